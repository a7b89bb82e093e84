"""Cases of the decoding ops: norm_linear as a layer's projections and its gated pair, attention_update over a filled cache, against torch's calls."""
import torch
import torch.nn.functional as F

import terrazzo

from .cases import DTYPES, Case, generator, own_providers, peers
from .roofline import Work

# preset -> (width, key heads' width, ffn width, rows), [(heads, key heads, head width, positions kept, rows)]
SIZES = {
    "blt": (((512, 512, 1408, (1, 8)), (1024, 1024, 2816, (1,))), ((8, 8, 64, 511, 1), (8, 8, 64, 511, 8))),
    "dbrx": (((2048, 512, 3584, (1, 8)),), ((16, 4, 128, 1023, 1), (16, 4, 128, 8191, 1))),
    "tiny": (((16, 8, 24, (1, 3)),), ((4, 2, 8, 9, 2),)),
}


def _layers(backend, options):
    return lambda **inputs: terrazzo.norm_linear(**inputs, **options, backend=backend)


def _torch_layers(options):
    def run(x, norm_weight, weight, weight2, weight3=None):
        n = F.rms_norm(x, x.shape[1:], norm_weight, options["eps"])
        products = [F.linear(n, w) for w in (weight, weight2, weight3) if w is not None]
        return F.silu(products[0]) * products[1] if options["gated"] else torch.cat(products, 1)

    return run


def layers_work(T, K, columns, itemsize):
    """The weights, once."""
    return Work(2 * T * K * columns, itemsize * (K * columns + T * (K + columns)), "read")


def _layer_inputs(T, K, rows, dtype):
    def make(seed):
        g = generator(seed)
        names = ("weight", "weight2", "weight3")
        return {"x": torch.randn(T, K, generator=g).to(dtype), "norm_weight": torch.randn(K, generator=g).to(dtype),
                **{name: (torch.randn(n, K, generator=g) * K**-0.5).to(dtype) for name, n in zip(names, rows)}}

    return make


def _attend(backend):
    return lambda qkv, k_cache, v_cache, rotary_cos, rotary_sin: terrazzo.attention_update(
        qkv, k_cache, v_cache, k_cache.shape[2] - 1, rotary_cos=rotary_cos, rotary_sin=rotary_sin, backend=backend)


def _torch_attend(qkv, k_cache, v_cache, rotary_cos, rotary_sin):
    B, Hk, slots, P = k_cache.shape
    q, k, v = qkv.unflatten(1, (-1, P)).split([qkv.shape[1] // P - 2 * Hk, Hk, Hk], 1)

    def turn(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * rotary_cos - b * rotary_sin, b * rotary_cos + a * rotary_sin], -1)

    k_cache[:, :, -1], v_cache[:, :, -1] = turn(k), v
    return F.scaled_dot_product_attention(turn(q)[:, :, None], k_cache, v_cache, enable_gqa=q.shape[1] != Hk).flatten(1)


def attention_work(B, H, Hk, P, kept, itemsize):
    """Keys and values, once."""
    return Work(4 * B * H * (kept + 1) * P, 2 * itemsize * B * Hk * (kept + 1) * P, "read")


def _attention_inputs(B, H, Hk, P, kept, dtype):
    def make(seed):
        g = generator(seed)
        angle = torch.rand(1, P // 2, generator=g) + 0.1
        shapes = {"qkv": (B, (H + 2 * Hk) * P), "k_cache": (B, Hk, kept + 1, P), "v_cache": (B, Hk, kept + 1, P)}
        drawn = {name: torch.randn(*shape, generator=g).to(dtype) for name, shape in shapes.items()}
        return drawn | {"rotary_cos": angle.cos().to(dtype), "rotary_sin": angle.sin().to(dtype)}

    return make


JOBS = (("qkv", {"eps": 1e-5, "gated": False}), ("gate and up", {"eps": 1e-5, "gated": True, "activation": "silu"}))


def _layer_case(T, job, options, K, rows, name, dtype):
    providers = (*own_providers(lambda backend: _layers(backend, options)), *peers("torch", lambda: _torch_layers(options)))
    return Case("norm_linear", f"{T} {job} {K} to {'+'.join(map(str, rows))}", "decode", name, layers_work(T, K, sum(rows), dtype.itemsize),
                _layer_inputs(T, K, rows, dtype), providers, lambda: _layers("reference", options), arguments=options)


def cases(preset):
    found, (layers, attentions) = [], SIZES[preset]
    for name, dtype in DTYPES.items():
        for K, kv, ffn, all_rows in layers:
            for job, options in JOBS:
                found += [_layer_case(T, job, options, K, (ffn, ffn) if options["gated"] else (K, kv, kv), name, dtype) for T in all_rows]
        for H, Hk, P, kept, B in attentions:
            providers = (*own_providers(_attend), *peers("torch", lambda: _torch_attend))
            work = attention_work(B, H, Hk, P, kept, dtype.itemsize)
            found.append(Case("attention_update", f"{B}x{H}/{Hk}x{P} behind {kept}", "decode", name, work, _attention_inputs(B, H, Hk, P, kept, dtype),
                              providers, lambda: _attend("reference"), mutated=("k_cache", "v_cache")))
    return found
