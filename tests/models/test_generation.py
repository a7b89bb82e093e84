"""Generated tokens against transformers', and what transformers has no twin for."""
import pytest
import torch
from terrazzo.models import Blenderbot
from terrazzo.models.generation import Settings

from model_pairs import ids, pair

KINDS = ("bamba", "dbrx", "blt", "blenderbot")
GREEDY = {
    "plain": {}, "repetition": {"repetition_penalty": 1.4}, "ngrams": {"no_repeat_ngram_size": 2}, "at_least": {"min_new_tokens": 9},
    "everything": {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
}  # fmt: skip
BEAMS = {
    "four": {"num_beams": 4}, "early": {"num_beams": 3, "early_stopping": True}, "never": {"num_beams": 3, "early_stopping": "never"},
    "long": {"num_beams": 4, "length_penalty": 2.0}, "short": {"num_beams": 4, "length_penalty": -1.0}, "ngrams": {"num_beams": 5, "no_repeat_ngram_size": 2},
    "published": {"num_beams": 10, "min_length": 8, "length_penalty": 0.65, "encoder_no_repeat_ngram_size": 3},
}  # fmt: skip


def expected(theirs, tokens, **kwargs):
    return theirs.generate(tokens, do_sample=False, use_cache=theirs.config.model_type != "blt", **kwargs)  # its cache there is wrong


def same(found, wanted):
    """transformers pads a beam's tail one place further in some versions: what counts is every token."""
    length = max(found.shape[1], wanted.shape[1])
    pad = [torch.nn.functional.pad(t, (0, length - t.shape[1])) for t in (found, wanted)]
    assert torch.equal(*pad), f"\n{found}\n{wanted}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", GREEDY)
def test_greedy(kind, option, tmp_path):
    ours, theirs = pair(kind, tmp_path)
    for seed in range(2):
        tokens = ids(2, 11, seed=seed)
        same(ours.generate(tokens, 20, **GREEDY[option]), expected(theirs, tokens, max_new_tokens=20, **GREEDY[option]))


@pytest.mark.parametrize("kind, option", [(kind, option) for kind in KINDS for option in BEAMS if kind == "blenderbot" or option != "published"])
def test_beams(kind, option, tmp_path):
    ours, theirs = pair(kind, tmp_path)
    for seed in range(2):
        tokens = ids(2, 11, seed=seed)
        same(ours.generate(tokens, 16, **BEAMS[option]), expected(theirs, tokens, max_new_tokens=16, **BEAMS[option]))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["bamba", "dbrx"])
def test_unequal_prompts(kind, beams, tmp_path):
    ours, theirs = pair(kind, tmp_path)
    tokens, mask = ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5], mask[2, :1] = 0, 0
    tokens = tokens * mask
    found = ours.generate(tokens, 12, attention_mask=mask, num_beams=beams)
    same(found, expected(theirs, tokens, max_new_tokens=12, attention_mask=mask, num_beams=beams))
    alone = ours.generate(tokens[1:2, 5:], 12, num_beams=beams)
    assert torch.equal(found[1, 5 : 5 + alone.shape[1]], alone[0])


@pytest.mark.parametrize("beams", [1, 4])
def test_unequal_questions(beams, tmp_path):
    ours, theirs = pair("blenderbot", tmp_path)
    tokens, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    tokens = tokens * mask
    same(ours.generate(tokens, 15, attention_mask=mask, num_beams=beams), expected(theirs, tokens, max_new_tokens=15, attention_mask=mask, num_beams=beams))


def test_settings_of_the_checkpoint(tmp_path):
    """generation_config.json rules what the caller leaves open."""
    ours, theirs = pair("blenderbot", tmp_path)
    for name, value in {"num_beams": 3, "max_length": 14, "min_length": 6, "length_penalty": 0.65, "encoder_no_repeat_ngram_size": 3}.items():
        setattr(theirs.generation_config, name, value)
    theirs.save_pretrained(tmp_path)
    ours = Blenderbot.from_pretrained(tmp_path)
    same(ours.generate(ids(2, 11)), expected(theirs, ids(2, 11)))


def test_what_generation_config_leaves_out_is_not_taken_from_the_config(tmp_path):
    """As in transformers: a forced end that only config.json names is none, where there is a generation_config.json."""
    ours, theirs = pair("blenderbot", tmp_path)
    tokens = ids(2, 11)
    assert bool((ours.generate(tokens, 8, eos_token_id=[])[:, -1] == 2).all())
    theirs.generation_config.forced_eos_token_id = None
    theirs.save_pretrained(tmp_path)
    found = Blenderbot.from_pretrained(tmp_path).generate(tokens, 8, min_new_tokens=8)
    assert bool((found[:, -1] != 2).all())
    same(found, expected(theirs, tokens, max_new_tokens=8, min_new_tokens=8))


