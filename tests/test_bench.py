"""The benchmark suite itself: protocol, accuracy gate, comparison, targets."""
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from terrazzo.bench import accuracy, compare, cost_model, memory, report, roofline, suite, targets, timer
from terrazzo.bench.__main__ import main
from terrazzo.bench.cases import DTYPES, PRESETS, Provider, Unavailable, clone_inputs, runner, select

CALIBRATION = roofline.Calibration(100.0, 20.0, 30.0, 40.0, 2, "test", "2026-01-01")
TINY = suite.all_cases("tiny")


class FakeTime:
    """A clock that moves only when a provider says so."""

    def __init__(self):
        self.now = 0

    def clock(self):
        return self.now

    def provider(self, ns, jitter=(0.0,)):
        state = {"calls": 0}

        def run():
            self.now += int(ns * (1 + jitter[state["calls"] % len(jitter)]))
            state["calls"] += 1

        return run


def tiny(op, mode="fwd"):
    return next(c for c in TINY if (c.op, c.mode, c.dtype) == (op, mode, "fp32"))


def with_providers(case, **builds):
    return replace(case, providers=tuple(Provider(name, build, ours=name == "terrazzo") for name, build in builds.items()))


def measured(case, **options):
    chosen = suite.Options(providers=tuple(p.name for p in case.providers), budget_s=0.01, min_rounds=3, **options)
    return {row["provider"]: row for row in suite.measure(case, chosen, CALIBRATION)}


# ---- timer ---------------------------------------------------------------------------------------------------


def test_quantiles():
    values = [5, 1, 4, 2, 3]
    assert timer.median(values) == 3
    assert timer.quantile(values, 0.2) == pytest.approx(1.8)
    assert timer.quantile([7], 0.8) == 7


def test_fake_clock_times_exactly_and_stops_when_settled():
    fake = FakeTime()
    found = timer.interleave({"a": fake.provider(1_000_000), "b": fake.provider(2_000_000)}, 10.0, clock=fake.clock)
    assert found["a"].summary()["median_ms"] == 1.0
    assert found["b"].summary()["median_ms"] == 2.0
    assert found["a"].summary()["n"] == 7 and not found["a"].summary()["noisy"]


def test_short_calls_are_repeated_inside_a_sample():
    fake = FakeTime()
    found = timer.interleave({"a": fake.provider(1_000)}, 1.0, clock=fake.clock)
    assert found["a"].repeats == 500
    assert found["a"].summary()["median_ms"] == pytest.approx(0.001)


def test_a_sample_holds_whole_periods_of_calls_that_differ():
    """Every fifth call takes six times as long as the others: the median is the mean of a period, wherever a sample begins; calls that are slow as they are stay single."""
    def median(name, unit_ns, budget_s=1.0):
        fake, count = FakeTime(), itertools.count()
        runs = [fake.provider(unit_ns if place else 6 * unit_ns) for place in range(5)]
        found = timer.interleave({name: lambda: runs[next(count) % 5]()}, budget_s, clock=fake.clock, period=5, lead_in=True)[name]
        return found.repeats, found.summary()["median_ms"]

    assert median("fast", 10_000) == (50, 0.02)
    assert median("middling", 1_000_000) == (5, 2.0)
    assert median("slow", 200_000_000)[0] == 1


def test_unsteady_provider_runs_to_the_budget_and_is_noisy():
    fake = FakeTime()
    found = timer.interleave({"a": fake.provider(10_000_000, jitter=(0.0, 0.3, 0.6, 0.1, 0.9))}, 0.5, clock=fake.clock)
    assert found["a"].summary()["noisy"]
    assert fake.now >= 0.5e9


def test_long_calls_that_were_made_before_are_not_warmed_up_again():
    fake, calls = FakeTime(), {"short": 0, "long": 0}

    def named(name, ns):
        run = fake.provider(ns)

        def count():
            calls[name] += 1
            run()

        return count

    providers = {"short": named("short", 1_000_000), "long": named("long", 200_000_000)}
    found = timer.interleave(providers, 10.0, clock=fake.clock, known={"short": 1_000_000, "long": 200_000_000})
    assert calls == {"short": 7 + 2, "long": 7} and {len(t.samples) for t in found.values()} == {7}


