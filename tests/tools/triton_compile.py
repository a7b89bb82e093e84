"""Compiles Triton kernels for GPUs that aren't there, through the launchers themselves.

    with compiling("sm90", seen):
        terrazzo.rmsnorm_gated(x, weight, backend="triton")     # CPU tensors; nothing is run, outputs stay unwritten

Inside the block every launch compiles its kernel as Triton would on that device, same specialisation, same options, and
hands it to `seen(Launch)` in the place of running it. Tensors are only looked at for dtype and alignment.
"""
import json
import re
import subprocess
import tempfile
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton
from terrazzo.triton_kernels import runtime
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
WORTH_LOOKING = re.compile(r"mma|cp\.async|ldmatrix|tcgen05")  # in PTX: else there is none of INSTRUCTIONS, and disassembling takes a second
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "LDSM")
KEPT = f"resources.{zlib.crc32(Path(__file__).read_bytes()):08x}.json"  # of this version, beside the kernel in Triton's cache


@dataclass(frozen=True)
class Launch:
    """One launch that was compiled: the kernel's name, what Triton made of it, and what it was called with."""

    kernel: str
    compiled: object  # triton's CompiledKernel: .asm, .metadata
    grid: tuple
    arguments: dict  # name -> value, constexprs included
    options: dict  # num_warps, num_stages, …
    seconds: float  # that compiling took; little where Triton's cache had it


class _Driver:
    """Stands for the driver of one target; the caches of JITFunction are kept by device, so the device is the target."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return TARGETS[self.arch]

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0


@contextmanager
def compiling(arch, seen):
    """See above. `arch` is one of TARGETS."""
    run = JITFunction.run
    active = triton.runtime.driver._active

    def compile_only(self, *args, grid, warmup, **kwargs):
        start = time.perf_counter()
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        seconds = time.perf_counter() - start
        arguments = dict(zip(self.arg_names, args)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        seen(Launch(self.fn.__name__, compiled, grid(arguments) if callable(grid) else tuple(grid), arguments, options, seconds))
        return compiled

    triton.runtime.driver.set_active(_Driver(arch))
    JITFunction.run = compile_only
    try:
        with runtime.pretend(arch):
            yield
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = active


def resources(launch, arch):
    """{"registers", "spills", "shared", "instructions": {name: count}} of a compiled launch. Spills are bytes (NVIDIA) or registers (AMD).

    Kept in Triton's cache, so that going on after an interruption repeats neither the compiling nor the disassembling.
    """
    cache = get_cache_manager(launch.compiled.hash)
    path = cache.get_file(KEPT)
    if path is None:
        path = cache.put(json.dumps(_examine(launch, arch)), KEPT, binary=False)
    return json.loads(Path(path).read_text())


def _examine(launch, arch):
    asm = launch.compiled.asm
    if arch.startswith("gfx"):
        text = asm["amdgcn"]
        keys = ("vgpr_count", "vgpr_spill_count")  # scalar registers spill into lanes of vector registers, not into memory
        number = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in keys}
        found = {"MFMA": len(re.findall(r"\bv_mfma", text))}
        return {"registers": number["vgpr_count"], "spills": number["vgpr_spill_count"],
                "shared": launch.compiled.metadata.shared, "instructions": {k: n for k, n in found.items() if n}}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()

        def tool(name, *options):
            return subprocess.run([NVIDIA_TOOLS / name, *options, cubin.name], capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", tool("cuobjdump", "-res-usage"))
        sass = tool("nvdisasm", "-c") if WORTH_LOOKING.search(asm["ptx"]) else ""
    found = {name: len(re.findall(rf"\b{name}\b", sass)) for name in INSTRUCTIONS}
    return {"registers": int(usage[1]), "spills": int(usage[2]) + int(usage[4]), "shared": launch.compiled.metadata.shared,
            "instructions": {k: n for k, n in found.items() if n}}
