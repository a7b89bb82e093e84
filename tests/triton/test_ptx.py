"""What the compiler makes of every Triton op, run: its PTX for sm_80 in the PTX interpreter, against the float64 reference.

Slower than Triton's interpreter, and another thing: it runs the compiled kernels, with their layouts, shared memory,
pipelines and tensor-core instructions, and finds races and accesses out of bounds. So one small case of each op, and of
what takes a path of its own through a kernel: scores of wide heads in float32, summed in parts.
"""
import pytest
import terrazzo
import torch
from terrazzo import cases

from test_ops import DTYPES, assert_matches, served_by
from tools.ptx_interpreter import running_ptx

OPS = {entry.name for entry in terrazzo.dispatch.OPS.values() if "triton" in entry.limits}
ENOUGH = 200  # elements: smaller cases are corner cases
IN_PARTS = [(case, "fp32") for case in cases.CASES if case.name in ("patches_wide_heads", "bytes_wide_heads", "wide_heads")]


def tensors(case):
    return [v for v in case.make(torch.float32).values() if isinstance(v, torch.Tensor)]


def chosen():
    """(case, dtype): of each op the case that uses most of its tensors, among those the smallest that is no corner case."""
    by_op = {}
    for case in cases.CASES:
        if served_by(case) in OPS:
            by_op.setdefault(served_by(case), []).append(case)
    for found in by_op.values():
        given = {case: tensors(case) for case in found}
        elements = {case: sum(t.numel() for t in given[case]) for case in found}
        case = min(found, key=lambda c: (elements[c] < ENOUGH, -len(given[c]), elements[c]))
        floating = any(t.is_floating_point() for t in given[case])
        yield from ((case, dtype) for dtype in (("fp32", "bf16", "fp16") if floating else ("fp32",)))


@pytest.mark.parametrize("case, dtype", [*chosen(), *IN_PARTS], ids=str)
def test_compiled(case, dtype):
    dtype = DTYPES[dtype]
    kwargs = case.make(dtype)
    kernels = []
    terrazzo.reset_counters()
    with running_ptx(kernels.append):
        found = cases.run(case, kwargs, "triton", gradients=bool(case.grads))
    ran = served_by(case)
    assert kernels and {op: set(backends) for op, backends in terrazzo.counters().items()} == {
        op: {"triton"} for op in ((ran, f"{ran}_bwd") if case.grads else (ran,))}
    assert_matches(case, dtype, kwargs, found, gradients=bool(case.grads))