def test_every_round_runs_every_provider_once_in_changing_order():
    fake, calls = FakeTime(), []

    def named(name):
        run = fake.provider(1_000_000)
        return lambda: (calls.append(name), run())

    timer.interleave({name: named(name) for name in "abc"}, 1.0, clock=fake.clock, min_rounds=9)
    rounds = ["".join(calls[i : i + 3]) for i in range(6, len(calls), 3)]  # after two warm-up calls each
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1


def test_judging_piece_by_piece_sees_every_element(monkeypatch):
    """Pieces of four: one wrong, one infinite element in the last of them counts as in the whole, and a reference of another shape is refused."""
    from terrazzo import tolerance

    exact = torch.arange(1.0, 11.0, dtype=torch.float64)
    same = exact.float()
    wrong, lost = same.clone(), same.clone()
    wrong[9] += 1.0
    lost[9] = float("inf")
    whole = [tolerance.check(out, exact, same) for out in (same, wrong, lost)]
    monkeypatch.setattr(tolerance, "PIECE", 4)
    pieces = [tolerance.check(out, exact, same) for out in (same, wrong, lost)]
    assert [v.ok for v in pieces] == [v.ok for v in whole] == [True, False, False]
    assert (pieces[1].max_abs, pieces[1].rel) == (1.0, 0.1) and pieces[1].nmse == pytest.approx(1 / 385) == whole[1].nmse
    assert pieces[2].why == "1 elements differ in being finite"
    with pytest.raises(ValueError, match="ref64 must have out's shape"):
        tolerance.check(same.view(2, 5), exact.view(5, 2), same.view(2, 5))


def test_rounds_on_a_busy_machine_are_dropped():
    fake = FakeTime()
    answers = iter([True, False, *[True] * 100])
    found = timer.interleave({"a": fake.provider(1_000_000)}, 1.0, clock=fake.clock, machine_is_free=lambda: next(answers))
    assert found["a"].dropped == 2  # the one before and the one after
    assert len(found["a"].samples) == 7


def test_laying_out_weights_is_no_part_of_a_packed_row():
    """300 ms for weights not seen before, 1 ms else: each sample says 1 ms, from the first round on, on every input set."""
    fake, case = FakeTime(), tiny("fused_experts")
    packed = next(p for p in case.providers if p.name == "terrazzo-packed")

    def build():
        fn, seen = packed.build(), set()

        def run(**inputs):
            key = (inputs["w1"].data_ptr(), float(inputs["w1"].flatten()[0]))
            fake.now += 1_000_000 if key in seen else 300_000_000
            seen.add(key)
            return fn(**inputs)

        return run

    options = suite.Options(providers=("terrazzo-packed",), budget_s=0.01, min_rounds=3)
    (row,) = suite.measure(replace(case, providers=(replace(packed, build=build),)), options, CALIBRATION, clock=fake.clock)
    assert row["input_sets"] == 2 and set(row["samples_ms"]) == {1.0}


# ---- comparison ----------------------------------------------------------------------------------------------

NOISE = (0.0, 0.004, -0.003, 0.002, -0.004, 0.001, 0.003)


def result_file(path, slowdown=1.0, cpu="test cpu", offset=0):
    fake = FakeTime()
    jitter = NOISE[offset:] + NOISE[:offset]
    samples = timer.interleave({"ours": fake.provider(int(2_000_000 * slowdown), jitter)}, 0.05, clock=fake.clock, min_rounds=21)["ours"].samples
    row = {"kind": "row", "op": "op", "size": "1", "dtype": "fp32", "mode": "fwd", "provider": "ours", "threads": 2, "status": "ok",
           "median_ms": timer.median(samples) / 1e6, "samples_ms": [s / 1e6 for s in samples]}  # fmt: skip
    environment = {"kind": "environment", "cpu": cpu, "gpu": None, "threads": 2, "malloc_tuned": False}
    path.write_text("".join(json.dumps(line) + "\n" for line in (environment, row)))
    return path


