"""The model of how training scales, and the comparison of ranks with threads."""
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from terrazzo import charts
from terrazzo.bench import ranks, scaling
from terrazzo.bench.__main__ import main
from terrazzo.bench.scaling import HOP, IB, NVLINK, Plan, Step, collect, step, stop

DBRX, BAMBA, LONG = scaling.TRAININGS


def test_sizes_of_the_models():
    assert DBRX.parameters == pytest.approx(131.6e9, rel=1e-3) and BAMBA.parameters == pytest.approx(9.78e9, rel=1e-3)
    active = step(DBRX, Plan(64)).useful / (6 * DBRX.rows * DBRX.length)  # 2 flops a parameter and token forward, 4 backward
    assert 36e9 < active < 38e9  # DBRX says 36 B, of which the embedding computes nothing; attention comes on top
    assert 9.2e9 < step(BAMBA, Plan(64)).useful / (6 * BAMBA.rows * BAMBA.length) < 9.6e9  # all but the embedding, and attention and scans


def test_collections():
    assert collect(8e9, 1, 1) == 0
    assert collect(8e9, 8, 8) == pytest.approx(HOP + 7e9 / NVLINK)
    assert collect(8e9, 16, 8) == pytest.approx(HOP + max(7.5e9 / NVLINK, 4e9 / (8 * IB)))
    assert collect(8e9, 64, 8) == pytest.approx(HOP + 7e9 / (8 * IB))  # eight ports carry what enters a node
    assert collect(1e9, 8, 1) == pytest.approx(HOP + 0.875e9 / IB)     # one rank a node: its own port


def test_what_layers_wait_for():
    (layer,) = DBRX.layers
    rows = 8192 * 4 * 6144 * 2  # bytes of 4 choices of 8192 tokens
    waits = layer.wait(8192, 2, Plan(8, experts=8))
    assert waits == {"experts' rows": pytest.approx(3 * HOP + 4 * 7 * 16 / 8 / NVLINK + 2 * rows * 7 / 8 / NVLINK)}
    assert layer.wait(8192, 2, Plan(16, experts=16))["experts' rows"] == pytest.approx(3 * HOP + 60 / IB + 2 * rows / 2 / IB)
    chunked = layer.wait(8192, 2, Plan(16, experts=16, chunks=4))["experts' rows"]  # computing takes longer than travelling: a quarter shows
    assert chunked == pytest.approx(9 * HOP + 4 * 60 / IB + 2 * rows / 2 / IB / 4)
    assert layer.wait(8192, 2, Plan(8)) == {}
    mamba, attention = LONG.layers
    state = 4 * 128 * 64 * 128
    hops = mamba.wait(4096, 1, Plan(context=16))["states"]
    assert hops == pytest.approx(16 * HOP + 14 * state / NVLINK + state / IB + 2 * 3 * (8192 + 256) / IB)
    keys = attention.wait(4096, 1, Plan(context=16))["keys"]
    assert keys == pytest.approx(HOP + 8 * 4096 * 2 * 8 * 128 * 2 / IB)  # of the other node's eight ranks
    assert attention.wait(4096, 1, Plan(context=8))["keys"] == pytest.approx(HOP + 7 * 4096 * 2 * 8 * 128 * 2 / NVLINK)
    assert attention.wait(4096, 1, Plan(tensor=8)) == {"tensor sums": pytest.approx(2 * (HOP + 2 * 7 / 8 * 4096 * 4096 * 2 / NVLINK))}


@pytest.mark.parametrize("training, plan, why", [
    (DBRX, Plan(8), "263 GB of weights and optimiser don't fit a GPU"),
    (DBRX, Plan(16, experts=16, sharded=False), "GB of weights and optimiser don't fit a GPU"),
    (DBRX, Plan(32, experts=32), "32 ranks don't divide the 16 experts"),
    (DBRX, Plan(2048), "1024 rows cannot be dealt to 2048 groups of ranks"),
    (BAMBA, Plan(1, tensor=16), "16 ranks don't divide the 8 heads of keys"),
    (LONG, Plan(16), r"the activations of 262144 tokens, \d+ GB, beside 10 GB of weights and optimiser, don't fit a GPU"),
])  # fmt: skip
def test_what_cannot_be_run(training, plan, why):
    assert re.search(why, step(training, plan).why)


