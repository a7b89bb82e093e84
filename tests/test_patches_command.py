"""`terrazzo patches`: every rule, where the text comes from, what is printed and written, and its errors."""
import io
import json
import os
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import terrazzo
import torch
from terrazzo import cli, patches_view, text_patches
from terrazzo.models import EntropyConfig, EntropyModel
from terrazzo.models.entropy_model import tokens_of

TEXT = "The cat sat on the mat, naïvely; the dog did not.\n"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tiny model without a threshold of its own."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = EntropyModel(EntropyConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, sliding_window=8))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # entropies that differ
    model.save_pretrained(folder)
    return str(folder)


def run(capsys, *argv):
    code = cli.main(["patches", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def report(capsys, *argv):
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    found = json.loads(out)
    starts, lengths, size = found["starts"], found["lengths"], found["statistics"]["bytes"]
    assert starts[0] == 0 and len(found["entropies"]) == size
    assert [start + length for start, length in zip(starts, lengths)] == [*starts[1:], size]  # they cover the text, once
    assert sum(length * count for length, count in ((int(key), value) for key, value in found["statistics"]["histogram"].items())) == size
    return found


def test_text_on_the_terminal(capsys):
    code, out, err = run(capsys, TEXT)
    assert code == 0 and err == ""
    shown, rest = out.split("\n\n", 1)
    assert shown.replace("│", "") == TEXT.replace(" ", "·").replace("\n", "↵\n") and "│the·│dog·│" in shown and "\x1b" not in out
    for words in ("the text given, cut where the entropy is above", "mean patch length", "bits per byte", "boundaries at word starts", "█"):
        assert words in rest


def test_colours_follow_the_entropy(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    found = report(capsys, TEXT)
    _, out, _ = run(capsys, TEXT)
    for start in found["starts"]:
        code = patches_view.colour(found["entropies"][start]).lstrip("#")
        assert f"48;2;{int(code[:2], 16)};{int(code[2:4], 16)};{int(code[4:], 16)}" in out
    assert "colour: entropy of a patch's first byte" in out
    assert len({patches_view.colour(value / 10) for value in range(41)}) == 41  # deeper with every step
    assert patches_view.colour(0) == "#e9f1f2" and patches_view.colour(9) == patches_view.colour(4) == "#df8269"


def test_numbers_are_those_of_the_ops(capsys):
    found, model = report(capsys, TEXT), EntropyModel.from_pretrained()
    tokens = tokens_of(TEXT.encode())
    logits = model.logits(tokens)
    cut = terrazzo.entropy_patch(logits, model.config.patching_threshold)
    assert found["starts"] == [place - 1 for place in cut.starts[0].nonzero()[1:, 0].tolist()]
    torch.testing.assert_close(torch.tensor(found["entropies"]), cut.entropies[0, :-1], atol=1e-4, rtol=1e-4)
    facts = found["statistics"]
    nats = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).item()
    assert facts["bits_per_byte"] == pytest.approx(nats / torch.tensor(2.0).log().item(), rel=1e-4)
    assert facts["patches"] == len(found["starts"]) and facts["mean_patch_length"] == pytest.approx(len(TEXT.encode()) / facts["patches"])
    words = [place for place in range(len(TEXT)) if TEXT[place].isalpha() and not (place and TEXT[place - 1].isalpha())]
    words = [len(TEXT[:place].encode()) for place in words]
    inner = found["starts"][1:]
    assert facts["boundaries_at_word_starts"] == pytest.approx(len(set(inner) & set(words)) / len(inner))
    assert facts["word_starts_with_a_boundary"] == pytest.approx(len(set(found["starts"]) & set(words)) / len(words))


def test_a_long_text_is_cut_as_in_one_piece(capsys, monkeypatch, model_dir, tmp_path):
    text = TEXT * 20
    whole = report(capsys, text, "--text", "--model", model_dir, "--threshold", "2")
    monkeypatch.setattr(text_patches, "BLOCK", 37)
    assert report(capsys, text, "--text", "--model", model_dir, "--threshold", "2")["starts"] == whole["starts"]


def test_files_and_standard_input(capsys, monkeypatch, tmp_path):
    file = tmp_path / "story.txt"
    file.write_bytes(TEXT.encode())
    from_text, from_file = report(capsys, TEXT), report(capsys, str(file))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    from_stdin = report(capsys, "-")
    assert from_text["starts"] == from_file["starts"] == from_stdin["starts"]
    assert [found["source"] for found in (from_text, from_file, from_stdin)] == ["the text given", "story.txt", "standard input"]
    monkeypatch.chdir(tmp_path)
    assert report(capsys, "story.txt", "--text")["statistics"]["bytes"] == len("story.txt")
    assert report(capsys, "-", "--text")["statistics"] | {"bits_per_byte": 0, "mean_entropy": 0} == {
        "bytes": 1, "patches": 1, "mean_patch_length": 1, "median_patch_length": 1, "longest_patch": 1, "bits_per_byte": 0, "mean_entropy": 0,
        "boundaries_at_word_starts": None, "word_starts_with_a_boundary": None, "histogram": {"1": 1},
    }  # fmt: skip


def starts_by_hand(e, threshold, rule):
    """The positions of e, entropies of bytes, where the rules of the paper's code cut; position 0 of the code is the begin token."""
    starts = [0]
    for j in range(1, len(e)):
        rise = e[j] - e[j - 1]
        if rule == "threshold":
            yes = e[j] > threshold
        elif rule == "monotonic":
            yes = j == 1 or rise > threshold
        else:
            yes = j == 1 or (j != 2 and e[j] > threshold and rise > 0.3)
        starts += [j] if yes else []
    return starts


@pytest.mark.parametrize("rule, options", [("threshold", ()), ("monotonic", ("--monotonic",)), ("combined", ("--threshold-add", "0.3"))])
def test_entropy_rules(capsys, model_dir, rule, options):
    found = report(capsys, TEXT * 4, "--model", model_dir, "--threshold", "1.1", *options)
    assert found["starts"] == starts_by_hand(found["entropies"], 1.1, rule)
    assert 3 < len(found["starts"]) < len(TEXT) * 3
    most = report(capsys, TEXT * 4, "--model", model_dir, "--threshold", "1.1", "--max-patch-length", "3", *options)
    assert max(most["lengths"]) == 3 and set(found["starts"]) <= set(most["starts"])


def test_other_rules(capsys, model_dir):
    text, size = TEXT * 4, len(TEXT.encode()) * 4
    aimed = report(capsys, text, "--model", model_dir, "--patch-size", "5")
    assert aimed["statistics"]["mean_patch_length"] == pytest.approx(5, rel=0.05)
    assert report(capsys, text, "--model", model_dir, "--mode", "bytes")["lengths"] == [1] * size
    static = report(capsys, text, "--model", model_dir, "--mode", "static", "--patch-size", "6")
    assert static["starts"] == list(range(0, size, 6))
    spaces = report(capsys, "A cat, 2 dogs: naïve", "--model", model_dir, "--mode", "space")
    words = [b"A ", b"cat,", b" 2 ", b"dogs:", b" na\xc3", b"\xafve"]  # behind the first of a run of spaces; a longer character counts as one
    assert spaces["lengths"] == [len(word) for word in words]
    assert max(report(capsys, text, "--model", model_dir, "--mode", "space", "--max-patch-length", "2")["lengths"]) == 2


def test_a_patch_may_cut_a_character(capsys, model_dir):
    _, out, _ = run(capsys, "é日x", "--model", model_dir, "--mode", "bytes")
    assert out.startswith("│\\xc3│\\xa9│\\xe6│\\x97│\\xa5│x│\n")
    _, out, _ = run(capsys, "é日x", "--model", model_dir, "--mode", "static", "--patch-size", "5")
    assert out.startswith("│é日│x│\n")


def test_nothing_reaches_the_terminal_as_a_command(capsys, model_dir, tmp_path):
    file = tmp_path / "wild.bin"
    file.write_bytes(bytes(range(256)) + "\u202e\u2028[red]\x1b]0;title\x07".encode())
    _, out, _ = run(capsys, str(file), "--model", model_dir, "--threshold", "9")
    assert all(char == "\n" or char.isprintable() for char in out) and "␛]0;title␇" in out and "\\u202e" in out and "\\u2028[red]" in out and "\\xff" in out


def test_show_limits_the_terminal_only(capsys, model_dir):
    _, out, _ = run(capsys, TEXT, "--model", model_dir, "--mode", "bytes", "--show", "3")
    assert out.startswith("│T│h│e│\n… the first 3 of 51 bytes (--show)\n") and " 51 " in out
    _, out, _ = run(capsys, TEXT, "--model", model_dir, "--mode", "bytes", "--show", "0")
    assert "│" not in out and "mean patch length" in out


class _Page(HTMLParser):
    """The text of the patches, and every tag and link of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.words, self.inside, self.text = set(), [], [], False, ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.inside = self.inside or ("class", "text") in attrs

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "div"

    def handle_data(self, data):
        self.text += data if self.inside else ""


def test_html_is_escaped_and_complete(capsys, tmp_path, model_dir):
    wild = '<script>alert("1")</script> & {{ 7 * 7 }} \x1b naïve\n' * 30
    page = tmp_path / "page.html"
    source = tmp_path / "<b>&amp;.txt"
    source.write_bytes(wild.encode())
    code, out, _ = run(capsys, str(source), "--model", model_dir, "--threshold", "2", "--show", "0", "--html", str(page))
    assert code == 0 and f"written: {page}" in out.replace("\n", "")
    text = page.read_text("utf-8")
    parsed = _Page(text)
    assert "script" not in parsed.tags and "b" not in parsed.tags and "&lt;b&gt;&amp;amp;.txt" in text
    assert parsed.text.strip("\n") == wild.replace(" ", "·").replace("\n", "↵").replace("\x1b", "␛")
    assert not [value for name, value in parsed.attributes if name in ("src", "href")]  # needs no network
    cut = report(capsys, wild, "--text", "--model", model_dir, "--threshold", "2")
    tips = [value for name, value in parsed.attributes if name == "title"]
    assert [int(tip.split()[0]) for tip in tips] == cut["lengths"]


def test_png_is_a_picture(capsys, tmp_path, model_dir):
    from matplotlib.image import imread

    picture = tmp_path / "picture.png"
    code, out, _ = run(capsys, TEXT + "日本 $x^2$ [red]", "--model", model_dir, "--threshold", "2", "--png", str(picture))
    assert code == 0 and "written: " in out
    pixels = imread(picture)[..., :3]
    assert pixels.shape == (1080, 1440, 3)
    found = report(capsys, TEXT + "日本 $x^2$ [red]", "--model", model_dir, "--threshold", "2")
    shades = {tuple(int(patches_view.colour(found["entropies"][start])[i : i + 2], 16) for i in (1, 3, 5)) for start in found["starts"]}
    drawn = {tuple(pixel) for pixel in (pixels[::2, ::2] * 255).round().astype(int).reshape(-1, 3).tolist()}
    assert len(shades & drawn) > 0.8 * len(shades)  # every patch's colour is there, but for slivers
    assert "matplotlib.pyplot" not in sys.modules


def test_cells_stay_inside_the_picture():
    text = ("word " * 60 + "日本\n").encode() * 40
    entropies = torch.zeros(len(text))
    cut = text_patches.Cut(text, entropies, entropies, list(range(0, len(text), 5)), text_patches.Rule("static", patch_size=5))
    seen, end = set(), (0, 0)
    for row, column, width, *_ in patches_view.cells(cut):
        assert row < patches_view.PICTURE_ROWS and column + width <= patches_view.PICTURE_COLUMNS and (row, column) >= end
        end = (row, column + width)
        seen.add(row)
    assert len(seen) == patches_view.PICTURE_ROWS


def test_histogram_has_no_gaps_and_one_tail():
    assert patches_view.histogram({1: 3, 4: 1}) == [("1", 3), ("2", 0), ("3", 0), ("4", 1)]
    rows = patches_view.histogram({2: 5, 15: 1, 16: 2, 300: 4})
    assert len(rows) == 16 and rows[1] == ("2", 5) and rows[-1] == ("16 and more", 6)


@pytest.mark.parametrize(
    "argv, message",
    [
        (("",), "is empty"),
        ((".",), ". is a directory; name a file, or say --text"),
        (("x", "--threshold", "nan"), "threshold must be finite"),
        (("x", "--threshold", "1", "--patch-size", "4"), "--patch-size excludes --threshold"),
        (("x", "--monotonic", "--patch-size", "4"), "--patch-size excludes --monotonic"),
        (("x", "--monotonic", "--threshold-add", "1"), "monotonic and threshold_add exclude each other"),
        (("x", "--patch-size", "0.5"), "patch_size must be at least 1"),
        (("x", "--max-patch-length", "0"), "max_patch_length must be an integer from 1, got 0"),
        (("x", "--mode", "static"), "--mode static needs --patch-size"),
        (("x", "--mode", "static", "--patch-size", "2.5"), "must be a positive integer with --mode static, got 2.5"),
        (("x", "--mode", "static", "--patch-size", "nan"), "must be a positive integer with --mode static, got nan"),
        (("x", "--mode", "space", "--patch-size", "2"), "--patch-size goes with --mode entropy or static, got --mode space"),
        (("x", "--mode", "bytes", "--threshold-add", "2"), "--threshold-add goes with --mode entropy, got --mode bytes"),
        (("x", "--model", "no-such-dir"), "no-such-dir is not a directory"),
        (("x", "--show", "-1"), "--show must not be negative"),
        (("x", "--html", "no-such-dir/page.html"), "no-such-dir/page.html"),
        (("x", "--png", "no-such-dir/page.png"), "no-such-dir/page.png"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""


def test_a_model_without_a_threshold_needs_one(capsys, model_dir):
    code, _, err = run(capsys, "x", "--model", model_dir)
    assert code == 2 and "has no patching_threshold; give --threshold in nats, or --patch-size in bytes" in err


@pytest.mark.parametrize("argv", [("x", "--mode", "words"), ("x", "--threshold", "high"), ()])
def test_the_parser_refuses_what_it_cannot_read(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        run(capsys, *argv)
    assert caught.value.code == 2


@pytest.mark.parametrize("option, module", [("--html", "jinja2"), ("--png", "matplotlib")])
def test_a_missing_library_says_how_to_install_it(capsys, monkeypatch, tmp_path, option, module):
    monkeypatch.setitem(sys.modules, module, None)
    code, out, err = run(capsys, "x", option, str(tmp_path / "file"))
    assert code == 2 and f"{option} needs {module}" in err and "pip install terrazzo[patches]" in err and out == ""
    assert run(capsys, "x")[0] == 0


def test_the_command_on_a_pipe_of_bytes_that_are_no_text():
    """Installed, as people run it: progress on stderr only, exit codes, nothing heavy imported."""
    code = "import sys; from terrazzo import cli; code = cli.main(sys.argv[1:]); print(sorted({'transformers', 'matplotlib', 'jinja2'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code, "patches", "-", "--json"], input=os.urandom(5000), capture_output=True)
    assert done.returncode == 0 and json.loads(done.stdout)["statistics"]["bytes"] == 5000
    assert b"transformers" not in done.stderr and b"matplotlib" not in done.stderr
