"""The cases that the CUDA kernels run emulated: the case list of the ops they serve, and shapes that only these kernels tell apart."""
import terrazzo
import torch
from terrazzo import cases, cases_bytes, cases_moe

from test_ops import served_by

from .emulator import SERVED


def unlike(experts):
    """w_up stored in another order than w_gate_up."""

    def build(r, dtype):
        kwargs = experts(r, dtype)
        return kwargs | {"w_up": kwargs["w_up"].mT.contiguous().mT}

    return build


def patching_cases():
    """Every team of lanes and vector width of the entropies; cuts of several tiles, whose patches and texts cross them; tiles of patch lengths."""
    patch, lengths, text = cases_bytes.patch, cases_bytes.lengths, cases_bytes.text
    entropies = {
        "16_lanes": patch(B=1, L=9, V=1024, threshold=6.4),
        "32_lanes_valid": patch(B=2, L=5, V=2000, threshold=7.1, valid=[5, 3]),
        "32_lanes_scalar": patch(B=1, L=5, V=301, threshold=5.2),
        "a_block_for_a_row": patch(B=2, L=3, V=4500, threshold=7.9, masked=True),
    }
    long_texts = [0, 3, 3, 2040, 2049, 2050, 4100, 4500]
    cuts = {
        "tiles_combined_next": lengths(B=2, L=4100, threshold=0.3, threshold_add=0.2, include_next=True),
        "tiles_next_alone_in_the_last": lengths(B=1, L=2048, include_next=True, max_patch_length=9),
        "tiles_max_length_without_starts": lengths(B=2, L=4500, threshold=99.0, max_patch_length=1000, valid=[4500, 2100]),
        "tiles_packed_max_length": lengths(B=1, L=4500, cu=long_texts, threshold=1.5, max_patch_length=700),
        "tiles_packed_top": lengths(B=1, L=4500, cu=long_texts, threshold=None, patch_size=4.5),
        "tiles_top_valid": lengths(B=3, L=2500, threshold=None, patch_size=3, valid=[2500, 0, 7]),
    }
    tokens = {"tiles_space": text("space", L=4500), "tiles_static": text("static", L=4500, patch_size=3000, max_patch_length=1999)}
    ids = {"tiles": cases_bytes.ids([[3, 0, 5, 1] * 150, [0] * 300 + [4, 5] * 150], 1350, exact=False)}
    for op, builders, grads, outputs in (
        ("entropy_patch", entropies, ("logits",), ("y", "starts", "patch_ids", "lengths", "counts")),
        ("patch_lengths_from_entropies", cuts, (), ("lengths",)),
        ("patch_lengths_from_tokens", tokens, (), ("lengths",)),
        ("patch_ids_from_lengths", ids, (), ("ids",)),
    ):
        yield from (cases.Case(op, name, build, grads, outputs=outputs) for name, build in builders.items())


