"""Packed weights: the same products as from the weights themselves, int8 within its stated error, and no gradients by mistake."""
import pytest
import terrazzo
import torch
from terrazzo import cases
from terrazzo.tolerance import check

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GROUPED = [case for case in cases.CASES if case.op == "grouped_mm"]
EXPERTS = [case for case in cases.CASES if case.op == "fused_experts"]
TRANSPOSED = ("transposed", "gpt_oss", "interleaved")


def named(found):
    return pytest.mark.parametrize("case", found, ids=[case.name for case in found])


def dtypes(weight_format):
    return [dtype for dtype in DTYPES if weight_format is None or dtype != torch.float64]


def packed_args(case, dtype, weight_format):
    kwargs = case.make(dtype)
    weights = [kwargs.pop(name) for name in ("w_gate_up", "w_down", "w_up")]
    kwargs.pop("transposed", None)
    packed = terrazzo.pack_expert_weights(
        weights[0], weights[1], w_up=weights[2], interleaved=kwargs["interleaved"], transposed=True if case.name in TRANSPOSED else None,
        num_experts=kwargs["num_experts"], weight_format=weight_format,
    )  # fmt: skip
    return dict(w_gate_up=packed, w_down=None, **kwargs)


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("weight_format", [None, "int8"])
@named(GROUPED)
def test_grouped_mm(case, weight_format):
    for dtype in dtypes(weight_format):
        kwargs = case.make(dtype)
        packed = terrazzo.pack_weight(kwargs["b"], weight_format)
        if weight_format is None:
            assert torch.equal(packed.unpack(), kwargs["b"])
        dense = kwargs | dict(b=packed.unpack())
        exact = terrazzo.grouped_mm(**{k: wide(v) for k, v in dense.items()}, backend="reference")
        verdict = check(terrazzo.grouped_mm(**kwargs | dict(b=packed), backend="cpu"), exact, terrazzo.grouped_mm(**dense, backend="reference"))
        assert verdict.ok, verdict.why


