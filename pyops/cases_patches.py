"""Cases of the patch ops and of local attention: see cases.py."""
import torch


def ids(*rows, dtype=torch.int32):
    """Rows of patch ids from patch lengths; (length, id) sets an id by hand and counting goes on behind it."""
    found = []
    for row in rows:
        line, next_id = [], 0
        for entry in row:
            length, patch = entry if isinstance(entry, tuple) else (entry, next_id)
            line += [patch] * length
            next_id = patch + 1 if patch >= 0 else next_id
        found.append(line)
    return torch.tensor(found, dtype=dtype)


LENGTHS = ((3, 1, 7, 2, 9, 1), (1, 1, 4, 0, 12, 5))  # an empty patch in the second row
RAGGED = (((2, -1), 3, 1, 7, (4, 9)), (1, 1, 5, (2, -1), 8))  # in front, behind (id 9 of 6 patches) and in the middle


def reduce(lengths=LENGTHS, S=6, D=24, kind="amax", strided=False, ties=False, index=torch.int32):
    def build(r, dtype):
        patch_ids = ids(*lengths, dtype=index)
        B, L = patch_ids.shape
        h = r.normal(B, L, 2 * D, dtype=dtype)[:, :, ::2] if strided else r.normal(B, L, D, dtype=dtype)
        return dict(h=h.round() if ties else h, patch_ids=patch_ids, num_patches=S, reduce=kind)

    return build


REDUCE = {
    "amax": reduce(),
    "mean": reduce(kind="mean"),
    "amin": reduce(kind="amin"),
    "ties": reduce(ties=True),
    "ties_amin_odd_width": reduce(ties=True, kind="amin", D=7),
    "ragged": reduce(RAGGED),
    "ragged_mean": reduce(RAGGED, kind="mean", D=37),
    "more_patches_than_needed": reduce(S=11),
    "fewer_patches_than_ids": reduce(S=3, kind="mean"),
    "one_patch": reduce(((40,),), S=1),
    "patches_of_one": reduce(((1,) * 40,), S=40),
    "no_patch_at_all": reduce((((20, -1),),), S=4),
    "one_byte": reduce(((1,), (1,)), S=2),
    "int64_ids": reduce(index=torch.int64),
    "strided": reduce(strided=True, D=33),
    "wide": reduce(D=1100),
}


def heads_last(r, B, L, H, P, dtype, strided):
    """(B, L, H, P), or the same as a view of (B, H, L, 2P)."""
    return r.normal(B, H, L, 2 * P, dtype=dtype).transpose(1, 2)[..., P:] if strided else r.normal(B, L, H, P, dtype=dtype)


def cross(queries, lengths=LENGTHS, S=6, K=1, H=4, Hk=None, P=16, strided=False, masked=False, index=torch.int32, **extra):
    def build(r, dtype):
        patch_ids = ids(*lengths, dtype=index)
        B, L = patch_ids.shape
        Lq, Lk = (S * K, L) if queries == "patches" else (L, S * K)
        q = heads_last(r, B, Lq, H, P, dtype, strided)
        k, v = (heads_last(r, B, Lk, Hk or H, P, dtype, strided) for _ in range(2))
        key_mask = r.uniform(B, Lk, dtype=torch.float64) < 0.7 if masked else None
        return dict(q=q, k=k, v=v, patch_ids=patch_ids, queries=queries, k_per_patch=K, key_mask=key_mask) | extra

    return build


