"""BLT on a row of bytes that is cut into stretches over the ranks of a mesh.

1. Entropies are computed where the bytes are; every rank gets all of them, 4 bytes a position, and cuts the whole row into patches.
2. Borders move right to the next begin of a patch: the bytes before it go to the left neighbour, so that no patch lies on two ranks.
3. Layers over bytes see the window - 1 positions before a stretch, hashes the n - 1 bytes before it: they come from the left, gradients go back.
4. The global model runs over patches, whose keys and values go to all ranks on the right; a stretch's first bytes ask the last patch of its left neighbour.
5. Outputs of the bytes that moved go back, so that logits are those of the stretch as it was given.
"""
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import terrazzo

from .. import checks
from ..entropy_patch import patches_from_entropies
from ..models import byte_layers, layers
from . import comm
from .context_model import FN, Behind, Stretch, reach


class Part:
    """The stretch starts[place] to starts[place + 1] of a row of bytes or patches: what a Stack takes for its past."""

    def __init__(self, line, place, starts):
        self.line, self.place, self.starts = line, place, starts

    def reach(self, before):
        """Where what the `before` positions before each stretch hold (None: all) travels."""
        return reach(self.starts, self.place, [0 if before is None else max(0, start - before) for start in self.starts[:-1]])

    def behind(self, tensor, dim, before, purpose):
        """The tensor with those positions in front, fewer at the row's begin."""
        return Behind.apply(tensor, dim, self.line(purpose), *self.reach(before))

    def span(self, stack, device):
        return _Span(self, stack, device)


class _Span:
    """What byte_layers.Span is for whole rows: the positions of one call, for all layers of a stack."""

    def __init__(self, part, stack, device):
        self.part, self.window = part, stack.window
        positions = torch.arange(part.starts[part.place], part.starts[part.place + 1], device=device)
        self.turns = byte_layers.turns(positions, stack.head_dim, stack.theta)

    def done(self):
        """Nothing is kept."""

    def attend(self, q, k, v, kept, dropout):
        if dropout:
            raise NotImplementedError("terrazzo.distributed: attention dropout in a Blt whose rows are sharded is not supported; set it to 0")
        k, v = self.part.behind(torch.stack([k, v]), 2, None if self.window is None else self.window - 1, "keys and values").unbind()
        L, before = q.shape[1], k.shape[1] - q.shape[1]
        if self.window is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return layers.attend(q, k, v, layers.Mask(causal_lower_right(L, before + L))).unflatten(2, (q.shape[1], -1))
        # Queries and keys of local_attention share their positions: queries of zeros stand before the stretch.
        return terrazzo.local_attention(F.pad(q, (0, 0, 0, 0, before, 0)), k, v, self.window)[:, before:]


class Moves:
    """Bytes between the stretches as given (starts) and those between patch borders (ends of the same ranks, further right)."""

    def __init__(self, group, place, starts, borders):
        self.group, self.place, size = group, place, len(starts) - 1
        left = [borders[r] - starts[r] for r in range(size)] + [0]  # how many go to the left neighbour
        stay = starts[place + 1] - borders[place]
        self.to_left, self.from_right = [0] * size, [0] * size
        self.to_left[place], self.from_right[place] = stay, stay
        if place:
            self.to_left[place - 1] = left[place]
        if place + 1 < size:
            self.from_right[place + 1] = left[place + 1]

    def to_patches(self, ids):
        exchange = comm.Exchange(self.group, self.place, self.to_left, self.from_right, "bytes at borders")
        exchange.begin(ids[0])
        return exchange.end()[None]

    def back(self, h):
        exchange = comm.Exchange(self.group, self.place, self.from_right, self.to_left, "outputs at borders")
        return exchange.finish(exchange.start(h[0]))[None]


def forward(self, input_ids, labels=None, attention_mask=None, patch_lengths=None, state=None, logits_to_keep=0):
    """Blt.forward, for this rank's stretch."""
    layers.check_ids(FN, "input_ids", input_ids, self.config.vocab_size)
    if len(input_ids) != 1:
        checks.fail(FN, f"input_ids of a Blt must be one row (1, L), got {tuple(input_ids.shape)}: patches begin elsewhere in every row")
    if patch_lengths is not None:
        checks.fail(FN, "patch_lengths isn't taken by a Blt whose rows are sharded; its own patcher cuts them")
    valid = layers.check_valid(FN, attention_mask, *input_ids.shape)
    stretch = Stretch(self._context_parallel[0], input_ids, labels, state, valid, None)
    h = _run(self.model, input_ids, stretch)
    logits = self.lm_head(h[:, -logits_to_keep:] if logits_to_keep else h).float()
    return layers.Output(logits, None if labels is None else stretch.loss(logits, 0.0))


def _run(model, ids, stretch):
    """BltModel.forward: the decoder's output (1, L, D)."""
    place, line = stretch.place, stretch.line
    patches = _cut(model, ids, stretch)
    borders, first = _borders(patches, stretch.starts)
    moves = Moves(stretch.group, place, stretch.starts, borders)
    ids = moves.to_patches(ids)
    part = Part(line, place, borders)
    own = patches[:, borders[place] : borders[place + 1]] - first[place]
    asked = patches[:, borders[place] + 1 : borders[place + 1] + 1] - 1 - first[place] + (place > 0)  # behind the left neighbour's last patch
    known = max((1, *model.config.encoder_hash_byte_group_size)) - 1
    text = part.behind(ids, 1, known, "hashed bytes") if known else ids
    text = F.pad(text, (known + ids.shape[1] - text.shape[1], 0))  # zeros before the row, as for whole ones
    h = model.local_encoder(model.embed(text)[:, known:], part, None)
    whole = model.local_encoder.patches(h, own, first[place + 1] - first[place])
    row = Part(line, place, first)
    answers = row.behind(model.global_transformer(whole, row, None), 1, 1, "patches at borders")
    h = model.local_decoder(h, model.local_decoder.keys_values(answers), asked, part, None)
    return moves.back(h)


@torch.no_grad()
def _cut(model, ids, stretch):
    """(1, T + 1) int32: the patch of each byte of the whole row, and of the byte behind it."""
    c, starts = model.config, stretch.starts
    if not c.cuts_by_entropy:
        return torch.arange(starts[-1] + 1, dtype=torch.int32, device=ids.device)[None]
    logits = model.patcher(ids, Part(stretch.line, stretch.place, starts))
    mine = terrazzo.entropy_patch(logits, 0.0).entropies
    entropies = stretch.line("entropies").everyones(mine, [b - a for a, b in zip(starts, starts[1:])])
    return patches_from_entropies(entropies, c.patching_threshold, max_patch_length=c.max_patch_length, include_next=True).patch_ids


def _borders(patches, starts):
    """Where stretches begin that hold whole patches (the end of the row last), and their first patches (the number of closed ones last)."""
    T = starts[-1]
    begins = torch.cat([patches.new_ones(1), patches[0, 1:T] - patches[0, : T - 1]]).nonzero()[:, 0]
    at = torch.searchsorted(begins, torch.tensor(starts[:-1], device=begins.device))
    borders = [*F.pad(begins, (0, 1), value=T)[at].tolist(), T]
    first = patches[0, torch.tensor(borders, device=patches.device)].tolist()
    for place, (a, b) in enumerate(zip(first, first[1:])):
        if a >= b:
            checks.fail(FN, f"every stretch of a Blt's row must hold a whole patch, number {place}, {starts[place + 1] - starts[place]} bytes, holds none; "
                            "give longer ones, or a model with a max_patch_length")
    return borders, first
