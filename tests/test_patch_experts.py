"""terrazzo.patch on mixtures of experts of any model type, on DBRX and on linear layers: same numbers, and all put back."""
import copy
import inspect
import pickle

import pytest
import terrazzo
import torch
from terrazzo import adapters, native, patching
from terrazzo.recipes import EXPERTS, RECIPES
from test_patch import GROUPED, LOGITS, far, far_gradients, loss_and_gradients, ops_that_ran, run, same_snapshot, snapshot
from tiny_models import EXPERT_MODELS, MODELS, make_model, tokens

transformers = pytest.importorskip("transformers")
from transformers.integrations import moe  # noqa: E402

OWN_GATES = {"hy_v4", "deepseek_v4", "muse_spark"} & EXPERT_MODELS.keys()  # a gate or a norm that fused_experts hasn't
CAUSAL = [key for key, (name, _) in EXPERT_MODELS.items() if name.endswith("ForCausalLM")]
KINDS = ["mixtral", "gpt_oss", "dbrx", "nemotron_h", "glm5_next"]  # plain, clamped, flat, without a gate, with a gate of its own


def every(names):
    return pytest.mark.parametrize("model_type", names)


def expected_ops(model_type):
    return GROUPED if model_type in OWN_GATES | {"glm5_next"} else {"fused_experts"}


def expert_modules(model):
    return [m for m in model.modules() if patching._is_experts(type(m)) or type(m).__name__ == "DbrxExperts"]


