"""The `terrazzo` command: what it prints, its exit codes, its errors."""
import json
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import terrazzo
import torch
from terrazzo import charts, cli, demo, dispatch, explain


def run(capsys, *argv):
    code = cli.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_info_json(capsys):
    code, out, _ = run(capsys, "info", "--json", "--support")
    facts = json.loads(out)
    assert code == 0 and facts["packages"]["torch"] == torch.__version__
    assert facts["support"]["causal_conv1d_fn"]["cpu"]["bfloat16"] is None
    assert "CUDA kernels" in facts["support"]["causal_conv1d_fn"]["cuda"]["float32"]
    assert set(facts["support"]) == set(explain.CALLS)


def test_info_table(capsys):
    code, out, _ = run(capsys, "info", "--support")
    assert code == 0 and "native extension" in out and "mamba_chunk_scan_combined" in out


def test_why_names_the_choice_and_the_reasons(capsys):
    code, out, _ = run(capsys, "why", "causal_conv1d_fn", "--shape", "1,64,32", "--dtype", "bf16")
    assert code == 0 and "chosen: preferred on cpu" in out
    _, out, _ = run(capsys, "why", "causal_conv1d_fn", "--shape", "1,64,32", "--set", "W=7")
    assert "widths 2 to 4, got 7" in out
    _, out, _ = run(capsys, "why", "chunk_scan", "--shape", "1,128,8,64", "--device", "cuda")
    assert "cuda:0" in out


