"""What nvcc makes of every CUDA kernel, run: its PTX for sm_80 in the PTX interpreter, against the float64 reference.

The emulator runs g++'s compilation of the same sources, without their inline PTX. Here the compiled kernels run, with the instructions
that are written by hand, and races, uninitialised shared memory and accesses out of bounds or misaligned are found in them.
"""
import re

import numpy as np
import pytest
import terrazzo
import torch
from terrazzo import cases_moe
from terrazzo.cases import Case

from test_ops import DTYPES, assert_matches
from tools import nvcc
from tools.emulated_ptx import entries_of, running_ptx
from tools.ptx_cases import BY_NAME, FURTHER, MODEL_LIKE, RUNS, run, shapes_of_launches
from tools.ptx_interpreter import PTXError, Traffic

@pytest.mark.parametrize("case, dtype", RUNS, ids=str)
def test_compiled(emulator, case, dtype):
    dtype = DTYPES[dtype]
    with running_ptx(emulator) as launched:
        kwargs, found = run(case, dtype)
    assert launched
    assert_matches(case, dtype, kwargs, found, gradients=bool(case.grads))


@pytest.mark.parametrize("name", FURTHER)
def test_compiled_further(emulator, name):
    with running_ptx(emulator) as launched:
        FURTHER[name]()
    assert launched


def test_every_entry_is_launched(emulator):
    """A new kernel, or a new instantiation, needs a case above. The fibers run them here: the launches are the same."""
    missing = {entry for source in nvcc.SOURCES for entry in entries_of(source)} - set(shapes_of_launches(emulator))
    assert not sorted(f"{entry.source} {entry.name}" for entry in missing)


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
    with pytest.raises(PTXError, match=rf"grouped_gemm_kernel.*{message}.*\(ptx.cuh:\d+\)"), running_ptx(emulator):
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
    kwargs = BY_NAME["rmsnorm_gated-one_row"].make(torch.float32)
    with pytest.raises(PTXError, match=r"rmsnorm_gated_fwd_kernel.*global memory out of bounds.*\(common.cuh:\d+\)"), running_ptx(emulator):
        terrazzo.rmsnorm_gated(**kwargs, backend="cuda")


# ---- what accesses cost

LANES = np.arange(32)


@pytest.mark.parametrize(
    "addresses, nbytes, steps, conflicts",
    [
        (4 * LANES, 4, 1, 0),
        (0 * LANES, 4, 1, 0),                                # one word for all
        (128 * LANES, 4, 32, 31),                            # all in one bank
        (8 * LANES, 4, 2, 1),
        (2 * LANES, 2, 1, 0),
        (8 * LANES, 8, 2, 0),                                # half a warp at a time
        (16 * LANES, 16, 4, 0),
        (80 * LANES, 16, 4, 0),                              # the rows of a tile: pitches of 80 bytes, and of 64
        (64 * LANES, 16, 16, 12),
    ],
)  # fmt: skip
def test_bank_conflicts(addresses, nbytes, steps, conflicts):
    traffic = Traffic()
    traffic.note("shared", LANES, addresses.astype(np.uint64), nbytes)
    assert (traffic.steps, traffic.conflicts) == (steps, conflicts)


@pytest.mark.parametrize(
    "addresses, nbytes, filled",
    [
        (4 * LANES, 4, 1.0), (16 * LANES, 16, 1.0), (8 * LANES, 4, 0.5), (128 * LANES, 4, 1 / 8), (128 * LANES, 16, 0.5), (4 * LANES + 16, 4, 0.8),
        (4 * (LANES // 2), 4, 1.0), (0 * LANES, 4, None),
    ],
)  # fmt: skip
def test_sectors(addresses, nbytes, filled):
    traffic = Traffic()
    traffic.note("global", np.concatenate([LANES, LANES + 32]), np.concatenate([addresses, addresses]).astype(np.uint64) + np.uint64(1 << 40), nbytes)
    assert traffic.filled == (None if filled is None else pytest.approx(filled))


def test_products_meet_no_banks(emulator):
    """Copies into the ring and ldmatrix out of it are free of conflicts: what is left are the results, on their way out through shared memory."""
    traffic = {}
    with running_ptx(emulator, traffic):
        run(Case("grouped_mm", "long", cases_moe.grouped(sizes=(128,), K=1024, N=256)), torch.bfloat16)
    assert traffic["grouped_gemm_kernel"].conflict_share < 0.1


WHOLE_SECTORS = {
    "causal_conv1d_fn-channel_last": "causal_conv1d_fwd_channel_last_kernel causal_conv1d_bwd_channel_last_kernel",
    "causal_conv1d_fn-channel_first": "causal_conv1d_fwd_channel_first_kernel",
    "causal_conv1d_varlen_states-aligned": "causal_conv1d_varlen_states_kernel",
    "selective_state_update-fp32_state": "state_update_kernel",
    "selective_state_update-bf16_state": "state_update_kernel",
    "rmsnorm_gated-wide": "rmsnorm_gated_fwd_kernel",
    "moe_unpermute-rows": "moe_unpermute_fwd_kernel moe_unpermute_bwd_kernel",
    "patch_reduce-rows": "patch_reduce_fwd_kernel patch_reduce_bwd_kernel",
}


@pytest.mark.parametrize("name", WHOLE_SECTORS)
def test_sectors_are_wanted_whole(emulator, name):
    """Kernels that bandwidth limits: nothing is fetched for a part of it, bar edges and weights."""
    traffic, (case,) = {}, [case for case in MODEL_LIKE if str(case) == name]
    with running_ptx(emulator, traffic):
        run(case, torch.bfloat16)
    assert {kernel: round(traffic[kernel].filled, 2) for kernel in WHOLE_SECTORS[name].split() if traffic[kernel].filled < 0.9} == {}
