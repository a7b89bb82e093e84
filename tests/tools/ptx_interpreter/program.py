"""A Kernel made ready to run: every instruction becomes a Step, built once by the function registered for its opcode.

A builder takes (instruction, program) and returns run(wave, active), where `active` is the mask of the threads that do it,
or None for all. `program.source(operand, type)` gives read(wave) -> array; `program.destination(operand, type)` gives
put(wave, active, values).
"""
import functools
from dataclasses import dataclass
from typing import Callable

import numpy as np

from .numbers import FLOAT, SIGNED, TYPES, UNSIGNED, to_bfloat16, to_float16
from .parser import Address, Immediate, Instruction, Negated, PTXError, Register, Special, Symbol

BUILDERS = {}


def instruction(*opcodes):
    """Registers the builder of these opcodes."""

    def register(builder):
        BUILDERS.update(dict.fromkeys(opcodes, builder))
        return builder

    return register


class Unsupported(Exception):
    """A builder does not know this form of its instruction."""


@dataclass
class Step:
    instruction: object
    guard: Callable | None
    run: Callable | None
    control: Callable | None = None  # (wave, place, mask, doing): decides where threads go on
    members: Callable | None = None  # of instructions that need a whole warp: the lanes each thread names, as bits


class Program:
    """One kernel. Its parameters are bytes, at `parameter_offsets` in the launch's `parameters`."""

    def __init__(self, kernel):
        self.kernel = kernel
        self._place_parameters()
        self._place_variables()
        self.code = [self._step(ins) for ins in kernel.instructions]
        self.code.append(self._step_to_exit())

    def _place_parameters(self):
        self.parameter_offsets, end = {}, 0
        for name, _, size, align in self.kernel.parameters:
            begin = -(-end // align) * align
            self.parameter_offsets[name], end = begin, begin + size
        self.parameter_bytes = -(-end // 16) * 16

    def _place_variables(self):
        """Addresses: shared and local variables in their own space, global and constant ones in the host's memory."""
        self.addresses, self.spaces, self.regions, self._kept = {}, {}, [], []
        ends = {"shared": 0, "local": 0}
        for name, variable in sorted(self.kernel.variables.items(), key=lambda item: item[1].bytes == 0):  # dynamic memory last
            self.spaces[name] = variable.space
            if variable.space in ends:
                begin = -(-ends[variable.space] // variable.align) * variable.align
                self.addresses[name], ends[variable.space] = begin, begin + variable.bytes
            else:
                data = np.zeros(max(variable.bytes, 1) + 16, np.uint8)
                data[:len(variable.data)] = np.frombuffer(variable.data, np.uint8)
                self._kept.append(data)
                self.addresses[name] = data.ctypes.data
                self.regions.append((data.ctypes.data, variable.bytes))
        self.shared_bytes, self.local_bytes = ends["shared"], ends["local"]

    def _step(self, ins):
        builder = BUILDERS.get(ins.opcode)
        try:
            if builder is None:
                raise Unsupported("unknown instruction")
            built = builder(ins, self)
        except (Unsupported, KeyError, StopIteration, IndexError, AttributeError) as error:
            why = str(error) if isinstance(error, Unsupported) else f"unknown form ({type(error).__name__}: {error})"
            raise PTXError(f"{self.kernel.name}: {why}: {ins.text}") from error
        step = built if isinstance(built, Step) else Step(ins, None, built)
        if ins.guard is not None:
            step.guard = self.source(Negated(ins.guard) if ins.guard_negated else ins.guard, TYPES["pred"])
        return step

    def _step_to_exit(self):
        return self._step(Instruction(None, False, "ret", (), [], "ret", ""))

    @functools.cached_property
    def _readers(self):
        """{register: the instructions that read it}"""
        readers = {}
        for ins in self.kernel.instructions:
            for register in ins.reads:
                readers.setdefault(register, []).append(ins)
        return readers

    def only_chosen_from(self, registers):
        """Whether everything that is ever done with them is to select them or others: nvcc loads ahead of the question whether to load."""
        readers = [reader for register in registers for reader in self._readers.get(register, ())]
        return bool(readers) and all(r.opcode == "selp" and not set(registers) & {r.guard, r.operands[3]} for r in readers)

    # ---- operands

    def source(self, operand, type):
        if isinstance(operand, Register):
            return _register_source(operand, type)
        if isinstance(operand, Negated):
            read = _register_source(operand.register, type)
            return lambda wave: ~read(wave)
        if isinstance(operand, Special):
            name, dtype = operand.name.removesuffix("64"), type.dtype
            return lambda wave: wave.special[name].astype(dtype, copy=False)
        if isinstance(operand, Immediate):
            constant = immediate(operand, type)
        elif isinstance(operand, Symbol) and operand.name in self.addresses:
            constant = type.dtype.type(self.addresses[operand.name])
        elif isinstance(operand, Symbol) and operand.name in self.parameter_offsets:
            constant = type.dtype.type(self.parameter_offsets[operand.name])
        else:
            raise Unsupported(f"cannot read the operand {operand}")
        return lambda wave: constant

    def destination(self, operand, type):
        if operand == "_":
            return lambda wave, active, values: None
        if not isinstance(operand, Register):
            raise Unsupported(f"cannot write to {operand}")
        if type.kind == "p" or operand.bits == 1:
            dtype = np.dtype(bool)
        else:
            dtype = {"u": UNSIGNED, "h": UNSIGNED, "s": SIGNED, "f": FLOAT}[type.kind][operand.bits]
        index = operand.index

        def put(wave, active, values):
            row = wave.rows[dtype][index]
            if active is None:
                row[...] = values
            else:
                np.copyto(row, values, where=active, casting="unsafe")

        return put

    def address(self, operand):
        """read(wave) -> uint64 address of every thread."""
        if not isinstance(operand, Address):
            raise Unsupported(f"{operand} is no address")
        base = operand.base
        if isinstance(base, Register) and base.bits == 32:
            narrow, offset = self.source(base, TYPES["u32"]), operand.offset % (1 << 32)
            return lambda wave: (narrow(wave) + np.uint32(offset)).astype(np.uint64)
        read, offset = self.source(base, TYPES["u64"]), np.uint64(operand.offset % (1 << 64))
        return lambda wave: np.broadcast_to(read(wave) + offset, wave.columns)


def _register_source(register, type):
    index = register.index
    if type.kind == "p" or register.bits == 1:
        if type.bits != register.bits:
            raise Unsupported("a predicate where a number belongs, or the reverse")
        dtype = np.dtype(bool)
    elif register.bits == type.bits:
        dtype = type.dtype
    elif register.bits > type.bits:
        wide, narrow, dtype = UNSIGNED[register.bits], UNSIGNED[type.bits], type.dtype
        return lambda wave: wave.rows[wide][index].astype(narrow).view(dtype)
    else:
        raise Unsupported(f"a {register.bits}-bit register where {type.name} is read")
    return lambda wave: wave.rows[dtype][index]


def immediate(operand, type):
    """A constant of the type."""
    value = operand.value
    if operand.bits is not None:  # the bits of a float
        as_float = np.array(value, UNSIGNED[operand.bits]).view(FLOAT[operand.bits])[()]
        if type.kind == "f":
            return type.dtype.type(as_float)
        if type.kind == "h":
            return {"b": to_bfloat16, "f": to_float16}[type.name[0]](as_float)[()]
        return type.dtype.type(value)
    if type.kind == "p":
        return bool(value)
    if type.kind == "f":
        return type.dtype.type(value)
    return np.array(int(value) % (1 << type.bits), UNSIGNED[type.bits]).view(type.dtype)[()]

