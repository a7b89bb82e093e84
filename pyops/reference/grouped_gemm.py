"""Grouped products in plain torch: a loop over the groups."""
import torch


def grouped_mm(a, b, offs, bias=None):
    """a[rows of e] @ b[e] (+ bias[e]) for every group; rows behind the last group are zero."""
    ends = offs.tolist()
    parts = []
    for e, (begin, end) in enumerate(zip([0, *ends], ends)):
        part = a[begin:end] @ b[e].to(a.dtype)
        parts.append(part if bias is None else part + bias[e].to(a.dtype))
    rest = a.shape[0] - (ends[-1] if ends else 0)
    return torch.cat([*parts, a.new_zeros(rest, b.shape[2])])


def weight_gradient(a, dy, ends):
    """(E, K, N): a[rows of e]^T @ dy[rows of e]."""
    starts = [0, *ends]
    return torch.stack([a[begin:end].T @ dy[begin:end] for begin, end in zip(starts, ends)])
