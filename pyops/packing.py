"""Weights of grouped products laid out once as the kernels read them, as they are or in int8: for repeated inference.

A packed weight holds panels of 16 columns, each contiguous along K, zero beyond the last column. Its elements keep their
dtype, or become int8 with one factor for each expert and column (symmetric: round(127 w / max |w|)), which moves half of
bfloat16's bytes; an element is then off by at most half a step, max |w| / 254 of its column.
"""
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from . import checks, dispatch

logger = logging.getLogger("terrazzo")

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


class PackedHandle:
    """What pack_experts did: report() says where, nbytes what it takes, undo() reverts it; usable as a context manager."""

    def __init__(self, handle, modules):
        self._handle, self._modules = handle, modules

    def report(self):
        return self._handle.report()

    @property
    def nbytes(self):
        return sum(module.__dict__[_ATTRIBUTE][0].nbytes for module in self._modules)

    def undo(self):
        """Drops the packed weights and reverts the patch; a second call does nothing."""
        for module in self._modules:
            module.__dict__.pop(_ATTRIBUTE, None)
        self._modules = []
        self._handle.undo()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.undo()


def pack_experts(model, weight_format=None):
    """Packs the experts of a Hugging Face model once, for repeated inference, and patches them (`terrazzo.patch`) to use that.

    The model's own weights stay: state_dict, saving and training go on as before, and calls that need gradients run on
    them. Where a weight changed since, its layer runs on the weight itself and a warning says so.

    Args:
        model: an nn.Module with experts that `fused_experts` serves on the CPU (DBRX's, and those behind transformers'
            ExpertsInterface).
        weight_format: None keeps the elements; "int8" rounds them, see `pack_weight`.

    Returns:
        PackedHandle: `.undo()`, `.report()`, `.nbytes` (extra memory).

    Raises:
        ValueError: no such experts, or an unknown format.
    """
    from . import adapters, patching

    op = "pack_experts"
    if not isinstance(model, nn.Module):
        checks.fail(op, f"model must be an nn.Module, got {type(model).__name__}")
    _check_format(op, weight_format)
    handle = patching.patch(model, ops=["fused_experts"])
    try:
        paths = [row.module for row in handle.report() if row.op == "fused_experts" and row.backend == "cpu"]
        named = dict(model.named_modules())
        modules = [named.get(path, model) for path in paths]
        if not modules:
            checks.fail(op, f"model has no experts that fused_experts serves on the cpu; terrazzo.patch(model).report() says why:\n{handle.report()}")
        for module in modules:
            w_gate_up, w_down, options = adapters.expert_layout(module)
            packed = pack_expert_weights(w_gate_up, w_down, weight_format=weight_format, **options)
            module.__dict__[_ATTRIBUTE] = packed, _state((w_gate_up, options.get("w_up"), w_down))
    except Exception:
        handle.undo()
        raise
    return PackedHandle(handle, modules)


_ATTRIBUTE = "_terrazzo_packed"  # of a module: (PackedExperts, the state of the weights they were made from)


def _state(weights):
    return tuple((w.data_ptr(), w._version) for w in weights if w is not None)


def attached(module, tensors):
    """The module's packed experts for a call on `tensors` (x, weights, routing), or None: none, outdated, or gradients are needed."""
    kept = module.__dict__.get(_ATTRIBUTE)
    if kept is None or dispatch.needs_grad(*tensors):
        return None
    packed, state = kept
    if not torch.compiler.is_compiling():
        present = {(t.data_ptr(), t._version) for t in tensors if isinstance(t, nn.Parameter)}
        if not present.issuperset(state):
            logger.warning("terrazzo.pack_experts: the weights of a %s changed since they were packed; it runs on the weights themselves", type(module).__name__)
            del module.__dict__[_ATTRIBUTE]
            return None
    return packed


def _check_format(op, weight_format):
    if weight_format not in FORMATS:
        checks.fail(op, f"weight_format must be None or 'int8', got {weight_format!r}")
