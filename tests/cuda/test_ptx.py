"""What nvcc makes of every CUDA kernel, run: its PTX for sm_80 in the PTX interpreter, against the float64 reference.

The emulator runs g++'s compilation of the same sources, without their inline PTX. Here the compiled kernels run, with the instructions
that are written by hand, and races, uninitialised shared memory and accesses out of bounds or misaligned are found in them. Instantiations
for fp16 differ from those for bf16 in names of instructions alone: where kernels multiply matrices they run too.
"""
import re

import pytest
import test_emulated_contents as contents
import torch
from terrazzo import cases

from test_ops import DTYPES, assert_matches
from tools import nvcc
from tools.emulated_cases import CASES
from tools.emulated_ptx import entries_of, noting, running_ptx
from tools.ptx_interpreter import PTXError

# Small cases that reach every instantiation, each for what it reaches beyond those before it.
CHOSEN = {
}
BY_NAME = {str(case): case for case in CASES}
RUNS = [(BY_NAME[f"{op}-{name}"], dtype) for op, chosen in CHOSEN.items() for name, dtypes in chosen.items() for dtype in dtypes.split()]
# What no case calls: (test of the emulator, its arguments)
FURTHER = {
    "sparse_gradient": (contents.test_sparse_gradient_is_the_dense_one, {"shape": {}}),
    "patcher_fp32": (contents.test_blocks_of_entropies_are_cut_as_the_whole, {"order": "forward", "rule": {"threshold": 0.9}, "dtype": torch.float32}),
    "patcher_bf16": (contents.test_blocks_of_entropies_are_cut_as_the_whole, {"order": "forward", "rule": {"threshold": 0.9}, "dtype": torch.bfloat16}),
}


def run(case, dtype):
    kwargs = case.make(dtype)
    return kwargs, cases.run(case, kwargs, "cuda", gradients=bool(case.grads))


@pytest.mark.parametrize("case, dtype", RUNS, ids=str)
def test_compiled(emulator, case, dtype):
    dtype = DTYPES[dtype]
    with running_ptx(emulator) as launched:
        kwargs, found = run(case, dtype)
    assert launched
    assert_matches(case, dtype, kwargs, found, gradients=bool(case.grads))


@pytest.mark.parametrize("name", FURTHER)
def test_compiled_further(emulator, name):
    test, arguments = FURTHER[name]
    with running_ptx(emulator) as launched:
        test(emulator, **arguments)
    assert launched


def test_every_entry_is_launched(emulator):
    """A new kernel, or a new instantiation, needs a case above. The fibers run them here: the launches are the same."""
    with noting(emulator) as launched:
        for case, dtype in RUNS:
            run(case, DTYPES[dtype])
        for test, arguments in FURTHER.values():
            test(emulator, **arguments)
    missing = {entry for source in nvcc.SOURCES for entry in entries_of(source)} - set(launched)
    assert not missing


# ---- that faults in compiled kernels are seen

def altered(monkeypatch, pattern, replacement):
    """From now on the PTX of every file is another."""
    compile = nvcc.ptx
    monkeypatch.setattr(nvcc, "ptx", lambda source: re.sub(pattern, replacement, compile(source)))


FAULTS = {
    "no barrier": (r"bar\.sync\s+0;", "", "race in shared memory"),
    "waits for too few copies": (r"cp\.async\.wait_group \d;", "cp.async.wait_group 7;", "cp.async not yet waited for"),
    "copies never committed": (r"cp\.async\.commit_group;", "", "cp.async not yet waited for"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_product_is_caught(emulator, monkeypatch, fault):
    pattern, replacement, message = FAULTS[fault]
    altered(monkeypatch, pattern, replacement)
    with running_ptx(emulator), pytest.raises(PTXError, match=rf"grouped_gemm_kernel.*{message}.*gemm.cuh"):
        run(BY_NAME["grouped_mm-long_sums"], torch.bfloat16)


WRONG = {
    "operand not transposed": (r"\.x4\.trans", ".x4"),
    "rounded towards zero": (r"cvt\.rna\.tf32\.f32", "mov.b32"),
    "another register": (r"(mma\.sync\S* \{[^}]*\}, \{)(%r\d+), (%r\d+)", r"\1\3, \2"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_instruction_is_seen(emulator, monkeypatch, fault):
    altered(monkeypatch, *WRONG[fault])
    case, dtype = BY_NAME["grouped_mm-long_sums"], torch.float32 if "rounded" in fault else torch.bfloat16
    with running_ptx(emulator):
        kwargs, found = run(case, dtype)
    with pytest.raises(AssertionError):
        assert_matches(case, dtype, kwargs, found, gradients=True)


def test_memory_of_nobody_is_out_of_bounds(emulator):
    """Tensors from before are not a launch's to touch, whatever pointer it has."""
    case = BY_NAME["rmsnorm_gated-one_row"]
    kwargs = case.make(torch.float32)
    with running_ptx(emulator), pytest.raises(PTXError, match="rmsnorm_gated_fwd_kernel.*global memory out of bounds.*rmsnorm_gated.cu|common.cuh"):
        cases.run(case, kwargs, "cuda")
