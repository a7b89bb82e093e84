"""Tile sizes: static tables, one per kernel, read top down; benchmarked on the spot only on request.

A Table's rows are tried in order and the first whose conditions hold is taken, so a first call never waits for tuning.
With TERRAZZO_TRITON_AUTOTUNE=1 every row for the architecture and the element size that the device can hold is timed once
for each new key instead.
"""
import os
from contextlib import contextmanager
from dataclasses import dataclass, field

from . import runtime

TABLES = {}  # kernel -> Table: what the docs and the compile checks go through


def _first(table, rows):
    return next(rows)


_choose = _first  # (table, the rows that serve, in order) -> row


@contextmanager
def choosing(choose):
    """Inside the block `choose(table, rows)` takes the place of "the first row that serves": for compile checks of every row."""
    global _choose
    before, _choose = _choose, choose
    try:
        yield
    finally:
        _choose = before


@dataclass(frozen=True)
class Row:
    """One configuration and when it serves. `blocks` are the kernel's constexprs; `up_to` bounds sizes of the key."""

    blocks: dict
    num_warps: int = 4
    num_stages: int = 2
    arch: tuple = ()  # () for any; a prefix will do ("sm", "gfx")
    itemsize: int | None = None  # bytes of an element; None for any
    up_to: dict = field(default_factory=dict)

    def suits(self, arch, itemsize):
        """Whether it may run there at all: sizes only say where it is thought to be fast."""
        return (not self.arch or arch.startswith(tuple(self.arch))) and (self.itemsize is None or self.itemsize == itemsize)

    def holds(self, sizes):
        return all(sizes[name] <= bound for name, bound in self.up_to.items())

    def options(self):
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


class Table:
    """The configurations of one kernel. The last row must serve everything."""

    def __init__(self, kernel, *rows):
        if rows[-1].arch or rows[-1].itemsize is not None or rows[-1].up_to:
            raise ValueError(f"{kernel}: the last row must have no conditions")
        self.kernel, self.rows, self._tuned = kernel, rows, {}
        TABLES[kernel] = self

    def suiting(self, arch, itemsize):
        """The rows meant for a device and element size: none behind the first that takes every size there."""
        rows = [row for row in self.rows if row.suits(arch, itemsize)]
        return rows[: next(i for i, row in enumerate(rows) if not row.up_to) + 1]

    def pick(self, tensor, **sizes):
        """Keyword arguments for the launch of `kernel`: constexprs, num_warps, num_stages."""
        rows = self.suiting(runtime.arch(tensor.device), tensor.element_size())
        return _choose(self, (row for row in rows if row.holds(sizes))).options()

    def launch(self, tensor, run, **sizes):
        """run(**options) with the row that serves, or with the fastest of all where tuning was asked for."""
        if os.environ.get("TERRAZZO_TRITON_AUTOTUNE") != "1" or tensor.device.type != "cuda" or runtime.is_tracing():
            return run(**self.pick(tensor, **sizes))
        arch, itemsize = runtime.arch(tensor.device), tensor.element_size()
        key = (arch, tensor.dtype, *sizes.values())
        if key not in self._tuned:
            if runtime.is_capturing():  # a CUDA graph: nothing can be timed
                return run(**self.pick(tensor, **sizes))
            self._tuned[key] = self._fastest(run, self.suiting(arch, itemsize))
        return run(**self._tuned[key])

    def _fastest(self, run, rows):
        from triton.runtime.errors import OutOfResources
        from triton.testing import do_bench

        times = []
        for row in rows:
            try:
                times.append((do_bench(lambda row=row: run(**row.options()), warmup=5, rep=20), row))
            except OutOfResources:  # this device cannot hold it
                continue
        return min(times, key=lambda timed: timed[0])[1].options()