def test_injected_slowdown_is_slow_and_the_reverse_fast(tmp_path):
    before, after = result_file(tmp_path / "a"), result_file(tmp_path / "b", slowdown=1.1)
    (found,) = compare.compare(before, after)
    assert found["verdict"] == "SLOW" and found["ratio"] == pytest.approx(1.1, rel=0.01)
    assert compare.compare(after, before)[0]["verdict"] == "FAST"
    assert compare.fails([found], "slow:5%") == [found]
    assert compare.fails([found], "slow:15%") == []
    assert main(["compare", str(before), str(after), "--fail-on", "slow:5%"]) == 1


def test_identical_runs_are_the_same(tmp_path):
    before, after = result_file(tmp_path / "a"), result_file(tmp_path / "b", offset=3)
    assert compare.compare(before, after)[0]["verdict"] == "SAME"
    assert main(["compare", str(before), str(after), "--fail-on", "slow:5%"]) == 0


def test_few_scattered_samples_are_unsure():
    assert compare.verdict(*compare.ratio_of([1.0, 1.2, 0.9], [1.1, 1.3, 1.0])) == "UNSURE"
    assert compare.verdict(*compare.ratio_of([1.0] * 8, [1.1] * 8, pairs=True)) == "SLOW"
    assert compare.verdict(*compare.ratio_of([1.0] * 7, [1.1] * 7, pairs=True)) == "UNSURE"  # seven signs alike are not yet one in a hundred


def test_pairs_see_through_a_machine_that_slows_down():
    """Both sides of a pair get the same share of a machine four times slower in the end: their ratios are all 1.1, their medians say little."""
    machine = [1.0 + number % 4 for number in range(20)]
    before, after = machine, [1.1 * speed for speed in machine]
    assert compare.verdict(*compare.ratio_of(before, after)) == "UNSURE"
    assert compare.verdict(*compare.ratio_of(before, after, pairs=True)) == "SLOW"


def compared(ratios, provider="hf"):
    return [{"provider": provider, "ratio": ratio, "p": 0.0} for ratio in ratios]


def test_what_others_rows_differ_by_is_the_machine():
    assert compare.noise(compared([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.3, 0.7])) == 0.0
    assert compare.noise(compared([1.1, 1 / 1.1] * 4)) == pytest.approx(1.4826 * math.log(1.1))
    assert compare.noise(compared([1.1] * 7)) == compare.noise(compared([1.1] * 9, provider="cpu")) == 0.0  # too few; our own code, which is what changed


def test_a_noisy_machine_raises_the_least_effect(tmp_path):
    """Eight rows of others that differ by a tenth either way: a fifth is not called slow, and the summary says why; a third more than that is."""
    def write(name, factors):
        rows = [{"kind": "row", "op": "op", "size": str(i), "dtype": "fp32", "mode": "fwd", "provider": "hf" if i < 8 else "cpu", "threads": 2, "status": "ok",
                 "median_ms": factor, "samples_ms": [factor * (1 + 0.001 * k) for k in range(9)]} for i, factor in enumerate(factors)]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in ({"kind": "environment"}, *rows)))
        return tmp_path / name

    before = write("a", [1.0] * 11)
    found = compare.compare(before, write("b", [1.1, 1 / 1.1] * 4 + [1.0, 1.2, 1.6]))
    assert [r["verdict"] for r in found] == ["UNSURE"] * 8 + ["SAME", "UNSURE", "SLOW"]
    assert "more than 33 %" in compare.summary(found)
    found = compare.compare(before, write("b", [1.0] * 8 + [1.0, 1.2, 1.6]))
    assert [r["verdict"] for r in found] == ["SAME"] * 9 + ["SLOW"] * 2 and compare.summary(found) == "11 rows: 9 SAME, 2 SLOW"


