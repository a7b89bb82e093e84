"""Modules with the signatures of other packages' functions, plain torch inside: what their adapters in bench/packages.py pass is checked by what comes out.

Each function is written from its package's documentation, apart from terrazzo: shapes that the package would refuse are refused.
"""
import importlib.machinery
import math
import sys
import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def install(monkeypatch):
    """Puts every fake into sys.modules, parents included, for the length of a test."""
    for path, functions in MODULES.items():
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in sys.modules or not hasattr(sys.modules[name], "is_fake"):
                module = types.ModuleType(name)
                module.__spec__, module.__path__, module.is_fake = importlib.machinery.ModuleSpec(name, None, is_package=True), [], True
                monkeypatch.setitem(sys.modules, name, module)
        for function in functions:
            setattr(sys.modules[path], function.__name__, function)


def refuse(condition, what):
    if condition:
        raise ValueError(what)


# ---- causal_conv1d, fla's convolution ------------------------------------------------------------------------


def _activated(y, activation):
    refuse(activation not in (None, "silu", "swish"), f"activation {activation}")
    return y if activation is None else F.silu(y)


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None):
    """x (batch, dim, seqlen), weight (dim, width), bias (dim,)."""
    refuse(x.dim() != 3 or weight.shape[0] != x.shape[1] or bias.shape != (x.shape[1],), "shapes")
    refuse(any(given is not None and given is not False for given in (seq_idx, initial_states, return_final_states, final_states_out)), "not in this fake")
    width = weight.shape[1]
    return _activated(F.conv1d(F.pad(x, (width - 1, 0)), weight[:, None], bias, groups=len(weight)), activation)


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None):
    """x (batch, dim) or (batch, dim, seqlen), conv_state (batch, dim, state_len >= width - 1), updated in place."""
    refuse(x.shape[:2] != conv_state.shape[:2] or weight.shape[0] != x.shape[1], "shapes")
    seen = torch.cat([conv_state, x], -1)
    conv_state.copy_(seen[..., -conv_state.shape[-1] :])
    window = seen[..., -(weight.shape[1] - 1 + x.shape[-1]) :]
    return _activated(F.conv1d(window, weight[:, None], bias, groups=len(weight)), activation)


def causal_conv1d(x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None, backend="triton", cu_seqlens=None,
                  cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, **kwargs):  # fmt: skip
    """fla: x (B, T, D), weight (D, W), bias (D,) -> y (B, T, D), final state."""
    refuse(x.shape[-1] != weight.shape[0] or bias.shape != x.shape[-1:], "x must be [B, T, D]")
    return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation=activation).transpose(1, 2), None


def _fla_update(x, cache, residual=None, weight=None, bias=None, activation=None):
    """fla: x (N, D), (1, N, D) or (N, 1, D), cache (N, D, W) -> y like x, cache."""
    refuse(residual is not None or x.shape[-1] != weight.shape[0] or cache.shape != (x.numel() // x.shape[-1], *weight.shape), "shapes")
    return causal_conv1d_update(x.reshape(-1, x.shape[-1], 1), cache, weight, bias, activation).view(x.shape), cache


_fla_update.__name__ = "causal_conv1d_update"


# ---- mamba_ssm, fla's scan -----------------------------------------------------------------------------------


def _steps(dt, dt_bias, dt_softplus):
    steps = dt if dt_bias is None else dt + dt_bias
    return F.softplus(steps) if dt_softplus else steps


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None, dt_softplus=False,
                              dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False):  # fmt: skip
    """x (batch, seqlen, nheads, headdim), dt (batch, seqlen, nheads), A (nheads), B and C (batch, seqlen, ngroups, dstate), D (nheads)."""
    refuse(not isinstance(chunk_size, int) or chunk_size & (chunk_size - 1), "chunk_size")
    steps, heads = _steps(dt, dt_bias, dt_softplus), x.shape[2]
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    y, _ = chunk_simple_gla(C, B, x * steps[..., None], steps * A, scale=1.0)
    return (y + D[:, None] * x).to(x.dtype)


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False, cu_seqlens=None,
                     cu_seqlens_cpu=None, **kwargs):  # fmt: skip
    """q and k (B, T, H, K), v (B, T, H, V), g (B, T, H) log decays -> o (B, T, H, V), final state."""
    refuse(q.shape != k.shape or v.shape[:3] != q.shape[:3] or g.shape != q.shape[:3], "shapes")
    state, out = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=torch.promote_types(v.dtype, torch.float32)), []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None] + k[:, t, :, :, None] * v[:, t, :, None]
        out.append((q[:, t, :, None] @ state.to(q.dtype))[:, :, 0])
    return torch.stack(out, 1) * (q.shape[-1] ** -0.5 if scale is None else scale), None


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
    """state (batch, nheads, dim, dstate) in place, x and dt (batch, nheads, dim), A (nheads, dim, dstate), B and C (batch, ngroups, dstate)."""
    refuse(dt.shape != x.shape or A.shape != state.shape[1:] or D.shape != x.shape[1:] or dt_bias.shape != x.shape[1:], "shapes")
    steps = _steps(dt, dt_bias, dt_softplus)
    B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (B, C))
    state.copy_(state * (steps[..., None] * A).exp() + (steps * x)[..., None] * B[:, :, None])
    return ((state.to(C.dtype) @ C[..., None])[..., 0] + D * x).to(x.dtype)


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """mamba_ssm: norm(x) * silu(z), or norm(x * silu(z))."""
    refuse(bias is not None or group_size is not None, "not in this fake")
    if z is not None and not norm_before_gate:
        x = x * F.silu(z)
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return y * F.silu(z) if z is not None and norm_before_gate else y


