"""Decoding one position by the fused ops: the logits of the whole text, and module by module where something stands in the way."""
import copy

import pytest
import terrazzo
import torch
from terrazzo.models import steps

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


@pytest.mark.parametrize("kind", ["bamba", "blt"])
def test_a_hooked_projection_is_called(models, kind):
    model, tokens, calls = models[kind], ids(1, 12, vocabulary(models[kind])), []
    modules = [module for name, module in model.named_modules() if name.endswith(("q_proj", "down_proj"))]
    with torch.no_grad():
        expected = stepped(model, tokens)
        hooks = [module.register_forward_hook(lambda *_: calls.append(0)) for module in modules]
        found = stepped(model, tokens)
    for hook in hooks:
        hook.remove()
    assert len(calls) > 3 * len(modules)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())
