"""A dense linear layer with an activation, for dtypes in which torch has no fast product on this machine."""
import torch

from . import activations, checks, dispatch, kernels
from .reference import linear as reference

OP = "linear"
dispatch.register(OP, "linear", ("linear_fwd", "linear_bwd"), cpu=dispatch.cpu_dtypes, gpu=dispatch.gpu_dtypes)


def linear(x, weight, bias=None, activation=None, *, backend=None):
    """y = activation(x @ weight.T + bias).

    Args:
        x: (..., K) float32, bfloat16, float16 or float64, any strides.
        weight: (N, K), any strides and any of these dtypes; float64 goes with float64.
        bias: (N,) or None.
        activation: None, "silu", "gelu", "gelu_tanh", "relu", "relu2", or transformers' name of one of these.
        backend: "cpu", "reference", ... or None to choose.

    Returns:
        (..., N) in x's dtype, accumulated in float32 (float64 for float64). Differentiable in x, weight and bias.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to: ``act(F.linear(x, weight, bias))``, rounded once.
    """
    if not isinstance(x, torch.Tensor) or x.dim() < 1:
        checks.check_tensor(OP, "x", x, 2, "(..., K)")
    checks.check_tensor(OP, "x", x, x.dim(), "(..., K)")
    checks.check_tensor(OP, "weight", weight, 2, "(N, K)", x)
    N, K = weight.shape
    checks.check_positive(OP, N=N, K=K)
    checks.check_shape(OP, "x", x, (*[None] * (x.dim() - 1), K), "(..., K)")
    checks.check_float64(OP, x=x, weight=weight)
    checks.check_optional(OP, "bias", bias, (N,), "(N,)", x)
    activation = activations.resolve(OP, activation, gates=False)
    chosen, _ = dispatch.pick(OP, x, weight, bias, backend=backend)
    return linear_by(chosen, x, weight, bias, activation)


def linear_by(chosen, x, weight, bias=None, activation=None):
    """linear() by a backend that has been picked, of arguments that are a layer's own: what is left of a call when nothing is checked twice."""
    if chosen == "reference":
        dispatch.count(OP, chosen)
        return reference.linear(x, weight, bias, activation)
    inside = None if dispatch.needs_grad(x, weight, bias) else activation  # a gradient needs the value before it
    N, K = weight.shape
    y = kernels.ops(chosen).linear_fwd(x.reshape(x.numel() // K, K), weight, bias, activations.IDS[inside]).view(*x.shape[:-1], N)
    return y if inside == activation else reference.ACTIVATIONS[activation](y)


@kernels.register_fake("linear_fwd")
def _(x, weight, bias, activation):
    return x.new_empty(x.shape[0], weight.shape[0])


@kernels.register_fake("linear_bwd")
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


def _backward(ops, ctx, dy):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias, _ = ctx.needs_input_grad
    dx, dweight, dbias = ops.linear_bwd(dy, x, weight, need_x, need_weight, need_bias)
    return dx if need_x else None, dweight if need_weight else None, dbias.to(ctx.bias_dtype) if need_bias else None, None


kernels.register_autograd(OP, _backward, _setup_context)
