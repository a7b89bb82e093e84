"""The protocol on a GPU, on a made-up one: launches take the host's time, kernels the device's, and a clock for both moves only when they say so."""
import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from terrazzo.bench import gpu, memory, roofline, suite, timer
from terrazzo.bench.cases import Provider

CALIBRATION = roofline.Calibration(100.0, 20.0, 30.0, 40.0, 2, "test", "2026-01-01", {"fp32": 100.0, "bf16": 400.0})
CASE = next(c for c in suite.all_cases("tiny") if (c.op, c.mode, c.dtype, c.size) == ("rmsnorm_gated", "fwd", "fp32", "9x64"))
MICROSECOND = 1000


class FakeCuda:
    """torch.cuda of a device that works off its queue behind the host."""

    REPLAY_NS = 7 * MICROSECOND

    def __init__(self, l2_bytes=1 << 20):
        self.host = self.device = 0
        self.captured = None   # kernels of the graph being captured
        self.can_capture = True
        self.l2_bytes, self.allocated, self.peak = l2_bytes, 0, 0

    def clock(self):
        return self.host

    def kernel(self, ns, launch_ns=20 * MICROSECOND, scratch=0):
        """What a provider does: the host launches, the device works."""
        self.peak = max(self.peak, self.allocated + scratch)
        self.host += launch_ns
        if self.captured is not None:
            self.captured.append(ns)
        else:
            self.device = max(self.device, self.host) + ns

    def synchronize(self):
        if self.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.host = max(self.host, self.device)

    def Event(self, enable_timing):
        cuda = self

        class Event:
            def record(self):
                self.at = max(cuda.device, cuda.host)

            def synchronize(self):
                cuda.host = max(cuda.host, self.at)

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e6

        return Event()

    def CUDAGraph(self):
        cuda = self

        class Graph:
            def replay(self):
                cuda.host += cuda.REPLAY_NS
                cuda.device = max(cuda.device, cuda.host) + sum(self.kernels)

        return Graph()

    @contextlib.contextmanager
    def graph(self, graph):
        if not self.can_capture:
            raise RuntimeError("this cannot be captured")
        self.captured = graph.kernels = []
        try:
            yield
        finally:
            self.captured = None

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream):
        return contextlib.nullcontext()

    def current_device(self):
        return 0

    def is_available(self):
        return True

    def get_device_properties(self, index):
        return SimpleNamespace(name="a made-up GPU", L2_cache_size=self.l2_bytes, major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)

    def memory_allocated(self):
        return self.allocated

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def max_memory_allocated(self):
        return self.peak


def test_a_short_call_is_replayed_and_its_launch_is_a_number_of_its_own():
    cuda = FakeCuda()
    found = gpu.prepare([lambda: cuda.kernel(3 * MICROSECOND)] * 50, cuda, cuda.clock)
    assert (found.how, found.calls, found.launch_ns) == ("graph", 50, 20 * MICROSECOND)
    # by events around eager calls it would be a launch long
    assert gpu.Events(cuda)(lambda: cuda.kernel(3 * MICROSECOND), 50) / 50 == pytest.approx(20 * MICROSECOND, rel=0.1)
    timing = timer.interleave({"a": found.fn}, 1.0, clock=cuda.clock, stopwatch=gpu.Events(cuda), calls={"a": 50})["a"]
    assert timing.summary()["median_ms"] == pytest.approx(0.003, rel=0.05)
    assert timing.summary()["repeats"] == timing.repeats * 50 > 50


def test_a_long_call_is_timed_by_events():
    cuda, turns = FakeCuda(), []
    found = gpu.prepare([lambda i=i: (turns.append(i), cuda.kernel(2_000_000)) for i in range(3)], cuda, cuda.clock)
    assert (found.how, found.calls, found.note) == ("events", 1, "")
    turns.clear()
    assert gpu.Events(cuda)(found.fn, 6) / 6 == pytest.approx(2_000_000, rel=0.02)
    assert turns == [0, 1, 2, 0, 1, 2]  # one input set after the other


