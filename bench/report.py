"""Results for people: tables in the terminal."""
from rich.box import SIMPLE
from rich.table import Table

from .page import number


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
