"""Attention between patches and their bytes: y[i] = sum over the keys j that i sees of softmax_j(scale q[i] . k[j]) v[j]; else zeros.

Layouts: q, y (B, Lq, H, P), k, v (B, Lk, Hk, P), any strides; patch_ids (B, L); query head h reads key head h // (H // Hk). Patches
ask (rows of q are K queries a patch, keys are bytes) or bytes ask (the other way round); a query sees the `window` patches that
end with its own. Negative ids may stand anywhere and ids >= S belong to no patch.

The mask of bytes x patches is a band, so a program takes BLOCK_M queries of one head and walks only the rows of keys between the
first and the last patch that they see: patch rows by arithmetic, byte rows from `starts`, which one pass over the ids leaves.
Inside, a block of scores is a tl.dot with the few pairs of equal patches let through. It computes some 15 pairs for one that
counts, but tensor cores have that to spare: k and v leave memory once and the kernel stays limited by bandwidth, where sums of
products over single patches would be bound by shuffles. All is O(bytes * window). Nothing but y is kept from the forward: the
backward by queries walks its keys twice, for the softmax with D = sum of p (dy . v) and for dq, and leaves three numbers a row
to the pass by keys, which gives dk and dv (deterministic, no atomics). Both passes take their dot products in blocks of one
shape, so that a query with a single key gets gradients of exactly zero.
"""
import math

import torch
import triton
import triton.language as tl

from . import configs, runtime
from .local_attention import FLOOR, block_K, block_P, load_rows, mask_strides, scores, store_rows

FWD = configs.Table(
    "patch_cross_attention_fwd",
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=4, num_stages=2, arch=("sm",), itemsize=2, up_to={"bytes_ask": 0, "P": 64}),  # 16 patches
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=8, num_stages=2, arch=("sm",), itemsize=2, up_to={"bytes_ask": 0, "P": 128}),
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2, itemsize=2, up_to={"P": 128}),  # 64 bytes, 15 patches
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=1, up_to={"P": 64}),
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=1, arch=("sm10",), up_to={"P": 128}),
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=1, up_to={"P": 128}),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=8, num_stages=1),
)
BWD = configs.Table(  # for both passes
    "patch_cross_attention_bwd",
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=2, itemsize=2, up_to={"bytes_ask": 0, "P": 64}),
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2, itemsize=2, up_to={"P": 64}),
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=1, itemsize=2, up_to={"P": 128}),  # half of it spills in 4 warps
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=1, arch=("sm9", "sm12", "gfx"), up_to={"P": 64}),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=4, num_stages=1, up_to={"P": 128}),
    configs.Row({"BLOCK_M": 32, "BLOCK_N": 16}, num_warps=8, num_stages=1, itemsize=2),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=8, num_stages=1),
)
BLOCK_IDS, BLOCK_BEFORE = 64, 1024


@triton.jit
def patch_starts_kernel(ids_ptr, starts_ptr, L, S, stride_ids_b, stride_ids_l, BLOCK_L: tl.constexpr, BLOCK_BEFORE: tl.constexpr):
    """starts[b, s] = the first byte whose id is s or more; the caller has filled starts (B, S + 1) with L."""
    blocks = tl.cdiv(L, BLOCK_L)
    b, begin = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK_L
    ids_ptr += b * stride_ids_b
    starts_ptr += b * (S + 1)
    here = tl.arange(0, BLOCK_L)
    offs_l = begin + here
    ids = tl.load(ids_ptr + offs_l.to(tl.int64) * stride_ids_l, mask=offs_l < L, other=-1)
    ids = tl.minimum(tl.maximum(ids, -1), S).to(tl.int32)
    # the id in front of the block: that of the nearest byte which has one
    before = tl.full((), -1, tl.int32)
    if tl.max(ids, 0) >= 0:
        at = begin
        while (before < 0) & (at > 0):
            at -= BLOCK_BEFORE
            offs = at + tl.arange(0, BLOCK_BEFORE)
            found = tl.load(ids_ptr + offs.to(tl.int64) * stride_ids_l, mask=offs >= 0, other=-1)
            before = tl.max(tl.minimum(tl.maximum(found, -1), S).to(tl.int32), 0)
    # the id in front of each byte, and the patches that begin with it: its own and the empty ones before
    previous = tl.max(tl.where(here[None, :] < here[:, None], ids[None, :], -1), 1)
    previous = tl.maximum(previous, before)
    opened = tl.maximum(ids - previous, 0)
    for i in range(tl.max(opened, 0)):
        tl.store(starts_ptr + previous + 1 + i, offs_l, mask=i < opened)


