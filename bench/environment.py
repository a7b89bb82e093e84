"""Where and how a result was measured: written as the first line of every result file."""
import datetime
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import terrazzo
from terrazzo import native

from . import memory
from .suite import SCHEMA


def _cpu():
    """(model name, instruction sets that matter here)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = dict([part.strip() for part in line.split(":", 1)] for line in lines if ":" in line)
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16")
    return fields.get("model name", platform.machine()), [flag for flag in wanted if flag in fields.get("flags", "").split()]


def _output(*command):
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else None


def _package_version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment(calibration, command, seed):
    model, flags = _cpu()
    compiler = _output(os.environ.get("CXX", "g++"), "--version")
    status = _output("git", "status", "--porcelain")
    return {
        "schema": SCHEMA, "kind": "environment",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": model, "cpu_flags": flags, "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(), "load_average": list(os.getloadavg()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "malloc_tuned": memory.is_tuned(),
        "terrazzo": terrazzo.__version__, "isa": native.isa(), "native": native.available,
        "torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(),
        "triton": _package_version("triton"), "transformers": _package_version("transformers"),
        "compiler": compiler.splitlines()[0] if compiler else None,
        "git_sha": _output("git", "rev-parse", "HEAD"), "git_dirty": bool(status) if status is not None else None,
        "calibration": calibration.as_dict(), "command": command, "seed": seed,
    }  # fmt: skip
