"""Users' own kernels and shapes in the suite, other packages' adapters, and the command that each row carries."""
import json
import runpy
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import terrazzo
import torch
from terrazzo.bench import accuracy, cases, packages, providers, roofline, suite
from terrazzo.bench.__main__ import main

import fake_packages

EXAMPLES = Path(__file__).parents[1] / "examples"
CALIBRATION = roofline.Calibration(100.0, 20.0, 30.0, 40.0, 2, "test", "2026-01-01")


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(providers, "REGISTERED", {})
    for module in suite.OPS.values():
        monkeypatch.setattr(module, "SIZES", dict(module.SIZES))


def tiny(op, mode="fwd"):
    return next(c for c in suite.all_cases("tiny") if (c.op, c.mode, c.dtype) == (op, mode, "fp32"))


def rows_of(case, *names):
    options = suite.Options(providers=names, budget_s=0.01, min_rounds=3)
    return {row["provider"]: row for row in suite.measure(case, options, CALIBRATION)}


def rows_printed(capsys):
    return [line for line in map(json.loads, capsys.readouterr().out.splitlines()) if line["kind"] == "row"]


def test_the_example_runs_at_its_shapes(capsys, monkeypatch):
    words = ["causal_conv1d", "--shapes", str(EXAMPLES / "my_shapes.json"), "--provider", "my_conv,terrazzo", "--json", "--quick", "--any-machine-state"]
    monkeypatch.setattr(sys, "argv", ["bench_my_kernel.py", *words, "--match", "256x64"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / "bench_my_kernel.py"), run_name="__main__")
    assert end.value.code == 0
    found = {(row["mode"], row["provider"]): row for row in rows_printed(capsys)}
    assert set(found) == {(mode, name) for mode in ("fwd", "bwd") for name in ("my_conv", "cpu")}
    assert all(row["status"] == "ok" and row["size"] == "1x256x64" for row in found.values())
    assert found["fwd", "my_conv"]["nmse"] < 1e-10


def test_a_rows_command_measures_it_again(capsys):
    words = ["causal_conv1d", "--load", str(EXAMPLES / "bench_my_kernel.py"), "--shapes", str(EXAMPLES / "my_shapes.json"), "--quick", "--any-machine-state"]
    assert main([*words, "--match", "256x64 fwd", "--provider", "my_conv", "--json"]) == 0
    (row,) = rows_printed(capsys)
    assert row["command"].startswith("terrazzo bench causal_conv1d ")
    assert main([*shlex.split(row["command"])[2:], "--json", "--quick", "--any-machine-state"]) == 0
    again = {r["provider"]: r for r in rows_printed(capsys)}
    assert set(again) == {"my_conv", "hf"}
    assert all(again["my_conv"][name] == row[name] for name in ("op", "size", "mode", "dtype", "status"))


def test_a_case_with_other_inputs_is_a_row_that_says_so():
    @terrazzo.bench.provider("mine", op="causal_conv1d")
    def mine(x, weight, bias):
        return x

    row = rows_of(tiny("causal_conv1d_update", "decode"), "mine")["mine"]
    assert row["status"] == "unavailable" and "mine takes x, weight, bias; this case gives x, conv_state, weight, bias, activation" in row["reason"]


def test_a_wrong_kernel_is_not_timed():
    @terrazzo.bench.provider("mine", op="rmsnorm_gated")
    def mine(**inputs):
        return terrazzo.rmsnorm_gated(**inputs, norm_before_gate=True)  # the case has it the other way round

    row = rows_of(tiny("rmsnorm_gated"), "mine")["mine"]
    assert row["status"] == "wrong" and "median_ms" not in row


def test_a_kernel_by_the_functions_name_serves_that_function_alone():
    @terrazzo.bench.provider("mine", op="causal_conv1d_fn")
    def mine(**inputs):
        return inputs["x"]

    assert "mine" in [p.name for p in providers.of_case(tiny("causal_conv1d_fn"))]
    assert "mine" not in [p.name for p in providers.of_case(tiny("causal_conv1d_update", "decode"))]


@pytest.mark.parametrize("name, op, message", [("mine", "conv", "op of 'mine' must be one of causal_conv1d,"), ("hf", "linear", "'hf' is a provider of the suite")])
def test_bad_registrations(name, op, message):
    with pytest.raises(ValueError, match=message):
        terrazzo.bench.provider(name, op=op)(lambda x: x)


