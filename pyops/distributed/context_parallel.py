"""Context parallelism: each rank holds a stretch of every sequence, the ranks of a mesh in order.

Convolution: the W - 1 inputs before a stretch come from the left neighbour. Scan: a stretch turns the state S that comes in into a S + R, where a is
its total decay and R its final state from zero. Each rank computes a and R by one matrix product; states then go from rank to rank, one hop each, and
with the state that came in the scan itself runs, all ranks at once:

    R = sum over t of exp(dt A summed behind t) dt x B,   a = exp(dt A summed),   S of rank r + 1 = a S of rank r + R

Gradients of states and halos go the same way back. What travels does not grow with the stretch. Source: Dao & Gu (2024), section 8.2.
"""
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .. import causal_conv1d as conv
from .. import chunk_scan as scan
from .. import checks
from . import comm


@torch.compiler.disable
def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, return_final_states=False, activation=None, *, mesh, backend=None):
    """`terrazzo.causal_conv1d_fn` of sequences whose stretches lie on the ranks of a mesh. Every rank calls it, and backward, together.

    Args:
        x: (B, D, L), this rank's stretch; L >= 1 may differ between ranks. weight: (D, W). bias: (D,) or None; the same on every rank.
        seq_idx: (B, L) int32, this rank's stretch of it, or None on every rank. A sequence goes on across ranks where the value does.
        return_final_states: also return the last W - 1 inputs up to the end of this stretch (B, D, W - 1); the last rank's are the whole row's.
        activation, backend: as there. mesh: a DeviceMesh of one dimension, its ranks in the order of the stretches.

    Returns:
        y (B, D, L), or (y, final_states). Differentiable in x, weight, bias; those of weight and bias are of this stretch: sum them over the ranks.
        Each rank but the last sends B D (W - 1) numbers (and B int32 with seq_idx), and in the backward pass each but the first.
    """
    fn = "distributed.causal_conv1d_fn"
    line = comm.Line(*comm.check_mesh(fn, mesh), "convolution halo")
    B, D, before = conv.check_arguments(fn, x, weight, bias, seq_idx)
    conv._silu(fn, activation)
    runs = None if seq_idx is None else _Runs(seq_idx, line)
    halo = _Halo.apply(*_tail(x, before, runs), line)
    if runs is not None:
        halo = torch.where(runs.enters[:, None, None], halo, 0)
    return conv.causal_conv1d_fn(x, weight, bias, seq_idx, halo, return_final_states, activation=activation, backend=backend)


@torch.compiler.disable
def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, seq_idx=None, dt_softplus=False, dt_limit=(0.0, math.inf),
                              return_final_states=False, *, mesh, backend=None):
    """`terrazzo.mamba_chunk_scan_combined` of sequences whose stretches lie on the ranks of a mesh. Every rank calls it, and backward, together.

    Args:
        x, dt, B, C, z: this rank's stretch, (B, L, ...); L >= 1 may differ between ranks. A, D, dt_bias and options: the same on every rank.
        seq_idx: (B, L) int32, this rank's stretch of it, or None on every rank. A sequence goes on across ranks where the value does.
        return_final_states: also return the states after this stretch (B, H, P, N); the last rank's are the whole row's.
        mesh: a DeviceMesh of one dimension, its ranks in the order of the stretches.

    Returns:
        y (B, L, H, P), then the final states where asked for. Differentiable as there; gradients of A, D and dt_bias are of this stretch: sum them
        over the ranks. Each rank but the last sends its B H P N numbers of state in float32 (and B int32 with seq_idx), and in the backward pass
        each but the first.
    """
    fn = "distributed.mamba_chunk_scan_combined"
    line = comm.Line(*comm.check_mesh(fn, mesh), "scan states")
    limits = scan.check_arguments(fn, x, dt, A, B, C, chunk_size, D, z, dt_bias, None, seq_idx, None, dt_limit)
    runs = None if seq_idx is None else _Runs(seq_idx, line)
    final, decay = _summary(x, dt, A, B, dt_bias, dt_softplus, limits, runs)
    states = _Carry.apply(final, decay, line)
    if runs is not None:
        states = torch.where(runs.enters[:, None, None, None], states, 0)
    return scan.mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, z, dt_bias, states, seq_idx, None, dt_softplus, dt_limit, return_final_states,
                                          backend=backend)


