"""Packed sequences of the causal convolution as runs (see causal_conv1d.py), found on the device."""
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import runtime

BLOCK_L = 256
BLOCK_ENDS = 1024


@dataclass(frozen=True)
class Runs:
    """What the kernels are told of packed sequences; every field is None where nothing is packed."""

    reach: torch.Tensor | None = None  # (B, L) int32, as are before and sequence
    before: torch.Tensor | None = None
    sequence: torch.Tensor | None = None
    cu: torch.Tensor | None = None  # (S + 1,) int32
    ends: torch.Tensor | None = None  # (S,) int32

    @property
    def packed(self):
        return self.reach is not None


@triton.jit
def causal_conv1d_runs_kernel(
    seq_idx_ptr, cu_ptr, reach_ptr, before_ptr, sequence_ptr, L, S, num_l, stride_seq_b, stride_seq_l,
    W: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_CU: tl.constexpr, STEPS: tl.constexpr, BLOCK_L: tl.constexpr,
):
    b = tl.program_id(0) // num_l
    l = tl.program_id(0) % num_l * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = l < L
    sequence = tl.zeros_like(l) + b
    begin = tl.zeros_like(l)
    # the last sequence that begins at l or before: empty ones begin with the next
    if HAS_CU:
        high = tl.zeros_like(l) + S
        for _ in range(STEPS):
            middle = (sequence + high) // 2
            later = tl.load(cu_ptr + middle) > l
            high = tl.where(later, middle, high)
            sequence = tl.where(later, sequence, middle)
        begin = tl.load(cu_ptr + sequence)
    # walk back until the run, or W - 1 positions, are over
    reach = tl.minimum(l - begin, W - 1)
    first = l - begin <= W - 1
    if HAS_SEQ:
        here = seq_idx_ptr + b.to(tl.int64) * stride_seq_b + l.to(tl.int64) * stride_seq_l
        own = tl.load(here, mask=inside, other=-1)
        reach = tl.zeros_like(l)
        same = inside
        for k in tl.static_range(1, W):
            same = same & (l - k >= begin)
            same = same & (tl.load(here - k * stride_seq_l, mask=same, other=-1) == own)
            reach += same.to(tl.int32)
        first = (reach == l - begin) & (own >= 0)
        reach = tl.where(own >= 0, reach, -1)
    offs = b.to(tl.int64) * L + l
    tl.store(reach_ptr + offs, reach, mask=inside)
    tl.store(before_ptr + offs, tl.where(first, sequence, -1), mask=inside)
    tl.store(sequence_ptr + offs, sequence, mask=inside)


@triton.jit
def causal_conv1d_ends_kernel(seq_idx_ptr, cu_ptr, ends_ptr, L, stride_seq_b, stride_seq_l, HAS_CU: tl.constexpr, BLOCK_L: tl.constexpr):
    """ends (S,): behind the last position of each sequence that isn't padding; its begin where there is none."""
    s = tl.program_id(0)
    row = s.to(tl.int64)
    begin = s * 0
    end = begin + L
    if HAS_CU:
        row = row * 0
        begin = tl.load(cu_ptr + s)
        end = tl.load(cu_ptr + s + 1)
    found = tl.zeros((BLOCK_L,), tl.int32) + begin
    for block in range(begin, end, BLOCK_L):
        l = block + tl.arange(0, BLOCK_L)
        own = tl.load(seq_idx_ptr + row * stride_seq_b + l.to(tl.int64) * stride_seq_l, mask=l < end, other=-1)
        found = tl.maximum(found, tl.where(own >= 0, l + 1, begin))
    tl.store(ends_ptr + s, tl.max(found, 0))


def find_runs(B, L, W, seq_idx, cu_seqlens, ends):
    """The Runs of a batch; `ends` only where asked for."""
    if seq_idx is None and cu_seqlens is None:
        return Runs()
    cu = None if cu_seqlens is None else cu_seqlens.contiguous()
    S = B if cu is None else cu.shape[0] - 1
    device = (cu if seq_idx is None else seq_idx).device
    reach, before, sequence = (torch.empty(B, L, dtype=torch.int32, device=device) for _ in range(3))
    strides = (0, 0) if seq_idx is None else seq_idx.stride()
    num_l = triton.cdiv(L, BLOCK_L)
    runtime.visible(causal_conv1d_runs_kernel)[(B * num_l,)](
        seq_idx, cu, reach, before, sequence, L, S, num_l, *strides,
        W=W, HAS_SEQ=seq_idx is not None, HAS_CU=cu is not None, STEPS=S.bit_length(), BLOCK_L=BLOCK_L,
    )
    last = None
    if ends and seq_idx is None:
        last = cu[1:]
    elif ends:
        last = torch.empty(S, dtype=torch.int32, device=device)
        runtime.visible(causal_conv1d_ends_kernel)[(S,)](seq_idx, cu, last, L, *strides, HAS_CU=cu is not None, BLOCK_L=BLOCK_ENDS)
    return Runs(reach, before, sequence, cu, last)
