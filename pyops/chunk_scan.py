"""The Mamba-2 scan over full and packed sequences, and the fused block around it. Source: state-spaces/mamba."""
import math

import torch
import torch.nn.functional as F

from . import checks, dispatch, kernels
from .causal_conv1d import causal_conv1d_fn, check_activation
from .reference import chunk_scan as reference
from .rmsnorm_gated import rmsnorm_gated

OP = "mamba_chunk_scan_combined"
dispatch.register(OP, "chunk_scan", ("chunk_scan_fwd", "chunk_scan_bwd"), cpu=dispatch.cpu_dtypes, gpu=dispatch.gpu_dtypes)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                              seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, math.inf),
                              return_final_states=False, return_varlen_states=False, *, backend=None):
    """The Mamba-2 state space scan.

    Per head: state = exp(dt A) state + dt B x;  y = C state + D x;  y *= silu(z).

    Args:
        x: (B, L, H, P) float32, bfloat16, float16 or float64; any L.
        dt: (B, L, H) step sizes; then + dt_bias, softplus if dt_softplus, clamp to dt_limit, in float32.
        A: (H,), usually negative.
        B, C: (B, L, G, N), G dividing H.
        chunk_size: a hint; backends pick their own, and the result does not depend on it beyond rounding.
        D: (H,) or (H, P) or None. z: like x, or None. dt_bias: (H,) or None.
        initial_states: (B, H, P, N) or None; with cu_seqlens (S, H, P, N), one for each sequence.
        seq_idx: (B, L) int32 or None: the state starts anew where it changes; negative = padding (y is zero).
        cu_seqlens: (S + 1,) int32 or None: bounds of sequences packed into a batch of 1.
        return_final_states: also return the state after each row's last position (B, H, P, N).
        return_varlen_states: also return the state after each sequence of cu_seqlens (S, H, P, N).

    Returns:
        y (B, L, H, P) in x's dtype, then the final states and the varlen states where asked for, in float32
        (float64 for float64). Differentiable in x, dt, A, B, C, D, z, dt_bias and initial_states, also through
        the returned states. Memory is O(L): the backward recomputes.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to::

        for t in range(L):
            state = exp(dt[:, t] * A) * state + outer(dt[:, t] * x[:, t], B[:, t])
            y[:, t] = state @ C[:, t] + D * x[:, t]
    """
    dt_min, dt_max = check_arguments(OP, x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_limit)
    checks.check_flags(OP, dt_softplus=dt_softplus, return_final_states=return_final_states, return_varlen_states=return_varlen_states)
    if return_varlen_states and cu_seqlens is None:
        checks.fail(OP, "return_varlen_states needs cu_seqlens")
    wants_states = return_final_states or return_varlen_states
    chosen, _ = dispatch.pick(OP, x, dt, A, B, C, D, z, dt_bias, initial_states, backend=backend)
    if chosen != "reference":
        y, states = gated(
            lambda x, z: kernels.ops(chosen).chunk_scan_fwd(
                x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, wants_states
            ), x, z, dt, A, B, C, D, dt_bias, initial_states)  # fmt: skip
    else:
        dispatch.count(OP, chosen)
        y, states = reference.mamba_chunk_scan_combined(
            x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, (dt_min, dt_max), wants_states
        )
    results = [y]
    if return_final_states:
        results.append(states if cu_seqlens is None else states[-1:])
    if return_varlen_states:
        results.append(states)
    return results[0] if len(results) == 1 else tuple(results)


def gated(run, x, z, *others):
    """(y, states) of run(x, z), a native scan. Its backward knows no gate: in training that is torch's own product around the scan, on an output that is
    not rounded to x's dtype in between."""
    if z is None or not dispatch.needs_grad(x, z, *others):
        return run(x, z)
    y, states = run(x.to(_acc(x.dtype)), None)
    return (y * F.silu(z.to(y.dtype))).to(x.dtype), states


