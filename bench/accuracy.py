"""The accuracy gate: a provider is timed only after its result agreed with the float64 oracle.

Ours are held to the tests' own tolerance. Peers may round where they like (Hugging Face computes dt in bfloat16):
they need a normalised error that is small for their dtype, and the row shows it.
Three cheats are caught: a result that is (a view of) an input, a result kept from an earlier call, and an input
that was changed.
"""
import time
from dataclasses import dataclass

import torch

from terrazzo.tolerance import check

from . import gpu, memory
from .cases import building_on, clone_inputs, runner
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
    second_call_ns: float | None = None
    peak_bytes: int | None = None  # host memory above what was held before the second call
    peak_device_bytes: int | None = None  # the device's likewise


class Inputs:
    """A case's inputs by seed, drawn once where those of two seeds are small enough to stay. `base` is the run's own --seed."""

    KEPT_BYTES = 1 << 29  # of one set

    def __init__(self, case, base=0):
        self.case, self.base, self.kept = case, base, {}

    def __call__(self, seed):
        if seed in self.kept:
            return self.kept[seed]
        made = self.case.inputs(seed + 1000 * self.base)
        if len(self.kept) < len(SEEDS) and size_of(made) <= self.KEPT_BYTES:
            self.kept[seed] = made
        return made


def size_of(inputs):
    """Bytes of the tensors among a case's inputs."""
    return sum(t.numel() * t.element_size() for t in inputs.values() if isinstance(t, torch.Tensor))


class Oracle:
    """What the outputs should be for each seed: in float64, and in the case's own dtype by the same reference."""

    def __init__(self, case, inputs=None, device="cpu"):
        self.case = case
        self.inputs = inputs or Inputs(case)
        with building_on(device):
            self.reference = case.reference()
        self.expected = {}
        for seed in SEEDS:
            inputs = self.gate_inputs(seed)
            same = self._run(clone_inputs(inputs) if case.mutated else inputs)
            self.expected[seed] = (same, same) if case.nmse_limit else (self._run(clone_inputs(inputs, torch.float64)), same)

    def _run(self, inputs):
        if self.case.narrow:
            inputs = self.case.narrow(inputs)
        lent = {t.untyped_storage().data_ptr() for t in inputs.values() if isinstance(t, torch.Tensor)}
        result = runner(self.case, self.reference, inputs)()
        kept = lambda t: self.case.mode == "model" or t.untyped_storage().data_ptr() in lent  # noqa: E731 -- what the next call overwrites
        return tuple(t.clone() if kept(t) else t for t in result)

    @classmethod
    def trusting(cls, case, inputs):
        """One that expects nothing: for builds that passed the gate in a process before this one."""
        self = cls.__new__(cls)
        self.case, self.inputs, self.expected = case, inputs, None
        return self

    def gate_inputs(self, seed):
        inputs = self.inputs(seed)
        return self.case.prepare(inputs) if self.case.prepare else inputs


def overwrite(inputs, values):
    """Puts other values into the very same tensors."""
    for name, tensor in inputs.items():
        if isinstance(tensor, torch.Tensor):
            sizes = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride())]
            tensor.as_strided(sizes, tensor.stride()).copy_(values[name].as_strided(sizes, values[name].stride()))


class TooSlow(Exception):
    """A first call that took longer than a run can wait for."""


def gate(case, fn, oracle, ours, nmse_limit=None, cuda=None, patience_ns=None, clock=time.perf_counter_ns):
    """Accuracy of `fn`, and the time of its first call.

    nmse_limit: the provider's own, or None. cuda: torch.cuda where the inputs lie there. A first call beyond patience_ns raises TooSlow.
    """
    inputs = clone_inputs(oracle.gate_inputs(SEEDS[0]))
    run = runner(case, fn, inputs)
    found, result = Accuracy(), []

    def call():
        result[:] = run()
        if cuda is not None:
            cuda.synchronize()

    def second():
        found.second_call_ns = time_once(call, clock)

    for number, seed in enumerate(SEEDS):
        expected_inputs = oracle.gate_inputs(seed)
        if number:
            overwrite(inputs, expected_inputs)
            host = lambda: memory.peak_of(second)  # noqa: E731
            if cuda is None:
                found.peak_bytes = host()
            else:
                found.peak_device_bytes = gpu.peak_of(lambda: setattr(found, "peak_bytes", host()), cuda)
        else:
            found.first_call_ns = time_once(call, clock)
            if patience_ns is not None and found.first_call_ns > patience_ns:
                raise TooSlow(f"one call takes {found.first_call_ns / 1e9:.1f} s")
        if oracle.expected is None:
            found.max_abs = found.rel = found.nmse = float("nan")
            continue
        why = _misuse(case, inputs, expected_inputs, result)
        outputs = tuple(result) if case.narrow is None else case.narrow(None, tuple(result))
        _compare(found, outputs, *oracle.expected[seed], nmse_limit or case.nmse_limit or (None if ours else PEER_NMSE[case.dtype]))
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


def _compare(found, outputs, expected64, expected_same, limit):
    """limit: of the NMSE; None: the tests' own tolerance."""
    if len(outputs) != len(expected64):
        found.ok, found.why = False, f"{len(outputs)} outputs, expected {len(expected64)}"
        return
    for index, (out, ref64, same) in enumerate(zip(outputs, expected64, expected_same)):
        verdict = check(out, ref64, same)
        found.max_abs = max(found.max_abs, verdict.max_abs)
        found.rel = max(found.rel, verdict.rel)
        found.nmse = max(found.nmse, verdict.nmse)
        # "not <=" rather than ">": NaN must fail
        failed = not verdict.ok if limit is None else not verdict.nmse <= limit
        if failed and found.ok:
            why = verdict.why if limit is None else f"NMSE {verdict.nmse:.1e} above {limit:.0e}"
            found.ok, found.why = False, f"output {index}: {why}"
