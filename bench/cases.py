"""What is measured: a case (one op on one size, dtype and mode), and the providers that can serve it.

A case makes its inputs from a seed. A provider is a function of those inputs by name. For "bwd" the harness
itself differentiates: forward and backward are timed together.
"""
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .roofline import Work

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
MODES = ("fwd", "bwd", "decode", "model")
PRESETS = ("bamba-9b", "dbrx", "mixtral", "blt", "blenderbot-400m", "tiny")
ALIASES = {"blt-1b": "blt"}


class Unavailable(Exception):
    """Why a provider cannot serve a case; becomes a row that says so."""


@dataclass(frozen=True)
class Provider:
    """`build()` returns fn(**inputs); it may raise Unavailable. `ours` are held to the tests' own tolerance."""

    name: str
    build: Callable
    ours: bool = False


@dataclass(frozen=True)
class Case:
    op: str                    # public function
    size: str                  # readable, unique within op, dtype and mode
    mode: str
    dtype: str
    work: Work
    inputs: Callable           # seed -> {argument: tensor or value}
    providers: tuple[Provider, ...]
    reference: Callable                          # builds the oracle: fn(**inputs) in any dtype
    mutated: tuple[str, ...] = ()                # inputs updated in place: part of the result
    differentiable: tuple[str, ...] = ()         # inputs whose gradients "bwd" computes
    prepare: Callable | None = None              # inputs -> inputs of the accuracy check
    narrow: Callable | None = None               # (inputs, outputs or None) -> the part that the oracle checks
    nmse_limit: float | None = None              # whole models: compared with Hugging Face's by this alone
    family: str = ""                             # its name in suite.OPS
    preset: str = ""

    @property
    def key(self):
        return f"{self.op} {self.size} {self.dtype} {self.mode}"


def trains(preset, length, lengths):
    """Whether a case of this length is also differentiated: the listed ones of the suite's presets, all of a user's shapes."""
    return length in lengths or preset not in PRESETS


def tensors_of(result):
    """The tensors of an op's result, flat."""
    if isinstance(result, torch.Tensor):
        return (result,)
    return tuple(t for item in result if item is not None for t in tensors_of(item))


def clone_inputs(inputs, dtype=None):
    """Fresh copies with the same strides; floating tensors converted when a dtype is given."""

    def copy(value):
        if not isinstance(value, torch.Tensor):
            return value
        if dtype is not None and value.is_floating_point():
            return value.to(dtype)
        if 0 in value.stride() and value.numel():  # expanded: a clone would make it dense
            base = value.as_strided([1 if s == 0 else n for n, s in zip(value.shape, value.stride())], value.stride())
            return base.clone().expand(value.shape)
        return value.clone(memory_format=torch.preserve_format)

    return {name: copy(value) for name, value in inputs.items()}


def runner(case, fn, inputs):
    """A function without arguments that runs one call on `inputs` and returns its result tensors."""
    if case.mode != "bwd":

        def run():
            with torch.no_grad():
                result = fn(**inputs)
            return (*tensors_of(result), *(inputs[name] for name in case.mutated))

        return run

    leaves = [inputs[name].detach().requires_grad_() for name in case.differentiable]
    call = {k: v for k, v in inputs.items() if k != "grad"} | dict(zip(case.differentiable, leaves))

    def run_with_gradients():
        out = tensors_of(fn(**call))[0]
        return (out.detach(), *torch.autograd.grad(out, leaves, inputs["grad"]))

    return run_with_gradients


def transformers_function(name):
    """Hugging Face's own torch function from the Bamba model file, without its hub wrapper."""
    try:
        from transformers.models.bamba import modeling_bamba
    except ImportError as error:
        raise Unavailable("transformers is not installed: pip install terrazzo[hf]") from error
    return inspect.unwrap(getattr(modeling_bamba, name))


def compiled(build):
    """The same provider under torch.compile, one graph for each shape."""

    def build_compiled():
        fn = build()
        torch._dynamo.reset()  # every case compiles afresh: no other case's graphs count against the limit
        return torch.compile(fn, dynamic=False)

    return build_compiled


def standard_providers(ours, reference, peer, compile_reference=None):
    """terrazzo's cpu backend, the reference eager and compiled, Hugging Face eager and compiled.

    `ours(backend)` and `reference()` and `peer()` build callables; `compile_reference` is a reason not to compile.
    """

    def no_compile():
        raise Unavailable(compile_reference)

    return (
        Provider("terrazzo", lambda: ours("cpu"), ours=True),
        Provider("reference", reference),
        Provider("reference-compiled", no_compile if compile_reference else compiled(reference)),
        Provider("hf", peer),
        Provider("hf-compiled", compiled(peer)),
    )


def mamba2_parameters(heads, generator=None):
    """(A, dt_bias) as Mamba-2 initialises them: A in -16..-1, steps between 0.001 and 0.1 before the data's part.

    Larger steps let most of the decay matrix underflow, and CPUs crawl through subnormal numbers: Hugging Face's
    own initial values would make its functions look slower than they are on trained weights.
    """
    A = -torch.empty(heads).uniform_(1.0, 16.0, generator=generator)
    dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
    return A, dt + torch.log(-torch.expm1(-dt))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def select(cases, *, modes=None, dtypes=None, match=None):
    """The cases of these modes and dtypes whose key contains every word of `match`."""
    words = (match or "").split()
    return [c for c in cases if (not modes or c.mode in modes) and (not dtypes or c.dtype in dtypes) and all(w in c.key for w in words)]