@pytest.mark.parametrize("weight_format", [None, "int8"])
@named(EXPERTS)
def test_fused_experts(case, weight_format):
    for dtype in dtypes(weight_format):
        kwargs = packed_args(case, dtype, weight_format)
        packed = kwargs["w_gate_up"]
        views = [None if w is None else w.unpack().mT for w in (packed.w1, packed.w_up, packed.w2)]
        dense = kwargs | dict(w_gate_up=views[0], w_up=views[1], w_down=views[2], transposed=False, num_experts=None)
        if packed.w_up is not None and dense["bias_gate_up"] is not None and dense["bias_up"] is None:
            dense["bias_gate_up"], dense["bias_up"] = dense["bias_gate_up"].chunk(2, 1)
        exact = terrazzo.fused_experts(**{k: wide(v) for k, v in dense.items()}, backend="reference")
        verdict = check(terrazzo.fused_experts(**kwargs, backend="cpu"), exact, terrazzo.fused_experts(**dense, backend="reference"))
        assert verdict.ok, (dtype, verdict.why)
        same = terrazzo.fused_experts(**kwargs, backend="reference")
        torch.testing.assert_close(same, terrazzo.fused_experts(**dense, backend="reference"), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_within_its_step(dtype):
    w = torch.randn(3, 40, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    w[1, :, 5] = 0
    packed = terrazzo.pack_weight(w, "int8")
    error = (packed.unpack() - w.float()).abs()
    step = w.float().abs().amax(1, keepdim=True) / 127
    assert (error <= step * 0.5001).all()
    assert error.max() > 0 and not packed.unpack()[1, :, 5].any()
    assert packed.nbytes < w.nbytes


def test_negative_control():
    """Two experts swapped before packing must be seen."""
    kwargs = next(case for case in GROUPED if case.name == "several_tiles").make(torch.float32)
    right = terrazzo.grouped_mm(**kwargs)
    swapped = terrazzo.grouped_mm(**kwargs | dict(b=terrazzo.pack_weight(kwargs["b"][[1, 0, 2]])))
    assert not check(swapped, right.double(), right).ok


@pytest.mark.parametrize("rows", [1, 2, 5, 9, 200])
@pytest.mark.parametrize("weight_format", [None, "int8"])
def test_independent_of_thread_count(rows, weight_format):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2 * rows, 300, generator=g), torch.randn(2, 300, 1000, generator=g)
    packed, offs, threads = terrazzo.pack_weight(b, weight_format), torch.tensor([rows, 2 * rows], dtype=torch.int32), torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(terrazzo.grouped_mm(a, packed, offs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_kernel_ran_and_compiles():
    kwargs = packed_args(next(case for case in EXPERTS if case.name == "gpt_oss"), torch.float32, "int8")
    terrazzo.reset_counters()
    eager = terrazzo.fused_experts(**kwargs)
    assert terrazzo.counters()["fused_experts"] == {"cpu": 1}
    compiled = torch.compile(lambda: terrazzo.fused_experts(**kwargs) * 2, fullgraph=True, backend="aot_eager")()
    assert torch.equal(compiled, eager * 2)
    w, offs = terrazzo.pack_weight(torch.randn(2, 4, 5)), torch.tensor([1, 3], dtype=torch.int32)
    torch.library.opcheck(torch.ops.terrazzo.grouped_gemm_packed.default, (torch.randn(3, 4), w.data, None, offs, None, 5))


A, OFFS = torch.randn(6, 4), torch.tensor([2, 2, 6], dtype=torch.int32)
W = torch.randn(3, 4, 5)


@pytest.mark.parametrize("call, message", [
    (lambda: terrazzo.pack_weight(W[0]), "pack_weight.*weight must"),
    (lambda: terrazzo.pack_weight(W, "int4"), "weight_format must be None or 'int8', got 'int4'"),
    (lambda: terrazzo.pack_weight(W.double(), "int8"), "got float64"),
    (lambda: terrazzo.pack_weight(W / 0, "int8"), "needs finite weights"),
    (lambda: terrazzo.pack_weight(W.int()), "pack_weight.*weight"),
    (lambda: terrazzo.pack_expert_weights(W, torch.randn(3, 7, 5)), "w_down must have an axis of D"),
    (lambda: terrazzo.grouped_mm(torch.randn(6, 3), terrazzo.pack_weight(W), OFFS), "grouped_mm.*a must"),
    (lambda: terrazzo.grouped_mm(A.double(), terrazzo.pack_weight(W), OFFS), "float64 goes with float64 only"),
    (lambda: terrazzo.grouped_mm(A, terrazzo.pack_weight(W), OFFS[:2]), "offs must"),
    (lambda: terrazzo.grouped_mm(A.clone().requires_grad_(), terrazzo.pack_weight(W), OFFS), "packed b is for inference"),
    (lambda: terrazzo.fused_experts(A, terrazzo.pack_expert_weights(torch.randn(3, 5, 4), torch.randn(3, 4, 5)), W, A[:, :2], torch.zeros(6, 2, dtype=torch.int32)),
     "w_down, w_up and transposed must be None"),
    (lambda: terrazzo.fused_experts(A.clone().requires_grad_(), terrazzo.pack_expert_weights(torch.randn(3, 5, 4), torch.randn(3, 4, 5)), None, A[:, :2],
                                    torch.zeros(6, 2, dtype=torch.int32)), "packed weights are for inference"),
    (lambda: terrazzo.fused_experts(A[:, :3], terrazzo.pack_expert_weights(torch.randn(3, 5, 4), torch.randn(3, 4, 5)), None, A[:, :2],
                                    torch.zeros(6, 2, dtype=torch.int32)), "x must"),
])  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# ---- inside models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_format, far", [(None, 2e-5), ("int8", 0.05)])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "dbrx", "nemotron_h"])
def test_pack_experts(model_type, weight_format, far):
    pytest.importorskip("transformers")
    from tiny_models import make_model, tokens

    model, ids = make_model(model_type), tokens(2, 9)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    with torch.no_grad():
        want = model(ids).logits
        handle = terrazzo.pack_experts(model, weight_format)
        assert handle.nbytes > 0 and list(model.state_dict()) == keys
        got = model(ids).logits
        assert (got - want).abs().max() <= far * want.abs().max()
        if weight_format == "int8":
            assert not torch.equal(got, want)  # the packed weights are what ran
    model(ids).logits.sum().backward()  # on the weights themselves
    assert all(p.grad is not None for name, p in model.named_parameters() if "experts" in name and "bias" not in name)
    handle.undo()
    handle.undo()
    assert [type(m) for m in model.modules()] == classes
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)


def test_changed_weights_are_not_served_from_the_pack(caplog):
    pytest.importorskip("transformers")
    from tiny_models import make_model, tokens

    model, ids = make_model("mixtral"), tokens(1, 5)
    with torch.no_grad(), terrazzo.pack_experts(model, "int8"):
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.mul_(0.5)
        got = model(ids).logits
        assert "changed since they were packed" in caplog.text
        with terrazzo.patch(model):
            assert torch.equal(model(ids).logits, got)


def test_models_without_experts():
    with pytest.raises(ValueError, match="no recipe|no experts|supported"):
        terrazzo.pack_experts(torch.nn.Linear(3, 3))
    with pytest.raises((TypeError, ValueError), match="model must be an nn.Module"):
        terrazzo.pack_experts("mixtral")