def test_passes_of_two_pairs_of_processes_are_one_row(tmp_path):
    """Each pair of processes has its own part; what only one side has of a part does not count."""
    def write(name, *parts):
        rows = [{"kind": "row", "op": "op", "size": "1", "dtype": "fp32", "mode": "fwd", "provider": "cpu", "threads": 2, "status": "ok", "by_turns": number,
                 "median_ms": 1.0, "samples_ms": samples} for number, samples in parts]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in ({"kind": "environment"}, *rows)))
        return tmp_path / name

    before = write("a", (1, [1.0, 2.0, 3.0, 4.0, 5.0]), (2, [5.0, 1.0, 2.0, 6.0, 3.0]), (3, [100.0]))
    after = write("b", (1, [1.1, 2.2, 3.3, 4.4, 5.5]), (2, [5.5, 1.1, 2.2, 6.6, 3.3]))
    (found,) = compare.compare(before, after)
    assert found["ratio"] == pytest.approx(1.1) and found["p"] < 0.01 and found["verdict"] == "SLOW" and found["before_ms"] == 3.0
    (found,) = compare.compare(before, write("c", (1, [1.1, 2.2, 3.3, 4.4]), (2, [5.5, 1.1, 2.2, 6.6, 3.3])))  # no longer pairs
    assert found["verdict"] == "UNSURE"
    assert compare.compare(before, write("d", (2, [5.5, 1.1, 2.2, 6.6, 3.3]))) == []  # what failed the gate of the first pass


def test_signed_ranks_against_known_value():
    """SciPy's wilcoxon(correction=True, method="asymptotic") of the same numbers."""
    assert compare.signed_ranks([1, 2, 3, 4, 5, 6, 7, 8, 9]) == pytest.approx(0.00915, rel=0.01)
    assert compare.signed_ranks([1, -1, 2, -2]) == 1.0 and compare.signed_ranks([0.0, 0.0]) == 1.0


def test_another_machine_is_refused(tmp_path, capsys):
    before, after = result_file(tmp_path / "a"), result_file(tmp_path / "b", cpu="other cpu")
    assert main(["compare", str(before), str(after)]) == 2
    assert "cpu differs" in capsys.readouterr().err
    assert main(["compare", str(before), str(after), "--force"]) == 0


def test_mann_whitney_against_known_value():
    assert compare.mann_whitney([1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14]) == pytest.approx(0.00217, rel=0.02)
    assert compare.mann_whitney([1, 1, 1], [1, 1, 1]) == 1.0


def test_bad_fail_rule():
    with pytest.raises(ValueError, match="slow:5%"):
        compare.fails([], "fast")


# ---- accuracy gate -------------------------------------------------------------------------------------------


def correct(case):
    return case.reference()


def test_right_provider_is_timed():
    case = tiny("rmsnorm_gated")
    row = measured(with_providers(case, terrazzo=lambda: correct(case)))["terrazzo"]
    assert row["status"] == "ok" and row["n"] >= 3 and row["first_call_ms"] > 0
    assert row["times_limit"] == pytest.approx(row["median_ms"] / row["limit_ms"])


@pytest.mark.parametrize("op, mode", [("rmsnorm_gated", "fwd"), ("rmsnorm_gated", "bwd"), ("causal_conv1d_update", "decode"),
                                      ("mamba_chunk_scan_combined", "fwd"), ("mamba_chunk_scan_combined", "bwd")])  # fmt: skip
def test_wrong_output_is_not_timed(op, mode):
    case = tiny(op, mode)
    row = measured(with_providers(case, terrazzo=lambda: lambda **kw: correct(case)(**kw) * 1.01))["terrazzo"]
    assert row["status"] == "wrong" and "median_ms" not in row
    assert row["rel"] > 1e-3


def test_provider_that_returns_its_input_is_caught():
    case = tiny("rmsnorm_gated")
    row = measured(with_providers(case, terrazzo=lambda: lambda x, weight, z: x))["terrazzo"]
    assert row["status"] == "wrong"


def test_view_of_an_input_is_caught_even_with_right_values():
    case = tiny("rmsnorm_gated")

    def into_its_input(x, weight, z):
        return x.copy_(correct(case)(x=x, weight=weight, z=z))

    row = measured(with_providers(case, terrazzo=lambda: into_its_input))["terrazzo"]
    assert row["status"] == "wrong" and "input x" in row["reason"]


@pytest.mark.parametrize("key", [lambda x: 0, lambda x: x.data_ptr()], ids=["always", "by address"])
def test_kept_output_is_caught(key):
    case, kept = tiny("rmsnorm_gated"), {}

    def lazy(x, weight, z):
        if key(x) not in kept:
            kept[key(x)] = correct(case)(x=x, weight=weight, z=z)
        return kept[key(x)].clone()

    row = measured(with_providers(case, terrazzo=lambda: lazy))["terrazzo"]
    assert row["status"] == "wrong" and "second call" in row["reason"]


