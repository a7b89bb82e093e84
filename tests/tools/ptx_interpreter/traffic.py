"""What a launch's accesses cost beyond the bytes they ask for: bank conflicts in shared memory, and how full the sectors of global memory are.

Counted for each request of a warp as it stands in the PTX, in front of all caches. Shared memory serves 128 bytes a step: a warp's 4-byte
words at once, half a warp of 8 bytes, a quarter of 16; of each bank one word, whoever wants it. Global memory moves sectors of 32 bytes;
requests for less than one (a number that all lanes read) don't count.
"""
from dataclasses import dataclass

import numpy as np

BANKS, SECTOR = 32, 32


@dataclass
class Traffic:
    steps: int = 0      # of shared memory
    conflicts: int = 0  # steps beyond the first of each group of lanes
    sectors: int = 0
    asked: int = 0      # different bytes of these sectors that the requests are for

    def note(self, space, columns, addresses, nbytes):
        """One instruction of some lanes (columns: 32 a warp)."""
        if space == "shared":
            self._shared(columns, addresses.astype(np.int64), nbytes)
        elif space == "global":
            self._global(columns // 32, addresses.astype(np.int64), nbytes)

    def _shared(self, columns, addresses, nbytes):
        words = max(1, nbytes // 4)
        group = columns // (32 // words)
        word = addresses[:, None] // 4 + np.arange(words)
        wanted = np.unique(group[:, None] << 32 | word)
        bank, times = np.unique(wanted >> 32 << 5 | wanted % BANKS, return_counts=True)
        _, first = np.unique(bank >> 5, return_index=True)
        most = np.maximum.reduceat(times, first)
        self.steps += int(most.sum())
        self.conflicts += int((most - 1).sum())

    def _global(self, warp, addresses, nbytes):
        different = np.unique(warp << 47 | addresses)
        warps, asked = np.unique(different >> 47, return_counts=True)
        whole = warps[asked * nbytes >= SECTOR]
        different = different[np.isin(different >> 47, whole)]
        self.asked += len(different) * nbytes
        self.sectors += len(np.unique(different // SECTOR))

    @property
    def conflict_share(self):
        """Of the steps of shared memory."""
        return self.conflicts / self.steps if self.steps else 0.0

    @property
    def filled(self):
        """The share of the moved sectors that was asked for; None without a request of a sector or more."""
        return self.asked / (self.sectors * SECTOR) if self.sectors else None

    def __iadd__(self, other):
        for name in ("steps", "conflicts", "sectors", "asked"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self
