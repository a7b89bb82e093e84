"""Grouped matrix products: every group of rows has its own matrix. Source: torch's grouped_mm, tgale96/grouped_gemm."""
import torch

from . import checks, dispatch, kernels
from .packing import PackedWeight
from .reference import grouped_gemm as reference

OP, WGRAD = "grouped_mm", "gmm"
dispatch.register(OP, "grouped_gemm", ("grouped_gemm", "grouped_gemm_bwd"), op="grouped_gemm_fwd", cpu=dispatch.cpu_dtypes, gpu=dispatch.gpu_dtypes)
dispatch.register(WGRAD, "grouped_gemm", ("grouped_wgrad", "grouped_wgrad_bwd"), op="grouped_wgrad_fwd", cpu=dispatch.cpu_dtypes, gpu=dispatch.gpu_dtypes)


def grouped_mm(a, b, offs, bias=None, *, backend=None):
    """c[r] = a[r] @ b[e] + bias[e] for the rows r of each group e.

    Args:
        a: (T, K) float32, bfloat16, float16 or float64, any strides; the rows of a group are adjacent.
        b: (E, K, N), any strides (a transposed view costs nothing) and any of these dtypes; float64 goes with float64. Or a
            `PackedWeight`: faster, without gradients.
        offs: (E,) int32 end of each group's rows, not decreasing, at most T; equal ends are an empty group.
        bias: (E, N) or None.
        backend: "cpu", "reference", ... or None to choose.

    Returns:
        (T, N) in a's dtype, accumulated in float32 (float64 for float64). Rows at and after offs[-1] are zero, whatever
        a holds there. Differentiable in a, b and bias.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to::

        for e, (begin, end) in enumerate(zip([0, *offs], offs)):
            c[begin:end] = a[begin:end] @ b[e] + bias[e]
    """
    checks.check_tensor(OP, "a", a, 2, "(T, K)")
    if isinstance(b, PackedWeight):
        return _packed(a, b, offs, bias, backend)
    checks.check_tensor(OP, "b", b, 3, "(E, K, N)", a)
    if checks.is_spread(b):
        b = b.contiguous()  # a DTensor's strides aren't always those of its pieces, by which db is laid out
    T, K = a.shape
    E, _, N = b.shape
    checks.check_positive(OP, E=E, K=K, N=N)
    checks.check_shape(OP, "b", b, (None, K, None), "(E, K, N)")
    checks.check_float64(OP, a=a, b=b)
    checks.check_optional(OP, "bias", bias, (E, N), "(E, N)", a)
    _check_offs(offs, E, T, a)
    chosen, _ = dispatch.pick(OP, a, b, bias, backend=backend)
    if chosen != "reference":
        return kernels.ops(chosen).grouped_gemm_fwd(a, b, offs, bias)
    dispatch.count(OP, chosen)
    return reference.grouped_mm(a, b, offs, bias)


def _packed(a, b, offs, bias, backend):
    T, K = a.shape
    E, _, N = b.shape
    checks.check_shape(OP, "a", a, (None, b.shape[1]), "(T, K) with the K of the packed b")
    checks.check_optional(OP, "bias", bias, (E, N), "(E, N)", a)
    _check_offs(offs, E, T, a)
    if (b.dtype == torch.float64) != (a.dtype == torch.float64):
        checks.fail(OP, f"float64 goes with float64 only, got a {a.dtype} and packed b {b.dtype}")
    if dispatch.needs_grad(a, bias):
        checks.fail(OP, "a packed b is for inference, and an input requires gradients; call under torch.no_grad(), or with the weight itself")
    chosen, _ = dispatch.pick(OP, a, bias, backend=backend)
    if chosen == "cpu":
        return torch.ops.terrazzo.grouped_gemm_packed(a, b.data, b.scale, offs, bias, N)
    if chosen != "reference":  # the panels are the cpu kernels' own: others take the weight itself
        return kernels.ops(chosen).grouped_gemm_fwd(a, b.unpack(), offs, bias)
    dispatch.count(OP, chosen)
    return reference.grouped_mm(a, b.unpack(), offs, bias)


@kernels.register_fake("grouped_gemm_packed")
def _(a, b, scale, offs, bias, N):
    return a.new_empty(a.shape[0], N)


