"""Two processes that measure one suite by turns, sample by sample: whatever slows the machine down for a while then meets both alike.

One of them has the turn and computes, the other waits asleep. The turn changes when a case is prepared and after every sample; a case ends for both in the same
round. What a process tells with the turn, behind a round, is whether its case is measured well enough. Both draw the same orders of providers, so that
neighbouring samples are of the same one.
"""
import time
from multiprocessing.connection import Connection

REST_S = 0.012  # before the turn is given away: threads that wait for work have gone to sleep by then (they spin for 5 ms)


class Turns:
    """One end of a connection between the two; the `first` one begins. Its clock stands still while the turn is the other's."""

    def __init__(self, connection, first, rest_s=REST_S, number=1, passes=1):
        self.connection, self.first, self.rest_s = connection, first, rest_s
        self.number, self.passes = number, passes  # which pair of processes of how many this is
        self.waited_ns, self.heard = 0, None
        if not first:
            self._receive()

    @classmethod
    def of(cls, text):
        """From "FD:first:2:3", the file descriptor of the connection, "first" or "second", and the second of three pairs of processes."""
        descriptor, place, number, passes = text.split(":")
        return cls(Connection(int(descriptor)), place == "first", number=int(number), passes=int(passes))

    def clock(self):
        return time.perf_counter_ns() - self.waited_ns

    def begin(self, word=None):
        """This side has prepared its case: returns what the other says to that when both have."""
        before = self.heard
        self._pass(word)
        return self.heard if self.first else before

    def swap(self):
        """Between two samples of a round: the other takes its own."""
        self._pass(None)

    def both_done(self, done):
        """Behind each round: whether both sides are done with the case. `done`: this one is."""
        before = self.heard
        self._pass(done)
        return bool(done and (self.heard if self.first else before))

    def sit_out(self):
        """A case that this side has nothing to time of."""
        self.begin()
        while not self.both_done(True):
            pass

    def _pass(self, word):
        begin = time.perf_counter_ns()
        time.sleep(self.rest_s)
        try:
            self.connection.send(word)
        except OSError:  # the other has come to its end
            self.heard = True
        else:
            self._receive()
        self.waited_ns += time.perf_counter_ns() - begin

    def _receive(self):
        try:
            self.heard = self.connection.recv()
        except (EOFError, OSError):
            self.heard = True
