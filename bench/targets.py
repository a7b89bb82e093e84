"""The speeds this project holds itself to, and `terrazzo bench targets`, which measures all of them in one run.

Ratios are taken between providers of the same interleaved run; "limit" is the time this machine could not beat
(roofline.py). Both sides run with two threads and the same tuned allocator.
"""
from dataclasses import dataclass, replace

from . import memory
from .cases import select
from .suite import PROVIDERS, all_cases, measure

PRESETS = ("bamba-9b", "dbrx", "mixtral", "blt", "blenderbot-400m")
THREADS = 2
PACKED = "packed limit"  # as "limit", with weights packed before the call
HF_MEMORY = "hf memory"  # the growth of the process in one call, as a part of transformers'
PER_FLOP = "flops of "  # against another case: at least `bar` times its rate


@dataclass(frozen=True)
class Target:
    """One bar on one case: at least `bar` times as fast as `against`, or at most `bar` times the limit or memory."""

    op: str
    size: str
    mode: str
    dtype: str
    against: str  # a provider, "limit", PACKED, "memory", HF_MEMORY, or PER_FLOP and the key of another case
    bar: float

    @property
    def key(self):
        return f"{self.op} {self.size} {self.dtype} {self.mode}"

    @property
    def cases(self):
        """The keys of the cases that this needs, its own last."""
        other = (self.against.removeprefix(PER_FLOP),) if self.against.startswith(PER_FLOP) else ()
        return (*other, self.key)

    @property
    def text(self):
        if self.against in ("limit", PACKED):
            return f"≤ {self.bar:g} × the limit" + (", packed" if self.against == PACKED else "")
        if self.against == "memory":
            return f"≤ {self.bar:g} × inputs and outputs"
        if self.against == HF_MEMORY:
            return f"≤ {self.bar:g} × transformers' memory"
        return f"≥ {self.bar:g} × {'the ' if self.against.startswith(PER_FLOP) else ''}{self.against}"


def _targets(op, sizes, mode, dtype, **bars):
    return [Target(op, size, mode, dtype, PACKED if against == "packed_limit" else against.replace("_", "-"), bar) for size in sizes for against, bar in bars.items()]


