"""What is measured: a case (one op on one size, dtype and mode), and the providers that can serve it.

A case makes its inputs from a seed. A provider is a function of those inputs by name. For "bwd" the harness
itself differentiates: forward and backward are timed together.
"""
import contextlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ..triton_kernels import runtime
from .roofline import Work

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
MODES = ("fwd", "bwd", "decode", "model")
PRESETS = ("bamba-9b", "dbrx", "mixtral", "blt", "blenderbot-400m", "tiny")
ALIASES = {"blt-1b": "blt"}


class Unavailable(Exception):
    """Why a provider cannot serve a case; becomes a row that says so."""


# What is raised where a package, or this device, is not there.
NO_TRANSFORMERS = "transformers is not installed: pip install terrazzo[hf]"
BACKENDS = ("cpu", "triton", "cuda")  # terrazzo's own, beside the reference


@dataclass(frozen=True)
class Provider:
    """`build()` returns fn(**inputs); it may raise Unavailable. `ours` are held to the tests' own tolerance.

    While it builds, torch's default device is the one that the inputs lie on.
    """

    name: str
    build: Callable
    ours: bool = False
    nmse_limit: float | None = None  # of what is inexact by design: quantised weights


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
    arguments: dict = field(default_factory=dict)  # what the public function takes besides the inputs: other kernels need it too
    tokens: int = 0                              # of one call, of whole models
    unit: str = "tokens"                         # or bytes
    period: int = 1                              # calls that differ in their work and make a whole: a sample of fast ones holds all of them
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


def building_on(device):
    """What surrounds `build()` and `reference()`: torch's default device is that of the inputs."""
    return contextlib.nullcontext() if device == "cpu" else torch.device(device)


def on_device(case, device):
    """The case with its inputs on another device, strides and slices as they were."""

    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
        return whole.as_strided(value.shape, value.stride(), value.storage_offset())

    if torch.device(device).type == "cpu":
        return case
    return replace(case, inputs=lambda seed: {name: move(value) for name, value in case.inputs(seed).items()})


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
        raise Unavailable(NO_TRANSFORMERS) from error
    return inspect.unwrap(getattr(modeling_bamba, name))


def compiled(build):
    """The same provider under torch.compile, one graph for each shape."""

    def build_compiled():
        fn = build()
        torch._dynamo.reset()  # every case compiles afresh: no other case's graphs count against the limit
        return torch.compile(fn, dynamic=False)

    return build_compiled


def no_backend(backend):
    """Why a backend of ours has nothing to run on, or None; what a single call needs, the call says."""
    here = torch.get_default_device().type
    if backend == "cpu":
        return None if here == "cpu" else f"the inputs are on {here}; --device cpu measures it"
    if here != "cpu":
        return None
    if backend == "triton" and runtime.interpreting():
        return "TRITON_INTERPRET runs it in Python: right, and nothing to time"
    return "no GPU" if not torch.cuda.is_available() else "the inputs are on the CPU; --device cuda measures it"


def own_providers(ours, compile_reference=None, reference=None):
    """terrazzo's backends, and the reference eager and compiled, from `ours(backend)`.

    `compile_reference` is a reason not to compile it, `reference` one not to run it at all.
    """

    def of(backend):
        def build():
            why = no_backend(backend)
            if why:
                raise Unavailable(why)
            return ours(backend)

        return build

    def eager():
        if reference:
            raise Unavailable(reference)
        return ours("reference")

    def no_compile():
        raise Unavailable(reference or compile_reference)

    return (
        *(Provider(backend, of(backend), ours=True) for backend in BACKENDS),
        Provider("reference", eager),
        Provider("reference-compiled", no_compile if reference or compile_reference else compiled(eager)),
    )


def peers(name, build):
    """Another's function, eager and compiled."""
    return Provider(name, build), Provider(f"{name}-compiled", compiled(build))


def standard_providers(ours, peer, compile_reference=None):
    """Ours, and Hugging Face's own function."""
    return *own_providers(ours, compile_reference), *peers("hf", peer)


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
