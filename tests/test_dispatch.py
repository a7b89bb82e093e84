"""Which backend serves a call, who may decide it, and what is said when one cannot run."""
import logging

import pytest
import terrazzo
import torch
from terrazzo import dispatch


def conv_args(dtype=torch.float32, width=4):
    return torch.randn(2, 8, 10, dtype=dtype), torch.randn(8, width, dtype=dtype)


def ran():
    return terrazzo.counters().get("causal_conv1d_fn", {})


def test_order_of_deciders(monkeypatch):
    terrazzo.reset_counters()
    x, w = conv_args()
    assert terrazzo.pick("causal_conv1d_fn", x, w) == ("cpu", "preferred on cpu")
    monkeypatch.setenv("TERRAZZO_BACKEND", "cpu")
    monkeypatch.setenv("TERRAZZO_BACKEND_CAUSAL_CONV1D", "reference")
    assert terrazzo.pick("causal_conv1d_fn", x, w) == ("reference", "asked for by the TERRAZZO_BACKEND_CAUSAL_CONV1D")
    monkeypatch.setenv("TERRAZZO_BACKEND_CAUSAL_CONV1D_FN", "cpu")
    assert terrazzo.pick("causal_conv1d_fn", x, w)[0] == "cpu"
    with terrazzo.use_backend("reference"):
        assert terrazzo.pick("causal_conv1d_fn", x, w) == ("reference", "asked for by the use_backend")
        with terrazzo.use_backend("cpu", op="causal_conv1d"):
            assert terrazzo.pick("causal_conv1d_fn", x, w)[0] == "cpu"
            assert terrazzo.pick("causal_conv1d_fn", x, w, backend="reference")[0] == "reference"
            assert terrazzo.pick("rmsnorm_gated", x)[0] == "reference"
    assert terrazzo.pick("causal_conv1d_fn", x, w)[0] == "cpu"


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_forced_backend_runs(how, monkeypatch):
    x, w = conv_args()
    terrazzo.reset_counters()
    if how == "argument":
        terrazzo.causal_conv1d_fn(x, w, backend="reference")
    elif how == "context":
        with terrazzo.use_backend("reference", op="causal_conv1d_fn"):
            terrazzo.causal_conv1d_fn(x, w)
    else:
        monkeypatch.setenv("TERRAZZO_BACKEND", "reference")
        terrazzo.causal_conv1d_fn(x, w)
    assert ran() == {"reference": 1}


def test_forced_backend_that_cannot_run_raises(monkeypatch):
    x, w = conv_args(width=6)
    with pytest.raises(terrazzo.BackendError, match=r"causal_conv1d_fn: backend 'cpu' \(asked for by the backend argument\) cannot run: .*widths 2 to 4, got 6"):
        terrazzo.causal_conv1d_fn(x, w, backend="cpu")
    monkeypatch.setenv("TERRAZZO_BACKEND", "cuda")
    with pytest.raises(terrazzo.BackendError, match="TERRAZZO_BACKEND.*CUDA kernels"):
        terrazzo.causal_conv1d_fn(*conv_args())
    monkeypatch.setenv("TERRAZZO_BACKEND", "fastest")
    with pytest.raises(ValueError, match="TERRAZZO_BACKEND must be one of"):
        terrazzo.causal_conv1d_fn(*conv_args())


def test_automatic_choice_falls_back_and_logs_once(caplog):
    dispatch._logged.clear()
    terrazzo.reset_counters()
    with caplog.at_level(logging.WARNING, logger="terrazzo"):
        for _ in range(3):
            terrazzo.causal_conv1d_fn(*conv_args(width=6))
    assert ran() == {"reference": 3}
    assert [r.message for r in caplog.records if "widths 2 to 4, got 6" in r.message] == [r.message for r in caplog.records]
    assert len(caplog.records) == 1


def test_can_run_gives_reasons():
    x, w = conv_args()
    assert terrazzo.can_run("causal_conv1d_fn", "cpu", x, w) is None
    assert terrazzo.can_run("causal_conv1d_fn", "reference", x, w) is None
    assert "CUDA kernels" in terrazzo.can_run("causal_conv1d_fn", "cuda", x, w)
    assert "meta" in terrazzo.can_run("causal_conv1d_fn", "cpu", x.to("meta"), w.to("meta"))
    with pytest.raises(ValueError, match="unknown op"):
        terrazzo.can_run("softmax", "cpu", x)
    with pytest.raises(ValueError, match="unknown op"), terrazzo.use_backend("cpu", op="softmax"):
        pass


def test_decode_with_gradients_takes_the_reference():
    """The native decoding steps have no gradient: under grad mode the reference serves them, and differentiates."""
    terrazzo.reset_counters()
    x = torch.randn(2, 8, requires_grad=True)
    state, w = torch.randn(2, 8, 4), torch.randn(8, 4)
    terrazzo.causal_conv1d_update(x, state, w).sum().backward()
    assert x.grad is not None and terrazzo.counters() == {"causal_conv1d_update": {"reference": 1}}
    with torch.no_grad():
        terrazzo.causal_conv1d_update(x, state, w)
    assert terrazzo.counters()["causal_conv1d_update"] == {"reference": 1, "cpu": 1}
    with pytest.raises(terrazzo.BackendError, match="no_grad"):
        terrazzo.causal_conv1d_update(x, state, w, backend="cpu")


def test_second_derivative_is_refused():
    x, w = conv_args(torch.float64)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(terrazzo.causal_conv1d_fn(x, w, activation="silu").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dx.sum().backward()


def test_other_devices_use_shapes_only():
    x, w = conv_args()
    out = terrazzo.causal_conv1d_fn(x.to("meta"), w.to("meta"))
    assert out.shape == x.shape and out.device.type == "meta"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", ["local_attention", "patch_cross_attention"])
def test_wide_heads_are_refused_before_a_launch(op, backend):
    q = torch.empty(1, 2, 1, 257)
    assert "heads of 257 channels are over the 256 of the GPU kernels" in dispatch.OPS[op].limits[backend](q, q, q)
    assert dispatch.OPS[op].limits[backend](q[..., :256], q[..., :256], q[..., :256]) is None
