"""What the models share: linear layers, norms, rotary embeddings, attention and its cache, gated MLP, losses."""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import terrazzo

from ..adapters import attends_faster, linear_serving
from ..checks import is_spread
from ..linear import linear_by

ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
               "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}  # fmt: skip
IGNORED = -100  # a label that has no loss


class Output(NamedTuple):
    """What a model returns. logits: (B, L, V), or of the last positions alone. loss: scalar, or None without labels."""

    logits: torch.Tensor
    loss: torch.Tensor | None


def activation(fn, name):
    if name not in ACTIVATIONS:
        raise ValueError(f"{fn}: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


class Linear(nn.Linear):
    """nn.Linear; by terrazzo.linear where torch is slower on this CPU (linear_serving)."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    chosen, _ = linear_serving(x, weight, bias, None)
    return F.linear(x, weight, bias) if chosen is None else linear_by(chosen, x, weight, bias)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return terrazzo.rmsnorm_gated(x, self.weight, eps=self.eps)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, width, inner, act, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = Linear(width, inner, bias), Linear(width, inner, bias)
        self.down_proj = Linear(inner, width, bias)
        self.act = act

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


# ---- positions ---------------------------------------------------------------------------------------------------
def rotations(positions, width, theta, dtype):
    """(cos, sin), each (B or 1, 1, L, width / 2), of positions (B or 1, L): angles of the rotary embedding of `width` channels."""
    speed = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width)
    angles = positions[:, None, :, None].float() * speed
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, turns):
    """Rotary embedding of x (B, H, L, P): channel i turns with channel i + width / 2; channels from `width` on stay as they are."""
    cos, sin = turns
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


# ---- attention ---------------------------------------------------------------------------------------------------
class KVCache:
    """Keys and values (B, Hk, L, P) of a layer's past; its room doubles when it is full."""

    steps = ()  # what the layer does with one position by the fused ops

    def __init__(self):
        self.keys = self.values = None
        self.length = 0

    def append(self, k, v):
        """Takes in those of new positions, and returns all."""
        end = self.length + k.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            self._grow(k, end)
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = k, v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def step(self):
        """The caches with room for one position, which counts as there, and how many were before it."""
        before, self.length = self.length, self.length + 1
        if self.length > self.keys.shape[2]:
            self._grow(self.keys, self.length)
        return self.keys, self.values, before

    def _grow(self, like, end):
        """Room for `end` positions and more; like: (B, Hk, *, P)."""
        room = (like.shape[0], like.shape[1], max(end + 64, 2 * self.length), like.shape[3])
        keys, values = like.new_empty(room), like.new_empty(room)
        if self.keys is not None:
            held = self.keys.shape[2]
            keys[:, :, :held], values[:, :, :held] = self.keys, self.values
        self.keys, self.values = keys, values

    def reorder(self, rows):
        """Row i becomes what row rows[i] was."""
        if self.keys is not None:
            self.keys, self.values = (self._reordered(kept, rows) for kept in (self.keys, self.values))

    def _reordered(self, kept, rows):
        """`kept` itself where as many rows stay: of its room only what is filled is copied."""
        filled = kept[:, :, : self.length].index_select(0, rows)
        if rows.shape[0] != kept.shape[0]:
            kept = kept.new_empty(rows.shape[0], *kept.shape[1:])
        kept[:, :, : self.length] = filled
        return kept


class State:
    """What a text leaves behind, for the next call to go on from.

    layers: what each layer keeps, something with reorder(rows); length: positions so far; valid: (B, length) bool, False for padding,
    or None.
    """

    def __init__(self, kept):
        self.layers, self.length, self.valid = list(kept), 0, None

    def reorder(self, rows):
        for layer in self.layers:
            layer.reorder(rows)
        self.valid = None if self.valid is None else self.valid[rows]


class Mask(NamedTuple):
    """Who sees whom, for all layers of a call. sees: bool, broadcast to (B, H, L, past + L), or None: what is_causal says alone;
    cu_seqlens: the bounds of texts packed into one row, none of which sees another."""

    sees: torch.Tensor | None
    cu_seqlens: torch.Tensor | None = None
    is_causal: bool = True

    @classmethod
    def causal(cls, length, past, valid, cu_seqlens=None, device=None):
        """For `length` positions behind `past` others; valid: (B, past + length) bool or None, False for padding."""
        if cu_seqlens is not None or (valid is None and (past == 0 or length == 1)):
            return cls(None, cu_seqlens)
        positions = torch.arange(past + length, device=device)
        sees = positions <= positions[past:, None]
        if valid is not None:
            sees = sees & valid[:, None, None, :] | (positions == positions[past:, None])  # padding sees itself: no row without a key
        return cls(sees.view(-1, 1, length, past + length))


def attend(q, k, v, mask, scale=None, dropout=0.0):
    """Attention of q (B, H, L, P) over k, v (B, Hk, past + L, P) -> (B, L, H * P)."""
    if mask.cu_seqlens is not None and dropout:
        raise NotImplementedError("terrazzo.models: attention dropout over packed texts is not supported; set it to 0 or give padded batches")
    if mask.cu_seqlens is not None or (mask.sees is None and not dropout and attends_faster(q, k, v)):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return terrazzo.local_attention(q, k, v, q.shape[1], causal=mask.is_causal, cu_seqlens=mask.cu_seqlens, scale=scale).flatten(2)
    causal = mask.sees is None and mask.is_causal and q.shape[2] > 1
    y = F.scaled_dot_product_attention(q, k, v, mask.sees, dropout, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).flatten(2)


def positions_of(valid, length, past, cu_seqlens=None, device=None):
    """Positions (B or 1, length): they count from 0 in every row's text and in every packed text; padding has 1, as in transformers."""
    if cu_seqlens is not None:
        text = text_of(cu_seqlens, past, length).clamp(max=cu_seqlens.shape[0] - 2)
        return (torch.arange(past, past + length, device=device) - cu_seqlens[text])[None]
    if valid is None:
        return torch.arange(past, past + length, device=device)[None]
    return (valid.long().cumsum(-1) - 1).masked_fill(~valid, 1)[:, past:]


def text_of(cu_seqlens, past, length):
    """(length,) int64: in which of the packed texts the positions from `past` on lie."""
    positions = torch.arange(past, past + length, dtype=torch.int32, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], positions, right=True)


