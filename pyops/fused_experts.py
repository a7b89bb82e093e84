"""A whole layer of experts in one op: gather, both products, gate, weighting and sum. Source: DBRX's and transformers' experts."""
import torch

from . import activations, checks, dispatch, kernels
from .packing import PackedExperts
from .reference import fused_experts as reference

OP = "fused_experts"
dispatch.register(OP, "moe", ("fused_experts_fwd", "fused_experts_bwd"), cpu=dispatch.cpu_dtypes, gpu=dispatch.gpu_dtypes)


def fused_experts(x, w_gate_up, w_down, topk_weights, topk_indices, *, w_up=None, bias_gate_up=None, bias_up=None, bias_down=None,
                  activation="silu", interleaved=False, transposed=None, num_experts=None, alpha=1.702, limit=7.0, backend=None):
    """y[t] = sum over a of topk_weights[t, a] * (h @ w_down[e].T + bias_down[e]) with e = topk_indices[t, a] and
    h = activation(gate) * up, where gate, up = x[t] @ w_gate_up[e].T + bias_gate_up[e].

    Args:
        x: (T, D) float32, bfloat16, float16 or float64; T may be 0.
        w_gate_up: (E, 2F, D): the gate's rows, then those of up; with `interleaved` they alternate. Width F instead of
            2F: an expert without a gate, h = activation(x w). With w_up: (E, F, D), the gate alone. Or a `PackedExperts`,
            which holds all weights (w_down and w_up are then None): faster, without gradients.
        w_down: (E, D, F). Weights are read where they lie, in any strides and dtypes (float64 goes with float64).
        topk_weights, topk_indices: (T, A), what `moe_route` returns; indices int32 or int64, not negative. An index >= E
            is an expert of somebody else (expert parallelism): it contributes nothing.
        w_up: (E, F, D), the up projection in a tensor of its own (DBRX).
        bias_gate_up: (E, 2F) like w_gate_up. bias_up: (E, F), with w_up. bias_down: (E, D).
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2", None, transformers' names of these, or "swiglu_oai"
            (gpt-oss): gate clamped above at `limit`, up to +-limit, h = (up + 1) * gate * sigmoid(alpha * gate).
        interleaved: gate and up alternate in w_gate_up and bias_gate_up (gpt-oss).
        transposed: True: w_gate_up is (E, D, 2F), w_up (E, D, F), w_down (E, F, D). A pair says it for (w_gate_up and
            w_up, w_down). None: each axis of length D is taken for D; where both are, as False.
        num_experts: E, needed with weights of two dimensions: DBRX's (E * F, D) for all three, viewed as
            transposed=(False, True).
        alpha, limit: of "swiglu_oai".
        backend: "cpu", "reference", ... or None to choose.

    Returns:
        (T, D) in x's dtype, accumulated in float32 (float64 for float64). No token is ever dropped. Differentiable in x,
        weights, biases and topk_weights.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to::

        for t, a in product(range(T), range(A)):
            e = topk_indices[t, a]
            gate, up = (x[t] @ w_gate_up[e].T + bias_gate_up[e]).chunk(2)
            y[t] += topk_weights[t, a] * (silu(gate) * up @ w_down[e].T + bias_down[e])
    """
    checks.check_tensor(OP, "x", x, 2, "(T, D)")
    activation = activations.resolve(OP, activation)
    checks.check_flags(OP, interleaved=interleaved)
    checks.check_number(OP, "alpha", alpha)
    checks.check_number(OP, "limit", limit, 0)
    if isinstance(w_gate_up, PackedExperts):
        biases = (bias_gate_up, bias_up, bias_down)
        if w_down is not None or w_up is not None or transposed is not None:
            checks.fail(OP, "packed experts hold every weight: w_down, w_up and transposed must be None")
        return _packed(x, w_gate_up, topk_weights, topk_indices, biases, activation, float(alpha), float(limit), backend)
    w1, w_up, w2 = one_layout(x, w_gate_up, w_up, w_down, transposed, num_experts, interleaved)
    _check_activation(activation, w_up is not None or w1.shape[1] == 2 * w2.shape[2])
    E, D, F = w2.shape
    checks.check_optional(OP, "bias_gate_up", bias_gate_up, (E, w1.shape[1]), "(E, 2F) or (E, F), like w_gate_up", x)
    checks.check_optional(OP, "bias_up", bias_up, (E, F), "(E, F)", x)
    checks.check_optional(OP, "bias_down", bias_down, (E, D), "(E, D)", x)
    if bias_up is not None and w_up is None:
        checks.fail(OP, "bias_up needs w_up; without it bias_gate_up holds both")
    _check_topk(x, topk_weights, topk_indices)
    checks.check_float64(OP, x=x, w_gate_up=w1, w_up=w_up, w_down=w2)
    chosen, _ = dispatch.pick(OP, x, w1, w_up, w2, topk_weights, bias_gate_up, bias_up, bias_down, backend=backend)
    args = (x, w1, w_up, w2, topk_weights, topk_indices, bias_gate_up, bias_up, bias_down)
    if chosen != "reference":
        tensors = (x, w1, w_up, w2, topk_weights, _int32(topk_indices, E), bias_gate_up, bias_up, bias_down)
        options = (activations.IDS[activation], interleaved, float(alpha), float(limit))
        return kernels.ops(chosen).fused_experts_fwd(*tensors, *options, dispatch.needs_grad(*tensors))[0]
    dispatch.count(OP, chosen)
    return reference.fused_experts(*args, activation, interleaved, float(alpha), float(limit))


