"""Expert parallelism, and checkpoints of sharded models, on two gloo ranks of this machine; the checks are in tests/ranks/experts.py and checkpoints.py."""
from ranks import checkpoints, experts, spawn


def test_two_ranks():
    spawn.run("ranks.everything", experts.LAYER + experts.MODELS + checkpoints.CHECKS, 2)
