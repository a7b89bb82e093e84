"""The Mamba-2 scan, plain torch:

    state[p, n] = exp(dt A) state[p, n] + dt B[n] x[p]        y[p] = sum_n C[n] state[p, n] + D x[p]

written as matrix products over short chunks (a position loop would take seconds). The oracle in float64 and the
fallback of every device. Source: Dao & Gu, "Transformers are SSDs" (2024).
"""
import torch
import torch.nn.functional as F

from .causal_conv1d import segments

CHUNK = 64


def mamba_chunk_scan_combined(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus,
                              dt_limit, return_final_states):
    """x (B, L, H, P), dt (B, L, H), A (H,), B and C (B, L, G, N) -> y (B, L, H, P), states (sequences, H, P, N)."""
    batch, L, H, P = x.shape
    G, N = B.shape[2:]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    dt = dt.to(acc)
    if dt_bias is not None:
        dt = dt + dt_bias.to(acc)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)
    xf = x.to(acc)
    operands = (xf * dt[..., None], dt * A.to(acc), *(t.to(acc).repeat_interleave(H // G, dim=2) for t in (B, C)))
    if seq_idx is None and cu_seqlens is None:
        start = xf.new_zeros(batch, H, P, N) if initial_states is None else initial_states.to(acc)
        y, states = _scan(*operands, start)
    else:
        y, states = torch.zeros_like(xf), {}
        for row, begin, end, init, final, padding in segments(batch, L, seq_idx, cu_seqlens):
            known = init is not None and initial_states is not None
            state = initial_states[init : init + 1].to(acc) if known else xf.new_zeros(1, H, P, N)
            if not padding and end > begin:
                part, state = _scan(*(t[row : row + 1, begin:end] for t in operands), state)
                y = torch.cat([y[:row], torch.cat([y[row : row + 1, :begin], part, y[row : row + 1, end:]], 1), y[row + 1 :]])
            if final is not None:
                states[final] = state
        states = torch.cat([states[s] for s in sorted(states)]) if states else xf.new_zeros(0, H, P, N)
    if D is not None:
        skip = xf * (D.to(acc) if D.dim() == 2 else D.to(acc)[:, None])
        y = y + (skip if seq_idx is None else torch.where((seq_idx >= 0)[..., None, None], skip, 0))
    if z is not None:
        y = y * F.silu(z.to(acc))
    return y.to(x.dtype), states if return_final_states else None


def _scan(dtx, dtA, B, C, state):
    """dtx (B, L, H, P), dtA (B, L, H), B and C (B, L, H, N), state (B, H, P, N) -> y, the last state."""
    L = dtx.shape[1]
    ys = []
    for begin in range(0, L, CHUNK):
        u, a, b, c = (t[:, begin : begin + CHUNK].transpose(1, 2) for t in (dtx, dtA, B, C))  # (B, H, Q, ...)
        cum = a.cumsum(2)
        # decay[l, s] = exp(a[s+1] + ... + a[l]): summed, never subtracted, so that a huge step costs no digits
        Q = a.shape[2]
        later = torch.ones(Q, Q, dtype=torch.bool, device=a.device).tril(-1)
        sums = a[..., None].expand(*a.shape, Q).masked_fill(~later, 0).cumsum(2)
        decay = sums.masked_fill(~later.logical_or(torch.eye(Q, dtype=torch.bool, device=a.device)), -torch.inf).exp()
        y = (c @ b.mT * decay) @ u + cum.exp()[..., None] * (c @ state.mT)
        state = cum[:, :, -1, None, None].exp() * state + u.mT @ (decay[:, :, -1, :, None] * b)
        ys.append(y.transpose(1, 2))
    return torch.cat(ys, 1), state
