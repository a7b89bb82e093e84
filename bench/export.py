"""Rows as CSV, as Markdown, and as tables between markers of a document.

    <!-- bench: op=causal_conv1d_fn dtype=fp32 providers=terrazzo,hf columns=median_ms,speedup,times_limit -->
    …replaced by the table…
    <!-- /bench -->
"""
import csv
import io
import re
from itertools import groupby

from .compare import IDENTITY
from .suite import HEADLINE

COLUMNS = (*IDENTITY, "threads", "device", "cold", "status", "median_ms", "p20_ms", "p80_ms", "min_ms", "n", "noisy", "speedup", "baseline", "times_limit", "limit",
           "gflops", "gbs", "tokens_per_s", "unit", "max_abs", "rel", "nmse", "first_call_ms", "launch_ms", "timer", "peak_bytes", "peak_device_bytes", "load_average",
           "reason", "command")  # fmt: skip
NAMES = {"median_ms": "ms", "speedup": "speed-up", "times_limit": "× limit", "gflops": "GFLOP/s", "gbs": "GB/s", "max_abs": "max error", "nmse": "NMSE",
         "first_call_ms": "first call, ms", "launch_ms": "launch, ms", "peak_bytes": "MB", "peak_device_bytes": "device MB", "tokens_per_s": "tokens/s"}  # fmt: skip
MARKED = re.compile(r"(<!-- bench:(?P<options>[^>]*?)-->\n)(?P<table>.*?)(<!-- /bench -->)", re.S)


def as_csv(rows):
    """All fields but the raw samples, one line a row."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def cell(row, column):
    """A field for people; the status where there is no time, a dash for nothing."""
    if row["status"] != "ok":
        return row["status"] if column == "median_ms" else "–"
    value = row.get(column)
    if value is None:
        return "–"
    if column == "speedup":
        return f"{value:.3g}×"
    if column in ("max_abs", "nmse", "rel"):
        return f"{value:.0e}"
    if column in ("peak_bytes", "peak_device_bytes"):
        return f"{value / 1e6:.3g}"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}" if isinstance(value, float) else str(value)


def markdown(rows, columns=("median_ms", "speedup", "times_limit", "nmse")):
    """One table: a line for each case and provider. Bars inside a cell are escaped."""
    lines = [["case", "provider", *(NAMES.get(c, c) for c in columns)], ["---"] * (2 + len(columns))]
    for case, group in groupby(rows, key=lambda row: tuple(row[k] for k in IDENTITY[:-1])):
        lines += [[" ".join(case) if number == 0 else "", row["provider"], *(cell(row, c) for c in columns)] for number, row in enumerate(group)]
    return "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)


def _chosen(options, rows):
    """(rows, columns) of a marker's options: op, size, dtype, mode, provider(s) as comma-separated lists, columns."""
    found = {}
    for word in options.split():
        name, equals, values = word.partition("=")
        name = "provider" if name == "providers" else name
        if not equals or name not in (*IDENTITY, "threads", "columns"):
            raise ValueError(f"terrazzo bench tables: a marker takes {', '.join((*IDENTITY, 'threads', 'columns'))} as NAME=VALUE,VALUE, got {word!r}")
        found[name] = values.split(",")
    if "terrazzo" in found.get("provider", ()):  # all of ours, where they ran
        found["provider"] = [*found["provider"], *HEADLINE]
        rows = [row for row in rows if row["provider"] not in HEADLINE or row["status"] != "unavailable"]
    columns = found.pop("columns", ["median_ms", "speedup", "times_limit", "nmse"])
    unknown = set(columns) - set(COLUMNS)
    if unknown:
        raise ValueError(f"terrazzo bench tables: unknown columns {', '.join(sorted(unknown))}; there are {', '.join(COLUMNS)}")
    return [row for row in rows if all(str(row[name]) in values for name, values in found.items())], columns


def source(environment):
    """One line that says where, when and with what the rows were measured."""
    return (f"{environment['cpu']}, {environment['threads']} threads, {environment['isa']}, torch {environment['torch']}, "
            f"transformers {environment['transformers']}, {environment['date'][:10]}: `{environment['command']}`\n")  # fmt: skip


def fill(text, environment, rows):
    """The document with every marked table made anew. A marker that selects no row is an error: a table must not vanish unseen."""
    if not MARKED.search(text):
        raise ValueError("terrazzo bench tables: no <!-- bench: … --> … <!-- /bench --> in this document")

    def table(match):
        chosen, columns = _chosen(match["options"], rows)
        if not chosen:
            raise ValueError(f"terrazzo bench tables: no row of the result fits <!-- bench:{match['options']}-->")
        return f"{match[1]}{source(environment)}\n{markdown(chosen, columns)}{match[4]}"

    return MARKED.sub(table, text)
