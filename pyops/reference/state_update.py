"""One decoding step of the Mamba scan, plain torch, on any device. Source: mamba_ssm's selective_state_update."""
import torch
import torch.nn.functional as F


def selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    """state (slots, H, P, N) in place; x, dt, z (B, H, P); A (H, P, N); B, C (B, G, N); D, dt_bias (H, P) -> (B, H, P)."""
    batch, H, P = x.shape
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    slots = torch.arange(batch, device=x.device) if state_batch_indices is None else state_batch_indices.long()
    live = slots >= 0
    dt = dt.to(acc)
    if dt_bias is not None:
        dt = dt + dt_bias.to(acc)
    if dt_softplus:
        dt = F.softplus(dt)
    xf = x.to(acc)
    Bf, Cf = (t.to(acc).repeat_interleave(H // B.shape[1], dim=1)[:, :, None] for t in (B, C))
    old = state[slots.clamp(min=0)].to(acc)
    new = old * torch.exp(dt[..., None] * A.to(acc)) + (dt * xf)[..., None] * Bf
    out = (new * Cf).sum(-1)
    if D is not None:
        out = out + xf * D.to(acc)
    if z is not None:
        out = out * F.silu(z.to(acc))
    with torch.no_grad():
        state[slots[live]] = new[live].to(state.dtype)
    return torch.where(live[:, None, None], out, 0).to(x.dtype)
