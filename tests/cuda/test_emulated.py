"""Every op with CUDA kernels x dtype x case x order of threads, forward and backward, emulated, by the tests' one tolerance rule."""
import pytest
import terrazzo
import torch
from terrazzo import cases, cases_moe, kernels

from test_ops import DTYPES, assert_matches, served_by
from tools.emulator import SERVED

def unlike(experts):
    """w_up stored in another order than w_gate_up."""

    def build(r, dtype):
        kwargs = experts(r, dtype)
        return kwargs | {"w_up": kwargs["w_up"].mT.contiguous().mT}

    return build


def further_cases():
    """Shapes that only these kernels tell apart: every team size and vector width, groups longer than registers hold, loops over n and p;
    widths of heads, long ways back to the patch before, many empty patches; of the scan tiles beyond the first, rows not aligned to
    16 bytes, sequences that end where chunks do, more of them than threads."""
    yield from conv_cases()
    yield from routing_and_byte_cases()
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
        "fp16_state": update(state_dtype=torch.float16, N=64),
        "bf16_state_odd": update(state_dtype=torch.bfloat16, N=12, expanded=False),
        "nothing_but_padding": update(indices=[-1, -1, -1], slots=2),
    }
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
        "sorted_by_several_blocks": experts(T=520, D=8, F=8, E=40),
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
        "aligned_states_alone": scan(B=1, L=40, H=2, P=20, G=1, N=36, final=True),
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
dtypes = pytest.mark.parametrize("dtype", [DTYPES[d] for d in ("fp32", "bf16", "fp16")], ids=("fp32", "bf16", "fp16"))
orders = pytest.mark.parametrize("order", ["forward", "reversed"])
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
def test_caller_tensors_unchanged(emulator, case):
    kwargs = case.make(torch.float32)
    before = {k: cases.clone(v) for k, v in kwargs.items()}
    with torch.no_grad():
        getattr(terrazzo, case.op)(**kwargs, backend="cuda")
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and name not in case.updated:
            assert torch.equal(value, before[name]), name


def test_contents_out_of_range_touch_nothing(emulator):
    """On a GPU nobody reads offsets and indices before the kernels do: ends are cut to the rows there are, experts that aren't ours have no slot."""
    ops, a, b = torch.ops.terrazzo_emulated, torch.randn(9, 8), torch.randn(3, 8, 5)
    ends = torch.tensor([-4, 4, 99], dtype=torch.int32)
    y = ops.grouped_gemm_fwd(a, b, ends, None)
    torch.testing.assert_close(y, torch.cat([a[:4] @ b[1], a[4:] @ b[2]]))
    assert ops.grouped_gemm_bwd(y, a, b, ends, True, True, True)[1][0].eq(0).all()
    w1, w2, weights = torch.randn(3, 10, 8), torch.randn(3, 8, 5), torch.rand(9, 2)
    indices = torch.tensor([[0, 2], [1, 0], [2, 1]] * 3, dtype=torch.int32)
    found = [ops.fused_experts_fwd(a, w1, None, w2, weights, indices.where(indices != 1, other), None, None, None, 1, False, 1.0, 1.0, False)[0]
             for other in (3, -1, 1 << 30)]
    assert all(torch.equal(found[0], y) for y in found[1:])


@orders
def test_ids_and_ends_that_mean_nothing_stay_in_bounds(emulator, order):
    """On a GPU nobody looks at what integers hold before the kernels do: any result, but inside the tensors (TERRAZZO_EMULATOR=sanitize sees that)."""
    emulator.order(order)
    ops, r = kernels.ops("cuda"), cases.Random(0)
    rows, patches = (r.normal(1, n, 2, 8, dtype=torch.bfloat16) for n in (70, 12))
    ids = torch.tensor([5, 2**31 - 1, 2, -7, 9, 0, -(2**31)] * 10, dtype=torch.int32)[None]
    for q, k, bytes_ask in ((rows, patches, True), (patches, rows, False)):
        rest = (ids, 6, bytes_ask, 2, 0.3, 2, None, None)
        assert ops.patch_cross_attention_fwd(q, k, k, *rest).isfinite().all()
        assert all(grad.isfinite().all() for grad in ops.patch_cross_attention_bwd(q, q, k, k, *rest))
    cu_seqlens = torch.tensor([900, -4, 30, 2**31 - 1, 12, -(2**31)], dtype=torch.int32)
    rest = (20, False, 0.3, None, cu_seqlens)
    y, lse = ops.local_attention_fwd(rows, rows, rows, *rest)
    assert y.isfinite().all() and all(grad.isfinite().all() for grad in ops.local_attention_bwd(y, rows, rows, rows, y, lse, *rest))


