"""Checks of Bamba on rows cut into stretches, run on every rank: each computes the whole rows alone and compares loss, its logits and all gradients."""
import dataclasses
from functools import partial

import pytest
import terrazzo
import torch
import torch.distributed as dist
import transformers
from model_pairs import BLT
from ranks.experts import gathered, livened, our_dbrx
from ranks.sequence import LENGTHS, SHORT, stretch
from ranks.spawn import close, replaced
from terrazzo import distributed, models
from terrazzo.distributed import context_blt, context_model, context_parallel, full_tensor, reduce_gradients, tensor_parallel, volume
from tiny_models import make_config
from torch.distributed.fsdp import fully_shard

THIN = [1, 12, 1, 2]  # lengths of stretches, some of them of one position
HK, P = 2, 8  # key heads of the model below, and their channels


def our_bamba(**changes):
    torch.manual_seed(0)
    config = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=HK, attn_layer_indices=[1, 3],
                  mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=16, z_loss_coefficient=0.01)  # fmt: skip
    return livened(models.Bamba(models.BambaConfig(**config | changes)))


BACKENDS = ["reference", "cpu", "reference"]  # of one rank: in float64, and twice in the model's own dtype


def rows(total, batch=2, seed=0, unjudged=None):
    """ids and labels (batch, total); some labels don't count, among them, in the first row alone, the one behind a border."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (batch, total), generator=draw)
    labels = ids.masked_fill(torch.rand(batch, total, generator=draw) < 0.2, -100)
    if unjudged is not None:
        labels[:, unjudged] = -100
    if total > LENGTHS[0]:
        labels[0, LENGTHS[0]], labels[1:, LENGTHS[0]] = -100, ids[1:, LENGTHS[0]]
    return ids, labels


def hf_bamba():
    torch.manual_seed(0)
    cls, config = make_config("bamba")
    config.z_loss_coefficient = 0.01
    return livened(cls(config).train())


def exact(mesh, lengths=LENGTHS, make=our_bamba, bounds=None, wrap=reduce_gradients, unjudged=None, batch=2, shard=context_parallel):
    """Loss, logits and gradients against one rank's. bounds: of packed texts. unjudged: a slice of labels that don't count. shard: context_parallel, and
    what goes before or after it."""
    lengths = lengths[: mesh.size()]
    ids, labels = rows(sum(lengths), 1 if bounds else batch, unjudged=unjudged)
    options = {} if bounds is None else dict(cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    here = (slice(None), stretch(mesh, lengths))
    model = shard(make(), mesh)
    if wrap is not reduce_gradients:
        wrap(model)
    out = model(ids[here], labels=labels[here], **options)
    out.loss.backward()
    if wrap is reduce_gradients:
        reduce_gradients(model, mesh)
    expected = []
    for precision, backend in zip((torch.float64, torch.float32, torch.float32), BACKENDS):
        whole = make().to(precision)
        with terrazzo.use_backend(backend):
            want = whole(ids, labels=labels, **options)
            want.loss.backward()
        expected.append([want.loss, want.logits[here], *(p.grad if p.grad is not None else torch.zeros_like(p) for p in whole.parameters() if p.requires_grad)])
    names = ["loss", "logits", *(name for name, p in whole.named_parameters() if p.requires_grad)]
    logits = out.logits.full_tensor() if hasattr(out.logits, "full_tensor") else out.logits
    found = [out.loss, logits, *(full_tensor(model, name, p.grad) for name, p in model.named_parameters() if p.requires_grad)]
    for name, *values in zip(names, found, *expected, strict=True):
        close(name, *values)


def bamba(mesh):
    exact(mesh)
    exact(mesh, SHORT)
    exact(mesh, unjudged=slice(0, LENGTHS[0] + 1))  # none on the first rank
    exact(mesh, make=lambda: our_bamba(tie_word_embeddings=True, num_key_value_heads=4, mamba_n_groups=1, z_loss_coefficient=0.0))


def bamba_of_packed_texts(mesh):
    a, b, *_ = borders = torch.tensor(LENGTHS[: mesh.size()]).cumsum(0).tolist()
    total = borders[-1]
    for inner in ([], [a], [a - 4], [a - 1, a + 2], [2, 5, 5, a + 1, total - 1], borders[:-1], [a - 3, a, a, b - 1]):
        exact(mesh, bounds=[0, *inner, total])
    total = sum(THIN[: mesh.size()])
    for inner in ([1], [5], [1, 2, total - 1]):
        exact(mesh, THIN, bounds=[0, *inner, total])


def bamba_computed_again(mesh):
    def make():
        model = our_bamba()
        model.gradient_checkpointing = True
        return model.train()

    exact(mesh, make=make)


def bamba_of_transformers(mesh):
    """Against transformers' own code on whole rows; packed texts, which that refuses on a CPU, against each text alone."""
    exact(mesh, make=hf_bamba)
    exact(mesh, SHORT, make=hf_bamba)
    lengths = LENGTHS[: mesh.size()]
    total, here = sum(lengths), (slice(None), stretch(mesh, lengths))
    ids, bounds = rows(total, 1)[0], [0, lengths[0] - 3, lengths[0] + 2, total]
    found = context_parallel(hf_bamba(), mesh)(ids[here], cu_seqlens=torch.tensor(bounds, dtype=torch.int32)).logits
    texts = [ids[:, a:b] for a, b in zip(bounds, bounds[1:])]
    expected = [torch.cat([hf_bamba().to(dtype)(text).logits for text in texts], 1)[here] for dtype in (torch.float64, torch.float32)]
    close("packed", found, *expected)


