"""What becomes of results: comparison with a revision, CSV, Markdown, tables of documents."""
import csv
import io
import json
import subprocess
from pathlib import Path

import pytest
from terrazzo.bench import compare, export, revision
from terrazzo.bench.__main__ import main

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"kind": "environment", "cpu": "a cpu", "gpu": None, "threads": 2, "malloc_tuned": False, "isa": "avx2", "torch": "2.13.0", "transformers": "5.23.0",
               "date": "2026-01-02T03:04:05+00:00", "command": "terrazzo bench --quick"}  # fmt: skip


def row(provider="cpu", ms=2.0, status="ok", **values):
    found = {"schema": 2, "kind": "row", "op": "linear", "size": "1x2x3", "dtype": "fp32", "mode": "fwd", "provider": provider, "threads": 2, "device": "cpu", "cold": False,
             "status": status, "reason": "", "command": "terrazzo bench linear"}  # fmt: skip
    if status == "ok":
        found |= {"median_ms": ms, "p20_ms": ms * 0.99, "p80_ms": ms * 1.01, "min_ms": ms * 0.98, "n": 3, "noisy": False, "speedup": 6 / ms, "baseline": "hf",
                  "times_limit": 1.25, "limit": "memory", "gflops": 10.0, "gbs": 20.0, "max_abs": 1e-6, "rel": 1e-6, "nmse": 1e-13, "first_call_ms": 5.0,
                  "peak_bytes": 1_500_000, "peak_device_bytes": None, "timer": "host", "launch_ms": None, "load_average": 0.5, "tokens_per_s": None, "unit": None,
                  "samples_ms": [ms, ms, ms]}  # fmt: skip
    return found | values


def write(path, *rows):
    path.write_text("".join(json.dumps(line) + "\n" for line in (ENVIRONMENT, *rows)))
    return str(path)


