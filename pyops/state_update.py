"""One decoding step of the Mamba scan. Source: mamba_ssm's selective_state_update."""
import torch

from . import checks, dispatch, kernels
from .reference import state_update as reference

OP = "selective_state_update"


def _cpu_limit(x, state, *rest):
    if dispatch.needs_grad(x, state, *rest):
        return "the decoding step has no gradient on the cpu backend; call it under torch.no_grad()"
    if (x.dtype == torch.float64) != (state.dtype == torch.float64):
        return "float64 inputs need a float64 state"
    if state.stride(-1) != 1 and state.shape[-1] > 1:
        return f"the state must have unit stride along N, got {state.stride(-1)}"
    return dispatch.cpu_dtypes(x, state, *rest)


def _gpu_limit(x, state, *rest):
    if dispatch.needs_grad(x, state, *rest):
        return "the decoding step has no gradient on GPUs; call it under torch.no_grad()"
    return dispatch.gpu_dtypes(x, state, *rest)


_ENTRY = dispatch.register(OP, "state_update", ("state_update",), op=OP, cpu=_cpu_limit, gpu=_gpu_limit)


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False,
                           state_batch_indices=None, *, backend=None):
    """The recurrence for one position, with the state updated in place.

    Per head: state = exp(dt A) state + dt B x;  out = C state + D x;  out *= silu(z); dt = softplus(dt + dt_bias).

    Args:
        state: (slots, H, P, N) float32, bfloat16, float16 (float64 for float64 inputs), updated in place.
        x, dt: (B, H, P). A: (H, P, N). B, C: (B, G, N), G dividing H. D, dt_bias: (H, P) or None. z: like x or None.
            Dimensions expanded with stride 0, as Mamba-2 callers pass dt, A, D and dt_bias, are never copied.
            Mamba-1 leaves out H and G: state (slots, D, N), x, dt, z (B, D), A (D, N), B, C (B, N), D, dt_bias (D,).
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: (B,) int32 or None: each row's slot; -1 is a padding row (zero output, state untouched).
            Without it row b owns slot b.

    Returns:
        out like x. On the native backends it has no gradient: under grad mode with inputs that need one, the
        reference serves the call.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to::

        state.copy_(torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, :, None])
        out = (state * C[:, :, None]).sum(-1) + D * x
    """
    if not torch.compiler.is_compiling():
        out = _fast(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, backend)
        if out is not None:
            return out
    if not isinstance(state, torch.Tensor) or state.dim() not in (3, 4):
        checks.check_tensor(OP, "state", state, 4, "(slots, H, P, N) or (slots, D, N)")
    mamba1 = state.dim() == 3
    if mamba1:
        def lift(t, dim):
            return t.unsqueeze(dim) if isinstance(t, torch.Tensor) else t

        state, x, dt, z, B, C = (lift(t, 1) for t in (state, x, dt, z, B, C))
        A, D, dt_bias = (lift(t, 0) for t in (A, D, dt_bias))
    checks.check_tensor(OP, "state", state, 4, "(slots, H, P, N)")
    checks.check_tensor(OP, "x", x, 3, "(B, H, P), or (B, D) with a state (slots, D, N)", state)
    checks.check_tensor(OP, "B", B, 3, "(B, G, N), or (B, N) with a state (slots, D, N)", state)
    slots, H, P, N = state.shape
    batch, G = x.shape[0], B.shape[1]
    checks.check_positive(OP, H=H, P=P, N=N, G=G)
    if x.shape[1] != H or x.shape[2] != P:
        checks.check_shape(OP, "x", x, (batch, H, P), "(B, H, P)")
    if H % G:
        checks.fail(OP, f"the groups of B must divide the {H} heads, got {G}")
    for name, value in (("dt", dt), ("A", A), ("C", C)):
        if value is None:
            checks.fail(OP, f"{name} is missing", TypeError)
    checks.check_optional(OP, "B", B, (batch, G, N), "(B, G, N)", state)
    checks.check_optional(OP, "C", C, (batch, G, N), "(B, G, N)", state)
    checks.check_optional(OP, "dt", dt, (batch, H, P), "(B, H, P)", state)
    checks.check_optional(OP, "A", A, (H, P, N), "(H, P, N)", state)
    checks.check_optional(OP, "D", D, (H, P), "(H, P)", state)
    checks.check_optional(OP, "z", z, (batch, H, P), "(B, H, P)", state)
    checks.check_optional(OP, "dt_bias", dt_bias, (H, P), "(H, P)", state)
    checks.check_slots(OP, "state_batch_indices", state_batch_indices, batch, slots, state)
    checks.check_flags(OP, dt_softplus=dt_softplus)
    checks.check_writable(OP, "state", state)
    chosen, _ = dispatch.pick(OP, x, state, dt, A, B, C, D, z, dt_bias, backend=backend)
    slot_of_row = None if state_batch_indices is None else state_batch_indices.contiguous()
    args = (state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, slot_of_row)
    if chosen != "reference":
        out = kernels.ops(chosen).selective_state_update(*args)
    else:
        dispatch.count(OP, chosen)
        out = reference.selective_state_update(*args)
    return out.squeeze(1) if mamba1 else out


def _fast(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, backend):
    """A decoding step costs microseconds: straight to the kernel, which checks everything before it touches memory.

    None when it cannot serve the call or refuses it; the full checks then say why.
    """
    try:
        if not x.is_cpu or not dispatch.cpu_may_serve(_ENTRY, backend) or state.dim() != 4:
            return None
        if dispatch.needs_grad(state, x, dt, A, B, C, D, z, dt_bias):
            return None
        return torch.ops.terrazzo.selective_state_update.default(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices
        )
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return None


@kernels.register_fake("selective_state_update")
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    return x.new_empty(x.shape)
