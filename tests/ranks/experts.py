"""Checks of expert parallelism, run on every rank: each builds the whole model, computes alone what all ranks' tokens give, and compares its part."""
import copy
import sys
import time

import pytest
import terrazzo
import torch
import torch.distributed as dist
from ranks.spawn import close, replaced
from terrazzo import models
from terrazzo.distributed import comm, expert_parallel, reduce_gradients, reset_traffic, traffic, volume
from terrazzo.models.dbrx import AttentionConfig, DbrxConfig, Experts, FFNConfig
from tiny_models import make_config
from torch.distributed.fsdp import fully_shard

D, F, E, A = 16, 12, 8, 3
parallel = sys.modules["terrazzo.distributed.expert_parallel"]  # the function has the module's name


def gathered(parameter):
    """The whole gradient of a parameter, sharded or not."""
    grad = parameter.grad
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def our_layer(dtype=torch.float32, experts=E):
    torch.manual_seed(1)
    config = DbrxConfig(d_model=D, n_heads=2)
    config.ffn_config.ffn_hidden_size, config.ffn_config.moe_num_experts, config.ffn_config.moe_top_k = F, experts, A
    layer = Experts(config)
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter).mul_(0.3).to(dtype)
    return layer


def routed(rows, choose, dtype, seed):
    """x (T, D), indices and weights (T, A), all of them leaves; `choose` says which experts occur."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, D, generator=draw).to(dtype)
    indices = torch.stack([torch.tensor(choose)[torch.randperm(len(choose), generator=draw)[:A]] for _ in range(rows)]) if rows else torch.zeros(0, A, dtype=torch.long)
    weights = torch.rand(rows, A, generator=draw).to(dtype)
    dy = torch.randn(rows, D, generator=draw).to(dtype)
    return x.requires_grad_(), indices.to(torch.int32), weights.requires_grad_(), dy


# how many tokens each rank has, and the experts that they choose
SETTINGS = {
    "uneven": ([7, 13, 1, 5], range(E)),
    "a_rank_without_tokens": ([0, 9, 3, 0], range(E)),
    "nobody_has_tokens": ([0, 0, 0, 0], range(E)),
    "all_on_one_rank": ([5, 6, 7, 8], range(A)),
    "one_expert_without_tokens": ([11, 4, 2, 9], [0, 1, 3, 4, 5, 6, 7]),
    "sentinels": ([6, 10, 3, 4], [0, 3, 5, 6, 7, E, E + 1, E + 5]),
    "sentinels_alone": ([4, 8, 2, 2], [E, E + 1, E + 2]),
}


def layer_exact(mesh, setting, dtype=torch.float32, chunks=1):
    """Output, gradients of tokens, routing weights and experts, against all ranks' tokens in one call on one rank."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    sizes, choose = SETTINGS[setting]
    calls = [routed(sizes[r], list(choose), dtype, r) for r in range(ranks)]
    x, indices, weights, dy = calls[rank]
    layer = expert_parallel(our_layer(dtype), mesh, chunks=chunks)
    y = layer(x, indices, weights)
    y.backward(dy)
    expected = []
    for precision in (torch.float64, dtype):
        whole = our_layer(dtype).to(precision)
        leaves = [tuple(t.detach().to(precision).requires_grad_() for t in (call[0], call[2])) for call in calls]
        joined = (torch.cat([a for a, _ in leaves]), torch.cat([call[1] for call in calls]), torch.cat([b for _, b in leaves]))
        with terrazzo.use_backend("reference"):
            out = whole(*joined)
        out.backward(torch.cat([call[3] for call in calls]).to(precision))
        begin = sum(sizes[:rank])
        results = [out[begin : begin + sizes[rank]], *(t.grad for t in leaves[rank])]
        weights_grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in whole.parameters()]
        expected.append([*results, *weights_grads])
    found = [y, x.grad, weights.grad, *(gathered(p) for p in layer.parameters())]
    for name, *values in zip(("y", "dx", "dweights", "dw1", "dv1", "dw2"), found, *expected):
        close(name, *values)


def uneven(mesh):
    layer_exact(mesh, "uneven")


def a_rank_without_tokens(mesh):
    layer_exact(mesh, "a_rank_without_tokens")


def nobody_has_tokens(mesh):
    layer_exact(mesh, "nobody_has_tokens")


def all_on_one_rank(mesh):
    layer_exact(mesh, "all_on_one_rank")


def one_expert_without_tokens(mesh):
    layer_exact(mesh, "one_expert_without_tokens")


