"""One case list, four uses: tests, gradients, `terrazzo doctor`, and the small end of the benchmark suite.

A case builds the keyword arguments of one public function for a dtype; `run` calls it and collects everything it
produced (outputs, states updated in place, gradients) under names that tests and error tables show.
"""
from dataclasses import dataclass, field
from typing import Callable
from unittest import mock

import torch

from . import cases_bytes, cases_decoding, cases_moe, cases_patches, checks


@dataclass(frozen=True)
class Case:
    """`build(r, dtype)` makes keyword arguments with `r`, a Random; `grads` names those that need gradients."""

    op: str
    name: str
    build: Callable
    grads: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()  # arguments changed in place
    outputs: tuple[str, ...] = field(default=("y",))

    def __str__(self):
        return f"{self.op}-{self.name}"

    def make(self, dtype, seed=0):
        return self.build(Random(seed), dtype)


class Random:
    """Seeded tensors drawn in float64 and rounded, so that every dtype sees the same numbers."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape, dtype, scale=1.0):
        return (torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale).to(dtype)

    def uniform(self, *shape, dtype, low=0.0, high=1.0):
        return (torch.rand(*shape, generator=self.generator, dtype=torch.float64) * (high - low) + low).to(dtype)


class Unwritten:
    """Stands for Random at sizes of real models: the same tensors, with nothing in them. Builders write integers as ever."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape, dtype, scale=1.0):
        return torch.empty(*shape, dtype=dtype)

    def uniform(self, *shape, dtype, low=0.0, high=1.0):
        return torch.empty(*shape, dtype=dtype)


def run_unwritten(function, build, dtype, grads, backend):
    """Forward, and backward where `grads` names arguments, on tensors that nobody wrote: for backends that only look at shapes."""
    kwargs = build(Unwritten(), dtype)
    leaves = {name: kwargs[name].detach().requires_grad_() for name in grads if kwargs.get(name) is not None}
    # As on a GPU, where values are not looked at from the host: what an op returned here holds none.
    with mock.patch.object(checks, "has_values", lambda *tensors: False), torch.set_grad_enabled(bool(leaves)):
        result = function(**kwargs | leaves, backend=backend)
    if leaves:
        outputs = [out for out in (result if isinstance(result, tuple) else (result,)) if isinstance(out, torch.Tensor) and out.requires_grad]
        torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(out) for out in outputs], allow_unused=True)


def to_dtype(kwargs, dtype):
    """The same arguments with every floating tensor in `dtype`, strides kept."""
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}


def run(case, kwargs, backend, gradients=False, function=None, device="cpu"):
    """Everything the call on `device` produced, by name, on the cpu. With gradients, for fixed random weights of every output."""
    import terrazzo

    function = function or getattr(terrazzo, case.op)
    kwargs = {k: clone(v, device) for k, v in kwargs.items()}
    leaves = {}
    for name in case.grads if gradients else ():
        if kwargs.get(name) is not None:
            leaves[name] = kwargs[name] = kwargs[name].detach().requires_grad_()
    with torch.set_grad_enabled(gradients):
        result = function(**kwargs, backend=backend)
    results = result if isinstance(result, tuple) else (result,)
    found = dict(zip(case.outputs, results, strict=True))
    found |= {f"updated {name}": kwargs[name] for name in case.updated}
    if leaves:
        r = Random(1)
        differentiable = [out for out in results if out.is_floating_point()]
        weights = [r.normal(*out.shape, dtype=torch.bfloat16).to(out) for out in differentiable]  # the same in every dtype
        grads = torch.autograd.grad(differentiable, list(leaves.values()), weights)
        found |= {f"d{name}": grad for name, grad in zip(leaves, grads)}
    return {name: value.detach().cpu() for name, value in found.items()}


