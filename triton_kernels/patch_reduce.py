"""One row for each patch of bytes: y[s] = max, mean or min of h[l] over the bytes l of patch s; zeros where it is empty.

Layouts: h (B, L, D) in any strides, y (B, S, D) and dh (B, L, D) contiguous. Ids do not fall along a row, so a patch's bytes
lie between its first and its last; both are found by integer minima and maxima, which come out the same in any order. Then
one program takes one patch and BLOCK_D channels, BLOCK_L bytes at a time. Backward: mean gives every byte dy / n; max and min
give dy to the bytes that hold it, in equal parts: a pass that counts them, and one that writes.
Memory bandwidth is the limit.
"""
import torch
import triton
import triton.language as tl

from . import configs

AMAX, MEAN, AMIN = (tl.constexpr(number) for number in range(3))  # PatchReduction of csrc/common/params.h
# A row of the block is 16 bytes for every thread, so that bytes are summed within threads.
REDUCE = configs.Table(
    "patch_reduce",
    configs.Row({"BLOCK_L": 4, "BLOCK_D": 512}, num_warps=1, arch=("gfx",), itemsize=2),  # 8 would spill
    configs.Row({"BLOCK_L": 8, "BLOCK_D": 256}, num_warps=1, arch=("gfx",)),
    configs.Row({"BLOCK_L": 8, "BLOCK_D": 512}, num_warps=2, itemsize=2),
    configs.Row({"BLOCK_L": 8, "BLOCK_D": 256}, num_warps=2),
)
BLOCK_IDS, BLOCK_CLEAR = 256, 16


@triton.jit
def _ids(ids_ptr, L, stride_ids_b, stride_ids_l, BLOCK_L: tl.constexpr):
    """A block of bytes: row, positions, and where their ids are."""
    blocks = tl.cdiv(L, BLOCK_L)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_l = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    return row, offs_l, ids_ptr + row * stride_ids_b + offs_l.to(tl.int64) * stride_ids_l


@triton.jit
def patch_ranges_kernel(ids_ptr, ranges_ptr, L, S, stride_ids_b, stride_ids_l, BLOCK_L: tl.constexpr):
    """ranges [B, S, 2]: the first byte of each patch, and the one behind its last; they come as (L, 0)."""
    row, offs_l, at = _ids(ids_ptr, L, stride_ids_b, stride_ids_l, BLOCK_L)
    patch = tl.load(at, mask=offs_l < L, other=-1)
    before = tl.load(at - stride_ids_l, mask=(offs_l > 0) & (offs_l < L), other=-1)
    behind = tl.load(at + stride_ids_l, mask=offs_l + 1 < L, other=-1)
    live = (patch >= 0) & (patch < S)
    range_ptr = ranges_ptr + (row * S + patch) * 2
    tl.atomic_min(range_ptr, offs_l, mask=live & (before != patch))  # bytes of no patch may part a patch
    tl.atomic_max(range_ptr + 1, offs_l + 1, mask=live & (behind != patch))


@triton.jit
def _range(ranges_ptr, item):
    return tl.load(ranges_ptr + item * 2), tl.load(ranges_ptr + item * 2 + 1)


@triton.jit
def _bytes(ids_ptr, begin, end, s, stride_ids_l, BLOCK_L: tl.constexpr):
    """The next BLOCK_L bytes, and which of them are the patch's."""
    offs_l = (begin + tl.arange(0, BLOCK_L)).to(tl.int64)
    return offs_l, (tl.load(ids_ptr + offs_l * stride_ids_l, mask=offs_l < end, other=-1) == s)


