"""Context parallelism on two gloo ranks of this machine; the checks are in tests/ranks/sequence.py."""
from ranks import sequence, spawn


def test_two_ranks():
    spawn.run("ranks.sequence", sequence.CHECKS, 2)
