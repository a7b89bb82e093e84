"""The byte model whose entropies cut a text into patches. Source: the patcher of the Byte Latent Transformer, transformers' BltPatcher.

A small Llama over bytes: RMS norm, attention in a sliding window with interleaved rotary embeddings, gated MLP. Token 4 + byte, BOS 1.
The names of its tensors are those of BltPatcher: each loads the other's checkpoint.
"""
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import terrazzo

from . import layers, loading, steps
from .byte_layers import Stack, check_heads

BOS, OFFSET = 1, 4  # the token of the begin of a text; token OFFSET + b is byte b
FN = "terrazzo.EntropyModel"
SHIPPED = Path(__file__).with_name("entropy")
PREFIXES = ("model.patcher.", "patcher.", "")  # a whole checkpoint's, BltModel's, the patcher's own


def _fail(message, error=ValueError):
    raise error(f"{FN}: {message}")


def tokens_of(text):
    """(1, 1 + bytes) int64: BOS and a token for each byte of `text`, bytes or uint8."""
    text = np.frombuffer(text, np.uint8)
    return F.pad(torch.from_numpy(text.astype(np.int64)) + OFFSET, (1, 0), value=BOS)[None]


def word_starts(text):
    """(bytes,) bool: a letter, a digit or a byte of a longer character that follows none of these."""
    wordy = np.zeros(256, bool)
    for low, high in (b"09", b"AZ", b"az", (128, 255)):
        wordy[low : high + 1] = True
    flags = wordy[np.frombuffer(text, np.uint8)]
    return flags & ~np.concatenate([[False], flags[:-1]])


@dataclass
class EntropyConfig:
    """Sizes by transformers' names; patching_threshold and patch_size are the cut that the model was made for."""

    vocab_size: int = 260
    hidden_size: int = 768
    num_hidden_layers: int = 14
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None  # None: as many as query heads
    intermediate_size: int | None = 2048    # None: 8/3 of hidden_size
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    dropout: float = 0.0                    # transformers' name; its patcher is never in training
    sliding_window: int | None = 512        # positions that a byte sees, itself included; None: all
    patching_threshold: float | None = None  # nats
    patch_size: float | None = None          # mean bytes of a patch at that threshold, on the text held out from training
    hidden_act = "silu"

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.intermediate_size = self.intermediate_size or int(8 * self.hidden_size / 3)
        check_heads(FN, self)
        if self.sliding_window is not None and (not isinstance(self.sliding_window, int) or self.sliding_window < 1):
            _fail(f"sliding_window must be a positive integer or None, got {self.sliding_window!r}")
        if not isinstance(self.vocab_size, int) or self.vocab_size < OFFSET + 256:
            _fail(f"vocab_size must be at least {OFFSET + 256}, special tokens and bytes, got {self.vocab_size!r}")

    @classmethod
    def from_hf(cls, config):
        """From the dict of a config.json: a patcher's, or a whole BLT's, which holds one as patcher_config."""
        whole = config if "patcher_config" in config else {}
        config = {"patching_threshold": whole.get("patching_threshold")} | (whole.get("patcher_config") or config)
        theta = loading.rope_theta(FN, config, cls.rope_theta)
        return cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config} | {"rope_theta": theta})

    def to_hf(self):
        """The dict of a config.json that transformers' BltPatcherConfig reads."""
        config = asdict(self)
        return {"model_type": "blt_patcher", "rope_parameters": {"rope_type": "default", "rope_theta": config.pop("rope_theta")}} | config


class EntropyModel(Stack):
    """EntropyModel(config) is untrained; `EntropyModel.from_pretrained()` is the one shipped with terrazzo."""

    def __init__(self, config):
        super().__init__(config, config.sliding_window)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = layers.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self):
        """Normal weights of variance 1 / width; what enters the residual stream is smaller by the root of the layers' number."""
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            std = weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            weight.normal_(0, std if name != "lm_head.weight" else std / 4)

    def forward(self, tokens, past=None, lengths=None):
        """Logits (B, L, vocab_size) of the byte behind each of tokens (B, L) int64.

        past: None, or what past() began, which carries what the next call needs to go on where this one ended: a window of keys
        and values for each layer. lengths: (B,) int64, the tokens of each row that are no padding, or None.
        """
        return steps.normed(self.run(self.embed_tokens(tokens), past, lengths), self.norm, self.lm_head)[0]

    @torch.no_grad()
    def logits(self, tokens, past=None, lengths=None, block=4096):
        """`forward` without gradients, in blocks of positions: the same logits, with memory for one block's layers."""
        return torch.cat(list(self._blocks(tokens, past, lengths, block)), 1)

    @torch.no_grad()
    def entropies(self, tokens, past=None, lengths=None, block=4096):
        """Entropies (B, L) in nats of the byte behind each token, in blocks of positions."""
        return torch.cat([terrazzo.entropy_patch(logits, 0.0).entropies for logits in self._blocks(tokens, past, lengths, block)], 1)

    def _blocks(self, tokens, past, lengths, block):
        if past is None and tokens.shape[1] <= block:
            yield self(tokens, None, lengths)
            return
        past, begin = self.past() if past is None else past, 0
        for part in tokens.split(block, 1):
            yield self(part, past, None if lengths is None else (lengths - begin).clamp(0, part.shape[1]))
            begin += part.shape[1]

    @classmethod
    def from_pretrained(cls, path=None):
        """The model in a directory, or in a .safetensors file beside its config.json; None: the one shipped with terrazzo.

        The directory holds a BLT patcher in transformers' layout, or a whole BLT, of which only the patcher is read.
        """
        path = Path(SHIPPED if path is None else path)
        folder, file = (path.parent, path.name) if path.suffix == ".safetensors" else (path, loading.WEIGHTS)
        checkpoint = loading.Checkpoint(FN, folder, file)
        config = loading.read_json(FN, folder / loading.CONFIG)
        loading.check_model_type(FN, {"model_type": "blt_patcher"} | config, ("blt", "blt_patcher"))
        model = cls(EntropyConfig.from_hf(config))
        model._load(checkpoint)
        return model.eval()

    @torch.no_grad()
    def _load(self, checkpoint):
        prefix = next(prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in checkpoint.names) or not prefix)
        names = {prefix + name: weight for name, weight in self.state_dict().items()}
        missing = [name for name in names if name not in checkpoint.names]
        wrong = [f"{name} must be {tuple(weight.shape)} by its config.json, got {checkpoint.shape(name)}" for name, weight in names.items()
                 if name not in missing and checkpoint.shape(name) != tuple(weight.shape)]  # fmt: skip
        if missing or wrong:
            lacks = [f"lacks {len(missing)} tensors of a BLT patcher: {loading.listed(missing)}"] if missing else []
            _fail(f"{checkpoint.folder} {'; '.join(lacks + ([loading.listed(wrong)] if wrong else []))}")
        for name, weight in names.items():
            weight.copy_(checkpoint[name])

    def save_pretrained(self, folder, dtype=None):
        """Writes config.json and model.safetensors, which `from_pretrained` and transformers' BltPatcher read."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.to(dtype or weight.dtype).contiguous() for name, weight in self.state_dict().items()}
        save_file(weights, folder / loading.WEIGHTS, {"format": "pt"})
        (folder / loading.CONFIG).write_text(json.dumps(self.config.to_hf(), indent=2) + "\n")