def test_the_list_of_types_is_the_installed_one():
    """EXPERTS against transformers' sources: every modeling file that decorates a class of experts."""
    import pathlib

    files = (pathlib.Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    assert sorted(EXPERTS) == sorted(f.parent.name for f in files if "\n@use_experts_implementation" in f.read_text())


@every(EXPERT_MODELS)
def test_logits_and_undo(model_type):
    model, ids = make_model(model_type), tokens(2, 17)
    before = snapshot(model)
    with torch.no_grad():
        want = run(model, ids)
        handle = terrazzo.patch(model)
        terrazzo.reset_counters()
        assert not far(run(model, ids), want, LOGITS)
        assert ops_that_ran() == expected_ops(model_type)
        rows = [row for row in handle.report() if row.op in ("fused_experts", "grouped_mm")]
        assert len(rows) == len(expert_modules(model)) > 0
        assert {(row.op, row.backend) for row in rows} == {(*(expected_ops(model_type) & {"fused_experts", "grouped_mm"}), "cpu")}
        handle.undo()
        assert same_snapshot(snapshot(model), before)
        terrazzo.reset_counters()
        assert torch.equal(run(model, ids), want) and not ops_that_ran()


@every(EXPERT_MODELS)
def test_gradients(model_type):
    model, ids = make_model(model_type).train(), tokens(2, 13)
    torch.manual_seed(5)  # some routers add noise in training
    want_loss, want = loss_and_gradients(model, ids)
    torch.manual_seed(5)
    terrazzo.reset_counters()
    with terrazzo.patch(model):
        loss, got = loss_and_gradients(model, ids)
    assert not far(loss, want_loss, 1e-4)
    assert not far_gradients(got, want)
    assert ops_that_ran() >= {op + "_bwd" for op in expected_ops(model_type) - {"moe_permute"}}


@every(CAUSAL)
def test_greedy_generation(model_type):
    model, ids = make_model(model_type), tokens(2, 7)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    want = model.generate(ids, **options)
    terrazzo.reset_counters()
    with terrazzo.patch(model):
        got = model.generate(ids, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert not far(torch.stack(got.logits), torch.stack(want.logits), 10 * LOGITS)
    assert ops_that_ran() == expected_ops(model_type)


@pytest.mark.parametrize("op, model_type", [("fused_experts", "mixtral"), ("fused_experts", "dbrx"), ("grouped_mm", "glm5_next")])
def test_a_wrong_op_is_caught(op, model_type, monkeypatch):
    true_op = getattr(adapters, op)
    model, ids = make_model(model_type), tokens(2, 13)
    with torch.no_grad():
        want = run(model, ids)
        monkeypatch.setattr(adapters, op, lambda *args, **kwargs: true_op(*args, **kwargs) * 1.01)
        with terrazzo.patch(model):
            assert far(run(model, ids), want, LOGITS)


@every(["mixtral", "gpt_oss", "glm5_next"])
def test_registered_implementation(model_type):
    """experts_implementation="terrazzo", without a patch."""
    model, ids = make_model(model_type), tokens(2, 13)
    patching.register_experts()
    with torch.no_grad():
        want = run(model, ids)
        model.set_experts_implementation("terrazzo")
        terrazzo.reset_counters()
        assert not far(run(model, ids), want, LOGITS)
        assert expected_ops(model_type) <= ops_that_ran()
        model.set_experts_implementation("grouped_mm")
        terrazzo.reset_counters()
        assert torch.equal(run(model, ids), want)
        assert not ops_that_ran() & {"fused_experts", "grouped_mm"}


@every(KINDS)
def test_class_scope(model_type):
    model, ids = make_model(model_type), tokens(2, 13)
    experts = type(expert_modules(model)[0])
    forward = experts.forward
    with torch.no_grad():
        want = run(model, ids)
        with terrazzo.patch(model_type) as handle:
            terrazzo.reset_counters()
            assert not far(run(make_model(model_type), ids), want, LOGITS)
            assert expected_ops(model_type) <= ops_that_ran()
        assert "linear" not in {row.op for row in handle.report()}
        assert experts.forward is forward
        assert torch.equal(run(model, ids), want)


@every(KINDS)
def test_copies_and_pickles(model_type):
    model, ids = make_model(model_type), tokens(1, 9)
    with torch.no_grad(), terrazzo.patch(model):
        patched = run(model, ids)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            terrazzo.reset_counters()
            assert torch.equal(run(other, ids), patched)
            assert expected_ops(model_type) <= ops_that_ran()


@every(["mixtral", "gpt_oss"])
def test_compile(model_type):
    model, ids = make_model(model_type), tokens(2, 9)
    with torch.no_grad():
        want = run(model, ids, use_cache=False)
        terrazzo.patch(model)
        terrazzo.reset_counters()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert not far(run(compiled, ids, use_cache=False), want, LOGITS)
        assert ops_that_ran() == expected_ops(model_type)


def test_the_shared_config_is_left_alone():
    model = make_model("mixtral")
    before = model.config._experts_implementation
    with terrazzo.patch(model):
        assert model.config._experts_implementation == before
        assert {m.config._experts_implementation for m in expert_modules(model)} == {before}


def test_activations_that_fused_experts_has_not_run_between_grouped_products():
    model, ids = make_model("mixtral", hidden_act="mish"), tokens(2, 13)
    with torch.no_grad():
        want = run(model, ids)
        with terrazzo.patch(model) as handle:
            terrazzo.reset_counters()
            assert not far(run(model, ids), want, LOGITS)
            assert ops_that_ran() == GROUPED
    assert any(row.op == "grouped_mm" and row.backend == "cpu" for row in handle.report())


def test_without_a_native_backend_transformers_own_runs(monkeypatch):
    model, ids = make_model("mixtral"), tokens(2, 13)
    with torch.no_grad():
        want = run(model, ids)
        monkeypatch.setattr(terrazzo.native, "available", False)
        monkeypatch.setattr(terrazzo.native, "why_not", "not built")
        with terrazzo.patch(model) as handle:
            terrazzo.dispatch._python_counts.clear()
            assert torch.equal(run(model, ids), want)
            assert not terrazzo.dispatch._python_counts
    rows = [row for row in handle.report() if row.op == "fused_experts"]
    assert rows and all(row.backend == "transformers" and "not built" in row.note for row in rows)


def test_experts_of_other_ranks_contribute_nothing():
    """Expert parallelism: indices of num_experts and above."""
    experts = expert_modules(make_model("mixtral"))[0]
    experts._is_expert_parallel = True
    x, indices = torch.randn(5, 32), torch.tensor([[0, 4], [4, 4], [1, 2], [3, 4], [2, 0]])
    weights = torch.rand(5, 2).masked_fill(indices == 4, 0.0)
    with torch.no_grad():
        want = moe.grouped_mm_experts_forward(experts, x, indices, weights)
        assert not far(adapters.experts(moe.grouped_mm_experts_forward, "cpu")(experts, x, indices, weights), want, LOGITS)
        assert not far(adapters._grouped_experts(experts, x, indices, weights, "cpu"), want, LOGITS)


# ---- linear layers -------------------------------------------------------------------------------------------


@pytest.fixture
def no_bf16_instructions(monkeypatch):
    monkeypatch.setattr(adapters, "TORCH_IS_FAST", {})


def half_model(model_type="mixtral", dtype=torch.bfloat16):
    return make_model(model_type, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_layers_in_16_bits(dtype, no_bf16_instructions):
    model, ids = half_model(dtype=dtype), tokens(2, 13)
    before = snapshot(model)
    with torch.no_grad():
        exact = run(copy.deepcopy(model).float(), ids)
        theirs = run(model, ids)
        with terrazzo.patch(model, ops="linear") as handle:
            terrazzo.reset_counters()
            ours = run(model, ids)
            linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
            assert terrazzo.counters() == {"linear": {"cpu": len(linears)}}
        assert same_snapshot(snapshot(model), before)
        assert torch.equal(run(model, ids), theirs)
    error = lambda out: (out.float() - exact).square().mean().sqrt().item()
    assert ours.dtype == dtype and error(ours) <= 1.25 * error(theirs)
    rows = handle.report()
    assert [row.backend for row in rows] == ["cpu"] * len(linears)
    assert str(rows).splitlines()[2].split() == ["nn.Linear", f"x{len(linears)}", "linear", "cpu"]


def test_linear_gradients_and_hooks(no_bf16_instructions):
    layer = torch.nn.Linear(24, 16).bfloat16()
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    x = torch.randn(3, 5, 24).bfloat16().requires_grad_()

    def gradients(layer, x):
        layer.zero_grad()
        (layer(x).float() * torch.arange(16.0)).sum().backward()
        grads = [x.grad.float(), layer.weight.grad.float(), layer.bias.grad.float()]
        x.grad = None
        return grads

    want = gradients(layer, x)
    with terrazzo.patch(layer) as handle:
        assert handle.active
        terrazzo.reset_counters()
        for ours, theirs in zip(gradients(layer, x), want):
            assert not far(ours, theirs, 2e-2)  # bfloat16 holds 8 bits
        assert ops_that_ran() == {"linear", "linear_bwd"}
    assert len(seen) == 2 and type(layer) is torch.nn.Linear


def test_tied_weights_stay_tied(no_bf16_instructions):
    model, ids = make_model("qwen2_moe", torch.bfloat16, tie_word_embeddings=True), tokens(1, 7)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    with torch.no_grad(), terrazzo.patch(model) as handle:
        run(model, ids)
        assert head.weight is embedding.weight
    assert handle.report() and type(head) is torch.nn.Linear


def test_linear_layers_compile(no_bf16_instructions):
    layer = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Linear(16, 8)).bfloat16()
    x = torch.randn(3, 24).bfloat16()
    with torch.no_grad(), terrazzo.patch(layer):
        want = layer(x)
        terrazzo.reset_counters()
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), want)
        assert terrazzo.counters() == {"linear": {"cpu": 2}}


