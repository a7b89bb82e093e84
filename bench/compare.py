"""Compares two result files row by row: SAME, FAST, SLOW or UNSURE.

Two conditions make a difference: the raw samples differ (Mann-Whitney, two-sided) and the medians differ by
more than a minimum effect. SAME needs the medians to be close; anything between is UNSURE.
"""
import json
import math
from pathlib import Path

from .timer import median

SCHEMA = 2  # of results: 1 called the cpu backend terrazzo

MIN_EFFECT = 0.03
SIGNIFICANCE = 0.01
IDENTITY = ("op", "size", "dtype", "mode", "provider")


def identity(row):
    """What makes two rows the same measurement: its case, provider, number of threads, device, and whether caches were empty."""
    return (*(row[name] for name in IDENTITY), row["threads"], row["device"], row["cold"])


def _upgraded(line):
    """A line of any schema up to today's, as today's; schema 1 called the cpu backend terrazzo and knew no GPU."""
    schema = line.get("schema", SCHEMA)
    if schema > SCHEMA:
        raise ValueError(f"schema {schema} is newer than this terrazzo, which reads up to {SCHEMA}")
    if line["kind"] == "row":
        line = {"device": "cpu", "cold": False} | line
        if schema == 1 and line["provider"] == "terrazzo" and line["mode"] != "model":
            line["provider"] = "cpu"
    return line


class Incomparable(Exception):
    """The two files were measured on different machines."""


def read_all(path):
    """(environment, [rows], [targets]) of a JSONL result. In an append-only file the last environment counts, and the last row of each kind."""
    found = {"environment": {}, "row": {}, "target": {}}
    for number, text in enumerate(Path(path).read_text().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = _upgraded(json.loads(text))
            key = {"environment": lambda line: (), "row": identity, "target": lambda line: (line["case"], line["target"])}[line["kind"]](line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"terrazzo bench: {path}, line {number} is no line of a result: {type(error).__name__} {error}") from error
        found[line["kind"]][key] = line
    return found["environment"].get((), {}), list(found["row"].values()), list(found["target"].values())


def read(path):
    """(environment, [rows]) of a JSONL result."""
    return read_all(path)[:2]


def mann_whitney(a, b):
    """Two-sided p-value by the normal approximation with ties corrected."""
    pooled = sorted([(value, 0) for value in a] + [(value, 1) for value in b])
    rank_sum, ties, i, n = 0.0, 0.0, 0, len(pooled)
    while i < n:
        j = i
        while j < n and pooled[j][0] == pooled[i][0]:
            j += 1
        rank_sum += (i + j + 1) / 2 * sum(1 for k in range(i, j) if pooled[k][1] == 0)
        ties += (j - i) ** 3 - (j - i)
        i = j
    u = rank_sum - len(a) * (len(a) + 1) / 2
    mean = len(a) * len(b) / 2
    variance = len(a) * len(b) / 12 * (n + 1 - ties / (n * (n - 1)))
    if variance <= 0:
        return 1.0
    return math.erfc(max(abs(u - mean) - 0.5, 0) / math.sqrt(2 * variance))


def verdict(before, after, min_effect=MIN_EFFECT):
    """(SAME | FAST | SLOW | UNSURE, ratio of medians after / before, p)."""
    ratio, p = median(after) / median(before), mann_whitney(before, after)
    if p < SIGNIFICANCE and ratio > 1 + min_effect:
        return "SLOW", ratio, p
    if p < SIGNIFICANCE and ratio < 1 / (1 + min_effect):
        return "FAST", ratio, p
    if 1 / (1 + min_effect) <= ratio <= 1 + min_effect:
        return "SAME", ratio, p
    return "UNSURE", ratio, p


def compare(path_before, path_after, min_effect=MIN_EFFECT, force=False):
    """One dict for each row that both files timed."""
    (env_a, rows_a), (env_b, rows_b) = read(path_before), read(path_after)
    for name in ("cpu", "gpu", "device", "threads", "malloc_tuned"):
        old, new = (env.get(name, "cpu" if name == "device" else None) for env in (env_a, env_b))
        if old != new and not force:
            raise Incomparable(f"{name} differs: {old!r} in {path_before}, {new!r} in {path_after}; --force compares anyway")
    before = {identity(r): r for r in rows_a if r["status"] == "ok"}
    results = []
    for row in rows_b:
        old = before.get(identity(row))
        if row["status"] != "ok" or old is None:
            continue
        word, ratio, p = verdict(old["samples_ms"], row["samples_ms"], min_effect)
        results.append({k: row[k] for k in (*IDENTITY, "threads")} | {"verdict": word, "ratio": ratio, "p": p, "before_ms": old["median_ms"], "after_ms": row["median_ms"]})
    return results


def fails(results, rule):
    """The results that a rule such as "slow:5%" forbids."""
    word, _, percent = rule.partition(":")
    if word != "slow" or not percent.removesuffix("%").replace(".", "", 1).isdigit():
        raise ValueError(f"terrazzo bench compare: --fail-on must look like slow:5%, got {rule!r}")
    limit = 1 + float(percent.removesuffix("%")) / 100
    return [r for r in results if r["verdict"] == "SLOW" and r["ratio"] > limit]