def test_why_leaves_the_log_as_it_was(capsys, caplog):
    x, weight = torch.randn(1, 8, 16), torch.randn(8, 7)
    dispatch._logged.clear()
    run(capsys, "why", "causal_conv1d_fn", "--shape", "1,64,32", "--set", "W=7")
    assert not caplog.records
    terrazzo.causal_conv1d_fn(x, weight)
    assert ["widths 2 to 4, got 7" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("op", sorted(explain.CALLS))
def test_why_answers_for_every_op(capsys, op):
    names, sizes = explain.CALLS[op][1], dict(B=1, L=64, H=4, P=16, D=64, T=32, A=2, E=8, K=48, V=260)
    shape = ",".join(str(sizes[name]) for name in names) if names else "4,64"
    code, out, err = run(capsys, "why", op, "--shape", shape)
    assert code == 0 and "chosen" in out, err


@pytest.mark.parametrize(
    "argv, message",
    [
        (("why", "nope"), "unknown op 'nope'"),
        (("why", "chunk_scan", "--shape", "1,2"), "the shape must be (B, L, H, P)"),
        (("why", "chunk_scan", "--shape", "a,b"), "--shape must be sizes"),
        (("why", "chunk_scan", "--set", "N"), "--set must be NAME=NUMBER"),
        (("why", "chunk_scan", "--set", "Q=3"), "unexpected keyword argument 'Q'"),
        (("why", "chunk_scan", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("why", "chunk_scan", "--backend", "cuda"), "CUDA kernels"),
        (("doctor", "--backend", "tpu"), "unknown backend 'tpu'"),
        (("patch", "--dry-run", "gpt2"), "no recipe for model type 'gpt2'"),
        (("demo", "--bytes", "1000000"), "fewer than asked for"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(capsys, argv, message):
    code, _, err = run(capsys, *argv)
    assert code == 2 and message in err and "Traceback" not in err


def test_patch_dry_run(capsys):
    code, out, _ = run(capsys, "patch", "--dry-run", "bamba")
    assert code == 0 and "causal_conv1d_update" in out
    code, out, _ = run(capsys, "patch", "--dry-run", "bamba", "--json")
    assert {"rmsnorm_gated", "selective_state_update"} <= {row["op"] for row in json.loads(out)}


def test_transformers_missing_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_version", lambda package: None)
    for argv in (("demo",), ("patch", "--dry-run", "bamba")):
        code, _, err = run(capsys, *argv)
        assert code == 2 and "pip install terrazzo[hf]" in err


def few_cases(monkeypatch):
    from terrazzo import cases

    chosen = {}
    for case in cases.CASES:
        chosen.setdefault(case.op, case)
    monkeypatch.setattr(cases, "CASES", tuple(chosen.values()))


def test_doctor_passes(capsys, monkeypatch):
    few_cases(monkeypatch)
    code, out, _ = run(capsys, "doctor", "--json", "--dtype", "float32,float64")
    result = json.loads(out)
    assert code == 0 and result["ok"]
    by_key = {(row["op"], row["backend"], row["dtype"]): row for row in result["rows"]}
    assert by_key["rmsnorm_gated", "cpu", "float32"]["cases"] == 1
    if not torch.cuda.is_available():
        assert "Triton needs a GPU" in by_key["rmsnorm_gated", "triton", "float32"]["skipped"]
    assert "CUDA kernels" in by_key["rmsnorm_gated", "cuda", "float32"]["skipped"]


def test_doctor_reports_a_broken_backend(capsys, monkeypatch):
    few_cases(monkeypatch)
    from terrazzo import cases

    honest = cases.run

    def broken(case, kwargs, backend, *args, **kw):
        found = honest(case, kwargs, backend, *args, **kw)
        return {name: out * 1.01 for name, out in found.items()} if backend == "cpu" and case.op == "rmsnorm_gated" else found

    monkeypatch.setattr(cases, "run", broken)
    code, out, _ = run(capsys, "doctor", "--dtype", "float32")
    assert code == 1 and "1 of" in out


def test_explain_runs_no_kernel():
    terrazzo.reset_counters()
    for op in explain.CALLS:
        with torch.no_grad():
            tensors = explain.tensors_at_choice(op, explain.arguments(op, torch.float32))
        assert explain.refusals(op, tensors)["reference"] is None
        assert dispatch.pick(op, *tensors)[0] == "cpu"
    assert terrazzo.counters() == {}


def test_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "terrazzo.cli", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"terrazzo {terrazzo.__version__}"


def test_demo_on_a_small_model(tmp_path, capsys, monkeypatch):
    """The whole demo with its model cut down: same numbers on both sides, chart and report written."""
    from transformers import BambaConfig, BambaForCausalLM

    def small():
        torch.manual_seed(0)
        config = BambaConfig(
            vocab_size=demo.VOCAB, pad_token_id=256, bos_token_id=257, eos_token_id=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            attn_layer_indices=[1], num_attention_heads=2, num_key_value_heads=1, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16,
            mamba_chunk_size=32,
        )  # fmt: skip
        return BambaForCausalLM(config).eval()

    monkeypatch.setattr(demo, "build_model", small)
    args = SimpleNamespace(text=None, bytes=300, new_tokens=4, train_bytes=40, out=str(tmp_path), json=True)
    terrazzo.reset_counters()
    assert demo.main(args) == 0
    ran = terrazzo.counters()
    assert ran["mamba_chunk_scan_combined"]["cpu"] and ran["selective_state_update"]["cpu"] and ran["mamba_chunk_scan_combined_bwd"]["cpu"]
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "demo.json").read_text())
    assert result["same_greedy_continuation"] and result["new_tokens"] == 4
    assert result["max_logit_difference"] < 1e-4
    plain, patched = result["sides"].values()
    assert plain["loss"] == pytest.approx(patched["loss"], rel=1e-5)
    assert min(plain["prefill_tokens_per_s"], plain["decode_tokens_per_s"], plain["train_step_s"]) > 0
    ElementTree.fromstring((tmp_path / "demo.svg").read_text())
    text = demo.files("terrazzo").joinpath("demo_text.txt").read_text()
    assert text.startswith(result["sample"]["prompt"]) and len(result["sample"]["text"].encode()) > 100


def test_demo_text_is_shipped_and_long_enough():
    text = demo.files("terrazzo").joinpath("demo_text.txt").read_bytes()
    assert len(text) >= 4096 and text.isascii() and text.startswith(b"IN CONGRESS, July 4, 1776.")


def test_bars_escape_and_scale():
    drawing = charts.bars("a < b", [("speed", [("x & y", 2.0, 1.5, 2.5), ("z", 1.0)])], "ms")
    root = ElementTree.fromstring(drawing)
    widths = [float(r.get("width")) for r in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert widths == [336.0, 168.0]
