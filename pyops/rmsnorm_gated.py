"""RMS norm with a SiLU gate, as it stands behind the Mamba-2 scan. Source: mamba_ssm's RMSNormGated."""
import torch

from . import checks, dispatch, kernels
from .reference import rmsnorm_gated as reference

OP = "rmsnorm_gated"
dispatch.register(OP, "rmsnorm_gated", ("rmsnorm_gated_fwd", "rmsnorm_gated_bwd"), cpu=dispatch.cpu_dtypes, gpu=dispatch.gpu_dtypes)


def rmsnorm_gated(x, weight, z=None, eps=1e-6, group_size=None, norm_before_gate=True, *, backend=None):
    """RMS norm over groups of the last dimension, multiplied by silu(z) after it or before it.

    Args:
        x: (..., D) float32, bfloat16, float16 or float64. weight: (D,). z: like x, or None.
        eps: added to the mean of squares. group_size: divides D; None = D.
        norm_before_gate: True: rms(x) * weight * silu(z); False: rms(x * silu(z)) * weight.

    Returns:
        (..., D) in x's dtype, computed in float32 (float64 for float64). Differentiable in x, weight and z.

    Equivalent to: ``F.rms_norm(x, (D,), weight, eps) * F.silu(z)`` with norm_before_gate and one group.
    """
    if not isinstance(x, torch.Tensor) or x.dim() < 1:
        checks.check_tensor(OP, "x", x, 2, "(..., D)")
    width = x.shape[-1]
    checks.check_tensor(OP, "x", x, x.dim(), "(..., D)")
    checks.check_positive(OP, D=width)
    checks.check_tensor(OP, "weight", weight, 1, "(D,)", x)
    checks.check_shape(OP, "weight", weight, (width,), "(D,)")
    checks.check_optional(OP, "z", z, tuple(x.shape), "like x", x)
    checks.check_number(OP, "eps", eps, 0)
    checks.check_flags(OP, norm_before_gate=norm_before_gate)
    group_size = width if group_size is None else group_size
    checks.check_count(OP, "group_size", group_size, 1)
    if width % group_size:
        checks.fail(OP, f"group_size must divide D = {width}, got {group_size}")
    chosen, _ = dispatch.pick(OP, x, weight, z, backend=backend)
    if chosen != "reference":
        rows = None if z is None else z.reshape(-1, width)
        return kernels.ops(chosen).rmsnorm_gated_fwd(x.reshape(-1, width), weight, rows, eps, group_size, norm_before_gate).view(x.shape)
    dispatch.count(OP, chosen)
    return reference.rmsnorm_gated(x, weight, z, eps, group_size, norm_before_gate)


@kernels.register_fake("rmsnorm_gated_fwd")
def _(x, weight, z, eps, group_size, norm_before_gate):
    return x.new_empty(x.shape)


@kernels.register_fake("rmsnorm_gated_bwd")
def _(dy, x, weight, z, eps, group_size, norm_before_gate):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(0) if z is None else z.new_empty(z.shape)


def _setup_context(ctx, inputs, output):
    x, weight, z, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, z)


def _backward(ops, ctx, dy):
    x, weight, z = ctx.saved_tensors
    dx, dweight, dz = ops.rmsnorm_gated_bwd(dy, x, weight, z, *ctx.rest)
    return dx, dweight, None if z is None else dz, None, None, None


kernels.register_autograd(OP, _backward, _setup_context)