@triton.jit
def _patches(ids_ptr, stride_ids_l, offs, mask, S, none, K: tl.constexpr, ARE_BYTES: tl.constexpr):
    """The patch of each row of one side; `none` where a row has no patch."""
    if ARE_BYTES:
        ids = tl.load(ids_ptr + offs.to(tl.int64) * stride_ids_l, mask=mask, other=-1)
        return tl.where((ids >= 0) & (ids < S), ids, none).to(tl.int32)
    return tl.where(mask, offs // K, none)


@triton.jit
def _rows_of(starts_ptr, first, last, K: tl.constexpr, ARE_BYTES: tl.constexpr):
    """The rows [begin, end) of the patches [first, last) on one side."""
    if ARE_BYTES:
        return tl.load(starts_ptr + first), tl.load(starts_ptr + last)
    return first * K, last * K


@triton.jit
def _keys_of(
    k_ptr, v_ptr, ids_ptr, key_mask_ptr, start, end, S, stride_k_l, stride_k_p, stride_v_l, stride_v_p, stride_ids_l, stride_key_mask_l,
    BYTES_ASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """k and v of the rows from start on, these rows, which of them exist, and their patches: S, later than any query, for keys hidden from all."""
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < end
    k = load_rows(k_ptr, stride_k_l, stride_k_p, offs_n, mask_n, P, BLOCK_P)
    v = load_rows(v_ptr, stride_v_l, stride_v_p, offs_n, mask_n, P, BLOCK_P)
    live = mask_n
    if HAS_KEY_MASK:
        live &= tl.load(key_mask_ptr + offs_n.to(tl.int64) * stride_key_mask_l, mask=mask_n, other=0) != 0
    return k, v, offs_n, mask_n, _patches(ids_ptr, stride_ids_l, offs_n, live, S, S, K, not BYTES_ASK)


@triton.jit
def _sees(of_query, of_key, window):
    behind = of_query[:, None] - of_key[None, :]
    return (behind >= 0) & (behind < window)


@triton.jit
def _softmax_step(top, total, s, seen, unit):
    """Online softmax: the weights of a block so far, what everything before must be multiplied by, the new top and total.

    The top is taken away before the unit is multiplied in: the largest weight is exactly 1 however the compiler contracts.
    """
    higher = tl.maximum(top, tl.max(tl.where(seen, s, FLOOR), 1))
    p = tl.where(seen, tl.exp2((s - higher[:, None]) * unit), 0.0)
    factor = tl.exp2((top - higher) * unit)
    return p, factor, higher, total * factor + tl.sum(p, 1)


@triton.jit
def patch_cross_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, ids_ptr, starts_ptr, key_mask_ptr, Lq, S, H, group, window, unit,
    stride_q_b, stride_q_l, stride_q_h, stride_q_p, stride_k_b, stride_k_l, stride_k_h, stride_k_p,
    stride_v_b, stride_v_l, stride_v_h, stride_v_p, stride_ids_b, stride_ids_l, stride_key_mask_b, stride_key_mask_l,
    BYTES_ASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    h, rest = (tl.program_id(0) % H).to(tl.int64), tl.program_id(0) // H
    blocks_m = tl.cdiv(Lq, BLOCK_M)
    b, offs_m = (rest // blocks_m).to(tl.int64), rest % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < Lq
    ids_ptr += b * stride_ids_b
    k_ptr += b * stride_k_b + h // group * stride_k_h
    v_ptr += b * stride_v_b + h // group * stride_v_h
    if not BYTES_ASK:
        starts_ptr += b * (S + 1)
    if HAS_KEY_MASK:
        key_mask_ptr += b * stride_key_mask_b
    of_query = _patches(ids_ptr, stride_ids_l, offs_m, mask_m, S, -1, K, BYTES_ASK)
    first = tl.min(tl.where(of_query < 0, S, of_query), 0)
    begin, end = _rows_of(starts_ptr, tl.maximum(first - window + 1, 0), tl.max(of_query, 0) + 1, K, not BYTES_ASK)
    q_ptr += b * stride_q_b + h * stride_q_h
    q = load_rows(q_ptr, stride_q_l, stride_q_p, offs_m, mask_m, P, BLOCK_P)
    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    top = tl.full((BLOCK_M,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        k, v, offs_n, mask_n, of_key = _keys_of(
            k_ptr, v_ptr, ids_ptr, key_mask_ptr, start, end, S, stride_k_l, stride_k_p, stride_v_l, stride_v_p, stride_ids_l, stride_key_mask_l,
            BYTES_ASK, HAS_KEY_MASK, K, P, BLOCK_N, BLOCK_P,
        )
        s = scores(q, k.to(q.dtype), q_ptr, k_ptr, offs_m, offs_n, mask_m, mask_n,
                   stride_q_l, stride_q_p, stride_k_l, stride_k_p, PRECISION, P, BLOCK_P, BLOCK_K)
        p, factor, top, total = _softmax_step(top, total, s, _sees(of_query, of_key, window), unit)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * factor[:, None], input_precision=PRECISION)
    y = acc / tl.where(total == 0, 1.0, total)[:, None]
    store_rows(y_ptr + (b * Lq * H + h) * P, H * P, offs_m, mask_m, y, P, BLOCK_P)


@triton.jit
def patch_cross_attention_bwd_queries_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, stats_ptr, ids_ptr, starts_ptr, key_mask_ptr, Lq, S, H, group, window, unit, scale,
    stride_dy_b, stride_dy_l, stride_dy_h, stride_dy_p, stride_q_b, stride_q_l, stride_q_h, stride_q_p,
    stride_k_b, stride_k_l, stride_k_h, stride_k_p, stride_v_b, stride_v_l, stride_v_h, stride_v_p,
    stride_ids_b, stride_ids_l, stride_key_mask_b, stride_key_mask_l,
    BYTES_ASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dq, and stats (B, H, 3, Lq): the largest product q . k of each query, the inverse of its softmax's sum, and D."""
    h, rest = (tl.program_id(0) % H).to(tl.int64), tl.program_id(0) // H
    blocks_m = tl.cdiv(Lq, BLOCK_M)
    b, offs_m = (rest // blocks_m).to(tl.int64), rest % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < Lq
    ids_ptr += b * stride_ids_b
    k_ptr += b * stride_k_b + h // group * stride_k_h
    v_ptr += b * stride_v_b + h // group * stride_v_h
    if not BYTES_ASK:
        starts_ptr += b * (S + 1)
    if HAS_KEY_MASK:
        key_mask_ptr += b * stride_key_mask_b
    of_query = _patches(ids_ptr, stride_ids_l, offs_m, mask_m, S, -1, K, BYTES_ASK)
    first = tl.min(tl.where(of_query < 0, S, of_query), 0)
    begin, end = _rows_of(starts_ptr, tl.maximum(first - window + 1, 0), tl.max(of_query, 0) + 1, K, not BYTES_ASK)
    q_ptr += b * stride_q_b + h * stride_q_h
    q = load_rows(q_ptr, stride_q_l, stride_q_p, offs_m, mask_m, P, BLOCK_P)
    dy_ptr += b * stride_dy_b + h * stride_dy_h
    dy = load_rows(dy_ptr, stride_dy_l, stride_dy_p, offs_m, mask_m, P, BLOCK_P).to(q.dtype)
    # once for the softmax and D
    top = tl.full((BLOCK_M,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    D = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        k, v, offs_n, mask_n, of_key = _keys_of(
            k_ptr, v_ptr, ids_ptr, key_mask_ptr, start, end, S, stride_k_l, stride_k_p, stride_v_l, stride_v_p, stride_ids_l, stride_key_mask_l,
            BYTES_ASK, HAS_KEY_MASK, K, P, BLOCK_N, BLOCK_P,
        )
        k, v = k.to(q.dtype), v.to(q.dtype)
        s = scores(q, k, q_ptr, k_ptr, offs_m, offs_n, mask_m, mask_n, stride_q_l, stride_q_p, stride_k_l, stride_k_p, PRECISION, P, BLOCK_P, BLOCK_K)
        dp = scores(dy, v, dy_ptr, v_ptr, offs_m, offs_n, mask_m, mask_n,
                    stride_dy_l, stride_dy_p, stride_v_l, stride_v_p, PRECISION, P, BLOCK_P, BLOCK_K)
        p, factor, top, total = _softmax_step(top, total, s, _sees(of_query, of_key, window), unit)
        D = D * factor + tl.sum(p * dp, 1)
    inverse = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    D *= inverse
    at = stats_ptr + (b * H + h) * 3 * Lq + offs_m
    tl.store(at, top, mask=mask_m)
    tl.store(at + Lq, inverse, mask=mask_m)
    tl.store(at + 2 * Lq, D, mask=mask_m)
    # once more for dq
    dq = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for start in range(begin, end, BLOCK_N):
        k, v, offs_n, mask_n, of_key = _keys_of(
            k_ptr, v_ptr, ids_ptr, key_mask_ptr, start, end, S, stride_k_l, stride_k_p, stride_v_l, stride_v_p, stride_ids_l, stride_key_mask_l,
            BYTES_ASK, HAS_KEY_MASK, K, P, BLOCK_N, BLOCK_P,
        )
        k, v = k.to(q.dtype), v.to(q.dtype)
        s = scores(q, k, q_ptr, k_ptr, offs_m, offs_n, mask_m, mask_n, stride_q_l, stride_q_p, stride_k_l, stride_k_p, PRECISION, P, BLOCK_P, BLOCK_K)
        dp = scores(dy, v, dy_ptr, v_ptr, offs_m, offs_n, mask_m, mask_n,
                    stride_dy_l, stride_dy_p, stride_v_l, stride_v_p, PRECISION, P, BLOCK_P, BLOCK_K)
        p = tl.where(_sees(of_query, of_key, window), tl.exp2((s - top[:, None]) * unit), 0.0) * inverse[:, None]
        dq = tl.dot((p * (dp - D[:, None])).to(q.dtype), k, dq, input_precision=PRECISION)
    store_rows(dq_ptr + (b * Lq * H + h) * P, H * P, offs_m, mask_m, dq * scale, P, BLOCK_P)


@triton.jit
def patch_cross_attention_bwd_keys_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr, stats_ptr, ids_ptr, starts_ptr, key_mask_ptr, Lq, Lk, S, Hk, group, window, unit, scale,
    stride_dy_b, stride_dy_l, stride_dy_h, stride_dy_p, stride_q_b, stride_q_l, stride_q_h, stride_q_p,
    stride_k_b, stride_k_l, stride_k_h, stride_k_p, stride_v_b, stride_v_l, stride_v_h, stride_v_p,
    stride_ids_b, stride_ids_l, stride_key_mask_b, stride_key_mask_l,
    BYTES_ASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    kv, rest = (tl.program_id(0) % Hk).to(tl.int64), tl.program_id(0) // Hk
    blocks_n = tl.cdiv(Lk, BLOCK_N)
    b, start_n = (rest // blocks_n).to(tl.int64), rest % blocks_n * BLOCK_N
    ids_ptr += b * stride_ids_b
    if BYTES_ASK:
        starts_ptr += b * (S + 1)
    if HAS_KEY_MASK:
        key_mask_ptr += b * stride_key_mask_b
    k_ptr += b * stride_k_b + kv * stride_k_h
    v_ptr += b * stride_v_b + kv * stride_v_h
    k, v, offs_n, mask_n, of_key = _keys_of(
        k_ptr, v_ptr, ids_ptr, key_mask_ptr, start_n, Lk, S, stride_k_l, stride_k_p, stride_v_l, stride_v_p, stride_ids_l, stride_key_mask_l,
        BYTES_ASK, HAS_KEY_MASK, K, P, BLOCK_N, BLOCK_P,
    )
    k, v = k.to(q_ptr.dtype.element_ty), v.to(q_ptr.dtype.element_ty)
    last = tl.max(tl.where(of_key < S, of_key, -1), 0)
    begin, end = _rows_of(starts_ptr, tl.min(of_key, 0), tl.minimum(last + window, S), K, BYTES_ASK)  # of the queries that see these keys
    dk = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for h in range(kv * group, (kv + 1) * group):
        q_head, dy_head = q_ptr + b * stride_q_b + h * stride_q_h, dy_ptr + b * stride_dy_b + h * stride_dy_h
        at = stats_ptr + (b * Hk * group + h) * 3 * Lq
        for start in range(begin, end, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            mask_m = offs_m < end
            q = load_rows(q_head, stride_q_l, stride_q_p, offs_m, mask_m, P, BLOCK_P)
            dy = load_rows(dy_head, stride_dy_l, stride_dy_p, offs_m, mask_m, P, BLOCK_P).to(q.dtype)
            of_query = _patches(ids_ptr, stride_ids_l, offs_m, mask_m, S, -1, K, BYTES_ASK)
            top = tl.load(at + offs_m, mask=mask_m, other=0.0)
            inverse = tl.load(at + Lq + offs_m, mask=mask_m, other=0.0)
            D = tl.load(at + 2 * Lq + offs_m, mask=mask_m, other=0.0)
            s = scores(q, k, q_head, k_ptr, offs_m, offs_n, mask_m, mask_n,
                       stride_q_l, stride_q_p, stride_k_l, stride_k_p, PRECISION, P, BLOCK_P, BLOCK_K)
            dp = scores(dy, v, dy_head, v_ptr, offs_m, offs_n, mask_m, mask_n,
                        stride_dy_l, stride_dy_p, stride_v_l, stride_v_p, PRECISION, P, BLOCK_P, BLOCK_K)
            p = tl.where(_sees(of_query, of_key, window), tl.exp2((s - top[:, None]) * unit), 0.0) * inverse[:, None]
            dv = tl.dot(tl.trans(p.to(q.dtype)), dy, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans((p * (dp - D[:, None])).to(q.dtype)), q, dk, input_precision=PRECISION)
    out = (b * Lk * Hk + kv) * P
    store_rows(dk_ptr + out, Hk * P, offs_n, mask_n, dk * scale, P, BLOCK_P)
    store_rows(dv_ptr + out, Hk * P, offs_n, mask_n, dv, P, BLOCK_P)


def _starts(patch_ids, S):
    B, L = patch_ids.shape
    starts = torch.full((B, S + 1), L, dtype=torch.int32, device=patch_ids.device)
    if patch_ids.numel():
        patch_starts_kernel[(triton.cdiv(L, BLOCK_IDS) * B,)](
            patch_ids, starts, L, S, *patch_ids.stride(), BLOCK_L=BLOCK_IDS, BLOCK_BEFORE=BLOCK_BEFORE)
    return starts


def _flags(q, bytes_ask, k_per_patch, key_mask):
    P = q.shape[3]
    return dict(BYTES_ASK=bytes_ask, HAS_KEY_MASK=key_mask is not None, PRECISION=runtime.dot_precision(q.device, q.dtype), K=k_per_patch, P=P,
                BLOCK_P=block_P(P), BLOCK_K=block_K(q))


def patch_cross_attention_fwd_triton(q, k, v, patch_ids, num_patches, bytes_ask, k_per_patch, scale, window, key_mask, cu_seqlens):
    B, Lq, H, P = q.shape
    y = q.new_empty(q.shape)
    if y.numel() == 0:
        return y
    if scale < 0:  # the kernel takes the largest product for the largest score
        q, scale = -q, -scale
    starts = None if bytes_ask else _starts(patch_ids, num_patches)  # no patch lies in two sequences: cu_seqlens says nothing more
    flags, window = _flags(q, bytes_ask, k_per_patch, key_mask), min(window, max(num_patches, 1))

    def run(BLOCK_M, **options):
        patch_cross_attention_fwd_kernel[(triton.cdiv(Lq, BLOCK_M) * B * H,)](
            q, k, v, y, patch_ids, starts, key_mask, Lq, num_patches, H, H // k.shape[2], window, scale * math.log2(math.e),
            *q.stride(), *k.stride(), *v.stride(), *patch_ids.stride(), *mask_strides(key_mask), BLOCK_M=BLOCK_M, **flags, **options,
        )

    FWD.launch(q, run, bytes_ask=bytes_ask, P=block_P(P))
    return y


def patch_cross_attention_bwd_triton(dy, q, k, v, patch_ids, num_patches, bytes_ask, k_per_patch, scale, window, key_mask, cu_seqlens):
    B, Lq, H, P = q.shape
    Lk, Hk = k.shape[1:3]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    flipped = scale < 0
    if flipped:
        q, scale = -q, -scale
    starts, stats = _starts(patch_ids, num_patches), torch.empty(B, H, 3, Lq, dtype=torch.float32, device=q.device)
    flags, window = _flags(q, bytes_ask, k_per_patch, key_mask), min(window, max(num_patches, 1))
    strides = (*dy.stride(), *q.stride(), *k.stride(), *v.stride(), *patch_ids.stride(), *mask_strides(key_mask))
    rest = (window, scale * math.log2(math.e), scale, *strides)

    def run(BLOCK_M, BLOCK_N, **options):
        options |= flags | {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
        if dq.numel():
            patch_cross_attention_bwd_queries_kernel[(triton.cdiv(Lq, BLOCK_M) * B * H,)](
                dy, q, k, v, dq, stats, patch_ids, starts, key_mask, Lq, num_patches, H, H // Hk, *rest, **options)
        if dk.numel():
            patch_cross_attention_bwd_keys_kernel[(triton.cdiv(Lk, BLOCK_N) * B * Hk,)](
                dy, q, k, v, dk, dv, stats, patch_ids, starts, key_mask, Lq, Lk, num_patches, Hk, H // Hk, *rest, **options)

    BWD.launch(q, run, bytes_ask=bytes_ask, P=block_P(P))
    return -dq if flipped else dq, dk, dv
