"""Cases of the Mamba-2 decoding step, called as Hugging Face does: per-head values expanded with stride 0."""
import torch

import terrazzo

from .cases import DTYPES, Case, generator, mamba2_parameters, standard_providers, transformers_function
from .roofline import Work

# preset -> (heads, head dim, [(batch, state size)])
SIZES = {
    "bamba-9b": (128, 64, ((1, 128), (1, 256), (8, 128), (8, 256))),
    "tiny": (4, 16, ((1, 16), (3, 32))),
}


def _inputs(batch, H, P, N, dtype):
    def make(seed):
        g = generator(seed)
        params = torch.float64 if dtype == torch.float64 else torch.float32
        A, dt_bias = (values.to(params) for values in mamba2_parameters(H, g))
        return {
            "state": torch.randn(batch, H, P, N, generator=g).to(dtype),
            "x": torch.randn(batch, H, P, generator=g).to(dtype),
            "dt": torch.randn(batch, H, 1, generator=g).to(dtype).expand(-1, -1, P),
            "A": A[:, None, None].expand(-1, P, N),
            "B": torch.randn(batch, 1, N, generator=g).to(dtype),
            "C": torch.randn(batch, 1, N, generator=g).to(dtype),
            "D": torch.randn(H, 1, generator=g).to(params).expand(-1, P),
            "dt_bias": dt_bias[:, None].expand(-1, P),
        }

    return make


def _ours(backend):
    return lambda **inputs: terrazzo.selective_state_update(**inputs, dt_softplus=True, backend=backend)


def _theirs():
    update = transformers_function("mamba2_selective_state_update")

    def run(state, x, dt, A, B, C, D, dt_bias):
        return update(state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True)

    return run


def work(batch, H, P, N, itemsize):
    """The state in and out."""
    return Work(flops=6 * batch * H * P * N, bytes=2 * batch * H * P * N * itemsize, traffic="scale")


def cases(preset):
    H, P, sizes = SIZES[preset]
    found = []
    for name, dtype in DTYPES.items():
        for batch, N in sizes:
            providers = standard_providers(_ours, _theirs)
            found.append(Case("selective_state_update", f"{batch}x{H}x{P} N{N}", "decode", name, work(batch, H, P, N, dtype.itemsize), _inputs(batch, H, P, N, dtype),
                              providers, lambda: _ours("reference"), mutated=("state",), arguments={"dt_softplus": True}))
    return found
