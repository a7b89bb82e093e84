"""Timing on a GPU: replayed CUDA graphs for short calls, events for long ones, the cost of launching apart.

A call of microseconds is shorter than its launch from Python. So one CUDA graph holds a call on each of many input sets, more bytes
together than three second-level caches, and its replays are timed by events: every call finds its inputs in memory, and none waits for
Python. Calls of a millisecond and more are timed by events around each. What Python needs to launch a call is a number of its own.

`cuda` is torch.cuda, or what stands in for it in tests.
"""
import time
from dataclasses import dataclass

import torch

from .timer import median

SHORT_NS = 1_000_000  # shorter calls are replayed
WARM_UP = 3           # calls before a graph is captured: allocations, autotuning, lazy loading
MAX_SETS = 1024


class Events:
    """A stopwatch: nanoseconds that the device needs for `repeats` calls, by two events."""

    def __init__(self, cuda=torch.cuda):
        self.cuda = cuda

    def __call__(self, fn, repeats=1):
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            fn()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e6


@dataclass
class Prepared:
    """What interleaved rounds call: fn() makes `calls` calls. how: "graph" or "events"; note: why not a graph."""

    fn: object
    calls: int
    how: str
    launch_ns: float
    note: str = ""


def cache_bytes(cuda=torch.cuda):
    """The second-level cache of the current device."""
    return cuda.get_device_properties(cuda.current_device()).L2_cache_size


def set_count(size, cache):
    """How many input sets of `size` bytes are more than three caches; at least two, at most MAX_SETS."""
    return min(MAX_SETS, max(2, 3 * cache // max(size, 1) + 1))


def launch_ns(runs, cuda, clock):
    """What the host spends on launching a call, of one call on each input set, while the device works behind it."""
    samples = []
    for run in runs:
        begin = clock()
        run()
        samples.append(clock() - begin)
    cuda.synchronize()
    return median(samples)


def _capture(runs, cuda):
    """One graph with a call of each of `runs`."""
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):  # captured work must not meet a first call
        for run in runs[:WARM_UP]:
            run()
    cuda.current_stream().wait_stream(side)
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        for run in runs:
            run()
    return graph


def prepare(runs, cuda=torch.cuda, clock=time.perf_counter_ns, replay=True):
    """How to time the calls `runs`, one on each input set -> Prepared. replay=False: by events, however short (whole models: what Python does counts)."""
    for run in runs[:WARM_UP]:
        run()
    cuda.synchronize()
    turn = iter(())

    def one_after_another():
        nonlocal turn
        run = next(turn, None)
        if run is None:
            turn = iter(runs)
            run = next(turn)
        return run()

    once = Events(cuda)(one_after_another, len(runs)) / len(runs)
    launch = launch_ns(runs, cuda, clock)
    if once >= SHORT_NS or not replay:
        return Prepared(one_after_another, 1, "events", launch)
    try:
        graph = _capture(runs, cuda)
    except Exception as error:  # whatever cannot be captured (a copy to the host, a sync) is timed by events
        cuda.synchronize()
        return Prepared(one_after_another, 1, "events", launch, " ".join(f"no CUDA graph: {error}".split())[:200])
    return Prepared(graph.replay, len(runs), "graph", launch)


def peak_of(fn, cuda=torch.cuda):
    """Bytes of device memory by which torch's allocator grew at its highest during fn()."""
    cuda.synchronize()
    before = cuda.memory_allocated()
    cuda.reset_peak_memory_stats()
    fn()
    cuda.synchronize()
    return max(0, cuda.max_memory_allocated() - before)


def facts(cuda=torch.cuda):
    """What the environment line says of the device, or None without one."""
    if not cuda.is_available():
        return None
    found = cuda.get_device_properties(cuda.current_device())
    return {"name": found.name, "capability": f"{found.major}.{found.minor}", "memory_bytes": found.total_memory, "l2_bytes": found.L2_cache_size,
            "multiprocessors": found.multi_processor_count}  # fmt: skip
