"""Cases of the mixture-of-experts ops and the linear layer: see cases.py."""
import torch


def wide(dtype, other):
    """`other` beside a low-precision or float32 dtype; float64 goes with float64 only."""
    return dtype if other is None or dtype == torch.float64 else other


def sliced(r, *shape, dtype, scale=1.0):
    """Every second column of a wider tensor, behind an offset."""
    return r.normal(*shape[:-1], 2 * shape[-1] + 3, dtype=dtype, scale=scale)[..., 3::2]


def row_ends(*sizes):
    return torch.tensor(sizes).cumsum(0).int()


# ---- grouped products --------------------------------------------------------------------------------------


def grouped(sizes=(3, 5, 0, 9), K=24, N=20, rest=0, transposed=False, strided=False, bias=False, weight_dtype=None):
    """`rest` rows behind the last group; transposed: b is a view of (E, N, K)."""

    def build(r, dtype):
        E, wdtype, make = len(sizes), wide(dtype, weight_dtype), sliced if strided else lambda r, *shape, **kw: r.normal(*shape, **kw)
        b = make(r, E, N, K, dtype=wdtype, scale=0.3).mT if transposed else make(r, E, K, N, dtype=wdtype, scale=0.3)
        return dict(a=make(r, sum(sizes) + rest, K, dtype=dtype), b=b, offs=row_ends(*sizes),
                    bias=make(r, E, N, dtype=wdtype) if bias else None)

    return build


GROUPED = {
    "mixed_sizes": grouped(),
    "one_row": grouped(sizes=(0, 1, 0)),
    "no_rows": grouped(sizes=(0, 0)),
    "one_group_takes_all": grouped(sizes=(0, 0, 31, 0)),
    "one_expert": grouped(sizes=(33,)),
    "empty_first_and_last": grouped(sizes=(0, 7, 6, 0)),
    "rows_behind": grouped(rest=6),
    "only_rows_behind": grouped(sizes=(0, 0), rest=5),
    "transposed": grouped(transposed=True),
    "bias": grouped(bias=True),
    "bias_transposed_rows_behind": grouped(bias=True, transposed=True, rest=3),
    "odd_sizes": grouped(sizes=(13, 1, 7), K=7, N=5),
    "one_by_one": grouped(sizes=(2, 3), K=1, N=1),
    "several_tiles": grouped(sizes=(70, 3, 131), K=300, N=67),
    "several_tiles_transposed": grouped(sizes=(70, 3, 131), K=300, N=67, transposed=True),
    "rows_fill_panels": grouped(sizes=(64, 20, 96, 33), K=320, N=67, transposed=True),
    "strided": grouped(strided=True, bias=True),
    "strided_transposed": grouped(strided=True, transposed=True),
    "bf16_weights": grouped(weight_dtype=torch.bfloat16, bias=True),
    "fp32_weights": grouped(weight_dtype=torch.float32),
}


def gmm(sizes=(4, 0, 9, 2), K=12, N=10, trans_a=False, trans_b=False, index=torch.int64):
    def build(r, dtype):
        E, T = len(sizes), sum(sizes)
        b = r.normal(*((T, N) if trans_a else (E, N, K) if trans_b else (E, K, N)), dtype=dtype, scale=0.3)
        return dict(a=r.normal(T, K, dtype=dtype), b=b, batch_sizes=torch.tensor(sizes, dtype=index), trans_a=trans_a, trans_b=trans_b)

    return build


GMM = {"plain": gmm(), "trans_b": gmm(trans_b=True, index=torch.int32), "trans_a": gmm(trans_a=True), "trans_a_no_rows": gmm(sizes=(0, 0), trans_a=True)}


def linear(shape=(6, 24), N=20, bias=True, activation=None, strided=False, transposed=False, weight_dtype=None):
    def build(r, dtype):
        wdtype, K = wide(dtype, weight_dtype), shape[-1]
        weight = r.normal(K, N, dtype=wdtype, scale=0.3).T if transposed else r.normal(N, K, dtype=wdtype, scale=0.3)
        return dict(x=sliced(r, *shape, dtype=dtype) if strided else r.normal(*shape, dtype=dtype), weight=weight,
                    bias=r.normal(N, dtype=wdtype) if bias else None, activation=activation)

    return build


