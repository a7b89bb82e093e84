"""Context parallelism: each rank holds a stretch of every sequence, the ranks of a mesh in order.

Convolution: the W - 1 inputs before a stretch come from the left neighbour. Scan: a stretch begins with the state in which the one on its left ends. Two ways:

- relay: heads are independent, and a CPU works on them block by block. A rank sends the states of a block on as soon as it has scanned it, and scans
  the next while its neighbour begins with this one. Nothing is computed twice; the last of R ranks begins R - 1 blocks late, so that n blocks take
  the time of n + R - 1. The backward pass runs the other way.
- summary: a stretch turns the state that comes in into a S + R, where a is its total decay and R its final state from zero. Each rank computes both
  by one matrix product; states then go from rank to rank, one hop each, and with the state that came in the scan runs, all ranks at once:

      R = sum over t of exp(dt A summed behind t) dt x B,   a = exp(dt A summed),   S of rank r + 1 = a S of rank r + R

  The product has half of the scan's operations, but its cost does not grow with the ranks.

The relay is taken where it costs less, n > 2 (R - 1), by the CPU's kernels; a GPU scans all heads at once, n = 1. Gradients of states and halos go the
same way back. What travels does not grow with the stretch, and is as much either way. Source of the summary: Dao & Gu (2024), section 8.2.
"""
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .. import causal_conv1d as conv
from .. import chunk_scan as scan
from .. import dispatch, kernels
from . import comm

BLOCK = 8  # heads that a thread takes at once: as the CPU's kernel in its backward pass


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
    conv.check_activation(fn, activation)
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
        x, dt, B, C, z: this rank's stretch, (B, L, ...); L >= 1 may differ between ranks. A, D, dt_bias, dtypes and options, and so the backend, are the
            same on every rank.
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
    chosen, _ = dispatch.pick(scan.OP, x, dt, A, B, C, D, z, dt_bias, backend=backend)
    blocks = _blocks(x.shape[2], B.shape[2], BLOCK * math.ceil(line.threads() / max(1, x.shape[0]))) if chosen == "cpu" else []
    if len(blocks) > 2 * (line.size - 1):
        rest = line, blocks, (dt_softplus, *limits), return_final_states, seq_idx, None if runs is None else runs.enters
        y, states = scan.gated(lambda x, z: _Relayed.apply(x, dt, A, B, C, D, dt_bias, z, *rest), x, z, dt, A, B, C, D, dt_bias)
        return (y, states) if return_final_states else y
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


def _blocks(H, G, size):
    """[(heads, groups)] slices of about `size` heads: some of one group, or whole groups."""
    each = H // G
    if each >= size:
        return [(slice(g * each + h, min(g * each + h + size, (g + 1) * each)), slice(g, g + 1)) for g in range(G) for h in range(0, each, size)]
    whole = size // each
    return [(slice(g * each, min(g + whole, G) * each), slice(g, min(g + whole, G))) for g in range(0, G, whole)]


class _Relayed(torch.autograd.Function):
    """The CPU's scan of this stretch, block after block, each from the states that come from the left: y, and the states at its end."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, z, line, blocks, options, wants_states, seq_idx, enters):
        relay, wanted = _relay(line, 1, blocks, x, B), wants_states or line.place < line.size - 1
        y, came, ends = torch.empty(x.shape, dtype=x.dtype), [], []
        for block in blocks:
            came.append(_masked(relay.take(), enters))
            *operands, bias = _part(block, x, dt, A, B, C, D, dt_bias)
            gate = None if z is None else z[:, :, block[0]]
            end = kernels.ops("cpu").chunk_scan_fwd_into(y[:, :, block[0]], *operands, gate, bias, came[-1], seq_idx, None, *options, wanted)
            relay.give(end)
            ends.append(end)
        relay.end()
        ctx.line, ctx.blocks, ctx.options = line, blocks, options
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, seq_idx, enters, *came)
        return y, torch.cat(ends, 1) if wants_states else None

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstates):
        x, dt, A, B, C, D, dt_bias, seq_idx, enters, *came = ctx.saved_tensors
        relay, acc = _relay(ctx.line, -1, ctx.blocks, x, B), scan._acc(x.dtype)
        B, C = B.to(acc), C.to(acc)  # so that blocks' shares in their gradients aren't rounded before they are summed
        dx, ddt, dA, dD, dbias = (None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in (x, dt, A, D, dt_bias))
        grads = dx, ddt, dA, torch.zeros(B.shape, dtype=acc), torch.zeros(C.shape, dtype=acc), dD, dbias
        for block, states in zip(ctx.blocks, came):
            dends = relay.take()
            if dstates is not None:
                dends = dstates[:, block[0]] if dends is None else dends + dstates[:, block[0]]
            dx, *others = _part(block, *grads)
            *found, dcame = kernels.ops("cpu").chunk_scan_bwd_into(
                dx, dy[:, :, block[0]], dends, *_part(block, x, dt, A, B, C, D, dt_bias), states, seq_idx, None, *ctx.options
            )
            for i, (grad, own) in enumerate(zip(others, found)):
                if grad is not None:
                    grad.add_(own) if i in (2, 3) else grad.copy_(own)  # blocks share B and C
            if states is not None:
                relay.give(_masked(dcame, enters))
        relay.end()
        return *grads, *[None] * 7


def _relay(line, step, blocks, x, B):
    """For the states of blocks, or their gradients."""
    batch, P, N = x.shape[0], x.shape[3], B.shape[3]
    return comm.Relay(line, step, [torch.empty((batch, heads.stop - heads.start, P, N), dtype=scan._acc(x.dtype)) for heads, _ in blocks])


def _part(block, x, dt, A, B, C, D, dt_bias):
    """A block's part of each."""
    heads, groups = block
    D, dt_bias = (None if t is None else t[heads] for t in (D, dt_bias))
    return x[:, :, heads], dt[:, :, heads], A[heads], B[:, :, groups], C[:, :, groups], D, dt_bias


def _masked(states, enters):
    return states if states is None or enters is None else torch.where(enters[:, None, None, None], states, 0)


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
