"""Loads the compiled extension, if it was built, and says why not otherwise."""
import importlib

import torch

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


def register_fake(name):
    """Registers the shape function of torch.ops.terrazzo.<name>, when the op exists."""
    return torch.library.register_fake(f"terrazzo::{name}") if available else (lambda fn: fn)


def register_autograd(name, backward, setup_context):
    """Registers the gradient of <name>_fwd; <name>_bwd itself refuses to be differentiated."""
    if not available:
        return
    torch.library.register_autograd(f"terrazzo::{name}_fwd", backward, setup_context=setup_context)

    def no_double_backward(ctx, *grads):
        raise NotImplementedError(
            f"terrazzo.{name}: second derivatives are not supported by the cpu backend; use backend='reference'"
        )

    torch.library.register_autograd(f"terrazzo::{name}_bwd", no_double_backward)
