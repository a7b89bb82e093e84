"""Loads, stores, atomics, asynchronous copies and ldmatrix.

An access of n bytes moves `words` of `word` bytes: the largest that divide it, 8 at most.
"""
import numpy as np

from .control import whole_warps
from .memory import HOST, WORDS, Fault
from .numbers import TYPES, UNSIGNED, pack, unpack
from .parser import Register
from .program import Unsupported, instruction

SPACES = ("param", "global", "shared", "local", "const")


def _in_each_space(wave, addresses, access):
    """access(space, lanes, addresses in it) for every space that generic addresses lie in."""
    for space, lanes, inside in wave.spaces_of(addresses):
        try:
            access(space, lanes, inside)
        except Fault as fault:
            raise Fault(str(fault), np.arange(len(addresses))[lanes][fault.at]) from None


def load(wave, space, columns, addresses, nbytes, unwritten_too=False):
    """(lanes, words) or (lanes,) of what lies there, after the checks of its space. `unwritten_too`: shared memory may be what it was."""
    if space is None:
        found = np.empty((len(columns), nbytes // min(nbytes, 8)) if nbytes > 8 else len(columns), WORDS[min(nbytes, 8)])
        def read(space, lanes, inside):
            found[lanes] = load(wave, space, columns[lanes], inside, nbytes, unwritten_too)

        _in_each_space(wave, addresses, read)
        return found
    word = min(nbytes, 8)
    words = nbytes // word
    wave.launch.note(space, columns, addresses, nbytes)
    if space == "shared":
        wave.shared.check(addresses, nbytes)
        return wave.shared.load(addresses, wave.block[columns], wave.warp[columns], word, words, unwritten_too)
    if space == "local":
        wave.local.check(addresses, nbytes)
        return wave.local.data[word][wave.local.index(addresses, columns, word, words)]
    if space == "param":
        index = addresses.astype(np.int64) // word
        return wave.launch.parameters.view(WORDS[word])[index[:, None] + np.arange(words) if words > 1 else index]
    memory = wave.launch.memory
    memory.check(addresses, nbytes)
    memory.note_read(addresses, wave.block[columns] + wave.first_block, nbytes)
    return memory.load(addresses, word, words)


def store(wave, space, columns, addresses, data, nbytes):
    if space is None:
        _in_each_space(wave, addresses, lambda space, lanes, inside: store(wave, space, columns[lanes], inside, data[lanes], nbytes))
        return
    word = min(nbytes, 8)
    words = nbytes // word
    wave.launch.note(space, columns, addresses, nbytes)
    if space == "shared":
        wave.shared.check(addresses, nbytes)
        wave.shared.store(addresses, wave.block[columns], wave.warp[columns], data, word, words)
    elif space == "local":
        wave.local.check(addresses, nbytes)
        wave.local.data[word][wave.local.index(addresses, columns, word, words)] = data
    else:
        memory = wave.launch.memory
        memory.check(addresses, nbytes)
        memory.note_write(addresses, wave.block[columns] + wave.first_block, nbytes)
        memory.store(addresses, data, word, words)


def _space(ins):
    space = ins.one_of(SPACES)
    return "global" if space == "const" else space


@instruction("ld", "ldu")
def ld(ins, program):
    targets = ins.operands[0] if isinstance(ins.operands[0], list) else [ins.operands[0]]
    type, space, address = ins.types[-1], _space(ins), program.address(ins.operands[1])
    puts = [program.destination(t, type) for t in targets]
    nbytes = type.bytes * len(targets)
    used = [t for i, t in enumerate(targets) if ins.used_bytes >> i * type.bytes & (1 << type.bytes) - 1 and isinstance(t, Register)]
    speculative = space in ("shared", None) and program.only_chosen_from(used)

    def run(wave, active):
        columns = wave.columns_of(active)
        found = load(wave, space, columns, address(wave)[columns], nbytes, speculative)
        parts = np.ascontiguousarray(found).view(type.dtype).reshape(len(columns), -1)
        for i, put in enumerate(puts):
            if active is None:
                put(wave, None, parts[:, i])
            else:
                values = np.zeros(wave.columns, type.dtype)
                values[columns] = parts[:, i]
                put(wave, active, values)

    return run


@instruction("st")
def st(ins, program):
    values = ins.operands[1] if isinstance(ins.operands[1], list) else [ins.operands[1]]
    type, space, address = ins.types[-1], _space(ins), program.address(ins.operands[0])
    type = TYPES[f"b{type.bits}"]
    reads = [program.source(v, type) for v in values]
    nbytes = type.bytes * len(values)
    word = min(nbytes, 8)

    def run(wave, active):
        columns = wave.columns_of(active)
        data = np.empty((len(columns), len(reads)), type.dtype)
        for i, read in enumerate(reads):
            value = read(wave)
            data[:, i] = value[columns] if np.ndim(value) else value
        data = data.view(WORDS[word])
        store(wave, space, columns, address(wave)[columns], data if nbytes > 8 else data[:, 0], nbytes)

    return run


# ---- atomics: one thread after the other, in the order of the threads

def _increment(old, limit):
    return np.where(old >= limit, 0, old + 1).astype(old.dtype)


def _decrement(old, limit):
    return np.where((old == 0) | (old > limit), limit, old - 1).astype(old.dtype)


ATOMICS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
           "exch": lambda old, new: new, "inc": _increment, "dec": _decrement}


@instruction("atom", "red")
def atom(ins, program):
    returns = ins.opcode == "atom"
    target, where, *values = ins.operands if returns else ["_", *ins.operands]
    if isinstance(target, list):
        raise Unsupported("atomics on vectors")
    type, space, address = ins.types[-1], _space(ins), program.address(where)
    put, reads = program.destination(target, type), [program.source(v, type) for v in values]
    name = ins.one_of((*ATOMICS, "cas"))
    function = _sixteen_bit(type, ATOMICS[name]) if type.kind == "h" and name == "add" else ATOMICS.get(name)

    def run(wave, active):
        columns = wave.columns_of(active)
        addresses = address(wave)[columns]
        arguments = [np.broadcast_to(read(wave), wave.columns)[columns] for read in reads]
        where = space
        if where is None:
            (where, _, addresses), *others = wave.spaces_of(addresses)
            if others:
                raise Fault("an atomic in two memory spaces at once")
        before = np.zeros(wave.columns, type.dtype)
        left = np.arange(len(columns))
        while len(left):  # every address once a round
            _, now = np.unique(addresses[left], return_index=True)
            now = left[np.sort(now)]
            there = _AtomicPlace(wave, where, columns[now], addresses[now], type)
            old = there.read()
            new = np.where(old == arguments[0][now], arguments[1][now], old) if name == "cas" else function(old, arguments[0][now])
            there.write(new.astype(type.dtype))
            before[columns[now]] = old
            left = np.setdiff1d(left, now)
        put(wave, active, before)

    return run


def _sixteen_bit(type, function):
    return lambda old, value: pack(type, [function(a, b) for a, b in zip(unpack(type, old), unpack(type, value))])


class _AtomicPlace:
    """What atomics read and write: shared or global memory."""

    def __init__(self, wave, space, columns, addresses, type):
        self.wave, self.shared, self.columns, self.addresses, self.type = wave, space == "shared", columns, addresses, type
        (wave.shared if self.shared else wave.launch.memory).check(addresses, type.bytes)
        self.uint = UNSIGNED[type.bits]

    def read(self):
        if self.shared:
            wave = self.wave
            old = wave.shared.read_atomically(self.addresses, wave.block[self.columns], wave.warp[self.columns], self.type.bytes)
        else:
            old = self.wave.launch.memory.load(self.addresses, self.type.bytes, 1)
        return old.view(self.type.dtype)

    def write(self, values):
        values = np.ascontiguousarray(values).view(self.uint)
        if self.shared:
            self.wave.shared.write_atomically(self.addresses, self.wave.block[self.columns], values, self.type.bytes)
        else:
            self.wave.launch.memory.store(self.addresses, values, self.type.bytes, 1)


# ---- cp.async: issued copies wait in wave.copies until the thread waits for their group

@instruction("cp")
def cp(ins, program):
    if not ins.has("async") or ins.has("bulk", "mbarrier"):
        raise Unsupported("copy")
    if ins.has("commit_group"):
        def commit(wave, active):
            wave.commits += True if active is None else active

        return commit
    if ins.has("wait_all"):
        return lambda wave, active: _land(wave, active, None)
    if ins.has("wait_group"):
        keep = ins.operands[0].value
        return lambda wave, active: _land(wave, active, keep)
    return _issue(ins, program)


def _issue(ins, program):
    to, origin = program.address(ins.operands[0]), program.address(ins.operands[1])
    nbytes = ins.operands[2].value
    fill = ins.operands[3] if len(ins.operands) > 3 else None
    if fill is not None and isinstance(fill, Register) and fill.bits == 1:  # ignore-src
        ignored = program.source(fill, TYPES["pred"])
        count = lambda wave: np.where(ignored(wave), 0, nbytes)  # noqa: E731
    elif fill is not None and not (isinstance(fill, Register) and fill.bits == 64):
        count = program.source(fill, TYPES["u32"])
    else:
        count = lambda wave: np.uint32(nbytes)  # noqa: E731

    def run(wave, active):
        columns = wave.columns_of(active)
        destination, source = to(wave)[columns], origin(wave)[columns]
        counts = np.broadcast_to(count(wave), wave.columns)[columns].astype(np.int64)
        wave.shared.check(destination, nbytes)
        reading = counts > 0
        wave.launch.memory.check(source[reading], nbytes if (counts[reading] == nbytes).all() else 1)
        word = min(nbytes, 8)
        wave.shared.announce(destination, wave.block[columns], wave.warp[columns], word, nbytes // word)
        wave.copies.append((columns, destination, source, counts, nbytes, wave.commits[columns]))

    return run


def _land(wave, active, keep):
    """The copies of the active threads that are in groups older than the last `keep` (None: all copies) take place."""
    waiting = np.ones(wave.columns, bool) if active is None else active
    left = []
    for columns, destination, source, counts, nbytes, group in wave.copies:
        done = waiting[columns]
        if keep is not None:
            done = done & (group + keep < wave.commits[columns])
        if done.any():
            _copy(wave, columns[done], destination[done], source[done], counts[done], nbytes)
        if not done.all():
            left.append(tuple(a[~done] if isinstance(a, np.ndarray) else a for a in (columns, destination, source, counts, nbytes, group)))
    wave.copies = left


def _copy(wave, columns, destination, source, counts, nbytes):
    data = np.zeros((len(columns), nbytes), np.uint8)
    whole = counts == nbytes
    if whole.any():
        found = load(wave, "global", columns[whole], source[whole], nbytes)
        data[whole] = np.ascontiguousarray(found).view(np.uint8).reshape(-1, nbytes)
    for lane in np.flatnonzero((counts > 0) & ~whole):
        data[lane, :counts[lane]] = HOST[1][int(source[lane]) - 16:int(source[lane]) - 16 + counts[lane]]
    word = min(nbytes, 8)
    data = data.view(WORDS[word])
    store(wave, "shared", columns, destination, data if nbytes > 8 else data[:, 0], nbytes)


@instruction("createpolicy")
def createpolicy(ins, program):
    put = program.destination(ins.operands[0], TYPES["b64"])
    return lambda wave, active: put(wave, active, np.uint64(0))


# ---- matrices

@instruction("ldmatrix")
def ldmatrix(ins, program):
    """Lanes 8 i to 8 i + 7 address the 16-byte rows of matrix i; lane l receives elements 2 l and 2 l + 1 of each."""
    if not ins.has("m8n8") or not ins.has("b16"):
        raise Unsupported("matrix shape")
    targets = ins.operands[0] if isinstance(ins.operands[0], list) else [ins.operands[0]]
    puts, address = [program.destination(t, TYPES["b32"]) for t in targets], program.address(ins.operands[1])
    transposed = ins.has("trans")

    def run(wave, active):
        giving = wave.lane < 8 * len(puts)
        columns = np.flatnonzero(giving if active is None else giving & active)
        rows = load(wave, "shared", columns, address(wave)[columns], 16).view(np.uint16).reshape(-1, len(puts), 8, 8)
        if transposed:
            rows = np.ascontiguousarray(rows.transpose(0, 1, 3, 2))
        pairs = rows.view(np.uint32).reshape(-1, len(puts), 32)
        for i, put in enumerate(puts):
            if active is None:
                put(wave, None, pairs[:, i].reshape(-1))
            else:
                values = np.zeros(wave.columns, np.uint32)
                values[active] = pairs[:, i].reshape(-1)
                put(wave, active, values)

    return whole_warps(ins, run)


