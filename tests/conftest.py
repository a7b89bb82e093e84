"""Shared fixtures: uninitialised memory is NaN in every test, so an output that was never written shows."""
import gc
import sys

import pytest
import torch
from terrazzo import adapters, native


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    native.poison_new_tensors(True)
    yield
    native.poison_new_tensors(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def linear_layers_as_on_any_cpu(monkeypatch):
    """Which linear layers are ours depends on the CPU; tests say what they mean by setting these."""
    for name, value in (("TORCH_IS_SLOW", False), ("MKL_IS_HOME", False), ("FUSING_PAYS", {}), ("OWN_BF16", False), ("STORED_TILES", False)):
        monkeypatch.setattr(adapters, name, value)


@pytest.fixture(autouse=True, scope="module")
def objects_of_other_tests_rest():
    """Benchmarks collect garbage before every row: not among what thousands of tests before have left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def calibrations(tmp_path_factory):
    return tmp_path_factory.mktemp("calibration") / "calibration.json"


@pytest.fixture(autouse=True)
def benchmarks_keep_to_themselves(monkeypatch, calibrations):
    """Their peaks are kept in a folder of the tests, not in the user's cache, and the tests' allocator is left as it is."""
    roofline = sys.modules.get("terrazzo.bench.roofline")
    if roofline is not None:
        monkeypatch.setattr(roofline, "_kept_in", lambda: calibrations)
        monkeypatch.setattr(sys.modules["terrazzo.bench.memory"], "keep_freed", lambda: None)


def pytest_report_header(config):
    return f"terrazzo: cpu kernels {native.isa() if native.available else 'not built: ' + native.why_not}"


def pytest_configure(config):
    config.addinivalue_line("markers", "unpoisoned: leave uninitialised memory as it is")
    if not native.available:
        pytest.exit(f"the tests need the compiled extension: {native.why_not}", returncode=3)
