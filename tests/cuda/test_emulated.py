"""Every op with CUDA kernels x dtype x case x order of threads, forward and backward, emulated, by the tests' one tolerance rule."""
import pytest
import terrazzo
import torch
from terrazzo import cases, cases_bytes, cases_moe, kernels

from test_ops import DTYPES, assert_matches, served_by
from tools.emulator import SERVED

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
    widths of heads, long ways back to the patch before, many empty patches."""
    yield from conv_cases()
    yield from patching_cases()
    norm, update = cases.norm, cases.state_update
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
    if any(value.numel() for value in found.values()):
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


@orders
@pytest.mark.parametrize("rule", [dict(threshold=0.9), dict(threshold=0.4, monotonic=True), dict(threshold=0.3, threshold_add=0.2, max_patch_length=5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_entropies_are_cut_as_the_whole(emulator, order, rule, dtype):
    emulator.order(order)
    e = cases.Random(0).normal(3, 100, dtype=dtype)
    whole = terrazzo.patches_from_entropies(e, include_next=True, backend="reference", **rule)
    state = terrazzo.PatcherState(3, dtype=dtype, backend="cuda", **rule)
    parts = [state.update(block) for block in e.split([0, 5, 1, 64, 30], 1)]
    starts, ids = (torch.cat(part, 1) for part in zip(*parts))
    assert torch.equal(starts, whole.starts[:, 1:]) and torch.equal(ids, whole.patch_ids[:, 1:])
    assert torch.equal(state.patch_id.int(), ids[:, -1]) and state.position.tolist() == [100] * 3


@orders
def test_texts_that_mean_nothing_stay_in_bounds(emulator, order):
    emulator.order(order)
    ops, e = torch.ops.terrazzo_emulated, cases.Random(0).normal(1, 70, dtype=torch.float32)
    for rule in range(4):
        for cu_seqlens, valid in (([900, -4, 30, 2**31 - 1, 12, -(2**31)], None), (None, [-5]), (None, [2**31 - 1])):
            texts = [None if v is None else torch.tensor(v, dtype=torch.int32) for v in (cu_seqlens, valid)]
            counts = ops.patch_cut(e, 0.5, rule, 0.1, 3.0, 7, 0, *texts, False)[3]
            assert 0 <= counts.item() <= 70
    assert ops.patch_ids(torch.tensor([[-5, 2**40, 3, 2**62]]), 9).tolist() == [[1] * 9]
