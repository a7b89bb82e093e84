"""A dense linear layer with an activation, for dtypes in which torch has no fast product on this machine."""
import torch

from . import activations, checks, dispatch
from .reference import linear as reference

OP = "linear"
dispatch.register(OP, "linear", ())


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
    dispatch.count(OP, chosen)
    return reference.linear(x, weight, bias, activation)
