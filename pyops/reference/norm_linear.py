"""Linear layers of one input with a norm before and a gate or a sum behind, plain torch, on any device."""
import torch

from .linear import ACTIVATIONS, acc_dtype
from .rmsnorm_gated import rmsnorm_gated


def norm_linear(x, weights, norm_weight, eps, activation, gated, residual):
    """x (T, K), weights [(N, K), ...], norm_weight (K,), residual (T, columns) -> (T, columns)."""
    acc = acc_dtype(x.dtype)
    n = x if norm_weight is None else rmsnorm_gated(x, norm_weight, None, eps, x.shape[1], True)
    products = [n.to(acc) @ weight.to(acc).T for weight in weights]
    act = ACTIVATIONS[activation]
    y = act(products[0]) * products[1] if gated else act(torch.cat(products, 1))
    return (y if residual is None else y + residual.to(acc)).to(x.dtype)
