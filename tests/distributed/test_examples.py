"""examples/expert_parallel.py under torchrun: two ranks learn, and in chunks they learn the same."""
import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples/expert_parallel.py"


def losses(*flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE), *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    return [float(value) for value in re.findall(r"loss ([\d.]+)", run.stdout)]


def test_the_example_learns():
    found = losses("--steps", "12")
    assert len(found) == 12 and found[-1] < found[0] - 0.5
    assert all(abs(a - b) < 2e-3 for a, b in zip(found[:4], losses("--steps", "4", "--chunks", "2"), strict=True))
