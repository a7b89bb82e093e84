"""Trains a small entropy model on the CPU: python -m terrazzo.models.train_entropy --out DIRECTORY [TEXT ...]

AdamW, cosine schedule over a time budget or a number of steps, windows of text that begin at a word, loss in bits per byte. The
text is models/data of the checkout unless files are named. At the end the threshold is set where the held-out text is cut into
patches of --patch-size bytes on average, and the share of patches that begin at a word is told, beside that of the untrained model.
"""
import argparse
import json
import lzma
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..text_patches import Cut, Rule, measure, starts_of
from .entropy_model import BOS, OFFSET, EntropyConfig, EntropyModel, word_starts

DATA = Path(__file__).with_name("data")
WARM_UP = 0.03  # of the budget
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0


def read_text(paths, default):
    """The bytes of these files, .xz ones unpacked, or of the default one."""
    if not paths and not (DATA / default).exists():
        raise FileNotFoundError("terrazzo.models.train_entropy: the training text comes with a checkout, not with the installed package; name text files")
    files = [Path(path) for path in paths] or [DATA / default]
    return np.frombuffer(b"".join(lzma.open(file).read() if file.suffix == ".xz" else file.read_bytes() for file in files), np.uint8)


def batches(text, length, size, generator):
    """Endless (size, length + 1) token windows: BOS and text from a word's start; an epoch goes through all of it in random order."""
    starts = np.flatnonzero(word_starts(text))
    starts = starts[starts < len(text) - length]
    if not len(starts):
        raise ValueError(f"terrazzo.models.train_entropy: the text must be longer than a window of {length} bytes, got {len(text)}")
    waiting = np.empty(0, np.int64)
    while True:
        while len(waiting) < size:
            phase = int(torch.randint(length, (), generator=generator))
            slots = np.searchsorted(starts, np.arange(phase, len(text) - length, length)) if len(text) - length > phase else np.array([0])
            fresh = starts[slots[slots < len(starts)]]
            waiting = np.concatenate([waiting, fresh[torch.randperm(len(fresh), generator=generator).numpy()]])
        chosen, waiting = waiting[:size], waiting[size:]
        window = text[chosen[:, None] + np.arange(length)]
        yield F.pad(torch.from_numpy(window.astype(np.int64)) + OFFSET, (1, 0), value=BOS)


