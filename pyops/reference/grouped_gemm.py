"""Grouped matrix products, plain torch. Source: torch's grouped_mm."""
import torch

from .linear import acc_dtype


def grouped_mm(a, b, offs, bias):
    """a (T, K), b (E, K, N), offs (E,) row ends, bias (E, N) or None -> (T, N), zero behind the last group."""
    acc = acc_dtype(a.dtype)
    rows, begin = [], 0
    for e, end in enumerate(offs.tolist()):
        c = a[begin:end].to(acc) @ b[e].to(acc)
        rows.append(c if bias is None else c + bias[e].to(acc))
        begin = end
    rows.append(a.new_zeros(a.shape[0] - begin, b.shape[2], dtype=acc))
    return torch.cat(rows).to(a.dtype)


def grouped_wgrad(a, b, offs):
    """a (T, K), b (T, N), offs (E,) row ends -> (E, K, N): a[rows of e].T @ b[rows of e]."""
    acc = acc_dtype(a.dtype)
    ends = offs.tolist()
    return torch.stack([a[i:j].T.to(acc) @ b[i:j].to(acc) for i, j in zip([0, *ends], ends)]).to(a.dtype)
