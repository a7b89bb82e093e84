"""Cases of entropy patching and byte hash embeddings: see cases.py."""
import torch

from .cases_moe import sliced, wide


def int32(values):
    return None if values is None else torch.tensor(values, dtype=torch.int32)


def patch(B=2, L=37, V=260, threshold=4.9, scale=1.0, strided=False, cu=None, valid=None, masked=False, **options):
    """masked: some logits are -inf. The entropy of V = 260 normal logits is around 5.06, with scale 2 around 3.6."""

    def build(r, dtype):
        logits = sliced(r, B, L, V, dtype=dtype, scale=scale) if strided else r.normal(B, L, V, dtype=dtype, scale=scale)
        if masked:
            logits[..., ::3] = float("-inf")
        return dict(logits=logits, threshold=threshold, cu_seqlens=int32(cu), valid_lengths=int32(valid), **options)

    return build


ENTROPY_PATCH = {
    "threshold": patch(threshold=5.06),
    "monotonic": patch(threshold=0.02, monotonic=True),
    "combined": patch(threshold=5.04, threshold_add=0.01),
    "top": patch(threshold=None, patch_size=4.5),
    "max_length": patch(threshold=5.12, max_patch_length=4),
    "next": patch(threshold=5.06, include_next=True),
    "odd_sizes": patch(B=3, L=11, V=13, threshold=2.2),
    "one_position": patch(L=1),
    "two_positions": patch(L=2),
    "one_token": patch(V=1, L=5, threshold=0.1),
    "several_blocks": patch(B=1, L=5, V=5003, threshold=8.0),
    "peaked": patch(scale=12.0, threshold=0.7),
    "masked": patch(masked=True, threshold=4.6),
    "packed": patch(B=1, L=40, cu=[0, 1, 1, 15, 17, 40], threshold=5.06, max_patch_length=5),
    "valid": patch(B=4, valid=[37, 0, 1, 20], threshold=5.06),
    "strided": patch(strided=True, threshold=5.06),
    "width": patch(threshold=5.06, max_patches=50),
    "empty_batch": patch(B=0),
    "many": patch(B=2, L=700, V=40, threshold=3.2),
}


def lengths(B=3, L=50, threshold=0.9, cu=None, valid=None, strided=False, **options):
    def build(r, dtype):
        entropies = sliced(r, B, L, dtype=dtype) if strided else r.normal(B, L, dtype=dtype)
        return dict(entropies=entropies, threshold=threshold, cu_seqlens=int32(cu), valid_lengths=int32(valid), **options)

    return build


CUT = {name: lengths(**options) for name, options in {
    "threshold": {},
    "monotonic": dict(monotonic=True, threshold=0.5),
    "combined": dict(threshold=0.2, threshold_add=0.3),
    "top": dict(threshold=None, patch_size=4),
    "top_next": dict(threshold=None, patch_size=3.5, include_next=True, valid=[50, 7, 30]),
    "top_long_patches": dict(threshold=None, patch_size=40),
    "threshold_beside_patch_size": dict(patch_size=4),
    "max_length": dict(max_patch_length=3, threshold=1.5),
    "max_length_1": dict(max_patch_length=1),
    "next_valid": dict(include_next=True, valid=[50, 0, 3]),
    "packed": dict(B=1, cu=[0, 2, 9, 9, 50], monotonic=True, threshold=0.4),
    "packed_top": dict(B=1, cu=[0, 12, 13, 50], threshold=None, patch_size=2),
    "strided": dict(strided=True, max_patch_length=6),
    "one_position": dict(L=1),
    "three_positions": dict(L=3, threshold=0.0, threshold_add=0.0),
    "many": dict(B=5, L=3000, max_patch_length=20),
}.items()}


def text(mode, B=2, L=60, **options):
    def build(r, dtype):
        tokens = torch.randint(0, 260, (B, L), generator=r.generator)
        return dict(tokens=tokens.int() if mode == "space" else tokens, mode=mode, cu_seqlens=int32(options.get("cu")),
                    **{k: v for k, v in options.items() if k != "cu"})

    return build