class _Runs:
    """How packed sequences cross this rank's borders.

    last (B, L): positions of the stretch's last sequence; padding isn't one, and the state passes it unchanged. enters (B,): the state that comes in
    belongs to the first sequence here, or nothing is here but padding. leaves (B,): it is still part of the one that goes out.
    """

    def __init__(self, seq_idx, line):
        left = line.shift(seq_idx[:, -1], 1, torch.full_like(seq_idx[:, 0], -1))
        real, L = seq_idx >= 0, seq_idx.shape[1]
        changes = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).int(), (0, 1)).flip(1).cumsum(1).flip(1)  # behind each position
        self.last = real & (changes == torch.where(real, changes, L).amin(1, keepdim=True))
        empty = ~real.any(1)
        goes_on = (left == seq_idx[:, 0]) & (left >= 0)
        self.enters, self.leaves = goes_on | empty, goes_on & self.last[:, 0] | empty


def _summary(x, dt, A, B, dt_bias, dt_softplus, limits, runs):
    """(B, H, P, N) the state after this stretch from zero, (B, H) what becomes of one that came in, as a factor."""
    acc = scan._acc(x.dtype)
    dt = dt.to(acc)
    if dt_bias is not None:
        dt = dt + dt_bias.to(acc)
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*limits)
    steps = dt * A.to(acc)
    if runs is not None:
        dt, steps = dt * runs.last[..., None], steps * runs.last[..., None]
    later = F.pad(steps[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)  # summed, never subtracted: a huge step costs no digits
    weight, decay = dt * later.exp(), steps.sum(1).exp()
    if runs is not None:
        decay = decay * runs.leaves[:, None]
    batch, L, H, P = x.shape
    G, N = B.shape[2:]
    rows = (x.to(acc) * weight[..., None]).view(batch, L, G, H // G * P).permute(0, 2, 3, 1)
    return (rows @ B.to(acc).transpose(1, 2)).view(batch, H, P, N), decay


class _Carry(torch.autograd.Function):
    """The state that comes in from the left; what goes to the right is decay * it + final."""

    @staticmethod
    def forward(ctx, final, decay, line):
        states = line.shift(None, 1, torch.zeros_like(final))
        line.shift(decay[..., None, None] * states + final, 1)
        ctx.line = line
        ctx.save_for_backward(states, decay)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, dstates):
        states, decay = ctx.saved_tensors
        dright = ctx.line.shift(None, -1, torch.zeros_like(states))
        ctx.line.shift(dstates + decay[..., None, None] * dright, -1)
        return dright, (dright * states).sum((2, 3)), None


def _tail(x, before, runs):
    """(tail, places, comes): the last `before` inputs (B, D, before) of each row's last sequence, zeros where that doesn't reach back so far in this stretch;
    which place of the halo each of them would be, and whether it is (B, before). places and comes are None where the stretch itself has all of them."""
    batch, channels, L = x.shape
    if runs is None:
        tail, positions = x[:, :, -before:], torch.arange(L - before, L, device=x.device).expand(batch, -1)
        tail, comes = F.pad(tail, (before - tail.shape[2], 0)), positions < 0
        return (tail, None, None) if L >= before else (tail, (positions + before).clamp(max=before - 1), comes)
    end = torch.where(runs.last, torch.arange(1, L + 1, device=x.device), 0).amax(1)
    positions = end[:, None] - before + torch.arange(before, device=x.device)
    here = positions.clamp(min=0)
    own = (positions >= 0) & runs.last.gather(1, here)
    tail = torch.where(own[:, None], x.gather(2, here[:, None].expand(-1, channels, -1)), 0)
    comes = (positions < 0) & runs.leaves[:, None]
    return (tail, (positions + before).clamp(max=before - 1), comes) if comes.any() else (tail, None, None)


class _Halo(torch.autograd.Function):
    """(B, D, before) the inputs before this stretch, for `tail`, which goes to the right. A stretch too short for a tail hands on some of what came."""

    @staticmethod
    def forward(ctx, tail, places, comes, line):
        ctx.line = line
        ctx.save_for_backward(places, comes)
        halo = tail.new_zeros(tail.shape)
        if places is None:
            return line.shift(tail, 1, halo)
        line.shift(None, 1, halo)
        passed = torch.where(comes[:, None], halo.gather(2, places[:, None].expand_as(halo)), 0)
        line.shift(tail + passed, 1)
        return halo

    @staticmethod
    @once_differentiable
    def backward(ctx, dhalo):
        places, comes = ctx.saved_tensors
        dtail = dhalo.new_zeros(dhalo.shape)
        if places is None:
            return ctx.line.shift(dhalo, -1, dtail), None, None, None
        ctx.line.shift(None, -1, dtail)
        passed = torch.where(comes[:, None], dtail, 0)
        ctx.line.shift(dhalo.scatter_add(2, places[:, None].expand_as(dhalo), passed), -1)
        return dtail, None, None, None