GROUPED, EXPERTS, LINEAR = "grouped_mm", "fused_experts", "linear"
CROSS, OWN = "patch_cross_attention", "terrazzo.models"
DBRX = "1024x1792 16x4 balanced"
SCAN, CONV, CONV_UPDATE, UPDATE = "mamba_chunk_scan_combined", "causal_conv1d_fn", "causal_conv1d_update", "selective_state_update"
TARGETS = (
    *_targets(SCAN, ("1x512x128x64 N128", "1x2048x128x64 N128"), "fwd", "fp32", hf=15, hf_compiled=15, limit=1.7),
    *_targets(SCAN, ("1x512x128x64 N256", "1x2048x128x64 N256"), "fwd", "fp32", hf=9.5, hf_compiled=9.5, limit=1.7),
    *_targets(SCAN, ("1x512x128x64 N128",), "bwd", "fp32", hf=7, limit=2),
    *_targets(SCAN, ("1x512x128x64 N128", "1x2048x128x64 N128"), "fwd", "fp32", memory=2),
    *_targets(SCAN, ("1x512x128x64 N128",), "bwd", "fp32", memory=2),
    *_targets(CONV, ("1x8448x512",), "fwd", "fp32", hf=6, limit=1.8),
    *_targets(CONV, ("1x8448x2048",), "fwd", "fp32", hf=14, limit=1.8),
    *_targets(CONV, ("1x8448x512", "1x8448x2048"), "fwd", "bf16", hf=30),
    *_targets(CONV, ("1x8448x512", "1x8448x2048"), "bwd", "fp32", hf=10, limit=2.2),
    *_targets(CONV_UPDATE, ("1x8448", "8x8448", "32x8448"), "decode", "fp32", hf=14),
    *_targets(CONV_UPDATE, ("1x8448", "8x8448", "32x8448"), "decode", "bf16", hf=200),
    *_targets(UPDATE, ("1x128x64 N128",), "decode", "fp32", hf=40),
    *_targets(UPDATE, ("8x128x64 N128",), "decode", "fp32", hf=16, limit=1.15),
    *_targets("bamba_block", ("prefill 1x1024 hidden 1024",), "model", "fp32", hf=1.4),
    *_targets("bamba_block", ("decode 1x1 hidden 1024",), "model", "fp32", hf=1.25),
    # 0.80 and 0.75 of the FMA peak are 1.25 and 1.33 times the limit
    *_targets(GROUPED, ("4x256x1024x1792 NT", "4x256x2048x2048 NT", "4x256x1024x1792 NN"), "fwd", "fp32", limit=1.25, torch=1.15),
    *_targets(GROUPED, ("4x256x1024x1792 NT", "4x256x2048x2048 NT"), "fwd", "bf16", limit=1.33, torch=6),
    *_targets(GROUPED, ("4x256x1024x1792 NN",), "fwd", "bf16", limit=1.33, torch=50),
    *_targets(EXPERTS, (f"64 tokens {DBRX}",), "fwd", "fp32", limit=2.4, packed_limit=1.8),
    *_targets(EXPERTS, (f"256 tokens {DBRX}",), "fwd", "fp32", limit=1.6, packed_limit=1.4),
    *_targets(EXPERTS, (f"1024 tokens {DBRX}",), "fwd", "fp32", limit=1.4, packed_limit=1.3),
    *_targets(EXPERTS, tuple(f"{T} tokens {DBRX}" for T in (64, 256, 1024)), "fwd", "bf16", hf=20, hf_grouped=3),
    *_targets(EXPERTS, (f"1 tokens {DBRX}",), "fwd", "fp32", limit=1.25),
    *_targets(EXPERTS, (f"8 tokens {DBRX}",), "fwd", "fp32", limit=1.4),
    *_targets(EXPERTS, (f"1 tokens {DBRX}",), "fwd", "bf16", limit=1.5, hf=8),
    *_targets(EXPERTS, (f"8 tokens {DBRX}",), "fwd", "bf16", limit=1.6, hf=15),
    *_targets(EXPERTS, (f"512 tokens {DBRX}",), "bwd", "fp32", hf=2.5, hf_grouped=1.3),
    *_targets(EXPERTS, (f"512 tokens {DBRX}",), "bwd", "bf16", hf=20),
    *_targets(LINEAR, ("64x1024x1792", "256x1024x1792", "64x2048x2048", "256x2048x2048"), "fwd", "bf16", limit=1.43, torch=6),
    *_targets(LINEAR, ("64x1024x1792", "256x2048x2048"), "fwd", "fp16", limit=1.43, torch=6),
    *_targets(LINEAR, ("1x1024x1792", "1x2048x2048"), "fwd", "bf16", limit=1.3),
    *_targets(LINEAR, ("64x1024x1792", "256x2048x2048"), "bwd", "bf16", torch=5),
    # within 15 %: bf16 of fp32 where both compute, and an uneven load of an even one
    Target(EXPERTS, f"1024 tokens {DBRX}", "fwd", "bf16", f"{PER_FLOP}{EXPERTS} 1024 tokens {DBRX} fp32 fwd", 0.87),
    Target(EXPERTS, "1024 tokens 1024x448 64x4 zipf", "fwd", "fp32", f"{PER_FLOP}{EXPERTS} 1024 tokens 1024x448 64x4 balanced fp32 fwd", 0.87),
    *_targets("moe_route", ("4096 tokens 16x4 with permute",), "fwd", "fp32", hf=5),
    *_targets("moe_route", ("4096 tokens 16x4 with permute",), "fwd", "bf16", hf=5),
    *_targets("bf16_model", ("bamba prefill 1x256",), "model", "bf16", hf=5),
    *_targets("bf16_model", ("bamba decode 1x1",), "model", "bf16", hf=2.5),
    *_targets("bf16_model", ("dbrx prefill 1x256",), "model", "bf16", hf=20),
    *_targets("bf16_model", ("dbrx decode 1x1",), "model", "bf16", hf=6),
    *_targets("bf16_model", ("blenderbot generate 8x1",), "model", "bf16", hf=4),
    *_targets("bamba_block", ("training step 1x1024 hidden 1024",), "model", "fp32", hf=1.7),
    # patches and local attention
    *_targets("patch_reduce", ("amax 4096 bytes 1024",), "fwd", "fp32", hf=20, limit=3),
    *_targets(CROSS, ("patches 4096 bytes 16x64", "bytes 4096 bytes 16x64"), "fwd", "fp32", hf=100),
    *_targets(CROSS, ("patches 8192 bytes 16x64", "bytes 8192 bytes 16x64"), "fwd", "fp32", limit=2.7),
    *_targets(CROSS, ("patches 8192 bytes 16x64", "bytes 8192 bytes 16x64"), "bwd", "fp32", limit=4),
    *_targets(CROSS, ("patches 131072 bytes 16x64", "bytes 131072 bytes 16x64"), "fwd", "fp32", limit=2.7, memory=1.5),
    *_targets("local_attention", ("4096 window 512 16/16x64",), "fwd", "fp32", torch=3, memory=1.5),
    *_targets("local_attention", ("16384 window 512 16/16x64",), "fwd", "fp32", torch=10, memory=1.5),
    *_targets("entropy_patch", ("1x8192x260", "1x131072x260"), "fwd", "fp32", hf=8.5, limit=1.7),
    *_targets("patch_lengths_from_entropies", ("1x8192 with ids",), "fwd", "fp32", hf=500),
    *_targets("byte_hash_embedding", ("1x1024x1024",), "fwd", "fp32", hf=3, limit=5),
    *_targets("byte_hash_embedding", ("1x8192x1024",), "fwd", "fp32", hf=5, limit=15),
    *_targets("byte_hash_embedding", ("1x1024x1024", "1x8192x1024"), "bwd", "fp32", hf=5),
    *_targets("blt_model", ("forward 4096 bytes hidden 256",), "model", "fp32", hf=1.5),
    *_targets("blt_model", ("forward 8192 bytes hidden 256",), "model", "fp32", hf=2.5),
    Target("blt_model", "forward 8192 bytes hidden 256", "model", "fp32", HF_MEMORY, 0.333),
    *_targets("blt_model", ("forward 4096 bytes hidden 256", "forward 8192 bytes hidden 256"), "model", "bf16", hf=5),
    # the models defined here
    *_targets(OWN, ("bamba prefill 1x512",), "model", "fp32", hf=1.5),
    *_targets(OWN, ("bamba decode 1x1",), "model", "fp32", hf=1.4),
    *_targets(OWN, ("bamba training step 1x512",), "model", "fp32", hf=1.8),
    *_targets(OWN, ("bamba prefill 1x512",), "model", "bf16", hf=5),
    *_targets(OWN, ("bamba decode 1x1",), "model", "bf16", hf=3),
    *_targets(OWN, ("bamba training step 1x512",), "model", "bf16", hf=4),
    *_targets(OWN, ("dbrx prefill 1x256",), "model", "fp32", hf=1.4),
    *_targets(OWN, ("dbrx decode 1x1",), "model", "fp32", hf=1.3),
    *_targets(OWN, ("dbrx prefill 1x256",), "model", "bf16", hf=20),
    *_targets(OWN, ("dbrx decode 1x1",), "model", "bf16", hf=8),
    *_targets(OWN, ("blt decode behind 512 1x1",), "model", "fp32", hf=40, limit=2),
    *_targets(OWN, ("blt decode behind 1024 1x1",), "model", "fp32", hf=80, limit=2),
    *_targets(OWN, ("blenderbot generate 1x32",), "model", "fp32", hf=1.3),
)  # fmt: skip