def test_linear_layers_that_stay(monkeypatch):
    half, single = torch.nn.Linear(8, 8).bfloat16(), torch.nn.Linear(8, 8)
    monkeypatch.setattr(adapters, "TORCH_IS_FAST", dict.fromkeys(adapters.HALF, adapters.AMX))
    with pytest.raises(ValueError, match="its linear layers: torch uses this CPU's AMX"):
        terrazzo.patch(half)
    assert terrazzo.patch(half, backend="cpu", dry_run=True).report()[0].backend == "cpu"  # asked for by name
    monkeypatch.setattr(adapters, "TORCH_IS_FAST", {})
    with pytest.raises(ValueError, match="its linear layers: float32 stays with torch"):
        terrazzo.patch(single)
    hooked = torch.nn.Linear(8, 8).bfloat16()
    hooked.forward = lambda input: input
    both = torch.nn.Sequential(half, single, hooked)
    with terrazzo.patch(both) as handle:
        notes = {row.module: (row.backend, row.note) for row in handle.report()}
        assert notes == {"0": ("cpu", ""), "1": ("transformers", "float32 stays with torch"),
                         "2": ("transformers", "its forward is replaced on the instance")}
        assert type(single) is torch.nn.Linear and type(hooked) is torch.nn.Linear
        with torch.autocast("cpu", torch.bfloat16):
            terrazzo.reset_counters()
            half(torch.randn(2, 8))
            assert not terrazzo.counters()


