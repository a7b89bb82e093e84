"""The entropy model against transformers' BltPatcher, in blocks, its checkpoints, its trainer, and the one that is shipped."""
import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import terrazzo
import torch
from safetensors.torch import load_file, save_file
from terrazzo.models import EntropyConfig, EntropyModel, train_entropy, training
from terrazzo.models.entropy_model import BOS, OFFSET, SHIPPED, tokens_of, word_starts
from terrazzo.tolerance import check

transformers = pytest.importorskip("transformers")
from transformers.models.blt.configuration_blt import BltPatcherConfig  # noqa: E402
from transformers.models.blt.modeling_blt import BltPatcher  # noqa: E402

DATA = Path(training.DATA)
CONFIGS = {
    "window": dict(sliding_window=7),
    "all": dict(sliding_window=None),
    "grouped_heads": dict(sliding_window=9, num_key_value_heads=2, rope_theta=500.0),
}
every_config = pytest.mark.parametrize("sizes", CONFIGS.values(), ids=CONFIGS.keys())


def tiny(seed=0, **sizes):
    torch.manual_seed(seed)
    return EntropyModel(EntropyConfig(**dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48) | sizes)).eval()


def some_tokens(B=2, L=50):
    return torch.randint(0, 260, (B, L), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of_transformers(patcher, tokens):
    return patcher(tokens, use_cache=False)[2]


@every_config
def test_transformers_reads_ours_and_computes_the_same(tmp_path, sizes):
    model, tokens = tiny(**sizes), some_tokens()
    model.save_pretrained(tmp_path)
    theirs, report = BltPatcher.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    exact = logits_of_transformers(theirs.double(), tokens)
    verdict = check(model.logits(tokens), exact, logits_of_transformers(theirs.float(), tokens))
    assert verdict.ok, verdict.why


@every_config
def test_ours_reads_transformers_and_computes_the_same(tmp_path, sizes):
    torch.manual_seed(3)
    sizes = {k: v for k, v in sizes.items() if k != "rope_theta"} | {"rope_parameters": {"rope_type": "default", "rope_theta": sizes.get("rope_theta", 10000.0)}}
    theirs = BltPatcher(BltPatcherConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **sizes)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path)
    model, tokens = EntropyModel.from_pretrained(tmp_path), some_tokens()
    terrazzo.reset_counters()
    found = model.logits(tokens)
    assert set(terrazzo.counters()["local_attention"]) == {"cpu"}
    same = logits_of_transformers(theirs, tokens)
    verdict = check(found, logits_of_transformers(theirs.double(), tokens), same)
    assert verdict.ok, verdict.why
    assert not check(found * 1.01, same.double(), same).ok


