"""Sliding-window attention in linear time. Source: transformers' sliding_window masks, Dao 2023 (FlashAttention-2)."""
import torch

from . import checks, dispatch, kernels
from .reference import local_attention as reference

OP = "local_attention"
MAX_GPU_P = 256


def gpu_heads(*tensors):
    """The limit of the attentions' GPU kernels: None, or why these tensors are refused."""
    for tensor in tensors:
        if tensor is not None and tensor.dim() == 4 and tensor.shape[3] > MAX_GPU_P:
            return f"heads of {tensor.shape[3]} channels are over the {MAX_GPU_P} of the GPU kernels; the reference takes them"
    return dispatch.gpu_dtypes(*tensors)


dispatch.register(OP, "local_attention", ("local_attention_fwd", "local_attention_bwd"), cpu=dispatch.cpu_dtypes, gpu=gpu_heads)


def local_attention(q, k, v, window, *, causal=True, cu_seqlens=None, scale=None, key_mask=None, backend=None):
    """Attention in which each query sees its own position and the window - 1 before it.

    Args:
        q: (B, L, H, P) float32, bfloat16, float16 or float64.
        k, v: (B, L, Hk, P); Hk divides H, query head h reads key head h // (H // Hk). Another dtype is read in q's; float64
            goes with float64 only.
        window: positions a query sees, itself included: transformers' `sliding_window`, flash-attn's window_size[0] + 1.
        causal: False: the window - 1 positions behind the query are seen as well.
        cu_seqlens: (sequences + 1,) int32 or None: the ends of sequences packed into a batch of 1; none sees another.
        scale: multiplies the scores; P ** -0.5 by default.
        key_mask: (B, L) bool or None: False hides a key (padding).
        backend: "cpu", "reference", ... or None to choose.

    Returns:
        (B, L, H, P) in q's dtype, computed in float32 (float64 for float64); zeros where a query sees no key.
        Differentiable in q, k and v. Time O(L * window), memory O(L).

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to::

        behind = arange(L)[:, None] - arange(L)
        mask = (behind >= 0) & (behind < window)
        F.scaled_dot_product_attention(q.mT, k.mT, v.mT, mask, scale=scale, enable_gqa=True).mT     # .mT: transpose(1, 2)
    """
    checks.check_heads(OP, q, k, v)
    B, L, _, P = q.shape
    checks.check_shape(OP, "k", k, (B, L, None, P), "(B, L, Hk, P)")
    checks.check_count(OP, "window", window, 1)
    checks.check_flags(OP, causal=causal)
    checks.check_cu_seqlens(OP, cu_seqlens, B, L, q)
    checks.check_optional(OP, "key_mask", key_mask, (B, L), "(B, L)", q, dtypes=(torch.bool,))
    scale = checks.attention_scale(OP, scale, P)
    chosen, _ = dispatch.pick(OP, q, k, v, backend=backend)
    if chosen != "reference":
        return kernels.ops(chosen).local_attention_fwd(q, k, v, window, bool(causal), scale, key_mask, cu_seqlens)[0]
    dispatch.count(OP, chosen)
    return reference.local_attention(q, k, v, window, bool(causal), scale, key_mask, cu_seqlens)


# ---- shapes and gradients of the native ops ----------------------------------------------------------------


@kernels.register_fake("local_attention_fwd")
def _(q, k, v, window, causal, scale, key_mask, cu_seqlens):
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=acc)


@kernels.register_fake("local_attention_bwd")
def _(dy, q, k, v, y, lse, window, causal, scale, key_mask, cu_seqlens):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _context(ctx, inputs, output):
    q, k, v, window, causal, scale, key_mask, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, key_mask, cu_seqlens)
    ctx.rest = (window, causal, scale)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ops, ctx, dy, dlse):
    q, k, v, y, lse, key_mask, cu_seqlens = ctx.saved_tensors
    if dy is None:
        return (None,) * 8
    return *ops.local_attention_bwd(dy, q, k, v, y, lse, *ctx.rest, key_mask, cu_seqlens), *[None] * 5


kernels.register_autograd(OP, _backward, _context)
