"""Loads the compiled extension, if it was built, and says why not otherwise."""
import importlib

try:
    _C = importlib.import_module("terrazzo._C")
    why_not = None
except ImportError as error:
    _C = None
    why_not = f"the compiled extension terrazzo._C is not available ({error}); reinstall with a C++ compiler"

available = _C is not None


def isa():
    """The CPU build in use: "portable", "avx2" or "avx512"; None without the extension."""
    return _C.isa() if available else None


def kernel_counts():
    return _C.kernel_counts() if available else {}


def reset_kernel_counts():
    if available:
        _C.reset_kernel_counts()


def poison_new_tensors(poison):
    """Whether native outputs are filled with NaN before a kernel writes them: for tests."""
    if available:
        _C.poison_new_tensors(poison)
