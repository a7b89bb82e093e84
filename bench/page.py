"""The HTML report: one file, no network, light and dark, readable on a phone. Everything is drawn here; the script only filters and copies."""
import json
import math
import re
from collections import defaultdict
from html import escape
from pathlib import Path

from . import plots
from .compare import read_all
from .suite import OURS

STYLE = """:root{color-scheme:light dark;--bg:#fbfaf7;--card:#fff;--ink:#22262a;--soft:#5d666e;--line:#dedbd3;--bad:#a8323a;--good:#23724a;
--s0:#1f6f78;--s1:#b5654a;--s2:#7b8fa1;--s3:#c09a4e;--s4:#5b8c5a;--s5:#7a5c99;--s6:#3d6fb4;--s7:#9c4f6e}
@media(prefers-color-scheme:dark){:root{--bg:#15181b;--card:#1d2226;--ink:#e4e6e8;--soft:#9aa4ad;--line:#343b41;--bad:#ff8b8b;--good:#79cf9f;
--s0:#4fb6c0;--s1:#e0906f;--s2:#a9bccd;--s3:#e0bf78;--s4:#8fc28d;--s5:#b798d8;--s6:#7eaaf0;--s7:#d98bab}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:76rem;margin:0 auto;padding:1rem}h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.25rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:.2rem 0}
p{margin:.3rem 0}.soft{color:var(--soft)}.bad{color:var(--bad)}.good{color:var(--good)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:.8rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(10rem,1fr));gap:.8rem;margin:1rem 0}
.card,.case{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem;min-width:0}.case{margin:.8rem 0}
.card{overflow-wrap:anywhere}.card b{display:block;font-size:1.5rem}.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}th{color:var(--soft);font-weight:600}
td:first-child,th:first-child,td.left{text-align:left}a{color:inherit}td.left{white-space:normal}svg{width:100%;height:auto;display:block}
.case svg{max-width:34rem}code{font-size:.85em;overflow-wrap:anywhere}details{margin:.3rem 0}
nav{position:sticky;top:0;background:var(--bg);padding:.5rem 0;display:flex;flex-wrap:wrap;gap:.5rem;border-bottom:1px solid var(--line);z-index:1}
input,select,button{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.25rem .5rem}
input{flex:1 1 12rem;min-width:0}.key{display:flex;flex-wrap:wrap;gap:.2rem .9rem}.key i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.3em}
text{fill:currentColor;font:12px system-ui,sans-serif}.t{font-weight:600}.m{text-anchor:middle}.e{text-anchor:end}.g{stroke:var(--line)}
.d{fill:none;stroke:var(--soft);stroke-dasharray:5 4}.l{fill:none;stroke-width:2}.w{fill:none;stroke:var(--ink)}
""" + "".join(f".p.s{k}{{fill:var(--s{k})}}.l.s{k}{{stroke:var(--s{k})}}.key i.s{k}{{background:var(--s{k})}}" for k in range(plots.SERIES))

SCRIPT = """const box=document.getElementById('words'),op=document.getElementById('op'),count=document.getElementById('count');
const cases=[...document.querySelectorAll('.case')],groups=[...document.querySelectorAll('section[data-op]')];
function filter(){const words=box.value.toLowerCase().split(/\\s+/).filter(Boolean);let shown=0;
for(const c of cases){const fits=(!op.value||c.dataset.op===op.value)&&words.every(w=>c.dataset.words.includes(w));c.hidden=!fits;shown+=fits}
for(const g of groups)g.hidden=![...g.querySelectorAll('.case')].some(c=>!c.hidden);
count.textContent=shown+' of '+cases.length+' cases'}
box.addEventListener('input',filter);op.addEventListener('change',filter);filter();
document.addEventListener('click',e=>{if(e.target.dataset.copy!==undefined)navigator.clipboard.writeText(e.target.previousElementSibling.textContent)
.then(()=>{e.target.textContent='copied'},()=>{e.target.textContent='select and copy'})});"""


def number(value, digits=3):
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def case_of(row):
    return " ".join((row["size"], row["dtype"], row["mode"]))


def table(headings, lines, left=1):
    """lines: cells, already escaped; the first `left` columns and the last are text."""
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f'<td class="left">{c}</td>' if i < left else f"<td>{c}</td>" for i, c in enumerate(line)) + "</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def summary(rows):
    """[{op, cases, speedup, worst, worst_case, limit, nmse, nmse_case, refused}] of our rows; speed-ups against each row's baseline."""
    found = []
    for op in dict.fromkeys(row["op"] for row in rows):
        ours = [row for row in rows if row["op"] == op and row["provider"] == "terrazzo"]
        timed = [row for row in ours if row["status"] == "ok"]
        compared = [row for row in timed if row.get("speedup")]
        limits = [row["times_limit"] for row in timed if row["times_limit"]]
        worst = min(compared, key=lambda row: row["speedup"], default=None)
        wildest = max(timed, key=lambda row: row["nmse"], default=None)
        found.append({
            "op": op, "cases": len(timed), "refused": len(ours) - len(timed),
            "speedup": geometric_mean([row["speedup"] for row in compared]) if compared else None,
            "worst": worst and worst["speedup"], "worst_case": worst and case_of(worst),
            "limit": geometric_mean(limits) if limits else None,
            "nmse": wildest and wildest["nmse"], "nmse_case": wildest and case_of(wildest),
        })  # fmt: skip
    return found