def bamba_under_fsdp2(mesh):
    def wrap(model):
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)

    exact(mesh, wrap=wrap)


def data_beside_context(mesh):
    """Two groups of ranks with rows of their own, FSDP2 over all: the gradient of the mean of both losses."""
    plane = dist.init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("data", "context"))
    group, along = plane["data"].get_local_rank(), plane["context"]
    lengths = LENGTHS[: along.size()]
    model = context_parallel(our_bamba(), along)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    ids, labels = rows(sum(lengths), seed=group)
    here = (slice(None), stretch(along, lengths))
    logits, loss = model(ids[here], labels=labels[here])
    loss.backward()
    expected = []
    for precision, backend in zip((torch.float64, torch.float32, torch.float32), BACKENDS):
        whole = our_bamba().to(precision)
        with terrazzo.use_backend(backend):
            results = [whole(ids, labels=labels) for ids, labels in (rows(sum(lengths), seed=0), rows(sum(lengths), seed=1))]
            (sum(each.loss for each in results) / 2).backward()
        expected.append([results[group].loss, results[group].logits[here], *(p.grad for p in whole.parameters())])
    names = ["loss", "logits", *(name for name, _ in whole.named_parameters())]
    for name, *values in zip(names, [loss, logits, *(gathered(p) for p in model.parameters())], *expected, strict=True):
        close(name, *values)


# ---- tensor parallelism on the other dimension -------------------------------------------------------------------


def crossed():
    """{how: shard(model, the dimension of stretches)}, in both orders, and that dimension."""
    grid = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "tensor"))
    return grid["context"], {"first": lambda model, along: context_parallel(tensor_parallel(model, grid["tensor"]), along),
                             "then": lambda model, along: tensor_parallel(context_parallel(model, along), grid["tensor"])}  # fmt: skip


def tensor_and_context(mesh):
    """Heads, channels and words on one dimension, stretches of rows on the other: whole groups, a group over two ranks, packed texts, FSDP2 over the stretches."""
    along, orders = crossed()
    one_group = partial(our_bamba, vocab_size=96, mamba_n_groups=1, tie_word_embeddings=True)
    for make, bounds in ((partial(our_bamba, vocab_size=96), None), (one_group, [0, LENGTHS[0] - 4, LENGTHS[0] + 2, sum(LENGTHS[:2])])):
        for shard in orders.values():
            exact(along, make=make, bounds=bounds, shard=shard)
    exact(along, SHORT, make=one_group, shard=orders["first"])

    def wrap(model):
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=along)

    exact(along, make=one_group, shard=orders["first"], wrap=wrap)


def tensor_and_context_of_blt(mesh):
    along, orders = crossed()
    config = our_blt().config
    make = partial(our_blt, global_=dataclasses.replace(config.global_, num_key_value_heads=4), local_attention_window_len=70)
    for shard in orders.values():
        exact(along, BYTES, make=make, batch=1, shard=shard)


