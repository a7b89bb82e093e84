"""The `terrazzo` command: info, doctor, why, patch, patches, generate, bench, demo."""
import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

import terrazzo

from . import dispatch, native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DTYPE_NAMES = DTYPES | {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
PACKAGES = ("torch", "triton", "transformers", "causal-conv1d", "mamba-ssm", "flash-attn")


def _console():
    return Console(width=None if sys.stdout.isatty() else 120)


def _table(title, *columns):
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _support():
    """{op: {backend: {dtype: None | reason}}} as can_run answers on this machine."""
    from .explain import CALLS, arguments, tensors_at_choice

    found = {}
    for op in CALLS:
        for name, dtype in DTYPES.items():
            for device in dict.fromkeys(map(_device_of, dispatch.BACKENDS)):
                with torch.no_grad():
                    tensors = tensors_at_choice(op, arguments(op, dtype, device=device))
                for backend in dispatch.BACKENDS:
                    if _device_of(backend) == device:
                        found.setdefault(op, {}).setdefault(backend, {})[name] = dispatch.can_run(op, backend, *tensors)
    return found


def _device_of(backend):
    """Where a backend's tensors lie on this machine."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def _cuda_words(facts):
    if facts is None:
        return "not in this build"
    archs = ", ".join(f"PTX of {arch}" if arch.startswith("compute") else arch for arch in facts["built for"])
    driver = f"this machine's driver runs CUDA {facts['driver']}" if facts["driver"] else "no driver on this machine"
    gpus = [f"; {gpu['name']}, {gpu['capability']}: {gpu['why not'] or 'can run them'}" for gpu in facts["gpus"]]
    return f"{archs} (CUDA {facts['toolkit']}; {driver}){''.join(gpus)}"


def _info(args):
    facts = {
        "terrazzo": terrazzo.__version__,
        "native extension": "available" if native.available else native.why_not,
        "cpu kernels": native.isa(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda kernels": native.cuda_facts(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("TERRAZZO_")},
    }
    if args.support:
        facts["support"] = _support()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    console, table = _console(), _table(None, "", "")
    for name, value in facts.items():
        if name in ("packages", "environment"):
            for key, text in value.items():
                table.add_row(key, text or "[dim]not installed[/]")
        elif name == "cuda kernels":
            table.add_row(name, _cuda_words(value))
        elif name != "support" and name != "terrazzo":
            table.add_row(name, "none" if value is None else str(value))
    console.print(f"terrazzo {facts['terrazzo']}", highlight=False)
    console.print(table)
    if args.support:
        matrix = _table("what each backend can run here", "op", *dispatch.BACKENDS)
        reasons = {}
        for op, backends in facts["support"].items():
            cells = []
            for per_dtype in backends.values():
                refused = {name: why for name, why in per_dtype.items() if why}
                able = ", ".join(name for name in per_dtype if name not in refused)
                for why in refused.values():
                    reasons.setdefault(why, len(reasons) + 1)
                numbers = ",".join(str(index) for why, index in reasons.items() if why in refused.values())
                cells.append("yes" if not refused else f"{able or 'no'} [dim]({numbers})[/]")
            matrix.add_row(op, *cells)
        console.print(matrix)
        for why, index in reasons.items():
            console.print(f"[dim]({index}) {why}[/]", highlight=False)
    return 0


def _doctor(args):
    from .cases import CASES

    backends = args.backend.split(",") if args.backend else [b for b in dispatch.BACKENDS if b != "reference"]
    dtypes = args.dtype.split(",") if args.dtype else ["float32", "bfloat16"]
    unknown = [f"backend {b!r}" for b in backends if b not in dispatch.BACKENDS] + [f"dtype {d!r}" for d in dtypes if d not in DTYPE_NAMES]
    if unknown:
        raise ValueError(f"terrazzo doctor: unknown {unknown[0]}; backends: {', '.join(dispatch.BACKENDS)}; dtypes: {', '.join(DTYPE_NAMES)}")
    jobs = [(case, backend, dtype) for case in CASES for backend in backends for dtype in dtypes]
    results = {}
    for case, backend, dtype in track(jobs, "checking", console=Console(stderr=True), transient=True, disable=args.json):
        entry = results.setdefault((case.op, backend, dtype), {"cases": 0, "failed": [], "rel": 0.0, "ms": 0.0, "skipped": None})
        if entry["skipped"] is None:
            _examine(case, backend, DTYPE_NAMES[dtype], entry)
    rows = [{"op": op, "backend": backend, "dtype": dtype, **entry} for (op, backend, dtype), entry in results.items()]
    bad = [row for row in rows if row["failed"]]
    if args.json:
        print(json.dumps({"ok": not bad, "rows": rows}, indent=2))
        return 1 if bad else 0
    table = _table(None, "op", "backend", "dtype", "cases", "worst error", "ms a call", "")
    for row in rows:
        if row["skipped"]:
            table.add_row(row["op"], row["backend"], row["dtype"], "", "", "", row["skipped"], style="dim")
            continue
        words = "[red]" + "; ".join(row["failed"]) + "[/]" if row["failed"] else "[green]ok[/]"
        table.add_row(row["op"], row["backend"], row["dtype"], str(row["cases"]), f"{row['rel']:.1e}", f"{row['ms'] / row['cases']:.2f}", words)
    console = _console()
    console.print(table)
    console.print(f"[red]{len(bad)} of {len(rows)} rows failed[/]" if bad else "every backend that can run here gives the reference's results")
    return 1 if bad else 0


def _examine(case, backend, dtype, entry):
    """Runs one case on one backend, forward and with gradients, and notes its error and time."""
    from .cases import clone, run, to_dtype
    from .explain import tensors_at_choice
    from .tolerance import check

    inputs, device = case.make(dtype), _device_of(backend)
    op = case.op if case.op in dispatch.OPS else "causal_conv1d_fn"  # the packed form is served by the same op
    with torch.no_grad():
        tensors = tensors_at_choice(case.op, {name: clone(value, device) for name, value in inputs.items()})
    entry["skipped"] = dispatch.can_run(op, backend, *tensors)
    if entry["skipped"] is not None:
        return
    entry["cases"] += 1
    try:
        for gradients in (False, True) if case.grads else (False,):
            start = time.perf_counter()
            found = run(case, inputs, backend, gradients, device=device)
            if not gradients:
                entry["ms"] += (time.perf_counter() - start) * 1e3
            exact = run(case, to_dtype(inputs, torch.float64), "reference", gradients)
            same = run(case, inputs, "reference", gradients)
            for name, out in found.items():
                verdict = check(out, exact[name], same[name])
                entry["rel"] = max(entry["rel"], verdict.rel)
                if not verdict.ok:
                    raise ArithmeticError(f"{name}: {verdict.why}")
    except Exception as error:  # a broken backend may raise anything: that is what this command is for
        entry["failed"].append(f"{case.name}: {error}")


def _sizes(text):
    try:
        return [int(size) for size in text.replace("x", ",").split(",")]
    except ValueError:
        raise ValueError(f"terrazzo why: --shape must be sizes such as 1,8448,2048, got {text!r}") from None


def _setting(text):
    name, _, value = text.partition("=")
    if not value.isdigit():
        raise ValueError(f"terrazzo why: --set must be NAME=NUMBER such as W=7, got {text!r}")
    return name, int(value)


def _why(args):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from .explain import CALLS, arguments, refusals, tensors_at_choice

    if args.dtype not in DTYPE_NAMES:
        raise ValueError(f"terrazzo why: unknown dtype {args.dtype!r}; choose from {', '.join(DTYPE_NAMES)}")
    names = [args.op] if args.op in CALLS else [name for name in CALLS if dispatch.OPS[name].family == args.op]
    if not names:
        raise ValueError(f"terrazzo why: unknown op {args.op!r}; ops are {', '.join(CALLS)}")
    shape = None if args.shape is None else _sizes(args.shape)
    extra = dict(_setting(text) for text in args.set)
    table = _table(None, "op", "backend", "")
    with FakeTensorMode(), torch.no_grad(), dispatch.unlogged():  # the table says what the log would
        for name in names:
            tensors = tensors_at_choice(name, arguments(name, DTYPE_NAMES[args.dtype], shape, args.device, **extra))
            chosen, reason = dispatch.pick(name, *tensors, backend=args.backend)
            for backend, why in refusals(name, tensors).items():
                text = f"[green]chosen[/]: {reason}" if backend == chosen else f"cannot run: {why}" if why else "could run"
                table.add_row(name, backend, text)
    _console().print(table)
    return 0


def _patch(args):
    from .patching import patch

    _need_transformers()
    report = patch(args.model, strict=False, dry_run=True).report()
    if not report:
        patch(args.model, dry_run=True)  # strict: says which model types there are
    if args.json:
        print(json.dumps([vars(row) for row in report], indent=2))
    else:
        print(report)
    return 0


def _need_transformers():
    if _version("transformers") is None:
        raise ImportError("terrazzo: transformers is not installed; pip install terrazzo[hf]")


def _demo(args):
    from .demo import main

    _need_transformers()
    return main(args)


def _patches(args):
    from .patches_view import main

    return main(args)


def _generate(args):
    from .generate import main

    return main(args)


def parser():
    from .generate import add_arguments as add_generate_arguments

    top = argparse.ArgumentParser(prog="terrazzo", description=terrazzo.__doc__)
    top.add_argument("--version", action="version", version=f"terrazzo {terrazzo.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="what is installed, and what each backend can run here")
    info.add_argument("--json", action="store_true")
    info.add_argument("--support", action="store_true", help="the matrix of ops, backends and dtypes")
    info.set_defaults(run=_info)

    doctor = commands.add_parser("doctor", help="run every op on every backend on small cases, check the numbers")
    doctor.add_argument("--backend", help="comma-separated; default: all but the reference")
    doctor.add_argument("--dtype", help="comma-separated; default: float32,bfloat16")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)

    why = commands.add_parser("why", help="which backend serves a call, and why not the others")
    why.add_argument("op", metavar="OP")
    why.add_argument("--shape", help="of x, such as 1,8448,2048")
    why.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER", help="another size, such as W=7, N=256, G=8")
    why.add_argument("--dtype", default="float32")
    why.add_argument("--device", default="cpu", help="need not be present")
    why.add_argument("--backend", help="as if this backend were forced")
    why.set_defaults(run=_why)

    patch = commands.add_parser("patch", help="what terrazzo.patch would replace in a Hugging Face model")
    patch.add_argument("model", metavar="MODEL_TYPE|PATH", help="such as bamba, or a directory with a config.json")
    patch.add_argument("--dry-run", action="store_true", required=True, help="a patch lives in a process: the command only reports")
    patch.add_argument("--json", action="store_true")
    patch.set_defaults(run=_patch)

    patches = commands.add_parser("patches", help="a text cut into patches where a byte model is unsure, coloured by entropy")
    patches.add_argument("source", metavar="FILE|TEXT", help="a file, or else the text itself; - reads standard input")
    patches.add_argument("--text", action="store_true", help="the argument is the text, even if a file has that name")
    patches.add_argument("--model", metavar="DIR", help="a BLT or its patcher in transformers' layout (default: the one shipped with terrazzo)")
    patches.add_argument("--mode", choices=("entropy", "space", "static", "bytes"), default="entropy", help="what decides (default entropy)")
    patches.add_argument("--threshold", type=float, metavar="NATS", help="cut above this entropy (default: the model's)")
    patches.add_argument("--threshold-add", type=float, metavar="NATS", help="and where it also rises by this")
    patches.add_argument("--monotonic", action="store_true", help="cut where the entropy rises by the threshold instead")
    patches.add_argument("--patch-size", type=float, metavar="BYTES", help="mean length to aim for, instead of a threshold (static: of all)")
    patches.add_argument("--max-patch-length", type=int, metavar="BYTES")
    patches.add_argument("--show", type=int, default=4096, metavar="BYTES", help="of the text in the terminal (default 4096; 0: statistics only)")
    patches.add_argument("--html", metavar="FILE", help="write a web page")
    patches.add_argument("--png", metavar="FILE", help="write a picture")
    patches.add_argument("--json", action="store_true", help="starts, lengths, entropies and statistics for machines")
    patches.set_defaults(run=_patches)

    generate = commands.add_parser("generate", help="text from a checkpoint or a shipped model, streamed; a chat with Blenderbot")
    add_generate_arguments(generate)
    generate.set_defaults(run=_generate)

    demo = commands.add_parser("demo", help="a Hugging Face Bamba on real text, as it is and patched, side by side")
    demo.add_argument("--bytes", type=int, default=4096, help="length of the prompt (default 4096)")
    demo.add_argument("--new-tokens", type=int, default=64, help="tokens generated after the prompt (default 64)")
    demo.add_argument("--train-bytes", type=int, default=512, help="length of the training step (default 512)")
    demo.add_argument("--text", metavar="FILE", help="another text (default: the one shipped with terrazzo)")
    demo.add_argument("--out", default="results", help="directory for the chart and the JSON report (default results)")
    demo.add_argument("--json", action="store_true")
    demo.set_defaults(run=_demo)

    commands.add_parser("bench", help="the benchmark suite: see terrazzo bench --help", add_help=False)
    return top


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"]:
        from .bench.__main__ import main as bench

        return bench(argv[1:])
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, ImportError, OSError, terrazzo.BackendError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
