"""Compiles every Triton kernel for every target, and says what the compilers made of it: `make aot`.

    python -m tools.triton_aot [OP …] [--arch sm80,sm90] [--dtype bf16] [--write docs/triton_kernels.md]

The kernels are compiled through their launchers at the sizes of real models (triton_launches.py), with every row of their tables
of configurations that serves there. Offenders are listed and end it with 1: spilled registers; tl.dot of 16-bit numbers
without a tensor-core instruction; more shared memory than the device has; an address from a product of 32 bits; a row that no
call reaches; whatever does not compile.
"""
import argparse
import multiprocessing
import re
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import terrazzo
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from terrazzo.bench import cost_model
from terrazzo.triton_kernels import configs, library, runtime

from .triton_compile import TARGETS, compiling, resources
from .triton_launches import LAUNCHES
from .ttir import narrow_offsets

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORES = {"HMMA", "HGMMA", "UTCHMMA", "MFMA"}
DOT_OF_16_BITS = re.compile(r"tt\.dot\b.*: tensor<\S*x(bf16|f16)> \* tensor<\S*x(bf16|f16)>")
INDICES = {  # kernel -> a variable, product of two numbers, that numbers what a dimension holds, or whose launcher sees to its size
    "chunk_scan_states_kernel": ("first",),    # chunks
    "chunk_scan_bwd_x_kernel": ("offs_D",),
    "chunk_scan_bwd_bc_kernel": ("first",),    # heads
    "rmsnorm_gated_fwd_kernel": ("offs_d",),   # channels
    "rmsnorm_gated_bwd_kernel": ("offs_d",),
}
DOC = Path(__file__).parents[2] / "docs/triton_kernels.md"


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: what it was compiled for, and what came out."""

    op: str
    name: str
    dtype: str
    arch: str
    config: str    # see config_of
    call: str      # the first call that led to it
    key: str       # Triton's own hash of source, target and options
    registers: int
    spills: int
    shared: int    # bytes
    instructions: dict
    dots: bool     # tl.dot of 16-bit operands
    narrow: tuple  # products of 32 bits that addresses come of
    seconds: float

    def offences(self):
        """Why it is refused: nothing, usually."""
        where = f"{self.name} {self.dtype} {self.arch} ({self.config}; {self.op}, {self.call})"
        found = []
        if self.spills:
            found.append(f"{where}: spills {self.spills}")
        if self.shared > runtime.SHARED_KIB[self.arch] * 1024:
            found.append(f"{where}: {self.shared / 1024:.0f} KiB of shared memory, {self.arch} has {runtime.SHARED_KIB[self.arch]}")
        if self.dots and not TENSOR_CORES & set(self.instructions):
            found.append(f"{where}: tl.dot of 16-bit operands without a tensor-core instruction")
        if self.narrow:
            found.append(f"{where}: addresses come of products of 32 bits: {'; '.join(self.narrow)}")
        return found


@dataclass
class Result:
    """Of one op, dtype and architecture: kernels, rows of the tables that were used, and what went wrong."""

    kernels: list = field(default_factory=list)
    rows: set = field(default_factory=set)  # (table, row number)
    errors: list = field(default_factory=list)


def has_triton(op):
    return "triton" in terrazzo.dispatch.OPS[op].limits


def missing():
    """Ops with a Triton backend and no call to compile them with."""
    return [op for op in terrazzo.dispatch.OPS if has_triton(op) and not LAUNCHES.get(op)]


def config_of(launch):
    """Block sizes and whatever else the tables choose, warps and stages; not what the call is about, such as HAS_BIAS."""
    chosen = {name for table in configs.TABLES.values() for row in table.rows for name in row.blocks}
    blocks = [f"{name}={value}" for name, value in launch.arguments.items() if name in chosen or (name.startswith("BLOCK") and type(value) is int)]
    stages = [f"{launch.options['num_stages']} stages"] if "num_stages" in launch.options else []
    return " ".join([*blocks, f"{launch.compiled.metadata.num_warps} warps", *stages])


def _run_rows(call, op, dtype, result, every_row):
    """The call with the rows that its tables pick, then again while it can be served by a row that was not compiled yet."""
    again, first = True, True
    while again:
        again = False

        def choose(table, rows, first=first):
            nonlocal again
            serving = [table.rows.index(row) for row in rows]
            new = [i for i in serving if (table.kernel, i) not in result.rows]
            chosen = serving[0] if first or not new else new[0]
            result.rows.add((table.kernel, chosen))
            again |= every_row and any(i != chosen for i in new)
            return table.rows[chosen]

        with configs.choosing(choose):
            call.run(op, dtype)
        first = False


def quick_calls(op):
    """The calls of an op that launch, between them, each of its kernels."""
    found, seen = [], set()
    for call in LAUNCHES[op]:
        names = []
        with cost_model.counting(names):
            call.run(op, torch.bfloat16)
        if not seen.issuperset(names):
            found.append(call)
            seen.update(names)
    return found


def serving_rows(op, dtype, arch):
    """(table, row number) of every row that serves a call of the op; nothing is compiled."""
    found = set()

    def choose(table, rows):
        serving = [table.rows.index(row) for row in rows]
        found.update((table.kernel, i) for i in serving)
        return table.rows[serving[0]]

    for call in LAUNCHES[op]:
        with configs.choosing(choose), cost_model.counting([], arch):
            call.run(op, DTYPES[dtype])
    return found


def examine(op, dtype, arch, calls=None, every_row=True):
    """Compiles these calls of one op, all by default -> Result."""
    result, seen = Result(), {}

    def on_launch(launch):
        key = launch.compiled.hash
        if key not in seen:
            ttir = launch.compiled.asm["ttir"]
            seen[key] = Kernel(op, launch.kernel, dtype, arch, config_of(launch), call.name, key, dots=bool(DOT_OF_16_BITS.search(ttir)),
                               narrow=tuple(narrow_offsets(ttir, INDICES.get(launch.kernel, ()))), seconds=launch.seconds, **resources(launch, arch))

    for call in LAUNCHES[op] if calls is None else calls:
        try:
            with compiling(arch, on_launch):
                _run_rows(call, op, DTYPES[dtype], result, every_row)
        except Exception as error:  # the compiler's errors are of many kinds; the next call is compiled all the same
            place = traceback.extract_tb(error.__traceback__)[-1]
            line = next(iter(str(error).strip().splitlines()), "")
            result.errors.append(f"{op} {dtype} {arch}, {call.name}: {type(error).__name__}: {line} ({Path(place.filename).name}:{place.lineno})")
    result.kernels = list(seen.values())
    return result


def unreached(rows):
    """Rows of tables that no call was compiled with; `rows` holds what all ops, dtypes and architectures used."""
    return [f"{kernel}: row {i} ({row}) serves none of the calls in triton_launches.py"
            for kernel, table in configs.TABLES.items() for i, row in enumerate(table.rows) if (kernel, i) not in rows]


def examine_all(ops, dtypes, archs, jobs, console):
    """Result of everything, in `jobs` processes."""
    work = [(op, dtype, arch) for op in ops for dtype in dtypes for arch in archs]
    total = Result()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, \
            ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:  # fmt: skip
        bar = progress.add_task("compiling", total=len(work))
        futures = {pool.submit(examine, *unit): unit for unit in work}
        found = {}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            progress.update(bar, advance=1, description=" ".join(futures[future]))
    for unit in work:  # in the same order every time
        total.kernels += found[unit].kernels
        total.rows |= found[unit].rows
        total.errors += found[unit].errors
    return total


# ---- the document ------------------------------------------------------------------------------------------

HEAD = """# Triton kernels as compiled