@pytest.fixture(scope="module")
def bamba(tmp_path_factory):
    return pair("bamba", tmp_path_factory.mktemp("bamba"))[0]


def test_sampling_is_by_the_generator(bamba):
    def draw(seed, **kwargs):
        return bamba.generate(ids(4, 6), 12, generator=torch.Generator().manual_seed(seed), eos_token_id=[], **kwargs)

    assert torch.equal(draw(1, temperature=1.0), draw(1, temperature=1.0))
    assert not torch.equal(draw(1, temperature=1.0), draw(2, temperature=1.0))
    greedy = bamba.generate(ids(4, 6), 12, eos_token_id=[])
    for settings in ({"temperature": 0.0}, {"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(draw(3, **settings), greedy), settings


@pytest.mark.parametrize("settings, allowed", [({"top_k": 5}, lambda p: p >= p.topk(5)[0][-1]), ({"top_p": 0.5}, lambda p: _nucleus(p, 0.5))])
def test_what_sampling_leaves(bamba, settings, allowed):
    prompt = ids(1, 6)
    probabilities = bamba(prompt).logits[0, -1].softmax(-1)
    drawn = bamba.generate(prompt.expand(400, -1), 1, generator=torch.Generator().manual_seed(0), **settings)[:, -1]
    ok = allowed(probabilities)
    assert bool(ok[drawn].all())
    share = torch.bincount(drawn, minlength=97).float() / 400
    kept = torch.where(ok, probabilities, 0)
    assert (share - kept / kept.sum()).abs().max() < 0.12


def _nucleus(p, mass):
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    return torch.zeros_like(p, dtype=torch.bool).scatter(0, order, before < mass)


def test_stream_and_stop_strings(bamba):
    class Tokenizer:
        def decode(self, tokens):
            return "".join(chr(32 + token) for token in tokens)

    prompt, seen = ids(1, 6), []
    whole = bamba.generate(prompt, 20, eos_token_id=[], stream=lambda tokens: seen.append(tokens.item()))
    assert seen == whole[0, 6:].tolist()
    stop = Tokenizer().decode(whole[0, 9:11].tolist())
    stopped = bamba.generate(prompt, 20, eos_token_id=[], stop_strings=[stop], tokenizer=Tokenizer())
    assert torch.equal(stopped, whole[:, : stopped.shape[1]]) and stopped.shape[1] <= 11
    assert stop in Tokenizer().decode(stopped[0, 6:].tolist())


@pytest.mark.parametrize("kwargs, error, message", [
    ({}, ValueError, "say how long"), ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be"), ({"max_new_tokens": 2, "top_p": 1.5}, ValueError, "top_p must be"),
    ({"max_new_tokens": 2, "temperatur": 1.0}, TypeError, "unknown setting 'temperatur'"), ({"max_new_tokens": 2, "num_beams": 2, "top_k": 3}, ValueError, "no sampling"),
    ({"max_new_tokens": 2, "stop_strings": ["a"]}, ValueError, "needs the tokenizer"), ({"max_new_tokens": 2, "stream": 3}, TypeError, "stream must be a function"),
    ({"max_new_tokens": 2, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, ValueError, "pad on the left"),
])  # fmt: skip
def test_bad_settings(bamba, kwargs, error, message):
    with pytest.raises(error, match=message):
        bamba.generate(ids(1, 6), **kwargs)


def test_nothing_to_do(bamba):
    assert torch.equal(bamba.generate(ids(2, 6), 0), ids(2, 6))
    with pytest.raises(ValueError, match="must hold a token"):
        bamba.generate(ids(2, 6)[:, :0], 3)


def test_too_long_a_chat(tmp_path):
    ours, _ = pair("blenderbot", tmp_path)
    with pytest.raises(ValueError, match="max_position_embeddings = 64 tokens, got 65; cut the oldest turns"):
        ours.generate(ids(1, 65), 3)


def test_greedy_is_the_default_of_a_checkpoint_that_does_not_sample():
    class Config:
        eos_token_id = 2

    assert not Settings.of("f", {"max_new_tokens": 3}, {"top_k": 50, "temperature": 0.7}, Config).samples
    assert Settings.of("f", {"max_new_tokens": 3}, {"top_k": 50, "do_sample": True}, Config).samples