def test_a_name_is_taken_once():
    terrazzo.bench.provider("mine", op="linear")(lambda x: x)

    def other(x):
        return x

    with pytest.raises(ValueError, match="take another name"):
        terrazzo.bench.provider("mine", op="linear")(other)


# ---- shapes --------------------------------------------------------------------------------------------------

SMALL = [
    {"op": "causal_conv1d", "D": 24, "L": [5, 9], "batch": 2},
    {"op": "chunk_scan", "H": 2, "P": 8, "N": [8, 16], "L": 7},
    {"op": "state_update", "H": 2, "P": 8, "N": 16, "batch": [1, 3]},
    {"op": "rmsnorm_gated", "D": 24, "rows": 3},
    {"op": "grouped_gemm", "E": 2, "K": 8, "N": 12, "rows": [1, 3]},
    {"op": "moe", "D": 8, "F": 12, "E": 4, "A": 2, "T": [3, 5]},
    {"op": "linear", "K": [8, 16], "N": 12, "M": 3},
    {"op": "patch_reduce", "L": 30, "D": 8},
    {"op": "patch_cross_attention", "H": 2, "P": 8, "L": 30},
    {"op": "local_attention", "H": 4, "Hk": 2, "P": 8, "window": 5, "L": [17]},
    {"op": "entropy_patch", "L": [12]},
    {"op": "byte_hash_embedding", "L": 12, "D": 8, "V": 13},
]
SIZES = {"causal_conv1d": 5, "chunk_scan": 4, "state_update": 2, "rmsnorm_gated": 2, "grouped_gemm": 8, "moe": 14, "linear": 4, "patch_reduce": 4,
         "patch_cross_attention": 4, "local_attention": 2, "entropy_patch": 3, "byte_hash_embedding": 2}  # fmt: skip


@pytest.mark.parametrize("entry", SMALL, ids=lambda e: e["op"])
def test_shapes_of_every_op_are_cases_that_ours_pass(entry, tmp_path):
    file = tmp_path / "shapes.json"
    file.write_text(json.dumps([entry]))
    (preset,) = providers.shapes(file)
    cases = [c for c in suite.cases_of(entry["op"], preset) if c.dtype == "fp32"]
    assert len(cases) == SIZES[entry["op"]]
    assert {c.mode for c in cases} >= ({"decode"} if entry["op"] == "state_update" else {"fwd", "bwd"})
    for case in cases:
        ours = case.providers[0]
        assert accuracy.gate(case, ours.build(), accuracy.Oracle(case), ours.ours).ok, case.key


@pytest.mark.parametrize("text, message", [
    ("{", "is not JSON"), ("[]", "must hold a list"), ('[{"op": "conv"}]', "entry 0: op must be one of"), ('[{"op": "linear", "K": 8, "N": 8}]', "missing: M"),
    ('[{"op": "linear", "K": 8, "N": 8, "M": 1, "L": 4}]', "unknown: L"), ('[{"op": "linear", "K": 8, "N": 8, "M": 0}]', "M of linear must be a positive"),
    ('[{"op": "moe", "D": [8], "F": 8, "E": 2, "A": 1, "T": 1}]', "D of moe must be a positive whole number, got"),
])  # fmt: skip
def test_bad_shapes(text, message, tmp_path, capsys):
    (tmp_path / "shapes.json").write_text(text)
    assert main(["--shapes", str(tmp_path / "shapes.json")]) == 2
    assert message in capsys.readouterr().err


def test_a_file_to_load_must_be_there(capsys):
    assert main(["--load", "nothing.py"]) == 2
    assert "--load must name a Python file" in capsys.readouterr().err


# ---- other packages ------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Every package is there, a fake of its signatures, and runs where the inputs are."""
    fake_packages.install(monkeypatch)
    monkeypatch.setattr(packages, "needs_gpu", lambda: None)


CASES_OF_PACKAGES = [(package, case) for package in packages.PACKAGES for case in suite.all_cases("tiny") if case.op == package.op and case.dtype in package.dtypes]


@pytest.mark.parametrize("package, case", CASES_OF_PACKAGES, ids=[f"{package.name} {case.key}" for package, case in CASES_OF_PACKAGES])
def test_packages_are_called_by_their_signatures(package, case, installed):
    row = rows_of(case, package.name)[package.name]
    assert row["status"] == "ok", row["reason"]


