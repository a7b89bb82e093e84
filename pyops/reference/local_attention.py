"""Attention with a dense mask, and the sliding window as one, plain torch."""
import torch

from .linear import acc_dtype


def masked_attention(q, k, v, seen, scale):
    """q (B, Lq, H, P), k and v (B, Lk, Hk, P), seen (B, Lq, Lk) bool -> (B, Lq, H, P); zeros for a query that sees nothing."""
    acc, group = acc_dtype(q.dtype), q.shape[2] // k.shape[2]
    k, v = (t.to(acc).repeat_interleave(group, dim=2) for t in (k, v))
    scores = torch.einsum("bihp,bjhp->bhij", q.to(acc), k) * scale
    seen = seen[:, None]
    weights = scores.masked_fill(~seen, torch.finfo(acc).min).softmax(-1).masked_fill(~seen, 0)
    return torch.einsum("bhij,bjhp->bihp", weights, v).to(q.dtype)


def local_attention(q, k, v, window, causal, scale, key_mask, cu_seqlens):
    """q (B, L, H, P), k and v (B, L, Hk, P) -> (B, L, H, P)."""
    B, L = q.shape[:2]
    position = torch.arange(L, device=q.device)
    behind = position[:, None] - position  # how far key j lies behind query i
    seen = (behind < window) & ((behind >= 0) if causal else (behind > -window))
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens.contiguous(), position, right=True)
        seen = seen & (sequence[:, None] == sequence)
    seen = seen.expand(B, L, L)
    if key_mask is not None:
        seen = seen & key_mask[:, None]
    return masked_attention(q, k, v, seen, scale)