def loss_of(model, tokens):
    """Mean nats of a byte."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def optimiser(model, lr):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


def factor(done):
    """Of the learning rate, when this share of the budget is done: a short rise, then a cosine down to a fiftieth."""
    if done < WARM_UP:
        return max(done / WARM_UP, 0.01)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min((done - WARM_UP) / (1 - WARM_UP), 1.0)))


def train(model, source, lr, seconds=None, steps=None, on_step=None):
    """Trains until either budget is spent; on_step(share done, step, loss in bits per byte). Returns steps, bytes and seconds."""
    adam, model = optimiser(model, lr), model.train()
    begin, step, seen = time.perf_counter(), 0, 0
    while True:
        taken = time.perf_counter() - begin
        done = step / steps if steps is not None else taken / seconds
        if done >= 1:
            model.eval()
            return {"steps": step, "bytes": seen, "seconds": round(taken, 1)}
        for group in adam.param_groups:
            group["lr"] = lr * factor(done)
        tokens = next(source)
        loss = loss_of(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adam.step()
        adam.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + tokens.numel() - tokens.shape[0]
        if on_step is not None:
            on_step(done, step, loss.item() / math.log(2))


def evaluate(model, text, patch_size):
    """Bits per byte, and the cut into patches of patch_size bytes on average: its threshold, its share of word starts."""
    rule = Rule(patch_size=patch_size)
    entropies, surprises = measure(model, text)
    cut = Cut(text, entropies, surprises, starts_of(text, entropies, rule), rule)
    facts, chosen = cut.statistics(), entropies[cut.starts[1:]]
    return {
        "bits_per_byte": round(facts["bits_per_byte"], 4),
        "patch_size": round(facts["mean_patch_length"], 2),
        "threshold": round(float(chosen.min()) if len(chosen) else 0.0, 4),
        **{share: round(facts[share] or 0.0, 4) for share in ("boundaries_at_word_starts", "word_starts_with_a_boundary")},
    }


def parser():
    top = argparse.ArgumentParser(prog="python -m terrazzo.models.train_entropy", description=__doc__.splitlines()[0])
    top.add_argument("texts", nargs="*", metavar="TEXT", help="text files, .xz ones too (default: the public-domain text of the checkout)")
    top.add_argument("--out", required=True, help="directory for model.safetensors and config.json")
    top.add_argument("--held-out", action="append", default=[], metavar="TEXT", help="text files to evaluate on (default: the checkout's)")
    top.add_argument("--minutes", type=float, default=12.0, help="time budget of the training; the schedule follows the clock (default 12)")
    top.add_argument("--steps", type=int, help="a number of steps instead: the same model on every run")
    top.add_argument("--layers", type=int, default=4)
    top.add_argument("--width", type=int, default=160)
    top.add_argument("--heads", type=int, default=5)
    top.add_argument("--window", type=int, default=128, help="positions that a byte sees (default 128)")
    top.add_argument("--length", type=int, default=384, help="bytes of a training window (default 384)")
    top.add_argument("--batch", type=int, default=4, help="windows of a step (default 4: many small steps suit a short budget)")
    top.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default 3e-3)")
    top.add_argument("--patch-size", type=float, default=4.75, help="mean bytes of a patch to set the threshold for (default 4.75)")
    top.add_argument("--seed", type=int, default=1776)
    top.add_argument("--json", action="store_true")
    return top


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def run(args):
    if args.minutes <= 0 or (args.steps is not None and args.steps < 1) or args.batch < 1 or args.length < 2:
        raise ValueError("terrazzo.models.train_entropy: --minutes, --steps and --batch must be positive, --length at least 2")
    text, held_out = read_text(args.texts, "train.txt.xz"), read_text(args.held_out, "held_out.txt.xz")
    config = EntropyConfig(hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=args.heads, sliding_window=args.window,
                           intermediate_size=math.ceil(args.width / 12) * 32)
    torch.manual_seed(args.seed)
    model = EntropyModel(config)
    untrained = evaluate(model, held_out, args.patch_size)
    source = batches(text, args.length, args.batch, torch.Generator().manual_seed(args.seed))
    console = Console(stderr=True)
    columns = TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=args.json) as progress:
        task, smooth = progress.add_task("", total=1.0), [None]

        def on_step(done, step, bits):
            smooth[0] = bits if smooth[0] is None else 0.98 * smooth[0] + 0.02 * bits
            if step % 20 == 0:
                progress.update(task, completed=done, description=f"step {step}, {smooth[0]:.3f} bits per byte")

        spent = train(model, source, args.lr, args.minutes * 60, args.steps, on_step)
    model.half().float()  # what is stored is what is evaluated
    trained = evaluate(model, held_out, args.patch_size)
    config.patching_threshold, config.patch_size = trained["threshold"], trained["patch_size"]
    model.save_pretrained(args.out, torch.float16)
    report = {"parameters": sum(p.numel() for p in model.parameters()), "text_bytes": len(text), **spent, "trained": trained, "untrained": untrained}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        describe(report, args.out)
    return 0


def describe(report, out):
    console = Console(width=None if sys.stdout.isatty() else 120)
    rate = report["bytes"] / report["seconds"] / 1e3
    console.print(f"{report['parameters'] / 1e6:.2f} M parameters, {report['steps']} steps over {report['bytes'] / 1e6:.2f} MB in {report['seconds']:.0f} s "
                  f"({rate:.1f} kB/s)", highlight=False)  # fmt: skip
    for name in ("trained", "untrained"):
        found = report[name]
        console.print(f"{name:>9}: {found['bits_per_byte']:.3f} bits per byte held out; patches of {found['patch_size']:.2f} bytes, "
                      f"{found['boundaries_at_word_starts']:.1%} of boundaries at word starts", highlight=False)  # fmt: skip
    console.print(f"written: {out}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
