"""`terrazzo bench …`, also as `python -m terrazzo.bench …`."""
import argparse
import json
import math
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from . import compare, cost_model, export, memory, packages, page, providers, report, revision, roofline, suite, targets
from .cases import ALIASES, DTYPES, MODES, PRESETS, select
from .environment import environment
from .turns import Turns

SECONDS = {"quick": 1.0, "normal": 3.0, "full": 15.0}
MIN_PAIRS = 35         # rounds of `compare --git` in all, at least: samples of one moment differ by a tenth here, and a median of 35 is known to 2 %
MAX_PAIRS = 200        # at most: what is not known by then is unequal from process to process
QUICK_LIMIT_S = 200.0  # of `terrazzo bench --quick`: about four minutes with start, calibration and the last case's overrun


def parser():
    top = argparse.ArgumentParser(prog="terrazzo bench", description="How much faster, how exact, how far from this machine's limit.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--match", metavar="WORDS", help="only cases whose name contains every word")
    speed = common.add_mutually_exclusive_group()
    speed.add_argument("--quick", dest="speed", action="store_const", const="quick", default="normal", help="1 s a row")
    speed.add_argument("--full", dest="speed", action="store_const", const="full", help="up to 15 s a row")
    speed.add_argument("--normal", dest="speed", action="store_const", const="normal", help=argparse.SUPPRESS)
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--out", metavar="FILE", help="append the rows to this JSONL file")
    common.add_argument("--json", action="store_true", help="rows as JSON lines instead of tables")
    common.add_argument("--any-machine-state", action="store_true", help="keep rounds measured while something else was computing")

    run = commands.add_parser("run", parents=[common], help="measure ops (the default command)")
    run.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(suite.OPS)}; all by default")
    run.add_argument("--provider", help=f"comma-separated, of {', '.join(suite.PROVIDERS)}, or loaded ones")
    run.add_argument("--load", action="append", default=[], metavar="FILE", help="a Python file that registers kernels with @terrazzo.bench.provider")
    run.add_argument("--shapes", metavar="FILE", help="a JSON file of shapes of your own, in place of a preset")
    run.add_argument("--turns", help=argparse.SUPPRESS)  # of `compare --git`: Turns.of reads it
    run.add_argument("--mode", help=f"comma-separated, of {', '.join(MODES)}; bwd is forward and backward together")
    run.add_argument("--dtype", default="fp32", help=f"comma-separated, of {', '.join(DTYPES)} (default fp32)")
    run.add_argument("--preset", help=f"comma-separated, of {', '.join(PRESETS)}; default: each op's own, with --quick and no OP its smallest cases")
    run.add_argument("--baseline", default="hf", help="provider that speed-ups refer to; default hf, and torch where transformers has no such function")
    run.add_argument("--threads", type=_thread_counts, metavar="N[,N]", help="one run for each number, default torch's choice")
    run.add_argument("--cold", action="store_true", help="empty the CPU's caches before every call (a GPU's inputs never lie in its cache)")
    run.add_argument("--device", choices=suite.DEVICES, help="where the inputs lie; default cuda where there is one")
    run.add_argument("--limit", type=float, metavar="SECONDS", help=f"for all cases together, shared among them; default {QUICK_LIMIT_S:.0f} for --quick without OP")
    run.add_argument("--list", action="store_true", help="only name the cases, and count the rows and the time that they may take")

    bars = commands.add_parser("targets", parents=[common], help="measure every speed target and say which are met")
    bars.add_argument("--threads", type=int, default=targets.THREADS, help=f"default {targets.THREADS}")
    calibrate = commands.add_parser("calibrate", help="this machine's peaks")
    calibrate.add_argument("--threads", type=int)
    calibrate.add_argument("--device", choices=suite.DEVICES, default="cpu")
    calibrate.add_argument("--json", action="store_true")
    diff = commands.add_parser("compare", help="two result files: SAME, FAST, SLOW or UNSURE")
    diff.add_argument("before", nargs="?")
    diff.add_argument("after", nargs="?")
    diff.add_argument("--git", metavar="REF", help="build that revision in a worktree of its own, and measure it and this checkout")
    diff.add_argument("--run", default="--quick", metavar="OPTIONS", help="with --git: ops and options of terrazzo bench (default --quick)")
    diff.add_argument("--passes", type=int, default=revision.PASSES, help=f"with --git: how often both are started anew (default {revision.PASSES})")
    diff.add_argument("--fail-on", metavar="RULE", help="such as slow:5%%: exit 1 when a row is that much slower")
    diff.add_argument("--force", action="store_true", help="compare results of different machines")
    diff.add_argument("--json", action="store_true")
    floors = commands.add_parser("roofline", help="the time floor of every op at model sizes on A100, H100, B200 and MI300X: computed, no GPU needed")
    floors.add_argument("-o", "--output", metavar="FILE", help="write the tables there (Markdown) instead of printing them")
    scales = commands.add_parser("scaling", help="step time against ranks, of every plan of parallelism on 8 to 1024 H100s: computed, no GPU needed")
    scales.add_argument("-o", "--output", metavar="FILE", help="write it there (Markdown, its plots beside it) instead of printing it")
    shared = commands.add_parser("ranks", help="two ranks with one thread each against one rank with two threads: what parallelism costs")
    shared.add_argument("--size", choices=("quick", "full", "tiny"), default="full")
    shared.add_argument("--rounds", type=int, default=9)
    shared.add_argument("--ranks", type=int, default=2)
    shared.add_argument("--json", action="store_true")
    table = commands.add_parser("export", help="rows as CSV or Markdown")
    table.add_argument("files", nargs="+")
    table.add_argument("--format", choices=("csv", "markdown"), default="csv")
    filled = commands.add_parser("tables", help="make the tables between <!-- bench: … --> and <!-- /bench --> of documents anew")
    filled.add_argument("result")
    filled.add_argument("documents", nargs="+")
    filled.add_argument("--check", action="store_true", help="write nothing; exit 1 where a table would change")
    page = commands.add_parser("report", help="one HTML file from result files")
    page.add_argument("files", nargs="+")
    page.add_argument("-o", "--output", default="report.html")
    return top