# ---- what no case of the list says ---------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, dict(sigmoid=True), dict(softmax_first=False), dict(n_group=2, topk_group=1, norm_order=1)], ids=str)
def test_nan_logits(emulator, options):
    """A NaN among a token's logits: NaN weights, the first experts, and no other token touched."""
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    clean = terrazzo.moe_route(logits, 2, backend="cuda", **options)
    logits[1, 35] = float("nan")
    weights, indices = terrazzo.moe_route(logits, 2, backend="cuda", **options)
    assert weights[1].isnan().all() and indices[1].tolist() == [0, 1]
    assert torch.equal(weights[::2], clean[0][::2]) and torch.equal(indices[::2], clean[1][::2])


def test_equal_scores_take_the_lower_index(emulator):
    assert terrazzo.moe_route(torch.zeros(2, 40), 3, backend="cuda")[1].tolist() == [[0, 1, 2]] * 2
    assert terrazzo.moe_route(torch.tensor([[1.0] * 20 + [2.0] * 20]), 3, backend="cuda")[1].tolist() == [[20, 21, 22]]


@pytest.mark.parametrize("reduce", ["amax", "amin", "mean"])
def test_nan_bytes_are_their_patchs_result(emulator, reduce):
    h = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0))
    h[0, 4, 3] = float("nan")
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]], dtype=torch.int32)
    y = terrazzo.patch_reduce(h, ids, 3, reduce, backend="cuda")
    expected = torch.zeros(1, 3, 8, dtype=torch.bool)
    expected[0, 1, 3] = True
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("shape", [dict(), dict(vocab=1 << 20), dict(same=True, L=2100, vocab=3, D=4), dict(L=0)], ids=str)
def test_sparse_gradient_is_the_dense_one(emulator, shape):
    """The rows that occur, rising, each with its row of the dense gradient, bit for bit."""
    kwargs = cases.cases_bytes.hashes(**shape)(cases.Random(0), torch.float32)
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


def test_contents_out_of_range_touch_nothing(emulator):
    """Without a check on the host, indices that mean nothing must not lead anywhere: the sanitizers see it."""
    ops = kernels.ops("cuda")
    i32 = torch.int32
    rows, weights = torch.randn(6, 8), torch.rand(3, 2)
    inverse = torch.tensor([0, 1, -5, 3, 2**31 - 1, 5], dtype=i32)
    y = ops.moe_unpermute_fwd(rows, inverse, weights)
    torch.testing.assert_close(y[1], weights[1, 1] * rows[3])
    ops.moe_unpermute_bwd(torch.randn(3, 8), rows, inverse, weights)
    ops.moe_route_bwd(torch.randn(2, 2), torch.randn(2, 4), torch.tensor([[4, -1], [0, 2**31 - 1]], dtype=i32), 1.0, True, False, 1.0)
    order, _, offs = ops.moe_permute(torch.tensor([[1, -3], [2**31 - 1, 0]], dtype=i32), 2)
    assert order.tolist() == [3, 0, 1, 2] and offs.tolist() == [1, 2]
    for ids in ([[5, 0, 9, -7, 2, 2**31 - 1, 1, 1]], [[2**31 - 1] * 8]):
        y = ops.patch_reduce_fwd(torch.randn(1, 8, 4), torch.tensor(ids, dtype=i32), 3, 0)
        ops.patch_reduce_bwd(torch.randn(1, 3, 4), torch.randn(1, 8, 4), y, torch.tensor(ids, dtype=i32), 0)
    tokens = torch.tensor([[9, -1, 2**40, 1]])
    table, byte = torch.randn(14, 4), torch.randn(5, 4)
    for cu in ([0, 9, -4, 2], [3, 3, 3], [-9, 99]):
        cu = torch.tensor(cu, dtype=i32)
        ops.byte_hash_embedding_fwd(tokens, table, byte, [2, 3], 1, 7, cu, False)
        dtable, dbytes, _ = ops.byte_hash_embedding_bwd(torch.ones(1, 4, 4), tokens, table, 14, byte, 5, [2, 3], 1, 7, cu, False, True, True)
        assert dtable.sum() == 4 * 4 * 2 and dbytes.sum() == 4 and dbytes[1].tolist() == [1] * 4
