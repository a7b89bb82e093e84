"""`terrazzo demo`: Hugging Face's Bamba on real text, as it is and patched, side by side.

The model is BambaForCausalLM, 8 layers (one of them attention), hidden 512, bytes as tokens, weights random but
fixed, with Mamba-2's decay rates. The text is the Declaration of Independence (1776), in the public domain. Both sides run the same weights
on the same bytes in alternating order; the logits and the greedy continuation
of both are compared. At the end tiny-bamba, which is shipped and has learnt to read, goes on from the text's first words.
"""
import json
import sys
import time
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import terrazzo

from .bench import memory
from .bench.model import with_mamba2_parameters
from .bench.timer import median
from .charts import bars

REPEATS = 2  # of every step, the sides in alternating order, after a short warm-up
BEGUN, SAID = 60, 160  # bytes that tiny-bamba reads, and says
VOCAB = 259  # 256 bytes, then padding, begin and end of text
SIDES = ("transformers", "+ terrazzo")


def build_model():
    """The demo's model with its fixed weights."""
    from transformers import BambaConfig, BambaForCausalLM

    config = BambaConfig(
        vocab_size=VOCAB, pad_token_id=256, bos_token_id=257, eos_token_id=258, hidden_size=512, intermediate_size=1024,
        num_hidden_layers=8, attn_layer_indices=[4], num_attention_heads=8, num_key_value_heads=4, mamba_n_heads=16,
        mamba_d_head=64, mamba_n_groups=1, mamba_d_state=128, mamba_d_conv=4, mamba_expand=2, mamba_chunk_size=256,
    )  # fmt: skip
    before = torch.random.get_rng_state()
    torch.manual_seed(1776)
    model = with_mamba2_parameters(BambaForCausalLM(config)).eval()
    torch.random.set_rng_state(before)
    return model


@dataclass
class Side:
    """What was measured on one side; times in seconds."""

    prefill_s: list[float] = field(default_factory=list)
    train_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)  # between generated tokens
    prefill_peak: int | None = None
    train_peak: int | None = None
    logits: torch.Tensor | None = None
    continuation: list[int] = field(default_factory=list)
    loss: float | None = None


class _Stopwatch:
    """A streamer for generate() that notes when each token came."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def _timed(fn, into):
    start = time.perf_counter()
    result = fn()
    into.append(time.perf_counter() - start)
    return result


@torch.no_grad()
def _prefill(model, ids, side):
    def run():
        side.logits = _timed(lambda: model(ids, use_cache=False).logits, side.prefill_s)

    side.prefill_peak = memory.peak_of(run)


@torch.no_grad()
def _generate(model, ids, new_tokens, side):
    watch = _Stopwatch()
    out = model.generate(ids, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, streamer=watch)
    side.continuation = out[0, ids.shape[1] :].tolist()
    # The prompt and the first token arrive before any decoding step.
    side.token_s += [b - a for a, b in zip(watch.times[1:], watch.times[2:])]


def _train(model, ids, side):
    """Forward and backward; the weights stay as they are."""

    def run():
        model.train()
        model.zero_grad(set_to_none=True)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        side.loss = loss.item()
        model.zero_grad(set_to_none=True)
        model.eval()

    side.train_peak = memory.peak_of(lambda: _timed(run, side.train_s))


def measure(text, new_tokens, train_bytes, on_step=None):
    """{side name: Side}. The same model serves both: patched and put back between the steps."""
    on_step = on_step or (lambda name: None)
    model = build_model()
    ids = torch.tensor([list(text)])
    sides = {name: Side() for name in SIDES}

    def each(step, *rest, repeats=REPEATS):
        for repeat in range(repeats):
            for name in SIDES[:: 1 if repeat % 2 else -1]:
                on_step(f"{step.__name__.strip('_')}: {name}")
                if name == SIDES[1]:
                    with terrazzo.patch(model):
                        step(model, *rest, sides[name])
                else:
                    step(model, *rest, sides[name])

    each(_prefill, ids[:, :256], repeats=1)  # warm-up
    for side in sides.values():
        side.prefill_s.clear()
    each(_prefill, ids)
    each(_generate, ids, new_tokens)
    each(_train, ids[:, :train_bytes])
    return sides


STEPS = 2 * (1 + 3 * REPEATS)


def summarise(sides, length, train_length):
    """The numbers people and machines read."""
    plain, patched = (sides[name] for name in SIDES)
    difference = (plain.logits - patched.logits).abs().max().item()
    rows = {
        name: {
            "prefill_tokens_per_s": length / median(side.prefill_s),
            "decode_tokens_per_s": 1 / median(side.token_s),
            "train_step_s": median(side.train_s),
            "train_tokens_per_s": train_length / median(side.train_s),
            "prefill_peak_bytes": side.prefill_peak,
            "train_peak_bytes": side.train_peak,
            "loss": side.loss,
        }
        for name, side in sides.items()
    }
    return {
        "prompt_bytes": length,
        "train_bytes": train_length,
        "new_tokens": len(plain.continuation),
        "threads": torch.get_num_threads(),
        "sides": rows,
        "max_logit_difference": difference,
        "max_logit": plain.logits.abs().max().item(),
        "same_greedy_continuation": plain.continuation == patched.continuation,
        "same_best_token": (plain.logits.argmax(-1) == patched.logits.argmax(-1)).double().mean().item(),
    }


def _sample(text):
    """What the shipped tiny-bamba makes of a text's first whole words: {"prompt", "text"}."""
    from .models import Tokenizer, from_pretrained
    from .models.auto import locate

    tokenizer, model = Tokenizer.of(locate("tiny-bamba")), from_pretrained("tiny-bamba", torch.float32)
    begun = text[:BEGUN].decode("utf-8", "ignore").rpartition(" ")[0]
    ids = torch.tensor([tokenizer.encode(begun)])
    said = model.generate(ids, SAID, generator=torch.Generator().manual_seed(1776))
    return {"prompt": begun, "text": tokenizer.decode(said[0, ids.shape[1] :].tolist())}