def test_csv_holds_every_field_but_the_samples(tmp_path, capsys):
    rows = [row(), row("hf", 6.0), row("torch", status="unavailable", reason="no, not here")]
    assert main(["export", write(tmp_path / "a.jsonl", *rows)]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [r["provider"] for r in found] == ["cpu", "hf", "torch"]
    assert float(found[0]["median_ms"]) == 2.0 and found[2]["median_ms"] == "" and found[2]["reason"] == "no, not here"
    assert set(found[0]) == set(rows[0]) - {"schema", "kind", "samples_ms"}


def test_markdown_names_a_case_once(tmp_path, capsys):
    assert main(["export", "--format", "markdown", write(tmp_path / "a.jsonl", row(), row("hf|x", 6.0), row("torch", status="wrong"))]) == 0
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert head == "| case | provider | ms | speed-up | × limit | NMSE |" and rule == "| --- | --- | --- | --- | --- | --- |"
    assert lines == ["| linear 1x2x3 fp32 fwd | cpu | 2 | 3× | 1.25 | 1e-13 |", "|  | hf\\|x | 6 | 1× | 1.25 | 1e-13 |", "|  | torch | wrong | – | – | – |"]


DOCUMENT = """# Title
<!-- bench: op=linear providers=terrazzo columns=median_ms,peak_bytes -->
old
<!-- /bench -->
text
"""


def test_tables_between_markers_are_made_anew(tmp_path, capsys):
    result, document = write(tmp_path / "a.jsonl", row(), row("hf", 6.0), row(op="other")), tmp_path / "doc.md"
    document.write_text(DOCUMENT)
    assert main(["tables", result, str(document), "--check"]) == 1
    assert document.read_text() == DOCUMENT
    assert main(["tables", result, str(document)]) == 0
    text = document.read_text()
    assert "old" not in text and text.startswith("# Title\n<!-- bench: op=linear") and text.endswith("<!-- /bench -->\ntext\n")
    assert "| linear 1x2x3 fp32 fwd | cpu | 2 | 1.5 |" in text and "hf" not in text and "other" not in text
    assert "a cpu, 2 threads, avx2, torch 2.13.0, transformers 5.23.0, 2026-01-02: `terrazzo bench --quick`" in text
    assert main(["tables", result, str(document), "--check"]) == 0


def test_terrazzo_in_a_marker_is_whatever_of_ours_ran(tmp_path):
    rows = [row("cpu"), row("cuda", status="unavailable", reason="no GPU"), row("hf", 6.0)]
    text = export.fill("<!-- bench: providers=terrazzo,hf columns=median_ms -->\n<!-- /bench -->\n", ENVIRONMENT, rows)
    assert "| cpu | 2 |" in text and "| hf | 6 |" in text and "cuda" not in text


@pytest.mark.parametrize("marker, message", [("op=nothing", "no row of the result fits"), ("size", "a marker takes op, size"), ("columns=speed", "unknown columns speed")])
def test_bad_markers(marker, message, tmp_path, capsys):
    document = tmp_path / "doc.md"
    document.write_text(f"<!-- bench: {marker} -->\n<!-- /bench -->\n")
    assert main(["tables", write(tmp_path / "a.jsonl", row()), str(document)]) == 2
    assert message in capsys.readouterr().err


def test_readmes_measured_tables_have_a_row_in_the_suite():
    """Every marker of README.md selects cases that the suite has: the command that fills them cannot fail for a renamed op."""
    from terrazzo.bench import suite, targets

    cases = [case for preset in targets.PRESETS for case in suite.all_cases(preset)]
    everything = [row(op=c.op, size=c.size, dtype=c.dtype, mode=c.mode, provider=p.name) for c in cases for p in c.providers]
    text = (ROOT / "README.md").read_text()
    assert export.fill(text, ENVIRONMENT, everything) != text


# ---- revisions -----------------------------------------------------------------------------------------------


def git(*words, cwd=ROOT):
    return subprocess.run(["git", *words], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def test_a_revision_is_built_and_measured_in_a_worktree_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TERRAZZO_WITH_CPU", "0")  # Python alone: the reference is what runs
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    options = ["rmsnorm_gated", "--preset", "tiny", "--match", "1x64 fwd", "--provider", "reference", "--quick", "--any-machine-state"]
    steps, trees = [], []

    def on_step(text):
        steps.append(text)
        trees.append("terrazzo-compare-" in git("worktree", "list"))

    revision.measure("HEAD", options, before, after, passes=2, on_step=on_step)
    assert steps == ["building HEAD", *(f"measuring HEAD and this checkout by turns, {number} of 2" for number in (1, 2))]
    assert trees == [True] * 3
    assert "terrazzo-compare-" not in git("worktree", "list")
    (old, old_rows), (new, new_rows) = compare.read(before), compare.read(after)
    assert old["git_sha"] == new["git_sha"] == git("rev-parse", "HEAD")
    assert (old["native"], new["native"]) == (False, True)  # the first is the revision's own build
    assert [(r["status"], r["by_turns"]) for r in (*old_rows, *new_rows)] == [("ok", 1), ("ok", 2)] * 2
    for one, other in zip(old_rows, new_rows, strict=True):
        assert one["n"] == other["n"] >= 5 and one["repeats"] == other["repeats"]  # as many pairs, and a sample is as many calls
    assert old["malloc_tuned"] and new["malloc_tuned"]
    (found,) = compare.compare(before, after)
    assert found["provider"] == "reference"


def test_the_command_compares_and_judges(monkeypatch, capsys):
    def measured(ref, options, before, after, passes, on_step):
        assert (ref, options, passes) == ("v1", ["linear", "--match", "1x2x3 fwd"], 2)
        write(before, row(samples_ms=[2.0 + i / 1000 for i in range(20)]))
        write(after, row(samples_ms=[2.4 + i / 1000 for i in range(20)]))

    monkeypatch.setattr(revision, "measure", measured)
    command = ["compare", "--git", "v1", "--passes", "2", "--run", "linear --match '1x2x3 fwd'"]
    assert main(command) == 0
    assert main([*command, "--fail-on", "slow:5%"]) == 1
    assert main([*command, "--fail-on", "slow:25%"]) == 0
    assert capsys.readouterr().out.count("1 rows: 1 SLOW") == 3


@pytest.mark.parametrize("words, message", [
    (["compare"], "give two result files, or --git REF"), (["compare", "a"], "give two result files"), (["compare", "a", "b", "--git", "HEAD"], "give two result files"),
    (["compare", "--git", "no-such-revision"], "finding 'no-such-revision' failed"), (["compare", "a.jsonl", "b.jsonl"], "a.jsonl"), (["compare", "--git", "HEAD", "--passes", "0"], "--passes must be at least 1"),
])  # fmt: skip
def test_bad_comparisons(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err
