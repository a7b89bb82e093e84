"""Trains a small byte-level Bamba or BLT on the CPU: python -m terrazzo.models.train --model bamba|blt --out DIRECTORY [TEXT ...]

AdamW, cosine schedule over a time budget or a number of steps, windows of text that begin at a word, loss in bits per byte. The
text is models/data of the checkout unless files are named. DIRECTORY gets a checkpoint in Hugging Face's layout, in bfloat16, and the
loss curve. At the end: bits per byte of the held-out text, beside what gzip and xz need for it. A BLT's patches are those of the
entropy model shipped with terrazzo, whose weights are part of the checkpoint and are not trained.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch
from rich.console import Console

from ..charts import curves
from .auto import from_pretrained
from .entropy_model import BOS, EntropyModel
from .loading import CONFIG, read_json
from .training import add_arguments, batches, bits_per_byte, command, compressed, progress, read_text, train

FN = "terrazzo.models.train"
NAMES = {"bamba": "Bamba", "blt": "BLT"}
PAD, EOS = 3, 2  # of the byte vocabulary: tokens 0 to 3 are special, 4 + b is byte b
GENERATION = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 400}


def bamba(args):
    """--layers, the middle one attends, the others scan."""
    from .bamba import Bamba, BambaConfig

    attends = [args.layers // 2] if args.layers > 1 else []
    heads = args.width // args.head_size
    config = BambaConfig(vocab_size=260, hidden_size=args.width, intermediate_size=2 * args.width, num_hidden_layers=args.layers,
                         num_attention_heads=heads, num_key_value_heads=heads // 2 or 1, attn_layer_indices=attends, mamba_n_heads=2 * heads,
                         mamba_d_state=args.state, max_position_embeddings=4096, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)  # fmt: skip
    model = Bamba(config)
    initialise(model, args.layers)
    return model


def blt(args):
    """--layers of the decoder, one of the encoder, two of the global model, which is twice as wide; patches of the shipped entropy model."""
    from .blt import Blt
    from .blt_config import BltConfig, StackConfig

    patcher = EntropyModel.from_pretrained()
    heads, inner = args.width // args.head_size, math.ceil(args.width / 12) * 32
    local = dict(hidden_size=args.width, num_attention_heads=heads, intermediate_size=inner, rope_theta=10000.0, max_position_embeddings=4096)
    whole = dict(hidden_size=2 * args.width, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=2 * inner, rope_theta=10000.0)
    config = BltConfig(patch_size=round(patcher.config.patch_size), patching_threshold=patcher.config.patching_threshold, local_attention_window_len=256,
                       encoder_hash_byte_group_vocab=args.hashes, bos_token_id=BOS, eos_token_id=EOS, encoder=StackConfig(**local, num_hidden_layers=1),
                       decoder=StackConfig(**local, num_hidden_layers=args.layers, cross_attn_all_layers=True),
                       global_=StackConfig(**whole, max_position_embeddings=4096), patcher=patcher.config)  # fmt: skip
    model = Blt(config)
    initialise(model, args.layers)
    model.model.patcher.load_state_dict(patcher.bfloat16().state_dict())  # as it is stored: the patches that the model learns on are those it will meet
    return model


MODELS = {"bamba": (bamba, {"layers": 4, "width": 256, "head_size": 64}), "blt": (blt, {"layers": 3, "width": 128, "head_size": 32})}


@torch.no_grad()
def initialise(model, layers):
    """Normal weights of variance 1 / width; what enters the residual stream is smaller by the root of its inputs' number, the head by four.
    Steps of the scan between 0.001 and 0.1, decay rates between 1 and 16, as Mamba-2 has them."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * layers)
            weight.normal_(0, std / 4 if name == "lm_head.weight" else std)
        elif name.endswith("conv1d.weight"):
            weight.uniform_(-0.5, 0.5)
        elif name.endswith("A_log"):
            weight.uniform_(1, 16).log_()
        elif name.endswith("dt_bias"):
            step = torch.empty_like(weight).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            weight.copy_(step + torch.log(-torch.expm1(-step)))


def begun(args):
    """The model to train, in float32."""
    if args.go_on_from is None:
        return MODELS[args.model][0](args)
    kind = read_json(FN, Path(args.go_on_from, CONFIG)).get("model_type")
    if kind != args.model:
        raise ValueError(f"{FN}: --go-on-from must hold a model of --model {args.model}, got {kind!r}")
    return from_pretrained(args.go_on_from, torch.float32)


