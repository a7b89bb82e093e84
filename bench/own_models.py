"""Rows of terrazzo.models: the four models as they are defined here, against Hugging Face's of the same checkpoint, eager.

Random weights in the proportions of the published ones, made small: Bamba of a scanning and an attending layer, DBRX of one layer
with 16 experts of which 4 are asked, BLT with patches of 4.5 bytes, Blenderbot-400M in its own size. Hugging Face's BLT has no
cache that is right: it computes the whole text for every byte.
"""
import functools
import tempfile

import torch

from . import byte_model, low_precision
from .cases import DTYPES, Case, Provider, Unavailable, generator
from .model import PROMPT, VOCAB, cached_step, training_step, with_mamba2_parameters
from .roofline import Work

BLT_LAYERS = {"patcher": 4, "encoder": 1, "decoder": 5, "global": 8}
NMSE_LIMIT = {"fp32": 1e-8, "bf16": 1e-2}
SIZES = {"bamba-9b": 1024, "dbrx": 1024, "blt": 512, "blenderbot-400m": 1280, "tiny": 256}  # hidden size


def _bamba(hidden):
    from transformers import BambaConfig, BambaForCausalLM

    return with_mamba2_parameters(BambaForCausalLM(BambaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=2, attn_layer_indices=[1], num_attention_heads=hidden // 32,
        num_key_value_heads=2, mamba_n_heads=hidden * 2 // 64, mamba_d_head=64, mamba_n_groups=1, mamba_d_state=128,
    )))  # fmt: skip


def _blt(hidden):
    return byte_model.build(hidden, BLT_LAYERS)


def _blenderbot(hidden):
    model = low_precision._blenderbot(hidden)
    model.generation_config.update(num_beams=10, max_length=None, forced_eos_token_id=None)
    return model


@functools.cache
def _checkpoint(make, hidden, dtype):
    """A directory with the model's checkpoint, gone at exit."""
    try:
        torch.manual_seed(7)
        model = make(hidden).to(dtype)
    except ImportError as error:
        raise Unavailable("transformers is not installed: pip install terrazzo[hf]") from error
    folder = tempfile.TemporaryDirectory(prefix="terrazzo-bench-")
    model.save_pretrained(folder.name)
    return folder, type(model)


def _model(make, hidden, dtype, ours):
    from transformers.utils import logging

    from ..models import from_pretrained

    before = torch.random.get_rng_state()
    logging.disable_progress_bar()
    folder, theirs = _checkpoint(make, hidden, dtype)
    torch.random.set_rng_state(before)
    return from_pretrained(folder.name) if ours else theirs.from_pretrained(folder.name, dtype=dtype).eval()


def _prefill(make, hidden, dtype, ours):
    model = _model(make, hidden, dtype, ours)
    kwargs = {} if ours else {"use_cache": False}
    return lambda input_ids: model(input_ids, **kwargs).logits


def _decode(make, hidden, dtype, ours):
    """One token after another behind a short prompt."""
    model = _model(make, hidden, dtype, ours)
    if not ours:
        return cached_step(model)
    state = None

    def step(input_ids):
        nonlocal state
        if state is None:
            state = model.new_state()
            model(torch.arange(PROMPT)[None] % VOCAB, state=state)
        return model(input_ids, state=state).logits

    return step


def _decode_blt(context, make, hidden, dtype, ours):
    """One byte after another behind a text of `context` bytes; in transformers the whole text again."""
    model = _model(make, hidden, dtype, ours)
    text = torch.randint(4, VOCAB, (1, context), generator=generator(5))
    state = None

    def step(input_ids):
        nonlocal state, text
        if not ours:
            text = torch.cat([text, input_ids], 1)
            return model(text[:, 1:], use_cache=False).logits[:, -1:]
        if state is None:
            state = model.new_state()
            model(text[:, 1:], state=state)
        return model(input_ids, state=state).logits

    return step


