"""What nvcc makes of every CUDA kernel, run: its PTX for sm_80 in the PTX interpreter, against the float64 reference.

The emulator runs g++'s compilation of the same sources, without their inline PTX. Here the compiled kernels run, with the instructions
that are written by hand, and races, uninitialised shared memory and accesses out of bounds or misaligned are found in them.
"""
import functools
import re

import pytest
import terrazzo
import torch
from terrazzo import cases

from test_ops import DTYPES, assert_matches
from tools import nvcc
from tools.emulated_cases import CASES, check_blocks_of_entropies, check_sparse_gradient
from tools.emulated_ptx import entries_of, noting, running_ptx
from tools.ptx_interpreter import PTXError

# Small cases that together launch every entry, in every dtype.
CHOSEN = {
    "causal_conv1d_fn": "packed_states packed_states_channel_first edges edges_channel_first odd_channels_sliced odd_channels_first_sliced length_1 "
                        "length_2_channel_first states_channel_first fp32_weight",
    "causal_conv1d_varlen_fn": "odd_channels edges",
    "causal_conv1d_varlen_states": "mixed aligned",
    "causal_conv1d_update": "hf_layout channel_last_state width_2 width_3 odd_channels circular_several slots fp32_state_channel_last more_than_the_ring",
    "mamba_chunk_scan_combined": "packed_states gated_states varlen split_group several_odd_tiles dt_limit",
    "selective_state_update": "gated slots odd_sizes mamba1 not_expanded odd_not_expanded long_rows_not_expanded bf16_state_aligned "
                              "bf16_state_odd bf16_state_not_expanded bf16_state_odd_not_expanded fp16_state_aligned fp16_state_odd fp16_state_not_expanded "
                              "fp16_state_odd_not_expanded",
    "rmsnorm_gated": "groups_norm_first odd_width strided_rows a_warp 128_threads 512_threads scalar_warp wide read_again",
    "grouped_mm": "bias_transposed_rows_behind strided long_sums long_sums_transposed large_tiles large_tiles_transposed converted_weights",
    "gmm": "trans_a trans_a_aligned",
    "linear": "gelu transposed_aligned",
    "moe_route": "dbrx deepseek_v3 norm_3 more_scores_than_shared_memory",
    "moe_permute": "sentinels several_tiles two_passes",
    "moe_unpermute": "plain odd_sizes fp32_weights long_rows",
    "fused_experts": "gpt_oss interleaved sentinels odd_sizes separate_bias no_gate dbrx large_tiles large_tiles_gpt_oss sorted_by_several_blocks",
    "patch_reduce": "amax mean ties_amin_odd_width ragged_mean aligned_mean wide far_apart_amin",
    "patch_cross_attention": "patches_window_ragged_masked bytes_window_ragged_masked patches_packed bytes_two_a_patch patches_128_channels bytes_256_channels",
    "local_attention": "packed_grouped_masked strided_scale 96_of_128_channels 256_channels",
    "entropy_patch": "top valid odd_sizes masked 32_lanes_scalar several_blocks a_block_for_a_row",
    "patch_lengths_from_entropies": "max_length packed_top tiles_packed_max_length tiles_packed_top",
    "patch_lengths_from_tokens": "space_packed tiles_space",
    "patch_ids_from_lengths": "zeros tiles",
    "byte_hash_ids": "functions",
    "byte_hash_embedding": "packed functions wide aligned_mixed odd_sizes many",
}
BY_NAME = {str(case): case for case in CASES}
CASES_RUN = [BY_NAME[f"{op}-{name}"] for op, names in CHOSEN.items() for name in names.split()]
RUNS = [(case, dtype) for case in CASES_RUN for dtype in (("fp32", "bf16", "fp16") if any(
    isinstance(v, torch.Tensor) and v.is_floating_point() for v in case.make(torch.float32).values()) else ("fp32",))]
FURTHER = {"sparse_gradient": check_sparse_gradient}
FURTHER |= {f"patcher_{dtype}": functools.partial(check_blocks_of_entropies, DTYPES[dtype], threshold=0.9) for dtype in ("fp32", "bf16", "fp16")}


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
    with running_ptx(emulator) as launched:
        FURTHER[name]()
    assert launched


def test_every_entry_is_launched(emulator):
    """A new kernel, or a new instantiation, needs a case above. The fibers run them here: the launches are the same."""
    with noting(emulator) as launched:
        for case, dtype in RUNS:
            run(case, DTYPES[dtype])
        for check in FURTHER.values():
            check()
    missing = {entry for source in nvcc.SOURCES for entry in entries_of(source)} - set(launched)
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
