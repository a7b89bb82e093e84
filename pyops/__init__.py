"""terrazzo: kernels for hybrid, mixture-of-experts and byte-level language models behind one set of PyTorch operators."""
from importlib.metadata import PackageNotFoundError, version

from .attention_update import attention_update
from .byte_hash_embedding import byte_hash_embedding, byte_hash_ids
from .causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_fn,
    causal_conv1d_varlen_states,
)
from .chunk_scan import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from .dispatch import BackendError, can_run, counters, pick, reset_counters, use_backend
from .entropy_patch import (
    Patches,
    PatcherState,
    entropy_patch,
    hf_patch_lengths,
    patch_ids_from_lengths,
    patch_lengths_from_entropies,
    patch_lengths_from_tokens,
    patches_from_entropies,
    split_patch_lengths,
)
from .fused_experts import fused_experts
from .grouped_gemm import gmm, grouped_mm
from .linear import linear
from .local_attention import local_attention
from .moe import load_balancing_loss, moe_permute, moe_route, moe_unpermute, router_z_loss
from .norm_linear import norm_linear
from .packing import PackedExperts, PackedWeight, pack_expert_weights, pack_experts, pack_weight
from .patch_cross_attention import patch_cross_attention
from .patch_reduce import patch_reduce
from .rmsnorm_gated import rmsnorm_gated
from .state_update import selective_state_update

try:
    __version__ = version("terrazzo")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+source"

__all__ = [
    "BackendError",
    "PackedExperts",
    "PackedWeight",
    "PatcherState",
    "Patches",
    "attention_update",
    "byte_hash_embedding",
    "byte_hash_ids",
    "can_run",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_fn",
    "causal_conv1d_varlen_states",
    "compat",
    "counters",
    "distributed",
    "entropy_patch",
    "fused_experts",
    "gmm",
    "grouped_mm",
    "hf_patch_lengths",
    "linear",
    "load_balancing_loss",
    "local_attention",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "moe_permute",
    "moe_route",
    "moe_unpermute",
    "norm_linear",
    "pack_expert_weights",
    "pack_experts",
    "pack_weight",
    "patch",
    "patch_cross_attention",
    "patch_reduce",
    "patch_ids_from_lengths",
    "patch_lengths_from_entropies",
    "patch_lengths_from_tokens",
    "patches_from_entropies",
    "pick",
    "reset_counters",
    "rmsnorm_gated",
    "router_z_loss",
    "selective_state_update",
    "split_patch_lengths",
    "use_backend",
]


def __getattr__(name):
    if name == "patch":  # kept out of the light import: the drop-in layer knows about transformers
        from .patching import patch

        return patch
    if name == "compat":
        import terrazzo.compat

        return terrazzo.compat
    if name == "distributed":
        import terrazzo.distributed

        return terrazzo.distributed
    raise AttributeError(f"module 'terrazzo' has no attribute {name!r}")
