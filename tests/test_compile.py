"""opcheck, torch.compile(fullgraph=True), autocast, vmap-free functional use: the ops inside torch's own machinery."""
import pytest
import terrazzo
import torch
from terrazzo import cases

ops = torch.ops.terrazzo
SMALL = {"causal_conv1d_fn": ("channel_last", "packed_states", "width_3_channel_first"), "causal_conv1d_varlen_fn": ("mixed",),
         "causal_conv1d_update": ("hf_layout", "circular", "slots"), "causal_conv1d_varlen_states": ("mixed",),
         "mamba_chunk_scan_combined": ("plain", "gated_states", "varlen"), "selective_state_update": ("mamba2", "slots", "mamba1"),
         "rmsnorm_gated": ("gate_first", "groups_norm_first", "no_gate"),
         "grouped_mm": ("bias_transposed_rows_behind", "mixed_sizes"), "gmm": ("trans_b", "trans_a"), "linear": ("three_dimensions", "no_bias"),
         "moe_route": ("dbrx", "gpt_oss", "deepseek_v3"), "moe_permute": ("sentinels",), "moe_unpermute": ("two_dimensions",),
         "entropy_patch": ("threshold", "packed", "valid", "width"), "patch_lengths_from_entropies": ("combined", "top_next"),
         "patch_lengths_from_tokens": ("space",), "patch_ids_from_lengths": ("zeros",), "byte_hash_ids": ("functions",),
         "byte_hash_embedding": ("blt", "packed"),
         "fused_experts": ("hf", "gpt_oss", "separate_bias", "no_gate", "sentinels", "many_tokens_dbrx"),
         # patches and local attention
         "patch_reduce": ("amax", "ragged_mean"), "patch_cross_attention": ("patches_two_a_patch", "bytes_window_ragged_masked", "patches_packed"),
         "local_attention": ("causal", "packed_grouped_masked"),
         "norm_linear": ("qkv", "gated_residual_gelu"), "attention_update": ("plain", "part_rotary_interleaved", "ragged_window")}
CHOSEN = [c for c in cases.CASES if c.name in SMALL[c.op]]
INDUCTOR = [c for c in CHOSEN if c.name in ("channel_last", "hf_layout", "plain", "mamba2", "gate_first", "dbrx", "hf", "mixed_sizes", "no_bias", "amax", "patches_two_a_patch", "causal")]
compiled_cases = pytest.mark.parametrize("case, compiler", [(c, "aot_eager") for c in CHOSEN] + [(c, "inductor") for c in INDUCTOR],
                                         ids=lambda v: str(v))


def assert_same(found, expected, tol=1e-5):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=tol, atol=tol, msg=lambda m: f"{name}: {m}")


@compiled_cases
def test_compile_fullgraph(case, compiler):
    function = torch.compile(getattr(terrazzo, case.op), fullgraph=True, backend=compiler)
    kwargs = case.make(torch.float32)
    terrazzo.reset_counters()
    found = cases.run(case, kwargs, None, gradients=bool(case.grads), function=function)
    assert set(terrazzo.counters()) and all(set(ran) == {"cpu"} for ran in terrazzo.counters().values()) or case.op.endswith("varlen_states")
    expected = cases.run(case, kwargs, "cpu", gradients=bool(case.grads))
    if "lengths" in found:  # a graph keeps every column: how many are used depends on the data
        width = expected["lengths"].shape[1]
        assert not found["lengths"][:, width:].any()
        found["lengths"] = found["lengths"][:, :width]
    assert_same(found, expected)


@pytest.mark.parametrize("op", ["causal_conv1d_fn", "mamba_chunk_scan_combined", "rmsnorm_gated"])
def test_compile_dynamic_length(op):
    """One graph serves several lengths."""
    case = next(c for c in CHOSEN if c.op == op)
    function = torch.compile(getattr(terrazzo, op), fullgraph=True, backend="aot_eager", dynamic=True)
    for seed, dtype in ((0, torch.float32), (1, torch.float32)):
        kwargs = case.make(dtype, seed)
        if op != "rmsnorm_gated":
            cut = {"causal_conv1d_fn": ("x",), "mamba_chunk_scan_combined": ("x", "dt", "B", "C")}[op]
            for name in cut:
                kwargs[name] = kwargs[name][:, :, : 30 + seed] if op == "causal_conv1d_fn" else kwargs[name][:, : 60 + seed]
        assert_same(cases.run(case, kwargs, None, gradients=True, function=function), cases.run(case, kwargs, "cpu", gradients=True))


