"""Trains a small entropy model on the CPU: python -m terrazzo.models.train_entropy --out DIRECTORY [TEXT ...]

AdamW, cosine schedule over a time budget or a number of steps, windows of text that begin at a word, loss in bits per byte. The
text is models/data of the checkout unless files are named. At the end the threshold is set where the held-out text is cut into
patches of --patch-size bytes on average, and the share of patches that begin at a word is told, beside that of the untrained model.
"""
import argparse
import json
import math
import sys

import torch
import torch.nn.functional as F
from rich.console import Console

from ..text_patches import Cut, Rule, measure, starts_of
from .entropy_model import EntropyConfig, EntropyModel
from .training import add_arguments, batches, command, progress, read_text, train

FN = "terrazzo.models.train_entropy"


def loss_of(model, tokens):
    """Mean nats of a byte."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


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
    add_arguments(top, minutes=12.0, length=384)
    top.add_argument("--out", required=True, help="directory for model.safetensors and config.json")
    top.add_argument("--layers", type=int, default=4)
    top.add_argument("--width", type=int, default=160)
    top.add_argument("--heads", type=int, default=5)
    top.add_argument("--window", type=int, default=128, help="positions that a byte sees (default 128)")
    top.add_argument("--patch-size", type=float, default=4.75, help="mean bytes of a patch to set the threshold for (default 4.75)")
    return top


def main(argv=None):
    return command(run, parser().parse_args(argv))


def run(args):
    if args.minutes <= 0 or (args.steps is not None and args.steps < 1) or args.batch < 1 or args.length < 2:
        raise ValueError(f"{FN}: --minutes, --steps and --batch must be positive, --length at least 2")
    text, held_out = read_text(FN, args.texts, "train.txt.xz"), read_text(FN, args.held_out, "held_out.txt.xz")
    config = EntropyConfig(hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=args.heads, sliding_window=args.window,
                           intermediate_size=math.ceil(args.width / 12) * 32)
    torch.manual_seed(args.seed)
    model = EntropyModel(config)
    untrained = evaluate(model, held_out, args.patch_size)
    source = batches(FN, text, args.length, args.batch, torch.Generator().manual_seed(args.seed))
    with progress(args.json) as on_step:
        spent = train(model, source, loss_of, args.lr, args.minutes * 60, args.steps, on_step)
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
