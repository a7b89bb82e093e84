"""Causal depthwise convolution: full sequences, packed sequences, and the decoding step. Source: Dao-AILab/causal-conv1d."""
import torch

from . import checks, dispatch, kernels
from .reference import causal_conv1d as reference

ACTIVATIONS = {None: False, "silu": True, "swish": True}
WIDTH = 4  # of the kernels: their taps are unrolled and stay in registers, which wider filters outgrow


def _width_limit(backend, weight):
    if not 2 <= weight.shape[1] <= WIDTH:
        return f"the {backend} kernels take widths 2 to {WIDTH}, got {weight.shape[1]}"
    return None


def _cpu_limit(x, weight, *rest):
    return _width_limit("cpu", weight) or dispatch.cpu_dtypes(x, weight, *rest)


def _gpu_limit(x, weight, *rest):
    return _width_limit("GPU", weight) or dispatch.gpu_dtypes(x, weight, *rest)


def _cpu_update_limit(x, weight, bias, conv_state):
    if dispatch.needs_grad(x, weight, bias, conv_state):
        return "the decoding step has no gradient on the cpu backend; call it under torch.no_grad()"
    if (x.dtype == torch.float64) != (conv_state.dtype == torch.float64):
        return "float64 inputs need a float64 conv_state"
    return _cpu_limit(x, weight, conv_state)


def _gpu_update_limit(x, weight, bias, conv_state):
    if dispatch.needs_grad(x, weight, bias, conv_state):
        return "the decoding step has no gradient on GPUs; call it under torch.no_grad()"
    return _gpu_limit(x, weight, bias, conv_state)


dispatch.register("causal_conv1d_fn", "causal_conv1d", ("causal_conv1d_fwd", "causal_conv1d_bwd"), cpu=_cpu_limit, gpu=_gpu_limit)
_UPDATE = dispatch.register(
    "causal_conv1d_update", "causal_conv1d", ("causal_conv1d_update",), cpu=_cpu_update_limit, gpu=_gpu_update_limit
)
dispatch.register(  # a copy: the cpu has no kernel for it
    "causal_conv1d_varlen_states", "causal_conv1d", (), op="causal_conv1d_varlen_states", cpu=dispatch.cpu_dtypes, gpu=dispatch.gpu_dtypes
)


def check_activation(fn, activation):
    if not (activation is None or isinstance(activation, str)) or activation not in ACTIVATIONS:
        checks.fail(fn, f"activation must be None, 'silu' or 'swish', got {activation!r}")
    return ACTIVATIONS[activation]


def _check_weight(fn, x, weight, bias, D):
    checks.check_tensor(fn, "weight", weight, 2, "(D, W)", x)
    if weight.shape[0] != D or weight.shape[1] < 2:
        checks.fail(fn, f"weight must be (D, W) = ({D}, 2 or more), got {checks.describe(weight)}")
    checks.check_optional(fn, "bias", bias, (D,), "(D,)", x)


def check_arguments(fn, x, weight, bias, seq_idx):
    """The rules of x, weight, bias and seq_idx; returns the states' shape."""
    checks.check_tensor(fn, "x", x, 3, "(B, D, L)")
    B, D, L = x.shape
    checks.check_positive(fn, D=D, L=L)
    _check_weight(fn, x, weight, bias, D)
    checks.check_seq_idx(fn, seq_idx, B, L, x)
    return B, D, weight.shape[1] - 1


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                     final_states_out=None, activation=None, *, backend=None):
    """Causal depthwise convolution along the last dimension, with bias and SiLU.

    Args:
        x: (B, D, L) float32, bfloat16, float16 or float64; either D or L with unit stride (else it is copied).
        weight: (D, W), any of these dtypes. The kernels take W 2 to 4, the reference any W >= 2.
        bias: (D,) or None.
        seq_idx: (B, L) int32 or None: packed sequences. Nothing crosses a change of its value; positions with a
            negative value are padding: their output is zero.
        initial_states: (B, D, W-1) or None: the inputs before position 0 of each row.
        return_final_states: also return the last W-1 inputs of each row's last sequence.
        final_states_out: (B, D, W-1), written and returned as the final states; needs return_final_states.
        activation: None, "silu" or "swish".
        backend: "cpu", "reference", ... or None to choose.

    Returns:
        y (B, D, L) in x's dtype and layout (channel-last stays channel-last), or (y, final_states (B, D, W-1)).
        Differentiable in x, weight, bias and initial_states; accumulates in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to::

        F.conv1d(F.pad(x, (W - 1, 0)), weight[:, None], bias, groups=D)   # then F.silu
    """
    fn = "causal_conv1d_fn"
    state_shape = check_arguments(fn, x, weight, bias, seq_idx)
    checks.check_optional(fn, "initial_states", initial_states, state_shape, "(B, D, W-1)", x)
    checks.check_optional(fn, "final_states_out", final_states_out, state_shape, "(B, D, W-1)", x)
    checks.check_flags(fn, return_final_states=return_final_states)
    if final_states_out is not None:
        checks.check_writable(fn, "final_states_out", final_states_out)
        if not return_final_states:
            checks.fail(fn, "final_states_out needs return_final_states=True")
    silu = check_activation(fn, activation)
    y, final_states = _conv(fn, x, weight, bias, seq_idx, None, initial_states, return_final_states, silu, backend)
    if not return_final_states:
        return y
    if final_states_out is not None:
        return y, final_states_out.copy_(final_states)
    return y, final_states


