"""What the forward and the backward of the Mamba-2 scan share: chunks, decays, states, products that keep float32's digits.

Every sequence (a row, or a range of cu_seqlens) is cut into chunks of CHUNK positions from its own start. Per chunk and head
    dt            after bias, softplus and clamp; 0 at padding and behind the end
    cum_l         sum of dt A from the start of the chunk to l, in float64, kept as hi + lo: a difference of two large sums
                  keeps its digits
are written once. A position where seq_idx changes starts anew: its step is so negative that nothing before it remains, in
values and gradients alike, and no kernel but this one knows of packed rows. Padding is a step of nothing, so that the state
after the last position of a sequence is the one of its last run. A step is floored where exp is zero anyway.

States are carried through a sequence by one program per block of (P, N), from first to last chunk, or their gradients from
last to first: state = exp(cum_last) state + sum over l of exp(cum_last - cum_l) dt_l x_l B_l.
"""
import torch
import triton
import triton.language as tl

from . import configs, runtime

STATES = configs.Table(
    "chunk_scan_states",
    configs.Row({"BLOCK_P": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2, arch=("sm9", "sm10"), itemsize=2),
    configs.Row({"BLOCK_P": 32, "BLOCK_N": 64}, num_warps=4, num_stages=2, itemsize=2),
    configs.Row({"BLOCK_P": 32, "BLOCK_N": 32}, num_warps=4, num_stages=2),
)
BLOCK_H = 16  # heads per program of the decays
BLOCK_ROWS, BLOCK_COLUMNS = 32, 128  # sums of partial sums
CHUNKS_AT_ONCE = 64
PASSING = tl.constexpr(-128.0)  # exp of it is zero in float32
RESET = tl.constexpr(-1e4)  # outweighs what growing states may add within a chunk
CEILING = tl.constexpr(1e30)


@triton.jit
def place(chunk, bounds_ptr, L, chunks_per_row, CHUNK: tl.constexpr, HAS_CU: tl.constexpr):
    """A chunk's row, the first position of its sequence, its own first position and its end. bounds: (chunks, 3)."""
    if HAS_CU:
        row = chunk * 0
        start, begin, end = tl.load(bounds_ptr + 3 * chunk), tl.load(bounds_ptr + 3 * chunk + 1), tl.load(bounds_ptr + 3 * chunk + 2)
    else:
        row = chunk // chunks_per_row
        start = chunk * 0
        begin = chunk % chunks_per_row * CHUNK
        end = tl.minimum(begin + CHUNK, L)
    return row.to(tl.int64), start, begin, end


@triton.jit
def real_positions(seq_idx_ptr, row, offs_l, end, L, HAS_SEQ: tl.constexpr):
    """Positions of the chunk that aren't padding."""
    mask = offs_l < end
    if HAS_SEQ:
        mask = mask & (tl.load(seq_idx_ptr + row * L + offs_l, mask=mask, other=-1) >= 0)
    return mask


@triton.jit
def load_tile(ptr, offs_0, stride_0, mask_0, offs_1, stride_1, mask_1):
    at = ptr + offs_0[:, None].to(tl.int64) * stride_0 + offs_1[None, :].to(tl.int64) * stride_1
    return tl.load(at, mask=mask_0[:, None] & mask_1[None, :], other=0.0)


@triton.jit
def load_decay(decay_ptr, chunk, head, H, CHUNK: tl.constexpr):
    """dt, hi and lo of one head in one chunk, and hi and lo of its last position. decay: (chunks, H, 3, CHUNK)."""
    at = decay_ptr + (chunk.to(tl.int64) * H + head) * 3 * CHUNK
    offs = tl.arange(0, CHUNK)
    dt, hi, lo = tl.load(at + offs), tl.load(at + CHUNK + offs), tl.load(at + 2 * CHUNK + offs)
    return dt, hi, lo, tl.load(at + 2 * CHUNK - 1), tl.load(at + 3 * CHUNK - 1)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), all digits for small values too: 2 artanh(e / (2 + e)) as a series, e = exp(-|x|) <= 1."""
    e = tl.exp(-tl.abs(x))
    r = e / (2 + e)
    t = r * r
    series = 1 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t * (1 / 15)))))))
    return tl.maximum(x, 0) + 2 * r * series


@triton.jit
def weighted_dot(weighted, exact, LEFT: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr):
    """weighted @ exact (LEFT) or exact @ weighted: `weighted` float32, `exact` in the storage dtype.

    Tensor cores take 16-bit operands, so `weighted` becomes a sum of such: with FULL enough of them for float32's digits.
    """
    dtype: tl.constexpr = exact.dtype
    if dtype == tl.float32:
        acc = tl.dot(weighted, exact, input_precision=PRECISION) if LEFT else tl.dot(exact, weighted, input_precision=PRECISION)
    else:
        if dtype == tl.float16:  # its range is narrow: scale the largest value to 2^14
            largest = tl.max(tl.max(tl.abs(weighted), 1), 0)
            exponent = tl.minimum(268 - (largest.to(tl.int32, bitcast=True) >> 23), 250)
            weighted = weighted * (exponent << 23).to(tl.float32, bitcast=True)
        part = weighted.to(dtype)
        acc = tl.dot(part, exact) if LEFT else tl.dot(exact, part)
        if FULL:
            rest = weighted - part.to(tl.float32)
            part = rest.to(dtype)
            acc = tl.dot(part, exact, acc) if LEFT else tl.dot(exact, part, acc)
            if dtype == tl.bfloat16:
                part = (rest - part.to(tl.float32)).to(dtype)
                acc = tl.dot(part, exact, acc) if LEFT else tl.dot(exact, part, acc)
        if dtype == tl.float16:
            acc = acc * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return acc


@triton.jit
def chunk_scan_bounds_kernel(cu_ptr, bounds_ptr, first_ptr, sequences, chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Cuts the sequences of cu_seqlens into chunks: `first` (sequences,), bounds (chunks, 3). Chunks that none needs are empty."""
    sequence = tl.program_id(0)
    first = sequence * 0
    for begin in range(0, sequence, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        mask = offs < sequence
        lengths = tl.load(cu_ptr + offs + 1, mask=mask, other=0) - tl.load(cu_ptr + offs, mask=mask, other=0)
        first += tl.sum((lengths + CHUNK - 1) // CHUNK, 0)
    start = sequence * 0
    end = sequence * 0
    count = chunks - first
    if sequence < sequences:
        start = tl.load(cu_ptr + sequence)
        end = tl.load(cu_ptr + sequence + 1)
        count = (end - start + CHUNK - 1) // CHUNK
        tl.store(first_ptr + sequence, first)
    for c in range(0, count, BLOCK):
        offs = c + tl.arange(0, BLOCK)
        mask = offs < count
        begins = start + offs * CHUNK
        at = bounds_ptr + 3 * (first + offs)
        tl.store(at, begins * 0 + start, mask=mask)
        tl.store(at + 1, tl.minimum(begins, end), mask=mask)
        tl.store(at + 2, tl.minimum(begins + CHUNK, end), mask=mask)


@triton.jit
def chunk_scan_decay_kernel(
    dt_ptr, A_ptr, dt_bias_ptr, seq_idx_ptr, bounds_ptr, decay_ptr, L, H, chunks_per_row, dt_min, dt_max, stride_dt_b, stride_dt_l, stride_dt_h,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_CU: tl.constexpr, CHUNK: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """decay (chunks, H, 3, CHUNK) = dt and the two parts of its cumulated products with A."""
    chunk = tl.program_id(0)
    row, start, begin, end = place(chunk, bounds_ptr, L, chunks_per_row, CHUNK, HAS_CU)
    in_chunk = tl.arange(0, CHUNK)
    offs_l = begin + in_chunk
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    real = real_positions(seq_idx_ptr, row, offs_l, end, L, HAS_SEQ)
    # steps [CHUNK, BLOCK_H]
    dt = load_tile(dt_ptr + row * stride_dt_b, offs_l, stride_dt_l, real, offs_h, stride_dt_h, mask_h).to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(dt_bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        dt = softplus(dt)
    dt = tl.where(real[:, None], tl.minimum(tl.maximum(dt, dt_min), dt_max), 0.0)
    A = tl.load(A_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float64)
    step = tl.minimum(tl.maximum(dt.to(tl.float64) * A[None, :], PASSING), CEILING)
    if HAS_SEQ:
        ids = tl.load(seq_idx_ptr + row * L + offs_l, mask=real, other=-1)
        before = tl.load(seq_idx_ptr + row * L + offs_l - 1, mask=real & (offs_l > start), other=-1)
        step = tl.where((real & (offs_l > start) & (ids != before))[:, None], RESET, step)
    cum = tl.cumsum(step, 0)
    hi = cum.to(tl.float32)
    lo = (cum - hi.to(tl.float64)).to(tl.float32)
    at = decay_ptr + (chunk.to(tl.int64) * H + offs_h[None, :]) * 3 * CHUNK + in_chunk[:, None]
    tl.store(at, dt, mask=mask_h[None, :])
    tl.store(at + CHUNK, hi, mask=mask_h[None, :])
    tl.store(at + 2 * CHUNK, lo, mask=mask_h[None, :])


@triton.jit
def chunk_scan_states_kernel(
    values_ptr, rows_ptr, decay_ptr, seq_idx_ptr, cu_ptr, first_ptr, given_ptr, states_ptr, last_ptr, L, H, heads_per_group,
    stride_values_b, stride_values_l, stride_values_h, stride_values_p, stride_rows_b, stride_rows_l, stride_rows_g, stride_rows_n,
    P: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, HAS_GIVEN: tl.constexpr, HAS_LAST: tl.constexpr, HAS_SEQ: tl.constexpr,
    HAS_CU: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """states (chunks, H, P, N) = the state before each chunk; with REVERSE the gradient of the state after it.

    Forward: values = x, rows = B, given = initial states, last = final states.
    REVERSE: values = dy, rows = C, given = gradients of the final states, last = gradients of the initial ones.
    """
    tile, sequence = tl.program_id(0), tl.program_id(1)
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P * blocks_n
    head = tile // blocks
    offs_p = tile % blocks // blocks_n * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_n = tile % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_p, mask_n = offs_p < P, offs_n < N
    mask = mask_p[:, None] & mask_n[None, :]
    if HAS_CU:
        row = sequence.to(tl.int64) * 0
        start, end = tl.load(cu_ptr + sequence), tl.load(cu_ptr + sequence + 1)
        first = tl.load(first_ptr + sequence)
    else:
        row = sequence.to(tl.int64)
        start, end = 0, L
        first = sequence * ((L + CHUNK - 1) // CHUNK)
    in_state = offs_p[:, None] * N + offs_n[None, :]
    at_sequence = (sequence.to(tl.int64) * H + head) * P * N + in_state
    values_at = values_ptr + row * stride_values_b + head.to(tl.int64) * stride_values_h
    rows_at = rows_ptr + row * stride_rows_b + (head // heads_per_group).to(tl.int64) * stride_rows_g
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if HAS_GIVEN:
        state = tl.load(given_ptr + at_sequence, mask=mask, other=0.0).to(tl.float32)
    count = (end - start + CHUNK - 1) // CHUNK
    for i in range(0, count):
        index = count - 1 - i if REVERSE else i
        chunk = first + index
        tl.store(states_ptr + (chunk.to(tl.int64) * H + head) * P * N + in_state, state, mask=mask)
        offs_l = start + index * CHUNK + tl.arange(0, CHUNK)
        real = real_positions(seq_idx_ptr, row, offs_l, end, L, HAS_SEQ)
        dt, hi, lo, last_hi, last_lo = load_decay(decay_ptr, chunk, head, H, CHUNK)
        weight = tl.exp(hi) if REVERSE else tl.exp((last_hi - hi) + (last_lo - lo)) * dt
        values = load_tile(values_at, offs_p, stride_values_p, mask_p, offs_l, stride_values_l, real).to(tl.float32)
        rows = load_tile(rows_at, offs_l, stride_rows_l, real, offs_n, stride_rows_n, mask_n).to(values_ptr.dtype.element_ty)
        state = tl.exp(last_hi) * state + weighted_dot(values * weight[None, :], rows, True, True, PRECISION)
    if HAS_LAST:
        tl.store(last_ptr + at_sequence, state.to(last_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_partials_kernel(partial_ptr, out_ptr, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """out (columns,) = the sum of partial (rows, columns), always in the same order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = offs < columns
    acc = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for begin in range(0, rows, BLOCK_ROWS):
        offs_r = begin + tl.arange(0, BLOCK_ROWS)
        at = partial_ptr + offs_r[:, None].to(tl.int64) * columns + offs[None, :]
        acc += tl.sum(tl.load(at, mask=(offs_r < rows)[:, None] & mask[None, :], other=0.0), 0)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def sum_partials(partial, out):
    """Sums partial (rows, *out's shape) into out."""
    columns = out.numel()
    if columns:
        grid = (triton.cdiv(columns, BLOCK_COLUMNS),)
        sum_partials_kernel[grid](partial, out, partial.shape[0], columns, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS)


def block(size, limit):
    """The power of two that covers `size`, from 16 (tl.dot takes no less) to `limit`."""
    return max(16, min(limit, triton.next_power_of_2(size)))


class Chunks:
    """One call's sequences cut into chunks, their decays, and the launches of the state kernel."""

    def __init__(self, x, dt, A, B, dt_bias, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, chunk):
        self.batch, self.L, self.H, self.P = x.shape
        self.G, self.N = B.shape[2:]
        self.chunk, self.x, self.cu = chunk, x, cu_seqlens
        self.seq_idx = None if seq_idx is None else seq_idx.contiguous()
        self.per_row = triton.cdiv(self.L, chunk)
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        # with cu_seqlens, as many as the sequences may need at most
        self.count = self.batch * self.per_row if cu_seqlens is None else self.L // chunk + self.sequences
        self.bounds = self.first = None
        self.precision = runtime.dot_precision(x.device, x.dtype)
        if cu_seqlens is not None:
            self.cu = cu_seqlens.contiguous()
            self.bounds = torch.empty(self.count, 3, dtype=torch.int32, device=x.device)
            self.first = torch.empty(self.sequences, dtype=torch.int32, device=x.device)
            chunk_scan_bounds_kernel[(self.sequences + 1,)](
                self.cu, self.bounds, self.first, self.sequences, self.count, CHUNK=chunk, BLOCK=CHUNKS_AT_ONCE)
        self.decay = torch.empty(self.count, self.H, 3, chunk, dtype=torch.float32, device=x.device)
        chunk_scan_decay_kernel[self.count, triton.cdiv(self.H, BLOCK_H)](
            dt, A.contiguous(), None if dt_bias is None else dt_bias.contiguous(), *self.where(), self.decay, *self.sizes(), dt_min, dt_max,
            *dt.stride(), SOFTPLUS=dt_softplus, HAS_BIAS=dt_bias is not None, **self.packing(), CHUNK=chunk, BLOCK_H=BLOCK_H,
        )

    def where(self):
        """Arguments seq_idx_ptr, bounds_ptr."""
        return self.seq_idx, self.bounds

    def sizes(self):
        """Arguments L, H, chunks_per_row."""
        return self.L, self.H, self.per_row

    def packing(self):
        return {"HAS_SEQ": self.seq_idx is not None, "HAS_CU": self.cu is not None}

    def states(self, values, rows, given, last, reverse=False):
        """The states before each chunk, or the gradients of those after it (chunks, H, P, N); `last` is written if it isn't None."""
        P, N = self.P, self.N
        states = torch.empty(self.count, self.H, P, N, dtype=torch.float32, device=self.x.device)

        def run(BLOCK_P, BLOCK_N, **options):
            BLOCK_P, BLOCK_N = block(P, BLOCK_P), block(N, BLOCK_N)
            grid = self.H * triton.cdiv(P, BLOCK_P) * triton.cdiv(N, BLOCK_N), self.sequences
            chunk_scan_states_kernel[grid](
                values, rows, self.decay, self.seq_idx, self.cu, self.first, None if given is None else given.contiguous(), states, last,
                self.L, self.H, self.H // self.G, *values.stride(), *rows.stride(), P=P, N=N, REVERSE=reverse, HAS_GIVEN=given is not None,
                HAS_LAST=last is not None, **self.packing(), PRECISION=self.precision, CHUNK=self.chunk, BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N, **options,
            )

        STATES.launch(values, run, P=P, N=N)
        return states