@pytest.mark.parametrize("name, op, spoil", [
    ("causal_conv1d", "causal_conv1d_fn", lambda fn: lambda x, weight, bias, **kw: fn(x, weight.flip(1), bias, **kw)),
    ("mamba_ssm", "mamba_chunk_scan_combined", lambda fn: lambda x, dt, A, B, C, chunk_size, **kw: fn(x, dt, A, C, B, chunk_size, **kw)),
    ("mamba_ssm", "rmsnorm_gated", lambda fn: lambda *a, norm_before_gate, **kw: fn(*a, norm_before_gate=not norm_before_gate, **kw)),
    ("flash_attn", "local_attention", lambda fn: lambda q, k, v, window_size, **kw: fn(q, k, v, window_size=(window_size[0] + 1, 0), **kw)),
    ("flash_attn", "patch_cross_attention", lambda fn: lambda q, k, v, a, b, *rest: fn(q, k, v, a, b.flip(0).diff().neg().cumsum(0).int(), *rest)),
    ("scattermoe", "fused_experts", lambda fn: lambda x, w, k, experts, *rest, **kw: fn(x, w, k, experts.roll(1), *rest, **kw)),
    ("fla", "mamba_chunk_scan_combined", lambda fn: lambda q, k, v, g, **kw: fn(q, k, v, g)),
])  # fmt: skip
def test_the_check_of_signatures_sees_a_wrong_call(name, op, spoil, installed, monkeypatch):
    """A swapped, shifted or left-out argument must not come out right: else the test above says nothing."""
    package = next(p for p in packages.PACKAGES if (p.name, p.op) == (name, op))
    module = sys.modules[package.modules[-1].split("|")[0]]
    function = {"causal_conv1d_fn": "causal_conv1d_fn", "rmsnorm_gated": "rmsnorm_fn", "local_attention": "flash_attn_func", "fused_experts": "parallel_linear",
                "patch_cross_attention": "flash_attn_varlen_func"}.get(op, "chunk_simple_gla" if name == "fla" else op)  # fmt: skip
    monkeypatch.setattr(module, function, spoil(getattr(module, function)))
    case = next(c for c in suite.all_cases("tiny") if c.op == op and c.dtype in package.dtypes and c.mode == "fwd")
    assert rows_of(case, name)[name]["status"] in ("wrong", "failed")


def test_every_package_has_its_rows():
    """Each of the eight is asked for where it has a function for the op; absent it is a row that says how to get it."""
    found = {}
    for case in suite.all_cases("tiny"):
        for row in rows_of(case, *packages.NAMES).values():
            assert row["status"] == "unavailable" and row["reason"] == f"{row['provider']} is not installed: pip install {packages.DISTRIBUTIONS[row['provider']]}"
            found.setdefault(row["provider"], set()).add(case.op)
    assert set(found) == set(packages.NAMES) and set(found["fla"]) == {"causal_conv1d_fn", "causal_conv1d_update", "mamba_chunk_scan_combined"}


def test_packages_that_cannot_run_say_why(monkeypatch):
    fake_packages.install(monkeypatch)
    assert rows_of(tiny("causal_conv1d_fn"), "fla")["fla"]["reason"] == "it runs on CUDA tensors; the inputs are on the CPU"
    monkeypatch.setattr(packages, "needs_gpu", lambda: None)
    assert rows_of(tiny("local_attention"), "flash_attn")["flash_attn"]["reason"] == "it takes bf16, fp16, not fp32"
    monkeypatch.setitem(sys.modules, "fla.modules.convolution", None)  # its import fails
    assert rows_of(tiny("causal_conv1d_fn"), "fla")["fla"]["reason"].startswith("fla does not load: ")


@pytest.mark.filterwarnings("ignore:terrazzo.compat.install")
def test_our_own_stand_in_is_not_the_package():
    handle = terrazzo.compat.install()
    try:
        assert "causal_conv1d" in sys.modules
        assert "is not installed" in rows_of(tiny("causal_conv1d_fn"), "causal_conv1d")["causal_conv1d"]["reason"]
    finally:
        handle.undo()