def test_forgotten_state_is_caught():
    case = tiny("causal_conv1d_update", "decode")

    def without_state(conv_state, **kw):
        return correct(case)(conv_state=conv_state.clone(), **kw)

    assert measured(with_providers(case, terrazzo=lambda: without_state))["terrazzo"]["status"] == "wrong"


def test_nan_output_is_wrong_for_peers_too():
    case = tiny("rmsnorm_gated")
    row = measured(with_providers(case, hf=lambda: lambda x, weight, z: x * float("nan")))["hf"]
    assert row["status"] == "wrong"


def test_raising_and_absent_providers_are_rows_with_the_reason():
    case = tiny("rmsnorm_gated")

    def absent():
        raise Unavailable("not installed")

    def broken():
        def run(**kw):
            raise RuntimeError("no kernel image")

        return run

    rows = measured(with_providers(case, terrazzo=lambda: correct(case), hf=absent, reference=broken))
    assert (rows["hf"]["status"], rows["hf"]["reason"]) == ("unavailable", "not installed")
    assert rows["reference"]["status"] == "failed" and "no kernel image" in rows["reference"]["reason"]
    assert rows["terrazzo"]["status"] == "ok" and rows["terrazzo"]["speedup"] is None


def test_speedup_refers_to_the_baseline():
    rows = [{"provider": name, "status": "ok", "median_ms": ms} for name, ms in (("terrazzo", 2.0), ("hf", 6.0))]
    suite._add_speedups(rows, "hf")
    assert [row["speedup"] for row in rows] == [3.0, 1.0]


# ---- cases and roofline --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in TINY if c.dtype in ("fp32", "bf16")], ids=lambda c: c.key)
def test_every_provider_passes_the_gate_at_tiny_size(case):
    oracle = accuracy.Oracle(case)
    for provider in case.providers:
        if provider.name in ("cpu", "terrazzo", "reference", "torch", "hf", "hf-patched", "hf-grouped"):
            try:
                provider.build()
            except Unavailable as why:
                assert "nothing" in str(why) or "terrazzo" in str(why), f"{provider.name}: {why}"
                continue
            found = accuracy.gate(case, provider.build(), oracle, provider.ours)
            assert found.ok, f"{provider.name}: {found.why}"


def test_compiled_peer_passes_the_gate():
    case = tiny("causal_conv1d_fn")
    provider = next(p for p in case.providers if p.name == "hf-compiled")
    assert accuracy.gate(case, provider.build(), accuracy.Oracle(case), ours=False).ok


@pytest.mark.parametrize("preset", PRESETS)
def test_case_names_are_unique(preset):
    keys = [case.key for case in suite.all_cases(preset)]
    assert len(keys) == len(set(keys))


def test_inputs_differ_by_seed_and_are_never_zero():
    for case in TINY:
        first, second = case.inputs(1), case.inputs(2)
        assert any(isinstance(v, torch.Tensor) and not torch.equal(v, second[k]) for k, v in first.items())
        assert all(v.count_nonzero() for v in first.values() if isinstance(v, torch.Tensor))


def test_clone_keeps_expanded_and_sliced_strides():
    inputs = tiny("selective_state_update", "decode").inputs(1)
    clones = clone_inputs(inputs)
    for name, value in inputs.items():
        assert clones[name].stride() == value.stride() and torch.equal(clones[name], value), name
        assert clones[name].data_ptr() != value.data_ptr()


def test_limit_is_the_larger_of_compute_and_memory():
    assert CALIBRATION.limit_ms(roofline.Work(flops=1e9, bytes=1e6)) == (pytest.approx(10.0), "compute")
    assert CALIBRATION.limit_ms(roofline.Work(flops=1e6, bytes=3e8, traffic="copy")) == (pytest.approx(10.0), "memory")
    assert CALIBRATION.limit_ms(roofline.Work(flops=1e6, bytes=4e8, traffic="scale")) == (pytest.approx(10.0), "memory")


