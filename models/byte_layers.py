"""Layers of byte models, BLT's and its patcher's: attention in a window with rotary embeddings of neighbouring pairs, gated MLP.

A text may come in pieces: a Past keeps what the next piece needs. Rows of a batch may differ in length; the padding stands behind.
"""
import torch
import torch.nn.functional as F
from torch import nn

import terrazzo

from . import layers, steps


TURNS_AHEAD = 256  # positions whose turns are computed together


class Past:
    """Keys and values of a stack's last `window` positions (None: of all), in rings: position p lies in slot p % window.

    length: positions so far, an int, or (B,) int64 where rows differ; longest: the longest row's.
    """

    def __init__(self, stack):
        self.window, self.length, self.longest = stack.window, 0, 0
        self.kept = [[None, None] for _ in stack.layers]  # (B, Hk, slots + 1, P); the last slot takes what belongs to no row
        self.steps = stack.steps()
        self._turns, self._turned = None, 0  # of positions from _turned on

    def turns_at(self, position, stack, device):
        """(cos, sin), (1, width / 2) each."""
        at = position - self._turned
        if self._turns is None or not 0 <= at < TURNS_AHEAD:
            self._turned, at = position, 0
            ahead = turns(torch.arange(position, position + TURNS_AHEAD, device=device), stack.head_dim, stack.theta)
            self._turns = ahead.real.contiguous(), ahead.imag.contiguous()
        return self._turns[0][at], self._turns[1][at]

    def make_room(self, room):
        """Slots for `room` positions in every layer."""
        if self.kept[0][0].shape[2] <= room:
            for kept in self.kept:
                grow(kept, *kept, room, self.window)

    def reorder(self, rows):
        self.kept = [[None if t is None else t[rows] for t in pair] for pair in self.kept]
        if isinstance(self.length, torch.Tensor):
            self.length = self.length[rows]


