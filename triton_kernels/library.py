"""Every Triton op on one screen: its schema, that of the native op of the same name (see csrc/library.cpp), and its launcher.

torch.ops.terrazzo_triton.<name> runs <name>_triton of the family's file. These ops exist without the compiled extension.
"""
import torch

from . import runtime

# family (the file of the launchers): schemas
SCHEMAS = {
    "linear": (
        "linear_fwd(Tensor x, Tensor weight, Tensor? bias, int activation) -> Tensor",
        "linear_bwd(Tensor dy, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    ),
    "fused_experts": (
        "fused_experts_fwd(Tensor x, Tensor w1, Tensor? w_up, Tensor w2, Tensor topk_weights, Tensor topk_indices, Tensor? bias1, Tensor? bias_up, Tensor? bias2, int activation, bool interleaved, float alpha, float limit, bool save) -> (Tensor, Tensor)",
        "fused_experts_bwd(Tensor dy, Tensor x, Tensor w1, Tensor? w_up, Tensor w2, Tensor topk_weights, Tensor topk_indices, Tensor? bias1, Tensor? bias_up, Tensor? bias2, int activation, bool interleaved, float alpha, float limit, Tensor saved, bool need_x, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    "moe": (
        "moe_route_fwd(Tensor logits, Tensor? bias, int top_k, float norm_order, bool softmax_first, bool sigmoid, int n_group, int topk_group, float scale) -> (Tensor, Tensor)",
        "moe_route_bwd(Tensor dweights, Tensor logits, Tensor indices, float norm_order, bool softmax_first, bool sigmoid, float scale) -> Tensor",
        "moe_permute(Tensor indices, int num_experts) -> (Tensor, Tensor, Tensor)",
        "moe_unpermute_fwd(Tensor rows, Tensor inverse, Tensor weights) -> Tensor",
        "moe_unpermute_bwd(Tensor dy, Tensor rows, Tensor inverse, Tensor weights) -> (Tensor, Tensor)",
    ),
    "grouped_gemm": (
        "grouped_gemm_fwd(Tensor a, Tensor b, Tensor offs, Tensor? bias) -> Tensor",
        "grouped_wgrad_fwd(Tensor a, Tensor b, Tensor offs) -> Tensor",
        "grouped_wgrad_bwd(Tensor dy, Tensor a, Tensor b, Tensor offs) -> (Tensor, Tensor)",
        "grouped_gemm_bwd(Tensor dy, Tensor a, Tensor b, Tensor offs, bool need_a, bool need_b, bool need_bias) -> (Tensor, Tensor, Tensor)",
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
