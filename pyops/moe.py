"""Choosing experts, sorting tokens by expert, summing them up again, and the losses of routers. Source: DBRX, transformers."""
import torch

from . import checks, dispatch, kernels
from .reference import moe as reference

ROUTE, PERMUTE, UNPERMUTE = "moe_route", "moe_permute", "moe_unpermute"
dispatch.register(ROUTE, "moe", ("moe_route_fwd", "moe_route_bwd"), cpu=dispatch.cpu_dtypes, gpu=dispatch.gpu_dtypes)
dispatch.register(PERMUTE, "moe", ("moe_permute",), cpu=lambda indices: None, gpu=lambda indices: None)
dispatch.register(UNPERMUTE, "moe", ("moe_unpermute_fwd", "moe_unpermute_bwd"), cpu=dispatch.cpu_dtypes, gpu=dispatch.gpu_dtypes)


def moe_route(router_logits, top_k, *, norm_order=None, softmax_first=True, sigmoid=False, bias=None, n_group=None, topk_group=None,
              scale=1.0, backend=None):
    """The top_k experts of every token and their weights.

    Args:
        router_logits: (T, E) float32, bfloat16, float16 or float64.
        top_k: A, 1 to E.
        norm_order: None, or p > 0 (1, 2, inf, ...): the chosen weights are divided by their p-norm (+ 1e-20).
        softmax_first: True: scores are the softmax over all experts. False: the softmax of the chosen logits (gpt-oss).
        sigmoid: scores are the sigmoid of each logit instead (DeepSeek-V3); softmax_first then says nothing.
        bias: (E,) or None, added to the scores for choosing only; not differentiated.
        n_group, topk_group: both or neither: experts stand in n_group equal groups, and only those of the topk_group best
            groups can be chosen. A group is worth the sum of its best two scores with sigmoid or bias (DeepSeek-V3), else
            its best one (DeepSeek-V2).
        scale: multiplies the weights at the end.
        backend: "cpu", "reference", ... or None to choose.

    Returns:
        weights (T, A) in the logits' dtype, computed in float32 (float64 for float64), the best first, and indices (T, A)
        int32. Of equal scores the lower index is taken. A row whose scores hold a NaN gets NaN weights and the indices
        0 .. A-1. Differentiable in router_logits.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to::

        scores = router_logits.float().softmax(-1)
        weights, indices = scores.topk(top_k)
        weights = scale * weights / weights.norm(p=norm_order, dim=-1, keepdim=True)
    """
    checks.check_tensor(ROUTE, "router_logits", router_logits, 2, "(T, E)")
    E = router_logits.shape[1]
    _check_integer(ROUTE, "top_k", top_k, 1, E, "the number of experts")
    checks.check_flags(ROUTE, softmax_first=softmax_first, sigmoid=sigmoid)
    checks.check_number(ROUTE, "scale", scale)
    if norm_order is not None:
        checks.check_number(ROUTE, "norm_order", norm_order)
        if not norm_order > 0:
            checks.fail(ROUTE, f"norm_order must be None or positive (1, 2, inf, ...), got {norm_order!r}")
    checks.check_optional(ROUTE, "bias", bias, (E,), "(E,)", router_logits)
    if (n_group is None) != (topk_group is None):
        checks.fail(ROUTE, f"n_group and topk_group go together, got {n_group!r} and {topk_group!r}")
    if n_group is not None:
        _check_integer(ROUTE, "n_group", n_group, 1, E, "the number of experts")
        if E % n_group:
            checks.fail(ROUTE, f"n_group must divide the {E} experts, got {n_group}")
        _check_integer(ROUTE, "topk_group", topk_group, 1, n_group, "n_group")
        if top_k > topk_group * (E // n_group):
            checks.fail(ROUTE, f"top_k must be at most the {topk_group * (E // n_group)} experts of the topk_group groups, got {top_k}")
    chosen, _ = dispatch.pick(ROUTE, router_logits, bias, backend=backend)
    flags = (bool(softmax_first), bool(sigmoid))
    if chosen != "reference":
        order = 0.0 if norm_order is None else float(norm_order)
        return kernels.ops(chosen).moe_route_fwd(router_logits, bias, top_k, order, *flags, n_group or 0, topk_group or 0, float(scale))
    dispatch.count(ROUTE, chosen)
    return reference.moe_route(router_logits, bias, top_k, norm_order, *flags, n_group, topk_group, float(scale))


def moe_permute(indices, num_experts, *, backend=None):
    """Sorts the pairs (token, choice) by expert, stably, without asking the device anything.

    Args:
        indices: (T, A) int32 or int64, not negative. Indices >= num_experts (expert parallelism) go last.
        num_experts: E.

    Returns:
        order (T * A,): the pair that stands at each place; its token is order // A.
        inverse (T * A,): the place of each pair. offs (E,): the end of each expert's places; all int32.

    Equivalent to::

        order = indices.flatten().argsort(stable=True)
        inverse[order] = arange(T * A)
        offs = bincount(indices.flatten(), minlength=E)[:E].cumsum(0)
    """
    checks.check_tensor(PERMUTE, "indices", indices, 2, "(T, A)", dtypes=(torch.int32, torch.int64))
    _check_integer(PERMUTE, "num_experts", num_experts, 1, 2**31 - 2, "what int32 holds")
    checks.check_not_negative(PERMUTE, "indices", indices)
    chosen, _ = dispatch.pick(PERMUTE, indices, backend=backend)
    if chosen != "reference":
        return kernels.ops(chosen).moe_permute(indices, num_experts)
    dispatch.count(PERMUTE, chosen)
    return reference.moe_permute(indices, num_experts)


def moe_unpermute(rows, inverse, weights, *, backend=None):
    """y[t] = sum over a of weights[t, a] * rows[inverse[t, a]].

    Args:
        rows: (T * A, D), in `moe_permute`'s order, for instance what grouped_mm returned.
        inverse: (T * A,) or (T, A) int32 or int64, from `moe_permute`.
        weights: (T, A), any float dtype.

    Returns:
        (T, D) in rows' dtype, summed in float32 (float64 for float64). Differentiable in rows and weights.

    Equivalent to: ``(rows[inverse].view(T, A, D) * weights[:, :, None]).sum(1)``
    """
    checks.check_tensor(UNPERMUTE, "rows", rows, 2, "(T * A, D)")
    checks.check_tensor(UNPERMUTE, "weights", weights, 2, "(T, A)", rows)
    R, A = weights.numel(), weights.shape[1]
    checks.check_positive(UNPERMUTE, A=A, D=rows.shape[1])
    checks.check_shape(UNPERMUTE, "rows", rows, (R, None), "(T * A, D)")
    dims = 2 if isinstance(inverse, torch.Tensor) and inverse.dim() == 2 else 1
    checks.check_tensor(UNPERMUTE, "inverse", inverse, dims, "(T * A,) or (T, A)", rows, dtypes=(torch.int32, torch.int64))
    checks.check_shape(UNPERMUTE, "inverse", inverse, tuple(weights.shape) if dims == 2 else (R,), "(T * A,) or (T, A)")
    if checks.has_values(inverse) and R:
        low, high = (int(v) for v in inverse.aminmax())
        if low < 0 or high >= R or int(inverse.flatten().bincount(minlength=R).max()) > 1:
            checks.fail(UNPERMUTE, f"inverse must name each of the {R} rows once, got values from {low} to {high}; take it from moe_permute")
    chosen, _ = dispatch.pick(UNPERMUTE, rows, weights, backend=backend)
    if chosen != "reference":
        return kernels.ops(chosen).moe_unpermute_fwd(rows, inverse.flatten(), weights)
    dispatch.count(UNPERMUTE, chosen)
    return reference.moe_unpermute(rows, inverse.flatten(), weights)


def load_balancing_loss(router_logits, num_experts, top_k, attention_mask=None):
    """How unevenly tokens go to experts: E * sum over e of (share of choices of e) * (mean probability of e).

    Args:
        router_logits: (T, E), or a tuple of one for each layer; num_experts: E. top_k: choices of each token.
        attention_mask: (B, L) or (T,) with T = B * L, or None: zero leaves a token out.

    Returns:
        a scalar, float32 (float64 for float64). Equivalent to: transformers' load_balancing_loss_func (Mixtral, DBRX).
    """
    fn = "load_balancing_loss"
    layers = _check_layers(fn, router_logits)
    T = layers[0].shape[0]
    checks.check_count(fn, "num_experts", num_experts, 1)
    for logits in layers:
        checks.check_shape(fn, "router_logits", logits, (T, num_experts), "(T, E)")
    _check_integer(fn, "top_k", top_k, 1, num_experts, "the number of experts")
    acc = torch.float64 if layers[0].dtype == torch.float64 else torch.float32
    live = torch.ones(T, dtype=acc, device=layers[0].device)
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor):
            checks.fail(fn, f"attention_mask must be a tensor (B, L) or (T,), got {type(attention_mask).__name__}", TypeError)
        checks.check_tensor(fn, "attention_mask", attention_mask, attention_mask.dim(), "(B, L) or (T,)",
                            dtypes=(*checks.FLOATS, torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
        if attention_mask.numel() != T:
            checks.fail(fn, f"attention_mask must hold one value for each of the {T} tokens, got {checks.describe(attention_mask)}")
        live = attention_mask.reshape(-1).to(layers[0].device, acc)
    probabilities = [logits.softmax(-1) for logits in layers]
    chosen = torch.stack([p.topk(top_k, dim=-1)[1] for p in probabilities]).flatten()
    counts = torch.zeros(num_experts, dtype=acc, device=live.device).index_add(0, chosen, live.repeat_interleave(top_k).repeat(len(layers)))
    mean = sum((p.to(acc) * live[:, None]).sum(0) for p in probabilities)
    rows = live.sum() * len(layers)
    return num_experts * (counts / rows * (mean / rows)).sum()


def router_z_loss(router_logits):
    """mean(logsumexp(logits)^2): keeps the logits of a router small (ST-MoE, Switch Transformer).

    Args:
        router_logits: (T, E), or a tuple of one for each layer.

    Returns:
        a scalar, float32 (float64 for float64).
    """
    layers = _check_layers("router_z_loss", router_logits)
    acc = torch.float64 if layers[0].dtype == torch.float64 else torch.float32
    return torch.cat([logits.to(acc).logsumexp(-1) for logits in layers]).square().mean()


def _check_layers(fn, router_logits):
    layers = tuple(router_logits) if isinstance(router_logits, (tuple, list)) else (router_logits,)
    if not layers:
        checks.fail(fn, "router_logits must hold at least one layer, got none")
    for logits in layers:
        checks.check_tensor(fn, "router_logits", logits, 2, "(T, E)", layers[0])
    return layers


def _check_integer(fn, name, value, low, high, high_text):
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        checks.fail(fn, f"{name} must be an integer from {low} to {high}, {high_text}, got {value!r}")


# ---- shapes and gradients of the native ops ----------------------------------------------------------------


@kernels.register_fake("moe_route_fwd")
def _(logits, bias, top_k, norm_order, softmax_first, sigmoid, n_group, topk_group, scale):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32)


@kernels.register_fake("moe_route_bwd")
def _(dweights, logits, indices, norm_order, softmax_first, sigmoid, scale):
    return logits.new_empty(logits.shape)


@kernels.register_fake("moe_permute")
def _(indices, num_experts):
    pairs = indices.new_empty(indices.numel(), dtype=torch.int32)
    return pairs, torch.empty_like(pairs), indices.new_empty(num_experts, dtype=torch.int32)


@kernels.register_fake("moe_unpermute_fwd")
def _(rows, inverse, weights):
    return rows.new_empty(weights.shape[0], rows.shape[1])


@kernels.register_fake("moe_unpermute_bwd")
def _(dy, rows, inverse, weights):
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _route_context(ctx, inputs, output):
    logits, _, _, norm_order, softmax_first, sigmoid, _, _, scale = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.rest = (norm_order, softmax_first, sigmoid, scale)


def _route_backward(ops, ctx, dweights, dindices):
    logits, indices = ctx.saved_tensors
    return ops.moe_route_bwd(dweights, logits, indices, *ctx.rest), *[None] * 8


def _unpermute_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _unpermute_backward(ops, ctx, dy):
    drows, dweights = ops.moe_unpermute_bwd(dy, *ctx.saved_tensors)
    return drows, None, dweights


kernels.register_autograd("moe_route", _route_backward, _route_context)
kernels.register_autograd("moe_unpermute", _unpermute_backward, _unpermute_context)
