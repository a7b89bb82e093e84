"""The byte-latent ops in Triton: what no case of the list shows."""
import pytest
import terrazzo
import torch
from terrazzo import cases
from terrazzo.triton_kernels import runtime

DEVICE = "cpu" if runtime.interpreting() else "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [dict(threshold=0.9, max_patch_length=3), dict(threshold=0.4, monotonic=True), dict(threshold=0.3, threshold_add=0.2)])
def test_patcher_state_equals_batch(rule, dtype):
    """Blocks of every length, one of them over several of the kernel's, give the patches of the whole text."""
    entropies = cases.Random(0).normal(2, 1200, dtype=dtype).to(DEVICE)
    whole = terrazzo.patches_from_entropies(entropies, include_next=True, backend="reference", **rule)
    state = terrazzo.PatcherState(2, dtype=dtype, device=DEVICE, backend="triton", **rule)
    parts = [state.update(block) for block in entropies.split([1, 1, 1, 0, 30, 1100, 67], 1)]
    starts, ids = (torch.cat(part, 1) for part in zip(*parts))
    assert torch.equal(starts, whole.starts[:, 1:]) and torch.equal(ids, whole.patch_ids[:, 1:])
    last = whole.patch_ids[:, -1:]
    assert torch.equal(state.patch_id, last[:, 0].long()) and state.position.tolist() == [1200] * 2
    assert torch.equal(state.patch_length, (whole.patch_ids == last).sum(1))


def test_long_packed_texts():
    entropies = cases.Random(0).normal(1, 9000, dtype=torch.float32).to(DEVICE)
    cu_seqlens = torch.tensor([0, 1, 1, 4097, 4100, 9000], dtype=torch.int32, device=DEVICE)
    for rule in (dict(threshold=0.4, monotonic=True), dict(threshold=None, patch_size=3.7)):
        found, expected = (terrazzo.patches_from_entropies(entropies, cu_seqlens=cu_seqlens, backend=b, **rule) for b in ("triton", "reference"))
        for name, value in expected._asdict().items():
            assert torch.equal(getattr(found, name), value), name


def test_nan_starts_no_patch_and_is_taken_first():
    logits = cases.Random(0).normal(1, 6, 9, dtype=torch.float32).to(DEVICE)
    logits[0, 2, 3], logits[0, 3] = float("nan"), float("-inf")
    found = terrazzo.entropy_patch(logits, -1.0, backend="triton")
    assert found.entropies.isnan().tolist() == [[False, False, True, True, False, False]]
    assert found.starts.tolist() == [[True, True, True, False, False, True]]
    found = terrazzo.entropy_patch(logits, None, patch_size=1.5, backend="triton")
    assert found.starts.tolist() == [[True, True, False, True, True, False]]
    h = torch.zeros(1, 3, 2, device=DEVICE)
    h[0, 1, 0] = float("nan")
    for reduce in ("amax", "amin", "mean"):
        pooled = terrazzo.patch_reduce(h, torch.tensor([[0, 0, 1]], device=DEVICE), 2, reduce, backend="triton")
        assert pooled.isnan().tolist() == [[[True, False], [False, False]]]


@pytest.mark.parametrize("name", ["plain", "same_byte", "no_positions"])
def test_sparse_gradient(name):
    """The rows that were read, rising, with the gradients of the dense tensor."""
    case = next(c for c in cases.CASES if str(c) == f"byte_hash_embedding-{name}")
    kwargs = {k: cases.clone(v, DEVICE) if DEVICE == "cuda" else v for k, v in case.make(torch.float32).items()}
    grads = []
    for sparse in (False, True):
        table = kwargs["table"].detach().requires_grad_()
        y = terrazzo.byte_hash_embedding(**(kwargs | dict(table=table)), sparse_grad=sparse, backend="triton")
        grads += torch.autograd.grad(y, table, torch.arange(1.0, y.numel() + 1, device=DEVICE).view_as(y))
    dense, sparse = grads
    read = terrazzo.byte_hash_ids(kwargs["tokens"], kwargs["group_sizes"], 1, kwargs["vocab"], backend="reference").unique()
    assert sparse.is_coalesced() and torch.equal(sparse.indices()[0], read)
    assert torch.equal(sparse.to_dense(), dense)
