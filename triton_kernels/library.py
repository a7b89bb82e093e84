"""Every Triton op on one screen: its schema, that of the native op of the same name (see csrc/library.cpp), and its launcher.

torch.ops.terrazzo_triton.<name> runs <name>_triton of the family's file. These ops exist without the compiled extension.
"""
import torch

from . import runtime

# family (the file of the launchers): schemas
SCHEMAS = {
    "local_attention": (
        "local_attention_fwd(Tensor q, Tensor k, Tensor v, int window, bool causal, float scale, Tensor? key_mask, Tensor? cu_seqlens) -> (Tensor, Tensor)",
        "local_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, int window, bool causal, float scale, Tensor? key_mask, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    ),
    "patch_cross_attention": (
        "patch_cross_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor patch_ids, int num_patches, bool bytes_ask, int k_per_patch, float scale, int window, Tensor? key_mask, Tensor? cu_seqlens) -> Tensor",
        "patch_cross_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor patch_ids, int num_patches, bool bytes_ask, int k_per_patch, float scale, int window, Tensor? key_mask, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    ),
    "rmsnorm_gated": (
        "rmsnorm_gated_fwd(Tensor x, Tensor weight, Tensor? z, float eps, int group_size, bool norm_before_gate) -> Tensor",
        "rmsnorm_gated_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? z, float eps, int group_size, bool norm_before_gate) -> (Tensor, Tensor, Tensor)",
    ),
}
NAMESPACE = "terrazzo_triton"
NAMES = {schema.partition("(")[0]: family for family, schemas in SCHEMAS.items() for schema in schemas}
counts: dict[str, int] = {}  # name -> launches since import or dispatch.reset_counters()


def _implementation(name, family):
    def launch(*args):
        launcher = getattr(runtime.load(family), f"{name}_triton")
        first = next(arg for arg in args if isinstance(arg, torch.Tensor))
        counts[name] = counts.get(name, 0) + 1
        with torch.cuda.device_of(first):
            return launcher(*args)

    return launch


_library = torch.library.Library(NAMESPACE, "DEF")
for _family, _schemas in SCHEMAS.items():
    for _schema in _schemas:
        _library.define(_schema)
for _name, _family in NAMES.items():
    _library.impl(_name, _implementation(_name, _family), "CompositeExplicitAutograd")