def sentinels(mesh):
    layer_exact(mesh, "sentinels")


def sentinels_alone(mesh):
    layer_exact(mesh, "sentinels_alone")


def chunked(mesh):
    for setting in SETTINGS:
        layer_exact(mesh, setting, chunks=3)


def float64_and_bfloat16(mesh):
    layer_exact(mesh, "uneven", torch.float64)
    layer_exact(mesh, "uneven", torch.bfloat16, chunks=2)


def a_swapped_expert_shows(mesh):
    """The comparison above fails when two experts of the sharded layer change places."""
    layer = our_layer()
    expert_parallel(layer, mesh)
    local = layer.mlp.w1.to_local()
    with torch.no_grad():
        local.copy_(torch.cat([local[F : 2 * F], local[:F], local[2 * F :]]))
    x, indices, weights, _ = routed(9, list(range(E)), torch.float32, 0)
    whole = our_layer()
    with pytest.raises(AssertionError, match="max error"):
        close("y", layer(x, indices, weights), copy.deepcopy(whole).double()(x.double(), indices, weights.double()), whole(x, indices, weights))


# ---- whole models ------------------------------------------------------------------------------------------------


def model_exact(mesh, make, loss_of, chunks=1):
    """Loss and all gradients of a model on uneven batches, against the mean of the ranks' losses on one rank."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    batches = [torch.randint(3, 60, (1 + r % 2, 9 + 4 * r), generator=torch.Generator().manual_seed(r)) for r in range(ranks)]
    model = expert_parallel(make(), mesh, chunks=chunks)
    loss, logits = loss_of(model, batches[rank])
    loss.backward()
    reduce_gradients(model, mesh)
    expected = []
    for dtype in (torch.float64, torch.float32):
        whole = make().to(dtype)
        results = [loss_of(whole, ids) for ids in batches]
        (sum(each for each, _ in results) / ranks).backward()
        expected.append([results[rank][0], results[rank][1], *(p.grad for p in whole.parameters())])
    names = ["loss", "logits", *(name for name, _ in model.named_parameters())]
    for name, *values in zip(names, [loss, logits, *(gathered(p) for p in model.parameters())], *expected, strict=True):
        close(name, *values)


def livened(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 3 if parameter.dim() > 1 else parameter.data + 0.1 * torch.randn_like(parameter)
    return model


def our_dbrx():
    torch.manual_seed(0)
    ffn = FFNConfig(ffn_hidden_size=24, moe_num_experts=8, moe_top_k=3, moe_loss_weight=0.05)
    attn = AttentionConfig(kv_n_heads=2, clip_qkv=8.0)
    return livened(models.Dbrx(DbrxConfig(d_model=32, n_heads=4, n_layers=3, vocab_size=97, attn_config=attn, ffn_config=ffn)))


def hf(model_type):
    torch.manual_seed(0)
    cls, config = make_config(model_type)
    model = livened(cls(config))
    if model_type != "dbrx":
        model.set_experts_implementation("eager")  # the one of transformers' that takes float64
    return model


def our_loss(model, ids):
    out = model(ids, labels=ids, output_router_logits=True)
    return out.loss, out.logits


def hf_loss(model, ids):
    out = model(ids, labels=ids, use_cache=False)
    return out.loss, out.logits


def dbrx_of_ours(mesh):
    model_exact(mesh, our_dbrx, our_loss)
    model_exact(mesh, our_dbrx, our_loss, chunks=2)


def dbrx_of_transformers(mesh):
    model_exact(mesh, lambda: hf("dbrx"), hf_loss)


def mixtral(mesh):
    model_exact(mesh, lambda: hf("mixtral"), hf_loss)


def gpt_oss(mesh):
    """Transposed interleaved weights with biases."""
    model_exact(mesh, lambda: hf("gpt_oss"), hf_loss, chunks=2)


def gradient_checkpointing(mesh):
    def make():
        model = our_dbrx()
        model.gradient_checkpointing = True
        return model.train()

    model_exact(mesh, make, our_loss)


def state_dict_is_the_whole_model(mesh):
    """torch.distributed.checkpoint's full state dict of a sharded model is the one of the model before."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    before = {name: value.clone() for name, value in our_dbrx().state_dict().items()}
    model = expert_parallel(our_dbrx(), mesh)
    sharded = model.transformer.blocks[0].ffn.experts.mlp.w1
    assert sharded.to_local().shape[0] == sharded.shape[0] // mesh.size()
    after = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def an_optimiser_step(mesh):
    """AdamW on the sharded model moves every weight as it does on one rank."""
    ids = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(9))
    model, whole = expert_parallel(our_dbrx(), mesh), our_dbrx()
    for each in (model, whole):
        our_loss(each, ids)[0].backward()
        if each is model:
            reduce_gradients(model, mesh)
        torch.optim.AdamW(each.parameters(), lr=0.01, eps=1e-3).step()
    for (name, found), expected in zip(model.named_parameters(), whole.parameters()):
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-6, msg=name)


