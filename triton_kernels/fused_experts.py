"""A layer of experts: y[t] = sum over a of weight[t, a] (gate(x[t] w1[e]^T) w2[e]^T + bias2[e]), e = expert a of token t.

Layouts: x (T, D), w1 (E, F or 2F, D), w_up (E, F, D) or none, w2 (E, D, F), all in any strides; topk (T, A). Pairs (token,
choice) are sorted by expert on the device; a pair's place among them is its slot, sentinels (indices >= E) go last and are
never touched. The host learns nothing of the routing.

  forward   1. h[slot] = gate(x[token] w1^T): rows of x are gathered as they are loaded, the gate works on the accumulators;
               both products are kept for the backward where asked for, in float32 and in w1's order of columns
            2. rows[slot] = h w2^T + bias2      3. y[t] = weighted sum of the token's rows, in the order of its choices
  backward  1. dh[slot] = dy[token] w2 stays in the accumulators: h is computed again, its dot product with dh is the weight's
               gradient (a partial sum for each tile, added up in order), and dproducts = weight dh through the gate
            2. rows[slot] = dproducts w1, dx[t] their sum      3. weight gradients: grouped products over the slots
"""
import torch
import triton
import triton.language as tl

from . import configs, moe
from .activation import activation_curve, gate_curve
from .grouped_gemm import (
    GROUP_M, accumulate, block_groups, column_sums, count_tiles, dot_options, find_tile, num_programs, product, strides, weight_gradient, widest,
)

# both: whether interleaved products are kept, which takes registers: larger tiles spill
GATE = configs.Table(
    "fused_experts_fwd",
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64}, num_warps=4, num_stages=3, itemsize=4, up_to={"rows": 16}),
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16}, num_warps=4, num_stages=4, itemsize=4, arch=("sm8",)),
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4, num_stages=2, itemsize=4),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=4, up_to={"rows": 16}, arch=("sm",)),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=2, up_to={"rows": 16}),
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3, up_to={"rows": 64}),
    configs.Row({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=8, num_stages=3, arch=("sm80", "sm90", "sm100", "sm103"), up_to={"both": 0}),
    configs.Row({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=8, num_stages=2, up_to={"both": 0}),
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=8, num_stages=3),
)
GATE_BWD = configs.Table(
    "fused_experts_bwd",
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=2, itemsize=4, up_to={"rows": 16}),
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4, num_stages=2, itemsize=4),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3, up_to={"rows": 16}),
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=8, num_stages=3),
)
BLOCK_PAIRS, BLOCK_PARTIALS = 16, 64


# ---- kernels -----------------------------------------------------------------------------------------------


@triton.jit
def accumulate_gate(
    acc_g, acc_u, x_ptr, g_ptr, u_ptr, token, mask_m, offs_g, mask_g, offs_u, D,
    stride_x_t, stride_x_d, stride_g_n, stride_g_d, stride_u_n, stride_u_d, DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """acc_g + x[token] w_g^T and acc_u + x[token] w_u^T: x is loaded once for both."""
    offs_k = tl.arange(0, BLOCK_K)
    step = tl.full((), BLOCK_K, tl.int64)
    x_ptrs = x_ptr + token[:, None].to(tl.int64) * stride_x_t + offs_k[None, :].to(tl.int64) * stride_x_d
    g_ptrs = g_ptr + offs_k[:, None].to(tl.int64) * stride_g_d + offs_g[None, :].to(tl.int64) * stride_g_n
    u_ptrs = u_ptr + offs_k[:, None].to(tl.int64) * stride_u_d + offs_u[None, :].to(tl.int64) * stride_u_n
    for k in range(0, D, BLOCK_K):
        mask_k = offs_k < D - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0).to(DOT)
        g = tl.load(g_ptrs, mask=mask_k[:, None] & mask_g[None, :], other=0.0)
        u = tl.load(u_ptrs, mask=mask_k[:, None] & mask_g[None, :], other=0.0)
        acc_g = tl.dot(x, g.to(DOT), acc_g, input_precision=PRECISION)
        acc_u = tl.dot(x, u.to(DOT), acc_u, input_precision=PRECISION)
        x_ptrs += step * stride_x_d
        g_ptrs += step * stride_g_d
        u_ptrs += step * stride_u_d
    return acc_g, acc_u