@pytest.mark.parametrize("how", ["refused", "synchronizes"])
def test_what_cannot_be_captured_is_timed_by_events_and_says_why(how):
    cuda = FakeCuda()
    cuda.can_capture = how != "refused"

    def call():
        cuda.kernel(3 * MICROSECOND)
        if how == "synchronizes":
            cuda.synchronize()

    found = gpu.prepare([call] * 4, cuda, cuda.clock)
    assert found.how == "events" and found.note.startswith("no CUDA graph: ") and ("cannot be captured" in found.note or "capturing" in found.note)
    assert cuda.captured is None


def test_rotating_sets_are_more_than_three_caches():
    cache = gpu.cache_bytes(FakeCuda(l2_bytes=50 << 20))
    for size in (1 << 20, 7 << 20, 123_457, 400 << 20):
        count = gpu.set_count(size, cache)
        assert count == 2 or count == gpu.MAX_SETS or (count * size > 3 * cache >= (count - 1) * size)
    assert gpu.set_count(400 << 20, cache) == 2 and gpu.set_count(0, cache) == gpu.set_count(8, cache) == gpu.MAX_SETS


def test_device_memory_is_what_a_call_adds_at_its_highest():
    cuda = FakeCuda()
    cuda.allocated = 5000
    assert gpu.peak_of(lambda: cuda.kernel(1, scratch=300), cuda) == 300
    assert gpu.peak_of(lambda: None, cuda) == 0


def test_rows_of_a_gpu(monkeypatch):
    """The whole of measure: the gate, graphs over rotating inputs, and what the row says."""
    cuda, seen = FakeCuda(l2_bytes=100_000), set()
    monkeypatch.setattr(suite, "on_device", lambda case, device: case)  # the tensors stay here

    def build():
        fn = CASE.reference()

        def run(x, **inputs):
            cuda.kernel(5 * MICROSECOND, scratch=4096)
            seen.add(x.data_ptr())
            return fn(x=x, **inputs)

        return run

    case = replace(CASE, providers=(Provider("cuda", build, ours=True), Provider("hf", build)))
    monkeypatch.setattr(suite, "_built", lambda job, provider: provider.build())  # torch here may know no cuda
    options = suite.Options(providers=("cuda", "hf"), budget_s=0.01, min_rounds=3, device="cuda")
    ours, peer = suite.measure(case, options, CALIBRATION, clock=cuda.clock, cuda=cuda)
    assert (ours["status"], ours["device"], ours["timer"]) == ("ok", "cuda", "graph")
    assert ours["median_ms"] == pytest.approx(0.005, rel=0.05) and ours["launch_ms"] == pytest.approx(0.02)
    assert ours["input_bytes"] > 3 * cuda.l2_bytes and len(seen) >= ours["input_sets"] > 10
    assert ours["peak_device_bytes"] == 4096 and peer["timer"] == "graph" and ours["speedup"] == pytest.approx(1.0)
    assert "--device cuda" in ours["command"]


def test_mutated_states_are_the_providers_own_on_a_gpu(monkeypatch):
    cuda = FakeCuda(l2_bytes=1)
    monkeypatch.setattr(suite, "on_device", lambda case, device: case)
    case = next(c for c in suite.all_cases("tiny") if (c.op, c.dtype) == ("causal_conv1d_update", "fp32"))
    states = {"cuda": [], "hf": []}  # kept, so that no address comes twice

    def build(name):
        fn = case.reference()

        def run(conv_state, **inputs):
            cuda.kernel(1000)
            states[name].append(conv_state)
            return fn(conv_state=conv_state, **inputs)

        return run

    monkeypatch.setattr(suite, "_built", lambda job, provider: provider.build())
    case = replace(case, providers=tuple(Provider(name, lambda name=name: build(name), ours=name == "cuda") for name in states))
    rows = suite.measure(case, suite.Options(providers=tuple(states), budget_s=0.01, min_rounds=3, device="cuda"), CALIBRATION, clock=cuda.clock, cuda=cuda)
    assert [row["status"] for row in rows] == ["ok", "ok"] and all(len({state.data_ptr() for state in kept}) >= 3 for kept in states.values())


