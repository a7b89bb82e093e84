"""Patches and hash embeddings against transformers' BLT, rules written out position by position, and properties."""
import pytest
import terrazzo
import torch
from terrazzo import cases

transformers = pytest.importorskip("transformers")
from transformers.models.blt import modeling_blt as hf  # noqa: E402

backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
RULES = {
    "threshold": dict(threshold=0.9),
    "monotonic": dict(threshold=0.4, monotonic=True),
    "combined": dict(threshold=0.3, threshold_add=0.2),
    "threshold_max": dict(threshold=1.2, max_patch_length=3),
    "monotonic_max": dict(threshold=0.8, monotonic=True, max_patch_length=2),
    "combined_max": dict(threshold=0.3, threshold_add=0.2, max_patch_length=5),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def entropies(B=3, L=64, seed=0, dtype=torch.float32):
    return torch.randn(B, L, generator=torch.Generator().manual_seed(seed)).to(dtype)


def starts_one_by_one(e, threshold, monotonic=False, threshold_add=None, max_patch_length=None):
    """The rules of the paper's code for one row of floats, and one position more."""
    starts, length = [], 0
    for i in range(len(e) + 1):
        if i < 2 or (i == 2 and (monotonic or threshold_add is not None)):
            start = True
        elif monotonic:
            start = e[i - 1] - e[i - 2] > threshold
        elif threshold_add is not None:
            start = i != 3 and e[i - 1] > threshold and e[i - 1] - e[i - 2] > threshold_add
        else:
            start = e[i - 1] > threshold
        start = start or length == max_patch_length
        length = 1 if start else length + 1
        starts.append(start)
    return starts


@backends
@every_rule
@pytest.mark.parametrize("L", [1, 2, 3, 4, 64])
def test_rules(rule, L, backend):
    e = entropies(L=L, dtype=torch.float64)
    expected = torch.tensor([starts_one_by_one(row, **rule) for row in e.tolist()])
    assert torch.equal(terrazzo.patches_from_entropies(e, include_next=True, backend=backend, **rule).starts, expected)
    assert torch.equal(terrazzo.patches_from_entropies(e, backend=backend, **rule).starts, expected[:, :L])


@backends
@every_rule
def test_lengths_and_ids_belong_together(rule, backend):
    e = entropies(B=5, L=100)
    valid = torch.tensor([100, 0, 1, 2, 57], dtype=torch.int32)
    for options, total in (({}, [100] * 5), (dict(valid_lengths=valid), valid.tolist()), (dict(include_next=True), [101] * 5)):
        p = terrazzo.patches_from_entropies(e, backend=backend, **rule, **options)
        assert p.lengths.sum(1).tolist() == total
        assert (p.lengths > 0).sum(1).tolist() == p.counts.tolist() == p.starts.sum(1).tolist()
        assert p.lengths.shape[1] == max(p.counts)
        if rule.get("max_patch_length"):
            assert p.lengths.max() <= rule["max_patch_length"]
        for b, n in enumerate(total):
            ids = p.patch_ids[b, :n]
            assert (ids.diff() >= 0).all() and (p.patch_ids[b, n:] == -1).all() and not p.starts[b, n:].any()
            assert torch.equal(ids.long().bincount(minlength=p.lengths.shape[1]), p.lengths[b].long())
            if n:
                assert torch.equal(terrazzo.patch_ids_from_lengths(p.lengths[b : b + 1], n, backend=backend)[0], ids)


@backends
@every_rule
def test_rows_do_not_leak(rule, backend):
    """Permuting the batch permutes the result; a row alone, padded or packed is the same row."""
    logits = torch.randn(4, 30, 17, generator=torch.Generator().manual_seed(0)) * 2
    rule = rule | dict(threshold=rule["threshold"] + 1.0 if not rule.get("monotonic") else 0.1)
    together = terrazzo.entropy_patch(logits, backend=backend, **rule)
    order = torch.tensor([2, 0, 3, 1])
    permuted = terrazzo.entropy_patch(logits[order], backend=backend, **rule)
    for found, expected in zip(permuted, together):
        assert torch.equal(found, expected[order])
    packed = terrazzo.entropy_patch(logits.view(1, 120, 17), backend=backend, cu_seqlens=torch.arange(0, 121, 30, dtype=torch.int32), **rule)
    assert torch.equal(packed.starts.view(4, 30), together.starts) and packed.lengths.sum() == 120
    cut = terrazzo.entropy_patch(logits, backend=backend, valid_lengths=torch.tensor([30, 7, 1, 0], dtype=torch.int32), **rule)
    assert torch.equal(cut.starts[1, :7], together.starts[1, :7]) and cut.counts[3] == 0


@backends
@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_incremental_equals_batch(rule, backend, dtype):
    e = entropies(dtype=dtype)
    whole = terrazzo.patches_from_entropies(e, include_next=True, backend=backend, **rule)
    for sizes in ([1] * 64, [0, 5, 1, 30, 28], [64]):
        state = terrazzo.PatcherState(3, dtype=dtype, backend=backend, **rule)
        parts = [state.update(block) for block in e.split(sizes, 1)]
        starts, ids = (torch.cat(part, 1) for part in zip(*parts))
        assert torch.equal(starts, whole.starts[:, 1:]) and torch.equal(ids, whole.patch_ids[:, 1:])
        assert torch.equal(state.patch_id.int(), ids[:, -1]) and state.position.tolist() == [64] * 3


@backends
@every_rule
def test_rows_of_unequal_length_are_rows_alone(rule, backend):
    e, lengths = entropies(), torch.tensor([[5, 0, 20], [0, 1, 30], [31, 2, 1], [0, 0, 0]])
    together = terrazzo.PatcherState(3, backend=backend, **rule)
    alone = [terrazzo.PatcherState(1, backend=backend, **rule) for _ in range(3)]
    begin = [0, 0, 0]
    for some in lengths:
        width = int(some.max())
        block = torch.full((3, width), 1.7)  # what stands behind a row counts for nothing
        for row, n in enumerate(some.tolist()):
            block[row, :n] = e[row, begin[row] : begin[row] + n]
        starts, ids = together.update(block, some)
        for row, n in enumerate(some.tolist()):
            expected = alone[row].update(e[row : row + 1, begin[row] : begin[row] + n])
            assert torch.equal(starts[row, :n], expected[0][0]) and torch.equal(ids[row, :n], expected[1][0])
            assert not starts[row, n:].any() and (ids[row, n:] == -1).all()
            begin[row] += n
        assert torch.equal(together.state, torch.cat([state.state for state in alone]))
    together.reorder(torch.tensor([2, 0, 0, 1]))
    assert together.position.tolist() == [51, 36, 36, 3]
    found = together.update(e[[2, 0, 0, 1], -1])[1].tolist()
    assert found == [alone[row].update(e[row : row + 1, -1])[1].item() if i != 2 else found[1] for i, row in enumerate((2, 0, 0, 1))]


def test_incremental_from_logits():
    logits = torch.randn(2, 20, 260, generator=torch.Generator().manual_seed(1))
    whole = terrazzo.entropy_patch(logits, 5.06, include_next=True)
    state = terrazzo.PatcherState(2, 5.06)
    steps = [state.update_from_logits(logits[:, t]) for t in range(20)]
    assert torch.equal(torch.stack([s[0] for s in steps], 1), whole.starts[:, 1:])
    assert torch.equal(torch.stack([s[2] for s in steps], 1), whole.entropies)


@backends
@pytest.mark.parametrize("max_patch_length", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_like_transformers(backend, max_patch_length, dtype):
    """Trailing patches of length 0, the +1 and -1 of short rows, and the ids that transformers reads from them."""
    for seed in range(20):
        for L in (1, 2, 3, 40):
            e = entropies(B=4, L=L, seed=seed, dtype=dtype)
            expected = hf.BltPatcher.patch_lengths_from_entropies(e, L, threshold=0.9)
            ids = hf.BltModel._patch_ids_from_lengths(None, expected, L)
            assert torch.equal(terrazzo.patch_ids_from_lengths(expected, L, exact=False, backend=backend), ids.int())
            found = terrazzo.hf_patch_lengths(e, 0.9, max_patch_length, backend=backend)
            assert torch.equal(found, hf.process_patch_lengths(expected, max_patch_length))
            if max_patch_length is None:
                inside = terrazzo.patches_from_entropies(e, 0.9, backend=backend)
                assert torch.equal(inside.patch_ids, ids.int())


def test_whole_patcher_like_transformers():
    torch.manual_seed(0)
    config = hf.BltPatcherConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    patcher = hf.BltPatcher(config).eval()
    with torch.no_grad():
        patcher.lm_head.weight.mul_(20)
        middle = patcher(torch.randint(0, 260, (1, 200)))[0].median().item()
        h, lengths, logits = patcher(torch.randint(0, 260, (3, 50)), patch_size=4, threshold=middle, max_patch_length=6)
    torch.testing.assert_close(terrazzo.entropy_patch(logits, middle).entropies, h, rtol=1e-5, atol=1e-5)
    assert torch.equal(terrazzo.hf_patch_lengths(h, middle, 6), lengths)


@backends
def test_top_takes_the_largest(backend):
    e = torch.tensor([[9.0, 1, 5, 2, 8, 7, 3, 9, 5, 9], [0.0] * 10])
    starts = terrazzo.patches_from_entropies(e, None, patch_size=2, backend=backend).starts
    assert starts.nonzero()[:, 1].split(starts.sum(1).tolist())[0].tolist() == [0, 1, 5, 6, 8]  # behind 8, 7 and 9
    assert starts[1].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]                            # of equals the first


@backends
def test_text_modes(backend):
    tokens = torch.tensor([[1] + [b + 4 for b in "to be, or é!".encode()]])
    # <s> | to_ | be, | _or_ | é! : behind the first of each run of space-like bytes, and the first byte of é is one
    assert terrazzo.patch_lengths_from_tokens(tokens, "space", backend=backend).tolist() == [[1, 3, 3, 4, 3]]
    assert terrazzo.patch_lengths_from_tokens(tokens, "static", patch_size=5, backend=backend).tolist() == [[5, 5, 4]]
    assert terrazzo.patch_lengths_from_tokens(tokens, "bytes", backend=backend).tolist() == [[1] * 14]


def test_nan_starts_no_patch():
    logits = torch.randn(1, 6, 9)
    logits[0, 2, 3] = float("nan")
    logits[0, 3] = float("-inf")
    found = terrazzo.entropy_patch(logits, -1.0)
    assert found.entropies.isnan().tolist() == [[False, False, True, True, False, False]]
    assert found.starts.tolist() == [[True, True, True, False, False, True]]


# ---- hash embeddings ---------------------------------------------------------------------------------------


def hash_by_hand(tokens, t, size, prime, vocab):
    total = sum((tokens[t - size + 1 + j] if t - size + 1 + j >= 0 else 0) * prime**j for j in range(size)) % 2**64
    return (total - 2**64 if total >= 2**63 else total) % vocab


@backends
def test_ids_by_hand(backend):
    from terrazzo.reference.byte_hash_embedding import PRIMES

    tokens = torch.randint(0, 260, (2, 20), generator=torch.Generator().manual_seed(0))
    ids = terrazzo.byte_hash_ids(tokens, [3, 8, 5], 12, 500002, backend=backend)
    for b in range(2):
        for t in range(20):
            expected = [hash_by_hand(tokens[b].tolist(), t, size, PRIMES[f % 11], 500002) + (3 * f + g) * 500002
                        for f in range(12) for g, size in enumerate((3, 8, 5))]
            assert ids[b, t].tolist() == expected


@backends
def test_embedding_like_transformers(backend):
    """Ids, sums and both gradients; the table's also sparse."""
    torch.manual_seed(0)
    sizes, vocab = [3, 4, 5, 6, 7, 8], 1009
    encoder, table = torch.nn.Module(), torch.nn.Embedding(2 * 6 * vocab, 16)
    encoder.embed_tokens = torch.nn.Embedding(260, 16)
    tokens = torch.randint(0, 260, (2, 50))
    ids = terrazzo.byte_hash_ids(tokens, sizes, 1, vocab, backend=backend)
    for i, size in enumerate(sizes):
        assert torch.equal(ids[..., i] - i * vocab, hf.byte_group_hash_function(tokens, size, 1000000007, vocab))
    leaves = (table.weight, encoder.embed_tokens.weight)
    expected = hf.compute_hash_embeddings(tokens, encoder, table, 2, sizes, vocab)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, weights)
    for sparse in (False, True):
        found = terrazzo.byte_hash_embedding(tokens, *leaves, sizes, 2, vocab, sparse_grad=sparse, backend=backend)
        torch.testing.assert_close(found, expected)
        dtable, dbyte = torch.autograd.grad(found, leaves, weights)
        assert dtable.is_sparse == sparse
        torch.testing.assert_close(dtable.to_dense() if sparse else dtable, wanted[0])
        torch.testing.assert_close(dbyte, wanted[1])


