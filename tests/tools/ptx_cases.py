"""The cases whose compiled kernels are run (tests/cuda/test_ptx.py) and whose launches and accesses are counted (cuda_report.py)."""
import functools

import torch
from terrazzo import cases, cases_bytes, cases_moe
from terrazzo.cases import Case, cases_patches

from test_ops import DTYPES

from .emulated_cases import CASES, check_blocks_of_entropies, check_sparse_gradient
from .emulated_ptx import noting, running_ptx

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
    "fused_experts": "gpt_oss interleaved sentinels odd_sizes separate_bias no_gate dbrx large_tiles large_tiles_gpt_oss",
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


_shapes = {}


def shapes_of_launches(emulator):
    """{Entry: {(threads of a block, bytes of dynamic shared memory), …}} of all cases above. Once a process."""
    if not _shapes:
        with noting(emulator) as launched:
            for case, dtype in RUNS:
                run(case, DTYPES[dtype])
            for check in FURTHER.values():
                check()
        _shapes.update(launched)
    return _shapes


# ---- rows and tiles as models have them, only fewer: what their accesses cost is counted

MODEL_LIKE = [
    Case("causal_conv1d_fn", "channel_last", cases.conv(B=1, D=256, L=128), cases.CONV_GRADS),
    Case("causal_conv1d_fn", "channel_first", cases.conv(B=1, D=8, L=512, channel_last=False), cases.CONV_GRADS),
    Case("causal_conv1d_update", "channel_first_state", cases.conv_update(B=2, D=256), updated=("conv_state",)),
    Case("causal_conv1d_update", "channel_last_state", cases.conv_update(B=2, D=512, state_len=3, channel_last=True), updated=("conv_state",)),
    Case("causal_conv1d_varlen_states", "aligned", cases.varlen_states(D=256)),
    Case("mamba_chunk_scan_combined", "mamba", cases.scan(B=1, L=128, H=2, P=64, G=1, N=128, z=True), cases.SCAN_GRADS),
    Case("selective_state_update", "fp32_state", cases.state_update(B=1, H=2, P=64, G=1, N=128), updated=("state",)),
    Case("selective_state_update", "bf16_state", cases.state_update(B=1, H=2, P=64, G=1, N=128, state_dtype=torch.bfloat16), updated=("state",)),
    Case("rmsnorm_gated", "narrow", cases.norm(shape=(8, 512)), ("x", "weight", "z")),
    Case("rmsnorm_gated", "wide", cases.norm(shape=(4, 4096)), ("x", "weight", "z")),
    Case("grouped_mm", "many_rows", cases_moe.grouped(sizes=(130, 0, 126), K=128, N=256), ("a", "b")),
    Case("grouped_mm", "many_rows_transposed", cases_moe.grouped(sizes=(130, 0, 126), K=128, N=256, transposed=True), ("a", "b")),
    Case("grouped_mm", "few_rows", cases_moe.grouped(sizes=(3, 2, 7), K=256, N=128, transposed=True), ("a", "b")),
    Case("fused_experts", "many_rows", cases_moe.experts(T=144, D=128, F=128, E=2), cases_moe.EXPERT_GRADS),
    Case("fused_experts", "few_rows", cases_moe.experts(T=8, D=128, F=128, E=4), cases_moe.EXPERT_GRADS),
    Case("moe_route", "mixtral", cases_moe.route(T=8, E=64, top_k=4), ("router_logits",), outputs=("y", "indices")),
    Case("moe_permute", "several_tiles", cases_moe.permute(T=640, A=4, E=64), outputs=("order", "inverse", "offs")),
    Case("moe_unpermute", "rows", cases_moe.unpermute(T=8, A=4, D=512), ("rows", "weights")),
    Case("patch_reduce", "rows", cases_patches.reduce(D=512), ("h",)),
    Case("patch_cross_attention", "patches", cases_patches.cross("patches", H=2, P=64), ("q", "k", "v")),
    Case("patch_cross_attention", "bytes", cases_patches.cross("bytes", H=2, P=64), ("q", "k", "v")),
    Case("local_attention", "window", cases_patches.local(B=1, L=160, H=2, P=64, window=64), ("q", "k", "v")),
    Case("entropy_patch", "bytes", cases_bytes.patch(B=1, L=64, V=260), ("logits",), outputs=("y", "starts", "patch_ids", "lengths", "counts")),
    Case("byte_hash_embedding", "rows", cases_bytes.hashes(D=256), ("table", "byte_embedding")),
]


def traffic_of(emulator):
    """{kernel: Traffic} of these cases in bf16, by the compiled kernels."""
    traffic = {}
    with running_ptx(emulator, traffic):
        for case in MODEL_LIKE:
            run(case, torch.bfloat16)
    return traffic
