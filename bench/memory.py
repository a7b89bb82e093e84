"""Peak host memory of one call: the resident high-water mark of the process (Linux). Device memory: bench/gpu.py.

The mark is reset before the call, after the allocator has handed its free memory back. It sees scratch memory
that torch's own counters miss; scratch that a kernel keeps from an earlier call does not count again.
"""
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Of mallopt (glibc): large blocks come from the heap too, the heap never shrinks, and it grows by 256 MiB.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
_keeping = False


def keep_freed():
    """From now on the allocator keeps freed memory instead of handing it back to the system: calls that are measured write to no page for the first time."""
    global _keeping
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    _keeping = mallopt is not None and all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1), mallopt(M_TOP_PAD, 256 << 20)])


def is_tuned():
    """Whether this process keeps freed memory."""
    return _keeping


def _resident():
    """(now, high-water mark) in bytes."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if line.startswith(("VmRSS", "VmHWM")))
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


def _trim():
    """Hands the allocator's free memory back to the system (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_of(fn):
    """Bytes by which the process grew at its highest during fn(), or None where that cannot be told."""
    gc.collect()
    _trim()
    try:
        CLEAR.write_text("5")
        before, _ = _resident()
        fn()
        return max(0, _resident()[1] - before)
    except FileNotFoundError:  # not Linux
        fn()
        return None


def last_level_cache_bytes(folder="/sys/devices/system/cpu/cpu0/cache"):
    """The largest cache that the system tells of (Linux), or 32 MiB."""
    sizes = [file.read_text().strip() for file in Path(folder).glob("index*/size")]
    return max((int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1], 0) for size in sizes), default=32 << 20)


class Eviction:
    """Called before a call of a cold run: writes three last-level caches' worth of other memory, at most MAX_BYTES."""

    MAX_BYTES = 1 << 30

    def __init__(self, cache_bytes=None):
        import torch

        self.bytes = min(self.MAX_BYTES, 3 * (cache_bytes or last_level_cache_bytes()))
        self.memory = torch.ones(self.bytes // 4)

    def __call__(self):
        self.memory.mul_(-1.0)


def peak_in_fresh_process(op, size, mode, dtype, threads):
    """(peak bytes, bytes of inputs and outputs) of our provider on one case, default allocator."""
    code = f"from terrazzo.bench.memory import _report; _report({op!r}, {size!r}, {mode!r}, {dtype!r}, {threads})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"terrazzo.bench: measuring the memory of {op} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"], found["in_and_out"]


def _report(op, size, mode, dtype, threads):
    import torch

    from .cases import PRESETS, clone_inputs, runner, tensors_of
    from .suite import all_cases

    torch.set_num_threads(threads)
    case = next(c for preset in PRESETS for c in all_cases(preset) if (c.op, c.size, c.mode, c.dtype) == (op, size, mode, dtype))
    fn = next(p for p in case.providers if p.name in ("cpu", "terrazzo")).build()
    inputs = clone_inputs(case.inputs(1))
    result = []
    # The first call pays for the kernel's reusable scratch memory too: it belongs to the peak.
    peak = peak_of(lambda: result.extend(runner(case, fn, inputs)()))
    in_and_out = sum(t.numel() * t.element_size() for t in (*tensors_of(list(v for v in inputs.values() if isinstance(v, torch.Tensor))), *result))
    print(json.dumps({"peak": peak, "in_and_out": in_and_out}))