def _split(text, allowed, what):
    """A comma-separated option as a tuple; every part must be allowed."""
    parts = tuple(part for part in (text or "").split(",") if part)
    for part in parts:
        if part not in allowed:
            raise ValueError(f"terrazzo bench: unknown {what} {part!r}; choose from {', '.join(allowed)}")
    return parts


def _thread_counts(text):
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise ValueError
    return counts


class Session:
    """What run and targets share: threads, calibration, progress bar, result file."""

    def __init__(self, args, argv, threads=None, device="cpu"):
        if threads:
            torch.set_num_threads(threads)
        self.device = device
        if device == "cpu":
            memory.keep_freed()
        self.turns = Turns.of(args.turns) if getattr(args, "turns", None) else None  # waits for its turn
        width = None if sys.stdout.isatty() else 120  # a file or a pipe has no width of its own
        self.args, self.console = args, Console(stderr=args.json, width=width)
        self.command = "terrazzo bench " + " ".join(argv)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
        # Bar and tables share the terminal; rows for machines or for a file never mix with the bar.
        shared = self.console if sys.stdout.isatty() and not args.json else Console(stderr=True)
        self.progress = Progress(*columns, console=shared, transient=True, redirect_stdout=False, redirect_stderr=False)
        self.calibration = roofline.calibrated(device)
        every_round = args.any_machine_state or device != "cpu" or self.turns  # by turns: what one side dropped would have no counterpart
        self.machine_is_free = None if every_round else roofline.FreeMachine(self.calibration)
        self.environment = environment(self.calibration, self.command, args.seed, device)
        if args.out:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        self.record([self.environment])

    def options(self, **chosen):
        rounds = {"min_rounds": math.ceil(MIN_PAIRS / self.turns.passes), "max_rounds": math.ceil(MAX_PAIRS / self.turns.passes)} if self.turns else {}
        return suite.Options(budget_s=SECONDS[self.args.speed], speed=self.args.speed, seed=self.args.seed, device=self.device, **rounds, **chosen)

    def describe(self):
        c, where = self.calibration, self.environment["cpu"]
        where = f"{where}, {c.threads} threads" if self.device == "cpu" else f"{self.environment['gpu']}, {where}"
        products = "".join(f"{rate:.0f} {dtype} " for dtype, rate in (c.gflops_of or {"": c.gflops}).items()).replace("  ", " ")
        self.console.print(f"{where}: {products}GFLOP/s, read {c.read_gbs:.1f}, copy {c.copy_gbs:.1f}, in place {c.scale_gbs:.1f} GB/s ({c.source}, {c.date[:16]})",
                           highlight=False)  # fmt: skip

    def record(self, lines):
        """Result lines go out at once: an interrupted run keeps what it measured."""
        if self.args.out:
            with Path(self.args.out).open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        if self.args.json:
            print(*map(json.dumps, lines), sep="\n", flush=True)

    def show(self, rows):
        """Records the rows of one case, and prints their table."""
        if not rows:  # none of the chosen providers has this case
            return
        self.record(rows)
        if not self.args.json:
            self.console.print(report.case_table(rows))


