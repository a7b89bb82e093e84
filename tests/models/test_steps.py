"""Decoding one position by the fused ops: the logits of the whole text, and module by module where something stands in the way."""
import copy

import pytest
import terrazzo
import torch
from terrazzo import adapters
from terrazzo.models import layers, steps

from model_pairs import ids, pair

KINDS = ["bamba", "dbrx", "blt"]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {kind: pair(kind, tmp_path_factory.mktemp(kind))[0] for kind in KINDS}


def vocabulary(model):
    return min(model.config.vocab_size, 256)


def stepped(model, tokens, begin=9):
    """Logits (B, L - begin, V) of one position after another behind the first `begin`."""
    state = model.new_state()
    model(tokens[:, :begin], state=state)
    terrazzo.reset_counters()
    return torch.cat([model(token, state=state).logits for token in tokens[:, begin:].split(1, 1)], 1)


def fused():
    return {"norm_linear", "attention_update"} & set(terrazzo.counters())


@every_kind
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=str)
def test_steps_have_the_logits_of_the_whole_text(models, kind, rows, dtype, tol):
    model = copy.deepcopy(models[kind]).to(dtype)
    tokens = ids(rows, 30, vocabulary(model))
    with torch.no_grad():
        found, expected = stepped(model, tokens), model(tokens).logits[:, 9:]
        assert "attention_update" in fused() and all(set(terrazzo.counters()[op]) == {"cpu"} for op in fused())
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol * expected.abs().max().item())


@every_kind
def test_gradients_hooks_and_many_rows_go_module_by_module(models, kind):
    model, tokens = models[kind], ids(2, 12, vocabulary(models[kind]))
    with torch.no_grad():
        expected = stepped(model, tokens)
    assert fused()
    found = stepped(model, tokens)
    assert found.requires_grad and (kind == "blt" or not fused())  # its patcher has no gradients
    torch.testing.assert_close(found.detach(), expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())
    with torch.no_grad():
        found = stepped(model, tokens[:1].expand(steps.FEW_ROWS + 1, -1))
        assert not fused()
        torch.testing.assert_close(found[:1], expected[:1], rtol=2e-5, atol=2e-5 * expected.abs().max().item())


def ours(monkeypatch, where):
    """Linear layers of any size are this package's, those of many rows only where that fuses them, or those of float32 are torch's."""
    monkeypatch.setattr(adapters, "TORCH_IS_SLOW", where == "everywhere")
    monkeypatch.setattr(adapters, "FUSING_PAYS", {torch.float32: where == "fused"})
    monkeypatch.setattr(adapters, "BIG_WEIGHT", 1)


@pytest.mark.parametrize("kind", ["bamba", "blt"])
@pytest.mark.parametrize("rows, length", [(1, 40), (3, 30)])
@pytest.mark.parametrize("where", ["everywhere", "fused"])
def test_many_rows_are_fused_where_that_is_faster(models, kind, rows, length, where, monkeypatch):
    model, tokens = models[kind], ids(rows, length, vocabulary(models[kind]))
    with torch.no_grad():
        ours(monkeypatch, None)
        terrazzo.reset_counters()
        expected = model(tokens).logits
        assert "norm_linear" not in terrazzo.counters()
        ours(monkeypatch, where)
        found = model(tokens).logits
        assert set(terrazzo.counters()["norm_linear"]) == {"cpu"}
        others = {"bamba": 0, "blt": 4}[kind] if where == "everywhere" else 0  # heads, and between bytes and patches
        assert sum(terrazzo.counters().get("linear", {}).values()) == others
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["bamba", "dbrx", "blenderbot"])
def test_long_texts_attend_by_our_kernel(kind, tmp_path):
    """Logits and gradients of transformers, whose attention is torch's; short texts, masks and autocast stay with torch."""
    model, theirs = pair(kind, tmp_path, **({"max_position_embeddings": 256} if kind == "blenderbot" else {}))
    tokens, mask = ids(2, adapters.LONG_WITH_GRADIENTS + 9), torch.ones(2, adapters.LONG_WITH_GRADIENTS + 9, dtype=torch.int64)
    more = {"decoder_input_ids": tokens.flip(1)} if kind == "blenderbot" else {}
    calls = lambda: terrazzo.counters().get("local_attention", {})  # noqa: E731
    terrazzo.reset_counters()
    found, expected = model(tokens, labels=tokens, **more), theirs(tokens, labels=tokens, **more)
    assert set(calls()) == {"cpu"}
    torch.testing.assert_close(found.logits, expected.logits, rtol=2e-5, atol=2e-5 * expected.logits.abs().max().item())
    found.loss.backward()
    expected.loss.backward()
    wanted = {name: weight.grad for name, weight in theirs.named_parameters()}
    most = max(grad.abs().max().item() for grad in wanted.values())  # the bias of keys moves nothing: its gradient is rounding alone
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, wanted[name], rtol=1e-3, atol=1e-4 * max(wanted[name].abs().max().item(), 1e-2 * most), msg=name)
    terrazzo.reset_counters()
    mask[0, :5] = 0
    with torch.no_grad():
        model(tokens, attention_mask=mask, **{name: t[:, :8] for name, t in more.items()})
        model(tokens[:, : adapters.LONG - 1], **{name: t[:, :8] for name, t in more.items()})
        with torch.autocast("cpu"):
            model(tokens, **more)
    assert not calls()


def hook(module, calls):
    return module.register_forward_hook(lambda *_: calls.append(0)).remove


def another_forward(module, calls):
    """As accelerate puts one on the instance."""
    def forward(*args, **kwargs):
        calls.append(0)
        return type(module).forward(module, *args, **kwargs)

    module.forward = forward
    return lambda: module.__dict__.pop("forward")


@pytest.mark.parametrize("kind", ["bamba", "blt"])
@pytest.mark.parametrize("put", [hook, another_forward])
def test_a_changed_module_is_called(models, kind, put):
    model, tokens, calls = models[kind], ids(1, 12, vocabulary(models[kind])), []
    modules = [module for name, module in model.named_modules() if name.endswith(("q_proj", "down_proj", "self_attn", ".mlp", "feed_forward"))]
    with torch.no_grad():
        expected = stepped(model, tokens)
        undo = [put(module, calls) for module in modules]
        found = stepped(model, tokens)
    for step in undo:
        step()
    assert len(calls) > 3 * len(modules)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())