@every(["bamba", "mixtral", "dbrx"])
def test_float32_where_torch_is_slow(model_type, monkeypatch):
    monkeypatch.setattr(adapters, "TORCH_IS_SLOW", True)
    monkeypatch.setattr(adapters, "MANY_MULTIPLY_ADDS", 1)
    model, ids = make_model(model_type).train(), tokens(2, 13)
    torch.manual_seed(5)
    want_loss, want = loss_and_gradients(model, ids)
    with torch.no_grad():
        logits = run(model.eval(), ids)
    linears = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    with terrazzo.patch(model, ops="linear") as handle:
        assert [(row.op, row.backend, row.note) for row in handle.report()] == [("linear", "cpu", "")] * linears
        terrazzo.reset_counters()
        with torch.no_grad():
            assert not far(run(model, ids), logits, LOGITS)
        assert terrazzo.counters() == {"linear": {"cpu": linears}}
        torch.manual_seed(5)
        loss, got = loss_and_gradients(model.train(), ids)
    assert not far(loss, want_loss, 1e-4) and not far_gradients(got, want)


def test_float32_that_is_worth_a_call(monkeypatch):
    monkeypatch.setattr(adapters, "TORCH_IS_SLOW", True)
    small, large = torch.nn.Linear(256, 256), torch.nn.Linear(512, 512)
    with torch.no_grad(), terrazzo.patch(torch.nn.Sequential(small, large)) as handle:
        notes = {row.module: (row.backend, row.note) for row in handle.report()}
        assert notes == {"0": ("cpu", "for few rows torch's own: float32 stays with torch"), "1": ("cpu", "")}
        for layer, rows, ours in ((small, 127, False), (small, 128, True), (large, 1, True)):
            terrazzo.reset_counters()
            layer(torch.randn(rows, layer.in_features))
            assert bool(terrazzo.counters()) == ours
    monkeypatch.setattr(adapters, "TORCH_IS_SLOW", False)
    assert adapters.linear_serving(torch.randn(128, 512), large.weight, None, None) == (None, "float32 stays with torch")


