"""Which backend serves a call: one function decides, every backend says whether it can and why not.

Order: the `backend=` argument, `with use_backend(...)`, TERRAZZO_BACKEND_<OP>, TERRAZZO_BACKEND, then the
preference of the tensors' device. A forced backend that cannot run raises BackendError; the automatic choice
falls back to the reference and logs the reason once.
"""
import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Callable

import torch

from . import native
from .triton_kernels import library, runtime

BACKENDS = ("cpu", "cuda", "triton", "reference")
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # then the reference
# The dict behind os.environ, where there is one: a variable that isn't set costs 40 ns there, 1 µs in os.environ.
_ENVIRONMENT = getattr(os.environ, "_data", os.environ)
logger = logging.getLogger("terrazzo")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run this call."""


@dataclass(frozen=True)
class Op:
    """One public op: its family (the file that holds it), its native kernels, and what each backend refuses."""

    name: str
    family: str
    kernels: tuple[str, ...]  # names in terrazzo._C.kernel_counts(), forward first; () when counted in Python
    ops: tuple[str, ...]  # what serves it in torch.ops.terrazzo, forward first
    limits: dict[str, Callable] = field(default_factory=dict)  # backend -> (*tensors) -> None | reason
    env: tuple[tuple[str, bytes | str], ...] = ()  # variables that may force a backend, and their keys in _ENVIRONMENT


OPS: dict[str, Op] = {}
_forced: dict[str, str] = {}  # op or family name, or "" for all -> backend, set by use_backend
_logged: set[tuple[str, ...]] = set()
_python_counts: dict[str, dict[str, int]] = {}


def _environment_key(variable):
    return variable if _ENVIRONMENT is os.environ else os.environ.encodekey(variable)


def register(name, family, kernels, *, op=None, gpu=None, **limits):
    """Declares an op; `limits` maps a backend that serves it to (*tensors) -> None | reason, `gpu` stands for cuda and triton.

    `op` is its name in torch.ops.terrazzo where that isn't the first kernel's.
    """
    op = op or kernels[0]
    ops = (op, f"{op.removesuffix('_fwd')}_bwd")[: max(len(kernels), 1)]
    if gpu is not None:
        limits = {"cuda": gpu, "triton": gpu} | limits
    variables = dict.fromkeys((f"TERRAZZO_BACKEND_{name.upper()}", f"TERRAZZO_BACKEND_{family.upper()}", "TERRAZZO_BACKEND"))
    OPS[name] = Op(name, family, kernels, ops, limits, tuple((v, _environment_key(v)) for v in variables))
    return OPS[name]


def _op(name):
    if name not in OPS:
        raise ValueError(f"terrazzo: unknown op {name!r}; ops are {', '.join(sorted(OPS))}")
    return OPS[name]


def _check_backend(backend, where, op="use_backend"):
    if backend not in BACKENDS:
        raise ValueError(f"terrazzo.{op}: {where} must be one of {', '.join(BACKENDS)}, got {backend!r}")


def can_run(op, backend, *tensors):
    """None when `backend` can serve `op` on these tensors (None entries are skipped), else the reason it cannot."""
    entry = _op(op)
    if backend == "reference":
        return None
    limit = entry.limits.get(backend)
    if limit is None:
        return f"{op} has no {backend} backend yet"
    if backend == "cpu" and not native.available:
        return native.why_not
    if backend == "cuda" and (why := native.cuda_why_not(op, entry.ops, *tensors)):
        return why
    if backend == "triton" and (why := runtime.why_not(*tensors)):
        return why
    for tensor in tensors if backend == "cpu" else ():
        if tensor is not None and not tensor.is_cpu:
            return f"the tensors are on {tensor.device}, not on the cpu"
    return limit(*tensors)


def _wanted(entry, backend):
    """(backend, who asked) or (None, "")."""
    if backend is not None:
        _check_backend(backend, "backend", entry.name)
        return backend, "backend argument"
    if _forced:
        for key in (entry.name, entry.family, ""):
            if key in _forced:
                return _forced[key], "use_backend"
    for variable, key in entry.env:
        value = _ENVIRONMENT.get(key)
        if value:
            value = os.fsdecode(value)
            _check_backend(value, variable, entry.name)
            return value, variable
    return None, ""


def cpu_may_serve(entry, backend):
    """True where the cpu kernel of an Op may be tried straight away: asked for by name, or nobody asks for anything.

    For decoding steps, which cost microseconds: the kernel then refuses what it cannot run, and `pick` says why.
    """
    if not native.available:
        return False
    if backend is not None:
        return backend == "cpu"
    for _, key in entry.env:  # no any(): a generator costs more than the look-ups
        if _ENVIRONMENT.get(key):
            return False
    return not _forced


def pick(op, *tensors, backend=None):
    """(backend, reason) for one call of `op` on `tensors`; raises BackendError when a forced backend cannot run."""
    entry = _op(op)
    wanted, who = _wanted(entry, backend)
    if wanted is not None:
        why = can_run(op, wanted, *tensors)
        if why is not None:
            raise BackendError(f"terrazzo.{op}: backend {wanted!r} (asked for by the {who}) cannot run: {why}")
        return wanted, f"asked for by the {who}"
    refusals = []
    device = "cpu" if tensors[0].is_cpu else tensors[0].device.type
    for candidate in PREFERENCE.get(device, ()):
        why = can_run(op, candidate, *tensors)
        if why is None:
            return candidate, f"preferred on {device}"
        refusals.append(f"{candidate}: {why}")
    reason = "; ".join(refusals) or f"no kernels for {device} tensors"
    warn_once("terrazzo.%s runs on the reference backend (correct, slower): %s", op, reason)
    return "reference", reason


def warn_once(message, *args):
    """Logs it, unless these words were logged before in this process or the call is being compiled."""
    if not torch.compiler.is_compiling() and (message, *args) not in _logged:
        _logged.add((message, *args))
        logger.warning(message, *args)


@contextmanager
def unlogged():
    """Choices made inside the `with` block are not logged, and are still news to the log behind it."""
    global _logged
    level, logged = logger.level, set(_logged)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        _logged = logged


@contextmanager
def use_backend(backend, op=None):
    """Forces `backend` for every op, or for one op or op family, inside the `with` block (process-wide)."""
    _check_backend(backend, "backend")
    known = set(OPS) | {entry.family for entry in OPS.values()}
    if op is not None and op not in known:
        raise ValueError(f"terrazzo.use_backend: unknown op {op!r}; ops and families are {', '.join(sorted(known))}")
    key = op or ""
    before = _forced.get(key)
    _forced[key] = backend
    try:
        yield
    finally:
        if before is None:
            del _forced[key]
        else:
            _forced[key] = before


def count(op, backend):
    """Counts one eager call where no native kernel counts itself."""
    if not torch.compiler.is_compiling():
        per_op = _python_counts.setdefault(op, {})
        per_op[backend] = per_op.get(backend, 0) + 1


def counters():
    """{op: {backend: calls}} since import or reset_counters(): what really ran. Backward kernels count as "<op>_bwd"."""
    result = {op: dict(counts) for op, counts in _python_counts.items()}
    for backend, counts in (("cpu", native.kernel_counts()), ("cuda", native.cuda_kernel_counts()), ("triton", library.counts)):
        counts = {name.removesuffix("_fwd"): n for name, n in counts.items() if n}
        for entry in OPS.values():
            for suffix, kernel in zip(("", "_bwd"), entry.kernels):
                n = counts.get(kernel.removesuffix("_fwd")) or counts.get(entry.name + suffix)  # a kernel of the op's own name counts too
                if n:
                    result.setdefault(entry.name + suffix, {})[backend] = n
    return result


def reset_counters():
    """Sets every counter to zero."""
    _python_counts.clear()
    library.counts.clear()
    native.reset_kernel_counts()


CPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def cpu_dtypes(*tensors):
    """The cpu kernels' own limit: None, or why these dtypes are refused."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in CPU_DTYPES:
            return f"dtype {tensor.dtype} is not supported"
    return None


GPU_DTYPES = CPU_DTYPES - {torch.float64}


def gpu_dtypes(*tensors):
    """The limit of the CUDA and Triton kernels: None, or why these dtypes are refused."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in GPU_DTYPES:
            return f"dtype {str(tensor.dtype).removeprefix('torch.')} is not supported by the GPU kernels; the reference takes it"
    return None


def needs_grad(*tensors):
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False
