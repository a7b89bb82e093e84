"""The suite judged by itself, on a made-up clock: how often identical runs are SAME and slower ones SLOW, and what cheats are paid for.

Providers of the first part say how long they took: a skewed distribution, spikes, and a machine that drifts between two runs.
"""
import json
import random
from dataclasses import replace

import pytest
from terrazzo.bench import compare, roofline, suite
from terrazzo.bench.cases import Provider
from terrazzo.bench.timer import interleave

CALIBRATION = roofline.Calibration(100.0, 20.0, 30.0, 40.0, 2, "test", "2026-01-01")
CASE = next(c for c in suite.all_cases("tiny") if (c.op, c.mode, c.dtype) == ("rmsnorm_gated", "fwd", "fp32"))
RUNS = 100  # of two rows each


class Clock:
    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now


def rows_of(seed, slowdown, drift):
    """Rows of one run of two providers, timed by the suite's protocol: a call takes 2 or 7 ms, 2 % noise, a twentieth of the calls up to half as long again."""
    clock, draw = Clock(), random.Random(seed)

    def provider(ns):
        def run():
            noise = draw.gammavariate(4, 0.01) + (draw.uniform(0, 0.5) if draw.random() < 0.05 else 0)
            clock.now += int(ns * drift * (1 + noise))

        return run

    timings = interleave({"terrazzo": provider(2e6 * slowdown), "hf": provider(7e6)}, 2.0, clock=clock, seed=seed)
    return [suite._row(CASE, name, "ok", **timing.summary(), samples_ms=[s / 1e6 for s in timing.samples]) for name, timing in timings.items()]


def verdicts(folder, slowdown):
    """provider -> [verdict of each run against another], with up to 1 % of drift between the two."""
    found = {"terrazzo": [], "hf": []}
    drifts = random.Random(1)
    for run in range(RUNS):
        for name, seed, factor in (("a", 2 * run, 1.0), ("b", 2 * run + 1, slowdown)):
            lines = [{"kind": "environment"}, *rows_of(seed, factor, drifts.uniform(0.995, 1.005))]
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        for result in compare.compare(folder / "a", folder / "b"):
            found[result["provider"]].append(result["verdict"])
    return found


def share(words, word):
    return sum(w == word for w in words) / len(words)


def test_identical_runs_are_the_same_in_95_of_100_rows(tmp_path):
    found = verdicts(tmp_path, 1.0)
    words = found["terrazzo"] + found["hf"]
    assert len(words) == 2 * RUNS and share(words, "SAME") >= 0.95
    assert "SLOW" not in words and "FAST" not in words


def test_a_tenth_slower_is_found_in_95_of_100_rows_and_only_there(tmp_path):
    found = verdicts(tmp_path, 1.1)
    assert len(found["terrazzo"]) == RUNS and share(found["terrazzo"], "SLOW") >= 0.95
    assert share(found["hf"], "SAME") >= 0.95


def test_the_verdicts_check_sees_a_smaller_slowdown_missed(tmp_path):
    """5 % is the least that counts: half of it must not come out as SLOW, or the numbers above would say nothing."""
    assert share(verdicts(tmp_path, 1.025)["terrazzo"], "SLOW") < 0.05


@pytest.mark.parametrize("spoil", [lambda out: out * 1.01, lambda out: out.roll(1, -1), lambda out: out[..., :-1]], ids=["1 % off", "shifted", "cut"])
def test_a_wrong_provider_is_called_for_the_gate_alone(spoil):
    calls = []

    def build():
        fn = CASE.reference()

        def run(**inputs):
            calls.append(1)
            return spoil(fn(**inputs))

        return run

    case = replace(CASE, providers=(Provider("terrazzo", build, ours=True), Provider("hf", CASE.reference)))
    wrong, right = suite.measure(case, suite.Options(providers=("terrazzo", "hf"), budget_s=0.01, min_rounds=3), CALIBRATION)
    assert (wrong["status"], right["status"]) == ("wrong", "ok")
    assert len(calls) <= 2 and "samples_ms" not in wrong


def test_a_kept_output_is_caught_in_a_training_step():
    case = next(c for c in suite.all_cases("tiny") if (c.op, c.mode, c.dtype) == ("rmsnorm_gated", "bwd", "fp32"))

    def build():
        fn, kept = case.reference(), []

        def run(**inputs):
            out = fn(**inputs)
            kept.append(out.detach().clone())
            return out + (kept[0] - out).detach()  # the first call's values with this call's gradients

        return run

    (row,) = suite.measure(replace(case, providers=(Provider("terrazzo", build, ours=True),)), suite.Options(providers=("terrazzo",), budget_s=0.01), CALIBRATION)
    assert row["status"] == "wrong" and "second call" in row["reason"]


def test_weights_of_four_bits_are_not_taken_for_int8():
    """The int8 row has an error limit of its own, as wide as its rounding: what rounds sixteen times as coarsely is beyond it."""
    case = next(c for c in suite.all_cases("tiny") if (c.op, c.mode, c.dtype) == ("fused_experts", "fwd", "fp32"))
    int8 = next(p for p in case.providers if p.name == "terrazzo-int8")

    def build():
        fn = int8.build()

        def coarse(w):
            step = w.abs().amax() / 7
            return (w / step).round() * step

        return lambda w1, v1, w2, **others: fn(w1=coarse(w1), v1=coarse(v1), w2=coarse(w2), **others)

    case = replace(case, providers=(int8, replace(int8, name="four-bits", build=build)))
    found = suite.measure(case, suite.Options(providers=("terrazzo-int8", "four-bits"), budget_s=0.01, min_rounds=3), CALIBRATION)
    assert [row["status"] for row in found] == ["ok", "wrong"] and "NMSE" in found[1]["reason"]
