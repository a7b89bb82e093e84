"""Other packages' functions as providers: each under the names of a case's inputs, where the package is installed and the inputs lie on a GPU.

Signatures as published: causal-conv1d 1.5, mamba-ssm 2.2, flash-linear-attention 0.4, grouped_gemm 0.3, megablocks 0.10, scattermoe 0.3,
liger-kernel 0.7, flash-attn 2.8. tests/fake_packages.py has modules of the same signatures, which check the calls made here.
"""
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from terrazzo import compat

from .cases import Provider, Unavailable
from .moe import Prepared, side_by_side

SIXTEEN = ("bf16", "fp16")
DISTRIBUTIONS = {"causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm", "fla": "flash-linear-attention", "grouped_gemm": "grouped_gemm",
                 "megablocks": "megablocks", "scattermoe": "scattermoe", "liger_kernel": "liger-kernel", "flash_attn": "flash-attn"}  # fmt: skip


@dataclass(frozen=True)
class Package:
    """One function of another package for one public function of ours. adapt(case, *modules) -> fn(**inputs)."""

    name: str
    op: str
    modules: tuple[str, ...]  # "a|b": the first that is there
    adapt: Callable
    dtypes: tuple[str, ...] = ("fp32", *SIXTEEN)


# ---- convolution and scan ------------------------------------------------------------------------------------


def _conv(case, module):
    return lambda x, weight, bias: module.causal_conv1d_fn(x, weight, bias, **case.arguments)


def _conv_update(case, module):
    return lambda x, conv_state, weight, bias: module.causal_conv1d_update(x, conv_state, weight, bias, **case.arguments)


def _fla_conv(case, module):
    """Channels last, (B, L, D); the second result is the final state."""
    return lambda x, weight, bias: module.causal_conv1d(x.transpose(1, 2), weight, bias, **case.arguments)[0].transpose(1, 2)


def _fla_conv_update(case, module):
    def run(x, conv_state, weight, bias):
        return module.causal_conv1d_update(x[:, :, 0], conv_state, weight=weight, bias=bias, **case.arguments)[0][:, :, None]

    return run


def _scan(case, module):
    return lambda x, dt, A, B, C, D, dt_bias: module.mamba_chunk_scan_combined(x, dt, A, B, C, D=D, dt_bias=dt_bias, **case.arguments)


def _fla_scan(case, module):
    """Mamba-2 as gated linear attention: queries C, keys B, values dt x, log decays dt A; D x beside it."""

    def run(x, dt, A, B, C, D, dt_bias):
        steps = F.softplus(dt.float() + dt_bias)
        queries, keys = (t.expand(-1, -1, x.shape[2], -1) for t in (C, B))
        y, _ = module.chunk_simple_gla(queries, keys, (x * steps[..., None]).to(x.dtype), steps * A, scale=1.0)
        return (y + D[:, None] * x).to(x.dtype)

    return run


def _state_update(case, module):
    return lambda state, x, dt, A, B, C, D, dt_bias: module.selective_state_update(state, x, dt, A, B, C, D, dt_bias=dt_bias, **case.arguments)


def _norm(case, module):
    return lambda x, weight, z: module.rmsnorm_fn(x, weight, None, z=z, **case.arguments)


def _liger_norm(case, swiglu, norm):
    """Its gated product, then its norm; not in place, which would overwrite the gradient it is given."""
    eps = case.arguments["eps"]
    return lambda x, weight, z: norm.LigerRMSNormFunction.apply(swiglu.LigerSiLUMulFunction.apply(z, x), weight, eps, 0.0, "llama", False)


# ---- experts -------------------------------------------------------------------------------------------------


def _gmm(case, module):
    """Rows of each group as int64 on the CPU, as it asks; a transposed b by its flag."""

    def run(a, b, offs):
        sizes = offs.diff(prepend=offs.new_zeros(1)).long().cpu()
        return module.gmm(a, b, sizes) if b.is_contiguous() else module.gmm(a, b.mT, sizes, trans_b=True)

    return run


def _megablocks(case, arguments, dmoe):
    """Its dropless experts without a router, DBRX's layer: weights (E * F, D) as they are."""
    E, layers = case.arguments["num_experts"], []

    def layer_of(x, w1, top_k):
        if not layers:
            options = arguments.Arguments(
                hidden_size=x.shape[1], ffn_hidden_size=w1.shape[0] // E, bias=False, return_bias=False, activation_fn=F.silu, moe_num_experts=E, moe_top_k=top_k,
                mlp_type="glu", mlp_impl="grouped", fp16=x.dtype == torch.float16, bf16=x.dtype == torch.bfloat16, device=x.device,
            )  # fmt: skip
            layers.append(dmoe.ParallelDroplessMLP(options).eval())
        return layers[0]

    def run(x, w1, v1, w2, topk_weights, topk_indices):
        layer = layer_of(x, w1, topk_indices.shape[1])
        weights = {"mlp.w1": w1, "mlp.v1": v1, "mlp.w2": w2}
        # (x of tokens, batch, width; scores, for its loss in training alone; weights; experts)
        return torch.func.functional_call(layer, weights, (x[:, None], None, topk_weights, topk_indices)).view(x.shape)

    return run