def _packed(x, packed, topk_weights, topk_indices, biases, activation, alpha, limit, backend):
    w1, w_up, w2 = packed.w1, packed.w_up, packed.w2
    E, D, N1 = w1.shape
    F = w2.shape[1]
    checks.check_shape(OP, "x", x, (None, D), "(T, D) with the D of the packed weights")
    _check_activation(activation, packed.gated)
    bias1, bias_up, bias2 = biases
    if bias1 is not None and w_up is not None and bias1.dim() == 2 and bias1.shape[1] == 2 * F:
        bias1, bias_up = bias1[:, :F], bias1[:, F:]
    checks.check_optional(OP, "bias_gate_up", bias1, (E, N1), "(E, 2F) or (E, F), like the weight before packing", x)
    checks.check_optional(OP, "bias_up", bias_up, (E, F), "(E, F)", x)
    checks.check_optional(OP, "bias_down", bias2, (E, D), "(E, D)", x)
    _check_topk(x, topk_weights, topk_indices)
    if dispatch.needs_grad(x, topk_weights, bias1, bias_up, bias2):
        checks.fail(OP, "packed weights are for inference, and an input requires gradients; call under torch.no_grad(), or with the weights themselves")
    if any((w.dtype == torch.float64) != (x.dtype == torch.float64) for w in packed.weights):
        checks.fail(OP, f"float64 goes with float64 only, got x {x.dtype} and packed weights {w1.dtype}")
    chosen, _ = dispatch.pick(OP, x, topk_weights, bias1, bias_up, bias2, backend=backend)
    indices, kind = _int32(topk_indices, E), activations.IDS[activation]
    if chosen == "cpu":
        return torch.ops.terrazzo.fused_experts_packed(
            x, w1.data, w_up and w_up.data, w2.data, w1.scale, w_up and w_up.scale, w2.scale, topk_weights, indices, bias1, bias_up, bias2,
            N1, F, kind, packed.interleaved, alpha, limit,
        )
    dense = [None if w is None else w.unpack().mT for w in (w1, w_up, w2)]
    if chosen != "reference":  # the panels are the cpu kernels' own: others take the weights themselves
        return kernels.ops(chosen).fused_experts_fwd(
            x, *dense, topk_weights, indices, bias1, bias_up, bias2, kind, packed.interleaved, alpha, limit, False)[0]
    dispatch.count(OP, chosen)
    return reference.fused_experts(x, *dense, topk_weights, topk_indices, bias1, bias_up, bias2, activation, packed.interleaved, alpha, limit)


def _int32(topk_indices, E):
    return topk_indices if topk_indices.dtype == torch.int32 else topk_indices.clamp(max=E).to(torch.int32)


@kernels.register_fake("fused_experts_packed")
def _(x, *args):
    return x.new_empty(x.shape)


