"""What terrazzo.patch replaces in Hugging Face transformers, as data: one line per model type.

A recipe names functions of transformers.models.<type>.modeling_<type> and methods of classes there that are replaced
("Class.method"; "Class" alone is its forward), and for each the public op, the adapter that calls it and the parameters
the replaced function must have. What stands
in ANYWHERE needs no recipe: every class of experts behind transformers' ExpertsInterface, torch's linear layers, and attention
that transformers' AttentionInterface computes.
Written against transformers 5.23.0; patch() checks the version range and every signature before it touches anything.
"""
from dataclasses import dataclass, field

VERSIONS = ("5.23", "6")  # from, below


@dataclass(frozen=True)
class Swap:
    """One replaced function: the public op it calls, the adapter in adapters.py or adapters_blt.py, the parameters it must have."""

    op: str
    adapter: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """functions: module-level name -> Swap; methods: class or "Class.method" -> Swap; left: name -> why it is not replaced."""

    functions: dict[str, Swap] = field(default_factory=dict)
    methods: dict[str, Swap] = field(default_factory=dict)
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
BLT_FUNCTIONS = {
    "compute_hash_embeddings": _swap("byte_hash_embedding", "blt_hash_embeddings", "local_encoder_tokens local_encoder encoder_hash_tok_embedding"
        " encoder_hash_byte_group_nb_functions encoder_hash_byte_group_size encoder_hash_byte_group_vocab"),
    "create_sliding_window_causal_mask": _swap("local_attention", "blt_window", "config inputs_embeds attention_mask past_key_values position_ids"
        " or_mask_function and_mask_function block_sequence_ids layer_idx allow_is_causal_skip"),
    "_prepare_patch_cross_attention_mask": _swap("patch_cross_attention", "blt_patch_mask",
        "patch_ids num_patches sequence_length patches_as_queries cross_attn_k dtype"),
}  # fmt: skip
BLT_METHODS = {
    "BltSelfAttention": _swap("local_attention", "blt_self_attention", "self hidden_states attention_mask position_embeddings past_key_values kwargs"),
    "BltCrossAttention": _swap("patch_cross_attention", "blt_cross_attention", "self hidden_states cross_attention_states attention_mask kwargs"),
    "BltLocalEncoder.patch_reduce": _swap("patch_reduce", "blt_patch_reduce", "self hidden_states max_num_patches patch_ids"),
    "BltPatcher.patch_lengths_from_entropies": _swap("patch_lengths_from_entropies", "blt_patch_lengths", "entropies sequence_length patch_size threshold"),
    "BltModel._patch_ids_from_lengths": _swap("patch_ids_from_lengths", "blt_patch_ids", "self patch_lengths seq_len"),
    "BltModel": _swap("use_cache", "blt_uncached", "self input_ids patch_lengths attention_mask position_ids past_key_values inputs_embeds use_cache kwargs"),
    "BltForCausalLM.generate": _swap("use_cache", "blt_generate", "self inputs generation_config logits_processor stopping_criteria"
        " prefix_allowed_tokens_fn synced_gpus assistant_model streamer negative_prompt_ids negative_prompt_attention_mask custom_generate kwargs"),
}  # fmt: skip

# Replaced in models of any type, name of the kind -> Swap of the forward; of attention, of the function that "sdpa" stands for.
ANYWHERE = {
    "experts": _swap("fused_experts", "experts", "self hidden_states top_k_index top_k_weights"),
    "linear": _swap("linear", "linear", "self input"),
    "attention": _swap("local_attention", "attention", "module query key value attention_mask dropout scaling is_causal position_bias cache kwargs"),
}
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # what attention layers of any type look their function up in

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
    "blt": Recipe(BLT_FUNCTIONS, BLT_METHODS),
    "dbrx": Recipe(methods={"DbrxExperts": DBRX_EXPERTS}),
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
