"""Models beyond one machine, on torch.distributed, DeviceMesh and DTensor.

Expert parallelism: `expert_parallel`, `reduce_gradients`. Context parallelism: `context_parallel` of a model whose rows lie in stretches on different ranks,
and its two ops, `causal_conv1d_fn` and `mamba_chunk_scan_combined`. Tensor parallelism: `tensor_parallel`, `plan`, `full_tensor`. All ops take DTensors.
`traffic` counts the bytes sent. See docs/distributed.md.
"""
from . import sharding_rules, volume  # noqa: F401  importing the rules registers them
from .comm import reset_traffic, traffic
from .context_model import context_parallel
from .context_parallel import causal_conv1d_fn, mamba_chunk_scan_combined
from .expert_parallel import expert_parallel, reduce_gradients
from .tensor_parallel import full_tensor, plan, tensor_parallel

__all__ = [
    "causal_conv1d_fn", "context_parallel", "expert_parallel", "full_tensor", "mamba_chunk_scan_combined", "plan", "reduce_gradients", "reset_traffic",
    "tensor_parallel", "traffic", "volume",
]  # fmt: skip
