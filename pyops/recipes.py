"""What terrazzo.patch replaces in Hugging Face transformers, as data: one line per model type.

A recipe names functions of transformers.models.<type>.modeling_<type> and classes there whose forward is replaced,
and for each the public op, the adapter that calls it and the parameters the replaced function must have. What stands
in ANYWHERE needs no recipe: every class of experts behind transformers' ExpertsInterface, and torch's linear layers.
Written against transformers 5.23.0; patch() checks the version range and every signature before it touches anything.
"""
from dataclasses import dataclass, field

VERSIONS = ("5.23", "6")  # from, below


@dataclass(frozen=True)
class Swap:
    """One replaced function: the public op it calls, the adapter in adapters.py, the parameters it must have."""

    op: str
    adapter: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """functions: module-level name -> Swap; forwards: class -> Swap of its forward; left: name -> why it is not replaced."""

    functions: dict[str, Swap] = field(default_factory=dict)
    forwards: dict[str, Swap] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    versions: tuple[str, str] = VERSIONS


def _swap(op, adapter, parameters):
    return Swap(op, adapter, tuple(parameters.split()))


CONV = {
    "causal_conv1d_fn": _swap("causal_conv1d_fn", "conv", "hidden_states weight bias activation kwargs"),
    "causal_conv1d_update": _swap(
        "causal_conv1d_update", "conv_update", "hidden_states conv_state weight bias activation"
    ),
}
_STATE_UPDATE = _swap(
    "selective_state_update", "state_update", "state hidden_states dt A B C D dt_bias dt_softplus z kwargs"
)
MAMBA1 = CONV | {"mamba_selective_state_update": _STATE_UPDATE}
MAMBA2 = CONV | {
    "mamba2_selective_state_update": _STATE_UPDATE,
    "mamba2_chunk_scan": _swap(
        "mamba_chunk_scan_combined",
        "chunk_scan",
        "hidden_states dt A B C chunk_size D dt_bias initial_states dt_softplus dt_limit return_final_states kwargs",
    ),
    "mamba2_split_conv1d_scan_combined": _swap(
        "mamba_split_conv1d_scan_combined",
        "split_scan",
        "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states dt_limit return_final_states activation"
        " rmsnorm_weight rmsnorm_eps outproj_weight outproj_bias headdim ngroups norm_before_gate kwargs",
    ),
}
# The gate is applied before the norm (Mamba-2), after it (gated delta nets), or as the module says (Falcon-H1).
GATE_FIRST = _swap("rmsnorm_gated", "norm_gate_first", "self hidden_states gate")
NORM_FIRST = _swap("rmsnorm_gated", "norm_first", "self hidden_states gate")
FALCON_NORM = _swap("rmsnorm_gated", "norm_falcon_h1", "self hidden_states gate")
DBRX_EXPERTS = _swap("fused_experts", "dbrx_experts", "self hidden_states top_k_index top_k_weights")

# Replaced in models of any type, name of the kind -> Swap of the forward.
ANYWHERE = {
    "experts": _swap("fused_experts", "experts", "self hidden_states top_k_index top_k_weights"),
    "linear": _swap("linear", "linear", "self input"),
}

SELECTIVE_SCAN = {"mamba_selective_scan": "Mamba-1's selective scan is not an op of terrazzo"}
DELTA_RULE = {
    "torch_chunk_gated_delta_rule": "the gated delta rule is not an op of terrazzo",
    "torch_recurrent_gated_delta_rule": "the gated delta rule is not an op of terrazzo",
}
DELTA_ATTENTION = {
    "chunk_kimi_delta_attention": "Kimi delta attention is not an op of terrazzo",
    "recurrent_kimi_delta_attention": "Kimi delta attention is not an op of terrazzo",
}
SIGMOID_NORM = "its gate is a sigmoid, terrazzo.rmsnorm_gated's a silu"

RECIPES = {
    "bamba": Recipe(MAMBA2, {"BambaRMSNormGated": GATE_FIRST}),
    "falcon_h1": Recipe(MAMBA2, {"FalconH1RMSNormGated": FALCON_NORM}),
    "granitemoehybrid": Recipe(MAMBA2, {"GraniteMoeHybridRMSNormGated": GATE_FIRST}),
    "mamba2": Recipe(MAMBA2, {"MambaRMSNormGated": GATE_FIRST}),
    "nemotron_h": Recipe(MAMBA2, {"NemotronHRMSNormGated": GATE_FIRST}),
    "zamba2": Recipe(MAMBA2, {"Zamba2RMSNormGated": GATE_FIRST}),
    "falcon_mamba": Recipe(MAMBA1, left=SELECTIVE_SCAN),
    "jamba": Recipe(MAMBA1, left=SELECTIVE_SCAN),
    "mamba": Recipe(MAMBA1, left=SELECTIVE_SCAN),
    "zamba": Recipe(MAMBA1, left=SELECTIVE_SCAN),
    "olmo_hybrid": Recipe(CONV, {"OlmoHybridRMSNormGated": NORM_FIRST}, DELTA_RULE),
    "qwen3_5": Recipe(CONV, {"Qwen3_5RMSNormGated": NORM_FIRST}, DELTA_RULE),
    "qwen3_5_moe": Recipe(CONV, {"Qwen3_5MoeRMSNormGated": NORM_FIRST}, DELTA_RULE),
    "qwen3_next": Recipe(CONV, {"Qwen3NextRMSNormGated": NORM_FIRST}, DELTA_RULE),
    "qwen4_exp": Recipe(CONV, {"Qwen4ExpTextRMSNormGated": NORM_FIRST}, DELTA_RULE),
    "bailing_hybrid": Recipe(CONV, left=DELTA_ATTENTION | {"BailingHybridRMSNormGated": SIGMOID_NORM}),
    "glm5_next": Recipe(CONV, left=DELTA_ATTENTION | {"Glm5NextTextRMSNormGated": SIGMOID_NORM}),
    "kimi_linear": Recipe(CONV, left=DELTA_ATTENTION | {"KimiLinearRMSNormGated": SIGMOID_NORM}),
    "inkling": Recipe(CONV),
    "inkling2": Recipe(CONV, left={"Inkling2DynamicShortConvolution": "its taps change with every token"}),
    "dbrx": Recipe(forwards={"DbrxExperts": DBRX_EXPERTS}),
    "lfm2": Recipe(CONV),
    "lfm2_moe": Recipe(CONV),
    "lfm3": Recipe(CONV),  # 7 taps by default: such calls stay with transformers, see adapters.py
}

# Model types with experts decorated by transformers.integrations.moe.use_experts_implementation.
EXPERTS = tuple("""
    afmoe aria axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4
    diffusion_gemma dots1 dots3_note ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint gemma4 glm4_moe glm4_moe_lite
    glm4v_moe glm5_next glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3
    hy_v4 inkling inkling2 jamba kimi_linear kolibri1 laguna lfm2_moe mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl
    mistral4 mistral_large4 mixtral muse_spark nemotron_h olmoe openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_moe
    qwen3_next qwen3_omni_moe qwen3_vl_moe qwen4_exp solar_open unlimited_ocr zaya
""".split())
SUPPORTED = sorted({*RECIPES, *EXPERTS})


def modeling_name(key):
    return f"transformers.models.{key}.modeling_{key}"


BY_MODULE = {modeling_name(key): key for key in RECIPES}
