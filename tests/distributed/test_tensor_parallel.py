"""Tensor parallelism and the ops on DTensors, on two gloo ranks of this machine; the checks are in tests/ranks/tensors.py and rules.py."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import rules, spawn, tensors

EXAMPLE = Path(__file__).parents[2] / "examples/tensor_parallel.py"


def test_two_ranks():
    spawn.run("ranks.tensors", tensors.SPLIT, 2)


def test_ops_on_dtensors():
    spawn.run("ranks.rules", rules.RULES, 2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_example_learns(ranks):
    """One row of two ranks, which generate; and two rows, with FSDP2."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(EXAMPLE), "--steps", "8", "--length", "64"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    found = [float(value) for value in re.findall(r"loss ([\d.]+)", run.stdout)]
    assert len(found) == 8 and found[-1] < found[0] - 0.5
    assert run.stdout.splitlines()[-1].startswith(("'", '"')) == (ranks == 2)