def test_no_step_is_faster_than_the_peak():
    for training in scaling.TRAININGS:
        for make in scaling.kinds(training).values():
            for count in scaling.RANKS:
                found = scaling.best(training, make(count))
                if found is not None and not found.why:
                    assert found.plan.ranks == count and 0 < found.share < 1
                    assert found.seconds["compute"] > 0 and min(found.seconds.values()) >= 0


def test_where_a_plan_stops():
    def steps(*totals):
        return {count: None if total is None else Step(Plan(count), {"compute": 64 / count, "keys": total - 64 / count}) for count, total in zip(scaling.RANKS, totals)}

    assert stop(steps(8, 4, 2, 1, 0.5, 0.25, 0.125, 0.0625)) == (1024, "")
    ranks_, why = stop(steps(8, 4, 3, 3, 3, 3, 3, 3))
    assert ranks_ == 16 and why.startswith(scaling.REASONS["keys"]) and "(33% of a step on 32)" in why
    assert stop(steps(8, 4, None, None, None, None, None, None)) == (16, "no such mesh")
    refused = {count: Step(Plan(count), why="too large") for count in scaling.RANKS}
    assert stop(refused) == (None, "too large")


def test_the_document_is_up_to_date(tmp_path):
    docs = Path(__file__).parents[1] / "docs"
    assert main(["scaling", "-o", str(tmp_path / "scaling.md")]) == 0
    for path in tmp_path.iterdir():
        assert path.read_text() == (docs / path.name).read_text(), f"docs/{path.name} is stale: terrazzo bench scaling -o docs/scaling.md"
    plots = list(tmp_path.glob("*.svg"))
    assert len(plots) == 3 and all(len(ElementTree.fromstring(plot.read_text())) > 20 for plot in plots)


def test_loglog_places_points():
    drawn = charts.loglog("t", [("a", [(8, 10.0), (16, 1.0)])], "x", "y")
    circles = [node for node in ElementTree.fromstring(drawn) if node.tag.endswith("circle")]
    assert [(node.get("cx"), node.get("cy")) for node in circles] == [("64.0", "40.0"), ("584.0", "360.0")]


def test_ranks_agree_with_one(capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # else the command starts over, in the place of the tests
    assert main(["ranks", "--size", "tiny", "--rounds", "1"]) in (0, 1)  # times don't matter here
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ranks.CASES) + 2 * len(ranks.CHUNKS) and not any("WRONG" in line for line in lines)
    assert all("hidden" in line for line in lines[len(ranks.CASES) :])


def test_judging_ranks():
    assert ranks.Result("scan", "fwd", [1.0, 1.0, 9.0], [1.1, 1.1, 1.1]).passed
    assert not ranks.Result("scan", "fwd", [1.0, 1.0, 9.0], [1.2, 1.2, 1.2]).passed
    wrong = ranks.Result("scan", "fwd", [], [], "y is off by 3")
    assert not wrong.passed and "WRONG: y is off by 3" in wrong.line()
    y = torch.randn(6, 4)
    assert ranks.disagreement([(y[:3], None), (y[3:], None)], (y, None)) == ""
    assert ranks.disagreement([(y[3:], None), (y[:3], None)], (y, None)).startswith("y is off by")
    assert ranks.disagreement([(y[:3], y[:3]), (y[3:], 1.01 * y[3:])], (y, y)).startswith("gradient is off by")


def test_hidden_share_of_a_link():
    late = ranks.Overlap("fwd", 1, link=2.0, without=[3.0, 3.0, 9.0], with_link=[5.0, 5.0, 5.0])
    assert late.hidden == 0 and "0% of it hidden" in late.line()
    assert ranks.Overlap("fwd", 4, link=2.0, without=[3.0], with_link=[3.5]).hidden == 0.75
    wrong = ranks.Overlap("bwd", 2, 2.0, [], [], "gradient is off by 3")
    assert late.passed and not wrong.passed and "WRONG: gradient is off by 3" in wrong.line() and wrong.record()["hidden"] is None


def test_bad_options(capsys):
    assert main(["ranks", "--rounds", "0"]) == 2
    assert "--rounds and --ranks must be at least 1, got 0 and 2" in capsys.readouterr().err
