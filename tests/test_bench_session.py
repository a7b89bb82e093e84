"""A run as a whole: its plan and its limit, the calibration that is kept, what each row's command says, the tables, results of older schemas."""
import inspect
import io
import itertools
import json
import shlex
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from terrazzo.bench import __main__ as command_line
from terrazzo.bench import accuracy, byte_model, compare, environment, page, report, roofline, suite
from terrazzo.bench.__main__ import main
from terrazzo.bench.cases import Provider, Unavailable

CALIBRATION = roofline.Calibration(100.0, 20.0, 30.0, 40.0, 2, "test", "2026-01-01")
CASE = next(c for c in suite.all_cases("tiny") if (c.op, c.mode, c.dtype, c.size) == ("rmsnorm_gated", "fwd", "fp32", "9x64"))
WORDS = ["rmsnorm_gated", "--preset", "tiny", "--mode", "fwd", "--any-machine-state", "--provider", "reference", "--quick"]


# ---- plan and limit ------------------------------------------------------------------------------------------


def test_the_plan_counts_rows_and_seconds(capsys):
    assert main(["rmsnorm_gated", "--preset", "tiny", "--list", "--provider", "cpu,triton,reference,hf,fla", "--full"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert err == "4 cases, 12 rows of up to 15 s: 180 s of timing; checks and slow calls come on top\n"
    assert main(["rmsnorm_gated", "--preset", "tiny", "--list", "--limit", "30", "--provider", "cpu"]) == 0
    assert capsys.readouterr().err == "4 cases, 4 rows of up to 3 s: 12 s of timing; at most 30 s in all\n"


def test_quick_plans_less_than_its_limit(capsys):
    """Bare --quick: no compiled rows, and the timing of all rows fits into the limit, most of which checks may take."""
    assert main(["--quick", "--list"]) == 0
    words = capsys.readouterr().err.split()
    assert words[-6:] == ["at", "most", "200", "s", "in", "all"]
    seconds = int(words[words.index("s:") + 1])
    assert 30 < seconds < 120, words


class Clock:
    """Every look at it is a millisecond; measuring takes what a test says."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        self.now += 1_000_000
        return self.now


def test_a_limit_is_shared_and_what_is_left_over_goes_on(monkeypatch, capsys):
    clock, shares = Clock(), []

    def measure(case, options, calibration, *, deadline_ns, **kw):
        shares.append((deadline_ns - clock.now) / 1e9)
        clock.now += int(9e9) if len(shares) == 3 else int(1e9)
        return suite.left_out(case, options, "a stand-in")

    monkeypatch.setattr(command_line.time, "perf_counter_ns", clock)
    monkeypatch.setattr(suite, "measure", measure)
    assert main([*WORDS, "--mode", "fwd,bwd", "--limit", "12", "--json"]) == 0
    # 12 s for four; 11 for three; 10 for two, of which 9 are used; 1 for the last
    assert [round(share, 1) for share in shares] == [3.0, 3.7, 5.0, 1.0]


def test_cases_behind_the_limit_are_rows_that_say_so(monkeypatch, capsys):
    clock = Clock()

    def measure(case, options, calibration, **kw):
        clock.now += int(8e9)
        return suite.left_out(case, options, "a stand-in")

    monkeypatch.setattr(command_line.time, "perf_counter_ns", clock)
    monkeypatch.setattr(suite, "measure", measure)
    assert main([*WORDS, "--mode", "fwd,bwd", "--limit", "12", "--json"]) == 0
    rows = [line for line in map(json.loads, capsys.readouterr().out.splitlines()) if line["kind"] == "row"]
    assert [row["reason"] for row in rows] == ["a stand-in"] * 2 + ["the 12 s of this run were over; --limit sets them"] * 2


def test_timing_ends_at_the_deadline():
    clock, durations = [0], itertools.cycle((40, 60, 90, 30, 75))

    def fn(**inputs):
        clock[0] += next(durations) * 1_000_000
        return CASE.reference()(**inputs)

    case = replace(CASE, providers=(Provider("cpu", lambda: fn, ours=True),))
    options = suite.Options(providers=("cpu",), budget_s=100.0)
    (free,) = suite.measure(case, options, CALIBRATION, clock=lambda: clock[0])
    (row,) = suite.measure(case, options, CALIBRATION, clock=lambda: clock[0], deadline_ns=clock[0] + 1_000_000_000)
    assert free["n"] > 50 and 7 <= row["n"] <= 20 and row["noisy"]
    (row,) = suite.measure(case, options, CALIBRATION, clock=lambda: clock[0], deadline_ns=clock[0] - 1)  # over already: MIN_TIMING_S
    assert 3 <= row["n"] <= 7


@pytest.mark.parametrize("hurry, status", [(True, "unavailable"), (False, "ok")])
def test_a_run_in_a_hurry_does_not_wait_for_slow_calls(hurry, status):
    clock, calls = [0], []

    def fn(**inputs):
        calls.append(1)
        clock[0] += 2_100_000_000  # over twice the second that a quick row has
        return CASE.reference()(**inputs)

    case = replace(CASE, providers=(Provider("reference", lambda: fn),))
    (row,) = suite.measure(case, suite.Options(providers=("reference",), budget_s=1.0, hurry=hurry), CALIBRATION, clock=lambda: clock[0])
    assert row["status"] == status
    if status == "unavailable":
        assert row["reason"].startswith("one call takes 2.1 s: name it with --provider") and len(calls) == 1


def test_compiled_peers_are_left_out_of_quick_runs_unless_named():
    def build():
        raise AssertionError("must not be built")

    case = replace(CASE, providers=(Provider("reference-compiled", build),))
    (row,) = suite.measure(case, suite.Options(providers=("reference-compiled",), hurry=True), CALIBRATION)
    assert row["status"] == "unavailable" and "--provider" in row["reason"]
    (row,) = suite.measure(case, suite.Options(providers=("reference-compiled",)), CALIBRATION)
    assert row["status"] == "failed" and "must not be built" in row["reason"]


@pytest.mark.parametrize("words, message", [(["--limit", "0"], "--limit must be above 0"), (["--baseline", "nobody"], "unknown baseline 'nobody'")])
def test_bad_options(words, message, capsys):
    assert main([*WORDS, *words]) == 2
    assert message in capsys.readouterr().err


# ---- rows ----------------------------------------------------------------------------------------------------


def test_a_command_says_everything_that_was_chosen():
    options = suite.Options(baseline="reference", seed=3, cold=True, speed="full", device="cuda")
    words = shlex.split(suite.command(CASE, "cuda", options))
    for pair in (["--provider", "cuda,reference"], ["--baseline", "reference"], ["--seed", "3"], ["--device", "cuda"]):
        assert pair == words[words.index(pair[0]) :][:2]
    assert "--cold" in words and "--full" in words
    assert command_line.parser().parse_args(["run", *words[2:]]).seed == 3
    plain = shlex.split(suite.command(CASE, "cpu"))
    assert not {"--seed", "--device", "--cold", "--normal", "--baseline"} & set(plain)


@pytest.mark.parametrize("op, baseline, peer", [("linear", "hf", "torch"), ("rmsnorm_gated", "hf", "hf"), ("linear", "reference", "reference")])
def test_whom_speed_ups_refer_to(op, baseline, peer):
    case = next(c for c in suite.all_cases("tiny") if (c.op, c.mode, c.dtype) == (op, "fwd", "fp32"))
    options = suite.Options(providers=("cpu", "torch", "hf", "reference"), baseline=baseline, budget_s=0.01, min_rounds=3)
    ours = next(row for row in suite.measure(case, options, CALIBRATION) if row["provider"] == "cpu")
    assert ours["baseline"] == peer and ours["speedup"] > 0 and f"--provider cpu,{peer}" in ours["command"]


def test_the_seed_draws_other_inputs():
    first, again, other = (accuracy.Inputs(CASE, base)(accuracy.SEEDS[0])["x"] for base in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_inputs_are_drawn_once_where_they_are_small(monkeypatch):
    drawn = []
    inputs = accuracy.Inputs(replace(CASE, inputs=lambda seed: drawn.append(seed) or CASE.inputs(seed)))
    assert all(inputs(seed) is inputs(seed) for seed in accuracy.SEEDS) and drawn == list(accuracy.SEEDS)
    monkeypatch.setattr(accuracy.Inputs, "KEPT_BYTES", 10)
    large = accuracy.Inputs(CASE)
    assert large(1) is not large(1) and torch.equal(large(1)["x"], large(1)["x"])


def test_providers_do_not_share_the_kept_inputs():
    """A provider that writes to its input is caught, and the next one still gets what was drawn."""
    def spoiler(x, weight, z):
        out = CASE.reference()(x=x, weight=weight, z=z)
        x.zero_()
        return out

    case = replace(CASE, providers=(Provider("hf", lambda: spoiler), Provider("cpu", CASE.reference, ours=True)))
    rows = {row["provider"]: row for row in suite.measure(case, suite.Options(providers=("hf", "cpu"), budget_s=0.01, min_rounds=3), CALIBRATION)}
    assert rows["hf"]["status"] == "wrong" and "changed its input x" in rows["hf"]["reason"]
    assert rows["cpu"]["status"] == "ok"


def test_timed_inputs_are_never_zero_nor_one_set():
    for case in suite.all_cases("tiny"):
        if case.dtype == "fp32":
            sets = suite._Job(case, suite.Options(), None, None).input_sets()
            assert len(sets) == (1 if case.mutated else 2)
            assert all(value.count_nonzero() > value.numel() / 2 or not value.is_floating_point() for s in sets for value in s.values() if isinstance(value, torch.Tensor))


def test_rows_of_models_count_tokens():
    case = replace(CASE, tokens=50, unit="bytes", providers=(Provider("cpu", CASE.reference, ours=True),))
    (row,) = suite.measure(case, suite.Options(providers=("cpu",), budget_s=0.01, min_rounds=3), CALIBRATION)
    assert row["tokens_per_s"] == pytest.approx(50 / row["median_ms"] * 1e3) and row["unit"] == "bytes"
    models = [case for preset in ("bamba-9b", "dbrx", "blt", "blenderbot-400m") for case in suite.all_cases(preset) if case.mode == "model"]
    assert all(case.tokens > 0 for case in models) and {case.unit for case in models if "blt" in case.key} == {"bytes"}


@pytest.mark.parametrize("model, preset", [("bamba", "bamba-9b"), ("dbrx", "dbrx"), ("blt", "blt"), ("blenderbot", "blenderbot-400m")])
def test_every_model_has_prefill_decoding_and_a_training_step_on_three_sides(model, preset):
    cases = [case for case in suite.cases_of("own_models", preset) if case.dtype == "fp32"]
    for job in ("prefill", "decode", "training step"):
        found = [case for case in cases if case.size.startswith(f"{model} {job}")]
        assert found, job
        assert {provider.name for provider in found[0].providers} == {"terrazzo", "hf-patched", "hf"}


@pytest.mark.parametrize("bytes_given", [(4, 259), (101, 7)])
def test_a_period_of_decoded_bytes_closes_as_many_patches_as_texts_do(bytes_given):
    """Whatever two bytes the inputs hold: rows of decoding count both kinds of steps, where a patch closes and where none does, in the limit's proportion."""
    pytest.importorskip("transformers")
    (case,) = [case for case in suite.cases_of("own_models", "tiny") if case.size.startswith("blt decode")]
    step = next(provider for provider in case.providers if provider.name == "terrazzo").build()
    model = inspect.getclosurevars(step).nonlocals["model"]
    closed = []
    hook = model.model.global_transformer.register_forward_hook(lambda *_: closed.append(1))
    sets = itertools.cycle([torch.tensor([[byte]]) for byte in bytes_given])
    with torch.no_grad():
        step(next(sets))
        for _ in range(3):
            closed.clear()
            for _ in range(case.period):
                step(next(sets))
            assert len(closed) == round(case.period * (1 - byte_model.SURE))
    hook.remove()


def test_the_environment_holds_what_the_specification_asks_for():
    found = environment.environment(CALIBRATION, "terrazzo bench", 5)
    for name in ("cpu", "cpu_flags", "threads", "gpu", "driver", "torch", "triton", "compiler", "nvcc", "build", "git_sha", "git_dirty", "seed", "command", "load_average",
                 "calibration", "packages"):  # fmt: skip
        assert name in found, name
    json.dumps(found)
    assert found["seed"] == 5 and set(found["packages"]) >= {"mamba-ssm", "flash-attn"} and found["build"]["isa"] == found["isa"]
    if found["cpu_flags"]:
        assert all(flag.startswith(environment.SIMD) for flag in found["cpu_flags"])


# ---- calibration ---------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Calibrations are kept in a folder of the test; measuring is counted and takes no time."""
    monkeypatch.setattr(roofline, "_kept_in", lambda: tmp_path / "deep" / "calibration.json")
    monkeypatch.setattr(roofline, "_still_true", lambda calibration: True)
    counted = []

    def measure():
        counted.append(1)
        return replace(CALIBRATION, gflops=100.0 + len(counted), date=roofline._now())

    monkeypatch.setattr(roofline, "calibrate", measure)
    return counted


def test_a_calibration_is_kept(kept):
    assert roofline.calibrated() == roofline.calibrated() and len(kept) == 1
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        roofline.calibrated()
        assert len(kept) == 2  # other threads, other peaks
    finally:
        torch.set_num_threads(before)
    assert roofline.calibrated().gflops == 101.0 and len(kept) == 2


def test_a_calibration_that_is_old_or_untrue_is_made_anew(kept, monkeypatch):
    roofline.calibrated()
    path = roofline._kept_in()
    path.write_text(path.read_text().replace(roofline._now()[:4], "2001"))
    assert roofline.calibrated().gflops == 102.0
    monkeypatch.setattr(roofline, "_still_true", lambda calibration: False)
    assert roofline.calibrated().gflops == 103.0
    path.write_text("{")  # cut off
    monkeypatch.setattr(roofline, "_still_true", lambda calibration: True)
    assert roofline.calibrated().gflops == 104.0 and roofline.calibrated().gflops == 104.0


def test_the_command_keeps_what_it_measured(kept, capsys):
    assert main(["calibrate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gflops"] == 101.0
    assert roofline.calibrated().gflops == 101.0 and len(kept) == 1
    assert main(["calibrate"]) == 0
    assert "101.0" not in capsys.readouterr().out and roofline.calibrated().gflops == 102.0


def test_a_folder_that_cannot_be_written_keeps_nothing(kept, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(roofline, "_kept_in", lambda: tmp_path / "file" / "calibration.json")
    assert roofline.keep(CALIBRATION) is False
    assert roofline.calibrated().gflops == 101.0


def test_whether_a_calibration_is_still_true(monkeypatch):
    rates = {}
    monkeypatch.setattr(roofline, "_best_rate", lambda amount, fn, repeats, stopwatch: rates["read" if amount == 1 << 26 else "fma"])
    for fma, read, true in ((100, 20, True), (95, 19, True), (90, 20, False), (100, 12, False), (100, 30, False)):
        rates.update(fma=fma, read=read)
        assert roofline._still_true(CALIBRATION) is true, (fma, read)


# ---- tables --------------------------------------------------------------------------------------------------


def timed(provider, ms, **values):
    return {"op": "op", "size": "1x2", "dtype": "fp32", "mode": "fwd", "provider": provider, "status": "ok", "reason": "", "median_ms": ms, "p20_ms": ms, "p80_ms": ms,
            "n": 9, "noisy": False, "times_limit": 1.5, "gflops": 1.0, "gbs": 2.0, "max_abs": 1e-6, "nmse": 1e-13, "speedup": 8 / ms, "baseline": "hf"} | values  # fmt: skip


def lines_of(table):
    console = Console(width=160, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_absent_providers_share_a_line():
    rows = [timed("cpu", 2.0), *({"op": "op", "size": "1x2", "dtype": "fp32", "mode": "fwd", "provider": name, "status": "unavailable", "reason": reason}
            for name, reason in (("fla", "fla is not installed: pip install x"), ("flash_attn", "flash_attn is not installed: pip install y"), ("cuda", "no GPU")))]  # fmt: skip
    assert page.absent(rows) == [("not installed", ["fla", "flash_attn"]), ("no GPU", ["cuda"])]
    text = lines_of(report.case_table(rows))
    assert "fla, flash_attn: not installed" in text and "cuda: no GPU" in text and "pip" not in text


def test_a_run_ends_with_one_line_a_case():
    rows = [timed("cpu", 2.0), timed("hf", 8.0), timed("cpu", 3.0, size="9x9", tokens_per_s=1234.0, unit="tokens"),
            timed("hf", 1.0, size="9x9", status="wrong", reason="row 3"), timed("cpu", 1.0, size="0x0", status="unavailable", reason="no")]  # fmt: skip
    text = lines_of(report.summary_table(rows))
    first, second, third = (next(line for line in text.splitlines() if size in line) for size in ("1x2", "9x9", "0x0"))
    assert "4×" in first and "hf" in first and "1.5" in first
    assert "hf wrong" in second and "not measured" in third
    assert "1234 tokens/s" in lines_of(report.case_table(rows[2:3]))


@pytest.mark.parametrize("names, chosen", [(("hf", "cpu"), "cpu"), (("cpu", "cuda", "triton"), "cuda"), (("hf", "terrazzo", "hf-patched"), "terrazzo"), (("hf",), None)])
def test_who_stands_for_us(names, chosen):
    found = suite.standing_for_us([timed(name, 1.0) for name in names])
    assert (found and found["provider"]) == chosen


def test_a_wrong_row_of_ours_is_not_hidden_by_an_absent_one():
    rows = [timed("cuda", 1.0, status="unavailable", reason="no GPU"), timed("cpu", 1.0, status="wrong", reason="x")]
    assert suite.standing_for_us(rows)["provider"] == "cpu"


# ---- results of other schemas --------------------------------------------------------------------------------


def result(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def old_row(provider, mode="fwd"):
    return {"schema": 1, "kind": "row", "op": "op", "size": "1", "dtype": "fp32", "mode": mode, "provider": provider, "threads": 2, "status": "ok", "reason": "",
            "median_ms": 1.0, "samples_ms": [1.0] * 9}  # fmt: skip


def test_schema_1_is_read_as_2(tmp_path):
    _, rows = compare.read(result(tmp_path / "a", old_row("terrazzo"), old_row("hf"), old_row("terrazzo", "model"), old_row("terrazzo-packed")))
    assert [(row["provider"], row["mode"], row["device"], row["cold"]) for row in rows] == [
        ("cpu", "fwd", "cpu", False), ("hf", "fwd", "cpu", False), ("terrazzo", "model", "cpu", False), ("terrazzo-packed", "fwd", "cpu", False)]  # fmt: skip
    new = result(tmp_path / "b", old_row("cpu") | {"schema": 2, "device": "cpu", "cold": False})
    assert [r["verdict"] for r in compare.compare(tmp_path / "a", new)] == ["SAME"]


def test_a_newer_schema_is_refused(tmp_path, capsys):
    file = result(tmp_path / "a", old_row("cpu") | {"schema": 3})
    assert main(["export", str(file)]) == 2
    assert "line 1 is no line of a result: ValueError schema 3 is newer than this terrazzo" in capsys.readouterr().err


def test_other_devices_and_cold_runs_are_other_measurements(tmp_path):
    base = old_row("cpu") | {"schema": 2, "device": "cpu", "cold": False}
    a, b = result(tmp_path / "a", base), result(tmp_path / "b", base | {"cold": True}, base | {"device": "cuda"})
    assert compare.compare(a, b) == []
    with pytest.raises(compare.Incomparable, match="device differs: 'cpu'"):
        compare.compare(result(tmp_path / "a", {"kind": "environment"}, base), result(tmp_path / "b", {"kind": "environment", "device": "cuda"}, base))


def test_unavailable_reasons_come_from_the_call_too():
    def build():
        def run(**inputs):
            raise Unavailable("not with these")

        return run

    case = replace(CASE, providers=(Provider("hf", build),))
    (row,) = suite.measure(case, suite.Options(providers=("hf",)), CALIBRATION)
    assert (row["status"], row["reason"]) == ("unavailable", "not with these")
