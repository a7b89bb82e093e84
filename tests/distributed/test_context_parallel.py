"""Context parallelism on two gloo ranks of this machine; the checks are in tests/ranks/sequence.py and rows.py."""
from ranks import rows, sequence, spawn


def test_two_ranks():
    spawn.run("ranks.everything", sequence.CHECKS + rows.CHECKS, 2)
