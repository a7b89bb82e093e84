"""Launching PTX on host memory: launch() for any kernel, running_ptx() for the launches of Triton kernels."""
import functools
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from triton import knobs

from ..triton_compile import compiling
from . import arithmetic, bits, control, memory_access, moves, warps  # noqa: F401  (they register their instructions)
from .machine import Wave
from .memory import GlobalMemory
from .parser import PTXError, parse
from .program import Program
from .traffic import Traffic

WAVE_THREADS = 1024  # blocks run side by side up to this many threads: wide enough for numpy, and the registers stay in the cache


@dataclass
class Launch:
    """What a Wave needs to know of its launch."""

    grid: tuple
    block: tuple
    parameters: np.ndarray
    memory: GlobalMemory
    dynamic_shared: int
    traffic: Traffic | None = None

    def note(self, *access):
        if self.traffic is not None:
            self.traffic.note(*access)

    @property
    def threads(self):
        return self.block[0] * self.block[1] * self.block[2]


@functools.lru_cache(maxsize=64)
def program_of(ptx, name):
    return Program(parse(ptx, name))


def launch(ptx, name, grid, block, arguments, dynamic_shared=0, touched=(), regions=(), traffic=None):
    """Runs a kernel. Arguments: tensors, numbers, or bytes for structs; the kernel may touch the tensors' storages, those
    of the tensors in `touched`, and `regions`: (address, bytes). A Traffic counts its accesses. Returns the number of instructions, each
    counted once for all threads that run it together.
    """
    program = program_of(ptx, name)
    regions = [_region(t) for t in (*arguments, *touched) if isinstance(t, torch.Tensor)] + program.regions + list(regions)
    grid, block = ((*sizes, 1, 1)[:3] for sizes in (grid, block))
    running = Launch(grid, block, _pack(program, arguments), GlobalMemory(regions), dynamic_shared, traffic)
    blocks = grid[0] * grid[1] * grid[2]
    together = max(1, WAVE_THREADS // (-(-running.threads // 32) * 32))
    return sum(Wave(program, running, first, min(together, blocks - first)).run() for first in range(0, blocks, together))


def _region(tensor):
    if tensor.device.type != "cpu":
        raise ValueError(f"the interpreter reads the host's memory; a tensor is on {tensor.device}")
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _pack(program, arguments):
    """The bytes of the parameter space."""
    declared = program.kernel.parameters
    if len(arguments) != len(declared):
        raise PTXError(f"{program.kernel.name}: {len(declared)} parameters, got {len(arguments)} arguments")
    space = np.zeros(program.parameter_bytes, np.uint8)
    for (name, type, size, _), value in zip(declared, arguments):
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        if isinstance(value, float):
            data = np.array(value, {"f32": np.float32, "f64": np.float64, "b32": np.float32, "u32": np.float32}[type.name]).tobytes()
        else:
            data = value if isinstance(value, bytes) else (int(value) % (1 << 8 * size)).to_bytes(size, "little")
        begin = program.parameter_offsets[name]
        space[begin:begin + size] = np.frombuffer(data.ljust(size, b"\0"), np.uint8)
    return space


@contextmanager
def running_ptx(seen=None):
    """Inside, a Triton launch on CPU tensors is compiled for sm_80 and its PTX run on the tensors' memory.

    terrazzo's ops then serve CPU tensors with backend="triton". `seen` is called with every compiled launch before it runs.
    """

    def run(compiled_launch):
        if seen is not None:
            seen(compiled_launch)
        compiled = compiled_launch.compiled
        metadata = compiled.metadata
        arguments = [compiled_launch.arguments[name] for name, type in compiled.src.signature.items() if type != "constexpr"]
        scratch = [np.zeros(size + 16, np.uint8) for size in (metadata.global_scratch_size, metadata.profile_scratch_size)]
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise PTXError(f"{metadata.name}: scratch memory is not provided")
        launch(compiled.asm["ptx"], metadata.name, compiled_launch.grid, (metadata.num_warps * metadata.warp_size,),
               [*arguments, *(s.ctypes.data for s in scratch)], metadata.shared)

    hook = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = _without_machine_code
    try:
        with compiling("sm80", run):
            yield
    finally:
        knobs.runtime.add_stages_inspection_hook = hook


def _without_machine_code(backend=None, stages=None, *_):
    """Triton's hook into its stages: the assembler behind the PTX takes most of the time and is not needed."""
    if stages is None:
        return "PTX only", "PTX only"  # for the keys of Triton's caches
    stages["cubin"] = lambda ptx, metadata: b""
    return None
