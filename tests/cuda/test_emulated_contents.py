"""What the CUDA kernels make of contents that nobody looks at on the host of a GPU: ids, offsets and logits that mean nothing, and texts in blocks."""
import pytest
import terrazzo
import torch
from terrazzo import cases, kernels

from tools.emulated_cases import check_blocks_of_entropies, check_sparse_gradient

orders = pytest.mark.parametrize("order", ["forward", "reversed"])


def test_offsets_and_experts_out_of_range_touch_nothing(emulator):
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


def test_without_experts_there_is_nothing_to_run(emulator):
    """The op itself says so: the kernels divide by the number of experts."""
    x, none = torch.randn(5, 8), torch.empty(0, 10, 8)
    with pytest.raises(RuntimeError, match=r"terrazzo.fused_experts: E must be positive, got 0"):
        torch.ops.terrazzo_emulated.fused_experts_fwd(x, none, None, torch.empty(0, 8, 5), torch.rand(5, 2), torch.ones(5, 2, dtype=torch.int32), None, None, None, 1,
                                                      False, 1.0, 1.0, False)


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
    check_sparse_gradient(**shape)


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


@orders
@pytest.mark.parametrize("rule", [dict(threshold=0.9), dict(threshold=0.4, monotonic=True), dict(threshold=0.3, threshold_add=0.2, max_patch_length=5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_entropies_are_cut_as_the_whole(emulator, order, rule, dtype):
    emulator.order(order)
    check_blocks_of_entropies(dtype, **rule)


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