def test_the_default_device_is_that_of_the_inputs_while_a_provider_builds(monkeypatch):
    monkeypatch.setattr(suite, "on_device", lambda case, device: case)
    devices = []

    def build():
        devices.append(torch.get_default_device().type)
        return CASE.reference()

    case = replace(CASE, providers=(Provider("hf", build),), reference=build)
    for device in ("cpu", "meta"):
        suite.measure(case, suite.Options(providers=("hf",), budget_s=0.001, min_rounds=1, device=device), CALIBRATION)
    assert devices == ["cpu", "cpu", "meta", "meta"] and torch.get_default_device().type == "cpu"


def test_limits_of_a_gpu_know_its_tensor_cores():
    work = roofline.Work(flops=4e9, bytes=1e6)
    assert CALIBRATION.limit_ms(work, "fp32") == (pytest.approx(40.0), "compute")
    assert CALIBRATION.limit_ms(work, "bf16") == (pytest.approx(10.0), "compute")
    assert CALIBRATION.limit_ms(work, "fp64") == (pytest.approx(40.0), "compute")  # unknown: the float32 rate


def test_calibrating_a_gpu_measures_every_dtype():
    found = roofline.calibrate_gpu("cpu", timer.by(__import__("time").perf_counter_ns), "a stand-in", buffer_bytes=8 << 20, size=64, repeats=1)
    assert set(found.gflops_of) == {"fp32", "bf16", "fp16"} and min(*found.gflops_of.values(), found.read_gbs, found.copy_gbs, found.scale_gbs) > 0
    assert found.source == "a stand-in" and found.gflops == found.gflops_of["fp32"]


def test_facts_of_the_device():
    assert gpu.facts(FakeCuda(l2_bytes=123)) == {"name": "a made-up GPU", "capability": "9.0", "memory_bytes": 80 << 30, "l2_bytes": 123, "multiprocessors": 132}
    assert gpu.facts(SimpleNamespace(is_available=lambda: False)) is None


# ---- cold caches of a CPU ------------------------------------------------------------------------------------


def test_a_cold_call_finds_the_caches_emptied_and_is_timed_alone():
    now, order = [0], []

    def evict():
        order.append("evict")
        now[0] += 1_000_000

    def call():
        order.append("call")
        now[0] += 10_000

    timing = timer.interleave({"a": call}, 1.0, clock=lambda: now[0], before_call=evict, lead_in=True)["a"]
    assert timing.repeats == 1 and timing.summary()["median_ms"] == 0.01  # the evictions are not counted
    assert order[2:] == ["evict", "call"] * len(timing.samples)


def test_eviction_writes_three_caches():
    evict = memory.Eviction(1 << 16)
    assert evict.memory.numel() * 4 == evict.bytes == 3 << 16
    before = evict.memory.clone()
    evict()
    assert torch.equal(evict.memory, -before)
    assert memory.Eviction(memory.Eviction.MAX_BYTES).bytes == memory.Eviction.MAX_BYTES


@pytest.mark.parametrize("files, size", [({}, 32 << 20), ({"0": "48K", "3": "32768K"}, 32 << 20), ({"2": "2M", "3": "1G"}, 1 << 30), ({"1": "512"}, 512)])
def test_the_last_level_cache_is_the_largest(files, size, tmp_path):
    for index, text in files.items():
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}/size").write_text(text + "\n")
    assert memory.last_level_cache_bytes(tmp_path) == size


def test_cold_rows_say_so():
    case = replace(CASE, providers=(Provider("cpu", CASE.reference, ours=True),))
    (row,) = suite.measure(case, suite.Options(providers=("cpu",), budget_s=0.02, min_rounds=3, cold=True), CALIBRATION)
    assert row["cold"] and row["repeats"] == 1 and "--cold" in row["command"]
