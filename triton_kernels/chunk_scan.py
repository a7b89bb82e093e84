"""The Mamba-2 scan: state[p, n] = exp(dt A) state[p, n] + dt B[n] x[p], y[p] = sum_n C[n] state[p, n] + D x[p], y *= silu(z).

Layouts: x, z, y (B, L, H, P); dt (B, L, H); B, C (B, L, G, N); states (sequences, H, P, N); inputs in any strides, y contiguous.
Three kernels over chunks of CHUNK positions (chunk_scan_parts.py has the first two):
    1. dt and the cumulated decays of every chunk,
    2. the state before every chunk, carried through each sequence in float32,
    3. per chunk and head y = exp(cum) C state^T + (C B^T * exp(cum_l - cum_s) * dt_s, s <= l) x + D x, then the gate.
Products of inputs are exact in tensor cores; states, which are returned in float32 and make float32 gradients, keep float32's
digits in 16-bit dtypes too. Limited by memory: the states between 2 and 3 cost more bytes than x and y.
Dao and Gu, "Transformers are SSDs" (2024).
"""
import torch
import triton
import triton.language as tl

from . import configs
from .chunk_scan_bwd import chunk_scan_bwd_triton  # noqa: F401
from .chunk_scan_parts import Chunks, block, load_decay, load_tile, place, real_positions, weighted_dot

CHUNK = 64
FWD = configs.Table(
    "chunk_scan_fwd",
    configs.Row({"BLOCK_P": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2, itemsize=2),
    configs.Row({"BLOCK_P": 32, "BLOCK_N": 32}, num_warps=8, num_stages=1, arch=("sm8",), itemsize=4),
    configs.Row({"BLOCK_P": 64, "BLOCK_N": 32}, num_warps=4, num_stages=1),
)


@triton.jit
def chunk_scan_fwd_kernel(
    x_ptr, B_ptr, C_ptr, D_ptr, z_ptr, decay_ptr, states_ptr, y_ptr, seq_idx_ptr, bounds_ptr, L, H, chunks_per_row, heads_per_group,
    stride_x_b, stride_x_l, stride_x_h, stride_x_p, stride_B_b, stride_B_l, stride_B_g, stride_B_n, stride_C_b, stride_C_l, stride_C_g, stride_C_n,
    stride_D_h, stride_D_p, stride_z_b, stride_z_l, stride_z_h, stride_z_p,
    P: tl.constexpr, N: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_CU: tl.constexpr,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    row, _, begin, end = place(chunk, bounds_ptr, L, chunks_per_row, CHUNK, HAS_CU)
    head = head.to(tl.int64)
    in_chunk = tl.arange(0, CHUNK)
    offs_l = begin + in_chunk
    real = real_positions(seq_idx_ptr, row, offs_l, end, L, HAS_SEQ)
    width = tl.where(begin < end, P, 0)  # of states: an empty chunk has none
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    # scores C B^T [l, s] and what the state gives [l, p]
    B_at = B_ptr + row * stride_B_b + head // heads_per_group * stride_B_g
    C_at = C_ptr + row * stride_C_b + head // heads_per_group * stride_C_g
    state_at = states_ptr + (chunk.to(tl.int64) * H + head) * P * N
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    acc = tl.zeros((CHUNK, BLOCK_P), tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        C = load_tile(C_at, offs_l, stride_C_l, real, offs_n, stride_C_n, mask_n).to(dtype)
        B = load_tile(B_at, offs_n, stride_B_n, mask_n, offs_l, stride_B_l, real).to(dtype)
        state = load_tile(state_at, offs_n, 1, mask_n, offs_p, N, offs_p < width)
        scores = tl.dot(C, B, scores, input_precision=PRECISION)
        acc += weighted_dot(state, C, False, False, PRECISION)
    # what the chunk gives itself: the exponents of later positions are cut before exp
    dt, hi, lo, _, _ = load_decay(decay_ptr, chunk, head, H, CHUNK)
    between = tl.where(in_chunk[:, None] >= in_chunk[None, :], (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :]), float("-inf"))
    x = load_tile(x_ptr + row * stride_x_b + head * stride_x_h, offs_l, stride_x_l, real, offs_p, stride_x_p, mask_p)
    y = acc * tl.exp(hi)[:, None] + weighted_dot(scores * tl.exp(between) * dt[None, :], x, True, False, PRECISION)
    if HAS_D:
        y += tl.load(D_ptr + head * stride_D_h + offs_p.to(tl.int64) * stride_D_p, mask=mask_p, other=0.0).to(tl.float32)[None, :] * x.to(tl.float32)
    if HAS_Z:
        z = load_tile(z_ptr + row * stride_z_b + head * stride_z_h, offs_l, stride_z_l, real, offs_p, stride_z_p, mask_p).to(tl.float32)
        y *= z * tl.sigmoid(z)
    if HAS_SEQ:
        y = tl.where(real[:, None], y, 0.0)
    y_at = y_ptr + ((row * L + offs_l[:, None]) * H + head) * P + offs_p[None, :]
    tl.store(y_at, y.to(dtype), mask=(offs_l < end)[:, None] & mask_p[None, :])


def chunk_scan_fwd_triton(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, return_final_states):
    _, _, H, P = x.shape
    N = B.shape[3]
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = x.new_empty(x.shape)
    final = x.new_empty((sequences, H, P, N) if return_final_states else (0,), dtype=torch.float32)
    if x.shape[0] == 0:
        return y, final
    chunks = Chunks(x, dt, A, B, dt_bias, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, CHUNK)
    states = chunks.states(x, B, initial_states, final if return_final_states else None)

    def run(BLOCK_P, BLOCK_N, **options):
        BLOCK_P, BLOCK_N = block(P, BLOCK_P), block(N, BLOCK_N)
        chunk_scan_fwd_kernel[chunks.count * H, triton.cdiv(P, BLOCK_P)](
            x, B, C, D, z, chunks.decay, states, y, *chunks.where(), *chunks.sizes(), H // chunks.G, *x.stride(), *B.stride(), *C.stride(),
            *((0, 0) if D is None else (*D.stride(), 0)[:2]), *((0, 0, 0, 0) if z is None else z.stride()),
            P=P, N=N, HAS_D=D is not None, HAS_Z=z is not None, **chunks.packing(), PRECISION=chunks.precision,
            CHUNK=CHUNK, BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N, **options,
        )

    FWD.launch(x, run, P=P, N=N)
    return y, final
