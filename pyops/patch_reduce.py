"""One row for each patch of bytes: the pooling of the Byte Latent Transformer. Source: Pagnoni et al. 2024, transformers' BLT."""
import torch

from . import checks, dispatch, kernels
from .reference import patch_reduce as reference

OP = "patch_reduce"
REDUCTIONS = ("amax", "mean", "amin")  # PatchReduction of csrc/common/params.h
dispatch.register(OP, "patch_attention", ("patch_reduce_fwd", "patch_reduce_bwd"), cpu=dispatch.cpu_dtypes, gpu=dispatch.gpu_dtypes)


def patch_reduce(h, patch_ids, num_patches, reduce="amax", *, backend=None):
    """The largest, the mean or the smallest of each patch's rows.

    Args:
        h: (B, L, D) float32, bfloat16, float16 or float64.
        patch_ids: (B, L) int32 or int64, the patch of each byte; not decreasing along a row. Bytes whose id is negative or
            >= num_patches belong to no patch (negative ones may stand anywhere).
        num_patches: S.
        reduce: "amax", "mean" or "amin".
        backend: "cpu", "reference", ... or None to choose.

    Returns:
        (B, S, D) in h's dtype; zeros for an empty patch. Differentiable in h: bytes that share the largest value share its
        gradient in equal parts, as in torch's scatter_reduce. (Transformers' pooling starts from a row of zeros, which takes a
        part of the gradient where the largest value is exactly 0; here bytes alone share it.)

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to::

        torch.zeros(B, S, D).scatter_reduce(1, patch_ids[:, :, None].expand(B, L, D), h, reduce, include_self=False)
    """
    checks.check_tensor(OP, "h", h, 3, "(B, L, D)")
    B, L, D = h.shape
    checks.check_positive(OP, D=D)
    checks.check_count(OP, "num_patches", num_patches, 0)
    if reduce not in REDUCTIONS:
        checks.fail(OP, f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    checks.check_patch_ids(OP, patch_ids, B, L, h)
    chosen, _ = dispatch.pick(OP, h, backend=backend)
    if chosen != "reference":
        return kernels.ops(chosen).patch_reduce_fwd(h, patch_ids, num_patches, REDUCTIONS.index(reduce))
    dispatch.count(OP, chosen)
    return reference.patch_reduce(h, patch_ids, num_patches, reduce)


# ---- shapes and gradients of the native ops ----------------------------------------------------------------


@kernels.register_fake("patch_reduce_fwd")
def _(h, patch_ids, num_patches, reduce):
    return h.new_empty(h.shape[0], num_patches, h.shape[2])


@kernels.register_fake("patch_reduce_bwd")
def _(dy, h, y, patch_ids, reduce):
    return h.new_empty(h.shape)


def _context(ctx, inputs, output):
    h, patch_ids, _, ctx.reduce = inputs
    ctx.save_for_backward(h, output, patch_ids)


def _backward(ops, ctx, dy):
    return ops.patch_reduce_bwd(dy, *ctx.saved_tensors, ctx.reduce), None, None, None


kernels.register_autograd(OP, _backward, _context)
