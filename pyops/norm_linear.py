"""Linear layers of one input, with the norm before them and the gate or the sum behind them, in one call: for decoding."""
import torch

from . import activations, checks, dispatch, kernels
from .reference import norm_linear as reference

OP = "norm_linear"


def _cpu_limit(*tensors):
    if dispatch.needs_grad(*tensors):
        return "it has no gradient on the cpu backend; call it under torch.no_grad()"
    return dispatch.cpu_dtypes(*tensors)


_ENTRY = dispatch.register(OP, "linear", ("norm_linear",), cpu=_cpu_limit)


def norm_linear(x, weight, weight2=None, weight3=None, *, norm_weight=None, eps=1e-6, activation=None, gated=False, residual=None, backend=None):
    """y = act(n @ [weight; weight2; weight3].T) + residual, side by side, where n is x or its RMS norm.

    Made for decoding, which takes as long as weights are read: what stands between two layers costs no call of its own, and the weights
    of one input are read by all threads together.

    Args:
        x: (T, K) float32, bfloat16, float16 or float64; few rows.
        weight: (N, K), any of these dtypes and any strides; float64 goes with float64. weight2: (N2, K) or None. weight3: (N3, K) or None.
        norm_weight: (K,) or None. Given: n = rms_norm(x) * norm_weight, rounded to x's dtype; eps is added to the mean of squares.
        activation: None, "silu", "gelu", "gelu_tanh", "relu", "relu2", or transformers' name of one of these.
        gated: y = act(n @ weight.T) * (n @ weight2.T) + residual, of two weights of one shape.
        residual: (T, columns of y) or None, added last.
        backend: "cpu", "reference" or None to choose.

    Returns:
        (T, N + N2 + N3), or (T, N) when gated, in x's dtype, accumulated in float32 (float64 for float64) and rounded once. The cpu backend
        has no gradient: under grad mode with inputs that need one, the reference serves the call.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to: ``residual + act(F.linear(F.rms_norm(x, (K,), norm_weight, eps), torch.cat([weight, weight2, weight3])))``
    """
    if activation not in (None, "silu"):
        activation = activations.resolve(OP, activation, gates=False)
    if not torch.compiler.is_compiling():
        y = _fast(x, weight, weight2, weight3, norm_weight, eps, activation, gated, residual, backend)
        if y is not None:
            return y
    checks.check_flags(OP, gated=gated)
    checks.check_number(OP, "eps", eps, 0)
    weights = _check(x, weight, weight2, weight3, norm_weight, gated, residual)
    chosen, _ = dispatch.pick(OP, x, *weights, norm_weight, residual, backend=backend)
    if chosen != "reference":
        return kernels.ops(chosen).norm_linear(x, weight, weight2, weight3, norm_weight, eps, activations.IDS[activation], gated, residual)
    dispatch.count(OP, chosen)
    return reference.norm_linear(x, weights, norm_weight, eps, activation, gated, residual)


def _check(x, weight, weight2, weight3, norm_weight, gated, residual):
    checks.check_tensor(OP, "x", x, 2, "(T, K)")
    T, K = x.shape
    if weight2 is None and weight3 is not None:
        checks.fail(OP, "weight3 goes behind weight2, which is missing")
    weights = {name: w for name, w in (("weight", weight), ("weight2", weight2), ("weight3", weight3)) if w is not None or name == "weight"}
    for name, w in weights.items():
        checks.check_tensor(OP, name, w, 2, "(N, K)", x)
        checks.check_positive(OP, N=w.shape[0], K=K)
        checks.check_shape(OP, name, w, (None, K), "(N, K)")
    checks.check_float64(OP, x=x, **weights)
    if gated and (len(weights) != 2 or weight.shape != weight2.shape):
        checks.fail(OP, f"gated needs weight and weight2 of one shape and no third, got {', '.join(checks.describe(w) for w in weights.values())}")
    columns = weight.shape[0] if gated else sum(w.shape[0] for w in weights.values())
    checks.check_optional(OP, "norm_weight", norm_weight, (K,), "(K,)", x)
    checks.check_optional(OP, "residual", residual, (T, columns), "(T, columns of y)", x)
    return list(weights.values())


def _fast(x, weight, weight2, weight3, norm_weight, eps, activation, gated, residual, backend):
    """Straight to the kernel, which checks everything before it touches memory; None when it cannot serve the call or refuses it."""
    try:
        if not x.is_cpu or not dispatch.cpu_may_serve(_ENTRY, backend) or dispatch.needs_grad(x, weight, weight2, weight3, norm_weight, residual):
            return None
        if not eps >= 0 or type(gated) is not bool:
            return None
        return torch.ops.terrazzo.norm_linear.default(x, weight, weight2, weight3, norm_weight, eps, activations.IDS[activation], gated, residual)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return None


@kernels.register_fake("norm_linear")
def _(x, weight, weight2, weight3, norm_weight, eps, activation, gated, residual):
    return x.new_empty(x.shape[0], weight.shape[0] if gated else sum(w.shape[0] for w in (weight, weight2, weight3) if w is not None))
