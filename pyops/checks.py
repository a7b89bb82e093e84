"""Argument checks shared by the public functions: which function, which argument, the rule, what came."""
import math
import numbers

import torch
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(fn, message, error=ValueError):
    raise error(f"terrazzo.{fn}: {message}")


def describe(value):
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else repr(value)


def check_tensor(fn, name, value, ndim, shape_text, like=None, dtypes=FLOATS):
    """value is a tensor of `ndim` dimensions, an allowed dtype, on `like`'s device."""
    if not isinstance(value, torch.Tensor):
        fail(fn, f"{name} must be a tensor {shape_text}, got {type(value).__name__}", TypeError)
    if value.dim() != ndim:
        fail(fn, f"{name} must be {shape_text}, got {describe(value)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        fail(fn, f"{name} must be {names}, got {str(value.dtype).removeprefix('torch.')}; convert it first", TypeError)
    if value.layout is not torch.strided:
        fail(fn, f"{name} must be a dense tensor {shape_text}, got layout {str(value.layout).removeprefix('torch.')}; call .to_dense() first", TypeError)
    if like is not None and value.device != like.device:
        fail(fn, f"{name} must be on {like.device} like the first argument, got {value.device}; move it first")


def check_shape(fn, name, value, shape, shape_text):
    """value has exactly `shape`; None stands for any size of a dimension."""
    if any(want is not None and want != got for want, got in zip(shape, value.shape)):
        text = ", ".join("*" if s is None else str(s) for s in shape)
        fail(fn, f"{name} must be {shape_text} = ({text}), got {describe(value)}")


def check_optional(fn, name, value, shape, shape_text, like, dtypes=FLOATS):
    if value is not None:
        check_tensor(fn, name, value, len(shape), shape_text, like, dtypes)
        check_shape(fn, name, value, shape, shape_text)


def check_flags(fn, **flags):
    """True or False; the numbers 1 and 0 and None will do, as they do in Python."""
    for name, value in flags.items():
        if not isinstance(value, int) and value is not None:
            fail(fn, f"{name} must be True or False, got {value!r}", TypeError)


def check_number(fn, name, value, low=-math.inf, finite=False):
    """A real number of at least `low`, not NaN."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        fail(fn, f"{name} must be a number, got {value!r}", TypeError)
    if finite and not math.isfinite(value):
        fail(fn, f"{name} must be finite, got {value!r}")
    if not value >= low:
        fail(fn, f"{name} must be a number" + ("" if low == -math.inf else f" of at least {low:g}") + f", got {value!r}")


def check_writable(fn, name, value):
    """A tensor that is updated in place: no two of its elements are one place in memory."""
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape)):
        fail(fn, f"{name} is updated in place and must not be expanded, got strides {tuple(value.stride())} for {describe(value)}; pass a .clone()")


def check_positive(fn, **sizes):
    for name, size in sizes.items():
        if size == 0:
            fail(fn, f"{name} must be positive, got 0")


def check_float64(fn, **tensors):
    """float64 goes with float64 only: the kernels sum everything else in float32."""
    given = {name: t.dtype for name, t in tensors.items() if t is not None}
    if torch.float64 in given.values() and len(set(given.values())) > 1:
        text = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in given.items())
        fail(fn, f"float64 goes with float64 only, got {text}; convert the others", TypeError)


def has_values(tensor):
    """Whether values can be read here: not in a graph, where it would break, nor on a device, which would have to be waited for, nor of a DTensor.

    Otherwise the kernel itself checks them.
    """
    if not tensor.is_cpu or torch.compiler.is_compiling():
        return False
    return type(tensor) is torch.Tensor or not (isinstance(tensor, FakeTensor) or is_spread(tensor))


def is_spread(tensor):
    """Whether this is a DTensor. (Its class isn't imported: torch.distributed need not be there.)"""
    return not torch.compiler.is_compiling() and hasattr(tensor, "placements")


def check_not_negative(fn, name, value):
    if not has_values(value) or value.numel() == 0:
        return
    lowest = int(value.min())
    if lowest < 0:
        fail(fn, f"{name} must not be negative, got {lowest}")


def check_seq_idx(fn, seq_idx, B, L, like):
    check_optional(fn, "seq_idx", seq_idx, (B, L), "(B, L)", like, dtypes=(torch.int32,))


def check_cu_seqlens(fn, cu_seqlens, B, T, like):
    """(sequences + 1,) int32, from 0 to T, not decreasing; the batch is one packed row."""
    if cu_seqlens is None:
        return
    check_tensor(fn, "cu_seqlens", cu_seqlens, 1, "(sequences + 1,)", like, dtypes=(torch.int32,))
    if cu_seqlens.shape[0] < 2:
        fail(fn, f"cu_seqlens must hold at least one sequence: (sequences + 1,), got {describe(cu_seqlens)}")
    if B != 1:
        fail(fn, f"cu_seqlens needs all sequences packed into a batch of 1, got a batch of {B}; use seq_idx for a batch")
    if not has_values(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != T:
        fail(fn, f"cu_seqlens must start at 0 and end at {T}, the number of positions, got {ends[0]} and {ends[-1]}")
    for index, (begin, end) in enumerate(zip(ends, ends[1:])):
        if end < begin:
            fail(fn, f"cu_seqlens must not decrease, got {begin} then {end} at index {index + 1}")


def check_slots(fn, name, indices, B, num_slots, like):
    """(B,) int32 slots of a state: -1 for a padding row, else below num_slots; without them row b owns slot b."""
    if indices is None:
        if num_slots != B:
            fail(fn, f"the state must have one slot for each of the {B} rows, got {num_slots}; pass {name} to choose slots")
        return
    check_tensor(fn, name, indices, 1, "(B,)", like, dtypes=(torch.int32,))
    check_shape(fn, name, indices, (B,), "(B,)")
    if not has_values(indices):
        return
    for row, slot in enumerate(indices.tolist()):
        if not -1 <= slot < num_slots:
            fail(fn, f"{name} must be -1 or below {num_slots}, the number of slots, got {slot} at row {row}")


# ---- patches and local attention ---------------------------------------------------------------------------


def check_count(fn, name, value, low):
    if isinstance(value, torch.SymInt):
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        fail(fn, f"{name} must be an integer of at least {low}, got {value!r}")


def check_heads(fn, q, k, v):
    """q (B, Lq, H, P), k and v (B, Lk, Hk, P) with Hk a divisor of H."""
    check_tensor(fn, "q", q, 4, "(B, Lq, H, P)")
    check_tensor(fn, "k", k, 4, "(B, Lk, Hk, P)", q)
    check_tensor(fn, "v", v, 4, "(B, Lk, Hk, P)", q)
    B, _, H, P = q.shape
    check_positive(fn, H=H, Hk=k.shape[2], P=P)
    check_shape(fn, "k", k, (B, None, None, P), "(B, Lk, Hk, P)")
    check_shape(fn, "v", v, tuple(k.shape), "(B, Lk, Hk, P)")
    if H % k.shape[2]:
        fail(fn, f"the heads of k must divide the {H} heads of q, got {k.shape[2]}")
    check_float64(fn, q=q, k=k, v=v)


def attention_scale(fn, scale, P):
    """What multiplies the scores: `scale`, or P ** -0.5 for None."""
    if scale is None:
        return P**-0.5
    check_number(fn, "scale", scale)
    return float(scale)


def check_patch_ids(fn, patch_ids, B, L, like, cu_seqlens=None):
    """(B, L) int32 or int64; not decreasing along a row, negative ids aside; no patch in two sequences."""
    check_tensor(fn, "patch_ids", patch_ids, 2, "(B, L)", like, dtypes=(torch.int32, torch.int64))
    check_shape(fn, "patch_ids", patch_ids, (B, L), "(B, L)")
    if not has_values(patch_ids) or L < 2 or B == 0:
        return
    before = patch_ids.cummax(1)[0][:, :-1]  # a negative id says nothing
    wrong = (patch_ids[:, 1:] >= 0) & (patch_ids[:, 1:] < before)
    if wrong.any():
        row, place = (int(i) for i in wrong.nonzero()[0])
        fail(fn, f"patch_ids must not decrease along a row, got {int(before[row, place])} then {int(patch_ids[row, place + 1])} "
                 f"at position {place + 1} of row {row}")
    if cu_seqlens is not None:
        for begin in cu_seqlens[1:-1].tolist():
            live = patch_ids[0, begin:][patch_ids[0, begin:] >= 0]
            if 0 < begin < L and live.numel() and int(live[0]) == int(before[0, begin - 1]):
                fail(fn, f"a patch must not lie in two sequences of cu_seqlens, patch {int(live[0])} does at position {begin}; let ids count on")
