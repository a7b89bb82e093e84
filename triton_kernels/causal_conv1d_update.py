"""The decoding step of the causal convolution, and the states after packed sequences.

Layouts: x (B, D, L), conv_state (slots, D, state_len), weight (D, W), all in any strides; y (B, D, L). One program takes
BLOCK_D channels of one row: outputs first, from the state and the new inputs, then the state, in place. What it reads it
alone writes; barriers keep its threads from writing a column that another has yet to read.
"""
import torch
import triton
import triton.language as tl

from . import configs, runtime

UPDATE = configs.Table("causal_conv1d_update", configs.Row({"BLOCK_D": 64}, num_warps=2))
STATES = configs.Table("causal_conv1d_varlen_states", configs.Row({"BLOCK_L": 8, "BLOCK_D": 128}, num_warps=4))
BLOCK_COLUMNS = 16  # positions of the input, or columns of the state, at a time, at most


@triton.jit
def causal_conv1d_update_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, seqlens_ptr, indices_ptr, y_ptr, D, L, state_len, num_d,
    stride_x_b, stride_x_d, stride_x_l, stride_state_s, stride_state_d, stride_state_w, stride_weight_d, stride_weight_w, stride_bias_d,
    stride_seqlens, stride_indices,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, CIRCULAR: tl.constexpr, HAS_INDICES: tl.constexpr, SILU: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):
    b = (tl.program_id(0) // num_d).to(tl.int64)
    offs_d = tl.program_id(0) % num_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    slot = b
    if HAS_INDICES:
        slot = tl.load(indices_ptr + b * stride_indices).to(tl.int64)
    live = offs_d < tl.where(slot >= 0, D, 0)  # -1: a padding row
    offs_d = offs_d.to(tl.int64)
    next_column = state_len  # where the first new input would go: behind the last one
    if CIRCULAR:
        next_column = tl.load(seqlens_ptr + b * stride_seqlens) % state_len
    x_row = x_ptr + b * stride_x_b + offs_d[:, None] * stride_x_d
    state_row = state_ptr + slot * stride_state_s + offs_d[:, None] * stride_state_d

    for begin in range(0, L, BLOCK_L):
        l = begin + tl.arange(0, BLOCK_L)
        mask = live[:, None] & (l < L)[None, :]
        acc = tl.zeros((BLOCK_D, BLOCK_L), tl.float32)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_d * stride_bias_d, mask=mask_d, other=0.0).to(tl.float32)[:, None]
        for k in tl.static_range(W):
            back = l - k
            column = next_column + back
            if CIRCULAR:
                column = tl.where(column < 0, column + state_len, column)
            new = tl.load(x_row + back[None, :].to(tl.int64) * stride_x_l, mask=mask & (back >= 0)[None, :], other=0.0)
            old = tl.load(state_row + column[None, :].to(tl.int64) * stride_state_w, mask=mask & (back < 0)[None, :], other=0.0).to(new.dtype)
            tap = tl.load(weight_ptr + offs_d * stride_weight_d + (W - 1 - k) * stride_weight_w, mask=mask_d, other=0.0).to(tl.float32)
            acc += (new + old).to(tl.float32) * tap[:, None]
        if SILU:
            acc = acc / (1 + tl.exp(-acc))
        acc = tl.where(mask, acc, 0.0)
        tl.store(y_ptr + (b * D + offs_d)[:, None] * L + l[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask_d[:, None] & (l < L)[None, :])
    tl.debug_barrier()

    # the new inputs' columns of the ring
    if CIRCULAR:
        for begin in range(0, L, BLOCK_L):
            l = begin + tl.arange(0, BLOCK_L)
            mask = live[:, None] & ((l < L) & (l >= L - state_len))[None, :]
            new = tl.load(x_row + l[None, :].to(tl.int64) * stride_x_l, mask=mask, other=0.0)
            column = ((next_column + l) % state_len).to(tl.int64)
            tl.store(state_row + column[None, :] * stride_state_w, new.to(state_ptr.dtype.element_ty), mask=mask)
    # or the window, shifted by L
    else:
        for begin in range(0, state_len, BLOCK_S):
            w = begin + tl.arange(0, BLOCK_S)
            mask = live[:, None] & (w < state_len)[None, :]
            back = w + L - state_len
            old = tl.load(state_row + (w + L)[None, :].to(tl.int64) * stride_state_w, mask=mask & (back < 0)[None, :], other=0.0)
            new = tl.load(x_row + back[None, :].to(tl.int64) * stride_x_l, mask=mask & (back >= 0)[None, :], other=0.0)
            tl.debug_barrier()
            tl.store(state_row + w[None, :].to(tl.int64) * stride_state_w, old + new.to(old.dtype), mask=mask)


@triton.jit
def causal_conv1d_varlen_states_kernel(
    x_ptr, cu_ptr, states_ptr, D, state_len, num_l, num_d, stride_x_t, stride_x_d, stride_cu, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """states [S, state_len, D] = the last inputs of each sequence."""
    pid = tl.program_id(0)
    s = (pid // num_d // num_l).to(tl.int64)
    w = pid // num_d % num_l * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_d = (pid % num_d * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask = (w < state_len)[:, None] & (offs_d < D)[None, :]
    t = tl.load(cu_ptr + (s + 1) * stride_cu) - state_len + w
    inside = t >= tl.load(cu_ptr + s * stride_cu)
    x = tl.load(x_ptr + t[:, None].to(tl.int64) * stride_x_t + offs_d[None, :] * stride_x_d, mask=mask & inside[:, None], other=0.0)
    tl.store(states_ptr + (s * state_len + w)[:, None] * D + offs_d[None, :], x, mask=mask)


def causal_conv1d_update_triton(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    B, D, L = x.shape
    state_len = conv_state.shape[2]
    y = x.new_empty(B, D, L)
    if B == 0:
        return y

    def run(BLOCK_D, **options):
        num_d = triton.cdiv(D, BLOCK_D)
        runtime.visible(causal_conv1d_update_kernel)[(B * num_d,)](
            x, conv_state, weight, bias, cache_seqlens, conv_state_indices, y, D, L, state_len, num_d,
            *x.stride(), *conv_state.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
            0 if cache_seqlens is None else cache_seqlens.stride(0), 0 if conv_state_indices is None else conv_state_indices.stride(0),
            W=weight.shape[1], HAS_BIAS=bias is not None, CIRCULAR=cache_seqlens is not None, HAS_INDICES=conv_state_indices is not None,
            SILU=silu, BLOCK_L=min(BLOCK_COLUMNS, triton.next_power_of_2(int(L))), BLOCK_D=BLOCK_D,
            BLOCK_S=min(BLOCK_COLUMNS, triton.next_power_of_2(int(state_len))), **options,
        )

    run(**UPDATE.pick(x))  # not launch: what is tuned runs more than once, and the state is updated in place
    return y


def causal_conv1d_varlen_states_triton(x, cu_seqlens, state_len):
    S, D = cu_seqlens.shape[0] - 1, x.shape[1]
    states = x.new_empty(S, state_len, D)

    def run(BLOCK_L, BLOCK_D, **options):
        num_l, num_d = triton.cdiv(state_len, BLOCK_L), triton.cdiv(D, BLOCK_D)
        causal_conv1d_varlen_states_kernel[(S * num_l * num_d,)](
            x, cu_seqlens, states, D, state_len, num_l, num_d, *x.stride(), cu_seqlens.stride(0), BLOCK_L=BLOCK_L, BLOCK_D=BLOCK_D, **options,
        )

    STATES.launch(x, run)
    return states.transpose(1, 2)
