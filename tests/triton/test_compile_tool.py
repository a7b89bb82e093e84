"""The compiler for absent GPUs: every target, resources read back, nothing left behind."""
import pytest
import terrazzo
import torch
import triton

from tools.triton_compile import TARGETS, compiling, resources


@pytest.mark.parametrize("arch", TARGETS)
def test_compiles_a_launch(arch):
    seen = []
    x, weight = torch.empty(64, 512, dtype=torch.bfloat16), torch.empty(512, dtype=torch.bfloat16)
    with compiling(arch, seen.append):
        terrazzo.rmsnorm_gated(x, weight, x, backend="triton")
    (launch,) = seen
    assert launch.kernel == "rmsnorm_gated_fwd_kernel" and launch.arguments["D"] == 512 and launch.grid == (64, 1)
    found = resources(launch, arch)
    assert found["registers"] > 8 and found["spills"] == 0


def test_leaves_nothing_behind():
    with compiling("sm80", lambda launch: None):
        pass
    with pytest.raises(terrazzo.BackendError, match="Triton needs a GPU"):
        terrazzo.rmsnorm_gated(torch.ones(2, 4), torch.ones(4), backend="triton")
    assert triton.runtime.driver._active is None
