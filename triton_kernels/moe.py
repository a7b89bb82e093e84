"""Choosing experts, sorting pairs (token, choice) by expert, and summing each token's rows up again.

  route      the A largest of E scores a token (ties: the lower index), their weights, and the gradient of the logits
  permute    counting sort of the T * A pairs, stable; indices >= E go last
  unpermute  y[t] = sum over a of weights[t, a] rows[inverse[t, a]]

A token's scores lie in one block; each of its A largest is a maximum and a look for where it stands first, and is given its
rank, so that weights are computed on the whole block under a mask and stored by rank. Sorting compares the pairs of a block
with each other: a pair's place is the number of pairs that stand before it. One block is sorted by one program; many blocks
count their pairs of each expert, the counts are summed over blocks and experts, and pairs are placed. Everything is limited
by memory bandwidth, or by launches; nothing is atomic, every sum has its order.
"""
import torch
import triton
import triton.language as tl

from . import configs

ROUTE = configs.Table(
    "moe_route",
    configs.Row({"BLOCK_T": 16}, num_warps=4, up_to={"E": 64}),
    configs.Row({"BLOCK_T": 4}, num_warps=4, up_to={"E": 256}),
    configs.Row({"BLOCK_T": 1}, num_warps=4),
)
BLOCK_PAIRS = 128
BLOCK_COUNTS, BLOCK_EXPERTS = 32, 64
UNPERMUTE = configs.Table(
    "moe_unpermute",
    configs.Row({"BLOCK_T": 16, "BLOCK_D": 64}, num_warps=4, up_to={"D": 64}),
    configs.Row({"BLOCK_T": 1, "BLOCK_D": 1024}, num_warps=4),
)


# ---- routing -----------------------------------------------------------------------------------------------


@triton.jit
def route_scores(logits_ptr, offs_t, offs_e, mask, stride_t, stride_e, SOFTMAX: tl.constexpr, SIGMOID: tl.constexpr):
    """(BLOCK_T, BLOCK_E) softmax or sigmoid of the logits, or the logits; 0 beyond the experts."""
    ptrs = logits_ptr + offs_t[:, None].to(tl.int64) * stride_t + offs_e[None, :].to(tl.int64) * stride_e
    if SIGMOID:
        scores = tl.sigmoid(tl.load(ptrs, mask=mask, other=0.0).to(tl.float32))
    else:
        scores = tl.load(ptrs, mask=mask, other=-float("inf")).to(tl.float32)
        if SOFTMAX:
            scores = tl.exp(scores - tl.max(scores, 1)[:, None])
            scores = scores / tl.sum(scores, 1)[:, None]
    return tl.where(mask, scores, 0.0)


@triton.jit
def first_largest(values, free, offs):
    """Where the largest of the free values of each row stands first, (rows,)."""
    top = tl.max(tl.where(free, values, -float("inf")), 1)
    return tl.min(tl.where(free & (values == top[:, None]), offs[None, :], 2147483647), 1)


@triton.jit
def norm_of_chosen(weights, order, NORM: tl.constexpr):
    """The norm of each row, zero where nothing was chosen. NORM: 1, 2, 3 for infinity, 4 for any other order."""
    if NORM == 1:
        return tl.sum(weights, 1)
    elif NORM == 2:
        return tl.sqrt(tl.sum(weights * weights, 1))
    elif NORM == 3:
        return tl.max(weights, 1)
    else:
        return tl.exp2(tl.log2(tl.sum(tl.exp2(order * tl.log2(weights)), 1)) / order)


