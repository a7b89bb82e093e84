"""The HTML report: its numbers by hand, and the page in a headless browser.

Without a browser these tests are skipped, and fail where TERRAZZO_NEEDS_BROWSER is set, as in CI.
"""
import json
import os
import re
from xml.etree import ElementTree

import pytest
from terrazzo.bench import compare, page, plots
from terrazzo.bench.__main__ import main
from tools import browser as browsers

CALIBRATION = {"gflops": 190.0, "read_gbs": 40.0, "copy_gbs": 35.0, "scale_gbs": 38.0, "threads": 2}
ENVIRONMENT = {"schema": 1, "kind": "environment", "cpu": "a made-up <cpu>", "threads": 2, "date": "2026-01-02T03:04:05+00:00", "torch": "2.13.0",
               "calibration": CALIBRATION, "command": "terrazzo bench"}  # fmt: skip


def row(op, size, provider, ms, dtype="fp32", status="ok", speedup=None, reason="", nmse=1e-13):
    found = {"schema": 2, "kind": "row", "op": op, "size": size, "dtype": dtype, "mode": "fwd", "provider": provider, "threads": 2, "device": "cpu", "cold": False,
             "status": status, "reason": reason,
             "command": f"terrazzo bench {op} --match '{size}' --provider {provider}"}  # fmt: skip
    if status == "ok":
        found |= {"median_ms": ms, "p20_ms": ms * 0.97, "p80_ms": ms * 1.05, "min_ms": ms * 0.95, "n": 9, "noisy": False, "gflops": 30 / ms, "gbs": 12 / ms,
                  "times_limit": 1.2, "max_abs": 1e-6, "nmse": nmse, "first_call_ms": ms * 2, "peak_bytes": int(ms * 1e6), "speedup": speedup}  # fmt: skip
    return found


def made_up_rows():
    rows = []
    for op, lengths in (("causal_conv1d_fn", (512, 1024, 2048)), ("mamba_chunk_scan_combined", (512, 2048))):
        for dtype in ("fp32", "bf16"):
            for L in lengths:
                ms = L / 512 * (1 if op.startswith("causal") else 8)
                rows += [row(op, f"1x8448x{L}", "cpu", ms, dtype, speedup=8 if L == 512 else 2, nmse=1e-5 if dtype == "bf16" else 1e-13),
                         row(op, f"1x8448x{L}", "hf", 8 * ms, dtype, speedup=1.0)]  # fmt: skip
    rows.append(row("causal_conv1d_fn", "1x8448x512", "causal_conv1d", 0, status="unavailable", reason="causal_conv1d is <not> installed"))
    rows.append(row("causal_conv1d_fn", "1x8448x512", "my_conv", 0, status="wrong", reason="row 3"))
    return rows


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    target = {"kind": "target", "case": "op 1 fp32 fwd", "target": "≥ 4 × hf", "measured": 3.5, "bar": 4, "passed": False, "reason": ""}
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (ENVIRONMENT, *made_up_rows(), target)))
    assert main(["report", str(folder / "a.jsonl"), "-o", str(folder / "report.html")]) == 0
    return folder / "report.html"


def test_summary_by_hand():
    conv, scan = page.summary(made_up_rows())
    assert conv["op"] == "causal_conv1d_fn" and conv["cases"] == 6 and conv["refused"] == 0
    assert conv["speedup"] == pytest.approx((8 * 2 * 2) ** (1 / 3)) and scan["speedup"] == pytest.approx(4)
    assert (conv["worst"], conv["worst_case"]) == (2, "1x8448x1024 fp32 fwd")
    assert (conv["nmse"], conv["nmse_case"]) == (1e-5, "1x8448x512 bf16 fwd")
    assert conv["limit"] == pytest.approx(1.2)


def test_scaling_lines_are_sizes_that_differ_in_one_number():
    rows = [row("op", size, "cpu", ms) for size, ms in (("1x8x512 N64", 1.0), ("1x8x1024 N64", 2.0), ("1x8x2048 N64", 4.0), ("1x8x512 N128", 9.0))]
    assert page.scalings(rows) == [("1x8x▢ N64 fp32 fwd", [("cpu", [(512, 1.0), (1024, 2.0), (2048, 4.0)])])]
    assert [pattern for pattern, _ in page.scalings(rows[:2])] == ["1x8x▢ N64 fp32 fwd"]
    assert page.scalings(rows[:1]) == []


def test_points_lie_where_the_axes_say():
    svg = ElementTree.fromstring(plots.loglog("t", "x", "y", points=[(0, 10, 1, "a"), (1, 100, 1000, "b"), (2, 1000, 31.6228, "c")]))
    space = "{http://www.w3.org/2000/svg}"
    x, y = zip(*((float(c.get("cx")), float(c.get("cy"))) for c in svg.iter(f"{space}circle")))
    assert x[1] == pytest.approx((x[0] + x[2]) / 2, abs=0.1)  # 10, 100, 1000
    assert y[2] == pytest.approx((y[0] + y[1]) / 2, abs=0.1)  # 1, 1000, and their geometric mean
    assert y[1] < y[2] < y[0]


