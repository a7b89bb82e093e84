"""Logic, shifts, bit fields, bytes."""
import numpy as np

from .arithmetic import elementwise
from .numbers import TYPES, UNSIGNED
from .parser import Pair
from .program import Unsupported, instruction

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@instruction("and", "or", "xor", "not", "cnot")
def logic(ins, program):
    if ins.opcode == "cnot":
        return elementwise(ins, program, lambda x: (x == 0).astype(np.result_type(x)))
    return elementwise(ins, program, LOGIC[ins.opcode])


@instruction("shl", "shr")
def shift(ins, program):
    """The amount has 32 bits; amounts over the width shift everything out (sign bits in, for signed types)."""
    type = ins.types[-1]
    x, amount = program.source(ins.operands[1], type), program.source(ins.operands[2], TYPES["u32"])
    put = program.destination(ins.operands[0], type)
    function = np.left_shift if ins.opcode == "shl" else np.right_shift
    last, zero = np.uint32(type.bits - 1), type.dtype.type(0)
    arithmetic = ins.opcode == "shr" and type.kind == "s"

    def run(wave, active):
        value, n = x(wave), amount(wave)
        shifted = function(value, np.minimum(n, last).astype(type.dtype))
        put(wave, active, shifted if arithmetic or np.ndim(n) == 0 and n <= last else np.where(n > last, zero, shifted))

    return run