def _scattermoe(case, module):
    E = case.arguments["num_experts"]
    weights = side_by_side(E)

    def run(x, w1, v1, w2, topk_weights, topk_indices):
        gate_up, down = weights(w1, v1, w2)
        order = module.flatten_sort_count(topk_indices.long(), E)  # experts in order, where they stand, ends of their rows
        gate, up = module.parallel_linear(x, gate_up.permute(0, 2, 1), topk_indices.shape[1], *order, grouped_out=True).chunk(2, -1)
        return module.parallel_linear(F.silu(gate) * up, down, 1, *order, gates=topk_weights, grouped_in=True)

    return run


def _liger_experts(case, module):
    E = case.arguments["num_experts"]
    weights, down_of = side_by_side(E), Prepared(lambda w1, v1, w2: w2.view(E, -1, w2.shape[1]).mT.contiguous())

    def run(x, w1, v1, w2, topk_weights, topk_indices):
        down = w2.view(E, -1, w2.shape[1]).mT if w2.requires_grad else down_of(w1, v1, w2)
        return module.LigerFusedMoEFunction.apply(x, weights(w1, v1, w2)[0], down, topk_indices, topk_weights)

    return run


# ---- attention -----------------------------------------------------------------------------------------------


def _flash_local(case, module):
    behind = case.arguments["window"] - 1  # its window does not count the query itself
    return lambda q, k, v: module.flash_attn_func(q, k, v, causal=case.arguments["causal"], window_size=(behind, 0))


def _flash_cross(case, module):
    """Every patch is a sequence of its own: its rows on one side, its bytes on the other."""
    rows_of_patch, patches_ask = case.arguments["k_per_patch"], case.arguments["queries"] == "patches"

    def run(q, k, v, patch_ids):
        count = (q if patches_ask else k).shape[1] // rows_of_patch
        of_patch = patch_ids[0].bincount(minlength=count)
        bytes_, rows = F.pad(of_patch.cumsum(0), (1, 0)).int(), torch.arange(count + 1, dtype=torch.int32, device=q.device) * rows_of_patch
        longest = int(of_patch.max())
        ends = (rows, bytes_, rows_of_patch, longest) if patches_ask else (bytes_, rows, longest, rows_of_patch)
        return module.flash_attn_varlen_func(q[0], k[0], v[0], *ends)[None]

    return run


PACKAGES = (
    Package("causal_conv1d", "causal_conv1d_fn", ("causal_conv1d",), _conv),
    Package("causal_conv1d", "causal_conv1d_update", ("causal_conv1d",), _conv_update),
    Package("fla", "causal_conv1d_fn", ("fla.modules.convolution|fla.modules.conv.causal_conv1d",), _fla_conv),
    Package("fla", "causal_conv1d_update", ("fla.modules.convolution|fla.modules.conv.triton.ops",), _fla_conv_update),
    Package("mamba_ssm", "mamba_chunk_scan_combined", ("mamba_ssm.ops.triton.ssd_combined",), _scan),
    Package("fla", "mamba_chunk_scan_combined", ("fla.ops.simple_gla",), _fla_scan),
    Package("mamba_ssm", "selective_state_update", ("mamba_ssm.ops.triton.selective_state_update",), _state_update),
    Package("mamba_ssm", "rmsnorm_gated", ("mamba_ssm.ops.triton.layernorm_gated",), _norm),
    Package("liger_kernel", "rmsnorm_gated", ("liger_kernel.ops.swiglu", "liger_kernel.ops.rms_norm"), _liger_norm),
    Package("grouped_gemm", "grouped_mm", ("grouped_gemm.ops",), _gmm, ("bf16",)),
    Package("megablocks", "fused_experts", ("megablocks.layers.arguments", "megablocks.layers.dmoe"), _megablocks, ("bf16",)),
    Package("scattermoe", "fused_experts", ("scattermoe.parallel_experts",), _scattermoe),
    Package("liger_kernel", "fused_experts", ("liger_kernel.ops.fused_moe",), _liger_experts),
    Package("flash_attn", "local_attention", ("flash_attn",), _flash_local, SIXTEEN),
    Package("flash_attn", "patch_cross_attention", ("flash_attn",), _flash_cross, SIXTEEN),
)
NAMES = tuple(DISTRIBUTIONS)


def _installed(name):
    """Whether the package is there; our own stand-in of that name (terrazzo.compat.install) is not it."""
    there = sys.modules.get(name)
    if there is None:
        return importlib.util.find_spec(name) is not None
    return Path(compat.__file__).parent not in Path(getattr(there, "__file__", None) or "/").parents


def needs_gpu():
    """Why none of these packages can run here, or None: all want CUDA tensors."""
    here = torch.get_default_device().type
    return None if here == "cuda" else f"it runs on CUDA tensors; the inputs are on the {here.upper()}"


def _import(modules):
    """The first of "a|b" that is there."""
    names = modules.split("|")
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return importlib.import_module(names[-1])


def _builder(package, case):
    def build():
        if not _installed(package.name):
            raise Unavailable(f"{package.name} is not installed: pip install {DISTRIBUTIONS[package.name]}")
        why = needs_gpu()
        if why:
            raise Unavailable(why)
        if case.dtype not in package.dtypes:
            raise Unavailable(f"it takes {', '.join(package.dtypes)}, not {case.dtype}")
        try:
            modules = [_import(name) for name in package.modules]
        except ImportError as error:  # an older or newer release, or one that does not load here
            raise Unavailable(f"{package.name} does not load: {error}") from error
        return package.adapt(case, *modules)

    return build


def providers(case):
    """The providers of other packages for a case."""
    return tuple(Provider(package.name, _builder(package, case)) for package in PACKAGES if package.op == case.op)