@pytest.mark.parametrize("values", [[3.0], [128, 256], [0.8, 0.9, 27.0], [1e-18, 1e-3], [5e-14, 7e-13], [1.0, 1e9]])
def test_every_axis_holds_its_values_and_two_to_seven_ticks(values):
    low, high = plots.bounds(values)
    assert low < min(values) and max(values) < high and high / low >= 5.99
    found = plots.ticks(low, high)
    assert 2 <= len(found) <= 7 and found == sorted(set(found)) and low <= found[0] and found[-1] <= high


def test_ranges_stand_on_one_scale():
    svg = ElementTree.fromstring(plots.ranges("t", [("a", 1, 10, 100), ("b", 10, 10, 10)], (1.0, "as fast")))
    space = "{http://www.w3.org/2000/svg}"
    first, second = (float(c.get("cx")) for c in svg.iter(f"{space}circle"))
    begin, end = (float(n) for n in re.fullmatch(r"M([\d.]+) [\d.]+H([\d.]+)", next(p.get("d") for p in svg.iter(f"{space}path") if p.get("class") == "r")).groups())
    assert first == second == pytest.approx((begin + end) / 2, abs=0.1)
    assert begin == pytest.approx(float(re.match(r"M([\d.]+)", next(p.get("d") for p in svg.iter(f"{space}path") if p.get("class") == "w"))[1]))


def test_models_are_a_table_of_tokens_a_second(tmp_path):
    rows = [row("m", "prefill", name, ms, speedup=8 / ms) | {"mode": "model", "tokens_per_s": 512 / ms, "unit": "bytes", "baseline": "hf"} for name, ms in (("terrazzo", 2.0), ("hf-patched", 4.0), ("hf", 8.0))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (ENVIRONMENT, *rows)))
    text = page.html([tmp_path / "a.jsonl"])
    (line,) = re.findall(r"<tr><td class=\"left\">m prefill fp32 model</td>.*?</tr>", text)
    cells = re.findall(r"<td>(.*?)</td>", line)
    assert cells[:3] == ['256 <span class="soft">4×</span>', "64", '128 <span class="soft">2×</span>'] and cells[3] == "bytes"
    assert "Whole models" not in page.html([next(tmp_path.glob("a*"))]).replace("Whole models", "", 1)


def test_only_rows_of_several_files_carry_the_files_name(tmp_path):
    for name, rows in (("old", [row("op", "1", "cpu", 1.0), row("op", "2", "cpu", 1.0)]), ("new", [row("op", "1", "cpu", 1.0)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (ENVIRONMENT, *rows)))
    text = page.html([tmp_path / "old.jsonl", tmp_path / "new.jsonl"])
    assert all(f">{name}</td>" in text for name in ("cpu · old", "cpu · new", "cpu"))


def test_every_row_case_and_reason_is_there(report):
    text = report.read_text()
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(drawing)
    assert text.count('class="case"') == 10 and text.count(">Roofline, ") == 2
    assert "a made-up &lt;cpu&gt;" in text and "causal_conv1d is &lt;not&gt; installed" in text and "<not>" not in text
    assert "Targets: 0 of 1 met" in text and text.index("Summary") < text.index("Targets") < text.index("1x8448x512 fp32 fwd</h4>")
    assert "terrazzo bench causal_conv1d_fn --match &#x27;1x8448x512&#x27; --provider hf" in text


def test_every_row_has_a_command_and_absent_ones_share_theirs():
    rows = made_up_rows()
    rows.append(row("causal_conv1d_fn", "1x8448x512", "fla", 0, status="unavailable", reason="fla is not installed: pip install x"))
    of_case = [r for r in rows if (r["op"], r["size"], r["dtype"]) == ("causal_conv1d_fn", "1x8448x512", "fp32")]
    commands = page._commands(of_case)
    assert [who for who, _ in commands] == ["cpu", "hf", "my_conv", "causal_conv1d, fla"]
    assert commands[-1][1] == "terrazzo bench causal_conv1d_fn --match '1x8448x512' --provider causal_conv1d,fla"


def test_providers_of_a_usual_run_have_colours_of_their_own(tmp_path):
    names = ("cpu", "hf", "reference", "torch", "hf-compiled", "reference-compiled", "hf-grouped", "terrazzo-packed", "terrazzo-int8", "my_conv")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (ENVIRONMENT, *(row("op", "1", name, 1.0) for name in names))))
    key = dict(re.findall(r'<i class="(s\d+)"></i>([^<]+)</span>', page.html([tmp_path / "a.jsonl"])))
    assert len(key) == len(names) and key["s0"] == "cpu" and key["s1"] == "hf"
    from terrazzo.bench.page_style import STYLE

    assert all(STYLE.count(f"--s{k}:#") == 2 for k in range(plots.SERIES))  # light and dark


def test_the_same_rows_of_two_files_stand_side_by_side(tmp_path):
    for name in ("old", "new"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ENVIRONMENT) + "\n" + json.dumps(row("op", "1", "cpu", 1.0)) + "\n")
    text = page.html([tmp_path / "old.jsonl", tmp_path / "new.jsonl"])
    assert text.count('class="case"') == 1 and "cpu · old" in text and "cpu · new" in text


