"""Tiny random models of every transformers model type that terrazzo.patch knows."""
import importlib

import torch

VOCAB = 64
BASE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)
HYBRID = ["linear_attention", "full_attention"]
DELTA_NET = dict(
    head_dim=8, linear_conv_kernel_dim=4, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
    linear_num_value_heads=4, layer_types=HYBRID,
)
MOE = dict(moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
MAMBA2 = dict(
    mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=2, mamba_chunk_size=16, mamba_expand=2,
)
MLA = dict(kv_lora_rank=16, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8)
BLT_PART = {key: value for key, value in BASE.items() if key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")}
BLT_LOCAL = BLT_PART | dict(vocab_size=VOCAB, hidden_size_global=64)
# model type -> (class, its options); options override BASE, None drops one of it
MODELS = {
    "bamba": ("BambaForCausalLM", MAMBA2 | dict(attn_layer_indices=[1])),
    "falcon_h1": ("FalconH1ForCausalLM", MAMBA2 | dict(head_dim=8, mamba_d_ssm=64, mamba_rms_norm=True)),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", MAMBA2 | dict(
        layer_types=["mamba", "attention"], num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32)),
    "mamba2": ("Mamba2ForCausalLM", dict(
        num_heads=8, head_dim=8, state_size=16, n_groups=2, chunk_size=16, num_attention_heads=None,
        num_key_value_heads=None, intermediate_size=None)),
    "nemotron_h": ("NemotronHForCausalLM", dict(
        layers_block_type=["linear_attention", "full_attention", "moe"], num_hidden_layers=None, head_dim=8,
        ssm_state_size=16, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, chunk_size=16, n_routed_experts=4,
        moe_intermediate_size=16, moe_shared_expert_intermediate_size=16)),
    "zamba2": ("Zamba2ForCausalLM", dict(
        layers_block_type=["mamba", "hybrid", "mamba"], num_hidden_layers=3, mamba_d_state=16, mamba_ngroups=2,
        n_mamba_heads=8, mamba_headdim=8, chunk_size=16, num_key_value_heads=4, adapter_rank=8)),
    "falcon_mamba": ("FalconMambaForCausalLM", dict(
        state_size=16, num_attention_heads=None, num_key_value_heads=None, intermediate_size=None)),
    "mamba": ("MambaForCausalLM", dict(
        state_size=16, num_attention_heads=None, num_key_value_heads=None, intermediate_size=None)),
    "jamba": ("JambaForCausalLM", dict(
        num_experts=4, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=16, mamba_dt_rank=4)),
    "zamba": ("ZambaForCausalLM", dict(
        layers_block_type=["mamba", "hybrid", "hybrid"], num_hidden_layers=3, num_key_value_heads=4, mamba_d_state=16,
        mamba_dt_rank=4)),
    "olmo_hybrid": ("OlmoHybridForCausalLM", DELTA_NET | dict(head_dim=None, num_key_value_heads=4, linear_num_key_heads=4)),
    "qwen3_5": ("Qwen3_5ForCausalLM", DELTA_NET),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", DELTA_NET | MOE),
    "qwen3_next": ("Qwen3NextForCausalLM", DELTA_NET | MOE),
    "qwen4_exp": ("Qwen4ExpForCausalLM", DELTA_NET | MOE | dict(
        hc_count=2, hc_lowrank=8, ple_layer_ids=[], indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8,
        indexer_budget=16, indexer_compress_ratio=4)),
    "bailing_hybrid": ("BailingHybridForCausalLM", MLA | dict(
        moe_intermediate_size=16, num_local_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, head_dim=8,
        num_key_value_heads=4, first_k_dense_replace=1, layer_types=HYBRID, num_mtp_layers=0)),
    "kimi_linear": ("KimiLinearForCausalLM", MLA | dict(
        moe_intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=4, layer_types=HYBRID,
        mlp_layer_types=["dense", "sparse"], linear_head_dim=8, linear_num_heads=4)),
    "glm5_next": ("Glm5NextTextModel", dict(
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, num_key_value_heads=4, kv_lora_rank=16,
        q_lora_rank=16, v_head_dim=8, qk_nope_head_dim=8, linear_head_dim=8, linear_num_heads=4, hc_mult=2,
        layer_types=HYBRID, mlp_layer_types=["dense", "sparse"])),
    "inkling": ("InklingForCausalLM", dict(
        head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=8, d_rel=4,
        rel_extent=16, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1)),
    "inkling2": ("Inkling2ForCausalLM", dict(
        unpadded_vocab_size=VOCAB, head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8,
        sliding_window_size=8, d_rel=4, rel_extent=16, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, n_layers_per_attn_res_block=1, intermediate_size=None)),
    "blt": ("BltForCausalLM", dict.fromkeys(BLT_PART) | dict(
        use_cache=False, local_attention_window_len=8, patching_threshold=3.62, encoder_hash_byte_group_size=[3, 4, 5], encoder_hash_byte_group_vocab=50,
        patcher_config=BLT_PART | dict(vocab_size=VOCAB, sliding_window=8), encoder_config=BLT_LOCAL, decoder_config=BLT_LOCAL,
        global_config=BLT_PART | dict(hidden_size=64))),
    "dbrx": ("DbrxForCausalLM", dict(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, hidden_size=None, intermediate_size=None, num_hidden_layers=None,
        num_attention_heads=None, num_key_value_heads=None, attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(hidden_size=32, ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2, moe_jitter_eps=None))),
    "lfm2": ("Lfm2ForCausalLM", dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)),
    "lfm2_moe": ("Lfm2MoeForCausalLM", dict(
        layer_types=["conv", "full_attention"], moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        num_dense_layers=1)),
    "lfm3": ("Lfm3ForCausalLM", dict(layer_types=["conv", "full_attention"], head_dim=8, conv_L_cache=4)),
}

