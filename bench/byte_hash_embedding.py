"""Cases of byte hash embeddings: six n-gram sizes, a table far larger than any cache (BLT-1B's own has 500002 rows a size)."""
from types import SimpleNamespace

import torch

import terrazzo

from .cases import DTYPES, NO_TRANSFORMERS, Case, Unavailable, generator, own_providers, peers
from .roofline import Work

GROUP_SIZES = (3, 4, 5, 6, 7, 8)
BYTES = 260
# preset -> [(bytes, D, rows a size)]
SIZES = {"blt": ((1024, 1024, 20011), (8192, 1024, 20011)), "tiny": ((9, 16, 11),)}


def _inputs(L, D, vocab, dtype, with_grad):
    def make(seed):
        g = generator(seed)
        inputs = {
            "tokens": torch.randint(0, BYTES, (1, L), generator=g),
            "table": torch.empty(len(GROUP_SIZES) * vocab, D).normal_(generator=g).to(dtype),
            "byte_embedding": torch.randn(BYTES, D, generator=g).to(dtype),
        }
        return inputs | ({"grad": torch.randn(1, L, D, generator=g).to(dtype)} if with_grad else {})

    return make


def _ours(backend, vocab):
    def run(tokens, table, byte_embedding):
        return terrazzo.byte_hash_embedding(tokens, table, byte_embedding, GROUP_SIZES, 1, vocab, backend=backend)

    return run


def _hf(vocab):
    try:
        from transformers.models.blt.modeling_blt import compute_hash_embeddings
    except ImportError as error:
        raise Unavailable(NO_TRANSFORMERS) from error

    def run(tokens, table, byte_embedding):
        encoder = SimpleNamespace(embed_tokens=lambda ids: torch.nn.functional.embedding(ids, byte_embedding))
        lookup = lambda ids: torch.nn.functional.embedding(ids, table)  # noqa: E731
        return compute_hash_embeddings(tokens, encoder, lookup, 1, list(GROUP_SIZES), vocab)

    return run


def work(L, D, vocab, itemsize, mode="fwd"):
    """Forward: every row read once, the sum written. Backward besides: a dense gradient as large as the table, the sum's
    gradient read for every row and for the byte, and both gradients' rows written."""
    rows = L * D * itemsize
    moved = (len(GROUP_SIZES) + 2) * rows
    if mode == "bwd":
        moved += len(GROUP_SIZES) * vocab * D * itemsize + 2 * (len(GROUP_SIZES) + 1) * rows
    return Work(flops=len(GROUP_SIZES) * L * D, bytes=moved, traffic="read" if mode == "fwd" else "copy")


def cases(preset):
    found = []
    for L, D, vocab in SIZES[preset]:
        for name, dtype in DTYPES.items():
            providers = (*own_providers(lambda backend, vocab=vocab: _ours(backend, vocab)), *peers("hf", lambda vocab=vocab: _hf(vocab)))
            for mode in ("fwd", "bwd"):
                found.append(Case("byte_hash_embedding", f"1x{L}x{D}", mode, name,
                                  work(L, D, vocab, dtype.itemsize, mode), _inputs(L, D, vocab, dtype, mode == "bwd"), providers,
                                  lambda vocab=vocab: _ours("reference", vocab), differentiable=("table", "byte_embedding"),
                                  arguments={"group_sizes": GROUP_SIZES, "num_functions": 1, "vocab": vocab}))
    return found
