"""The PTX interpreter itself: planted faults are found, single instructions do what they should, nvcc's kernels run."""
import shutil
import struct
import subprocess

import numpy as np
import pytest
import torch

from tools.ptx_interpreter import PTXError, launch

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n"
REGISTERS = ".reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .f32 %f<8>; .reg .b64 %d<32>;"


def run(body, *tensors, threads=32, grid=1, shared=1024):
    """A kernel whose parameters are tensors, in %d0, %d1, …; %r0 is the thread."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(len(tensors)))
    loads = "\n".join(f"ld.param.u64 %d{i}, [p{i}];" for i in range(len(tensors)))
    ptx = HEAD + f".visible .entry k({parameters})\n{{\n{REGISTERS}\n{loads}\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    return launch(ptx, "k", (grid,), (threads,), tensors, dynamic_shared=shared)


def bits(array):
    return torch.from_numpy(np.ascontiguousarray(array).view(np.int32))


def evaluate(instruction, *inputs):
    """What an instruction makes of %r10, %r11, … in %r20 (or %d20 for "d20"): inputs and result are arrays of 32 words."""
    loads = "".join(f"add.s64 %d{10 + i}, %d{i}, %d9; ld.global.b32 %r{10 + i}, [%d{10 + i}];" for i in range(len(inputs)))
    out = torch.zeros(32, dtype=torch.int32)
    run(f"mul.wide.u32 %d9, %r0, 4; {loads} {instruction} add.s64 %d30, %d{len(inputs)}, %d9; st.global.b32 [%d30], %r20;",
        *(bits(np.asarray(i)) for i in inputs), out)
    return out.numpy().view(np.uint32)


LANE = np.arange(32, dtype=np.uint32)
WORDS = np.random.default_rng(0).integers(0, 2**32, (3, 32), dtype=np.uint32)
CORNERS = [0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8, 65519.0]
FLOATS = np.concatenate([np.random.default_rng(1).normal(0, 3, 24), CORNERS]).astype(np.float32)

# ---- planted faults

EACH = "shl.b32 %r1, %r0, 2; mov.u32 %r2, smem; add.s32 %r3, %r2, %r1; cvt.u64.u32 %d9, %r1;"
TURNED = "xor.b32 %r4, %r1, 128; add.s32 %r5, %r2, %r4;"  # the same place of the next warp
COPY = ("shl.b32 %r1, %r0, 4; mov.u32 %r2, smem; add.s32 %r3, %r2, %r1; cvt.u64.u32 %d9, %r1; add.s64 %d8, %d0, %d9;"
        "cp.async.cg.shared.global [%r3], [%d8], 16; cp.async.commit_group;")
SECOND_COPY = "add.s32 %r4, %r3, 512; cp.async.cg.shared.global [%r4], [%d8], 16; cp.async.commit_group;"
FAULTS = {
    "missing barrier": (EACH + TURNED + "st.shared.b32 [%r3], %r0; ld.shared.b32 %r6, [%r5];", "race in shared memory"),
    "missing barrier before overwriting": (
        EACH + TURNED + "st.shared.b32 [%r3], %r0; bar.sync 0; ld.shared.b32 %r6, [%r5]; st.shared.b32 [%r3], %r6;",
        "race in shared memory.*read"),
    "two writers": ("st.shared.b32 [smem], %r0;", "race in shared memory"),
    "load out of bounds": (
        EACH + "add.s64 %d8, %d0, %d9; ld.global.b32 %r6, [%d8+4];",
        "thread 31: global memory out of bounds: 4 bytes at 128 of a tensor"),
    "store out of bounds": (
        EACH + "add.s64 %d8, %d0, %d9; st.global.b32 [%d8+-4], %r0;",
        "thread 0: global memory out of bounds: 4 bytes at 4 before"),
    "shared out of bounds": (EACH + "st.shared.b32 [%r3+1000], %r0;", "thread 6: shared memory out of bounds"),
    "misaligned": (
        EACH + "add.s64 %d8, %d0, %d9; setp.lt.u32 %p0, %r0, 4; @%p0 ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d8];",
        "thread 1: misaligned 16-byte access"),
    "uninitialised shared memory": (
        EACH + "setp.ne.u32 %p0, %r0, 9; @%p0 st.shared.b32 [%r3], %r0; bar.sync 0; ld.shared.b32 %r6, [%r3];",
        "thread 9: read of uninitialised"),
    "cp.async waited for too weakly": (
        COPY + SECOND_COPY + "cp.async.wait_group 1; ld.shared.b32 %r6, [%r3]; ld.shared.b32 %r6, [%r4];",
        r"cp.async not yet waited for.*%r6, \[%r4\]"),
    "cp.async without a barrier": (COPY + "cp.async.wait_all; xor.b32 %r5, %r3, 512; ld.shared.b32 %r6, [%r5];", "race in shared memory"),
    "divergent barrier in a warp": ("setp.lt.u32 %p0, %r0, 7; @%p0 bra SKIP; bar.sync 0; SKIP:", "divergent barrier.*bar.sync"),
    "barrier that a warp never reaches": ("setp.lt.u32 %p0, %r0, 32; @%p0 bra SKIP; bar.sync 0; SKIP:", "divergent barrier.*bar.sync"),
    "shuffle without its lanes": (
        "setp.lt.u32 %p0, %r0, 7; @%p0 bra SKIP; shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1; SKIP:",
        "lanes of the warp that never come: shfl"),
    "unknown instruction": ("tcgen05.alloc.b32 [%r1], 32;", "unknown instruction: tcgen05.alloc.b32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(fault):
    body, message = FAULTS[fault]
    warps = 1 if "bounds" in fault or "weakly" in fault else 2
    with pytest.raises(PTXError, match=message):
        run(body, torch.zeros(256 if "cp.async" in fault else 32 * warps), threads=32 * warps)


def test_no_fault_with_barriers_and_waits():
    x, y = torch.arange(256, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    run(COPY + EACH + TURNED + "cp.async.wait_group 0; bar.sync 0; ld.shared.b32 %r6, [%r5]; bar.sync 0; st.shared.b32 [%r3], %r6;"
        "add.s64 %d8, %d1, %d9; st.global.b32 [%d8], %r6;", x, y, threads=64)
    assert torch.equal(y, x[:64].view(2, 32).flip(0).reshape(-1))


def test_uninitialised_shared_memory_that_is_not_chosen():
    """nvcc loads before it asks: what was loaded in vain may be anything."""
    x, out = torch.zeros(32), torch.ones(32, dtype=torch.int32)
    body = (EACH + "setp.lt.u32 %p0, %r0, 40; {pragma} ld.shared.v2.u32 {{%r5, %r6}}, [smem]; selp.u32 %r7, 3, %r5, %p0; {last} add.s64 %d8, %d1, %d9; st.global.b32 [%d8], %r7;")
    run(body.format(pragma="", last=""), x, out)
    assert out.tolist() == [3] * 32
    with pytest.raises(PTXError, match="read of uninitialised"):
        run(body.format(pragma="", last="add.u32 %r7, %r7, %r6;"), x, out)
    run(body.format(pragma='.pragma "used_bytes_mask 15";', last="mov.b32 %r6, 1; add.u32 %r7, %r7, %r6;"), x, out)
    assert out.tolist() == [4] * 32


def test_race_between_blocks():
    body = EACH + "add.s64 %d8, %d0, %d9; mov.u32 %r7, %ctaid.x; st.global.b32 [%d8], %r7;"
    run(body, torch.zeros(32), grid=1)
    with pytest.raises(PTXError, match="race in global memory"):
        run(body, torch.zeros(32), grid=2)


# ---- single instructions

SHFL = {  # mode: distance, clamp, the lane that each one reads
    "bfly": (5, 31, LANE ^ 5), "up": (3, 0, np.where(LANE >= 3, LANE - 3, LANE)), "down": (3, 31, np.where(LANE < 29, LANE + 3, LANE)),
    "idx": (9, 31, np.full(32, 9)),
}


@pytest.mark.parametrize("mode", SHFL)
def test_shfl(mode):
    distance, clamp, expected = SHFL[mode]
    np.testing.assert_array_equal(evaluate(f"shfl.sync.{mode}.b32 %r20, %r10, {distance}, {clamp}, -1;", LANE * 7), expected * 7)


def test_shfl_in_segments_of_eight():
    found = evaluate(f"shfl.sync.down.b32 %r20|%p0, %r10, 3, {(32 - 8) << 8 | 31}, -1; @!%p0 mov.b32 %r20, 99;", LANE)
    np.testing.assert_array_equal(found, np.where(LANE % 8 < 5, LANE + 3, 99))


CONVERSIONS = {
    "bf16 pair": ("mov.b32 %f0, %r10; mov.b32 %f1, %r11; cvt.rn.bf16x2.f32 %r20, %f0, %f1;", torch.bfloat16),
    "f16 pair": ("mov.b32 %f0, %r10; mov.b32 %f1, %r11; cvt.rn.f16x2.f32 %r20, %f0, %f1;", torch.float16),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_cvt_to_16_bits(name):
    code, dtype = CONVERSIONS[name]
    found = torch.from_numpy(evaluate(code, FLOATS, FLOATS[::-1].copy()).view(np.int16).copy()).view(dtype).view(32, 2)
    high, low = torch.from_numpy(FLOATS).to(dtype), torch.from_numpy(FLOATS[::-1].copy()).to(dtype)
    assert torch.allclose(found, torch.stack([low, high], 1), rtol=0, atol=0, equal_nan=True)


INTEGERS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@pytest.mark.parametrize("mode", INTEGERS)
def test_cvt_to_integers(mode):
    found = evaluate(f"mov.b32 %f0, %r10; cvt.{mode}.s32.f32 %r20, %f0;", FLOATS).view(np.int32)
    wide = np.clip(np.nan_to_num(INTEGERS[mode](FLOATS.astype(np.float64)), nan=0), -2**31, 2**31 - 1)
    np.testing.assert_array_equal(found, wide.astype(np.int64))


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode):
    x, y = np.abs(FLOATS[:24]), FLOATS[:24][::-1] * np.float32(1e-3)
    x, y = np.resize(x, 32), np.resize(y, 32)
    found = evaluate(f"mov.b32 %f0, %r10; mov.b32 %f1, %r11; add.{mode}.f32 %f2, %f0, %f1; mov.b32 %r20, %f2;", x, y).view(np.float32)
    exact, near = x.astype(np.float64) + y, (x + y)
    down = np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)
    up = np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
    np.testing.assert_array_equal(found, {"rm": down, "rp": up, "rz": np.where(exact > 0, down, up)}[mode])


def test_prmt():
    a, b, selector = WORDS
    chosen = np.stack([a, b]).T.copy().view(np.uint8).reshape(32, 8)
    found = evaluate("prmt.b32 %r20, %r10, %r11, %r12;", a, b, selector).view(np.uint8).reshape(32, 4)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = chosen[LANE, nibble & 7]
        np.testing.assert_array_equal(found[:, i], np.where(nibble & 8, np.where(byte & 128, 255, 0), byte))


def test_lop3():
    a, b, c = WORDS
    for table, expected in ((0x80, a & b & c), (0x96, a ^ b ^ c), (0xCA, (a & b) | (~a & c)), (0xFE, a | b | c)):
        np.testing.assert_array_equal(evaluate(f"lop3.b32 %r20, %r10, %r11, %r12, {table};", a, b, c), expected)


SMALL = {
    "bfe.u32 %r20, %r10, 5, 9;": lambda a, b: a >> 5 & 511,
    "bfe.s32 %r20, %r10, 5, 9;": lambda a, b: (a.view(np.int32) << 18 >> 23).view(np.uint32),
    "bfi.b32 %r20, %r10, %r11, 4, 8;": lambda a, b: (b & ~np.uint32(0xFF0)) | (a & 0xFF) << 4,
    "shf.l.wrap.b32 %r20, %r10, %r11, 7;": lambda a, b: b << 7 | a >> 25,
    "shf.r.wrap.b32 %r20, %r10, %r11, 7;": lambda a, b: b << 25 | a >> 7,
    "mul.hi.u32 %r20, %r10, %r11;": lambda a, b: (a.astype(np.uint64) * b >> 32).astype(np.uint32),
    "mul.hi.s32 %r20, %r10, %r11;": lambda a, b: (a.view(np.int32).astype(np.int64) * b.view(np.int32) >> 32).astype(np.int32).view(np.uint32),
    "popc.b32 %r20, %r10;": lambda a, b: np.bitwise_count(a).astype(np.uint32),
    "clz.b32 %r20, %r10;": lambda a, b: 31 - np.floor(np.log2(a.astype(np.float64))).astype(np.uint32),
    "shr.s32 %r20, %r10, 40;": lambda a, b: (a.view(np.int32) >> 31).view(np.uint32),
    "shl.b32 %r20, %r10, 40;": lambda a, b: a * 0,
    "div.s32 %r20, %r10, -7;": lambda a, b: np.trunc(a.view(np.int32) / -7.0).astype(np.int32).view(np.uint32),
    "rem.s32 %r20, %r10, 7;": lambda a, b: np.fmod(a.view(np.int32), 7).view(np.uint32),
    "setp.lt.s32 %p0, %r10, %r11; vote.sync.ballot.b32 %r20, %p0, -1;": lambda a, b: np.full(
        32, sum(1 << i for i in np.flatnonzero(a.view(np.int32) < b.view(np.int32))), np.uint32),
    "and.b32 %r12, %r10, 3; match.any.sync.b32 %r20, %r12, -1;": lambda a, b: np.array(
        [sum(1 << i for i in np.flatnonzero((a & 3) == one)) for one in a & 3], np.uint32),
    "redux.sync.max.u32 %r20, %r10, -1;": lambda a, b: np.full(32, a.max()),
}


@pytest.mark.parametrize("code", SMALL)
def test_integer_instruction(code):
    np.testing.assert_array_equal(evaluate(code, *WORDS[:2]), SMALL[code](*WORDS[:2]))


def test_ldmatrix():
    """Lane l of matrix i gets row l / 4, elements 2 (l % 4) and the next; transposed, of the transposed matrix."""
    x = torch.arange(256, dtype=torch.int16)
    matrices = x.view(4, 8, 8)
    for trans, expected in (("", matrices), (".trans", matrices.transpose(1, 2))):
        out = torch.zeros(32, 4, dtype=torch.int32)
        run("shl.b32 %r1, %r0, 4; mov.u32 %r2, smem; add.s32 %r3, %r2, %r1; cvt.u64.u32 %d9, %r1; add.s64 %d8, %d0, %d9;"
            "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d8]; st.shared.v4.b32 [%r3], {%r4, %r5, %r6, %r7}; bar.sync 0;"
            f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r8, %r9, %r10, %r11}}, [%r3];"
            "add.s64 %d8, %d1, %d9; st.global.v4.b32 [%d8], {%r8, %r9, %r10, %r11};", x, out)
        assert torch.equal(out.view(torch.int16).view(32, 4, 2).transpose(0, 1).reshape(4, 8, 8), expected)


def fragments(matrix, rows_first):
    """The operand registers of mma.m16n8k16 as the PTX manual lays them out: (32 lanes, registers, 2) of a 16-bit matrix."""
    out = torch.empty(32, 4 if rows_first else 2, 2, dtype=matrix.dtype)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(out.shape[1]):
            for j in range(2):
                out[lane, i, j] = matrix[g + 8 * (i % 2), 2 * t + j + 8 * (i // 2)] if rows_first else matrix[2 * t + j + 8 * i, g]
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma(dtype):
    torch.manual_seed(0)
    A, B, out = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.zeros(32, 4)
    name = "bf16" if dtype == torch.bfloat16 else "f16"
    run("mul.wide.u32 %d9, %r0, 16; mul.wide.u32 %d8, %r0, 8; add.s64 %d3, %d0, %d9; add.s64 %d4, %d1, %d8; add.s64 %d5, %d2, %d9;"
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d3]; ld.global.v2.b32 {%r5, %r6}, [%d4]; mov.b32 %f0, 0f3F800000;"
        f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{%f1, %f2, %f3, %f4}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%f0, %f0, %f0, %f0}};"
        "st.global.v4.f32 [%d5], {%f1, %f2, %f3, %f4};", fragments(A, True), fragments(B, False), out)
    expected = A.double() @ B.double() + 1
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            assert abs(out[lane, i] - expected[g + 8 * (i // 2), 2 * t + i % 2]) < 1e-5


# ---- what nvcc makes of csrc/cuda and Triton does not

def floats(code, *inputs):
    """The same of float32: inputs in %f0, %f1, …, the result in %f7."""
    loads = "".join(f"mov.b32 %f{i}, %r{10 + i};" for i in range(len(inputs)))
    return evaluate(f"{loads} {code} mov.b32 %r20, %f7;", *(np.asarray(i, np.float32) for i in inputs)).view(np.float32)


def longs(code, a, b):
    """The same of int64: inputs in %d10 and %d11, the result in %d12."""
    words = np.stack([a, b]).astype(np.int64).view(np.uint32).reshape(2, 32, 2).transpose(0, 2, 1).reshape(4, 32)
    low, high = (evaluate(f"mov.b64 %d10, {{%r10, %r11}}; mov.b64 %d11, {{%r12, %r13}}; {code} mov.b64 {{%r{20 + i}, %r{21 - i}}}, %d12;", *words) for i in (0, 1))
    return (high.astype(np.uint64) << 32 | low).view(np.int64)


FLOAT_CODE = {
    "add.rz.f32 %f7, %f0, 0f4B400000;": lambda x: np.floor(x.astype(np.float64) + 12582912),
    "fma.rm.f32 %f7, %f0, 0f3DAAAAAB, 0f4B400000;": lambda x: np.floor(x.astype(np.float64) / 12 + 12582912),
    "cvt.sat.f32.f32 %f7, %f0;": lambda x: np.clip(x, 0, 1),
    "cvt.rni.f32.f32 %f7, %f0;": np.rint,
    "cvt.rmi.f32.f32 %f7, %f0;": np.floor,
    "ex2.approx.ftz.f32 %f7, %f0;": lambda x: np.exp2(x.astype(np.float64)),
    "copysign.f32 %f7, %f0, 0f40400000;": lambda x: np.copysign(np.float32(3), x),
    "div.approx.f32 %f7, 0f3F800000, %f0;": lambda x: 1 / x,
    "rcp.rn.f32 %f7, %f0;": lambda x: 1 / x,
    "setp.num.f32 %p0, %f0, %f0; selp.f32 %f7, 0f3F800000, 0f00000000, %p0;": lambda x: ~np.isnan(x),
    "setp.nan.f32 %p0, %f0, %f0; selp.f32 %f7, 0f3F800000, 0f00000000, %p0;": np.isnan,
    "cvt.f64.f32 %d10, %f0; fma.rn.f64 %d10, %d10, %d10, 0d3FF0000000000000; cvt.rn.f32.f64 %f7, %d10;": lambda x: x.astype(np.float64) ** 2 + 1,
}


@pytest.mark.parametrize("code", FLOAT_CODE)
def test_float_instruction(code):
    x = FLOATS[:24].repeat(2)[:32] if "f32.f64" in code or "0f4B" in code else FLOATS.copy()
    with np.errstate(all="ignore"):
        expected = FLOAT_CODE[code](x).astype(np.float32)
    found = floats(code, x)
    np.testing.assert_array_equal(found, np.nan_to_num(expected, nan=0) if "sat" in code else expected)


def test_ex2_has_no_numbers_below_normal_ones():
    x = np.array([-125, -126, -126.5, -127, -140, -200, 0, 1] * 4, np.float32)
    np.testing.assert_array_equal(floats("ex2.approx.ftz.f32 %f7, %f0;", x), np.where(x >= -126, np.exp2(x.astype(np.float64)), 0).astype(np.float32))


SHORT = {
    "brev.b32 %r20, %r10;": lambda a, b: np.array([int(f"{x:032b}"[::-1], 2) for x in a], np.uint32),
    "bfind.shiftamt.u32 %r20, %r10;": lambda a, b: np.array([32 - int(x).bit_length() if x else 2**32 - 1 for x in a], np.uint32),
    "cvt.u16.u32 %h0, %r10; cvt.u16.u32 %h1, %r11; mul.lo.s16 %h2, %h0, %h1; cvt.u32.u16 %r20, %h2;": lambda a, b: (a * b) & 0xFFFF,
    "cvt.u16.u32 %h0, %r10; cvt.u16.u32 %h1, %r11; mul.wide.u16 %r20, %h0, %h1;": lambda a, b: (a & 0xFFFF) * (b & 0xFFFF),
    "cvt.u16.u32 %h0, %r10; shr.u16 %h1, %h0, 3; sub.s16 %h2, %h1, %h0; cvt.s32.s16 %r20, %h2;": lambda a, b: (
        ((a & 0xFFFF) >> 3) - (a & 0xFFFF)).astype(np.uint16).view(np.int16).astype(np.int32).view(np.uint32),
    "cvt.u16.u32 %h0, %r10; cvt.u16.u32 %h1, %r11; setp.gt.s16 %p0, %h0, %h1; selp.u16 %h2, 1, 0, %p0; cvt.u32.u16 %r20, %h2;": lambda a, b: (
        a.astype(np.uint16).view(np.int16) > b.astype(np.uint16).view(np.int16)),
    "setp.lt.u32 %p0, %r10, %r11; mov.pred %p1, 0; xor.pred %p2, %p0, %p1; not.pred %p3, %p2; selp.u32 %r20, 5, 7, %p3;": lambda a, b: np.where(a < b, 7, 5),
    "setp.eq.u32 %p0, %r0, 9; vote.sync.any.pred %p1, %p0, -1; selp.u32 %r20, 1, 0, %p1;": lambda a, b: np.ones(32),
    "mov.b32 %f0, %r10; cvt.rna.tf32.f32 %r20, %f0;": lambda a, b: np.where(np.isfinite(a.view(np.float32)), (a + 0x1000) & 0xFFFFE000, a),
}


@pytest.mark.parametrize("code", SHORT)
def test_short_instruction(code):
    words = WORDS[:2].copy()
    words[0, :3] = 0, 1, 0x3F801000  # the last lies half way between two numbers of tf32
    np.testing.assert_array_equal(evaluate(code, *words), SHORT[code](*words).astype(np.uint32))


LONG = {
    "div.s64 %d12, %d10, %d11;": lambda a, b: np.array([abs(int(x)) // abs(int(y)) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, b)]),
    "rem.s64 %d12, %d10, %d11;": lambda a, b: np.fmod(a, b),
    "mul.lo.s64 %d12, %d10, %d11;": lambda a, b: a * b,
    "shr.s64 %d12, %d10, 35;": lambda a, b: a >> 35,
    "neg.s64 %d12, %d10;": lambda a, b: -a,
    "min.s64 %d12, %d10, %d11;": np.minimum,
    "setp.lt.u64 %p0, %d10, %d11; selp.b64 %d12, %d10, %d11, %p0;": lambda a, b: np.where(a.view(np.uint64) < b.view(np.uint64), a, b),
}


@pytest.mark.parametrize("code", LONG)
def test_long_instruction(code):
    a, b = np.random.default_rng(2).integers(-2**62, 2**62, (2, 32))
    b[::2] >>= 50
    np.testing.assert_array_equal(longs(code, a, b), LONG[code](a, b))


def test_atomics_of_one_place():
    """Each thread gets what the ones before it made."""
    out = torch.zeros(32, dtype=torch.int32)
    run("setp.eq.u32 %p0, %r0, 0; @%p0 st.shared.b32 [smem], 100; bar.sync 0; atom.shared.add.u32 %r1, [smem], %r0;"
        "mul.wide.u32 %d9, %r0, 4; add.s64 %d8, %d0, %d9; st.global.b32 [%d8], %r1;", out)
    assert out.tolist() == [100 + lane * (lane - 1) // 2 for lane in range(32)]


def test_generic_addresses_in_two_spaces_at_once():
    """Lanes below 16 read global memory, the others shared."""
    x, out = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    body = ("mov.u64 %d4, smem; cvta.shared.u64 %d4, %d4; mul.wide.u32 %d9, %r0, 4; add.s64 %d5, %d4, %d9; add.s64 %d6, %d0, %d9; add.s32 %r1, %r0, 500;"
            "st.u32 [%d5], %r1; setp.lt.u32 %p0, %r0, 16; selp.b64 %d7, %d6, %d5, %p0; ld.u32 %r2, [%d7+OFFSET]; add.s64 %d8, %d1, %d9; st.u32 [%d8], %r2;")
    run(body.replace("OFFSET", "0"), x, out)
    assert out.tolist() == [*range(16), *range(516, 532)]
    with pytest.raises(PTXError, match="thread 16: shared memory out of bounds"):
        run(body.replace("OFFSET", "960"), torch.zeros(300), out)


def test_local_memory():
    out = torch.zeros(32, dtype=torch.int32)
    run(".local .align 16 .b8 depot[64]; mov.u64 %d4, depot; and.b32 %r1, %r0, 15; mul.wide.u32 %d9, %r1, 4; add.s64 %d5, %d4, %d9; st.local.u32 [%d5], %r0;"
        "cvta.local.u64 %d6, %d5; ld.u32 %r2, [%d6]; mul.wide.u32 %d9, %r0, 4; add.s64 %d8, %d0, %d9; st.global.u32 [%d8], %r2;", out)
    assert out.tolist() == list(range(32))


@pytest.mark.parametrize("nbytes, how", [(16, "cg"), (4, "ca")])
def test_cp_async_fills_up_with_zeros(nbytes, how):
    """Lane l copies min(l, nbytes) bytes."""
    x, out = torch.arange(1, 513, dtype=torch.int16).view(torch.uint8).clone(), torch.full((32 * nbytes,), 9, dtype=torch.uint8)
    moved = {16: "ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r3]; st.global.v4.u32 [%d8], {%r5, %r6, %r7, %r8};", 4: "ld.shared.u32 %r5, [%r3]; st.global.u32 [%d8], %r5;"}
    run(f"mul.wide.u32 %d9, %r0, {nbytes}; cvt.u32.u64 %r1, %d9; mov.u32 %r2, smem; add.s32 %r3, %r2, %r1; add.s64 %d7, %d0, %d9; min.u32 %r4, %r0, {nbytes};"
        f"cp.async.{how}.shared.global [%r3], [%d7], {nbytes}, %r4; cp.async.commit_group; cp.async.wait_group 0; add.s64 %d8, %d1, %d9; {moved[nbytes]}", x, out)
    for lane in range(32):
        taken = min(lane, nbytes)
        assert out[lane * nbytes:][:nbytes].tolist() == x[lane * nbytes:][:taken].tolist() + [0] * (nbytes - taken)


def test_mma_tf32():
    """m16n8k8: lane 4 g + t holds A[g + 8 (i % 2), t + 4 (i // 2)] and B[t + 4 i, g]."""
    torch.manual_seed(0)
    A, B, out = torch.randn(16, 8), torch.randn(8, 8), torch.zeros(32, 4)
    g, t = torch.arange(32) // 4, torch.arange(32) % 4
    a, b = torch.stack([A[g + 8 * (i % 2), t + 4 * (i // 2)] for i in range(4)], 1), torch.stack([B[t + 4 * i, g] for i in range(2)], 1)
    run("mul.wide.u32 %d9, %r0, 16; mul.wide.u32 %d8, %r0, 8; add.s64 %d3, %d0, %d9; add.s64 %d4, %d1, %d8; add.s64 %d5, %d2, %d9;"
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d3]; ld.global.v2.b32 {%r5, %r6}, [%d4]; mov.b32 %f0, 0f3F800000;"
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f0, %f0, %f0, %f0};"
        "st.global.v4.f32 [%d5], {%f1, %f2, %f3, %f4};", a.contiguous(), b.contiguous(), out)
    seen = [(m.view(torch.int32) & -8192).view(torch.float32).double() for m in (A, B)]  # the tensor core drops 13 bits
    expected = seen[0] @ seen[1] + 1
    torch.testing.assert_close(out, torch.stack([expected[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)], 1).float(), rtol=0, atol=1e-5)


# ---- nvcc's kernels

SOURCE = r"""
#include <cuda_bf16.h>
extern "C" __global__ void add(const float* x, const float* y, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = x[i] + y[i];
}
struct Options { char kind; float scale[3]; long where; unsigned char last[2]; };
extern "C" __global__ void options(Options o, short more, long* out) {
    out[0] = o.kind, out[1] = o.scale[0] + 10 * o.scale[2], out[2] = o.where, out[3] = o.last[0] + 1000 * o.last[1], out[4] = more, out[5] = o.scale[threadIdx.x + 1];
}
extern "C" __global__ void sum(const float* x, float* out, int n) {
    __shared__ float warps[32];
    float v = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) v += x[i];
    for (int o = 16; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    v = threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0;
    for (int o = 16; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
    if (threadIdx.x == 0) *out = v;
}
// 16 x 8 = (16 x 64) (64 x 8), one warp: rows of 16 and of 8 elements come by cp.async, two steps of 16 in flight
extern "C" __global__ void tile(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
    __shared__ __align__(16) __nv_bfloat16 a_smem[2][16][16], b_smem[2][16][8];
    int lane = threadIdx.x;
    float acc[4] = {0, 0, 0, 0};
    auto copy = [](void* to, const void* from) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
    };
    auto fetch = [&](int step) {
        copy(&a_smem[step % 2][lane / 2][lane % 2 * 8], a + lane / 2 * 64 + step * 16 + lane % 2 * 8);
        if (lane < 16) copy(&b_smem[step % 2][lane][0], b + (step * 16 + lane) * 8);
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    fetch(0);
    for (int step = 0; step < 4; ++step) {
        if (step < 3) fetch(step + 1); else asm volatile("cp.async.commit_group;" ::: "memory");
        asm volatile("cp.async.wait_group WAIT;" ::: "memory");
        __syncthreads();
        unsigned x[4], y[2];
        unsigned at = __cvta_generic_to_shared(&a_smem[step % 2][lane % 16][lane / 16 * 8]);
        unsigned bt = __cvta_generic_to_shared(&b_smem[step % 2][lane % 16][0]);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
            : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at));
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(y[0]), "=r"(y[1]) : "r"(bt));
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
        __syncthreads();
    }
    for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = acc[i];
}
"""


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory):
    """compile(source) -> PTX."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not on PATH")
    folder = tmp_path_factory.mktemp("ptx")

    def compile(source):
        (folder / "k.cu").write_text(source)
        subprocess.run(["nvcc", "-ptx", "-std=c++17", "-arch=compute_80", "-o", folder / "k.ptx", folder / "k.cu"], check=True)
        return (folder / "k.ptx").read_text()

    return compile


@pytest.fixture(scope="module")
def kernels(nvcc):
    return nvcc(SOURCE.replace("WAIT", "1"))


def test_nvcc_add_with_tail(kernels):
    x, y, out = torch.randn(1000), torch.randn(1000), torch.full((1000,), float("nan"))
    launch(kernels, "add", (8,), (128,), [x, y, out, 1000])
    assert torch.equal(out, x + y)
    with pytest.raises(PTXError, match=r"add, block \(7, 0, 0\), thread 104: global memory out of bounds: 4 bytes at 4000 of a tensor of 4000"):
        launch(kernels, "add", (8,), (128,), [x, y, out, 1001])


def test_nvcc_arguments_by_value(kernels):
    out = torch.zeros(6, dtype=torch.int64)
    launch(kernels, "options", (1,), (1,), [struct.pack("b3x3fq2B6x", -7, 1, 2, 3, 1 << 40, 5, 6), -300, out])
    assert out.tolist() == [-7, 31, 1 << 40, 6005, -300, 2]


def test_nvcc_block_reduction(kernels):
    x, out = torch.randn(1000), torch.zeros(1)
    launch(kernels, "sum", (1,), (128,), [x, out, 1000])
    torch.testing.assert_close(out[0], x.double().sum().float())


def test_nvcc_tensor_core_tile(kernels, nvcc):
    torch.manual_seed(0)
    a, b, c = torch.randn(16, 64).bfloat16(), torch.randn(64, 8).bfloat16(), torch.full((16, 8), float("nan"))
    launch(kernels, "tile", (1,), (32,), [a, b, c])
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(PTXError, match="cp.async not yet waited for.*ldmatrix"):
        launch(nvcc(SOURCE.replace("WAIT", "2")), "tile", (1,), (32,), [a, b, c])
