"""Tensor parallelism and the ops on DTensors, on two gloo ranks of this machine; the checks are in tests/ranks/tensors.py and rules.py."""
from ranks import rules, spawn, tensors


def test_two_ranks():
    spawn.run("ranks.tensors", tensors.SPLIT, 2)


def test_ops_on_dtensors():
    spawn.run("ranks.rules", rules.RULES, 2)
