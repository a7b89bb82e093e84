"""Every op x backend x dtype x case, forward and backward, against the float64 reference, by one tolerance rule."""
import pytest
import terrazzo
import torch
from terrazzo import cases, native
from terrazzo.tolerance import check

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_case = pytest.mark.parametrize("case", cases.CASES, ids=str)
training_cases = pytest.mark.parametrize("case", [c for c in cases.CASES if c.grads], ids=str)


def assert_matches(case, dtype, kwargs, found, gradients=False):
    expected = cases.run(case, cases.to_dtype(kwargs, torch.float64), "reference", gradients)
    same_dtype = cases.run(case, kwargs, "reference", gradients)
    assert found.keys() == expected.keys()
    for name, out in found.items():
        verdict = check(out, expected[name], same_dtype[name])
        assert verdict.ok, f"{case} {dtype} {name}: {verdict.why}"


def served_by(case):
    """The op that counts a case: some public functions are another's in other words."""
    if case.op == "gmm" and not case.name.startswith("trans_a"):
        return "grouped_mm"
    return {"causal_conv1d_varlen_fn": "causal_conv1d_fn"}.get(case.op, case.op)


@every_case
@dtypes
def test_forward(case, dtype):
    kwargs = case.make(dtype)
    terrazzo.reset_counters()
    found = cases.run(case, kwargs, "cpu")
    ran = served_by(case)
    assert terrazzo.counters() == {ran: {"cpu": 1}}
    assert_matches(case, dtype, kwargs, found)


@training_cases
@dtypes
def test_backward(case, dtype):
    kwargs = case.make(dtype)
    terrazzo.reset_counters()
    found = cases.run(case, kwargs, "cpu", gradients=True)
    ran = served_by(case)
    assert terrazzo.counters() == {ran: {"cpu": 1}, f"{ran}_bwd": {"cpu": 1}}
    assert_matches(case, dtype, kwargs, found, gradients=True)


PRODUCTS = ("grouped_mm", "gmm", "linear", "fused_experts", "norm_linear")


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.op in PRODUCTS], ids=str)
@dtypes
def test_other_second_level_cache(case, dtype):
    """Products are cut by the size of a core's second-level cache: what other machines run."""
    kwargs = case.make(dtype)
    with native.assumed_second_level_cache(1 << 20 if native.second_level_cache() >= 2 << 20 else 2 << 20):
        found = cases.run(case, kwargs, "cpu", gradients=bool(case.grads))
    assert_matches(case, dtype, kwargs, found, gradients=bool(case.grads))


def test_second_level_caches_are_not_one_code():
    x, weight = torch.randn(64, 1024), torch.randn(96, 1024)
    found = []
    for bytes in (1 << 20, 2 << 20, 2 << 20):
        with native.assumed_second_level_cache(bytes):
            found.append(terrazzo.linear(x, weight, backend="cpu"))
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])


@every_case
def test_any_strides(case):
    """No argument has unit stride anywhere, and what lies between its elements is not finite."""
    kwargs = cases.spread(case, case.make(torch.float32))
    gradients = bool(case.grads)
    assert_matches(case, torch.float32, kwargs, cases.run(case, kwargs, "cpu", gradients), gradients)


@every_case
def test_caller_tensors_unchanged(case):
    kwargs = case.make(torch.float32)
    before = {k: cases.clone(v) for k, v in kwargs.items()}
    function = getattr(terrazzo, case.op)
    with torch.no_grad():
        function(**kwargs, backend="cpu")
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and name not in case.updated:
            assert torch.equal(value, before[name]), name


