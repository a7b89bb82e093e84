"""What the ranks of a tensor-parallel group sum and collect, forward and backward, and the bytes that it takes.

Every rank holds the same activations but inside a region, where each has some heads or channels of its own. A region is entered (gradients are summed)
and left (outputs are summed). Bytes are those of ring algorithms over R ranks: a sum of n bytes sends 2 (R - 1) / R n from each rank, a collection of
pieces of n bytes (R - 1) n, and so does its gradient where that is a sum. Sums have the same bits on every rank.
"""
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from . import comm

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renames them
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks:
    """The ranks of a mesh of one dimension."""

    def __init__(self, mesh):
        self.group, self.place, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()

    def __deepcopy__(self, memo):
        return self

    def own(self, number):
        """(begin, end) of this rank's share of so many rows: as DTensors have it, fewer on the last ranks where the ranks don't divide them."""
        width = -(-number // self.size)
        return min(number, self.place * width), min(number, (self.place + 1) * width)

    def _call(self, purpose, sent, collective, *tensors, **options):
        comm._sent[purpose] += sent
        with comm.explained(purpose, self.group):
            collective(*tensors, group=self.group, **options)

    def sum(self, tensor, purpose, op=dist.ReduceOp.SUM):
        """A new tensor: the sum over ranks, or their maximum."""
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            self._call(purpose, 2 * (self.size - 1) * tensor.nbytes // self.size, dist.all_reduce, tensor, op=op)
        return tensor

    def collect(self, tensor, purpose):
        """(..., n) of each rank -> (..., R n)."""
        if self.size == 1:
            return tensor
        pieces = tensor.new_empty(self.size, *tensor.shape)
        self._call(purpose, (self.size - 1) * tensor.nbytes, _all_gather, pieces.flatten(0, 1), tensor.contiguous())
        return pieces.movedim(0, -2).flatten(-2)

    def sum_and_deal(self, tensor, purpose):
        """(..., R n) -> (..., n): this rank's piece of the sum."""
        if self.size == 1:
            return tensor
        pieces = tensor.unflatten(-1, (self.size, -1)).movedim(-2, 0).contiguous()
        mine = torch.empty_like(pieces[0])
        self._call(purpose, (self.size - 1) * mine.nbytes, _reduce_scatter, mine, pieces.flatten(0, 1))
        return mine


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks, purpose):
        ctx.ranks, ctx.purpose = ranks, purpose
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.ranks.sum(grad, ctx.purpose), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, ranks, purpose):
        return ranks.sum(y, purpose)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks, purpose):
        ctx.ranks, ctx.purpose = ranks, purpose
        return ranks.sum(x, purpose)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.ranks.sum(grad, ctx.purpose), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks, purpose, differ):
        ctx.ranks, ctx.purpose, ctx.differ = ranks, purpose, differ
        return ranks.collect(x, purpose)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.differ:
            return ctx.ranks.sum_and_deal(grad, ctx.purpose), None, None, None
        return grad.chunk(ctx.ranks.size, -1)[ctx.ranks.place], None, None, None


@torch.compiler.disable
def enter(x, ranks, purpose):
    """x, which is the same on every rank; each rank's part of its gradient is summed."""
    return _Enter.apply(x, ranks, purpose)


@torch.compiler.disable
def leave(y, ranks, purpose):
    """The sum of the ranks' parts; the gradient, which is the same on every rank, goes to each part."""
    return _Leave.apply(y, ranks, purpose)


@torch.compiler.disable
def sum_of_all(x, ranks, purpose):
    """The sum of the ranks' parts, which each rank goes on with in its own way: gradients are summed too."""
    return _Sum.apply(x, ranks, purpose)


@torch.compiler.disable
def collect(x, ranks, purpose, differ):
    """(..., n) of each rank -> (..., R n). differ: what the ranks do with it differs, and so do their gradients, which are summed."""
    return _Collect.apply(x, ranks, purpose, differ)


# ---- a vocabulary in pieces --------------------------------------------------------------------------------------


class _Judge(torch.autograd.Function):
    """logits (T, V / R) of this rank's words, of which the first is number `begin`, labels (T,) of the whole vocabulary -> in float32 (or 64) their
    log-sum-exp (T,), and the label's logit, 0 where the label isn't one. No rank sees another's logits."""

    @staticmethod
    def forward(ctx, logits, labels, begin, ranks, purpose):
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        top = ranks.sum(z.amax(-1), purpose, dist.ReduceOp.MAX)
        here = labels - begin
        mine = (here >= 0) & (here < z.shape[1])
        here = torch.where(mine, here, 0)[:, None]
        chosen = torch.where(mine, z.gather(1, here)[:, 0], 0)
        sums, chosen = ranks.sum(torch.stack([(z - top[:, None]).exp().sum(-1), chosen]), purpose)
        whole = sums.log() + top
        ctx.save_for_backward(logits, whole, here, mine)
        return whole, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx, dwhole, dchosen):
        logits, whole, here, mine = ctx.saved_tensors
        dz = (logits.to(whole.dtype) - whole[:, None]).exp_().mul_(dwhole[:, None])
        dz.scatter_add_(1, here, torch.where(mine, dchosen, 0)[:, None])
        return dz.to(logits.dtype), None, None, None, None


@torch.compiler.disable
def judge(logits, labels, begin, ranks, purpose):
    return _Judge.apply(logits, labels, begin, ranks, purpose)