def test_gradients_are_those_of_transformers(tmp_path):
    model, tokens = tiny(sliding_window=7), some_tokens()
    model.save_pretrained(tmp_path)
    theirs = BltPatcher.from_pretrained(tmp_path)

    def grads(module, logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        found = {name: weight.grad.clone() for name, weight in module.named_parameters()}
        module.zero_grad()
        return found

    ours, same = grads(model, model(tokens)), grads(theirs, theirs(tokens, use_cache=False)[2])
    exact = grads(theirs.double(), theirs(tokens, use_cache=False)[2])
    for name, grad in ours.items():
        verdict = check(grad, exact[name], same[name])
        assert verdict.ok, f"{name}: {verdict.why}"


@every_config
@pytest.mark.parametrize("block", [1, 3, 16])
def test_blocks_give_the_whole_texts_logits(sizes, block):
    model, tokens = tiny(**sizes).double(), some_tokens(L=24)
    with torch.no_grad():
        whole = model(tokens)
    torch.testing.assert_close(model.logits(tokens, block=block), whole, rtol=1e-12, atol=1e-12)
    exact = torch.distributions.Categorical(logits=whole).entropy()
    torch.testing.assert_close(model.entropies(tokens, block=block), exact, rtol=1e-12, atol=1e-12)


def test_a_state_goes_on_where_it_ended():
    model, tokens = tiny(sliding_window=7), some_tokens()
    past = model.past()
    parts = [model.logits(part, past) for part in tokens.split([1, 30, 2, 1, 16], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.logits(tokens))
    assert past.length == 50
    assert all(kept.shape[2] == 7 + 1 for layer in past.kept for kept in layer)  # never more than the window, and the slot of padding


@every_config
@pytest.mark.parametrize("pieces", [(50,), (1, 30, 2, 1, 16), (20, 1, 1, 1, 27)], ids=str)
def test_rows_of_unequal_length(sizes, pieces):
    model, tokens, lengths = tiny(**sizes), some_tokens(3), torch.tensor([50, 23, 1])
    past, begin = model.past(), 0
    for part in tokens.split(pieces, 1):
        logits = model.logits(part, past, (lengths - begin).clamp(0, part.shape[1]))
        for row, length in enumerate(lengths.tolist()):
            n = max(min(length - begin, part.shape[1]), 0)
            torch.testing.assert_close(logits[row, :n], model.logits(tokens[row : row + 1, :length])[0, begin : begin + n])
        begin += part.shape[1]
    assert past.length.tolist() == [50, 23, 1] and past.longest == 50


def test_what_is_saved_comes_back_bit_by_bit(tmp_path):
    model = tiny()
    model.config.patching_threshold = 1.25
    model.save_pretrained(tmp_path)
    again = EntropyModel.from_pretrained(tmp_path / "model.safetensors")
    assert again.config == model.config and not again.training
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    model.save_pretrained(tmp_path, torch.float16)
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert torch.equal(EntropyModel.from_pretrained(tmp_path).norm.weight, model.norm.weight)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_patcher_of_a_whole_blt_is_read(tmp_path, sharded):
    model = tiny(sliding_window=7)
    weights = {f"model.patcher.{name}": weight for name, weight in model.state_dict().items()} | {"lm_head.weight": torch.zeros(2, 2)}
    config = {"model_type": "blt", "patching_threshold": 1.5, "hidden_size": 64, "patcher_config": model.config.to_hf()}
    config["patcher_config"].pop("patching_threshold")
    (tmp_path / "config.json").write_text(json.dumps(config))
    if sharded:
        files = {name: f"model-{1 + index % 2}-of-2.safetensors" for index, name in enumerate(weights)}
        for file in set(files.values()):
            save_file({name: weights[name] for name in weights if files[name] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        save_file(weights, tmp_path / "model.safetensors")
    found = EntropyModel.from_pretrained(tmp_path)
    assert found.config.patching_threshold == 1.5 and found.config.hidden_size == 32
    assert torch.equal(found.logits(some_tokens()), model.logits(some_tokens()))


def _config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _weights(edit):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors")

    return change


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def _index(text):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return change


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object, got list"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (_pickled, "pytorch_model.bin is not read, it can run code: save it as safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no tensors here"), "is not a whole safetensors file"),
        (_index("{}"), "is no index of shards"),
        (_index('{"weight_map": {"patcher.norm.weight": "model-1-of-1.safetensors"}}'), "model-1-of-1.safetensors"),
        (_config(model_type="llama"), "model_type 'blt' or 'blt_patcher', got 'llama'"),
        (_config(hidden_size=64), "must be (64, 64) by its config.json, got (32, 32)"),
        (_config(hidden_size="32"), "hidden_size must be a positive integer, got '32'"),
        (_config(hidden_size=30), "hidden_size must be heads of an even size, got 30"),
        (_config(num_key_value_heads=3), "num_key_value_heads must divide num_attention_heads 4, got 3"),
        (_config(vocab_size=256), "vocab_size must be at least 260"),
        (_config(sliding_window=0), "sliding_window must be a positive integer or None, got 0"),
        (_config(rope_parameters={"rope_type": "llama3"}), "rope_type must be 'default', got 'llama3'"),
        (_weights(lambda weights: weights.pop("norm.weight")), "lacks 1 tensors of a BLT patcher: norm.weight"),
    ],
)
def test_bad_checkpoints_say_what_is_wrong(tmp_path, spoil, message):
    tiny().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, OSError)) as caught:
        EntropyModel.from_pretrained(tmp_path)
    assert message in str(caught.value)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        EntropyModel.from_pretrained(tmp_path / "nowhere")