def plans_over_the_same_ranks(mesh):
    with pytest.raises(ValueError, match=r"context_parallel: mesh must cross that of distributed.tensor_parallel, ranks \[0, .*\], got ranks \[0, .*; take another"):
        context_parallel(tensor_parallel(our_bamba(vocab_size=96), mesh), mesh)
    with pytest.raises(ValueError, match=r"tensor_parallel: mesh must cross that of distributed.context_parallel, ranks \[0, .*\], got ranks \[0, .*; take another"):
        tensor_parallel(context_parallel(our_bamba(vocab_size=96), mesh), mesh)


# ---- BLT ---------------------------------------------------------------------------------------------------------

BYTES = [40, 33, 51, 38]  # lengths of stretches


def our_blt(**changes):
    torch.manual_seed(0)
    config = models.BltConfig.from_hf(transformers.BltConfig(**BLT).to_dict())
    model = models.Blt(dataclasses.replace(config, **{"max_patch_length": 6} | changes))
    if model.model.patcher is not None:
        livened(model.model.patcher)  # entropies on both sides of the threshold; it has no gradients
    return model


def blt(mesh):
    """Patches across borders, windows over several ranks, patches cut by entropy, by length and byte by byte; and many bytes a patch."""
    distributed.reset_traffic()
    for changes in ({}, {"local_attention_window_len": 70}, {"local_attention_window_len": None}, {"local_attention_window_len": 2, "patching_threshold": 9.0},
                    {"patching_mode": "byte"}, {"patching_threshold": 99.0}, {"patching_threshold": 3.0, "max_patch_length": 20}):
        exact(mesh, BYTES, make=lambda: our_blt(**changes), batch=1)
    moved = torch.tensor(distributed.traffic().get("bytes at borders", 0))
    dist.all_reduce(moved)
    assert moved >= 8 * 3  # at a threshold of 99 patches begin at 0, 1, 7, 13, ..., 43: not at 40


def blt_computed_again(mesh):
    def make():
        model = our_blt()
        model.gradient_checkpointing = True
        return model.train()

    exact(mesh, BYTES, make=make, batch=1)


def what_blt_loses_shows(mesh):
    """The comparison fails when what is behind a stretch doesn't come, when positions count from zero, when a stretch's first bytes ask no patch before it."""
    behind, span = context_blt.Part.behind, context_blt._Span.__init__

    def lost(purpose):
        return lambda self, tensor, dim, before, what: tensor if what == purpose else behind(self, tensor, dim, before, what)

    for purpose in ("keys and values", "hashed bytes", "patches at borders"):
        with replaced(context_blt.Part, "behind", lost(purpose)), pytest.raises(AssertionError, match="^loss"):
            exact(mesh, BYTES, make=our_blt, batch=1)

    def from_zero(self, part, stack, device):
        span(self, context_blt.Part(part.line, 0, [0, part.starts[part.place + 1] - part.starts[part.place]]), stack, device)
        self.part = part

    if mesh.size() > 1:
        with replaced(context_blt._Span, "__init__", from_zero), pytest.raises(AssertionError, match="^(loss|logits|model)"):
            exact(mesh, BYTES, make=our_blt, batch=1)