def _run(args, argv):
    ops = args.ops or list(suite.OPS)
    _split(",".join(ops), tuple(suite.OPS), "op")
    for file in args.load:
        providers.load(file)
    presets = providers.shapes(args.shapes) if args.shapes else _split(",".join(ALIASES.get(p, p) for p in (args.preset or "").split(",")), PRESETS, "preset")
    modes, dtypes = _split(args.mode, MODES, "mode"), _split(args.dtype, tuple(DTYPES), "dtype")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("terrazzo bench: --device cuda: torch finds no GPU (torch.cuda.is_available() is False)")
    known = (*suite.PROVIDERS, *providers.REGISTERED)
    chosen = suite.expand(_split(args.provider, known, "provider"), device) or known
    _split(args.baseline, known, "baseline")
    if args.limit is not None and args.limit <= 0:
        raise ValueError(f"terrazzo bench: --limit must be above 0 seconds, got {args.limit:g}")
    pairs = [(op, preset) for preset in presets for op in ops] or [(op, suite.home(op)) for op in ops]
    cases = [case for op, preset in pairs for case in select(suite.cases_of(op, preset), modes=modes, dtypes=dtypes, match=args.match)]
    bare = args.speed == "quick" and not (presets or args.ops or args.match)
    if bare:
        cases = suite.smallest(cases)
    args.limit = args.limit or (QUICK_LIMIT_S if bare and not args.turns else None)
    args.hurry = args.speed == "quick" and not args.provider
    if args.list:
        print("\n".join(case.key for case in cases))
        print(_plan(cases, chosen, args, device), file=sys.stderr)
        return 0
    if not cases:
        raise ValueError("terrazzo bench: no case fits; --list names the cases of the chosen ops and presets")
    failed = False
    for threads in args.threads or [None]:
        failed |= _run_cases(Session(args, argv, threads, device), cases, args, chosen)
    return 1 if failed else 0


def _plan(cases, chosen, args, device):
    """How many rows a run has to time, and how long that may take."""
    not_here = {*(suite.COMPILED if args.hurry else ()), *(("cuda", "triton", *packages.NAMES) if device == "cpu" else ("cpu",))}
    rows = sum(p.name in chosen and p.name not in not_here for case in cases for p in providers.of_case(case))
    limit = f"at most {args.limit:.0f} s in all" if args.limit else "checks and slow calls come on top"
    return f"{len(cases)} cases, {rows} rows of up to {SECONDS[args.speed]:g} s: {rows * SECONDS[args.speed]:.0f} s of timing; {limit}"


def _run_cases(session, cases, args, chosen):
    """Measures the cases; whether a provider was wrong or failed. What a case leaves of its share of --limit is the others'."""
    session.describe()
    options = session.options(providers=chosen, baseline=args.baseline, cold=args.cold, hurry=args.hurry)
    turns = session.turns
    rows, clock = [], turns.clock if turns else time.perf_counter_ns
    end = clock() + int(args.limit * 1e9) if args.limit else None
    with session.progress as progress:
        overall, current = progress.add_task("cases", total=len(cases)), progress.add_task("", total=1.0)
        for number, case in enumerate(cases):
            left = end - clock() if end else None
            if end and left <= 0:
                if turns:
                    turns.sit_out()
                found = suite.left_out(case, options, f"the {args.limit:g} s of this run were over; --limit sets them")
            else:
                found = suite.measure(case, options, session.calibration, machine_is_free=session.machine_is_free, clock=clock, turns=turns,
                                      deadline_ns=clock() + left // (len(cases) - number) if end else None,
                                      on_progress=lambda text, done: progress.update(current, description=text, completed=done))  # fmt: skip
            rows += found
            progress.advance(overall)
            session.show(found)
    if len(cases) > 1 and not args.json:
        session.console.print(report.summary_table(rows))
    return any(row["status"] in ("wrong", "failed") for row in rows)


def _targets(args, argv):
    session = Session(args, argv, args.threads)
    session.describe()
    with session.progress as progress:
        overall, current = progress.add_task("cases", total=1), progress.add_task("", total=1.0)
        results = targets.run(
            session.options(), session.calibration, args.match, machine_is_free=session.machine_is_free,
            on_case=lambda number, total: progress.update(overall, completed=number, total=total), on_rows=session.show,
            on_progress=lambda text, done: progress.update(current, description=text, completed=done),
        )  # fmt: skip
    session.record(results)
    if not args.json:
        session.console.print(report.target_table(results))
        session.console.print(f"{sum(r['passed'] for r in results)} of {len(results)} targets met")
    return 0 if all(result["passed"] for result in results) else 1


