"""Gated RMS norm: y = rms(x) * weight * silu(z), or rms(x * silu(z)) * weight, over groups of the last dimension.

Layouts: x, z, y (M, D) in any strides; weight (D,). One program takes BLOCK_M rows of one group; the group fits into one
block, so that x and z are read once and y written once: the kernel is limited by memory bandwidth. The backward computes
the norm again instead of storing it, and sums dweight in two steps: every program adds the rows it walks into a row of
partial sums of its own, which a second kernel adds up in a fixed order (deterministic, no atomics). HOLD keeps that row in
registers meanwhile; wide groups of float32 have none left for it.
"""
import torch
import triton
import triton.language as tl

from . import configs, runtime

FWD = configs.Table(
    "rmsnorm_gated_fwd",
    configs.Row({"BLOCK_M": 8}, num_warps=4, up_to={"group_size": 256}),
    configs.Row({"BLOCK_M": 1}, num_warps=4, up_to={"group_size": 4096}),
    configs.Row({"BLOCK_M": 1}, num_warps=16),
)
BWD = configs.Table(
    "rmsnorm_gated_bwd",
    configs.Row({"BLOCK_M": 4, "HOLD": True}, num_warps=4, up_to={"group_size": 256}),
    configs.Row({"BLOCK_M": 1, "HOLD": True}, num_warps=8, up_to={"group_size": 4096}),
    configs.Row({"BLOCK_M": 1, "HOLD": True}, num_warps=16, itemsize=2, up_to={"group_size": 8192}),
    configs.Row({"BLOCK_M": 1, "HOLD": False}, num_warps=16),
)
BLOCK_PARTIALS = 64


@triton.jit
def _load_rows(ptr, stride_m, stride_d, offs_m, offs_d, mask, EVICTION: tl.constexpr = ""):
    ptrs = ptr + offs_m[:, None].to(tl.int64) * stride_m + offs_d[None, :].to(tl.int64) * stride_d
    return tl.load(ptrs, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)


