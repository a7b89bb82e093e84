"""Attention between patches and their bytes by a dense mask, plain torch."""
import torch

from .local_attention import masked_attention


def patch_cross_attention(q, k, v, patch_ids, num_patches, bytes_ask, k_per_patch, scale, window, key_mask):
    """q (B, Lq, H, P), k and v (B, Lk, Hk, P), patch_ids (B, L) -> (B, Lq, H, P)."""
    of_byte = torch.where(patch_ids < num_patches, patch_ids, -1)
    of_row = torch.arange(num_patches, device=q.device).repeat_interleave(k_per_patch).expand(q.shape[0], -1)
    of_query, of_key = (of_byte, of_row) if bytes_ask else (of_row, of_byte)
    behind = of_query[:, :, None] - of_key[:, None]  # how many patches the key lies behind
    seen = (behind >= 0) & (behind < window) & (of_query >= 0)[:, :, None] & (of_key >= 0)[:, None]
    if key_mask is not None:
        seen = seen & key_mask[:, None]
    return masked_attention(q, k, v, seen, scale)
