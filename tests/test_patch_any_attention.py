"""terrazzo.patch on attention that transformers computes by scaled_dot_product_attention: the same numbers, in models of any type."""
import copy
import pickle

import pytest
import terrazzo
import torch
from terrazzo import adapters

from test_patch import GRADIENTS, LOGITS, MODELS, far, far_gradients, loss_and_gradients, make_model, run, same_snapshot, snapshot, tokens

transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


@pytest.fixture(autouse=True)
def texts_are_long(monkeypatch):
    monkeypatch.setattr(adapters, "LONG", 5)
    monkeypatch.setattr(adapters, "LONG_WITH_GRADIENTS", 5)


def make(name, **options):
    torch.manual_seed(0)
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "bert": (transformers.BertConfig, transformers.BertModel),
        "blenderbot": (transformers.BlenderbotConfig, transformers.BlenderbotForConditionalGeneration),
    }[name]
    return model(config(**SMALL | options)).eval()


def calls():
    return sum(terrazzo.counters().get("local_attention", {}).values())


def chosen(handle):
    return [row for row in handle.report() if row.op == "local_attention" and row.backend == "cpu"]


@pytest.mark.parametrize("model_type", sorted(set(MODELS) - {"blt"}))
def test_every_recipe(model_type):
    model, ids = make_model(model_type), tokens(2, 21)
    with torch.no_grad():
        want = run(model, ids)
    want_loss, gradients = loss_and_gradients(model, ids)
    with terrazzo.patch(model) as handle:
        terrazzo.reset_counters()
        with torch.no_grad():
            assert not far(run(model, ids), want, LOGITS)
        assert calls() <= len(chosen(handle))
        if model_type in ("bamba", "jamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "lfm2", "qwen3_next", "dbrx"):
            assert calls() == len(chosen(handle)) > 0
        loss, found = loss_and_gradients(model, ids)
    assert not far(loss, want_loss, 1e-4) and not far_gradients(found, gradients)


@pytest.mark.parametrize("name, options", [("llama", dict(num_key_value_heads=2)), ("mistral", dict(num_key_value_heads=1, sliding_window=64)), ("bert", {})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_without_a_recipe(name, options, dtype):
    model, ids = make(name, **options).to(dtype), tokens(2, 30)
    before = snapshot(model)
    with torch.no_grad():
        want = run(model, ids)
    want_loss, gradients = loss_and_gradients(model, ids)
    other = make(name, **options)
    handle = terrazzo.patch(model)
    assert len(chosen(handle)) == 2 and all("without a mask or dropout" in row.note for row in chosen(handle))
    terrazzo.reset_counters()
    with torch.no_grad():
        assert not far(run(model, ids), want, LOGITS)
    loss, found = loss_and_gradients(model, ids)
    assert calls() == 4 and not far(loss, want_loss, 1e-4) and not far_gradients(found, gradients)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        terrazzo.reset_counters()
        assert torch.equal(run(copied, ids), run(model, ids)) and calls() == 4
    terrazzo.reset_counters()
    run(other, ids)
    assert not calls()
    handle.undo()
    assert same_snapshot(snapshot(model), before)


def test_what_stays_with_torch():
    """Masks, short texts, one new token, dropout, autocast, another implementation."""
    model, ids = make("llama", attention_dropout=0.5), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with terrazzo.patch(model), torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
        terrazzo.reset_counters()
        model(ids, attention_mask=mask)
        model(ids[:, :4])
        model(ids[:, :1], past_key_values=past)
        model.train()(ids)
        model.eval()
        with torch.autocast("cpu"):
            model(ids)
        model.set_attn_implementation("eager")
        model(ids)
        assert not calls()
        model.set_attn_implementation("sdpa")
        model(ids)
        assert calls() == 2


def test_windows_are_masks():
    model, ids = make("mistral", num_key_value_heads=1, sliding_window=8), tokens(1, 30)
    with torch.no_grad():
        want = run(model, ids)
        with terrazzo.patch(model):
            terrazzo.reset_counters()
            assert torch.equal(run(model, ids), want) and not calls()


def test_generating_with_growing_and_static_caches():
    model, ids = make("llama", num_key_value_heads=2, eos_token_id=None, pad_token_id=0), tokens(2, 30)
    for options in ({}, dict(cache_implementation="static")):
        settings = dict(max_new_tokens=6, do_sample=False) | options
        want = model.generate(ids, **settings)
        with terrazzo.patch(model):
            terrazzo.reset_counters()
            assert torch.equal(model.generate(ids, **settings), want)
            assert calls() or options  # a static cache comes with a mask where it has room left


def test_an_encoder_and_a_decoder():
    model = make("blenderbot", d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
                 decoder_ffn_dim=48, max_position_embeddings=64)  # fmt: skip
    ids, answer = tokens(2, 30), tokens(2, 12)
    with torch.no_grad():
        want = model(ids, decoder_input_ids=answer).logits
        with terrazzo.patch(model, ops="local_attention"):
            terrazzo.reset_counters()
            assert not far(model(ids, decoder_input_ids=answer).logits, want, LOGITS)
            assert calls() == 4  # two in either; between them there are other keys than queries


def test_compiled():
    """Whole, transformers builds a mask for what it compiles, and torch attends; a layer called without one is ours."""
    model, ids = make("llama", num_key_value_heads=2), tokens(2, 30)
    layer, hidden = model.model.layers[0].self_attn, torch.randn(2, 30, 32)
    turns = model.model.rotary_emb(hidden, torch.arange(30)[None])
    with torch.no_grad():
        want, attended = run(model, ids, use_cache=False), layer(hidden, turns)[0]
        with terrazzo.patch(model):
            found = torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False).logits
            assert not far(found, want, LOGITS)
            terrazzo.reset_counters()
            assert not far(torch.compile(layer, fullgraph=True, backend="eager")(hidden, turns)[0], attended, LOGITS)
            assert calls() == 1


def test_reports():
    model = make("gemma2", head_dim=8, num_key_value_heads=2)
    model.set_attn_implementation("eager")
    notes = {row.note for row in terrazzo.patch(model, strict=False).report() if row.op == "local_attention"}
    assert notes == {"attention implementation 'eager', not 'sdpa'"}
    with pytest.raises(ValueError, match=r"no recipe for model type 'gemma2'; .*\(its attention: attention implementation 'eager', not 'sdpa', its linear layers: "):
        terrazzo.patch(model)
    model = make("llama")
    with terrazzo.patch(model, backend="reference") as handle, torch.no_grad():
        assert {row.backend for row in handle.report() if row.op == "local_attention"} == {"reference"}
        terrazzo.reset_counters()
        model(tokens(1, 3))  # asked for: short texts too
        assert terrazzo.counters()["local_attention"] == {"reference": 2}
    notes = {row.op: row.note for row in terrazzo.patch("bamba", dry_run=True).report()}
    assert notes["local_attention"] == "attention: in instance scope alone"


def test_torch_keeps_it_where_it_has_amx(monkeypatch):
    monkeypatch.setattr(adapters, "TORCH_IS_FAST", dict.fromkeys(adapters.HALF, adapters.AMX))
    model = make("llama").bfloat16()
    with pytest.raises(ValueError, match="its attention: torch uses this CPU's AMX"):
        terrazzo.patch(model)
    monkeypatch.setattr(adapters, "TORCH_IS_FAST", {})
    with terrazzo.patch(model, ops="local_attention"), torch.no_grad():
        terrazzo.reset_counters()
        model(tokens(1, 30))
        assert calls() == 2
