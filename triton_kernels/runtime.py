"""What the launchers need to know of the device, without importing triton before the first launch."""
import functools
import importlib
import importlib.util
import os
import threading
from contextlib import contextmanager

import torch

# Shared memory that one block may use, in KiB.
SHARED_KIB = {"sm80": 163, "sm86": 99, "sm89": 99, "sm90": 227, "sm100": 227, "sm103": 227, "sm120": 99, "gfx942": 64, "gfx950": 160}
_MISSING = None if importlib.util.find_spec("triton") else "triton is not installed: pip install 'terrazzo[triton]'"
_pretended = None  # the architecture that `pretend` stands for


class _Tracing(threading.local):
    active = False  # whether launches go into the graph that this thread traces


_tracing = _Tracing()


def interpreting():
    """Whether Triton interprets kernels on CPU tensors (TRITON_INTERPRET, read when the kernels are first loaded)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@contextmanager
def pretend(arch):
    """Launchers accept CPU tensors and choose as on `arch`: for tools that compile kernels, or run them, without a GPU."""
    global _pretended
    before, _pretended = _pretended, arch
    try:
        yield
    finally:
        _pretended = before


@contextmanager
def tracing():
    """Launchers of this thread leave their launches in the graph that torch traces, and measure nothing."""
    _tracing.active = True
    try:
        yield
    finally:
        _tracing.active = False


def is_tracing():
    return _tracing.active


def is_capturing():
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def visible(kernel):
    """A kernel for launching: itself, or under `tracing` what stands in a graph for it."""
    return torch.library.wrap_triton(kernel) if _tracing.active else kernel


def why_not(*tensors):
    """None when Triton can launch on these tensors' device (None entries are skipped), else the reason."""
    if _MISSING:
        return _MISSING
    on_cpu = _pretended is not None or interpreting()
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cuda" and not (on_cpu and tensor.device.type == "cpu"):
            return f"the tensors are on {tensor.device}; Triton needs a GPU (or TRITON_INTERPRET=1, for tests)"
    return None


@functools.cache
def load(family):
    """The module of one family's launchers. Under the interpreter its faults are corrected first."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 changes its default
    if interpreting():
        importlib.import_module(".interpreter", __package__).correct()
    return importlib.import_module(f".{family}", __package__)


@functools.cache
def _device_arch(index):
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm{properties.major}{properties.minor}"


@functools.cache
def _processors(index):
    return torch.cuda.get_device_properties(index).multi_processor_count


def arch(device):
    """The device's architecture, "sm80", "sm90", "gfx942", …; under the interpreter "sm80"."""
    if _pretended is not None:
        return _pretended
    return _device_arch(device.index or 0) if device.type == "cuda" else "sm80"


def num_processors(device):
    """How many blocks run at once at least: the streaming multiprocessors; 4 where there is no GPU."""
    return _processors(device.index or 0) if device.type == "cuda" else 4


def dot_precision(device, *dtypes):
    """tl.dot's input_precision: float32 keeps its digits unless torch was told that TF32 will do."""
    if torch.float32 not in dtypes:
        return "ieee"
    if arch(device).startswith("gfx"):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
