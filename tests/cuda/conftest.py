"""The CUDA kernels without a GPU: csrc/cuda compiled by g++ against csrc/emulator, as the backend "cuda" on CPU tensors.

A missing compiler or missing CUDA headers fail these tests, they don't skip them. TERRAZZO_EMULATOR=sanitize or races compiles the
kernels for the sanitizers or the race detector: see `make emulated`.
"""
import os

import pytest
from terrazzo import kernels, native

from tools import emulator as build


def pytest_ignore_collect(collection_path):
    return True if collection_path.name == "test_extension.py" and not native.CUDA_ARCHS else None


@pytest.fixture(scope="session")
def loaded_emulator():
    try:
        return build.load(os.environ.get("TERRAZZO_EMULATOR", "plain"))
    except build.CannotBuild as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture
def emulator(loaded_emulator, monkeypatch):
    """terrazzo.<op>(..., backend="cuda") runs the emulated kernels."""
    monkeypatch.setitem(kernels.NAMESPACES, "cuda", build.NAMESPACE)
    monkeypatch.setattr(native, "cuda_why_not", lambda op, names, *tensors: None if op in build.SERVED else "not emulated")
    loaded_emulator.poison(True)
    loaded_emulator.order("forward")
    return loaded_emulator
