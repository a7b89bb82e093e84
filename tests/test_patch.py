"""terrazzo.patch on a tiny random model of every supported type: same numbers, and everything put back."""
import copy
import io
import pickle
import types

import pytest
import terrazzo
import torch
from terrazzo import adapters, patching, tolerance
from terrazzo.recipes import EXPERTS, RECIPES, SUPPORTED, Swap
from tiny_models import MODELS, make_config, make_model, tokens

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

CAUSAL = [key for key, (name, _) in MODELS.items() if name.endswith("ForCausalLM")]
CACHED = [key for key in CAUSAL if key != "blt"]  # whose cache is left out, see test_patch_blt.py
OWN_GATES = ("glm5_next", "inkling2")  # experts whose gate is none of fused_experts'
GROUPED = {"grouped_mm", "moe_permute", "moe_unpermute"}
FAMILIES = ["bamba", "falcon_h1", "jamba", "lfm2", "mamba2", "qwen3_next"]  # one of each kind of recipe
LOGITS, GRADIENTS = 2e-5, 2e-4  # largest difference over the largest value, float32; a 1 % fault is 50 times more


def every(names):
    return pytest.mark.parametrize("model_type", names)


def run(model, ids, **options):
    output = model(ids, **options)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def continued(model, ids, split):
    """Outputs for ids[:, split:] on the cache of ids[:, :split]."""
    with torch.no_grad():
        first = model(ids[:, :split], use_cache=True)
    if hasattr(first, "cache_params"):
        return model(ids[:, split:], cache_params=first.cache_params, use_cache=True).logits
    positions = torch.arange(split, ids.shape[1])[None].expand(ids.shape[0], -1)
    return model(ids[:, split:], past_key_values=first.past_key_values, position_ids=positions, use_cache=True).logits


