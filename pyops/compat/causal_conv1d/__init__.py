"""causal-conv1d's interface on terrazzo's ops. Source of the signatures: Dao-AILab/causal-conv1d 1.5."""
from terrazzo.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

__version__ = "1.5.0"
__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
