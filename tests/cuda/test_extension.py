"""The extension with CUDA kernels in it, on a machine without a GPU or a driver. Run by `make cuda`: build/cuda/lib is on PYTHONPATH there."""
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import terrazzo
import torch
from terrazzo import cli, dispatch, native

from tools import nvcc


def redispatch_to_cuda(op, *args):
    """The implementation for CUDA tensors, called with others."""
    return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)


def norm_args():
    return torch.randn(2, 8), torch.randn(8), None, 1e-6, 8, True


def test_is_the_one_just_built():
    assert Path(native._C.__file__) == nvcc.LIBRARY / "terrazzo/_C.abi3.so"


def test_built_for_every_arch():
    assert native.CUDA_ARCHS == (*nvcc.ARCHS, "compute_100")
    said = subprocess.run([nvcc.tool("cuobjdump"), "-lelf", "-lptx", native._C.__file__], capture_output=True, text=True, check=True).stdout
    for arch in nvcc.ARCHS:
        assert said.count(f".{arch}.cubin") == len(nvcc.SOURCES)
    assert said.count(".sm_100.ptx") == len(nvcc.SOURCES)


def test_size():
    assert Path(native._C.__file__).stat().st_size < 40e6


def test_needs_nothing_of_a_cuda_torch():
    """CUDA's runtime is inside, a CUDA torch's one function is weak: the file that is imported here is the one that runs there."""
    dynamic = subprocess.run(["readelf", "-d", "--wide", native._C.__file__], capture_output=True, text=True, check=True).stdout
    needed = [line.partition("[")[2].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line]
    assert "libtorch.so" in needed and not [name for name in needed if "cuda" in name or "nvidia" in name]
    undefined = subprocess.run(["nm", "-D", "--undefined-only", native._C.__file__], capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1]: line.split()[-2] for line in undefined.splitlines()}
    assert symbols["aoti_torch_get_current_cuda_stream"] == "w"
    assert not [name for name in symbols if name.startswith(("cuda", "cu", "__cuda"))]


def test_ops_are_registered_for_cuda_tensors():
    assert native.CUDA_OPS.issuperset(dispatch.OPS["rmsnorm_gated"].ops)
    for name in native.CUDA_OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"terrazzo::{name}", "CUDA")


def test_cpu_tensors_run_on_the_cpu():
    x, weight, *_ = norm_args()
    terrazzo.reset_counters()
    assert terrazzo.pick("rmsnorm_gated", x, weight) == ("cpu", "preferred on cpu")
    terrazzo.rmsnorm_gated(x, weight)
    assert terrazzo.counters() == {"rmsnorm_gated": {"cpu": 1}}


def test_launches_are_counted_by_kernel(monkeypatch):
    monkeypatch.setattr(native, "cuda_kernel_counts", lambda: dict.fromkeys(native._C.cuda_kernel_counts(), 0) | {"rmsnorm_gated_bwd": 3, "state_update": 1})
    terrazzo.reset_counters()
    assert terrazzo.counters() == {"rmsnorm_gated_bwd": {"cuda": 3}, "selective_state_update": {"cuda": 1}}


def test_all_tensors_must_be_on_one_gpu():
    with pytest.raises(RuntimeError, match="must be on the same CUDA device, got cpu"):
        redispatch_to_cuda(torch.ops.terrazzo.rmsnorm_gated_fwd.default, *norm_args())


# ---- whether it can run, and why not -------------------------------------------------------------------------


def test_reasons(monkeypatch):
    x, weight, *_ = norm_args()
    with pytest.raises(terrazzo.BackendError, match="cannot run: the tensors are on cpu; the CUDA kernels need a GPU"):
        terrazzo.rmsnorm_gated(x, weight, backend="cuda")
    monkeypatch.setattr(native, "CUDA_OPS", native.CUDA_OPS - {"rmsnorm_gated_bwd"})
    assert terrazzo.can_run("rmsnorm_gated", "cuda", x, weight) == "rmsnorm_gated has no CUDA kernels yet"
    monkeypatch.setattr(native, "CUDA_ARCHS", ())
    assert "this build of terrazzo has no CUDA kernels" in terrazzo.can_run("rmsnorm_gated", "cuda", x, weight)


