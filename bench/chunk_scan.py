"""Cases of the Mamba-2 scan: forward and backward.

The limit counts what no algorithm avoids: each token and head updates a state of P x N and reads it once,
2NP multiply-adds, so 4NP flops forward and 14NP with the backward that recomputes the states.
"""
import torch

import terrazzo

from .cases import DTYPES, Case, generator, mamba2_parameters, standard_providers, transformers_function
from .roofline import Work

CHUNK = 256  # what Bamba's config says; a hint for ours, the work itself for Hugging Face's function
# preset -> (heads, head dim, [(length, state size)])
SIZES = {
    "bamba-9b": (128, 64, ((512, 128), (2048, 128), (512, 256), (2048, 256))),
    "tiny": (4, 16, ((40, 16), (9, 32))),
}
CHECKED_HEADS = 4  # the oracle walks the sequence step by step: a few heads say as much as all of them


def _inputs(L, H, P, N, dtype, with_grad):
    def make(seed):
        g = generator(seed)
        rows = torch.randn(1, L, H * P + 2 * N, generator=g).to(dtype)  # x, B and C are slices of the convolution's output
        x, B, C = rows.split([H * P, N, N], dim=-1)
        A, dt_bias = mamba2_parameters(H, g)
        inputs = {
            "x": x.view(1, L, H, P),
            "dt": torch.randn(1, L, H, generator=g).to(dtype),
            "A": A,
            "B": B.view(1, L, 1, N),
            "C": C.view(1, L, 1, N),
            "D": torch.randn(H, generator=g),
            "dt_bias": dt_bias,
        }
        if dtype == torch.float64:
            inputs = {k: v.double() for k, v in inputs.items()}
        if with_grad:
            inputs["grad"] = torch.randn(1, L, H, P, generator=g).to(dtype)
        return inputs

    return make


_DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "dt_bias")
_HEAD_AXIS = {"x": 2, "dt": 2, "A": 0, "D": 0, "dt_bias": 0, "grad": 2}  # B and C are shared by all heads


def _silence_other_heads(inputs):
    """A gradient that reaches only the heads the oracle walks, so that dB and dC can be checked whole."""
    if "grad" not in inputs:
        return inputs
    grad = inputs["grad"].clone()
    grad[:, :, CHECKED_HEADS:] = 0
    return inputs | {"grad": grad}


def _narrow(inputs, outputs=None):
    """The first heads of the inputs, or of the outputs (y[, gradients])."""

    def cut(name, value):
        axis = _HEAD_AXIS.get(name)
        return value if axis is None else value.narrow(axis, 0, min(CHECKED_HEADS, value.shape[axis]))

    if outputs is None:
        return {name: cut(name, value) for name, value in inputs.items()}
    return tuple(cut(name, value) for name, value in zip(("x", *_DIFFERENTIABLE), outputs))


def _ours(backend):
    def run(x, dt, A, B, C, D, dt_bias):
        return terrazzo.mamba_chunk_scan_combined(x, dt, A, B, C, CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True, backend=backend)

    return run


def _theirs():
    scan = transformers_function("mamba2_chunk_scan")

    def run(x, dt, A, B, C, D, dt_bias):
        y = scan(x, dt, A, B, C, chunk_size=CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True)
        return y.to(x.dtype)  # it returns float32 whatever it was given

    return run


def work(L, H, P, N, itemsize, mode="fwd"):
    """x, B and C in, y out; with the backward also x and dy in, dx out, and B and C likewise."""
    return Work(flops=(4 if mode == "fwd" else 14) * N * P * L * H, bytes=L * (H * P + N) * (2 if mode == "fwd" else 5) * itemsize)


def cases(preset):
    H, P, sizes = SIZES[preset]
    found = []
    for name, dtype in DTYPES.items():
        for L, N in sizes:
            why = None if L <= 64 else f"the reference is a loop over {L} steps; compiling it unrolled takes longer than any run"
            providers = standard_providers(_ours, _theirs, why)
            for mode in ("fwd", "bwd"):
                make = _inputs(L, H, P, N, dtype, mode == "bwd")
                found.append(Case("mamba_chunk_scan_combined", f"1x{L}x{H}x{P} N{N}", mode, name,
                                  work(L, H, P, N, dtype.itemsize, mode), make, providers,
                                  lambda: _ours("reference"), differentiable=_DIFFERENTIABLE, prepare=_silence_other_heads, narrow=_narrow,
                                  arguments={"chunk_size": CHUNK, "dt_softplus": True}))
    return found
