"""Logits, losses and gradients of our models against transformers', of the same checkpoint, option by option."""
import pytest
import terrazzo
import torch
from terrazzo import adapters
from terrazzo.models import dbrx

from model_pairs import BAMBA, BLT, DBRX, ids, pair

OPTIONS = {
    "bamba": {
        "plain": {}, "no_attention": {"attn_layer_indices": None}, "all_attention": {"attn_layer_indices": [0, 1, 2, 3]},
        "tied": {"tie_word_embeddings": True}, "biases": {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True},
        "no_conv_bias": {"mamba_conv_bias": False}, "one_group": {"mamba_n_groups": 1}, "no_gqa": {"num_key_value_heads": 4},
        "z_loss": {"z_loss_coefficient": 0.1}, "dt_limit": {"time_step_limit": (0.2, 0.9)},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}},
    },
    "dbrx": {
        "plain": {}, "clip": {"attn_config": DBRX["attn_config"] | {"clip_qkv": 0.3}}, "one_expert": {"ffn_config": DBRX["ffn_config"] | {"moe_top_k": 1}},
        "not_normalised": {"ffn_config": DBRX["ffn_config"] | {"moe_normalize_expert_weights": None}},
        "norm_2": {"ffn_config": DBRX["ffn_config"] | {"moe_normalize_expert_weights": 2.0}},
        "gelu": {"ffn_config": DBRX["ffn_config"] | {"ffn_act_fn": {"name": "gelu"}}},
    },
    "blt": {
        "plain": {}, "no_window": {"local_attention_window_len": None}, "tied": {"tie_word_embeddings": True}, "bytes": {"patching_mode": "byte"},
        "no_patcher": {"patch_in_forward": False}, "two_hashes": {"encoder_hash_byte_group_nb_functions": 2, "encoder_hash_byte_group_size": [2, 9]},
        "one_slot": {"cross_attn_k": 1} | {name: BLT[name] | {"cross_attn_k": 1} for name in ("encoder_config", "decoder_config")},
        "encoder_crosses_everywhere": {"encoder_config": BLT["encoder_config"] | {"cross_attn_all_layers": True}},
        "decoder_crosses_once": {"decoder_config": BLT["decoder_config"] | {"cross_attn_all_layers": False}},
        "no_projection": {"global_config": BLT["global_config"] | {"hidden_size": 64},
                          "decoder_config": BLT["decoder_config"] | {"hidden_size_global": 64}},
        "theta": {"global_config": BLT["global_config"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 30.0}},
                  "patcher_config": BLT["patcher_config"] | {"sliding_window": None}},
    },
    "blenderbot": {"plain": {}, "not_scaled": {"scale_embedding": False}, "relu": {"activation_function": "relu"}},
}  # fmt: skip
every_option = pytest.mark.parametrize("kind, option", [(kind, option) for kind, options in OPTIONS.items() for option in options])


def both(ours, theirs, kind, tokens, labels=None, **kwargs):
    """((logits, loss) of each)."""
    extra = {"decoder_input_ids": ids(len(tokens), 9, seed=5)} if kind == "blenderbot" and labels is None else {}
    hf = {} if kind == "blenderbot" else {"use_cache": False}
    found, expected = ours(tokens, labels=labels, **extra, **kwargs), theirs(tokens, labels=labels, **extra, **hf, **kwargs)
    return found, expected


def close(a, b, rtol=2e-5, scale=0.0):
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max(b.abs().max().item(), scale))


