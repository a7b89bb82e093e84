"""Entropy patching in plain torch: see pyops/entropy_patch.py for the rules."""
import math

import torch

from .linear import acc_dtype


def entropy(logits, valid_lengths=None):
    """logits (B, L, V) -> entropies (B, L) in nats, float32 (float64 for float64); 0 on padding."""
    log_p = logits.to(acc_dtype(logits.dtype)).log_softmax(-1)
    entropies = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    if valid_lengths is not None:
        positions = torch.arange(logits.shape[1], device=logits.device)
        entropies = torch.where(positions < valid_lengths[:, None], entropies, 0)
    return entropies


def texts(B, L, cu_seqlens, valid_lengths):
    """(row, begin, end) of every text of the batch."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        return [(0, begin, end) for begin, end in zip(ends, ends[1:])]
    return [(b, 0, end) for b, end in enumerate([L] * B if valid_lengths is None else valid_lengths.tolist())]


def starts_of_text(source, n, rule, threshold, threshold_add, patch_size, offset):
    """source (given,) entropies or tokens of one text -> (n,) bool: where patches start, before any maximum length."""
    given = source.shape[0]
    starts = torch.ones(n, dtype=torch.bool, device=source.device)
    if rule == "bytes":
        return starts
    if rule == "static":
        return torch.arange(n, device=source.device) % patch_size == 0
    if rule == "space":
        byte = source - offset
        letters = ((byte >= ord("0")) & (byte <= ord("9"))) | ((byte >= ord("A")) & (byte <= ord("Z"))) | ((byte >= ord("a")) & (byte <= ord("z")))
        space = ~(letters | ((byte >= 0x80) & (byte < 0xC0)))
        behind = source < offset
        behind[1:] |= space[1:] & ~space[:-1]
        starts[2:] = behind[1 : n - 1]
        return starts
    if rule == "top":
        candidates = source[1 : n - 1]
        wanted = min(len(candidates), max(0, math.floor(given / patch_size) - 2))
        starts[2:] = False
        starts[2 + candidates.sort(descending=True, stable=True)[1][:wanted]] = True
        return starts
    value = source.to(acc_dtype(source.dtype))
    rise = value[1 : n - 1] - value[: max(n - 2, 0)]
    over = (source > threshold)[1 : n - 1]
    if rule == "threshold":
        starts[2:] = over
    elif rule == "monotonic":
        starts[3:] = rise[1:] > source.new_tensor(threshold).to(value.dtype)
    else:
        starts[3:] = (over & (rise > threshold_add))[1:]
        starts[3:4] = False
    return starts


def cut(source, rule, threshold=0.0, threshold_add=0.0, patch_size=1, max_length=None, offset=0, cu_seqlens=None, valid_lengths=None, include_next=False):
    """source (B, L) entropies or tokens -> starts (B, N) bool, ids (B, N), lengths (B, N), counts (B,), int32; N = L + include_next."""
    B, L = source.shape
    N = L + include_next
    starts = torch.zeros(B, N, dtype=torch.bool, device=source.device)
    live = torch.zeros_like(starts)
    for row, begin, end in texts(B, L, cu_seqlens, valid_lengths):
        n = end - begin + include_next
        found = starts_of_text(source[row, begin:end], n, rule, threshold, threshold_add, patch_size, offset)
        if max_length:
            position = torch.arange(n, device=source.device)
            since = position - torch.where(found, position, 0).cummax(0)[0] if n else position
            found = since % max_length == 0
        starts[row, begin : begin + n], live[row, begin : begin + n] = found, True
    ids = torch.where(live, starts.cumsum(1) - 1, -1).int()
    lengths = torch.zeros(B, N, dtype=torch.int32, device=source.device).scatter_add_(1, ids.clamp(min=0).long(), live.int())
    return starts, ids, lengths, starts.sum(1).int()


def patch_ids(lengths, length):
    """lengths (B, S) -> ids (B, length) int32: how many patches start at or before each position, less one."""
    begins = lengths.long().cumsum(1)[:, :-1].clamp(max=length)
    marks = torch.zeros(lengths.shape[0], length + 1, dtype=torch.int64, device=lengths.device)
    return marks.scatter_add_(1, begins, torch.ones_like(begins)).cumsum(1)[:, :length].int()


def update(entropies, state, before, rule, threshold, threshold_add, max_length):
    """One more block of entropies (B, K); state (B, 3) and before (B,) change in place -> starts (B, K), ids (B, K)."""
    starts, ids = [], []
    for e in entropies.to(before.dtype).unbind(1):
        state[:, 0] += 1
        position, length, patch = state.unbind(1)
        rise = e.to(acc_dtype(e.dtype)) - before.to(acc_dtype(e.dtype))
        if rule == "threshold":
            start = e > threshold
        elif rule == "monotonic":
            start = (rise > e.new_tensor(threshold).to(rise.dtype)) | (position == 2)
        else:
            start = ((e > threshold) & (rise > threshold_add) & (position != 3)) | (position == 2)
        start = start | (position < 2)
        if max_length:
            start = start | (length == max_length)
        state[:, 1] = torch.where(start, 1, length + 1)
        state[:, 2] = patch + start
        before.copy_(e)
        starts.append(start)
        ids.append(state[:, 2].int())
    empty = entropies.new_empty(entropies.shape[0], 0)
    return (torch.stack(starts, 1), torch.stack(ids, 1)) if starts else (empty.bool(), empty.int())
