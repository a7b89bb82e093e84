"""A layer of experts, plain torch: y[t] = sum over a of weight[t, a] * (gate(x[t] w1[e]) w2[e]), e = expert a of t."""
import torch

from .linear import ACTIVATIONS, acc_dtype


def gate(g, u, activation, alpha, limit):
    """What stands between the two products of an expert; u is None for an expert without a gate."""
    if activation == "swiglu_oai":  # gpt-oss: both sides clamped
        g = g.clamp(max=limit)
        return (u.clamp(-limit, limit) + 1) * g * torch.sigmoid(alpha * g)
    h = ACTIVATIONS[activation](g)
    return h if u is None else h * u


def fused_experts(x, w1, w_up, w2, topk_weights, topk_indices, bias1, bias_up, bias2, activation, interleaved, alpha, limit):
    """x (T, D), w1 (E, F or 2F, D), w_up (E, F, D) or None, w2 (E, D, F), topk (T, A) -> (T, D)."""
    acc = acc_dtype(x.dtype)
    E, F = w2.shape[0], w2.shape[2]
    xf, y = x.to(acc), x.new_zeros(x.shape, dtype=acc)

    def product(h, w, bias, e):
        out = h @ w[e].to(acc).T
        return out if bias is None else out + bias[e].to(acc)

    used = [e for e in topk_indices.unique().tolist() if e < E] or [0]  # one at least: the gradients then exist
    for e in used:
        token, place = torch.where(topk_indices == e)
        g, u = product(xf[token], w1, bias1, e), None
        if w_up is not None:
            u = product(xf[token], w_up, bias_up, e)
        elif w1.shape[1] == 2 * F:
            g, u = (g[:, ::2], g[:, 1::2]) if interleaved else g.chunk(2, dim=1)
        out = product(gate(g, u, activation, alpha, limit), w2, bias2, e)
        y = y.index_add(0, token, out * topk_weights[token, place, None].to(acc))
    return y.to(x.dtype)