def _train(make, hidden, dtype, ours):
    return training_step(_model(make, hidden, dtype, ours), **({} if ours else {"use_cache": False}))


def _generate(make, hidden, dtype, ours):
    """An answer of 40 tokens to a question of 32, by 10 beams."""
    model = _model(make, hidden, dtype, ours)
    kwargs = dict(num_beams=10, max_new_tokens=40, min_new_tokens=40)
    return lambda input_ids: model.generate(input_ids, **kwargs) if ours else model.generate(input_ids, do_sample=False, **kwargs)


def _weights(make, hidden, of_patch=0.2):
    """Multiply-adds of one token, and weights that are read for it. BLT's global model counts where a patch closes."""
    if make is _blenderbot:
        return (12 * (8 * 1280 * 1280 + 2 * 1280 * 5120) + 1280 * 8008,) * 2
    if make is _bamba:
        mamba = hidden * (4 * hidden + 256 + hidden // 32) + 2 * hidden * hidden
        return (mamba + 2 * hidden * hidden + hidden * 128 + 6 * hidden * (hidden * 7 // 2) + hidden * VOCAB,) * 2
    if make is _blt:
        patch = 8 * byte_model.layer_weights(2 * hidden) + 8 * hidden * hidden + 2 * 5 * 2 * hidden * hidden
        return (10 * byte_model.layer_weights(hidden) + 12 * hidden * hidden + 2 * VOCAB * hidden + (1 - byte_model.SURE) * patch,) * 2
    attention, expert = 2 * hidden * hidden + 512 * hidden, 3 * hidden * (hidden * 7 // 4)
    return attention + 4 * expert + hidden * VOCAB, attention + 4 * expert + hidden * VOCAB


def _work(make, hidden, dtype, tokens, train=False):
    active, weights = _weights(make, hidden)
    if make is low_precision._dbrx and tokens > 4:
        weights += 12 * 3 * hidden * (hidden * 7 // 4)
    return Work((6 if train else 2) * tokens * active, (10 if train else 1) * dtype.itemsize * weights, "read")


BOTH = ("fp32", "bf16")
JOBS = {
    "bamba-9b": [("bamba prefill", _bamba, _prefill, 512, BOTH), ("bamba decode", _bamba, _decode, 1, BOTH), ("bamba training step", _bamba, _train, 512, BOTH)],
    "dbrx": [("dbrx prefill", low_precision._dbrx, _prefill, 256, BOTH), ("dbrx decode", low_precision._dbrx, _decode, 1, BOTH)],
    "blenderbot-400m": [("blenderbot generate", _blenderbot, _generate, 32, ("fp32",))],
    "blt": [(f"blt decode behind {n}", _blt, functools.partial(_decode_blt, n), 1, ("fp32",)) for n in (512, 1024)],
    "tiny": [("bamba prefill", _bamba, _prefill, 24, BOTH), ("bamba decode", _bamba, _decode, 1, ("fp32",)), ("bamba training step", _bamba, _train, 24, ("fp32",)),
             ("dbrx decode", low_precision._dbrx, _decode, 1, ("fp32",)), ("blt decode behind 40", _blt, functools.partial(_decode_blt, 40), 1, ("fp32",))],
}  # fmt: skip


def cases(preset):
    hidden, found = SIZES[preset], []
    for job, make, build, length, dtypes in JOBS[preset]:
        for name in dtypes:

            def inputs(seed, length=length):
                return {"input_ids": torch.randint(4, VOCAB, (1, length), generator=generator(seed))}

            def provider(ours, make=make, build=build, dtype=DTYPES[name]):
                return lambda: build(make, hidden, dtype, ours)

            tokens = 400 if build is _generate else length
            found.append(Case("terrazzo.models", f"{job} 1x{length}", "model", name, _work(make, hidden, DTYPES[name], tokens, build is _train), inputs,
                              (Provider("terrazzo", provider(True), ours=True), Provider("hf", provider(False))), provider(False), nmse_limit=NMSE_LIMIT[name]))
    return found
