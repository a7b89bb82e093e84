"""Builds the package with its CUDA kernels for GPUs that aren't there, and reads what became of each kernel.

    python tests/tools/nvcc.py    # into build/cuda/lib, and says what that took

setup.py does the compiling, once for the package and for these tests; the objects of the CPU kernels are those of the package in place.
"""
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

try:
    from tools import emulator
except ImportError:  # run as a script
    import emulator

ROOT = emulator.ROOT
BUILD = ROOT / "build/nvcc"
LIBRARY = ROOT / "build/cuda/lib"  # to be put on PYTHONPATH
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90a", "sm_100a")  # setup.py's own choice
FLAGS = ["-std=c++20", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", f"-I{ROOT / 'csrc'}"]
INSTRUCTIONS = ("HMMA", "LDSM", "LDGSTS")  # mma.sync, ldmatrix, cp.async


@dataclass(frozen=True)
class Kernel:
    """One instantiation: what `cuobjdump -res-usage` says. stack holds what was spilled, and arrays that did not fit registers."""

    mangled: str
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


@functools.cache
def build():
    """Builds the package with its CUDA kernels; returns the folder of the objects."""
    # any torch will do: what is compiled does not depend on it
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TERRAZZO_", "PYTHONPATH"))}
    environment |= {"TERRAZZO_WITH_CPU": "1", "TERRAZZO_WITH_CUDA": "1", "CUDA_HOME": str(emulator.cuda_home())}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", "build", "--build-lib", LIBRARY.relative_to(ROOT)]
    LIBRARY.mkdir(parents=True, exist_ok=True)
    with open(LIBRARY.parent / "lock", "w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise emulator.CannotBuild(f"TERRAZZO_WITH_CUDA=1 python setup.py build:\n{done.stdout}{done.stderr}")
    (objects,) = {path.parent for path in (ROOT / "build").glob("temp*/*.cuda.o")}
    return objects


def built(source):
    """The object of a file of csrc/cuda: machine code for every architecture."""
    return build() / f"{source.stem}.cuda.o"


def seconds():
    """{file: how long nvcc took}, when it last compiled it."""
    log = re.findall(r"^(\d+)\t(\d+)\t\d+\t\S*/(\w+)\.cuda\.o\t", (build() / ".ninja_log").read_text(), re.MULTILINE)
    return {name: (int(end) - int(begin)) / 1000 for begin, end, name in log if (ROOT / f"csrc/cuda/{name}.cu").is_file()}


def compile(source, arch):
    """The cubin of a file of the tests, warnings as errors. Kept by contents, as in tests/tools/emulator.py."""
    return _made(source, [tool("nvcc"), *FLAGS, f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}", "-cubin"], f"{arch}.cubin")


def _made(source, command, kind):
    """The file that nvcc makes of a source, made once of the same contents."""
    stamp = hashlib.sha256("\0".join([emulator._headers(), version(), *map(str, command), source.read_text()]).encode()).hexdigest()[:16]
    target = BUILD / f"{source.stem}.{stamp}.{kind}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = BUILD / f"{source.stem}.{stamp}.{os.getpid()}.{kind}"  # tests run in several processes
        done = subprocess.run([str(c) for c in [*command, source, "-o", partial]], capture_output=True, text=True)
        if done.returncode:
            raise emulator.CannotBuild(f"nvcc refuses {source.name} ({kind}):\n{done.stdout}{done.stderr}")
        partial.rename(target)
    return target


@functools.cache
def ptx(source):
    """The PTX for sm_80 of a file of csrc/cuda, with source lines. Kept by contents."""
    command = [tool("nvcc"), *FLAGS, "-arch=compute_80", "-ptx", "-lineinfo"]
    return _made(source, command, "ptx").read_text()


def kernels(binary, arch):
    """Every kernel for an architecture in a cubin or an object."""
    said = subprocess.run([tool("cuobjdump"), "-res-usage", "-arch", arch, binary], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    return [Kernel(name, int(reg), int(stack) + int(local), int(shared)) for name, reg, stack, shared, local in found]


def instructions(cubin):
    sass = subprocess.run([tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
    return Counter(name for name in re.findall(r"\b[A-Z]{4,6}\b", sass) if name in INSTRUCTIONS)


def main():
    build()
    times, extension = seconds(), LIBRARY / "terrazzo/_C.abi3.so"
    slowest = ", ".join(f"{name} {took:.0f} s" for name, took in sorted(times.items(), key=lambda item: -item[1])[:3])
    print(f"{extension.relative_to(ROOT)}: {extension.stat().st_size / 1e6:.1f} MB; nvcc took {sum(times.values()):.0f} s for {len(times)} files ({slowest})")


if __name__ == "__main__":
    try:
        main()
    except emulator.CannotBuild as error:
        sys.exit(str(error))