def test_float32_of_few_rows_where_mkl_is_home(monkeypatch):
    monkeypatch.setattr(adapters, "MKL_IS_HOME", True)
    first, last = adapters.MKL_IS_SLOW_FROM, adapters.MKL_IS_SLOW_TO
    small, large = torch.nn.Linear(256, 256), torch.nn.Linear(512, 512)
    with terrazzo.patch(torch.nn.Sequential(small, large)) as handle:
        notes = {row.module: (row.backend, row.note) for row in handle.report()}
        assert notes == {"0": ("transformers", "float32 stays with torch"),
                         "1": ("cpu", f"for {first} to {last} rows without gradients, else torch's own: float32 stays with torch")}
        for rows, ours in ((first - 1, False), (first, True), (last, True), (last + 1, False)):
            x = torch.randn(rows, 512)
            for gradients in (False, True):
                terrazzo.reset_counters()
                with torch.set_grad_enabled(gradients):
                    y = large(x)
                assert bool(terrazzo.counters()) == (ours and not gradients)
                torch.testing.assert_close(y, torch.nn.functional.linear(x, large.weight, large.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vendor, mkl, slow", [("AuthenticAMD", True, True), ("GenuineIntel", True, False), (None, True, False), ("AuthenticAMD", False, False)])
def test_where_torch_is_slow(vendor, mkl, slow, monkeypatch):
    monkeypatch.setattr(native, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert adapters._torch_is_slow() == slow
    assert adapters._mkl_is_home() == (mkl and vendor == "GenuineIntel" and native.isa() != "portable")


def test_few_rows_of_bf16_where_both_have_instructions(monkeypatch):
    monkeypatch.setattr(adapters, "TORCH_IS_FAST", {torch.bfloat16: adapters.AVX512_BF16})
    monkeypatch.setattr(adapters, "OWN_BF16", True)
    monkeypatch.setattr(adapters, "FEW_LINEAR_ROWS", 16)
    layer = torch.nn.Linear(24, 16).bfloat16()
    with torch.no_grad(), terrazzo.patch(layer) as handle:
        assert [(row.backend, row.note) for row in handle.report()] == [("cpu", f"over 16 rows torch's own: {adapters.AVX512_BF16}")]
        for rows, ours in ((16, True), (17, False)):
            terrazzo.reset_counters()
            layer(torch.randn(rows, 24).bfloat16())
            assert bool(terrazzo.counters()) == ours
    assert adapters.linear_serving(torch.randn(99, 24).half(), layer.weight.half(), None, None)[0] == "cpu"  # torch has nothing fast for it


def test_rows_of_bf16_that_meet_a_weight_where_it_lies(monkeypatch):
    for name, value in (("TORCH_IS_FAST", dict.fromkeys(adapters.HALF, adapters.AMX)), ("OWN_BF16", True), ("STORED_TILES", True), ("FEW_LINEAR_ROWS", 4), ("STORED_TILE_WEIGHT", 1024)):
        monkeypatch.setattr(adapters, name, value)
    small, odd, large = (torch.nn.Linear(*sizes).bfloat16() for sizes in ((32, 16), (48, 64), (64, 48)))
    few, many = (f"over {rows}4 rows torch's own: {adapters.AMX}" for rows in ("", "128 rows, with gradients over "))
    with terrazzo.patch(torch.nn.Sequential(small, odd, large)) as handle:
        assert [(row.backend, row.note) for row in handle.report()] == [("cpu", few), ("cpu", few), ("cpu", many)]
        for layer, rows, gradients, ours in ((small, 4, True, True), (small, 5, False, False), (odd, 5, False, False), (large, 5, True, False), (large, 5, False, True),
                                             (large, 128, False, True), (large, 129, False, False)):  # fmt: skip
            terrazzo.reset_counters()
            with torch.set_grad_enabled(gradients):
                layer(torch.randn(rows, layer.in_features).bfloat16())
            assert bool(terrazzo.counters()) == ours, (layer, rows, gradients)


@pytest.mark.parametrize("isa, fast, own", [("avx2", None, False), ("avx2", adapters.AMX, False), ("avx512_bf16", adapters.AVX512_BF16, True),
                                            ("avx512_bf16", adapters.AMX, False), ("amx", adapters.AVX512_BF16, True), ("amx", adapters.AMX, True)])  # fmt: skip
def test_which_cpus_are_not(isa, fast, own, monkeypatch):
    monkeypatch.setattr(native, "isa", lambda: isa)
    monkeypatch.setattr(adapters, "TORCH_IS_FAST", {torch.bfloat16: fast, torch.float16: fast} if fast else {})
    assert adapters._own_bf16() == own
    monkeypatch.setattr(adapters, "OWN_BF16", own)
    choices = torch.zeros(adapters.FEW_ROWS * 4 + 1, 1)
    assert adapters.better_left(choices, torch.empty(4, 8).bfloat16(), 4, None) == (fast is not None and not own)
    assert adapters.better_left(choices, torch.empty(4, 8).half(), 4, None) == (fast is not None)
    if fast:
        assert adapters.linear_serving(torch.empty(2, 8).bfloat16(), torch.empty(8, 8).bfloat16(), None, None)[0] == ("cpu" if own else None)
        assert adapters.linear_serving(torch.empty(2, 8).half(), torch.empty(8, 8).half(), None, None) == (None, fast)


@pytest.mark.parametrize("isa, fast", [("AVX2", False), ("AVX512_CORE", False), ("AVX512_CORE_BF16", True), ("DEFAULT", True), (None, True)])
def test_which_cpus_are_left_to_torch(isa, fast, monkeypatch):
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa) if isa else monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert adapters._torch_is_fast() == ({torch.bfloat16: adapters.AVX512_BF16} if fast else {})
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert adapters._torch_is_fast() == {}
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert adapters._torch_is_fast() == (dict.fromkeys(adapters.HALF, adapters.AMX) if fast else {})


# ---- signatures ----------------------------------------------------------------------------------------------


def test_another_experts_interface_is_refused(monkeypatch):
    monkeypatch.setattr(moe, "grouped_mm_experts_forward", lambda self, hidden_states, routing: None)
    patching._problem_anywhere.cache_clear()
    try:
        with pytest.raises(patching.PatchError, match=r"takes \(self, hidden_states, routing\), the recipe expects"):
            terrazzo.patch(make_model("mixtral"))
    finally:
        patching._problem_anywhere.cache_clear()


def test_every_class_of_experts_takes_three_tensors():
    """What the replaced forward takes is what every decorated class is called with, whatever it calls them."""
    import importlib

    for key in EXPERTS:
        modeling = importlib.import_module(f"transformers.models.{key}.modeling_{key}")
        classes = [c for c in vars(modeling).values() if inspect.isclass(c) and c.__module__ == modeling.__name__ and patching._is_experts(c)]
        assert classes and all(len(inspect.signature(c.forward).parameters) == 4 for c in classes)


def test_dbrx_is_a_recipe_and_tested_with_the_others():
    assert "DbrxExperts" in RECIPES["dbrx"].methods and "dbrx" in MODELS


@pytest.mark.parametrize("fast, own, backend, rows, ours", [
    (True, False, None, 4, True), (True, False, None, 200, False), (True, False, "cpu", 200, True), (False, False, None, 200, True),
    (True, True, None, 200, True),
])  # fmt: skip
@every(["mixtral", "dbrx"])
def test_many_rows_in_16_bits_stay_where_torch_is_faster(model_type, fast, own, backend, rows, ours, monkeypatch):
    monkeypatch.setattr(adapters, "TORCH_IS_FAST", {torch.bfloat16: adapters.AVX512_BF16} if fast else {})
    monkeypatch.setattr(adapters, "OWN_BF16", own)
    model, ids = make_model(model_type, dtype=torch.bfloat16), tokens(1, rows)
    with torch.no_grad(), terrazzo.patch(model, ops=["fused_experts"], backend=backend):
        terrazzo.reset_counters()
        run(model, ids)
    assert ("fused_experts" in ops_that_ran()) == ours


@every(["mixtral", "dbrx"])
def test_packed_experts_serve_every_number_of_rows(model_type, monkeypatch):
    """int8 was asked for: a long prompt must not run on other weights than the next token."""
    monkeypatch.setattr(adapters, "TORCH_IS_FAST", {torch.bfloat16: adapters.AVX512_BF16})
    model = make_model(model_type, dtype=torch.bfloat16)
    with torch.no_grad(), terrazzo.pack_experts(model, "int8") as handle:
        notes = {row.note for row in handle.report() if row.op == "fused_experts"}
        assert notes == {"over 24 rows an expert transformers' own, unless packed: torch uses this CPU's AVX512-BF16"}
        terrazzo.reset_counters()
        run(model, tokens(1, 400))
    assert "fused_experts" in ops_that_ran()
