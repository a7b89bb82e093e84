"""A model whose rows lie in stretches on the ranks of a mesh, in order.

Convolutions and scans look back by halos and states (context_parallel.py). In attention a stretch's queries see keys before it: each rank gets them from the
ranks on its left, those of its first text alone where texts are packed, and gives their gradients back. So a rank holds the keys of the row up to its end
while a layer attends; no mask of them where flash attention runs. The loss is the whole row's on every rank; what flows back on a rank is its own share of it.
"""
import zlib
from bisect import bisect_right
from functools import partial
from itertools import accumulate

import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from .. import checks
from ..models import bamba, blt, layers
from ..patching import patch
from . import comm
from .context_parallel import causal_conv1d_fn, mamba_chunk_scan_combined

FN = "distributed.context_parallel"


def context_parallel(model, mesh):
    """Lets a model run on rows that are cut into stretches over the ranks of a mesh, in place. Every rank calls it, and then the model, together.

    Args:
        model: a `terrazzo.models.Bamba` or `Blt`, or transformers' BambaForCausalLM (which is also patched, see `terrazzo.patch`), the same on every rank;
            its weights stay whole (FSDP2 may shard them, over the same mesh or a larger one).
        mesh: a DeviceMesh of one dimension, its ranks in the order of the stretches.

    Returns:
        model. Calls then take
            input_ids, labels: (B, L), this rank's stretch of each row, as they would stand in the whole row; L >= 1 may differ between ranks.
            cu_seqlens (not Blt): the bounds of the texts packed into the whole row, the same on every rank; they need not lie on ranks' borders.
        and return the logits of the stretch, and as loss that of the whole row, the same on every rank. After backward a parameter's gradient is that
        of the stretch's share in the loss, times the number of ranks: the mean over ranks, by `reduce_gradients` or FSDP2, is the gradient of the loss.
        attention_mask, state or cache (and so generation) are refused. A Blt takes one row, B = 1, of which every stretch holds a whole patch.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or models differ between ranks; before anything else travels, on every rank.
        RuntimeError, in a call: another rank failed.
    """
    group, _, _ = comm.check_mesh(FN, mesh)
    comm.agree(FN, group, model, lambda: _check_model(model, mesh))
    comm.claim(FN, model, mesh)
    if isinstance(model, bamba.Bamba):
        model.context = partial(_context, mesh)
    elif isinstance(model, blt.Blt):
        from .context_blt import forward

        _swap(model, mesh, forward)
    else:
        _patch_transformers(model)
        _swap(model, mesh, _forward)
    return model


def _swap(model, mesh, forward):
    """The model's forward becomes `forward`, which finds (mesh, the one before) in model._context_parallel."""
    cls = type(model)
    object.__setattr__(model, "_context_parallel", (mesh, cls.forward))
    model.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "forward": forward})


