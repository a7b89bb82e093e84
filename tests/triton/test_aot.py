"""What `make aot` gates, on the part of it that is quick: bfloat16, each kernel at a size or two, the rows that the tables pick; matrix products
for every target, the rest for three."""
from dataclasses import replace

import pytest
import terrazzo
import torch
from terrazzo.cases import Unwritten
from terrazzo.explain import tensors_at_choice
from terrazzo.triton_kernels import configs, runtime
from torch._subclasses.fake_tensor import FakeTensorMode

from tools import triton_aot
from tools.triton_launches import LAUNCHES

OPS = [op for op in LAUNCHES if triton_aot.has_triton(op)]
MATRIX = ("mamba_chunk_scan_combined", "grouped_mm", "fused_experts", "local_attention", "patch_cross_attention")
COMPILED = [(op, arch) for op in OPS for arch in ("sm80", "sm90", "gfx942")] + [(op, arch) for op in MATRIX for arch in ("sm100", "gfx950")]
KERNEL = triton_aot.Kernel("op", "kernel", "bf16", "gfx942", "BLOCK_M=16", "a call", "", 100, 0, 64 * 1024, {"MFMA": 4}, True, (), 1.0)


def test_every_triton_op_has_calls():
    assert not triton_aot.missing(), "ops with a triton backend need calls at model sizes in tests/tools/triton_launches.py"
    assert set(LAUNCHES) <= set(terrazzo.dispatch.OPS)


@pytest.mark.unpoisoned  # gigabytes that nobody touches
@pytest.mark.parametrize("op, arch", COMPILED)
def test_compiles_within_the_device(op, arch):
    found = triton_aot.examine(op, "bf16", arch, triton_aot.quick_calls(op), every_row=False)
    assert not found.errors and found.kernels
    assert not [line for kernel in found.kernels for line in kernel.offences()]
    text = triton_aot.DOC.read_text()
    for kernel in found.kernels:
        assert f"## {kernel.name}\n" in text, "docs/triton_kernels.md is old: make aot"


@pytest.mark.unpoisoned
@pytest.mark.parametrize("op", [op for op in LAUNCHES if op != "PatcherState"])
def test_calls_pass_the_public_checks(op):
    for call in LAUNCHES[op]:
        tensors_at_choice(call.function or op, call.build(Unwritten(), torch.bfloat16))


@pytest.mark.unpoisoned
def test_every_row_of_every_table_serves_a_call():
    rows = set()
    for op in OPS:
        for arch in triton_aot.TARGETS:
            for dtype in ("bf16", "fp32"):
                rows |= triton_aot.serving_rows(op, dtype, arch)
    assert not triton_aot.unreached(rows)


def test_document_shows_every_target_without_spills():
    text = triton_aot.DOC.read_text()
    assert "(spills" not in text
    for section in text.split("\n## ")[1:]:
        heads = [line for line in section.splitlines() if line.startswith("| configuration")]
        if not heads:  # not a kernel's
            continue
        assert [cell.strip() for cell in heads[0].split("|")[3:-1]] == list(triton_aot.TARGETS)
        cells = [line.split("|")[3:-1] for line in section.splitlines() if line.startswith("| ") and line not in heads]
        compiled = {arch for row in cells for arch, cell in zip(triton_aot.TARGETS, row, strict=True) if cell.strip() != "–"}
        assert compiled == set(triton_aot.TARGETS), section.partition("\n")[0]


def test_document_shows_the_tables():
    """As they are now: every row of every table, in order."""
    lines = triton_aot.configurations()
    assert "\n".join(lines) in triton_aot.DOC.read_text(), "docs/triton_kernels.md is old: make aot"
    rows = sum(len(table.rows) for table in configs.TABLES.values())
    assert len([line for line in lines if line.startswith("| ")]) == rows + 1


@pytest.mark.parametrize("row, words", [
    (configs.Row({}, arch=("sm8", "gfx"), itemsize=2, up_to={"P": 64, "masked": 0}), "sm8/gfx, 16 bits, P ≤ 64, masked = 0"),
    (configs.Row({}, itemsize=4), "32 bits"), (configs.Row({}), "everything else")])
