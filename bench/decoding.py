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
        return {"qkv": torch.randn(B, (H + 2 * Hk) * P, generator=g).to(dtype), "k_cache": torch.randn(B, Hk, kept + 1, P, generator=g).to(dtype),
                "v_cache": torch.randn(B, Hk, kept + 1, P, generator=g).to(dtype), "rotary_cos": angle.cos().to(dtype), "rotary_sin": angle.sin().to(dtype)}

    return make


def cases(preset):
    found, (layers, attentions) = [], SIZES[preset]
    for name, dtype in DTYPES.items():
        for K, kv, ffn, all_rows in layers:
            for job, rows, options in (("qkv", (K, kv, kv), {"eps": 1e-5, "gated": False}), ("gate and up", (ffn, ffn), {"eps": 1e-5, "gated": True, "activation": "silu"})):
                for T in all_rows:
                    found.append(Case("norm_linear", f"{T} {job} {K} to {'+'.join(map(str, rows))}", "decode", name, layers_work(T, K, sum(rows), dtype.itemsize),
                                      _layer_inputs(T, K, rows, dtype), (*own_providers(lambda backend, o=options: _layers(backend, o)), *peers("torch", lambda o=options: _torch_layers(o))),
                                      lambda o=options: _layers("reference", o), arguments=options))
        for H, Hk, P, kept, B in attentions:
            found.append(Case("attention_update", f"{B}x{H}/{Hk}x{P} behind {kept}", "decode", name, attention_work(B, H, Hk, P, kept, dtype.itemsize),
                              _attention_inputs(B, H, Hk, P, kept, dtype), (*own_providers(_attend), *peers("torch", lambda: _torch_attend)),
                              lambda: _attend("reference"), mutated=("k_cache", "v_cache")))
    return found
