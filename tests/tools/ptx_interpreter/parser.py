"""PTX text -> its entries, each as a Kernel: variables, and a list of Instructions with resolved operands.

Scopes in braces (inline assembly declares registers of its own in them) are resolved here; .loc lines become the source
position of the instructions behind them.
"""
import functools
import re
from dataclasses import dataclass, field

from .numbers import TYPES


class PTXError(Exception):
    """The PTX cannot be run, or did something that it must not: the message names kernel, block, thread and instruction."""


@dataclass(frozen=True)
class Register:
    bits: int  # 1 for predicates
    index: int  # among the registers of this width


@dataclass(frozen=True)
class Immediate:
    bits: int | None  # of a hexadecimal float; None for an integer
    value: int | float


@dataclass(frozen=True)
class Special:
    name: str  # "tid.x"


@dataclass(frozen=True)
class Symbol:
    name: str  # a variable, a parameter or a label


@dataclass(frozen=True)
class Address:
    base: object  # Register, Symbol or Immediate
    offset: int


@dataclass(frozen=True)
class Negated:
    register: Register


class Pair(tuple):
    """d|p of shfl, setp and others."""


@dataclass
class Instruction:
    guard: Register | None
    guard_negated: bool
    opcode: str  # "ld"
    modifiers: tuple  # ("global", "v4", "b32")
    operands: list  # vectors are lists
    text: str
    source: str  # "file.py:12", where the PTX tells
    used_bytes: int = -1  # of a load: a bit for each byte that somebody looks at, where the PTX tells

    @property
    def types(self):
        return [TYPES[m] for m in self.modifiers if m in TYPES]

    @property
    def reads(self):
        """The registers it reads, the guard's and those of addresses included."""
        writes = self.opcode not in ("st", "red", "bra", "bar", "cp", "ret", "exit")
        found = [*_registers(self.operands[1:] if writes else self.operands), *_registers([o for o in self.operands[:1] if isinstance(o, Address)])]
        return [*found, self.guard] if self.guard else found

    def has(self, *names):
        return any(name in self.modifiers for name in names)

    def one_of(self, names, default=None):
        return next((m for m in self.modifiers if m in names), default)


def _registers(operands):
    for o in operands:
        if isinstance(o, Register):
            yield o
        elif isinstance(o, Negated):
            yield o.register
        elif isinstance(o, Address):
            yield from _registers([o.base])
        elif isinstance(o, (list, tuple)):
            yield from _registers(o)


@dataclass
class Variable:
    space: str  # shared, global, const, local
    bytes: int  # 0 for dynamic shared memory
    align: int
    data: bytes = b""


@dataclass
class Kernel:
    name: str
    parameters: list = field(default_factory=list)  # (name, Type or None, bytes, align)
    variables: dict = field(default_factory=dict)
    registers: dict = field(default_factory=lambda: {1: 0, 16: 0, 32: 0, 64: 0, 128: 0})  # width -> how many
    instructions: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)


COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
VARIABLE = re.compile(r"\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?\.([a-z]\d+)\s+([\w$]+)\s*(\[\d*\])?\s*(?:=\s*\{?([^;}]*)\}?)?$")
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([a-z]+\d+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?([\w$]+)\s*(?:\[(\d+)\])?$")
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", re.S)


@functools.lru_cache(maxsize=64)
def entries(ptx):
    """{name: (its parameters' text, its body's), ...} of every entry, the text outside of them, and the names of the source files."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.M))
    text = COMMENT.sub("", re.sub(r'^\s*\.file.*$', "", ptx, flags=re.M))
    files = {number: path.rpartition("/")[2] for number, path in files.items()}
    found, outside, end = {}, "", 0
    for match in ENTRY.finditer(text):
        outside += text[end:match.start()]
        end = _closing_brace(text, match.end())
        found[match[1]] = match[2], text[match.end():end]
    return found, re.sub(r"\.section\b.*", "", outside + text[end + 1:], flags=re.S), files


def parse(ptx, name):
    """The Kernel of an entry."""
    found, outside, files = entries(ptx)
    parameters, inside = found[name]
    body = _Body(Kernel(name, [_parameter(p) for p in parameters.split(",") if p.strip()]), files)
    body.kernel.variables.update(v for v in map(_variable, outside.split(";")) if v)
    body.parse(inside)
    return body.kernel


def _closing_brace(text, position):
    depth = 1
    for brace in re.finditer(r"[{}]", text[position:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return position + brace.start()
    raise PTXError("a kernel's closing brace is missing")


def _parameter(text):
    match = PARAMETER.search(" ".join(text.split()))
    if not match:
        raise PTXError(f"cannot read the parameter: {text.strip()}")
    type = TYPES[match[2]]
    array = int(match[4]) if match[4] else None
    return match[3], None if array else type, array or type.bytes, int(match[1] or type.bytes)


def _variable(text):
    """(name, Variable) of a declaration, or None."""
    match = VARIABLE.search(" ".join(text.split()))
    if not match:
        return None
    space, align, type, name, array, initial = match.groups()
    size = TYPES[type].bytes
    count = 1 if array is None else int(array[1:-1] or 0)
    data = b""
    if initial:
        data = b"".join((_number(v.strip()).value % (1 << 8 * size)).to_bytes(size, "little") for v in initial.split(","))
    return name, Variable(space, count * size, int(align or size), data)


def _number(text):
    """An Immediate, or None."""
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        return Immediate(32, int(match[1], 16)) if match[1] else Immediate(64, int(match[2], 16))
    if re.fullmatch(r"[+-]?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        text = text.rstrip("U")
        return Immediate(None, int(text, 8) if re.fullmatch(r"0[0-7]+", text) else int(text, 0))
    if re.fullmatch(r"[+-]?\d+\.\d*([eE][+-]?\d+)?", text):
        return Immediate(None, float(text))
    return None


class _Body:
    """One kernel's statements."""

    TOKEN = re.compile(r"\s*(?:([{}])|([$%\w]+)\s*:(?!:)|(\.loc\b[^\n]*)|((?:[^;{}]|\{[^{};]*\})*?);)")

    def __init__(self, kernel, files):
        self.kernel, self.files, self.source, self.used_bytes = kernel, files, "", -1
        self.scopes = [{}]

    def parse(self, text):
        position = 0
        while match := self.TOKEN.match(text, position):
            position = match.end()
            brace, label, loc, statement = match.groups()
            if brace:
                self.scopes = self.scopes + [{}] if brace == "{" else self.scopes[:-1]
            elif label:
                self.kernel.labels[label] = len(self.kernel.instructions)
            elif loc:
                _, file, line, *_ = loc.split()
                self.source = f"{self.files.get(file, '?')}:{line}"
            elif statement.strip():
                self._statement(" ".join(statement.split()))
        if text[position:].strip():
            raise PTXError(f"{self.kernel.name}: cannot read: {text[position:position + 80].strip()}")

    def _statement(self, text):
        if text.startswith(".reg"):
            _, type, names = text.split(None, 2)
            for name in names.split(","):
                self._declare(name.strip(), max(16, TYPES[type[1:]].bits) if type != ".pred" else 1)
        elif used := re.match(r'\.pragma "used_bytes_mask (\w+)"', text):
            self.used_bytes = int(used[1], 0)
        elif text.startswith("."):
            if variable := _variable(text):
                self.kernel.variables[variable[0]] = variable[1]
        else:
            guard = re.match(r"@(!?)\s*(%?[\w$]+)\s+", text)
            opcode, _, operands = (text[guard.end():] if guard else text).partition(" ")
            name, *modifiers = re.split(r"\.|::", opcode)
            self.kernel.instructions.append(Instruction(
                self._register(guard[2]) if guard else None, bool(guard and guard[1]), name, tuple(modifiers),
                [self._operand(o) for o in _split(operands)], text, self.source, self.used_bytes))
            self.used_bytes = -1

    def _declare(self, name, bits):
        match = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
        for each in (f"{match[1]}{i}" for i in range(int(match[2]))) if match else (name,):
            self.scopes[-1][each] = Register(bits, self.kernel.registers[bits])
            self.kernel.registers[bits] += 1

    def _register(self, name):
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def _operand(self, text):
        text = text.strip()
        if text.startswith("{"):
            return [self._operand(o) for o in _split(text[1:-1])]
        if text.startswith("["):
            base, plus, offset = (part.strip() for part in text[1:-1].partition("+"))
            return Address(self._operand(base), int(offset, 0) if plus else 0)
        if "|" in text:
            return Pair(self._operand(o) for o in text.split("|"))
        if text.startswith("!"):
            return Negated(self._register(text[1:].strip()))
        found = self._register(text) or _number(text)
        if found or text == "_":
            return found or text
        return Special(text[1:]) if text.startswith("%") else Symbol(text)


def _split(text):
    """At commas outside of braces and brackets."""
    return [part for part in re.findall(r"(?:[^,{}\[\]]|\{[^{}]*\}|\[[^\[\]]*\])+", text) if part.strip()]
