"""Rows of terrazzo.models: the four models as they are defined here, against Hugging Face's of the same checkpoint, as it is and patched.

Prefill, decoding and one training step of each. Random weights in the proportions of the published ones, made small: Bamba of a scanning
and an attending layer, DBRX of one layer with 16 experts of which 4 are asked, BLT with patches of 4.5 bytes, Blenderbot-400M in its own
size; training steps of BLT and Blenderbot at half their widths. Hugging Face's BLT has no cache that is right: it computes the whole text
for every byte.
"""
import functools
import tempfile

import torch

import terrazzo

from . import byte_model, low_precision
from .cases import DTYPES, NO_TRANSFORMERS, Case, Provider, Unavailable, generator
from .model import PROMPT, VOCAB, cached_step, training_step, with_mamba2_parameters
from .roofline import Work

BLT_LAYERS = {"patcher": 4, "encoder": 1, "decoder": 5, "global": 8}
NMSE_LIMIT = {"fp32": 1e-8, "bf16": 1e-2}
SIZES = {"bamba-9b": 1024, "dbrx": 1024, "blt": 512, "blenderbot-400m": 1280, "tiny": 256}  # hidden size
ANSWER = 40  # tokens of `generate`
VALUES = 28  # of each kind of bytes, those that a patch goes on behind and those that end one
PERIOD = 2 * byte_model.KINDS  # bytes, of two inputs by turns
OURS, THEIRS, PATCHED = "terrazzo", "hf", "hf-patched"


def _bamba(hidden):
    from transformers import BambaConfig, BambaForCausalLM

    return with_mamba2_parameters(BambaForCausalLM(BambaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=2, attn_layer_indices=[1], num_attention_heads=hidden // 32,
        num_key_value_heads=2, mamba_n_heads=hidden * 2 // 64, mamba_d_head=64, mamba_n_groups=1, mamba_d_state=128,
    )))  # fmt: skip


def _blt(hidden):
    return byte_model.build(hidden, BLT_LAYERS)


