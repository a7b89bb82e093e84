"""Sliding-window attention: y[i] = sum over the keys j that i sees of softmax_j(scale q[i] . k[j]) v[j]; zeros without such a key.

Layouts: q, y (B, L, H, P), k, v (B, L, Hk, P), any strides; lse (B, H, L), the logarithm to base 2 of the softmax's sum, infinite
where nothing is seen. Query head h reads key head h // (H // Hk). Position i sees [low, high): `before` positions in front of it
and `behind` behind it, within its own sequence of cu_seqlens, whose ends every position finds by a search on the device.

Flash attention on a band (Dao 2023): a program takes BLOCK_M queries of one head and walks the blocks of keys that their bands
meet, O(L * window) in all. The blocks that every query sees from end to end come first, without a mask, then those at the
edges. Backward: dq by blocks of queries, which also leaves delta = dy . y; then dk and dv by blocks of keys, the query heads of
a key head in order (deterministic, no atomics). Limited by tensor cores, and in short windows by the loads of k and v.
"""
import math

import torch
import triton
import triton.language as tl

from . import configs, runtime

FWD = configs.Table(  # masked: whether there is a key mask, which takes registers
    "local_attention_fwd",
    configs.Row({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4, num_stages=3, arch=("sm8", "sm9", "sm12"), itemsize=2, up_to={"P": 64, "masked": 0}),
    configs.Row({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2, arch=("sm",), itemsize=2, up_to={"P": 128}),
    configs.Row({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4, num_stages=1, arch=("gfx",), itemsize=2, up_to={"P": 128}),
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=1, up_to={"P": 64}),
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=1, arch=("sm10",), up_to={"P": 128}),
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=1, arch=("sm8", "sm9", "sm12", "gfx"), up_to={"P": 128}),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=4, num_stages=1, up_to={"P": 128}),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=8, num_stages=1),
)
BWD_QUERIES = configs.Table(
    "local_attention_bwd_queries",
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2, arch=("sm",), itemsize=2, up_to={"P": 64}),
    configs.Row({"BLOCK_M": 128, "BLOCK_N": 32}, num_warps=8, num_stages=2, arch=("sm",), itemsize=2, up_to={"P": 128}),
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=1, arch=("gfx",), itemsize=2, up_to={"P": 64}),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=8, num_stages=1, arch=("sm10",), up_to={"P": 64}),
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=1, arch=("sm8", "sm9", "sm12", "gfx"), up_to={"P": 64}),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=4, num_stages=1, up_to={"P": 128}),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=8, num_stages=1),
)
BWD_KEYS = configs.Table(
    "local_attention_bwd_keys",
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 128}, num_warps=8, num_stages=2, arch=("sm",), itemsize=2, up_to={"P": 64}),
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=1, arch=("sm",), itemsize=2, up_to={"P": 128}),
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=4, num_stages=1, arch=("gfx",), itemsize=2, up_to={"P": 64}),
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=1, up_to={"P": 64}),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=4, num_stages=1, up_to={"P": 128}),
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 16}, num_warps=8, num_stages=1, arch=("sm",), itemsize=4),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=8, num_stages=1),
)
FLOOR = tl.constexpr(-1e30)  # the score of what is not seen: finite, so that differences of two stay numbers


