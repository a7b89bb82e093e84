"""Patch pooling, patch cross-attention and local attention against transformers' own code, and properties that need no oracle."""
import pytest
import terrazzo
import torch
import torch.nn.functional as F

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
DIRECTIONS = pytest.mark.parametrize("queries", ["patches", "bytes"])


def close(found, expected, tol=1e-5):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def random_ids(g, B, L, longest=9):
    """(B, L) int32 of the same number of patches in every row, and that number; the last ones may be empty."""
    ids = torch.stack([torch.arange(L).repeat_interleave(torch.randint(1, longest, (L,), generator=g))[:L] for _ in range(B)])
    return ids.int(), int(ids.max()) + 1


@DIRECTIONS
@pytest.mark.parametrize("seed", range(8))
def test_cross_attention_equals_dense_mask(queries, seed):
    """Any patches, heads and window: what scaled_dot_product_attention gives with the whole mask."""
    g = torch.Generator().manual_seed(seed)
    B, L, K = 2, int(torch.randint(1, 60, (), generator=g)), 1 + seed % 3
    Hk, group, P = 1 + seed % 4, 1 + seed // 3, int(torch.randint(1, 40, (), generator=g))
    window = None if seed % 2 else 1 + seed // 2
    ids, S = random_ids(g, B, L)
    Lq, Lk = (S * K, L) if queries == "patches" else (L, S * K)
    q, k, v = (torch.randn(B, n, h, P, generator=g, dtype=torch.float64) for n, h in ((Lq, Hk * group), (Lk, Hk), (Lk, Hk)))
    rows = torch.arange(S).repeat_interleave(K).expand(B, -1)
    of_query, of_key = (rows, ids) if queries == "patches" else (ids, rows)
    behind = of_query[:, :, None] - of_key[:, None]
    mask = ((behind >= 0) & (behind < (window or 1)))[:, None]
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, enable_gqa=True).transpose(1, 2)
    expected = torch.where(mask.any(-1)[:, 0, :, None, None], expected, 0)  # a query without a key
    close(terrazzo.patch_cross_attention(q, k, v, ids, queries=queries, k_per_patch=K, window=window, backend="cpu"), expected, 1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("L, window", [(1, 1), (63, 5), (64, 64), (65, 64), (129, 65), (300, 128), (300, 1000)])
def test_local_attention_equals_dense_mask(L, window, causal):
    g = torch.Generator().manual_seed(L + window)
    q, k, v = (torch.randn(2, L, h, 24, generator=g) for h in (4, 2, 2))
    behind = torch.arange(L)[:, None] - torch.arange(L)
    mask = (behind < window) & ((behind >= 0) if causal else (behind > -window))
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, enable_gqa=True).transpose(1, 2)
    close(terrazzo.local_attention(q, k, v, window, causal=causal, backend="cpu"), expected)


def test_window_is_transformers_sliding_window():
    """The mask that transformers builds for config.sliding_window lets the same keys through."""
    masks = pytest.importorskip("transformers.masking_utils")
    L, window = 40, 7
    seen = torch.tensor([[bool(masks.sliding_window_overlay(window)(0, 0, i, j)) and j <= i for j in range(L)] for i in range(L)])
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, L, 2, 8, generator=g) for _ in range(3))
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), seen).transpose(1, 2)
    close(terrazzo.local_attention(q, k, v, window), expected)


@BACKENDS
@DIRECTIONS
def test_cross_attention_is_transformers(queries, backend):
    """BltCrossAttention of a small model, with our function in the place of its masked attention: values and gradients."""
    blt = pytest.importorskip("transformers.models.blt.modeling_blt")
    from transformers import BltConfig

    encoder = BltConfig(encoder_config=dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)).encoder_config
    torch.manual_seed(0)
    encoder._attn_implementation = "sdpa"
    layer = blt.BltCrossAttention(encoder, 0)
    ids, S = random_ids(torch.Generator().manual_seed(1), 1, 50)  # one row: no patch is empty, so that both sides agree
    K, L = 2, ids.shape[1]
    Lq, Lk = (S * K, L) if queries == "patches" else (L, S * K)
    hidden, states = torch.randn(1, Lq, 32, requires_grad=True), torch.randn(1, Lk, 32, requires_grad=True)
    mask = blt._prepare_patch_cross_attention_mask(ids, S, L, queries == "patches", K)
    expected, _ = layer(hidden, states, mask)

    def ours():
        q = layer.q_proj(layer.q_norm(hidden)).view(1, Lq, -1, layer.head_dim)
        kv = layer.k_norm(states)
        k, v = (proj(kv).view(1, Lk, -1, layer.head_dim) for proj in (layer.k_proj, layer.v_proj))
        attended = terrazzo.patch_cross_attention(q, k, v, ids, queries=queries, k_per_patch=K, scale=layer.scaling, backend=backend)
        return layer.o_proj(attended.flatten(2)) + hidden

    found = ours()
    close(found, expected)
    weights = torch.randn_like(found)
    leaves = [hidden, states, layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]
    for a, b in zip(torch.autograd.grad(found, leaves, weights), torch.autograd.grad(expected, leaves, weights)):
        close(a, b, 1e-4)


