"""The torch ops behind the public functions: one set of schemas under torch.ops.terrazzo (compiled, for the CPU and CUDA) and .terrazzo_triton.

Shapes and gradients are registered here for all: the gradient of a backend's op is an op of the same backend.
"""
import functools

import torch

from . import native
from .triton_kernels import library

NAMESPACES = {"cpu": "terrazzo", "cuda": "terrazzo", "triton": library.NAMESPACE}
_fakes, _gradients = {}, {}  # name -> what was registered


def ops(backend):
    """The namespace of a backend's ops: ops("triton").rmsnorm_gated_fwd."""
    return getattr(torch.ops, NAMESPACES[backend])


def _backends(name):
    """The backends whose namespaces have an op; "cpu" stands for torch.ops.terrazzo."""
    found = ["cpu"] if native.available and hasattr(torch.ops.terrazzo, name) else []
    return found + ["triton"] if name in library.NAMES else found


def register_fake(name):
    """Registers the shape function of an op, in every backend that has it."""

    def register(fake):
        _fakes[name] = _on_one_device(name, fake)
        for backend in _backends(name):
            torch.library.register_fake(f"{ops(backend).name}::{name}", _fakes[name])
        return fake

    return register


def _on_one_device(name, fake):
    """torch calls a shape function as soon as one argument is on meta, whatever holds the others; it would answer with a tensor that nobody wrote."""

    @functools.wraps(fake)
    def checked(*args):
        devices = {arg.device.type for arg in args if isinstance(arg, torch.Tensor)}
        if "meta" in devices and len(devices) > 1:
            raise ValueError(f"terrazzo.{name}: all tensors must be on one device, got {', '.join(sorted(devices))}")
        return fake(*args)

    return checked


def register_autograd(name, backward, setup_context):
    """Registers backward(ops, ctx, *grads) as the gradient of <name>_fwd; <name>_bwd itself refuses to be differentiated."""
    _gradients[name] = backward, setup_context
    for backend in _backends(f"{name}_fwd"):
        _register_gradient(name, ops(backend))


def _register_gradient(name, namespace):
    backward, setup_context = _gradients[name]
    torch.library.register_autograd(f"{namespace.name}::{name}_fwd", functools.partial(backward, namespace), setup_context=setup_context)
    torch.library.register_autograd(f"{namespace.name}::{name}_bwd", functools.partial(_no_double_backward, name))


def register_namespace(namespace, names):
    """Shapes and gradients for further ops of the same schemas, torch.ops.<namespace>.<names>."""
    for name in names:
        torch.library.register_fake(f"{namespace}::{name}", _fakes[name])
        op = name.removesuffix("_fwd")
        if op != name and op in _gradients:
            _register_gradient(op, getattr(torch.ops, namespace))


def _no_double_backward(name, ctx, *grads):
    raise NotImplementedError(f"terrazzo.{name}: only backend='reference' has second derivatives")
