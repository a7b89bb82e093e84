"""The backward of chunk_scan.py's scan: every gradient but z's (in training the gate stands outside), recomputing the states.

With E[l, s] = exp(cum_l - cum_s) for s <= l, w_s = exp(cum_last - cum_s) dt_s, and dH the gradient of the state after a chunk:
    1. decays, the state H before every chunk, and dH, carried from the last chunk to the first (chunk_scan_parts.py),
    2. per chunk and head     dx = dt (exp(cum_last - cum) B dH^T + (C B^T * E)^T dy) + D dy, and from its terms ddt and shares of
                              dA, dD and ddt_bias,
    3. per chunk and group    dS = sum over heads of dy x^T * E * dt;  dC = dS B + sum of exp(cum) dy H;  dB = dS^T C + sum of w x dH.
The gradient of a step's exponent is the sum of what crosses the step: what leaves through positions at or after it, what
entered before it, and the state that passes. It is summed from those terms, never as a difference of totals: after a reset
it is exactly zero. Shares of sums go to rows of their own, which a further kernel adds up in a fixed order (no atomics).
"""
import torch
import triton
import triton.language as tl

from . import configs, runtime
from .chunk_scan_parts import Chunks, block, load_decay, load_tile, place, real_positions, softplus, sum_partials, weighted_dot

# With chunks of 64 the products of float32, three of TF32 each, do not fit the registers of sm80.
CHUNKS = {2: 64, 4: 32}  # by bytes of an element
BWD_X = configs.Table(
    "chunk_scan_bwd_x",
    configs.Row({"BLOCK_P": 64, "BLOCK_N": 32}, num_warps=8, num_stages=1, arch=("sm9", "sm10", "gfx94"), itemsize=2),
    configs.Row({"BLOCK_P": 32, "BLOCK_N": 32}, num_warps=8, num_stages=1, itemsize=2),
    configs.Row({"BLOCK_P": 32, "BLOCK_N": 16}, num_warps=8, num_stages=1),
)
BWD_BC = configs.Table(
    "chunk_scan_bwd_bc",
    configs.Row({"BLOCK_P": 64, "BLOCK_N": 64}, num_warps=8, num_stages=1, arch=("sm9", "sm10"), itemsize=2),
    configs.Row({"BLOCK_P": 32, "BLOCK_N": 64}, num_warps=8, num_stages=1, arch=("gfx",), itemsize=2),
    configs.Row({"BLOCK_P": 32, "BLOCK_N": 16}, num_warps=4, num_stages=1, itemsize=2),
    configs.Row({"BLOCK_P": 16, "BLOCK_N": 32}, num_warps=4, num_stages=1),
)