def run(layer, h, *args, again):
    """layer(h, *args); `again`: its inner values are computed once more in the backward pass instead of kept."""
    return checkpoint(layer, h, *args, use_reentrant=False) if again else layer(h, *args)


@torch.no_grad()
def initialise(model, std):
    """Normal weights of linear, convolution and embedding layers, zero biases: transformers' initialisation."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)):
            module.weight.normal_(0, std)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()


# ---- losses ------------------------------------------------------------------------------------------------------
def causal_loss(logits, labels):
    """Mean cross entropy in float32 of each label (B, L) given the positions before it; labels of -100 don't count."""
    return cross_entropy(logits.float(), F.pad(labels, (0, 1), value=IGNORED)[:, 1:])


def cross_entropy(logits, labels):
    """Mean cross entropy of labels (B, L) given logits (B, L, V), which a tensor-parallel model leaves spread over ranks."""
    if is_spread(logits):
        from ..distributed.tensor_parallel import cross_entropy as spread

        return spread(logits, labels, IGNORED)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def logsumexp(logits):
    """(B, L) of logits (B, L, V), spread or not."""
    if is_spread(logits):
        from ..distributed.tensor_parallel import logsumexp as spread

        return spread(logits)
    return logits.logsumexp(-1)


def check_ids(fn, name, ids, vocab_size, optional=False):
    """A (B, L) int64 tensor of tokens of the vocabulary."""
    if ids is None and optional:
        return
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        got = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise (TypeError if not isinstance(ids, torch.Tensor) else ValueError)(f"{fn}: {name} must be (B, L) int64 or int32, got {got}")
    if ids.numel() and ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{fn}: {name} must lie in 0 to {vocab_size - 1}, got {low if low < 0 else high}")


def check_valid(fn, attention_mask, batch, length):
    """attention_mask as (B, length) bool, or None when it hides nothing."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or tuple(attention_mask.shape) != (batch, length):
        got = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        raise ValueError(f"{fn}: attention_mask must be (B, past + L) = ({batch}, {length}), one where a token is and zero on padding, got {got}")
    valid = attention_mask.bool()
    return None if not torch.compiler.is_compiling() and bool(valid.all()) else valid


def check_labels(fn, labels, shape, vocab_size, logits_to_keep=0, like="input_ids"):
    """None, or tokens of the vocabulary for every position, -100 where none counts; shape None: any (B, L)."""
    if labels is None:
        return
    check_ids(fn, "labels", labels if not isinstance(labels, torch.Tensor) else labels.masked_fill(labels == IGNORED, 0), vocab_size)
    if shape is not None and labels.shape != shape:
        raise ValueError(f"{fn}: labels must be like {like} = {tuple(shape)}, got {tuple(labels.shape)}")
    if logits_to_keep:
        raise ValueError(f"{fn}: labels need the logits of every position; leave out logits_to_keep, got {logits_to_keep}")


def check_call(fn, input_ids, labels, vocab_size, attention_mask, cu_seqlens, state, logits_to_keep):
    """The arguments that models of one stack share -> attention_mask (B, past + L) as bool, or None when it hides nothing."""
    check_ids(fn, "input_ids", input_ids, vocab_size)
    check_labels(fn, labels, input_ids.shape, vocab_size, logits_to_keep)
    B, L = input_ids.shape
    valid = check_valid(fn, attention_mask, B, (0 if state is None else state.length) + L)
    if cu_seqlens is not None and (B != 1 or valid is not None or state is not None):
        raise ValueError(f"{fn}: cu_seqlens goes with a batch of 1 and without attention_mask and state, got B = {B}")
    return valid