def _calibrate(args, argv):
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("terrazzo bench: --device cuda: torch finds no GPU (torch.cuda.is_available() is False)")
    found = roofline.calibrate_gpu() if args.device == "cuda" else roofline.calibrate()
    roofline.keep(found, args.device)
    if args.json:
        print(json.dumps(found.as_dict()))
        return 0
    print(f"{found.threads} threads, {found.source}, {found.date}")
    for dtype, rate in (found.gflops_of or {}).items():
        print(f"{dtype} product          {rate:8.1f} GFLOP/s")
    if not found.gflops_of:
        print(f"float32 multiply-add  {found.gflops:8.1f} GFLOP/s")
    print(f"read                  {found.read_gbs:8.1f} GB/s")
    print(f"copy (read + write)   {found.copy_gbs:8.1f} GB/s")
    print(f"in place (both ways)  {found.scale_gbs:8.1f} GB/s")
    return 0


def _compare(args, argv):
    if bool(args.git) == bool(args.before) or bool(args.before) != bool(args.after):
        raise ValueError("terrazzo bench compare: give two result files, or --git REF")
    if args.passes < 1:
        raise ValueError(f"terrazzo bench compare: --passes must be at least 1, got {args.passes}")
    with tempfile.TemporaryDirectory(prefix="terrazzo-compare-") as folder:
        before, after = (Path(folder) / f"{name}.jsonl" for name in ("before", "after")) if args.git else (args.before, args.after)
        if args.git:
            with Console(stderr=True).status("") as status:
                revision.measure(args.git, shlex.split(args.run), before, after, args.passes, on_step=status.update)
        results = compare.compare(before, after, force=args.force)
    if args.json:
        print(*(json.dumps(r) for r in results), sep="\n")
    else:
        for r in results:
            print(f"{r['verdict']:6} {r['ratio']:6.3f}×  {r['before_ms']:9.4g} → {r['after_ms']:9.4g} ms  {' '.join(r[k] for k in compare.IDENTITY)}")
        print(compare.summary(results))
    return 1 if args.fail_on and compare.fails(results, args.fail_on) else 0


def _export(args, argv):
    rows = [row for file in args.files for row in compare.read(file)[1]]
    print(export.as_csv(rows) if args.format == "csv" else export.markdown(rows), end="")
    return 0


def _tables(args, argv):
    environment, rows = compare.read(args.result)
    stale = []
    for document in map(Path, args.documents):
        text = document.read_text()
        filled = export.fill(text, environment, rows)
        if filled != text:
            stale.append(str(document))
            if not args.check:
                document.write_text(filled)
    print(*stale, sep="\n", end="\n" if stale else "")
    return 1 if args.check and stale else 0


def _report(args, argv):
    Path(args.output).write_text(page.html(args.files))
    print(args.output)
    return 0


def _roofline(args, argv):
    with Console(stderr=True).status("counting launches"):
        text = cost_model.document()
    if args.output:
        Path(args.output).write_text(text)
    print(args.output or text)
    return 0


def _scaling(args, argv):
    from . import scaling  # brings torch.distributed with it, which the other commands do without

    text = scaling.write(args.output)
    print(args.output or text)
    return 0


def _ranks(args, argv):
    from . import ranks

    if args.rounds < 1 or args.ranks < 1:
        raise ValueError(f"terrazzo bench ranks: --rounds and --ranks must be at least 1, got {args.rounds} and {args.ranks}")
    ranks.restart_asleep(argv)
    results = ranks.measure(ranks.SIZES[args.size], args.rounds, args.ranks, None if args.json else lambda result: print(result.line(), flush=True))
    if args.json:
        print(*(json.dumps(result.record()) for result in results), sep="\n")
    return 0 if all(result.passed for result in results) else 1


COMMANDS = {"run": _run, "targets": _targets, "calibrate": _calibrate, "compare": _compare, "roofline": _roofline, "report": _report, "export": _export,
            "tables": _tables, "scaling": _scaling, "ranks": _ranks}


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0] not in COMMANDS and argv[0] not in ("-h", "--help")):
        argv.insert(0, "run")
    args = parser().parse_args(argv)
    # Torch 2.13 keeps what it compiled whatever ATEN_CPU_CAPABILITY said then; run under another one, that code overruns its buffers.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():  # torch itself sets it to that
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{default_cache_dir()}_{torch.backends.cpu.get_cpu_capability().replace(' ', '')}"
    try:
        return COMMANDS[args.command](args, argv)
    except (ValueError, compare.Incomparable, revision.RevisionError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