def check_arguments(fn, x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_limit):
    """The scan's rules; returns the limits of dt as floats."""
    checks.check_tensor(fn, "x", x, 4, "(B, L, H, P)")
    batch, L, H, P = x.shape
    checks.check_tensor(fn, "B", B, 4, "(B, L, G, N)", x)
    G, N = B.shape[2:]
    checks.check_positive(fn, L=L, H=H, P=P, G=G, N=N)
    checks.check_shape(fn, "B", B, (batch, L, None, None), "(B, L, G, N)")
    if H % G:
        checks.fail(fn, f"the groups of B must divide the {H} heads of x, got {G}")
    checks.check_optional(fn, "C", C, (batch, L, G, N), "(B, L, G, N)", x)
    checks.check_optional(fn, "dt", dt, (batch, L, H), "(B, L, H)", x)
    checks.check_optional(fn, "A", A, (H,), "(H,)", x)
    for name, value in (("C", C), ("dt", dt), ("A", A)):
        if value is None:
            checks.fail(fn, f"{name} is missing", TypeError)
    if D is not None and isinstance(D, torch.Tensor) and D.dim() == 2:
        checks.check_optional(fn, "D", D, (H, P), "(H,) or (H, P)", x)
    else:
        checks.check_optional(fn, "D", D, (H,), "(H,) or (H, P)", x)
    checks.check_optional(fn, "z", z, (batch, L, H, P), "(B, L, H, P)", x)
    checks.check_optional(fn, "dt_bias", dt_bias, (H,), "(H,)", x)
    checks.check_seq_idx(fn, seq_idx, batch, L, x)
    checks.check_cu_seqlens(fn, cu_seqlens, batch, L, x)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    checks.check_optional(fn, "initial_states", initial_states, (sequences, H, P, N), "(sequences, H, P, N)", x)
    checks.check_count(fn, "chunk_size", chunk_size, 1)
    if not isinstance(dt_limit, (tuple, list)) or len(dt_limit) != 2:
        checks.fail(fn, f"dt_limit must be (low, high), got {dt_limit!r}")
    for limit in dt_limit:
        checks.check_number(fn, "dt_limit", limit)
    dt_min, dt_max = (float(limit) for limit in dt_limit)
    if not dt_min <= dt_max:
        checks.fail(fn, f"dt_limit must be (low, high) with low <= high, got {dt_limit!r}")
    return dt_min, dt_max


def mamba_split_conv1d_scan_combined(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None,
                                     seq_idx=None, dt_limit=(0.0, math.inf), return_final_states=False,
                                     activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None,
                                     outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True, *, backend=None):
    """The Mamba-2 mixer between its projections: split, convolution, scan, gated norm, output projection.

    Args:
        zxbcdt: (B, L, 2·H·P + 2·G·N + H), the input projection: gate z | convolved x, B, C | dt.
        conv1d_weight: (H·P + 2·G·N, W). conv1d_bias: likewise (H·P + 2·G·N,) or None.
        dt_bias: (H,). A: (H,). D: (H,) or (H, P). chunk_size: a hint.
        headdim: P, needed when D is (H,) (then H = D's length gives P too if it is left out).
        rmsnorm_weight: (H·P,) or None: without it y is gated by silu(z) inside the scan.
        outproj_weight: (out, H·P) or None; outproj_bias: (out,) or None.
        The rest as in `mamba_chunk_scan_combined` and `rmsnorm_gated` (the norm's groups are the ngroups).

    Returns:
        (B, L, H·P) or (B, L, out), and the final states (B, H, P, N) where asked for.
    """
    fn = "mamba_split_conv1d_scan_combined"
    checks.check_tensor(fn, "zxbcdt", zxbcdt, 3, "(B, L, 2*H*P + 2*G*N + H)")
    batch, L, width = zxbcdt.shape
    checks.check_tensor(fn, "A", A, 1, "(H,)", zxbcdt)
    checks.check_tensor(fn, "conv1d_weight", conv1d_weight, 2, "(H*P + 2*G*N, W)", zxbcdt)
    H, conv_dim = A.shape[0], conv1d_weight.shape[0]
    checks.check_positive(fn, H=H, L=L)
    checks.check_count(fn, "ngroups", ngroups, 1)
    inner = width - conv_dim - H
    if inner <= 0 or inner % H or (conv_dim - inner) <= 0 or (conv_dim - inner) % (2 * ngroups):
        checks.fail(fn, f"the last dimension of zxbcdt must be H*P + conv_dim + H with conv_dim = H*P + 2*G*N; got {width} "
                        f"with H = {H}, conv_dim = {conv_dim} (conv1d_weight), G = {ngroups} (ngroups)")
    P, N = inner // H, (conv_dim - inner) // (2 * ngroups)
    if headdim is not None:
        checks.check_count(fn, "headdim", headdim, 1)
        if headdim != P:
            checks.fail(fn, f"headdim must be {P}, the inner width {inner} over the {H} heads of A, got {headdim}")
    if D is not None and isinstance(D, torch.Tensor) and D.dim() == 1 and D.shape[0] == inner and inner != H:
        D = D.view(H, P)
    z, xBC, dt = zxbcdt.split([inner, conv_dim, H], dim=-1)
    if conv1d_weight.shape[1] < 2:
        checks.fail(fn, f"conv1d_weight must be (H*P + 2*G*N, 2 or more), got {checks.describe(conv1d_weight)}")
    checks.check_optional(fn, "conv1d_bias", conv1d_bias, (conv_dim,), "(H*P + 2*G*N,)", zxbcdt)
    check_activation(fn, activation)
    x, B, C = _heads(xBC, H, P, ngroups, N)
    check_arguments(fn, x, dt, A, B, C, chunk_size, D, None, dt_bias, initial_states, seq_idx, None, dt_limit)
    checks.check_flags(fn, return_final_states=return_final_states, norm_before_gate=norm_before_gate)
    checks.check_number(fn, "rmsnorm_eps", rmsnorm_eps, 0)
    checks.check_optional(fn, "rmsnorm_weight", rmsnorm_weight, (inner,), "(H*P,)", zxbcdt)
    if outproj_weight is not None:
        checks.check_tensor(fn, "outproj_weight", outproj_weight, 2, "(out, H*P)", zxbcdt)
        checks.check_shape(fn, "outproj_weight", outproj_weight, (None, inner), "(out, H*P)")
        checks.check_optional(fn, "outproj_bias", outproj_bias, (outproj_weight.shape[0],), "(out,)", zxbcdt)
    elif outproj_bias is not None:
        checks.fail(fn, "outproj_bias needs outproj_weight")
    xBC = causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx=seq_idx, activation=activation, backend=backend)
    x, B, C = _heads(xBC.transpose(1, 2), H, P, ngroups, N)
    gate = z.unflatten(-1, (H, P)) if rmsnorm_weight is None else None
    y, states = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=D, z=gate,
        dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx, dt_softplus=True, dt_limit=dt_limit,
        return_final_states=True, backend=backend,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_gated(y, rmsnorm_weight, z, rmsnorm_eps, inner // ngroups, norm_before_gate, backend=backend)
    if outproj_weight is not None:
        if not torch.is_autocast_enabled(y.device.type):
            y, outproj_bias = (t if t is None else t.to(outproj_weight.dtype) for t in (y, outproj_bias))
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, states) if return_final_states else y


