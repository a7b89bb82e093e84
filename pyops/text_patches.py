"""A text cut into patches by a byte model's entropies, or by its bytes alone, and what can be said of the cut.

The entropy of byte j is that of the model's distribution for it, given the bytes before: where it is high, a patch starts.
"""
import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .entropy_patch import MODES as TOKEN_MODES
from .entropy_patch import entropy_patch, patch_lengths_from_tokens, patches_from_entropies
from .models.entropy_model import tokens_of, word_starts

MODES = ("entropy", *TOKEN_MODES)
BLOCK = 4096  # bytes of one step of the model


def _fail(message):
    raise ValueError(f"terrazzo patches: {message}")


@dataclass
class Rule:
    """How a text is cut: arguments of patches_from_entropies, or of patch_lengths_from_tokens."""

    mode: str = "entropy"
    threshold: float | None = None
    threshold_add: float | None = None
    monotonic: bool = False
    patch_size: float | None = None
    max_patch_length: int | None = None

    def complete(self, config):
        """Checks which options go together, and takes from the model's config what was left open."""
        if self.mode == "entropy":
            self._complete_threshold(config)
            return self
        for option in ("threshold", "threshold_add", "monotonic"):
            if getattr(self, option) not in (None, False):
                _fail(f"--{option.replace('_', '-')} goes with --mode entropy, got --mode {self.mode}")
        if (self.patch_size is None) == (self.mode == "static"):
            _fail("--mode static needs --patch-size, the bytes of every patch" if self.mode == "static" else
                  f"--patch-size goes with --mode entropy or static, got --mode {self.mode}")  # fmt: skip
        if self.mode == "static":
            if self.patch_size < 1 or not float(self.patch_size).is_integer():
                _fail(f"--patch-size must be a positive integer with --mode static, got {self.patch_size}")
            self.patch_size = int(self.patch_size)
        return self

    def _complete_threshold(self, config):
        if self.patch_size is not None:
            for option in ("threshold", "threshold_add", "monotonic"):
                if getattr(self, option) not in (None, False):
                    _fail(f"--patch-size excludes --{option.replace('_', '-')}: the length to aim for decides how many of the largest entropies cut")
        elif self.threshold is None:
            self.threshold = config.patching_threshold
            if self.threshold is None:
                _fail("the model's config.json has no patching_threshold; give --threshold in nats, or --patch-size in bytes")

    def __str__(self):
        if self.mode != "entropy":
            words = {"space": "behind every space and punctuation mark", "bytes": "every byte", "static": f"every {self.patch_size} bytes"}[self.mode]
        elif self.patch_size is not None:
            words = f"at the largest entropies, for {self.patch_size:g} bytes a patch"
        elif self.monotonic:
            words = f"where the entropy rises by more than {self.threshold:.4g} nats"
        else:
            words = f"where the entropy is above {self.threshold:.4g} nats"
        if self.threshold_add is not None:
            words += f" and rises by more than {self.threshold_add:.4g}"
        return words if self.max_patch_length is None else f"{words}; at most {self.max_patch_length} bytes a patch"


@torch.no_grad()
def measure(model, text, on_block=lambda size: None):
    """Entropy and surprise of every byte given those before it, (bytes,) nats; on_block hears of every block of bytes done."""
    tokens, past, entropies, surprises = tokens_of(text), model.past(), [], []
    for before, byte in zip(tokens[:, :-1].split(BLOCK, 1), tokens[:, 1:].split(BLOCK, 1)):
        logits = model(before, past)
        entropies.append(entropy_patch(logits, 0.0).entropies[0])
        surprises.append(F.cross_entropy(logits[0], byte[0], reduction="none"))
        on_block(byte.shape[1])
    return torch.cat(entropies), torch.cat(surprises)


def starts_of(text, entropies, rule):
    """Positions of the bytes that start a patch."""
    if rule.mode == "entropy":
        # Position 0 of the op is the begin-of-text token, whose entropy is that of byte 0.
        cut = patches_from_entropies(entropies[None], rule.threshold, monotonic=rule.monotonic, threshold_add=rule.threshold_add,
                                     patch_size=rule.patch_size, max_patch_length=rule.max_patch_length, include_next=True)  # fmt: skip
        return cut.starts[0, 1:].nonzero()[:, 0].tolist()
    # The words of "space" begin behind that token, a patch of its own; the other modes count from the first byte.
    special = 1 if rule.mode == "space" else 0
    tokens = tokens_of(text)[:, 1 - special :]
    lengths = patch_lengths_from_tokens(tokens, rule.mode, patch_size=rule.patch_size, max_patch_length=rule.max_patch_length)[0, special:]
    return (lengths.cumsum(0) - lengths).tolist()


@dataclass
class Cut:
    """A text and its patches; entropies and surprises (bytes,) in nats, starts the positions of the patches' first bytes."""

    text: bytes
    entropies: torch.Tensor
    surprises: torch.Tensor
    starts: list[int]
    rule: Rule

    @property
    def lengths(self):
        return [end - begin for begin, end in zip(self.starts, [*self.starts[1:], len(self.text)])]

    def patches(self, limit=None):
        """(bytes, entropies) of every patch, or of those that start before `limit`."""
        values = self.entropies.tolist()
        for begin, length in zip(self.starts, self.lengths):
            if limit is not None and begin >= limit:
                return
            yield self.text[begin : begin + length], values[begin : begin + length]

    def statistics(self):
        lengths, words = sorted(self.lengths), word_starts(self.text)
        inner = self.starts[1:]  # byte 0 starts a patch by every rule
        return {
            "bytes": len(self.text),
            "patches": len(lengths),
            "mean_patch_length": len(self.text) / len(lengths),
            "median_patch_length": lengths[len(lengths) // 2],
            "longest_patch": lengths[-1],
            "bits_per_byte": self.surprises.mean().item() / math.log(2),
            "mean_entropy": self.entropies.mean().item(),
            "boundaries_at_word_starts": float(words[inner].mean()) if inner else None,
            "word_starts_with_a_boundary": float(words[self.starts].sum() / words.sum()) if words.any() else None,
            "histogram": dict(sorted(Counter(lengths).items())),
        }