def bytes_of_blt(mesh):
    """What one call and its backward pass send: windows of keys, keys of all patches before, one patch, a few bytes; entropies to everyone."""
    rank, size = mesh.get_local_rank(), mesh.size()
    lengths, model = BYTES[:size], context_parallel(our_blt(patching_mode="byte"), mesh)
    ids, labels = rows(sum(lengths), 1)
    starts = [sum(lengths[:r]) for r in range(size + 1)]
    here, c = (slice(None), stretch(mesh, lengths)), model.config

    def travels(before, width):
        """Numbers forward and backward: what others see here, what of others is seen here."""
        sees = [max(0, start - before) for start in starts[:-1]]
        to = sum(max(0, starts[rank + 1] - max(sees[r], starts[rank])) for r in range(rank + 1, size))
        back = sum(max(0, starts[r + 1] - max(sees[rank], starts[r])) for r in range(rank))
        return width * to, width * back

    parts = ((c.encoder, c.local_attention_window_len - 1), (c.decoder, c.local_attention_window_len - 1), (c.global_, starts[-1]))
    passes = [travels(before, p.num_hidden_layers * volume.keys(1, p.num_key_value_heads or p.num_attention_heads, p.hidden_size // p.num_attention_heads, 1, 4))
              for p, before in parts]
    distributed.reset_traffic()
    loss = model(ids[here], labels=labels[here]).loss
    forward = {"keys and values": sum(to for to, _ in passes), "patches at borders": travels(1, 4 * c.global_.hidden_size)[0],
               "hashed bytes": travels(max(c.encoder_hash_byte_group_size) - 1, 8)[0]}  # every byte a patch: no border moves
    assert {name: distributed.traffic().get(name, 0) for name in forward} == forward
    assert distributed.traffic().get("bytes at borders", 0) == distributed.traffic().get("outputs at borders", 0) == 0
    loss.backward()
    assert distributed.traffic()["keys and values"] == sum(to + back for to, back in passes)
    assert distributed.traffic()["patches at borders"] == sum(travels(1, 4 * c.global_.hidden_size))


def bad_bytes(mesh):
    model, ids = context_parallel(our_blt(max_patch_length=None, patching_threshold=99.0), mesh), torch.arange(4, 24)[None]
    with pytest.raises(ValueError, match=r"input_ids of a Blt must be one row \(1, L\), got \(2, 20\)"):
        model(ids.expand(2, -1))
    with pytest.raises(ValueError, match="patch_lengths isn't taken by a Blt whose rows are sharded"):
        model(ids, patch_lengths=torch.tensor([[1, 19]]))
    with pytest.raises(ValueError, match="keeps no state and doesn't generate"):
        model.generate(ids, 2)
    with pytest.raises(ValueError, match="every stretch of a Blt's row must hold a whole patch, number 1, 20 bytes, holds none"):
        model(ids)


# ---- what would go unnoticed otherwise ---------------------------------------------------------------------------


def what_is_lost_shows(mesh):
    """The comparison fails when positions count from zero on every rank, when keys don't travel, when a border's label is lost."""
    positions = context_model.layers.positions_of
    with replaced(context_model.layers, "positions_of", lambda valid, L, past, *rest: positions(valid, L, 0, *rest)):
        with pytest.raises(AssertionError, match="^loss"):
            exact(mesh)
    with replaced(context_model.comm.Line, "transfer", lambda self, outgoing, incoming: [t.zero_() for t in incoming.values()]):
        with pytest.raises(AssertionError, match="^loss"):
            exact(mesh)
    with replaced(context_model.Stretch, "_reach", lambda self, bounds: vars(self).update(outgoing={}, incoming={}, head=0)):
        with pytest.raises(AssertionError, match="^loss"):
            exact(mesh)
    shift = context_model.comm.Line.shift

    def no_label(self, tensor, step, received=None):
        return received if self.purpose == "labels" else shift(self, tensor, step, received)

    with replaced(context_model.comm.Line, "shift", no_label):
        with pytest.raises(AssertionError, match="^loss"):
            exact(mesh)
    with replaced(context_model.Behind, "backward", staticmethod(lambda ctx, grad: (grad[..., -ctx.L :, :].contiguous(), None, None, None, None))):
        with pytest.raises(AssertionError, match="^model.embed_tokens"):  # forward all is right
            exact(mesh)


def keys_travel_once(mesh):
    """Keys and values go to the ranks on the right, gradients to those on the left: 2 B Hk P times the positions that are seen, times the element size."""
    rank, size = mesh.get_local_rank(), mesh.size()
    lengths = LENGTHS[:size]
    ids, labels = rows(sum(lengths), 1)
    here = (slice(None), stretch(mesh, lengths))
    model = context_parallel(our_bamba(), mesh)
    every = [sum(lengths[:r]) for r in range(size)]
    for bounds in ([0, sum(lengths)], [0, lengths[0] - 3, sum(lengths)], [0, *every[1:], sum(lengths)]):
        def seen(source, place):
            begin = max(b for b in bounds if b <= every[place])
            return max(0, every[source] + lengths[source] - max(every[source], begin))

        forward = sum(seen(rank, place) for place in range(rank + 1, size))
        backward = sum(seen(source, rank) for source in range(rank))
        distributed.reset_traffic()
        _, loss = model(ids[here], labels=labels[here], cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
        attentions = len(model.config.attn_layer_indices)
        assert distributed.volume.keys(1, HK, P, 3, 4) == 2 * 1 * HK * P * 3 * 4
        assert distributed.traffic().get("keys and values", 0) == attentions * distributed.volume.keys(1, HK, P, forward, 4)
        assert distributed.traffic()["stretch lengths"] == 4 * 8 * (size - 1)
        assert distributed.traffic().get("labels", 0) == 8 * (rank > 0)
        loss.backward()
        assert distributed.traffic().get("keys and values", 0) == attentions * distributed.volume.keys(1, HK, P, forward + backward, 4)


def bad_rows(mesh):
    rank = mesh.get_local_rank()
    with pytest.raises(TypeError, match="terrazzo.distributed.context_parallel: model must be a Bamba or Blt of terrazzo.models or transformers' BambaForCausalLM, got Dbrx"):
        context_parallel(our_dbrx(), mesh)
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh of one dimension, got NoneType"):
        context_parallel(our_bamba(), None)
    with pytest.raises(ValueError, match="every rank must pass the same model and arguments, got intermediate_size 48 on rank 0 and intermediate_size 64 on rank 1"):
        context_parallel(our_bamba(intermediate_size=48 if rank == 0 else 64), mesh)
    other = our_bamba()
    with torch.no_grad():
        other.lm_head.weight[:3] += rank
    with pytest.raises(ValueError, match=r"the same model and arguments, got lm_head.weight \(97, 32\) torch.float32 \w+ on rank 0 and lm_head"):
        context_parallel(other, mesh)
    with pytest.raises(ValueError, match="the same model and arguments, got terrazzo.models.bamba.Bamba on rank 0 and terrazzo.models.dbrx.Dbrx on rank 1"):
        context_parallel(our_bamba() if rank == 0 else our_dbrx(), mesh)  # of which one rank alone sees that it isn't served
    model = context_parallel(our_bamba(), mesh)
    with pytest.raises(ValueError, match="the rows of model must not be sharded yet"):
        context_parallel(model, mesh)
    ids = torch.arange(3, 12)[None]
    theirs = context_parallel(hf_bamba(), mesh)
    distributed.reset_traffic()
    with pytest.raises(ValueError, match="keeps no state and doesn't generate"):
        model.generate(ids, 3)
    with pytest.raises(ValueError, match="attention_mask must hide nothing"):
        model(ids, attention_mask=torch.arange(9)[None] > 2)
    with pytest.raises(ValueError, match=r"labels must be like input_ids = \(1, 9\), got \(1, 8\)"):
        model(ids, labels=ids[:, :8])
    with pytest.raises(TypeError, match="cu_seqlens must be int32, got int64"):
        model(ids, cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="keeps no state and doesn't generate"):
        theirs(ids, use_cache=True)
    with pytest.raises(ValueError, match="inputs_embeds isn't taken by a model whose rows are sharded"):
        theirs(ids, inputs_embeds=torch.zeros(1, 9, 32))
    with pytest.raises(ValueError, match="the rows of model must not be sharded yet"):
        context_parallel(theirs, mesh)
    assert distributed.traffic() == {}
    together = [  # what differs between ranks: raised on all of them, behind one exchange of numbers
        ("batches of input_ids must be the same on every rank", (ids.expand(1 + rank, -1),), {}),
        ("labels, or none, must be the same on every rank", (ids,), dict(labels=ids) if rank else {}),
        ("cu_seqlens must be the same on every rank", (ids,), dict(cu_seqlens=torch.tensor([0, 3 + rank, 9 * mesh.size()], dtype=torch.int32))),
        ("input_ids must hold at least one position on every rank, got none on number 1", (ids[:, : 9 * (rank != 1)],), {}),
        (f"cu_seqlens must start at 0 and end at {9 * mesh.size()}", (ids,), dict(cu_seqlens=torch.tensor([0, 9], dtype=torch.int32))),
    ]
    for told, args, options in together:
        with pytest.raises(ValueError, match=told):
            model(*args, **options)


BLT_CHECKS = ["blt", "blt_computed_again", "what_blt_loses_shows", "bytes_of_blt", "bad_bytes"]
CHECKS = [*BLT_CHECKS, "bamba", "bamba_of_packed_texts", "bamba_computed_again", "bamba_of_transformers", "bamba_under_fsdp2", "what_is_lost_shows",
          "keys_travel_once", "plans_over_the_same_ranks", "bad_rows"]  # fmt: skip
