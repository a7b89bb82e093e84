"""Entropy of every next-byte distribution, and the patches it cuts a text into (patch_cut.py).

    H = log s - t / s   with a = x - max x, s = sum e^a, t = sum e^a a;   dx = -dH p (log p + H)

Layouts: logits (B, L, V) in any strides; entropies (B, L) float32, dlogits (B, L, V) contiguous. One program takes BLOCK_M
positions of a row. Logits pass once, a block of V at a time, the sums rescaled where a block has a higher maximum; what V
leaves behind whole blocks is a smaller block of its own (BLT: 260 = 256 + 4). Memory bandwidth is the limit. The backward
computes the sums again instead of storing them; its second look at the logits finds them in the cache.
"""
import math

import torch
import triton
import triton.language as tl

from . import configs
from .patch_cut import contiguous, patch_cut_triton, patch_ids_triton, patcher_update_triton  # noqa: F401

FWD = configs.Table(
    "entropy_patch_fwd",
    configs.Row({"BLOCK_M": 64, "BLOCK_V": 64}, num_warps=4, up_to={"V": 64}),
    configs.Row({"BLOCK_M": 16, "BLOCK_V": 256}, num_warps=4, up_to={"V": 1024}),
    configs.Row({"BLOCK_M": 1, "BLOCK_V": 2048}, num_warps=4),
)
BWD = configs.Table(
    "entropy_patch_bwd",
    configs.Row({"BLOCK_M": 64, "BLOCK_V": 64}, num_warps=4, up_to={"V": 64}),
    configs.Row({"BLOCK_M": 16, "BLOCK_V": 256}, num_warps=4, up_to={"V": 1024}),
    configs.Row({"BLOCK_M": 1, "BLOCK_V": 2048}, num_warps=4),
)
FLOOR = tl.constexpr(-100.0)  # e^a below this adds nothing to a sum that holds 1; it keeps -inf out of products


@triton.jit
def _rows(L, BLOCK_M: tl.constexpr):
    """The row of this program and its positions."""
    blocks = tl.cdiv(L, BLOCK_M)
    return (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)


@triton.jit
def _floored(a):
    return tl.where(a < FLOOR, FLOOR, a)  # NaN stays


