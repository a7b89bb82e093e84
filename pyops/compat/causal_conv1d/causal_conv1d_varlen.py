"""causal_conv1d.causal_conv1d_varlen: the states of packed sequences."""
from terrazzo.causal_conv1d import causal_conv1d_varlen_states


def causal_conv1d_varlen_states_ref(x, cu_seqlens, state_len):
    """causal_conv1d_varlen_states in plain torch."""
    return causal_conv1d_varlen_states(x, cu_seqlens, state_len, backend="reference")


__all__ = ["causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"]