class Span:
    """The L positions of one call, for all layers of a stack. lengths: (B,) int64, those that are no padding; None: all are."""

    def __init__(self, stack, length, device, past=None, lengths=None):
        self.window, self.past, self.lengths, self.L = stack.window, past, lengths, length
        self.begin = 0 if past is None else past.length
        positions = torch.arange(length, device=device) + (self.begin[:, None] if isinstance(self.begin, torch.Tensor) else self.begin)
        self.turns = turns(positions, stack.head_dim, stack.theta)
        self.ragged = lengths is not None or isinstance(self.begin, torch.Tensor)
        if past is not None:
            self._place(device)

    def _place(self, device):
        """Where the new keys go, and what a single new position sees."""
        past, L = self.past, self.L
        if self.ragged:
            count = torch.full_like(self.begin, L) if self.lengths is None else self.lengths
            self.end = self.begin + count
            self.longest = int(self.end.max()) if len(self.end) else 0
        else:
            self.end = self.longest = self.begin + L
        self.room = self.longest if self.window is None else min(self.longest, self.window)
        m = L if self.window is None else min(L, self.window)
        if self.ragged:
            self.take = count[:, None] - m + torch.arange(m, device=device)
            self.begin = self.end - count
            position = self.begin[:, None] + self.take
            self.slots = torch.where(self.take < 0, -1, position if self.window is None else position % self.window)
            self.rows = torch.arange(len(count), device=device)[:, None]
            seen = self.end.clamp(min=1) if self.window is None else self.end.clamp(1, self.window)
            self.sees = (torch.arange(self.room, device=device) < seen[:, None])[:, None, None]
        else:
            self.take, first = slice(L - m, L), self.begin + L - m
            first = first if self.window is None else first % self.window
            whole = self.window is None or first + m <= self.window
            self.slots = slice(first, first + m) if whole else (first + torch.arange(m, device=device)) % self.window
            self.sees = None

    def done(self):
        """The positions belong to the past from now on."""
        if self.past is not None:
            self.past.length, self.past.longest = self.end, self.longest

    def attend(self, q, k, v, kept, dropout):
        """Attention of q (B, L, H, P) over k, v (B, L, Hk, P) and what is kept -> (B, L, H, P)."""
        if kept is None or self.past.longest == 0:
            if kept is not None:
                self._store(kept, k, v)
            if dropout:
                return dense_attention(q, k, v, causal_window(self.L, self.window, q.device), dropout)
            return terrazzo.local_attention(q, k, v, self.window or max(self.L, 1))
        if self.L == 1:
            self._store(kept, k, v)
            keys, values = (t[:, :, : self.room] for t in kept)
            return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, self.sees, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)
        keys, values, mask = self._before(kept)
        before = keys.shape[1]
        self._store(kept, k, v)
        # Queries and keys of local_attention share their positions: queries of zeros stand before the piece.
        k, v = torch.cat([keys, k], 1), torch.cat([values, v], 1)
        y = terrazzo.local_attention(F.pad(q, (0, 0, 0, 0, before, 0)), k, v, self.window or k.shape[1], key_mask=mask)
        return y[:, before:]

    def _before(self, kept):
        """Keys and values (B, m, Hk, P) of the last m positions before the piece in their order, and a mask (B, m + L) where rows are shorter."""
        m = self.past.longest if self.window is None else min(self.past.longest, self.window - 1)
        if not self.ragged:
            position = torch.arange(self.begin - m, self.begin, device=kept[0].device)
            slots = position if self.window is None else position % self.window
            return *(t[:, :, slots].transpose(1, 2) for t in kept), None
        position = self.begin[:, None] - m + torch.arange(m, device=kept[0].device)
        slots = position if self.window is None else position % self.window
        slots = torch.where(position < 0, 0, slots)
        return *(t[self.rows, :, slots] for t in kept), F.pad(position >= 0, (0, self.L), value=True)

    def _store(self, kept, k, v):
        if kept[0] is None or kept[0].shape[2] <= self.room:
            grow(kept, k.transpose(1, 2), v.transpose(1, 2), self.room, self.window)
        for into, new in zip(kept, (k, v)):
            if self.ragged:
                into[self.rows, :, self.slots] = new[self.rows, self.take.clamp(min=0)]
            else:
                into[:, :, self.slots] = new[:, self.take].transpose(1, 2)


def grow(kept, k, v, room, window):
    """Gives a layer's caches more than `room` slots; k, v: (B, Hk, *, P), like what they keep."""
    room = max(room + 64, 2 * room)
    room = room if window is None else min(room, window)
    for i, like in enumerate((k, v)):  # zeros: what a mask hides must be a number
        fresh = like.new_zeros(like.shape[0], like.shape[1], room + 1, like.shape[3])
        if kept[i] is not None:
            fresh[:, :, : kept[i].shape[2] - 1] = kept[i][:, :, :-1]
        kept[i] = fresh


def turns(positions, width, theta):
    """(..., 1, width / 2) complex64 of positions (...): what turns a pair of neighbouring channels. Angles are exact for any length of text."""
    speed = 1 / theta ** (torch.arange(0, width, 2, device=positions.device).float() / width)
    angles = positions[..., None].double() * speed
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64).unsqueeze(-2)


def _rotate(x, turns):
    """Rotary embedding of neighbouring pairs: a product of complex numbers."""
    pairs = (x if x.dtype == torch.float64 else x.float()).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(x.dtype)


def causal_window(length, window, device):
    """(length, length) bool: who sees whom."""
    behind = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (behind >= 0) & (behind < (window or length))


