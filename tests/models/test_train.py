"""The trainer of byte-level models, the parts that trainers share, and the fine-tuning example: a few steps of each."""
import gzip
import importlib.util
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from terrazzo.charts import curves
from terrazzo.models import EntropyModel, from_pretrained, train, training
from terrazzo.models.entropy_model import tokens_of

LINE = b"to be or not to be, that is the question; "
THEIRS = {"bamba": transformers.BambaForCausalLM, "blt": transformers.BltForCausalLM}
SMALL = ("--steps", "30", "--layers", "2", "--width", "32", "--head-size", "16", "--state", "16", "--hashes", "64", "--length", "64", "--lr", "0.01", "--json")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_bytes(LINE * 40)
    return file


def trained(model, text, out, capsys, *more):
    code = train.main(["--model", model, "--out", str(out), "--held-out", str(text), *SMALL, *more, str(text)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("kind", ["bamba", "blt"])
def test_it_learns_and_transformers_reads_it(kind, text, tmp_path, capsys):
    report = trained(kind, text, tmp_path, capsys)
    assert report["steps"] == 30 and report["bytes"] == 30 * 4 * 64
    assert report["bits_per_byte"] < 4
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    ours = from_pretrained(tmp_path, torch.float32)
    assert sum(weight.numel() for weight in ours.parameters()) == report["parameters"]
    theirs, info = THEIRS[kind].from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokens = tokens_of(LINE)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs.eval()(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert training.bits_per_byte(ours, np.frombuffer(text.read_bytes(), np.uint8), 128) == pytest.approx(report["bits_per_byte"], abs=1e-3)
    assert theirs.generation_config.eos_token_id == 2 and theirs.generation_config.do_sample


def test_the_patcher_of_a_blt_is_the_shipped_one(text, tmp_path, capsys):
    report = trained("blt", text, tmp_path, capsys)
    shipped, found = EntropyModel.from_pretrained(), EntropyModel.from_pretrained(tmp_path)
    assert found.config.patching_threshold == shipped.config.patching_threshold
    weights = found.state_dict()
    assert all(torch.equal(weights[name].bfloat16(), weight.bfloat16()) for name, weight in shipped.state_dict().items())
    assert report["parameters"] - report["trained_parameters"] == sum(weight.numel() for weight in shipped.parameters())


def test_it_goes_on_from_a_checkpoint(text, tmp_path, capsys):
    first = trained("bamba", text, tmp_path / "a", capsys)
    second = trained("bamba", text, tmp_path / "b", capsys, "--go-on-from", str(tmp_path / "a"), "--steps", "10")
    assert second["bits_per_byte"] < first["bits_per_byte"]
    assert train.main(["--model", "blt", "--out", str(tmp_path), *SMALL, str(text), "--go-on-from", str(tmp_path / "a")]) == 2
    assert "--go-on-from must hold a model of --model blt, got 'bamba'" in capsys.readouterr().err


def test_the_same_steps_give_the_same_model(text, tmp_path, capsys):
    for name in ("a", "b"):
        trained("bamba", text, tmp_path / name, capsys)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(weight, b[name]) for name, weight in a.items())


def test_the_curve_is_a_picture_of_the_loss(text, tmp_path, capsys):
    report = trained("bamba", text, tmp_path, capsys)
    svg = ElementTree.parse(tmp_path / "loss.svg").getroot()
    line = next(element for element in svg.iter() if element.tag.endswith("polyline")).get("points").split()
    heights = [float(point.split(",")[1]) for point in line]
    assert len(heights) == 30 and heights[-1] > heights[0] + 50  # downwards is larger
    words = "".join(element.text or "" for element in svg.iter())
    assert f"held out {report['bits_per_byte']:.3g}" in words and "gzip" in words


@pytest.mark.parametrize("points", [[(0, 1.0), (5, 3.0)], [(1, 2.0)], []], ids=str)
def test_curves_of_any_number_of_points(points):
    drawn = ElementTree.fromstring(curves("<t>", [("a & b", points)], "x", "y"))
    assert len(next(element for element in drawn.iter() if element.tag.endswith("polyline")).get("points", "").split()) == len(points)


@pytest.mark.parametrize("argv, message", [
    (("--steps", "0"), "--steps must be positive, got 0"), (("--width", "33"), "--width must be a multiple of --head-size 16, got 33"),
    (("--lr", "-1"), "--lr must be positive"), (("no-such-file",), "no-such-file"), (("--length", "99999"), "longer than a window of 99999 bytes"),
])  # fmt: skip
def test_errors_are_one_line(text, tmp_path, capsys, argv, message):
    assert train.main(["--model", "bamba", "--out", str(tmp_path), *SMALL, str(text), *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


class Uniform:
    """The model that knows nothing, and counts what it is asked."""

    asked = 0

    def __call__(self, tokens, labels):
        counted = (labels[:, 1:] != -100).sum().item()
        self.asked += counted
        logits = torch.zeros(*tokens.shape, 260)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return type("Output", (), {"loss": loss})


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_bits_per_byte_counts_every_byte_once(length):
    model, text = Uniform(), np.arange(length, dtype=np.uint8)
    assert training.bits_per_byte(model, text, 64) == pytest.approx(math.log2(260), rel=1e-5)
    assert model.asked == length


def test_bits_per_byte_are_those_of_one_pass(text):
    torch.manual_seed(0)
    model = train.bamba(train.parser().parse_args(["--model", "bamba", "--out", "", *SMALL])).eval()
    some = text.read_bytes()[:60]
    with torch.no_grad():
        whole = model(tokens_of(some), labels=tokens_of(some)).loss.item() / math.log(2)
    assert training.bits_per_byte(model, some, 128) == pytest.approx(whole, rel=1e-5)


def test_what_archives_need(text):
    found = training.compressed(text.read_bytes())
    assert found["gzip"] == pytest.approx(8 * len(gzip.compress(text.read_bytes(), 9)) / len(text.read_bytes()), abs=1e-4)
    assert 0 < found["xz"] < 1


# ---- the example -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finetune():
    file = Path(__file__).parents[2] / "examples/finetune.py"
    spec = importlib.util.spec_from_file_location("finetune", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    assert train.main(["--model", "bamba", "--out", str(out), "--held-out", str(text), *SMALL, str(text), "--steps", "2"]) == 0
    return out


@pytest.mark.parametrize("flags", [(), ("--bf16",), ("--checkpointing",), ("--bf16", "--checkpointing", "--compile")], ids=" ".join)
def test_finetuning(finetune, folder, text, tmp_path, flags, capsys):
    losses = finetune.main([str(text), "--model", str(folder), "--out", str(tmp_path), "--steps", "20", "--length", "64", "--lr", "0.01", *flags])
    assert len(losses) == 20 and np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])
    assert "nats per token in 20 steps" in capsys.readouterr().out
    ElementTree.parse(tmp_path / "loss.svg")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert not any(torch.equal(weight, after[name]) for name, weight in before.items() if weight.dim() > 1)


def test_the_flags_change_only_rounding(finetune, folder, text, tmp_path):
    """Recomputing is exact; bfloat16 is near."""
    argv = [str(text), "--model", str(folder), "--out", str(tmp_path), "--steps", "3", "--length", "64"]
    plain, again, half = (finetune.main([*argv, *flags]) for flags in ((), ("--checkpointing",), ("--bf16",)))
    assert plain == again
    assert half != plain
    np.testing.assert_allclose(half, plain, rtol=0.01)
