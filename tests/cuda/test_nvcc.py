"""nvcc compiles every CUDA kernel for every target without a warning, and nothing is spilled. No GPU is needed."""
import re

import pytest

from tools import cuda_report, emulator, nvcc
from tools.ptx_cases import shapes_of_launches

archs = pytest.mark.parametrize("arch", nvcc.ARCHS)


def made(function, *args):
    try:
        return function(*args)
    except emulator.CannotBuild as error:
        pytest.fail(str(error), pytrace=False)


@archs
@pytest.mark.parametrize("source", nvcc.SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, arch):
    found = nvcc.kernels(made(nvcc.built, source), arch)
    assert found
    assert [kernel for kernel in found if kernel.stack] == []


@archs
def test_wrappers_become_their_instructions(arch):
    """The kernels of the emulator's tests, whose asm forms run nowhere here: at least they are what they say."""
    path = made(nvcc.compile, nvcc.ROOT / "tests/cuda/kernels.cu", arch)
    assert [kernel for kernel in nvcc.kernels(path, arch) if kernel.stack] == []
    found = nvcc.instructions(path)
    assert all(found[name] for name in nvcc.INSTRUCTIONS), found


def test_every_kernel_has_its_floor():
    """In csrc/cuda/README.md: bytes, flops, tiling, trade. `name_{a,b}` are two."""
    def spelt(name):
        head, brace, rest = name.partition("{")
        inner, _, tail = rest.partition("}")
        return [head + part + tail for part in inner.split(",")] if brace else [name]

    named = {name for quoted in re.findall(r"`([^`]+)`", (nvcc.ROOT / "csrc/cuda/README.md").read_text()) for name in spelt(quoted)}
    folder = nvcc.ROOT / "csrc/cuda"
    defined = {name for path in folder.glob("*.cu*") for name in re.findall(r"(\w+)_kernel\(const", path.read_text())}
    assert len(defined) > 50 and defined <= named


def test_resources_are_those_in_the_docs(emulator):
    """After a change: make resources."""
    made(nvcc.build)
    if f"nvcc {nvcc.version()}:" not in cuda_report.written("resources"):
        pytest.skip(f"the table is not of nvcc {nvcc.version()}")
    assert cuda_report.resources(shapes_of_launches(emulator)) == cuda_report.written("resources")


@pytest.mark.parametrize(
    "arch, registers, shared, threads, warps",
    [("sm_80", 32, 0, 256, 64), ("sm_80", 128, 0, 256, 16), ("sm_80", 129, 0, 128, 12), ("sm_80", 168, 0, 128, 12), ("sm_80", 32, 55296, 128, 8),
     ("sm_90a", 32, 55296, 128, 16), ("sm_90a", 16, 0, 32, 32), ("sm_100a", 255, 0, 512, 0), ("sm_90a", 40, 99 * 1024, 1024, 32)],
)  # fmt: skip
def test_occupancy(arch, registers, shared, threads, warps):
    """As NVIDIA's occupancy calculator has it."""
    assert cuda_report.resident_warps(arch, registers, shared, threads) == warps
