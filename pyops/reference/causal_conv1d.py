"""Causal depthwise convolution, plain torch: y[b,d,l] = act(bias[d] + sum_w weight[d,w] x[b,d,l-(W-1)+w]).

Any width, dtype and device; the oracle in float64. Source: Dao-AILab/causal-conv1d.
"""
import torch
import torch.nn.functional as F


def segments(B, L, seq_idx=None, cu_seqlens=None):
    """The independent sequences of a packed batch: (row, begin, end, init, final, padding) of each.

    Rows, or the ranges of cu_seqlens, split where seq_idx changes. `init` and `final` number the initial and final
    states of the row (range): its first run takes the one, its last run that isn't padding gives the other.
    """
    if cu_seqlens is None:
        ranges = [(row, 0, L) for row in range(B)]
    else:
        ends = cu_seqlens.tolist()
        ranges = [(0, begin, end) for begin, end in zip(ends, ends[1:])]
    found = []
    for state, (row, begin, end) in enumerate(ranges):
        ids = [0] * (end - begin) if seq_idx is None else seq_idx[row, begin:end].tolist()
        cuts = [0, *(i for i in range(1, len(ids)) if ids[i] != ids[i - 1]), len(ids)] if ids else [0, 0]
        runs = [[row, begin + a, begin + b, None, None, bool(ids) and ids[a] < 0] for a, b in zip(cuts, cuts[1:])]
        if not runs[0][5]:
            runs[0][3] = state
        real = [run for run in runs if not run[5]]
        if not real:  # nothing but padding: the state passes through
            real = [[row, begin, begin, state, None, False]]
            runs += real
        real[-1][4] = state
        found += runs
    return found


def causal_conv1d_fn(x, weight, bias, seq_idx, cu_seqlens, initial_states, return_final_states, silu):
    """x (B, D, L), weight (D, W), states (sequences, D, W-1) -> y (B, D, L), final states or None."""
    B, D, L = x.shape
    K = weight.shape[1] - 1
    if seq_idx is None and cu_seqlens is None:
        before = x.new_zeros(B, D, K) if initial_states is None else initial_states.to(x.dtype)
        return _conv(x, weight, bias, before, return_final_states, silu)
    y, states = torch.zeros_like(x), {}
    for row, begin, end, init, final, padding in segments(B, L, seq_idx, cu_seqlens):
        known = init is not None and initial_states is not None
        before = initial_states[init : init + 1].to(x.dtype) if known else x.new_zeros(1, D, K)
        part, state = _conv(x[row : row + 1, :, begin:end], weight, bias, before, True, silu)
        if not padding:
            y = torch.cat([y[:row], torch.cat([y[row : row + 1, :, :begin], part, y[row : row + 1, :, end:]], 2), y[row + 1 :]])
        if final is not None:
            states[final] = state
    if not return_final_states:
        return y, None
    return y, torch.cat([states[s] for s in sorted(states)]) if states else x.new_zeros(0, D, K)


def _conv(x, weight, bias, before, return_final_states, silu):
    """One sequence per row: x (B, D, L) after the inputs `before` (B, D, W-1)."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    L, W = x.shape[2], weight.shape[1]
    inputs = torch.cat([before, x], 2)
    y = sum(inputs[:, :, w : w + L].to(acc) * weight[:, w, None].to(acc) for w in range(W))
    if bias is not None:
        y = y + bias[:, None].to(acc)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype), inputs[:, :, L:] if return_final_states else None


def causal_conv1d_update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    """x (B, D, L) against conv_state (slots, D, >=W-1), updated in place -> y (B, D, L)."""
    B, D, L = x.shape
    W, state_len = weight.shape[1], conv_state.shape[2]
    slots = torch.arange(B, device=x.device) if conv_state_indices is None else conv_state_indices.long()
    live = slots >= 0
    state = conv_state[slots.clamp(min=0)]
    if cache_seqlens is None:
        history = state[:, :, state_len - (W - 1) :]
        new_state = torch.cat([state, x.to(state.dtype)], 2)[:, :, -state_len:]
    else:
        seqlens = cache_seqlens.long()[:, None]
        old = (seqlens + torch.arange(-(W - 1), 0, device=x.device)) % state_len
        history = state.gather(2, old[:, None].expand(B, D, W - 1))
        keep = min(L, state_len)
        new = (seqlens + torch.arange(L - keep, L, device=x.device)) % state_len
        new_state = state.scatter(2, new[:, None].expand(B, D, keep), x[:, :, L - keep :].to(state.dtype))
    y, _ = _conv(x, weight, bias, history.to(x.dtype), False, silu)
    with torch.no_grad():
        conv_state[slots[live]] = new_state[live]
    return torch.where(live[:, None, None], y, 0)


def causal_conv1d_varlen_states(x, cu_seqlens, state_len):
    """x (T, D) packed -> (sequences, D, state_len): the last inputs of each sequence, zeros before short ones."""
    cu = cu_seqlens.long()
    source = cu[1:, None] - state_len + torch.arange(state_len, device=x.device)
    inside = source >= cu[:-1, None]
    return torch.where(inside[..., None], x[source.clamp(min=0)], 0).transpose(1, 2)