def _rival(target):
    return "hf" if target.against == HF_MEMORY else target.against


def judge(target, rows, peak=None, rates=None):
    """(measured ratio or None, passed, reason) of one target from the rows of its case."""
    if target.against == "memory":
        if peak is None or peak[0] is None:
            return None, False, "peak memory cannot be read on this system"
        ratio = peak[0] / peak[1]
        return ratio, ratio <= target.bar, ""
    by_provider = {row["provider"]: row for row in rows}
    ours = by_provider.get("terrazzo-packed") if target.against == PACKED else by_provider.get("cpu", by_provider.get("terrazzo"))
    other = by_provider.get(_rival(target))
    for row in (ours, other):
        if row is not None and row["status"] != "ok":
            return None, False, f"{row['provider']} {row['status']}: {row['reason']}"
    if ours is None:
        return None, False, "terrazzo has no such case"
    if target.against in ("limit", PACKED):
        return ours["times_limit"], ours["times_limit"] <= target.bar, ""
    if target.against.startswith(PER_FLOP):
        rate = (rates or {}).get(target.cases[0])
        ratio = ours["gflops"] / rate if rate else None
        return ratio, ratio is not None and ratio >= target.bar, "" if rate else f"{target.cases[0]} was not measured"
    if other is None:
        return None, False, f"{_rival(target)} was not measured"
    if target.against == HF_MEMORY:
        if ours["peak_bytes"] is None:
            return None, False, "peak memory cannot be read on this system"
        ratio = ours["peak_bytes"] / other["peak_bytes"]
        return ratio, ratio <= target.bar, ""
    ratio = other["median_ms"] / ours["median_ms"]
    return ratio, ratio >= target.bar, ""


def run(options, calibration, match=None, *, machine_is_free=None, on_case=None, on_rows=None, on_progress=None):
    """Measures the cases of every target (those that `match` selects) -> [{"target", "case", "measured", "bar", "passed", "reason"}].

    `on_case(number, total)` and `on_rows(rows)` follow the work.
    """
    cases = {case.key: case for preset in PRESETS for case in all_cases(preset)}
    wanted = [cases[key] for key in dict.fromkeys(key for t in TARGETS for key in t.cases)]
    results, rates = [], {}
    chosen = select(wanted, match=match)
    for number, case in enumerate(chosen):
        if on_case:
            on_case(number, len(chosen))
        targets = [t for t in TARGETS if t.key == case.key]
        packed = ("terrazzo-packed",) if any(t.against == PACKED for t in targets) else ()
        providers = ("cpu", "terrazzo", *packed, *(_rival(t) for t in targets if _rival(t) in PROVIDERS))
        case_rows = measure(case, replace(options, providers=providers), calibration, machine_is_free=machine_is_free, on_progress=on_progress)
        if on_rows:
            on_rows(case_rows)
        rates |= {case.key: row["gflops"] for row in case_rows if row["provider"] in ("cpu", "terrazzo") and row["status"] == "ok"}
        for target in targets:
            peak = memory.peak_in_fresh_process(target.op, target.size, target.mode, target.dtype, THREADS) if target.against == "memory" else None
            measured, passed, reason = judge(target, case_rows, peak, rates)
            results.append({
                "kind": "target", "target": target.text, "case": case.key, "measured": measured, "bar": target.bar,
                "passed": passed, "reason": reason,
            })  # fmt: skip
    return results