def test_conditions_in_words(row, words):
    assert triton_aot._where(row) == words


@pytest.mark.parametrize("change, words", [
    ({}, None), ({"spills": 8}, "spills 8"), ({"shared": 64 * 1024 + 1}, "gfx942 has 64"), ({"instructions": {}}, "without a tensor-core"),
    ({"instructions": {}, "dots": False}, None), ({"instructions": {"LDSM": 3}}, "without a tensor-core"),
    ({"narrow": ("%3 = arith.muli %1, %2 : i32",)}, "addresses come of products of 32 bits: %3")])  # fmt: skip
def test_gates(change, words):
    found = replace(KERNEL, **change).offences()
    assert not found if words is None else len(found) == 1 and words in found[0]


def test_finds_dots_of_16_bits():
    line = "%9 = tt.dot %a, %b, %c, inputPrecision = {} : tensor<64x32x{}> * tensor<32x64x{}> -> tensor<64x64xf32> loc(#loc1)"
    assert triton_aot.DOT_OF_16_BITS.search(line.format("tf32", "bf16", "bf16"))
    assert not triton_aot.DOT_OF_16_BITS.search(line.format("ieee", "f32", "f32"))


def test_every_row_that_serves_is_compiled_once(monkeypatch):
    monkeypatch.setattr(configs, "TABLES", {})
    rows = configs.Row({"BLOCK_M": 1}, up_to={"M": 4}), configs.Row({"BLOCK_M": 2}, arch=("gfx",)), configs.Row({"BLOCK_M": 3})
    table = configs.Table("kernel", *rows)
    used, result = [], triton_aot.Result()

    class Call:
        def __init__(self, M):
            self.M = M

        def run(self, op, dtype):
            used.append(table.pick(torch.empty(1), M=self.M)["BLOCK_M"])

    for M in (8, 2, 2):
        triton_aot._run_rows(Call(M), "op", torch.float32, result, every_row=True)
    assert used == [3, 1, 1]  # row 1 serves another architecture; the last was compiled by the first call
    assert triton_aot.unreached(result.rows) == [f"kernel: row 1 ({rows[1]}) serves none of the calls in triton_launches.py"]
    assert table.pick(torch.empty(1), M=2)["BLOCK_M"] == 1


def test_tuning_leaves_rows_of_other_devices_alone(monkeypatch):
    monkeypatch.setattr(configs, "TABLES", {})
    monkeypatch.setenv("TERRAZZO_TRITON_AUTOTUNE", "1")
    rows = (configs.Row({"B": 1}, arch=("gfx",)), configs.Row({"B": 2}, itemsize=2), configs.Row({"B": 3}, up_to={"M": 1}),
            configs.Row({"B": 4}, arch=("sm9",)), configs.Row({"B": 5}))  # fmt: skip
    table, timed = configs.Table("kernel", *rows), []
    monkeypatch.setattr(table, "_fastest", lambda run, rows: timed.extend(rows) or rows[0].options())
    with FakeTensorMode(), runtime.pretend("sm90"):
        table.launch(torch.empty(4, device="cuda"), lambda **options: None, M=2)
        # bounds on sizes only say what is thought to be fast; row 4 takes all there is
        assert [row.blocks["B"] for row in timed] == [3, 4]
        monkeypatch.setattr(runtime, "is_capturing", lambda: True)
        assert table.launch(torch.empty(4, device="cuda"), lambda **options: options["B"], M=2) == 3  # what was tuned before
        assert table.launch(torch.empty(4, device="cuda"), lambda **options: options["B"], M=5) == 4  # the table, and nothing is timed
    assert [row.blocks["B"] for row in timed] == [3, 4]
    with FakeTensorMode(), runtime.pretend("sm90"), runtime.tracing():
        assert table.launch(torch.empty(4, device="cuda"), lambda **options: options["B"], M=2) == 4  # nor in a graph of torch.compile
