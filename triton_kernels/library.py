"""Every Triton op on one screen: its schema, that of the native op of the same name (see csrc/library.cpp), and its launcher.

torch.ops.terrazzo_triton.<name> runs <name>_triton of the family's file. These ops exist without the compiled extension.
"""
import torch

from . import runtime

# family (the file of the launchers): schemas
SCHEMAS = {
    "rmsnorm_gated": (
        "rmsnorm_gated_fwd(Tensor x, Tensor weight, Tensor? z, float eps, int group_size, bool norm_before_gate) -> Tensor",
        "rmsnorm_gated_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? z, float eps, int group_size, bool norm_before_gate) -> (Tensor, Tensor, Tensor)",
    ),
    "entropy_patch": (
        "entropy_patch_fwd(Tensor logits, float threshold, int rule, float threshold_add, float patch_size, int max_length, Tensor? cu_seqlens, "
        "Tensor? valid_lengths, bool next) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        "entropy_patch_bwd(Tensor dentropies, Tensor logits, Tensor? valid_lengths) -> Tensor",
        "patch_cut(Tensor source, float threshold, int rule, float threshold_add, float patch_size, int max_length, int offset, Tensor? cu_seqlens, "
        "Tensor? valid_lengths, bool next) -> (Tensor, Tensor, Tensor, Tensor)",
        "patcher_update(Tensor entropies, Tensor(a!) state, Tensor(b!) before, float threshold, int rule, float threshold_add, int max_length) "
        "-> (Tensor, Tensor)",
        "patch_ids(Tensor lengths, int length) -> Tensor",
    ),
    "byte_hash_embedding": (
        "byte_hash_ids(Tensor tokens, int[] group_sizes, int num_functions, int vocab, Tensor? cu_seqlens) -> Tensor",
        "byte_hash_embedding_fwd(Tensor tokens, Tensor table, Tensor byte_embedding, int[] group_sizes, int num_functions, int vocab, "
        "Tensor? cu_seqlens, bool sparse_grad) -> Tensor",
        "byte_hash_embedding_bwd(Tensor dy, Tensor tokens, Tensor table_like, int table_rows, Tensor byte_like, int byte_rows, int[] group_sizes, "
        "int num_functions, int vocab, Tensor? cu_seqlens, bool sparse_grad, bool need_table, bool need_bytes) -> (Tensor, Tensor, Tensor)",
    ),
    "patch_reduce": (
        "patch_reduce_fwd(Tensor h, Tensor patch_ids, int num_patches, int reduce) -> Tensor",
        "patch_reduce_bwd(Tensor dy, Tensor h, Tensor y, Tensor patch_ids, int reduce) -> Tensor",
    ),
}
NAMESPACE = "terrazzo_triton"
# op: (*args) -> the kernel it counts as, where that isn't its own name
COUNTED_AS = {"patch_cut": lambda source, *rest: "patch_cut" if source.is_floating_point() else "patch_cut_tokens"}
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


_library = torch.library.Library(NAMESPACE, "DEF")
for _family, _schemas in SCHEMAS.items():
    for _schema in _schemas:
        _library.define(_schema)
for _name, _family in NAMES.items():
    _library.impl(_name, _implementation(_name, _family), "CompositeExplicitAutograd")
