"""Mixture of experts: routing, permutation, experts, losses. Sources: transformers' DBRX, Mixtral, DeepSeek-V3, gpt-oss."""
import math

import torch
from torch.nn import functional as F

from . import checks, dispatch, native
from .linear import ACTIVATION_IDS
from .reference import moe as reference

ROUTE, PERMUTE, UNPERMUTE, EXPERTS = "moe_route", "moe_permute", "moe_unpermute", "fused_experts"
# Names of transformers' ACT2FN for the same functions.
ALIASES = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu_squared": "relu2"}
NORMS = (None, 1, 2, math.inf)


def _experts_limit(x, w1, w_up, w2, *rest):
    for weight in (w1, w_up, w2):
        if weight is not None and (x.dtype == torch.float64) != (weight.dtype == torch.float64):
            return "float64 goes with float64 only"
    return dispatch.cpu_dtypes(x, w1, w_up, w2, *rest)


dispatch.register(ROUTE, "moe", ("moe_route_fwd", "moe_route_bwd"), cpu=dispatch.cpu_dtypes)
dispatch.register(PERMUTE, "moe", ("moe_permute",), cpu=lambda indices: None)
dispatch.register(UNPERMUTE, "moe", ("moe_unpermute_fwd", "moe_unpermute_bwd"), cpu=dispatch.cpu_dtypes)
dispatch.register(EXPERTS, "moe", ("fused_experts_fwd", "fused_experts_bwd"), cpu=_experts_limit)


