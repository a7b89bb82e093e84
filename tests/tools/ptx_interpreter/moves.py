"""Moves, selections, conversions."""
import numpy as np

from .memory import LOCAL_WINDOW, SHARED_WINDOW
from .numbers import TYPES, UNSIGNED, flush, from_bfloat16, round_float, to_integer
from .parser import Address, Symbol
from .program import Unsupported, instruction


@instruction("mov")
def mov(ins, program):
    target, origin = ins.operands
    type = ins.types[-1]
    if type.kind in "sfh":
        type = TYPES[f"b{type.bits}"]
    if isinstance(target, list):  # one register's bits over several, lowest first
        part = TYPES[f"b{type.bits // len(target)}"]
        read, puts = program.source(origin, type), [program.destination(t, part) for t in target]

        def split(wave, active):
            value = np.array(read(wave))
            for i, put in enumerate(puts):
                put(wave, active, (value >> type.dtype.type(i * part.bits)).astype(part.dtype))

        return split
    put = program.destination(target, type)
    if isinstance(origin, list):
        part = TYPES[f"b{type.bits // len(origin)}"]
        reads = [program.source(o, part) for o in origin]

        def join(wave, active):
            value = type.dtype.type(0)
            for i, read in enumerate(reads):
                value = value | np.asarray(read(wave)).astype(type.dtype) << type.dtype.type(i * part.bits)
            put(wave, active, value)

        return join
    if isinstance(origin, Symbol) and program.spaces.get(origin.name) in ("shared", "local"):
        type = TYPES[f"b{type.bits}"]
    read = program.source(origin.base if isinstance(origin, Address) else origin, type)
    return lambda wave, active: put(wave, active, read(wave))


@instruction("selp", "slct")
def selp(ins, program):
    type = ins.types[0]
    if type.kind in "fh":
        type = TYPES[f"b{type.bits}"]
    yes, no = (program.source(o, type) for o in ins.operands[1:3])
    put = program.destination(ins.operands[0], type)
    chooser = ins.types[-1] if ins.opcode == "slct" else TYPES["pred"]
    third = program.source(ins.operands[3], chooser)
    choose = third if ins.opcode == "selp" else lambda wave: third(wave) >= 0
    return lambda wave, active: put(wave, active, np.where(choose(wave), yes(wave), no(wave)))


@instruction("cvta")
def cvta(ins, program):
    window = np.uint64({"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(ins.one_of(("shared", "local")), 0))
    wide = TYPES["u64"]
    if ins.types[-1].bits != 64:
        raise Unsupported("32-bit addresses")
    read, put = program.source(ins.operands[1], wide), program.destination(ins.operands[0], wide)
    if ins.has("to"):
        return lambda wave, active: put(wave, active, read(wave) - window)
    return lambda wave, active: put(wave, active, read(wave) + window)


@instruction("isspacep")
def isspacep(ins, program):
    read, put = program.source(ins.operands[1], TYPES["u64"]), program.destination(ins.operands[0], TYPES["pred"])
    windows = {"global": (0, SHARED_WINDOW), "shared": (SHARED_WINDOW, LOCAL_WINDOW), "local": (LOCAL_WINDOW, 1 << 62)}
    low, high = windows[ins.one_of(windows)]
    return lambda wave, active: put(wave, active, (read(wave) >= np.uint64(low)) & (read(wave) < np.uint64(high)))


@instruction("cvt")
def cvt(ins, program):
    to, origin = ins.types[:2]
    mode = ins.one_of(("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"))
    if ins.has("satfinite", "rs"):
        raise Unsupported("conversion")
    if to.name in ("f16x2", "bf16x2"):
        return _pack_two(ins, program, to, mode)
    read, put = program.source(ins.operands[1], origin), program.destination(ins.operands[0], to)
    convert = _conversion(ins, to, origin, mode)
    return lambda wave, active: put(wave, active, convert(read(wave)))


def _pack_two(ins, program, to, mode):
    """cvt.rn.bf16x2.f32 d, a, b: a above, b below."""
    high, low = (program.source(o, TYPES["f32"]) for o in ins.operands[1:])
    put, name = program.destination(ins.operands[0], TYPES["b32"]), to.name.removesuffix("x2")

    def half(values):
        values = np.maximum(values, 0) if ins.has("relu") else values
        return round_float(np.asarray(values).astype(np.float64), name, mode).astype(np.uint32)

    return lambda wave, active: put(wave, active, half(high(wave)) << np.uint32(16) | half(low(wave)))


def _conversion(ins, to, origin, mode):
    widen = {"bf16": from_bfloat16, "f16": lambda v: np.asarray(v).view(np.float16).astype(np.float32)}.get(origin.name, lambda v: v)
    from_float, to_float = origin.kind in "fh", to.kind in "fh" or to.name == "tf32"
    if not from_float and not to_float:
        return _between_integers(ins, to, origin)
    if from_float and not to_float:
        return lambda v: to_integer(widen(v), to, mode)

    def to_floating(values):
        values = np.asarray(widen(values))
        if from_float and mode in ("rni", "rzi", "rmi", "rpi"):
            values = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](values)
        if origin.bits == 64 and not from_float:  # float64 would round first: let numpy go straight to the type
            if mode != "rn" or to.name not in ("f32", "f64"):
                raise Unsupported("conversion of 64-bit integers")
            return values.astype(to.dtype)
        rounding = mode if mode in ("rz", "rm", "rp", "rna") else "rn"
        if to.name == "f32" and rounding == "rn":
            result = values.astype(np.float32)
        else:
            result = round_float(values.astype(np.float64), to.name, rounding)
        if ins.has("sat"):
            result = np.clip(np.nan_to_num(result), 0, 1).astype(result.dtype)
        if ins.has("relu"):
            result = np.where(values < 0, result.dtype.type(0), result)
        return flush(result) if ins.has("ftz") and to.name == "f32" else result

    return to_floating


def _between_integers(ins, to, origin):
    if ins.has("sat"):
        limits = np.iinfo(to.dtype)
        low, high = max(limits.min, np.iinfo(origin.dtype).min), min(limits.max, np.iinfo(origin.dtype).max)
        return lambda v: np.clip(v, low, high).astype(to.dtype)
    # A wider register takes the destination type's extension: go through the destination type.
    return lambda v: np.asarray(v).astype(UNSIGNED[to.bits] if to.kind == "u" else to.dtype)
