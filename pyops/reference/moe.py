"""Choosing experts, sorting tokens by expert and summing them up again, plain torch."""
import torch

from .linear import acc_dtype


def moe_route(logits, bias, top_k, norm_order, softmax_first, sigmoid, n_group, topk_group, scale):
    """logits (T, E), bias (E,) or None -> weights (T, A), indices (T, A) int32."""
    scores = logits.to(acc_dtype(logits.dtype))
    if sigmoid or softmax_first:
        scores = scores.sigmoid() if sigmoid else scores.softmax(-1)
    scores = torch.where(scores.isnan().any(-1, keepdim=True), torch.nan, scores)
    choice = scores.detach()
    if bias is not None:
        choice = choice + bias.detach().to(choice.dtype)
    if n_group is not None:
        groups = choice.unflatten(1, (n_group, -1))
        best = 2 if sigmoid or bias is not None else 1  # DeepSeek-V3 adds a group's best two, DeepSeek-V2 takes the best
        value = groups.topk(min(best, groups.shape[2]), dim=2)[0].sum(2)
        out = torch.ones_like(value, dtype=torch.bool).scatter(1, _largest(value, topk_group), False)
        choice = groups.masked_fill(out[:, :, None], -torch.inf).flatten(1)
    indices = _largest(choice, top_k)
    weights = scores.gather(1, indices)
    if not sigmoid and not softmax_first:
        weights = weights.softmax(-1)
    if norm_order is not None:
        weights = weights / (torch.linalg.vector_norm(weights, norm_order, dim=1, keepdim=True) + 1e-20)
    return (weights * scale).to(logits.dtype), indices.int()


def _largest(values, k):
    """Columns of each row's k largest values, the largest first and the lower column first among equals."""
    return values.sort(dim=1, descending=True, stable=True)[1][:, :k]


def moe_permute(indices, num_experts):
    """indices (T, A) -> order (T*A,), inverse (T*A,), offs (E,), int32; indices >= num_experts go last."""
    experts = indices.flatten().long().clamp(max=num_experts)
    order = experts.sort(stable=True)[1]
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=order.device).index_add_(0, experts, torch.ones_like(experts))
    return order.int(), inverse.int(), counts[:num_experts].cumsum(0).int()


def moe_unpermute(rows, inverse, weights):
    """rows (T*A, D), inverse (T*A,), weights (T, A) -> (T, D): the weighted sum of each token's rows."""
    acc = acc_dtype(rows.dtype)
    T, A = weights.shape
    picked = rows.to(acc)[inverse.long()].view(T, A, rows.shape[1])
    return (picked * weights[:, :, None].to(acc)).sum(1).to(rows.dtype)
