"""Attention between patches and their bytes, without a mask. Source: Pagnoni et al. 2024 (Byte Latent Transformer), its published code."""
import torch

from . import checks, dispatch, kernels
from .local_attention import gpu_heads
from .reference import patch_cross_attention as reference

OP = "patch_cross_attention"
dispatch.register(OP, "patch_attention", ("patch_cross_attention_fwd", "patch_cross_attention_bwd"), cpu=dispatch.cpu_dtypes, gpu=gpu_heads)


def patch_cross_attention(q, k, v, patch_ids, *, queries="patches", k_per_patch=1, scale=None, num_patches=None, key_mask=None, window=None,
                          cu_seqlens=None, backend=None):
    """The cross-attention of BLT's encoder (patches ask their bytes) and decoder (bytes ask their patch), in O(bytes).

    Args:
        q: (B, Lq, H, P) float32, bfloat16, float16 or float64.
        k, v: (B, Lk, Hk, P); Hk divides H, query head h reads key head h // (H // Hk). Another dtype is read in q's; float64
            goes with float64 only.
        patch_ids: (B, L) int32 or int64, the patch of each byte; not decreasing along a row. Bytes whose id is negative or
            >= num_patches belong to no patch (negative ones may stand anywhere).
        queries: "patches": Lq = num_patches * k_per_patch and Lk = L; the k_per_patch queries of patch s, which stand side by
            side, see the bytes of patch s. "bytes": Lq = L and Lk = num_patches * k_per_patch; each byte sees the k_per_patch keys
            of its patch.
        scale: multiplies the scores; P ** -0.5 by default.
        num_patches: S; by default what the rows of the patches' side hold.
        key_mask: (B, Lk) bool or None: False hides a key.
        window: None: a query sees its own patch alone. w: it sees the w patches that end with its own (the window of BLT's code).
        cu_seqlens: (sequences + 1,) int32 or None: the byte ends of sequences packed into a batch of 1. Ids count on through the
            row, and no patch may lie in two sequences. Not together with a window.
        backend: "cpu", "reference", ... or None to choose.

    Returns:
        (B, Lq, H, P) in q's dtype, computed in float32 (float64 for float64); zeros where a query sees no key, as for an empty
        patch. (Transformers' mask lets such a query see every key.) Differentiable in q, k and v.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to::

        rows = arange(S).repeat_interleave(k_per_patch)
        mask = rows[:, None] == patch_ids[:, None]                   # queries="patches"; transposed for "bytes"
        F.scaled_dot_product_attention(q.mT, k.mT, v.mT, mask[:, None], scale=scale, enable_gqa=True).mT     # .mT: transpose(1, 2)
    """
    checks.check_heads(OP, q, k, v)
    if queries not in ("patches", "bytes"):
        checks.fail(OP, f"queries must be 'patches' or 'bytes', got {queries!r}")
    bytes_ask = queries == "bytes"
    checks.check_count(OP, "k_per_patch", k_per_patch, 1)
    B, Lq, Lk = q.shape[0], q.shape[1], k.shape[1]
    L, rows, name = (Lq, Lk, "k") if bytes_ask else (Lk, Lq, "q")
    if num_patches is None:
        num_patches = rows // k_per_patch
    checks.check_count(OP, "num_patches", num_patches, 0)
    if rows != num_patches * k_per_patch:
        checks.fail(OP, f"{name} must hold num_patches * k_per_patch = {num_patches} * {k_per_patch} rows, got {rows}")
    if window is not None:
        checks.check_count(OP, "window", window, 1)
        if cu_seqlens is not None:
            checks.fail(OP, "window and cu_seqlens don't go together: a window would reach into the sequence before; pass a batch of rows")
    checks.check_cu_seqlens(OP, cu_seqlens, B, L, q)
    checks.check_patch_ids(OP, patch_ids, B, L, q, cu_seqlens)
    checks.check_optional(OP, "key_mask", key_mask, (B, Lk), "(B, Lk)", q, dtypes=(torch.bool,))
    scale = checks.attention_scale(OP, scale, q.shape[3])
    chosen, _ = dispatch.pick(OP, q, k, v, backend=backend)
    if chosen != "reference":
        return kernels.ops(chosen).patch_cross_attention_fwd(q, k, v, patch_ids, num_patches, bytes_ask, k_per_patch, scale, window or 1, key_mask,
                                                            cu_seqlens)
    dispatch.count(OP, chosen)
    return reference.patch_cross_attention(q, k, v, patch_ids, num_patches, bytes_ask, k_per_patch, scale, window or 1, key_mask)


# ---- shapes and gradients of the native ops ----------------------------------------------------------------


@kernels.register_fake("patch_cross_attention_fwd")
def _(q, k, v, patch_ids, num_patches, bytes_ask, k_per_patch, scale, window, key_mask, cu_seqlens):
    return q.new_empty(q.shape)


@kernels.register_fake("patch_cross_attention_bwd")
def _(dy, q, k, v, patch_ids, num_patches, bytes_ask, k_per_patch, scale, window, key_mask, cu_seqlens):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _context(ctx, inputs, output):
    q, k, v, patch_ids, *ctx.rest, key_mask, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, patch_ids, key_mask, cu_seqlens)


def _backward(ops, ctx, dy):
    q, k, v, patch_ids, key_mask, cu_seqlens = ctx.saved_tensors
    return *ops.patch_cross_attention_bwd(dy, q, k, v, patch_ids, *ctx.rest, key_mask, cu_seqlens), *[None] * 8


kernels.register_autograd(OP, _backward, _context)