def fsdp2_beside_it(mesh):
    """FSDP2 shards what isn't experts; its gradients are means over ranks, the experts' are sums."""
    model = expert_parallel(our_dbrx(), mesh)
    experts = {p for name, p in model.named_parameters() if ".experts." in name}
    for block in (*model.transformer.blocks, model):
        fully_shard(block, mesh=mesh, ignored_params=experts)
    under_fsdp2(model, mesh, mesh)


def experts_and_data(mesh):
    """On a mesh of two by two: experts over one dimension, each of them under FSDP2 over the other, all else under FSDP2 over all ranks."""
    grid = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "experts"))
    model = expert_parallel(our_dbrx(), grid["experts"])
    for block in model.transformer.blocks:
        fully_shard(block.ffn.experts, mesh=grid["data"])
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    w1 = model.transformer.blocks[0].ffn.experts.mlp.w1
    assert w1.to_local().numel() * 4 == w1.numel()
    under_fsdp2(model, mesh, grid["experts"])


def under_fsdp2(model, mesh, along):
    """Loss and gradients of every rank's own batch; an expert's are sums over `along`."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    batches = [torch.randint(3, 60, (2, 9 + 4 * r), generator=torch.Generator().manual_seed(r)) for r in range(ranks)]
    loss, _ = our_loss(model, batches[rank])
    loss.backward()
    expected = []
    for dtype in (torch.float64, torch.float32):
        whole = our_dbrx().to(dtype)
        results = [our_loss(whole, ids)[0] for ids in batches]
        (sum(results) / ranks).backward()
        expected.append([results[rank], *(p.grad for p in whole.parameters())])
    found = [loss, *(gathered(p) / (along.size() if ".experts." in name else 1) for name, p in model.named_parameters())]
    for name, *values in zip(["loss", *(name for name, _ in model.named_parameters())], found, *expected, strict=True):
        close(name, *values)


# ---- bytes -------------------------------------------------------------------------------------------------------


def bytes_are_the_formula(mesh):
    """Forward: counts, and twice the rows for other ranks; backward: the rows twice again, the other way."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    sizes, choose = SETTINGS["uneven"]
    calls = [routed(sizes[r], list(choose), torch.float32, r) for r in range(ranks)]
    x, indices, weights, dy = calls[rank]
    here = E // ranks
    owners = [call[1].flatten() // here for call in calls]
    leaving = int((owners[rank] != rank).sum())
    arriving = sum(int((owners[r] == rank).sum()) for r in range(ranks) if r != rank)
    layer = expert_parallel(our_layer(), mesh, chunks=2)
    reset_traffic()
    y = layer(x, indices, weights)
    counts, out, back = volume.expert_counts(E, ranks, chunks=2), volume.expert_rows(leaving, D, 4), volume.expert_rows(arriving, D, 4)
    assert (counts, out) == (4 * (ranks - 1) * 2 * here, 4 * D * leaving)
    assert traffic() == {"expert counts": counts, "expert dispatch": out, "expert combine": back}
    y.backward(dy)
    assert traffic() == {"expert counts": counts, "expert dispatch": out + back, "expert combine": back + out}


# ---- one chunk travels while another is computed -----------------------------------------------------------------


def the_next_chunk_travels_meanwhile(mesh):
    """The order of events: while a chunk is computed, forward and backward, the rows of another have been sent and are not waited for; and they arrive."""
    chunks, events, open_ = 4, [], {}
    order, begin, end, compute = {}, comm.Exchange.begin, comm.Exchange.end, parallel._run

    def begins(self, rows, back=False):
        if self.purpose == "expert dispatch":
            events.append(("sent", order.setdefault(self, len(order)), back))
            received = begin(self, rows, back)
            open_[order[self]] = self.open[0]
            return received
        return begin(self, rows, back)

    def ends(self):
        if self in order:
            events.append(("waited", order[self], events.count(("sent", order[self], True)) > 0))
        return end(self)

    def computes(layer, view, weights, rows, counts):
        i = sum(kind == "computed" and not back for kind, _, back in events)
        if i + 1 < chunks:  # nobody has waited for them, and they come: the transfer needs no one's help
            deadline = time.monotonic() + 20
            while not open_[i + 1].is_completed():
                assert time.monotonic() < deadline, f"the rows of chunk {i + 1} don't arrive while chunk {i} is computed"
                time.sleep(0.001)
        events.append(("computed", i, False))
        y = compute(layer, view, weights, rows, counts)
        y.register_hook(lambda grad: events.append(("computed", i, True)))
        return y

    layer = expert_parallel(our_layer(), mesh, chunks=chunks)
    x, indices, weights, dy = routed(20, list(range(E)), torch.float32, mesh.get_local_rank())
    with replaced(comm.Exchange, "begin", begins), replaced(comm.Exchange, "end", ends), replaced(parallel, "_run", computes):
        layer(x, indices, weights).backward(dy)
    at = {event: place for place, event in enumerate(events)}
    assert len(at) == len(events) == 6 * chunks
    for i in range(chunks - 1):
        for back in (False, True):
            assert at["sent", i + 1, back] < at["computed", i, back] < at["waited", i + 1, back], (i, back, events)
    alone = expert_parallel(our_layer(), mesh)
    order.clear(), events.clear()
    with replaced(comm.Exchange, "begin", begins), replaced(comm.Exchange, "end", ends):
        alone(x, indices, weights)
    assert events == [("sent", 0, False), ("waited", 0, False)]


# ---- bad input ---------------------------------------------------------------------------------------------------


def experts_that_do_not_divide(mesh):
    """Raised on every rank, before anything but descriptions of the models travels."""
    reset_traffic()
    with pytest.raises(ValueError, match=rf"distributed.expert_parallel: the {mesh.size()} ranks of mesh must divide the 7 experts of Experts"):
        expert_parallel(our_layer(experts=7), mesh)
    assert not traffic()


def models_that_differ(mesh):
    """Raised on every rank, where one alone would have found something too."""
    first = mesh.get_local_rank() == 0
    for other in (16, 7):
        with pytest.raises(ValueError, match=rf"every rank must pass the same model and arguments, got mlp.w1 \({8 * F}, .* on rank 0 and mlp.w1 \({other * F}, .* on rank 1"):
            expert_parallel(our_layer(experts=8 if first else other), mesh)
    with pytest.raises(ValueError, match="every rank must pass the same model and arguments, got chunks 2 on rank 0 and chunks 3 on rank 1"):
        expert_parallel(our_layer(), mesh, chunks=2 if first else 3)
    layer = our_layer()
    layer.mlp.w2.data *= 1 if first else 1.01
    with pytest.raises(ValueError, match="got mlp.w2 .* on rank 0 and mlp.w2 .* on rank 1"):
        expert_parallel(layer, mesh)


def other_bad_input(mesh):
    with pytest.raises(ValueError, match="Linear has no experts that can be sharded"):
        expert_parallel(torch.nn.Linear(4, 4), mesh)
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh of one dimension, got NoneType"):
        expert_parallel(our_layer(), None)
    with pytest.raises(ValueError, match="mesh must have one dimension, got 2"):
        expert_parallel(our_layer(), dist.init_device_mesh("cpu", (mesh.size(), 1)))
    with pytest.raises(ValueError, match="chunks must be an integer of at least 1, got 0"):
        expert_parallel(our_layer(), mesh, chunks=0)
    layer = expert_parallel(our_layer(), mesh)
    with pytest.raises(ValueError, match="the experts of Experts must not be sharded yet"):
        expert_parallel(layer, mesh)
    with pytest.raises(ValueError, match=r"top_k_weights must be like top_k_index = \(5, 3\), got \(4, 3\)"):
        layer(torch.randn(5, D), torch.zeros(5, A, dtype=torch.int32), torch.rand(4, A))


LAYER = ["uneven", "a_rank_without_tokens", "nobody_has_tokens", "all_on_one_rank", "one_expert_without_tokens", "sentinels", "sentinels_alone", "chunked",
         "float64_and_bfloat16", "a_swapped_expert_shows", "bytes_are_the_formula", "the_next_chunk_travels_meanwhile", "experts_that_do_not_divide", "models_that_differ", "other_bad_input"]  # fmt: skip
MODELS = ["dbrx_of_ours", "dbrx_of_transformers", "mixtral", "gpt_oss", "gradient_checkpointing", "state_dict_is_the_whole_model", "an_optimiser_step", "fsdp2_beside_it"]
