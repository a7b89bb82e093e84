"""What this machine can do, measured by the native loops of csrc/cpu/calibrate.cpp, and the limit it sets.

limit = max(flops / peak arithmetic, compulsory bytes / bandwidth). Bandwidth has three kinds, because they
differ by a quarter: reading, copying past the cache, and updating in place. A case names the one it needs.
Without the compiled extension, and on GPUs, the loops are torch's own (a matrix product, sum, copy_, mul_), and say so.
`calibrate` always measures; `calibrated` takes what it measured last here, as long as the machine still is as fast.
"""
import datetime
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import gpu, timer

KINDS = ("fma", "read", "copy", "scale")
FLOPS_PER_ITERATION = 2 * 64 * 12 * 16 * 4096  # kCalibrateFmas multiply-adds in each of 64 chunks
BUFFER_BYTES = 256 << 20                       # many times a last-level cache
BUSY_BELOW = 0.85                              # of the calibrated FMA rate: somebody else is computing
FRESH_HOURS = 24                               # older calibrations are made anew
STILL_TRUE_WITHIN = 0.07                       # half of what makes a machine busy: a kept calibration must not drop rounds
PRODUCTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Calibration:
    """Peaks measured in one run, with the number of threads they hold for."""

    gflops: float  # float32 multiply-adds, counted as two
    read_gbs: float
    copy_gbs: float   # bytes read plus bytes written, non-temporal stores
    scale_gbs: float  # bytes read plus bytes written, in place
    threads: int
    source: str       # "native <isa>", "torch", or a GPU's name
    date: str
    gflops_of: dict | None = None  # GPUs: the rate of matrix products in each dtype; on CPUs `gflops` holds for all

    def bandwidth(self, traffic):
        return {"read": self.read_gbs, "copy": self.copy_gbs, "scale": self.scale_gbs}[traffic]

    def limit_ms(self, work, dtype="fp32"):
        """The least time this machine could take for `work`, and which of the two limits it is."""
        compute = work.flops / (self.gflops_of or {}).get(dtype, self.gflops) / 1e6
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


def _best_rate(amount, fn, repeats, stopwatch):
    """Units per nanosecond, that is giga-units a second, of the fastest of `repeats` calls."""
    fn()
    return amount / min(stopwatch(fn) for _ in range(repeats))


_host = timer.by(time.perf_counter_ns)


def _now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def calibrate(buffer_bytes=BUFFER_BYTES, repeats=7):
    """Measures the peaks of the CPU with torch's current number of threads; about a second."""
    loop, flops, source = _loops()
    buffer = torch.rand(buffer_bytes // 4, dtype=torch.float32)
    size = buffer.numel() * 4
    fma = _best_rate(4 * flops, lambda: loop(buffer, "fma", 4), repeats, _host)
    moved = {"read": size, "copy": size, "scale": 2 * size}
    rates = {kind: _best_rate(moved[kind], lambda: loop(buffer, kind, 1), repeats, _host) for kind in moved}
    return Calibration(fma, rates["read"], rates["copy"], rates["scale"], torch.get_num_threads(), source, _now())


def calibrate_gpu(device="cuda", stopwatch=None, name=None, buffer_bytes=1 << 30, size=8192, repeats=7):
    """Measures the peaks of a GPU: products of `size` square matrices in each dtype, and torch's sum, copy_ and mul_ of a gigabyte."""
    stopwatch = stopwatch or gpu.Events()
    rates = {}
    for dtype, kind in PRODUCTS.items():
        a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
        rates[dtype] = _best_rate(2 * size**3, lambda: torch.mm(a, b), repeats, stopwatch)
    buffer = torch.rand(buffer_bytes // 4, device=device)
    moved = {"read": buffer_bytes, "copy": buffer_bytes, "scale": 2 * buffer_bytes}
    found = {kind: _best_rate(moved[kind], lambda: _torch_loop(buffer, kind, 1), repeats, stopwatch) for kind in moved}
    source = name or torch.cuda.get_device_name()
    return Calibration(rates["fp32"], found["read"], found["copy"], found["scale"], torch.get_num_threads(), source, _now(), rates)


# ---- kept between runs ---------------------------------------------------------------------------------------


def _kept_in():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "terrazzo" / "calibration.json"


def _key(device):
    """Two calibrations of one key are of the same loops on the same machine."""
    if device == "cuda":
        return f"{platform.node()} {torch.cuda.get_device_name()}"
    return f"{platform.node()} {torch.get_num_threads()} threads {_loops()[2]}"


def _kept():
    try:
        return json.loads(_kept_in().read_text())
    except (OSError, json.JSONDecodeError):  # none yet, or written by a run that was killed
        return {}


def keep(calibration, device="cpu"):
    """Stores a calibration for later runs; a folder that cannot be written keeps none."""
    path = _kept_in()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_kept() | {_key(device): calibration.as_dict()}, indent=1))
    except OSError:
        return False
    return True


def _still_true(calibration):
    """Whether arithmetic and reading are as fast as they were, by a look of some 50 ms: neighbours and clocks change."""
    loop, flops, _ = _loops()
    buffer = torch.rand(1 << 24, dtype=torch.float32)
    fma = _best_rate(4 * flops, lambda: loop(buffer, "fma", 4), 3, _host)
    read = _best_rate(buffer.numel() * 4, lambda: loop(buffer, "read", 1), 3, _host)
    return all(abs(now / then - 1) < STILL_TRUE_WITHIN for now, then in ((fma, calibration.gflops), (read, calibration.read_gbs)))


def calibrated(device="cpu"):
    """The machine's peaks: those kept, when they are of today and still true, else measured now and kept."""
    found = _kept().get(_key(device))
    if found is not None:
        found = Calibration(**found)
        age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(found.date)
        if age < datetime.timedelta(hours=FRESH_HOURS) and (device == "cuda" or _still_true(found)):
            return found
    found = calibrate_gpu() if device == "cuda" else calibrate()
    keep(found, device)
    return found


class FreeMachine:
    """Asks, with a few milliseconds of multiply-adds, whether the machine is as fast as when it was calibrated."""

    def __init__(self, calibration):
        self.calibration = calibration
        self.loop, self.flops, _ = _loops()
        self.buffer = torch.rand(1 << 21, dtype=torch.float32)

    def __call__(self):
        rate = 4 * self.flops / _host(lambda: self.loop(self.buffer, "fma", 4))
        return rate >= BUSY_BELOW * self.calibration.gflops
