"""Every Triton op x dtype x case in Triton's interpreter, forward and backward, by the tests' one tolerance rule."""
import pytest
import terrazzo
import torch
from terrazzo import cases
from terrazzo.triton_kernels import library, runtime

from test_ops import DTYPES, assert_matches, served_by

DEVICE = "cpu" if runtime.interpreting() else "cuda"
OPS = {entry.name for entry in terrazzo.dispatch.OPS.values() if "triton" in entry.limits}
CASES = [case for case in cases.CASES if served_by(case) in OPS]
dtypes = pytest.mark.parametrize("dtype", [DTYPES[d] for d in ("fp32", "bf16", "fp16")], ids=("fp32", "bf16", "fp16"))
every_case = pytest.mark.parametrize("case", CASES, ids=str)
training_cases = pytest.mark.parametrize("case", [c for c in CASES if c.grads], ids=str)


def run(case, kwargs, gradients=False):
    """What the triton backend made; the counters show that it was nothing else."""
    terrazzo.reset_counters()
    found = cases.run(case, kwargs, "triton", gradients)
    ran = served_by(case)
    expected = {ran, f"{ran}_bwd"} if gradients else {ran}
    assert {op: set(backends) for op, backends in terrazzo.counters().items()} == {op: {"triton"} for op in expected}
    return found


@every_case
@dtypes
def test_forward(case, dtype):
    kwargs = case.make(dtype)
    assert_matches(case, dtype, kwargs, run(case, kwargs))


@training_cases
@dtypes
def test_backward(case, dtype):
    kwargs = case.make(dtype)
    assert_matches(case, dtype, kwargs, run(case, kwargs, gradients=True), gradients=True)


@every_case
def test_caller_tensors_unchanged(case):
    kwargs = case.make(torch.float32)
    before = {k: cases.clone(v) for k, v in kwargs.items()}
    with torch.no_grad():
        getattr(terrazzo, case.op)(**kwargs, backend="triton")
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and name not in case.updated:
            assert torch.equal(value, before[name]), name


FIRST = {c.op: c for c in reversed(CASES)}


@pytest.mark.parametrize("op", FIRST)
def test_float64_is_refused(op):
    case = FIRST[op]
    kwargs = case.make(torch.float64)
    if not any(isinstance(v, torch.Tensor) and v.dtype == torch.float64 for v in kwargs.values()):
        pytest.skip(f"{op} takes integers only")
    with pytest.raises(terrazzo.BackendError, match="triton.*float64"):
        getattr(terrazzo, op)(**kwargs, backend="triton")


@pytest.mark.parametrize("op", FIRST)
def test_traces_whole(op):
    """torch.compile(fullgraph=True): the op stands in the graph, by shape functions alone."""
    case = FIRST[op]
    kwargs = case.make(torch.float32)
    eager = cases.run(case, kwargs, "triton", gradients=bool(case.grads))
    compiled = torch.compile(getattr(terrazzo, op), fullgraph=True, backend="aot_eager")
    found = cases.run(case, kwargs, "triton", gradients=bool(case.grads), function=compiled)
    if "lengths" in found:  # a graph keeps every column: how many are used depends on the data
        width = eager["lengths"].shape[1]
        assert not found["lengths"][:, width:].any()
        found["lengths"] = found["lengths"][:, :width]
    for name, value in eager.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_every_schema_is_the_native_one():
    for family, schemas in library.SCHEMAS.items():
        for schema in schemas:
            name = schema.partition("(")[0]
            assert str(getattr(torch.ops.terrazzo_triton, name).default._schema).replace("terrazzo_triton::", "terrazzo::") == str(
                getattr(torch.ops.terrazzo, name).default._schema), family


# ---- byte-latent ops: what no case shows -------------------------------------------------------------------


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
    case = next(c for c in CASES if str(c) == f"byte_hash_embedding-{name}")
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


@pytest.mark.parametrize("op", ["entropy_patch", "byte_hash_embedding", "patch_reduce"])
def test_expanded_gradient(op):
    """sum().backward() hands the kernel a stride-0 gradient."""
    case = FIRST[op]
    kwargs = {k: cases.clone(v, DEVICE) if DEVICE == "cuda" else v for k, v in case.make(torch.float32).items()}
    grads = []
    for backend in ("triton", "reference"):
        leaf = kwargs[case.grads[0]].detach().requires_grad_()
        result = getattr(terrazzo, op)(**(kwargs | {case.grads[0]: leaf}), backend=backend)
        (result[0] if isinstance(result, tuple) else result).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=2e-4, atol=2e-4)
