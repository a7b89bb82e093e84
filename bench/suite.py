"""Runs cases: accuracy gate, first call, interleaved timing, and one row for each provider."""
import functools
import itertools
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
    entropy_patch,
    grouped_gemm,
    linear,
    local_attention,
    low_precision,
    model,
    moe,
    own_models,
    patch_cross_attention,
    patch_reduce,
    providers,
    rmsnorm_gated,
    state_update,
)
from .cases import PRESETS, Unavailable, clone_inputs, runner
from .timer import interleave

SCHEMA = 1
OPS = {
    "causal_conv1d": causal_conv1d,
    "chunk_scan": chunk_scan,
    "state_update": state_update,
    "rmsnorm_gated": rmsnorm_gated,
    "grouped_gemm": grouped_gemm,
    "moe": moe,
    "linear": linear,
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
OURS = ("terrazzo", "terrazzo-packed", "terrazzo-int8")
PROVIDERS = (*OURS, "reference", "reference-compiled", "torch", "hf", "hf-compiled", "hf-grouped", "causal_conv1d", "mamba_ssm", "grouped_gemm")
CACHE_BYTES = 32 << 20       # a last-level cache; cold runs rotate over three of them
MAX_COLD_SETS = 64


@dataclass(frozen=True)
class Options:
    providers: tuple[str, ...] = PROVIDERS
    budget_s: float = 3.0        # of timing, for each provider of a case
    baseline: str = "hf"
    cold: bool = False           # rotate over more inputs than the last-level cache holds
    seed: int = 0
    min_rounds: int = 7


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


def command(case, provider):
    """What measures this row again."""
    words = ["terrazzo", "bench", case.family, "--dtype", case.dtype, "--mode", case.mode, "--match", f"{case.op} {case.size}"]
    words += ["--threads", str(torch.get_num_threads())]
    words += ["--preset", case.preset] if case.preset in PRESETS else ["--shapes", case.preset.rpartition("#")[0]]
    words += ["--provider", ",".join(dict.fromkeys((provider, "hf")))]
    if provider in providers.REGISTERED:
        words += ["--load", providers.REGISTERED[provider].file]
    return shlex.join(words)


def _row(case, provider, status, reason="", **values):
    return {
        "schema": SCHEMA, "kind": "row", "op": case.op, "size": case.size, "dtype": case.dtype, "mode": case.mode,
        "provider": provider, "threads": torch.get_num_threads(), "status": status, "reason": reason, "command": command(case, provider), **values,
    }  # fmt: skip


def _one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _rotating(case, fn, input_sets):
    """One call after the other on different inputs, so that no result can be kept."""
    runs = itertools.cycle([runner(case, fn, inputs) for inputs in input_sets])
    return lambda: next(runs)()


def _input_sets(case, cold):
    first = case.inputs(0)
    size = sum(t.numel() * t.element_size() for t in first.values() if isinstance(t, torch.Tensor))
    warm = 1 if case.mutated else 2  # a state updated in place already differs from call to call
    count = min(MAX_COLD_SETS, max(2, -(-3 * CACHE_BYTES // max(size, 1)))) if cold else warm
    return [first, *(case.inputs(seed) for seed in range(1, count))]


def measure(case, options, calibration, *, machine_is_free=None, on_progress=None, clock=time.perf_counter_ns):
    """Rows of every chosen provider on one case: timed, or with the reason why not.

    `on_progress(text, fraction)` follows the work.
    """
    report = on_progress or (lambda text, fraction: None)
    rows, timed, found = [], {}, {}
    oracle = None
    for provider in providers.of_case(case):
        if provider.name not in options.providers:
            continue
        report(f"{case.key}: checking {provider.name}", 0.0)
        try:
            fn = provider.build()
        except Unavailable as why:
            rows.append(_row(case, provider.name, "unavailable", str(why)))
            continue
        try:
            oracle = oracle or accuracy.Oracle(case)
            checked = accuracy.gate(case, fn, oracle, provider.ours)
        except Exception as error:  # whatever a provider raises is its row, not the end of the run
            rows.append(_row(case, provider.name, "failed", _one_line(error)))
            continue
        if not checked.ok:
            errors = {"max_abs": checked.max_abs, "rel": checked.rel, "nmse": checked.nmse}
            rows.append(_row(case, provider.name, "wrong", checked.why, **errors))
            continue
        timed[provider.name], found[provider.name] = fn, checked
    oracle = None  # its float64 tensors are large
    if timed:
        sets = _input_sets(case, options.cold)
        own = (lambda: [clone_inputs(s) for s in sets]) if case.mutated else (lambda: sets)
        timings = interleave(
            {name: _rotating(case, fn, own()) for name, fn in timed.items()},
            options.budget_s * len(timed),
            clock=clock,
            seed=options.seed,
            min_rounds=options.min_rounds,
            lead_in=not options.cold,
            machine_is_free=machine_is_free,
            on_round=lambda fraction: report(f"{case.key}: timing", fraction),
        )
        rows += [_timed_row(case, name, timing, found[name], calibration, options) for name, timing in timings.items()]
        _add_speedups(rows, options.baseline)
    return sorted(rows, key=lambda row: PROVIDERS.index(row["provider"]) if row["provider"] in PROVIDERS else len(PROVIDERS))


def _timed_row(case, name, timing, checked, calibration, options):
    timing.first_call_ns = checked.first_call_ns
    values = timing.summary()
    seconds = values["median_ms"] / 1e3
    limit_ms, limit_kind = calibration.limit_ms(case.work)
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
        "samples_ms": [round(s / 1e6, 6) for s in timing.samples],
    }
    return _row(case, name, "ok", **values)


def _add_speedups(rows, baseline):
    base = next((r["median_ms"] for r in rows if r["provider"] == baseline and r["status"] == "ok"), None)
    for row in rows:
        if row["status"] == "ok":
            row["speedup"] = base / row["median_ms"] if base else None
            row["baseline"] = baseline
