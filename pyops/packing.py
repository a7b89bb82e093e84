"""Weights of grouped products laid out once as the kernels read them, as they are or in int8: for repeated inference.

A packed weight holds panels of 16 columns, each contiguous along K, zero beyond the last column. Its elements keep their
dtype, or become int8 with one factor for each expert and column (symmetric: round(127 w / max |w|)), which moves half of
bfloat16's bytes; an element is then off by at most half a step, max |w| / 254 of its column.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import checks

PANEL = 16
FORMATS = (None, "int8")


@dataclass(frozen=True)
class PackedWeight:
    """One matrix (K, N) for each of E experts. data: (E, panels, K, 16); scale: (E, N) float32 with int8; dtype: the
    weight's before packing."""

    data: torch.Tensor
    scale: torch.Tensor | None
    N: int
    dtype: torch.dtype

    @property
    def shape(self):
        return torch.Size((self.data.shape[0], self.data.shape[2], self.N))

    @property
    def nbytes(self):
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def unpack(self):
        """The weight (E, K, N) again: the same bits, or with int8 the float32 values that the kernels multiply by."""
        w = self.data.transpose(1, 2).flatten(2)[..., : self.N]
        return w if self.scale is None else w * self.scale[:, None]

    def __repr__(self):
        kind = self.dtype if self.scale is None else "int8"
        return f"PackedWeight({tuple(self.shape)}, {kind}, {self.nbytes / 2**20:.1f} MiB)"


def pack_weight(weight, weight_format=None):
    """Packs a weight for `grouped_mm`.

    Args:
        weight: (E, K, N) float32, bfloat16, float16 or float64, any strides; it is copied.
        weight_format: None keeps the elements, "int8" rounds them to one step for each expert and column.

    Returns:
        PackedWeight, accepted by `grouped_mm` in the place of b, without gradients.
    """
    op = "pack_weight"
    checks.check_tensor(op, "weight", weight, 3, "(E, K, N)")
    _check_format(op, weight_format)
    E, K, N = weight.shape
    checks.check_positive(op, E=E, K=K, N=N)
    weight, scale = weight.detach(), None
    dtype = weight.dtype
    if weight_format == "int8":
        if dtype == torch.float64:
            checks.fail(op, "weight_format 'int8' serves float32, bfloat16 and float16 weights, got float64")
        largest = torch.amax(weight.abs().float(), 1)
        if not torch.isfinite(largest).all():
            checks.fail(op, "weight_format 'int8' needs finite weights, got infinities or NaN")
        scale = (largest / 127).contiguous()
        steps = torch.where(scale > 0, scale, 1)[:, None]
        weight = (weight.float() / steps).round().clamp(-127, 127).to(torch.int8)
    padded = F.pad(weight, (0, -N % (2 * PANEL)))
    return PackedWeight(padded.unflatten(2, (-1, PANEL)).transpose(1, 2).contiguous(), scale, N, dtype)


@dataclass(frozen=True)
class PackedExperts:
    """The weights of a layer of experts, packed by `pack_expert_weights`, for `fused_experts`. w_up is None without a gate
    and where gate and up alternate."""

    w1: PackedWeight
    w_up: PackedWeight | None
    w2: PackedWeight
    gated: bool

    @property
    def interleaved(self):
        return self.gated and self.w_up is None

    @property
    def weights(self):
        return [w for w in (self.w1, self.w_up, self.w2) if w is not None]

    @property
    def nbytes(self):
        return sum(w.nbytes for w in self.weights)


def pack_expert_weights(w_gate_up, w_down, *, w_up=None, interleaved=False, transposed=None, num_experts=None, weight_format=None):
    """Packs the weights of a layer of experts; arguments as of `fused_experts`, which takes the result as w_gate_up (with
    w_down None). `transposed` None: as stored by most models, w_gate_up (E, 2F, D) and w_down (E, D, F).

    Returns:
        PackedExperts: copies; the originals stay as they are.
    """
    from .fused_experts import one_layout

    op = "pack_expert_weights"
    _check_format(op, weight_format)
    if not isinstance(w_gate_up, torch.Tensor) or w_gate_up.dim() not in (2, 3):
        checks.check_tensor(op, "w_gate_up", w_gate_up, 3, "(E, 2F, D)")
    flat = w_gate_up.dim() == 2
    if not flat and transposed is None:
        transposed = False
    first = transposed[0] if isinstance(transposed, (tuple, list)) else transposed
    D = w_gate_up.shape[1] if flat or first else w_gate_up.shape[2]
    w1, w_up, w2 = one_layout(w_gate_up.new_empty(0, D), w_gate_up, w_up, w_down, transposed, num_experts, interleaved)
    gated = w_up is not None or w1.shape[1] == 2 * w2.shape[2]
    if gated and w_up is None and not interleaved:
        w1, w_up = w1.chunk(2, 1)
    packed = [None if w is None else pack_weight(w.mT, weight_format) for w in (w1, w_up, w2)]
    return PackedExperts(*packed, gated)


def _check_format(op, weight_format):
    if weight_format not in FORMATS:
        checks.fail(op, f"weight_format must be None or 'int8', got {weight_format!r}")
