"""Grouped matrix products. Sources: torch.nn.functional.grouped_mm and tgale96/grouped_gemm."""
import torch

from . import checks, dispatch, native
from .reference import grouped_gemm as reference

OP = "grouped_mm"


def _cpu_limit(a, b, *rest):
    if (a.dtype == torch.float64) != (b.dtype == torch.float64):
        return "float64 goes with float64 only"
    return dispatch.cpu_dtypes(a, b, *rest)


dispatch.register(OP, "grouped_gemm", ("grouped_gemm", "grouped_gemm_bwd"), cpu=_cpu_limit)


def _check_ends(fn, ends, T):
    """Rows of the groups on the CPU: not decreasing, at most T. Elsewhere reading them would synchronise."""
    if torch.compiler.is_compiling() or not ends.is_cpu:
        return
    before = 0
    for group, end in enumerate(ends.tolist()):
        if not before <= end <= T:
            checks.fail(fn, f"offs must not decrease and end at most at {T}, the number of rows, got {end} after {before} at group {group}")
        before = end


def grouped_mm(a, b, offs, bias=None, *, backend=None):
    """One matrix product for each group of rows.

    Args:
        a: (T, K) float32, bfloat16, float16 or float64, any strides; the rows of group e are [offs[e-1], offs[e]).
        b: (E, K, N), any strides: a transposed weight costs nothing. Its dtype may differ from a's (16-bit weights
            under float32 rows), but float64 goes with float64 only.
        offs: (E,) int32 row ends of the groups, not decreasing, at most T. Groups may be empty.
        bias: (E, N) or None.

    Returns:
        (T, N) in a's dtype, accumulated in float32 (float64). Rows behind offs[-1] are zero. Differentiable in a, b
        and bias.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to::

        torch.cat([a[begin:end] @ b[e] + bias[e] for e, (begin, end) in enumerate(zip([0, *offs], offs))])
    """
    checks.check_tensor(OP, "a", a, 2, "(T, K)")
    checks.check_tensor(OP, "b", b, 3, "(E, K, N)", a)
    E, K, N = b.shape
    checks.check_positive(OP, E=E, K=K, N=N)
    checks.check_shape(OP, "a", a, (None, K), "(T, K)")
    checks.check_optional(OP, "offs", offs, (E,), "(E,)", a, dtypes=(torch.int32,))
    if offs is None:
        checks.fail(OP, "offs is missing: the (E,) int32 row ends of the groups", TypeError)
    checks.check_optional(OP, "bias", bias, (E, N), "(E, N)", a)
    chosen, _ = dispatch.pick(OP, a, b, bias, backend=backend)
    _check_ends(OP, offs, a.shape[0])
    if chosen == "cpu":
        return torch.ops.terrazzo.grouped_gemm_fwd(a, b, offs, bias)
    dispatch.count(OP, chosen)
    return reference.grouped_mm(a, b, offs, bias)


def gmm(a, b, batch_sizes, trans_a=False, trans_b=False, *, backend=None):
    """grouped_gemm's product of groups given by their sizes.

    Args:
        a: (T, K). b: (E, K, N), or (E, N, K) with trans_b, or (T, N) with trans_a.
        batch_sizes: (E,) int32 or int64 on the CPU: rows of each group; they add up to T.
        trans_a: the weight gradient instead: a[rows of e]^T @ b[rows of e] for each group.
        trans_b: b[e] is transposed first.

    Returns:
        (T, N), or (E, K, N) with trans_a, in a's dtype. Differentiable in a and b.
    """
    name = "gmm"
    if trans_a and trans_b:
        checks.fail(name, "trans_a and trans_b exclude each other")
    checks.check_tensor(name, "a", a, 2, "(T, K)")
    checks.check_tensor(name, "batch_sizes", batch_sizes, 1, "(E,)", dtypes=(torch.int32, torch.int64))
    if not torch.compiler.is_compiling() and batch_sizes.is_cpu:
        sizes = batch_sizes.tolist()
        if min(sizes, default=0) < 0 or sum(sizes) != a.shape[0]:
            checks.fail(name, f"batch_sizes must be non-negative and add up to T = {a.shape[0]}, got {sizes}")
    offs = batch_sizes.cumsum(0).to(torch.int32).to(a.device)
    if trans_a:
        checks.check_tensor(name, "b", b, 2, "(T, N)", a)
        checks.check_shape(name, "b", b, (a.shape[0], None), "(T, N)")
        return _GroupedGradient.apply(a, b, offs, backend)
    checks.check_tensor(name, "b", b, 3, "(E, N, K)" if trans_b else "(E, K, N)", a)
    return grouped_mm(a, b.transpose(1, 2) if trans_b else b, offs, backend=backend)


class _GroupedGradient(torch.autograd.Function):
    """y[e] = a_e^T b_e; its gradients are grouped products again."""

    @staticmethod
    def forward(ctx, a, b, offs, backend):
        ctx.save_for_backward(a, b, offs)
        ctx.backend = backend
        return _weight_gradient(a, b, offs, False, a.dtype, backend)

    @staticmethod
    def backward(ctx, dy):
        a, b, offs = ctx.saved_tensors
        da = grouped_mm(b, dy.transpose(1, 2), offs, backend=ctx.backend).to(a.dtype) if ctx.needs_input_grad[0] else None
        db = grouped_mm(a, dy, offs, backend=ctx.backend).to(b.dtype) if ctx.needs_input_grad[1] else None
        return da, db, None, None


def _weight_gradient(a, dy, offs, k_last, dtype, backend=None):
    chosen, _ = dispatch.pick(OP, a, dy, backend=backend)
    if chosen == "cpu":
        db = torch.ops.terrazzo.grouped_gemm_wgrad(a, dy, offs, k_last, dtype)
        return db.transpose(1, 2) if k_last else db
    dispatch.count(OP, chosen)
    return reference.weight_gradient(a, dy, offs.tolist()).to(dtype)


@native.register_fake("grouped_gemm_fwd")
def _(a, b, offs, bias):
    return a.new_empty(a.shape[0], b.shape[2])


@native.register_fake("grouped_gemm_wgrad")
def _(a, dy, offs, k_last, dtype):
    K, N = a.shape[1], dy.shape[1]
    return a.new_empty((offs.shape[0], N, K) if k_last else (offs.shape[0], K, N), dtype=dtype)


@native.register_fake("grouped_gemm_bwd")
def _(dy, a, b, offs, need_a, need_b, need_bias):
    E, K, N = b.shape
    k_last = b.stride(1) == 1 and b.stride(2) != 1
    return (
        a.new_empty(a.shape if need_a else (0,)),
        b.new_empty(((E, N, K) if k_last else (E, K, N)) if need_b else (0,)),
        a.new_empty((E, N), dtype=torch.float64 if a.dtype == torch.float64 else torch.float32) if need_bias else a.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    a, b, offs, bias = inputs
    ctx.save_for_backward(a, b, offs)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    a, b, offs = ctx.saved_tensors
    need_a, need_b, _, need_bias = ctx.needs_input_grad
    da, db, dbias = torch.ops.terrazzo.grouped_gemm_bwd(dy, a, b, offs, need_a, need_b, need_bias)
    k_last = b.stride(1) == 1 and b.stride(2) != 1
    return (
        da if need_a else None,
        (db.transpose(1, 2) if k_last else db) if need_b else None,
        None,
        dbias.to(ctx.bias_dtype) if need_bias else None,
    )


native.register_autograd("grouped_gemm", _backward, _setup_context)
