"""What the case list does not show of the convolution's CUDA kernels: strides, what must not leak, offsets that make no sense."""
import pytest
import terrazzo
import torch
from terrazzo.reference import causal_conv1d as reference

from tools.emulator import NAMESPACE

pytestmark = pytest.mark.usefixtures("emulator")
both_layouts = pytest.mark.parametrize("channel_last", [True, False], ids=("channel_last", "channel_first"))
packings = pytest.mark.parametrize("packing", ["seq_idx", "cu_seqlens"])


def ops():
    return getattr(torch.ops, NAMESPACE)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def drawn(*shape, channel_last=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return x.transpose(1, 2).contiguous().transpose(1, 2) if channel_last else x


def test_no_unit_stride():
    x = drawn(2, 12, 18)[:, ::2, ::2]
    weight, bias = drawn(6, 8)[:, ::2], drawn(12)[::2]
    close(terrazzo.causal_conv1d_fn(x, weight, bias, backend="cuda"), terrazzo.causal_conv1d_fn(x, weight, bias, backend="reference"))


@both_layouts
@pytest.mark.parametrize("slopes", ["other layout", "expanded"])
def test_dy_in_any_strides(channel_last, slopes):
    x, weight = drawn(2, 8, 16, channel_last=channel_last), drawn(8, 4)
    dy = drawn(2, 8, 16, channel_last=not channel_last) if slopes == "other layout" else drawn(1, 1, 1).expand(2, 8, 16)
    found = ops().causal_conv1d_bwd(dy, x, weight, None, None, None, None, None, True)[:2]
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    reference.causal_conv1d_fn(*leaves, None, None, None, None, False, True)[0].backward(dy)
    for got, leaf in zip(found, leaves):
        close(got, leaf.grad)


def test_states_of_another_dtype():
    """Initial states are rounded to x's dtype, wherever they are read."""
    x, weight, states = drawn(2, 6, 3).bfloat16(), drawn(6, 4), drawn(2, 6, 3)
    found, expected = (terrazzo.causal_conv1d_fn(x, weight, initial_states=states, return_final_states=True, backend=b) for b in ("cuda", "reference"))
    for got, want in zip(found, expected):
        close(got, want, 1e-2)


@both_layouts
def test_runs_inside_sequences(channel_last):
    """seq_idx and cu_seqlens together: each range of cu_seqlens is split again. Every gradient."""
    ids = torch.tensor([[0, 0, 1, 1, 1, 1, -1, -1, -1, 2, 2, 2, -1, -1, -1, 3]], dtype=torch.int32)
    cu = torch.tensor([0, 4, 4, 8, 13, 15, 16], dtype=torch.int32)
    args = drawn(1, 8, 16, channel_last=channel_last), drawn(8, 4), drawn(8), drawn(6, 8, 3)
    dy, dfinal = drawn(1, 8, 16) + 1, drawn(6, 8, 3) + 1
    x, weight, bias, states = (t.clone().requires_grad_() for t in args)
    y, final = ops().causal_conv1d_fwd(args[0], weight.detach(), args[2], ids, cu, args[3], True, True)
    want, want_final = reference.causal_conv1d_fn(x, weight, bias, ids, cu, states, True, True)
    close(y, want)
    close(final, want_final)
    torch.autograd.backward([want, want_final], [dy, dfinal])
    found = ops().causal_conv1d_bwd(dy, args[0], args[1], args[2], ids, cu, args[3], dfinal, True)
    for got, leaf in zip(found, (x, weight, bias, states)):
        close(got, leaf.grad)


@both_layouts
@packings
def test_nothing_crosses_a_boundary(packing, channel_last):
    """Not even NaN times zero."""
    L, cut = 24, 9
    x, dy, weight = drawn(1, 8, L, channel_last=channel_last), drawn(1, 8, L), drawn(8, 4)
    x[:, :, cut:] = dy[:, :, cut:] = float("nan")
    ids = torch.tensor([[0] * cut + [1] * (L - cut)], dtype=torch.int32) if packing == "seq_idx" else None
    cu = torch.tensor([0, cut, L], dtype=torch.int32) if packing == "cu_seqlens" else None
    assert ops().causal_conv1d_fwd(x, weight, None, ids, cu, None, False, True)[0][:, :, :cut].isfinite().all()
    assert ops().causal_conv1d_bwd(dy, x, weight, None, ids, cu, None, None, True)[0][:, :, :cut].isfinite().all()


@both_layouts
def test_padding_may_hold_anything(channel_last):
    ids = torch.tensor([[0] * 6 + [-1] * 10], dtype=torch.int32)
    x, dy, weight = drawn(1, 8, 16, channel_last=channel_last), drawn(1, 8, 16), drawn(8, 4)
    x[:, :, 6:] = dy[:, :, 6:] = float("nan")
    y, final = ops().causal_conv1d_fwd(x, weight, None, ids, None, None, True, True)
    dx, dweight, *_ = ops().causal_conv1d_bwd(dy, x, weight, None, ids, None, None, None, True)
    assert (y[:, :, 6:] == 0).all() and (dx[:, :, 6:] == 0).all()
    assert y.isfinite().all() and final.isfinite().all() and dx.isfinite().all() and dweight.isfinite().all()


@both_layouts
@pytest.mark.parametrize("cu", [[0, 50, 16], [0, 9, 4, 16], [-7, 3, 99], [12, 2, 0], [5, 5, 5]])
def test_offsets_that_make_no_sense_stay_in_bounds(cu, channel_last):
    """Nobody reads them on the host: results are whatever they are, in bounds (mode sanitize) and written."""
    cu = torch.tensor(cu, dtype=torch.int32)
    x, weight, states = drawn(1, 8, 16, channel_last=channel_last), drawn(8, 4), drawn(len(cu) - 1, 8, 3)
    found = [*ops().causal_conv1d_fwd(x, weight, None, None, cu, states, True, True),
             *ops().causal_conv1d_bwd(x, x, weight, weight[:, 0], None, cu, states, states, True),
             ops().causal_conv1d_varlen_states(x[0].t(), cu, 5)]
    assert all(t.isfinite().all() for t in found)


def test_update_with_slots_out_of_range():
    """A slot that isn't there is padding, as -1 is."""
    state = drawn(3, 5, 4)
    before, x = state.clone(), drawn(4, 5, 1)
    y = ops().causal_conv1d_update(x, state, drawn(5, 4), None, True, None, torch.tensor([3, 1, -9, 99], dtype=torch.int32))
    assert (y[[0, 2, 3]] == 0).all() and (y[1] != 0).all()
    assert torch.equal(state[[0, 2]], before[[0, 2]]) and torch.equal(state[1, :, 3], x[1, :, 0])


def test_update_longer_than_the_window():
    for state_len, L, cache in ((3, 21, None), (37, 20, None), (20, 3, None), (5, 21, 7), (37, 18, 30)):
        states = [drawn(2, 5, 2 * state_len)[:, :, ::2] for _ in range(2)]
        seqlens = None if cache is None else torch.tensor([cache, cache + 1], dtype=torch.int32)
        args = drawn(2, 5, 2 * L)[:, :, ::2], drawn(5, 4), None, "silu", seqlens, torch.tensor([1, 0], dtype=torch.int32)
        found, expected = (terrazzo.causal_conv1d_update(args[0], state, *args[1:], backend=backend) for state, backend in zip(states, ("cuda", "reference")))
        close(found, expected)
        close(*states)


@pytest.mark.parametrize("D, dtype", [(16, torch.bfloat16), (8, torch.float32), (13, torch.float16)])
def test_varlen_states_of_any_stride(D, dtype):
    cu = torch.tensor([0, 3, 3, 13], dtype=torch.int32)
    for x in (drawn(13, D), drawn(D, 13).t(), drawn(13, D + 16)[:, 16:], drawn(13, D + 3)[:, 3:]):
        x = x.to(dtype)
        found = ops().causal_conv1d_varlen_states(x, cu, 5)
        assert torch.equal(found, reference.causal_conv1d_varlen_states(x, cu, 5))
