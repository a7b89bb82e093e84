"""The reader of Triton's IR that finds addresses made of 32-bit products, on kernels with and without them."""
import pytest
import torch
import triton
import triton.language as tl

from tools.triton_compile import compiling
from tools.ttir import narrow_offsets

STRIDE = 48  # any number but 1, which Triton takes for a constant


@triton.jit
def row_times_stride(x_ptr, n, stride):
    tl.store(x_ptr + tl.program_id(0) * stride + tl.arange(0, 16), 0.0)


@triton.jit
def widened_too_late(x_ptr, n, stride):
    offs = (tl.program_id(0) * 16 + tl.arange(0, 16)) * stride
    tl.store(x_ptr + offs.to(tl.int64), 0.0, mask=offs < n)


@triton.jit
def through_a_loop(x_ptr, n, stride):
    begin = n * stride
    for start in range(begin, begin + n, 16):
        tl.store(x_ptr + start, 0.0)


@triton.jit
def carried_by_a_loop(x_ptr, n, stride):
    at = tl.program_id(0) * 16
    for _ in range(n):
        tl.store(x_ptr + at, 0.0)
        at = n * stride


@triton.jit
def carried_by_a_while(x_ptr, n, stride):
    at = n * stride
    while at > 0:
        tl.store(x_ptr + at, 0.0)
        at -= n


@triton.jit
def chosen_by_an_if(x_ptr, n, stride):
    if n > 3:
        at = n * stride
    else:
        at = n
    tl.store(x_ptr + at, 0.0)


@triton.jit
def counted_by_a_loop(x_ptr, n, stride):
    for i in range(n):
        tl.store(x_ptr + i * stride, 0.0)


@triton.jit
def widened(x_ptr, n, stride):
    for i in range(n):
        row = tl.program_id(0).to(tl.int64) * n + i
        tl.store(x_ptr + row * stride + tl.arange(0, 16).to(tl.int64) * stride, 0.0)


@triton.jit
def times_a_block(x_ptr, n, stride):
    offs = tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(x_ptr + offs, 0.0, mask=offs < n * stride)


@triton.jit
def times_a_negative_number(x_ptr, n, stride):
    tl.store(x_ptr - 3 * stride, 0.0)


@triton.jit
def inside_a_block(x_ptr, n, stride):
    tl.store(x_ptr + (tl.arange(0, 16)[:, None] + 3) * stride + tl.arange(0, 16)[None, :], 0.0)


@triton.jit
def only_divided_by(x_ptr, n, stride):
    tl.store(x_ptr + tl.program_id(0) // (n * stride), 0.0)


@triton.jit
def only_compared_with(x_ptr, n, stride):
    total = tl.sum(tl.arange(0, 16), 0)
    while total < n * stride:
        total += n
    tl.store(x_ptr + total, 0.0)


NARROW = (row_times_stride, widened_too_late, through_a_loop, carried_by_a_loop, carried_by_a_while, chosen_by_an_if, counted_by_a_loop)
WIDE = (widened, times_a_block, times_a_negative_number, inside_a_block, only_divided_by, only_compared_with)


@pytest.mark.parametrize("kernel, narrow", [(k, True) for k in NARROW] + [(k, False) for k in WIDE], ids=lambda v: getattr(v, "__name__", None))
def test_finds_narrow_offsets(kernel, narrow):
    seen = []
    with compiling("sm80", seen.append):
        kernel[(3,)](torch.zeros(64), 7, STRIDE)
    (launch,) = seen
    found = narrow_offsets(launch.compiled.asm["ttir"])
    assert bool(found) == narrow, found
    assert all("arith.muli" in line for line in found)


def test_named_indices_are_let_through():
    seen = []
    with compiling("sm80", seen.append):
        carried_by_a_loop[(3,)](torch.zeros(64), 7, STRIDE)
    ttir = seen[0].compiled.asm["ttir"]
    assert narrow_offsets(ttir, ("other",)) and not narrow_offsets(ttir, ("at",))
