"""Instructions of a warp together: shuffles, votes, matrix products."""
import numpy as np

from .control import whole_warps
from .memory import Fault, first
from .numbers import TYPES, from_bfloat16, to_float16, truncate_to_tf32
from .parser import Pair
from .program import Unsupported, instruction

LANES = np.uint32(1) << np.arange(32, dtype=np.uint32)


def _everybody(wave, active):
    return np.ones(wave.columns, bool) if active is None else active


def _bits(condition):
    """Per column: one bit for each lane of its warp for which the condition holds."""
    return np.repeat((condition.reshape(-1, 32) * LANES).sum(1, dtype=np.uint32), 32)


@instruction("shfl")
def shfl(ins, program):
    targets = ins.operands[0] if isinstance(ins.operands[0], Pair) else Pair((ins.operands[0], "_"))
    put, put_inside = program.destination(targets[0], TYPES["b32"]), program.destination(targets[1], TYPES["pred"])
    read, distance, clamp, members = (program.source(o, TYPES["u32"]) for o in ins.operands[1:5])
    mode = ins.one_of(("up", "down", "bfly", "idx"))

    def run(wave, active):
        lane, b, c = wave.lane, distance(wave).astype(np.int64) & 31, clamp(wave).astype(np.int64)
        segment = c >> 8 & 31
        first_lane, last_lane = lane & segment, lane & segment | c & 31 & ~segment
        other = {"up": lambda: lane - b, "down": lambda: lane + b, "bfly": lambda: lane ^ b, "idx": lambda: first_lane | b & ~segment}[mode]()
        inside = other >= last_lane if mode == "up" else other <= last_lane
        column = wave.everyone - lane + np.where(inside, other, lane)
        if active is not None and (gone := active & ~active[column]).any():
            raise Fault("shuffle from a lane that does not take part", first(gone[active]))
        value = np.broadcast_to(read(wave), wave.columns)[column]
        put(wave, active, value)
        put_inside(wave, active, inside)

    return whole_warps(ins, run, members)


@instruction("vote")
def vote(ins, program):
    if not ins.has("sync"):
        raise Unsupported("vote without .sync")
    read, members = program.source(ins.operands[1], TYPES["pred"]), program.source(ins.operands[2], TYPES["u32"])
    mode = ins.one_of(("all", "any", "uni", "ballot"))
    put = program.destination(ins.operands[0], TYPES["b32" if mode == "ballot" else "pred"])

    def run(wave, active):
        named = members(wave)
        found = _bits(read(wave) & _everybody(wave, active)) & named
        put(wave, active, {"ballot": found, "any": found != 0, "all": found == named, "uni": (found == 0) | (found == named)}[mode])

    return whole_warps(ins, run, members)


@instruction("match")
def match(ins, program):
    type = ins.types[-1]
    targets = ins.operands[0] if isinstance(ins.operands[0], Pair) else Pair((ins.operands[0], "_"))
    put, put_all = program.destination(targets[0], TYPES["b32"]), program.destination(targets[1], TYPES["pred"])
    read, members = program.source(ins.operands[1], type), program.source(ins.operands[2], TYPES["u32"])
    every = ins.has("all")

    def run(wave, active):
        values = np.broadcast_to(read(wave), wave.columns).reshape(-1, 32)
        same = values[:, :, None] == values[:, None, :]
        found = (same * LANES).sum(2, dtype=np.uint32).reshape(-1) & members(wave)
        agreed = found == members(wave)
        put(wave, active, np.where(agreed, found, np.uint32(0)) if every else found)
        put_all(wave, active, agreed)

    return whole_warps(ins, run, members)


@instruction("activemask")
def activemask(ins, program):
    put = program.destination(ins.operands[0], TYPES["b32"])
    return lambda wave, active: put(wave, active, _bits(_everybody(wave, active)))


