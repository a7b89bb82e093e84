"""Expert parallelism on two gloo ranks of this machine; the checks are in tests/ranks/experts.py."""
from ranks import experts, spawn


def test_two_ranks():
    spawn.run("ranks.experts", experts.LAYER + experts.MODELS, 2)
