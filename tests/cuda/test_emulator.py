"""The emulator itself: correct kernels run clean in every mode and order, and each planted fault is caught by the mode that is there for it."""
import subprocess
from pathlib import Path

import pytest

from tools import emulator

SOURCE = Path(__file__).parent / "kernels.cu"
CORRECT = ("sum", "rotate", "operations", "gemm_bf16", "gemm_fp16", "product_bf16", "product_fp16", "product_tf32")
ORDERS = ("forward", "reversed", "random")


def run(name, mode="plain", order="forward", seed=1):
    """(exit status, what it said) of one program of kernels.cu."""
    try:
        program = emulator.program(SOURCE, mode)
    except emulator.CannotBuild as error:
        pytest.fail(str(error), pytrace=False)
    done = subprocess.run([program, name, order, str(seed)], capture_output=True, text=True, timeout=120, env={"ASAN_OPTIONS": "detect_leaks=0"})
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", emulator.MODES)
@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels_run_clean(name, mode, order):
    status, said = run(name, mode, order)
    assert status == 0 and said.startswith("OK"), said


def test_bank_conflicts_are_counted():
    assert "bank conflicts 0 of 1536" in run("gemm_bf16")[1]
    assert "bank conflicts 384 of 128" in run("no_padding")[1]  # rows of 64 bytes: eight of them meet in two places of 16 bytes


# fault: (mode, orders, what is said); where the orders are few, the others don't see it
CAUGHT = {
    "no_sync": ("plain", ("forward",), "WRONG: off by nan"),
    "unwritten": ("plain", ORDERS, "WRONG: off by nan"),
    "wrong_lane": ("plain", ORDERS, "WRONG"),
    "wrong_mask": ("plain", ORDERS, "__shfl_xor_sync: the calling lane is not in its own mask (kernels.cu:"),
    "misaligned": ("plain", ORDERS, "misaligned access of 16 bytes"),
    "divergent": ("plain", ORDERS, "divergent barrier: others wait in another __syncthreads"),
    "early_exit": ("plain", ORDERS, "divergent barrier"),
    "bad_launch": ("plain", ORDERS, "whole warps"),
    "weak_wait": ("plain", ORDERS, "WRONG: off by nan"),
    "no_sync_after_wait": ("plain", ("forward",), "WRONG: off by nan"),
    "no_sync_before_overwriting": ("plain", ("reversed",), "WRONG: off by nan"),
    "out_of_bounds": ("sanitize", ORDERS, "heap-buffer-overflow"),
}


@pytest.mark.parametrize("name, mode, order, says", [(name, mode, order, says) for name, (mode, orders, says) in CAUGHT.items() for order in orders])
def test_planted_fault_is_caught(name, mode, order, says):
    status, said = run(name, mode, order)
    assert status != 0 and says in said, said


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["no_sync", "no_syncwarp", "no_sync_after_wait", "no_sync_before_overwriting"])
def test_races_are_caught_in_every_order(name, order):
    status, said = run(name, "races", order)
    assert status != 0 and "data race: block" in said, said


def test_an_order_alone_does_not_find_every_race():
    """Why there is a detector: a missing __syncwarp whose lanes happen to run in the right order."""
    assert {run("no_syncwarp", order=order)[0] for order in ORDERS} == {0}


def test_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(emulator.CannotBuild, match="no CUDA headers in .*: set CUDA_HOME"):
        emulator.cuda_home()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(emulator.CannotBuild, match="no-such-compiler is not on PATH"):
        emulator.compiler()