def loss_and_gradients(model, ids, **options):
    """A loss that weighs every output differently, and the gradient of every parameter."""
    model.zero_grad()
    out = run(model, ids, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    loss = (out.float() * weight).mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def far(got, want, bar):
    """None, or what is wrong with `got`."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"got {tuple(got.shape)} {got.dtype}, not {tuple(want.shape)} {want.dtype}"
    error = (got - want).abs().max().item() / max(want.abs().max().item(), 1e-30)
    return None if error <= bar else f"off by {error:.2e} of the largest value"


def far_gradients(got, want):
    if got.keys() != want.keys():
        return f"gradients of {sorted(got.keys() ^ want.keys())} on one side only"
    largest = max(g.abs().max().item() for g in want.values())
    for name in want:
        # A parameter whose gradient is all rounding (1e-4 of the others) is judged on the others' scale.
        scale = max(want[name].abs().max().item(), 1e-4 * largest)
        error = (got[name] - want[name]).abs().max().item() / scale
        if not error <= GRADIENTS:
            return f"gradient of {name} off by {error:.2e} of its largest value"
    return None


def ops_that_ran(backend="cpu"):
    return {op for op, counts in terrazzo.counters().items() if counts.get(backend)}


def expected_ops(model_type, *, decoding=False):
    recipe = RECIPES[model_type]
    ops = {swap.op for swap in [*recipe.functions.values(), *recipe.methods.values()]}
    ops -= {"mamba_split_conv1d_scan_combined", "use_cache"}  # which run no kernel of their own
    if model_type in OWN_GATES:
        ops |= GROUPED
    elif model_type in EXPERTS:
        ops.add("fused_experts")
    return ops if decoding else ops - {"causal_conv1d_update", "selective_state_update"}


def of_recipes(rows):
    """The rows of a report but those of what is patched in models of any type: attention, and linear layers, which in float32 all stay with torch."""
    assert all(row.backend == "transformers" and row.note for row in rows if row.op == "linear")
    return [row for row in rows if row.op not in ("linear", "local_attention")]


def snapshot(model):
    return {path: (type(m), dict(m.__dict__)) for path, m in model.named_modules()}


def same_snapshot(a, b):
    return a.keys() == b.keys() and all(
        a[p][0] is b[p][0] and a[p][1].keys() == b[p][1].keys() and all(a[p][1][k] is b[p][1][k] for k in a[p][1]) for p in a
    )


def test_the_tiny_models_cover_every_recipe():
    assert MODELS.keys() == RECIPES.keys()


@every(MODELS)
def test_logits(model_type):
    model, ids = make_model(model_type), tokens(2, 37)
    with torch.no_grad():
        want = run(model, ids)
        terrazzo.reset_counters()
        with terrazzo.patch(model):
            assert not far(run(model, ids), want, LOGITS)
            assert ops_that_ran() == expected_ops(model_type)
        assert torch.equal(run(model, ids), want)


@every(MODELS)
def test_gradients(model_type):
    model, ids = make_model(model_type).train(), tokens(2, 21)
    want_loss, want = loss_and_gradients(model, ids)
    terrazzo.reset_counters()
    with terrazzo.patch(model):
        loss, got = loss_and_gradients(model, ids)
    assert not far(loss, want_loss, 1e-4)
    assert not far_gradients(got, want)
    expected = {op + suffix for op in expected_ops(model_type) for suffix in ("", "_bwd")}
    # integers have no gradient
    assert ops_that_ran() == expected - {"moe_permute_bwd", "patch_lengths_from_entropies_bwd", "patch_ids_from_lengths_bwd"}


@every(MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(model_type, side):
    model, ids = make_model(model_type), tokens(2, 19)
    mask = torch.ones_like(ids)
    mask[0, slice(None, 6) if side == "left" else slice(-6, None)] = 0
    real = mask.bool()
    for train in (False, True):
        model.train(train)
        with torch.no_grad():
            want = run(model, ids, attention_mask=mask)
            with terrazzo.patch(model):
                got = run(model, ids, attention_mask=mask)
        assert not far(got[real], want[real], LOGITS)


@every(CACHED)
def test_greedy_generation(model_type):
    model, ids = make_model(model_type), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    want = model.generate(ids, **options)
    terrazzo.reset_counters()
    with terrazzo.patch(model):
        got = model.generate(ids, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert not far(torch.stack(got.logits), torch.stack(want.logits), 10 * LOGITS)  # eight steps add up
    assert ops_that_ran() == expected_ops(model_type, decoding=True)


@every(CACHED)
def test_prefill_in_two_parts(model_type):
    model, ids = make_model(model_type), tokens(2, 23)
    with torch.no_grad():
        want = continued(model, ids, 14)
        with terrazzo.patch(model):
            assert not far(continued(model, ids, 14), want, LOGITS)


@every(MODELS)
def test_copies_pickles_and_saved_models(model_type, tmp_path):
    model, ids = make_model(model_type), tokens(1, 11)
    before, keys = snapshot(model), list(model.state_dict())
    with torch.no_grad():
        want = run(model, ids)
        handle = terrazzo.patch(model)
        patched = run(model, ids)
        assert list(model.state_dict()) == keys
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)]
        model.save_pretrained(tmp_path)
        reloaded = type(model).from_pretrained(tmp_path).eval()
        handle.undo()
        assert same_snapshot(snapshot(model), before)
        assert torch.equal(run(model, ids), want)
        for other in copies:  # stay patched, whatever became of the first
            terrazzo.reset_counters()
            assert torch.equal(run(other, ids), patched)
            assert ops_that_ran() == expected_ops(model_type)
        terrazzo.reset_counters()
        assert not far(run(reloaded, ids), want, LOGITS)  # memory-mapped weights may round differently
        assert not ops_that_ran()


@every(CAUSAL)
def test_gradient_checkpointing(model_type):
    model, ids = make_model(model_type).train(), tokens(2, 13)
    want_loss, want = loss_and_gradients(model, ids, use_cache=False)
    model.activation_checkpointing_enable()
    with terrazzo.patch(model):
        loss, got = loss_and_gradients(model, ids, use_cache=False)
    assert not far(loss, want_loss, 1e-4)
    assert not far_gradients(got, want)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
@every([key for key in CAUSAL if key != "qwen4_exp"])  # its indexer's sizes depend on the data: it doesn't compile
def test_compile(model_type):
    model, ids = make_model(model_type), tokens(2, 9)
    with torch.no_grad():
        want = run(model, ids, use_cache=False)
        terrazzo.patch(model)
        terrazzo.reset_counters()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=model._can_compile_fullgraph)
        assert not far(run(compiled, ids, use_cache=False), want, LOGITS)
        assert ops_that_ran() == expected_ops(model_type)


def test_compile_training():
    model, ids = make_model("bamba").train(), tokens(2, 17)
    _, want = loss_and_gradients(model, ids, use_cache=False)
    terrazzo.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    _, got = loss_and_gradients(compiled, ids, use_cache=False)
    assert not far_gradients({name.removeprefix("_orig_mod."): g for name, g in got.items()}, want)


@every(FAMILIES)
def test_bfloat16(model_type):
    model, ids = make_model(model_type, torch.bfloat16), tokens(2, 37)
    with torch.no_grad():
        exact = run(copy.deepcopy(model).float(), ids)
        theirs = run(model, ids)
        with terrazzo.patch(model):
            ours = run(model, ids)
    # Both round differently at every layer: judged by the error to the float32 model, theirs being the yardstick.
    error = lambda out: (out.float() - exact).square().mean().sqrt().item()
    assert ours.dtype == theirs.dtype
    assert error(ours) <= 1.25 * error(theirs)


@pytest.mark.parametrize("options", [
    dict(mamba_rms_norm=False), dict(mamba_norm_before_gate=True), dict(mamba_norm_before_gate=False),
], ids=str)
def test_falcon_h1_gates(options):
    model, ids = make_model("falcon_h1", **options), tokens(2, 21)
    with torch.no_grad():
        want, continued = run(model, ids), model.generate(ids, max_new_tokens=4, do_sample=False)
        with terrazzo.patch(model):
            assert not far(run(model, ids), want, LOGITS)
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), continued)


def test_step_limits():
    model, ids = make_model("mamba2", time_step_limit=(0.5, 0.9)), tokens(2, 21)
    with torch.no_grad():
        want = run(model, ids)
        with terrazzo.patch(model):
            assert not far(run(model, ids), want, LOGITS)


# ---- negative controls: a wrong op must not pass the comparison ----------------------------------------------


NO_NORM = dict(mamba_rms_norm=False)  # a norm right after the scan would divide the fault out again
FAULTY = {
    "causal_conv1d_fn": ("bamba", {}),
    "mamba_chunk_scan_combined": ("falcon_h1", NO_NORM),
    "rmsnorm_gated": ("qwen3_next", {}),
    "causal_conv1d_update": ("lfm2", {}),
    "selective_state_update": ("falcon_h1", NO_NORM),
}


@pytest.mark.parametrize("op", FAULTY)
def test_a_wrong_op_is_caught(op, monkeypatch):
    def scaled(*args, **kwargs):
        out = true_op(*args, **kwargs)
        return (out[0] * 1.01, *out[1:]) if isinstance(out, tuple) else out * 1.01

    true_op = getattr(adapters, op)
    monkeypatch.setattr(adapters, op, scaled)
    model_type, options = FAULTY[op]
    model, ids = make_model(model_type, **options), tokens(2, 21)
    with torch.no_grad():
        want = torch.cat([run(model, ids), continued(model, ids, 20)], 1)
        with terrazzo.patch(model):
            assert far(torch.cat([run(model, ids), continued(model, ids, 20)], 1), want, LOGITS)
    if op.endswith("update"):
        return
    model.train()
    _, want = loss_and_gradients(model, ids)
    with terrazzo.patch(model):
        _, got = loss_and_gradients(model, ids)
    assert far_gradients(got, want)


# ---- scopes, handles, options --------------------------------------------------------------------------------


def test_instance_scope_touches_one_model():
    first, second = make_model("bamba"), make_model("bamba")
    before = snapshot(second)
    with terrazzo.patch(first), torch.no_grad():
        terrazzo.reset_counters()
        run(second, tokens(1, 5))
        assert same_snapshot(snapshot(second), before) and not ops_that_ran()


def test_class_scope_reaches_every_instance():
    from transformers.models.bamba import modeling_bamba as modeling

    names = [*RECIPES["bamba"].functions]
    functions, forward = [getattr(modeling, name) for name in names], modeling.BambaRMSNormGated.forward
    model, ids = make_model("bamba"), tokens(2, 21)
    with torch.no_grad():
        want = run(model, ids)
        handle = terrazzo.patch("bamba")
        terrazzo.reset_counters()
        assert not far(run(make_model("bamba"), ids), want, LOGITS)
        assert ops_that_ran() == expected_ops("bamba")
        handle.undo()
        assert torch.equal(run(model, ids), want)
    assert all(getattr(modeling, name) is function for name, function in zip(names, functions))
    assert modeling.BambaRMSNormGated.forward is forward


@pytest.mark.parametrize("scope", ["instance", "class"])
@pytest.mark.parametrize("first_out", [0, 1])
def test_overlapping_patches_in_any_order(scope, first_out):
    model, ids = make_model("mamba2"), tokens(1, 9)
    before = snapshot(model)
    handles = [terrazzo.patch(model, scope=scope) for _ in range(2)]
    with torch.no_grad():
        handles[first_out].undo()
        handles[first_out].undo()
        terrazzo.reset_counters()
        run(model, ids)
        assert ops_that_ran() == expected_ops("mamba2")
        handles[1 - first_out].undo()
        terrazzo.reset_counters()
        run(model, ids)
    assert not ops_that_ran() and same_snapshot(snapshot(model), before)


def test_two_patches_of_different_ops_add_up():
    model, ids = make_model("mamba2"), tokens(1, 9)
    conv, norm = terrazzo.patch(model, ops="causal_conv1d"), terrazzo.patch(model, ops=["rmsnorm_gated"], backend="reference")
    with torch.no_grad():
        for active, handle in (({"causal_conv1d_fn", "rmsnorm_gated"}, conv), ({"rmsnorm_gated"}, norm), (set(), norm)):
            terrazzo.reset_counters()
            run(model, ids)
            assert set(terrazzo.counters()) == active
            handle.undo()


def test_patching_a_copy_again_and_undoing_leaves_the_copy_patched():
    model, ids = make_model("lfm2"), tokens(1, 9)
    terrazzo.patch(model)
    twin = copy.deepcopy(model)
    terrazzo.patch(twin, ops="causal_conv1d_fn").undo()
    terrazzo.reset_counters()
    with torch.no_grad():
        run(twin, ids)
    assert ops_that_ran() == {"causal_conv1d_fn"}


def test_forced_backend_and_its_report():
    model, ids = make_model("bamba"), tokens(1, 9)
    with torch.no_grad(), terrazzo.patch(model, backend="reference") as handle:
        terrazzo.reset_counters()
        run(model, ids)
        assert ops_that_ran("reference") == expected_ops("bamba") | {"local_attention"} and not ops_that_ran()
    assert {row.backend for row in of_recipes(handle.report())} == {"reference", "unfused"}


def test_use_backend_reaches_a_patched_model():
    model, ids = make_model("bamba"), tokens(1, 9)
    with torch.no_grad(), terrazzo.patch(model), terrazzo.use_backend("reference"):
        terrazzo.reset_counters()
        run(model, ids)
        assert ops_that_ran("reference") == expected_ops("bamba")


def test_wide_convolutions_stay_with_transformers():
    model, ids = make_model("lfm3", conv_L_cache=7), tokens(1, 15)
    with torch.no_grad():
        want = run(model, ids)
        with terrazzo.patch(model) as handle:
            terrazzo.reset_counters()
            assert torch.equal(run(model, ids), want)
            assert not terrazzo.counters()
    rows = of_recipes(handle.report())
    assert {row.backend for row in rows} == {"transformers"} and all("got 7" in row.note for row in rows)


def test_other_activations_stay_with_transformers():
    model, ids = make_model("mamba2", hidden_act="gelu"), tokens(1, 15)
    with torch.no_grad():
        want = run(model, ids)
        with terrazzo.patch(model) as handle:
            assert not far(run(model, ids), want, LOGITS)
    assert any(row.op == "causal_conv1d_fn" and "gelu" in row.note for row in handle.report())


def test_a_decoding_step_with_gradients_stays_with_transformers():
    model, ids = make_model("lfm2"), tokens(1, 9)

    def step():
        model.zero_grad()
        continued(model, ids, 8).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = step()
    with terrazzo.patch(model):
        assert not far_gradients(step(), want)


def test_report():
    model = make_model("qwen3_next")
    with terrazzo.patch(model) as handle:
        rows = handle.report()
    assert any(row.op == "causal_conv1d_fn" and row.backend == "cpu" and row.module.endswith("linear_attn") for row in rows)
    assert any(row.op == "torch_chunk_gated_delta_rule" and row.backend == "transformers" and row.note for row in rows)
    text = str(rows).splitlines()
    assert text[0].split() == ["modules", "op", "backend", "note"] and "model.layers.*.linear_attn" in str(rows)


@pytest.mark.parametrize("target", [*SUPPORTED, "qwen3_5_text", "lfm2_vl", "qwen3_vl_moe_text"])
def test_dry_run_by_type(target):
    handle = terrazzo.patch(target, dry_run=True)
    ops = {row.op for row in handle.report() if row.backend == "cpu"}
    if (target in RECIPES and target not in ("blt", "dbrx")) or target in ("qwen3_5_text", "lfm2_vl"):
        assert "causal_conv1d_fn" in ops
    if target in (*EXPERTS, "dbrx", "qwen3_vl_moe_text"):
        assert ops & {"fused_experts", "grouped_mm"}
    if target == "blt":
        assert ops == expected_ops("blt")
    assert not handle.active


def test_dry_run_changes_nothing(tmp_path):
    model = make_model("bamba")
    model.config.save_pretrained(tmp_path)
    before = snapshot(model)
    rows = terrazzo.patch(model, dry_run=True).report()
    assert same_snapshot(snapshot(model), before)
    by_path = terrazzo.patch(tmp_path, dry_run=True).report()
    assert {row.op for row in of_recipes(by_path)} == {row.op for row in of_recipes(rows)}


def test_unknown_models_and_options():
    with pytest.raises(ValueError, match=r"no recipe for model type 'gpt2'; supported: afmoe, aria, .*zamba2, zaya"):
        terrazzo.patch("gpt2")
    with pytest.raises(ValueError, match="no recipe for model type 'LayerNorm'; supported: [^(]*$"):
        terrazzo.patch(torch.nn.LayerNorm(2))
    linear = r"no recipe for model type 'Linear'; supported: .* \(its linear layers: float32 stays with torch\)"
    with pytest.raises(ValueError, match=linear):
        terrazzo.patch(torch.nn.Linear(2, 2))
    assert str(terrazzo.patch(torch.nn.LayerNorm(2), strict=False).report()) == "nothing to patch"
    assert not terrazzo.patch(torch.nn.Linear(2, 2), strict=False).active
    model = make_model("lfm2")
    with pytest.raises(ValueError, match="unknown op 'conv'; ops and families are byte_hash_embedding, causal_conv1d, "):
        terrazzo.patch(model, ops="conv")
    with pytest.raises(TypeError, match="expected a model, a model type or the path of a checkpoint, got 3"):
        terrazzo.patch(3)
    with pytest.raises(ValueError, match="scope must be 'instance' or 'class', got 'module'"):
        terrazzo.patch(model, scope="module")
    with pytest.raises(ValueError, match="scope 'instance' needs a model, got 'bamba'"):
        terrazzo.patch("bamba", scope="instance")
    with pytest.raises(ValueError, match="backend must be one of"):
        terrazzo.patch(model, backend="opencl")


@pytest.mark.parametrize("wrong, message", [
    (dict(versions=("9", "10")), r"the recipe is for transformers >= 9, < 10, not"),
    (dict(functions={"causal_conv1d_fn": Swap("causal_conv1d_fn", "conv", ("x", "weight"))}),
     r"causal_conv1d_fn takes \(hidden_states, weight, .*\), the recipe expects \(x, weight\)"),
    (dict(functions=RECIPES["lfm2"].functions | {"gone": Swap("causal_conv1d_fn", "conv", ())}), r"modeling_lfm2 has no gone"),
])
def test_recipes_that_do_not_match(wrong, message, monkeypatch):
    from dataclasses import replace

    model, ids = make_model("lfm2"), tokens(1, 9)
    monkeypatch.setitem(patching.RECIPES, "lfm2", replace(RECIPES["lfm2"], **wrong))
    patching._problem.cache_clear()
    try:
        before = snapshot(model)
        with pytest.raises(patching.PatchError, match=message):
            terrazzo.patch(model)
        handle = terrazzo.patch(model, "causal_conv1d", strict=False)
        assert same_snapshot(snapshot(model), before) and not handle.active
        assert all(row.backend == "transformers" and row.note for row in handle.report())
    finally:
        patching._problem.cache_clear()


def test_a_forward_replaced_on_the_instance_is_reported():
    model = make_model("lfm2")
    conv = model.model.layers[0].conv
    conv.forward = types.MethodType(lambda self, *args, **kwargs: None, conv)
    with pytest.raises(patching.PatchError, match="its forward is replaced on the instance"):
        terrazzo.patch(model)
    assert "replaced on the instance" in str(terrazzo.patch(model, strict=False).report())


def test_modules_hooked_by_accelerate():
    """accelerate keeps the bound method of the class in _old_forward and puts a wrapper on the instance."""
    model, ids = make_model("lfm2"), tokens(1, 9)
    conv = model.model.layers[0].conv
    conv._old_forward = conv.forward
    conv.forward = types.MethodType(lambda self, *args, **kwargs: self._old_forward(*args, **kwargs), conv)
    old = conv._old_forward
    with torch.no_grad(), terrazzo.patch(model):
        terrazzo.reset_counters()
        run(model, ids)
        assert ops_that_ran() == {"causal_conv1d_fn"}
    assert conv._old_forward == old


def test_a_subclass_of_a_mixer_is_patched():
    from transformers.models.bamba import modeling_bamba as modeling

    class Mine(modeling.BambaMixer):
        pass

    model, ids = make_model("bamba"), tokens(1, 9)
    model.model.layers[0].mamba.__class__ = Mine
    with torch.no_grad(), terrazzo.patch(model):
        terrazzo.reset_counters()
        run(model, ids)
        assert ops_that_ran() == expected_ops("bamba")
        assert isinstance(model.model.layers[0].mamba, Mine)


def test_a_class_changed_after_the_patch_is_not_overwritten():
    model = make_model("lfm2")
    conv = model.model.layers[0].conv
    handle = terrazzo.patch(model)
    patched = type(conv)
    conv.__class__ = type("Wrapped", (patched,), {})
    with pytest.raises(RuntimeError, match="class was changed to Wrapped after the patch; undo that first"):
        handle.undo()
    conv.__class__ = patched
    handle.undo()
    assert type(conv).__name__ == "Lfm2ShortConv" and not hasattr(type(conv), "_terrazzo_plain")


def test_tolerance_of_the_scan_alone():
    """The adapter against transformers' function itself, on a case with every option."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=g)
    args = rand(2, 45, 4, 8), rand(2, 45, 4), -torch.rand(4, generator=g), rand(2, 45, 2, 16), rand(2, 45, 2, 16), 16
    options = dict(D=rand(4), dt_bias=rand(4), initial_states=rand(2, 4, 8, 16), dt_softplus=True, dt_limit=[0.1, 2.0],
                   return_final_states=True, seq_idx=None, unknown=1)
    ours = adapters.chunk_scan(mamba2_chunk_scan, None)(*args, **options)
    theirs = mamba2_chunk_scan(*args, **options)
    for got, want in zip(ours, theirs):
        assert not far(got, want, LOGITS)
    assert tolerance.check(ours[0], theirs[0].double(), theirs[0]).nmse < 1e-10


def test_config_and_class_names_of_a_patched_model_are_plain():
    cls, config = make_config("bamba")
    model = cls(config)
    with terrazzo.patch(model):
        assert model.config.to_dict() == config.to_dict()
        assert {m.__class__.__name__ for m in model.modules()} >= {"BambaMixer", "BambaRMSNormGated"}