@every_option
def test_logits_loss_and_gradients(kind, option, tmp_path):
    ours, theirs = pair(kind, tmp_path, **OPTIONS[kind][option])
    tokens = ids()
    with torch.no_grad():
        found, expected = both(ours, theirs, kind, tokens)
    assert expected.logits.std() > 0.05
    close(found.logits, expected.logits)
    labels = ids(2, 13, seed=3)
    labels[0, 4:7] = -100
    found, expected = both(ours, theirs, kind, tokens, labels)
    close(found.loss, expected.loss)
    found.loss.backward()
    expected.loss.backward()
    gradients = {name: torch.zeros_like(weight) if weight.grad is None else weight.grad for name, weight in theirs.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, weight in ours.named_parameters():  # with one expert its weight is 1 and the router's gradient nothing but rounding
        close(torch.zeros_like(weight) if weight.grad is None else weight.grad, gradients[name], 2e-4, 1e-3 * largest)


@pytest.mark.parametrize("kind", [kind for kind in OPTIONS if kind != "blt"])  # its patches depend on the last digit: tests/models/test_blt.py
def test_bfloat16(kind, tmp_path):
    """As near to the float32 model as transformers' own bfloat16 is, twice that at most."""
    exact, theirs = pair(kind, tmp_path)
    ours = type(exact).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    tokens = ids(2, 40)
    with torch.no_grad():
        truth = both(exact, theirs, kind, tokens)[0].logits
        found, expected = both(ours, theirs.bfloat16(), kind, tokens)
    error, floor = (found.logits.float() - truth).norm(), (expected.logits.float() - truth).norm()
    assert error <= 2 * floor, (error, floor)


@pytest.mark.parametrize("kind", ["bamba", "dbrx"])
def test_padded_batch(kind, tmp_path):
    ours, theirs = pair(kind, tmp_path)
    tokens, mask = ids(3, 17), torch.ones(3, 17, dtype=torch.long)
    mask[1, :6], mask[2, :1] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = ours(tokens, attention_mask=mask).logits
        expected = theirs(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        alone = ours(tokens[1:2, 6:]).logits
    close(found[mask.bool()], expected[mask.bool()])
    close(found[1:2, 6:], alone)


def test_padded_questions(tmp_path):
    ours, theirs = pair("blenderbot", tmp_path)
    tokens, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    with torch.no_grad():
        found, expected = both(ours, theirs, "blenderbot", tokens, attention_mask=mask)
    close(found.logits, expected.logits)


@pytest.mark.parametrize("kind", ["bamba", "dbrx"])
def test_packed_texts_are_texts_alone(kind, tmp_path):
    ours, _ = pair(kind, tmp_path)
    tokens = ids(1, 31)
    bounds = torch.tensor([0, 5, 5, 22, 31], dtype=torch.int32)
    with torch.no_grad():
        packed = ours(tokens, cu_seqlens=bounds).logits
        for begin, end in zip(bounds.tolist(), bounds.tolist()[1:]):
            if end > begin:
                close(packed[:, begin:end], ours(tokens[:, begin:end]).logits)


@pytest.mark.parametrize("kind", ["bamba", "dbrx"])
@pytest.mark.parametrize("pieces", [(13,), (1,) * 13, (5, 1, 1, 6), (2, 11)], ids=str)
def test_in_pieces(kind, pieces, tmp_path):
    changes = {"time_step_limit": (0.2, 0.9)} if kind == "bamba" else {}
    ours, _ = pair(kind, tmp_path, **changes)
    tokens = ids()
    with torch.no_grad():
        whole, state = ours(tokens).logits, ours.new_state()
        parts = [ours(part, state=state).logits for part in tokens.split(pieces, 1)]
    close(torch.cat(parts, 1), whole)
    assert state.length == 13


@pytest.mark.parametrize("kind", ["bamba", "dbrx"])
def test_logits_to_keep(kind, tmp_path):
    ours, _ = pair(kind, tmp_path)
    with torch.no_grad():
        close(ours(ids(), logits_to_keep=3).logits, ours(ids()).logits[:, -3:])


def test_router_logits_and_auxiliary_loss(tmp_path):
    ours, theirs = pair("dbrx", tmp_path)
    tokens, mask = ids(3, 17), torch.ones(3, 17, dtype=torch.long)
    mask[1, :6] = 0
    for attention_mask in (None, mask):
        labels = tokens.masked_fill(mask.cumsum(1) <= 1, -100)  # what follows padding is judged by the padding's logits
        kwargs = {"labels": labels, "output_router_logits": True, "attention_mask": attention_mask}
        found, expected = ours(tokens, **kwargs), theirs(tokens, use_cache=False, **kwargs)
        close(found.aux_loss, expected.aux_loss)
        close(found.loss, expected.loss)
        for a, b in zip(found.router_logits, expected.router_logits):
            close(a.view(3, 17, -1)[mask.bool()], b.view(3, 17, -1)[mask.bool()])


@pytest.mark.parametrize("kind", OPTIONS)
def test_gradient_checkpointing(kind, tmp_path):
    ours, theirs = pair(kind, tmp_path)
    gradients = []
    for again in (False, True):
        ours.train()
        ours.zero_grad()
        ours.gradient_checkpointing = again
        torch.manual_seed(1)
        ours(ids(), labels=ids(seed=3)).loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in ours.named_parameters() if weight.grad is not None})
    assert len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, 1e-6)


@pytest.mark.parametrize("kind", ["bamba", "dbrx"])
def test_compiles_whole(kind, tmp_path):
    ours, _ = pair(kind, tmp_path)
    with torch.no_grad():
        close(torch.compile(ours, fullgraph=True, backend="aot_eager")(ids()).logits, ours(ids()).logits)


