"""Routing and experts in plain torch."""
import torch
from torch.nn import functional as F

ACTIVATIONS = {
    None: lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def gate(g, u, activation, alpha, limit):
    """What stands between an expert's two products: act(g) * u, gpt-oss's clamped form, or act(g) without u."""
    if activation == "swiglu_oai":
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        return (u + 1) * g * torch.sigmoid(alpha * g)
    h = ACTIVATIONS[activation](g)
    return h if u is None else h * u


def fused_experts(x, w1, w_up, w2, topk_weights, topk_indices, bias1, bias_up, bias2, activation, interleaved, alpha, limit):
    """w1 (E, F or 2F, D), w_up (E, F, D) or None, w2 (E, D, F); see terrazzo.fused_experts."""
    y = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        tokens, places = torch.where(topk_indices == e)
        rows = x[tokens]

        def product(rows, w, bias, e=e):
            return F.linear(rows, w[e].to(x.dtype), None if bias is None else bias[e].to(x.dtype))

        g, u = product(rows, w1, bias1), None
        if w_up is not None:
            u = product(rows, w_up, bias_up)
        elif w1.shape[1] == 2 * w2.shape[2]:
            g, u = (g[:, ::2], g[:, 1::2]) if interleaved else g.chunk(2, dim=1)
        out = product(gate(g, u, activation, alpha, limit), w2, bias2)
        y = y.index_add(0, tokens, out * topk_weights[tokens, places, None].to(x.dtype))
    return y


def moe_route(logits, top_k, norm_order, softmax_first, sigmoid, bias, n_group, topk_group, scale):
    """(weights, indices): see terrazzo.moe_route."""
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1) if softmax_first else logits
    choice = scores if bias is None else scores + bias
    if n_group is not None:
        groups = choice.unflatten(-1, (n_group, -1))
        group_scores = groups.topk(min(2, groups.shape[-1]), dim=-1)[0].sum(-1) if bias is not None else groups.amax(-1)
        kept = torch.zeros_like(group_scores).scatter(1, group_scores.topk(topk_group, dim=-1)[1], 1).bool()
        choice = groups.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    order = torch.sort(choice.detach(), dim=-1, descending=True, stable=True)[1]  # ties: the lower index first
    indices = order[:, :top_k]
    weights = scores.gather(1, indices)
    if not softmax_first and not sigmoid:
        weights = weights.softmax(-1)
    if norm_order is not None:
        weights = weights / torch.linalg.vector_norm(weights, ord=norm_order, dim=-1, keepdim=True)
    return weights * scale, indices.to(torch.int32)


def moe_permute(indices, num_experts):
    """(order, inverse, offs): see terrazzo.moe_permute."""
    flat = indices.flatten().clamp(max=num_experts)
    order = torch.sort(flat, stable=True)[1]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    offs = torch.bincount(flat, minlength=num_experts + 1)[:num_experts].cumsum(0)
    return order.to(torch.int32), inverse.to(torch.int32).view(indices.shape), offs.to(torch.int32)


def moe_unpermute(rows, inverse, weights):
    return (rows[inverse.long()] * weights.to(rows.dtype)[..., None]).sum(1)