LINEAR = {
    "plain": linear(),
    "no_bias": linear(bias=False),
    "one_row": linear(shape=(1, 37)),
    "one_dimension": linear(shape=(24,)),
    "three_dimensions": linear(shape=(2, 5, 24), activation="silu"),
    "gelu": linear(activation="gelu"),
    "gelu_tanh": linear(activation="gelu_pytorch_tanh"),
    "relu": linear(activation="relu"),
    "relu2": linear(activation="relu2"),
    "odd_sizes": linear(shape=(7, 13), N=9),
    "several_tiles": linear(shape=(131, 300), N=67),
    "rows_fill_panels": linear(shape=(48, 1100), N=35, activation="silu"),
    "several_tiles_long_sums": linear(shape=(300, 1664), N=40),
    "strided": linear(strided=True),
    "transposed_weight": linear(transposed=True),
    "bf16_weight": linear(weight_dtype=torch.bfloat16),
    "empty_batch": linear(shape=(0, 24)),
}

# ---- routing -----------------------------------------------------------------------------------------------


def route(T=9, E=16, top_k=4, bias=False, strided=False, **options):
    def build(r, dtype):
        return dict(router_logits=sliced(r, T, E, dtype=dtype) if strided else r.normal(T, E, dtype=dtype), top_k=top_k,
                    bias=r.normal(E, dtype=dtype, scale=0.2) if bias else None, **options)

    return build


ROUTE = {
    "softmax": route(),
    "dbrx": route(norm_order=1),
    "norm_2": route(norm_order=2),
    "norm_inf": route(norm_order=float("inf")),
    "norm_3": route(norm_order=3),
    "gpt_oss": route(E=12, softmax_first=False),
    "deepseek_v3": route(sigmoid=True, bias=True, n_group=4, topk_group=2, norm_order=1, scale=2.5),
    "deepseek_v2": route(n_group=4, topk_group=2, scale=1.5),
    "softmax_bias": route(bias=True, norm_order=1),
    "one_choice": route(top_k=1),
    "every_expert": route(E=5, top_k=5, norm_order=1),
    "one_token": route(T=1, E=7, top_k=2),
    "no_tokens": route(T=0),
    "many": route(T=300, E=61, top_k=6, norm_order=1),
    "strided": route(strided=True),
}