TOKENS = {"space": text("space"), "space_max_length": text("space", max_patch_length=4), "space_offset": text("space", offset=0, include_next=True),
          "space_packed": text("space", B=1, cu=[0, 1, 30, 32, 60]), "static": text("static", patch_size=7), "bytes": text("bytes", include_next=True),
          "static_packed": text("static", B=1, cu=[0, 10, 60], patch_size=4, max_patch_length=3), "one_position": text("space", L=1)}


def ids(rows, length, **options):
    return lambda r, dtype: dict(lengths=torch.tensor(rows), length=length, **options)


IDS = {"plain": ids([[1, 2, 3], [6, 0, 0]], 6), "zeros": ids([[0, 2, 0, 0, 4]], 6), "past_the_end": ids([[3, 5, 1, -1], [2, 1, 0, 0]], 6, exact=False),
       "one_patch": ids([[9]], 9), "no_positions": ids([[0, 0]], 0)}


def hashes(B=2, L=30, D=24, V=20, vocab=50, group_sizes=(3, 4, 5), num_functions=1, rest=0, cu=None, strided=False, same=False, table_dtype=None,
           index=torch.int64):
    """rest: rows of the table behind those that can be hit; same: one byte everywhere, so that every position adds to the same rows."""

    def build(r, dtype):
        make = sliced if strided else lambda r, *shape, **kw: r.normal(*shape, **kw)
        tokens = torch.full((B, L), 7) if same else torch.randint(0, V, (B, L), generator=r.generator)
        return dict(tokens=tokens.to(index), table=make(r, num_functions * len(group_sizes) * vocab + rest, D, dtype=wide(dtype, table_dtype)),
                    byte_embedding=make(r, V, D, dtype=dtype), group_sizes=list(group_sizes), num_functions=num_functions, vocab=vocab, cu_seqlens=int32(cu))

    return build


HASHES = {
    "plain": hashes(),
    "blt": hashes(group_sizes=(3, 4, 5, 6, 7, 8), vocab=101, V=260, D=64),
    "functions": hashes(num_functions=3, group_sizes=(8, 2, 5), rest=3),
    "twelve_functions": hashes(num_functions=12, group_sizes=(4,), vocab=11),
    "one_group": hashes(group_sizes=(1,), vocab=1),
    "one_position": hashes(L=1),
    "no_positions": hashes(L=0),
    "odd_sizes": hashes(B=3, L=13, D=7),
    "one_channel": hashes(D=1),
    "same_byte": hashes(same=True, L=200, vocab=7),
    "wide": hashes(L=9, D=150),
    "packed": hashes(B=1, L=40, cu=[0, 3, 3, 20, 40]),
    "strided": hashes(strided=True),
    "fp32_table": hashes(table_dtype=torch.float32),
    "bf16_table": hashes(table_dtype=torch.bfloat16),
    "int32_tokens": hashes(index=torch.int32),
    "empty_batch": hashes(B=0),
    "many": hashes(B=2, L=600, D=40, vocab=997),
}


def hash_ids(B=2, L=30, V=260, group_sizes=(3, 4, 5), num_functions=1, vocab=500002, cu=None):
    return lambda r, dtype: dict(tokens=torch.randint(0, V, (B, L), generator=r.generator), group_sizes=list(group_sizes), num_functions=num_functions,
                                 vocab=vocab, cu_seqlens=int32(cu))


HASH_IDS = {"blt": hash_ids(group_sizes=(3, 4, 5, 6, 7, 8)), "functions": hash_ids(num_functions=13, vocab=1000003),
            "packed": hash_ids(B=1, L=40, cu=[0, 3, 3, 20, 40]), "many": hash_ids(B=3, L=3000)}


def make_cases(Case):
    """Every case of these ops; Case is cases.Case, which imports this module."""
    found = []
    for op, builders, grads, outputs in (
        ("entropy_patch", ENTROPY_PATCH, ("logits",), ("y", "starts", "patch_ids", "lengths", "counts")),
        ("patch_lengths_from_entropies", CUT, (), ("lengths",)),
        ("patch_lengths_from_tokens", TOKENS, (), ("lengths",)),
        ("patch_ids_from_lengths", IDS, (), ("ids",)),
        ("byte_hash_ids", HASH_IDS, (), ("ids",)),
        ("byte_hash_embedding", HASHES, ("table", "byte_embedding"), ("y",)),
    ):
        found += [Case(op, name, build, grads, outputs=outputs) for name, build in builders.items()]
    return found
