"""Causal depthwise convolution: y[l] = act(bias + sum_k weight[W-1-k] x[l-k]), k < W, of packed sequences too.

Layouts: x, y, dx (B, D, L) in any strides; weight (D, W); states (S, D, W-1) in any strides. One program takes a tile of
BLOCK_L positions x BLOCK_D channels and loads it once for each tap, W - 1 times out of the L1 cache: the kernels are limited
by memory bandwidth. The table's rows shape the tile after the axis of unit stride.

Packed sequences (seq_idx, cu_seqlens) become runs, on the device: `reach` says how many inputs of its own run lie before a
position (W - 1 at most, -1 in padding), `before` which initial state lies before those (-1: none), `sequence` which row or
range of cu_seqlens the position is of, `ends` where the last run of each of those ends. Without them all follows from l.

Backward, with g = dy act'(pre) and pre computed again: dx[l] = sum_k weight[W-1-k] g[l+k], dweight[W-1-k] = sum_l g[l] x[l-k].
A program walks TILES tiles and leaves its sums in a row of partial sums, which a second kernel adds up in a fixed order.
"""
import torch
import triton
import triton.language as tl

from . import configs, runtime
from .causal_conv1d_runs import find_runs
from .causal_conv1d_update import causal_conv1d_update_triton, causal_conv1d_varlen_states_triton  # noqa: F401  launchers of this family

FWD = configs.Table(
    "causal_conv1d_fwd",
    configs.Row({"BLOCK_L": 16, "BLOCK_D": 64}, num_warps=8, arch=("sm10",), up_to={"stride_d": 1}),
    configs.Row({"BLOCK_L": 128, "BLOCK_D": 8}, num_warps=4, arch=("sm10",)),
    configs.Row({"BLOCK_L": 32, "BLOCK_D": 64}, num_warps=4, up_to={"stride_d": 1}),
    configs.Row({"BLOCK_L": 256, "BLOCK_D": 8}, num_warps=4),
)
# Four elements for a thread: it holds each 2 W times over, inputs and sums.
BWD = configs.Table(
    "causal_conv1d_bwd",
    configs.Row({"BLOCK_L": 16, "BLOCK_D": 64, "TILES": 8}, num_warps=8, up_to={"stride_d": 1}),
    configs.Row({"BLOCK_L": 64, "BLOCK_D": 8, "TILES": 8}, num_warps=8, arch=("sm8",), itemsize=4),
    configs.Row({"BLOCK_L": 128, "BLOCK_D": 8, "TILES": 4}, num_warps=8),
)
BLOCK_STATES = 64  # channels of a program of the kernels for states and sums


@triton.jit
def _reach_before(reach_ptr, before_ptr, row, b, l, L, W: tl.constexpr, PACKED: tl.constexpr):
    """reach and before of positions l; reach is -1 outside 0..L."""
    inside = (l >= 0) & (l < L)
    if PACKED:
        reach = tl.load(reach_ptr + row + l, mask=inside, other=-1)
        before = tl.load(before_ptr + row + l, mask=inside, other=-1)
    else:
        reach = tl.where(inside, tl.minimum(l, W - 1), -1)
        before = tl.where(inside, b, -1)
    return reach, before