def op_arguments(name):
    """Arguments for each native op, forward ops with gradients required."""
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape).requires_grad_()

    def plain(values):
        return tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in values)

    cu = torch.tensor([0, 3, 9], dtype=torch.int32)
    x, w, b, s = leaf(2, 6, 9), leaf(6, 4), leaf(6), leaf(2, 6, 3)
    scan = [leaf(2, 9, 4, 3), torch.rand(2, 9, 4).requires_grad_(), (-torch.rand(4)).requires_grad_(), leaf(2, 9, 2, 5), leaf(2, 9, 2, 5), leaf(4)]
    states = leaf(2, 4, 3, 5)
    ends = torch.tensor([4, 7], dtype=torch.int32)
    patch_ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, -1, 2, 2, 3, 3]], dtype=torch.int32)
    experts = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]], dtype=torch.int32)
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [2] * 9], dtype=torch.int32)
    tokens = torch.randint(0, 9, (2, 6))
    table, byte = leaf(2 * 2 * 7, 4), leaf(9, 4)
    valid = torch.tensor([5, 0], dtype=torch.int32)
    return {
        "entropy_patch_fwd": [(leaf(2, 5, 7), 1.5, 0, 0.0, 1.0, 3, None, valid, True), (leaf(1, 9, 7), 0.0, 3, 0.0, 2.5, 0, cu, None, False)],
        "entropy_patch_bwd": [(torch.randn(2, 5), torch.randn(2, 5, 7), valid)],
        "patch_cut": [(torch.randn(2, 8), 0.1, 2, 0.2, 1.0, 0, 0, None, None, True), (torch.randint(0, 260, (2, 8)), 0.0, 6, 0.0, 1.0, 2, 4, None, None, False)],
        "patcher_update": [(torch.randn(2, 4), torch.tensor([[0, 1, 0]] * 2), torch.zeros(2), 0.1, 1, 0.0, 3)],
        "patch_ids": [(torch.tensor([[1, 2, 3], [6, 0, 0]]), 6)],
        "byte_hash_ids": [(tokens, [2, 3], 2, 7, None)],
        "byte_hash_embedding_fwd": [(tokens, table, byte, [2, 3], 2, 7, None, False)],
        "byte_hash_embedding_bwd": [(torch.randn(2, 6, 4), tokens, torch.empty(0), 28, torch.empty(0), 9, [2, 3], 2, 7, None, False, True, True)],
        "causal_conv1d_fwd": [(x, w, b, seq_idx, None, s, True, True), (x.transpose(1, 2).contiguous().transpose(1, 2), w, None, None, None, None, False, False)],
        "causal_conv1d_bwd": [plain((x, x, w, b, seq_idx, None, s, s, True))],
        "causal_conv1d_update": [(torch.randn(2, 6, 1), torch.randn(2, 6, 4), w.detach(), None, True, None, None)],
        "causal_conv1d_varlen_states": [(torch.randn(9, 6), cu, 3)],
        "chunk_scan_fwd": [(*scan, None, leaf(4), states, seq_idx, None, True, 0.0, float("inf"), True)],
        "chunk_scan_bwd": [plain((scan[0], states, *scan, leaf(4), states, None, None, True, 0.0, 9.0))],
        "chunk_scan_fwd_into": [(torch.randn(2, 9, 6, 3)[:, :, 1:5], *plain(scan), None, None, states.detach(), seq_idx, None, True, 0.0, 9.0, True)],
        "chunk_scan_bwd_into": [(torch.randn(2, 9, 6, 3)[:, :, 1:5], *plain((scan[0], states, *scan, leaf(4), states)), None, None, True, 0.0, 9.0)],
        "selective_state_update": [(torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3), torch.rand(2, 4, 3), -torch.rand(4, 3, 5), torch.randn(2, 2, 5),
                                    torch.randn(2, 2, 5), None, None, None, True, None)],
        "rmsnorm_gated_fwd": [(leaf(3, 8), leaf(8), leaf(3, 8), 1e-5, 4, False), (leaf(3, 8), leaf(8), None, 1e-5, 8, True)],
        "rmsnorm_gated_bwd": [(torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), torch.randn(3, 8), 1e-5, 4, True)],
        "moe_route_fwd": [(leaf(5, 8), None, 3, 1.0, True, False, 0, 0, 1.0), (leaf(5, 8), torch.rand(8), 2, 0.0, True, True, 4, 2, 2.5)],
        "moe_route_bwd": [(torch.randn(5, 2), torch.randn(5, 8), torch.tensor([[0, 7]] * 5, dtype=torch.int32), 2.0, False, False, 1.0)],
        "grouped_gemm_fwd": [(leaf(9, 5), leaf(2, 5, 6), ends, leaf(2, 6)), (leaf(9, 5), leaf(2, 6, 5).mT, ends, None)],
        "grouped_gemm_bwd": [(torch.randn(9, 6), torch.randn(9, 5), torch.randn(2, 6, 5).mT, ends, True, True, True)],
        "grouped_wgrad_fwd": [(leaf(9, 5), leaf(9, 6), ends)],
        "grouped_wgrad_bwd": [(torch.randn(2, 5, 6), torch.randn(9, 5), torch.randn(9, 6), ends)],
        "norm_linear": [(torch.randn(3, 5), torch.randn(6, 5), torch.randn(6, 5), None, torch.randn(5), 1e-5, 1, True, torch.randn(3, 6)),
                        (torch.randn(3, 5), torch.randn(6, 5), torch.randn(2, 5), torch.randn(2, 5), None, 1e-5, 0, False, None)],
        "attention_update": [(torch.randn(2, 40), torch.randn(2, 2, 7, 5), torch.randn(2, 2, 7, 5), 0, torch.tensor([3, 6]), torch.rand(1, 2), torch.rand(1, 2),
                              True, 0, 0.4), (torch.randn(2, 40), torch.randn(2, 2, 7, 5), torch.randn(2, 2, 7, 5), 9, None, None, None, False, 7, 0.4)],
        "linear_fwd": [(leaf(4, 5), leaf(6, 5), leaf(6), 0), (torch.randn(4, 5), torch.randn(6, 5), None, 1)],
        "linear_bwd": [(torch.randn(4, 6), torch.randn(4, 5), torch.randn(6, 5), True, True, True)],
        "fused_experts_fwd": [(leaf(4, 5), leaf(3, 12, 5), None, leaf(3, 5, 6), leaf(4, 2), experts, leaf(3, 12), None, leaf(3, 5), 1, False, 1.7, 7.0, True),
                              (torch.randn(4, 5), torch.randn(3, 6, 5), torch.randn(3, 6, 5), torch.randn(3, 5, 6), torch.rand(4, 2), experts, None, None,
                               None, 2, False, 1.7, 7.0, False)],
        "fused_experts_bwd": [(torch.randn(4, 5), torch.randn(4, 5), torch.randn(3, 12, 5), None, torch.randn(3, 6, 5).mT, torch.rand(4, 2), experts,
                               torch.randn(3, 12), None, torch.randn(3, 5), 1, False, 1.7, 7.0, torch.randn(8, 12), True, True)],
        "patch_reduce_fwd": [(leaf(2, 9, 6), patch_ids, 3, 0), (leaf(2, 9, 6), patch_ids, 2, 1)],
        "patch_reduce_bwd": [(torch.randn(2, 3, 6), torch.randn(2, 9, 6), torch.randn(2, 3, 6), patch_ids, 1)],
        "patch_cross_attention_fwd": [(leaf(2, 6, 4, 5), leaf(2, 9, 2, 5), leaf(2, 9, 2, 5), patch_ids, 3, False, 2, 0.4, 1, None, None),
                                      (leaf(2, 9, 4, 5), leaf(2, 6, 2, 5), leaf(2, 6, 2, 5), patch_ids, 3, True, 2, 0.4, 2, torch.ones(2, 6, dtype=torch.bool), None)],
        "patch_cross_attention_bwd": [tuple(torch.randn(2, n, h, 5) for n, h in ((6, 4), (6, 4), (9, 2), (9, 2)))
                                      + (patch_ids, 3, False, 2, 0.4, 1, None, None)],
        "local_attention_fwd": [(leaf(1, 9, 4, 5), leaf(1, 9, 2, 5), leaf(1, 9, 2, 5), 3, True, 0.4, None, cu)],
        "local_attention_bwd": [tuple(torch.randn(1, 9, h, 5) for h in (4, 4, 2, 2, 4)) + (torch.randn(1, 4, 9), 3, False, 0.4, None, None)],
        "moe_permute": [(torch.tensor([[0, 5], [1, 0]], dtype=torch.int32), 3)],
        "moe_unpermute_fwd": [(leaf(4, 3), torch.tensor([2, 0, 1, 3], dtype=torch.int32), leaf(2, 2))],
        "moe_unpermute_bwd": [(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([2, 0, 1, 3], dtype=torch.int32), torch.rand(2, 2))],
    }[name]


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update", "causal_conv1d_varlen_states", "chunk_scan_fwd",
                                  "chunk_scan_bwd", "chunk_scan_fwd_into", "chunk_scan_bwd_into", "selective_state_update", "rmsnorm_gated_fwd",
                                  "rmsnorm_gated_bwd", "moe_route_fwd", "moe_route_bwd", "moe_permute",
                                  "moe_unpermute_fwd", "moe_unpermute_bwd", "grouped_gemm_fwd", "grouped_gemm_bwd",
                                  "grouped_wgrad_fwd", "grouped_wgrad_bwd", "norm_linear", "attention_update", "linear_fwd", "linear_bwd",
                                  "fused_experts_fwd", "fused_experts_bwd",
                                  "patch_reduce_fwd", "patch_reduce_bwd", "patch_cross_attention_fwd", "patch_cross_attention_bwd",
                                  "local_attention_fwd", "local_attention_bwd",
                                  "entropy_patch_fwd", "entropy_patch_bwd", "patch_cut", "patcher_update", "patch_ids", "byte_hash_ids",
                                  "byte_hash_embedding_fwd", "byte_hash_embedding_bwd"])
