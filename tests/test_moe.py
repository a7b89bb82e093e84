"""The mixture-of-experts ops against transformers' own routers, experts and losses, and properties that no oracle is needed for."""
import copy
from types import SimpleNamespace

import pytest
import terrazzo
import torch
from terrazzo import cases
from terrazzo.tolerance import check

transformers = pytest.importorskip("transformers")
T, D, E, A = 33, 16, 8, 2


def close(found, expected, tol=2e-5):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol, check_dtype=False)


def same_experts(found, expected):
    """Weights by expert: transformers takes the chosen ones in any order."""
    tables = []
    for weights, indices in (found, expected):
        tables.append(torch.zeros(weights.shape[0], E, dtype=torch.float32).scatter(1, indices.long(), weights.float()))
    close(*tables)


def hf_router(module, name, **config):
    cls = getattr(__import__(f"transformers.models.{module}.modeling_{module}", fromlist=[name]), name)
    settings = dict(num_experts_per_tok=A, num_local_experts=E, num_experts=E, hidden_size=D, norm_topk_prob=True, routed_scaling_factor=2.5, n_group=4,
                    topk_group=2, topk_method="group_limited_greedy") | config
    router = cls(SimpleNamespace(**settings))
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.normal_(0, 0.5)
    return router


ROUTERS = {
    "mixtral": ("mixtral", "MixtralTopKRouter", {}, dict(norm_order=1)),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeTopKRouter", dict(norm_topk_prob=False), {}),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeTopKRouter", {}, dict(norm_order=1)),
    "olmoe": ("olmoe", "OlmoeTopKRouter", dict(norm_topk_prob=False), {}),
    "granitemoe": ("granitemoe", "GraniteMoeTopKRouter", {}, dict(softmax_first=False)),
    "gpt_oss": ("gpt_oss", "GptOssTopKRouter", {}, dict(softmax_first=False)),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3TopkRouter", {}, dict(sigmoid=True, norm_order=1, n_group=4, topk_group=2, scale=2.5)),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2TopkRouter", {}, dict(n_group=4, topk_group=2, scale=2.5)),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("model", ROUTERS)
def test_routes_like_transformers(model, backend):
    torch.manual_seed(0)
    module, name, config, options = ROUTERS[model]
    router = hf_router(module, name, **config)
    if hasattr(router, "e_score_correction_bias"):
        options = options | dict(bias=router.e_score_correction_bias)
    x = torch.randn(T, D)
    logits, weights, indices = router(x)
    same_experts(terrazzo.moe_route(logits.detach(), A, backend=backend, **options), (weights.detach(), indices))
    # the gradient of the logits, by each side's own autograd
    expected = torch.autograd.grad(weights.sum() + weights.square().sum(), logits)[0]
    leaf = logits.detach().requires_grad_()
    found, _ = terrazzo.moe_route(leaf, A, backend=backend, **options)
    close(torch.autograd.grad(found.sum() + found.square().sum(), leaf)[0], expected)


@pytest.mark.parametrize("order", [None, 1, 2.0])
def test_routes_like_dbrx(order):
    from transformers.models.dbrx.modeling_dbrx import DbrxFFN

    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
    expected = DbrxFFN.route_tokens_to_experts(SimpleNamespace(top_k=4, moe_normalize_expert_weights=order), logits)
    same_experts(terrazzo.moe_route(logits, 4, norm_order=order), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", [{}, dict(sigmoid=True), dict(softmax_first=False), dict(n_group=2, topk_group=1, norm_order=1)], ids=str)
def test_nan_logits(options, backend):
    """A NaN among a token's logits: NaN weights, the first experts, and no other token touched."""
    logits = torch.randn(3, E, generator=torch.Generator().manual_seed(0))
    clean = terrazzo.moe_route(logits, A, backend=backend, **options)
    logits[1, 5] = float("nan")
    weights, indices = terrazzo.moe_route(logits, A, backend=backend, **options)
    assert weights[1].isnan().all() and indices[1].tolist() == [0, 1]
    assert torch.equal(weights[::2], clean[0][::2]) and torch.equal(indices[::2], clean[1][::2])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equal_scores_take_the_lower_index(backend):
    _, indices = terrazzo.moe_route(torch.zeros(2, 40), 3, backend=backend)
    assert indices.tolist() == [[0, 1, 2]] * 2
    _, indices = terrazzo.moe_route(torch.tensor([[1.0] * 20 + [2.0] * 20]), 3, backend=backend)
    assert indices.tolist() == [[20, 21, 22]]


def routing(experts=E, top_k=A):
    g = torch.Generator().manual_seed(1)
    return terrazzo.moe_route(torch.randn(T, experts, generator=g), top_k, norm_order=1)


def hf_experts(module, name, **config):
    cls = getattr(__import__(f"transformers.models.{module}.modeling_{module}", fromlist=[name]), name)
    settings = dict(num_local_experts=E, hidden_size=D, intermediate_size=12, hidden_act="silu", swiglu_alpha=1.702, swiglu_limit=0.8, ffn_hidden_size=12,
                    moe_num_experts=E, ffn_act_fn={"name": "silu"}, _experts_implementation="eager") | config
    module = cls(SimpleNamespace(**settings))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4, generator=torch.Generator().manual_seed(parameter.numel()))
    return module


def dbrx(m):
    return (m.mlp.w1, m.mlp.w2), dict(w_up=m.mlp.v1, num_experts=E)


def mixtral(m):
    return (m.gate_up_proj, m.down_proj), {}


def gpt_oss(m):
    return (m.gate_up_proj, m.down_proj), dict(bias_gate_up=m.gate_up_proj_bias, bias_down=m.down_proj_bias, activation="swiglu_oai", interleaved=True,
                                               transposed=True, alpha=m.alpha, limit=m.limit)


