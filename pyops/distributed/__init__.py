"""Models beyond one machine, on torch.distributed, DeviceMesh and DTensor.

Expert parallelism: `expert_parallel`, `reduce_gradients`. Context parallelism: `context_parallel` of a model whose rows lie in stretches on different ranks,
and its two ops, `causal_conv1d_fn` and `mamba_chunk_scan_combined`. `traffic` counts the bytes sent. See docs/distributed.md.
"""
from . import volume
from .comm import reset_traffic, traffic
from .context_model import context_parallel
from .context_parallel import causal_conv1d_fn, mamba_chunk_scan_combined
from .expert_parallel import expert_parallel, reduce_gradients

__all__ = ["causal_conv1d_fn", "context_parallel", "expert_parallel", "mamba_chunk_scan_combined", "reduce_gradients", "reset_traffic", "traffic", "volume"]