def further_cases():
    """Shapes that only these kernels tell apart: every team size and vector width, groups longer than registers hold, loops over n and p;
    widths of heads, long ways back to the patch before, many empty patches; of the scan tiles beyond the first, rows not aligned to
    16 bytes, sequences that end where chunks do, more of them than threads."""
    yield from conv_cases()
    yield from routing_and_byte_cases()
    yield from patching_cases()
    norm, update, scan, packed = cases.norm, cases.state_update, cases.scan, cases.packed
    norms = {
        "a_warp": norm(shape=(9, 256)),
        "128_threads": norm(shape=(3, 1024), norm_before_gate=True),
        "512_threads": norm(shape=(2, 4096), group_size=4096),
        "read_again": norm(shape=(2, 8200)),
        "read_again_norm_first_no_gate": norm(shape=(3, 16408), z=False, norm_before_gate=True),
        "more_rows_than_programs": norm(shape=(1100, 16)),
        "scalar_warp": norm(shape=(5, 51), group_size=17),
    }
    updates = {
        "long_rows": update(N=272, P=3, B=2),
        "many_rows": update(N=8, P=300, B=1, H=2),
        "long_rows_not_expanded": update(N=160, P=5, expanded=False),
        "odd_not_expanded": update(N=10, P=5, expanded=False),
        "nothing_but_padding": update(indices=[-1, -1, -1], slots=2),
    }
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        updates |= {f"{name}_state_aligned": update(state_dtype=dtype, N=64), f"{name}_state_odd": update(state_dtype=dtype, N=12),
                    f"{name}_state_not_expanded": update(state_dtype=dtype, expanded=False),
                    f"{name}_state_odd_not_expanded": update(state_dtype=dtype, N=12, expanded=False)}
    grouped, gmm, linear = cases_moe.grouped, cases_moe.gmm, cases_moe.linear
    products = {
        "large_tiles": grouped(sizes=(150, 0, 141), K=72, N=136, rest=3, bias=True),
        "large_tiles_transposed": grouped(sizes=(150, 0, 141), K=72, N=136, transposed=True),
        "more_groups_than_lanes": grouped(sizes=(0, 1, 2, 0) * 10, K=16, N=8, rest=2),
        "a_band_of_tiles": grouped(sizes=(290, *(0,) * 9), K=8, N=136),
        "long_sums": grouped(sizes=(2, 3), K=528, N=72),
        "long_sums_transposed": grouped(sizes=(2, 3), K=528, N=72, transposed=True),
        "converted_weights": grouped(K=40, N=64, weight_dtype=torch.bfloat16),
        "converted_weights_transposed": grouped(K=40, N=64, weight_dtype=torch.bfloat16, transposed=True),
    }
    linears = {"large_tiles": linear(shape=(200, 64), N=136, activation="gelu"), "transposed_aligned": linear(shape=(40, 64), N=72, transposed=True)}
    experts = cases_moe.experts
    layers = {
        "large_tiles": experts(T=80, D=64, F=72, E=2),
        "large_tiles_gpt_oss": experts(T=80, D=40, F=72, E=2, layout="interleaved", activation="swiglu_oai", bias=True, limit=1.5),
        "large_tiles_separate_bias": experts(T=80, D=40, F=72, E=2, layout="separate", bias=True),
        "large_tiles_no_gate": experts(T=80, D=40, F=136, E=2, layout="no_gate", bias=True),
        "sorted_by_several_blocks": experts(T=1030, D=8, F=8, E=40),
        "sorted_in_two_passes": experts(T=9, D=8, F=8, E=1024),
        "converted_weights": experts(D=32, F=40, weight_dtype=torch.bfloat16),
        "gate_and_up_not_alike": unlike(experts(layout="separate")),
    }
    yield from (cases.Case("fused_experts", name, build, cases_moe.EXPERT_GRADS) for name, build in layers.items())
    yield from (cases.Case("grouped_mm", name, build, ("a", "b", "bias")) for name, build in products.items())
    yield cases.Case("gmm", "trans_a_aligned", gmm(sizes=(70, 0, 41), K=136, N=72, trans_a=True), ("a", "b"))
    yield from (cases.Case("linear", name, build, ("x", "weight", "bias")) for name, build in linears.items())
    cross, local = cases.cases_patches.cross, cases.cases_patches.local
    crosses = {
        "patches_128_channels": cross("patches", H=2, Hk=1, P=128, K=2, window=2),
        "bytes_256_channels": cross("bytes", H=2, P=256, K=3),
        "patches_far_apart": cross("patches", ((3, (280, -1), 5, 2, (600, -1)),), S=70, H=1, P=8),
        "bytes_far_apart": cross("bytes", (((300, -1), 3, 5, 2, (20, 60)),), S=61, H=1, P=8, K=2),
    }
    locals_ = {
        "strided_64_channels": local(B=1, L=100, H=2, P=64, strided=True, window=70),
        "96_of_128_channels": local(B=1, L=70, H=2, Hk=1, P=72, window=30, causal=False),
        "256_channels": local(B=1, L=90, H=2, Hk=1, P=256, window=40),
        "tiles_without_a_mask": local(B=1, L=200, H=1, P=24, window=150),
    }
    yield from (cases.Case("patch_cross_attention", name, build, ("q", "k", "v")) for name, build in crosses.items())
    yield from (cases.Case("local_attention", name, build, ("q", "k", "v")) for name, build in locals_.items())
    scans = {
        "several_tiles": scan(B=1, L=70, H=2, P=72, G=1, N=80, D="HP", initial=True, final=True),
        "several_odd_tiles": scan(B=1, L=66, H=1, P=67, G=1, N=69, initial=True, final=True),
        "aligned_states_alone": scan(B=1, L=72, H=2, P=20, G=1, N=36, final=True),
        "split_group": scan(B=1, L=33, H=6, P=32, G=1, N=16, final=True),
        "new_sequences_at_chunks": scan(B=1, L=200, H=2, G=1, seq_idx=packed([(0, 63), (1, 1), (2, 64), (3, 1), (-1, 3), (4, 68)]), initial=True, final=True),
        "packed_within_sequences": scan(B=1, L=100, H=2, G=1, cu=[0, 30, 30, 95, 100], seq_idx=packed([(0, 20), (1, 12), (-1, 2), (3, 66)]), initial=True, final=True),
        "many_sequences": scan(B=1, L=90, H=1, P=4, G=1, N=4, cu=[0] * 150 + [3] * 100 + [80, 81, 90] + [90] * 40, initial=True, final=True),
    }
    yield from (cases.Case("mamba_chunk_scan_combined", name, build, cases.SCAN_GRADS, outputs=("y", "final_states")) for name, build in scans.items())
    yield from (cases.Case("rmsnorm_gated", name, build, ("x", "weight", "z")) for name, build in norms.items())
    yield from (cases.Case("selective_state_update", name, build, updated=("state",)) for name, build in updates.items())