EXPERTS = {"dbrx": ("DbrxExperts", dbrx), "mixtral": ("MixtralExperts", mixtral), "gpt_oss": ("GptOssExperts", gpt_oss)}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("model", EXPERTS)
def test_experts_like_transformers(model, backend):
    """Values and every gradient of transformers' eager experts."""
    name, arguments = EXPERTS[model]
    theirs = hf_experts(model, name)
    ours = copy.deepcopy(theirs)
    x, (weights, indices) = torch.randn(T, D, generator=torch.Generator().manual_seed(2)), routing()
    results = []
    for module in (theirs, ours):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        if module is theirs:
            y = module(leaves[0], indices.long(), leaves[1]).view(T, D)
        else:
            matrices, options = arguments(module)
            y = terrazzo.fused_experts(leaves[0], *matrices, leaves[1], indices, backend=backend, **options)
        results.append((y, *torch.autograd.grad(y.square().sum(), [*leaves, *module.parameters()])))
    for found, expected in zip(results[1], results[0], strict=True):
        close(found, expected, 1e-4)


def test_layouts_agree():
    """One set of weights in every layout: the same result."""
    F = 12
    g = torch.Generator().manual_seed(3)
    x, up_gate, down = torch.randn(T, D, generator=g), torch.randn(E, 2 * F, D, generator=g), torch.randn(E, D, F, generator=g)
    gate, up = up_gate.chunk(2, dim=1)
    weights, indices = routing()
    mixed = torch.stack([gate, up], 2).flatten(1, 2)
    expected = terrazzo.fused_experts(x, up_gate, down, weights, indices)
    for matrices, options in (
        ((up_gate.mT.contiguous(), down.mT.contiguous()), {}),
        ((up_gate.mT.contiguous(), down.mT.contiguous()), dict(transposed=True)),
        ((up_gate, down.mT.contiguous()), dict(transposed=(False, True))),
        ((mixed, down), dict(interleaved=True)),
        ((gate, down), dict(w_up=up)),
        ((gate.flatten(0, 1), down.mT.flatten(0, 1)), dict(w_up=up.flatten(0, 1), num_experts=E)),
    ):
        close(terrazzo.fused_experts(x, *matrices, weights, indices, **options), expected)
    # the parts: sort, two grouped products, sum
    order, inverse, offs = terrazzo.moe_permute(indices, E)
    sizes = offs.diff(prepend=offs.new_zeros(1)).long()
    h = torch.nn.functional.silu(terrazzo.grouped_mm(x[order // A], gate.mT, offs)) * terrazzo.gmm(x[order // A], up, sizes, trans_b=True)
    close(terrazzo.moe_unpermute(terrazzo.grouped_mm(h, down.mT, offs), inverse, weights), expected)


def wrong_experts(kwargs, out):
    """Two experts swapped; a token dropped; a choice dropped."""
    swapped = kwargs | dict(w_down=kwargs["w_down"][torch.tensor([1, 0, *range(2, kwargs["w_down"].shape[0])])])
    indices = kwargs["topk_indices"].clone()
    indices[0, 1] = 1000
    return (cases.run(PLAIN, swapped, None)["y"], torch.cat([torch.zeros_like(out[:1]), out[1:]]),
            cases.run(PLAIN, kwargs | dict(topk_indices=indices), None)["y"])


PLAIN = next(c for c in cases.CASES if str(c) == "fused_experts-hf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_negative_controls(dtype):
    """The tolerance rule must see two experts swapped, a dropped token and a dropped choice."""
    kwargs = PLAIN.make(dtype)
    R = cases.run(PLAIN, cases.to_dtype(kwargs, torch.float64), "reference")["y"]
    E_ = cases.run(PLAIN, kwargs, "reference")["y"]
    out = cases.run(PLAIN, kwargs, None)["y"]
    assert check(out, R, E_).ok
    for wrong in wrong_experts(kwargs, out):
        assert not check(wrong, R, E_).ok


def test_permutation():
    indices = cases.Random(0).uniform(50, 4, dtype=torch.float32, high=9).int()  # 8: an expert of somebody else
    order, inverse, offs = terrazzo.moe_permute(indices, 8)
    flat = indices.flatten()
    assert torch.equal(order.long(), flat.argsort(stable=True)) and torch.equal(inverse[order.long()], torch.arange(200, dtype=torch.int32))
    assert torch.equal(offs, flat.bincount(minlength=9)[:8].cumsum(0).int()) and (flat[order[offs[-1] :].long()] == 8).all()


@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss(masked):
    from transformers.models.dbrx.modeling_dbrx import load_balancing_loss_func as of_dbrx
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as of_mixtral

    g = torch.Generator().manual_seed(4)
    layers = tuple(torch.randn(24, E, generator=g).requires_grad_() for _ in range(3))
    mask = torch.ones(2, 12).index_fill(1, torch.tensor([0, 1, 2]), 0) if masked else None
    found = terrazzo.load_balancing_loss(layers, E, A, mask)
    grads = torch.autograd.grad(found, layers)
    for theirs in (of_mixtral, of_dbrx):
        expected = theirs(layers, E, A, mask)
        close(found, expected)
        for a, b in zip(grads, torch.autograd.grad(expected, layers)):
            close(a, b)


def test_router_z_loss():
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    logits = torch.randn(2, 9, E, generator=torch.Generator().manual_seed(5))
    close(terrazzo.router_z_loss(logits.flatten(0, 1)), router_z_loss_func(logits))
    close(terrazzo.router_z_loss(tuple(logits)), router_z_loss_func(logits))
