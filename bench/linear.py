"""Cases of the linear layer: one token (decoding) to a prompt."""
import torch
import torch.nn.functional as F

import terrazzo

from .cases import DTYPES, Case, generator, own_providers, peers
from .roofline import Work

# preset -> ([(K, N)], rows)
SIZES = {"dbrx": (((1024, 1792), (2048, 2048)), (1, 8, 64, 256)), "blenderbot-400m": (((1280, 1280), (1280, 5120), (5120, 1280)), (1, 10, 128)), "tiny": (((16, 24),), (1, 5))}


def _inputs(M, K, N, dtype, with_grad):
    def make(seed):
        g = generator(seed)
        inputs = {"x": torch.randn(M, K, generator=g).to(dtype), "weight": torch.randn(N, K, generator=g).to(dtype)}
        return inputs | ({"grad": torch.randn(M, N, generator=g).to(dtype)} if with_grad else {})

    return make


def _ours(backend):
    return lambda x, weight: terrazzo.linear(x, weight, backend=backend)


def work(M, K, N, itemsize, mode="fwd"):
    """The backward is two more products of the same size."""
    passes = 1 if mode == "fwd" else 3
    return Work(flops=passes * 2 * M * K * N, bytes=passes * itemsize * (M * (K + N) + K * N), traffic="read")


def cases(preset):
    shapes, all_rows = SIZES[preset]
    providers = (*own_providers(_ours), *peers("torch", lambda: F.linear))
    found = []
    for name, dtype in DTYPES.items():
        for K, N in shapes:
            for M in all_rows:
                for mode in ("fwd", "bwd"):
                    found.append(Case("linear", f"{M}x{K}x{N}", mode, name,
                                      work(M, K, N, dtype.itemsize, mode), _inputs(M, K, N, dtype, mode == "bwd"), providers,
                                      lambda: _ours("reference"), differentiable=("x", "weight")))
    return found
