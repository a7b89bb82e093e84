"""Cases of entropy patching: the entropies of a text's logits, and the lengths and ids that follow from them."""
import torch

import terrazzo

from .cases import DTYPES, NO_TRANSFORMERS, Case, Provider, Unavailable, generator, own_providers, peers, trains
from .roofline import Work

VOCAB = 260
FLOPS_PER_EXP = 40  # a polynomial exp in AVX2 runs at a fortieth of the multiply-add rate
SIZES = {"blt": (1024, 8192, 32768, 131072), "tiny": (9, 40)}
TRAIN_LENGTHS = (9, 8192)
HF_IDS_LENGTHS = (9, 40, 1024, 8192)  # transformers compares every position with every patch
THRESHOLD = 1.335442066192627


def _logits(L, dtype, with_grad):
    """Entropies like a byte model's: most near zero, some over the threshold, about 4.5 bytes a patch."""

    def make(seed):
        g = generator(seed)
        sharpness = torch.where(torch.rand(1, L, 1, generator=g) < 0.22, 2.0, 9.0)
        inputs = {"logits": (torch.randn(1, L, VOCAB, generator=g) * sharpness).to(dtype)}
        return inputs | ({"grad": torch.randn(1, L, generator=g)} if with_grad else {})

    return make


def _ours(backend):
    return lambda logits: terrazzo.entropy_patch(logits, THRESHOLD, backend=backend).entropies


def _hf():
    return lambda logits: torch.distributions.Categorical(logits=logits).entropy().float()


def _entropies(L):
    def make(seed):
        g = generator(seed)
        return {"entropies": torch.where(torch.rand(1, L, generator=g) < 0.22, 2.0, 0.5) + torch.rand(1, L, generator=g) * 0.1}

    return make


def _ours_cut(backend):
    def run(entropies):
        found = terrazzo.patches_from_entropies(entropies, THRESHOLD, include_next=True, backend=backend)
        return found.lengths, found.patch_ids[:, :-1]

    return run


def _hf_cut(L):
    if L not in HF_IDS_LENGTHS:
        raise Unavailable(f"transformers' ids of {L} positions take positions x patches bytes and minutes")
    try:
        from transformers.models.blt.modeling_blt import BltModel, BltPatcher
    except ImportError as error:
        raise Unavailable(NO_TRANSFORMERS) from error

    def run(entropies):
        lengths = BltPatcher.patch_lengths_from_entropies(entropies, L, threshold=THRESHOLD)
        ids = BltModel._patch_ids_from_lengths(None, lengths, L)
        lengths[:, -1] += 1  # the byte behind the text counts here
        return lengths.int(), ids.int()

    return run


def work(L, itemsize, mode="fwd"):
    """One pass over the logits; with the backward three."""
    passes = 1 if mode == "fwd" else 3
    return Work(flops=passes * FLOPS_PER_EXP * L * VOCAB, bytes=passes * itemsize * L * VOCAB, traffic="read")


def cases(preset):
    found = []
    for L in SIZES[preset]:
        for name, dtype in DTYPES.items():
            for mode in ("fwd", *(("bwd",) if trains(preset, L, TRAIN_LENGTHS) else ())):
                rounds_once = mode == "fwd" or dtype in (torch.float32, torch.float64)  # the peer's gradient passes through 16 bits several times
                providers = (*own_providers(_ours), *(peers("hf", _hf) if rounds_once else ()))
                found.append(Case("entropy_patch", f"1x{L}x{VOCAB}", mode, name,
                                  work(L, dtype.itemsize, mode), _logits(L, dtype, mode == "bwd"), providers,
                                  lambda: _ours("reference"), differentiable=("logits",), arguments={"threshold": THRESHOLD}))
        providers = (*own_providers(_ours_cut, "the sizes of its steps depend on the data"), Provider("hf", lambda L=L: _hf_cut(L)))
        found.append(Case("patch_lengths_from_entropies", f"1x{L} with ids", "fwd", "fp32", Work(0, 13 * L), _entropies(L), providers,
                          lambda: _ours_cut("reference"), arguments={"threshold": THRESHOLD, "include_next": True}))
    return found