@triton.jit
def causal_conv1d_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, init_ptr, reach_ptr, before_ptr, y_ptr, D, L, num_l, num_d,
    stride_x_b, stride_x_d, stride_x_l, stride_weight_d, stride_weight_w, stride_bias_d, stride_init_s, stride_init_d, stride_init_w,
    stride_y_b, stride_y_d, stride_y_l,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    b = pid // num_d // num_l
    l = pid // num_d % num_l * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_d = pid % num_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_d = offs_d.to(tl.int64)
    offs_l = l.to(tl.int64)
    batch = b.to(tl.int64)
    reach, before = _reach_before(reach_ptr, before_ptr, batch * L, b, l, L, W, PACKED)

    acc = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    here = x_ptr + batch * stride_x_b + offs_l[:, None] * stride_x_l + offs_d[None, :] * stride_x_d
    for k in tl.static_range(W):
        inside = l < L
        if k > 0:
            inside = inside & (l >= k)
        x = tl.load(here - k * stride_x_l, mask=inside[:, None] & mask_d[None, :], other=0.0)
        # as the position's run sees it: of the run, of its initial state, or zero
        if PACKED:
            x = tl.where((reach >= k)[:, None], x, 0.0)
        if HAS_INIT:
            if k > 0:
                offs = before.to(tl.int64) * stride_init_s + (W - 1 - k + reach).to(tl.int64) * stride_init_w
                mask = ((before >= 0) & (reach < k))[:, None] & mask_d[None, :]
                x += tl.load(init_ptr + offs[:, None] + offs_d[None, :] * stride_init_d, mask=mask, other=0.0).to(x.dtype)
        tap = tl.load(weight_ptr + offs_d * stride_weight_d + (W - 1 - k) * stride_weight_w, mask=mask_d, other=0.0).to(tl.float32)
        acc += x.to(tl.float32) * tap[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_d * stride_bias_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    if SILU:
        acc = acc / (1 + tl.exp(-acc))
    if PACKED:
        acc = tl.where((reach >= 0)[:, None], acc, 0.0)
    out = y_ptr + batch * stride_y_b + offs_l[:, None] * stride_y_l + offs_d[None, :] * stride_y_d
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(l < L)[:, None] & mask_d[None, :])


