"""causal_conv1d.causal_conv1d_interface: the functions and their plain-torch references."""
from terrazzo.causal_conv1d import causal_conv1d_fn, causal_conv1d_update


def causal_conv1d_ref(
    x, weight, bias=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None
):
    """causal_conv1d_fn in plain torch."""
    return causal_conv1d_fn(
        x,
        weight,
        bias,
        initial_states=initial_states,
        return_final_states=return_final_states,
        final_states_out=final_states_out,
        activation=activation,
        backend="reference",
    )


def causal_conv1d_update_ref(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None):
    """causal_conv1d_update in plain torch."""
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, backend="reference")


__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_ref", "causal_conv1d_update_ref"]
