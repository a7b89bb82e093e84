"""What the case list does not show of the mixture-of-experts kernels: packed weights, NaN, more blocks than one loop takes."""
import pytest
import terrazzo
import torch
from terrazzo import packing
from terrazzo.triton_kernels import runtime


def both(function, *args, **kwargs):
    """The results of the triton backend, which alone must have run, and of the reference."""
    terrazzo.reset_counters()
    found = function(*args, **kwargs, backend="triton")
    assert {backend for backends in terrazzo.counters().values() for backend in backends} == {"triton"}
    return found, function(*args, **kwargs, backend="reference")


@pytest.mark.parametrize("weight_format", [None, "int8"])
def test_packed_weight(weight_format):
    torch.manual_seed(0)
    packed = packing.pack_weight(torch.randn(3, 24, 20), weight_format)
    found, expected = both(terrazzo.grouped_mm, torch.randn(7, 24), packed, torch.tensor([2, 2, 6], dtype=torch.int32), torch.randn(3, 20))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_experts(interleaved):
    torch.manual_seed(0)
    packed = packing.pack_expert_weights(torch.randn(4, 40, 24), torch.randn(4, 24, 20), interleaved=interleaved, weight_format="int8")
    biases = dict(bias_gate_up=torch.randn(4, 40), bias_down=torch.randn(4, 24))
    found, expected = both(terrazzo.fused_experts, torch.randn(5, 24), packed, None, torch.rand(5, 2), torch.randint(0, 5, (5, 2)), **biases)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pairs, E", [((1100, 4), 70), ((50, 4), 1500), ((1, 3), 1500)])
def test_permute_many(pairs, E):
    indices = torch.randint(0, E + 9, pairs, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(*both(terrazzo.moe_permute, indices, E)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [dict(norm_order=1), dict(sigmoid=True, n_group=2, topk_group=1), dict(softmax_first=False)], ids=str)
def test_route_nan_and_infinity(options):
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    logits[1, 3] = float("nan")
    logits[2, 4:] = -float("inf")
    logits[3] = 0.0  # all the same: the lower index first
    (weights, indices), expected = both(terrazzo.moe_route, logits, 3, **options)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(weights, expected[0], equal_nan=True, rtol=1e-6, atol=1e-6)


def test_nan_behind_the_groups():
    a = torch.randn(9, 24)
    a[5:] = float("nan")
    offs = torch.tensor([3, 5], dtype=torch.int32)
    found, expected = both(terrazzo.grouped_mm, a, torch.randn(2, 24, 20), offs, torch.randn(2, 20))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found[5:] == 0).all()


@pytest.mark.skipif(not runtime.interpreting(), reason="pretends to be another GPU")
@pytest.mark.parametrize("arch", ["sm90", "sm100"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("K, read", [(72, True), (70, False)])  # rows of 140 bytes cannot be described
def test_tensor_descriptors(monkeypatch, arch, transposed, K, read):
    """Rows of other groups and of the next matrix, read with a tile, must not show; more rows of a than groups have."""
    torch.manual_seed(0)
    descriptor, described = runtime.load("grouped_gemm").TensorDescriptor, []
    make = descriptor.from_tensor
    monkeypatch.setattr(descriptor, "from_tensor", staticmethod(lambda t, block: described.append(block) or make(t, block)))
    a, b = torch.randn(400, K, dtype=torch.float16), torch.randn(3, *((264, K) if transposed else (K, 264)), dtype=torch.float16)
    a[320] = float("inf")  # behind the groups
    offs, bias = torch.tensor([150, 150, 320], dtype=torch.int32), torch.randn(3, 264, dtype=torch.float16)
    with runtime.pretend(arch):
        found, expected = both(terrazzo.grouped_mm, a, b.mT if transposed else b, offs, bias)
    assert bool(described) == read
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-2)
    assert (found[320:] == 0).all()