def gmm(a, b, batch_sizes, trans_a=False, trans_b=False, *, backend=None):
    """grouped_gemm's product: groups by their sizes, operands optionally transposed.

    Args:
        a: (T, K). batch_sizes: (E,) int64 or int32 rows of each group on the CPU, none negative, T in all.
        b: (E, K, N); with trans_b (E, N, K); with trans_a (T, N).
        trans_a: a[rows of e].T @ b[rows of e] for each group: the gradient of the weights.

    Returns:
        (T, N), or (E, K, N) with trans_a, in a's dtype. Differentiable in a and b.

    Equivalent to: ``grouped_mm(a, b.mT if trans_b else b, batch_sizes.cumsum(0))``, which also counts and serves it.
    """
    checks.check_tensor(WGRAD, "a", a, 2, "(T, K)")
    checks.check_flags(WGRAD, trans_a=trans_a, trans_b=trans_b)
    if trans_a and trans_b:
        checks.fail(WGRAD, "trans_a and trans_b exclude each other, got both; transpose b outside")
    T, K = a.shape
    checks.check_tensor(WGRAD, "batch_sizes", batch_sizes, 1, "(E,)", dtypes=(torch.int64, torch.int32))
    if batch_sizes.device.type != "cpu":
        checks.fail(WGRAD, f"batch_sizes must be on the cpu, got {batch_sizes.device}; use grouped_mm, whose offsets stay on the device")
    E = batch_sizes.shape[0]
    checks.check_positive(WGRAD, E=E, K=K)
    if trans_a:
        checks.check_tensor(WGRAD, "b", b, 2, "(T, N)", a)
        checks.check_shape(WGRAD, "b", b, (T, None), "(T, N)")
    else:
        text = "(E, N, K)" if trans_b else "(E, K, N)"
        checks.check_tensor(WGRAD, "b", b, 3, text, a)
        checks.check_positive(WGRAD, N=b.shape[1 if trans_b else 2])
        checks.check_shape(WGRAD, "b", b, (E, None, K) if trans_b else (E, K, None), text)
    checks.check_float64(WGRAD, a=a, b=b)
    if checks.has_values(batch_sizes):
        sizes = batch_sizes.tolist()
        if min(sizes) < 0 or sum(sizes) != T:
            checks.fail(WGRAD, f"batch_sizes must not be negative and sum to {T}, the rows of a, got {sizes}")
    offs = batch_sizes.cumsum(0).to(device=a.device, dtype=torch.int32)
    if not trans_a:
        return grouped_mm(a, b.mT if trans_b else b, offs, backend=backend)
    chosen, _ = dispatch.pick(WGRAD, a, b, backend=backend)
    if chosen != "reference":
        return kernels.ops(chosen).grouped_wgrad_fwd(a, b, offs)
    dispatch.count(WGRAD, chosen)
    return reference.grouped_wgrad(a, b, offs)


def _check_offs(offs, E, T, like):
    checks.check_tensor(OP, "offs", offs, 1, "(E,)", like, dtypes=(torch.int32,))
    checks.check_shape(OP, "offs", offs, (E,), "(E,)")
    if not checks.has_values(offs):
        return
    before = 0
    for group, end in enumerate(offs.tolist()):
        if not before <= end <= T:
            checks.fail(OP, f"offs must not decrease and end at most at {T}, the number of rows, got {end} after {before} at group {group}")
        before = end


def _k_last(b):
    """b is stored transposed, as a linear layer's weight: its gradient then is, too."""
    return b.stride(1) == 1 and b.stride(2) != 1


@kernels.register_fake("grouped_gemm_fwd")
def _(a, b, offs, bias):
    return a.new_empty(a.shape[0], b.shape[2])


@kernels.register_fake("grouped_gemm_bwd")
def _(dy, a, b, offs, need_a, need_b, need_bias):
    E, K, N = b.shape
    acc = torch.float64 if a.dtype == torch.float64 else torch.float32
    return (
        a.new_empty(a.shape if need_a else (0,)),
        b.new_empty(((E, N, K) if _k_last(b) else (E, K, N)) if need_b else (0,)),
        a.new_empty((E, N), dtype=acc) if need_bias else a.new_empty(0),
    )


@kernels.register_fake("grouped_wgrad_fwd")
def _(a, b, offs):
    return a.new_empty(offs.shape[0], a.shape[1], b.shape[1])


@kernels.register_fake("grouped_wgrad_bwd")
def _(dy, a, b, offs):
    return a.new_empty(a.shape), b.new_empty(b.shape)


def _setup_context(ctx, inputs, output):
    a, b, offs, bias = inputs
    ctx.save_for_backward(a, b, offs)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ops, ctx, dy):
    a, b, offs = ctx.saved_tensors
    need_a, need_b, _, need_bias = ctx.needs_input_grad
    da, db, dbias = ops.grouped_gemm_bwd(dy, a, b, offs, need_a, need_b, need_bias)
    db = db.mT if need_b and _k_last(b) else db
    return da if need_a else None, db if need_b else None, None, dbias.to(ctx.bias_dtype) if need_bias else None


kernels.register_autograd("grouped_gemm", _backward, _setup_context)


def _wgrad_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _wgrad_backward(ops, ctx, dy):
    da, db = ops.grouped_wgrad_bwd(dy, *ctx.saved_tensors)
    return da, db, None


kernels.register_autograd("grouped_wgrad", _wgrad_backward, _wgrad_setup)
