"""Every op with CUDA kernels x dtype x case, forward and backward, emulated, by the tests' one tolerance rule."""
import pytest
import terrazzo
import torch
from terrazzo import cases

from test_ops import DTYPES, assert_matches
from tools.emulated_cases import CASES

dtypes = pytest.mark.parametrize("dtype", [DTYPES[d] for d in ("fp32", "bf16", "fp16")], ids=("fp32", "bf16", "fp16"))
# One order a run: test_same_bits_in_every_order shows that the others give the same.
FORWARD_ORDER = {torch.float32: "reversed", torch.bfloat16: "forward", torch.float16: "random"}
BACKWARD_ORDER = {torch.float32: "forward", torch.bfloat16: "reversed", torch.float16: "random"}
every_case = pytest.mark.parametrize("case", CASES, ids=str)
training_cases = pytest.mark.parametrize("case", [c for c in CASES if c.grads], ids=str)


def run(emulator, case, kwargs, gradients=False):
    """What the emulated kernels made; their launches show that it was nothing else."""
    before = emulator.launches
    found = cases.run(case, kwargs, "cuda", gradients)
    if any(value.any() for value in found.values()):  # without positions gradients are zeros, which need no kernel
        assert emulator.launches > before
    return found


@every_case
@dtypes
def test_forward(emulator, case, dtype):
    emulator.order(FORWARD_ORDER[dtype])
    kwargs = case.make(dtype)
    assert_matches(case, dtype, kwargs, run(emulator, case, kwargs))


@training_cases
@dtypes
def test_backward(emulator, case, dtype):
    emulator.order(BACKWARD_ORDER[dtype])
    kwargs = case.make(dtype)
    assert_matches(case, dtype, kwargs, run(emulator, case, kwargs, gradients=True), gradients=True)


@training_cases
def test_same_bits_in_every_order(emulator, case):
    """Deterministic: no result depends on which thread came first."""
    kwargs = case.make(torch.bfloat16)
    results = []
    for order in ("forward", "reversed", "random"):
        emulator.order(order, seed=7)
        results.append(run(emulator, case, kwargs, gradients=True))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@every_case
def test_any_strides(emulator, case):
    """No argument has unit stride anywhere, and what lies between its elements is not finite."""
    kwargs = cases.spread(case, case.make(torch.float32))
    gradients = bool(case.grads)
    assert_matches(case, torch.float32, kwargs, run(emulator, case, kwargs, gradients), gradients)


@every_case
def test_caller_tensors_unchanged(emulator, case):
    kwargs = case.make(torch.float32)
    before = {k: cases.clone(v) for k, v in kwargs.items()}
    with torch.no_grad():
        getattr(terrazzo, case.op)(**kwargs, backend="cuda")
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and name not in case.updated:
            assert torch.equal(value, before[name]), name
