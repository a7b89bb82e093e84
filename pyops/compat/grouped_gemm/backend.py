"""grouped_gemm.backend: the product with both transposes, into a tensor of the caller's where one is given."""
from terrazzo.grouped_gemm import gmm as _gmm


def gmm(a, b, batch_sizes, trans_a=False, trans_b=False, c=None):
    """terrazzo.gmm; with `c` the result is copied into it."""
    out = _gmm(a, b, batch_sizes, trans_a, trans_b)
    return out if c is None else c.copy_(out)


__all__ = ["gmm"]