def test_tokens_and_word_starts():
    assert tokens_of(b"a\xff").tolist() == [[BOS, OFFSET + 97, OFFSET + 255]]
    text = "The cat's 2nd nap: naïve.".encode()
    assert [text[start : start + 2].decode("utf-8", "replace") for start in np.flatnonzero(word_starts(text))] == ["Th", "ca", "s ", "2n", "na", "na"]


# ---- the trainer and the shipped model ---------------------------------------------------------------------


def test_windows_go_through_all_of_the_text():
    text = np.frombuffer(b"word " * 400, np.uint8)
    source = training.batches("f", text, 50, 4, torch.Generator().manual_seed(0))
    windows = torch.cat([next(source) for _ in range(9)])
    assert windows.shape == (36, 51) and (windows[:, 0] == BOS).all() and (windows[:, 1] == OFFSET + ord("w")).all()
    with pytest.raises(ValueError, match="longer than a window of 50 bytes, got 20"):
        next(training.batches("f", text[:20], 50, 4, torch.Generator()))


def test_training_learns_and_writes_a_model(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(b"to be or not to be, that is the question; " * 40)
    argv = [str(text), "--held-out", str(text), "--out", str(tmp_path / "model"), "--steps", "25", "--layers", "1", "--width", "32", "--heads", "2",
            "--length", "64", "--window", "16", "--lr", "0.01", "--json"]  # fmt: skip
    assert train_entropy.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 25 and report["bytes"] == 25 * 4 * 64
    assert report["trained"]["bits_per_byte"] < 0.75 * report["untrained"]["bits_per_byte"]
    model = EntropyModel.from_pretrained(tmp_path / "model")
    assert model.config.patching_threshold == report["trained"]["threshold"]
    assert train_entropy.evaluate(model, np.frombuffer(text.read_bytes(), np.uint8), 4.75) == report["trained"]


@pytest.mark.parametrize("argv, message", [(("--steps", "0"), "must be positive"), (("no-such-file",), "no-such-file"), (("--width", "33"), "hidden_size")])
def test_trainer_errors_are_one_line(tmp_path, capsys, argv, message):
    assert train_entropy.main(["--out", str(tmp_path), "--steps", "1", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


@pytest.fixture(scope="module")
def held_out():
    return np.frombuffer(lzma.open(DATA / "held_out.txt.xz").read()[:16000], np.uint8)


def test_the_shipped_model_is_small_and_learnt_where_words_begin(held_out):
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 6e6
    model = EntropyModel.from_pretrained()
    trained = train_entropy.evaluate(model, held_out, 4.75)
    assert trained["bits_per_byte"] < 2.9 and trained["word_starts_with_a_boundary"] > 0.75
    shares = [float(word_starts(held_out).mean())]  # of boundaries anywhere
    for seed in range(3):
        torch.manual_seed(seed)
        untrained = train_entropy.evaluate(EntropyModel(model.config).eval(), held_out[:5000], 4.75)
        assert untrained["bits_per_byte"] > 7.9
        shares.append(untrained["boundaries_at_word_starts"])
    assert trained["boundaries_at_word_starts"] > 2 * max(shares)
    # The threshold in its config.json is the one that cuts the whole held-out text into patches of that size.
    assert trained["threshold"] == pytest.approx(model.config.patching_threshold, abs=0.15)
    assert model.config.patch_size == pytest.approx(4.75, abs=0.01)


def test_the_shipped_model_knows_frequent_words():
    model = EntropyModel.from_pretrained()
    text = b"The king of the land said unto them, Behold, the king of the land."
    tokens = tokens_of(text)
    logits = model.logits(tokens)[0, :-1]
    assert torch.nn.functional.cross_entropy(logits, tokens[0, 1:]) / math.log(2) < 3
    entropies, words = model.entropies(tokens)[0, :-1], torch.from_numpy(word_starts(text))
    assert entropies[words].mean() > 1.5 * entropies[~words].mean()