def conv_cases():
    """Vectors along both axes, runs that begin at their edges and inside them, several tiles of channels, the longest walks; decoding in every layout."""
    conv, update = cases.conv, cases.conv_update
    edges = cases.packed([(0, 16), (1, 8), (2, 3), (3, 1), (4, 12), (-1, 8), (5, 16)], [(-1, 3), (6, 40), (7, 2), (8, 1), (9, 18)])
    states = {
        "edges": conv(D=16, L=64, seq_idx=edges, initial=True, final=True),
        "edges_channel_first": conv(D=5, L=64, seq_idx=edges, initial=True, final=True, channel_last=False),
        "edges_width_2": conv(D=16, L=64, W=2, seq_idx=edges, initial=True, final=True),
        "edges_width_2_channel_first": conv(D=5, L=64, W=2, seq_idx=edges, initial=True, final=True, channel_last=False),
        "two_tiles_of_channels": conv(D=136, L=70, W=3, initial=True, final=True),
        "whole_vectors_channel_first": conv(D=6, L=192, initial=True, final=True, channel_last=False),
        "long_walks": conv(B=512, D=8, L=11, initial=True, final=True),
        "long_walks_channel_first": conv(B=520, D=3, L=16, W=3, bias=False, channel_last=False, initial=True, final=True),
    }
    large = {
        "long_walks_scalar": conv(B=520, D=33, L=34),
        "long_rows_channel_first": conv(B=260, D=16, L=304, channel_last=False),
    }
    yield from (cases.Case("causal_conv1d_fn", name, build, cases.CONV_GRADS) for name, build in large.items())
    yield from (cases.Case("causal_conv1d_fn", name, build, cases.CONV_GRADS, outputs=("y", "final_states")) for name, build in states.items())
    yield cases.Case("causal_conv1d_varlen_fn", "edges", cases.conv_varlen((8, 0, 3, 16, 1, 0, 36), D=16), cases.CONV_GRADS, outputs=("y", "final_states"))
    yield cases.Case("causal_conv1d_varlen_states", "aligned", cases.varlen_states(D=16))
    updates = {
        "short_of_a_vector": update(W=3, state_len=3, D=130),
        "fp32_state": update(state_dtype=torch.float32),
        "fp32_state_channel_last": update(state_dtype=torch.float32, channel_last=True, state_len=3, flat=True),
        "channel_last_odd": update(channel_last=True, D=13, state_len=3),
        "more_than_the_state": update(L=9, state_len=5),
        "more_than_the_ring": update(L=9, state_len=5, circular=True, channel_last=True),
        "ring_slots": update(state_len=3, circular=True, indices=[-1, 2, 0], slots=4),
    }
    yield from (cases.Case("causal_conv1d_update", name, build, updated=("conv_state",)) for name, build in updates.items())