def _heads(xBC, H, P, G, N):
    """Views x (B, L, H, P), B and C (B, L, G, N) of what lies side by side."""
    x, B, C = xBC.split([H * P, G * N, G * N], dim=-1)
    return x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))


# ---- shapes and gradients of the native ops ----------------------------------------------------------------


def _acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@kernels.register_fake("chunk_scan_fwd")
def _fwd_fake(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, return_final_states):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, x.shape[2], x.shape[3], B.shape[3]) if return_final_states else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=_acc(x.dtype))


@kernels.register_fake("chunk_scan_fwd_into")
def _(y, *args):
    return _fwd_fake(*args)[1]


@kernels.register_fake("chunk_scan_bwd")
def _bwd_fake(dy, dfinal_states, x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max):
    def like(t):
        return x.new_empty(0) if t is None else t.new_empty(t.shape)

    return tuple(like(t) for t in (x, dt, A, B, C, D, dt_bias, initial_states))


@kernels.register_fake("chunk_scan_bwd_into")
def _(dx, *args):
    return _bwd_fake(*args)[1:]


def _setup_context(ctx, inputs, output):
    x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, return_final_states = inputs
    if z is not None:
        raise NotImplementedError("terrazzo.chunk_scan_fwd: with z there is no gradient; gate outside, as the public function does")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, cu_seqlens)
    ctx.rest = (dt_softplus, dt_min, dt_max)
    ctx.has_final_states = return_final_states


def _backward(ops, ctx, dy, dstates):
    x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dstates = dstates if ctx.has_final_states else None
    grads = ops.chunk_scan_bwd(
        dy, dstates, x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, cu_seqlens, *ctx.rest
    )
    dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial = grads
    dD = None if D is None else dD
    ddt_bias = None if dt_bias is None else ddt_bias
    dinitial = None if initial_states is None else dinitial
    return dx, ddt, dA, dB, dC, dD, None, ddt_bias, dinitial, None, None, None, None, None, None


kernels.register_autograd("chunk_scan", _backward, _setup_context)