@training_cases
def test_independent_of_thread_count(case):
    kwargs = case.make(torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(cases.run(case, kwargs, "cpu", gradients=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


BREAKS = {
    "one percent": lambda y: y * 1.01,
    "dropped row": lambda y: torch.cat([y[:-1], torch.zeros_like(y[-1:])]) if y.shape[0] > 1 else y * 0,
    "shifted by one": lambda y: y.roll(1, dims=1),
    "swapped": lambda y: y.flip(1),
    "skipped tile": lambda y: torch.where(torch.arange(y.numel()).view(y.shape) < y.numel() // 8, 0, y),
}
PLAIN = {c.op: c for c in reversed(cases.CASES) if c.grads or c.updated}


@pytest.mark.parametrize("op", PLAIN)
@pytest.mark.parametrize("break_it", BREAKS.values(), ids=BREAKS.keys())
def test_negative_controls_fail(op, break_it):
    """The tolerance rule must tell a wrong result from a right one."""
    case = PLAIN[op]
    for dtype in (torch.float32, torch.bfloat16):
        kwargs = case.make(dtype)
        found = cases.run(case, kwargs, "cpu", gradients=bool(case.grads))
        for name, value in found.items():
            if name in ("y", "dx", "da", "drows") or name.startswith("updated"):
                with pytest.raises(AssertionError):
                    assert_matches(case, dtype, kwargs, found | {name: break_it(value)}, gradients=bool(case.grads))


def test_a_whole_model_may_be_twice_as_far_off_as_its_reference():
    draw = torch.Generator().manual_seed(0)
    exact = torch.randn(4096, generator=draw, dtype=torch.float64)
    reference, out = (exact + 0.01 * torch.randn(4096, generator=draw) for _ in range(2))

    def ok(times, **options):
        return check((exact + times * (out - exact)).bfloat16(), exact, reference.bfloat16(), **options).ok

    assert not ok(1)  # an op rounds once
    assert ok(1, whole_model=True) and not ok(2.2, whole_model=True) and not ok(4, whole_model=True)


GRADCHECK = [c for c in cases.CASES if c.grads and c.name in (
    "states", "packed_states", "packed_states_channel_first", "width_3_channel_first", "mixed", "odd_sizes", "gated_states", "varlen",
    "dt_limit", "D_per_channel", "gate_first", "groups_norm_first", "no_gate", "padding_first", "bias_transposed_rows_behind", "trans_a", "trans_b",
    "several_tiles", "three_dimensions", "norm_2", "norm_inf", "gpt_oss", "deepseek_v3", "deepseek_v2", "two_dimensions", "dbrx", "separate_bias",
    "no_gate_bias", "sentinels", "nothing_but_sentinels",
    # patches and local attention
    "amax", "mean", "amin", "ragged_mean", "patches_two_a_patch", "bytes_two_a_patch", "patches_grouped_heads", "bytes_grouped_heads", "patches_ragged",
    "patches_window_ragged_masked", "bytes_window_ragged_masked", "bytes_packed", "causal", "both_sides", "one_key_head", "right_padding_both_sides",
    "nothing_seen", "packed_grouped_masked",
    # byte-latent: patches and hash embeddings
    "valid", "functions", "packed")]


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradcheck(case):
    kwargs = case.make(torch.float64)
    names = [n for n in case.grads if kwargs.get(n) is not None]
    function = getattr(terrazzo, case.op)

    def call(*values):
        result = function(**(kwargs | dict(zip(names, values))), backend="cpu")
        return result[0] if case.op in ("moe_route", "entropy_patch") else result  # indices have no gradient

    leaves = [kwargs[n].detach().clone(memory_format=torch.preserve_format).requires_grad_() for n in names]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@training_cases
def test_expanded_gradient(case):
    """sum().backward() hands the kernel a stride-0 gradient."""
    kwargs = case.make(torch.float32)
    grads = []
    for backend in ("cpu", "reference"):
        first = case.grads[0]
        leaf = kwargs[first].detach().clone(memory_format=torch.preserve_format).requires_grad_()
        result = getattr(terrazzo, case.op)(**(kwargs | {first: leaf}), backend=backend)
        (result[0] if isinstance(result, tuple) else result).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=2e-4, atol=2e-4)