def test_dtype():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 8, dtype=torch.float64, device="cuda")
        assert terrazzo.can_run("rmsnorm_gated", "cuda", x) == "dtype float64 is not supported by the GPU kernels; the reference takes it"
        assert terrazzo.can_run("rmsnorm_gated", "cuda", x.float()) is None


@pytest.mark.parametrize(
    "capability, runs",
    [((7, 5), False), ((8, 0), True), ((8, 6), True), ((8, 9), True), ((9, 0), True), ((10, 0), True), ((10, 3), True), ((12, 0), True)],
)
def test_capabilities(capability, runs):
    assert native.runs_on(native.CUDA_ARCHS, *capability) == runs


@pytest.mark.parametrize(
    "arch, capability, runs",
    [
        ("sm_86", (8, 0), False), ("sm_86", (8, 9), True), ("sm_86", (9, 0), False), ("sm_90a", (9, 0), True), ("sm_100a", (10, 3), False),
        ("sm_100f", (10, 3), True), ("sm_100f", (12, 0), False), ("compute_80", (12, 0), True), ("compute_90a", (10, 0), False), ("compute_90", (8, 9), False),
    ],
)  # fmt: skip
def test_rule_of_capabilities(arch, capability, runs):
    assert native.runs_on((arch,), *capability) == runs


def gpu(monkeypatch, capability, driver=13000):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(native, "_cuda", native._cuda | {"driver": driver})
    return native._device_why_not(0)


def test_missing_capability_names_both_lists(monkeypatch):
    assert gpu(monkeypatch, (8, 6)) is None
    why = gpu(monkeypatch, (7, 5))
    assert why == "this build of terrazzo has CUDA kernels for sm_80 sm_90a sm_100a compute_100, this GPU is sm_75; they need sm_80 or newer"
    assert native._C.missing_capability(10, 3).endswith("this GPU is sm_103; build it from source with TERRAZZO_CUDA_ARCHS=103")


def test_driver(monkeypatch):
    toolkit = native.cuda_facts()["toolkit"]
    assert gpu(monkeypatch, (9, 0), driver=12080) == f"terrazzo was built with CUDA {toolkit}, this driver runs CUDA 12.8; update it, or build with an older toolkit"
    assert native.driver_why_not(13020, 13000) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in gpu(monkeypatch, (9, 0))


def test_compiled_calls_ask_once(monkeypatch):
    """What the device can run is a constant of a graph: asking it does not break the graph."""
    monkeypatch.setattr(native, "_device_reasons", {})
    monkeypatch.setattr(native, "_device_why_not", lambda index: native._C.missing_capability(7, 5) and None)
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        x, weight = torch.empty(2, 8, device="cuda"), torch.empty(8, device="cuda")
        torch.compile(terrazzo.rmsnorm_gated, fullgraph=True, backend=lambda graph, inputs: graph.forward)(x, weight)
    assert native._device_reasons == {0: None}


# ---- what is said of it --------------------------------------------------------------------------------------


def test_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["cuda kernels"]
    assert facts["built for"] == list(native.CUDA_ARCHS) and "rmsnorm_gated_fwd" in facts["ops"]
    assert cli._cuda_words(facts | {"driver": "13.1"}).endswith("this machine's driver runs CUDA 13.1)")
    assert cli.main(["info"]) == 0
    assert "sm_80, sm_90a, sm_100a, PTX of compute_100" in capsys.readouterr().out


def test_info_names_the_gpus(monkeypatch, capsys):
    gpu(monkeypatch, (9, 0))
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["cuda kernels"]
    assert facts["gpus"][0] == {"name": "GPU 0", "capability": "sm_90", "why not": None}
    said = cli._cuda_words(facts)
    assert "; GPU 0, sm_90: can run them; GPU 1, sm_75: this build of terrazzo has CUDA kernels for sm_80" in said


def test_why(capsys):
    cli._why(SimpleNamespace(op="rmsnorm_gated", shape="4,64", set=[], dtype="bf16", device="cuda", backend=None))
    said = capsys.readouterr().out
    assert "preferred on cuda" in said