def _ratio(rows, key):
    """How much better the patched side is; times and bytes are better when smaller."""
    a, b = rows[SIDES[0]][key], rows[SIDES[1]][key]
    if not a or not b:
        return None
    return b / a if key.endswith("per_s") else a / b


LINES = (
    ("prefill, tokens/s", "prefill_tokens_per_s", "{:.0f}", 1),
    ("decode, tokens/s", "decode_tokens_per_s", "{:.1f}", 1),
    ("training step, s", "train_step_s", "{:.2f}", 1),
    ("prefill peak memory, MB", "prefill_peak_bytes", "{:.0f}", 1e6),
    ("training peak memory, MB", "train_peak_bytes", "{:.0f}", 1e6),
    ("training loss", "loss", "{:.5f}", 1),
)


def _table(result):
    table = Table(title=f"Bamba, 8 layers, hidden 512, float32, {result['threads']} threads", title_justify="left", box=SIMPLE)
    for name in ("", *SIDES, "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    for label, key, form, unit in LINES:
        values = [result["sides"][side][key] for side in SIDES]
        ratio = None if key == "loss" else _ratio(result["sides"], key)
        table.add_row(label, *("–" if v is None else form.format(v / unit) for v in values), "" if ratio is None else f"{ratio:.2f}×")
    return table


def _chart(result):
    groups = [(label, [(side, result["sides"][side][key]) for side in SIDES])
              for label, key in (("prefill, tokens a second", "prefill_tokens_per_s"), ("decode, tokens a second", "decode_tokens_per_s"),
                                 ("training, tokens a second", "train_tokens_per_s"))]  # fmt: skip
    return bars("Hugging Face's Bamba as it is and patched by terrazzo", groups)


def main(args):
    text = Path(args.text).read_bytes() if args.text else files("terrazzo").joinpath("demo_text.txt").read_bytes()
    if args.bytes < 1 or args.new_tokens < 2 or args.train_bytes < 2:
        raise ValueError("terrazzo demo: --bytes must be at least 1, --new-tokens and --train-bytes at least 2")
    if len(text) < max(args.bytes, args.train_bytes):
        raise ValueError(f"terrazzo demo: the text has {len(text)} bytes, fewer than asked for; lower --bytes or --train-bytes")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # its advice to install other kernels is beside the point here
    prompt = text[: args.bytes]
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("building the model", total=STEPS + 1)
        sides = measure(prompt, args.new_tokens, args.train_bytes, lambda name: progress.update(task, advance=1, description=name))
    result = summarise(sides, len(prompt), min(args.train_bytes, len(prompt))) | {"sample": _sample(text)}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "demo.svg").write_text(_chart(result))
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        source = args.text or "the Declaration of Independence, 1776"
        console = Console(width=None if sys.stdout.isatty() else 100)
        console.print(f"{len(prompt)} bytes of {source}; {result['new_tokens']} new tokens; training on {result['train_bytes']} bytes", highlight=False)
        console.print(_table(result))
        console.print(f"largest logit difference {result['max_logit_difference']:.1e} of {result['max_logit']:.2f}; "
                      f"greedy continuation {'identical' if result['same_greedy_continuation'] else 'DIFFERENT'}", highlight=False)  # fmt: skip
        sample = Text.assemble("tiny-bamba goes on: ", (result["sample"]["prompt"], "dim"), result["sample"]["text"])
        console.print(sample, highlight=False)
        console.print(f"chart: {out / 'demo.svg'}   numbers: {out / 'demo.json'}", highlight=False)
    return 0 if result["same_greedy_continuation"] else 1