def causal_conv1d_varlen_fn(x, weight, bias, cu_seqlens, initial_states=None, return_final_states=False,
                            activation=None, *, backend=None):
    """Causal depthwise convolution of sequences packed one after another.

    Args:
        x: (T, D), all sequences concatenated.
        weight: (D, W). bias: (D,) or None.
        cu_seqlens: (S + 1,) int32, the sequences' bounds: from 0 to T, not decreasing; empty sequences are fine.
        initial_states: (S, D, W-1) or None: the inputs before each sequence.
        return_final_states: also return the last W-1 inputs of each sequence.
        activation: None, "silu" or "swish".

    Returns:
        y (T, D), or (y, final_states (S, D, W-1)). Differentiable like `causal_conv1d_fn`.

    Equivalent to: `causal_conv1d_fn` on each sequence alone.
    """
    fn = "causal_conv1d_varlen_fn"
    checks.check_tensor(fn, "x", x, 2, "(T, D)")
    T, D = x.shape
    checks.check_positive(fn, T=T, D=D)
    _check_weight(fn, x, weight, bias, D)
    if cu_seqlens is None:
        checks.fail(fn, "cu_seqlens is missing: (sequences + 1,) int32", TypeError)
    checks.check_cu_seqlens(fn, cu_seqlens, 1, T, x)
    S = cu_seqlens.shape[0] - 1
    checks.check_optional(fn, "initial_states", initial_states, (S, D, weight.shape[1] - 1), "(S, D, W-1)", x)
    checks.check_flags(fn, return_final_states=return_final_states)
    silu = check_activation(fn, activation)
    y, final_states = _conv(fn, x.t().unsqueeze(0), weight, bias, None, cu_seqlens, initial_states, return_final_states, silu, backend)
    y = y.squeeze(0).t()
    return (y, final_states) if return_final_states else y


def _conv(fn, x, weight, bias, seq_idx, cu_seqlens, initial_states, return_final_states, silu, backend):
    chosen, _ = dispatch.pick("causal_conv1d_fn", x, weight, bias, initial_states, backend=backend)
    if chosen != "reference":
        return kernels.ops(chosen).causal_conv1d_fwd(
            x, weight, bias, seq_idx, cu_seqlens, initial_states, return_final_states, silu
        )
    dispatch.count("causal_conv1d_fn", chosen)
    return reference.causal_conv1d_fn(x, weight, bias, seq_idx, cu_seqlens, initial_states, return_final_states, silu)


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None,
                         conv_state_indices=None, *, backend=None):
    """The decoding step of the convolution: new positions against a state of the last inputs, updated in place.

    Args:
        x: (B, D) or (B, D, L): one or a few new positions.
        conv_state: (slots, D, state_len) with state_len >= W-1, any strides, updated in place.
        weight: (D, W). bias: (D,) or None. activation: None, "silu" or "swish".
        cache_seqlens: (B,) int32 or None. Given, the state is a circular buffer and the first new input is
            written at cache_seqlens % state_len; otherwise the state is shifted left.
        conv_state_indices: (B,) int32 or None: the slot of each row; -1 is a padding row, whose output is zero
            and whose state stays. Without it row b owns slot b.

    Returns:
        y like x. On the native backends it has no gradient: under grad mode with inputs that need one, the
        reference serves the call.

    Equivalent to::

        window = torch.cat([conv_state, x], -1); conv_state.copy_(window[..., -state_len:])
        y = F.conv1d(window[..., -(W - 1 + L):], weight[:, None], bias, groups=D)   # then F.silu
    """
    if not torch.compiler.is_compiling():
        y = _update_fast(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, backend)
        if y is not None:
            return y
    fn = "causal_conv1d_update"
    if not isinstance(x, torch.Tensor) or x.dim() not in (2, 3):
        checks.check_tensor(fn, "x", x, 3, "(B, D) or (B, D, L)")
    one = x.dim() == 2
    if one:
        x = x.unsqueeze(-1)
    checks.check_tensor(fn, "x", x, 3, "(B, D) or (B, D, L)")
    B, D, L = x.shape
    checks.check_positive(fn, D=D, L=L)
    _check_weight(fn, x, weight, bias, D)
    checks.check_tensor(fn, "conv_state", conv_state, 3, "(slots, D, state_len)", x)
    if conv_state.shape[1] != D or conv_state.shape[2] < weight.shape[1] - 1:
        checks.fail(fn, f"conv_state must be (slots, D, W-1 or more) = (*, {D}, {weight.shape[1] - 1} or more), "
                        f"got {checks.describe(conv_state)}")
    checks.check_writable(fn, "conv_state", conv_state)
    checks.check_slots(fn, "conv_state_indices", conv_state_indices, B, conv_state.shape[0], x)
    checks.check_optional(fn, "cache_seqlens", cache_seqlens, (B,), "(B,)", x, dtypes=(torch.int32,))
    if cache_seqlens is not None:
        checks.check_not_negative(fn, "cache_seqlens", cache_seqlens)
    silu = check_activation(fn, activation)
    chosen, _ = dispatch.pick("causal_conv1d_update", x, weight, bias, conv_state, backend=backend)
    cache_seqlens, conv_state_indices = (None if t is None else t.contiguous() for t in (cache_seqlens, conv_state_indices))
    if chosen != "reference":
        y = kernels.ops(chosen).causal_conv1d_update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
    else:
        dispatch.count(fn, chosen)
        y = reference.causal_conv1d_update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
    return y.squeeze(-1) if one else y


