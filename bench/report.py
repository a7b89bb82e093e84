"""Results for people: tables in the terminal, and one HTML file without network access."""
import json
from collections import defaultdict
from html import escape
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from terrazzo.charts import bars

from .compare import read

STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}.bad{color:#a33}code{background:#f3f3f3;padding:.1rem .3rem}"""


def number(value, digits=3):
    """A readable number; a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def _cells(row):
    if row["status"] != "ok":
        return [row["provider"], row["status"], *[""] * (len(HEADINGS) - 3), row["reason"]]
    speed = "–" if row.get("speedup") is None else f"{number(row['speedup'])}×"
    return [
        row["provider"], number(row["median_ms"]), f"{number(row['p20_ms'])}–{number(row['p80_ms'])}", speed,
        number(row["times_limit"]), number(row["gflops"]), number(row["gbs"]), f"{row['max_abs']:.1e}", f"{row['nmse']:.1e}",
        f"n {row['n']}" + (" noisy" if row["noisy"] else ""),
    ]  # fmt: skip


HEADINGS = ("provider", "median ms", "p20–p80", "speed-up", "× limit", "GFLOP/s", "GB/s", "max error", "NMSE", "")


def case_table(rows):
    """A rich table of one case."""
    first = rows[0]
    table = Table(title=f"{first['op']}  {first['size']}  {first['dtype']}  {first['mode']}", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in HEADINGS:
        last = name == HEADINGS[-1]
        table.add_column(name, justify="left" if last or name == "provider" else "right", no_wrap=not last)
    for row in rows:
        style = {"ok": None, "unavailable": "dim"}.get(row["status"], "red")
        table.add_row(*_cells(row), style=style)
    return table


def target_table(results):
    """A rich table of targets: what was asked, what was measured."""
    table = Table(title="targets", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("case", "target", "measured", ""):
        table.add_column(name, justify="right" if name == "measured" else "left", overflow="fold")
    for result in results:
        verdict = "[green]pass[/]" if result["passed"] else f"[red]miss[/] {result['reason']}"
        measured = "–" if result["measured"] is None else f"{number(result['measured'])} ×"
        table.add_row(result["case"], result["target"], measured, verdict)
    return table


def by_case(rows):
    groups = defaultdict(list)
    for row in rows:
        groups[(row["op"], row["size"], row["dtype"], row["mode"])].append(row)
    return groups


def _html_case(key, rows):
    timed = [r for r in rows if r["status"] == "ok"]
    chart = bars(" ".join(key), [("milliseconds, median and p20–p80", [(r["provider"], r["median_ms"], r["p20_ms"], r["p80_ms"]) for r in timed])], "ms") if timed else ""
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADINGS)
    body = "".join(
        f"<tr{' class=bad' if row['status'] in ('wrong', 'failed') else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row)) + "</tr>"
        for row in rows
    )  # fmt: skip
    command = f"<p><code>{escape(timed[0]['command'])}</code></p>" if timed else ""
    return f"<h2>{escape(' '.join(key))}</h2>{chart}<table><tr>{head}</tr>{body}</table>{command}"


def html(paths):
    """The report of one or more result files as one HTML page."""
    sections = []
    for path in paths:
        environment, rows = read(path)
        facts = {k: v for k, v in environment.items() if k not in ("kind", "schema")}
        listed = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v if isinstance(v, str) else json.dumps(v))}</td></tr>" for k, v in facts.items())
        cases = "".join(_html_case(key, group) for key, group in by_case(rows).items())
        sections.append(f"<h1>{escape(Path(path).name)}</h1>{cases}<h2>environment</h2><table>{listed}</table>")
    return f"<!doctype html><meta charset=utf-8><title>terrazzo benchmarks</title><style>{STYLE}</style>{''.join(sections)}\n"
