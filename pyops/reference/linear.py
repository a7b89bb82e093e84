"""A linear layer and the activations, plain torch."""
import torch
import torch.nn.functional as F

ACTIVATIONS = {
    None: lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def acc_dtype(dtype):
    """What products of this dtype are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear(x, weight, bias, activation):
    """x (..., K), weight (N, K), bias (N,) or None -> (..., N)."""
    acc = acc_dtype(x.dtype)
    y = x.to(acc) @ weight.to(acc).T
    if bias is not None:
        y = y + bias.to(acc)
    return ACTIVATIONS[activation](y).to(x.dtype)
