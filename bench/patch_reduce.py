"""Cases of patch_reduce: pooling of bytes to patches of 4.5 bytes on average, at BLT's width."""
import torch

import terrazzo

from .cases import DTYPES, NO_TRANSFORMERS, Case, Unavailable, generator, own_providers, peers, trains
from .roofline import Work

SIZES = {"blt": ((1024, 1024), (4096, 1024), (8192, 1024), (32768, 1024)), "tiny": ((40, 16),)}  # bytes, width
LONGEST = 8  # patches are 1 to 8 bytes long, as likely each
TRAIN_BYTES = (40, 4096)


def patch_ids(L):
    """(1, L) int32, the same for every seed, and the number of patches."""
    ids = torch.arange(L).repeat_interleave(torch.randint(1, LONGEST + 1, (L,), generator=generator(0)))[:L]
    return ids.int()[None], int(ids[-1]) + 1


def _ours(backend, S, kind):
    return lambda h, patch_ids: terrazzo.patch_reduce(h, patch_ids, S, kind, backend=backend)


def _hf(S):
    try:
        from transformers.models.blt.modeling_blt import BltLocalEncoder
    except ImportError as error:
        raise Unavailable(NO_TRANSFORMERS) from error
    return lambda h, patch_ids: BltLocalEncoder.patch_reduce(None, h, S, patch_ids.long())


def work(L, S, D, itemsize, mode="fwd"):
    """Bytes in, patches out; with the backward three times that."""
    return Work(L * D, itemsize * (L + S) * (1 if mode == "fwd" else 3) * D)


def cases(preset):
    found = []
    for name, dtype in DTYPES.items():
        for L, D in SIZES[preset]:
            ids, S = patch_ids(L)
            for kind in ("amax", "mean"):
                for mode in ("fwd", *(("bwd",) if trains(preset, L, TRAIN_BYTES) else ())):

                    def inputs(seed, L=L, D=D, S=S, ids=ids, dtype=dtype, mode=mode):
                        g = generator(seed)
                        made = {"h": torch.randn(1, L, D, generator=g).to(dtype), "patch_ids": ids.clone()}
                        return made | ({"grad": torch.randn(1, S, D, generator=g).to(dtype)} if mode == "bwd" else {})

                    providers = (*own_providers(lambda backend, S=S, kind=kind: _ours(backend, S, kind)),
                                 *(peers("hf", lambda S=S: _hf(S)) if kind == "amax" else ()))  # transformers pools by amax alone
                    found.append(Case("patch_reduce", f"{kind} {L} bytes {D}", mode, name, work(L, S, D, dtype.itemsize, mode), inputs, providers,
                                      lambda S=S, kind=kind: _ours("reference", S, kind), differentiable=("h",), arguments={"num_patches": S, "reduce": kind}))
    return found