def loss_of(model, tokens):
    """Mean nats of a byte."""
    return model(tokens, labels=tokens).loss


def parser():
    top = argparse.ArgumentParser(prog=f"python -m {FN}", description=__doc__.splitlines()[0])
    add_arguments(top, minutes=25.0, length=512)
    top.add_argument("--model", required=True, choices=MODELS)
    top.add_argument("--out", required=True, help="directory for config.json, model.safetensors and loss.svg")
    top.add_argument("--go-on-from", metavar="DIR", help="a checkpoint, instead of random weights; its sizes count")
    top.add_argument("--layers", type=int, help="(default: 4, of which one attends; of a BLT's decoder: 3)")
    top.add_argument("--width", type=int, help="(default: 256; of a BLT's bytes: 128)")
    top.add_argument("--head-size", type=int, help="(default: 64; BLT: 32)")
    top.add_argument("--state", type=int, default=64, help="of a Bamba's scan (default 64)")
    top.add_argument("--hashes", type=int, default=2048, help="rows of a BLT's table for n-grams of one length (default 2048)")
    top.add_argument("--compile", action="store_true", help="torch.compile the training step; needs a C++ compiler")
    return top


def main(argv=None):
    return command(run, parser().parse_args(argv))


def run(args):
    for name, value in MODELS[args.model][1].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    for name in ("minutes", "steps", "layers", "width", "head_size", "state", "hashes", "length", "batch", "lr"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"{FN}: --{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.width % args.head_size:
        raise ValueError(f"{FN}: --width must be a multiple of --head-size {args.head_size}, got {args.width}")
    text, held_out = read_text(FN, args.texts, "train.txt.xz"), read_text(FN, args.held_out, "held_out.txt.xz")
    torch.manual_seed(args.seed)
    model = begun(args)
    source = batches(FN, text, args.length, args.batch, torch.Generator().manual_seed(args.seed))
    history = []
    with progress(args.json) as show:

        def on_step(done, step, bits):
            show(done, step, bits)
            history.append(bits)

        step = torch.compile(loss_of) if args.compile else loss_of
        torch.set_flush_denormal(True)  # decays underflow, and CPUs crawl through subnormal numbers
        try:
            spent = train(model, source, step, args.lr, args.minutes * 60, args.steps, on_step)
        finally:
            torch.set_flush_denormal(False)
    model.bfloat16().float()  # what is stored is what is evaluated
    model.generation_config = GENERATION
    model.save_pretrained(args.out, torch.bfloat16)
    report = {"model": args.model, "parameters": sum(p.numel() for p in model.parameters()),
              "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad), "text_bytes": len(text), **spent,
              "held_out_bytes": len(held_out), "bits_per_byte": round(bits_per_byte(model, held_out, 2 * args.length), 4), **compressed(held_out)}  # fmt: skip
    Path(args.out, "loss.svg").write_text(loss_curve(history, args.batch * args.length / 1e6, report))
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        describe(report, args.out)
    return 0


def loss_curve(history, megabytes, report):
    """SVG of the loss over the bytes seen: means over a hundredth of the steps; megabytes: of one step."""
    group = math.ceil(len(history) / 100)
    means = [(min(end, len(history)) * megabytes, sum(part := history[end - group : end]) / len(part)) for end in range(group, len(history) + group, group)]
    levels = [(name, report[name]) for name in ("gzip", "xz")] + [("held out", report["bits_per_byte"])]
    return curves(f"A {NAMES[report['model']]} of {report['parameters'] / 1e6:.1f} M parameters learns to read", [("training loss", means)],
                  "million bytes seen", "bits per byte", levels)  # fmt: skip


def describe(report, out):
    console = Console(width=None if sys.stdout.isatty() else 120)
    rate = report["bytes"] / report["seconds"] / 1e3
    console.print(f"{report['trained_parameters'] / 1e6:.2f} M trained parameters of {report['parameters'] / 1e6:.2f} M, {report['steps']} steps over {report['bytes'] / 1e6:.2f} MB in {report['seconds']:.0f} s "
                  f"({rate:.1f} kB/s)", highlight=False)  # fmt: skip
    console.print(f"held out: {report['bits_per_byte']:.3f} bits per byte; of the same {report['held_out_bytes'] / 1e3:.0f} kB gzip needs {report['gzip']:.3f}, "
                  f"xz {report['xz']:.3f}\nwritten: {out}", highlight=False)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
