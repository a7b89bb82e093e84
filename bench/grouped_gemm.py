"""Cases of the grouped product: DBRX's and Mixtral's experts, rows balanced over the groups, and linear layers of one group."""
import torch
import torch.nn.functional as F

import terrazzo

from .cases import DTYPES, Case, Provider, Unavailable, compiled, generator, own_providers
from .roofline import Work

# preset -> (groups, [(K, N)], rows of each group)
SIZES = {"dbrx": (4, ((1024, 1792), (2048, 2048)), (4, 64, 256)), "mixtral": (8, ((1024, 3584),), (64, 256)), "tiny": (3, ((16, 24),), (5,))}
LAYOUTS = ("NT", "NN")  # b as a view of (E, N, K), as most models store it, or (E, K, N) as it is


def _inputs(E, rows, K, N, dtype, layout, with_grad):
    def make(seed):
        g = generator(seed)
        b = torch.randn(E, N, K, generator=g).to(dtype).mT if layout == "NT" else torch.randn(E, K, N, generator=g).to(dtype)
        inputs = {"a": torch.randn(E * rows, K, generator=g).to(dtype), "b": b, "offs": torch.arange(1, E + 1, dtype=torch.int32) * rows}
        return inputs | ({"grad": torch.randn(E * rows, N, generator=g).to(dtype)} if with_grad else {})

    return make


def _ours(backend):
    return lambda a, b, offs: terrazzo.grouped_mm(a, b, offs, backend=backend)


def _torch():
    return lambda a, b, offs: F.grouped_mm(a, b, offs=offs)


def _bf16_alone():
    raise Unavailable("torch compiles its grouped_mm in bf16 alone")


def work(E, T, K, N, itemsize, mode="fwd"):
    """T rows over E groups; the backward is two more products of the same size."""
    passes = 1 if mode == "fwd" else 3
    return Work(flops=passes * 2 * T * K * N, bytes=passes * itemsize * (T * (K + N) + E * K * N), traffic="read")


def cases(preset):
    E, shapes, all_rows = SIZES[preset]
    found = []
    for name, dtype in DTYPES.items():
        providers = (*own_providers(_ours), Provider("torch", _torch), Provider("torch-compiled", compiled(_torch) if name == "bf16" else _bf16_alone))
        for K, N in shapes:
            for rows in all_rows:
                for layout in LAYOUTS:
                    for mode in ("fwd", "bwd"):
                        found.append(Case("grouped_mm", f"{E}x{rows}x{K}x{N} {layout}", mode, name, work(E, E * rows, K, N, dtype.itemsize, mode),
                                          _inputs(E, rows, K, N, dtype, layout, mode == "bwd"),
                                          providers, lambda: _ours("reference"), differentiable=("a", "b")))
    return found
