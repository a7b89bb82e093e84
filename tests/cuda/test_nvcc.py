"""nvcc compiles every CUDA kernel for every target without a warning, and nothing is spilled. No GPU is needed."""
import pytest

from tools import emulator, nvcc

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


def test_resources_are_those_in_the_readme():
    """After a change: python tests/tools/nvcc.py table."""
    made(nvcc.build)
    if f"nvcc {nvcc.version()}:" not in nvcc.written():
        pytest.skip(f"the table is not of nvcc {nvcc.version()}")
    assert nvcc.table() == nvcc.written()