@triton.jit
def load_rows(ptr, stride_l, stride_p, offs_l, mask_l, P: tl.constexpr, BLOCK_P: tl.constexpr, first=0):
    """One head's rows from channel `first` on as a block (rows, BLOCK_P), zeros outside; ptr stands at the head."""
    offs_p = first + tl.arange(0, BLOCK_P)
    mask = mask_l[:, None] & (offs_p < P)[None, :]
    return tl.load(ptr + offs_l[:, None].to(tl.int64) * stride_l + offs_p[None, :].to(tl.int64) * stride_p, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, stride_l, offs_l, mask_l, value, P: tl.constexpr, BLOCK_P: tl.constexpr):
    offs_p = tl.arange(0, BLOCK_P)
    mask = mask_l[:, None] & (offs_p < P)[None, :]
    tl.store(ptr + offs_l[:, None].to(tl.int64) * stride_l + offs_p[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def scores(
    x, y, x_ptr, y_ptr, offs_x, offs_y, mask_x, mask_y, stride_x_l, stride_x_p, stride_y_l, stride_y_p,
    PRECISION: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """x y^T of one head, of which x and y are rows; with BLOCK_K < BLOCK_P loaded again, BLOCK_K channels at a time."""
    if BLOCK_K == BLOCK_P:
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    else:
        s = tl.zeros((x.shape[0], y.shape[0]), tl.float32)
        for first in range(0, P, BLOCK_K):
            x_part = load_rows(x_ptr, stride_x_l, stride_x_p, offs_x, mask_x, P, BLOCK_K, first).to(x.dtype)
            y_part = load_rows(y_ptr, stride_y_l, stride_y_p, offs_y, mask_y, P, BLOCK_K, first).to(x.dtype)
            s = tl.dot(x_part, tl.trans(y_part), s, input_precision=PRECISION)
    return s


@triton.jit
def sequence_bounds_kernel(cu_seqlens_ptr, bounds_ptr, L, sequences, steps, stride_cu_seqlens, BLOCK_M: tl.constexpr):
    """bounds (2, L): where the sequence of each position begins and ends."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    low = tl.zeros((BLOCK_M,), tl.int32)  # cu_seqlens[low] <= position < cu_seqlens[high]
    high = low + sequences
    for _ in range(steps):
        middle = (low + high) // 2
        reached = tl.load(cu_seqlens_ptr + middle.to(tl.int64) * stride_cu_seqlens) <= offs_m
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
    begin = tl.load(cu_seqlens_ptr + low.to(tl.int64) * stride_cu_seqlens)
    end = tl.load(cu_seqlens_ptr + (low + 1).to(tl.int64) * stride_cu_seqlens)
    tl.store(bounds_ptr + offs_m, begin, mask=offs_m < L)
    tl.store(bounds_ptr + L + offs_m, end, mask=offs_m < L)


@triton.jit
def _bands(bounds_ptr, offs, L, before, behind, PACKED: tl.constexpr):
    """The positions [low, high) that lie at most `before` in front of each of `offs` and `behind` behind it, in its sequence."""
    low, high = tl.maximum(offs - before, 0), tl.minimum(offs + behind + 1, L)
    if PACKED:
        known = tl.minimum(offs, L - 1)
        low, high = tl.maximum(low, tl.load(bounds_ptr + known)), tl.minimum(high, tl.load(bounds_ptr + L + known))
    return low, high


@triton.jit
def _blocks(low, high, BLOCK: tl.constexpr):
    """The blocks [first, last) that bands meet, and [whole_first, whole_last) of them that every band holds whole."""
    first, last = tl.min(low, 0) // BLOCK, tl.cdiv(tl.max(high, 0), BLOCK)
    whole_first = tl.minimum(tl.cdiv(tl.max(low, 0), BLOCK), last)
    whole_last = tl.maximum(tl.min(high, 0) // BLOCK, whole_first)
    return first, whole_first, whole_last, last


@triton.jit
def _edge_block(i, first, whole_first, whole_last):
    """The i-th block that not every band holds whole."""
    block = first + i
    return tl.where(block < whole_first, block, block + whole_last - whole_first)


@triton.jit
def _fwd_step(
    acc, top, total, q, low, high, block, q_ptr, k_ptr, v_ptr, key_mask_ptr, offs_m, mask_m, L, unit,
    stride_q_l, stride_q_p, stride_k_l, stride_k_p, stride_v_l, stride_v_p, stride_key_mask_l, MASKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    PRECISION: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Online softmax: one more block of keys."""
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < L
    k = load_rows(k_ptr, stride_k_l, stride_k_p, offs_n, mask_n, P, BLOCK_P).to(q.dtype)
    v = load_rows(v_ptr, stride_v_l, stride_v_p, offs_n, mask_n, P, BLOCK_P).to(q.dtype)
    s = scores(q, k, q_ptr, k_ptr, offs_m, offs_n, mask_m, mask_n, stride_q_l, stride_q_p, stride_k_l, stride_k_p, PRECISION, P, BLOCK_P, BLOCK_K)
    if MASKED:
        seen = (offs_n[None, :] >= low[:, None]) & (offs_n[None, :] < high[:, None])
        if HAS_KEY_MASK:
            seen &= tl.load(key_mask_ptr + offs_n.to(tl.int64) * stride_key_mask_l, mask=mask_n, other=0)[None, :] != 0
        s = tl.where(seen, s, FLOOR)
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s * unit - (higher * unit)[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)  # where nothing was seen so far, FLOOR is the top
    factor = tl.exp2((top - higher) * unit)
    acc = tl.dot(p.to(q.dtype), v, acc * factor[:, None], input_precision=PRECISION)
    return acc, higher, total * factor + tl.sum(p, 1)


@triton.jit
def local_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, key_mask_ptr, bounds_ptr, L, H, group, before, behind, unit,
    stride_q_b, stride_q_l, stride_q_h, stride_q_p, stride_k_b, stride_k_l, stride_k_h, stride_k_p,
    stride_v_b, stride_v_l, stride_v_h, stride_v_p, stride_key_mask_b, stride_key_mask_l,
    HAS_KEY_MASK: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    blocks_m = tl.cdiv(L, BLOCK_M)
    pid_m, head = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < L
    q_ptr += b * stride_q_b + h * stride_q_h
    q = load_rows(q_ptr, stride_q_l, stride_q_p, offs_m, mask_m, P, BLOCK_P)
    k_ptr += b * stride_k_b + h // group * stride_k_h
    v_ptr += b * stride_v_b + h // group * stride_v_h
    if HAS_KEY_MASK:
        key_mask_ptr += b * stride_key_mask_b
    low, high = _bands(bounds_ptr, offs_m, L, before, behind, PACKED)
    first, whole_first, whole_last, last = _blocks(low, high, BLOCK_N)
    if HAS_KEY_MASK:
        whole_first = last
        whole_last = last
    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    top = tl.full((BLOCK_M,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if not HAS_KEY_MASK:
        for block in range(whole_first, whole_last):
            acc, top, total = _fwd_step(
                acc, top, total, q, low, high, block, q_ptr, k_ptr, v_ptr, key_mask_ptr, offs_m, mask_m, L, unit,
                stride_q_l, stride_q_p, stride_k_l, stride_k_p, stride_v_l, stride_v_p, stride_key_mask_l, False, HAS_KEY_MASK,
                PRECISION, P, BLOCK_N, BLOCK_P, BLOCK_K,
            )
    for i in range(last - first - (whole_last - whole_first)):
        acc, top, total = _fwd_step(
            acc, top, total, q, low, high, _edge_block(i, first, whole_first, whole_last), q_ptr, k_ptr, v_ptr, key_mask_ptr, offs_m, mask_m, L, unit,
            stride_q_l, stride_q_p, stride_k_l, stride_k_p, stride_v_l, stride_v_p, stride_key_mask_l, True, HAS_KEY_MASK,
            PRECISION, P, BLOCK_N, BLOCK_P, BLOCK_K,
        )
    empty = total == 0
    y = acc / tl.where(empty, 1.0, total)[:, None]
    store_rows(y_ptr + (b * L * H + h) * P, H * P, offs_m, mask_m, y, P, BLOCK_P)
    tl.store(lse_ptr + head.to(tl.int64) * L + offs_m, tl.where(empty, float("inf"), top * unit + tl.log2(total)), mask=mask_m)


@triton.jit
def _bwd_queries_step(
    dq, q, dy, lse, delta, low, high, block, q_ptr, dy_ptr, k_ptr, v_ptr, key_mask_ptr, offs_m, mask_m, L, unit,
    stride_q_l, stride_q_p, stride_dy_l, stride_dy_p, stride_k_l, stride_k_p, stride_v_l, stride_v_p, stride_key_mask_l,
    MASKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dq += ds k with ds = p (dy . v - delta)."""
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < L
    k = load_rows(k_ptr, stride_k_l, stride_k_p, offs_n, mask_n, P, BLOCK_P).to(q.dtype)
    v = load_rows(v_ptr, stride_v_l, stride_v_p, offs_n, mask_n, P, BLOCK_P).to(q.dtype)
    s = scores(q, k, q_ptr, k_ptr, offs_m, offs_n, mask_m, mask_n, stride_q_l, stride_q_p, stride_k_l, stride_k_p, PRECISION, P, BLOCK_P, BLOCK_K)
    p = tl.exp2(s * unit - lse[:, None])
    if MASKED:
        seen = (offs_n[None, :] >= low[:, None]) & (offs_n[None, :] < high[:, None])
        if HAS_KEY_MASK:
            seen &= tl.load(key_mask_ptr + offs_n.to(tl.int64) * stride_key_mask_l, mask=mask_n, other=0)[None, :] != 0
        p = tl.where(seen, p, 0.0)
    dp = scores(dy, v, dy_ptr, v_ptr, offs_m, offs_n, mask_m, mask_n,
                stride_dy_l, stride_dy_p, stride_v_l, stride_v_p, PRECISION, P, BLOCK_P, BLOCK_K)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(q.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def local_attention_bwd_queries_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, delta_ptr, dq_ptr, key_mask_ptr, bounds_ptr, L, H, group, before, behind, unit, scale,
    stride_dy_b, stride_dy_l, stride_dy_h, stride_dy_p, stride_q_b, stride_q_l, stride_q_h, stride_q_p,
    stride_k_b, stride_k_l, stride_k_h, stride_k_p, stride_v_b, stride_v_l, stride_v_h, stride_v_p,
    stride_y_b, stride_y_l, stride_y_h, stride_y_p, stride_key_mask_b, stride_key_mask_l,
    HAS_KEY_MASK: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    blocks_m = tl.cdiv(L, BLOCK_M)
    pid_m, head = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < L
    q_ptr += b * stride_q_b + h * stride_q_h
    dy_ptr += b * stride_dy_b + h * stride_dy_h
    q = load_rows(q_ptr, stride_q_l, stride_q_p, offs_m, mask_m, P, BLOCK_P)
    dy = load_rows(dy_ptr, stride_dy_l, stride_dy_p, offs_m, mask_m, P, BLOCK_P).to(q.dtype)
    y = load_rows(y_ptr + b * stride_y_b + h * stride_y_h, stride_y_l, stride_y_p, offs_m, mask_m, P, BLOCK_P)
    at = head.to(tl.int64) * L + offs_m
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(delta_ptr + at, delta, mask=mask_m)
    lse = tl.load(lse_ptr + at, mask=mask_m, other=float("inf"))
    k_ptr += b * stride_k_b + h // group * stride_k_h
    v_ptr += b * stride_v_b + h // group * stride_v_h
    if HAS_KEY_MASK:
        key_mask_ptr += b * stride_key_mask_b
    low, high = _bands(bounds_ptr, offs_m, L, before, behind, PACKED)
    first, whole_first, whole_last, last = _blocks(low, high, BLOCK_N)
    if HAS_KEY_MASK:
        whole_first = last
        whole_last = last
    dq = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    if not HAS_KEY_MASK:
        for block in range(whole_first, whole_last):
            dq = _bwd_queries_step(
                dq, q, dy, lse, delta, low, high, block, q_ptr, dy_ptr, k_ptr, v_ptr, key_mask_ptr, offs_m, mask_m, L, unit,
                stride_q_l, stride_q_p, stride_dy_l, stride_dy_p, stride_k_l, stride_k_p, stride_v_l, stride_v_p, stride_key_mask_l,
                False, HAS_KEY_MASK, PRECISION, P, BLOCK_N, BLOCK_P, BLOCK_K,
            )
    for i in range(last - first - (whole_last - whole_first)):
        dq = _bwd_queries_step(
            dq, q, dy, lse, delta, low, high, _edge_block(i, first, whole_first, whole_last), q_ptr, dy_ptr, k_ptr, v_ptr, key_mask_ptr,
            offs_m, mask_m, L, unit, stride_q_l, stride_q_p, stride_dy_l, stride_dy_p, stride_k_l, stride_k_p, stride_v_l, stride_v_p,
            stride_key_mask_l, True, HAS_KEY_MASK, PRECISION, P, BLOCK_N, BLOCK_P, BLOCK_K,
        )
    store_rows(dq_ptr + (b * L * H + h) * P, H * P, offs_m, mask_m, dq * scale, P, BLOCK_P)


@triton.jit
def _bwd_keys_step(
    dk, dv, k, v, low, high, block, q_ptr, dy_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, offs_n, mask_n, L, unit,
    stride_q_l, stride_q_p, stride_dy_l, stride_dy_p, stride_k_l, stride_k_p, stride_v_l, stride_v_p,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One more block of queries; keys stand in the rows here: dv += p dy, dk += ds q."""
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < L
    q = load_rows(q_ptr, stride_q_l, stride_q_p, offs_m, mask_m, P, BLOCK_P)
    dy = load_rows(dy_ptr, stride_dy_l, stride_dy_p, offs_m, mask_m, P, BLOCK_P).to(q.dtype)
    lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=float("inf"))
    delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
    s = scores(k, q, k_ptr, q_ptr, offs_n, offs_m, mask_n, mask_m, stride_k_l, stride_k_p, stride_q_l, stride_q_p, PRECISION, P, BLOCK_P, BLOCK_K)
    p = tl.exp2(s * unit - lse[None, :])
    if MASKED:
        p = tl.where((offs_m[None, :] >= low[:, None]) & (offs_m[None, :] < high[:, None]), p, 0.0)
    dv = tl.dot(p.to(q.dtype), dy, dv, input_precision=PRECISION)
    dp = scores(v, dy, v_ptr, dy_ptr, offs_n, offs_m, mask_n, mask_m,
                stride_v_l, stride_v_p, stride_dy_l, stride_dy_p, PRECISION, P, BLOCK_P, BLOCK_K)
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def local_attention_bwd_keys_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, key_mask_ptr, bounds_ptr, L, Hk, group, before, behind, unit, scale,
    stride_dy_b, stride_dy_l, stride_dy_h, stride_dy_p, stride_q_b, stride_q_l, stride_q_h, stride_q_p,
    stride_k_b, stride_k_l, stride_k_h, stride_k_p, stride_v_b, stride_v_l, stride_v_h, stride_v_p, stride_key_mask_b, stride_key_mask_l,
    HAS_KEY_MASK: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    blocks_n = tl.cdiv(L, BLOCK_N)
    pid_n, head = tl.program_id(0) % blocks_n, tl.program_id(0) // blocks_n
    b, kv = (head // Hk).to(tl.int64), (head % Hk).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < L
    k_ptr += b * stride_k_b + kv * stride_k_h
    v_ptr += b * stride_v_b + kv * stride_v_h
    k = load_rows(k_ptr, stride_k_l, stride_k_p, offs_n, mask_n, P, BLOCK_P).to(q_ptr.dtype.element_ty)
    v = load_rows(v_ptr, stride_v_l, stride_v_p, offs_n, mask_n, P, BLOCK_P).to(q_ptr.dtype.element_ty)
    low, high = _bands(bounds_ptr, offs_n, L, behind, before, PACKED)  # the queries that see each key
    if HAS_KEY_MASK:
        live = tl.load(key_mask_ptr + b * stride_key_mask_b + offs_n.to(tl.int64) * stride_key_mask_l, mask=mask_n, other=0) != 0
        high = tl.where(live, high, 0)
    first, whole_first, whole_last, last = _blocks(low, high, BLOCK_M)
    dk = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for h in range(kv * group, (kv + 1) * group):
        q_head, dy_head = q_ptr + b * stride_q_b + h * stride_q_h, dy_ptr + b * stride_dy_b + h * stride_dy_h
        at = (b * Hk * group + h) * L
        for block in range(whole_first, whole_last):
            dk, dv = _bwd_keys_step(
                dk, dv, k, v, low, high, block, q_head, dy_head, k_ptr, v_ptr, lse_ptr + at, delta_ptr + at, offs_n, mask_n, L, unit,
                stride_q_l, stride_q_p, stride_dy_l, stride_dy_p, stride_k_l, stride_k_p, stride_v_l, stride_v_p,
                False, PRECISION, P, BLOCK_M, BLOCK_P, BLOCK_K,
            )
        for i in range(last - first - (whole_last - whole_first)):
            dk, dv = _bwd_keys_step(
                dk, dv, k, v, low, high, _edge_block(i, first, whole_first, whole_last), q_head, dy_head, k_ptr, v_ptr, lse_ptr + at, delta_ptr + at,
                offs_n, mask_n, L, unit, stride_q_l, stride_q_p, stride_dy_l, stride_dy_p, stride_k_l, stride_k_p, stride_v_l, stride_v_p,
                True, PRECISION, P, BLOCK_M, BLOCK_P, BLOCK_K,
            )
    out = (b * L * Hk + kv) * P
    store_rows(dk_ptr + out, Hk * P, offs_n, mask_n, dk * scale, P, BLOCK_P)
    store_rows(dv_ptr + out, Hk * P, offs_n, mask_n, dv, P, BLOCK_P)


def block_P(P):
    """A head as a block: tl.dot takes powers of two from 16 on."""
    return max(16, triton.next_power_of_2(P))


def block_K(q):
    """Channels of a head in one product of scores: float32 rows of 256, and their two TF32 parts, take more registers than there are."""
    whole = block_P(q.shape[-1])
    return 64 if q.element_size() == 4 and whole > 128 else whole


BLOCK_POSITIONS = 256


def _bounds(cu_seqlens, L):
    if cu_seqlens is None:
        return None
    bounds = torch.empty(2, L, dtype=torch.int32, device=cu_seqlens.device)
    sequences = cu_seqlens.shape[0] - 1
    sequence_bounds_kernel[(triton.cdiv(L, BLOCK_POSITIONS),)](
        cu_seqlens, bounds, L, sequences, sequences.bit_length(), cu_seqlens.stride(0), BLOCK_M=BLOCK_POSITIONS)
    return bounds


def mask_strides(key_mask):
    return (0, 0) if key_mask is None else key_mask.stride()


def local_attention_fwd_triton(q, k, v, window, causal, scale, key_mask, cu_seqlens):
    B, L, H, P = q.shape
    y, lse = q.new_empty(q.shape), torch.empty(B, H, L, dtype=torch.float32, device=q.device)
    if y.numel() == 0:
        return y, lse
    if scale < 0:  # the kernel takes the largest product for the largest score
        q, scale = -q, -scale
    bounds, window = _bounds(cu_seqlens, L), min(window, L)

    def run(BLOCK_M, **options):
        local_attention_fwd_kernel[(triton.cdiv(L, BLOCK_M) * H * B,)](
            q, k, v, y, lse, key_mask, bounds, L, H, H // k.shape[2], window - 1, 0 if causal else window - 1, scale * math.log2(math.e),
            *q.stride(), *k.stride(), *v.stride(), *mask_strides(key_mask), HAS_KEY_MASK=key_mask is not None, PACKED=bounds is not None,
            PRECISION=runtime.dot_precision(q.device, q.dtype), P=P, BLOCK_M=BLOCK_M, BLOCK_P=block_P(P), BLOCK_K=block_K(q), **options,
        )

    FWD.launch(q, run, P=block_P(P), masked=int(key_mask is not None))
    return y, lse


def local_attention_bwd_triton(dy, q, k, v, y, lse, window, causal, scale, key_mask, cu_seqlens):
    B, L, H, P = q.shape
    Hk = k.shape[2]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if q.numel() == 0:
        return dq, dk, dv
    bounds, window, lse = _bounds(cu_seqlens, L), min(window, L), lse.contiguous()
    delta = torch.empty_like(lse)
    band = (window - 1, 0 if causal else window - 1, scale * math.log2(math.e), scale)
    flags = dict(HAS_KEY_MASK=key_mask is not None, PACKED=bounds is not None, PRECISION=runtime.dot_precision(q.device, q.dtype), P=P,
                 BLOCK_P=block_P(P), BLOCK_K=block_K(q))

    def run_queries(BLOCK_M, **options):
        local_attention_bwd_queries_kernel[(triton.cdiv(L, BLOCK_M) * H * B,)](
            dy, q, k, v, y, lse, delta, dq, key_mask, bounds, L, H, H // Hk, *band, *dy.stride(), *q.stride(), *k.stride(), *v.stride(), *y.stride(),
            *mask_strides(key_mask), BLOCK_M=BLOCK_M, **flags, **options,
        )

    def run_keys(BLOCK_N, **options):
        local_attention_bwd_keys_kernel[(triton.cdiv(L, BLOCK_N) * Hk * B,)](
            dy, q, k, v, lse, delta, dk, dv, key_mask, bounds, L, Hk, H // Hk, *band, *dy.stride(), *q.stride(), *k.stride(), *v.stride(),
            *mask_strides(key_mask), BLOCK_N=BLOCK_N, **flags, **options,
        )

    BWD_QUERIES.launch(q, run_queries, P=block_P(P))
    BWD_KEYS.launch(q, run_keys, P=block_P(P))
    return dq, dk, dv
