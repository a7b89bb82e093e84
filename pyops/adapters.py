"""The functions terrazzo.patch puts in the place of transformers' own: the same parameters, calling terrazzo's ops.

Each factory takes the replaced function and the backend asked for (None: automatic). A call that no native backend
can serve (a convolution of 7 taps, a GELU, a decode step that needs gradients, no compiled extension) goes to the
replaced function, so that a patched model is never slower. Packed sequences (seq_idx), which transformers' own code
refuses, always run here.
"""
import torch
from torch import nn

from . import dispatch
from .causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from .chunk_scan import mamba_chunk_scan_combined
from .rmsnorm_gated import rmsnorm_gated
from .state_update import selective_state_update

SILU = (None, "silu", "swish")


def serving(op, *tensors, backend=None):
    """(backend, "") that will serve this call of `op`, or (None, why transformers' own code does)."""
    if dispatch._wanted(dispatch.OPS[op], backend)[0] is not None:
        return dispatch.pick(op, *tensors, backend=backend)[0], ""
    refusals = []
    for candidate in dispatch.PREFERENCE.get(tensors[0].device.type, ()):
        why = dispatch.can_run(op, candidate, *tensors)
        if why is None:
            return candidate, ""
        refusals.append(f"{candidate}: {why}")
    return None, "; ".join(refusals) or f"no kernels for {tensors[0].device.type} tensors"


def conv(original, backend):
    def terrazzo_causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, seq_idx=None, **kwargs):
        chosen, _ = serving("causal_conv1d_fn", hidden_states, weight, bias, backend=backend)
        packed = seq_idx is not None
        if activation not in SILU or (chosen is None and not packed):
            return original(hidden_states, weight, bias, activation=activation, seq_idx=seq_idx)
        return causal_conv1d_fn(hidden_states, weight, bias, seq_idx, activation=activation, backend=chosen)

    return terrazzo_causal_conv1d_fn


def conv_update(original, backend):
    def terrazzo_causal_conv1d_update(hidden_states, conv_state, weight, bias=None, activation=None):
        chosen, _ = serving("causal_conv1d_update", hidden_states, weight, bias, conv_state, backend=backend)
        if chosen is None or activation not in SILU:
            return original(hidden_states, conv_state, weight, bias, activation=activation)
        return causal_conv1d_update(hidden_states, conv_state, weight, bias, activation, backend=chosen)

    return terrazzo_causal_conv1d_update


def state_update(original, backend):
    def terrazzo_selective_state_update(
        state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs
    ):
        tensors = (hidden_states, state, dt, A, B, C, D, z, dt_bias)
        chosen, _ = serving("selective_state_update", *tensors, backend=backend)
        if chosen is None:
            return original(
                state, hidden_states, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z
            )
        return selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus, backend=chosen)

    return terrazzo_selective_state_update


def chunk_scan(original, backend):
    def terrazzo_chunk_scan(
        hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False,
        dt_limit=(0.0, float("inf")), return_final_states=False, seq_idx=None, **kwargs,
    ):
        tensors = (hidden_states, dt, A, B, C, D, None, dt_bias, initial_states)
        chosen, _ = serving("mamba_chunk_scan_combined", *tensors, backend=backend)
        options = dict(
            D=D, dt_bias=dt_bias, initial_states=initial_states, dt_softplus=dt_softplus, dt_limit=tuple(dt_limit),
            return_final_states=return_final_states,
        )
        if chosen is None and seq_idx is None:
            return original(hidden_states, dt, A, B, C, chunk_size, **options)
        return mamba_chunk_scan_combined(
            hidden_states, dt, A, B, C, chunk_size, seq_idx=seq_idx, backend=chosen, **options
        )

    return terrazzo_chunk_scan


def split_scan(original, backend):
    """None means "go on": the mixer then runs convolution, scan and norm one by one, which are all replaced here,
    and, unlike the fused function, keeps padding out of the scan."""

    def terrazzo_split_scan(*args, **kwargs):
        return None

    return terrazzo_split_scan


def _gated_norm(module, x, gate, backend, group_size, norm_before_gate):
    """(y in x's dtype, or None when transformers' own code serves)."""
    chosen, _ = serving("rmsnorm_gated", x, module.weight, gate, backend=backend)
    if chosen is None:
        return None
    return rmsnorm_gated(
        x, module.weight, gate, module.variance_epsilon, group_size, norm_before_gate, backend=chosen
    )


def norm_gate_first(original, backend):
    def forward(self, hidden_states, gate=None):
        y = _gated_norm(self, hidden_states, gate, backend, self.group_size, False)
        if y is None:
            return original(self, hidden_states, gate)
        # transformers multiplies by the weight last, and so returns the wider of the two dtypes.
        return y.to(torch.promote_types(y.dtype, self.weight.dtype))

    return forward


def norm_first(original, backend):
    def forward(self, hidden_states, gate):
        y = None
        if self.activation in SILU:
            y = _gated_norm(self, hidden_states, gate, backend, None, True)
        return original(self, hidden_states, gate) if y is None else y

    return forward


def norm_falcon_h1(original, backend):
    def forward(self, hidden_states, gate=None):
        group_size = hidden_states.shape[-1] // self.n_groups
        y = _gated_norm(self, hidden_states, gate, backend, group_size, self.norm_before_gate)
        return original(self, hidden_states, gate) if y is None else y

    return forward


def probe(swap, module, dtype, device):
    """Tensors like those `module` will pass (module None: of usual sizes), for serving() to judge in a report."""
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device=device)

    if swap.adapter in ("conv", "conv_update"):
        taps = next((m.weight.squeeze(1) for m in _convolutions(module)), empty(8, 4))
        x = empty(1, taps.shape[0], 1)
        return (x, taps, None) if swap.adapter == "conv" else (x, taps, None, empty(1, *taps.shape))
    N = getattr(module, "ssm_state_size", 16)
    P = getattr(module, "head_dim", 4)
    A = empty(1, dtype=torch.float32)
    if swap.adapter == "state_update":
        state = empty(1, 1, P, N, dtype=torch.float32)
        x = empty(1, 1, P)
        return x, state, x, A.expand(1, P, N), empty(1, 1, N), empty(1, 1, N), x[0], None, x[0]
    if swap.adapter == "chunk_scan":
        BC = empty(1, 1, 1, N)
        return empty(1, 1, 1, P), empty(1, 1, 1), A, BC, BC, A, None, A, None
    weight = module.weight if module is not None else empty(8)
    x = empty(1, 1, weight.shape[0])
    return x, weight, x


def _convolutions(module):
    return [] if module is None else [m for m in module.modules() if isinstance(m, nn.Conv1d)]


def why_not(swap, module):
    """A reason the adapter knows of, other than the backends', for leaving `module`'s calls to transformers."""
    activation = getattr(module, "activation", None)
    if isinstance(activation, str) and activation not in SILU and swap.adapter in ("conv", "conv_update", "norm_first"):
        return f"activation {activation!r} is not served, only silu"
    return None
