"""What became of every CUDA kernel: registers, shared memory, occupancy, tensor-core and asynchronous instructions, and what its accesses cost.

    PYTHONPATH=tests python -m tools.cuda_report     # `make resources`: writes docs/cuda_kernels.md anew

Registers, static shared memory and instructions are nvcc's; threads and dynamic shared memory are those of the launches that the emulator
sees; bank conflicts and sectors are counted by the PTX interpreter. No GPU is needed.
"""
import re
import subprocess
import sys
from collections import Counter

from terrazzo import kernels, native

from . import emulator, nvcc
from .emulated_ptx import Entry, demangled
from .ptx_cases import shapes_of_launches, traffic_of

PAGE = nvcc.ROOT / "docs/cuda_kernels.md"
INSTRUCTIONS = nvcc.INSTRUCTIONS

# Of a multiprocessor (CUDA C++ Programming Guide, "Compute Capabilities"): shared memory, and what the system takes of it for each block.
WARPS, BLOCKS, REGISTERS, RESERVED = 64, 32, 65536, 1024
SHARED = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024, "sm_100a": 228 * 1024}


def up_to(n, unit):
    return -(-n // unit) * unit


def resident_warps(arch, registers, shared, threads):
    """How many warps of a kernel a multiprocessor holds. Registers come by 256 a warp, warps of each quarter of it; shared memory by 128 bytes."""
    warps = -(-threads // 32)
    by_registers = REGISTERS // 4 // up_to(registers * 32, 256) * 4 // warps
    by_shared = SHARED[arch] // up_to(shared + RESERVED, 128)
    return min(WARPS // warps, BLOCKS, by_registers, by_shared) * warps


def compiled(arch):
    """{Entry: nvcc.Kernel}"""
    found = {}
    for source in nvcc.SOURCES:
        made = nvcc.kernels(nvcc.built(source), arch)
        for kernel, name in zip(made, demangled([k.mangled for k in made])):
            found[Entry(source.name, name)] = kernel
    return found


def instructions(arch):
    """{Entry: Counter of INSTRUCTIONS} in the machine code."""
    found = {}
    for source in nvcc.SOURCES:
        said = subprocess.run([nvcc.tool("cuobjdump"), "-sass", "-arch", arch, nvcc.built(source)], capture_output=True, text=True, check=True).stdout
        names, bodies = [], re.split(r"\n\s*Function : ", said)[1:]
        for body in bodies:
            names.append(body.partition("\n")[0].strip())
        for name, body in zip(demangled(names), bodies):
            found[Entry(source.name, name)] = Counter(word for word in re.findall(r"\b(?:HMMA|LDSM|LDGSTS)\b", body))
    return found


def span(values, form=str):
    low, high = min(values), max(values)
    return form(low) if form(low) == form(high) else f"{form(low)}–{form(high)}"


def resources(shapes):
    """The table of resources; shapes: {Entry: its launches}, of every entry."""
    made, sass = {arch: compiled(arch) for arch in nvcc.ARCHS}, instructions("sm_90a")
    rows = [f"| kernel | instantiations | registers {' / '.join(nvcc.ARCHS)} | threads | shared memory, bytes | warps of {WARPS}: {' / '.join(nvcc.ARCHS)} | "
            f"{', '.join(INSTRUCTIONS)} |", "|---|---|---|---|---|---|---|"]
    by_kernel = {}
    for entry in made[nvcc.ARCHS[0]]:
        by_kernel.setdefault(entry.kernel, []).append(entry)
    for kernel, entries in sorted(by_kernel.items()):
        launches = [(entry, threads, dynamic) for entry in entries for threads, dynamic in shapes[entry]]
        static = {e: made["sm_80"][e].shared for e in entries}  # of newer ones it counts what the system takes
        rows.append("| " + " | ".join([
            f"`{kernel}`", str(len(entries)), " / ".join(span([made[arch][e].registers for e in entries]) for arch in nvcc.ARCHS),
            span([threads for _, threads, _ in launches]),
            span([static[e] + dynamic for e, _, dynamic in launches]),
            " / ".join(span([resident_warps(arch, made[arch][e].registers, static[e] + dynamic, threads) for e, threads, dynamic in launches])
                       for arch in nvcc.ARCHS),
            ", ".join(span([sass[e][name] for e in entries]) for name in INSTRUCTIONS) if any(sass[e] for e in entries) else "",
        ]) + " |")
    stacks = sum(made[arch][e].stack > 0 for arch in nvcc.ARCHS for e in made[arch])
    return f"nvcc {nvcc.version()}: {len(made['sm_80'])} kernels for each of {', '.join(nvcc.ARCHS)}; {stacks} of them with a stack.\n\n" + "\n".join(rows)


def accesses(traffic):
    """The table of what accesses cost."""
    def percent(share):
        return "" if share is None else f"{share:.0%}"

    rows = ["| kernel | steps of shared memory that are conflicts | sectors asked for |", "|---|---|---|"]
    rows += [f"| `{kernel}` | {percent(of.conflict_share if of.steps else None)} | {percent(of.filled)} |" for kernel, of in sorted(traffic.items())]
    return "\n".join(rows)


def written(name):
    return PAGE.read_text().partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0].strip()


def main():
    kernels.NAMESPACES["cuda"] = emulator.NAMESPACE
    native.cuda_why_not = lambda op, names, *tensors: None
    loaded = emulator.load()
    for name, make in (("resources", lambda: resources(shapes_of_launches(loaded))), ("accesses", lambda: accesses(traffic_of(loaded)))):
        table = make()
        head, begin, rest = PAGE.read_text().partition(f"<!-- {name} -->")
        end = f"<!-- end of {name} -->"
        PAGE.write_text(f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    try:
        main()
    except emulator.CannotBuild as error:
        sys.exit(str(error))
