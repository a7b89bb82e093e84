"""A linear layer in plain torch."""
from torch.nn import functional as F

from .moe import ACTIVATIONS


def linear(x, weight, bias=None, activation=None):
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return ACTIVATIONS[activation](y)
