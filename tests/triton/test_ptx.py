"""What the compiler makes of every Triton op, run: its PTX for sm_80 in the PTX interpreter, against the float64 reference.

Slower than Triton's interpreter, and another thing: it runs the compiled kernels, with their layouts, shared memory,
pipelines and tensor-core instructions, and finds races and accesses out of bounds. So two small cases of each op.
"""
import pytest
import terrazzo
import torch
from terrazzo import cases

from test_ops import DTYPES, assert_matches, served_by
from tools.ptx_interpreter import running_ptx

OPS = {entry.name for entry in terrazzo.dispatch.OPS.values() if "triton" in entry.limits}
ENOUGH = 200  # elements: smaller cases are corner cases


def chosen():
    """Of each public function: its smallest case that is no corner case, and the smallest that uses most of its tensors."""
    found = []
    for op in dict.fromkeys(case.op for case in cases.CASES if served_by(case) in OPS):
        sizes = {}
        for case in (c for c in cases.CASES if c.op == op and served_by(c) in OPS):
            tensors = [v for v in case.make(torch.float32).values() if isinstance(v, torch.Tensor)]
            sizes[case] = sum(t.numel() for t in tensors), len(tensors)
        usual = {case: size for case, size in sizes.items() if size[0] >= ENOUGH} or sizes
        found += dict.fromkeys((min(usual, key=lambda c: usual[c][0]), min(usual, key=lambda c: (-usual[c][1], usual[c][0]))))
    return found


@pytest.mark.parametrize("dtype", [DTYPES[d] for d in ("fp32", "bf16", "fp16")], ids=("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("case", chosen(), ids=str)
def test_compiled(case, dtype):
    kwargs = case.make(dtype)
    kernels = []
    terrazzo.reset_counters()
    with running_ptx(kernels.append):
        found = cases.run(case, kwargs, "triton", gradients=bool(case.grads))
    ran = served_by(case)
    assert kernels and {op: set(backends) for op, backends in terrazzo.counters().items()} == {
        op: {"triton"} for op in ((ran, f"{ran}_bwd") if case.grads else (ran,))}
    assert_matches(case, dtype, kwargs, found, gradients=bool(case.grads))
