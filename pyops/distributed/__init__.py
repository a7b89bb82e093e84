"""Models beyond one machine, on torch.distributed, DeviceMesh and DTensor.

Expert parallelism: `expert_parallel`, `reduce_gradients`. `traffic` counts the bytes sent. See docs/distributed.md.
"""
from .comm import reset_traffic, traffic
from .expert_parallel import expert_parallel, reduce_gradients

__all__ = ["expert_parallel", "reduce_gradients", "reset_traffic", "traffic"]