def test_a_sweep_over_threads_is_a_scaling_line(tmp_path):
    rows = [row("op", "1x8", "cpu", 4 / n) | {"threads": n} for n in (1, 2, 4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (ENVIRONMENT, *rows)))
    text = page.html([tmp_path / "a.jsonl"])
    assert text.count('class="case"') == 3 and "1x8 ▢ threads fp32 fwd" in text


def test_cold_and_warm_rows_are_cases_of_their_own(tmp_path):
    rows = [row("op", "1x8", "cpu", ms) | {"cold": cold} for ms, cold in ((1.0, False), (2.0, True))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (ENVIRONMENT, *rows)))
    text = page.html([tmp_path / "a.jsonl"])
    assert text.count('class="case"') == 2 and "1x8 cold fp32 fwd</h4>" in text and "1x8 warm fp32 fwd</h4>" in text


def test_the_last_of_an_appended_row_counts(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in (ENVIRONMENT, row("op", "1", "hf", 1.0), row("op", "1", "hf", 2.0))))
    assert [r["median_ms"] for r in compare.read(file)[1]] == [2.0]


@pytest.mark.parametrize("text, message", [("", "no rows in"), ("{\n", "line 1 is no line of a result"), ('{"kind": "row"}\n', "line 1 is no line of a result")])
def test_bad_results_are_named(text, message, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(text)
    assert main(["report", str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "r.html")]) == 2
    assert message in capsys.readouterr().err


# ---- in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    if browsers.find() is None:
        (pytest.fail if os.environ.get("TERRAZZO_NEEDS_BROWSER") else pytest.skip)("no Chromium: apt-get install chromium")
    with browsers.browser() as found:
        yield found


def colours(chromium):
    """(text, background) of the page as three numbers each."""
    found = chromium.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    return [[int(n) for n in re.findall(r"\d+", colour)[:3]] for colour in found]


def brightness(colour):
    return sum(weight * (c / 255) ** 2.2 for weight, c in zip((0.2126, 0.7152, 0.0722), colour))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200], ids=["phone", "desk"])
def test_page_renders_without_complaint_or_network(chromium, report, width, dark):
    chromium.open(report, width=width, dark=dark)
    assert chromium.complaints() == []
    assert [url for url in chromium.requests() if not url.startswith("data:")] == [report.resolve().as_uri()]
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width  # nothing hangs out sideways
    ink, paper = map(brightness, colours(chromium))
    assert (paper < 0.05) == dark
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7  # WCAG's AAA
    boxes = chromium.evaluate("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).filter(b => b.width > 200 && b.height > 40).length")
    assert boxes == chromium.evaluate("document.querySelectorAll('svg').length") > 10
    bars = chromium.evaluate("getComputedStyle(document.querySelector('.case rect.s0')).fill")
    assert bars != "rgb(0, 0, 0)"  # the series' own colour


def test_cases_fold(chromium, report):
    chromium.open(report)
    opened = "document.querySelectorAll('.case[open]').length"
    button = "document.getElementById('fold')"
    assert chromium.evaluate(opened) == 10 and chromium.evaluate(f"{button}.textContent") == "close all"  # few cases: all open
    chromium.evaluate(f"{button}.click()")
    assert chromium.evaluate(f"new Promise(r => setTimeout(() => r({opened}), 50))") == 0 and chromium.evaluate(f"{button}.textContent") == "open all"
    chromium.evaluate("document.querySelector('.case summary').click()")
    assert chromium.evaluate(opened) == 1
    chromium.evaluate(f"{button}.click()")
    assert chromium.evaluate(opened) == 10


def test_typing_filters(chromium, report):
    chromium.open(report)
    shown = "[...document.querySelectorAll('.case')].filter(c => c.getBoundingClientRect().height > 0).length"
    assert chromium.evaluate(shown) == 10
    chromium.evaluate("document.getElementById('words').focus()")
    chromium.type("bf16 1x8448x2048")
    assert chromium.evaluate(shown) == 2
    assert chromium.evaluate("document.getElementById('count').textContent") == "2 of 10 cases"
    chromium.type(" nothing")
    assert chromium.evaluate(shown) == 0
    chromium.evaluate("const w = document.getElementById('words'); w.value = ''; const o = document.getElementById('op'); o.value = 'causal_conv1d_fn'; "
                      "o.dispatchEvent(new Event('change'))")  # fmt: skip
    assert chromium.evaluate(shown) == 6
    assert chromium.complaints() == []


def test_the_browser_check_sees_a_broken_script_and_a_request(chromium, report, tmp_path):
    text = report.read_text()
    (tmp_path / "script.html").write_text(text.replace("filter();", "filterr();"))
    chromium.open(tmp_path / "script.html")
    assert any("filterr" in json.dumps(complaint) for complaint in chromium.complaints())
    (tmp_path / "image.html").write_text(text.replace("<main>", '<main><img src="missing.png">'))
    chromium.open(tmp_path / "image.html")
    assert chromium.complaints() != []
