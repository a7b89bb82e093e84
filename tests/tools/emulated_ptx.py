"""The CUDA kernels' PTX, run: what nvcc makes of csrc/cuda for sm_80 takes the place of the emulator's fibers, launch by launch.

    with running_ptx(emulator) as launched:
        y = terrazzo.rmsnorm_gated(x, weight, backend="cuda")      # launchers and glue of the emulator, kernels of nvcc
    launched                                                       # every Entry that ran

The emulator's library holds the same instantiations as functions of g++: the address it launches gives their name and source file.
"""
import ctypes
import functools
import re
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from . import nvcc
from .ptx_interpreter import Traffic, launch


@dataclass(frozen=True)
class Entry:
    source: str  # "moe_permute.cu": kernels of a header have the same name in several
    name: str    # demangled

    @property
    def kernel(self):
        return re.search(r"\w+_kernel", self.name)[0]

    @property
    def dtype(self):
        """The first argument of the template, where that is a dtype."""
        found = re.search(r"_kernel<(float|__nv_bfloat16|__half)\b", self.name)
        return found and found[1]


def demangled(names):
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return said.splitlines()


@functools.cache
def entries_of(source):
    """{Entry: its name in the PTX} of a file of csrc/cuda."""
    mangled = re.findall(r"\.entry ([\w$]+)", nvcc.ptx(source))
    return {Entry(source.name, name): entry for name, entry in zip(demangled(mangled), mangled)}


@functools.cache
def _functions(library):
    """{address in a library of the emulator: Entry} of the functions of its .cu files, and the address of emulator_launches."""
    said = subprocess.run(["readelf", "--symbols", "--wide", library], capture_output=True, text=True, check=True).stdout
    symbols, file, base = {}, "", None
    for line in said.splitlines():
        fields = line.split()
        if len(fields) < 7 or fields[3] not in ("FILE", "FUNC"):
            continue
        name = fields[7] if len(fields) > 7 else ""
        if fields[3] == "FILE":
            file = name
        elif name == "emulator_launches":
            base = int(fields[1], 16)
        elif file.endswith(".cu") and "_kernel" in name:
            symbols[int(fields[1], 16)] = file, name
    names = demangled([name for _, name in symbols.values()])
    return {address: Entry(file, name) for (address, (file, _)), name in zip(symbols.items(), names)}, base


class _Value(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


class _Launch(ctypes.Structure):
    """emu::Launch."""

    _fields_ = [("kernel", ctypes.c_void_p), ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("dynamic_shared", ctypes.c_uint64),
                ("count", ctypes.c_uint64), ("values", ctypes.POINTER(_Value))]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))
RAN, FAILED, RUN_HERE = range(3)  # the emulator's Answer


@contextmanager
def _asked(emulator, answer):
    """The emulator asks answer(entry, launch) before each launch; what it raises is raised where the launch came from."""
    table, offset = _functions(emulator.functions._name)
    base = ctypes.cast(emulator.functions.emulator_launches, ctypes.c_void_p).value - offset
    faults = []

    def ask(launched):
        try:
            return answer(table[launched.contents.kernel - base], launched.contents)
        except Exception as error:  # it cannot pass through the kernels' C++
            faults.append(error)
            return FAILED

    callback = _CALLBACK(ask)
    emulator.functions.emulator_run_elsewhere(callback)
    try:
        yield
    except RuntimeError:
        if faults:
            raise faults[0] from None
        raise
    finally:
        emulator.functions.emulator_run_elsewhere(None)


@contextmanager
def noting(emulator):
    """Gives {Entry: {(threads of a block, bytes of dynamic shared memory), …}} of every launch; the fibers run it."""
    shapes = {}

    def note(entry, it):
        shapes.setdefault(entry, set()).add((it.block[0] * it.block[1] * it.block[2], it.dynamic_shared))
        return RUN_HERE

    with _asked(emulator, note):
        yield shapes


@contextmanager
def running_ptx(emulator, traffic=None):
    """Gives a list of the Entry of every launch, whose PTX runs. A kernel may touch the tensors that are made inside, and no others.
    traffic: {kernel: Traffic}, what each one's accesses cost is counted there."""
    functions, launched = emulator.functions, []

    def run(entry, it):
        source = nvcc.ROOT / "csrc/cuda" / entry.source
        values = [ctypes.string_at(v.data, v.bytes) for v in it.values[:it.count]]
        launched.append(entry)
        launch(nvcc.ptx(source), entries_of(source)[entry], tuple(it.grid), tuple(it.block), values, it.dynamic_shared, regions=_tensors(functions),
               traffic=None if traffic is None else traffic.setdefault(entry.kernel, Traffic()))
        return RAN

    functions.emulator_record_allocations(1)
    try:
        with _asked(emulator, run):
            yield launched
    finally:
        functions.emulator_record_allocations(0)


def _tensors(functions):
    """(address, bytes) of the tensors that torch has made."""
    count, room = functions.emulator_allocations(None, 0), 0
    while count > room:
        room = count
        found = np.zeros((room, 2), np.uint64)
        count = functions.emulator_allocations(found.ctypes.data_as(ctypes.c_void_p), room)
    return [(int(address), int(size)) for address, size in found[:count]]
