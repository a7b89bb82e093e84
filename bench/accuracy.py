"""The accuracy gate: a provider is timed only after its result agreed with the float64 oracle.

Ours are held to the tests' own tolerance. Peers may round where they like (Hugging Face computes dt in bfloat16):
they need a normalised error that is small for their dtype, and the row shows it.
Three cheats are caught: a result that is (a view of) an input, a result kept from an earlier call, and an input
that was changed.
"""
from dataclasses import dataclass

import torch

from terrazzo.tolerance import check

from . import memory
from .cases import clone_inputs, runner
from .timer import time_once

PEER_NMSE = {"fp32": 1e-7, "fp64": 1e-7, "fp16": 1e-4, "bf16": 1e-3}
SEEDS = (101, 202)


@dataclass
class Accuracy:
    """Worst over the outputs of two calls with different values in the same tensors."""

    ok: bool = True
    max_abs: float = 0.0
    rel: float = 0.0
    nmse: float = 0.0
    why: str = ""
    first_call_ns: float | None = None
    peak_bytes: int | None = None  # host memory above what was held before the second call


class Oracle:
    """What the outputs should be for each seed: in float64, and in the case's own dtype by the same reference."""

    def __init__(self, case):
        self.case = case
        self.reference = case.reference()
        self.expected = {}
        for seed in SEEDS:
            inputs = gate_inputs(case, seed)
            same = self._run(clone_inputs(inputs))
            self.expected[seed] = (same, same) if case.nmse_limit else (self._run(clone_inputs(inputs, torch.float64)), same)

    def _run(self, inputs):
        if self.case.narrow:
            inputs = self.case.narrow(inputs)
        return tuple(t.clone() for t in runner(self.case, self.reference, inputs)())


def gate_inputs(case, seed):
    inputs = case.inputs(seed)
    return case.prepare(inputs) if case.prepare else inputs


def overwrite(inputs, values):
    """Puts other values into the very same tensors."""
    for name, tensor in inputs.items():
        if isinstance(tensor, torch.Tensor):
            sizes = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride())]
            tensor.as_strided(sizes, tensor.stride()).copy_(values[name].as_strided(sizes, values[name].stride()))


def gate(case, fn, oracle, ours):
    """Accuracy of `fn`, and the time of its first call."""
    inputs = clone_inputs(gate_inputs(case, SEEDS[0]))
    run = runner(case, fn, inputs)
    found, result = Accuracy(), []

    def call():
        result[:] = run()

    for number, seed in enumerate(SEEDS):
        expected_inputs = gate_inputs(case, seed)
        if number:
            overwrite(inputs, expected_inputs)
            found.peak_bytes = memory.peak_of(call)
        else:
            found.first_call_ns = time_once(call)
        why = _misuse(case, inputs, expected_inputs, result)
        outputs = tuple(result) if case.narrow is None else case.narrow(None, tuple(result))
        _compare(case, found, outputs, *oracle.expected[seed], ours)
        if why and found.ok:
            found.ok, found.why = False, why
        if not found.ok:
            if number:
                found.why += " (second call, other values in the same tensors)"
            break
    return found


def _misuse(case, inputs, before, result):
    """Why a call broke the rules, or None: results that are inputs, inputs that changed."""
    for name, tensor in inputs.items():
        if not isinstance(tensor, torch.Tensor) or name in case.mutated:
            continue
        if not torch.equal(tensor, before[name]):
            return f"changed its input {name}"
        for out in result:
            if out.numel() and out.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                return f"returned its input {name}"
    return None


def _compare(case, found, outputs, expected64, expected_same, ours):
    if len(outputs) != len(expected64):
        found.ok, found.why = False, f"{len(outputs)} outputs, expected {len(expected64)}"
        return
    for index, (out, ref64, same) in enumerate(zip(outputs, expected64, expected_same)):
        verdict = check(out, ref64, same)
        found.max_abs = max(found.max_abs, verdict.max_abs)
        found.rel = max(found.rel, verdict.rel)
        found.nmse = max(found.nmse, verdict.nmse)
        limit = case.nmse_limit or (None if ours else PEER_NMSE[case.dtype])
        # "not <=" rather than ">": NaN must fail
        failed = not verdict.ok if limit is None else not verdict.nmse <= limit
        if failed and found.ok:
            why = verdict.why if limit is None else f"NMSE {verdict.nmse:.1e} above {limit:.0e}"
            found.ok, found.why = False, f"output {index}: {why}"
