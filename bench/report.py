"""Results for people: tables in the terminal."""
from rich.box import SIMPLE
from rich.table import Table

from . import suite
from .page import absent, number


def _speed(row):
    return "–" if row.get("speedup") is None else f"{number(row['speedup'])}×"


def _remarks(row):
    words = [f"n {row['n']}"] + (["noisy"] if row["noisy"] else [])
    if row.get("tokens_per_s"):
        words.insert(0, f"{number(row['tokens_per_s'])} {row['unit']}/s")
    if row.get("launch_ms") is not None:
        words.append(f"{row['timer']}, launch {number(row['launch_ms'] * 1e3)} µs")
    return ", ".join(words)


def _cells(row):
    if row["status"] != "ok":
        return [row["provider"], row["status"], *[""] * (len(HEADINGS) - 3), row["reason"]]
    return [
        row["provider"], number(row["median_ms"]), f"{number(row['p20_ms'])}–{number(row['p80_ms'])}", _speed(row),
        number(row["times_limit"]), number(row["gflops"]), number(row["gbs"]), f"{row['max_abs']:.1e}", f"{row['nmse']:.1e}", _remarks(row),
    ]  # fmt: skip


HEADINGS = ("provider", "median ms", "p20–p80", "speed-up", "× limit", "GFLOP/s", "GB/s", "max error", "NMSE", "")


def _table(title, headings, left):
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in headings:
        last = name == headings[-1]
        table.add_column(name, justify="left" if last or name in left else "right", no_wrap=not last)
    return table


def case_table(rows):
    """A rich table of one case; providers that are not here share a line for each reason."""
    first = rows[0]
    table = _table(f"{first['op']}  {first['size']}  {first['dtype']}  {first['mode']}", HEADINGS, ("provider",))
    for row in rows:
        if row["status"] != "unavailable":
            table.add_row(*_cells(row), style=None if row["status"] == "ok" else "red")
    table.caption = "\n".join(f"{', '.join(names)}: {reason}" for reason, names in absent(rows)) or None
    return table


def summary_table(rows):
    """A rich table with a line for each case: how ours did."""
    table = _table("all cases", ("case", "ours", "ms", "speed-up", "over", "× limit", "NMSE", ""), ("case", "ours", "over"))
    cases = {}
    for row in rows:
        cases.setdefault((row["op"], row["size"], row["dtype"], row["mode"]), []).append(row)
    for case, group in cases.items():
        ours = suite.standing_for_us(group)
        bad = ", ".join(f"{row['provider']} {row['status']}" for row in group if row["status"] in ("wrong", "failed"))
        if ours is None or ours["status"] != "ok":
            table.add_row(" ".join(case), *[""] * 6, bad or "not measured", style="red" if bad else "dim")
            continue
        compared = ours.get("speedup") is not None
        table.add_row(" ".join(case), ours["provider"], number(ours["median_ms"]), _speed(ours), ours["baseline"] if compared else "", number(ours["times_limit"]),
                      f"{ours['nmse']:.1e}", bad or ("noisy" if ours["noisy"] else ""), style="red" if bad else None)  # fmt: skip
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
