"""Compares two result files row by row: SAME, FAST, SLOW or UNSURE.

Two conditions make a difference: the raw samples differ (two-sided), and the medians by more than a least effect. SAME needs the medians to be
close; anything between is UNSURE. Samples that two processes took by turns are pairs: their ratios are what counts (Wilcoxon's signed ranks). Those of
two runs one behind the other are not (Mann-Whitney), and the machine may have changed between them: by how much, the rows of others tell, whose code is the
same on both sides. What they differ by raises the least effect.
"""
import itertools
import json
import math
from pathlib import Path

from .timer import median

SCHEMA = 2  # of results: 1 called the cpu backend terrazzo

MIN_EFFECT = 0.05    # half-way between nothing and a tenth
SIGNIFICANCE = 0.01
NOISE_ROWS = 8       # fewer say nothing about the machine
PEERS = ("hf", "hf-grouped", "torch")  # not ours, whatever the revision
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
            key = {"environment": lambda line: (), "row": lambda line: (*identity(line), line.get("by_turns")), "target": lambda line: (line["case"], line["target"])}[line["kind"]](line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"terrazzo bench: {path}, line {number} is no line of a result: {type(error).__name__} {error}") from error
        found[line["kind"]][key] = line
    return found["environment"].get((), {}), list(found["row"].values()), list(found["target"].values())


def read(path):
    """(environment, [rows]) of a JSONL result."""
    return read_all(path)[:2]


def _rank_sum(values):
    """Of [(value, whether it counts)]: the sum of the ranks of those that count, equal values sharing theirs, and what the ties take off the variance."""
    total, ties, done = 0.0, 0, 0
    for _, group in itertools.groupby(sorted(values), key=lambda value: value[0]):
        counts = [counted for _, counted in group]
        total += (2 * done + len(counts) + 1) / 2 * sum(counts)
        ties += len(counts) ** 3 - len(counts)
        done += len(counts)
    return total, ties


def _two_sided(distance, variance):
    """p-value of a statistic so far from its mean, by the normal approximation with its correction for steps of one."""
    return math.erfc(max(abs(distance) - 0.5, 0) / math.sqrt(2 * variance)) if variance > 0 else 1.0


def mann_whitney(a, b):
    """Two-sided p-value by the normal approximation with ties corrected."""
    rank_sum, ties = _rank_sum([(value, True) for value in a] + [(value, False) for value in b])
    n = len(a) + len(b)
    u = rank_sum - len(a) * (len(a) + 1) / 2
    mean = len(a) * len(b) / 2
    return _two_sided(u - mean, len(a) * len(b) / 12 * (n + 1 - ties / (n * (n - 1))))


def signed_ranks(differences):
    """Two-sided p-value of Wilcoxon's test that they lie evenly around 0, by the normal approximation with ties corrected."""
    sizes = [(abs(d), d > 0) for d in differences if d]
    positive, ties = _rank_sum(sizes)
    n = len(sizes)
    return _two_sided(positive - n * (n + 1) / 4, n * (n + 1) * (2 * n + 1) / 24 - ties / 48)


def ratio_of(before, after, pairs=False):
    """(after / before, p): of the medians, or the median of the pairs' ratios."""
    if not pairs:
        return median(after) / median(before), mann_whitney(before, after)
    logs = [math.log(b / a) for a, b in zip(before, after, strict=True)]
    return math.exp(median(logs)), signed_ranks(logs)


def verdict(ratio, p, least=MIN_EFFECT, min_effect=MIN_EFFECT):
    """SAME | FAST | SLOW | UNSURE. `least`: by how much a row must have become slower or faster to be called so."""
    if p < SIGNIFICANCE and max(ratio, 1 / ratio) > 1 + least:
        return "SLOW" if ratio > 1 else "FAST"
    return "SAME" if max(ratio, 1 / ratio) <= 1 + min_effect else "UNSURE"


def noise(results):
    """What the machine alone made of a row, as a standard deviation of logarithms: 0 where too few rows could tell."""
    sizes = [abs(math.log(r["ratio"])) for r in results if r["provider"] in PEERS]
    return 1.4826 * median(sizes) if len(sizes) >= NOISE_ROWS else 0.0


def _parts(rows):
    """{identity: {number of the pair of processes, None without turns: row}} of the timed rows whose first pass was: the gate of the others."""
    found = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault(identity(row), {})[row.get("by_turns")] = row
    return {key: parts for key, parts in found.items() if parts.keys() & {None, 1}}


def compare(path_before, path_after, min_effect=MIN_EFFECT, force=False):
    """One dict for each row that both files timed."""
    (env_a, rows_a), (env_b, rows_b) = read(path_before), read(path_after)
    for name in ("cpu", "gpu", "device", "threads", "malloc_tuned"):
        old, new = (env.get(name, "cpu" if name == "device" else None) for env in (env_a, env_b))
        if old != new and not force:
            raise Incomparable(f"{name} differs: {old!r} in {path_before}, {new!r} in {path_after}; --force compares anyway")
    before, after, results = _parts(rows_a), _parts(rows_b), []
    for key in after:
        both = [(before[key][number], part) for number, part in after[key].items() if number in before.get(key, ())]
        if not both:
            continue
        old, new = (list(itertools.chain.from_iterable(part["samples_ms"] for part in parts)) for parts in zip(*both))
        pairs = all(part.get("by_turns") and len(other["samples_ms"]) == len(part["samples_ms"]) for other, part in both)
        ratio, p = ratio_of(old, new, pairs)
        results.append({k: both[0][1][k] for k in (*IDENTITY, "threads")} | {"ratio": ratio, "p": p, "before_ms": median(old), "after_ms": median(new)})
    least = max(min_effect, math.expm1(2 * noise(results)))
    return [r | {"verdict": verdict(r["ratio"], r["p"], least, min_effect), "least_effect": least} for r in results]


def summary(results):
    """A line for people: how many rows of each verdict, and what this comparison cannot see."""
    if not results:
        return "no row was timed in both"
    counts = {word: sum(r["verdict"] == word for r in results) for word in ("SAME", "FAST", "SLOW", "UNSURE")}
    line = f"{len(results)} rows: " + ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    least = results[0]["least_effect"]
    if least > MIN_EFFECT:
        line += f"; rows of others differ too, by the machine alone: FAST and SLOW are what differs by more than {100 * least:.0f} %"
    return line


def fails(results, rule):
    """The results that a rule such as "slow:5%" forbids."""
    word, _, percent = rule.partition(":")
    if word != "slow" or not percent.removesuffix("%").replace(".", "", 1).isdigit():
        raise ValueError(f"terrazzo bench compare: --fail-on must look like slow:5%, got {rule!r}")
    limit = 1 + float(percent.removesuffix("%")) / 100
    return [r for r in results if r["verdict"] == "SLOW" and r["ratio"] > limit]