def moe_route(router_logits, top_k, *, norm_order=None, softmax_first=True, sigmoid=False, bias=None, n_group=None,
              topk_group=None, scale=1.0, backend=None):
    """The experts of each token and their weights.

    Args:
        router_logits: (T, E) float32, bfloat16, float16 or float64.
        top_k: experts per token, 1..E.
        norm_order: None, or the order of the norm (1, 2, inf) that the chosen weights are divided by: DBRX's
            moe_normalize_expert_weights, 1 for Mixtral and norm_topk_prob.
        softmax_first: softmax over all experts, then top-k (DBRX, Mixtral, Qwen, OLMoE); False: softmax of the chosen
            logits (gpt-oss).
        sigmoid: scores by sigmoid instead of softmax (DeepSeek-V3).
        bias: (E,) or None, added to the scores for the choice alone (DeepSeek-V3's correction bias).
        n_group, topk_group: choose only inside the topk_group best of n_group equal groups of experts; a group counts
            by its best expert, or with a bias by the sum of its best two.
        scale: factor on the weights.

    Returns:
        weights (T, A) in the logits' dtype, computed in float32 (float64), differentiable in the logits; indices (T, A)
        int32, best first; of equal scores the lower index comes first. A row with a NaN logit has NaN weights and
        indices 0 .. A - 1.

    Equivalent to, by default: ``router_logits.softmax(-1).topk(top_k)``
    """
    checks.check_tensor(ROUTE, "router_logits", router_logits, 2, "(T, E)")
    E = router_logits.shape[1]
    if not isinstance(top_k, int) or not 1 <= top_k <= E:
        checks.fail(ROUTE, f"top_k must be between 1 and the {E} experts, got {top_k!r}")
    if norm_order not in NORMS:
        checks.fail(ROUTE, f"norm_order must be None, 1, 2 or inf, got {norm_order!r}")
    checks.check_optional(ROUTE, "bias", bias, (E,), "(E,)", router_logits)
    if (n_group is None) != (topk_group is None):
        checks.fail(ROUTE, "n_group and topk_group go together")
    if n_group is not None:
        if n_group < 1 or E % n_group or not 1 <= topk_group <= n_group:
            checks.fail(ROUTE, f"n_group must divide the {E} experts and topk_group lie in 1..n_group, got {n_group} and {topk_group}")
        if topk_group * (E // n_group) < top_k:
            checks.fail(ROUTE, f"top_k = {top_k} experts don't fit into topk_group = {topk_group} groups of {E // n_group}")
    chosen, _ = dispatch.pick(ROUTE, router_logits, bias, backend=backend)
    order = 0.0 if norm_order is None else float(norm_order)
    if chosen == "cpu":
        bias = None if bias is None else bias.detach()
        weights, indices, _ = torch.ops.terrazzo.moe_route_fwd(
            router_logits, bias, top_k, order, softmax_first, sigmoid, n_group or 0, topk_group or 0, scale
        )
        return weights, indices
    dispatch.count(ROUTE, chosen)
    wide = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    weights, indices = reference.moe_route(wide, top_k, norm_order, softmax_first, sigmoid, bias, n_group, topk_group, scale)
    broken = wide.isnan().any(-1, keepdim=True)
    weights = torch.where(broken, float("nan"), weights)
    indices = torch.where(broken, torch.arange(top_k, dtype=torch.int32, device=indices.device), indices)
    return weights.to(router_logits.dtype), indices


def moe_permute(indices, num_experts, *, backend=None):
    """The pairs of token and expert, sorted by expert: a counting sort, ties in token order.

    Args:
        indices: (T, A) int32 expert of each pair, not negative; those >= num_experts (sentinels) come last.
        num_experts: E.

    Returns:
        order (T * A,) int32: the pair t * A + a at each sorted place (its row is x[order // A]); inverse (T, A) int32:
        the place of each pair; offs (E,) int32: the end of each expert's places.

    Equivalent to: ``order = indices.flatten().argsort(stable=True)``; ``offs = bincount(indices).cumsum(0)``
    """
    checks.check_tensor(PERMUTE, "indices", indices, 2, "(T, A)", dtypes=(torch.int32,))
    if not isinstance(num_experts, int) or num_experts < 1:
        checks.fail(PERMUTE, f"num_experts must be a positive number, got {num_experts!r}")
    _check_not_negative(PERMUTE, "indices", indices)
    chosen, _ = dispatch.pick(PERMUTE, indices, backend=backend)
    if chosen == "cpu":
        return torch.ops.terrazzo.moe_permute(indices, num_experts)
    dispatch.count(PERMUTE, chosen)
    return reference.moe_permute(indices, num_experts)


def moe_unpermute(rows, inverse, weights, *, backend=None):
    """Each token's weighted sum of its rows.

    Args:
        rows: (S, D), S at least T * A, in sorted order. inverse: (T, A) int32 places. weights: (T, A).

    Returns:
        (T, D) in rows' dtype, summed in float32 (float64). Differentiable in rows and weights.

    Equivalent to: ``(rows[inverse] * weights[..., None]).sum(1)``
    """
    checks.check_tensor(UNPERMUTE, "rows", rows, 2, "(S, D)")
    checks.check_tensor(UNPERMUTE, "inverse", inverse, 2, "(T, A)", rows, dtypes=(torch.int32,))
    checks.check_tensor(UNPERMUTE, "weights", weights, 2, "(T, A)", rows)
    checks.check_shape(UNPERMUTE, "weights", weights, tuple(inverse.shape), "(T, A)")
    if not torch.compiler.is_compiling() and inverse.is_cpu and inverse.numel():
        low, high = int(inverse.min()), int(inverse.max())
        if low < 0 or high >= rows.shape[0]:
            checks.fail(UNPERMUTE, f"inverse must lie in 0..{rows.shape[0] - 1}, the rows, got {low}..{high}")
    chosen, _ = dispatch.pick(UNPERMUTE, rows, weights, backend=backend)
    if chosen == "cpu":
        return torch.ops.terrazzo.moe_unpermute_fwd(rows, inverse, weights)
    dispatch.count(UNPERMUTE, chosen)
    return reference.moe_unpermute(rows, inverse, weights)


def _check_not_negative(fn, name, indices):
    if not torch.compiler.is_compiling() and indices.is_cpu and indices.numel() and int(indices.min()) < 0:
        checks.fail(fn, f"{name} must not be negative, got {int(indices.min())}; mark experts of other ranks by an index >= the number of experts")


def fused_experts(x, w_gate_up, w_down, topk_weights, topk_indices, *, w_up=None, bias_gate_up=None, bias_up=None, bias_down=None,
                  activation="silu", interleaved=False, transposed=None, num_experts=None, alpha=1.702, limit=7.0, backend=None):
    """A layer of experts: gather, both products, gate, weighting and scatter in one op. Dropless.

    y[t] = sum over a of topk_weights[t, a] * (h @ w_down[e] + bias_down[e]) with h = act(g) * u of expert e = topk_indices[t, a],
    g and u its gate and up projections of x[t].

    Args:
        x: (T, D) float32, bfloat16, float16 or float64; T may be 0.
        w_gate_up: (E, 2F, D): gate above up, as in Mixtral (rows in turn when `interleaved`); with `w_up` the gate alone,
            (E, F, D); (E, F, D) without w_up: an expert without gate, h = act(x w). w_down: (E, D, F).
            Any strides, never copied or repacked; the dtype may differ from x's (float64 goes with float64 only).
        transposed: the matrices are stored (E, D, 2F) and (E, F, D), as in gpt-oss; a pair says so of (w_gate_up and
            w_up, w_down); None: read from the shapes, not transposed where both fit.
        num_experts: E, for two-dimensional weights (E * F, D), DBRX's w1, v1 (as w_up) and w2.
        topk_weights: (T, A). topk_indices: (T, A) int32 or int64; an index >= E belongs to another rank and contributes
            nothing.
        bias_gate_up: (E, 2F) or (E, F). bias_up: (E, F), with w_up. bias_down: (E, D).
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2", transformers' names for them, or "swiglu_oai", the gate of
            gpt-oss: g clamped above at `limit`, u to +-limit, h = (u + 1) g sigmoid(alpha g).

    Returns:
        (T, D) in x's dtype, accumulated in float32 (float64). Differentiable in x, every weight and bias, topk_weights.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to, for DBRX: ``sum(weights[t, a] * (silu(x[t] @ w1[e].T) * (x[t] @ v1[e].T)) @ w2[e])``
    """
    checks.check_tensor(EXPERTS, "x", x, 2, "(T, D)")
    w1, up, w2 = _views(x, w_gate_up, w_up, w_down, transposed, num_experts)
    E, N1, D = w1.shape
    width = w2.shape[2]
    if up is not None:
        checks.check_shape(EXPERTS, "w_up", up, (E, width, D), "like the gate")
    if N1 != width and (up is not None or N1 != 2 * width):
        checks.fail(EXPERTS, f"w_gate_up must have F = {width} or 2F columns beside w_down, got {N1}")
    activation = ALIASES.get(activation, activation)
    if activation is None or activation not in ACTIVATION_IDS:
        names = ", ".join(repr(name) for name in ACTIVATION_IDS if name)
        checks.fail(EXPERTS, f"activation must be one of {names}, got {activation!r}")
    gated = up is not None or N1 == 2 * width
    if activation == "swiglu_oai" and not gated:
        checks.fail(EXPERTS, "swiglu_oai is a gate: w_gate_up must have 2F columns, or w_up must be given")
    if interleaved and (up is not None or not gated):
        checks.fail(EXPERTS, "interleaved needs gate and up in one w_gate_up")
    checks.check_tensor(EXPERTS, "topk_indices", topk_indices, 2, "(T, A)", x, dtypes=(torch.int32, torch.int64))
    checks.check_shape(EXPERTS, "topk_indices", topk_indices, (x.shape[0], None), "(T, A)")
    checks.check_positive(EXPERTS, A=topk_indices.shape[1])
    checks.check_tensor(EXPERTS, "topk_weights", topk_weights, 2, "(T, A)", x)
    checks.check_shape(EXPERTS, "topk_weights", topk_weights, tuple(topk_indices.shape), "(T, A)")
    _check_not_negative(EXPERTS, "topk_indices", topk_indices)
    checks.check_optional(EXPERTS, "bias_gate_up", bias_gate_up, (E, N1), "(E, 2F or F)", x)
    checks.check_optional(EXPERTS, "bias_up", bias_up, (E, width), "(E, F)", x)
    checks.check_optional(EXPERTS, "bias_down", bias_down, (E, D), "(E, D)", x)
    if bias_up is not None and up is None:
        checks.fail(EXPERTS, "bias_up goes with w_up; put both biases into bias_gate_up")
    chosen, _ = dispatch.pick(EXPERTS, x, w1, up, w2, topk_weights, bias_gate_up, bias_up, bias_down, backend=backend)
    tensors = (x, w1, up, w2, topk_weights)
    biases = (bias_gate_up, bias_up, bias_down)
    if chosen == "cpu":
        indices = topk_indices if topk_indices.dtype == torch.int32 else topk_indices.clamp(max=E).to(torch.int32)
        save = dispatch.needs_grad(*tensors, *biases)
        options = (ACTIVATION_IDS[activation], interleaved, alpha, limit, save)
        return torch.ops.terrazzo.fused_experts_fwd(*tensors, indices, *biases, *options)[0]
    dispatch.count(EXPERTS, chosen)
    return reference.fused_experts(*tensors, topk_indices, *biases, activation, interleaved, alpha, limit)


def _views(x, w_gate_up, w_up, w_down, transposed, num_experts):
    """The weights as views (E, N1, D), (E, F, D) or None, (E, D, F)."""
    D = x.shape[1]
    checks.check_positive(EXPERTS, D=D)
    first, second = transposed if isinstance(transposed, tuple) else (transposed, transposed)
    views = []
    for name, weight, axis, turned in (("w_gate_up", w_gate_up, 2, first), ("w_up", w_up, 2, first), ("w_down", w_down, 1, second)):
        if weight is None and name == "w_up":
            views.append(None)
            continue
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            if num_experts is None:
                checks.fail(EXPERTS, f"{name} of two dimensions (E * F, D) needs num_experts, got {checks.describe(weight)}")
            if weight.shape[0] % num_experts:
                checks.fail(EXPERTS, f"{name} must be (E * F, D) with E = {num_experts}, got {checks.describe(weight)}")
            weight = weight.view(num_experts, -1, weight.shape[1])
        checks.check_tensor(EXPERTS, name, weight, 3, "(E, out, in), (E, in, out) or (E * F, D)", x)
        checks.check_positive(EXPERTS, **{f"each size of {name}": min(weight.shape)})
        if turned is None:
            turned = weight.shape[axis] != D and weight.shape[3 - axis] == D
        view = weight.transpose(1, 2) if turned else weight
        if view.shape[axis] != D or (views and view.shape[0] != views[0].shape[0]):
            expected = "(E, 2F, D)" if axis == 2 else "(E, D, F)"
            checks.fail(EXPERTS, f"{name} must be {expected}, or transposed, with D = {D}"
                        + (f" and E = {views[0].shape[0]}" if views else "") + f", got {checks.describe(weight)}")
        views.append(view)
    return views


def load_balancing_loss(router_logits, num_experts, top_k, attention_mask=None):
    """Switch Transformers' auxiliary loss over the logits of all layers, as Mixtral and DBRX compute it.

    Args:
        router_logits: (T, E), or a sequence of them, one for each layer. attention_mask: (B, L) of ones and zeros or None;
            then each layer's logits hold B * L tokens.

    Returns:
        scalar: E * sum over experts of (share of the tokens' choices) * (mean probability).
    """
    name = "load_balancing_loss"
    layers = [router_logits] if isinstance(router_logits, torch.Tensor) else list(router_logits)
    if not layers:
        checks.fail(name, "router_logits holds no layer")
    for layer in layers:
        checks.check_tensor(name, "router_logits", layer, 2, "(T, E)")
        checks.check_shape(name, "router_logits", layer, (None, num_experts), "(T, E)")
    probabilities = torch.cat([layer.to(layers[0].device) for layer in layers]).softmax(-1)
    chosen = F.one_hot(probabilities.topk(top_k, dim=-1)[1], num_experts).to(probabilities.dtype)
    if attention_mask is None:
        share, mean = chosen.mean(0), probabilities.mean(0)
    else:
        mask = attention_mask.reshape(-1).to(probabilities).repeat(len(layers))
        if mask.numel() != probabilities.shape[0]:
            checks.fail(name, f"attention_mask must cover the {probabilities.shape[0] // len(layers)} tokens of a layer, got {checks.describe(attention_mask)}")
        share = (chosen * mask[:, None, None]).sum(0) / mask.sum()
        mean = (probabilities * mask[:, None]).sum(0) / mask.sum()
    return (share * mean).sum() * num_experts


def router_z_loss(router_logits):
    """ST-MoE's z-loss: the mean of logsumexp(logits)^2 over (T, E) logits."""
    checks.check_tensor("router_z_loss", "router_logits", router_logits, 2, "(T, E)")
    return router_logits.logsumexp(-1).square().mean()


# ---- shapes and gradients of the native ops ------------------------------------------------------------------


@native.register_fake("moe_route_fwd")
def _(logits, bias, top_k, norm_order, softmax_first, sigmoid, n_group, topk_group, scale):
    T = logits.shape[0]
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(T, top_k), logits.new_empty((T, top_k), dtype=torch.int32), logits.new_empty((T, 2), dtype=acc)


@native.register_fake("moe_route_bwd")
def _(dweights, logits, indices, stats, norm_order, softmax_first, sigmoid, scale):
    return logits.new_empty(logits.shape)


def _route_setup(ctx, inputs, output):
    logits, _, _, norm_order, softmax_first, sigmoid, _, _, scale = inputs
    _, indices, stats = output
    ctx.save_for_backward(logits, indices, stats)
    ctx.mark_non_differentiable(indices, stats)
    ctx.options = (norm_order, softmax_first, sigmoid, scale)


def _route_backward(ctx, dweights, _, __):
    return torch.ops.terrazzo.moe_route_bwd(dweights, *ctx.saved_tensors, *ctx.options), *(None,) * 8


native.register_autograd(ROUTE, _route_backward, _route_setup)


@native.register_fake("moe_permute")
def _(indices, num_experts):
    return indices.new_empty(indices.numel()), indices.new_empty(indices.shape), indices.new_empty(num_experts)


@native.register_fake("moe_unpermute_fwd")
def _(rows, inverse, weights):
    return rows.new_empty(inverse.shape[0], rows.shape[1])


@native.register_fake("moe_unpermute_bwd")
def _(dy, rows, inverse, weights):
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _unpermute_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _unpermute_backward(ctx, dy):
    drows, dweights = torch.ops.terrazzo.moe_unpermute_bwd(dy, *ctx.saved_tensors)
    return drows, None, dweights


native.register_autograd(UNPERMUTE, _unpermute_backward, _unpermute_setup)


@native.register_fake("fused_experts_fwd")
def _(x, w1, w_up, w2, weights, indices, bias1, bias_up, bias2, activation, interleaved, alpha, limit, save):
    columns = w1.shape[1] + (w2.shape[2] if w_up is not None else 0)
    return x.new_empty(x.shape), x.new_empty((indices.numel(), columns) if save else (0,))


def _stored_transposed(weight):
    return weight.stride(2) != 1 and weight.stride(1) == 1


@native.register_fake("fused_experts_bwd")
def _(dy, x, w1, w_up, w2, weights, indices, bias1, bias_up, bias2, activation, interleaved, alpha, limit, saved, need_x, need_weights):
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32

    def like(weight):
        if weight is None or not need_weights:
            return x.new_empty(0)
        E, rows, columns = weight.shape
        return weight.new_empty(E, columns, rows).transpose(1, 2) if _stored_transposed(weight) else weight.new_empty(weight.shape)

    def bias_like(bias):
        return x.new_empty(0) if bias is None or not need_weights else x.new_empty(bias.shape, dtype=acc)

    dx = x.new_empty(x.shape if need_x else (0,))
    dweights = x.new_empty(weights.shape, dtype=acc)
    return dx, like(w1), like(w_up), like(w2), dweights, bias_like(bias1), bias_like(bias_up), bias_like(bias2)


def _experts_setup(ctx, inputs, output):
    *tensors, activation, interleaved, alpha, limit, save = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = (activation, interleaved, alpha, limit)


def _experts_backward(ctx, dy, _):
    *tensors, saved = ctx.saved_tensors
    x, w1, w_up, w2, weights, indices, bias1, bias_up, bias2 = tensors
    need = ctx.needs_input_grad
    need_weights = any(need[i] for i in (1, 2, 3, 6, 7, 8))
    grads = torch.ops.terrazzo.fused_experts_bwd(dy, *tensors, *ctx.options, saved, need[0], need_weights)
    dx, dw1, dw_up, dw2, dweights, dbias1, dbias_up, dbias2 = grads
    found = [dx, dw1, dw_up, dw2, dweights, None, dbias1, dbias_up, dbias2]
    return *(grad.to(t.dtype) if wanted else None for grad, t, wanted in zip(found, tensors, need)), *(None,) * 5


native.register_autograd(EXPERTS, _experts_backward, _experts_setup)
