"""Tokenizers of checkpoints against transformers' and against the bytes themselves; streams; Blenderbot's turns."""
import json
import sys

import pytest
import tokenizers
import transformers
from terrazzo.models import Tokenizer
from terrazzo.models.tokenizer import BYTES

TEXTS = ["Hello world", " Hello  world\n\tand you?", "naïve façade — 漢字 🙂👩‍👩‍👧", "", "</s>x<s>"]
BLENDERBOT = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def trained(special):
    """A byte-level BPE of a few hundred merges."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["the world says hello to the whole world and to you", "hello world, how are you? I am well"] * 5, trainer)
    return inner


@pytest.fixture
def blenderbot(tmp_path):
    """Only vocab.json and merges.txt, as in Blenderbot's older checkpoints."""
    trained(["<s>", "<pad>", "</s>", "<unk>"]).model.save(str(tmp_path))
    write(tmp_path, "config.json", {"model_type": "blenderbot", "vocab_size": 400})
    write(tmp_path, "tokenizer_config.json", BLENDERBOT | {"tokenizer_class": "BlenderbotTokenizer"})
    return tmp_path


@pytest.fixture
def stored(tmp_path):
    """A tokenizer.json, ids of special tokens partly in config.json."""
    inner = trained(["<bos>", "<eos>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    inner.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "config.json", {"model_type": "bamba", "vocab_size": 400, "eos_token_id": 1})
    write(tmp_path, "tokenizer_config.json", {"bos_token": {"content": "<bos>"}, "tokenizer_class": "PreTrainedTokenizerFast"})
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_vocab_and_merges(blenderbot, text):
    ours, theirs = Tokenizer.of(blenderbot), transformers.BlenderbotTokenizer.from_pretrained(blenderbot)
    assert ours.encode(text, special=False) == theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text) == [*ours.encode(text, special=False), ours.eos]
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert (ours.bos, ours.pad, ours.eos, ours.unk) == (0, 1, 2, 3)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("add", [{}, {"add_bos_token": False}, {"add_eos_token": True, "eos_token": "<eos>"}], ids=str)
def test_tokenizer_json(stored, text, add):
    write(stored, "tokenizer_config.json", {"bos_token": "<bos>", "tokenizer_class": "PreTrainedTokenizerFast"} | add)
    ours, theirs = Tokenizer.of(stored), transformers.AutoTokenizer.from_pretrained(stored)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert (ours.bos, ours.eos) == (0, 1)


@pytest.fixture
def bytewise(tmp_path):
    write(tmp_path, "config.json", {"model_type": "bamba", "vocab_size": BYTES, "pad_token_id": 3})
    return tmp_path


@pytest.mark.parametrize("config", [{"model_type": "blt", "vocab_size": 260}, {"model_type": "blt_patcher"}, {"model_type": "bamba", "vocab_size": 260}], ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_bytes(tmp_path, config, text):
    write(tmp_path, "config.json", config)
    ours = Tokenizer.of(tmp_path)
    assert ours.encode(text) == [1, *(4 + byte for byte in text.encode())]
    assert ours.decode([*ours.encode(text), 2]) == text
    assert ours.decode([4 + 0xE6, 4 + 65]) == "\ufffdA"


@pytest.mark.parametrize("text", TEXTS[:4])
@pytest.mark.parametrize("kind", ["blenderbot", "stored", "bytewise"])
def test_streams_never_break_a_character(kind, text, request):
    ours = Tokenizer.of(request.getfixturevalue(kind))
    tokens, stream = ours.encode(text), ours.stream()
    pieces = [stream.feed(token) for token in tokens]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.end() == ours.decode(tokens)
    assert len([piece for piece in pieces if piece]) > 3 or not text


@pytest.mark.parametrize("kind", ["blenderbot", "bytewise"])
def test_streams_that_end_within_a_character(kind, request):
    ours = Tokenizer.of(request.getfixturevalue(kind))
    tokens, stream = ours.encode("a漢", special=False)[:-1], ours.stream()
    assert "".join(map(stream.feed, tokens)) + stream.end() == ours.decode(tokens)
    assert ours.decode(tokens).lstrip() == "a\ufffd"


def test_turns_of_a_chat(blenderbot):
    """transformers' rule for Blenderbot: a space before what the user says, two between turns, </s> at the end."""
    ours = Tokenizer.of(blenderbot)
    turns = ["hello", " I am well", "and the world?"]
    whole = ours.encode(" hello   I am well   and the world?")
    assert ours.chat(turns) == whole and whole[-1] == ours.eos
    last = ours.encode(" and the world?")
    assert ours.chat(turns, len(whole)) == whole
    assert ours.chat(turns, len(last)) == last
    assert ours.chat(turns, len(last) - 2) == last[2:]
    with pytest.raises(ValueError, match="the user's first and last, got 2"):
        ours.chat(turns[:2])


def test_missing_and_spoilt_files(tmp_path, stored):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        Tokenizer.of(tmp_path / "nowhere")
    (stored / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="are spoilt"):
        Tokenizer.of(stored)
    (stored / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer.json, no vocab.json with merges.txt, and its vocab_size 400 is not that of bytes, 260"):
        Tokenizer.of(stored)


def test_the_library_is_named_where_it_is_missing(stored, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install terrazzo\[hf\]"):
        Tokenizer.of(stored)
