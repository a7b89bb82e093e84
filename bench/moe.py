"""Cases of whole expert layers and of routing, in DBRX's and Mixtral's proportions, with even and uneven loads."""
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import terrazzo

from .cases import DTYPES, NO_TRANSFORMERS, Case, Provider, Unavailable, generator, no_backend, own_providers, trains
from .roofline import Work

TOKENS = (1, 4, 16, 64, 256, 2048)
HALF_TOKENS = (1, 16, 256)  # of models at half their widths, and 8 experts: gigabytes of weights with the float64 reference
# preset -> [((width, expert width, experts, choices), tokens)]: DBRX's and Mixtral's proportions at a sixth, a quarter and a half
SIZES = {
    "dbrx": (
        ((1024, 1792, 16, 4), (*TOKENS, 8, 512, 1024)),
        ((1536, 2688, 16, 4), TOKENS),
        ((3072, 5376, 8, 4), HALF_TOKENS),
        ((1024, 448, 64, 4), (*TOKENS, 8, 512, 1024)),
    ),
    "mixtral": (((1024, 3584, 8, 2), (*TOKENS, 8)), ((2048, 7168, 8, 2), HALF_TOKENS)),
    "tiny": (((16, 24, 6, 2), (1, 9)),),
}
LOADS = ("balanced", "zipf", "one-hot")
TRAIN_TOKENS = (9, 512)
ROUTE_SIZES = {"dbrx": ((4096, 16, 4), (4096, 64, 4)), "mixtral": ((4096, 8, 2),), "tiny": ((9, 6, 2),)}


def choices(T, E, A, load, g):
    """(T, A) int32: evenly spread, expert e with probability ~ 1 / (e + 1), or always the first A."""
    if load == "balanced":
        return ((torch.arange(T)[:, None] * A + torch.arange(A)) % E).int()
    if load == "one-hot":
        return torch.arange(A, dtype=torch.int32).expand(T, A).contiguous()
    return torch.multinomial((1 / torch.arange(1.0, E + 1)).expand(T, E), A, generator=g).int()


def _inputs(T, D, F_, E, A, load, dtype, with_grad):
    def make(seed):
        g = generator(seed)
        inputs = {"x": torch.randn(T, D, generator=g).to(dtype), "topk_weights": torch.rand(T, A, generator=g).to(dtype)}
        inputs |= {name: (torch.randn(E * F_, D, generator=g) * 0.02).to(dtype) for name in ("w1", "v1", "w2")}
        inputs["topk_indices"] = choices(T, E, A, load, generator(0))
        return inputs | ({"grad": torch.randn(T, D, generator=g).to(dtype)} if with_grad else {})

    return make


def _ours(backend, E):
    def run(x, w1, v1, w2, topk_weights, topk_indices):
        return terrazzo.fused_experts(x, w1, w2, topk_weights, topk_indices, w_up=v1, num_experts=E, backend=backend)

    return run


class Prepared:
    """make(weights) once for each set of weights and again when their values changed."""

    def __init__(self, make):
        self.make, self.kept = make, {}

    def __call__(self, w1, v1, w2):
        key, state = w1.data_ptr(), (w1._version, w1.dtype)
        if self.kept.get(key, (None,))[0] != state:
            self.kept[key] = state, self.make(w1, v1, w2)
        return self.kept[key][1]


def side_by_side(E):
    """Weights of a layer as most store them: (w1, v1, w2) of (E * F, D) -> gate and up (E, 2F, D), down (E, F, D); joined once, in training every time."""

    def join(w1, v1, w2):
        w1, v1, w2 = (w.view(E, -1, w.shape[1]) for w in (w1, v1, w2))
        return torch.cat([w1, v1], 1), w2

    prepared = Prepared(join)
    return lambda w1, v1, w2: (join if w1.requires_grad else prepared)(w1, v1, w2)


def _packed(E, weight_format=None):
    """The same from weights packed before the call; inference alone, on the CPU."""
    if why := no_backend("cpu"):
        raise Unavailable(why)
    prepared = Prepared(lambda w1, v1, w2: terrazzo.pack_expert_weights(w1, w2, w_up=v1, num_experts=E, weight_format=weight_format))

    def run(x, w1, v1, w2, topk_weights, topk_indices):
        return terrazzo.fused_experts(x, prepared(w1, v1, w2), None, topk_weights, topk_indices, backend="cpu")

    return run