@instruction("redux")
def redux(ins, program):
    type = ins.types[-1]
    x, members = program.source(ins.operands[1], type), program.source(ins.operands[2], TYPES["u32"])
    put = program.destination(ins.operands[0], type)
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[
        ins.one_of(("add", "min", "max", "and", "or", "xor"))]

    def run(wave, active):
        values, named = (np.broadcast_to(read(wave), wave.columns).reshape(-1, 32) for read in (x, members))
        result = np.zeros((len(values), 32), type.dtype)
        doing = np.ones(values.shape, bool) if active is None else active.reshape(-1, 32)
        for warp in np.flatnonzero(doing.any(1)):
            for mask in np.unique(named[warp][doing[warp]]):
                lanes = (mask >> np.arange(32, dtype=np.uint32) & 1).astype(bool)
                result[warp][lanes] = function.reduce(values[warp][lanes], dtype=type.dtype)
        put(wave, active, result.reshape(-1))

    return whole_warps(ins, run, members)


# ---- mma.sync.m16n8kK: lane = 4 g + t. Of A (16 x K), register i holds row g + 8 (i % 2) and, from column t times the
# elements of a register on, consecutive elements, K/2 columns further for i >= 2; B (K x 8) likewise with column g; of C
# and D (16 x 8), element i lies in row g + 8 (i // 2) and column 2 t + i % 2.

def _elements(name, registers):
    """(registers, columns) of bits -> (registers, warps, 8, 4, elements of a register) of numbers."""
    bits = np.ascontiguousarray(np.stack(registers))
    numbers = {
        "bf16": lambda: from_bfloat16(bits.view(np.uint16)), "f16": lambda: bits.view(np.float16).astype(np.float32),
        "tf32": lambda: truncate_to_tf32(bits), "s8": lambda: bits.view(np.int8).astype(np.float64),
        "u8": lambda: bits.view(np.uint8).astype(np.float64),
    }[name]()
    return numbers.reshape(len(registers), -1, 8, 4, numbers.shape[1] // bits.shape[1])


@instruction("mma")
def mma(ins, program):
    shape = next((m for m in ins.modifiers if m.startswith("m16n8k")), None)
    if shape is None or not ins.has("row") or not ins.has("col"):
        raise Unsupported("matrix product")
    of_d, of_a, of_b, of_c = ins.types
    halves = of_d.name == "f16"  # accumulators: two float16 to a register
    accumulator = TYPES["b32"] if halves else of_d
    d, a, b, c = ([o] if not isinstance(o, list) else o for o in ins.operands)
    puts = [program.destination(o, accumulator) for o in d]
    read_a, read_b, read_c = ([program.source(o, type) for o in operand]
                              for operand, type in ((a, TYPES["b32"]), (b, TYPES["b32"]), (c, accumulator)))
    if len(b) * 2 != len(a) or of_c != of_d:
        raise Unsupported("matrix product")

    def run(wave, active):
        def registers(reads):
            return [np.broadcast_to(read(wave), wave.columns) for read in reads]

        A, B = _elements(of_a.name, registers(read_a)), _elements(of_b.name, registers(read_b))
        warps = A.shape[1]
        A = A.reshape(-1, 2, *A.shape[1:]).transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, -1)
        B = B.transpose(1, 0, 3, 4, 2).reshape(warps, -1, 8)
        C = np.stack(registers(read_c))
        if halves:
            C = np.ascontiguousarray(C).view(np.float16).reshape(2, -1, 2).transpose(0, 2, 1).astype(np.float32)
        C = C.reshape(2, 2, warps, 8, 4).transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
        D = np.matmul(A, B).astype(C.dtype) + C
        D = D.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        if halves:
            D = to_float16(D).astype(np.uint32)
            D = [D[0] | D[1] << np.uint32(16), D[2] | D[3] << np.uint32(16)]
        for put, values in zip(puts, D):
            put(wave, active, values)

    return whole_warps(ins, run)