def one_layout(x, w_gate_up, w_up, w_down, transposed, num_experts, interleaved):
    """Views (E, F or 2F, D), (E, F, D) or None, (E, D, F) of the weights; nothing is copied."""
    D = x.shape[1]
    checks.check_positive(OP, D=D)
    if num_experts is not None:
        checks.check_count(OP, "num_experts", num_experts, 1)
    pair = _transposed_pair(transposed)
    weights = {"w_gate_up": w_gate_up, "w_up": w_up, "w_down": w_down}
    weights = {name: w for name, w in weights.items() if w is not None or name != "w_up"}
    flat = isinstance(w_gate_up, torch.Tensor) and w_gate_up.dim() == 2
    if flat:
        if num_experts is None:
            checks.fail(OP, "weights of two dimensions (E * F, D) need num_experts")
        if pair not in ((None, None), (False, True)):
            checks.fail(OP, f"weights of two dimensions have DBRX's layout: transposed must be None or (False, True), got {transposed!r}")
        pair = (False, True)
    views = []
    for name, w in weights.items():
        checks.check_tensor(OP, name, w, 2 if flat else 3, "(E * F, D)" if flat else "of three dimensions, experts first,", x)
        if flat:
            if w.shape[0] % num_experts:
                checks.fail(OP, f"num_experts must divide the {w.shape[0]} rows of {name}, got {num_experts!r}")
            w = w.unflatten(0, (num_experts, w.shape[0] // num_experts))
        down = name == "w_down"
        views.append(_view(name, w, D, axis=1 if down else 2, transposed=pair[down]))
    w1, w2 = views[0], views[-1]
    E = w2.shape[0] if num_experts is None else num_experts
    checks.check_positive(OP, E=E)
    for name, w in zip(weights, views):
        if w.shape[0] != E:
            checks.fail(OP, f"{name} must hold {E} experts like " + ("num_experts" if num_experts else "w_down") + f", got {w.shape[0]}")
    w_up = views[1] if len(views) == 3 else None
    _check_widths(w1, w_up, w2, interleaved)
    return w1, w_up, w2


def _transposed_pair(transposed):
    pair = tuple(transposed) if isinstance(transposed, (tuple, list)) else (transposed, transposed)
    if len(pair) != 2 or any(not isinstance(p, bool) and p is not None for p in pair):
        checks.fail(OP, f"transposed must be None, a bool or a pair of bools for (w_gate_up, w_down), got {transposed!r}")
    return pair


def _view(name, w, D, axis, transposed):
    """w with its axis of length D at `axis`, where it stands when it is not transposed."""
    if transposed is None:
        transposed = w.shape[axis] != D
    w = w.mT if transposed else w
    if w.shape[axis] != D:
        given = checks.describe(w.mT if transposed else w)
        checks.fail(OP, f"{name} must have an axis of D = {D}, the width of x, where `transposed` says (last but for w_down (E, D, F)), got {given}")
    return w


def _check_widths(w1, w_up, w2, interleaved):
    F, width = w2.shape[2], w1.shape[1]
    checks.check_positive(OP, F=F)
    if w_up is not None:
        if width != F or w_up.shape[1] != F:
            checks.fail(OP, f"with w_up, w_gate_up and w_up must both be F = {F} wide like w_down, got {width} and {w_up.shape[1]}")
    elif width not in (F, 2 * F):
        checks.fail(OP, f"w_gate_up must be 2F = {2 * F} wide with a gate, F = {F} without one (F from w_down), got {width}")
    gated = w_up is not None or width == 2 * F
    if interleaved and (w_up is not None or not gated):
        checks.fail(OP, "interleaved needs gate and up in one w_gate_up of width 2F")


def _check_activation(activation, gated):
    if activation == "swiglu_oai" and not gated:
        checks.fail(OP, "activation 'swiglu_oai' needs a gate: w_gate_up of width 2F, or w_up")


def _check_topk(x, topk_weights, topk_indices):
    checks.check_tensor(OP, "topk_weights", topk_weights, 2, "(T, A)", x)
    checks.check_tensor(OP, "topk_indices", topk_indices, 2, "(T, A)", x, dtypes=(torch.int32, torch.int64))
    checks.check_shape(OP, "topk_weights", topk_weights, (x.shape[0], None), "(T, A)")
    checks.check_shape(OP, "topk_indices", topk_indices, tuple(topk_weights.shape), "like topk_weights")
    checks.check_positive(OP, A=topk_weights.shape[1])
    checks.check_not_negative(OP, "topk_indices", topk_indices)


@kernels.register_fake("fused_experts_fwd")
def _(x, w1, w_up, w2, weights, indices, bias1, bias_up, bias2, activation, interleaved, alpha, limit, save):
    columns = w1.shape[1] + (w2.shape[2] if w_up is not None else 0)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty((indices.numel() if save else 0, columns), dtype=acc)


def _stored_transposed(weight):
    return weight.stride(2) != 1 and weight.stride(1) == 1


@kernels.register_fake("fused_experts_bwd")
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


def _experts_backward(ops, ctx, dy, _):
    *tensors, saved = ctx.saved_tensors
    x, w1, w_up, w2, weights, indices, bias1, bias_up, bias2 = tensors
    need = ctx.needs_input_grad
    need_weights = any(need[i] for i in (1, 2, 3, 6, 7, 8))
    grads = ops.fused_experts_bwd(dy, *tensors, *ctx.options, saved, need[0], need_weights)
    dx, dw1, dw_up, dw2, dweights, dbias1, dbias_up, dbias2 = grads
    found = [dx, dw1, dw_up, dw2, dweights, None, dbias1, dbias_up, dbias2]
    return *(grad.to(t.dtype) if wanted else None for grad, t, wanted in zip(found, tensors, need)), *(None,) * 5


kernels.register_autograd(OP, _experts_backward, _experts_setup)