def dense_attention(q, k, v, mask, dropout):
    """Attention with dropout, which the kernels have not: q (B, L, H, P), mask broadcast to (B, H, L, Lk); memory L * Lk."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


class Projections(nn.Module):
    """What the attentions of byte models share: q, k, v and o without biases."""

    def __init__(self, config):
        super().__init__()
        D, self.head_dim, self.dropout = config.hidden_size, config.hidden_size // config.num_attention_heads, config.dropout
        self.q_proj = layers.Linear(D, D, bias=False)
        self.k_proj = layers.Linear(D, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = layers.Linear(D, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = layers.Linear(D, D, bias=False)

    def heads(self, projected):
        return projected.unflatten(-1, (-1, self.head_dim))


class Attention(Projections):
    def forward(self, x, norm, span, kept):
        """x + what the attention makes of norm(x)."""
        q, k, v = map(self.heads, steps.normed(x, norm, self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, span.turns), _rotate(k, span.turns)
        return steps.added(x, span.attend(q, k, v, kept, self.dropout if self.training else 0.0).flatten(-2), self.o_proj)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = layers.GatedMLP(config.hidden_size, config.intermediate_size, layers.activation("terrazzo.models", config.hidden_act))
        self.input_layernorm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, span, kept):
        x = self.self_attn(x, self.input_layernorm, span, kept)
        return steps.mlp(x, self.post_attention_layernorm, self.mlp)

    def parts(self):
        a, m = self.self_attn, self.mlp
        return a, a.q_proj, a.k_proj, a.v_proj, a.o_proj, m, m.gate_proj, m.up_proj, m.down_proj, self.input_layernorm, self.post_attention_layernorm


class Stack(nn.Module):
    """`num_hidden_layers` layers in `layers`; window: positions that one sees, itself included, or None: all."""

    gradient_checkpointing = False

    def __init__(self, config, window):
        super().__init__()
        self.window, self.theta, self.head_dim = window, config.rope_theta, config.hidden_size // config.num_attention_heads
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def past(self):
        return Past(self)

    def steps(self):
        """What the fused ops of decoding do for each layer, [(AttentionStep, MLPStep)]; None where they can't."""
        if not all(type(layer) is Layer and steps.is_plain(*layer.parts()) for layer in self.layers):
            return None
        return [(steps.AttentionStep(layer.input_layernorm, layer.self_attn), steps.MLPStep(layer.post_attention_layernorm, layer.mlp))
                for layer in self.layers]  # fmt: skip

    def step(self, x, past, before=None):
        """run() for the one next position of every row, x (B, 1, D), by the fused ops."""
        x, at = x[:, 0], past.length
        past.make_room(at + 1 if self.window is None else min(at + 1, self.window))
        turned = past.turns_at(at, self, x.device)
        for i, (attend, mlp) in enumerate(past.steps):
            x = x if before is None else before(i, x[:, None])[:, 0]
            x = mlp(attend(x, *past.kept[i], at, turned, True, self.window))
        past.length = past.longest = at + 1
        return x[:, None]

    def run(self, x, past=None, lengths=None, before=None):
        """x (B, L, D) through all layers; before(i, x) -> x is called in front of layer i. past: None, a Past, or what makes a span of its own
        (terrazzo.distributed: the positions before lie on other ranks)."""
        keeps = isinstance(past, Past)
        together = keeps and lengths is None and past.longest and isinstance(past.length, int)  # rows of one length, behind others
        if together and x.shape[1] == 1 and past.steps and not self.training and steps.in_steps(x):
            return self.step(x, past, before)
        span = Span(self, x.shape[1], x.device, past, lengths) if past is None or keeps else past.span(self, x.device)
        for i, layer in enumerate(self.layers):
            x = x if before is None else before(i, x)
            x = layers.run(layer, x, span, past.kept[i] if keeps else None, again=self.gradient_checkpointing and self.training and not keeps)
        span.done()
        return x


def check_heads(fn, config):
    """Sizes that every stack must have: positive, heads of an even width, groups of heads that are whole."""
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{fn}: {name} must be a positive integer, got {value!r}")
    if config.hidden_size % (2 * config.num_attention_heads):
        raise ValueError(f"{fn}: hidden_size must be heads of an even size, got {config.hidden_size} for num_attention_heads {config.num_attention_heads}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"{fn}: num_key_value_heads must divide num_attention_heads {config.num_attention_heads}, got {config.num_key_value_heads}")