@triton.jit
def add_bias(acc, bias_ptr, e, offs_n, mask_n, stride_e, stride_n):
    return acc + tl.load(bias_ptr + e * stride_e + offs_n.to(tl.int64) * stride_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]


@triton.jit
def fused_experts_fwd_gate_kernel(
    x_ptr, g_ptr, u_ptr, bias_g_ptr, bias_u_ptr, h_ptr, saved_ptr, order_ptr, offs_ptr, S, E, D, F, A, columns, alpha, limit,
    stride_x_t, stride_x_d, stride_g_e, stride_g_n, stride_g_d, stride_u_e, stride_u_n, stride_u_d,
    stride_bias_g_e, stride_bias_g_n, stride_bias_u_e, stride_bias_u_n,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS_G: tl.constexpr, HAS_BIAS_U: tl.constexpr, SAVE: tl.constexpr, ACTIVATION: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """h (S, F) = gate(x[token] w_g^T + bias_g, x[token] w_u^T + bias_u); interleaved: w_g holds both, u behind each g."""
    tiles_up_to = count_tiles(offs_ptr, E, S, True, False, BLOCK_M, BLOCK_E)
    tiles_n = tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), tl.max(tiles_up_to, 0) * tiles_n, tl.num_programs(0)):
        e, row, end, tile_n = find_tile(tile, tiles_up_to, tiles_n, offs_ptr, E, S, True, BLOCK_M, GROUP_M)
        offs_m, offs_n = row + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m, mask_n = offs_m < end, offs_n < F
        mask = mask_m[:, None] & mask_n[None, :]
        token = tl.load(order_ptr + offs_m, mask=mask_m, other=0) // A
        expert = e.to(tl.int64)
        saved_tile = saved_ptr + row.to(tl.int64) * columns + tl.arange(0, BLOCK_M)[:, None] * columns
        # both products (BLOCK_M, BLOCK_N)
        if INTERLEAVED:
            offs_both = tile_n * 2 * BLOCK_N + tl.arange(0, 2 * BLOCK_N)
            mask_both = offs_both < 2 * F
            both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
            both = accumulate(both, x_ptr, g_ptr + expert * stride_g_e, token, mask_m, offs_both, mask_both, D,
                              stride_x_t, stride_x_d, stride_g_d, stride_g_n, DOT, PRECISION, BLOCK_K)
            if HAS_BIAS_G:
                both = add_bias(both, bias_g_ptr, expert, offs_both, mask_both, stride_bias_g_e, stride_bias_g_n)
            if SAVE:
                tl.store(saved_tile + offs_both[None, :], both, mask=mask_m[:, None] & mask_both[None, :])
            g, u = tl.split(tl.reshape(both, (BLOCK_M, BLOCK_N, 2)))
        else:
            g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if GATED:
                u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                g, u = accumulate_gate(g, u, x_ptr, g_ptr + expert * stride_g_e, u_ptr + expert * stride_u_e, token, mask_m, offs_n, mask_n, offs_n, D,
                                       stride_x_t, stride_x_d, stride_g_n, stride_g_d, stride_u_n, stride_u_d, DOT, PRECISION, BLOCK_K)
                if HAS_BIAS_U:
                    u = add_bias(u, bias_u_ptr, expert, offs_n, mask_n, stride_bias_u_e, stride_bias_u_n)
            else:
                g = accumulate(g, x_ptr, g_ptr + expert * stride_g_e, token, mask_m, offs_n, mask_n, D,
                               stride_x_t, stride_x_d, stride_g_d, stride_g_n, DOT, PRECISION, BLOCK_K)
            if HAS_BIAS_G:
                g = add_bias(g, bias_g_ptr, expert, offs_n, mask_n, stride_bias_g_e, stride_bias_g_n)
            if SAVE:
                tl.store(saved_tile + offs_n[None, :], g, mask=mask)
                if GATED:
                    tl.store(saved_tile + F + offs_n[None, :], u, mask=mask)
        # the gate
        if GATED:
            h, _, _ = gate_curve(g, u, alpha, limit, ACTIVATION)
        else:
            h, _ = activation_curve(g, ACTIVATION)
        h_tile = h_ptr + row.to(tl.int64) * F + tl.arange(0, BLOCK_M)[:, None] * F
        tl.store(h_tile + offs_n[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fused_experts_bwd_gate_kernel(
    dy_ptr, w2_ptr, saved_ptr, weights_ptr, h_ptr, dproducts_ptr, partial_ptr, order_ptr, offs_ptr, S, E, D, F, A, columns, alpha, limit,
    stride_dy_t, stride_dy_d, stride_w2_e, stride_w2_d, stride_w2_f, stride_weights_t, stride_weights_a,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """h (S, F) times the weight, dproducts (S, columns), and partial (S, tiles of F): each tile's part of <dh, h>."""
    tiles_up_to = count_tiles(offs_ptr, E, S, True, False, BLOCK_M, BLOCK_E)
    tiles_n = tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), tl.max(tiles_up_to, 0) * tiles_n, tl.num_programs(0)):
        e, row, end, tile_n = find_tile(tile, tiles_up_to, tiles_n, offs_ptr, E, S, True, BLOCK_M, GROUP_M)
        offs_m, offs_n = row + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m, mask_n = offs_m < end, offs_n < F
        mask = mask_m[:, None] & mask_n[None, :]
        pair = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
        token = pair // A
        dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        dh = accumulate(dh, dy_ptr, w2_ptr + e.to(tl.int64) * stride_w2_e, token, mask_m, offs_n, mask_n, D,
                        stride_dy_t, stride_dy_d, stride_w2_d, stride_w2_f, DOT, PRECISION, BLOCK_K)
        # the gate once more, and through it
        first = row.to(tl.int64) * columns  # inside a tile 32 bits are enough, and half the registers
        products = tl.arange(0, BLOCK_M)[:, None] * columns + offs_n[None, :]
        offs_both = tile_n * 2 * BLOCK_N + tl.arange(0, 2 * BLOCK_N)
        both = tl.arange(0, BLOCK_M)[:, None] * columns + offs_both[None, :]
        mask_both = mask_m[:, None] & (offs_both < 2 * F)[None, :]
        if INTERLEAVED:
            g, u = tl.split(tl.reshape(tl.load(saved_ptr + first + both, mask=mask_both, other=0.0), (BLOCK_M, BLOCK_N, 2)))
        else:
            g = tl.load(saved_ptr + first + products, mask=mask, other=0.0)
            if GATED:
                u = tl.load(saved_ptr + first + F + products, mask=mask, other=0.0)
        if GATED:
            h, by_g, by_u = gate_curve(g, u, alpha, limit, ACTIVATION)
        else:
            h, by_g = activation_curve(g, ACTIVATION)
        tl.store(partial_ptr + offs_m.to(tl.int64) * tiles_n + tile_n, tl.sum(tl.where(mask, dh * h, 0.0), 1), mask=mask_m)
        rank = (pair % A).to(tl.int64)
        weight = tl.load(weights_ptr + token.to(tl.int64) * stride_weights_t + rank * stride_weights_a, mask=mask_m, other=0.0).to(tl.float32)
        h_tile = h_ptr + row.to(tl.int64) * F + tl.arange(0, BLOCK_M)[:, None] * F
        tl.store(h_tile + offs_n[None, :], (h * weight[:, None]).to(h_ptr.dtype.element_ty), mask=mask)
        dh *= weight[:, None]
        dtype = dproducts_ptr.dtype.element_ty
        if INTERLEAVED:
            tl.store(dproducts_ptr + first + both, tl.interleave(dh * by_g, dh * by_u).to(dtype), mask=mask_both)
        else:
            tl.store(dproducts_ptr + first + products, (dh * by_g).to(dtype), mask=mask)
            if GATED:
                tl.store(dproducts_ptr + first + F + products, (dh * by_u).to(dtype), mask=mask)


@triton.jit
def fused_experts_bwd_weights_kernel(
    partial_ptr, dy_ptr, bias_ptr, indices_ptr, inverse_ptr, offs_ptr, dweights_ptr, pairs, E, D, A, parts,
    stride_dy_t, stride_dy_d, stride_bias_e, stride_bias_d, HAS_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """dweights of each pair: the sum of its parts, and <dy, bias2>; zero for sentinels."""
    pair = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    slot = tl.load(inverse_ptr + pair, mask=pair < pairs, other=2147483647)
    live = slot < tl.load(offs_ptr + E - 1)
    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, parts, BLOCK_D):
        offs = first + tl.arange(0, BLOCK_D)
        acc += tl.load(partial_ptr + slot[:, None].to(tl.int64) * parts + offs[None, :], mask=live[:, None] & (offs < parts)[None, :], other=0.0)
    if HAS_BIAS:
        expert = tl.load(indices_ptr + pair, mask=live, other=0).to(tl.int64)
        token = (pair // A).to(tl.int64)
        for first in range(0, D, BLOCK_D):
            offs = (first + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask = live[:, None] & (offs < D)[None, :]
            dy = tl.load(dy_ptr + token[:, None] * stride_dy_t + offs[None, :] * stride_dy_d, mask=mask, other=0.0).to(tl.float32)
            acc += dy * tl.load(bias_ptr + expert[:, None] * stride_bias_e + offs[None, :] * stride_bias_d, mask=mask, other=0.0).to(tl.float32)
    tl.store(dweights_ptr + pair, tl.sum(acc, 1), mask=pair < pairs)


# ---- launchers ---------------------------------------------------------------------------------------------


def halves(tensor, F, interleaved):
    """gate and up of (E, 2F, ...), views; interleaved they stay together."""
    return (tensor, None) if tensor is None or interleaved or tensor.shape[1] == F else (tensor[:, :F], tensor[:, F:])


def fused_experts_fwd_triton(x, w1, w_up, w2, weights, indices, bias1, bias_up, bias2, activation, interleaved, alpha, limit, save):
    (T, D), (E, _, F), A = x.shape, w2.shape, indices.shape[1]
    S, columns = T * A, w1.shape[1] + (F if w_up is not None else 0)
    y, saved = x.new_empty(T, D), x.new_empty((S if save else 0, columns), dtype=torch.float32)
    if T == 0:
        return y, saved
    order, inverse, offs = moe.moe_permute_triton(indices, E)
    w_g, w_u = (w1, w_up) if w_up is not None else halves(w1, F, interleaved)
    bias_g, bias_u = (bias1, bias_up) if w_up is not None else halves(bias1, F, interleaved)
    h = x.new_empty(S, F)

    def run(BLOCK_M, BLOCK_N, **options):
        fused_experts_fwd_gate_kernel[(num_programs(S, E, F, x.device, BLOCK_M, BLOCK_N),)](
            x, w_g, w_u, bias_g, bias_u, h, saved, order, offs, S, E, D, F, A, columns, alpha, limit,
            *x.stride(), *w_g.stride(), *strides(w_u, 3), *strides(bias_g, 2), *strides(bias_u, 2),
            GATED=columns == 2 * F, INTERLEAVED=interleaved, HAS_BIAS_G=bias_g is not None, HAS_BIAS_U=bias_u is not None, SAVE=save,
            ACTIVATION=activation, **dot_options(x.device, x, w_g, w_u), BLOCK_E=block_groups(E), GROUP_M=GROUP_M,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **options,
        )

    GATE.launch(widest(x, w1), run, rows=triton.cdiv(S, E), both=int(save and interleaved))
    rows = product(h, w2.mT, offs, bias2, x.new_empty(S, D), rest=False)
    return moe.weighted_sum(rows, inverse, weights, offs, y), saved


def fused_experts_bwd_triton(dy, x, w1, w_up, w2, weights, indices, bias1, bias_up, bias2, activation, interleaved, alpha, limit, saved, need_x,
                             need_weights):
    (T, D), (E, _, F), A = x.shape, w2.shape, indices.shape[1]
    S, columns, N1, indices = T * A, saved.shape[1], w1.shape[1], indices.contiguous()
    order, inverse, offs = moe.moe_permute_triton(indices, E)
    h, dproducts = x.new_empty(S, F), x.new_empty(S, columns)
    dweights = x.new_empty((T, A), dtype=torch.float32)

    def run(BLOCK_M, BLOCK_N, **options):
        parts = triton.cdiv(F, BLOCK_N)
        partial = x.new_empty((S, parts), dtype=torch.float32)
        fused_experts_bwd_gate_kernel[(num_programs(S, E, F, x.device, BLOCK_M, BLOCK_N),)](
            dy, w2, saved, weights, h, dproducts, partial, order, offs, S, E, D, F, A, columns, alpha, limit,
            *dy.stride(), *w2.stride(), *weights.stride(), GATED=columns == 2 * F, INTERLEAVED=interleaved, ACTIVATION=activation,
            **dot_options(x.device, dy, w2), BLOCK_E=block_groups(E), GROUP_M=GROUP_M, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **options,
        )
        fused_experts_bwd_weights_kernel[(triton.cdiv(S, BLOCK_PAIRS),)](
            partial, dy, bias2, indices, inverse, offs, dweights, S, E, D, A, parts, *dy.stride(), *strides(bias2, 2),
            HAS_BIAS=bias2 is not None, BLOCK_P=BLOCK_PAIRS, BLOCK_D=BLOCK_PARTIALS,
        )

    if T:
        GATE_BWD.launch(widest(x, w2), run, rows=triton.cdiv(S, E))
    by_w1, by_w_up = dproducts[:, :N1], dproducts[:, N1:] if w_up is not None else None
    dx = x.new_empty(0)
    if need_x:
        dx = x.new_empty(T, D)
        rows = product(by_w1, w1, offs, None, x.new_empty(S, D), a2=by_w_up, b2=w_up, rest=False)
        moe.weighted_sum(rows, inverse, None, offs, dx)
    if not need_weights:
        return dx, *(x.new_empty(0) for _ in range(3)), dweights, *(x.new_empty(0) for _ in range(3))

    def gradient(weight, a, b, gather):
        if weight is None:
            return x.new_empty(0)
        stored = weight.mT if weight.stride(2) != 1 and weight.stride(1) == 1 else weight
        dweight = weight.new_empty(stored.shape)
        return weight_gradient(a, b, offs, dweight if stored is weight else dweight.mT, order=order, A=A, gather=gather)

    dw1, dw_up, dw2 = gradient(w1, by_w1, x, "b"), gradient(w_up, by_w_up, x, "b"), gradient(w2, dy, h, "a")
    dbias1 = column_sums(by_w1, offs, E) if bias1 is not None else x.new_empty(0)
    dbias_up = column_sums(by_w_up, offs, E) if bias_up is not None else x.new_empty(0)
    dbias2 = column_sums(dy, offs, E, order=order, A=A, weights=weights.contiguous()) if bias2 is not None else x.new_empty(0)
    return dx, dw1, dw_up, dw2, dweights, dbias1, dbias_up, dbias2
