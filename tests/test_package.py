"""What is installed, how light the import is, and that ISA builds share no code."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import terrazzo
import torch
from terrazzo import native

ROOT = Path(__file__).resolve().parent.parent


def python(code, **env):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, cwd="/")
    return run.returncode, run.stdout.strip(), run.stderr


def test_import_is_light():
    code = ("import sys, time, torch; t = time.perf_counter(); import terrazzo; t = time.perf_counter() - t; import json;"
            "print(json.dumps([t, sorted({'triton', 'transformers', 'matplotlib', 'rich'} & set(sys.modules)), torch.cuda.is_initialized()]))")
    status, out, err = python(code)
    assert status == 0, err
    _, heavy, cuda = json.loads(out)
    # torch itself may bring triton in; terrazzo must add nothing heavy of its own
    base = json.loads(python("import sys, json, torch; print(json.dumps(sorted({'triton', 'transformers', 'matplotlib', 'rich'} & set(sys.modules))))")[1])
    assert heavy == base and not cuda


def test_only_terrazzo_is_importable():
    for name in ("pyops", "csrc", "triton_kernels", "models", "bench"):
        status, _, err = python(f"import {name}")
        assert status and "ModuleNotFoundError" in err, name
    assert python("import terrazzo.bench, terrazzo.models, terrazzo.triton_kernels, terrazzo.reference")[0] == 0


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx", "sse9"])
def test_isa_can_be_forced(isa):
    status, out, err = python("from terrazzo import native; print(native.isa())", TERRAZZO_CPU_ISA=isa)
    if status == 0:
        assert out == isa
    else:
        assert "TERRAZZO_CPU_ISA" in err and isa in err
        assert isa in ("avx512", "avx512_bf16", "amx", "sse9") or native.isa() == "portable"


def test_tiles_leave_those_of_torch_alone():
    """Products by AMX between two of oneDNN's, which keeps its tile configuration from call to call."""
    if native.isa() != "amx":
        pytest.skip("no AMX, or another instruction set is asked for")
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(100, 96, generator=g).bfloat16(), torch.randn(80, 96, generator=g).bfloat16()
    before = torch.nn.functional.linear(x, weight)
    found = terrazzo.linear(x, weight, backend="cpu")
    assert torch.equal(torch.nn.functional.linear(x, weight), before)
    torch.testing.assert_close(found, before, rtol=1e-2, atol=1e-2)


def test_isa_builds_share_no_symbols():
    """A weak symbol compiled for AVX-512 could be linked into everybody's path: kernel objects may only export their own ISA's names."""
    objects = [o for isa in ("portable", "avx2", "avx512", "avx512_bf16") for o in (ROOT / "build").glob(f"temp*/*.{isa}.o")]
    assert len(objects) >= 15, "build the extension in place first: make build"
    assert shutil.which("nm")
    for path in objects:
        isa = path.name.split(".")[1]
        lines = subprocess.run(["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
        shared = [line for line in lines if line.split()[1] in "WwVvTuDBR" and isa not in line]
        assert not shared, f"{path.name}: {shared[:3]}"


def test_one_binary_for_many_pythons():
    binary = Path(native._C.__file__)
    assert binary.name == "_C.abi3.so"
    undefined = subprocess.run(["nm", "-D", "--undefined-only", str(binary)], capture_output=True, text=True, check=True).stdout
    assert not [line for line in undefined.splitlines() if "c10" in line or "_ZN2at" in line or "_ZN5torch" in line], "outside torch's stable ABI"


def test_public_functions_are_documented():
    for name in terrazzo.__all__:
        assert getattr(terrazzo, name).__doc__, name


@pytest.mark.slow
@pytest.mark.unpoisoned
def test_offsets_beyond_two_to_the_31():
    """Element offsets over 2**31: rows far apart in one large, mostly untouched buffer."""
    x = torch.empty_strided((2, 16, 8), (2**31 + 64, 1, 16), dtype=torch.bfloat16)
    values = torch.randn(2, 16, 8).bfloat16()
    x.copy_(values)
    weight = torch.randn(16, 4)
    found = terrazzo.causal_conv1d_fn(x, weight, activation="silu", backend="cpu")
    assert torch.equal(found, terrazzo.causal_conv1d_fn(values.transpose(1, 2).contiguous().transpose(1, 2), weight, activation="silu", backend="cpu"))
    xs = torch.empty_strided((2, 8, 2, 8), (2**31 + 128, 16, 8, 1), dtype=torch.bfloat16)
    xs.copy_(torch.randn(2, 8, 2, 8))
    args = (torch.rand(2, 8, 2), -torch.rand(2), torch.randn(2, 8, 1, 4).bfloat16(), torch.randn(2, 8, 1, 4).bfloat16(), 8)
    assert torch.equal(terrazzo.mamba_chunk_scan_combined(xs, *args, backend="cpu"), terrazzo.mamba_chunk_scan_combined(xs.contiguous(), *args, backend="cpu"))