@pytest.mark.parametrize("loops", [roofline._native_loop, roofline._torch_loop], ids=["native", "torch"])
@pytest.mark.parametrize("kind", roofline.KINDS)
def test_calibration_loops(loops, kind):
    buffer = torch.rand(1 << 21)
    before = buffer.clone()
    loops(buffer, kind, 1)
    half = buffer.numel() // 2
    if kind == "copy":
        assert torch.equal(buffer[:half], before[:half]) and torch.equal(buffer[half:], before[:half])
    elif kind == "scale":
        torch.testing.assert_close(buffer, before * 0.9999)
    else:
        assert torch.equal(buffer, before)


def test_native_read_sums_everything_it_says():
    buffer = torch.rand(64 * 256 * 3)
    assert torch.ops.terrazzo.calibrate(buffer, roofline.KINDS.index("read"), 2) == pytest.approx(2 * buffer.double().sum().item(), rel=1e-5)


def test_calibrate_measures_positive_rates():
    found = roofline.calibrate(buffer_bytes=8 << 20, repeats=1)
    assert min(found.gflops, found.read_gbs, found.copy_gbs, found.scale_gbs) > 0
    assert found.threads == torch.get_num_threads()


def test_peak_memory_sees_a_large_allocation():
    peak = memory.peak_of(lambda: torch.ones(64 << 18))
    assert peak > 50 << 20 if memory.CLEAR.exists() else peak is None


# ---- floors on GPUs ------------------------------------------------------------------------------------------

# op module and function, arguments -> (flops, bytes) counted by hand, 2 bytes a number
WORK = {
    "conv, 3 channels x 5": (suite.causal_conv1d.work, (3, 5, 2), 2 * 4 * 15, 2 * (15 + 15)),
    "conv backward": (suite.causal_conv1d.work, (3, 5, 2, "bwd"), 8 * 4 * 15, 2 * 5 * 15),
    "conv update, 2 rows x 3": (suite.causal_conv1d.update_work, (2, 3, 2), 2 * 4 * 6, 2 * (6 * 4 * 2 + 6 * 2 + 3 * 5)),
    "scan, 7 tokens, 2 heads of 3, state 5": (suite.chunk_scan.work, (7, 2, 3, 5, 2), 7 * 2 * (4 * 15), 2 * 2 * 7 * (6 + 5)),
    "scan backward": (suite.chunk_scan.work, (7, 2, 3, 5, 2, "bwd"), 7 * 2 * (14 * 15), 2 * 5 * 7 * (6 + 5)),
    "state update, 2 rows": (suite.state_update.work, (2, 2, 3, 5, 2), 6 * 60, 2 * 60 * 2),
    "norm, 3 x 8": (suite.rmsnorm_gated.work, (3, 8, 2), 15 * 24, 3 * 24 * 2),
    "linear, 2 x 3 x 5": (suite.linear.work, (2, 3, 5, 2), 2 * 30, 2 * (6 + 10 + 15)),
    "two layers, 2 x 3 x (5 + 1)": (suite.decoding.layers_work, (2, 3, 6, 2), 2 * 36, 2 * (6 + 12 + 18)),
    "4 positions before, 2/1 heads of 3": (suite.decoding.attention_work, (1, 2, 1, 3, 4, 2), 4 * 2 * 5 * 3, 2 * 2 * 15),
    "grouped, 4 groups, 6 rows, 3 x 5": (suite.grouped_gemm.work, (4, 6, 3, 5, 2), 2 * 6 * 15, 2 * (18 + 30 + 4 * 15)),
    "experts, 7 tokens, 3 x 5, 2 choices of 4": (suite.moe.experts_work, (7, 3, 5, 2, 4, 2), 3 * 2 * 14 * 15, 2 * (4 * 3 * 15 + 2 * 21)),
    "route, 7 tokens, 4 experts, 2 choices": (suite.moe.route_work, (7, 4, 2, 2), 20 * 28, 2 * 28 + 20 * 14),
    "reduce, 9 bytes, 2 patches x 3": (suite.patch_reduce.work, (9, 2, 3, 2), 27, 2 * (27 + 6)),
    "patches ask, 9 bytes, 2 patches, a head of 3": (suite.patch_cross_attention.work, (9, 2, 1, 3, "patches", 2), 9 * 2 * 12, 2 * 3 * (2 * 4 + 2 * 9)),
    "window 2 over 4, 2/1 heads of 3": (suite.local_attention.work, (4, 2, 1, 3, 2, 2), 4 * (1 + 2 + 2 + 2) * 6, 2 * 4 * 3 * (2 * 2 + 2)),
    "entropies of 3": (suite.entropy_patch.work, (3, 2), 40 * 3 * 260, 2 * 3 * 260),
    "hashes, 5 bytes x 4, 11 rows": (suite.byte_hash_embedding.work, (5, 4, 11, 2), 6 * 20, 8 * 20 * 2),
    "hashes backward": (suite.byte_hash_embedding.work, (5, 4, 11, 2, "bwd"), 6 * 20, 2 * (8 * 20 + 6 * 11 * 4 + 14 * 20)),
}


