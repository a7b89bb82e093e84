"""Runs a Program on the threads of several blocks at once.

A Wave holds every thread of some blocks as the columns of its register files; one instruction is one numpy operation on
all of them. Threads at the same place form a group; the group that is furthest behind runs until it branches or meets the
next group, so that the branches of compiled code join again where they can. A group waits at a barrier until its block's
other threads are there, and at an instruction of a whole warp until the missing lanes are.
"""
import numpy as np

from .memory import LOCAL_WINDOW, SHARED_WINDOW, Fault, LocalMemory, SharedMemory
from .numbers import FLOAT, SIGNED, UNSIGNED
from .parser import PTXError

MAX_STEPS = 50_000_000


class Wave:
    def __init__(self, program, launch, first_block, blocks):
        self.program, self.launch = program, launch
        self.blocks = blocks
        self.warps = -(-launch.threads // 32)
        self.columns = blocks * self.warps * 32
        self.block = np.repeat(np.arange(blocks), self.warps * 32)
        self.thread = np.tile(np.arange(self.warps * 32), blocks)  # in its block
        self.warp = self.thread >> 5
        self.lane = self.thread & 31
        self.first_block = first_block
        self.alive = self.thread < launch.threads
        self.everyone = np.arange(self.columns)
        self.shared = SharedMemory(blocks, program.shared_bytes + launch.dynamic_shared)
        self.local = LocalMemory(self.columns, program.local_bytes)
        self.copies, self.commits = [], np.zeros(self.columns, np.int64)  # of cp.async: see memory_access.py
        self.carry = np.zeros(self.columns, bool)  # of add.cc and the like
        self._registers(program.kernel.registers)
        self._special()

    def _registers(self, counts):
        """self.rows[dtype][index]: a register as an array over the threads, in any type of its width."""
        self.rows = {np.dtype(bool): list(np.zeros((counts[1], self.columns), bool))}
        for bits in (16, 32, 64):
            file = np.zeros((counts[bits], self.columns), UNSIGNED[bits])
            for table in (UNSIGNED, SIGNED, FLOAT):
                self.rows[table[bits]] = list(file.view(table[bits]))

    def _special(self):
        launch, uint = self.launch, np.uint32
        block = self.block + self.first_block
        grid, threads = launch.grid, launch.block
        self.special = {"laneid": self.lane, "warpid": self.warp, "nwarpid": self.warps, "smid": block, "nsmid": 1, "clock": 0,
                        "dynamic_smem_size": launch.dynamic_shared, "total_smem_size": self.shared.size}
        for name, index, sizes in (("tid", self.thread, threads), ("ctaid", block, grid)):
            self.special |= {f"{name}.x": index % sizes[0], f"{name}.y": index // sizes[0] % sizes[1], f"{name}.z": index // (sizes[0] * sizes[1])}
            self.special |= {f"n{name}.{axis}": size for axis, size in zip("xyz", sizes)}
        one, lane = np.uint64(1), self.lane.astype(np.uint64)
        below = (one << lane) - one
        self.special |= {"lanemask_eq": one << lane, "lanemask_lt": below, "lanemask_le": below | one << lane,
                         "lanemask_gt": ~(below | one << lane) & np.uint64(0xFFFFFFFF), "lanemask_ge": ~below & np.uint64(0xFFFFFFFF)}
        self.special = {name: np.broadcast_to(np.asarray(value).astype(uint), self.columns) for name, value in self.special.items()}

    # ---- scheduling: ready and waiting map a place in the program to the mask of the threads there

    def run(self):
        self.ready, self.at_barrier, self.incomplete = {0: self.alive.copy()}, {}, {}
        steps = 0
        with np.errstate(all="ignore"):
            while self.ready or self.at_barrier or self.incomplete:
                if not self.ready:
                    self._release_barrier()
                place = min(self.ready)
                mask = self.ready.pop(place)
                steps += self._advance(place, mask, min(self.ready, default=-1))
                if steps > MAX_STEPS:
                    raise PTXError(f"{self.program.kernel.name}: still running after {MAX_STEPS} instructions")
        return steps

    def _put(self, where, place, mask):
        where[place] = where[place] | mask if place in where else mask

    def _advance(self, place, mask, stop):
        """Runs the threads of a mask from `place` until they branch, wait or reach `stop`. Returns the instructions run."""
        code, begin = self.program.code, place
        active = None if mask.all() else mask  # None: every column
        try:
            while True:
                step = code[place]
                doing = active if step.guard is None else self._guarded(step, active)
                if step.control is not None:
                    step.control(self, place, mask, mask if doing is None else doing)
                    return place + 1 - begin
                if doing is not NOBODY:
                    step.run(self, doing)
                place += 1
                if place == stop:
                    self._put(self.ready, place, mask)
                    return place - begin
        except Fault as fault:
            doing = self.everyone if doing is None else np.flatnonzero(doing)
            raise PTXError(self.describe(code[place], doing[min(fault.at, len(doing) - 1)], str(fault))) from None

    def _guarded(self, step, active):
        value = step.guard(self)
        doing = value.copy() if active is None else active & value  # a copy: the register may change while threads wait
        n = np.count_nonzero(doing)
        return doing if 0 < n < self.columns else None if n else NOBODY

    def describe(self, step, column, what):
        block = int(self.block[column]) + self.first_block
        grid = self.launch.grid
        block = (block % grid[0], block // grid[0] % grid[1], block // (grid[0] * grid[1]))
        source = f" ({step.instruction.source})" if step.instruction.source else ""
        return f"{self.program.kernel.name}, block {block}, thread {self.thread[column]}: {what}: {step.instruction.text}{source}"

    # ---- control: what the steps with `control` call

    def branch(self, place, mask, doing, target):
        if doing is NOBODY:
            return self._put(self.ready, place + 1, mask)
        self._put(self.ready, target, doing)
        if doing is not mask and (rest := mask & ~doing).any():
            self._put(self.ready, place + 1, rest)
        return None

    def exit(self, place, mask, doing):
        if doing is NOBODY:
            doing = np.zeros_like(mask)
        self.alive &= ~doing
        if (rest := mask & ~doing).any():
            self._put(self.ready, place + 1, rest)

    def wait_at_barrier(self, place, mask, doing):
        if doing is not NOBODY:
            self._put(self.at_barrier, place, doing)
        if doing is NOBODY or (mask & ~doing).any():
            self._put(self.ready, place + 1, mask if doing is NOBODY else mask & ~doing)

    def with_whole_warps(self, place, mask, doing, step):
        """Runs a step of whole warps once every lane that its members name has come; members(wave) are bits per thread, or None."""
        if doing is NOBODY:
            return self._put(self.ready, place + 1, mask)
        if doing is not mask and (rest := mask & ~doing).any():
            self._put(self.ready, place + 1, rest)
        if place in self.incomplete:
            doing = doing | self.incomplete.pop(place)
        if self._missing(doing, step.members(self)).any():
            return self._put(self.incomplete, place, doing)
        step.run(self, None if doing.all() else doing)
        return self._put(self.ready, place + 1, doing)

    def _missing(self, doing, members):
        """Lanes that are named by a lane of `doing` in their warp, alive, and not there."""
        by_warp = doing.reshape(-1, 32)
        named = np.where(by_warp, np.broadcast_to(members, self.columns).reshape(-1, 32), 0).astype(np.uint32)
        named = np.bitwise_or.reduce(named, axis=1)
        named = (named[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool).reshape(-1)
        outside = doing & ~named
        if outside.any():
            raise Fault("a lane runs a warp instruction whose mask leaves it out", np.flatnonzero(outside[doing])[0])
        return named & self.alive & ~doing

    def _release_barrier(self):
        """Nobody can run: the blocks whose threads all stand at a barrier go on; no such block is a deadlock."""
        there = np.zeros(self.columns, bool)
        for place, mask in self.at_barrier.items():
            by_warp = mask.reshape(-1, 32)
            split = by_warp.any(1) & ~(by_warp == self._initially().reshape(-1, 32)).all(1)
            if split.any():
                self._stuck(place, mask, "divergent barrier: not every thread of the warp is here")
            there |= mask
        rows = there.reshape(self.blocks, -1)
        complete = (rows == self._initially().reshape(self.blocks, -1)).all(1)
        if not complete.any():
            for place, mask in self.incomplete.items():
                self._stuck(place, mask, "waits for lanes of the warp that never come")
            for place, mask in self.at_barrier.items():
                self._stuck(place, mask, "divergent barrier: not every thread of the block comes here")
        self.shared.barrier(complete)
        going = complete[self.block]
        for place, mask in list(self.at_barrier.items()):
            if (leaving := mask & going).any():
                self._put(self.ready, place + 1, leaving)
                self.at_barrier[place] = mask & ~going
            if not self.at_barrier[place].any():
                del self.at_barrier[place]

    def _initially(self):
        return self.thread < self.launch.threads

    def _stuck(self, place, mask, what):
        raise PTXError(self.describe(self.program.code[place], np.flatnonzero(mask)[0], what))

    # ---- for instructions

    def columns_of(self, active):
        return self.everyone if active is None else np.flatnonzero(active)

    @staticmethod
    def spaces_of(addresses):
        """(space, lanes, addresses in it) of each space that generic addresses lie in."""
        window = np.searchsorted(np.array([SHARED_WINDOW, LOCAL_WINDOW], np.uint64), addresses, "right")
        for i, (space, begin) in enumerate((("global", 0), ("shared", SHARED_WINDOW), ("local", LOCAL_WINDOW))):
            if (lanes := window == i).any():
                lanes = slice(None) if lanes.all() else np.flatnonzero(lanes)
                yield space, lanes, addresses[lanes] - np.uint64(begin)


NOBODY = object()  # in the place of a mask: no thread's guard holds
