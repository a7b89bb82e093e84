"""Cases of the gated RMS norm as Bamba uses it: the gate first, then the norm over the whole width."""
from types import SimpleNamespace

import torch

import terrazzo

from .cases import DTYPES, NO_TRANSFORMERS, Case, Unavailable, generator, standard_providers
from .roofline import Work

EPS = 1e-5
SIZES = {"bamba-9b": (8192, (512, 2048)), "tiny": (64, (1, 9))}  # preset -> (width, rows)


def _inputs(rows, D, dtype, with_grad):
    def make(seed):
        g = generator(seed)
        inputs = {
            "x": torch.randn(1, rows, D, generator=g).to(dtype),
            "weight": torch.randn(D, generator=g).to(dtype),
            "z": torch.randn(1, rows, D, generator=g).to(dtype),
        }
        if with_grad:
            inputs["grad"] = torch.randn(1, rows, D, generator=g).to(dtype)
        return inputs

    return make


def _ours(backend):
    return lambda x, weight, z: terrazzo.rmsnorm_gated(x, weight, z, eps=EPS, norm_before_gate=False, backend=backend)


def _theirs():
    try:
        from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
    except ImportError as error:
        raise Unavailable(NO_TRANSFORMERS) from error

    def run(x, weight, z):
        norm = SimpleNamespace(weight=weight, variance_epsilon=EPS, group_size=x.shape[-1])
        return BambaRMSNormGated.forward(norm, x, z)

    return run


def work(rows, D, itemsize, mode="fwd"):
    """The forward reads x and z and writes y; the backward reads x, z and dy and writes dx and dz."""
    passes = 3 if mode == "fwd" else 8
    return Work(flops=passes * 5 * rows * D, bytes=passes * rows * D * itemsize)


def cases(preset):
    D, lengths = SIZES[preset]
    found = []
    for name, dtype in DTYPES.items():
        providers = standard_providers(_ours, _theirs)
        for rows in lengths:
            for mode in ("fwd", "bwd"):
                found.append(Case("rmsnorm_gated", f"{rows}x{D}", mode, name, work(rows, D, dtype.itemsize, mode), _inputs(rows, D, dtype, mode == "bwd"), providers,
                                  lambda: _ours("reference"), differentiable=("x", "weight", "z"), arguments={"eps": EPS, "norm_before_gate": False}))
    return found
