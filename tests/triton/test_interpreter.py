"""The corrections of Triton's interpreter: each fault is there without them and gone with them."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from terrazzo.triton_kernels import interpreter

N = 16


@triton.jit
def arithmetic(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x * y + x)
    tl.store(out_ptr + N + offs, tl.where(x < y, x, y))
    tl.store(out_ptr + 2 * N + offs, -x)


@triton.jit
def product(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + offs, tl.dot(tl.load(x_ptr + offs), tl.load(y_ptr + offs)))


@triton.jit
def rounding(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(tl.bfloat16))


def found():
    """What kernels make of bfloat16, beside what torch makes of it."""
    torch.manual_seed(0)
    x, y = torch.randn(2, N, dtype=torch.bfloat16)
    out = torch.zeros(3, N, dtype=torch.bfloat16)
    arithmetic[(1,)](x, y, out, N)
    pairs = {"sums and products": (out[0], x * y + x), "comparisons": (out[1], torch.minimum(x, y)), "negation": (out[2], -x)}
    a, b = torch.randn(2, N, N, dtype=torch.bfloat16)
    c = torch.zeros(N, N)
    product[(1,)](a, b, c, N)
    pairs["dot"] = c, a.float() @ b.float()
    wide, narrow = torch.randn(N) * 3, torch.zeros(N, dtype=torch.bfloat16)
    wide[0], wide[1] = float("nan"), 1 + 2**-8  # half way: to even
    rounding[(1,)](wide, narrow, N)
    pairs["rounding"] = narrow, wide.bfloat16()
    return pairs


def agrees(pair):
    got, expected = pair
    return torch.allclose(got.float(), expected.float(), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("what", ["sums and products", "comparisons", "negation", "dot", "rounding"])
def test_corrected(what):
    interpreter.correct()
    assert agrees(found()[what])


def test_wrong_without_the_corrections():
    """In a process of its own. When this fails, Triton has mended a fault: drop its correction."""
    code = "import test_interpreter as t; print(*sorted(k for k, v in t.found().items() if not t.agrees(v)), sep='|')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip().split("|") == ["comparisons", "dot", "negation", "rounding", "sums and products"], done.stdout


def test_refuses_another_triton(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    monkeypatch.setattr(interpreter, "_corrected", False)
    with pytest.raises(RuntimeError, match="version 3.9"):
        interpreter.correct()
