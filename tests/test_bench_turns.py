"""Two sides that measure by turns: strictly one sample each, a case ends for both in the same round, and the end of one lets the other go on."""
from multiprocessing import Pipe
from threading import Thread

import pytest

from terrazzo.bench.timer import interleave
from terrazzo.bench.turns import Turns


def together(*sides):
    """Runs side(turns) of the first and the second side in threads of their own -> what they return."""
    found, threads = [None, None], []
    for number, (end, side) in enumerate(zip(Pipe(), sides, strict=True)):
        def run(number=number, end=end, side=side):
            with end:
                found[number] = side(Turns(end, number == 0, rest_s=0))

        threads.append(Thread(target=run, daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "the sides wait for each other"
    return found


def rounds_of(log, name, turns, done_after, cases=1):
    for case in range(cases):
        log.append(f"{name} prepares {case}")
        turns.begin()
        for number in range(100):
            log.append(f"{name}{case}.{number}")
            if turns.both_done(number + 1 >= done_after):
                break


@pytest.mark.parametrize("first, second", [(1, 3), (3, 1), (2, 2)])
def test_rounds_alternate_and_end_together(first, second):
    log = []
    together(lambda turns: rounds_of(log, "a", turns, first, cases=2), lambda turns: rounds_of(log, "b", turns, second, cases=2))
    expected = []
    for case in range(2):
        expected += [f"a prepares {case}", f"b prepares {case}"]
        expected += [f"{name}{case}.{number}" for number in range(max(first, second)) for name in "ab"]
    assert log == expected


@pytest.mark.parametrize("idle", [0, 1])
def test_a_side_with_nothing_to_time_sits_out(idle):
    log = []

    def busy(turns):
        for _ in range(2):
            rounds_of(log, "busy", turns, 3)

    def idler(turns):
        turns.sit_out()
        rounds_of(log, "idle", turns, 1)

    together(*((idler, busy) if idle == 0 else (busy, idler)))
    assert [word for word in log if "." in word].count("busy0.2") == 2 and sum(word.startswith("idle0") for word in log) == 3


@pytest.mark.parametrize("gone", [0, 1])
def test_the_end_of_one_side_lets_the_other_go_on(gone):
    log = []
    sides = [lambda turns: rounds_of(log, "left", turns, 4, cases=2)]
    together(*([lambda turns: None] + sides if gone == 0 else sides + [lambda turns: None]))
    assert [word for word in log if "." in word] == [f"left{case}.{number}" for case in range(2) for number in range(4)]


def test_the_clock_stands_still_while_the_turn_is_the_others():
    """Two sides share one machine that gets ten times slower half-way: both see the same share of slow rounds, and neither counts the other's."""
    machine = {"now": 0}

    def side(turns):
        mine = {"ns": 0}

        def provider():
            step = 5_000_000 if machine["now"] < 200_000_000 else 50_000_000
            machine["now"] += step
            mine["ns"] += step

        return interleave({"p": provider}, 10.0, clock=lambda: mine["ns"], min_rounds=30, max_rounds=40, turns=turns)["p"].samples

    a, b = together(side, side)
    assert len(a) == len(b) and set(a) == set(b) == {5e6, 5e7} and abs(a.count(5e7) - b.count(5e7)) <= 1
    assert max(a + b) == 5e7  # no sample holds a wait


def test_samples_of_one_provider_are_neighbours():
    """Three providers in a new order each round: whatever the first side measures, the second measures next."""
    log = []

    def side(name):
        def run(turns):
            mine = {"ns": 0}

            def provider(which):
                def call():
                    log.append((name, which))
                    mine["ns"] += 10_000_000

                return call

            return interleave({which: provider(which) for which in "pqr"}, 10.0, clock=lambda: mine["ns"], seed=5, max_rounds=12, min_rounds=12, turns=turns)

        return run

    together(side("a"), side("b"))
    samples = log[-2 * 3 * 12 :]
    assert [name for name, _ in samples] == ["a", "b"] * 36
    assert [which for name, which in samples if name == "a"] == [which for name, which in samples if name == "b"]
    assert len({"".join(which for _, which in samples[i : i + 6 : 2]) for i in range(0, 72, 6)}) > 1


def test_a_sample_is_as_many_calls_on_both_sides():
    """One side takes its provider for ten times as slow before the rounds begin: it repeats it as often as the other all the same."""
    def side(first_ns):
        def run(turns):
            mine = {"ns": 0, "calls": 0}

            def provider():
                mine["calls"] += 1
                mine["ns"] += first_ns if mine["calls"] <= 2 else 100_000

            return interleave({"p": provider}, 1.0, clock=lambda: mine["ns"], min_rounds=3, max_rounds=3, turns=turns)["p"]

        return run

    a, b = together(side(100_000), side(1_000_000))
    assert a.repeats == b.repeats == 50 and set(a.samples + b.samples) == {100_000}


def test_own_clock():
    def side(turns):
        begin = turns.clock()
        turns.begin()
        turns.both_done(True)
        return turns.clock() - begin, turns.waited_ns

    for own, waited in together(side, side):
        assert 0 <= own < waited + 10**9 and waited > 0