def _hf_eager(E, F_):
    try:
        from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU, DbrxExperts
    except ImportError as error:
        raise Unavailable(NO_TRANSFORMERS) from error

    def run(x, w1, v1, w2, topk_weights, topk_indices):
        mlp = SimpleNamespace(w1=w1, v1=v1, w2=w2, activation_fn=F.silu)
        glu = lambda *args: DbrxExpertGLU.forward(mlp, *args)  # noqa: E731
        glu.w1, glu.v1, glu.w2 = w1, v1, w2
        experts = SimpleNamespace(mlp=glu, hidden_size=x.shape[1], ffn_hidden_size=F_, num_experts=E)
        return DbrxExperts.forward(experts, x, topk_indices.long(), topk_weights).view(x.shape)

    return run


def _hf_grouped(E):
    """transformers' grouped_mm experts on the same weights, gate and up side by side as its models store them."""
    try:
        from transformers.integrations.moe import grouped_mm_experts_forward
    except ImportError as error:
        raise Unavailable(NO_TRANSFORMERS) from error

    weights = side_by_side(E)

    def run(x, w1, v1, w2, topk_weights, topk_indices):
        gate_up, down = weights(w1, v1, w2)
        module = SimpleNamespace(num_experts=E, gate_up_proj=gate_up, down_proj=down.mT, has_gate=True, has_bias=False, is_transposed=False, act_fn=F.silu,
                                 has_post_expert_norm=False, _is_expert_parallel=False,
                                 _apply_gate=lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1])
        return grouped_mm_experts_forward(module, x, topk_indices.long(), topk_weights)

    return run


def experts_work(T, D, F_, A, touched, itemsize, mode="fwd"):
    """Three products a choice; the weights of the touched experts, x and y once. The backward does all of it twice more."""
    passes = 1 if mode == "fwd" else 3
    return Work(flops=passes * 6 * T * A * D * F_, bytes=passes * itemsize * (3 * touched * D * F_ + 2 * T * D), traffic="read")


def route_work(T, E, A, itemsize):
    """Logits in; weights, indices, order, inverse and row ends out."""
    return Work(20 * T * E, itemsize * T * E + 20 * T * A)


def _experts_cases(preset):
    for (D, F_, E, A), tokens in SIZES[preset]:
        touched = {(T, load): choices(T, E, A, load, generator(0)).unique().numel() for T in tokens for load in LOADS}
        for name, dtype in DTYPES.items():
            providers = (*own_providers(lambda backend, E=E: _ours(backend, E), "how many rows each expert has depends on the data"),
                         Provider("hf", lambda E=E, F_=F_: _hf_eager(E, F_)),
                         Provider("hf-grouped", lambda E=E: _hf_grouped(E)))
            for T in tokens:
                for load in LOADS:
                    inference = (Provider("terrazzo-packed", lambda E=E: _packed(E), ours=True), Provider("terrazzo-int8", lambda E=E: _packed(E, "int8"), nmse_limit=1e-3))
                    for mode in ("fwd", *(("bwd",) if trains(preset, T, TRAIN_TOKENS) else ())):
                        work = experts_work(T, D, F_, A, touched[T, load], dtype.itemsize, mode)
                        yield Case("fused_experts", f"{T} tokens {D}x{F_} {E}x{A} {load}", mode, name, work,
                                   _inputs(T, D, F_, E, A, load, dtype, mode == "bwd"), providers + (inference if mode == "fwd" else ()), lambda E=E: _ours("reference", E),
                                   differentiable=("x", "w1", "v1", "w2", "topk_weights"), arguments={"num_experts": E, "activation": "silu"})


def _route_ours(backend):
    def run(logits, top_k):
        weights, indices = terrazzo.moe_route(logits, top_k, norm_order=1, backend=backend)
        terrazzo.moe_permute(indices, logits.shape[1], backend=backend)
        return weights

    return run


def _route_hf():
    """The router of DBRX, and the masks by which its experts find their tokens."""

    def run(logits, top_k):
        weights, indices = logits.softmax(1, dtype=logits.dtype).topk(top_k, dim=-1)
        weights = weights / torch.norm(weights, p=1, dim=-1, keepdim=True)
        mask = F.one_hot(indices, num_classes=logits.shape[1] + 1).permute(2, 1, 0)
        for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            torch.where(mask[expert[0]])
        return weights

    return run


def _route_cases(preset):
    for name, dtype in DTYPES.items():
        for T, E, A in ROUTE_SIZES[preset]:

            def inputs(seed, T=T, E=E, A=A, dtype=dtype):
                return {"logits": torch.randn(T, E, generator=generator(seed)).to(dtype), "top_k": A}

            providers = (*own_providers(_route_ours), Provider("hf", _route_hf))
            yield Case("moe_route", f"{T} tokens {E}x{A} with permute", "fwd", name, route_work(T, E, A, dtype.itemsize), inputs, providers,
                       lambda: _route_ours("reference"), arguments={"norm_order": 1})


def cases(preset):
    return [*_experts_cases(preset), *_route_cases(preset)]