def _context(mesh, config, input_ids, labels, state, valid, cu_seqlens, dtype):
    """What terrazzo.models.bamba.Context is for whole rows."""
    stretch = Stretch(mesh, input_ids, labels, state, valid, cu_seqlens)
    stretch.turns = layers.rotations(stretch.positions, config.hidden_size // config.num_attention_heads // 2, config.rope_theta, dtype)
    return stretch


class Stretch:
    """A call of which this rank has the positions starts[place] to starts[place + 1] of the rows; positions: (1, L), counted in each text."""

    valid = None

    def __init__(self, mesh, input_ids, labels, state, valid, cu_seqlens):
        self.mesh, self.labels = mesh, labels
        _check(input_ids, labels, state, valid, cu_seqlens)
        (self.group, self.place, self.size), device = comm.check_mesh(FN, mesh), input_ids.device
        self.line = partial(comm.Line, self.group, self.place, self.size)
        bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        found = self.line("stretch lengths").numbers(_describe(input_ids, labels, bounds, self.place), device)
        _check_ranks(found, cu_seqlens)
        B, L = input_ids.shape
        self.starts = [0, *accumulate(each[1] for each in found)]
        self.numbers, self.counted = B * self.starts[-1], sum(each[2] for each in found)
        start = self.starts[self.place]
        self._reach(bounds or [0, self.starts[-1]])
        self.positions = layers.positions_of(None, L, start, cu_seqlens, device)
        self.seq_idx = self.mask = None
        if cu_seqlens is not None:
            self.seq_idx = layers.text_of(cu_seqlens, start, L)[None].int()
            self.mask = (cu_seqlens - start).clamp(0, L)
        if labels is not None:
            self.after = self.line("labels").shift(labels[:, 0], -1, torch.full_like(labels[:, 0], layers.IGNORED))

    def _reach(self, bounds):
        """Where keys travel, and head: how many positions here belong to the text that reaches in from the left."""
        first = [bounds[bisect_right(bounds, start) - 1] for start in self.starts[:-1]]  # where the text begins that a stretch begins in

        self.outgoing, self.incoming = reach(self.starts, self.place, first)
        start, stop = self.starts[self.place], self.starts[self.place + 1]
        self.head = min(bounds[bisect_right(bounds, start)], stop) - start

    def attend(self, q, k, v, dropout):
        """As layers.attend: q (B, H, L, P), k and v (B, Hk, L, P) -> (B, L, H * P)."""
        if dropout and self.mask is not None:  # on every rank, not only where a text begins
            raise NotImplementedError("terrazzo.distributed: attention dropout over packed texts is not supported; set it to 0")
        k, v = Behind.apply(torch.stack([k, v]), 3, self.line("keys and values"), self.outgoing, self.incoming).unbind()
        behind, head, L = k.shape[2] - q.shape[2], self.head, q.shape[2]
        if not behind:
            return layers.attend(q, k, v, layers.Mask(None, self.mask), dropout=dropout)
        end = behind + head
        y = layers.attend(q[:, :, :head], k[:, :, :end], v[:, :, :end], layers.Mask(causal_lower_right(head, end)), dropout=dropout)
        if head == L:
            return y
        own = layers.Mask(None, (self.mask - head).clamp(min=0))
        return torch.cat([y, layers.attend(q[:, :, head:], k[:, :, end:], v[:, :, end:], own, dropout=dropout)], 1)

    def convolve(self, x, weight, bias):
        return causal_conv1d_fn(x, weight, bias, self.seq_idx, activation="silu", mesh=self.mesh)

    def scan(self, *args, **options):
        return mamba_chunk_scan_combined(*args, **options, seq_idx=self.seq_idx, mesh=self.mesh)

    def loss(self, logits, z):
        """The whole rows' loss; what flows back is this stretch's share of it, times the ranks."""
        labels = torch.cat([self.labels[:, 1:], self.after[:, None]], 1)
        here = int((labels != layers.IGNORED).sum())
        if here:
            share = layers.cross_entropy(logits.float(), labels) * (here / self.counted)
        else:  # the mean of none is no number
            share = layers.logsumexp(logits.float()).sum() * 0
        if z > 0:
            share = share + z / self.numbers * layers.logsumexp(logits).to(share.dtype).square().sum()
        return self.line("loss").total(share) + self.size * (share - share.detach())


def reach(starts, place, first):
    """Which positions of rank `place` others see, and it of others, where rank r has starts[r] to starts[r + 1] and sees from first[r] on:
    outgoing {rank on the right: position in the stretch from which on it sees}, incoming {rank on the left: how many of its last positions are seen}."""

    def seen(source, at):
        return max(0, starts[source + 1] - max(first[at], starts[source]))

    L = starts[place + 1] - starts[place]
    outgoing = {to: L - n for to in range(place + 1, len(starts) - 1) if (n := seen(place, to))}
    return outgoing, {source: n for source in range(place) if (n := seen(source, place))}


class Behind(torch.autograd.Function):
    """A tensor of this stretch's positions along `dim` -> with those before it that are seen here in front."""

    @staticmethod
    def forward(ctx, own, dim, line, outgoing, incoming):
        ctx.dim, ctx.line, ctx.outgoing, ctx.incoming, ctx.L = dim, line, outgoing, incoming, own.shape[dim]
        found = {source: own.new_empty(*own.shape[:dim], n, *own.shape[dim + 1 :]) for source, n in incoming.items()}
        line.transfer({to: own.narrow(dim, begin, ctx.L - begin) for to, begin in outgoing.items()}, found)
        return torch.cat([*found.values(), own], dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dim, L = ctx.dim, ctx.L
        *theirs, own = grad.split([*ctx.incoming.values(), L], dim)
        found = {to: grad.new_empty(*grad.shape[:dim], L - begin, *grad.shape[dim + 1 :]) for to, begin in ctx.outgoing.items()}
        ctx.line.transfer(dict(zip(ctx.incoming, theirs)), found)
        own = own.to(torch.promote_types(own.dtype, torch.float32), copy=True)
        for to, begin in ctx.outgoing.items():
            own.narrow(dim, begin, L - begin).add_(found[to])
        return own.to(grad.dtype), None, None, None, None


# ---- transformers' Bamba -----------------------------------------------------------------------------------------

ATTENTION = "terrazzo_context_parallel"


def _is_transformers(model):
    names = {(cls.__module__, cls.__name__) for cls in type(model).__mro__}
    return ("transformers.models.bamba.modeling_bamba", "BambaForCausalLM") in names


def _patch_transformers(model):
    """Its own forward runs, patched; what a call knows of its stretch goes down to convolutions, scans and attention as a keyword of theirs."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    patch(model, ops=["causal_conv1d_fn", "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"])
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
    model.set_attn_implementation(ATTENTION)


def _attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, stretch=None, **kwargs):
    return stretch.attend(query, key, value, dropout), None


def _forward(self, input_ids, attention_mask=None, labels=None, cu_seqlens=None, use_cache=False, logits_to_keep=0, **others):
    mesh, forward = self._context_parallel
    for name in sorted(name for name, value in others.items() if value is not None and name != "return_dict"):
        checks.fail(FN, f"{name} isn't taken by a model whose rows are sharded; it takes input_ids, labels and cu_seqlens, and returns logits and loss")
    layers.check_ids(FN, "input_ids", input_ids, self.config.vocab_size)
    valid = layers.check_valid(FN, attention_mask, *input_ids.shape)
    stretch = Stretch(mesh, input_ids, labels, use_cache or None, valid, cu_seqlens)
    out = forward(self, input_ids, position_ids=stretch.positions, use_cache=False, logits_to_keep=logits_to_keep, stretch=stretch)
    if labels is not None:
        out.loss = stretch.loss(out.logits, self.z_loss_coefficient)
    return out


# ---- arguments ---------------------------------------------------------------------------------------------------


def _check_model(model, mesh):
    if not isinstance(model, (bamba.Bamba, blt.Blt)) and not _is_transformers(model):
        checks.fail(FN, f"model must be a Bamba or Blt of terrazzo.models or transformers' BambaForCausalLM, got {type(model).__name__}; for other models there "
                        "are distributed.causal_conv1d_fn and mamba_chunk_scan_combined", TypeError)
    if FN in getattr(model, "_ranks_of_plans", {}):
        checks.fail(FN, "the rows of model must not be sharded yet, they are; load the model anew")
    comm.check_claims(FN, model, mesh)


def _check(input_ids, labels, state, valid, cu_seqlens):
    """What a rank sees alone."""
    if state is not None:
        checks.fail(FN, "a model whose rows are sharded keeps no state and doesn't generate; use one that isn't sharded")
    if valid is not None:
        checks.fail(FN, "attention_mask must hide nothing in a model whose rows are sharded; pad on the right with labels of -100, or pack texts by cu_seqlens")
    checks.check_optional(FN, "labels", labels, tuple(input_ids.shape), "like input_ids", input_ids, dtypes=(torch.int64,))
    if cu_seqlens is not None:
        checks.check_tensor(FN, "cu_seqlens", cu_seqlens, 1, "(texts + 1,)", input_ids, dtypes=(torch.int32,))


def _describe(input_ids, labels, bounds, place):
    """What ranks tell each other of a call: B, L, labels that count (-1: no labels), a checksum of cu_seqlens (-1: none)."""
    judged = None if labels is None else labels[:, int(place == 0) :]  # nothing stands before a row's first label
    counted = -1 if judged is None else int((judged != layers.IGNORED).sum())
    return [*input_ids.shape, counted, -1 if bounds is None else zlib.crc32(repr(bounds).encode())]


def _check_ranks(found, cu_seqlens):
    """What all ranks see of all, and so raise together."""
    names = ("batches of input_ids", "", "labels, or none,", "cu_seqlens")
    for rank, each in enumerate(found):
        for i in (0, 2, 3):
            same = each[i] == found[0][i] if i != 2 else (each[i] < 0) == (found[0][i] < 0)
            if not same:
                checks.fail(FN, f"{names[i]} must be the same on every rank, they differ between the first and number {rank}")
        if each[1] == 0:
            checks.fail(FN, f"input_ids must hold at least one position on every rank, got none on number {rank}")
    if cu_seqlens is not None:
        checks.check_cu_seqlens(FN, cu_seqlens.cpu(), found[0][0], sum(each[1] for each in found), cu_seqlens.cpu())
