"""Runs cases: accuracy gate, first call, interleaved timing, and one row for each provider."""
import functools
import itertools
import os
import shlex
import time
from dataclasses import dataclass, replace

import torch

from . import (
    accuracy,
    byte_hash_embedding,
    byte_model,
    causal_conv1d,
    chunk_scan,
    decoding,
    entropy_patch,
    gpu,
    grouped_gemm,
    linear,
    local_attention,
    low_precision,
    memory,
    model,
    moe,
    own_models,
    packages,
    patch_cross_attention,
    patch_reduce,
    providers,
    rmsnorm_gated,
    state_update,
)
from ..dispatch import BackendError
from .accuracy import SEEDS
from .cases import PRESETS, Unavailable, building_on, clone_inputs, on_device, runner
from .compare import SCHEMA
from .timer import MAX_ROUNDS, interleave

OPS = {
    "causal_conv1d": causal_conv1d,
    "chunk_scan": chunk_scan,
    "state_update": state_update,
    "rmsnorm_gated": rmsnorm_gated,
    "grouped_gemm": grouped_gemm,
    "moe": moe,
    "linear": linear,
    "decoding": decoding,
    "patch_reduce": patch_reduce,
    "patch_cross_attention": patch_cross_attention,
    "local_attention": local_attention,
    "entropy_patch": entropy_patch,
    "byte_hash_embedding": byte_hash_embedding,
    "model": model,
    "low_precision": low_precision,
    "byte_model": byte_model,
    "own_models": own_models,
}
PACKED = ("terrazzo-packed", "terrazzo-int8")  # weights laid out before the call
# The one that stands for us in a case first: a backend for ops, terrazzo itself for whole models.
HEADLINE = ("cuda", "triton", "cpu", "terrazzo")
OURS = (*HEADLINE, *PACKED)
COMPILED = ("reference-compiled", "hf-compiled", "torch-compiled")
PROVIDERS = ("cpu", "cuda", "triton", "terrazzo", *PACKED, "hf-patched", "reference", "torch", "hf", "hf-grouped", *COMPILED, *packages.NAMES)
DEVICES = ("cpu", "cuda")
HOW_TO_WAIT = "name it with --provider, or leave out --quick"
MIN_TIMING_S = 0.1  # of each provider, however little time is left


@dataclass(frozen=True)
class Options:
    providers: tuple[str, ...] = PROVIDERS
    budget_s: float = 3.0        # of timing, for each provider of a case
    baseline: str = "hf"
    cold: bool = False           # no call finds its data in a cache
    seed: int = 0                # of the inputs and of the order of the rounds
    min_rounds: int = 7
    max_rounds: int = MAX_ROUNDS
    device: str = "cpu"
    speed: str = "normal"        # what budget_s is called on the command line
    hurry: bool = False          # compiled providers and very slow ones become rows that say so


def expand(names, device="cpu"):
    """Provider names with "terrazzo" as all of ours on the device: the backends of ops, terrazzo itself of models."""
    ours = ("terrazzo", "cpu") if device == "cpu" else ("terrazzo", "cuda", "triton")
    return tuple(dict.fromkeys(name for given in names for name in (ours if given == "terrazzo" else (given,))))


def standing_for_us(rows):
    """The row of ours among those of one case, or None: the first of OURS that was timed, else the first that ran."""
    name = lambda row: row["provider"].split(" · ")[0]  # noqa: E731 -- a report of several files has "cpu · file"
    ours = sorted((row for row in rows if name(row) in HEADLINE), key=lambda row: HEADLINE.index(name(row)))
    return next((row for row in ours if row["status"] == "ok"), next((row for row in ours if row["status"] != "unavailable"), None))


def cases_of(op, preset):
    """The cases of an op in a preset: none where the preset has no size for it."""
    return [replace(case, family=op, preset=preset) for case in OPS[op].cases(preset)] if preset in OPS[op].SIZES else []


def home(op):
    """The first preset that has sizes of an op: the model it comes from."""
    return next(preset for preset in PRESETS if preset in OPS[op].SIZES)


def smallest(cases):
    """Of each function, mode and dtype the case of least work."""
    found = {}
    for case in cases:
        key = (case.op, case.mode, case.dtype)
        if key not in found or case.work.flops + case.work.bytes < found[key].work.flops + found[key].work.bytes:
            found[key] = case
    return list(found.values())


@functools.cache
def functions():
    """The public functions that the cases measure."""
    return tuple(dict.fromkeys(case.op for op in OPS for case in cases_of(op, "tiny")))


def all_cases(preset):
    if preset not in PRESETS:
        raise ValueError(f"terrazzo bench: unknown preset {preset!r}; presets are {', '.join(PRESETS)}")
    return [case for op in OPS for case in cases_of(op, preset)]


