"""Compiles csrc/cuda with nvcc for GPUs that aren't there, and reads what became of each kernel.

    python tests/tools/nvcc.py      # writes the table of resources in csrc/cuda/README.md anew
"""
import hashlib
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

try:
    from tools import emulator
except ImportError:  # run as a script
    import emulator

ROOT = emulator.ROOT
BUILD = ROOT / "build/nvcc"
README = ROOT / "csrc/cuda/README.md"
ARCHS = ("sm_80", "sm_90a", "sm_100a")
FLAGS = ["-std=c++20", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", f"-I{ROOT / 'csrc'}"]
INSTRUCTIONS = ("HMMA", "LDSM", "LDGSTS")  # mma.sync, ldmatrix, cp.async
BEGIN, END = "<!-- resources -->", "<!-- end of resources -->"


@dataclass(frozen=True)
class Kernel:
    """One instantiation: what `cuobjdump -res-usage` says. stack holds what was spilled, and arrays that did not fit registers."""

    name: str
    registers: int
    stack: int
    shared: int


def tool(name):
    """nvcc from PATH or the toolkit; cuobjdump and nvdisasm from the toolkit or the triton wheel."""
    places = [emulator.cuda_home() / "bin" / name]
    if name == "nvcc":
        places.append(Path(shutil.which("nvcc") or "/nowhere"))
    else:
        import triton

        places.append(Path(triton.__file__).parent / "backends/nvidia/bin" / name)
    for place in places:
        if place.is_file():
            return place
    raise emulator.CannotBuild(f"no {name} in {', '.join(map(str, places))}: set CUDA_HOME to a CUDA toolkit that has it")


def version():
    said = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", said)[1]


def compile(source, arch):
    """The cubin of one file, warnings as errors. Kept by contents, as in tests/tools/emulator.py."""
    command = [tool("nvcc"), *FLAGS, f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}", "-cubin"]
    stamp = hashlib.sha256("\0".join([emulator._headers(), version(), *map(str, command), source.read_text()]).encode()).hexdigest()[:16]
    target = BUILD / f"{source.stem}.{arch}.{stamp}.cubin"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial.cubin")
        done = subprocess.run([str(c) for c in [*command, source, "-o", partial]], capture_output=True, text=True)
        if done.returncode:
            raise emulator.CannotBuild(f"nvcc refuses {source.name} for {arch}:\n{done.stdout}{done.stderr}")
        partial.rename(target)
    return target


def kernels(cubin):
    said = subprocess.run([tool("cuobjdump"), "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    return [Kernel(_plain(name), int(reg), int(stack) + int(local), int(shared)) for name, reg, stack, shared, local in found]


def _plain(mangled):
    """The last identifier of a mangled name: _ZN8terrazzo4cuda15some_kernelIfE… -> some_kernel."""
    name, rest = "", mangled.removeprefix("_ZN").removeprefix("_Z")
    while length := re.match(r"\d+", rest):
        begin, end = length.end(), length.end() + int(length[0])
        name, rest = rest[begin:end], rest[end:]
    return name


def instructions(cubin):
    sass = subprocess.run([tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
    return Counter(name for name in re.findall(r"\b[A-Z]{4,6}\b", sass) if name in INSTRUCTIONS)


def table():
    """The rows of README.md: of each kernel the largest instantiation."""
    rows = ["| kernel | instantiations | registers " + " / ".join(ARCHS) + " | static shared memory, bytes |", "|---|---|---|---|"]
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        found = {arch: kernels(compile(source, arch)) for arch in ARCHS}
        for name in sorted({kernel.name for kernel in found[ARCHS[0]]}):
            same = {arch: [k for k in found[arch] if k.name == name] for arch in ARCHS}
            registers = " / ".join(f"{min(k.registers for k in ks)}–{max(k.registers for k in ks)}" for ks in same.values())
            rows.append(f"| `{name}` | {len(same[ARCHS[0]])} | {registers} | {max(k.shared for ks in same.values() for k in ks)} |")
    return f"nvcc {version()}:\n\n" + "\n".join(rows)


def written():
    return README.read_text().partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    text = README.read_text()
    head, _, rest = text.partition(BEGIN)
    README.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
