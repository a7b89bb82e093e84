"""PTX types as numpy types, and the conversions numpy lacks: bfloat16, tf32, directed rounding.

Registers hold bits. Everything of 16-bit floats is computed in wider floats and rounded once: `unpack` gives the wide
parts of a register's value, `pack` rounds them back.
"""
from dataclasses import dataclass

import numpy as np

UNSIGNED = {8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
SIGNED = {8: np.dtype("i1"), 16: np.dtype("i2"), 32: np.dtype("i4"), 64: np.dtype("i8")}
FLOAT = {16: np.dtype("f2"), 32: np.dtype("f4"), 64: np.dtype("f8")}


@dataclass(frozen=True)
class Type:
    """`kind` is u(nsigned or bits), s(igned), f(loat), p(redicate) or h: one or two 16-bit floats, kept as their bits."""

    name: str
    kind: str
    bits: int
    dtype: np.dtype  # of the arrays that instructions read and write

    @property
    def bytes(self):
        return self.bits // 8


TYPES = {"pred": Type("pred", "p", 1, np.dtype(bool)), "tf32": Type("tf32", "u", 32, UNSIGNED[32])}
TYPES |= {f"{letter}{bits}": Type(f"{letter}{bits}", kind, bits, table[bits])
          for letter, kind, table in (("b", "u", UNSIGNED), ("u", "u", UNSIGNED), ("s", "s", SIGNED)) for bits in table}
TYPES |= {f"f{bits}": Type(f"f{bits}", "f", bits, FLOAT[bits]) for bits in (32, 64)}
TYPES |= {name: Type(name, "h", bits, UNSIGNED[bits]) for name, bits in (("f16", 16), ("bf16", 16), ("f16x2", 32), ("bf16x2", 32))}


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_odd(values):
    """float64 as float32 with the last bit set where digits were lost: rounding that once more rounds correctly."""
    near = values.astype(np.float32)
    towards_zero = near.view(np.uint32) - (np.abs(near) > np.abs(values))
    return np.where(near == values, near.view(np.uint32), towards_zero | 1).astype(np.uint32).view(np.float32)


def to_bfloat16(values):
    """float32 or float64 rounded to nearest even; every NaN becomes 0x7FFF, as on the hardware."""
    values = np.asarray(values)
    if values.dtype == np.float64:
        values = round_to_odd(values)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).reshape(values.shape)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def to_float16(values):
    bits = np.asarray(values).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


def unpack(type, bits):
    """The 16-bit floats of a value of kind h, lowest first, as float32 arrays."""
    halves = [bits] if type.bits == 16 else [bits & 0xFFFF, bits >> 16]
    halves = [np.asarray(half).astype(np.uint16) for half in halves]
    return [from_bfloat16(half) if type.name.startswith("b") else half.view(np.float16).astype(np.float32) for half in halves]


def pack(type, parts):
    """The inverse: floats, lowest first, rounded to nearest even."""
    parts = [to_bfloat16(part) if type.name.startswith("b") else to_float16(part) for part in parts]
    return parts[0] if type.bits == 16 else parts[0].astype(np.uint32) | parts[1].astype(np.uint32) << 16


def round_float(values, name, mode):
    """float64 values in type `name` (its bits for f16 and bf16), rounded by mode rn, rz, rm, rp or rna."""
    if mode == "rna" or name == "tf32":  # to tf32, half away from zero: the low 13 bits of a float32
        bits = values.astype(np.float32).view(np.uint32)
        return np.where(np.isfinite(values), (bits + 0x1000) & 0xFFFFE000, bits).astype(np.uint32)
    if name == "f64":
        return values
    near = {"f32": lambda v: v.astype(np.float32), "f16": to_float16, "bf16": to_bfloat16}[name](values)
    if mode == "rn":
        return near
    bits = near.view(np.uint32) if name == "f32" else near
    as_float = {"f32": lambda: near, "f16": lambda: near.view(np.float16), "bf16": lambda: from_bfloat16(near)}[name]().astype(np.float64)
    too_far = {"rz": np.abs(as_float) > np.abs(values), "rm": as_float > values, "rp": as_float < values}[mode]
    # The neighbour towards zero has the next smaller bits, whatever the sign; past zero there is the smallest of the other sign.
    outward = (mode == "rm") & (as_float <= 0) | (mode == "rp") & (as_float >= 0)
    sign = bits.dtype.type(1 << (bits.dtype.itemsize * 8 - 1))
    past_zero = np.where(values < 0, sign | bits.dtype.type(1), bits.dtype.type(1))
    neighbour = np.where(as_float == 0, past_zero, np.where(outward, bits + bits.dtype.type(1), bits - bits.dtype.type(1)))
    result = np.where(too_far, neighbour, bits).astype(bits.dtype)
    return result.view(np.float32) if name == "f32" else result


def to_integer(values, type, mode):
    """Floats as integers: rounded by mode rni, rzi, rmi or rpi, clamped to the type; NaN as PTX defines it."""
    wide = np.asarray(values)
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](wide.astype(np.float64))
    limits = np.iinfo(type.dtype)
    inside = np.where((rounded > limits.min) & (rounded < float(limits.max)), rounded, 0).astype(type.dtype)
    result = np.where(rounded >= float(limits.max), limits.max, np.where(rounded <= limits.min, limits.min, inside))
    nan = 0 if wide.dtype != np.float64 and type.bits < 64 else limits.min if type.kind == "s" else 1 << (type.bits - 1)
    return np.where(np.isnan(wide), nan, result).astype(type.dtype)


def flush(values):
    """.ftz: what is smaller than the smallest normal float32 is zero of its sign."""
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)


def truncate_to_tf32(bits):
    """The bits of a float32 as the tensor core sees them."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)