@triton.jit
def rmsnorm_gated_fwd_kernel(
    x_ptr, weight_ptr, z_ptr, y_ptr, M, D, group_size, eps,
    stride_x_m, stride_x_d, stride_weight_d, stride_z_m, stride_z_d,
    HAS_Z: tl.constexpr, NORM_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_group = tl.arange(0, BLOCK_D)
    offs_d = tl.program_id(1) * group_size + in_group
    mask_d = in_group < group_size
    mask = (offs_m < M)[:, None] & mask_d[None, :]
    y = _load_rows(x_ptr, stride_x_m, stride_x_d, offs_m, offs_d, mask)
    if HAS_Z:
        z = _load_rows(z_ptr, stride_z_m, stride_z_d, offs_m, offs_d, mask)
        gate = z * tl.sigmoid(z)
        if not NORM_FIRST:
            y *= gate
    weight = tl.load(weight_ptr + offs_d * stride_weight_d, mask=mask_d, other=0.0).to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 1) / group_size + eps)[:, None] * weight[None, :]
    if HAS_Z and NORM_FIRST:
        y *= gate
    tl.store(y_ptr + offs_m[:, None].to(tl.int64) * D + offs_d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rmsnorm_gated_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, z_ptr, dx_ptr, dz_ptr, partial_ptr, M, D, group_size, eps,
    stride_dy_m, stride_dy_d, stride_x_m, stride_x_d, stride_weight_d, stride_z_m, stride_z_d,
    HAS_Z: tl.constexpr, NORM_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HOLD: tl.constexpr,
):
    program = tl.program_id(0)
    in_group = tl.arange(0, BLOCK_D)
    offs_d = tl.program_id(1) * group_size + in_group
    mask_d = in_group < group_size
    partial_ptrs = partial_ptr + program.to(tl.int64) * D + offs_d
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    for begin in range(program * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        offs_m = begin + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_d[None, :]
        x = _load_rows(x_ptr, stride_x_m, stride_x_d, offs_m, offs_d, mask, "evict_last")
        dy = _load_rows(dy_ptr, stride_dy_m, stride_dy_d, offs_m, offs_d, mask, "evict_last")
        normed, dnormed = x, dy
        if HAS_Z:
            z = _load_rows(z_ptr, stride_z_m, stride_z_d, offs_m, offs_d, mask, "evict_last")
            if NORM_FIRST:
                dnormed = dy * z * tl.sigmoid(z)
            else:
                normed = x * z * tl.sigmoid(z)
        weight = tl.load(weight_ptr + offs_d * stride_weight_d, mask=mask_d, other=0.0).to(tl.float32)
        # with r = rsqrt(mean(normed^2) + eps): d(normed r w) = r w g - normed r^3 mean(normed w g)
        r = tl.rsqrt(tl.sum(normed * normed, 1) / group_size + eps)[:, None]
        of_rows = tl.sum(dnormed * normed * r, 0)
        if HOLD:
            dweight += of_rows
        else:
            before = tl.load(partial_ptrs, mask=mask_d & (begin != program * BLOCK_M), other=0.0)
            tl.store(partial_ptrs, before + of_rows, mask=mask_d)
        dot = (tl.sum(dnormed * weight[None, :] * normed, 1) / group_size)[:, None]
        offs_out = offs_m[:, None].to(tl.int64) * D + offs_d[None, :]
        # the row comes from the cache once more, and weight with every row: registers would not hold them for wide groups
        x = _load_rows(x_ptr, stride_x_m, stride_x_d, offs_m, offs_d, mask, "evict_first")
        dy = _load_rows(dy_ptr, stride_dy_m, stride_dy_d, offs_m, offs_d, mask, "evict_first")
        if HAS_Z:
            z = _load_rows(z_ptr, stride_z_m, stride_z_d, offs_m, offs_d, mask, "evict_first")
            sigmoid = tl.sigmoid(z)
            gate = z * sigmoid
            if NORM_FIRST:
                dx = r * (dy * gate * weight[None, :] - x * r * r * dot)
                dgate = dy * x * r * weight[None, :]
            else:
                dinside = r * (dy * weight[None, :] - x * gate * r * r * dot)
                dx = dinside * gate
                dgate = dinside * x
            dz = dgate * sigmoid * (1 + z * (1 - sigmoid))
            tl.store(dz_ptr + offs_out, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        else:
            dx = r * (dy * weight[None, :] - x * r * r * dot)
        tl.store(dx_ptr + offs_out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if HOLD:
        tl.store(partial_ptrs, dweight, mask=mask_d)


@triton.jit
def sum_rows_kernel(partial_ptr, out_ptr, rows, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """out (D,) = the sum of partial (rows, D), always in the same order."""
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for begin in range(0, rows, BLOCK_M):
        offs_m = begin + tl.arange(0, BLOCK_M)
        mask = (offs_m < rows)[:, None] & mask_d[None, :]
        acc += tl.sum(tl.load(partial_ptr + offs_m[:, None].to(tl.int64) * D + offs_d[None, :], mask=mask, other=0.0), 0)
    tl.store(out_ptr + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)


def rmsnorm_gated_fwd_triton(x, weight, z, eps, group_size, norm_before_gate):
    M, D = x.shape
    y = x.new_empty(M, D)
    if M == 0:
        return y

    def run(BLOCK_M, **options):
        runtime.visible(rmsnorm_gated_fwd_kernel)[triton.cdiv(M, BLOCK_M), D // group_size](
            x, weight, z, y, M, D, group_size, eps, *x.stride(), *weight.stride(), *(z.stride() if z is not None else (0, 0)),
            HAS_Z=z is not None, NORM_FIRST=norm_before_gate, BLOCK_M=BLOCK_M, BLOCK_D=triton.next_power_of_2(int(group_size)), **options,
        )

    FWD.launch(x, run, group_size=group_size)
    return y


def rmsnorm_gated_bwd_triton(dy, x, weight, z, eps, group_size, norm_before_gate):
    M, D = x.shape
    dx, dweight = x.new_empty(M, D), torch.empty_like(weight)
    dz = x.new_empty(0) if z is None else z.new_empty(M, D)
    if M == 0:
        return dx, dweight.zero_(), dz
    groups = D // group_size

    def run(BLOCK_M, HOLD, **options):
        programs = min(triton.cdiv(M, BLOCK_M), max(1, 4 * runtime.num_processors(x.device) // groups))
        partial = torch.empty(programs, D, dtype=torch.float32, device=x.device)
        runtime.visible(rmsnorm_gated_bwd_kernel)[programs, groups](
            dy, x, weight, z, dx, dz, partial, M, D, group_size, eps, *dy.stride(), *x.stride(), *weight.stride(), *(z.stride() if z is not None else (0, 0)),
            HAS_Z=z is not None, NORM_FIRST=norm_before_gate, BLOCK_M=BLOCK_M, BLOCK_D=triton.next_power_of_2(int(group_size)), HOLD=HOLD, **options,
        )
        runtime.visible(sum_rows_kernel)[(triton.cdiv(D, BLOCK_PARTIALS),)](partial, dweight, programs, D, BLOCK_M=16, BLOCK_D=BLOCK_PARTIALS)

    BWD.launch(x, run, group_size=group_size)
    return dx, dweight, dz
