"""One decoding step of the selective scan: state = exp(dt A) state + dt B x;  out = (C state + D x) silu(z), state in place.

Layouts: state (slots, H, P, N), x, dt, z (B, H, P), A (H, P, N), B, C (B, G, N), D, dt_bias (H, P), all in any strides; out
(B, H, P). One program takes BLOCK_P rows of one head's state and walks them in blocks of N, each element read and written
once: the kernel is limited by the state's traffic. Where dt, A and dt_bias don't vary inside a head (TIED: expanded with
stride 0, as Mamba-2 has them) the decay is one number per program. `out` is summed from the state before that is rounded.
"""
import triton
import triton.language as tl

from . import configs, runtime

# Rows x N of a program: about 8 elements of the state for a thread.
UPDATE = configs.Table(
    "selective_state_update",
    configs.Row({"BLOCK_P": 64}, num_warps=4, up_to={"N": 16}),
    configs.Row({"BLOCK_P": 32}, num_warps=4, up_to={"N": 32}),
    configs.Row({"BLOCK_P": 16}, num_warps=4, up_to={"N": 64}),
    configs.Row({"BLOCK_P": 8}, num_warps=4, up_to={"N": 128}),
    configs.Row({"BLOCK_P": 4}, num_warps=4),
)
BLOCK_N = 256  # at most


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(exp(-|x|)), exact where the exponential is small against 1."""
    e = tl.exp(-tl.abs(x))
    sum = 1 + e
    rounded = sum - 1  # what 1 + e kept of e
    return tl.maximum(x, 0.0) + tl.where(rounded > 0, tl.log(sum) * (e / tl.where(rounded > 0, rounded, 1.0)), e)


@triton.jit
def selective_state_update_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dt_bias_ptr, indices_ptr, out_ptr, H, P, N, heads_per_group, num_p,
    stride_state_s, stride_state_h, stride_state_p, stride_state_n, stride_x_b, stride_x_h, stride_x_p, stride_dt_b, stride_dt_h, stride_dt_p,
    stride_A_h, stride_A_p, stride_A_n, stride_B_b, stride_B_g, stride_B_n, stride_C_b, stride_C_g, stride_C_n, stride_D_h, stride_D_p,
    stride_z_b, stride_z_h, stride_z_p, stride_dt_bias_h, stride_dt_bias_p, stride_indices,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_DT_BIAS: tl.constexpr, HAS_INDICES: tl.constexpr, SOFTPLUS: tl.constexpr, TIED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    h = (pid // num_p % H).to(tl.int64)
    b = (pid // num_p // H).to(tl.int64)
    g = h // heads_per_group
    offs_p = pid % num_p * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    slot = b
    if HAS_INDICES:
        slot = tl.load(indices_ptr + b * stride_indices).to(tl.int64)
    live = offs_p < tl.where(slot >= 0, P, 0)  # -1: a padding row
    offs_p = offs_p.to(tl.int64)

    # the step: a scalar per head, or a value per row
    if TIED:
        dt = tl.load(dt_ptr + b * stride_dt_b + h * stride_dt_h).to(tl.float32)
        if HAS_DT_BIAS:
            dt += tl.load(dt_bias_ptr + h * stride_dt_bias_h).to(tl.float32)
    else:
        dt = tl.load(dt_ptr + b * stride_dt_b + h * stride_dt_h + offs_p * stride_dt_p, mask=mask_p, other=0.0).to(tl.float32)
        if HAS_DT_BIAS:
            dt += tl.load(dt_bias_ptr + h * stride_dt_bias_h + offs_p * stride_dt_bias_p, mask=mask_p, other=0.0).to(tl.float32)
    if SOFTPLUS:
        dt = _softplus(dt)
    if TIED:
        decay = tl.exp(dt * tl.load(A_ptr + h * stride_A_h).to(tl.float32))
    x = tl.load(x_ptr + b * stride_x_b + h * stride_x_h + offs_p * stride_x_p, mask=mask_p, other=0.0).to(tl.float32)
    dtx = dt * x

    # the state (BLOCK_P, BLOCK_N) at a time
    acc = tl.zeros((BLOCK_P,), tl.float32)
    rows = state_ptr + slot * stride_state_s + h * stride_state_h + offs_p[:, None] * stride_state_p
    for begin in range(0, N, BLOCK_N):
        offs_n = begin + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        offs_n = offs_n.to(tl.int64)
        mask = live[:, None] & mask_n[None, :]
        here = rows + offs_n[None, :] * stride_state_n
        B = tl.load(B_ptr + b * stride_B_b + g * stride_B_g + offs_n * stride_B_n, mask=mask_n, other=0.0).to(tl.float32)
        C = tl.load(C_ptr + b * stride_C_b + g * stride_C_g + offs_n * stride_C_n, mask=mask_n, other=0.0).to(tl.float32)
        if not TIED:
            A = tl.load(A_ptr + h * stride_A_h + offs_p[:, None] * stride_A_p + offs_n[None, :] * stride_A_n, mask=mask, other=0.0)
            decay = tl.exp(dt[:, None] * A.to(tl.float32))
        state = tl.load(here, mask=mask, other=0.0).to(tl.float32) * decay + dtx[:, None] * B[None, :]
        tl.store(here, state.to(state_ptr.dtype.element_ty), mask=mask)
        acc += tl.sum(state * C[None, :], 1)

    if HAS_D:
        acc += x * tl.load(D_ptr + h * stride_D_h + offs_p * stride_D_p, mask=mask_p, other=0.0).to(tl.float32)
    if HAS_Z:
        z = tl.load(z_ptr + b * stride_z_b + h * stride_z_h + offs_p * stride_z_p, mask=mask_p, other=0.0).to(tl.float32)
        acc *= z * tl.sigmoid(z)
    acc = tl.where(live, acc, 0.0)
    tl.store(out_ptr + (b * H + h) * P + offs_p, acc.to(out_ptr.dtype.element_ty), mask=mask_p)


def _strides(tensor, dims):
    return tensor.stride() if tensor is not None else (0,) * dims


def _constant(tensor, *dims):
    """Whether the tensor (None too) has one value along `dims`, by its strides or sizes."""
    return tensor is None or all(tensor.stride(dim) == 0 or tensor.shape[dim] == 1 for dim in dims)


def selective_state_update_triton(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    batch, H, P = x.shape
    N = state.shape[3]
    out = x.new_empty(batch, H, P)
    if batch == 0:
        return out
    options = UPDATE.pick(state, N=N)  # not launch: what is tuned runs more than once, and the state is updated in place
    num_p = triton.cdiv(P, options["BLOCK_P"])
    runtime.visible(selective_state_update_kernel)[(batch * H * num_p,)](
        state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, out, H, P, N, H // B.shape[1], num_p,
        *state.stride(), *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(), *_strides(D, 2), *_strides(z, 3), *_strides(dt_bias, 2),
        0 if state_batch_indices is None else state_batch_indices.stride(0),
        HAS_D=D is not None, HAS_Z=z is not None, HAS_DT_BIAS=dt_bias is not None, HAS_INDICES=state_batch_indices is not None,
        SOFTPLUS=dt_softplus, TIED=_constant(dt, 2) and _constant(A, 1, 2) and _constant(dt_bias, 1),
        BLOCK_N=min(BLOCK_N, triton.next_power_of_2(int(N))), **options,
    )
    return out