def test_dbrx_theta_in_attn_config():
    """databricks' own config.json; transformers reads 10000 there."""
    from terrazzo.models import DbrxConfig

    config = {"model_type": "dbrx", "attn_config": {"kv_n_heads": 8, "rope_theta": 500000, "clip_qkv": 8}, "n_heads": 48, "d_model": 6144}
    assert DbrxConfig.from_hf(config).rope_theta == 500000.0
    assert DbrxConfig.from_hf(config | {"rope_theta": 10.0}).rope_theta == 10.0


@pytest.mark.parametrize("changes, message", [
    ({"mamba_d_head": 7}, "mamba_n_heads \\* mamba_d_head"), ({"mamba_n_groups": 3}, "mamba_n_groups must divide"),
    ({"num_key_value_heads": 3}, "num_key_value_heads must divide"), ({"attn_layer_indices": [9]}, "must lie in 0 to 3"),
    ({"hidden_act": "tanhshrink"}, "hidden_act must be one of"), ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be 'default'"),
])  # fmt: skip
def test_bad_config(changes, message):
    from terrazzo.models import BambaConfig

    with pytest.raises(ValueError, match=message):
        BambaConfig.from_hf(BAMBA | changes)


@pytest.mark.parametrize("kwargs, message", [
    ({"input_ids": torch.zeros(3, dtype=torch.long)}, "input_ids must be"), ({"input_ids": torch.full((1, 3), 97)}, "must lie in 0 to 96, got 97"),
    ({"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 2)}, r"attention_mask must be \(B, past \+ L\) = \(1, 3\)"),
    ({"input_ids": torch.ones(2, 3, dtype=torch.long), "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "batch of 1"),
    ({"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.ones(1, 2, dtype=torch.long)}, r"labels must be like input_ids = \(1, 3\), got \(1, 2\)"),
    ({"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.tensor([[5, -100, 97]])}, "labels must lie in 0 to 96, got 97"),
    ({"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.ones(1, 3)}, "labels must be .* got .1, 3. torch.float32"),
    ({"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.tensor([[5, -100, 9]]), "logits_to_keep": 2}, "leave out logits_to_keep"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["bamba", "dbrx"])
def test_bad_input(kind, kwargs, message, tmp_path):
    ours, _ = pair(kind, tmp_path)
    with pytest.raises(ValueError, match=message):
        ours(**kwargs)


@pytest.mark.parametrize("option", OPTIONS["dbrx"])
def test_experts_one_by_one(option, tmp_path, monkeypatch):
    """Where torch's products in 16 bits are faster than the kernels': the same numbers, of experts nobody asks and of another rank's too."""
    ours, theirs = pair("dbrx", tmp_path, **OPTIONS["dbrx"][option])
    monkeypatch.setattr(dbrx, "better_left", lambda *_: True)
    tokens, labels = ids(1, 3), ids(1, 3, seed=3)
    terrazzo.reset_counters()
    found, expected = both(ours, theirs, "dbrx", tokens, labels)
    assert "fused_experts" not in terrazzo.counters()
    close(found.logits, expected.logits)
    close(found.loss, expected.loss)
    found.loss.backward()
    expected.loss.backward()
    wanted = {name: weight.grad for name, weight in theirs.named_parameters()}
    most = max(grad.abs().max().item() for grad in wanted.values())
    for name, weight in ours.named_parameters():
        close(weight.grad, wanted[name], 2e-4, 1e-3 * most)
    experts = next(module for module in ours.modules() if isinstance(module, dbrx.Experts))
    x, weights, indices = torch.randn(5, 32), torch.rand(5, 2), torch.tensor([[0, 9], [8, 1], [2, 2], [9, 8], [7, 0]])
    one_by_one = experts(x, indices, weights)
    monkeypatch.setattr(dbrx, "better_left", lambda *_: False)
    close(one_by_one, experts(x, indices, weights))


def test_when_experts_run_one_by_one(monkeypatch):
    monkeypatch.setattr(adapters, "TORCH_IS_FAST", {torch.bfloat16: adapters.AMX})
    weight, indices = torch.empty(4, 8, dtype=torch.bfloat16), torch.zeros(adapters.FEW_ROWS * 2, 2)
    assert not adapters.better_left(indices, weight, 4, None)
    assert adapters.better_left(torch.zeros(adapters.FEW_ROWS * 2 + 1, 2), weight, 4, None)
    assert not adapters.better_left(torch.zeros(999, 2), weight.float(), 4, None)