Triton {triton}: kernels compiled through the launchers at the sizes of Bamba-9B, DBRX, Mixtral, BLT-1B and a few others
([tests/tools/triton_launches.py](../tests/tools/triton_launches.py)), with every row of their tables that serves. No GPU was used: these
are the compilers' own numbers. `make aot` compiles all dtypes for all targets, fails on spilled registers and writes this file; here stand:
{seen}. – was not compiled, or is not served.

A cell is registers of a thread · KiB of shared memory · tensor-core, asynchronous-copy and matrix-load instructions; where several
calls lead to the same configuration, the largest of each. `any`: the kernel takes no floating-point tensor, or only float32 ones.

## Under torch.compile
What AOTAutograd traces of `rmsnorm_gated`, `causal_conv1d_fn`, `causal_conv1d_update` and `selective_state_update`, backward included, is the
launches of their kernels, as with `torch.library.triton_op`: inductor can launch them itself and plan their outputs. (Seen in the graphs before
inductor, with fake tensors; inductor's code for them has not been seen, nor run.) `triton_op` itself takes schemas from
annotations and imports triton when it is defined, so the same rule is registered on our schemas (triton_kernels/library.py). The configuration
is chosen while tracing, from the tables even where tuning is on; alignment is then inductor's to find. `terrazzo.counters()` does not
count launches from within such a graph. Exported programs keep the op, as torch does with its own. The other ops stay whole: their time is in
matrix products, sorting or attention; opening them has not been tried.

## Addresses, CUDA graphs
Offsets are int64: `make aot` also reads each kernel's IR ([tests/tools/ttir.py](../tests/tools/ttir.py)) and refuses an address that comes of a 32-bit
product of two numbers, unless a block's size bounds one of them. (It lets through what only numbers chunks, heads or channels, and
the channels of the scan's D, whose launcher sees to their size: INDICES in tests/tools/triton_aot.py.)

Launchers wait for nothing: a test runs every one of them, backward included, on tensors without contents, where reading a number is an error
(tests/triton/test_fake.py), so calls can be captured in a CUDA graph once a first call has compiled them. Not `gmm`, which takes sizes
on the host; patch lengths only with `max_patches`. With tuning on, what was not tuned before the capture takes the row of the table. No graph
has been captured so far, for want of a GPU.

## Tensor descriptors, warp specialisation
`grouped_gemm_fwd_kernel`, which `grouped_mm`, `gmm`, `linear` and the second product of `fused_experts` share, reads large tiles on sm_90 and
sm_100 through descriptors made on the host (TMA=True below, UTMALDG); the row with pointers beside it says what that saves. Its numerics are seen in
Triton's interpreter (tests/triton/test_numerics_moe.py); our PTX interpreter runs sm_80's code, which has none. Operands whose rows are not
multiples of 16 bytes, gathered rows (the first product of `fused_experts`) and weight gradients, whose sums must stop at a group's end, keep pointers.

Warp specialisation (`tl.range(…, warp_specialize=True)`) of the same kernel is not used. For sm_100 Triton 3.9.0 compiles it without spills (the
loop over K: 168 registers with tiles of 128 x 256 and 8 warps, 255 with 128 x 128 and 4). For sm_90 it changes nothing with 8 warps, and with 4
its pass breaks off ("Other parent ops are not supported"). No interpreter at hand runs the hand-over between warps: nothing would have checked it.
"""
CONFIGURATIONS = """
## Configurations
Tile sizes come from these tables, read top down: the first row whose conditions hold for the device, the size of an element and the sizes of
the call. `TERRAZZO_TRITON_AUTOTUNE=1` times a table's rows for the device and the element instead, once for each new size; nothing else is ever timed.

| table | where | tiles | warps | stages |
|---|---|---|---|---|"""
LIMITS = "Shared memory of a block, KiB: {limits}."


def _cell(kernels):
    if not kernels:
        return "–"
    registers, shared = max(k.registers for k in kernels), max(k.shared for k in kernels)
    spills = max(k.spills for k in kernels)
    names = sorted(set().union(*(k.instructions for k in kernels)))
    return " · ".join([f"{registers}" + (f" (spills {spills})" if spills else ""), f"{shared / 1024:.0f}", *([" ".join(names)] if names else [])])


def _where(row):
    """The conditions of a row of a table."""
    found = ["/".join(row.arch)] if row.arch else []
    found += {2: ["16 bits"], 4: ["32 bits"], None: []}[row.itemsize]
    found += [f"{name} ≤ {bound}" if bound else f"{name} = 0" for name, bound in row.up_to.items()]
    return ", ".join(found) or "everything else"


def configurations():
    """The lines of the section that shows every table of configurations."""
    for family in library.SCHEMAS:
        runtime.load(family)
    lines = CONFIGURATIONS.splitlines()
    for name in sorted(configs.TABLES):
        for i, row in enumerate(configs.TABLES[name].rows):
            tiles = " ".join(f"{key}={value}" for key, value in row.blocks.items())
            lines.append(f"| {'' if i else name} | {_where(row)} | {tiles} | {row.num_warps} | {row.num_stages} |")
    return lines


def document(kernels, archs):
    """The text of docs/triton_kernels.md."""
    import triton

    shown = {}  # (kernel, config) -> dtype -> arch -> [Kernel]
    for k in kernels:
        shown.setdefault(k.name, {}).setdefault(k.config, {}).setdefault(k.dtype, {}).setdefault(k.arch, []).append(k)
    compiled = {dtype: ", ".join(arch for arch in archs if any((k.dtype, k.arch) == (dtype, arch) for k in kernels)) for dtype in DTYPES}
    seen = "; ".join(f"{dtype} for {found}" for dtype, found in compiled.items() if found) + f": {len(kernels)} compilations"
    lines = [HEAD.format(triton=triton.__version__, seen=seen), LIMITS.format(limits=", ".join(f"{a} {runtime.SHARED_KIB[a]}" for a in archs))]
    lines += configurations()
    ops = {k.name: dict.fromkeys(other.op for other in kernels if other.name == k.name) for k in kernels}
    for name in sorted(shown):
        lines += ["", f"## {name}", f"Of {', '.join(ops[name])}.", ""]
        lines += [f"| configuration | dtype | {' | '.join(archs)} |", "|---" * (2 + len(archs)) + "|"]
        for config, by_dtype in shown[name].items():
            keys = [{k.key for found in by_arch.values() for k in found} for by_arch in by_dtype.values()]
            if len(keys) > 1 and all(key == keys[0] for key in keys):
                by_dtype = {"any": next(iter(by_dtype.values()))}
            same = {}  # cells -> the dtypes that have them
            for dtype, by_arch in by_dtype.items():
                same.setdefault(" | ".join(_cell(by_arch.get(arch)) for arch in archs), []).append(dtype)
            lines += [f"| {config} | {', '.join(dtypes)} | {cells} |" for cells, dtypes in same.items()]
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="triton_aot", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP")
    parser.add_argument("--arch", default=",".join(TARGETS))
    parser.add_argument("--dtype", default=",".join(DTYPES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"write the table there (make aot: {DOC.name})")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    ops, archs, dtypes = args.ops or [op for op in LAUNCHES if has_triton(op)], args.arch.split(","), args.dtype.split(",")
    result = examine_all(ops, dtypes, archs, args.jobs, console)
    whole = not args.ops and archs == list(TARGETS) and dtypes == list(DTYPES)
    offenders = [line for k in result.kernels for line in k.offences()] + result.errors
    if whole:
        offenders += [f"{op} has a triton backend and no call in triton_launches.py" for op in missing()] + unreached(result.rows)
    if args.write:
        args.write.write_text(document(result.kernels, archs))
        console.print(f"wrote {args.write}", highlight=False)
    slowest = sorted(result.kernels, key=lambda k: -k.seconds)[:5]
    slowest = ", ".join(f"{k.name} {k.dtype} {k.arch} {k.seconds:.1f} s" for k in slowest)
    console.print(f"{len(result.kernels)} kernels; slowest to compile: {slowest}", highlight=False)
    for line in offenders:
        console.print(line, style="red", highlight=False, soft_wrap=True)
    console.print(f"{len(offenders)} offenders" if offenders else "no offenders", highlight=False)
    return 1 if offenders else 0


if __name__ == "__main__":
    raise SystemExit(main())
