"""mamba_ssm.ops.triton.selective_state_update."""
from terrazzo.state_update import selective_state_update


def selective_state_update_ref(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """selective_state_update in plain torch."""
    return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, backend="reference")


__all__ = ["selective_state_update", "selective_state_update_ref"]
