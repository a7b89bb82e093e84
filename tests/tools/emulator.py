"""Builds what the CUDA tests need from csrc/cuda with g++ and csrc/emulator: the op library, or a program of one test file.

Objects lie in build/emulator, named by the contents they were made from: an edit rebuilds what it touches. `mode` chooses what
the kernels are compiled with: "plain"; "sanitize", the address and undefined-behaviour sanitizers (for the library Python must be
started under them, see `make emulated`); "races", the emulator's race detector. The emulator itself is always built plain.
"""
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from terrazzo import dispatch, kernels
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/emulator"
NAMESPACE = "terrazzo_emulated"
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined"]
MODES = {
    "plain": [],
    "sanitize": ["-O1", *SANITIZERS, "-fno-sanitize-recover=all"],
    "races": ["-O1", "-fsanitize=thread"],  # compiled, not linked: csrc/emulator/races.cpp answers
}
RUNTIME = [ROOT / "csrc/emulator" / name for name in ("runtime.cpp", "fiber.cpp", "races.cpp")]
CUDA_OPS = tuple(re.findall(r"\bX\((\w+)\)", (ROOT / "csrc/cuda/ops.h").read_text()))
SERVED = tuple(op.name for op in dispatch.OPS.values() if set(op.ops) <= set(CUDA_OPS))  # public functions
ORDERS = {"forward": 0, "reversed": 1, "random": 2}


class CannotBuild(RuntimeError):
    """The tests of the CUDA kernels need a compiler and CUDA's headers."""


@functools.cache
def _setup():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("terrazzo_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuda_home():
    """The CUDA toolkit, where setup.py looks for it."""
    home = _setup().cuda_home(headers_alone=True)
    if home is None:
        raise CannotBuild(f"no CUDA headers in {os.environ.get('CUDA_HOME') or 'CUDA_PATH, around nvcc on PATH or below /usr/local'}: set CUDA_HOME to a CUDA "
                          "toolkit. The tests in tests/cuda run the CUDA kernels on the CPU and need its headers (no GPU, no driver)")
    return home


def compiler():
    found = shutil.which(os.environ.get("CXX", "g++"))
    if not found:
        raise CannotBuild(f"{os.environ.get('CXX', 'g++')} is not on PATH: the tests in tests/cuda compile the CUDA kernels for the CPU with g++")
    return found


def _run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"{' '.join(str(c) for c in command)}\n{done.stderr}")


@functools.cache
def _headers():
    """Fingerprint of everything a source may include."""
    digest = hashlib.sha256(subprocess.run([compiler(), "--version"], capture_output=True).stdout)
    digest.update(f"{cuda_home()} {torch.__version__}".encode())
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _object(source, flags):
    command = [compiler(), *FLAGS, *flags, f"-I{ROOT / 'csrc'}", f"-isystem{cuda_home() / 'include'}"]
    name = hashlib.sha256("\0".join([_headers(), *command, source.read_text()]).encode()).hexdigest()[:16]
    target = BUILD / f"{source.stem}.{name}.o"
    if not target.exists():
        partial = target.with_suffix(".partial")
        _run([*command, "-x", "c++", "-c", source, "-o", partial])
        partial.rename(target)
    return target


def _link(name, objects, options):
    stamp = hashlib.sha256("\0".join(map(str, [*objects, *options])).encode()).hexdigest()[:16]
    target = BUILD / f"{name}.{stamp}"
    if not target.exists():
        partial = target.with_suffix(".partial")
        _run([compiler(), *objects, "-o", partial, *options])
        partial.rename(target)
    return target


def _building():
    """A lock: tests run in several processes."""
    BUILD.mkdir(parents=True, exist_ok=True)
    lock = open(BUILD / "lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def program(source, mode):
    """The path of an executable made of one test file."""
    with _building():
        objects = [_object(path, []) for path in RUNTIME] + [_object(source, MODES[mode])]
        return _link(f"{source.stem}.{mode}", objects, SANITIZERS if mode == "sanitize" else [])


@functools.cache
def load(mode="plain"):
    """Loads torch.ops.terrazzo_emulated: every op that has CUDA kernels, emulated, on CPU tensors. Once a process, in one mode."""
    with_torch = [*(f"-isystem{path}" for path in include_paths()), f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    glue = ["-fno-strict-aliasing", "-DTZ_CUDA_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000", *with_torch]
    with _building():
        objects = [_object(path, []) for path in [*RUNTIME, ROOT / "csrc/common/parallel.cpp"]]
        objects += [_object(path, MODES[mode]) for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
        bindings = [path for path in sorted((ROOT / "csrc/bindings").glob("*.cpp")) if path.stem == "glue" or "TZ_RUN_WHERE" in path.read_text()]
        objects += [_object(path, glue) for path in [*bindings, ROOT / "csrc/emulator/library.cpp"]]
        objects.append(_object(ROOT / "csrc/emulator/allocations.cpp", with_torch))
        path = _link(f"library.{mode}.so", objects, ["-shared", *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ltorch", "-lc10", *(SANITIZERS if mode == "sanitize" else [])])
    library = torch.library.Library(NAMESPACE, "DEF")
    for name in CUDA_OPS:
        schema = getattr(torch.ops.terrazzo, name).default._schema
        library.define(str(schema).removeprefix("terrazzo::"))
    torch.ops.load_library(str(path))
    kernels.register_namespace(NAMESPACE, CUDA_OPS)
    return Emulator(library, ctypes.CDLL(str(path)), mode)


class Emulator:
    """The loaded library: its ops, the order it runs threads in, how many kernels it has launched."""

    def __init__(self, library, functions, mode):
        self.library = library  # torch forgets a library that nobody holds
        self.functions = functions
        functions.emulator_launches.restype = ctypes.c_int64
        functions.emulator_allocations.restype = ctypes.c_size_t
        if (mode == "races") != bool(functions.emulator_detects_races()):
            raise CannotBuild(f"{mode}: the race detector is {'off' if mode == 'races' else 'on'}")

    def order(self, name, seed=1):
        self.functions.emulator_order(ORDERS[name], ctypes.c_uint64(seed))

    def poison(self, on):
        self.functions.emulator_poison(int(on))

    @property
    def launches(self):
        return self.functions.emulator_launches()
