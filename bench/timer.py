"""Timing: interleaved rounds in random order, until the median is known to 1 % or the budget ends.

Nothing here knows what it times, or which clock it reads: a provider is a function without arguments, a clock
is a function that returns nanoseconds, a stopwatch one that runs a function some times and returns the nanoseconds
that took (bench/gpu.py has one of CUDA events). So the protocol itself is tested with a fake clock.
"""
import math
import random
import time
from dataclasses import dataclass, field

TARGET_HALF_WIDTH = 0.01  # of the median: the 95 % interval that ends the rounds
MIN_SAMPLE_NS = 500_000   # shorter calls are repeated inside one sample, so that the clock's own cost vanishes
TURN_SAMPLE_NS = 5_000_000  # likewise where two processes take turns: each sample begins on cores that were asleep
MAX_REPEATS = 1000
MAX_ROUNDS = 400
WARM_NS = 100_000_000     # longer calls need no warm-up behind the two of the accuracy check
LEAD_IN_NS = 20_000_000   # shorter calls run once untimed before a sample: the caches hold this provider's data, not the last one's


def quantile(values, q):
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median(values):
    return quantile(values, 0.5)


def median_interval(values):
    """95 % interval of the median from order statistics: no assumption about the distribution."""
    ordered = sorted(values)
    n = len(ordered)
    half = 1.96 * math.sqrt(n) / 2
    low, high = math.floor(n / 2 - half), math.ceil(n / 2 + half)
    return ordered[max(low, 0)], ordered[min(high, n - 1)]


def is_settled(values):
    """Whether the 95 % interval of the median lies within 1 % of it."""
    if len(values) < 6:  # below six samples the interval is the whole range and says nothing
        return False
    low, high = median_interval(values)
    return high - low <= 2 * TARGET_HALF_WIDTH * median(values)


@dataclass
class Timing:
    """Samples of one provider, in nanoseconds a call."""

    samples: list[float] = field(default_factory=list)
    first_call_ns: float | None = None
    once_ns: float = 0.0
    repeats: int = 1   # runs inside one sample
    calls: int = 1     # calls inside one run: of a CUDA graph many
    dropped: int = 0   # rounds thrown away because the machine was busy

    def summary(self):
        return {
            "median_ms": median(self.samples) / 1e6,
            "p20_ms": quantile(self.samples, 0.2) / 1e6,
            "p80_ms": quantile(self.samples, 0.8) / 1e6,
            "min_ms": min(self.samples) / 1e6,
            "n": len(self.samples),
            "noisy": not is_settled(self.samples),
            "repeats": self.repeats * self.calls,
            "dropped_rounds": self.dropped,
            "first_call_ms": None if self.first_call_ns is None else self.first_call_ns / 1e6,
        }


def time_once(fn, clock=time.perf_counter_ns):
    start = clock()
    fn()
    return clock() - start


def by(clock):
    """The stopwatch of a clock."""

    def stopwatch(fn, repeats=1):
        begin = clock()
        for _ in range(repeats):
            fn()
        return clock() - begin

    return stopwatch


def interleave(providers, budget_s, *, clock=time.perf_counter_ns, stopwatch=None, calls=None, known=None, before_call=None, seed=0, min_rounds=7,
               max_rounds=MAX_ROUNDS, lead_in=False, machine_is_free=None, on_round=None, turns=None, period=1):  # fmt: skip
    """Times every provider of {name: fn} round by round, in a new random order each round -> {name: Timing}, nanoseconds a call.

    Ends when every median is settled, or when the budget is spent and each provider has `min_rounds` samples
    (without turns 3 where one round alone outlasts the budget). `machine_is_free()` is asked around each round; a round next
    to a "no" is dropped, as long as budget is left. `lead_in` warms the caches before each sample of a short call. `on_round(spent_fraction)` feeds a progress bar.
    `before_call()` runs, untimed, before every single call (it empties the caches): a sample is one call then. `calls` {name: n}: fn() makes n calls. `known` {name: ns}:
    what a call took before; those over WARM_NS are not called again to warm up. `turns` (bench/turns.py): another process measures the same case, a sample each.
    `period`: so many calls in a row make a whole, of which each has other work; a sample holds whole ones, but where a call takes over WARM_NS.
    """
    stopwatch = stopwatch or by(clock)
    timings = {name: Timing() for name in providers}
    for name, fn in providers.items():
        once = (known or {}).get(name) or 0
        if once < WARM_NS:
            fn()  # warm-up: the first call was timed apart
            once = max(stopwatch(fn), 1)
        timings[name].once_ns, timings[name].calls = once, (calls or {}).get(name, 1)
        least = TURN_SAMPLE_NS if turns else MIN_SAMPLE_NS
        whole = period if once < WARM_NS else 1
        timings[name].repeats = 1 if before_call else whole * min(MAX_REPEATS, max(1, math.ceil(least / once / whole)))
    order, shuffle = list(providers), random.Random(seed).shuffle
    if turns:  # a sample is as many calls on both sides
        theirs = turns.begin({name: timing.repeats for name, timing in timings.items()})
        for name in timings.keys() & (theirs if isinstance(theirs, dict) else {}):
            timings[name].repeats = max(timings[name].repeats, theirs[name])
    start = clock()
    free_before = machine_is_free() if machine_is_free else True
    for number in range(max_rounds):
        shuffle(order)
        round_samples = {}
        for place, name in enumerate(order):
            if turns and place:
                turns.swap()
            fn, timing = providers[name], timings[name]
            if before_call:
                before_call()
            elif lead_in and timing.once_ns < LEAD_IN_NS:
                fn()
            round_samples[name] = stopwatch(fn, timing.repeats) / timing.repeats / timing.calls
        free_after = machine_is_free() if machine_is_free else True
        spent = (clock() - start) / 1e9
        keep = (free_before and free_after) or spent > budget_s
        free_before = free_after
        for name, timing in timings.items():
            if keep:
                timing.samples.append(round_samples[name])
            else:
                timing.dropped += 1
        rounds = len(timings[order[0]].samples)
        if on_round:
            on_round(min(1.0, max(spent / budget_s, rounds / max_rounds)))
        settled = rounds >= min_rounds and all(is_settled(t.samples) for t in timings.values())
        enough = 3 if spent > 2 * budget_s and not turns else min_rounds
        done = settled or (spent > budget_s and rounds >= enough) or number + 1 == max_rounds
        if turns.both_done(done) if turns else done:
            break
    return timings
