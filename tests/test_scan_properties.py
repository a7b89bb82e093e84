"""What must hold for the scan and the convolution beyond matching the reference: the recurrence itself, extremes, splitting."""
import pytest
import terrazzo
import torch

SHAPE = dict(B=2, L=90, H=4, P=6, G=2, N=5)


def inputs(dtype=torch.float64, B=2, L=90, H=4, P=6, G=2, N=5):
    torch.manual_seed(3)
    return dict(x=torch.randn(B, L, H, P, dtype=dtype), dt=torch.rand(B, L, H, dtype=dtype), A=-torch.rand(H, dtype=dtype) * 2,
                B=torch.randn(B, L, G, N, dtype=dtype), C=torch.randn(B, L, G, N, dtype=dtype), chunk_size=64)


def recurrence(x, dt, A, B, C, chunk_size):
    """Position by position, as the definition says."""
    heads = x.shape[2] // B.shape[2]
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    ys = []
    for t in range(x.shape[1]):
        b, c = (m[:, t].repeat_interleave(heads, 1)[:, :, None] for m in (B, C))
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + (dt[:, t, :, None] * x[:, t])[..., None] * b
        ys.append((state * c).sum(-1))
    return torch.stack(ys, 1), state


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_the_recurrence(backend):
    kwargs = inputs()
    y, state = terrazzo.mamba_chunk_scan_combined(**kwargs, return_final_states=True, backend=backend)
    for found, expected in zip((y, state), recurrence(**kwargs)):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("chunk_size", [1, 16, 256, 1000])
