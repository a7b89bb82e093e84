"""One row for each patch of bytes, plain torch."""
import torch

from .linear import acc_dtype


def patch_reduce(h, patch_ids, num_patches, reduce):
    """h (B, L, D), patch_ids (B, L) -> (B, num_patches, D): amax, mean or amin of each patch's rows, zeros where it is empty."""
    B, L, D = h.shape
    ids = patch_ids.long()
    slot = torch.where((ids < 0) | (ids >= num_patches), num_patches, ids)  # bytes of no patch meet in one row more
    filled = torch.zeros(B, num_patches + 1, dtype=torch.bool, device=h.device).scatter(1, slot, True)
    # The rows start as NaN, which equals nothing: a start of zero would take a part of the gradient where the result is zero.
    rows = h.new_full((B, num_patches + 1, D), torch.nan, dtype=acc_dtype(h.dtype))
    rows = rows.scatter_reduce(1, slot[:, :, None].expand(B, L, D), h.to(rows.dtype), reduce, include_self=False)
    return torch.where(filled[:, :, None], rows, 0)[:, :num_patches].to(h.dtype)
