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

from . import gpu, memory, packages
from .suite import SCHEMA


SIMD = ("sse4", "ssse3", "fma", "f16c", "avx", "amx", "asimd", "sve", "bf16", "i8mm")  # how the flags that matter begin


def _cpu():
    """(model name, its vector and matrix instructions)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = dict([part.strip() for part in line.split(":", 1)] for line in lines if ":" in line)
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return fields.get("model name", platform.machine()), [flag for flag in flags if flag.startswith(SIMD)]


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


def _build():
    """How this build of terrazzo was made: where the binary lies is nobody's business, what it holds is."""
    return {"native": native.available, "isa": native.isa(), "why_not": native.why_not, "cuda": native.cuda_facts(), "torch_debug": torch.version.debug,
            "torch_cuda": torch.version.cuda, "torch_hip": torch.version.hip, "blas_threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip


def environment(calibration, command, seed, device="cpu"):
    model, flags = _cpu()
    compiler = _output(os.environ.get("CXX", "g++"), "--version")
    nvcc = _output(os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc"), "--version") or _output("nvcc", "--version")
    status = _output("git", "status", "--porcelain")
    return {
        "schema": SCHEMA, "kind": "environment",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": model, "cpu_flags": flags, "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(), "load_average": list(os.getloadavg()),
        "device": device, "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "gpu_facts": gpu.facts(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if torch.cuda.is_available() else None,
        "malloc_tuned": memory.is_tuned(),
        "terrazzo": terrazzo.__version__, "isa": native.isa(), "native": native.available,
        "torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(),
        "triton": _package_version("triton"), "transformers": _package_version("transformers"),
        "compiler": compiler.splitlines()[0] if compiler else None, "nvcc": nvcc.splitlines()[-1] if nvcc else None, "build": _build(),
        "packages": {name: _package_version(name) for name in packages.DISTRIBUTIONS.values()},
        "git_sha": _output("git", "rev-parse", "HEAD"), "git_dirty": bool(status) if status is not None else None,
        "calibration": calibration.as_dict(), "command": command, "seed": seed,
    }  # fmt: skip