def _summary_html(rows):
    ops = summary(rows)
    timed = [row for row in rows if row["provider"] == "terrazzo" and row["status"] == "ok"]
    compared = [row for row in timed if row.get("speedup")]
    cards = []
    if compared:
        worst = min(compared, key=lambda row: row["speedup"])
        cards += [(f"{number(geometric_mean([row['speedup'] for row in compared]))}×", f"geometric mean speed-up over {len(compared)} cases"),
                  (f"{number(worst['speedup'])}×", f"worst case: {worst['op']} {case_of(worst)}")]
    if timed:
        wildest = max(timed, key=lambda row: row["nmse"])
        cards.append((f"{wildest['nmse']:.1e}", f"largest NMSE: {wildest['op']} {case_of(wildest)}"))
    failed = [row for row in rows if row["status"] in ("wrong", "failed")]
    cards.append((str(len(failed)), "rows wrong or failed" + (": " + ", ".join(sorted({row["provider"] for row in failed})) if failed else "")))
    shown = "".join(f'<div class="card"><b>{escape(value)}</b><span class="soft">{escape(what)}</span></div>' for value, what in cards)
    lines = [(f'<a href="#{escape(s["op"], quote=True)}">{escape(s["op"])}</a>', str(s["cases"]), f"{number(s['speedup'])}×" if s["speedup"] else "–",
              f"{number(s['worst'])}×" if s["worst"] else "–", escape(s["worst_case"] or ""), number(s["limit"]),
              f"{s['nmse']:.1e}" if s["nmse"] is not None else "–", escape(s["nmse_case"] or "")) for s in ops]  # fmt: skip
    heads = ("op", "cases", "speed-up", "worst", "in", "× limit", "largest NMSE", "in")
    return f'<h2 id="summary">Summary</h2><div class="cards">{shown}</div>{table(heads, lines)}<p class="soft">Of our kernels; speed-up and × limit are geometric means.</p>'


def _targets_html(targets):
    if not targets:
        return ""
    lines = [(escape(t["case"]), escape(t["target"]), number(t["measured"]), '<span class="good">met</span>' if t["passed"] else f'<span class="bad">missed</span> {escape(t["reason"])}')
             for t in sorted(targets, key=lambda t: t["passed"])]  # fmt: skip
    met = sum(t["passed"] for t in targets)
    return f"<h2>Targets: {met} of {len(targets)} met</h2><details><summary>all of them, missed ones first</summary>{table(('case', 'target', 'measured', ''), lines, 2)}</details>"


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
        guides.append((f"{kind} {number(rate)} GB/s, {number(peak)} GFLOP/s", [(x, min(peak, x * rate)) for x in ends]))
    return plots.loglog(f"{op}: roofline", "flop per compulsory byte", "GFLOP/s", points=points, guides=guides)


def _op_plots(op, rows, colour, calibration):
    timed = [row for row in rows if row["status"] == "ok"]
    drawn = [_roofline(op, timed, colour, calibration)]
    for pattern, lines in scalings(timed)[:4]:
        points = [(colour(name), n, ms, f"{name} {n}: {number(ms)} ms") for name, line in lines for n, ms in line]
        drawn.append(plots.loglog(pattern, "the size at ▢", "ms", lines=[(colour(name), line) for name, line in lines if len(line) > 1], points=points))
    errors = [(colour(r["provider"]), r["median_ms"], max(r["nmse"], 1e-18), f"{r['provider']} {case_of(r)}: NMSE {r['nmse']:.1e}, {number(r['median_ms'])} ms") for r in timed]
    if errors:
        drawn.append(plots.loglog(f"{op}: error against time", "ms", "NMSE", points=errors))
    peaks = defaultdict(list)
    for row in timed:
        if row.get("peak_bytes"):
            peaks[row["provider"]].append(row["peak_bytes"])
    if peaks:
        entries = [(colour(name), name, max(peaks[name]) / 1e6, None, None) for name in sorted(peaks, key=colour)]
        drawn.append(plots.bars(f"{op}: memory, largest growth in a call", entries, "MB"))
    return '<div class="grid">' + "".join(f'<div class="card">{svg}</div>' for svg in drawn if svg) + "</div>"


HEADINGS = ("provider", "median ms", "p20–p80", "min", "n", "speed-up", "× limit", "GFLOP/s", "GB/s", "max error", "NMSE", "first call ms", "MB")