@triton.jit
def softmax_of_chosen(scores, chosen):
    """Each row's softmax of what was chosen, zero elsewhere."""
    top = tl.max(tl.where(chosen, scores, -float("inf")), 1)
    weights = tl.where(chosen, tl.exp(scores - top[:, None]), 0.0)
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def moe_route_fwd_kernel(
    logits_ptr, bias_ptr, weights_ptr, indices_ptr, T, E, A, n_group, topk_group, order, scale, stride_logits_t, stride_logits_e, stride_bias_e,
    SOFTMAX: tl.constexpr, SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr, NORM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    mask = (offs_t < T)[:, None] & (offs_e < E)[None, :]
    scores = route_scores(logits_ptr, offs_t, offs_e, mask, stride_logits_t, stride_logits_e, SOFTMAX, SIGMOID)
    nan = tl.max((scores != scores).to(tl.int32), 1) > 0
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + offs_e.to(tl.int64) * stride_bias_e, mask=offs_e < E, other=0.0).to(tl.float32)[None, :]
    choice = tl.where(choice == choice, choice, float("inf"))
    if GROUPS:
        # a group's worth (BLOCK_T, BLOCK_G): its best score, or the sum of its best two
        size = E // n_group
        offs_g = tl.arange(0, BLOCK_G)
        worth = tl.zeros((BLOCK_T, BLOCK_G), tl.float32)
        for g in range(n_group):
            inside = mask & (offs_e // size == g)[None, :]
            best = tl.max(tl.where(inside, choice, -float("inf")), 1)
            if (SIGMOID or HAS_BIAS) and size > 1:
                rest = inside & (offs_e[None, :] != first_largest(choice, inside, offs_e)[:, None])
                best += tl.max(tl.where(rest, choice, -float("inf")), 1)
            worth = tl.where((offs_g == g)[None, :], best[:, None], worth)
        # experts outside the best groups come last
        free_groups = (offs_t < T)[:, None] & (offs_g < n_group)[None, :]
        allowed = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
        for _ in range(topk_group):
            group = first_largest(worth, free_groups, offs_g)
            free_groups = free_groups & (offs_g[None, :] != group[:, None])
            allowed = tl.where((offs_e // size)[None, :] == group[:, None], 1, allowed)
        choice = tl.where(allowed != 0, choice, -float("inf"))
    choice = tl.where(nan[:, None], -offs_e[None, :].to(tl.float32), choice)
    # rank of each chosen expert (BLOCK_T, BLOCK_E), -1 for the others
    rank = tl.full((BLOCK_T, BLOCK_E), -1, tl.int32)
    for a in range(A):
        found = first_largest(choice, mask & (rank < 0), offs_e)
        rank = tl.where(offs_e[None, :] == found[:, None], a, rank)
    chosen = rank >= 0
    weights = tl.where(chosen, scores, 0.0)
    if not (SOFTMAX or SIGMOID):
        weights = softmax_of_chosen(scores, chosen)
    if NORM:
        weights = weights / (norm_of_chosen(weights, order, NORM)[:, None] + 1e-20)
    weights = tl.where(nan[:, None], float("nan"), weights * scale)
    places = offs_t[:, None].to(tl.int64) * A + rank
    tl.store(weights_ptr + places, weights.to(weights_ptr.dtype.element_ty), mask=mask & chosen)
    tl.store(indices_ptr + places, tl.broadcast_to(offs_e[None, :], (BLOCK_T, BLOCK_E)), mask=mask & chosen)


@triton.jit
def moe_route_bwd_kernel(
    dweights_ptr, logits_ptr, indices_ptr, dlogits_ptr, T, E, A, order, scale, stride_dweights_t, stride_dweights_a, stride_logits_t, stride_logits_e,
    SOFTMAX: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < T
    mask = mask_t[:, None] & (offs_e < E)[None, :]
    scores = route_scores(logits_ptr, offs_t, offs_e, mask, stride_logits_t, stride_logits_e, SOFTMAX, SIGMOID)
    # the gradient of the weights at the experts they are of
    dw = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    picked = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for a in range(A):
        expert = tl.load(indices_ptr + offs_t.to(tl.int64) * A + a, mask=mask_t, other=-1)
        rank = tl.cast(a, tl.int64)
        grad = tl.load(dweights_ptr + offs_t.to(tl.int64) * stride_dweights_t + rank * stride_dweights_a, mask=mask_t, other=0.0).to(tl.float32)
        here = offs_e[None, :] == expert[:, None]
        dw = tl.where(here, grad[:, None], dw)
        picked = tl.where(here, 1, picked)
    chosen = picked != 0
    w = tl.where(chosen, scores, 0.0)
    if not (SOFTMAX or SIGMOID):
        w = softmax_of_chosen(scores, chosen)
    # through the scale and the norm: d(w / n) = dw / n - w <dw, w> dn / n^2
    dw *= scale
    if NORM:
        norm = norm_of_chosen(w, order, NORM)[:, None]
        n = norm + 1e-20
        if NORM == 1:
            slope = tl.where(w > 0, 1.0, 0.0)
        elif NORM == 2:
            slope = tl.where(w > 0, w / norm, 0.0)
        elif NORM == 3:
            highest = chosen & (w == norm)
            slope = tl.where(highest, 1.0, 0.0) / tl.sum(highest.to(tl.float32), 1)[:, None]
        else:
            slope = tl.where(w > 0, tl.exp2((order - 1) * (tl.log2(w) - tl.log2(norm))), 0.0)
        dw = tl.where(chosen, (dw - tl.sum(dw * w, 1)[:, None] / n * slope) / n, 0.0)
    # through the scores
    if SIGMOID:
        dlogits = dw * w * (1 - w)
    else:
        inside = tl.sum(dw * w, 1)[:, None]
        dlogits = scores * (dw - inside) if SOFTMAX else w * (dw - inside)
    dlogits_ptrs = dlogits_ptr + offs_t[:, None].to(tl.int64) * E + offs_e[None, :]
    tl.store(dlogits_ptrs, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


# ---- sorting -----------------------------------------------------------------------------------------------


@triton.jit
def load_experts(indices_ptr, pairs, num_pairs, E):
    """The expert of each pair: E for indices beyond the experts, E + 1 beyond the pairs."""
    expert = tl.load(indices_ptr + pairs, mask=pairs < num_pairs, other=0)
    return tl.where(pairs < num_pairs, tl.minimum(expert, E).to(tl.int32), E + 1)


@triton.jit
def rank_in_block(expert, BLOCK: tl.constexpr):
    """How many pairs of the block before each one have its expert."""
    place = tl.arange(0, BLOCK)
    before = (expert[None, :] == expert[:, None]) & (place[None, :] < place[:, None])
    return tl.sum(before.to(tl.int32), 1)


@triton.jit
def moe_permute_one_block_kernel(indices_ptr, order_ptr, inverse_ptr, offs_ptr, num_pairs, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    pairs = tl.arange(0, BLOCK)
    mask = pairs < num_pairs
    expert = load_experts(indices_ptr, pairs, num_pairs, E)
    lower = tl.sum((expert[None, :] < expert[:, None]).to(tl.int32), 1)
    place = lower + rank_in_block(expert, BLOCK)
    tl.store(inverse_ptr + pairs, place, mask=mask)
    tl.store(order_ptr + place, pairs, mask=mask)
    for first in range(0, E, BLOCK_E):
        offs_e = first + tl.arange(0, BLOCK_E)
        up_to = tl.sum((expert[None, :] <= offs_e[:, None]).to(tl.int32), 1)
        tl.store(offs_ptr + offs_e, up_to, mask=offs_e < E)


@triton.jit
def moe_permute_count_kernel(indices_ptr, counts_ptr, num_pairs, E, BLOCK: tl.constexpr):
    """counts (blocks, E + 1), zero so far: the pairs of each expert in each block. The last of its expert writes."""
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = load_experts(indices_ptr, pairs, num_pairs, E)
    place = tl.arange(0, BLOCK)
    after = (expert[None, :] == expert[:, None]) & (place[None, :] > place[:, None])
    last = tl.sum(after.to(tl.int32), 1) == 0
    row = counts_ptr + tl.program_id(0).to(tl.int64) * (E + 1)
    tl.store(row + expert, rank_in_block(expert, BLOCK) + 1, mask=last & (pairs < num_pairs))


@triton.jit
def moe_permute_sum_kernel(counts_ptr, totals_ptr, blocks, E, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """counts become those of the blocks before; totals (E + 1,) those of all blocks."""
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, blocks, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B)
        mask = (offs_b < blocks)[:, None] & (offs_e <= E)[None, :]
        ptrs = counts_ptr + offs_b[:, None].to(tl.int64) * (E + 1) + offs_e[None, :]
        counts = tl.load(ptrs, mask=mask, other=0)
        tl.store(ptrs, before[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        before += tl.sum(counts, 0)
    tl.store(totals_ptr + offs_e, before, mask=offs_e <= E)


@triton.jit
def moe_permute_ends_kernel(totals_ptr, offs_ptr, E, BLOCK_E: tl.constexpr):
    before = 0
    for first in range(0, E, BLOCK_E):
        offs_e = first + tl.arange(0, BLOCK_E)
        totals = tl.load(totals_ptr + offs_e, mask=offs_e < E, other=0)
        tl.store(offs_ptr + offs_e, before + tl.cumsum(totals, 0), mask=offs_e < E)
        before += tl.sum(totals, 0)


@triton.jit
def moe_permute_place_kernel(indices_ptr, counts_ptr, offs_ptr, order_ptr, inverse_ptr, num_pairs, E, BLOCK: tl.constexpr):
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = pairs < num_pairs
    expert = load_experts(indices_ptr, pairs, num_pairs, E)
    begin = tl.load(offs_ptr + expert - 1, mask=mask & (expert > 0), other=0)
    before = tl.load(counts_ptr + tl.program_id(0).to(tl.int64) * (E + 1) + expert, mask=mask, other=0)
    place = begin + before + rank_in_block(expert, BLOCK)
    tl.store(inverse_ptr + pairs, place, mask=mask)
    tl.store(order_ptr + place, pairs, mask=mask)


# ---- summing up --------------------------------------------------------------------------------------------


@triton.jit
def moe_unpermute_fwd_kernel(
    rows_ptr, inverse_ptr, weights_ptr, offs_ptr, y_ptr, T, E, D, A, stride_rows_m, stride_rows_d, stride_weights_t, stride_weights_a,
    HAS_WEIGHTS: tl.constexpr, HAS_OFFS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """With offs (E,) rows at and after the last end count for nothing, whatever they hold."""
    offs_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t, mask_d = offs_t < T, offs_d < D
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    live = 2147483647
    if HAS_OFFS:
        live = tl.load(offs_ptr + E - 1)
    for i in range(A):
        a = tl.cast(i, tl.int64)
        place = tl.load(inverse_ptr + offs_t * A + a, mask=mask_t, other=live)
        mask = place < live
        row_ptrs = rows_ptr + place[:, None].to(tl.int64) * stride_rows_m + offs_d[None, :].to(tl.int64) * stride_rows_d
        row = tl.load(row_ptrs, mask=mask[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            row *= tl.load(weights_ptr + offs_t * stride_weights_t + a * stride_weights_a, mask=mask, other=0.0).to(tl.float32)[:, None]
        acc += row
    y_ptrs = y_ptr + offs_t[:, None] * D + offs_d[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_d[None, :])


@triton.jit
def moe_unpermute_bwd_kernel(
    dy_ptr, rows_ptr, inverse_ptr, weights_ptr, drows_ptr, dweights_ptr, pairs, D, A,
    stride_dy_t, stride_dy_d, stride_rows_m, stride_rows_d, stride_weights_t, stride_weights_a, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """BLOCK_T pairs a program: inverse is a permutation, so every row of drows is written once."""
    pair = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    mask_p = pair < pairs
    t, a = pair // A, pair % A
    place = tl.load(inverse_ptr + pair, mask=mask_p, other=0).to(tl.int64)
    weight = tl.load(weights_ptr + t * stride_weights_t + a * stride_weights_a, mask=mask_p, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        offs_d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = mask_p[:, None] & (offs_d < D)[None, :]
        dy = tl.load(dy_ptr + t[:, None] * stride_dy_t + offs_d[None, :] * stride_dy_d, mask=mask, other=0.0).to(tl.float32)
        row = tl.load(rows_ptr + place[:, None] * stride_rows_m + offs_d[None, :] * stride_rows_d, mask=mask, other=0.0).to(tl.float32)
        acc += dy * row
        drow = (dy * weight[:, None]).to(drows_ptr.dtype.element_ty)
        tl.store(drows_ptr + place[:, None] * D + offs_d[None, :], drow, mask=mask)
    tl.store(dweights_ptr + pair, tl.sum(acc, 1).to(dweights_ptr.dtype.element_ty), mask=mask_p)


# ---- launchers ---------------------------------------------------------------------------------------------


def norm_kind(order):
    """NORM of the kernels: 0 for none."""
    return 0 if order <= 0 else {1.0: 1, 2.0: 2, float("inf"): 3}.get(order, 4)


def moe_route_fwd_triton(logits, bias, top_k, norm_order, softmax_first, sigmoid, n_group, topk_group, scale):
    T, E = logits.shape
    weights, indices = logits.new_empty(T, top_k), logits.new_empty((T, top_k), dtype=torch.int32)
    if T == 0:
        return weights, indices

    def run(BLOCK_T, **options):
        moe_route_fwd_kernel[(triton.cdiv(T, BLOCK_T),)](
            logits, bias, weights, indices, T, E, top_k, n_group, topk_group, norm_order, scale, *logits.stride(),
            bias.stride(0) if bias is not None else 0, SOFTMAX=softmax_first and not sigmoid, SIGMOID=sigmoid, HAS_BIAS=bias is not None,
            GROUPS=n_group > 0, NORM=norm_kind(norm_order), BLOCK_T=BLOCK_T, BLOCK_E=triton.next_power_of_2(E),
            BLOCK_G=triton.next_power_of_2(max(n_group, 1)), **options,
        )

    ROUTE.launch(logits, run, E=E)
    return weights, indices


def moe_route_bwd_triton(dweights, logits, indices, norm_order, softmax_first, sigmoid, scale):
    T, E = logits.shape
    dlogits, indices = logits.new_empty(T, E), indices.contiguous()
    if T == 0:
        return dlogits

    def run(BLOCK_T, **options):
        moe_route_bwd_kernel[(triton.cdiv(T, BLOCK_T),)](
            dweights, logits, indices, dlogits, T, E, indices.shape[1], norm_order, scale, *dweights.stride(), *logits.stride(),
            SOFTMAX=softmax_first and not sigmoid, SIGMOID=sigmoid, NORM=norm_kind(norm_order), BLOCK_T=BLOCK_T, BLOCK_E=triton.next_power_of_2(E),
            **options,
        )

    ROUTE.launch(logits, run, E=E)
    return dlogits


def moe_permute_triton(indices, num_experts):
    indices, pairs, E = indices.contiguous(), indices.numel(), num_experts
    order, inverse = (indices.new_empty(pairs, dtype=torch.int32) for _ in range(2))
    offs = indices.new_empty(E, dtype=torch.int32)
    if pairs == 0:
        return order, inverse, offs.zero_()
    blocks = triton.cdiv(pairs, BLOCK_PAIRS)
    if blocks == 1:
        moe_permute_one_block_kernel[(1,)](indices, order, inverse, offs, pairs, E, BLOCK=BLOCK_PAIRS, BLOCK_E=BLOCK_EXPERTS)
        return order, inverse, offs
    counts = torch.zeros(blocks, E + 1, dtype=torch.int32, device=indices.device)
    totals = torch.empty(E + 1, dtype=torch.int32, device=indices.device)
    moe_permute_count_kernel[(blocks,)](indices, counts, pairs, E, BLOCK=BLOCK_PAIRS)
    moe_permute_sum_kernel[(triton.cdiv(E + 1, BLOCK_EXPERTS),)](counts, totals, blocks, E, BLOCK_B=BLOCK_COUNTS, BLOCK_E=BLOCK_EXPERTS, num_warps=8)
    moe_permute_ends_kernel[(1,)](totals, offs, E, BLOCK_E=1024)
    moe_permute_place_kernel[(blocks,)](indices, counts, offs, order, inverse, pairs, E, BLOCK=BLOCK_PAIRS)
    return order, inverse, offs


def weighted_sum(rows, inverse, weights, offs, y):
    """y (T, D): the sum of each token's rows, times its weights where there are any; rows behind offs[-1] left out."""
    (T, D), E = y.shape, offs.shape[0] if offs is not None else 1
    if T == 0:
        return y

    def run(BLOCK_T, BLOCK_D, **options):
        moe_unpermute_fwd_kernel[triton.cdiv(T, BLOCK_T), triton.cdiv(D, BLOCK_D)](
            rows, inverse, weights, offs, y, T, E, D, inverse.shape[0] // T, *rows.stride(), *(weights.stride() if weights is not None else (0, 0)),
            HAS_WEIGHTS=weights is not None, HAS_OFFS=offs is not None, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, **options,
        )

    UNPERMUTE.launch(rows, run, D=D)
    return y


def moe_unpermute_fwd_triton(rows, inverse, weights):
    return weighted_sum(rows, inverse.contiguous(), weights, None, rows.new_empty(weights.shape[0], rows.shape[1]))


def moe_unpermute_bwd_triton(dy, rows, inverse, weights):
    drows, dweights = rows.new_empty(rows.shape), weights.new_empty(weights.shape)
    pairs, D = rows.shape
    if pairs == 0:
        return drows, dweights

    def run(BLOCK_T, **options):
        moe_unpermute_bwd_kernel[(triton.cdiv(pairs, BLOCK_T),)](
            dy, rows, inverse.contiguous(), weights, drows, dweights, pairs, D, weights.shape[1], *dy.stride(), *rows.stride(), *weights.stride(),
            BLOCK_T=BLOCK_T, **options,
        )

    UNPERMUTE.launch(rows, run, D=D)
    return drows, dweights