@pytest.mark.parametrize("name", WORK)
def test_work_counted_by_hand(name):
    function, arguments, flops, moved = WORK[name]
    work = function(*arguments)
    assert (work.flops, work.bytes) == (flops, moved)


def test_floor_is_the_largest_of_three():
    gpu = cost_model.Gpu("gpu", tflops=2.0, tbs=4.0)
    assert gpu.floor_us(roofline.Work(6e6, 8e6)) == (3.0, "compute")
    assert gpu.floor_us(roofline.Work(6e6, 16e6)) == (4.0, "memory")
    assert gpu.floor_us(roofline.Work(6e6, 8e6), launches=2) == (2 * cost_model.LAUNCH_US, "launches")


@pytest.mark.unpoisoned  # gigabytes that nobody touches
def test_launches_are_counted_and_nothing_runs():
    norms = [w for w in cost_model.workloads() if w.op == "rmsnorm_gated"]
    assert cost_model.launches(norms[0]) == ["rmsnorm_gated_fwd_kernel"]
    assert cost_model.launches(norms[1]) == ["rmsnorm_gated_fwd_kernel", "rmsnorm_gated_bwd_kernel", "sum_rows_kernel"]


@pytest.mark.unpoisoned
def test_roofline_document_is_what_the_command_writes(tmp_path, capsys):
    assert main(["roofline", "-o", str(tmp_path / "roofline.md")]) == 0
    document = Path(__file__).parents[1] / "docs/roofline.md"
    assert (tmp_path / "roofline.md").read_text() == document.read_text(), "terrazzo bench roofline -o docs/roofline.md"


def test_published_times_are_no_faster_than_the_floor():
    for p in cost_model.PUBLISHED:
        assert p.gpu.floor_us(p.work)[0] < p.us, p.what


# ---- targets and reports -------------------------------------------------------------------------------------


def test_every_target_has_a_case():
    keys = {case.key for preset in targets.PRESETS for case in suite.all_cases(preset)}
    assert {key for target in targets.TARGETS for key in target.cases} <= keys


def test_judging_targets():
    rows = [{"provider": "terrazzo", "status": "ok", "median_ms": 2.0, "times_limit": 1.6},
            {"provider": "hf", "status": "ok", "median_ms": 30.0}]  # fmt: skip
    target = targets.Target("op", "1", "fwd", "fp32", "hf", 15)
    assert targets.judge(target, rows) == (15.0, True, "")
    assert targets.judge(replace(target, bar=15.1), rows)[1] is False
    assert targets.judge(replace(target, against="limit", bar=1.5), rows) == (1.6, False, "")
    assert targets.judge(replace(target, against="memory", bar=2), rows, (30, 10)) == (3.0, False, "")
    sized = [row | {"peak_bytes": size} for row, size in zip(rows, (20, 100))]
    assert targets.judge(replace(target, against=targets.HF_MEMORY, bar=0.3), sized) == (0.2, True, "")
    assert targets.judge(replace(target, against=targets.HF_MEMORY, bar=0.1), sized)[1] is False
    wrong = [{"provider": "terrazzo", "status": "wrong", "reason": "row 3"}, rows[1]]
    assert targets.judge(target, wrong) == (None, False, "terrazzo wrong: row 3")


