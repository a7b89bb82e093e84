"""Tiny random models of transformers, saved as checkpoints, and ours read from them."""
import torch
import transformers
from terrazzo import models

BAMBA = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=16, mamba_chunk_size=16,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
DBRX = dict(vocab_size=97, d_model=32, n_heads=4, n_layers=3, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 5000.0}, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 3, "moe_loss_weight": 0.05, "moe_normalize_expert_weights": 1.0})  # fmt: skip
BLENDERBOT = dict(vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
                  encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, scale_embedding=True)  # fmt: skip
BLT_PART = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
BLT = dict(vocab_size=260, local_attention_window_len=9, patching_threshold=2.8, encoder_hash_byte_group_size=[3, 4, 5], encoder_hash_byte_group_vocab=50,
           pad_token_id=0, bos_token_id=1, eos_token_id=2, patcher_config=BLT_PART | dict(vocab_size=260, sliding_window=7, num_key_value_heads=2),
           encoder_config=BLT_PART | dict(cross_attn_all_layers=False, hidden_size_global=48, num_key_value_heads=2),
           decoder_config=BLT_PART | dict(num_hidden_layers=3, cross_attn_all_layers=True, hidden_size_global=48),
           global_config=BLT_PART | dict(hidden_size=48, num_key_value_heads=1))  # fmt: skip
KINDS = {
    "blt": (models.Blt, transformers.BltConfig, transformers.BltForCausalLM, BLT),
    "bamba": (models.Bamba, transformers.BambaConfig, transformers.BambaForCausalLM, BAMBA),
    "dbrx": (models.Dbrx, transformers.DbrxConfig, transformers.DbrxForCausalLM, DBRX),
    "blenderbot": (models.Blenderbot, transformers.BlenderbotConfig, transformers.BlenderbotForConditionalGeneration, BLENDERBOT),
}


def pair(kind, folder, **changes):
    """(ours, transformers'): the same weights, read from the same files, in evaluation mode."""
    ours, config, theirs, base = KINDS[kind]
    torch.manual_seed(0)
    model = theirs(config(**base | changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # everything that starts as a constant counts too, and logits are not all alike
            if weight.dim() < 2:
                weight.add_(0.1 * torch.randn_like(weight))
            else:
                weight.mul_(3)
    model.save_pretrained(folder)
    return ours.from_pretrained(folder), model


def ids(batch=2, length=13, vocab=97, seed=0):
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
