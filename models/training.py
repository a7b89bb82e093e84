"""What the trainers share: windows of text, AdamW with a cosine schedule over a time budget or a number of steps, progress, baselines."""
import gzip
import lzma
import math
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .entropy_model import BOS, OFFSET, word_starts

DATA = Path(__file__).with_name("data")
WARM_UP = 0.03  # of the budget
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0


def add_arguments(parser, minutes, length):
    """What every trainer takes; minutes and length are defaults."""
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="text files, .xz ones too (default: the public-domain text of the checkout)")
    parser.add_argument("--held-out", action="append", default=[], metavar="TEXT", help="text files to evaluate on (default: the checkout's)")
    parser.add_argument("--minutes", type=float, default=minutes, help=f"time budget of the training; the schedule follows the clock (default {minutes:g})")
    parser.add_argument("--steps", type=int, help="a number of steps instead: the same model on every run")
    parser.add_argument("--length", type=int, default=length, help=f"bytes of a training window (default {length})")
    parser.add_argument("--batch", type=int, default=4, help="windows of a step (default 4: many small steps suit a short budget)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default 3e-3)")
    parser.add_argument("--seed", type=int, default=1776)
    parser.add_argument("--json", action="store_true")


def command(run, args):
    """The exit code of run(args): 2 and one line on standard error where the arguments or the texts are at fault."""
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def read_text(fn, paths, default):
    """The bytes of these files as uint8, .xz ones unpacked, or of the default one."""
    if not paths and not (DATA / default).exists():
        raise FileNotFoundError(f"{fn}: the training text comes with a checkout, not with the installed package; name text files")
    files = [Path(path) for path in paths] or [DATA / default]
    return np.frombuffer(b"".join(lzma.open(file).read() if file.suffix == ".xz" else file.read_bytes() for file in files), np.uint8)


def batches(fn, text, length, size, generator):
    """Endless (size, length + 1) token windows: BOS and text from a word's start; an epoch goes through all of it in random order."""
    starts = np.flatnonzero(word_starts(text))
    starts = starts[starts < len(text) - length]
    if not len(starts):
        raise ValueError(f"{fn}: the text must be longer than a window of {length} bytes, got {len(text)}")
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


def optimiser(model, lr):
    """AdamW over what is to be trained; vectors do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": WEIGHT_DECAY}, {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


def factor(done):
    """Of the learning rate, when this share of the budget is done: a short rise, then a cosine down to a fiftieth."""
    if done < WARM_UP:
        return max(done / WARM_UP, 0.01)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min((done - WARM_UP) / (1 - WARM_UP), 1.0)))


def train(model, source, loss_of, lr, seconds=None, steps=None, on_step=None):
    """Trains until either budget is spent.

    Args:
        source: yields (B, 1 + L) tokens. loss_of: (model, tokens) -> mean nats of a byte. lr: the highest learning rate.
        seconds, steps: the budget, one of them. on_step: told (share done, step, loss in bits per byte) of every step.

    Returns: {"steps", "bytes", "seconds"}.
    """
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
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        adam.step()
        adam.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + tokens.numel() - tokens.shape[0]
        if on_step is not None:
            on_step(done, step, loss.item() / math.log(2))


@contextmanager
def progress(quiet):
    """A bar on standard error; what it yields is an on_step for `train`."""
    columns = TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task, smooth = bar.add_task("", total=1.0), None

        def on_step(done, step, bits):
            nonlocal smooth
            smooth = bits if smooth is None else 0.98 * smooth + 0.02 * bits
            if step % 20 == 0:
                bar.update(task, completed=done, description=f"step {step}, {smooth:.3f} bits per byte")

        yield on_step


@torch.no_grad()
def bits_per_byte(model, text, window=1024):
    """Of `text` (bytes or uint8): each byte given BOS and the half to whole window of bytes before it, or all that there are."""
    text = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64)) + OFFSET
    nats, half = 0.0, window // 2
    for begin in range(0, len(text), half):
        end, first = min(begin + half, len(text)), max(begin - half, 0)
        tokens = F.pad(text[first:end], (1, 0), value=BOS)[None]
        labels = tokens.clone()
        labels[:, : 1 + begin - first] = -100
        nats += model(tokens, labels=labels).loss.item() * (end - begin)
    return nats / math.log(2) / len(text)


def compressed(text):
    """{"gzip": bits per byte, "xz": ...} of the same text packed alone, each at its best setting."""
    text = bytes(text)
    packed = {"gzip": gzip.compress(text, 9), "xz": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}
    return {name: round(8 * len(found) / len(text), 4) for name, found in packed.items()}
