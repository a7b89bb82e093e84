"""The HTML report: one file, no network, light and dark, readable on a phone. Everything is drawn here; the script only filters and copies."""
import json
import math
import re
from collections import Counter, defaultdict
from html import escape
from pathlib import Path

from . import plots
from .compare import read_all
from .page_style import SCRIPT, STYLE
from .plots import number
from .suite import OURS, standing_for_us

OPEN_CASES = 16  # a page of no more shows them all open
# Who gets the colours that are easiest to tell apart, wherever they appear.
COLOURED = ("cpu", "hf", "reference", "torch", "terrazzo", "cuda", "triton", "hf-compiled", "hf-patched", "terrazzo-packed", "hf-grouped", "reference-compiled")


def small(value):
    """An error."""
    return "–" if value is None else f"{value:.1e}" if value else "0"


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def _rank(name):
    """Ours first, then by name."""
    plain = name.split(" · ")[0]
    return OURS.index(plain) if plain in OURS else len(OURS), name


def case_of(row):
    return " ".join((row["size"], row["dtype"], row["mode"]))


def table(headings, lines, left=1, last=False):
    """lines: cells, already escaped; the first `left` columns are text, with `last` the last one too."""
    text = {*range(left), *((len(headings) - 1,) if last else ())}
    of = lambda i: ' class="left"' if i in text else ""  # noqa: E731
    head = "".join(f"<th{of(i)}>{escape(h)}</th>" for i, h in enumerate(headings))
    body = "".join("<tr>" + "".join(f"<td{of(i)}>{c}</td>" for i, c in enumerate(line)) + "</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def absent(rows):
    """[(reason, [providers])] of the rows that could not run; those that are not installed stand together."""
    found = defaultdict(list)
    for row in rows:
        if row["status"] == "unavailable":
            found[re.sub(r"^\S+ is not installed:.*", "not installed", row["reason"])].append(row["provider"])
    return list(found.items())


def ours_of(rows):
    """The row that stands for us in each case that has one."""
    cases = defaultdict(list)
    for row in rows:
        cases[row["op"], case_of(row)].append(row)
    return list(filter(None, map(standing_for_us, cases.values())))


def summary(rows):
    """[{op, cases, speedup, worst, best, worst_case, limit, least_limit, most_limit, nmse, nmse_case, refused}] of our rows; speed-ups against each row's baseline."""
    found, all_ours = [], ours_of(rows)
    for op in dict.fromkeys(row["op"] for row in rows):
        ours = [row for row in all_ours if row["op"] == op]
        timed = [row for row in ours if row["status"] == "ok"]
        compared = [row for row in timed if row.get("speedup")]
        limits = [row["times_limit"] for row in timed if row["times_limit"]]
        worst = min(compared, key=lambda row: row["speedup"], default=None)
        wildest = max(timed, key=lambda row: row["nmse"], default=None)
        found.append({
            "op": op, "cases": len(timed), "refused": len(ours) - len(timed),
            "speedup": geometric_mean([row["speedup"] for row in compared]) if compared else None,
            "worst": worst and worst["speedup"], "worst_case": worst and case_of(worst), "best": max((row["speedup"] for row in compared), default=None),
            "limit": geometric_mean(limits) if limits else None, "least_limit": min(limits, default=None), "most_limit": max(limits, default=None),
            "nmse": wildest and wildest["nmse"], "nmse_case": wildest and case_of(wildest),
        })  # fmt: skip
    return found


def _stat(value, what, lead=False):
    return f'<div class="card stat{" lead" if lead else ""}"><b>{escape(value)}</b><span class="soft">{escape(what)}</span></div>'


def _cards(rows):
    """The four numbers that a reader wants first."""
    timed = [row for row in ours_of(rows) if row["status"] == "ok"]
    compared = [row for row in timed if row.get("speedup")]
    cards = []
    if compared:
        worst, baselines = min(compared, key=lambda row: row["speedup"]), sorted({row["baseline"] for row in compared if row.get("baseline")})
        against = f" against {', '.join(baselines)}" if baselines else ""
        cards += [_stat(f"{number(geometric_mean([row['speedup'] for row in compared]))}×", f"as fast: geometric mean of {len(compared)} cases{against}", lead=True),
                  _stat(f"{number(worst['speedup'])}×", f"the worst case: {worst['op']} {case_of(worst)}")]
    if timed:
        wildest = max(timed, key=lambda row: row["nmse"])
        cards.append(_stat(small(wildest["nmse"]), f"largest error (NMSE against float64): {wildest['op']} {case_of(wildest)}"))
    failed = [row for row in rows if row["status"] in ("wrong", "failed")]
    whose = ": " + ", ".join(sorted({row["provider"] for row in failed})) if failed else ""
    cards.append(_stat(str(len(failed)), f"rows wrong or failed, of {sum(row['status'] != 'unavailable' for row in rows)} that ran{whose}"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _summary_html(rows):
    ops = summary(rows)
    lines = [(f'<a href="#{escape(s["op"], quote=True)}">{escape(s["op"])}</a>', str(s["cases"]), f"{number(s['speedup'])}×" if s["speedup"] else "–",
              f"{number(s['worst'])}×" if s["worst"] else "–", number(s["limit"]), small(s["nmse"]),
              escape(s["worst_case"] or "")) for s in ops]  # fmt: skip
    drawn = []
    fastest = [(s["op"], s["worst"], s["speedup"], s["best"]) for s in ops if s["speedup"]]
    if fastest:
        drawn.append(plots.ranges("Speed-up: worst, geometric mean, best", fastest, (1.0, "as fast as the peer")))
    nearest = [(s["op"], s["least_limit"], s["limit"], s["most_limit"]) for s in ops if s["limit"]]
    if nearest:
        drawn.append(plots.ranges("Time ÷ what this machine allows", nearest, (1.0, "the limit")))
    heads = ("op", "cases", "speed-up", "worst", "× limit", "largest NMSE", "where the worst is")
    return (f'<h2 id="summary">Summary</h2>{_cards(rows)}<div class="grid two">{"".join(f"<div class=card>{svg}</div>" for svg in drawn)}</div>'
            f'<div class="card" style="margin-top:.8rem">{table(heads, lines, last=True)}</div>'
            '<p class="soft">Of terrazzo’s own kernels; speed-up and × limit are geometric means. A dot is the mean, its line runs from least to most.</p>')  # fmt: skip


def _models_html(rows):
    """Whole models: tokens or bytes a second of each provider, one line a job."""
    jobs = defaultdict(dict)
    for row in rows:
        if row["mode"] == "model":
            jobs[row["op"], case_of(row)][row["provider"]] = row
    if not jobs:
        return ""
    names = sorted({name for job in jobs.values() for name, row in job.items() if row["status"] == "ok"}, key=_rank)
    lines = []
    for (op, case), job in jobs.items():
        units = {row["unit"] for row in job.values() if row.get("unit")}
        cells = [_rate(job.get(name)) + _times(job.get(name)) for name in names]
        error = max((row["nmse"] for name, row in job.items() if row["status"] == "ok" and _rank(name)[0] < len(OURS)), default=None)
        peaks = "/".join(number(job[name]["peak_bytes"] / 1e6, 2) if job.get(name, {}).get("peak_bytes") is not None else "–" for name in names)
        lines.append((escape(f"{op} {case}"), *cells, escape("/".join(sorted(units)) or "–"), "–" if error is None else f"{error:.0e}", peaks))
    heads = ("model and job", *names, "a second", "logits’ NMSE", "MB of a call, in this order")
    return f'<h2 id="models">Whole models</h2><div class="card">{table(heads, lines)}</div>'


def _times(row):
    """How much faster than its baseline, unless it is that."""
    if row is None or row.get("speedup") is None or row["provider"].split(" · ")[0] == row.get("baseline"):
        return ""
    return f' <span class="soft">{number(row["speedup"])}×</span>'


def _rate(row):
    if row is None:
        return "–"
    if row["status"] != "ok":
        return f'<span class="soft" title="{escape(row["reason"], quote=True)}">{row["status"]}</span>'
    return number(row["tokens_per_s"]) if row.get("tokens_per_s") else f"{number(row['median_ms'])} ms"


def _targets_html(targets):
    if not targets:
        return ""
    lines = [(escape(t["case"]), escape(t["target"]), number(t["measured"]), '<span class="good">met</span>' if t["passed"] else f'<span class="bad">missed</span> {escape(t["reason"])}')
             for t in sorted(targets, key=lambda t: t["passed"])]  # fmt: skip
    met = sum(t["passed"] for t in targets)
    shown = table(("case", "target", "measured", ""), lines, 2, last=True)
    return f'<h2>Targets: {met} of {len(targets)} met</h2><details class="more card"><summary>all of them, missed ones first</summary>{shown}</details>'


def scalings(rows):
    """[(pattern, [(provider, [(number, ms)])])]: sizes of one op, dtype and mode that differ in one number alone, largest families first.

    A family is a pattern such as "1x8448x▢"; it needs three sizes, or two where the op has no family of three.
    """
    families = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        pieces = re.split(r"(\d+)", row["size"])
        for i in range(1, len(pieces), 2):
            pattern = "".join((*pieces[:i], "▢", *pieces[i + 1 :]))
            families[f"{pattern} {row['dtype']} {row['mode']}"][row["provider"]][int(pieces[i])] = row["median_ms"]
    sizes = {pattern: len({n for line in lines.values() for n in line}) for pattern, lines in families.items()}
    enough = 3 if any(count >= 3 for count in sizes.values()) else 2
    chosen = sorted((p for p in families if sizes[p] >= enough), key=lambda p: -sizes[p])
    return [(p, [(name, sorted(line.items())) for name, line in families[p].items()]) for p in chosen]


def _spread(numbers, least=1.25):
    """Those far enough from their neighbours to be written on one logarithmic axis, at most seven."""
    chosen = []
    for n in numbers:
        if not chosen or n >= least * chosen[-1]:
            chosen.append(n)
    return chosen[:: -(-len(chosen) // 7)]


def _roofline(op, rows, colour, calibration):
    points = [(colour(r["provider"]), r["gflops"] / r["gbs"], r["gflops"], f"{r['provider']} {case_of(r)}: {number(r['gflops'])} GFLOP/s, {number(r['times_limit'])} × the limit")
              for r in rows if r["gflops"] and r["gbs"]]  # fmt: skip
    if not points or not calibration:
        return ""
    peak, left = calibration["gflops"], min(p[1] for p in points) / 2
    right = 2 * max(*(p[1] for p in points), *(peak / calibration[f"{kind}_gbs"] for kind in ("read", "copy", "scale")))
    guides = []
    for kind in ("read", "copy", "scale"):
        rate = calibration[f"{kind}_gbs"]
        ridge = peak / rate
        ends = sorted({left, ridge, right})
        label = f"{number(peak)} GFLOP/s" if kind == "read" else ""
        guides.append((label, f"{kind} {number(rate)} GB/s, {number(peak)} GFLOP/s", [(x, min(peak, x * rate)) for x in ends]))
    slow, fast = (number(f(calibration[f"{kind}_gbs"] for kind in ("read", "copy", "scale"))) for f in (min, max))
    return plots.loglog(f"Roofline, {slow}–{fast} GB/s", "flop per compulsory byte", "GFLOP/s", points=points, guides=guides)


def _op_plots(op, rows, colour, calibration):
    timed = [row for row in rows if row["status"] == "ok"]
    drawn = [_roofline(op, timed, colour, calibration)]
    for pattern, lines in scalings(timed)[:4]:
        points = [(colour(name), n, ms, f"{name} {n}: {number(ms)} ms") for name, line in lines for n, ms in line]
        drawn.append(plots.loglog(f"Time over ▢ in {pattern}", "the number at ▢", "ms", lines=[(colour(name), line) for name, line in lines if len(line) > 1],
                                  points=points, marks=_spread(sorted({n for _, line in lines for n, _ in line}))))  # fmt: skip
    errors = [(colour(r["provider"]), r["median_ms"], max(r["nmse"], 1e-18), f"{r['provider']} {case_of(r)}: NMSE {r['nmse']:.1e}, {number(r['median_ms'])} ms") for r in timed]
    if errors:
        drawn.append(plots.loglog("Error against time", "ms", "NMSE", points=errors))
    peaks = defaultdict(list)
    for row in timed:
        if row.get("peak_bytes"):
            peaks[row["provider"]].append(row["peak_bytes"])
    if peaks:
        entries = [(colour(name), name, max(peaks[name]) / 1e6, None, None) for name in sorted(peaks, key=colour)]
        drawn.append(plots.bars("Memory: largest growth in a call", entries, "MB"))
    return '<div class="grid">' + "".join(f'<div class="card">{svg}</div>' for svg in drawn if svg) + "</div>"


HEADINGS = ("provider", "median ms", "p20–p80", "min", "n", "speed-up", "× limit", "GFLOP/s", "GB/s", "max error", "NMSE", "first call ms", "MB")


def _cells(row):
    megabytes = [row.get("peak_bytes"), row.get("peak_device_bytes")]
    memory = " + ".join(number(size / 1e6) for size in megabytes if size is not None) or "–"
    return [escape(row["provider"]), number(row["median_ms"]) + (' <span class="soft">noisy</span>' if row["noisy"] else ""), f"{number(row['p20_ms'])}–{number(row['p80_ms'])}",
            number(row["min_ms"]), str(row["n"]), "–" if row.get("speedup") is None else f"{number(row['speedup'])}×", number(row["times_limit"]), number(row["gflops"]),
            number(row["gbs"]), small(row["max_abs"]), small(row["nmse"]), number(row["first_call_ms"]), memory]  # fmt: skip


def _line(row):
    """A case in a few words: our time, and beside it the peer's and the limit."""
    if row is None:
        return '<span class="soft">ours did not run</span>'
    if row["status"] != "ok":
        return f'<span class="bad">{escape(row["provider"])} {row["status"]}</span>'
    words = [f"<b>{number(row['median_ms'])} ms</b>"]
    if row.get("tokens_per_s"):
        words.append(f"{number(row['tokens_per_s'])} {row['unit']}/s")
    if row.get("speedup") is not None and row["provider"] != row.get("baseline"):
        words.append(f"{number(row['speedup'])}× {escape(row.get('baseline') or 'peer')}")
    if row["times_limit"]:
        words.append(f'<span class="soft">{number(row["times_limit"])}× limit</span>')
    return "".join(f"<span>{word}</span>" for word in words)


def _commands(rows):
    """[(providers, command)]: of each row that ran its own, of those that could not one for all."""
    ran, not_here = ([row for row in rows if (row["status"] == "unavailable") is absent_] for absent_ in (False, True))
    found = [(row["provider"], row["command"]) for row in ran]
    if not_here:
        names = [row["provider"].split(" · ")[0] for row in not_here]
        found.append((", ".join(names), re.sub(r"--provider \S+", f"--provider {','.join(names)}", not_here[0]["command"])))
    return found


def _case_html(op, name, rows, colour, is_open):
    timed, ours = [row for row in rows if row["status"] == "ok"], standing_for_us(rows)
    chart = plots.bars("Milliseconds: median, p20 to p80", [(colour(r["provider"]), r["provider"], r["median_ms"], r["p20_ms"], r["p80_ms"]) for r in timed], "ms") if timed else ""
    lines = "".join(f'<tr{" class=ours" if row is ours else ""}>' + "".join(f"<td>{c}</td>" for c in _cells(row)) + "</tr>" for row in timed)
    head = "".join(f"<th>{escape(h)}</th>" for h in HEADINGS)
    shown = f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>' if timed else ""
    notes = [f'<p class="bad">{escape(row["provider"])} {row["status"]}: {escape(row["reason"])}</p>' for row in rows if row["status"] in ("wrong", "failed")]
    notes += [f'<p class="soft">{escape(", ".join(names))}: {escape(reason)}</p>' for reason, names in absent(rows)]
    notes += [f'<p class="soft">{escape(row["provider"])}: {escape(row["timer_note"])}</p>' for row in timed if row.get("timer_note")]
    commands = "".join(f"<p>{escape(who)}: <code>{escape(command)}</code> <button data-copy>copy</button></p>" for who, command in _commands(rows))
    words = escape(f"{op} {name} {' '.join(row['provider'] for row in rows)}".lower(), quote=True)
    return (f'<details class="case"{" open" if is_open else ""} data-op="{escape(op, quote=True)}" data-words="{words}"><summary><h4>{escape(name)}</h4>{_line(ours)}</summary>'
            f'<div class="body">{chart}{shown}<div>{"".join(notes)}</div>'
            f'<details class="more"><summary>commands that measure these rows again</summary>{commands}</details></div></details>')  # fmt: skip


def _environment_html(path, environment, is_open=False):
    facts = {k: v for k, v in environment.items() if k not in ("kind", "schema")}
    lines = [(escape(k), escape(v if isinstance(v, str) else json.dumps(v))) for k, v in facts.items()]
    return f'<details class="more card"{" open" if is_open else ""}><summary>{escape(Path(path).name)}</summary>{table(("", ""), lines, 2)}</details>'


def html(paths):
    """The report of result files as one page. Where files have the same rows, each row's provider is named with its file."""
    files = [(path, *read_all(path)) for path in paths]
    rows, targets = [row for _, _, found, _ in files for row in found], [t for *_, found in files for t in found]
    if not rows:
        raise ValueError(f"terrazzo bench report: no rows in {', '.join(map(str, paths))}")
    for field, word in (("threads", lambda row: f"{row['threads']} threads"), ("device", lambda row: f"on {row['device']}"), ("cold", lambda row: "cold" if row["cold"] else "warm")):
        if len({row[field] for row in rows}) > 1:  # a sweep: it is part of the size, and threads have scaling lines
            for *_, found, _ in files:
                found[:] = [row | {"size": f"{row['size']} {word(row)}"} for row in found]
    rows = [row for _, _, found, _ in files for row in found]
    if len(files) > 1:  # rows that several files have are told apart by the file's name
        identity = lambda row: (row["op"], case_of(row), row["provider"])  # noqa: E731
        often = Counter(map(identity, rows))
        rows = [row | {"provider": f"{row['provider']} · {Path(path).stem}"} if often[identity(row)] > 1 else row for path, _, found, _ in files for row in found]
    names = sorted({row["provider"] for row in rows if row["status"] == "ok"}, key=_rank)
    colour = sorted(names, key=lambda name: (COLOURED.index(name.split(" · ")[0]) if name.split(" · ")[0] in COLOURED else len(COLOURED), name)).index
    count = len({(row["op"], case_of(row)) for row in rows})
    environment = files[-1][1]
    calibration = environment.get("calibration")
    sections = []
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        cases = defaultdict(list)
        for row in of_op:
            cases[case_of(row)].append(row)
        drawn = "".join(_case_html(op, name, group, colour, count <= OPEN_CASES) for name, group in cases.items())
        sections.append(f'<section data-op="{escape(op, quote=True)}" id="{escape(op, quote=True)}"><h2>{escape(op)}</h2>{_op_plots(op, of_op, colour, calibration)}{drawn}</section>')
    ops = "".join(f"<option>{escape(op)}</option>" for op in dict.fromkeys(row["op"] for row in rows))
    key = "".join(f'<span><i class="s{colour(name) % plots.SERIES}"></i>{escape(name)}</span>' for name in names)
    facts = (environment.get("cpu", "unknown machine"), environment.get("gpu"), f"{environment.get('threads', '?')} threads", f"torch {environment.get('torch', '?')}",
             environment.get("date", "")[:10], f"revision {environment['git_sha'][:9]}" if environment.get("git_sha") else None)  # fmt: skip
    named_once = [row | {"provider": row["provider"].split(" · ")[0]} for row in rows]
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';img-src data:;style-src 'unsafe-inline';script-src 'unsafe-inline'"><title>terrazzo benchmarks</title>
<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><main><h1>terrazzo benchmarks</h1><p class="soft">{escape(" · ".join(filter(None, facts)))}</p>
{_summary_html(named_once)}{_targets_html(targets)}{_models_html(rows)}
<nav><input id="words" type="search" placeholder="filter: conv bf16 1x8448" aria-label="filter cases"><select id="op" aria-label="op"><option value="">all ops</option>{ops}</select>
<button id="fold">open all</button><span id="count" class="soft"></span><div class="key">{key}</div></nav>{"".join(sections)}
<h2 id="environment">Environment</h2>{"".join(_environment_html(path, found) for path, found, *_ in files)}</main><script>{SCRIPT}</script></body></html>
"""