def peer_of(case, baseline):
    """Whom speed-ups of a case refer to: the chosen one; for "hf" torch, where transformers has no such function."""
    names = {provider.name for provider in case.providers}
    return "torch" if baseline == "hf" and "hf" not in names and "torch" in names else baseline


def command(case, provider, options=Options()):
    """What measures this row again, its baseline beside it."""
    words = ["terrazzo", "bench", case.family, "--dtype", case.dtype, "--mode", case.mode, "--match", f"{case.op} {case.size}"]
    words += ["--threads", str(torch.get_num_threads())]
    words += ["--preset", case.preset] if case.preset in PRESETS else ["--shapes", case.preset.rpartition("#")[0]]
    words += ["--provider", ",".join(dict.fromkeys((provider, peer_of(case, options.baseline))))]
    if provider in providers.REGISTERED:
        words += ["--load", providers.REGISTERED[provider].file]
    words += [f"--{options.speed}"] if options.speed != "normal" else []
    words += ["--baseline", options.baseline] if options.baseline != "hf" else []
    words += ["--seed", str(options.seed)] if options.seed else []
    words += ["--device", options.device] if options.device != "cpu" else []
    words += ["--cold"] if options.cold else []
    return shlex.join(words)


def _row(case, provider, status, reason="", options=Options(), **values):
    return {
        "schema": SCHEMA, "kind": "row", "op": case.op, "size": case.size, "dtype": case.dtype, "mode": case.mode,
        "provider": provider, "threads": torch.get_num_threads(), "device": options.device, "cold": options.cold,
        "status": status, "reason": reason, "command": command(case, provider, options), **values,
    }  # fmt: skip


def _one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def rotating(case, fn, input_sets):
    """One call after the other on different inputs, so that no result can be kept."""
    runs = itertools.cycle([runner(case, fn, inputs) for inputs in input_sets])
    return lambda: next(runs)()


class _Job:
    """One case on one device: its inputs, and how a provider of it is timed."""

    def __init__(self, case, options, cuda, clock):
        self.case, self.options, self.clock = on_device(case, options.device), options, clock
        self.cuda = cuda if options.device == "cuda" else None
        self.inputs = accuracy.Inputs(self.case, options.seed)

    def input_sets(self):
        """Never one set: two, and on a GPU as many as its caches cannot hold. A state updated in place differs from call to call and may stay one."""
        first = self.inputs(SEEDS[0])
        count = 1 if self.case.mutated else 2
        if self.cuda is not None:
            count = gpu.set_count(accuracy.size_of(first), gpu.cache_bytes(self.cuda))
        return [first, *(self.inputs(seed) for seed in (SEEDS[1], *range(SEEDS[1] + 1, SEEDS[1] + count))[: count - 1])]

    def prepare(self, timed):
        """{name: fn(**inputs)} -> ({name: fn()}, what interleave needs besides, {name: fields of its row})."""
        sets = self.input_sets()
        own = (lambda: [clone_inputs(s) for s in sets]) if self.case.mutated else (lambda: sets)
        facts = {"input_sets": len(sets), "input_bytes": len(sets) * accuracy.size_of(sets[0])}
        if self.cuda is None:
            evict = memory.Eviction() if self.options.cold else None
            runs = {name: rotating(self.case, fn, own()) for name, fn in timed.items()}
            return runs, {"before_call": evict, "lead_in": True}, {name: {"timer": "host", **facts} for name in timed}
        found = {name: gpu.prepare([runner(self.case, fn, s) for s in own()], self.cuda, self.clock, self.case.mode != "model") for name, fn in timed.items()}
        rows = {name: {"timer": p.how, "timer_note": p.note, "launch_ms": p.launch_ns / 1e6, **facts} for name, p in found.items()}
        extras = {"stopwatch": gpu.Events(self.cuda), "calls": {name: p.calls for name, p in found.items()}}
        return {name: p.fn for name, p in found.items()}, extras, rows


def _patience_ns(options):
    """What a run in a hurry waits for a first call: a few more would not fit. On GPUs first calls compile."""
    return int(2e9 * options.budget_s) if options.hurry and options.device == "cpu" else None


def left_out(case, options, reason):
    """Rows of a case that is not measured."""
    chosen = [provider.name for provider in providers.of_case(case) if provider.name in options.providers]
    return [_row(case, name, "unavailable", reason, options) for name in chosen]


def _built(job, provider):
    """A provider's function; raises Unavailable."""
    if provider.name in COMPILED and job.options.hurry:
        raise Unavailable(f"compiling takes tens of seconds: {HOW_TO_WAIT}")
    with building_on(job.options.device):
        return provider.build()