def test_opcheck(name):
    for args in op_arguments(name):
        torch.library.opcheck(getattr(ops, name).default, args)


@pytest.mark.parametrize("case", [c for c in CHOSEN if c.grads], ids=str)
def test_autocast(case):
    """Under autocast the ops take what comes, in mixed dtypes, and gradients return in each input's dtype."""
    kwargs = case.make(torch.float32)
    first = case.grads[0]
    kwargs[first] = kwargs[first].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = cases.run(case, kwargs, "cpu", gradients=True)
    expected = cases.run(case, kwargs, "reference", gradients=True)
    for name in found:
        assert found[name].dtype == expected[name].dtype, name
        torch.testing.assert_close(found[name], expected[name], rtol=0.05, atol=0.2)


def test_split_conv1d_scan_combined():
    """The fused block equals its parts, in values and gradients, and under compile and autocast."""
    torch.manual_seed(0)
    H, P, G, N, L = 4, 8, 2, 5, 40
    inner, conv_dim = H * P, H * P + 2 * G * N
    z = torch.randn(2, L, inner + conv_dim + H, requires_grad=True)
    params = [torch.randn(s).requires_grad_() for s in ((conv_dim, 4), (conv_dim,), (H,), (H,), (inner,), (20, inner))]
    w, b, dt_bias, D, norm, out = params
    A = -torch.rand(H)

    def call(backend, function=terrazzo.mamba_split_conv1d_scan_combined, **kw):
        y, states = function(z, w, b, dt_bias, A, D, 16, return_final_states=True, rmsnorm_weight=norm, outproj_weight=out, headdim=P, ngroups=G,
                             norm_before_gate=False, backend=backend, **kw)
        return (y, states, *torch.autograd.grad(y.square().sum() + states.sum(), [z, *params]))

    expected = call("reference")
    for found in (call("cpu"), call(None, torch.compile(terrazzo.mamba_split_conv1d_scan_combined, fullgraph=True, backend="aot_eager"))):
        for a, e in zip(found, expected):
            torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        y = terrazzo.mamba_split_conv1d_scan_combined(z, w, b, dt_bias, A, D, 16, rmsnorm_weight=norm, outproj_weight=out, headdim=P, ngroups=G)
    assert y.dtype == torch.bfloat16
    gated = terrazzo.mamba_split_conv1d_scan_combined(z, w, b, dt_bias, A, D, 16, headdim=P, ngroups=G)
    assert gated.shape == (2, L, inner)
