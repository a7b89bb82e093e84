"""Cases of the causal convolution: forward, backward, and one decoding step."""
import torch

import terrazzo

from .cases import DTYPES, Case, generator, standard_providers, transformers_function
from .roofline import Work

WIDTH = 4
# preset -> (channels, width of the projection that x is a slice of, lengths, decode batches)
SIZES = {
    "bamba-9b": (8448, 16768, (512, 2048), (1, 8, 32)),
    "tiny": (48, 120, (7, 64), (1, 3)),
}


def _forward_inputs(D, projection, L, dtype, with_grad):
    def make(seed):
        g = generator(seed)
        # Hugging Face's layout: a slice of the projection (B, L, projection), seen as (B, D, L).
        x = torch.randn(1, L, projection, generator=g).to(dtype)[..., projection - D :].transpose(1, 2)
        inputs = {
            "x": x,
            "weight": torch.randn(D, WIDTH, generator=g).mul_(0.5).to(dtype),
            "bias": torch.randn(D, generator=g).mul_(0.5).to(dtype),
        }
        if with_grad:
            inputs["grad"] = torch.randn(1, L, D, generator=g).to(dtype).transpose(1, 2)
        return inputs

    return make


def _update_inputs(D, projection, batch, dtype):
    def make(seed):
        g = generator(seed)
        return {
            "x": torch.randn(batch, 1, projection, generator=g).to(dtype)[..., projection - D :].transpose(1, 2),
            "conv_state": torch.randn(batch, D, WIDTH, generator=g).to(dtype),
            "weight": torch.randn(D, WIDTH, generator=g).mul_(0.5).to(dtype),
            "bias": torch.randn(D, generator=g).mul_(0.5).to(dtype),
        }

    return make


def _providers(name):
    op, peer = getattr(terrazzo, name), lambda: transformers_function(name)

    def ours(backend):
        return lambda x, *rest, **named: op(x, *rest, activation="silu", backend=backend, **named)

    def theirs():
        fn = peer()

        def run(x, weight, bias, conv_state=None):
            state = () if conv_state is None else (conv_state,)
            return fn(x, *state, weight, bias, activation="silu")

        return run

    return standard_providers(ours, theirs), lambda: ours("reference")


def work(D, L, itemsize, mode="fwd"):
    """The forward reads x and writes y; the backward reads x and dy and writes dx."""
    return Work(flops=2 * WIDTH * D * L * (1 if mode == "fwd" else 4), bytes=(2 if mode == "fwd" else 5) * D * L * itemsize, traffic="copy")


def update_work(batch, D, itemsize):
    """The state in and out, x and y, weight and bias."""
    return Work(flops=2 * WIDTH * D * batch, bytes=batch * D * itemsize * (2 * WIDTH + 2) + D * itemsize * (WIDTH + 1), traffic="scale")


def cases(preset):
    D, projection, lengths, batches = SIZES[preset]
    found = []
    for name, dtype in DTYPES.items():
        size = dtype.itemsize
        providers, reference = _providers("causal_conv1d_fn")
        for L in lengths:
            for mode in ("fwd", "bwd"):
                inputs = _forward_inputs(D, projection, L, dtype, mode == "bwd")
                found.append(Case("causal_conv1d_fn", f"1x{D}x{L}", mode, name, work(D, L, size, mode), inputs, providers, reference,
                                  differentiable=("x", "weight", "bias"), arguments={"activation": "silu"}))
        providers, reference = _providers("causal_conv1d_update")
        for batch in batches:
            inputs = _update_inputs(D, projection, batch, dtype)
            found.append(Case("causal_conv1d_update", f"{batch}x{D}", "decode", name,
                              update_work(batch, D, size), inputs, providers, reference, mutated=("conv_state",), arguments={"activation": "silu"}))
    return found