def test_chunk_size_is_a_hint(chunk_size):
    kwargs = inputs(torch.float32) | dict(chunk_size=chunk_size)
    y = terrazzo.mamba_chunk_scan_combined(**kwargs, backend="cpu")
    torch.testing.assert_close(y, terrazzo.mamba_chunk_scan_combined(**inputs(torch.float32), backend="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1e2, 1e4, 1e30])
def test_extreme_decay_gives_no_nan(dtype, step):
    """exp of a large cumulative difference must never be formed: neither outputs nor gradients may be NaN or infinite."""
    kwargs = inputs(torch.float32)
    kwargs["dt"][:, ::7] = step
    kwargs["x"][:, ::7] /= step  # dt x stays of order one
    kwargs = {k: v.to(dtype) if k in ("x", "B", "C") else v for k, v in kwargs.items()}
    results = {}
    for backend in ("cpu", "reference"):
        leaves = {k: v.detach().clone().requires_grad_() for k, v in kwargs.items() if k != "chunk_size"}
        y, state = terrazzo.mamba_chunk_scan_combined(**leaves, chunk_size=64, return_final_states=True, backend=backend)
        results[backend] = (y, state, *torch.autograd.grad(y.float().sum() + state.sum(), list(leaves.values())))
    for found, expected in zip(results["cpu"], results["reference"]):
        assert found.isfinite().all()
        if expected.isfinite().all():
            scale = expected.abs().max().item()
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * scale if dtype == torch.bfloat16 else 1e-4 * scale)


@pytest.mark.parametrize("split", [1, 33, 64, 89])
def test_two_halves_with_states_equal_one_run(split):
    kwargs = inputs(torch.float32)
    whole, last = terrazzo.mamba_chunk_scan_combined(**kwargs, return_final_states=True)

    def part(cut, **states):
        sliced = {k: v[:, cut] if k in ("x", "dt", "B", "C") else v for k, v in kwargs.items()}
        return terrazzo.mamba_chunk_scan_combined(**sliced, return_final_states=True, **states)

    first, state = part(slice(0, split))
    second, final = part(slice(split, None), initial_states=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final, last, rtol=1e-4, atol=1e-5)


def test_decoding_continues_the_scan_and_the_convolution():
    """Prefill, then single steps from its states, equals one long run."""
    kwargs = inputs(torch.float32, L=40)
    whole = terrazzo.mamba_chunk_scan_combined(**kwargs)
    short = {k: v[:, :32] if k in ("x", "dt", "B", "C") else v for k, v in kwargs.items()}
    _, state = terrazzo.mamba_chunk_scan_combined(**short, return_final_states=True)
    H, P, N = SHAPE["H"], SHAPE["P"], SHAPE["N"]
    A = kwargs["A"][:, None, None].expand(H, P, N)
    for t in range(32, 40):
        dt = kwargs["dt"][:, t, :, None].expand(-1, -1, P)
        y = terrazzo.selective_state_update(state, kwargs["x"][:, t], dt, A, kwargs["B"][:, t], kwargs["C"][:, t])
        torch.testing.assert_close(y, whole[:, t], rtol=1e-4, atol=1e-5)
    x, weight = torch.randn(2, 12, 20), torch.randn(12, 4)
    whole = terrazzo.causal_conv1d_fn(x, weight, activation="silu")
    _, conv_state = terrazzo.causal_conv1d_fn(x[:, :, :15], weight, return_final_states=True)
    for t in range(15, 20):
        torch.testing.assert_close(terrazzo.causal_conv1d_update(x[:, :, t], conv_state, weight, None, "silu"), whole[:, :, t])


def test_packed_rows_equal_separate_rows():
    """seq_idx and cu_seqlens give the numbers of the sequences run alone, gradients included."""
    kwargs = inputs(torch.float64, B=1, L=60)
    ends = [0, 7, 8, 50, 60]
    seq_idx = torch.tensor([[i for i, (a, b) in enumerate(zip(ends, ends[1:])) for _ in range(b - a)]], dtype=torch.int32)
    x = kwargs.pop("x").requires_grad_()
    alone = torch.cat([terrazzo.mamba_chunk_scan_combined(x[:, a:b], **{k: v[:, a:b] if k in ("dt", "B", "C") else v for k, v in kwargs.items()})
                       for a, b in zip(ends, ends[1:])], 1)
    weight = torch.randn_like(alone)
    (expected,) = torch.autograd.grad(alone, x, weight)
    for packing in (dict(seq_idx=seq_idx), dict(cu_seqlens=torch.tensor(ends, dtype=torch.int32))):
        y = terrazzo.mamba_chunk_scan_combined(x, **kwargs, **packing)
        torch.testing.assert_close(y, alone)
        torch.testing.assert_close(torch.autograd.grad(y, x, weight)[0], expected)


@pytest.mark.parametrize("width, offset", [(4, 1), (5, 1), (1200, 3)], ids=["beside others", "at odd strides", "streamed past the caches"])
@pytest.mark.parametrize("P", [16, 6])
def test_into_some_heads_of_a_larger_tensor(width, offset, P):
    """The bits of a scan of these heads alone land there, forward and backward; the other heads stay as they are."""
    ops, k = torch.ops.terrazzo, inputs(torch.float32, L=130, H=2, G=1, P=P)
    ids = torch.zeros(2, 130, dtype=torch.int32)
    ids[0, 70:], ids[1, 100:] = 1, -1
    operands, states = (k["x"], k["dt"], k["A"], k["B"], k["C"], None), torch.randn(2, 2, P, 5)
    options = None, states, ids, None, True, 0.0, 9.0
    large = torch.full((2, 131, width, P), 7.0)[:, 1:]
    y, ends = ops.chunk_scan_fwd(*operands, None, *options, True)
    torch.testing.assert_close(ops.chunk_scan_fwd_into(large[:, :, offset : offset + 2], *operands, None, *options, True), ends, rtol=0, atol=0)
    torch.testing.assert_close(large[:, :, offset : offset + 2], y, rtol=0, atol=0)
    dx, *others = ops.chunk_scan_bwd(y, ends, *operands, *options)
    for found, expected in zip(ops.chunk_scan_bwd_into(large[:, :, offset - 1 : offset + 1], y, ends, *operands, *options), others, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(large[:, :, offset - 1 : offset + 1], dx, rtol=0, atol=0)
    torch.testing.assert_close(large[:, :, offset + 1], y[:, :, 1], rtol=0, atol=0)
    assert (large[:, :, : offset - 1] == 7).all() and (large[:, :, offset + 2 :] == 7).all()


@pytest.mark.parametrize("y, why", [
    (torch.empty(2, 90, 3, 6), "y must have shape"),
    (torch.empty(2, 90, 4, 6, dtype=torch.float64), "y must have the dtype of x"),
    (torch.empty(2, 90, 6, 4).mT, "the heads of y must be contiguous"),
    (torch.empty(2, 90, 4, 7)[..., :6], "the heads of y must be contiguous"),
])  # fmt: skip
def test_what_a_scan_is_not_written_into(y, why):
    k = inputs(torch.float32)
    with pytest.raises(RuntimeError, match=f"terrazzo.mamba_chunk_scan_combined: {why}"):
        torch.ops.terrazzo.chunk_scan_fwd_into(y, k["x"], k["dt"], k["A"], k["B"], k["C"], *[None] * 6, True, 0.0, 9.0, False)
