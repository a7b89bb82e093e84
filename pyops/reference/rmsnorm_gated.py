"""Gated RMS norm, plain torch. Source: mamba_ssm's RMSNormGated."""
import torch
import torch.nn.functional as F


def rmsnorm_gated(x, weight, z, eps, group_size, norm_before_gate):
    """x, z (..., D), weight (D,) -> (..., D); the mean of squares is taken over groups of group_size."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(acc)
    gate = None if z is None else F.silu(z.to(acc))
    if gate is not None and not norm_before_gate:
        y = y * gate
    groups = y.unflatten(-1, (-1, group_size))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(acc)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)