@instruction("shf")
def funnel(ins, program):
    """shf.l: the upper 32 bits of (high:low) << n; shf.r: the lower 32 bits of (high:low) >> n."""
    left, wrap = ins.has("l"), ins.has("wrap")

    def shifted(low, high, n):
        n = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low).astype(np.uint64)
        return (both << n >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return elementwise(ins, program, shifted, TYPES["u32"])


@instruction("bfe")
def bfe(ins, program):
    type = ins.types[-1]
    x = program.source(ins.operands[1], type)
    begin, length = (program.source(o, TYPES["u32"]) for o in ins.operands[2:4])
    put = program.destination(ins.operands[0], type)
    width = type.bits

    def run(wave, active):
        """Shift the field to the top, then down again: sign bits come by themselves."""
        low, count = ((read(wave) & np.uint32(0xFF)).astype(np.int64) for read in (begin, length))
        end = np.minimum(low + count, width)
        dtype = type.dtype
        value = np.left_shift(x(wave), np.minimum(width - end, width - 1).astype(dtype))
        down = width - end + low
        value = np.right_shift(value, np.minimum(down, width - 1).astype(dtype))
        beyond = (low >= width) & (type.kind == "s") & (count > 0)
        sign = np.right_shift(x(wave), dtype.type(width - 1))
        value = np.where(down >= width, dtype.type(0), value)
        put(wave, active, np.where(beyond, sign, np.where(count == 0, dtype.type(0), value)))

    return run


@instruction("bfi")
def bfi(ins, program):
    type = ins.types[-1]
    field, into = (program.source(o, type) for o in ins.operands[1:3])
    begin, length = (program.source(o, TYPES["u32"]) for o in ins.operands[3:5])
    put = program.destination(ins.operands[0], type)
    uint = UNSIGNED[type.bits].type

    def run(wave, active):
        low, count = (np.minimum(read(wave) & np.uint32(0xFF), type.bits).astype(np.int64) for read in (begin, length))
        ones = np.where(count >= type.bits, ~uint(0), (uint(1) << np.minimum(count, type.bits - 1).astype(uint)) - uint(1))
        move = np.minimum(low, type.bits - 1).astype(uint)
        mask = np.where(low >= type.bits, uint(0), ones << move)
        put(wave, active, (into(wave) & ~mask) | ((field(wave) << move) & mask))

    return run


def _unary_to_u32(ins, program, function):
    type = TYPES[f"u{ins.types[-1].bits}"]
    x, put = program.source(ins.operands[1], type), program.destination(ins.operands[0], TYPES["u32"])
    return lambda wave, active: put(wave, active, function(np.asarray(x(wave))))


def highest_bit(x):
    """Its place, or -1 for 0."""
    bits = x.dtype.itemsize * 8
    place = np.full(x.shape, -1, np.int64)
    for bit in range(bits):
        place = np.where(x >> x.dtype.type(bit) != 0, bit, place)
    return place


@instruction("popc", "clz", "bfind")
def count_bits(ins, program):
    bits = ins.types[-1].bits
    if ins.opcode == "popc":
        return _unary_to_u32(ins, program, np.bitwise_count)
    if ins.opcode == "clz":
        return _unary_to_u32(ins, program, lambda x: bits - 1 - highest_bit(x))
    signed, amount = ins.types[-1].kind == "s", ins.has("shiftamt")

    def find(x):
        if signed:  # the highest bit that differs from the sign
            x = np.where(x >> x.dtype.type(bits - 1) != 0, ~x, x)
        place = highest_bit(x)
        return (np.where((place >= 0) & amount, bits - 1 - place, place)).astype(np.uint32)

    return _unary_to_u32(ins, program, find)


@instruction("brev")
def brev(ins, program):
    def reverse(x):
        as_bytes = np.ascontiguousarray(np.atleast_1d(x)).view(np.uint8).reshape(-1, x.dtype.itemsize)
        bits = np.unpackbits(as_bytes, axis=1, bitorder="little")[:, ::-1]
        return np.packbits(bits, axis=1, bitorder="little").view(x.dtype)[:, 0].reshape(np.shape(x))

    return elementwise(ins, program, reverse, TYPES[f"u{ins.types[-1].bits}"])


@instruction("prmt")
def prmt(ins, program):
    mode = ins.one_of(("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"))
    selectors = {
        "f4e": lambda c: [c + i for i in range(4)], "b4e": lambda c: [(c - i) & 7 for i in range(4)],
        "rc8": lambda c: [c] * 4, "ecl": lambda c: [np.maximum(c, i) for i in range(4)],
        "ecr": lambda c: [np.minimum(c, i) for i in range(4)], "rc16": lambda c: [(c & 1) * 2 + i % 2 for i in range(4)],
    }

    def permute(a, b, c):
        both = np.asarray(b).astype(np.uint64) << np.uint64(32) | np.asarray(a).astype(np.uint64)
        chosen = [c >> np.uint32(4 * i) for i in range(4)] if mode is None else selectors[mode]((np.asarray(c) & np.uint32(3)).astype(np.int64))
        result = np.uint32(0)
        for i, selector in enumerate(chosen):
            byte = (both >> (np.asarray(selector).astype(np.uint64) & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)).astype(np.uint32)
            if mode is None:  # bit 3: the byte's sign, eight times
                byte = np.where(selector & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(0xFF), byte)
            result = result | byte << np.uint32(8 * i)
        return result

    return elementwise(ins, program, permute, TYPES["u32"])


@instruction("lop3")
def lop3(ins, program):
    if isinstance(ins.operands[0], Pair):
        raise Unsupported("lop3 with a predicate")
    *inputs, table = ins.operands[1:]
    table, uint = table.value, TYPES["b32"]
    reads, put = [program.source(o, uint) for o in inputs], program.destination(ins.operands[0], uint)

    def run(wave, active):
        a, b, c = (np.asarray(read(wave)) for read in reads)
        result = np.zeros(wave.columns, np.uint32)
        for row in range(8):  # bit `row` of the table is the result where (a, b, c) are the bits of `row`
            if table >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        put(wave, active, result)

    return run


@instruction("dp4a")
def dp4a(ins, program):
    """d = c + the sum of four products of bytes."""
    kinds = [np.int8 if t.kind == "s" else np.uint8 for t in ins.types]
    x, y = (program.source(o, TYPES["u32"]) for o in ins.operands[1:3])
    signed = TYPES["s32" if np.int8 in kinds else "u32"]
    z, put = program.source(ins.operands[3], signed), program.destination(ins.operands[0], signed)

    def run(wave, active):
        a, b = (np.array(np.broadcast_to(read(wave), wave.columns)).view(kind).reshape(-1, 4).astype(np.int32) for read, kind in zip((x, y), kinds))
        put(wave, active, z(wave) + (a * b).sum(1, dtype=np.int32).astype(signed.dtype))

    return run