def _cells(row):
    name = escape(row["provider"])
    if row["status"] != "ok":
        return [name, f'<span class="{"soft" if row["status"] == "unavailable" else "bad"}">{row["status"]}: {escape(row["reason"])}</span>']
    return [name, number(row["median_ms"]) + (" noisy" if row["noisy"] else ""), f"{number(row['p20_ms'])}–{number(row['p80_ms'])}", number(row["min_ms"]), str(row["n"]),
            "–" if row.get("speedup") is None else f"{number(row['speedup'])}×", number(row["times_limit"]), number(row["gflops"]), number(row["gbs"]), f"{row['max_abs']:.1e}",
            f"{row['nmse']:.1e}", number(row["first_call_ms"]), number(None if row["peak_bytes"] is None else row["peak_bytes"] / 1e6)]  # fmt: skip


def _case_html(op, name, rows, colour):
    timed = [row for row in rows if row["status"] == "ok"]
    chart = plots.bars("milliseconds: median, p20 to p80", [(colour(r["provider"]), r["provider"], r["median_ms"], r["p20_ms"], r["p80_ms"]) for r in timed], "ms") if timed else ""
    lines = "".join("<tr>" + "".join(f'<td colspan="{len(HEADINGS) - 1}" class="left">{c}</td>' if len(cells) == 2 and i else f"<td>{c}</td>" for i, c in enumerate(cells)) + "</tr>"
                    for cells in map(_cells, rows))  # fmt: skip
    head = "".join(f"<th>{escape(h)}</th>" for h in HEADINGS)
    commands = "".join(f"<p>{escape(row['provider'])}: <code>{escape(row['command'])}</code> <button data-copy>copy</button></p>" for row in rows)
    words = escape(f"{op} {name} {' '.join(row['provider'] for row in rows)}".lower(), quote=True)
    return (f'<div class="case" data-op="{escape(op, quote=True)}" data-words="{words}"><h3>{escape(name)}</h3>{chart}<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'
            f"<details><summary>commands that measure these rows again</summary>{commands}</details></div>")  # fmt: skip


def _environment_html(path, environment):
    facts = {k: v for k, v in environment.items() if k not in ("kind", "schema")}
    lines = [(escape(k), escape(v if isinstance(v, str) else json.dumps(v))) for k, v in facts.items()]
    return f"<h3>{escape(Path(path).name)}</h3>{table(('', ''), lines, 2)}"


def html(paths):
    """The report of result files as one page. Where files have the same rows, each row's provider is named with its file."""
    files = [(path, *read_all(path)) for path in paths]
    rows, targets = [row for _, _, found, _ in files for row in found], [t for *_, found in files for t in found]
    if not rows:
        raise ValueError(f"terrazzo bench report: no rows in {', '.join(map(str, paths))}")
    if len({row["threads"] for row in rows}) > 1:  # a sweep: the number of threads is a size like another, with scaling lines
        for *_, found, _ in files:
            found[:] = [row | {"size": f"{row['size']} {row['threads']} threads"} for row in found]
        rows = [row for _, _, found, _ in files for row in found]
    identity = [(row["op"], case_of(row), row["provider"]) for row in rows]
    if len(set(identity)) < len(identity) and len(files) > 1:
        rows = [row | {"provider": f"{row['provider']} · {Path(path).stem}"} for path, _, found, _ in files for row in found]
    names = sorted({row["provider"] for row in rows}, key=lambda name: (name.split(" · ")[0] not in OURS, name))
    colour = names.index
    environment = files[-1][1]
    calibration = environment.get("calibration")
    sections = []
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        cases = defaultdict(list)
        for row in of_op:
            cases[case_of(row)].append(row)
        drawn = "".join(_case_html(op, name, group, colour) for name, group in cases.items())
        sections.append(f'<section data-op="{escape(op, quote=True)}" id="{escape(op, quote=True)}"><h2>{escape(op)}</h2>{_op_plots(op, of_op, colour, calibration)}{drawn}</section>')
    ops = "".join(f"<option>{escape(op)}</option>" for op in dict.fromkeys(row["op"] for row in rows))
    key = "".join(f'<span><i class="s{colour(name) % plots.SERIES}"></i>{escape(name)}</span>' for name in names)
    where = f"{environment.get('cpu', 'unknown machine')}, {environment.get('threads', '?')} threads, {environment.get('date', '')[:10]}, torch {environment.get('torch', '?')}"
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';img-src data:;style-src 'unsafe-inline';script-src 'unsafe-inline'"><title>terrazzo benchmarks</title>
<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><main><h1>terrazzo benchmarks</h1><p class="soft">{escape(where)}</p>
{_summary_html([row | {"provider": row["provider"].split(" · ")[0]} for row in rows])}{_targets_html(targets)}
<nav><input id="words" type="search" placeholder="filter: conv bf16 1x8448" aria-label="filter cases"><select id="op" aria-label="op"><option value="">all ops</option>{ops}</select>
<span id="count" class="soft"></span><div class="key">{key}</div></nav>{"".join(sections)}
<h2 id="environment">Environment</h2>{"".join(_environment_html(path, found) for path, found, *_ in files)}</main><script>{SCRIPT}</script></body></html>
"""
