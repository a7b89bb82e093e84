"""The memory spaces, and what is wrong with an access: Fault, raised with the first lane at fault.

Global memory is the host's: addresses in the kernels are host addresses, good inside the regions of the launch only.
Shared memory lives in one array for all blocks that run side by side; beside every byte stand its state and who touched
it since the block's last barrier. A race is reported between warps; lanes of one warp are run in step and never race.
"""
import numpy as np

SHARED_WINDOW = 1 << 60  # where generic addresses of shared and local memory begin; host addresses lie below 1 << 47
LOCAL_WINDOW = 1 << 61
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(Exception):
    """`at` is the position of the faulty lane among the lanes of the access."""

    def __init__(self, what, at=0):
        super().__init__(what)
        self.at = int(at)


def first(condition):
    return np.flatnonzero(condition)[0]


def check_alignment(addresses, nbytes):
    wrong = addresses & np.uint64(nbytes - 1)
    if wrong.any():
        raise Fault(f"misaligned {nbytes}-byte access at address {addresses[first(wrong)]:#x}", first(wrong))


class _HostMemory:
    """The process's own memory as one array from address 16 up: `array[(address - 16) // word]`."""

    def __init__(self, word):
        self.__array_interface__ = {"data": (16, False), "shape": ((1 << 47) // word,), "typestr": f"<u{word}", "version": 3}


HOST = {word: np.asarray(_HostMemory(word)) for word in WORDS}


class GlobalMemory:
    """`regions`: (first address, bytes) of everything that the launch may touch.

    Blocks of one launch are not ordered: one that writes what another one reads or writes races with it (atomics aside, and
    accesses of less than a granule). Every granule notes the block that wrote it and the one that read it, or SEVERAL.
    """

    GRANULE = 4
    NOBODY, SEVERAL = -1, -2

    def __init__(self, regions):
        regions = sorted((r for r in set(regions) if r[1] > 0))
        self.begins = np.array([begin for begin, _ in regions] or [0], np.uint64)
        self.ends = np.array([begin + size for begin, size in regions] or [0], np.uint64)
        granules = [-(-size // self.GRANULE) for _, size in regions]
        self.shadows = np.cumsum([0, *granules])[:-1] if granules else np.zeros(1, np.int64)
        self.writer, self.reader = (np.full(sum(granules), self.NOBODY, np.int32) for _ in range(2))

    def check(self, addresses, nbytes):
        check_alignment(addresses, nbytes)
        region = np.searchsorted(self.begins, addresses, "right") - 1
        outside = (region < 0) | (addresses + np.uint64(nbytes) > self.ends[region])
        if outside.any():
            at = first(outside)
            raise Fault(f"global memory out of bounds: {nbytes} bytes at {self._where(int(addresses[at]))}", at)

    def _granules(self, addresses, nbytes):
        """Places in the shadows of the granules of every access, (lanes, granules)."""
        region = np.searchsorted(self.begins, addresses, "right") - 1
        first_one = (addresses - self.begins[region]).astype(np.int64) // self.GRANULE + self.shadows[region]
        return first_one[:, None] + np.arange(max(1, nbytes // self.GRANULE))

    def note_read(self, addresses, block, nbytes):
        place, block = self._granules(addresses, nbytes), block[:, None]
        writer = self.writer[place]
        foreign = (writer != self.NOBODY) & (writer != block)
        if foreign.any():
            raise Fault("race in global memory: another block of this launch wrote what is read", first(foreign.any(1)))
        reader = self.reader[place]
        self.reader[place] = np.where(reader == self.NOBODY, block, np.where(reader == block, reader, self.SEVERAL))
        self.reader[place[(self.reader[place] != block)]] = self.SEVERAL  # blocks side by side

    def note_write(self, addresses, block, nbytes):
        if nbytes < self.GRANULE:  # neighbours in one granule may be other blocks'
            return
        place, block = self._granules(addresses, nbytes), block[:, None]
        for shadow, what in ((self.writer, "wrote here too"), (self.reader, "read what is overwritten")):
            foreign = (shadow[place] != self.NOBODY) & (shadow[place] != block)
            if foreign.any():
                raise Fault(f"race in global memory: another block of this launch {what}", first(foreign.any(1)))
        self.writer[place] = block
        if (foreign := self.writer[place] != block).any():
            raise Fault("race in global memory: blocks of this launch write to one place", first(foreign.any(1)))

    def _where(self, address):
        distances = [(max(int(b) - address, address - int(e), 0), int(b), int(e)) for b, e in zip(self.begins, self.ends)]
        _, begin, end = min(distances)
        place = f"{begin - address} before" if address < begin else f"{address - begin} of"
        return f"{place} a tensor of {end - begin} bytes"

    @staticmethod
    def load(addresses, word, words):
        index = (addresses - np.uint64(16)) // np.uint64(word)
        return HOST[word][index] if words == 1 else HOST[word][index[:, None] + np.arange(words, dtype=np.uint64)]

    @staticmethod
    def store(addresses, data, word, words):
        index = (addresses - np.uint64(16)) // np.uint64(word)
        HOST[word][index if words == 1 else index[:, None] + np.arange(words, dtype=np.uint64)] = data


UNWRITTEN, WRITTEN, IN_FLIGHT = 0, 1, 2
NOBODY, SEVERAL, ATOMIC = 0, 255, 254  # beside 1 + the warp's number


def _spread(values, word):
    """A byte repeated over a word: 0x05 -> 0x05050505."""
    return values.astype(WORDS[word]) * WORDS[word](int.from_bytes(b"\1" * word, "little"))


class SharedMemory:
    """`size` bytes for each of `blocks`. Callers give the block and the warp of every lane."""

    def __init__(self, blocks, size):
        self.size, self.stride = size, -(-size // 16) * 16
        arrays = [np.full(blocks * self.stride, fill, np.uint8) for fill in (0xFF, UNWRITTEN, NOBODY, NOBODY)]
        self.data, self.state, self.writer, self.reader = ({word: a.view(t) for word, t in WORDS.items()} for a in arrays)
        self.blocks = blocks

    def barrier(self, blocks):
        """Everything before it is visible behind it, in these blocks (a mask)."""
        for shadow in (self.writer, self.reader):
            shadow[1].reshape(self.blocks, self.stride)[blocks] = NOBODY

    def check(self, addresses, nbytes):
        check_alignment(addresses, nbytes)
        outside = addresses + np.uint64(nbytes) > self.size
        if outside.any():
            at = first(outside)
            raise Fault(f"shared memory out of bounds: {nbytes} bytes at {addresses[at]} of {self.size}", at)

    def _index(self, addresses, block, word, words):
        index = ((addresses.astype(np.int64) + block * self.stride) // word)
        return index[:, None] + np.arange(words) if words > 1 else index

    @staticmethod
    def _foreign(found, own, *harmless):
        """Per lane: whether a shadow shows any warp but its own."""
        wrong = (found != own) & (found != 0)
        if not wrong.any():
            return None
        lanes, width = len(found), found.dtype.itemsize * (found.size // len(found))
        found, own = (np.ascontiguousarray(np.broadcast_to(a, found.shape)).view(np.uint8).reshape(lanes, width) for a in (found, own))
        wrong = ((found != own) & ~np.isin(found, (NOBODY, *harmless))).any(1)
        return first(wrong) if wrong.any() else None

    def _own(self, warp, word, words):
        own = _spread(warp + 1, word)
        return own[:, None] if words > 1 else own

    def load(self, addresses, block, warp, word, words, unwritten_too=False):
        index, own = self._index(addresses, block, word, words), self._own(warp, word, words)
        states = self.state[word][index]
        if not (states == _spread(np.array(WRITTEN), word)).all():
            states = np.ascontiguousarray(states).view(np.uint8).reshape(len(addresses), -1)
            flying = (states == IN_FLIGHT).any(1)
            if flying.any():
                raise Fault("read of shared memory that a cp.async not yet waited for will write", first(flying))
            if not unwritten_too:
                raise Fault("read of uninitialised shared memory", first((states != WRITTEN).any(1)))
        at = self._foreign(self.writer[word][index], own)
        if at is not None:
            raise Fault("race in shared memory: another warp wrote here and no barrier stands between", at)
        self._note_reader(index, own, word)
        return self.data[word][index]

    def _note_reader(self, index, own, word):
        reader = self.reader[word]
        before = reader[index]
        reader[index] = np.where(before == 0, own, before)
        if (reader[index] != own).any():  # byte by byte, where warps meet
            bytes_ = (np.broadcast_to(index, before.shape)[..., None] * word + np.arange(word)).reshape(-1)
            mine = np.ascontiguousarray(np.broadcast_to(own, before.shape)).view(np.uint8).reshape(-1)
            single = self.reader[1]
            fresh = single[bytes_] == NOBODY
            single[bytes_[fresh]] = mine[fresh]
            single[bytes_[single[bytes_] != mine]] = SEVERAL

    def claim(self, addresses, block, warp, word, words, atomic=False):
        """The checks and marks of a write by these lanes."""
        index, own = self._index(addresses, block, word, words), self._own(warp, word, words)
        harmless = (ATOMIC,) if atomic else ()
        at = self._foreign(self.writer[word][index], own, *harmless)
        if at is not None:
            raise Fault("race in shared memory: another warp wrote here too and no barrier stands between", at)
        at = self._foreign(self.reader[word][index], own)
        if at is not None:
            raise Fault("race in shared memory: another warp read what is overwritten and no barrier stands between", at)
        self.writer[word][index] = _spread(np.array(ATOMIC), word) if atomic else own
        return index, own

    def store(self, addresses, block, warp, data, word, words):
        index, own = self.claim(addresses, block, warp, word, words)
        self.data[word][index] = data
        self.state[word][index] = _spread(np.array(WRITTEN), word)
        lost = (self.writer[word][index] != own) & (self.data[word][index] != data)
        if lost.any():
            raise Fault("race in shared memory: warps write different values in one step", first(lost.reshape(len(addresses), -1).any(1)))

    def announce(self, addresses, block, warp, word, words):
        """A cp.async was issued: until it is waited for, its destination holds nothing."""
        index, _ = self.claim(addresses, block, warp, word, words)
        self.data[word][index] = _spread(np.array(0xFF), word)
        self.state[word][index] = _spread(np.array(IN_FLIGHT), word)

    def read_atomically(self, addresses, block, warp, word):
        index, _ = self.claim(addresses, block, warp, word, 1, atomic=True)
        if not (self.state[word][index] == _spread(np.array(WRITTEN), word)).all():
            raise Fault("atomic on uninitialised shared memory")
        return self.data[word][index]

    def write_atomically(self, addresses, block, data, word):
        self.data[word][self._index(addresses, block, word, 1)] = data


class LocalMemory:
    """`size` bytes for each thread."""

    def __init__(self, threads, size):
        self.size, self.stride = size, -(-size // 16) * 16
        data = np.full(threads * self.stride, 0xFF, np.uint8)
        self.data = {word: data.view(t) for word, t in WORDS.items()}

    def check(self, addresses, nbytes):
        check_alignment(addresses, nbytes)
        outside = addresses + np.uint64(nbytes) > self.size
        if outside.any():
            raise Fault("local memory out of bounds", first(outside))

    def index(self, addresses, thread, word, words):
        index = (addresses.astype(np.int64) + thread * self.stride) // word
        return index[:, None] + np.arange(words) if words > 1 else index
