"""A dense linear layer on the grouped kernels: for low-precision weights on CPUs whose torch has no fast path for them."""
import torch

from . import checks, dispatch, native
from .reference import linear as reference
from .reference.moe import ACTIVATIONS

OP = "linear"
ACTIVATION_IDS = {name: index for index, name in enumerate((*ACTIVATIONS, "swiglu_oai"))}


def _cpu_limit(x, weight, *rest):
    if (x.dtype == torch.float64) != (weight.dtype == torch.float64):
        return "float64 goes with float64 only"
    return dispatch.cpu_dtypes(x, weight, *rest)


dispatch.register(OP, "linear", ("linear_fwd", "linear_bwd"), cpu=_cpu_limit)


def linear(x, weight, bias=None, activation=None, *, backend=None):
    """act(x weight^T + bias).

    Args:
        x: (..., K) float32, bfloat16, float16 or float64. weight: (N, K), any strides, its dtype may differ from x's (but
            float64 goes with float64 only). bias: (N,) or None.
        activation: None, "silu", "gelu", "gelu_tanh", "relu" or "relu2".

    Returns:
        (..., N) in x's dtype, accumulated in float32 (float64). Differentiable in x, weight and bias.

    Equivalent to: ``act(torch.nn.functional.linear(x, weight.to(x.dtype), bias))``
    """
    if not isinstance(x, torch.Tensor) or x.dim() < 1:
        checks.check_tensor(OP, "x", x, 2, "(..., K)")
    checks.check_tensor(OP, "x", x, x.dim(), "(..., K)")
    checks.check_tensor(OP, "weight", weight, 2, "(N, K)", x)
    N, K = weight.shape
    checks.check_positive(OP, N=N, K=K)
    if x.shape[-1] != K:
        checks.fail(OP, f"x must be (..., K) with K = {K} as weight has, got {tuple(x.shape)}")
    checks.check_optional(OP, "bias", bias, (N,), "(N,)", x)
    if activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        checks.fail(OP, f"activation must be one of {names}, got {activation!r}")
    chosen, _ = dispatch.pick(OP, x, weight, bias, backend=backend)
    if chosen != "cpu":
        dispatch.count(OP, chosen)
        return reference.linear(x, weight, bias, activation)
    inside = activation if not dispatch.needs_grad(x, weight, bias) else None  # the gradient needs the value before it
    y = torch.ops.terrazzo.linear_fwd(x.reshape(-1, K), weight, bias, ACTIVATION_IDS[inside]).view(*x.shape[:-1], N)
    return y if inside == activation else ACTIVATIONS[activation](y)


@native.register_fake("linear_fwd")
def _(x, weight, bias, activation):
    return x.new_empty(x.shape[0], weight.shape[0])


@native.register_fake("linear_bwd")
def _(dy, x, weight, need_x, need_weight, need_bias):
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        x.new_empty((weight.shape[0],), dtype=acc) if need_bias else x.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, activation = inputs
    if activation:
        raise NotImplementedError("terrazzo.linear: the native op has no gradient with an activation; call terrazzo.linear")
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias, _ = ctx.needs_input_grad
    dx, dweight, dbias = torch.ops.terrazzo.linear_bwd(dy, x, weight, need_x, need_weight, need_bias)
    return dx if need_x else None, dweight if need_weight else None, dbias.to(ctx.bias_dtype) if need_bias else None, None


native.register_autograd(OP, _backward, _setup_context)