def test_sparse_gradient_trains():
    torch.manual_seed(0)
    table, byte = torch.nn.Parameter(torch.randn(20, 4)), torch.randn(9, 4)
    tokens = torch.randint(0, 9, (1, 3))
    terrazzo.byte_hash_embedding(tokens, table, byte, [2], 1, 20, sparse_grad=True).sum().backward()
    assert table.grad.is_sparse and table.grad.coalesce().indices().diff().gt(0).all()
    before = table.detach().clone()
    torch.optim.SGD([table], lr=0.1).step()
    read = terrazzo.byte_hash_ids(tokens, [2], 1, 20).flatten().unique()
    changed = (table.detach() != before).any(1).nonzero().flatten()
    assert torch.equal(changed, read)


@backends
def test_ngrams_stay_inside_their_text(backend):
    tokens = torch.randint(0, 260, (3, 20), generator=torch.Generator().manual_seed(0))
    packed = terrazzo.byte_hash_ids(tokens.view(1, 60), [3, 8], 1, 99, cu_seqlens=torch.tensor([0, 20, 40, 60], dtype=torch.int32), backend=backend)
    assert torch.equal(packed.view(3, 20, 2), terrazzo.byte_hash_ids(tokens, [3, 8], 1, 99, backend=backend))
    prefix = terrazzo.byte_hash_ids(tokens[:, :9], [3, 8], 1, 99, backend=backend)
    assert torch.equal(prefix, packed.view(3, 20, 2)[:, :9])


def test_cases_cut_something():
    """The cases would say little if every position, or none, started a patch."""
    for case in cases.CASES:
        if case.op == "entropy_patch" and case.name in ("threshold", "monotonic", "combined", "top", "max_length", "peaked", "masked", "strided", "many"):
            kwargs = case.make(torch.float32)
            share = terrazzo.entropy_patch(**kwargs).starts.float().mean()
            assert 0.05 < share < 0.95, case
