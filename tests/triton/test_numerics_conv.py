"""What the case list does not show of the convolution and of the state update: strides, mixed dtypes, what must not leak."""
import pytest
import terrazzo
import torch
from terrazzo.reference import causal_conv1d as reference

OPS = torch.ops.terrazzo_triton


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_no_unit_stride():
    x = drawn(2, 12, 18)[:, ::2, ::2]
    weight, bias = drawn(6, 8)[:, ::2], drawn(12)[::2]
    close(terrazzo.causal_conv1d_fn(x, weight, bias, backend="triton"), terrazzo.causal_conv1d_fn(x, weight, bias, backend="reference"))


def test_states_of_another_dtype():
    """Initial states are rounded to x's dtype, wherever they are read."""
    x, weight, states = drawn(2, 6, 3).bfloat16(), drawn(6, 4), drawn(2, 6, 3)
    found = terrazzo.causal_conv1d_fn(x, weight, initial_states=states, return_final_states=True, backend="triton")
    expected = terrazzo.causal_conv1d_fn(x, weight, initial_states=states, return_final_states=True, backend="reference")
    for got, want in zip(found, expected):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_runs_inside_sequences():
    """seq_idx and cu_seqlens together: each range of cu_seqlens is split again."""
    ids = torch.tensor([[0, 0, 1, 1, 1, 1, -1, -1, -1, 2, 2, 2, -1]], dtype=torch.int32)
    cu = torch.tensor([0, 4, 4, 8, 13], dtype=torch.int32)
    x, weight, states = drawn(1, 5, 13), drawn(5, 4), drawn(4, 5, 3)
    y, final = OPS.causal_conv1d_fwd(x, weight, None, ids, cu, states, True, True)
    want, want_final = reference.causal_conv1d_fn(x, weight, None, ids, cu, states, True, True)
    close(y, want)
    close(final, want_final)


@pytest.mark.parametrize("packing", ["seq_idx", "cu_seqlens"])
def test_nothing_crosses_a_boundary(packing):
    """Not even NaN times zero."""
    L, cut = 20, 9
    x, dy, weight = drawn(1, 4, L), drawn(1, 4, L), drawn(4, 4)
    x[:, :, cut:] = float("nan")
    dy[:, :, cut:] = float("nan")
    ids = torch.tensor([[0] * cut + [1] * (L - cut)], dtype=torch.int32) if packing == "seq_idx" else None
    cu = torch.tensor([0, cut, L], dtype=torch.int32) if packing == "cu_seqlens" else None
    assert OPS.causal_conv1d_fwd(x, weight, None, ids, cu, None, False, True)[0][:, :, :cut].isfinite().all()
    assert OPS.causal_conv1d_bwd(dy, x, weight, None, ids, cu, None, None, True)[0][:, :, :cut].isfinite().all()


def test_padding_may_hold_anything():
    ids = torch.tensor([[0] * 6 + [-1] * 5], dtype=torch.int32)
    x, dy, weight = drawn(1, 4, 11), drawn(1, 4, 11), drawn(4, 4)
    x[:, :, 6:] = dy[:, :, 6:] = float("nan")
    y, final = OPS.causal_conv1d_fwd(x, weight, None, ids, None, None, True, True)
    dx, dweight, *_ = OPS.causal_conv1d_bwd(dy, x, weight, None, ids, None, None, None, True)
    assert (y[:, :, 6:] == 0).all() and (dx[:, :, 6:] == 0).all()
    assert y.isfinite().all() and final.isfinite().all() and dx.isfinite().all() and dweight.isfinite().all()


def test_wide_filters_are_refused():
    with pytest.raises(terrazzo.BackendError, match="widths 2 to 4, got 5"):
        terrazzo.causal_conv1d_fn(drawn(1, 4, 9), drawn(4, 5), backend="triton")


def test_update_longer_than_the_window():
    """More new positions, and more columns, than a block holds; strides everywhere."""
    for state_len, L, cache in ((3, 21, None), (37, 20, None), (20, 3, None), (5, 21, 7), (37, 18, 30)):
        states = [drawn(2, 5, 2 * state_len)[:, :, ::2] for _ in range(2)]
        seqlens = None if cache is None else torch.tensor([cache, 0, cache + 1, 0], dtype=torch.int32)[::2]
        args = drawn(2, 5, 2 * L)[:, :, ::2], drawn(5, 4), None, "silu", seqlens, torch.tensor([1, 9, 0, 9], dtype=torch.int32)[::2]
        found, expected = (terrazzo.causal_conv1d_update(args[0], state, *args[1:], backend=backend)
                           for state, backend in zip(states, ("triton", "reference")))
        close(found, expected)
        close(*states)


@pytest.mark.parametrize("op", ["causal_conv1d_update", "selective_state_update"])
def test_decoding_has_no_gradient(op):
    x = drawn(2, 4).requires_grad_()
    args = (drawn(2, 4, 3), drawn(4, 4)) if op == "causal_conv1d_update" else (x, drawn(2, 4), drawn(4, 8), drawn(2, 8), drawn(2, 8))
    with pytest.raises(terrazzo.BackendError, match="no gradient on GPUs"):
        getattr(terrazzo, op)(x if op == "causal_conv1d_update" else drawn(2, 4, 8), *args, backend="triton")


def test_state_of_any_stride_and_size():
    """N past a block and without unit stride; a decay of its own for each element beside one for each head."""
    B, H, P, N = 2, 2, 3, 300
    for A in (-drawn(H, P, N).abs(), -drawn(H, 1, 1).abs().expand(H, P, N)):
        states = [drawn(B, H, N, P).transpose(2, 3) for _ in range(2)]
        dt = drawn(B, H, 1).expand(B, H, P) * 1
        args = drawn(B, H, P), dt, A, drawn(B, H, N), drawn(B, H, N)
        found, expected = (terrazzo.selective_state_update(state, *args, dt_softplus=True, backend=backend)
                           for state, backend in zip(states, ("triton", "reference")))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        close(*states)


def test_softplus_far_from_zero():
    """exp(x) below the rounding of 1 and above what float32 holds."""
    dt = torch.tensor([-40.0, -20.0, -1.0, 0.0, 30.0, 200.0])[:, None]
    states = [torch.zeros(6, 1, 1), torch.zeros(6, 1, 1)]
    one = torch.ones(6, 1)
    for state, backend in zip(states, ("triton", "reference")):
        terrazzo.selective_state_update(state, one, dt, -torch.ones(1, 1), one, one, dt_softplus=True, backend=backend)
    torch.testing.assert_close(*states, rtol=1e-5, atol=0)


def test_a_skip_whose_channels_lie_gigabytes_apart():
    """Offsets of D may be beyond 32 bits; the backward reads it after a copy. (Of the memory only these pages are touched.)"""
    H, P, apart = 2, 5, 2**29
    D = torch.empty((P - 1) * apart + H).as_strided((H, P), (1, apart))
    D.copy_(drawn(H, P))
    args = [drawn(1, 7, H, P), drawn(1, 7, H), -drawn(H).abs(), drawn(1, 7, 1, 3), drawn(1, 7, 1, 3)]

    def run(D, backend):
        leaves = [t.clone().requires_grad_() for t in args]
        y = terrazzo.mamba_chunk_scan_combined(*leaves, 8, D=D, backend=backend)
        return y, *torch.autograd.grad(y.sum(), leaves)

    for found, expected in zip(run(D, "triton"), run(D.contiguous(), "reference"), strict=True):
        close(found, expected)
