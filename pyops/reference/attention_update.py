"""One decoding step of attention, plain torch, on any device. Source: flash_attn_with_kvcache."""
import torch

from .linear import acc_dtype


def _rotate(x, cos, sin, interleaved):
    """x (B, heads, P) with its first 2 R channels turned; cos and sin (1 or B, R)."""
    R, cos, sin = cos.shape[1], cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turned, rest = x[..., : 2 * R], x[..., 2 * R :]
    a, b = turned.unflatten(-1, (R, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    pair = a * cos - b * sin, b * cos + a * sin
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), rest], -1)


def attention_update(qkv, k_cache, v_cache, cache_seqlens, cos, sin, interleaved, window, scale):
    """qkv (B, (H + 2 Hk) P), the caches (B, Hk, slots, P) in place, cache_seqlens int or (B,) -> (B, H P)."""
    (B, Hk, slots, P), acc = k_cache.shape, acc_dtype(qkv.dtype)
    q, k, v = qkv.unflatten(1, (-1, P)).to(acc).split([qkv.shape[1] // P - 2 * Hk, Hk, Hk], 1)
    if cos is not None:
        q, k = _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)
    before = torch.as_tensor(cache_seqlens, device=qkv.device).long().expand(B)
    rows, slot = torch.arange(B, device=qkv.device), before if window is None else before % window
    with torch.no_grad():
        k_cache[rows, :, slot], v_cache[rows, :, slot] = k.to(k_cache.dtype), v.to(v_cache.dtype)
    keys, values = (cache.to(acc).repeat_interleave(q.shape[1] // Hk, 1) for cache in (k_cache, v_cache))
    seen = (before + 1 if window is None else (before + 1).clamp(max=window))[:, None, None]
    unseen = torch.arange(slots, device=qkv.device) >= seen
    scores = (torch.einsum("bhp,bhsp->bhs", q, keys) * scale).masked_fill(unseen, -torch.inf)
    values = values.masked_fill(unseen[..., None], 0.0)  # what was never written may be anything
    return torch.einsum("bhs,bhsp->bhp", scores.softmax(-1), values).flatten(1).to(qkv.dtype)
