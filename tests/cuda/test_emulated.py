"""Every op with CUDA kernels x dtype x case x order of threads, forward and backward, emulated, by the tests' one tolerance rule."""
import pytest
import terrazzo
import torch
from terrazzo import cases

from test_ops import DTYPES, assert_matches, served_by
from tools.emulator import SERVED



def further_cases():
    """Shapes that only these kernels tell apart: every team size and vector width, groups longer than registers hold, loops over n and p;
    of the scan tiles beyond the first, rows not aligned to 16 bytes, sequences that end where chunks do, more of them than threads."""
    norm, update, scan, packed = cases.norm, cases.state_update, cases.scan, cases.packed
    norms = {
        "a_warp": norm(shape=(9, 256)),
        "128_threads": norm(shape=(3, 1024), norm_before_gate=True),
        "512_threads": norm(shape=(2, 4096), group_size=4096),
        "read_again": norm(shape=(2, 8200)),
        "read_again_norm_first_no_gate": norm(shape=(3, 16408), z=False, norm_before_gate=True),
        "more_rows_than_programs": norm(shape=(1100, 16)),
        "scalar_warp": norm(shape=(5, 51), group_size=17),
    }
    updates = {
        "long_rows": update(N=272, P=3, B=2),
        "many_rows": update(N=8, P=300, B=1, H=2),
        "long_rows_not_expanded": update(N=160, P=5, expanded=False),
        "fp16_state": update(state_dtype=torch.float16, N=64),
        "bf16_state_odd": update(state_dtype=torch.bfloat16, N=12, expanded=False),
        "nothing_but_padding": update(indices=[-1, -1, -1], slots=2),
    }
    scans = {
        "several_tiles": scan(B=1, L=70, H=2, P=72, G=1, N=80, D="HP", initial=True, final=True),
        "several_odd_tiles": scan(B=1, L=66, H=1, P=67, G=1, N=69, initial=True, final=True),
        "aligned_states_alone": scan(B=1, L=40, H=2, P=20, G=1, N=36, final=True),
        "split_group": scan(B=1, L=33, H=6, P=32, G=1, N=16, final=True),
        "new_sequences_at_chunks": scan(B=1, L=200, H=2, G=1, seq_idx=packed([(0, 63), (1, 1), (2, 64), (3, 1), (-1, 3), (4, 68)]), initial=True, final=True),
        "packed_within_sequences": scan(B=1, L=100, H=2, G=1, cu=[0, 30, 30, 95, 100], seq_idx=packed([(0, 20), (1, 12), (-1, 2), (3, 66)]), initial=True, final=True),
        "many_sequences": scan(B=1, L=90, H=1, P=4, G=1, N=4, cu=[0] * 150 + [3] * 100 + [80, 81, 90] + [90] * 40, initial=True, final=True),
    }
    yield from (cases.Case("mamba_chunk_scan_combined", name, build, cases.SCAN_GRADS, outputs=("y", "final_states")) for name, build in scans.items())
    yield from (cases.Case("rmsnorm_gated", name, build, ("x", "weight", "z")) for name, build in norms.items())
    yield from (cases.Case("selective_state_update", name, build, updated=("state",)) for name, build in updates.items())


CASES = [case for case in cases.CASES if served_by(case) in SERVED] + list(further_cases())
dtypes = pytest.mark.parametrize("dtype", [DTYPES[d] for d in ("fp32", "bf16", "fp16")], ids=("fp32", "bf16", "fp16"))
orders = pytest.mark.parametrize("order", ["forward", "reversed"])
every_case = pytest.mark.parametrize("case", CASES, ids=str)
training_cases = pytest.mark.parametrize("case", [c for c in CASES if c.grads], ids=str)


def run(emulator, case, kwargs, gradients=False):
    """What the emulated kernels made; their launches show that it was nothing else."""
    before = emulator.launches
    found = cases.run(case, kwargs, "cuda", gradients)
    if any(value.numel() for value in found.values()):
        assert emulator.launches > before
    return found


@every_case
@dtypes
@orders
def test_forward(emulator, case, dtype, order):
    emulator.order(order)
    kwargs = case.make(dtype)
    assert_matches(case, dtype, kwargs, run(emulator, case, kwargs))


@training_cases
@dtypes
@orders
def test_backward(emulator, case, dtype, order):
    emulator.order(order)
    kwargs = case.make(dtype)
    assert_matches(case, dtype, kwargs, run(emulator, case, kwargs, gradients=True), gradients=True)


@training_cases
def test_same_bits_in_every_order(emulator, case):
    """Deterministic: no result depends on which thread came first."""
    kwargs = case.make(torch.bfloat16)
    results = []
    for order in ("forward", "reversed", "random"):
        emulator.order(order, seed=7)
        results.append(run(emulator, case, kwargs, gradients=True))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@every_case
def test_caller_tensors_unchanged(emulator, case):
    kwargs = case.make(torch.float32)
    before = {k: cases.clone(v) for k, v in kwargs.items()}
    with torch.no_grad():
        getattr(terrazzo, case.op)(**kwargs, backend="cuda")
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and name not in case.updated:
            assert torch.equal(value, before[name]), name
