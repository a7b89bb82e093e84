"""Arithmetic on integers and floats, comparisons and the special functions.

Sums and products of float32 round once; fma goes through float64, which rounds twice in one case of 2^29. The .approx
functions are computed exactly and rounded: they are better here than on the hardware, tanh.approx apart (11 bits there,
and here).
"""
import numpy as np

from .numbers import SIGNED, TYPES, UNSIGNED, flush, pack, round_float, unpack
from .parser import Pair
from .program import Unsupported, instruction


def elementwise(ins, program, function, type=None):
    """run for d = function(operands), all of one type. 16-bit floats are computed as float64 and rounded once."""
    type = type or ins.types[-1]
    sources = [program.source(o, type) for o in ins.operands[1:]]
    put = program.destination(ins.operands[0], type)
    if type.kind == "h":

        def run(wave, active):
            parts = zip(*(unpack(type, read(wave)) for read in sources))
            put(wave, active, pack(type, [_finish(ins, function(*(p.astype(np.float64) for p in part))) for part in parts]))

    elif type.name == "f32" and ins.has("rz", "rm", "rp"):
        mode = ins.one_of(("rz", "rm", "rp"))

        def run(wave, active):
            wide = function(*(np.asarray(read(wave)).astype(np.float64) for read in sources))
            put(wave, active, _finish(ins, round_float(wide, "f32", mode)))

    elif type.kind == "f" and ins.has("ftz", "sat"):

        def run(wave, active):
            values = [read(wave) for read in sources]
            put(wave, active, _finish(ins, function(*(map(flush, values) if ins.has("ftz") else values))))

    else:

        def run(wave, active):
            put(wave, active, function(*[read(wave) for read in sources]))

    return run


def _finish(ins, values):
    if ins.has("sat"):
        values = np.where(np.isnan(values), 0, np.clip(values, 0, 1)).astype(values.dtype)
    if ins.has("relu"):
        values = np.where(np.isnan(values), values, np.maximum(values, 0)).astype(values.dtype)
    return flush(values) if ins.has("ftz") and values.dtype == np.float32 else values


def _simple(opcodes, choose):
    @instruction(*opcodes)
    def build(ins, program):
        return elementwise(ins, program, choose(ins))


def _fma(x, y, z):
    if np.result_type(x) == np.float32:
        return (np.multiply(x, y, dtype=np.float64) + z).astype(np.float32)
    return x * y + z


def _is_float(ins):
    return ins.types[-1].kind in "fh"


def _extreme(ins):
    smaller = ins.opcode == "min"
    if _is_float(ins) and not ins.has("NaN"):
        return np.fmin if smaller else np.fmax
    return np.minimum if smaller else np.maximum


def _divide(x, y):
    """Integers towards zero; what PTX leaves open (division by zero) gives all ones."""
    if np.result_type(x).kind == "f":
        return x / y
    safe = np.where(y == 0, 1, y).astype(np.result_type(y))
    quotient = x // safe
    if np.result_type(x).kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * safe != x))
    return np.where(y == 0, ~np.zeros_like(quotient), quotient)


def _remainder(x, y):
    return np.where(y == 0, x, np.fmod(x, np.where(y == 0, 1, y).astype(np.result_type(y))))


_simple(("min", "max"), _extreme)
_simple(("div",), lambda ins: _divide)
_simple(("rem",), lambda ins: _remainder)
_simple(("neg",), lambda ins: np.negative)
_simple(("abs",), lambda ins: np.abs)
_simple(("copysign",), lambda ins: lambda sign, value: np.copysign(value, sign))


@instruction("fma")
def fma(ins, program):
    if len(ins.types) == 2:  # fma.rn.f32.bf16: factors of 16 bits, sum of 32
        return _mixed(ins, program, _fma)
    return elementwise(ins, program, _fma)


def _mixed(ins, program, function):
    """d and the last operand float32, the others of a 16-bit type."""
    wide, narrow = ins.types
    sources = [program.source(o, narrow) for o in ins.operands[1:-1]]
    last, put = program.source(ins.operands[-1], wide), program.destination(ins.operands[0], wide)
    return lambda wave, active: put(wave, active, function(*(unpack(narrow, read(wave))[0] for read in sources), last(wave)))


@instruction("add", "sub", "addc", "subc")
def add(ins, program):
    function = np.add if ins.opcode.startswith("add") else np.subtract
    if len(ins.types) == 2:
        return _mixed(ins, program, function)
    if ins.opcode.endswith("c") or ins.has("cc"):
        type = TYPES[f"u{ins.types[-1].bits}"]
        x, y = (program.source(o, type) for o in ins.operands[1:])
        return _with_carry(ins, program, type, x, y)
    if ins.has("sat") and not _is_float(ins):
        raise Unsupported("saturating integers")
    return elementwise(ins, program, function)


def _with_carry(ins, program, type, x, y):
    """x + y or x - y with the carry flag coming in (addc, subc, madc) or going out (.cc)."""
    put = program.destination(ins.operands[0], type)
    adding, takes, gives = not ins.opcode.startswith("sub"), ins.opcode.endswith("c"), ins.has("cc")

    def run(wave, active):
        flag = wave.carry if takes else np.zeros(wave.columns, bool)
        a, b = np.broadcast_to(x(wave), wave.columns), y(wave)
        first = a + b if adding else a - b
        result = first + flag.astype(type.dtype) if adding else first - flag.astype(type.dtype)
        if gives:
            carry = (first < a) | (result < first) if adding else (first > a) | (result > first)
            wave.carry = carry if active is None else np.where(active, carry, wave.carry)
        put(wave, active, result)

    return run


