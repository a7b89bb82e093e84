"""mamba_ssm.ops.triton.layernorm_gated: gated RMS norm on terrazzo.rmsnorm_gated, gated layer norm in plain torch."""
import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.rmsnorm_gated import rmsnorm_gated


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """RMS norm over groups of `group_size`; z gates before or after it."""
    if bias is None:
        return rmsnorm_gated(x, weight, z, eps, group_size, norm_before_gate)
    acc = torch.promote_types(x.dtype, torch.float32)
    gate_last = norm_before_gate and z is not None
    y = rmsnorm_gated(x, weight, None if gate_last else z, eps, group_size, norm_before_gate).to(acc) + bias.to(acc)
    return (y * F.silu(z.to(acc)) if gate_last else y).to(x.dtype)


def layernorm_fn(
    x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True, is_rms_norm=False
):
    """Layer norm (or RMS norm) over groups of `group_size`; z gates before or after it. Computes in float32."""
    if is_rms_norm:
        return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)
    acc = torch.promote_types(x.dtype, torch.float32)
    y = x.to(acc)
    if z is not None and not norm_before_gate:
        y = y * F.silu(z.to(acc))
    groups = y.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = F.layer_norm(groups, groups.shape[-1:], eps=eps).flatten(-2) * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    if z is not None and norm_before_gate:
        y = y * F.silu(z.to(acc))
    return y.to(x.dtype)


class RMSNorm(nn.Module):
    """rmsnorm_fn with a weight of its own."""

    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x, z=None):
        return rmsnorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


class LayerNorm(nn.Module):
    """layernorm_fn with a weight and a bias of its own."""

    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x, z=None):
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


__all__ = ["LayerNorm", "RMSNorm", "layernorm_fn", "rmsnorm_fn"]