@triton.jit
def causal_conv1d_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, init_ptr, dfinal_ptr, reach_ptr, before_ptr, sequence_ptr, ends_ptr, dx_ptr, partial_ptr,
    D, L, num_l, num_d,
    stride_dy_b, stride_dy_d, stride_dy_l, stride_x_b, stride_x_d, stride_x_l, stride_weight_d, stride_weight_w, stride_bias_d,
    stride_init_s, stride_init_d, stride_init_w, stride_dfinal_s, stride_dfinal_d, stride_dfinal_w, stride_dx_b, stride_dx_d, stride_dx_l,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr, HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):
    pid = tl.program_id(0)
    b = pid // num_d // num_l
    first = pid // num_d % num_l * (BLOCK_L * TILES)
    offs_d = pid % num_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_d = offs_d.to(tl.int64)
    batch = b.to(tl.int64)
    row = batch * L

    taps = ()  # taps[k]: of the input k positions back
    sums = ()  # of dweight, as taps; of dbias at the end
    for k in tl.static_range(W):
        taps = taps + (tl.load(weight_ptr + offs_d * stride_weight_d + (W - 1 - k) * stride_weight_w, mask=mask_d, other=0.0).to(tl.float32),)
        sums = sums + (tl.zeros((BLOCK_L, BLOCK_D), tl.float32),)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_d * stride_bias_d, mask=mask_d, other=0.0).to(tl.float32)
        sums = sums + (tl.zeros((BLOCK_L, BLOCK_D), tl.float32),)

    for begin in range(first, min(first + BLOCK_L * TILES, L), BLOCK_L):
        l = begin + tl.arange(0, BLOCK_L)
        offs_l = l.to(tl.int64)
        # every input that the tile's gradients depend on, at l - (W - 1) .. l + W - 1
        here = x_ptr + batch * stride_x_b + offs_l[:, None] * stride_x_l + offs_d[None, :] * stride_x_d
        xs = ()
        for i in tl.static_range(2 * W - 1 if SILU else W):
            inside = (l >= W - 1 - i) & (l < L - (i - (W - 1)))
            xs = xs + (tl.load(here + (i - (W - 1)) * stride_x_l, mask=inside[:, None] & mask_d[None, :], other=0.0),)

        # g at l + k; that at l makes dweight
        dx = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
        slopes = dy_ptr + batch * stride_dy_b + offs_l[:, None] * stride_dy_l + offs_d[None, :] * stride_dy_d
        for k in tl.static_range(W):
            g = tl.load(slopes + k * stride_dy_l, mask=(l < L - k)[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
            reach, before = _reach_before(reach_ptr, before_ptr, row, b, l + k, L, W, PACKED)
            inputs = ()  # j positions before l + k, as its run sees them
            for j in tl.static_range(W if SILU or k == 0 else 0):
                x = xs[W - 1 + k - j]
                if PACKED:
                    x = tl.where((reach >= j)[:, None], x, 0.0)
                if HAS_INIT:
                    if j > 0:
                        offs = before.to(tl.int64) * stride_init_s + (W - 1 - j + reach).to(tl.int64) * stride_init_w
                        mask = ((before >= 0) & (reach < j))[:, None] & mask_d[None, :]
                        x += tl.load(init_ptr + offs[:, None] + offs_d[None, :] * stride_init_d, mask=mask, other=0.0).to(x.dtype)
                inputs = inputs + (x.to(tl.float32),)
            if SILU:
                pre = inputs[0] * taps[0][None, :]
                for j in tl.static_range(1, W):
                    pre += inputs[j] * taps[j][None, :]
                if HAS_BIAS:
                    pre += bias[None, :]
                sigmoid = 1 / (1 + tl.exp(-pre))
                g *= sigmoid * (1 + pre * (1 - sigmoid))
            if PACKED:
                g = tl.where((reach >= k)[:, None], g, 0.0)
            dx += g * taps[k][None, :]
            if k == 0:
                new = ()
                for j in tl.static_range(W):
                    new = new + (sums[j] + g * inputs[j],)
                if HAS_BIAS:
                    new = new + (sums[W] + g,)
                sums = new

        # the last inputs of a sequence are its final state
        if HAS_DFINAL:
            if PACKED:
                s = tl.load(sequence_ptr + row + l, mask=l < L, other=0)
                end = tl.load(ends_ptr + s, mask=l < L, other=0)
                last_reach = tl.load(reach_ptr + row + end - 1, mask=(l < L) & (end > l), other=-1)
            else:
                s = tl.zeros_like(l) + b
                end = tl.zeros_like(l) + L
                last_reach = tl.zeros_like(l) + W
            left = end - l
            kept = (left >= 1) & (left <= W - 1) & (last_reach >= left - 1)
            offs = s.to(tl.int64) * stride_dfinal_s + (W - 1 - left).to(tl.int64) * stride_dfinal_w
            dx += tl.load(dfinal_ptr + offs[:, None] + offs_d[None, :] * stride_dfinal_d, mask=kept[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        out = dx_ptr + batch * stride_dx_b + offs_l[:, None] * stride_dx_l + offs_d[None, :] * stride_dx_d
        tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=(l < L)[:, None] & mask_d[None, :])

    partial = partial_ptr + (pid // num_d).to(tl.int64) * (W + HAS_BIAS) * D + offs_d
    for k in tl.static_range(W):
        tl.store(partial + (W - 1 - k) * D, tl.sum(sums[k], 0), mask=mask_d)
    if HAS_BIAS:
        tl.store(partial + W * D, tl.sum(sums[W], 0), mask=mask_d)


@triton.jit
def causal_conv1d_bwd_sums_kernel(partial_ptr, dweight_ptr, dbias_ptr, rows, D, W: tl.constexpr, HAS_BIAS: tl.constexpr,
                                  BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """dweight (D, W) and dbias (D,) = the sums of partial (rows, W + HAS_BIAS, D), always in the same order."""
    w = tl.program_id(1)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for begin in range(0, rows, BLOCK_M):
        offs_m = begin + tl.arange(0, BLOCK_M)
        offs = (offs_m[:, None].to(tl.int64) * (W + HAS_BIAS) + w) * D + offs_d[None, :]
        acc += tl.sum(tl.load(partial_ptr + offs, mask=(offs_m < rows)[:, None] & mask_d[None, :], other=0.0), 0)
    tl.store(dweight_ptr + offs_d.to(tl.int64) * W + w, acc.to(dweight_ptr.dtype.element_ty), mask=offs_d < tl.where(w < W, D, 0))
    if HAS_BIAS:
        tl.store(dbias_ptr + offs_d, acc.to(dbias_ptr.dtype.element_ty), mask=offs_d < tl.where(w == W, D, 0))


# ---- initial and final states ------------------------------------------------------------------------------


@triton.jit
def _last_run(s, reach_ptr, before_ptr, cu_ptr, ends_ptr, L, W: tl.constexpr, PACKED: tl.constexpr, HAS_CU: tl.constexpr):
    """Of sequence s: row, begin, the end of its last run, that run's inputs (up to W), whether an initial state lies before those."""
    b = s
    begin = s * 0
    end = begin + L
    count = tl.minimum(end, W)
    initial = s >= 0
    if HAS_CU:
        b = s * 0
        begin = tl.load(cu_ptr + s)
    if PACKED:
        end = tl.load(ends_ptr + s)
        last = b.to(tl.int64) * L + end - 1
        count = tl.load(reach_ptr + last, mask=end > begin, other=-1) + 1
        initial = (end == begin) | (tl.load(before_ptr + last, mask=end > begin, other=-1) >= 0)
    return b, begin, end, count, initial


@triton.jit
def causal_conv1d_fwd_states_kernel(
    x_ptr, init_ptr, reach_ptr, before_ptr, cu_ptr, ends_ptr, final_ptr, D, L, num_d,
    stride_x_b, stride_x_d, stride_x_l, stride_init_s, stride_init_d, stride_init_w,
    W: tl.constexpr, HAS_INIT: tl.constexpr, PACKED: tl.constexpr, HAS_CU: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """final (S, D, W-1): the last inputs of each sequence's last run."""
    s = tl.program_id(0) // num_d
    offs_d = (tl.program_id(0) % num_d * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    w = tl.arange(0, BLOCK_W)
    mask = (offs_d < D)[:, None] & (w < W - 1)[None, :]
    b, begin, end, count, initial = _last_run(s, reach_ptr, before_ptr, cu_ptr, ends_ptr, L, W, PACKED, HAS_CU)
    of_run = W - 2 - w < count
    offs_l = (end - (W - 1) + w).to(tl.int64)
    state = tl.load(x_ptr + b.to(tl.int64) * stride_x_b + offs_d[:, None] * stride_x_d + offs_l[None, :] * stride_x_l,
                    mask=mask & of_run[None, :], other=0.0)
    if HAS_INIT:
        later = (w + count).to(tl.int64)
        older = tl.load(init_ptr + s.to(tl.int64) * stride_init_s + offs_d[:, None] * stride_init_d + later[None, :] * stride_init_w,
                        mask=mask & (w < tl.where(initial, W - 1 - count, 0))[None, :], other=0.0)
        state += older.to(state.dtype)
    tl.store(final_ptr + (s.to(tl.int64) * D + offs_d[:, None]) * (W - 1) + w[None, :], state, mask=mask)


@triton.jit
def causal_conv1d_bwd_states_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, init_ptr, dfinal_ptr, reach_ptr, before_ptr, cu_ptr, ends_ptr, dinit_ptr, D, L, num_d,
    stride_dy_b, stride_dy_d, stride_dy_l, stride_x_b, stride_x_d, stride_x_l, stride_weight_d, stride_weight_w, stride_bias_d,
    stride_init_s, stride_init_d, stride_init_w, stride_dfinal_s, stride_dfinal_d, stride_dfinal_w,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr, HAS_CU: tl.constexpr, SILU: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """dinit (S, D, W-1), from the first W - 1 positions of each sequence's first run and from its final state."""
    s = tl.program_id(0) // num_d
    offs_d = (tl.program_id(0) % num_d * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask_d = offs_d < D
    w = tl.arange(0, BLOCK_W)
    mask = mask_d[:, None] & (w < W - 1)[None, :]
    b, begin, end, count, initial = _last_run(s, reach_ptr, before_ptr, cu_ptr, ends_ptr, L, W, PACKED, HAS_CU)
    batch = b.to(tl.int64)
    sequence = s.to(tl.int64)
    dinit = tl.zeros((BLOCK_D, BLOCK_W), tl.float32)
    if HAS_DFINAL:
        older = (w - count).to(tl.int64)
        dinit += tl.load(dfinal_ptr + sequence * stride_dfinal_s + offs_d[:, None] * stride_dfinal_d + older[None, :] * stride_dfinal_w,
                         mask=mask & (w >= tl.where(initial, count, W))[None, :], other=0.0).to(tl.float32)
    for i in tl.static_range(W - 1):
        l = begin + i
        reach, before = _reach_before(reach_ptr, before_ptr, batch * L, b, l, L, W, PACKED)
        mask_i = offs_d < tl.where((before == s) & (reach == i), D, 0)
        offs_l = l.to(tl.int64)
        g = tl.load(dy_ptr + batch * stride_dy_b + offs_d * stride_dy_d + offs_l * stride_dy_l, mask=mask_i, other=0.0).to(tl.float32)
        if SILU:
            pre = tl.zeros((BLOCK_D,), tl.float32)
            if HAS_BIAS:
                pre += tl.load(bias_ptr + offs_d * stride_bias_d, mask=mask_i, other=0.0).to(tl.float32)
            for k in tl.static_range(W):
                if k <= i:
                    x = tl.load(x_ptr + batch * stride_x_b + offs_d * stride_x_d + (offs_l - k) * stride_x_l, mask=mask_i, other=0.0)
                else:
                    x = tl.load(init_ptr + sequence * stride_init_s + offs_d * stride_init_d + (W - 1 - k + i) * stride_init_w, mask=mask_i, other=0.0)
                    x = x.to(x_ptr.dtype.element_ty)
                tap = tl.load(weight_ptr + offs_d * stride_weight_d + (W - 1 - k) * stride_weight_w, mask=mask_i, other=0.0)
                pre += x.to(tl.float32) * tap.to(tl.float32)
            sigmoid = 1 / (1 + tl.exp(-pre))
            g *= sigmoid * (1 + pre * (1 - sigmoid))
        taps = tl.load(weight_ptr + offs_d[:, None] * stride_weight_d + (w - i)[None, :] * stride_weight_w, mask=mask & (w >= i)[None, :], other=0.0)
        dinit += g[:, None] * taps.to(tl.float32)
    tl.store(dinit_ptr + (sequence * D + offs_d[:, None]) * (W - 1) + w[None, :], dinit.to(dinit_ptr.dtype.element_ty), mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------------


def _strides(tensor, dims):
    return tensor.stride() if tensor is not None else (0,) * dims


def _like_layout(x):
    B, D, L = x.shape
    channel_last = x.stride(1) == 1 and x.stride(2) != 1
    return x.new_empty_strided((B, D, L), (L * D, 1, D) if channel_last else (D * L, L, 1))


def causal_conv1d_fwd_triton(x, weight, bias, seq_idx, cu_seqlens, initial_states, return_final_states, silu):
    B, D, L = x.shape
    W = weight.shape[1]
    S = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = _like_layout(x)
    final = x.new_empty((S, D, W - 1) if return_final_states else (0,))
    if B == 0:
        return y, final
    runs = find_runs(B, L, W, seq_idx, cu_seqlens, ends=return_final_states)
    flags = dict(W=W, HAS_INIT=initial_states is not None, PACKED=runs.packed)

    def run(BLOCK_L, BLOCK_D, **options):
        num_l, num_d = triton.cdiv(L, BLOCK_L), triton.cdiv(D, BLOCK_D)
        runtime.visible(causal_conv1d_fwd_kernel)[(B * num_l * num_d,)](
            x, weight, bias, initial_states, runs.reach, runs.before, y, D, L, num_l, num_d,
            *x.stride(), *weight.stride(), *_strides(bias, 1), *_strides(initial_states, 3), *y.stride(),
            HAS_BIAS=bias is not None, SILU=silu, BLOCK_L=BLOCK_L, BLOCK_D=BLOCK_D, **flags, **options,
        )

    FWD.launch(x, run, stride_d=x.stride(1))
    if return_final_states:
        num_d = triton.cdiv(D, BLOCK_STATES)
        runtime.visible(causal_conv1d_fwd_states_kernel)[(S * num_d,)](
            x, initial_states, runs.reach, runs.before, runs.cu, runs.ends, final, D, L, num_d,
            *x.stride(), *_strides(initial_states, 3),
            HAS_CU=cu_seqlens is not None, BLOCK_W=triton.next_power_of_2(W - 1), BLOCK_D=BLOCK_STATES, **flags,
        )
    return y, final


def causal_conv1d_bwd_triton(dy, x, weight, bias, seq_idx, cu_seqlens, initial_states, dfinal_states, silu):
    B, D, L = x.shape
    W = weight.shape[1]
    dx, dweight = _like_layout(x), weight.new_empty(weight.shape)
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    dinitial = x.new_empty(0) if initial_states is None else initial_states.new_empty(initial_states.shape)
    if B == 0:
        return dx, dweight.zero_(), dbias.zero_(), dinitial
    runs = find_runs(B, L, W, seq_idx, cu_seqlens, ends=dfinal_states is not None or initial_states is not None)
    flags = dict(W=W, HAS_BIAS=bias is not None, HAS_DFINAL=dfinal_states is not None, PACKED=runs.packed, SILU=silu)
    strides = (*dy.stride(), *x.stride(), *weight.stride(), *_strides(bias, 1), *_strides(initial_states, 3), *_strides(dfinal_states, 3))

    def run(BLOCK_L, BLOCK_D, TILES, **options):
        num_l, num_d = triton.cdiv(L, BLOCK_L * TILES), triton.cdiv(D, BLOCK_D)
        partial = torch.empty(B * num_l, W + (bias is not None), D, dtype=torch.float32, device=x.device)
        runtime.visible(causal_conv1d_bwd_kernel)[(B * num_l * num_d,)](
            dy, x, weight, bias, initial_states, dfinal_states, runs.reach, runs.before, runs.sequence, runs.ends, dx, partial,
            D, L, num_l, num_d, *strides, *dx.stride(),
            HAS_INIT=initial_states is not None, BLOCK_L=BLOCK_L, BLOCK_D=BLOCK_D, TILES=TILES, **flags, **options,
        )
        runtime.visible(causal_conv1d_bwd_sums_kernel)[(triton.cdiv(D, BLOCK_STATES), partial.shape[1])](
            partial, dweight, dbias, partial.shape[0], D, W=W, HAS_BIAS=bias is not None, BLOCK_M=16, BLOCK_D=BLOCK_STATES,
        )

    BWD.launch(x, run, stride_d=x.stride(1))
    if initial_states is not None:
        num_d = triton.cdiv(D, BLOCK_STATES)
        runtime.visible(causal_conv1d_bwd_states_kernel)[(initial_states.shape[0] * num_d,)](
            dy, x, weight, bias, initial_states, dfinal_states, runs.reach, runs.before, runs.cu, runs.ends, dinitial, D, L, num_d, *strides,
            HAS_CU=cu_seqlens is not None, BLOCK_W=triton.next_power_of_2(W - 1), BLOCK_D=BLOCK_STATES, **flags, num_warps=2,  # with 4 it spills on sm_90
        )
    return dx, dweight, dbias, dinitial
