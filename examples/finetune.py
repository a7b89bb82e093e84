"""Fine-tunes a model of terrazzo.models on a text: python examples/finetune.py --model tiny-bamba --out DIRECTORY TEXT

A plain PyTorch loop: AdamW on float32 weights, the products in bfloat16 by autocast, activations computed again in the backward pass
instead of kept, the step compiled: each a flag. Writes a checkpoint in Hugging Face's layout and the loss curve as a picture.
"""
import argparse
import random
from pathlib import Path

import torch
from rich.progress import track
from terrazzo.charts import curves
from terrazzo.models import Tokenizer, from_pretrained
from terrazzo.models.auto import locate


def windows(tokens, length, size, seed):
    """Endless (size, length) random pieces of the text."""
    if len(tokens) <= length:
        raise SystemExit(f"the text must be longer than --length {length} tokens, got {len(tokens)}")
    draw = random.Random(seed)
    while True:
        begins = [draw.randrange(len(tokens) - length) for _ in range(size)]
        yield torch.stack([tokens[begin : begin + length] for begin in begins])


def finetune(model, source, steps, lr, bf16=False, compiled=False):
    """Trains, and returns the loss of every step in nats per token."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1) if steps > 1 else None
    device = model.device

    def loss_of(ids):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return model(ids, labels=ids).loss

    step = torch.compile(loss_of) if compiled else loss_of
    model.train()
    losses = []
    for _ in track(range(steps), "fine-tuning", transient=True):
        loss = step(next(source).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


def parser():
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("text", help="a text file")
    top.add_argument("--model", default="tiny-bamba", help="a checkpoint of a Bamba, BLT or DBRX in Hugging Face's layout, or a shipped model (default tiny-bamba)")
    top.add_argument("--out", required=True, help="directory for the checkpoint and loss.svg")
    top.add_argument("--steps", type=int, default=100)
    top.add_argument("--length", type=int, default=256, help="tokens of a window (default 256)")
    top.add_argument("--batch", type=int, default=4, help="windows of a step (default 4)")
    top.add_argument("--lr", type=float, default=3e-4)
    top.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    top.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, more time")
    top.add_argument("--compile", action="store_true", help="torch.compile the forward and backward pass")
    top.add_argument("--device", default="cpu")
    top.add_argument("--seed", type=int, default=0)
    return top


def main(argv=None):
    args = parser().parse_args(argv)
    folder = locate(args.model)
    model = from_pretrained(folder, torch.float32, args.device)
    model.gradient_checkpointing = args.checkpointing
    tokens = torch.tensor(Tokenizer.of(folder).encode(Path(args.text).read_text(), special=False))
    torch.manual_seed(args.seed)
    losses = finetune(model, windows(tokens, args.length, args.batch, args.seed), args.steps, args.lr, args.bf16, args.compile)
    model.save_pretrained(args.out, torch.bfloat16)
    picture = curves(f"Fine-tuning {args.model}", [("training loss", list(enumerate(losses, 1)))], "step", "nats per token")
    Path(args.out, "loss.svg").write_text(picture)
    few = max(args.steps // 10, 1)
    print(f"loss {sum(losses[:few]) / few:.3f} -> {sum(losses[-few:]) / few:.3f} nats per token in {args.steps} steps; written: {args.out}")
    return losses


if __name__ == "__main__":
    main()