@triton.jit
def patch_reduce_fwd_kernel(
    h_ptr, ids_ptr, ranges_ptr, y_ptr, S, D, stride_h_b, stride_h_l, stride_h_d, stride_ids_b, stride_ids_l,
    REDUCE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    row, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask_d = offs_d < D
    h_ptr += row * stride_h_b
    ids_ptr += row * stride_ids_b
    first, end = _range(ranges_ptr, item)
    nothing: tl.constexpr = 0.0 if REDUCE == MEAN else -float("inf") if REDUCE == AMAX else float("inf")
    acc = tl.full((BLOCK_D,), nothing, tl.float32)
    spoilt = tl.zeros((BLOCK_D,), tl.int32)  # a NaN among the values is the result
    count = 0
    for begin in range(first, end, BLOCK_L):
        offs_l, mine = _bytes(ids_ptr, begin, end, s, stride_ids_l, BLOCK_L)
        mask = mine[:, None] & mask_d[None, :]
        h = tl.load(h_ptr + offs_l[:, None] * stride_h_l + offs_d[None, :] * stride_h_d, mask=mask, other=nothing).to(tl.float32)
        count += tl.sum(mine.to(tl.int32), 0)
        if REDUCE == MEAN:
            acc += tl.sum(h, 0)
        else:
            acc = tl.maximum(acc, tl.max(h, 0)) if REDUCE == AMAX else tl.minimum(acc, tl.min(h, 0))
            spoilt += tl.sum((h != h).to(tl.int32), 0)
    if REDUCE == MEAN:
        acc /= tl.maximum(count, 1)
    else:
        acc = tl.where(spoilt > 0, float("nan"), acc)
    acc = tl.where(count > 0, acc, 0.0)
    tl.store(y_ptr + item * D + offs_d, acc.to(y_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def patch_reduce_bwd_kernel(
    dy_ptr, h_ptr, y_ptr, ids_ptr, ranges_ptr, dh_ptr, L, S, D,
    stride_dy_b, stride_dy_s, stride_dy_d, stride_h_b, stride_h_l, stride_h_d, stride_ids_b, stride_ids_l,
    REDUCE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    row, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask_d = offs_d < D
    h_ptr += row * stride_h_b + offs_d[None, :] * stride_h_d
    dh_ptr += row * L * D + offs_d[None, :]
    ids_ptr += row * stride_ids_b
    first, end = _range(ranges_ptr, item)
    y = tl.load(y_ptr + item * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    holders = tl.zeros((BLOCK_D,), tl.int32)
    for begin in range(first, end, BLOCK_L):
        offs_l, mine = _bytes(ids_ptr, begin, end, s, stride_ids_l, BLOCK_L)
        mask = mine[:, None] & mask_d[None, :]
        if REDUCE == MEAN:
            holders += tl.sum(mine.to(tl.int32), 0)
        else:
            h = tl.load(h_ptr + offs_l[:, None] * stride_h_l, mask=mask, other=0.0).to(tl.float32)
            holders += tl.sum((mask & (h == y[None, :])).to(tl.int32), 0)
    dy = tl.load(dy_ptr + row * stride_dy_b + s * stride_dy_s + offs_d * stride_dy_d, mask=mask_d, other=0.0).to(tl.float32)
    share = dy / tl.maximum(holders, 1)  # where none hold it, the result is NaN and nobody gets anything
    for begin in range(first, end, BLOCK_L):
        offs_l, mine = _bytes(ids_ptr, begin, end, s, stride_ids_l, BLOCK_L)
        mask = mine[:, None] & mask_d[None, :]
        dh = tl.zeros((BLOCK_L, BLOCK_D), tl.float32) + share[None, :]
        if REDUCE != MEAN:
            h = tl.load(h_ptr + offs_l[:, None] * stride_h_l, mask=mask, other=0.0).to(tl.float32)
            dh = tl.where(h == y[None, :], dh, 0.0)
        tl.store(dh_ptr + offs_l[:, None] * D, dh.to(dh_ptr.dtype.element_ty), mask=mask)


@triton.jit
def patch_reduce_bwd_clear_kernel(ids_ptr, dh_ptr, L, S, D, stride_ids_b, stride_ids_l, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros for the bytes of no patch."""
    row, offs_l, at = _ids(ids_ptr, L, stride_ids_b, stride_ids_l, BLOCK_L)
    patch = tl.load(at, mask=offs_l < L, other=0)
    mask_l = (offs_l < L) & ((patch < 0) | (patch >= S))
    if tl.sum(mask_l.to(tl.int32), 0) > 0:
        for begin in range(0, D, BLOCK_D):
            offs_d = begin + tl.arange(0, BLOCK_D)
            dh = tl.zeros((BLOCK_L, BLOCK_D), dh_ptr.dtype.element_ty)
            tl.store(dh_ptr + (row * L + offs_l)[:, None] * D + offs_d[None, :], dh, mask=mask_l[:, None] & (offs_d < D)[None, :])


def _ranges(patch_ids, S):
    """(B, S, 2) int32: where the bytes of each patch lie; (L, 0) for an empty one."""
    B, L = patch_ids.shape
    ranges = torch.empty(B, S, 2, dtype=torch.int32, device=patch_ids.device)
    ranges[..., 0], ranges[..., 1] = L, 0
    if ranges.numel() and L:
        patch_ranges_kernel[(B * triton.cdiv(L, BLOCK_IDS),)](patch_ids, ranges, L, S, *patch_ids.stride(), BLOCK_L=BLOCK_IDS)
    return ranges


def patch_reduce_fwd_triton(h, patch_ids, num_patches, reduce):
    B, _, D = h.shape
    y = h.new_empty(B, num_patches, D)
    ranges = _ranges(patch_ids, num_patches)

    def run(BLOCK_L, BLOCK_D, **options):
        BLOCK_D = min(BLOCK_D, triton.next_power_of_2(D))
        patch_reduce_fwd_kernel[B * num_patches, triton.cdiv(D, BLOCK_D)](
            h, patch_ids, ranges, y, num_patches, D, *h.stride(), *patch_ids.stride(), REDUCE=reduce, BLOCK_L=BLOCK_L, BLOCK_D=BLOCK_D, **options,
        )

    if y.numel():
        REDUCE.launch(h, run)
    return y


def patch_reduce_bwd_triton(dy, h, y, patch_ids, reduce):
    B, L, D = h.shape
    S = y.shape[1]
    dh = h.new_empty(B, L, D)
    y = y.contiguous()
    ranges = _ranges(patch_ids, S)

    def run(BLOCK_L, BLOCK_D, **options):
        BLOCK_D = min(BLOCK_D, triton.next_power_of_2(D))
        if S:
            patch_reduce_bwd_kernel[B * S, triton.cdiv(D, BLOCK_D)](
                dy, h, y, patch_ids, ranges, dh, L, S, D, *dy.stride(), *h.stride(), *patch_ids.stride(),
                REDUCE=reduce, BLOCK_L=BLOCK_L, BLOCK_D=BLOCK_D, **options,
            )
        patch_reduce_bwd_clear_kernel[(B * triton.cdiv(L, BLOCK_CLEAR),)](
            patch_ids, dh, L, S, D, *patch_ids.stride(), BLOCK_L=BLOCK_CLEAR, BLOCK_D=BLOCK_D, **options,
        )

    if dh.numel():
        REDUCE.launch(h, run)
    return dh
