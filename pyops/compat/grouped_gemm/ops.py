"""grouped_gemm.ops: the grouped product, and the fork's permute and unpermute around it."""
from terrazzo.grouped_gemm import gmm as _gmm
from terrazzo.moe import moe_permute, moe_unpermute


def gmm(a, b, batch_sizes, trans_b=False):
    """terrazzo.gmm: (T, K) times (E, K, N), or (E, N, K) with trans_b, in groups of batch_sizes rows."""
    return _gmm(a, b, batch_sizes, trans_b=trans_b)


def permute(input_act, indices, num_out_tokens=None, max_token_num=0):
    """Rows (T, D) copied for each choice of indices (T, A) or (T,) and sorted by expert -> (T * A, D), and their map for unpermute.

    max_token_num sizes upstream's workspace; nothing here needs it.
    """
    choices = indices.view(input_act.shape[0], -1)
    if num_out_tokens not in (None, 0, choices.numel()):
        raise NotImplementedError(
            f"grouped_gemm.ops.permute: tokens are never dropped, num_out_tokens must be None or {choices.numel()}, got {num_out_tokens}; "
            "give choices that should not count an index behind the last expert, and use terrazzo.moe_permute"
        )
    experts = int(choices.max()) + 1 if choices.numel() else 1
    order, inverse, _ = moe_permute(choices, experts)
    return input_act.index_select(0, order // choices.shape[1]), inverse


def unpermute(input_act, row_id_map, probs=None):
    """Rows (T * A, D) back in token order, summed with the weights probs (T, A); without probs A is 1."""
    weights = input_act.new_ones(row_id_map.shape[0], 1) if probs is None else probs
    return moe_unpermute(input_act, row_id_map, weights)


def __getattr__(name):
    raise AttributeError(
        f"module 'grouped_gemm.ops' has no attribute {name!r} in terrazzo: it has gmm, permute and unpermute; "
        "terrazzo.moe_route, terrazzo.fused_experts and terrazzo.load_balancing_loss cover routing and experts"
    )


__all__ = ["gmm", "permute", "unpermute"]