def _update_fast(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, backend):
    """A decoding step costs microseconds: straight to the kernel, which checks everything before it touches memory.

    None when it cannot serve the call or refuses it; the full checks then say why.
    """
    try:
        if not x.is_cpu or not dispatch.cpu_may_serve(_UPDATE, backend) or dispatch.needs_grad(x, weight, bias, conv_state):
            return None
        silu = ACTIVATIONS[activation]
        kernel = torch.ops.terrazzo.causal_conv1d_update.default
        if x.dim() == 3:
            return kernel(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
        return kernel(x.unsqueeze(-1), conv_state, weight, bias, silu, cache_seqlens, conv_state_indices).squeeze(-1)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        return None


def causal_conv1d_varlen_states(x, cu_seqlens, state_len, *, backend=None):
    """The convolution states after packed sequences: the last `state_len` inputs of each.

    Args:
        x: (T, D), all sequences concatenated. cu_seqlens: (S + 1,) int32. state_len: positions to keep, >= 1.

    Returns:
        (S, D, state_len) in x's dtype; sequences shorter than state_len have zeros before. No gradient on the
        native backends.
    """
    fn = "causal_conv1d_varlen_states"
    checks.check_tensor(fn, "x", x, 2, "(T, D)")
    checks.check_positive(fn, T=x.shape[0], D=x.shape[1])
    if cu_seqlens is None:
        checks.fail(fn, "cu_seqlens is missing: (sequences + 1,) int32", TypeError)
    checks.check_cu_seqlens(fn, cu_seqlens, 1, x.shape[0], x)
    checks.check_count(fn, "state_len", state_len, 1)
    chosen, _ = dispatch.pick(fn, x, backend=backend)
    dispatch.count(fn, chosen)
    if chosen != "reference":
        return kernels.ops(chosen).causal_conv1d_varlen_states(x, cu_seqlens, state_len)
    return reference.causal_conv1d_varlen_states(x, cu_seqlens, state_len)


# ---- shapes and gradients of the native ops ----------------------------------------------------------------


def _states(x, cu_seqlens):
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _like_layout(x):
    channel_last = x.stride(1) == 1 and x.stride(2) != 1
    B, D, L = x.shape
    return x.new_empty(B, L, D).transpose(1, 2) if channel_last else x.new_empty(B, D, L)


@kernels.register_fake("causal_conv1d_fwd")
def _(x, weight, bias, seq_idx, cu_seqlens, initial_states, return_final_states, silu):
    shape = (_states(x, cu_seqlens), x.shape[1], weight.shape[1] - 1) if return_final_states else (0,)
    return _like_layout(x), x.new_empty(shape)


@kernels.register_fake("causal_conv1d_bwd")
def _(dy, x, weight, bias, seq_idx, cu_seqlens, initial_states, dfinal_states, silu):
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    dinitial = x.new_empty(0) if initial_states is None else initial_states.new_empty(initial_states.shape)
    return _like_layout(x), weight.new_empty(weight.shape), dbias, dinitial


@kernels.register_fake("causal_conv1d_update")
def _(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    return x.new_empty(x.shape)


@kernels.register_fake("causal_conv1d_varlen_states")
def _(x, cu_seqlens, state_len):
    return x.new_empty(cu_seqlens.shape[0] - 1, state_len, x.shape[1]).transpose(1, 2)


def _setup_context(ctx, inputs, output):
    x, weight, bias, seq_idx, cu_seqlens, initial_states, return_final_states, silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, seq_idx, cu_seqlens, initial_states)
    ctx.silu = silu
    ctx.has_final_states = return_final_states


def _backward(ops, ctx, dy, dfinal_states):
    x, weight, bias, seq_idx, cu_seqlens, initial_states = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dfinal_states = dfinal_states if ctx.has_final_states else None
    dx, dweight, dbias, dinitial = ops.causal_conv1d_bwd(
        dy, x, weight, bias, seq_idx, cu_seqlens, initial_states, dfinal_states, ctx.silu
    )
    dbias = None if bias is None else dbias
    dinitial = None if initial_states is None else dinitial
    return dx, dweight, dbias, None, None, dinitial, None, None


kernels.register_autograd("causal_conv1d", _backward, _setup_context)
