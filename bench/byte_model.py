"""Model rows of the Byte Latent Transformer: Hugging Face's BltForCausalLM, as it is and patched, one forward without a cache.

BLT-1B's proportions made small: windows of 512 bytes, two rows a patch, six n-gram sizes, cross-attention before each decoder
layer. The patcher does all its work, but its weights let a byte's entropy depend on that byte alone, near 0 or near 5.5 nats:
patches are 4.5 bytes long on average and rounding moves no boundary, so that both sides compute the same thing.
"""
import torch

import terrazzo

from .cases import DTYPES, NO_TRANSFORMERS, Case, Provider, Unavailable, generator
from .roofline import Work

VOCAB, WINDOW, HASHES, K = 260, 512, 20000, 2
LAYERS = {"patcher": 2, "encoder": 1, "decoder": 3, "global": 4}
KINDS = 9         # of bytes, by their value
SURE = 7 / KINDS  # of the bytes are followed by a byte of their patch
NMSE_LIMIT = {"fp32": 1e-8, "bf16": 1e-2}
SIZES = {"blt": (256, (4096, 8192)), "tiny": (64, (48,))}  # hidden size, bytes; the global transformer is twice as wide


def _ffn(hidden):
    return hidden * 11 // 4 // 8 * 8


def layer_weights(width):
    return 4 * width * width + 3 * width * _ffn(width)


def _config(hidden, layers):
    from transformers import BltConfig

    def part(name, width, **more):
        return dict(hidden_size=width, intermediate_size=_ffn(width), num_attention_heads=width // 64, num_hidden_layers=layers[name], **more)

    local = dict(vocab_size=VOCAB, hidden_size_global=2 * hidden)
    return BltConfig(
        vocab_size=VOCAB, local_attention_window_len=WINDOW, cross_attn_k=K, encoder_hash_byte_group_vocab=HASHES,
        patcher_config=part("patcher", hidden, vocab_size=VOCAB, sliding_window=WINDOW), encoder_config=part("encoder", hidden, **local),
        decoder_config=part("decoder", hidden, **local), global_config=part("global", 2 * hidden),
    )  # fmt: skip


@torch.no_grad()
def _with_clear_entropies(patcher):
    """Its layers add nothing to the embeddings, which the head turns into a sure guess or an even one."""
    for layer in patcher.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    sure = torch.arange(VOCAB) % KINDS < round(KINDS * SURE)
    patcher.embed_tokens.weight[:, 0] = torch.where(sure, 10.0, 0.0)
    patcher.lm_head.weight.mul_(0.1)
    patcher.lm_head.weight[:, 0] = torch.where(torch.arange(VOCAB) == 0, 10.0, 0.0)


def build(hidden, layers=LAYERS):
    """transformers' BltForCausalLM with random weights and clear entropies; layers: of each part."""
    from transformers import BltForCausalLM

    model = BltForCausalLM(_config(hidden, layers)).eval()
    _with_clear_entropies(model.model.patcher)
    return model


def _forward(hidden, dtype, patched):
    before = torch.random.get_rng_state()
    torch.manual_seed(7)
    try:
        model = build(hidden)
    except ImportError as error:
        raise Unavailable(NO_TRANSFORMERS) from error
    finally:
        torch.random.set_rng_state(before)
    model = model.to(torch.get_default_device(), dtype)
    if patched:
        terrazzo.patch(model)
    return lambda input_ids: model(input_ids, use_cache=False).logits


def _work(hidden, L, dtype):
    """The dense layers and the windows; the weights, read once."""
    patches, wide, local = L * (1 - SURE), 2 * hidden, LAYERS["patcher"] + LAYERS["encoder"] + LAYERS["decoder"]
    crosses = LAYERS["decoder"] + 1
    weights = local * layer_weights(hidden) + LAYERS["global"] * layer_weights(wide) + 4 * crosses * hidden * hidden + 2 * VOCAB * hidden
    of_byte = local * (layer_weights(hidden) + 2 * min(WINDOW, L) * hidden) + 2 * crosses * hidden * hidden + 2 * VOCAB * hidden
    of_patch = LAYERS["global"] * (layer_weights(wide) + patches * wide) + 2 * K * crosses * hidden * hidden + K * hidden * (hidden + wide)
    return Work(2 * (L * of_byte + patches * of_patch), dtype.itemsize * weights, "read")


def cases(preset):
    hidden, lengths = SIZES[preset]
    found = []
    for name in ("fp32", "bf16"):
        for L in lengths:

            def inputs(seed, L=L):
                return {"input_ids": torch.randint(4, VOCAB, (1, L), generator=generator(seed))}

            def provider(patched, dtype=DTYPES[name]):
                return lambda: _forward(hidden, dtype, patched)

            found.append(Case("blt_model", f"forward {L} bytes hidden {hidden}", "model", name, _work(hidden, L, DTYPES[name]), inputs,
                              (Provider("terrazzo", provider(True), ours=True), Provider("hf", provider(False))), provider(False),
                              nmse_limit=NMSE_LIMIT[name], tokens=L, unit="bytes"))
    return found