def routing_and_byte_cases():
    """Scores that leave shared memory, two best of groups wider than a warp, sorts of several tiles and passes, runs over many chunks."""
    route, permute, unpermute = cases_moe.route, cases_moe.permute, cases_moe.unpermute
    routes = {
        "more_scores_than_shared_memory": route(T=2, E=3100, top_k=3, norm_order=1),
        "large_groups": route(T=3, E=132, top_k=5, sigmoid=True, bias=True, n_group=2, topk_group=1, norm_order=2),
        "groups_of_one": route(T=3, E=7, top_k=3, bias=True, n_group=7, topk_group=5),
        "more_choices_than_lanes": route(T=2, E=80, top_k=40, softmax_first=False, norm_order=3),
    }
    permutes = {
        "several_tiles": permute(T=1100, A=4, E=20, sentinels=True),
        "two_passes": permute(T=60, A=4, E=1024),
        "several_tiles_two_passes": permute(T=1030, A=4, E=1500),
        "no_tokens_two_passes": permute(T=0, E=2000),
    }
    unpermutes = {"long_rows": unpermute(T=3, A=5, D=1064), "a_block_for_each_token": unpermute(T=2, A=2, D=4200)}
    reduce, hashes = cases.cases_patches.reduce, cases.cases_bytes.hashes
    reduces = {
        "far_apart": reduce((((300, -1), 3, 600, (400, -1), (9, 40)),), S=60, D=8),
        "far_apart_amin": reduce(((5, (700, -1), (40, 0), 3),), S=9, D=16, kind="amin"),
        "aligned_mean": reduce(D=32, kind="mean"),
        "no_patches": reduce(S=0),
    }
    embeddings = {
        "long_runs": hashes(same=True, B=1, L=4200, vocab=3, D=8, group_sizes=(2,)),
        "many_sizes": hashes(group_sizes=tuple(range(1, 36)), vocab=5, L=9),
        "three_passes": hashes(vocab=1 << 20, group_sizes=(2, 3), D=4, L=40),
        "aligned_mixed": hashes(D=64, table_dtype=torch.bfloat16, L=70),
        "long_rows": hashes(D=1032, L=5, B=1),
    }
    yield from (cases.Case("moe_route", name, build, ("router_logits",), outputs=("y", "indices")) for name, build in routes.items())
    yield from (cases.Case("moe_permute", name, build, outputs=("order", "inverse", "offs")) for name, build in permutes.items())
    yield from (cases.Case("moe_unpermute", name, build, ("rows", "weights")) for name, build in unpermutes.items())
    yield from (cases.Case("patch_reduce", name, build, ("h",)) for name, build in reduces.items())
    yield from (cases.Case("byte_hash_embedding", name, build, ("table", "byte_embedding")) for name, build in embeddings.items())


CASES = [case for case in cases.CASES if served_by(case) in SERVED] + list(further_cases())


# ---- what no case calls

def check_sparse_gradient(**shape):
    """The rows that occur, rising, each with its row of the dense gradient, bit for bit."""
    kwargs = cases_bytes.hashes(**shape)(cases.Random(0), torch.float32)
    table = kwargs.pop("table").requires_grad_()
    grads = []
    for sparse in (False, True):
        y = terrazzo.byte_hash_embedding(table=table, sparse_grad=sparse, backend="cuda", **kwargs)
        grads += torch.autograd.grad(y, table, torch.ones_like(y))
    dense, sparse = grads
    names = sparse.indices()[0]
    assert torch.equal(names, names.unique()) and torch.equal(sparse.to_dense(), dense)
    ids = terrazzo.byte_hash_ids(kwargs["tokens"], kwargs["group_sizes"], kwargs["num_functions"], kwargs["vocab"], backend="reference")
    assert torch.equal(names, ids.unique())


def check_blocks_of_entropies(dtype, **rule):
    """Patches of a text that comes in blocks are those of the whole."""
    e = cases.Random(0).normal(3, 100, dtype=dtype)
    whole = terrazzo.patches_from_entropies(e, include_next=True, backend="reference", **rule)
    state = terrazzo.PatcherState(3, dtype=dtype, backend="cuda", **rule)
    parts = [state.update(block) for block in e.split([0, 5, 1, 64, 30], 1)]
    starts, ids = (torch.cat(part, 1) for part in zip(*parts))
    assert torch.equal(starts, whole.starts[:, 1:]) and torch.equal(ids, whole.patch_ids[:, 1:])
    assert torch.equal(state.patch_id.int(), ids[:, -1]) and state.position.tolist() == [100] * 3
