"""The models that come with the package: their size, that transformers reads them, what they know, and what they say."""
import lzma
import math
import re

import numpy as np
import pytest
import torch
import transformers
from terrazzo import cli
from terrazzo.models import Tokenizer, from_pretrained, training
from terrazzo.models.auto import SHIPPED
from terrazzo.models.entropy_model import tokens_of

THEIRS = {"tiny-bamba": transformers.BambaForCausalLM, "tiny-blt": transformers.BltForCausalLM}
every_model = pytest.mark.parametrize("name", THEIRS)


@pytest.fixture(scope="module")
def held_out():
    return lzma.open(training.DATA / "held_out.txt.xz").read()


@pytest.fixture(scope="module")
def words():
    """Words of four letters and more that the training text has ten times at least."""
    found, counts = np.unique(re.findall(rb"[a-z]{4,}", lzma.open(training.DATA / "train.txt.xz").read().lower()), return_counts=True)
    return set(found[counts >= 10].tolist())


def test_what_is_shipped():
    assert set(SHIPPED) == set(THEIRS)


@every_model
def test_it_is_small(name):
    files = {file.name: file.stat().st_size for file in SHIPPED[name].iterdir()}
    assert set(files) == {"config.json", "generation_config.json", "model.safetensors"}
    assert sum(files.values()) <= 12e6
    assert 3e6 <= sum(weight.numel() for weight in from_pretrained(name).parameters() if weight.requires_grad) <= 6e6


@every_model
def test_transformers_reads_it_and_computes_the_same(name, held_out):
    ours = from_pretrained(name, torch.float32)
    theirs, info = THEIRS[name].from_pretrained(SHIPPED[name], dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokens = tokens_of(held_out[:200])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs.eval()(tokens, use_cache=False).logits, rtol=1e-3, atol=1e-3)


@every_model
def test_it_packs_a_text_that_it_never_saw_tighter_than_archives(name, held_out):
    some = held_out[:8000]
    bits = training.bits_per_byte(from_pretrained(name, torch.float32), some)
    archives = training.compressed(some)
    assert bits < min(archives.values()), (bits, archives)


@every_model
@pytest.mark.parametrize("prompt", ["The king said unto", "It was a dark night, and", "She looked at him with"])
def test_it_says_english_words(name, prompt, words, capsys):
    assert cli.main(["generate", "--model", name, prompt, "--seed", "1", "--max-new-tokens", "300"]) == 0
    said = re.findall(rb"[a-z]{4,}", capsys.readouterr().out.lower().encode())[:-1]  # the last may be cut
    known = sum(word in words for word in said) / len(said)
    assert len(said) > 15 and len(set(said)) > 8 and known > 0.6, (known, said)


@every_model
def test_a_stream_is_what_the_whole_text_gives(name):
    """Byte by byte with its state, or all of the text at once: the same likeliest bytes."""
    model, tokenizer = from_pretrained(name, torch.float32), Tokenizer.of(SHIPPED[name])
    ids = torch.tensor([tokenizer.encode("And the Lord said unto Moses, ")])
    out = model.generate(ids, 60, temperature=0.0)
    with torch.no_grad():
        logits = model(out).logits[0, ids.shape[1] - 1 : -1]
    chosen = logits.gather(1, out[0, ids.shape[1] :, None])[:, 0]
    assert (logits.max(1)[0] - chosen).max() < 1e-3
    assert math.isfinite(float(logits.sum()))