# ---- our backends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in suite.all_cases("tiny") if c.dtype == "fp32" and c.mode != "model"], ids=lambda c: c.key)
def test_every_op_has_all_backends(case):
    names = [provider.name for provider in case.providers]
    assert set(names) >= {"cpu", "cuda", "triton", "reference", "reference-compiled"}, names
    rows = rows_of(case, "cuda", "triton")
    assert {name: (row["status"], row["reason"]) for name, row in rows.items()} == {name: ("unavailable", "no GPU") for name in ("cuda", "triton")}


def test_backends_by_name_on_the_command_line(capsys):
    words = ["linear", "--preset", "tiny", "--match", "1x16x24 fwd", "--quick", "--any-machine-state", "--json", "--provider", "cpu,triton,cuda,reference"]
    assert main(words) == 0  # a backend that is not here is no failure
    rows = {row["provider"]: row for row in rows_printed(capsys)}
    assert list(rows) == ["cpu", "cuda", "triton", "reference"]
    assert rows["cpu"]["status"] == rows["reference"]["status"] == "ok"
    if not torch.cuda.is_available():
        assert {rows[name]["reason"] for name in ("cuda", "triton")} == {"no GPU"}


def test_backends_say_what_they_lack(monkeypatch):
    case = tiny("linear")
    monkeypatch.setattr(cases, "no_backend", lambda backend: None)  # the call itself has to say it
    row = rows_of(case, "cuda")["cuda"]
    assert row["status"] == "unavailable" and "CUDA kernels" in row["reason"] and "cannot run" not in row["reason"]


def test_where_the_inputs_lie_decides(monkeypatch):
    with torch.device("meta"):
        assert cases.no_backend("cpu") == "the inputs are on meta; --device cpu measures it" and cases.no_backend("cuda") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cases.no_backend("cuda") == "the inputs are on the CPU; --device cuda measures it" and cases.no_backend("cpu") is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in cases.no_backend("triton")


def test_terrazzo_means_all_of_ours():
    assert suite.expand(("terrazzo", "hf")) == ("terrazzo", "cpu", "hf")
    assert suite.expand(("hf", "terrazzo", "cuda"), "cuda") == ("hf", "terrazzo", "cuda", "triton")


def test_a_missing_gpu_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["linear", "--device", "cuda"]) == 2
    assert "--device cuda: torch finds no GPU" in capsys.readouterr().err


def test_inputs_move_with_their_strides():
    for case in suite.all_cases("tiny"):
        if case.dtype == "bf16" and case.mode != "model":
            before, moved = case.inputs(3), cases.on_device(case, "meta").inputs(3)
            for name, value in before.items():
                if isinstance(value, torch.Tensor):
                    assert moved[name].is_meta and (moved[name].shape, moved[name].stride(), moved[name].dtype) == (value.shape, value.stride(), value.dtype), name


# ---- arguments of kernels ------------------------------------------------------------------------------------


def test_a_kernel_gets_the_functions_other_arguments():
    @terrazzo.bench.provider("mine", op="rmsnorm_gated")
    def mine(x, weight, z, eps, norm_before_gate):
        return terrazzo.rmsnorm_gated(x, weight, z, eps=eps, norm_before_gate=norm_before_gate)

    assert rows_of(tiny("rmsnorm_gated"), "mine")["mine"]["status"] == "ok"


def test_threads_are_swept(capsys):
    before = torch.get_num_threads()
    words = ["rmsnorm_gated", "--preset", "tiny", "--match", "1x64 fwd", "--provider", "reference", "--quick", "--any-machine-state", "--json"]
    try:
        assert main([*words, "--threads", "1,2"]) == 0
    finally:
        torch.set_num_threads(before)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["kind"], line["threads"]) for line in lines] == [("environment", 1), ("row", 1), ("environment", 2), ("row", 2)]
    assert [line["calibration"]["threads"] for line in lines[::2]] == [1, 2]


def test_a_command_names_threads_and_preset():
    case = replace(tiny("rmsnorm_gated"), size="9x64")
    words = shlex.split(suite.command(case, "terrazzo"))
    assert words[:3] == ["terrazzo", "bench", "rmsnorm_gated"]
    assert ["--preset", "tiny"] == words[words.index("--preset") :][:2] and ["--threads", str(torch.get_num_threads())] == words[words.index("--threads") :][:2]
