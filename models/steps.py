"""Layers by the fused ops: what Bamba, DBRX, BLT and its patcher share.

A step of a few rows takes as long as weights are read, if nothing else takes longer: norm, projections, gate and sum are one call of norm_linear
each, rotary embedding, cache and attention one of attention_update. AttentionStep and MLPStep hold a layer's parameters, looked up once for a text,
of modules that are still what this package made them (is_plain). normed, added and mlp take any number of rows, where that is faster
(fused_serves). Otherwise, and with gradients, the modules run one by one.
"""
import torch

import terrazzo

from .. import dispatch, native
from ..adapters import fused_serves, plain_tensors
from . import layers

FEW_ROWS = 16
_OP = dispatch.OPS["norm_linear"]


def is_plain(*modules):
    """Whether nobody has put another module, another forward, a hook, a bias, a quantised or a sharded weight in the place of these."""
    def plain(module):
        kept = module.__dict__
        ours = type(module).__module__.startswith(__package__) and "forward" not in kept
        if not ours or kept["_forward_hooks"] or kept["_forward_pre_hooks"]:
            return False
        return kept["_parameters"].get("bias") is None and plain_tensors(kept["_parameters"].get("weight"))

    return all(map(plain, modules))


def is_few(x):
    return x.numel() <= FEW_ROWS * x.shape[-1]


def in_steps(x):
    """Whether the fused ops serve a call for x (..., K): a few rows on the CPU, and no gradient."""
    return is_few(x) and _may_fuse(x)


def _may_fuse(x):
    if not native.available or torch.is_grad_enabled() or type(x) is not torch.Tensor or not x.is_cpu:
        return False
    return not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu") and dispatch._wanted(_OP, None)[0] in (None, "cpu")


def _fuses(x, *modules):
    """Whether norm_linear serves plain modules for x, which the last of them multiplies: many rows only where it is faster."""
    if not _may_fuse(x) or not is_plain(*modules):
        return False
    return is_few(x) or fused_serves(x, modules[-1].weight)


def _product(x, norm_weight, eps, *weights, **options):
    """norm_linear of x (T, K). Its norm is one thread's: that of many rows is made before."""
    if not is_few(x):
        x, norm_weight = terrazzo.rmsnorm_gated(x, norm_weight, eps=eps), None
    return terrazzo.norm_linear(x, *weights, norm_weight=norm_weight, eps=eps, **options)


def normed(x, norm, *linears):
    """[linear(norm(x)), ...], x (..., K)."""
    if not _fuses(x, norm, *linears):
        n = norm(x)
        return [linear(n) for linear in linears]
    y = _product(x.flatten(0, -2), norm.weight, norm.eps, *(linear.weight for linear in linears)).unflatten(0, x.shape[:-1])
    return [y] if len(linears) == 1 else y.split([linear.out_features for linear in linears], -1)


def added(residual, x, linear):
    """residual + linear(x), x (..., K)."""
    if not _fuses(x, linear):
        return residual + linear(x)
    return terrazzo.norm_linear(x.flatten(0, -2), linear.weight, residual=residual.flatten(0, -2)).view(residual.shape)


def mlp(x, norm, mlp):
    """x + mlp(norm(x)) of a GatedMLP, x (..., K)."""
    if not _fuses(x, norm, mlp, mlp.down_proj, mlp.up_proj, mlp.gate_proj):
        return x + mlp(norm(x))
    return MLPStep(norm, mlp)(x.flatten(0, -2)).view(x.shape)


class AttentionStep:
    """x + attention of norm(x) for one position of each row, x (B, D)."""

    def __init__(self, norm, attention):
        self.norm, self.eps = norm.weight, norm.eps
        self.qkv = tuple(proj.weight for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
        self.out = attention.o_proj.weight

    def __call__(self, x, keys, values, length, turns, interleaved=False, window=None):
        """keys, values: the caches (B, Hk, slots, P), which take in what is new; turns: cos and sin, (1 or B, pairs)."""
        qkv = terrazzo.norm_linear(x, *self.qkv, norm_weight=self.norm, eps=self.eps)
        cos, sin = turns
        y = terrazzo.attention_update(qkv, keys, values, length, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved, window=window)
        return terrazzo.norm_linear(y, self.out, residual=x)


class MLPStep:
    """x + mlp(norm(x)), x (B, D): one position of each row, or more."""

    def __init__(self, norm, mlp):
        self.norm, self.eps = norm.weight, norm.eps
        self.gate, self.up, self.down = (proj.weight for proj in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.act = next(name for name, act in layers.ACTIVATIONS.items() if act is mlp.act)

    def __call__(self, x):
        h = _product(x, self.norm, self.eps, self.gate, self.up, activation=self.act, gated=True)
        return terrazzo.norm_linear(h, self.down, residual=x)


def is_step(x, mask, past):
    """Whether attention_update serves x (B, L, qkv) and a KVCache: one position behind others, and no padding."""
    return past is not None and past.length > 0 and x.shape[1] == 1 and mask.sees is None and in_steps(x)