def _cross_cases():
    for queries in ("patches", "bytes"):
        yield from {
            queries: cross(queries),
            f"{queries}_two_a_patch": cross(queries, K=2),
            f"{queries}_grouped_heads": cross(queries, K=2, H=6, Hk=2, P=20),
            f"{queries}_one_key_head": cross(queries, K=2, H=40, Hk=1, P=8),
            f"{queries}_many_heads": cross(queries, K=2, H=16, P=64),
            f"{queries}_tail_of_heads": cross(queries, H=19, P=12),
            f"{queries}_ragged": cross(queries, RAGGED, K=2),
            f"{queries}_window": cross(queries, K=2, window=3),
            f"{queries}_window_ragged_masked": cross(queries, RAGGED, K=2, H=4, Hk=2, masked=True, window=2),
            f"{queries}_window_of_all": cross(queries, window=1000),
            f"{queries}_masked": cross(queries, K=2, masked=True),
            f"{queries}_strided_scale": cross(queries, strided=True, P=9, scale=0.3),
            f"{queries}_packed": cross(queries, ((3, 1, 7, 2, 9, 1),), cu_seqlens=torch.tensor([0, 4, 4, 13, 23], dtype=torch.int32)),
            f"{queries}_one_patch": cross(queries, ((50,),), S=1, K=2, num_patches=1),
            f"{queries}_patches_of_one": cross(queries, ((1,) * 30,), S=30),
            f"{queries}_no_patch_at_all": cross(queries, (((9, -1),),), S=3),
            f"{queries}_fewer_patches_than_ids": cross(queries, S=3),
            f"{queries}_one_channel": cross(queries, H=1, P=1, index=torch.int64),
            f"{queries}_long_patches": cross(queries, ((150, 3, 90, 1),), S=4, K=2, H=2),
            f"{queries}_long_padding": cross(queries, (((70, -1), 5, 2, (90, -1), (3, 9), 4, (40, -1)), (6, (150, -1), (58, 11))), S=13, K=2, H=2),
            f"{queries}_negative_scale": cross(queries, scale=-0.4, K=2, window=2),
            f"{queries}_wide_heads": cross(queries, K=2, H=1, P=130),
            f"{queries}_many_patches": cross(queries, ((2, 3, 1, 4) * 60, (4, 3, 2, 1) * 60), S=240, K=2),
        }.items()


def local(B=2, L=150, H=4, Hk=None, P=16, window=20, padding=None, strided=False, **extra):
    """padding: (left, right) keys of the first row that nobody sees."""

    def build(r, dtype):
        q = heads_last(r, B, L, H, P, dtype, strided)
        k, v = (heads_last(r, B, L, Hk or H, P, dtype, strided) for _ in range(2))
        key_mask = None
        if padding is not None:
            key_mask = torch.ones(B, L, dtype=torch.bool)
            key_mask[0, : padding[0]] = False
            key_mask[0, L - padding[1] :] = False
        return dict(q=q, k=k, v=v, window=window, key_mask=key_mask) | extra

    return build


LOCAL = {
    "causal": local(),
    "both_sides": local(causal=False),
    "window_of_blocks": local(L=260, window=128, H=2),
    "window_of_one": local(L=70, window=1),
    "window_over_length": local(L=70, window=500),
    "window_over_length_both_sides": local(L=70, window=500, causal=False),
    "grouped_heads": local(H=6, Hk=2, P=20, window=33),
    "one_key_head": local(H=5, Hk=1, P=7, L=67, window=9),
    "left_padding": local(padding=(40, 0)),
    "right_padding_both_sides": local(padding=(0, 30), causal=False, H=4, Hk=2),
    "nothing_seen": local(padding=(150, 0), B=1),
    "packed": local(B=1, cu_seqlens=torch.tensor([0, 1, 1, 65, 70, 150], dtype=torch.int32)),
    "packed_grouped_masked": local(B=1, H=4, Hk=2, padding=(3, 4), causal=False, cu_seqlens=torch.tensor([0, 64, 150], dtype=torch.int32)),
    "strided_scale": local(strided=True, P=9, scale=0.3),
    "negative_scale": local(L=100, scale=-0.4, H=2),
    "one_position": local(L=1),
    "no_positions": local(L=0),
    "several_runs": local(B=1, L=700, H=2, P=64, window=100),
    "wide_heads": local(B=1, H=1, P=130, L=90),
}


def make_cases(Case):
    """Every case of these ops; Case is cases.Case, which imports this module."""
    found = [Case("patch_reduce", name, build, ("h",)) for name, build in REDUCE.items()]
    found += [Case("patch_cross_attention", name, build, ("q", "k", "v")) for name, build in _cross_cases()]
    # With a single key the gradients of q and k are zero; what rounding leaves has no scale to be judged by.
    return found + [Case("local_attention", name, build, ("v",) if name in ("window_of_one", "one_position") else ("q", "k", "v"))
                    for name, build in LOCAL.items()]
