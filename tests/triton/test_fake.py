"""The path of GPU tensors, without a GPU: fake tensors on "cuda" go through checks, choice and shape functions, whole under torch.compile.

Run by the package in place, whose extension may have no CUDA kernels, and by the one that has them: see `make cuda`.
"""
import inspect

import pytest
import terrazzo
import torch
from terrazzo import cases, native
from terrazzo.bench import cost_model
from terrazzo.triton_kernels import library, runtime
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._library.triton import get_triton_kernels_for_op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from test_ops import served_by
from tools.triton_compile import _Driver
from tools.triton_launches import LAUNCHES

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


class GraphSeen(Exception):
    """Ends a compilation once its graph is known: nothing can run here."""


VISIBLE = [case for case in cases.CASES if f"{served_by(case)}_fwd" in library.VISIBLE or served_by(case) in library.VISIBLE]


@pytest.mark.parametrize("case", VISIBLE, ids=str)
def test_launches_stand_in_the_graph(case):
    """What torch.compile hands to inductor holds the launches of the kernels in the place of the op."""
    mode, graphs = FakeTensorMode(), []

    def keep(graph, inputs):
        graphs.append(graph)
        raise GraphSeen

    active = driver._active
    driver.set_active(_Driver("sm90"))
    try:
        kwargs = on_cuda(case, mode)
        if any(isinstance(value, torch.Tensor) and 0 in value.shape for value in kwargs.values()):
            pytest.skip("nothing is launched")
        with torch.no_grad(), mode, runtime.pretend("sm90"), pytest.raises((GraphSeen, BackendCompilerFailed)):
            torch.compile(getattr(terrazzo, case.op), fullgraph=True, backend=aot_autograd(fw_compiler=keep))(**kwargs, backend="triton")
    finally:
        driver._active = active
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert "triton_kernel_wrapper_functional" in called and not [name for name in called if "terrazzo" in name], called


def test_caches_know_the_kernels():
    """The keys of torch.compile's caches hold the kernels' sources, so that a new release is compiled anew."""
    for name in library.VISIBLE:
        kernels = {kernel.fn.__name__ for kernel in get_triton_kernels_for_op(f"{library.NAMESPACE}::{name}")}
        assert any(found.startswith(name) for found in kernels), name


@pytest.mark.parametrize("case", [case for case in {c.op: c for c in reversed(VISIBLE)}.values() if case.grads], ids=str)
def test_launches_stand_in_the_backward_graph(case):
    """As above, of CPU tensors that stand for a GPU's, as gradients of GPU tensors need a torch built for GPUs."""
    graphs = []

    def partition(joint, inputs, **rest):
        graphs.append(joint)
        raise GraphSeen

    kwargs = case.make(torch.bfloat16)
    kwargs |= {name: kwargs[name].detach().requires_grad_() for name in case.grads if isinstance(kwargs.get(name), torch.Tensor)}
    active = driver._active
    driver.set_active(_Driver("sm90"))
    try:
        with runtime.pretend("sm90"), pytest.raises((GraphSeen, BackendCompilerFailed)):
            compiled = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, partition_fn=partition)
            torch.compile(getattr(terrazzo, case.op), fullgraph=True, backend=compiled)(**kwargs, backend="triton")
    finally:
        driver._active = active
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called.count("triton_kernel_wrapper_functional") > 1 and not [name for name in called if "terrazzo" in name], called


class Recorded(TorchDispatchMode):
    """Notes the calls of the Triton ops: (name, arguments)."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == library.NAMESPACE:
            self.calls.append((func._schema.name.partition("::")[2], args))
        return func(*args, **(kwargs or {}))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("op", [op for op in LAUNCHES if "triton" in terrazzo.dispatch.OPS[op].limits])
def test_launchers_never_wait_for_the_gpu(op):
    """What a CUDA graph needs: on the way from an op's arguments to its last launch nothing is read from the GPU, and no shape depends on
    contents. Fake tensors have none: reading one is an error. (They are on the CPU: indexing them on "cuda" wants a torch built for GPUs.)"""
    for call in LAUNCHES[op]:
        calls, kernels = [], []
        with cost_model.counting([]), Recorded(calls):
            call.run(op, torch.bfloat16)
        assert calls
        with cost_model.counting(kernels), FakeTensorMode(), torch.no_grad():
            for name, args in calls:
                fake = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype) if isinstance(a, torch.Tensor) else a for a in args]
                getattr(runtime.load(library.NAMES[name]), f"{name}_triton")(*fake)
        assert kernels


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.nonzero, lambda x: x.repeat_interleave(x), lambda x: x[x > 0]])
def test_reading_a_fake_tensor_is_an_error(read):
    with FakeTensorMode(), pytest.raises(RuntimeError, match="data-dependent|dynamic|not supported|_local_scalar_dense|nonzero|repeat_interleave"):
        read(torch.empty(1, dtype=torch.int32))


@pytest.mark.parametrize("op", ["local_attention", "patch_cross_attention"])
def test_heads_over_256_are_refused(op):
    """By name, with the reason."""
    with FakeTensorMode():
        q = torch.empty(1, 6, 2, 257, device="cuda")
        rest = dict(window=3) if op == "local_attention" else dict(patch_ids=torch.empty(1, 6, dtype=torch.int32, device="cuda"))
        with pytest.raises(terrazzo.BackendError, match="'triton'.*heads of 257 channels are over the 256"):
            getattr(terrazzo, op)(q, q, q, **rest, backend="triton")
        assert terrazzo.can_run(op, "triton", torch.empty(1, 6, 2, 256, device="cuda")) is None