# Model types without a recipe, whose experts terrazzo.patch serves.
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=2, topk_group=1)
DEEPSEEK = MLA | ROUTED | dict(q_lora_rank=16, num_key_value_heads=4, first_k_dense_replace=1)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
EXPERT_MODELS = {
    "mixtral": ("MixtralForCausalLM", LOCAL),
    "qwen2_moe": ("Qwen2MoeForCausalLM", MOE),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE | dict(head_dim=8)),
    "olmoe": ("OlmoeForCausalLM", dict(num_experts=4, num_experts_per_tok=2)),
    "flex_olmo": ("FlexOlmoForCausalLM", dict(num_experts=4, num_experts_per_tok=2)),
    "deepseek_v2": ("DeepseekV2ForCausalLM", DEEPSEEK),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "gpt_oss": ("GptOssForCausalLM", LOCAL | dict(head_dim=8, sliding_window=8)),
    "granitemoe": ("GraniteMoeForCausalLM", LOCAL),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", LOCAL | dict(shared_intermediate_size=16)),
    "phimoe": ("PhimoeForCausalLM", LOCAL),
    "glm4_moe": ("Glm4MoeForCausalLM", ROUTED | dict(head_dim=8, first_k_dense_replace=1)),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", DEEPSEEK),
    "dots1": ("Dots1ForCausalLM", ROUTED | dict(head_dim=8, first_k_dense_replace=1, n_shared_experts=1)),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", dict(
        moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=0)),
    "minimax": ("MiniMaxForCausalLM", LOCAL | dict(head_dim=8, block_size=8)),
    "minimax_m2": ("MiniMaxM2ForCausalLM", LOCAL | dict(head_dim=8)),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", dict(num_experts=4, moe_topk=2, head_dim=8)),
    "aria": ("AriaTextForCausalLM", dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)),
    "afmoe": ("AfmoeForCausalLM", dict(
        num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, num_dense_layers=1,
        sliding_window=8)),
    "qwen3_vl_moe": ("Qwen3VLMoeTextModel", MOE | dict(head_dim=8)),
    "solar_open": ("SolarOpenForCausalLM", ROUTED | dict(head_dim=8)),
    "exaone_moe": ("ExaoneMoeForCausalLM", ROUTED | dict(num_experts=4, head_dim=8, first_k_dense_replace=1, sliding_window=8)),
    "cohere2_moe": ("Cohere2MoeForCausalLM", dict(num_experts=4, num_experts_per_tok=2, head_dim=8)),
    "openai_privacy_filter": ("OpenAIPrivacyFilterModel", LOCAL | dict(head_dim=8, sliding_window=8)),
    "hy_v3": ("HYV3ForCausalLM", dict(
        num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)),
    "hy_v4": ("HYV4ForCausalLM", dict(
        num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)),
    "beam": ("BeamForCausalLM", MOE | ROUTED | dict(head_dim=8, mlp_layer_types=["dense", "sparse"])),
    "flint": ("FlintForCausalLM", MOE | ROUTED | dict(head_dim=8, mlp_only_layers=[])),
    "zaya": ("ZayaForCausalLM", MOE | dict(head_dim=8, num_experts_per_tok=1)),
    "mistral4": ("Mistral4ForCausalLM", DEEPSEEK),
    "muse_spark": ("MuseSparkTextModel", MOE | LOCAL | dict(head_dim=8)),
    "deepseek_v4": ("DeepseekV4ForCausalLM", ROUTED),
    "minimax_m3_vl": ("MiniMaxM3VLForCausalLM", LOCAL | dict(head_dim=8)),
    "axk1": ("AXK1ForCausalLM", DEEPSEEK),
    "axk2": ("AXK2ForCausalLM", DEEPSEEK),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM", LOCAL | dict(sliding_window=8)),
    "kolibri1": ("Kolibri1ForCausalLM", MOE | ROUTED | dict(head_dim=8)),
    "laguna": ("LagunaForCausalLM", MOE | dict(head_dim=8)),
    "mellum": ("MellumForCausalLM", MOE | dict(head_dim=8)),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", ROUTED | dict(head_dim=8)),
    "deepseek_v32": ("DeepseekV32ForCausalLM", DEEPSEEK),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", DEEPSEEK),
    "gemma4": ("Gemma4ForCausalLM", dict(
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16, head_dim=8, global_head_dim=8,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=64)),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerTextModel", MOE | dict(head_dim=8)),
}


def make_config(model_type, **options):
    """The tiny configuration of a model type, with options of its own."""
    name, own = (MODELS | EXPERT_MODELS)[model_type]
    modeling = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    cls = getattr(modeling, name)
    merged = {key: value for key, value in (BASE | own | options).items() if value is not None or key.endswith("token_id")}
    return cls, cls.config_class(**merged)


def make_model(model_type, dtype=torch.float32, seed=0, **options):
    """A tiny random model in eval mode; every parameter is random, so that no path is multiplied by zero."""
    cls, config = make_config(model_type, **options)
    torch.manual_seed(seed)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            elif (parameter == parameter.flatten()[0]).all():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def tokens(rows, length, seed=1):
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