@triton.jit
def chunk_scan_bwd_x_kernel(
    dy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, dt_bias_ptr, decay_ptr, states_ptr, dstates_ptr, seq_idx_ptr, bounds_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dbias_ptr, dD_ptr, L, H, chunks_per_row, heads_per_group, dt_min, dt_max,
    stride_dy_b, stride_dy_l, stride_dy_h, stride_dy_p, stride_x_b, stride_x_l, stride_x_h, stride_x_p, stride_dt_b, stride_dt_l, stride_dt_h,
    stride_B_b, stride_B_l, stride_B_g, stride_B_n, stride_C_b, stride_C_l, stride_C_g, stride_C_n, stride_D_h, stride_D_p,
    P: tl.constexpr, N: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_SEQ: tl.constexpr,
    HAS_CU: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dx and ddt of one head in one chunk; its shares dA, ddt_bias (chunks, H) and dD (chunks, H, P)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    row, _, begin, end = place(chunk, bounds_ptr, L, chunks_per_row, CHUNK, HAS_CU)
    head = head.to(tl.int64)
    in_chunk = tl.arange(0, CHUNK)
    offs_l = begin + in_chunk
    real = real_positions(seq_idx_ptr, row, offs_l, end, L, HAS_SEQ)
    width = tl.where(begin < end, P, 0)  # of states: an empty chunk has none
    dt, hi, lo, last_hi, last_lo = load_decay(decay_ptr, chunk, head, H, CHUNK)
    x_at = x_ptr + row * stride_x_b + head * stride_x_h
    dy_at = dy_ptr + row * stride_dy_b + head * stride_dy_h
    B_at = B_ptr + row * stride_B_b + head // heads_per_group * stride_B_g
    C_at = C_ptr + row * stride_C_b + head // heads_per_group * stride_C_g
    state_at = (chunk.to(tl.int64) * H + head) * P * N
    # scores B C^T and x dy^T [s, l]
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        B = load_tile(B_at, offs_l, stride_B_l, real, offs_n, stride_B_n, mask_n).to(dtype)
        C = load_tile(C_at, offs_n, stride_C_n, mask_n, offs_l, stride_C_l, real).to(dtype)
        scores = tl.dot(B, C, scores, input_precision=PRECISION)
    between = tl.where(in_chunk[:, None] <= in_chunk[None, :], (hi[None, :] - hi[:, None]) + (lo[None, :] - lo[:, None]), float("-inf"))
    scores *= tl.exp(between)
    dscores = tl.zeros((CHUNK, CHUNK), tl.float32)
    for p in range(0, P, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        x = load_tile(x_at, offs_l, stride_x_l, real, offs_p, stride_x_p, mask_p)
        dy = load_tile(dy_at, offs_p, stride_dy_p, mask_p, offs_l, stride_dy_l, real).to(dtype)
        dscores = tl.dot(x, dy, dscores, input_precision=PRECISION)
    # what positions of the chunk give each other, without dt_s: `direct` to s as a factor, `after` of r across step r + 1
    dscores *= scores
    direct = tl.sum(dscores, 1)
    crossing = tl.cumsum(tl.where(in_chunk[:, None] < in_chunk[None, :], dscores, 0.0) * dt[:, None], 0)
    after = tl.sum(tl.where(in_chunk[:, None] < in_chunk[None, :], crossing, 0.0), 1)
    # the state before the chunk gives to `through`, the chunk to the state after it in `enter`, [l]; `passing` does both
    to_end = tl.exp((last_hi - hi) + (last_lo - lo))
    enter = tl.zeros((CHUNK,), tl.float32)
    through = tl.zeros((CHUNK,), tl.float32)
    passing = tl.zeros((BLOCK_N,), tl.float32)
    for p in range(0, P, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        entering = tl.zeros((CHUNK, BLOCK_P), tl.float32)
        leaving = tl.zeros((CHUNK, BLOCK_P), tl.float32)
        for n in range(0, N, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N
            B = load_tile(B_at, offs_l, stride_B_l, real, offs_n, stride_B_n, mask_n).to(dtype)
            dstate = load_tile(dstates_ptr + state_at, offs_n, 1, mask_n, offs_p, N, offs_p < width)
            entering += weighted_dot(dstate, B, False, True, PRECISION)
            C = load_tile(C_at, offs_l, stride_C_l, real, offs_n, stride_C_n, mask_n).to(dtype)
            state = load_tile(states_ptr + state_at, offs_n, 1, mask_n, offs_p, N, offs_p < width)
            leaving += weighted_dot(state, C, False, True, PRECISION)
            passing += tl.sum(state * dstate, 1)
        x = load_tile(x_at, offs_l, stride_x_l, real, offs_p, stride_x_p, mask_p).to(tl.float32)
        dy = load_tile(dy_at, offs_l, stride_dy_l, real, offs_p, stride_dy_p, mask_p).to(dtype)
        entering *= to_end[:, None]
        enter += tl.sum(entering * x, 1)
        dx = dt[:, None] * (entering + weighted_dot(scores, dy, True, False, PRECISION))
        dy = dy.to(tl.float32)
        through += tl.sum(leaving * dy, 1)
        if HAS_D:
            D_at = D_ptr + head * stride_D_h
            offs_D = offs_p * stride_D_p  # 64 bits would spill on sm_90; the launcher sees to it that 32 are enough
            dx += tl.load(D_at + offs_D, mask=mask_p, other=0.0).to(tl.float32)[None, :] * dy
            tl.store(dD_ptr + (chunk.to(tl.int64) * H + head) * P + offs_p, tl.sum(x * dy, 0), mask=mask_p)
        dx_at = dx_ptr + ((row * L + offs_l[:, None]) * H + head) * P + offs_p[None, :]
        tl.store(dx_at, dx.to(dtype), mask=(offs_l < end)[:, None] & mask_p[None, :])
    # the gradient of each step's exponent, then of dt before bias, softplus and clamp
    A = tl.load(A_ptr + head).to(tl.float32)
    before = after + tl.cumsum(dt * enter, 0)
    before = tl.sum(tl.where(in_chunk[:, None] + 1 == in_chunk[None, :], before[:, None], 0.0), 0)
    da = tl.cumsum(through * tl.exp(hi), 0, reverse=True) + before + tl.exp(last_hi) * tl.sum(passing, 0)
    raw = tl.load(dt_ptr + row * stride_dt_b + offs_l.to(tl.int64) * stride_dt_l + head * stride_dt_h, mask=real, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(dt_bias_ptr + head).to(tl.float32)
    ddt = direct + enter + A * da
    if SOFTPLUS:
        ddt *= tl.sigmoid(raw)
        raw = softplus(raw)
    ddt = tl.where(real & (raw >= dt_min) & (raw <= dt_max), ddt, 0.0)
    tl.store(ddt_ptr + (row * L + offs_l) * H + head, ddt.to(ddt_ptr.dtype.element_ty), mask=offs_l < end)
    tl.store(dA_ptr + chunk.to(tl.int64) * H + head, tl.sum(da * dt, 0))
    if HAS_BIAS:
        tl.store(dbias_ptr + chunk.to(tl.int64) * H + head, tl.sum(ddt, 0))


@triton.jit
def chunk_scan_bwd_bc_kernel(
    dy_ptr, x_ptr, B_ptr, C_ptr, decay_ptr, states_ptr, dstates_ptr, seq_idx_ptr, bounds_ptr, dB_ptr, dC_ptr, positions, L, H, chunks_per_row,
    G, heads_per_group, splits, stride_dy_b, stride_dy_l, stride_dy_h, stride_dy_p, stride_x_b, stride_x_l, stride_x_h, stride_x_p,
    stride_B_b, stride_B_l, stride_B_g, stride_B_n, stride_C_b, stride_C_l, stride_C_g, stride_C_n,
    P: tl.constexpr, N: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_CU: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Shares of dB and dC (splits, positions, G, N): of one block of a group's heads, in one chunk."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    split = tl.program_id(0) % splits
    group = tl.program_id(0) // splits % G
    chunk = tl.program_id(0) // splits // G
    row, _, begin, end = place(chunk, bounds_ptr, L, chunks_per_row, CHUNK, HAS_CU)
    in_chunk = tl.arange(0, CHUNK)
    offs_l = begin + in_chunk
    real = real_positions(seq_idx_ptr, row, offs_l, end, L, HAS_SEQ)
    width = tl.where(begin < end, P, 0)  # of states: an empty chunk has none
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    dS = tl.zeros((CHUNK, CHUNK), tl.float32)
    dB = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    dC = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    split_heads = (heads_per_group + splits - 1) // splits
    first = group * heads_per_group + split * split_heads
    for h in range(0, tl.minimum(split_heads, (group + 1) * heads_per_group - first)):
        head = (first + h).to(tl.int64)
        state_at = (chunk.to(tl.int64) * H + head) * P * N
        dscores = tl.zeros((CHUNK, CHUNK), tl.float32)
        from_state = tl.zeros((CHUNK, BLOCK_N), tl.float32)
        to_state = tl.zeros((CHUNK, BLOCK_N), tl.float32)
        for p in range(0, P, BLOCK_P):
            offs_p = p + tl.arange(0, BLOCK_P)
            mask_p = offs_p < P
            x = load_tile(x_ptr + row * stride_x_b + head * stride_x_h, offs_l, stride_x_l, real, offs_p, stride_x_p, mask_p)
            dy = load_tile(dy_ptr + row * stride_dy_b + head * stride_dy_h, offs_l, stride_dy_l, real, offs_p, stride_dy_p, mask_p).to(dtype)
            dscores = tl.dot(dy, tl.trans(x), dscores, input_precision=PRECISION)
            state = load_tile(states_ptr + state_at, offs_p, N, offs_p < width, offs_n, 1, mask_n)
            from_state += weighted_dot(state, dy, False, False, PRECISION)
            dstate = load_tile(dstates_ptr + state_at, offs_p, N, offs_p < width, offs_n, 1, mask_n)
            to_state += weighted_dot(dstate, x, False, False, PRECISION)
        dt, hi, lo, last_hi, last_lo = load_decay(decay_ptr, chunk, head, H, CHUNK)  # in front of the loop they spill
        between = tl.where(in_chunk[:, None] >= in_chunk[None, :], (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :]), float("-inf"))
        dS += dscores * tl.exp(between) * dt[None, :]
        dC += from_state * tl.exp(hi)[:, None]
        dB += to_state * (tl.exp((last_hi - hi) + (last_lo - lo)) * dt)[:, None]
    B = load_tile(B_ptr + row * stride_B_b + group.to(tl.int64) * stride_B_g, offs_l, stride_B_l, real, offs_n, stride_B_n, mask_n).to(dtype)
    C = load_tile(C_ptr + row * stride_C_b + group.to(tl.int64) * stride_C_g, offs_l, stride_C_l, real, offs_n, stride_C_n, mask_n).to(dtype)
    dC += weighted_dot(dS, B, True, False, PRECISION)
    dB += weighted_dot(tl.trans(dS), C, True, False, PRECISION)
    at = ((split.to(tl.int64) * positions + row * L + offs_l[:, None]) * G + group) * N + offs_n[None, :]
    mask = (offs_l < end)[:, None] & mask_n[None, :]
    tl.store(dB_ptr + at, dB.to(dB_ptr.dtype.element_ty), mask=mask)
    tl.store(dC_ptr + at, dC.to(dC_ptr.dtype.element_ty), mask=mask)


def chunk_scan_bwd_triton(dy, dfinal_states, x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max):
    def like(t):
        return x.new_empty(0) if t is None else t.new_empty(t.shape)

    grads = dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial = tuple(like(t) for t in (x, dt, A, B, C, D, dt_bias, initial_states))
    batch, L, H, P = x.shape
    if batch == 0:
        return tuple(grad.zero_() for grad in grads)
    chunks = Chunks(x, dt, A, B, dt_bias, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, CHUNKS[x.element_size()])
    states = chunks.states(x, B, initial_states, None)
    dstates = chunks.states(dy, C, dfinal_states, None if initial_states is None else dinitial, reverse=True)
    _grad_x(chunks, dy, x, dt, A, B, C, D, dt_bias, states, dstates, dt_softplus, dt_min, dt_max, dx, ddt, dA, dD, ddt_bias)
    _grad_bc(chunks, dy, x, B, C, states, dstates, dB, dC)
    return grads


def _grad_x(chunks, dy, x, dt, A, B, C, D, dt_bias, states, dstates, dt_softplus, dt_min, dt_max, dx, ddt, dA, dD, ddt_bias):
    H, P, N = chunks.H, chunks.P, chunks.N

    def partial(*shape):
        return torch.empty(chunks.count, *shape, dtype=torch.float32, device=x.device)

    if D is not None and D.dim() == 2 and D.stride(1) * P >= 2**31:
        D = D.contiguous()
    partial_A, partial_bias = partial(H), None if dt_bias is None else partial(H)
    partial_D = None if D is None else partial(H, P)

    def run(BLOCK_P, BLOCK_N, **options):
        chunk_scan_bwd_x_kernel[(chunks.count * H,)](
            dy, x, dt, A.contiguous(), B, C, D, None if dt_bias is None else dt_bias.contiguous(), chunks.decay, states, dstates, *chunks.where(),
            dx, ddt, partial_A, partial_bias, partial_D, *chunks.sizes(), H // chunks.G, dt_min, dt_max,
            *dy.stride(), *x.stride(), *dt.stride(), *B.stride(), *C.stride(), *((0, 0) if D is None else (*D.stride(), 0)[:2]),
            P=P, N=N, HAS_D=D is not None, HAS_BIAS=dt_bias is not None, SOFTPLUS=dt_softplus, **chunks.packing(), PRECISION=chunks.precision,
            CHUNK=chunks.chunk, BLOCK_P=block(P, BLOCK_P), BLOCK_N=block(N, BLOCK_N), **options,
        )

    BWD_X.launch(x, run, P=P, N=N)
    sum_partials(partial_A, dA)
    if dt_bias is not None:
        sum_partials(partial_bias, ddt_bias)
    if D is not None:
        whole = dD if D.dim() == 2 else torch.empty(H, P, dtype=torch.float32, device=x.device)
        sum_partials(partial_D, whole)
        if D.dim() == 1:
            dD.copy_(whole.sum(1))


def _grad_bc(chunks, dy, x, B, C, states, dstates, dB, dC):
    H, P, N, G = chunks.H, chunks.P, chunks.N, chunks.G
    # heads are split for programs enough, their shares no larger than x
    heads = H // G
    splits = max(1, min(heads, triton.cdiv(2 * runtime.num_processors(x.device), chunks.count * G), heads * P // (4 * N)))
    splits = triton.cdiv(heads, triton.cdiv(heads, splits))

    def target(out):
        return out if splits == 1 else torch.empty(splits, *out.shape, dtype=torch.float32, device=x.device)

    share_B, share_C = target(dB), target(dC)

    def run(BLOCK_P, BLOCK_N, **options):
        BLOCK_N = block(N, BLOCK_N)
        chunk_scan_bwd_bc_kernel[chunks.count * G * splits, triton.cdiv(N, BLOCK_N)](
            dy, x, B, C, chunks.decay, states, dstates, *chunks.where(), share_B, share_C, x.shape[0] * x.shape[1], *chunks.sizes(), G, heads, splits,
            *dy.stride(), *x.stride(), *B.stride(), *C.stride(), P=P, N=N, **chunks.packing(), PRECISION=chunks.precision,
            CHUNK=chunks.chunk, BLOCK_P=block(P, BLOCK_P), BLOCK_N=BLOCK_N, **options,
        )

    BWD_BC.launch(x, run, P=P, N=N)
    if splits > 1:
        sum_partials(share_B, dB)
        sum_partials(share_C, dC)