def test_run_writes_rows_and_report(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    command = ["rmsnorm_gated", "--preset", "tiny", "--match", "9x64 fwd", "--provider", "terrazzo,hf", "--quick", "--any-machine-state"]
    assert main([*command, "--json", "--out", str(out)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stored = [json.loads(line) for line in out.read_text().splitlines()]
    assert printed == stored
    environment, *rows = stored
    assert environment["kind"] == "environment" and environment["calibration"]["gflops"] > 0
    assert [row["provider"] for row in rows] == ["cpu", "hf"]
    assert all(len(row["samples_ms"]) == row["n"] for row in rows)
    assert rows[0]["command"].startswith("terrazzo bench rmsnorm_gated --dtype fp32 --mode fwd")

    page = tmp_path / "report.html"
    assert main(["report", str(out), "-o", str(page)]) == 0
    text = page.read_text()
    assert "rmsnorm_gated" in text and "://" not in text.replace("http://www.w3.org/2000/svg", "")
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(drawing)
    assert report.case_table(rows).row_count == 2


@pytest.mark.parametrize("command, message", [(["nope"], "unknown op"), (["--preset", "huge"], "unknown preset"), (["--dtype", "fp8"], "unknown dtype"),
                                              (["--match", "nothing"], "no case fits"), (["--provider", "numpy"], "unknown provider")])  # fmt: skip
def test_bad_options(command, message, capsys):
    assert main(command) == 2
    assert message in capsys.readouterr().err


def test_list_and_select(capsys):
    assert main(["chunk_scan", "--preset", "tiny", "--list", "--mode", "bwd"]) == 0
    assert capsys.readouterr().out.splitlines() == [c.key for c in select(TINY, modes=("bwd",), dtypes=("fp32",), match="chunk_scan")]
    assert {case.dtype for case in TINY if case.op == "rmsnorm_gated"} == set(DTYPES)


@pytest.mark.parametrize("preset, key", [("blt-1b", "blt_model forward 4096 bytes hidden 256 fp32 model"), ("blenderbot-400m", "terrazzo.models blenderbot generate 1x32 fp32 model"),
                                         ("bamba-9b", "bamba_block prefill 1x1024 hidden 1024 fp32 model")])  # fmt: skip
def test_presets_of_the_models(preset, key, capsys):
    assert main(["--preset", preset, "--list", "--mode", "model"]) == 0
    assert key in capsys.readouterr().out.splitlines()


def test_quick_is_one_case_of_every_function_and_mode(capsys):
    assert main(["--quick", "--list"]) == 0
    quick = capsys.readouterr().out.splitlines()
    assert main(["--list"]) == 0
    everything = capsys.readouterr().out.splitlines()
    kind = lambda key: (key.split()[0], key.split()[-1])  # noqa: E731
    assert len(quick) == len(set(map(kind, quick))) and set(map(kind, quick)) == set(map(kind, everything)) and set(quick) < set(everything)
    assert {key.split()[0] for key in quick} == {case.op for op in suite.OPS for case in suite.cases_of(op, suite.home(op)) if case.dtype == "fp32"}
    assert "mamba_chunk_scan_combined 1x512x128x64 N128 fp32 fwd" in quick and "fused_experts 1 tokens 1024x448 64x4 balanced fp32 fwd" in quick
    assert main(["moe", "--quick", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 20  # an op of one's choice comes whole


def test_runner_differentiates_every_input():
    case = tiny("causal_conv1d_fn", "bwd")
    inputs = case.inputs(3)
    y, dx, dweight, dbias = runner(case, correct(case), inputs)()
    assert (y.shape, dx.shape, dweight.shape, dbias.shape) == tuple(inputs[k].shape for k in ("x", "x", "weight", "bias"))


def test_judging_a_target_against_another_case():
    target = targets.Target("op", "1", "fwd", "bf16", targets.PER_FLOP + "op 1 fp32 fwd", 0.87)
    assert target.cases == ("op 1 fp32 fwd", "op 1 bf16 fwd")
    rows = [{"provider": "terrazzo", "status": "ok", "median_ms": 2.0, "times_limit": 1.6, "gflops": 90.0}]
    assert targets.judge(target, rows, rates={"op 1 fp32 fwd": 100.0}) == (0.9, True, "")
    assert targets.judge(target, rows, rates={"op 1 fp32 fwd": 110.0})[1] is False
    assert targets.judge(target, rows)[2] == "op 1 fp32 fwd was not measured"