def measure(case, options, calibration, *, machine_is_free=None, on_progress=None, clock=time.perf_counter_ns, deadline_ns=None, cuda=torch.cuda,
            turns=None):  # fmt: skip
    """Rows of every chosen provider on one case: timed, or with the reason why not.

    `on_progress(text, fraction)` follows the work. By `deadline_ns` of the clock the timing ends, as far as MIN_TIMING_S for each provider allows.
    `turns`: another process measures the same cases, by turns.
    """
    report = on_progress or (lambda text, fraction: None)
    rows, timed, found = [], {}, {}
    job, oracle = _Job(case, options, cuda, clock), None
    case = job.case
    for provider in providers.of_case(case):
        if provider.name not in options.providers:
            continue
        report(f"{case.key}: checking {provider.name}", 0.0)
        row = functools.partial(_row, case, provider.name, options=options)
        try:
            fn = _built(job, provider)
            if oracle is None:  # of several passes by turns the first is the gate of them all
                oracle = accuracy.Oracle.trusting(case, job.inputs) if turns and turns.number > 1 else accuracy.Oracle(case, job.inputs, options.device)
            checked = accuracy.gate(case, fn, oracle, provider.ours, provider.nmse_limit, job.cuda, None if turns else _patience_ns(options), clock)
        except Unavailable as why:
            rows.append(row("unavailable", str(why)))
            continue
        except accuracy.TooSlow as why:
            rows.append(row("unavailable", f"{why}: {HOW_TO_WAIT}"))
            continue
        except BackendError as error:  # one of our backends says at the call what it lacks
            rows.append(row("unavailable", str(error).rpartition(" cannot run: ")[2]))
            continue
        except Exception as error:  # whatever a provider raises is its row, not the end of the run
            rows.append(row("failed", _one_line(error)))
            continue
        if not checked.ok:
            errors = {"max_abs": checked.max_abs, "rel": checked.rel, "nmse": checked.nmse}
            rows.append(row("wrong", checked.why, **errors))
            continue
        timed[provider.name], found[provider.name] = fn, checked
    oracle = None  # its float64 tensors are large
    if timed:
        runs, extras, facts = job.prepare(timed)
        for name in timed.keys() & set(PACKED):  # the first call on an input set lays out its weights, which is no part of a call
            for _ in range(facts[name]["input_sets"]):
                runs[name]()
        known = {name: checked.second_call_ns for name, checked in found.items() if name not in PACKED}
        budget = options.budget_s * len(timed)
        if deadline_ns is not None:
            budget = max(MIN_TIMING_S * len(timed), min(budget, (deadline_ns - clock()) / 1e9))
        timings = interleave(
            runs, budget, clock=clock, seed=options.seed, min_rounds=options.min_rounds, max_rounds=options.max_rounds, machine_is_free=machine_is_free, period=case.period,
            on_round=lambda fraction: report(f"{case.key}: timing", fraction), known=known, turns=turns, **extras,
        )  # fmt: skip
        part = {"by_turns": turns.number} if turns else {}
        rows += [_timed_row(case, name, timing, found[name], calibration, options, facts[name] | part) for name, timing in timings.items()]
        _add_speedups(rows, peer_of(case, options.baseline))
    elif turns:
        turns.sit_out()
    return sorted(rows, key=lambda row: PROVIDERS.index(row["provider"]) if row["provider"] in PROVIDERS else len(PROVIDERS))


def _timed_row(case, name, timing, checked, calibration, options, facts):
    timing.first_call_ns = checked.first_call_ns
    values = timing.summary()
    seconds = values["median_ms"] / 1e3
    limit_ms, limit_kind = calibration.limit_ms(case.work, case.dtype)
    values |= {
        "gflops": case.work.flops / seconds / 1e9,
        "gbs": case.work.bytes / seconds / 1e9,
        "limit_ms": limit_ms,
        "limit": limit_kind,
        "times_limit": values["median_ms"] / limit_ms if limit_ms else None,
        "max_abs": checked.max_abs,
        "rel": checked.rel,
        "nmse": checked.nmse,
        "peak_bytes": checked.peak_bytes,
        "peak_device_bytes": checked.peak_device_bytes,
        "load_average": round(os.getloadavg()[0], 2),
        **facts,
        "samples_ms": [round(s / 1e6, 6) for s in timing.samples],
    }
    if case.tokens:
        values |= {"tokens_per_s": case.tokens / seconds, "unit": case.unit}
    return _row(case, name, "ok", options=options, **values)


def _add_speedups(rows, baseline):
    base = next((r["median_ms"] for r in rows if r["provider"] == baseline and r["status"] == "ok"), None)
    for row in rows:
        if row["status"] == "ok":
            row["speedup"] = base / row["median_ms"] if base else None
            row["baseline"] = baseline