def _small_blt(hidden):
    return byte_model.build(hidden // 2)


def _blenderbot(hidden):
    model = low_precision._blenderbot(hidden)
    model.generation_config.update(num_beams=10, max_length=None, forced_eos_token_id=None)
    return model


def _small_blenderbot(hidden):
    return low_precision._blenderbot(hidden // 2)


@functools.cache
def _checkpoint(make, hidden, dtype):
    """A directory with the model's checkpoint, gone at exit."""
    torch.manual_seed(7)
    model = make(hidden).to(dtype)
    folder = tempfile.TemporaryDirectory(prefix="terrazzo-bench-")
    model.save_pretrained(folder.name)
    return folder, type(model)


def _model(make, hidden, dtype, kind):
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise Unavailable(NO_TRANSFORMERS) from error
    from ..models import from_pretrained

    device, before = torch.get_default_device(), torch.random.get_rng_state()
    logging.disable_progress_bar()
    folder, theirs = _checkpoint(make, hidden, dtype)
    torch.random.set_rng_state(before)
    if kind == OURS:
        return from_pretrained(folder.name, device=device)
    model = theirs.from_pretrained(folder.name, dtype=dtype).eval().to(device)
    if kind == PATCHED:
        try:
            terrazzo.patch(model)
        except ValueError as error:  # nothing of this model, in this dtype on this machine, is ours to replace
            raise Unavailable(str(error)) from error
    return model


def _options(kind):
    return {} if kind == OURS else {"use_cache": False}


def _prefill(make, hidden, dtype, kind):
    model = _model(make, hidden, dtype, kind)
    return lambda input_ids: model(input_ids, **_options(kind)).logits


def _decode(make, hidden, dtype, kind):
    """One token after another behind a short prompt."""
    model = _model(make, hidden, dtype, kind)
    if kind != OURS:
        return cached_step(model)
    state = None

    def step(input_ids):
        nonlocal state
        if state is None:
            state = model.new_state()
            model(torch.arange(PROMPT, device=input_ids.device)[None] % VOCAB, state=state)
        return model(input_ids, state=state).logits

    return step


def _decode_blt(context, make, hidden, dtype, kind):
    """One byte after another behind a text of `context` bytes; in transformers the whole text again. No two bytes in a row are the same: their values go on
    from those of the inputs, so that in every PERIOD as many patches close as the text's mean length says."""
    model = _model(make, hidden, dtype, kind)
    text = torch.randint(4, VOCAB, (1, context), generator=generator(5), device="cpu").to(torch.get_default_device())
    state, said = None, 0

    def step(input_ids):
        nonlocal state, said, text
        input_ids = 4 + (input_ids + said) % (VALUES * byte_model.KINDS)
        said += 1
        if kind != OURS:
            text = torch.cat([text, input_ids], 1)
            return model(text[:, 1:], use_cache=False).logits[:, -1:]
        if state is None:
            state = model.new_state()
            model(text[:, 1:], state=state)
        return model(input_ids, state=state).logits

    return step


def _train(make, hidden, dtype, kind):
    return training_step(_model(make, hidden, dtype, kind), **_options(kind))


def _read_question(make, hidden, dtype, kind):
    """The chat is encoded, and the first token of the answer decoded."""
    model = _model(make, hidden, dtype, kind)
    start = torch.tensor([[model.config.decoder_start_token_id]], device=torch.get_default_device())
    return lambda input_ids: model(input_ids, decoder_input_ids=start, **_options(kind)).logits


def _answer(make, hidden, dtype, kind):
    """One token of an answer after another, against an encoded chat of 32 tokens; the answer starts anew after 64."""
    model = _model(make, hidden, dtype, kind)
    chat = torch.arange(4, 36, device=torch.get_default_device())[None]
    encoded = None if kind == OURS else model.get_encoder()(chat)
    kept, said = None, 0

    def step(input_ids):
        nonlocal kept, said
        if said % 64 == 0:
            kept = model.begin(chat, None)[1] if kind == OURS else None
        said += 1
        if kind == OURS:
            return model.advance(input_ids, kept)[:, None]
        out = model(encoder_outputs=encoded, decoder_input_ids=input_ids, past_key_values=kept, use_cache=True)
        kept = out.past_key_values
        return out.logits

    return step


def _generate(make, hidden, dtype, kind):
    """An answer of 40 tokens to a question of 32, by 10 beams."""
    model = _model(make, hidden, dtype, kind)
    kwargs = dict(num_beams=10, max_new_tokens=ANSWER, min_new_tokens=ANSWER)
    return lambda input_ids: model.generate(input_ids, **kwargs) if kind == OURS else model.generate(input_ids, do_sample=False, **kwargs)


def _weights(make, hidden, layers=BLT_LAYERS):
    """Multiply-adds of one token, and weights that are read for it. BLT's global model counts where a patch closes."""
    if make in (_small_blt, _small_blenderbot):
        return _weights(_blt if make is _small_blt else _blenderbot, hidden // 2, layers=byte_model.LAYERS)
    if make is _blenderbot:
        return (12 * (8 * hidden * hidden + 2 * hidden * 4 * hidden) + hidden * 8008,) * 2
    if make is _bamba:
        mamba = hidden * (4 * hidden + 256 + hidden // 32) + 2 * hidden * hidden
        return (mamba + 2 * hidden * hidden + hidden * 128 + 6 * hidden * (hidden * 7 // 2) + hidden * VOCAB,) * 2
    if make is _blt:
        local = layers["patcher"] + layers["encoder"] + layers["decoder"]
        patch = layers["global"] * byte_model.layer_weights(2 * hidden) + 8 * hidden * hidden + 2 * layers["decoder"] * 2 * hidden * hidden
        crosses = 2 * (layers["decoder"] + 1) * hidden * hidden
        return (local * byte_model.layer_weights(hidden) + crosses + 2 * VOCAB * hidden + (1 - byte_model.SURE) * patch,) * 2
    attention, expert = 2 * hidden * hidden + 512 * hidden, 3 * hidden * (hidden * 7 // 4)
    return attention + 4 * expert + hidden * VOCAB, attention + 4 * expert + hidden * VOCAB


def _work(make, hidden, dtype, tokens, train=False):
    active, weights = _weights(make, hidden)
    if make is low_precision._dbrx and tokens > 4:
        weights += 12 * 3 * hidden * (hidden * 7 // 4)
    return Work((6 if train else 2) * tokens * active, (10 if train else 1) * dtype.itemsize * weights, "read")


BOTH, FP32 = ("fp32", "bf16"), ("fp32",)
# preset -> [(job, model, what it does, tokens given, dtypes)]
JOBS = {
    "bamba-9b": [("bamba prefill", _bamba, _prefill, 512, BOTH), ("bamba decode", _bamba, _decode, 1, BOTH), ("bamba training step", _bamba, _train, 512, BOTH)],
    "dbrx": [("dbrx prefill", low_precision._dbrx, _prefill, 256, BOTH), ("dbrx decode", low_precision._dbrx, _decode, 1, BOTH),
             ("dbrx training step", low_precision._dbrx, _train, 256, FP32)],
    "blenderbot-400m": [("blenderbot prefill", _blenderbot, _read_question, 128, FP32), ("blenderbot decode", _blenderbot, _answer, 1, FP32),
                        ("blenderbot training step", _small_blenderbot, _train, 128, FP32), ("blenderbot generate", _blenderbot, _generate, 32, FP32)],
    "blt": [("blt prefill", _blt, _prefill, 1024, FP32), *((f"blt decode behind {n}", _blt, functools.partial(_decode_blt, n), 1, FP32) for n in (512, 1024)),
            ("blt training step", _small_blt, _train, 1024, FP32)],
    "tiny": [("bamba prefill", _bamba, _prefill, 24, BOTH), ("bamba decode", _bamba, _decode, 1, FP32), ("bamba training step", _bamba, _train, 24, FP32),
             ("dbrx decode", low_precision._dbrx, _decode, 1, FP32), ("dbrx training step", low_precision._dbrx, _train, 9, FP32),
             ("blt prefill", _small_blt, _prefill, 40, FP32), ("blt decode behind 40", _blt, functools.partial(_decode_blt, 40), 1, FP32),
             ("blt training step", _small_blt, _train, 40, FP32), ("blenderbot prefill", _small_blenderbot, _read_question, 9, FP32),
             ("blenderbot decode", _small_blenderbot, _answer, 1, FP32), ("blenderbot training step", _small_blenderbot, _train, 9, FP32)],
}  # fmt: skip


def cases(preset):
    hidden, found = SIZES[preset], []
    for job, make, build, length, dtypes in JOBS[preset]:
        for name in dtypes:

            def inputs(seed, length=length):
                return {"input_ids": torch.randint(4, VOCAB, (1, length), generator=generator(seed))}

            def provider(kind, make=make, build=build, dtype=DTYPES[name]):
                return lambda: build(make, hidden, dtype, kind)

            computed = 10 * ANSWER if build is _generate else length  # every beam is computed
            found.append(Case("terrazzo.models", f"{job} 1x{length}", "model", name, _work(make, hidden, DTYPES[name], computed, build is _train), inputs,
                              tuple(Provider(kind, provider(kind), ours=kind == OURS) for kind in (OURS, PATCHED, THEIRS)), provider(THEIRS),
                              nmse_limit=NMSE_LIMIT[name], tokens=ANSWER if build is _generate else length, unit="bytes" if job.startswith("blt") else "tokens",
                              period=PERIOD if job.startswith("blt decode") else 1))
    return found