def clone(value, device="cpu"):
    """A copy with the same strides (expanded dimensions stay expanded); what lies between its elements is NaN, or far out of range."""
    if not isinstance(value, torch.Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    whole = copy.as_strided((copy.untyped_storage().nbytes() // copy.element_size(),), (1,))
    whole.fill_(float("nan") if value.is_floating_point() else 1 if value.dtype == torch.bool else torch.iinfo(value.dtype).max - 1)
    base = tuple(slice(0, 1) if s == 0 else slice(None) for s in value.stride())
    copy[base].copy_(value[base])
    return copy


def spread(case, kwargs):
    """The same arguments as views without unit stride anywhere, but for states that kernels update in place."""
    def view(value):
        return value.new_empty([2 * n for n in value.shape])[(slice(None, None, 2),) * value.dim()].copy_(value)

    return {k: view(v) if isinstance(v, torch.Tensor) and (k not in case.updated or k == "conv_state") else v for k, v in kwargs.items()}


# ---- convolution -------------------------------------------------------------------------------------------


def conv(B=2, D=24, L=37, W=4, bias=True, activation="silu", channel_last=True, initial=False, final=False, seq_idx=None,
         weight_dtype=None, slack=0):
    def build(r, dtype):
        wdtype = weight_dtype if weight_dtype and dtype != torch.float64 else dtype
        x = r.normal(B, L, D + slack, dtype=dtype)[..., slack:].transpose(1, 2) if channel_last else r.normal(B, D + slack, L, dtype=dtype)[:, slack:]
        return dict(
            x=x,
            weight=r.normal(D, W, dtype=wdtype, scale=0.5),
            bias=r.normal(D, dtype=wdtype) if bias else None,
            seq_idx=None if seq_idx is None else torch.tensor(seq_idx, dtype=torch.int32),
            initial_states=r.normal(B, D, W - 1, dtype=dtype) if initial else None,
            return_final_states=final,
            activation=activation,
        )

    return build


def packed(*rows):
    """seq_idx rows from (id, length) pairs."""
    return [[i for i, n in row for _ in range(n)] for row in rows]


PACKED = packed([(0, 5), (1, 1), (2, 2), (3, 29)], [(7, 1), (8, 30), (-1, 6)])
CONV_GRADS = ("x", "weight", "bias", "initial_states")


def _conv_cases():
    shapes = {
        "channel_last": conv(),
        "channel_first": conv(channel_last=False),
        "width_2": conv(W=2),
        "width_3_channel_first": conv(W=3, channel_last=False),
        "no_bias_no_activation": conv(bias=False, activation=None),
        "length_1": conv(L=1),
        "length_2_channel_first": conv(L=2, channel_last=False),
        "one_channel": conv(D=1, L=9),
        "odd_channels_sliced": conv(D=13, slack=3, L=40),
        "odd_channels_first_sliced": conv(D=13, slack=3, L=41, channel_last=False),
        "many_blocks": conv(B=1, D=72, L=700),
        "many_blocks_channel_first": conv(B=1, D=17, L=1500, channel_last=False),
        "packed": conv(seq_idx=PACKED),
        "packed_channel_first": conv(seq_idx=PACKED, channel_last=False),
        "fp32_weight": conv(weight_dtype=torch.float32),
        "empty_batch": conv(B=0),
    }
    for name, build in shapes.items():
        yield Case("causal_conv1d_fn", name, build, CONV_GRADS)
    states = {
        "states": conv(initial=True, final=True),
        "states_length_1": conv(L=1, initial=True, final=True),
        "states_channel_first": conv(initial=True, final=True, channel_last=False, L=2, W=4),
        "final_only": conv(final=True, L=2),
        "packed_states": conv(seq_idx=PACKED, initial=True, final=True),
        "packed_states_channel_first": conv(seq_idx=PACKED, initial=True, final=True, channel_last=False, W=3),
        "all_padding_row": conv(seq_idx=packed([(0, 37)], [(-1, 37)]), initial=True, final=True),
        "padding_first": conv(seq_idx=packed([(-1, 4), (0, 33)], [(0, 2), (-1, 35)]), initial=True, final=True),
    }
    for name, build in states.items():
        yield Case("causal_conv1d_fn", name, build, CONV_GRADS, outputs=("y", "final_states"))


def conv_varlen(lengths, D=24, W=4, initial=True):
    def build(r, dtype):
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        return dict(x=r.normal(int(cu[-1]), D, dtype=dtype), weight=r.normal(D, W, dtype=dtype, scale=0.5), bias=r.normal(D, dtype=dtype),
                    cu_seqlens=cu, initial_states=r.normal(len(lengths), D, W - 1, dtype=dtype) if initial else None,
                    return_final_states=True, activation="silu")

    return build


def conv_update(B=3, D=24, L=1, W=4, state_len=4, channel_last=False, circular=False, indices=None, slots=None, activation="silu",
                state_dtype=None, flat=False):
    def build(r, dtype):
        sdtype = state_dtype if state_dtype and dtype != torch.float64 else dtype
        count = slots or B
        state = r.normal(count, state_len, D, dtype=sdtype).transpose(1, 2) if channel_last else r.normal(count, D, state_len, dtype=sdtype)
        return dict(
            x=r.normal(B, D, dtype=dtype) if flat else r.normal(B, D, L, dtype=dtype),
            conv_state=state,
            weight=r.normal(D, W, dtype=dtype, scale=0.5),
            bias=r.normal(D, dtype=dtype),
            activation=activation,
            cache_seqlens=torch.arange(B, dtype=torch.int32) * 3 if circular else None,
            conv_state_indices=None if indices is None else torch.tensor(indices, dtype=torch.int32),
        )

    return build


def _conv_update_cases():
    shapes = {
        "hf_layout": conv_update(),
        "flat": conv_update(flat=True),
        "state_w_minus_1": conv_update(state_len=3),
        "width_2": conv_update(W=2, state_len=2),
        "width_3": conv_update(W=3, state_len=2, activation=None),
        "odd_channels": conv_update(D=13),
        "channel_last_state": conv_update(channel_last=True),
        "long_state": conv_update(state_len=7, L=2),
        "several_positions": conv_update(L=5),
        "circular": conv_update(circular=True, state_len=5),
        "circular_several": conv_update(circular=True, state_len=6, L=3),
        "slots": conv_update(indices=[4, -1, 0], slots=6),
        "wide_batch": conv_update(B=9, D=520),
    }
    for name, build in shapes.items():
        yield Case("causal_conv1d_update", name, build, updated=("conv_state",))


# ---- scan --------------------------------------------------------------------------------------------------


def scan(B=2, L=100, H=4, P=8, G=2, N=16, D="H", z=False, dt_bias=True, softplus=True, dt_limit=(0.0, float("inf")), initial=False,
         final=False, varlen=False, seq_idx=None, cu=None, A_scale=1.0, sliced=False, dt_dtype=None):
    def build(r, dtype):
        states = B if cu is None else len(cu) - 1
        x = r.normal(B, L, H * P + 5, dtype=dtype)[..., 5:].unflatten(-1, (H, P)) if sliced else r.normal(B, L, H, P, dtype=dtype)
        return dict(
            x=x,
            dt=r.normal(B, L, H, dtype=dt_dtype or dtype, scale=0.5) if softplus else r.uniform(B, L, H, dtype=dtype, high=0.5),
            A=-r.uniform(H, dtype=torch.float64 if dtype == torch.float64 else torch.float32, low=0.5, high=4.0) * A_scale,
            B=r.normal(B, L, G, N, dtype=dtype),
            C=r.normal(B, L, G, N, dtype=dtype),
            chunk_size=32,
            D=None if D is None else r.normal(*((H, P) if D == "HP" else (H,)), dtype=dtype),
            z=r.normal(B, L, H, P, dtype=dtype) if z else None,
            dt_bias=r.normal(H, dtype=dtype) if dt_bias else None,
            initial_states=r.normal(states, H, P, N, dtype=dtype) if initial else None,
            seq_idx=None if seq_idx is None else torch.tensor(seq_idx, dtype=torch.int32),
            cu_seqlens=None if cu is None else torch.tensor(cu, dtype=torch.int32),
            dt_softplus=softplus,
            dt_limit=dt_limit,
            return_final_states=final,
            return_varlen_states=varlen,
        )

    return build


SCAN_GRADS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")


def _scan_cases():
    shapes = {
        "plain": scan(),
        "length_1": scan(L=1),
        "length_63": scan(L=63),
        "length_64": scan(L=64),
        "length_65": scan(L=65),
        "one_head": scan(H=1, G=1),
        "many_heads": scan(B=1, H=40, G=1, L=70),
        "headdim_64_state_128": scan(B=1, H=3, P=64, G=1, N=128, L=130),
        "headdim_4_state_16": scan(H=6, P=4, G=3, N=16),
        "odd_sizes": scan(H=3, P=5, G=1, N=7, L=71),
        "h_net": scan(H=2, P=32, G=2, N=1, L=50),
        "headdim_1": scan(H=8, P=1, G=2, N=8, L=40),
        "no_options": scan(D=None, dt_bias=False, softplus=False),
        "D_per_channel": scan(D="HP"),
        "dt_limit": scan(dt_limit=(0.2, 0.9)),
        "gated": scan(z=True),
        "sliced": scan(sliced=True),
        "strong_decay": scan(A_scale=30.0),
        "packed": scan(B=1, seq_idx=packed([(0, 3), (1, 1), (2, 60), (3, 30), (-1, 6)])),
        "fp32_dt": scan(dt_dtype=torch.float32),
        "empty_batch": scan(B=0),
    }
    for name, build in shapes.items():
        yield Case("mamba_chunk_scan_combined", name, build, SCAN_GRADS)
    final = {
        "states": scan(initial=True, final=True),
        "final_only": scan(final=True, L=33),
        "gated_states": scan(initial=True, final=True, z=True, L=40),
        "packed_states": scan(initial=True, final=True, seq_idx=packed([(0, 10), (1, 90)], [(-1, 100)])),
        "cu_seqlens_final": scan(B=1, initial=True, final=True, cu=[0, 30, 30, 31, 100]),
    }
    for name, build in final.items():
        yield Case("mamba_chunk_scan_combined", name, build, SCAN_GRADS, outputs=("y", "final_states"))
    yield Case("mamba_chunk_scan_combined", "varlen", scan(B=1, initial=True, final=True, varlen=True, cu=[0, 1, 1, 64, 100]), SCAN_GRADS,
               outputs=("y", "final_states", "varlen_states"))


def state_update(B=3, H=4, P=8, G=2, N=16, z=False, D=True, dt_bias=True, softplus=True, indices=None, slots=None, expanded=True,
                 state_dtype=None):
    def build(r, dtype):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        sdtype = state_dtype if state_dtype and dtype != torch.float64 else acc

        def param(*shape, dims, scale=1.0):  # (H,) expanded over P (and N), or full
            if not expanded:
                return r.normal(*shape, *dims, dtype=dtype, scale=scale)
            return r.normal(*shape, dtype=dtype, scale=scale).reshape(*shape, *(1 for _ in dims)).expand(*shape, *dims)

        return dict(
            state=r.normal(slots or B, H, P, N, dtype=sdtype),
            x=r.normal(B, H, P, dtype=dtype),
            dt=param(B, H, dims=(P,)),
            A=-param(H, dims=(P, N)).to(acc).abs() if not expanded else (-r.uniform(H, dtype=acc, low=0.1, high=4.0))[:, None, None].expand(H, P, N),
            B=r.normal(B, G, N, dtype=dtype),
            C=r.normal(B, G, N, dtype=dtype),
            D=param(H, dims=(P,)) if D else None,
            z=r.normal(B, H, P, dtype=dtype) if z else None,
            dt_bias=param(H, dims=(P,)) if dt_bias else None,
            dt_softplus=softplus,
            state_batch_indices=None if indices is None else torch.tensor(indices, dtype=torch.int32),
        )

    return build


def mamba1_update(B=3, D=24, N=16):
    def build(r, dtype):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        return dict(state=r.normal(B, D, N, dtype=acc), x=r.normal(B, D, dtype=dtype), dt=r.normal(B, D, dtype=dtype),
                    A=-r.uniform(D, N, dtype=acc, high=3.0), B=r.normal(B, N, dtype=dtype), C=r.normal(B, N, dtype=dtype),
                    D=r.normal(D, dtype=dtype), z=r.normal(B, D, dtype=dtype), dt_bias=r.normal(D, dtype=dtype), dt_softplus=True)

    return build


def _state_update_cases():
    shapes = {
        "mamba2": state_update(),
        "gated": state_update(z=True),
        "no_options": state_update(D=False, dt_bias=False, softplus=False),
        "not_expanded": state_update(expanded=False, z=True),
        "slots": state_update(indices=[5, -1, 2], slots=7),
        "odd_sizes": state_update(P=5, N=7, H=3, G=1),
        "state_1": state_update(N=1, P=32, H=2),
        "model_size": state_update(B=1, H=8, P=64, N=128, G=1),
        "bf16_state": state_update(state_dtype=torch.bfloat16),
        "mamba1": mamba1_update(),
    }
    for name, build in shapes.items():
        yield Case("selective_state_update", name, build, updated=("state",))


def norm(shape=(3, 5, 48), z=True, group_size=None, norm_before_gate=False, weight_dtype=None, strided=False):
    def build(r, dtype):
        wdtype = weight_dtype if weight_dtype and dtype != torch.float64 else dtype
        x = r.normal(*shape[:-1], shape[-1] * 2, dtype=dtype)[..., : shape[-1]] if strided else r.normal(*shape, dtype=dtype)
        return dict(x=x, weight=r.normal(shape[-1], dtype=wdtype), z=r.normal(*shape, dtype=dtype) if z else None, eps=1e-5,
                    group_size=group_size, norm_before_gate=norm_before_gate)

    return build


def _norm_cases():
    shapes = {
        "gate_first": norm(),
        "norm_first": norm(norm_before_gate=True),
        "no_gate": norm(z=False),
        "groups": norm(group_size=16),
        "groups_norm_first": norm(group_size=12, norm_before_gate=True),
        "odd_width": norm(shape=(7, 37)),
        "groups_of_one": norm(group_size=1),
        "one_row": norm(shape=(1, 8)),
        "one_dimension": norm(shape=(40,)),
        "wide": norm(shape=(3, 2049)),
        "many_rows": norm(shape=(300, 24), group_size=8),
        "strided_rows": norm(strided=True),
        "fp32_weight": norm(weight_dtype=torch.float32),
        "empty_batch": norm(shape=(0, 8)),
    }
    for name, build in shapes.items():
        yield Case("rmsnorm_gated", name, build, ("x", "weight", "z"))


def varlen_states(D=10):
    def build(r, dtype):
        return dict(x=r.normal(12, D, dtype=dtype), cu_seqlens=torch.tensor([0, 1, 1, 7, 12], dtype=torch.int32), state_len=4)

    return build


CASES = (
    *_conv_cases(),
    *(Case("causal_conv1d_varlen_fn", name, conv_varlen(lengths, **kw), CONV_GRADS, outputs=("y", "final_states"))
      for name, lengths, kw in (("mixed", (5, 1, 0, 2, 40), {}), ("no_initial", (3, 30), dict(initial=False)), ("one", (9,), dict(W=2)),
                                ("odd_channels", (2, 3, 4, 70), dict(D=11)))),
    *_conv_update_cases(),
    Case("causal_conv1d_varlen_states", "mixed", varlen_states()),
    *_scan_cases(),
    *_state_update_cases(),
    *_norm_cases(),
    *cases_moe.make_cases(Case),
    *cases_patches.make_cases(Case),
    *cases_decoding.make_cases(Case),
    *cases_bytes.make_cases(Case),
)
