"""What this machine can do, measured by the native loops of csrc/cpu/calibrate.cpp, and the limit it sets.

limit = max(flops / peak arithmetic, compulsory bytes / bandwidth). Bandwidth has three kinds, because they
differ by a quarter: reading, copying past the cache, and updating in place. A case names the one it needs.
Without the compiled extension the loops are torch's own (a matrix product, sum, copy_, mul_), and say so.
"""
import datetime
import time
from dataclasses import asdict, dataclass

import torch

KINDS = ("fma", "read", "copy", "scale")
FLOPS_PER_ITERATION = 2 * 64 * 12 * 16 * 4096  # kCalibrateFmas multiply-adds in each of 64 chunks
BUFFER_BYTES = 256 << 20                       # many times a last-level cache
BUSY_BELOW = 0.85                              # of the calibrated FMA rate: somebody else is computing


@dataclass(frozen=True)
class Calibration:
    """Peaks measured in one run, with the number of threads they hold for."""

    gflops: float  # float32 multiply-adds, counted as two
    read_gbs: float
    copy_gbs: float   # bytes read plus bytes written, non-temporal stores
    scale_gbs: float  # bytes read plus bytes written, in place
    threads: int
    source: str       # "native <isa>" or "torch"
    date: str

    def bandwidth(self, traffic):
        return {"read": self.read_gbs, "copy": self.copy_gbs, "scale": self.scale_gbs}[traffic]

    def limit_ms(self, work):
        """The least time this machine could take for `work`, and which of the two limits it is."""
        compute = work.flops / self.gflops / 1e6
        memory = work.bytes / self.bandwidth(work.traffic) / 1e6
        return (compute, "compute") if compute >= memory else (memory, "memory")

    def as_dict(self):
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """Compulsory work of one call: what no implementation can avoid."""

    flops: float
    bytes: float
    traffic: str = "copy"


def _native_loop(buffer, kind, iterations):
    torch.ops.terrazzo.calibrate(buffer, KINDS.index(kind), iterations)


def _torch_loop(buffer, kind, iterations):
    half = buffer.numel() // 2
    for _ in range(iterations):
        if kind == "fma":
            torch.mm(buffer[: 1 << 20].view(1024, 1024), buffer[1 << 20 : 1 << 21].view(1024, 1024))
        elif kind == "read":
            buffer.sum()
        elif kind == "copy":
            buffer[half : 2 * half].copy_(buffer[:half])
        else:
            buffer.mul_(0.9999)


def _loops():
    """(loop, flops of an fma iteration, source): native where the extension is there."""
    from terrazzo import native

    if native.available:
        return _native_loop, FLOPS_PER_ITERATION, f"native {native.isa()}"
    return _torch_loop, 2 * 1024**3, "torch"


def _best_rate(amount, fn, repeats):
    """Units per nanosecond, that is giga-units a second, of the fastest of `repeats` calls."""
    fn()
    best = min(_elapsed(fn) for _ in range(repeats))
    return amount / best


def _elapsed(fn):
    start = time.perf_counter_ns()
    fn()
    return time.perf_counter_ns() - start


def calibrate(buffer_bytes=BUFFER_BYTES, repeats=7):
    """Measures the peaks with torch's current number of threads; about a second."""
    loop, flops, source = _loops()
    buffer = torch.rand(buffer_bytes // 4, dtype=torch.float32)
    size = buffer.numel() * 4
    fma = _best_rate(4 * flops, lambda: loop(buffer, "fma", 4), repeats)
    moved = {"read": size, "copy": size, "scale": 2 * size}
    rates = {kind: _best_rate(moved[kind], lambda: loop(buffer, kind, 1), repeats) for kind in moved}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Calibration(fma, rates["read"], rates["copy"], rates["scale"], torch.get_num_threads(), source, now)


class FreeMachine:
    """Asks, with a few milliseconds of multiply-adds, whether the machine is as fast as when it was calibrated."""

    def __init__(self, calibration):
        self.calibration = calibration
        self.loop, self.flops, _ = _loops()
        self.buffer = torch.rand(1 << 21, dtype=torch.float32)

    def __call__(self):
        rate = 4 * self.flops / _elapsed(lambda: self.loop(self.buffer, "fma", 4))
        return rate >= BUSY_BELOW * self.calibration.gflops
