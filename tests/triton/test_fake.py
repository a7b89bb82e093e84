"""The path of GPU tensors, without a GPU: fake tensors on "cuda" go through checks, choice and shape functions, whole under torch.compile.

Run by the package in place, whose extension may have no CUDA kernels, and by the one that has them: see `make cuda`.
"""
import inspect

import pytest
import terrazzo
import torch
from terrazzo import cases, native
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from test_ops import served_by

# The namespace of the ops that serve a public function: CUDA kernels where the extension has them.
NAMESPACES = {entry.name: "terrazzo" if native.CUDA_OPS.issuperset(entry.ops) else "terrazzo_triton" for entry in terrazzo.dispatch.OPS.values()}
OPS = {entry.name for entry in terrazzo.dispatch.OPS.values() if "triton" in entry.limits}
FIRST = {c.op: c for c in reversed(cases.CASES) if served_by(c) in OPS}
ON_HOST = {"gmm": ("batch_sizes",)}  # what the op takes on the cpu
STATIC = {"max_patches": 40}  # without it the width of the lengths depends on the data, which eager calls wait for


def arguments(case):
    takes = inspect.signature(getattr(terrazzo, case.op)).parameters
    return case.make(torch.bfloat16) | {name: value for name, value in STATIC.items() if name in takes}


def on_cuda(case, mode):
    """The arguments of a case as fake tensors on a GPU."""
    kwargs = arguments(case)
    with mode:
        return {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu" if name in ON_HOST.get(case.op, ()) else "cuda")
            if isinstance(value, torch.Tensor) else value
            for name, value in kwargs.items()
        }  # fmt: skip


# Eager calls that need a real device: lengths as wide as the data say; sizes that move from the host to the device.
EAGER = [op for op in FIRST if op not in ("patch_lengths_from_entropies", "gmm")]


class Called(TorchDispatchMode):
    """Notes the package's ops that were called."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("terrazzo"):
            self.ops = [*getattr(self, "ops", ()), str(func)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", EAGER)
def test_gpu_tensors_are_served_by_gpu_kernels(op):
    """Chosen without being asked for; shapes, dtypes and devices are those of the reference. (Gradients of GPU tensors need a
    torch built for GPUs; test_numerics.py traces those on the CPU.)"""
    case = FIRST[op]
    kwargs, function = on_cuda(case, FakeTensorMode()), getattr(terrazzo, op)
    with torch.no_grad(), Called() as called:
        found = function(**kwargs)
    namespaces = {name.partition(".")[0] for name in called.ops}
    assert NAMESPACES[served_by(case)] in namespaces, called.ops
    with torch.no_grad():
        expected = function(**arguments(case), backend="reference")
    as_tuple = lambda result: result if isinstance(result, tuple) else (result,)  # noqa: E731
    for got, want in zip(as_tuple(found), as_tuple(expected), strict=True):
        assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "cuda")


@pytest.mark.parametrize("op", FIRST)
def test_gpu_tensors_trace_whole(op):
    """torch.compile(fullgraph=True) of a call on GPU tensors."""
    case = FIRST[op]
    mode = FakeTensorMode()
    kwargs = on_cuda(case, mode)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad(), mode:
        torch.compile(getattr(terrazzo, op), fullgraph=True, backend=keep)(**kwargs)
    (graph,) = graphs
    assert any(str(node.target).startswith(f"{NAMESPACES[served_by(case)]}.") for node in graph.graph.nodes)