def _high_product(x, y, bits):
    """The upper half of the product of two unsigned or signed integers."""
    if bits < 64:
        wide = (SIGNED if np.result_type(x).kind == "i" else UNSIGNED)[bits * 2]
        return (np.asarray(x).astype(wide) * np.asarray(y).astype(wide) >> wide.type(bits)).astype(np.result_type(x))
    a, b = np.asarray(x).astype(np.uint64), np.asarray(y).astype(np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    middle = (a >> half) * (b & low) + ((a & low) * (b & low) >> half)
    other = (a & low) * (b >> half) + (middle & low)
    high = (a >> half) * (b >> half) + (middle >> half) + (other >> half)
    if np.result_type(x).kind == "i":
        high = high - np.where(np.asarray(x) < 0, b, np.uint64(0)) - np.where(np.asarray(y) < 0, a, np.uint64(0))
    return high.astype(np.result_type(x))


@instruction("mul", "mad", "madc")
def mul(ins, program):
    type = ins.types[-1]
    adding = ins.opcode.startswith("mad")
    if ins.has("sat") and type.kind not in "fh":
        raise Unsupported("saturating integers")
    if ins.opcode == "madc" or ins.has("cc"):
        uint = TYPES[f"u{type.bits}"]
        x, y, z = (program.source(o, t) for o, t in zip(ins.operands[1:], (type, type, uint)))
        high = ins.has("hi")

        def product(wave):
            return (_high_product(x(wave), y(wave), type.bits) if high else x(wave) * y(wave)).astype(uint.dtype)

        return _with_carry(ins, program, uint, product, z)
    if ins.has("wide"):
        wide = TYPES[f"{type.name[0]}{type.bits * 2}"]
        x, y = (program.source(o, type) for o in ins.operands[1:3])
        z = program.source(ins.operands[3], wide) if adding else None
        put = program.destination(ins.operands[0], wide)

        def run(wave, active):
            product = np.multiply(x(wave), y(wave), dtype=wide.dtype)
            put(wave, active, product + z(wave) if adding else product)

        return run
    if ins.has("hi"):
        return elementwise(ins, program, lambda x, y, z=0: _high_product(x, y, type.bits) + np.result_type(x).type(z))
    if type.kind in "fh":
        return elementwise(ins, program, _fma if adding else np.multiply)
    return elementwise(ins, program, (lambda x, y, z: x * y + z) if adding else np.multiply)


def _in_float64(function):
    return lambda x: function(np.asarray(x).astype(np.float64)).astype(np.result_type(x))


def _coarse_tanh(x):
    """tanh.approx: 11 bits are right."""
    mantissa, exponent = np.frexp(np.tanh(np.asarray(x).astype(np.float64)))
    return np.ldexp(np.rint(mantissa * 2048) / 2048, exponent).astype(np.result_type(x))


for _opcode, _function in {
    "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "sqrt": np.sqrt,
    "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x),
}.items():
    _simple((_opcode,), lambda ins, function=_function: _in_float64(function))
_simple(("tanh",), lambda ins: _coarse_tanh)


# ---- comparisons

COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
           "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name, is_float):
    if not is_float:
        return COMPARE[name]
    if name in ("num", "nan"):
        return lambda x, y: (np.isnan(x) | np.isnan(y)) == (name == "nan")
    if name in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
        return lambda x, y: COMPARE[name[:2]](x, y) | np.isnan(x) | np.isnan(y)
    return lambda x, y: COMPARE[name](x, y) & ~(np.isnan(x) | np.isnan(y))


@instruction("setp", "set")
def setp(ins, program):
    type = ins.types[-1]
    if type.name == "b8" or ins.opcode == "set" and type.kind == "h":
        raise Unsupported("comparison of this type")
    compare = _comparison(ins.modifiers[0], type.kind in "fh")
    combine = COMBINE.get(ins.modifiers[1])
    x, y = (program.source(o, type) for o in ins.operands[1:3])
    third = program.source(ins.operands[3], TYPES["pred"]) if len(ins.operands) > 3 else None

    def results(wave):
        found = [compare(a, b) for a, b in zip(unpack(type, x(wave)), unpack(type, y(wave)))] if type.kind == "h" else [compare(x(wave), y(wave))]
        return found if third is None else [combine(f, third(wave)) for f in found], found

    if ins.opcode == "set":
        return _set(ins, program, results)
    targets = ins.operands[0] if isinstance(ins.operands[0], Pair) else (ins.operands[0],)
    puts = [program.destination(t, TYPES["pred"]) for t in targets]

    def run(wave, active):
        values, plain = results(wave)
        if len(puts) > len(values):  # p|q of single numbers: q takes the opposite comparison
            values.append(~plain[0] if third is None else combine(~plain[0], third(wave)))
        for put, value in zip(puts, values):
            put(wave, active, value)

    return run


def _set(ins, program, results):
    """A number instead of a predicate: 1.0 for floats, all ones for integers."""
    target = ins.types[0]
    put = program.destination(ins.operands[0], target)
    yes = target.dtype.type(1) if target.kind == "f" else ~target.dtype.type(0)
    return lambda wave, active: put(wave, active, np.where(results(wave)[0][0], yes, target.dtype.type(0)))


@instruction("testp")
def testp(ins, program):
    type = ins.types[-1]
    x, put = program.source(ins.operands[1], type), program.destination(ins.operands[0], TYPES["pred"])
    tests = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda v: ~np.isnan(v)}
    if ins.modifiers[0] not in tests:
        raise Unsupported("test")
    test = tests[ins.modifiers[0]]
    return lambda wave, active: put(wave, active, test(x(wave)))
