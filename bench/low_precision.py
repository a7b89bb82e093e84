"""Model rows in bfloat16: whole Hugging Face models, as they are and patched, prompt and one step of decoding.

DBRX in its proportions (d 1024, f 1792, 16 experts, 4 chosen), one Bamba block, and Blenderbot-400M's shape with a batch of 8.
bfloat16 routes and rounds differently in each: the outputs are compared by their normalised error.
"""
import torch

import terrazzo

from .cases import Case, Provider, Unavailable, generator
from .model import NO_MASKS, cached_step, with_mamba2_parameters
from .roofline import Work

VOCAB = 260
NMSE_LIMIT = 1e-2
PROMPT = 256
SIZES = {"dbrx": 1024, "bamba-9b": 1024, "blenderbot-400m": 1280}  # preset -> hidden size


def _dbrx(hidden):
    from transformers import DbrxConfig, DbrxForCausalLM

    return DbrxForCausalLM(DbrxConfig(
        d_model=hidden, n_heads=hidden // 64, n_layers=1, vocab_size=VOCAB, max_seq_len=4096, attn_config=dict(kv_n_heads=4, clip_qkv=8.0, rope_theta=500000.0),
        ffn_config=dict(ffn_hidden_size=hidden * 7 // 4, moe_num_experts=16, moe_top_k=4, moe_normalize_expert_weights=1.0),
    ))  # fmt: skip


def _bamba(hidden):
    from transformers import BambaForCausalLM

    from .model import _config

    return with_mamba2_parameters(BambaForCausalLM(_config(hidden)))


def _blenderbot(hidden):
    """Blenderbot-400M at 1280; heads are 40 wide there."""
    from transformers import BlenderbotConfig, BlenderbotForConditionalGeneration

    heads = hidden // 40 if hidden % 40 == 0 else hidden // 32
    return BlenderbotForConditionalGeneration(BlenderbotConfig(
        vocab_size=8008, d_model=hidden, encoder_layers=2, decoder_layers=12, encoder_attention_heads=heads, decoder_attention_heads=heads,
        encoder_ffn_dim=4 * hidden, decoder_ffn_dim=4 * hidden, max_position_embeddings=128, dropout=0.0,
    ))  # fmt: skip


def _model(make, hidden, patched):
    before = torch.random.get_rng_state()
    torch.manual_seed(7)
    try:
        model = make(hidden).eval().to(torch.get_default_device(), torch.bfloat16)
        if patched:
            terrazzo.patch(model)
    except (ImportError, ValueError) as error:  # no transformers, or a model type that terrazzo.patch does not know
        raise Unavailable(str(error)) from error
    finally:
        torch.random.set_rng_state(before)
    return model


def _prefill(make, hidden, patched):
    model = _model(make, hidden, patched)
    return lambda input_ids: model(input_ids, use_cache=False).logits


def _decode(make, hidden, patched):
    return cached_step(_model(make, hidden, patched), **(dict(attention_mask=NO_MASKS) if make is _bamba else {}))


def _generate(make, hidden, patched):
    """One step of the decoder for 8 rows against an encoded prompt of 32 tokens; its cache starts anew after 64 steps."""
    model = _model(make, hidden, patched)
    encoded = model.get_encoder()(torch.arange(256, device=model.device).view(8, 32) % VOCAB)
    cache, seen = None, 0

    def step(input_ids):
        nonlocal cache, seen
        if seen % 64 == 0:
            cache = None
        seen += 1
        out = model(encoder_outputs=encoded, decoder_input_ids=input_ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        return out.logits

    return step


def _work(make, hidden, tokens):
    """The dense layers' multiply-adds, and the weights they read once: 2 bytes each."""
    if make is _blenderbot:
        weights = active = 12 * (8 * 1280 * 1280 + 2 * 1280 * 5120) + 1280 * 8008
    elif make is _bamba:
        weights = active = hidden * (4 * hidden + 256 + hidden // 32) + 2 * hidden * hidden + 3 * hidden * (hidden * 7 // 2) + hidden * VOCAB
    else:
        attention, expert = 2 * hidden * hidden + 512 * hidden, 3 * hidden * (hidden * 7 // 4)
        active, weights = attention + 4 * expert + hidden * VOCAB, attention + min(16, 4 * tokens) * expert + hidden * VOCAB
    return Work(2 * tokens * active, 2 * weights, "read")


JOBS = {
    "dbrx": (("dbrx prefill", _dbrx, _prefill, 1, PROMPT), ("dbrx decode", _dbrx, _decode, 1, 1)),
    "bamba-9b": (("bamba prefill", _bamba, _prefill, 1, PROMPT), ("bamba decode", _bamba, _decode, 1, 1)),
    "blenderbot-400m": (("blenderbot generate", _blenderbot, _generate, 8, 1),),
}


def cases(preset):
    hidden = SIZES[preset]
    found = []
    for job, make, build, batch, length in JOBS[preset]:

        def inputs(seed, batch=batch, length=length):
            return {"input_ids": torch.randint(0, VOCAB, (batch, length), generator=generator(seed))}

        def provider(patched, make=make, build=build):
            return lambda: build(make, hidden, patched)

        found.append(Case("bf16_model", f"{job} {batch}x{length}", "model", "bf16", _work(make, hidden, batch * length), inputs,
                          (Provider("terrazzo", provider(True), ours=True), Provider("hf", provider(False))), provider(False), nmse_limit=NMSE_LIMIT,
                          tokens=batch * length))
    return found
