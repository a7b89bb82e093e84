"""Cases of patch_cross_attention: BLT's encoder (patches ask) and decoder (bytes ask) at the shapes of BLT-1B and 8B."""
import torch
import torch.nn.functional as F

import terrazzo

from .cases import DTYPES, NO_TRANSFORMERS, Case, Unavailable, generator, own_providers, peers, trains
from .patch_reduce import patch_ids
from .roofline import Work

K = 2  # rows of a patch
# heads, head width, bytes. Hugging Face's mask alone takes 30 GB at 128 k bytes.
SIZES = {"blt": ((16, 64, (1024, 2048, 4096, 8192, 32768, 131072)), (32, 64, (4096,))), "tiny": ((2, 8, (40,)),)}
TRAIN_BYTES = (40, 4096, 8192, 32768, 131072)
MASK_BYTES = 8192     # the longest text for providers with a mask
REFERENCE_BYTES = 4096
CHECKED_PATCHES = 64  # what the oracle sees: patches know nothing of each other


def _ours(backend, queries):
    return lambda q, k, v, patch_ids: terrazzo.patch_cross_attention(q, k, v, patch_ids, queries=queries, k_per_patch=K, backend=backend)


def _hf(queries, L):
    try:
        from transformers.models.blt.modeling_blt import _prepare_patch_cross_attention_mask
    except ImportError as error:
        raise Unavailable(NO_TRANSFORMERS) from error
    if L > MASK_BYTES:
        raise Unavailable(f"its mask and scores of {L} bytes need {L * L / 4.5 * K * 8 / 1e9:.0f} GB and more")

    def run(q, k, v, patch_ids):
        patches = queries == "patches"
        S = (q if patches else k).shape[1] // K
        mask = _prepare_patch_cross_attention_mask(patch_ids, S, patch_ids.shape[1], patches, K, q.dtype)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=q.shape[3] ** -0.5).transpose(1, 2)

    return run


def _narrow(L, queries):
    """Cuts everything to the first patches and their bytes."""
    ids, S = patch_ids(L)
    patches = min(S, CHECKED_PATCHES)
    rows, count = patches * K, int((ids < patches).sum())
    of_query, of_key = (rows, count) if queries == "patches" else (count, rows)
    cut = {"q": of_query, "k": of_key, "v": of_key, "patch_ids": count, "grad": of_query}

    def narrow(inputs, outputs=None):
        if outputs is None:
            return {name: value[:, : cut[name]].contiguous() for name, value in inputs.items()}
        return tuple(out[:, :n] for out, n in zip(outputs, (of_query, of_query, of_key, of_key)))

    return narrow


def _inputs(L, H, P, queries, dtype, mode):
    ids, S = patch_ids(L)
    Lq, Lk = (S * K, L) if queries == "patches" else (L, S * K)

    def make(seed):
        g = generator(seed)
        shapes = {"q": Lq, "k": Lk, "v": Lk} | ({"grad": Lq} if mode == "bwd" else {})
        return {name: torch.randn(1, n, H, P, generator=g).to(dtype) for name, n in shapes.items()} | {"patch_ids": ids.clone()}

    return make


def work(L, S, H, P, queries, itemsize, mode="fwd"):
    """Every byte meets the K rows of its patch. Backward: q, dy, dq and k, v, dk, dv as well."""
    asks, asked = (S * K, L) if queries == "patches" else (L, S * K)
    rows = 2 * asks + 2 * asked + (3 * asks + 4 * asked if mode == "bwd" else 0)
    return Work((4 if mode == "fwd" else 14) * L * K * H * P, itemsize * rows * H * P)


def cases(preset):
    found = []
    for name, dtype in DTYPES.items():
        for H, P, lengths in SIZES[preset]:
            for L in lengths:
                S = patch_ids(L)[1]
                for queries in ("patches", "bytes"):
                    for mode in ("fwd", *(("bwd",) if trains(preset, L, TRAIN_BYTES) else ())):
                        why = None if L <= REFERENCE_BYTES else f"its scores of all pairs need {4 * H * L * S * K / 1e9:.0f} GB and more"
                        providers = (*own_providers(lambda backend, queries=queries: _ours(backend, queries), reference=why),
                                     *peers("hf", lambda queries=queries, L=L: _hf(queries, L)))
                        found.append(Case("patch_cross_attention", f"{queries} {L} bytes {H}x{P}", mode, name,
                                          work(L, S, H, P, queries, dtype.itemsize, mode), _inputs(L, H, P, queries, dtype, mode),
                                          providers, lambda queries=queries: _ours("reference", queries), differentiable=("q", "k", "v"),
                                          narrow=_narrow(L, queries), arguments={"queries": queries, "k_per_patch": K}))
    return found
