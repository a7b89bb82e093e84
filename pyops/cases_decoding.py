"""Cases of the decoding ops norm_linear and attention_update: see cases.py."""
import torch

from .cases_moe import sliced, wide


def norm_linear(T=3, K=24, N=20, others=(), norm=True, residual=False, activation=None, gated=False, strided=False, transposed=False,
                weight_dtype=None):
    """others: rows of weight2 and weight3."""

    def build(r, dtype):
        wdtype, make = wide(dtype, weight_dtype), sliced if strided else lambda r, *shape, **kw: r.normal(*shape, **kw)

        def weight(rows):
            return r.normal(K, rows, dtype=wdtype, scale=0.3).T if transposed else make(r, rows, K, dtype=wdtype, scale=0.3)

        found = dict(x=make(r, T, K, dtype=dtype), weight=weight(N), eps=1e-5, activation=activation, gated=gated)
        found |= {f"weight{i}": weight(rows) for i, rows in enumerate(others, 2)}
        columns = N if gated else N + sum(others)
        return found | dict(norm_weight=r.normal(K, dtype=wdtype) if norm else None, residual=make(r, T, columns, dtype=dtype) if residual else None)

    return build


NORM_LINEAR = {
    "qkv": norm_linear(others=(8, 8)),
    "two_weights": norm_linear(others=(37,), norm=False),
    "out": norm_linear(norm=False, residual=True),
    "gated": norm_linear(others=(20,), activation="silu", gated=True),
    "gated_residual_gelu": norm_linear(others=(20,), activation="gelu", gated=True, residual=True),
    "activation": norm_linear(activation="relu", residual=True),
    "one_row": norm_linear(T=1, K=37, N=9, others=(5, 1)),
    "long_rows": norm_linear(T=2, K=1500, N=67, others=(67,), activation="silu", gated=True),
    "many_rows": norm_linear(T=131, K=300, N=67, others=(5,), residual=True),
    "more_rows_than_a_block": norm_linear(T=500, K=16, N=33, norm=False),
    "strided": norm_linear(others=(7,), strided=True, residual=True),
    "transposed_weight": norm_linear(others=(7,), transposed=True),
    "bf16_weight": norm_linear(others=(20, 4), weight_dtype=torch.bfloat16),
    "fp32_weight": norm_linear(weight_dtype=torch.float32),
    "no_rows": norm_linear(T=0),
}


def attention_update(B=2, H=4, P=16, Hk=2, slots=24, length=20, lengths=None, R=None, rotary_rows=1, interleaved=False, window=None,
                     sliced_cache=False, strided=False, rotary_dtype=None):
    """R: pairs of channels that turn, None: no rotary embedding; lengths: of each row, instead of `length`."""

    def build(r, dtype):
        def cache():
            whole = r.normal(B, Hk, slots + 3, 2 * P, dtype=dtype) if sliced_cache else r.normal(B, Hk, slots, P, dtype=dtype)
            return whole[:, :, 1 : slots + 1, P:] if sliced_cache else whole

        def angles():
            return r.uniform(rotary_rows, R, dtype=wide(dtype, rotary_dtype), low=-1.0)

        width = (H + 2 * Hk) * P
        return dict(qkv=sliced(r, B, width, dtype=dtype) if strided else r.normal(B, width, dtype=dtype), k_cache=cache(), v_cache=cache(),
                    cache_seqlens=length if lengths is None else torch.tensor(lengths), rotary_cos=None if R is None else angles(),
                    rotary_sin=None if R is None else angles(), rotary_interleaved=interleaved, window=window)

    return build


ATTENTION_UPDATE = {
    "plain": attention_update(),
    "rotary": attention_update(R=8),
    "part_rotary_interleaved": attention_update(R=5, interleaved=True, rotary_rows=2),
    "window": attention_update(window=7, R=8, length=40),
    "window_unfilled": attention_update(window=24, length=3),
    "first": attention_update(length=0, R=8, interleaved=True),
    "ragged": attention_update(B=3, lengths=[0, 23, 11], R=4, rotary_rows=3),
    "ragged_window": attention_update(B=3, lengths=[2, 90, 11], window=12),
    "one_key_head": attention_update(H=6, Hk=1),
    "heads_of_their_own": attention_update(H=3, Hk=3, P=7),
    "odd_width": attention_update(P=70, R=9, slots=33, length=31),
    "long": attention_update(B=1, H=8, P=64, Hk=4, slots=700, length=641, R=32, interleaved=True),
    "sliced_cache": attention_update(sliced_cache=True, R=3),
    "strided": attention_update(strided=True),
    "fp32_angles": attention_update(R=8, rotary_dtype=torch.float32),
    "no_rows": attention_update(B=0),
}


def make_cases(Case):
    """Every case of these ops; Case is cases.Case, which imports this module."""
    yield from (Case("norm_linear", name, build) for name, build in NORM_LINEAR.items())
    yield from (Case("attention_update", name, build, updated=("k_cache", "v_cache")) for name, build in ATTENTION_UPDATE.items())
