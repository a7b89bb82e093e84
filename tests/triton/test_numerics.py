"""Every Triton op x dtype x case, forward and backward, by the tests' one tolerance rule: in Triton's interpreter, or on a GPU."""
import pytest
import terrazzo
import torch
from terrazzo import cases
from terrazzo.triton_kernels import library, runtime

from test_ops import DTYPES, assert_matches, served_by

DEVICE = "cpu" if runtime.interpreting() else "cuda"
OPS = {entry.name for entry in terrazzo.dispatch.OPS.values() if "triton" in entry.limits}
CASES = [case for case in cases.CASES if served_by(case) in OPS]
dtypes = pytest.mark.parametrize("dtype", [DTYPES[d] for d in ("fp32", "bf16", "fp16")], ids=("fp32", "bf16", "fp16"))
every_case = pytest.mark.parametrize("case", CASES, ids=str)
training_cases = pytest.mark.parametrize("case", [c for c in CASES if c.grads], ids=str)


def run(case, kwargs, gradients=False):
    """What the triton backend made; the counters show that it was nothing else."""
    terrazzo.reset_counters()
    found = cases.run(case, kwargs, "triton", gradients, device=DEVICE)
    ran = served_by(case)
    expected = {ran, f"{ran}_bwd"} if gradients else {ran}
    assert {op: set(backends) for op, backends in terrazzo.counters().items()} == {op: {"triton"} for op in expected}
    return found


@every_case
@dtypes
def test_forward(case, dtype):
    kwargs = case.make(dtype)
    assert_matches(case, dtype, kwargs, run(case, kwargs))


@training_cases
@dtypes
def test_backward(case, dtype):
    kwargs = case.make(dtype)
    assert_matches(case, dtype, kwargs, run(case, kwargs, gradients=True), gradients=True)


@every_case
def test_any_strides(case):
    """No argument has unit stride anywhere, and what lies between its elements is not finite."""
    kwargs = cases.spread(case, case.make(torch.float32))
    gradients = bool(case.grads)
    assert_matches(case, torch.float32, kwargs, run(case, kwargs, gradients), gradients)


@every_case
def test_caller_tensors_unchanged(case):
    kwargs = {k: cases.clone(v, DEVICE) for k, v in case.make(torch.float32).items()}
    before = {k: cases.clone(v, DEVICE) for k, v in kwargs.items()}
    with torch.no_grad():
        getattr(terrazzo, case.op)(**kwargs, backend="triton")
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and name not in case.updated:
            assert torch.equal(value, before[name]), name


FIRST = {c.op: c for c in reversed(CASES)}


@pytest.mark.parametrize("op", FIRST)
def test_float64_is_refused(op):
    case = FIRST[op]
    kwargs = {k: cases.clone(v, DEVICE) for k, v in case.make(torch.float64).items()}
    if not any(isinstance(v, torch.Tensor) and v.dtype == torch.float64 for v in kwargs.values()):
        pytest.skip(f"{op} takes integers only")
    with pytest.raises(terrazzo.BackendError, match="triton.*float64"):
        getattr(terrazzo, op)(**kwargs, backend="triton")


@pytest.mark.parametrize("op", FIRST)
def test_traces_whole(op):
    """torch.compile(fullgraph=True): the op stands in the graph, by shape functions alone."""
    case = FIRST[op]
    kwargs = case.make(torch.float32)
    eager = cases.run(case, kwargs, "triton", gradients=bool(case.grads), device=DEVICE)
    compiled = torch.compile(getattr(terrazzo, op), fullgraph=True, backend="aot_eager")
    found = cases.run(case, kwargs, "triton", gradients=bool(case.grads), function=compiled, device=DEVICE)
    if "lengths" in found:  # a graph keeps every column: how many are used depends on the data
        width = eager["lengths"].shape[1]
        assert not found["lengths"][:, width:].any()
        found["lengths"] = found["lengths"][:, :width]
    for name, value in eager.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_every_schema_is_the_native_one():
    for family, schemas in library.SCHEMAS.items():
        for schema in schemas:
            name = schema.partition("(")[0]
            assert str(getattr(torch.ops.terrazzo_triton, name).default._schema).replace("terrazzo_triton::", "terrazzo::") == str(
                getattr(torch.ops.terrazzo, name).default._schema), family


@pytest.mark.parametrize("op", [op for op, case in FIRST.items() if case.grads])
def test_expanded_gradient(op):
    """sum().backward() hands the kernel a stride-0 gradient."""
    case = FIRST[op]
    kwargs = {k: cases.clone(v, DEVICE) for k, v in case.make(torch.float32).items()}
    grads = []
    for backend in ("triton", "reference"):
        leaf = kwargs[case.grads[0]].detach().requires_grad_()
        result = getattr(terrazzo, op)(**(kwargs | {case.grads[0]: leaf}), backend=backend)
        (result[0] if isinstance(result, tuple) else result).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=2e-4, atol=2e-4)