def choices(T, A, E, seed=0, index=torch.int32):
    """(T, A) different experts of each token."""
    order = torch.rand(T, E, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order[:, :A].to(index).contiguous()


def permute(T=9, A=3, E=8, index=torch.int32, skewed=False, sentinels=False):
    def build(r, dtype):
        indices = torch.full((T, A), 2, dtype=index) if skewed else choices(T, A, E, index=index)
        return dict(indices=torch.where(indices % 3 == 1, E + indices, indices) if sentinels else indices, num_experts=E)

    return build


PERMUTE = {"plain": permute(), "int64": permute(index=torch.int64), "one_expert": permute(skewed=True), "sentinels": permute(sentinels=True),
           "one_token": permute(T=1, A=1), "no_tokens": permute(T=0), "many": permute(T=500, A=4, E=64)}


def unpermute(T=9, A=3, D=20, flat=True, weight_dtype=None, strided=False):
    def build(r, dtype):
        rows = r.normal(T * A, D + 5, dtype=dtype)[:, 5:] if strided else r.normal(T * A, D, dtype=dtype)
        inverse = torch.randperm(T * A, generator=r.generator).int()
        return dict(rows=rows, inverse=inverse if flat else inverse.view(T, A), weights=r.uniform(T, A, dtype=wide(dtype, weight_dtype)))

    return build


UNPERMUTE = {"plain": unpermute(), "two_dimensions": unpermute(flat=False), "odd_sizes": unpermute(T=7, A=1, D=13), "one_token": unpermute(T=1, A=2, D=1),
             "no_tokens": unpermute(T=0), "fp32_weights": unpermute(weight_dtype=torch.float32), "strided": unpermute(strided=True),
             "many": unpermute(T=200, A=4, D=40)}

# ---- experts -----------------------------------------------------------------------------------------------


def experts(T=9, D=24, F=20, E=6, A=2, layout="hf", bias=False, activation="silu", indices=None, weight_dtype=None, index=torch.int32, **options):
    """layout: hf (E, 2F, D) | transposed (E, D, 2F) | interleaved (gpt-oss) | separate (w_up) | turned (separate, views of (E, D, F)) |
    dbrx (E * F, D) | no_gate | strided."""

    def build(r, dtype):
        wdtype = wide(dtype, weight_dtype)
        gated, transposed = layout != "no_gate", layout in ("transposed", "interleaved")
        separate = layout in ("separate", "turned", "dbrx")
        width = 2 * F if gated and not separate else F

        def weight(rows, columns, swap=transposed):
            make = sliced if layout == "strided" else lambda r, *shape, **kw: r.normal(*shape, **kw)
            if layout == "turned":
                return r.normal(E, columns, rows, dtype=wdtype, scale=0.3).mT
            return make(r, E, *((columns, rows) if swap else (rows, columns)), dtype=wdtype, scale=0.3)

        def stored(w):
            return w.flatten(0, 1) if layout == "dbrx" else w

        found = choices(T, A, E, index=index) if indices is None else torch.tensor(indices, dtype=index)
        return dict(
            x=sliced(r, T, D, dtype=dtype) if layout == "strided" else r.normal(T, D, dtype=dtype),
            w_gate_up=stored(weight(width, D)),
            w_down=stored(weight(D, F, swap=transposed or layout == "dbrx")),
            topk_weights=r.uniform(T, A, dtype=dtype),
            topk_indices=found,
            w_up=stored(weight(F, D)) if separate else None,
            bias_gate_up=r.normal(E, width, dtype=wdtype) if bias else None,
            bias_up=r.normal(E, F, dtype=wdtype) if bias and separate else None,
            bias_down=r.normal(E, D, dtype=wdtype) if bias else None,
            activation=activation,
            interleaved=layout == "interleaved",
            num_experts=E if layout == "dbrx" else None,
            **options,
        )

    return build


EXPERTS = {
    "hf": experts(),
    "dbrx": experts(layout="dbrx", A=4),
    "separate": experts(layout="separate"),
    "separate_bias": experts(layout="separate", bias=True),
    "transposed": experts(layout="transposed", transposed=True),
    "gpt_oss": experts(layout="interleaved", activation="swiglu_oai", bias=True, limit=1.5),
    "swiglu_oai_halves": experts(activation="swiglu_oai", alpha=1.1, limit=2.0),
    "interleaved": experts(layout="interleaved"),
    "no_gate": experts(layout="no_gate", activation="relu2"),
    "no_gate_bias": experts(layout="no_gate", activation="gelu_tanh", bias=True),
    "bias": experts(bias=True),
    "gelu": experts(activation="gelu"),
    "gelu_tanh": experts(activation="gelu_new"),
    "relu": experts(activation="relu"),
    "one_token": experts(T=1),
    "one_token_one_choice": experts(T=1, A=1, D=7, F=5),
    "no_tokens": experts(T=0),
    "one_expert_takes_all": experts(T=40, A=1, indices=[[3]] * 40),
    "unused_experts": experts(T=3, E=12, A=1, indices=[[0], [7], [7]]),
    "sentinels": experts(T=4, E=4, A=2, indices=[[0, 4], [9, 2], [4, 4], [1, 3]]),
    "nothing_but_sentinels": experts(T=3, E=4, A=2, indices=[[4, 5]] * 3),
    "odd_sizes": experts(T=13, D=7, F=5, E=3),
    "square": experts(D=16, F=16),
    "int64_indices": experts(index=torch.int64),
    "strided": experts(layout="strided"),
    "bf16_weights": experts(weight_dtype=torch.bfloat16, bias=True),
    "many_tokens": experts(T=150, D=40, F=48, E=4, A=2),
    "rows_fill_panels": experts(T=64, D=64, F=96, E=3, A=2, indices=[[0, 2]] * 64),
    "rows_fill_panels_dbrx": experts(T=64, D=64, F=96, E=3, A=2, indices=[[0, 2]] * 64, layout="dbrx"),
    "rows_fill_panels_turned": experts(T=64, D=64, F=96, E=3, A=2, indices=[[0, 2]] * 64, layout="turned"),
    "many_tokens_dbrx": experts(T=150, D=40, F=48, E=4, A=2, layout="dbrx"),
}

EXPERT_GRADS = ("x", "w_gate_up", "w_up", "w_down", "topk_weights", "bias_gate_up", "bias_up", "bias_down")


def make_cases(Case):
    """Every case of these ops; Case is cases.Case, which imports this module."""
    found = []
    for op, builders, grads, outputs in (
        ("grouped_mm", GROUPED, ("a", "b", "bias"), ("y",)),
        ("gmm", GMM, ("a", "b"), ("y",)),
        ("linear", LINEAR, ("x", "weight", "bias"), ("y",)),
        ("moe_route", ROUTE, ("router_logits",), ("y", "indices")),
        ("moe_permute", PERMUTE, (), ("order", "inverse", "offs")),
        ("moe_unpermute", UNPERMUTE, ("rows", "weights"), ("y",)),
        ("fused_experts", EXPERTS, EXPERT_GRADS, ("y",)),
    ):
        found += [Case(op, name, build, grads, outputs=outputs) for name, build in builders.items()]
    return found