@BACKENDS
def test_patch_reduce_is_transformers(backend):
    blt = pytest.importorskip("transformers.models.blt.modeling_blt")
    g = torch.Generator().manual_seed(0)
    ids, S = random_ids(g, 3, 70)
    h = torch.randn(3, 70, 20, generator=g, requires_grad=True)
    expected = blt.BltLocalEncoder.patch_reduce(None, h, S + 2, ids.long())
    found = terrazzo.patch_reduce(h, ids, S + 2, backend=backend)
    assert torch.equal(found, expected)
    weights = torch.randn(found.shape, generator=g)
    close(*(torch.autograd.grad(y, h, weights)[0] for y in (found, expected)))


@BACKENDS
def test_tied_bytes_share_the_gradient(backend):
    h = torch.tensor([[[0.0], [0.0], [-1.0], [2.0]]], requires_grad=True)
    y = terrazzo.patch_reduce(h, torch.tensor([[0, 0, 0, 1]]), 3, backend=backend)
    assert y.flatten().tolist() == [0, 2, 0]
    y.backward(torch.tensor([[[6.0], [5.0], [7.0]]]))
    assert h.grad.flatten().tolist() == [3, 3, 0, 5]


@BACKENDS
@pytest.mark.parametrize("kind", ["amax", "mean", "amin"])
def test_nan_stays_in_its_patch(kind, backend):
    h = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    h[0, 4, 1] = float("nan")
    nan = terrazzo.patch_reduce(h, torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]]), 3, kind, backend=backend).isnan()
    assert nan[0, 1, 1] and nan.sum() == 1


@DIRECTIONS
def test_rows_and_patches_do_not_leak(queries):
    """Changing one patch's keys changes that patch's outputs alone, and the order of the batch only the order of the result."""
    g = torch.Generator().manual_seed(0)
    ids, S = random_ids(g, 3, 40)
    Lq, Lk = (S, 40) if queries == "patches" else (40, S)
    q, k, v = (torch.randn(3, n, 2, 8, generator=g) for n in (Lq, Lk, Lk))
    before = terrazzo.patch_cross_attention(q, k, v, ids, queries=queries)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(terrazzo.patch_cross_attention(q[order], k[order], v[order], ids[order], queries=queries), before[order])
    rows = torch.arange(S).expand(3, S)
    of_query, of_key = (rows, ids) if queries == "patches" else (ids, rows)
    v[1][of_key[1] == 3] += 1
    changed = (terrazzo.patch_cross_attention(q, k, v, ids, queries=queries) != before).flatten(2).any(2)
    expected = of_query == 3
    expected[[0, 2]] = False
    assert torch.equal(changed, expected)


def test_packed_local_attention_equals_rows():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 90, 4, 16, generator=g) for _ in range(3))
    packed = terrazzo.local_attention(*(t.flatten(0, 1)[None] for t in (q, k, v)), 30, cu_seqlens=torch.tensor([0, 90, 180, 270], dtype=torch.int32))
    assert torch.equal(packed.view(q.shape), terrazzo.local_attention(q, k, v, 30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_scores(dtype):
    """Scores in the thousands neither overflow nor lose the largest key."""
    q = torch.full((1, 130, 1, 4), 50.0, dtype=dtype)
    k = torch.linspace(-40, 40, 130, dtype=dtype).view(1, 130, 1, 1).expand(1, 130, 1, 4)
    v = torch.arange(130, dtype=dtype).view(1, 130, 1, 1).expand(1, 130, 1, 4).contiguous()
    assert torch.equal(terrazzo.local_attention(q, k, v, 40), v)  # keys grow, so each query takes its own
    ids = torch.zeros(1, 130, dtype=torch.int32)
    assert torch.equal(terrazzo.patch_cross_attention(q[:, :1], k, v, ids), v[:, -1:])


def test_local_attention_memory_is_linear():
    """At 16 k positions a square of scores would take a gigabyte."""
    from terrazzo.bench import memory

    peaks = []
    for L in (4096, 16384):
        q = torch.randn(1, L, 1, 16)
        terrazzo.local_attention(q, q, q, 64)
        peaks.append(memory.peak_of(lambda q=q: terrazzo.local_attention(q, q, q, 64)))
    if None in peaks:
        pytest.skip("peak memory cannot be read on this system")
    assert peaks[1] < 64 << 20