@triton.jit
def _load_block(rows_ptr, offs_v, stride_v, mask):
    return tl.load(rows_ptr[:, None] + offs_v[None, :].to(tl.int64) * stride_v, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def _add_block(x, top, total, dot):
    """The highest logit, s and t of each row with the block x in them."""
    highest = tl.maximum(top, tl.max(x, 1))
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    a = _floored(x - shift[:, None])
    e = tl.exp(a)
    fall = _floored(tl.where(top == -float("inf"), 0.0, top - shift))
    factor = tl.exp(fall)
    return highest, total * factor + tl.sum(e, 1), (dot + fall * total) * factor + tl.sum(e * a, 1)


@triton.jit
def _softmax(rows_ptr, mask_m, V, stride_v, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, TAIL: tl.constexpr):
    """The highest logit, s and t of BLOCK_M rows."""
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    dot = tl.zeros((BLOCK_M,), tl.float32)
    whole = V // BLOCK_V * BLOCK_V
    for begin in range(0, whole, BLOCK_V):
        x = _load_block(rows_ptr, begin + tl.arange(0, BLOCK_V), stride_v, mask_m[:, None])
        top, total, dot = _add_block(x, top, total, dot)
    if TAIL > 0:
        offs_v = whole + tl.arange(0, TAIL)
        x = _load_block(rows_ptr, offs_v, stride_v, mask_m[:, None] & (offs_v < V)[None, :])
        top, total, dot = _add_block(x, top, total, dot)
    return top, total, dot


@triton.jit
def entropy_patch_fwd_kernel(
    logits_ptr, valid_ptr, entropies_ptr, L, V, stride_logits_b, stride_logits_l, stride_logits_v,
    ALIGNED: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, TAIL: tl.constexpr,
):
    row, offs_m = _rows(L, BLOCK_M)
    mask_m = offs_m < L
    live = mask_m
    if HAS_VALID:
        live = mask_m & (offs_m < tl.load(valid_ptr + row))
    rows_ptr = logits_ptr + tl.multiple_of(row * stride_logits_b + offs_m * stride_logits_l, ALIGNED)
    top, total, dot = _softmax(rows_ptr, live, V, stride_logits_v, BLOCK_M, BLOCK_V, TAIL)
    entropy = tl.where(top == -float("inf"), float("nan"), tl.log(total) - dot / total)
    tl.store(entropies_ptr + row * L + offs_m, tl.where(live, entropy, 0.0), mask=mask_m)


@triton.jit
def _gradient(x, top, shift, scale, live):
    """scale e^a (a + shift); zero on padding, whatever the logits there."""
    a = _floored(x - top[:, None])
    return tl.where(live[:, None], scale[:, None] * tl.exp(a) * (a + shift[:, None]), 0.0)


@triton.jit
def entropy_patch_bwd_kernel(
    dentropies_ptr, logits_ptr, valid_ptr, dlogits_ptr, L, V,
    stride_dentropies_b, stride_dentropies_l, stride_logits_b, stride_logits_l, stride_logits_v,
    ALIGNED: tl.constexpr, OUT_ALIGNED: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, TAIL: tl.constexpr,
):
    row, offs_m = _rows(L, BLOCK_M)
    mask_m = offs_m < L
    live = mask_m
    if HAS_VALID:
        live = mask_m & (offs_m < tl.load(valid_ptr + row))
    rows_ptr = logits_ptr + tl.multiple_of(row * stride_logits_b + offs_m * stride_logits_l, ALIGNED)
    out_ptr = dlogits_ptr + tl.multiple_of((row * L + offs_m) * V, OUT_ALIGNED)
    top, total, dot = _softmax(rows_ptr, live, V, stride_logits_v, BLOCK_M, BLOCK_V, TAIL)
    # -dH p (log p + H) with p = e^a / s and log p = a - log s, so that log p + H = a - t / s
    dH = tl.load(dentropies_ptr + row * stride_dentropies_b + offs_m * stride_dentropies_l, mask=live, other=0.0).to(tl.float32)
    scale, shift = -dH / total, -dot / total
    dtype = dlogits_ptr.dtype.element_ty
    whole = V // BLOCK_V * BLOCK_V
    for begin in range(0, whole, BLOCK_V):
        offs_v = begin + tl.arange(0, BLOCK_V)
        dx = _gradient(_load_block(rows_ptr, offs_v, stride_logits_v, live[:, None]), top, shift, scale, live)
        tl.store(out_ptr[:, None] + offs_v[None, :], dx.to(dtype), mask=mask_m[:, None])
    if TAIL > 0:
        offs_v = whole + tl.arange(0, TAIL)
        mask_v = (offs_v < V)[None, :]
        dx = _gradient(_load_block(rows_ptr, offs_v, stride_logits_v, live[:, None] & mask_v), top, shift, scale, live)
        tl.store(out_ptr[:, None] + offs_v[None, :], dx.to(dtype), mask=mask_m[:, None] & mask_v)


def _tail(V, BLOCK_V):
    """The smallest block for what V leaves behind whole blocks."""
    return triton.next_power_of_2(V % BLOCK_V) if V % BLOCK_V else 0


def entropy_patch_fwd_triton(logits, threshold, rule, threshold_add, patch_size, max_length, cu_seqlens, valid_lengths, next):
    B, L, V = logits.shape
    entropies = logits.new_empty(B, L, dtype=torch.float32)
    valid_lengths = contiguous(valid_lengths)

    def run(BLOCK_M, BLOCK_V, **options):
        entropy_patch_fwd_kernel[(B * triton.cdiv(L, BLOCK_M),)](
            logits, valid_lengths, entropies, L, V, *logits.stride(), ALIGNED=math.gcd(*logits.stride()[:2], 16), HAS_VALID=valid_lengths is not None,
            BLOCK_M=BLOCK_M, BLOCK_V=BLOCK_V, TAIL=_tail(V, BLOCK_V), **options,
        )

    if B:
        FWD.launch(logits, run, V=V)
    return entropies, *patch_cut_triton(entropies, threshold, rule, threshold_add, patch_size, max_length, 0, cu_seqlens, valid_lengths, next)


def entropy_patch_bwd_triton(dentropies, logits, valid_lengths):
    B, L, V = logits.shape
    dlogits = logits.new_empty(B, L, V)
    valid_lengths = contiguous(valid_lengths)

    def run(BLOCK_M, BLOCK_V, **options):
        entropy_patch_bwd_kernel[(B * triton.cdiv(L, BLOCK_M),)](
            dentropies, logits, valid_lengths, dlogits, L, V, *dentropies.stride(), *logits.stride(), ALIGNED=math.gcd(*logits.stride()[:2], 16),
            OUT_ALIGNED=math.gcd(V, 16), HAS_VALID=valid_lengths is not None, BLOCK_M=BLOCK_M, BLOCK_V=BLOCK_V, TAIL=_tail(V, BLOCK_V), **options,
        )

    if B:
        BWD.launch(logits, run, V=V)
    return dlogits