# ---- liger_kernel --------------------------------------------------------------------------------------------


class LigerSiLUMulFunction:
    @staticmethod
    def apply(a, b, gate_multiplier=1.0, down_multiplier=1.0):
        """silu(a) * b."""
        return F.silu(a) * b


class LigerRMSNormFunction:
    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        refuse(in_place, "the backward would overwrite its gradient")
        refuse(casting_mode not in ("llama", "gemma", "none"), f"casting mode {casting_mode}")
        return X * (X.square().mean(-1, keepdim=True) + eps).rsqrt() * (W + offset)


class LigerFusedMoEFunction:
    @staticmethod
    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        """x (T, H), gate_up_proj (E, 2 I, H), gate first, down_proj (E, H, I), top_k_index (T, K) int32, top_k_weights (T, K)."""
        E, width, H = gate_up_proj.shape
        refuse(down_proj.shape != (E, H, width // 2) or top_k_index.dtype != torch.int32 or top_k_index.shape != top_k_weights.shape, "shapes")
        gate, up = torch.einsum("th,eih->tei", x, gate_up_proj).chunk(2, -1)
        return _weighted(torch.einsum("tei,ehi->teh", F.silu(gate) * up, down_proj), top_k_index, top_k_weights)


def _weighted(of_all, indices, weights):
    """of_all (T, E, H) -> (T, H): those of the chosen experts, weighted."""
    return (of_all.gather(1, indices.long()[:, :, None].expand(-1, -1, of_all.shape[2])) * weights[:, :, None]).sum(1)


# ---- grouped_gemm, megablocks, scattermoe --------------------------------------------------------------------


def gmm(a, b, batch_sizes, trans_b=False):
    """a (T, K), b (E, K, N) or with trans_b (E, N, K), both contiguous, batch_sizes (E,) int64 on the CPU."""
    refuse(batch_sizes.dtype != torch.int64 or not batch_sizes.is_cpu or not b.is_contiguous(), "batch_sizes or layout")
    return torch.cat([rows @ (w.T if trans_b else w) for rows, w in zip(a.split(batch_sizes.tolist()), b)])


@dataclass
class Arguments:
    """megablocks' own fields; device's default asks for a GPU there."""

    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    bias: bool = True
    return_bias: bool = True
    activation_fn: object = F.gelu
    moe_num_experts: int = 1
    moe_top_k: int = 1
    moe_loss_weight: float = 0.1
    memory_optimized_mlp: bool = False
    mlp_type: str = "mlp"
    mlp_impl: str = "sparse"
    fp16: bool = True
    bf16: bool = False
    device: object = None

    def __post_init__(self):
        refuse(self.mlp_impl == "sparse", "sparse is not supported with today's triton")
        refuse(self.device is None, "device")


class GLU(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32
        rows = args.moe_num_experts * args.ffn_hidden_size
        self.w1, self.v1, self.w2 = (torch.nn.Parameter(torch.full((rows, args.hidden_size), math.nan, dtype=dtype)) for _ in range(3))


class ParallelDroplessMLP(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        refuse(args.mlp_type != "glu" or args.bias or args.mlp_impl != "grouped", "not in this fake")
        self.args, self.mlp = args, GLU(args)

    def forward(self, x, scores, expert_weights, top_experts):
        """x (sl, bs, hs), expert_weights and top_experts (sl * bs, top-k)."""
        a, rows = self.args, x.view(-1, x.shape[-1])
        refuse(x.dim() != 3 or top_experts.shape != (len(rows), a.moe_top_k) or self.training, "shapes")
        w1, v1, w2 = (w.view(a.moe_num_experts, a.ffn_hidden_size, a.hidden_size) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
        gate, up = (torch.einsum("th,efh->tef", rows, w) for w in (w1, v1))
        return _weighted(torch.einsum("tef,efh->teh", a.activation_fn(gate) * up, w2), top_experts, expert_weights).view(x.shape)


def flatten_sort_count(expert_idxs, num_experts):
    """scattermoe: (T, k) -> experts in order, where in the flat list they stand, ends of their rows."""
    experts, places = expert_idxs.flatten().sort()
    return experts, places, expert_idxs.flatten().bincount(minlength=num_experts).cumsum(-1)


def parallel_linear(inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets, expert_biases=None, gates=None, grouped_in=False,
                    grouped_out=False):  # fmt: skip
    """expert_weights (E, in, out); rows in the order of the tokens, or grouped by expert; gates (T, K) sum a token's rows."""
    refuse(expert_weights.shape[1] != inputs.shape[1] or expert_offsets[-1] != len(sorted_expert_idxs) or expert_biases is not None, "shapes")
    rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
    refuse(len(rows) != len(sorted_expert_idxs), "a row for each choice")
    out = torch.einsum("ri,rio->ro", rows, expert_weights[sorted_expert_idxs])
    if grouped_out:
        refuse(gates is not None, "gates need the tokens' order")
        return out
    out = torch.zeros_like(out).index_copy(0, sorted_scattered_idxs, out)
    return out if gates is None else (gates[:, None] @ out.view(*gates.shape, -1))[:, 0]


# ---- flash_attn ----------------------------------------------------------------------------------------------


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                    return_attn_probs=False):  # fmt: skip
    """q (batch, seqlen, nheads, headdim), k and v with as many heads or a divisor; window_size (left, right) keys beside the query's own."""
    refuse(q.dtype not in (torch.float16, torch.bfloat16), "only fp16 and bf16")
    refuse(q.shape[1] != k.shape[1] or q.shape[2] % k.shape[2], "shapes")
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    behind = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    seen = torch.ones_like(behind, dtype=torch.bool)
    seen &= (behind >= 0) if causal else True
    seen &= (behind <= window_size[0]) if window_size[0] >= 0 else True
    scores = torch.einsum("bqhp,bkhp->bhqk", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    return torch.einsum("bhqk,bkhp->bqhp", scores.float().masked_fill(~seen, -math.inf).softmax(-1).to(q.dtype), v)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                           softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None):  # fmt: skip
    """q (total_q, nheads, headdim), k and v (total_k, nheads, headdim), cu_seqlens (batch + 1,) int32."""
    refuse(cu_seqlens_q.dtype != torch.int32 or cu_seqlens_k.dtype != torch.int32 or cu_seqlens_q.shape != cu_seqlens_k.shape, "cu_seqlens")
    refuse(cu_seqlens_q[-1] != len(q) or cu_seqlens_k[-1] != len(k) or causal, "lengths")
    refuse(max_seqlen_q < cu_seqlens_q.diff().max() or max_seqlen_k < cu_seqlens_k.diff().max(), "longest")
    out = []
    for (a, b), (c, d) in zip(*(zip(ends[:-1], ends[1:]) for ends in (cu_seqlens_q.tolist(), cu_seqlens_k.tolist()))):
        scores = torch.einsum("qhp,khp->hqk", q[a:b], k[c:d]) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        out.append(torch.einsum("hqk,khp->qhp", scores.softmax(-1), v[c:d]))
    return torch.cat(out)


MODULES = {
    "causal_conv1d": (causal_conv1d_fn, causal_conv1d_update),
    "fla.modules.convolution": (causal_conv1d, _fla_update),
    "fla.ops.simple_gla": (chunk_simple_gla,),
    "mamba_ssm.ops.triton.ssd_combined": (mamba_chunk_scan_combined,),
    "mamba_ssm.ops.triton.selective_state_update": (selective_state_update,),
    "mamba_ssm.ops.triton.layernorm_gated": (rmsnorm_fn,),
    "liger_kernel.ops.swiglu": (LigerSiLUMulFunction,),
    "liger_kernel.ops.rms_norm": (LigerRMSNormFunction,),
    "liger_kernel.ops.fused_moe": (LigerFusedMoEFunction,),
    "grouped_gemm.ops": (gmm,),
    "megablocks.layers.arguments": (Arguments,),
    "megablocks.layers.dmoe": (ParallelDroplessMLP,),
    "scattermoe.parallel_experts": (flatten_sort_count, parallel_linear),
    "flash_attn": (flash_attn_func, flash_attn_varlen_func),
}
