"""Every Triton op on one screen: its schema, that of the native op of the same name (see csrc/library.cpp), and its launcher.

torch.ops.terrazzo_triton.<name> runs <name>_triton of the family's file. These ops exist without the compiled extension.
"""
import sys

import torch

from . import runtime

# family (the file of the launchers): schemas
SCHEMAS = {
    "causal_conv1d": (
        "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? cu_seqlens, Tensor? initial_states, bool return_final_states, bool silu) -> (Tensor, Tensor)",
        "causal_conv1d_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? cu_seqlens, Tensor? initial_states, Tensor? dfinal_states, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
        "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, Tensor? cache_seqlens, Tensor? conv_state_indices) -> Tensor",
        "causal_conv1d_varlen_states(Tensor x, Tensor cu_seqlens, int state_len) -> Tensor",
    ),
    "chunk_scan": (
        "chunk_scan_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, float dt_min, float dt_max, bool return_final_states) -> (Tensor, Tensor)",
        "chunk_scan_bwd(Tensor dy, Tensor? dfinal_states, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, float dt_min, float dt_max) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    "state_update": (
        "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices) -> Tensor",
    ),
    "rmsnorm_gated": (
        "rmsnorm_gated_fwd(Tensor x, Tensor weight, Tensor? z, float eps, int group_size, bool norm_before_gate) -> Tensor",
        "rmsnorm_gated_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? z, float eps, int group_size, bool norm_before_gate) -> (Tensor, Tensor, Tensor)",
    ),
    "grouped_gemm": (
        "grouped_gemm_fwd(Tensor a, Tensor b, Tensor offs, Tensor? bias) -> Tensor",
        "grouped_wgrad_fwd(Tensor a, Tensor b, Tensor offs) -> Tensor",
        "grouped_wgrad_bwd(Tensor dy, Tensor a, Tensor b, Tensor offs) -> (Tensor, Tensor)",
        "grouped_gemm_bwd(Tensor dy, Tensor a, Tensor b, Tensor offs, bool need_a, bool need_b, bool need_bias) -> (Tensor, Tensor, Tensor)",
    ),
    "linear": (
        "linear_fwd(Tensor x, Tensor weight, Tensor? bias, int activation) -> Tensor",
        "linear_bwd(Tensor dy, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    ),
    "moe": (
        "moe_route_fwd(Tensor logits, Tensor? bias, int top_k, float norm_order, bool softmax_first, bool sigmoid, int n_group, int topk_group, float scale) -> (Tensor, Tensor)",
        "moe_route_bwd(Tensor dweights, Tensor logits, Tensor indices, float norm_order, bool softmax_first, bool sigmoid, float scale) -> Tensor",
        "moe_permute(Tensor indices, int num_experts) -> (Tensor, Tensor, Tensor)",
        "moe_unpermute_fwd(Tensor rows, Tensor inverse, Tensor weights) -> Tensor",
        "moe_unpermute_bwd(Tensor dy, Tensor rows, Tensor inverse, Tensor weights) -> (Tensor, Tensor)",
    ),
    "fused_experts": (
        "fused_experts_fwd(Tensor x, Tensor w1, Tensor? w_up, Tensor w2, Tensor topk_weights, Tensor topk_indices, Tensor? bias1, Tensor? bias_up, Tensor? bias2, int activation, bool interleaved, float alpha, float limit, bool save) -> (Tensor, Tensor)",
        "fused_experts_bwd(Tensor dy, Tensor x, Tensor w1, Tensor? w_up, Tensor w2, Tensor topk_weights, Tensor topk_indices, Tensor? bias1, Tensor? bias_up, Tensor? bias2, int activation, bool interleaved, float alpha, float limit, Tensor saved, bool need_x, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    "patch_reduce": (
        "patch_reduce_fwd(Tensor h, Tensor patch_ids, int num_patches, int reduce) -> Tensor",
        "patch_reduce_bwd(Tensor dy, Tensor h, Tensor y, Tensor patch_ids, int reduce) -> Tensor",
    ),
    "patch_cross_attention": (
        "patch_cross_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor patch_ids, int num_patches, bool bytes_ask, int k_per_patch, float scale, int window, Tensor? key_mask, Tensor? cu_seqlens) -> Tensor",
        "patch_cross_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor patch_ids, int num_patches, bool bytes_ask, int k_per_patch, float scale, int window, Tensor? key_mask, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    ),
    "local_attention": (
        "local_attention_fwd(Tensor q, Tensor k, Tensor v, int window, bool causal, float scale, Tensor? key_mask, Tensor? cu_seqlens) -> (Tensor, Tensor)",
        "local_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, int window, bool causal, float scale, Tensor? key_mask, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    ),
    "entropy_patch": (
        "entropy_patch_fwd(Tensor logits, float threshold, int rule, float threshold_add, float patch_size, int max_length, Tensor? cu_seqlens, Tensor? valid_lengths, bool next) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        "entropy_patch_bwd(Tensor dentropies, Tensor logits, Tensor? valid_lengths) -> Tensor",
        "patch_cut(Tensor source, float threshold, int rule, float threshold_add, float patch_size, int max_length, int offset, Tensor? cu_seqlens, Tensor? valid_lengths, bool next) -> (Tensor, Tensor, Tensor, Tensor)",
        "patcher_update(Tensor entropies, Tensor(a!) state, Tensor(b!) before, float threshold, int rule, float threshold_add, int max_length) -> (Tensor, Tensor)",
        "patch_ids(Tensor lengths, int length) -> Tensor",
    ),
    "byte_hash_embedding": (
        "byte_hash_ids(Tensor tokens, int[] group_sizes, int num_functions, int vocab, Tensor? cu_seqlens) -> Tensor",
        "byte_hash_embedding_fwd(Tensor tokens, Tensor table, Tensor byte_embedding, int[] group_sizes, int num_functions, int vocab, Tensor? cu_seqlens, bool sparse_grad) -> Tensor",
        "byte_hash_embedding_bwd(Tensor dy, Tensor tokens, Tensor table_like, int table_rows, Tensor byte_like, int byte_rows, int[] group_sizes, int num_functions, int vocab, Tensor? cu_seqlens, bool sparse_grad, bool need_table, bool need_bytes) -> (Tensor, Tensor, Tensor)",
    ),
}
NAMESPACE = "terrazzo_triton"
# op: (*args) -> the kernel it counts as, where that isn't its own name
COUNTED_AS = {"patch_cut": lambda source, *rest: "patch_cut" if source.is_floating_point() else "patch_cut_tokens"}
# Ops that torch.compile looks into: its graph holds their kernels' launches, see _open.
VISIBLE = ("causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update", "selective_state_update", "rmsnorm_gated_fwd", "rmsnorm_gated_bwd")
NAMES = {schema.partition("(")[0]: family for family, schemas in SCHEMAS.items() for schema in schemas}
counts: dict[str, int] = {}  # name -> launches since import or dispatch.reset_counters()


def _implementation(name, family):
    counted_as = COUNTED_AS.get(name)

    def launch(*args):
        launcher = getattr(runtime.load(family), f"{name}_triton")
        first = next(arg for arg in args if isinstance(arg, torch.Tensor))
        kernel = counted_as(*args) if counted_as else name
        counts[kernel] = counts.get(kernel, 0) + 1
        with torch.cuda.device_of(first):
            return launcher(*args)

    return launch


class _Kernels:
    """The kernels of one family, for the keys of torch.compile's caches; looked up when first asked for, since that imports triton."""

    def __init__(self, family):
        self.family = family

    def __iter__(self):
        from triton.runtime.jit import JITFunction

        family = runtime.load(self.family)
        files = {family.__name__} | {module for value in vars(family).values() if (module := getattr(value, "__module__", None) or "").startswith(__package__)}
        found = {id(value): value for file in sorted(files) for value in vars(sys.modules[file]).values() if isinstance(value, JITFunction)}
        return iter(found.values())


def _open(name, family):
    """What torch.library.triton_op does with its ops, for one that is defined here: when AOTAutograd traces the op, the launches
    of its kernels take its place. (triton_op itself takes schemas from annotations and imports triton on the spot.)"""
    from torch._library.triton import triton_ops_to_kernels
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    def in_a_graph(mode, op, types, args, kwargs):
        from torch.export._trace import custom_triton_ops_decomposition_disabled  # a second, and triton: not at import

        if runtime.interpreting() or custom_triton_ops_decomposition_disabled():  # exported programs keep the op
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode, runtime.tracing():
            return getattr(runtime.load(family), f"{name}_triton")(*args, **kwargs)

    torch.library.register_torch_dispatch(f"{NAMESPACE}::{name}", FunctionalTensorMode, in_a_graph, lib=_library)
    triton_ops_to_kernels[f"{NAMESPACE}::{name}"] = _Kernels(family)


_library = torch.library.Library(NAMESPACE, "DEF")
for _family, _schemas in SCHEMAS.items():
    for _schema in _schemas:
        _library.define(_schema)
for _name, _family in NAMES.items():
    _library.impl(_name, _implementation(_name, _family), "CompositeExplicitAutograd")
for _name in VISIBLE:
    _open(_name, NAMES[_name])
