"""One tolerance rule for tests, `terrazzo doctor` and the benchmark's accuracy gate.

With R the float64 reference and E the reference in the op's own dtype, an output passes when
max|out - R| <= 2 max|E - R| + a rounding floor, and its normalised mean squared error is small for the dtype,
and it is finite where R is, with E's shape and dtype. That second limit is an op's, which rounds its result once. A whole model in 16 bits rounds in every
layer, so that E itself breaks it: there it is four times E's own, which is twice the error, as in the first.
"""
from dataclasses import dataclass

import torch

NMSE = {torch.bfloat16: 2e-5, torch.float16: 5e-7, torch.float32: 1e-10, torch.float64: 1e-20}
# The floor, in roundings of the largest value: one of a low-precision result, sums in another order in float32. In
# float64 E is R itself and says nothing about rounding: room for sums of a few thousand terms.
ROUNDINGS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 8, torch.float64: 4096}
PIECE = 1 << 18  # elements that are judged at once: three float64 copies of them stay in a cache


@dataclass(frozen=True)
class Verdict:
    """ok, and how far off: max_abs, rel (max_abs over the largest |R|), nmse; `why` says which rule broke."""

    ok: bool
    max_abs: float
    rel: float
    nmse: float
    why: str


def _measures(out, ref64, ref_same_dtype):
    """(elements that only one of out and R has finite; max |R|, |out - R|, |E - R|; sums of their squares), where R is finite.

    Piece by piece: a reference of gigabytes stays the only tensor of its size.
    """
    differ, peaks, powers = 0, [], []
    for R, O, E in zip(*(t.detach().flatten().split(PIECE) for t in (ref64, out, ref_same_dtype)), strict=True):
        R, O, E = R.double(), O.double(), E.double()
        finite = R.isfinite()
        differ += (O.isfinite() != finite).sum()
        found = [torch.where(finite, t, 0) for t in (R, O - R, E - R)]
        peaks.append(torch.stack([t.abs().max() for t in found]))
        powers.append(torch.stack([t.square().sum() for t in found]))
    return int(differ), *torch.stack(peaks).amax(0).tolist(), *torch.stack(powers).sum(0).tolist()


def check(out, ref64, ref_same_dtype, whole_model=False):
    """Judges `out`, of an op or of a whole model, against the float64 reference and the reference in out's dtype."""
    nan = float("nan")
    if out.shape != ref_same_dtype.shape or out.dtype != ref_same_dtype.dtype:
        why = f"got {tuple(out.shape)} {out.dtype}, not {tuple(ref_same_dtype.shape)} {ref_same_dtype.dtype}"
        return Verdict(False, nan, nan, nan, why)
    if ref64.shape != out.shape:
        raise ValueError(f"terrazzo.tolerance.check: ref64 must have out's shape {tuple(out.shape)}, got {tuple(ref64.shape)}")
    if out.numel() == 0:
        return Verdict(True, 0.0, 0.0, 0.0, "")
    if not out.is_floating_point():  # indices: exactly those
        wrong = int((out != ref_same_dtype).sum())
        return Verdict(not wrong, *(nan if wrong else 0.0,) * 3, f"{wrong} integers differ" if wrong else "")
    other, scale, error, same_error, power, error_power, same_power = _measures(out, ref64, ref_same_dtype)
    if other:
        return Verdict(False, nan, nan, nan, f"{other} elements differ in being finite")
    nmse = error_power / power if power else 0.0 if error == 0 else float("inf")
    nmse_limit = NMSE[out.dtype]
    if whole_model and power:
        nmse_limit = max(nmse_limit, 4 * same_power / power)
    floor = ROUNDINGS[out.dtype] * torch.finfo(out.dtype).eps * scale + torch.finfo(out.dtype).tiny
    limit = 2 * same_error + floor
    why = ""
    if error > limit:
        why = f"max error {error:.3g} is over the limit {limit:.3g}"
    elif nmse > nmse_limit:
        why = f"nmse {nmse:.3g} is over the limit {nmse_limit:.3g}"
    return Verdict(not why, error, error / scale if scale else 0.0, nmse, why)
