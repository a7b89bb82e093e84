"""Grouped matrix products: c[r] = a[r] b[e] + bias[e] for the rows r of each group e, and db[e] = a[rows of e]^T dy[rows of e].

Layouts: a (T, K), b (E, K, N) and their gradients in any strides; offs (E,) int32 row ends on the device; c (T, N).
How many rows a group has is known on the device only. So a fixed number of programs walks the tiles group by group, and
each finds the group of a tile by a running sum over all groups; what the host must know is no more than T and E. Rows
behind the last group are a group of their own that sums nothing. Inside a group tiles go in bands of GROUP_M tile rows, so
that tiles computed at the same time share their operands in the L2 cache. Weight gradients take one program for each tile of
each group, which walks the group's rows in order: nothing is split, sums are always in the same order.
On sm_90 and sm_100 large tiles of a and b are read through tensor descriptors (TMA) where their strides allow it.
Limited by the tensor cores with many rows a group, by reading b with few.
"""
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs, runtime
from .activation import activation_curve

GROUP_M = 8
PROGRAMS = 2  # programs for each processor: one loads while the other multiplies
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# pointers: whether an operand cannot be read through a descriptor
FWD = configs.Table(
    "grouped_gemm_fwd",
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3, itemsize=4, up_to={"rows": 16}),
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}, num_warps=4, num_stages=4, itemsize=4, arch=("sm8",)),
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=2, itemsize=4),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=4, up_to={"rows": 16}, arch=("sm",)),
    configs.Row({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=2, up_to={"rows": 16}),
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3, up_to={"rows": 64}, arch=("sm10",)),
    configs.Row({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=4, num_stages=3, up_to={"rows": 64}, arch=("sm8", "sm9", "sm12", "gfx")),
    configs.Row({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "TMA": True}, num_warps=8, num_stages=3, arch=("sm90",), up_to={"pointers": 0}),
    configs.Row({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}, num_warps=8, num_stages=3, arch=("sm90",)),
    configs.Row({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "TMA": True}, num_warps=8, num_stages=4, arch=("sm100", "sm103"),
                up_to={"pointers": 0}),
    configs.Row({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=4, arch=("sm100", "sm103")),
    configs.Row({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3, arch=("sm80",)),
    configs.Row({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=2),
)
WGRAD = configs.Table(
    "grouped_gemm_wgrad",
    configs.Row({"BLOCK_K": 64, "BLOCK_N": 64, "BLOCK_R": 32}, num_warps=4, num_stages=2, itemsize=4),
    configs.Row({"BLOCK_K": 128, "BLOCK_N": 256, "BLOCK_R": 64}, num_warps=8, num_stages=3, arch=("sm90", "sm100", "sm103")),
    configs.Row({"BLOCK_K": 128, "BLOCK_N": 128, "BLOCK_R": 64}, num_warps=8, num_stages=2, arch=("gfx950",)),  # 3: Triton 3.9.0 breaks off
    configs.Row({"BLOCK_K": 128, "BLOCK_N": 128, "BLOCK_R": 32}, num_warps=8, num_stages=3),
)
BLOCK_SUM_N, BLOCK_SUM_R = 64, 64


# ---- tiles of groups ---------------------------------------------------------------------------------------


@triton.jit
def group_bounds(offs_ptr, e, E, T, HAS_OFFS: tl.constexpr):
    """First row and end of groups e; group E is the rest behind the last group."""
    if HAS_OFFS:
        begin = tl.load(offs_ptr + e - 1, mask=(e > 0) & (e <= E), other=0)
        end = tl.load(offs_ptr + e, mask=e < E, other=0)
        return begin, tl.where(e < E, end, T)
    else:
        return tl.where(e > 0, T, 0), tl.where(e >= 0, T, 0)


@triton.jit
def count_tiles(offs_ptr, E, T, HAS_OFFS: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Tile rows of all groups up to each one, (BLOCK_E,); the rest counts as a group where REST."""
    e = tl.arange(0, BLOCK_E)
    begin, end = group_bounds(offs_ptr, e, E, T, HAS_OFFS)
    return tl.cumsum(tl.where(e < E + REST, (end - begin + BLOCK_M - 1) // BLOCK_M, 0), 0)


@triton.jit
def find_tile(tile, tiles_up_to, tiles_n, offs_ptr, E, T, HAS_OFFS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """The group of a tile, the tile's first row, the group's end, and the tile's column of tiles."""
    done = tiles_up_to * tiles_n <= tile
    e = tl.sum(done.to(tl.int32), 0)
    begin, end = group_bounds(offs_ptr, e, E, T, HAS_OFFS)
    inside = tile - tl.max(tl.where(done, tiles_up_to, 0), 0) * tiles_n
    band = inside // (GROUP_M * tiles_n) * GROUP_M
    band_rows = tl.minimum((end - begin + BLOCK_M - 1) // BLOCK_M - band, GROUP_M)
    inside -= band * tiles_n
    return e, begin + (band + inside % band_rows) * BLOCK_M, end, inside // band_rows


@triton.jit
def accumulate(
    acc, a_ptr, b_ptr, offs_m, mask_m, offs_n, mask_n, K, stride_a_m, stride_a_k, stride_b_k, stride_b_n,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """acc (BLOCK_M, BLOCK_N) + a[offs_m] b[:, offs_n]; b_ptr stands at the group's matrix."""
    offs_k = tl.arange(0, BLOCK_K)
    step = tl.full((), BLOCK_K, tl.int64)
    a_ptrs = a_ptr + offs_m[:, None].to(tl.int64) * stride_a_m + offs_k[None, :].to(tl.int64) * stride_a_k
    b_ptrs = b_ptr + offs_k[:, None].to(tl.int64) * stride_b_k + offs_n[None, :].to(tl.int64) * stride_b_n
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
        a_ptrs += step * stride_a_k
        b_ptrs += step * stride_b_k
    return acc


@triton.jit
def accumulate_tma(acc, a, b, row, column, matrix, K, N_LAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc + a[row:] b[matrix][:, column:] by descriptors: a (T, K), b (E, K, N) or, unless N_LAST, (E, N, K); zeros outside. Rows are not masked."""
    for k in range(0, K, BLOCK_K):
        if N_LAST:
            b_tile = b.load([matrix, k, column]).reshape(BLOCK_K, BLOCK_N)
        else:
            b_tile = tl.trans(b.load([matrix, column, k]).reshape(BLOCK_N, BLOCK_K))
        acc = tl.dot(a.load([row, k]), b_tile, acc)
    return acc


# ---- kernels -----------------------------------------------------------------------------------------------


@triton.jit
def grouped_gemm_fwd_kernel(
    a_ptr, b_ptr, a2_ptr, b2_ptr, bias_ptr, c_ptr, offs_ptr, T, E, K, N,
    stride_a_m, stride_a_k, stride_b_e, stride_b_k, stride_b_n, stride_b2_e, stride_b2_k, stride_b2_n, stride_bias_e, stride_bias_n, stride_c_m,
    HAS_OFFS: tl.constexpr, REST: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, N_LAST: tl.constexpr,
):
    """c = activation(a b + a2 b2 + bias); with TMA a and b are descriptors, and there is no second product."""
    tiles_up_to = count_tiles(offs_ptr, E, T, HAS_OFFS, REST, BLOCK_M, BLOCK_E)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tl.max(tiles_up_to, 0) * tiles_n, tl.num_programs(0)):
        # which rows (BLOCK_M,) of which group, which columns (BLOCK_N,)
        e, row, end, tile_n = find_tile(tile, tiles_up_to, tiles_n, offs_ptr, E, T, HAS_OFFS, BLOCK_M, GROUP_M)
        offs_m, offs_n = row + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m, mask_n = offs_m < end, offs_n < N
        depth = tl.where(e < E, K, 0)
        matrix = tl.minimum(e, E - 1).to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TMA:
            acc = accumulate_tma(acc, a_ptr, b_ptr, row, tile_n * BLOCK_N, tl.minimum(e, E - 1), depth, N_LAST, BLOCK_N, BLOCK_K)
        else:
            acc = accumulate(acc, a_ptr, b_ptr + matrix * stride_b_e, offs_m, mask_m, offs_n, mask_n, depth,
                             stride_a_m, stride_a_k, stride_b_k, stride_b_n, DOT, PRECISION, BLOCK_K)
        if HAS_SECOND:
            acc = accumulate(acc, a2_ptr, b2_ptr + matrix * stride_b2_e, offs_m, mask_m, offs_n, mask_n, depth,
                             stride_a_m, stride_a_k, stride_b2_k, stride_b2_n, DOT, PRECISION, BLOCK_K)
        # epilogue
        if HAS_BIAS:
            bias_ptrs = bias_ptr + matrix * stride_bias_e + offs_n.to(tl.int64) * stride_bias_n
            bias = tl.load(bias_ptrs, mask=mask_n, other=0.0).to(tl.float32)
            acc += tl.where(e < E, bias, 0.0)[None, :]
        acc, _ = activation_curve(acc, ACTIVATION)
        c_ptrs = c_ptr + offs_m[:, None].to(tl.int64) * stride_c_m + offs_n[None, :]
        tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def grouped_gemm_wgrad_kernel(
    a_ptr, b_ptr, c_ptr, offs_ptr, order_ptr, T, E, K, N, A,
    stride_a_m, stride_a_k, stride_b_m, stride_b_n, stride_c_e, stride_c_k, stride_c_n,
    HAS_OFFS: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """c[e] (K, N) = a[rows of e]^T b[rows of e]; with GATHER_A or GATHER_B row r is row order[r] // A."""
    tiles_k, tiles_n = tl.cdiv(K, BLOCK_K), tl.cdiv(N, BLOCK_N)
    e, inside = tl.program_id(0) // (tiles_k * tiles_n), tl.program_id(0) % (tiles_k * tiles_n)
    band = inside // (GROUP_M * tiles_n) * GROUP_M
    band_rows = tl.minimum(tiles_k - band, GROUP_M)
    inside -= band * tiles_n
    offs_k, offs_n = (band + inside % band_rows) * BLOCK_K + tl.arange(0, BLOCK_K), inside // band_rows * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_k, mask_n = offs_k < K, offs_n < N
    a_ptrs, b_ptrs = a_ptr + offs_k[:, None].to(tl.int64) * stride_a_k, b_ptr + offs_n[None, :].to(tl.int64) * stride_b_n
    begin, end = group_bounds(offs_ptr, e, E, T, HAS_OFFS)
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for row in range(begin, end, BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        mask_r = rows < end
        rows_a, rows_b = rows.to(tl.int64), rows.to(tl.int64)
        if GATHER_A or GATHER_B:
            gathered = (tl.load(order_ptr + rows, mask=mask_r, other=0) // A).to(tl.int64)
            rows_a = gathered if GATHER_A else rows_a
            rows_b = gathered if GATHER_B else rows_b
        a = tl.load(a_ptrs + rows_a[None, :] * stride_a_m, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        b = tl.load(b_ptrs + rows_b[:, None] * stride_b_m, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
    c_ptrs = c_ptr + e.to(tl.int64) * stride_c_e + offs_k[:, None].to(tl.int64) * stride_c_k + offs_n[None, :].to(tl.int64) * stride_c_n
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask_k[:, None] & mask_n[None, :])


@triton.jit
def grouped_sum_kernel(
    x_ptr, out_ptr, offs_ptr, order_ptr, weight_ptr, T, E, N, A, stride_x_m, stride_x_n,
    HAS_OFFS: tl.constexpr, GATHER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """out (E, N): the sum of each group's rows of x; with GATHER of rows order[r] // A times weight[order[r]]."""
    e = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    begin, end = group_bounds(offs_ptr, e, E, T, HAS_OFFS)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(begin, end, BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        mask_r = rows < end
        source = rows
        if GATHER:
            pair = tl.load(order_ptr + rows, mask=mask_r, other=0)
            source = pair // A
        x_ptrs = x_ptr + source[:, None].to(tl.int64) * stride_x_m + offs_n[None, :].to(tl.int64) * stride_x_n
        x = tl.load(x_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
        if GATHER:
            x *= tl.load(weight_ptr + pair, mask=mask_r, other=0.0).to(tl.float32)[:, None]
        acc += tl.sum(x, 0)
    tl.store(out_ptr + e.to(tl.int64) * N + offs_n, acc, mask=mask_n)


# ---- launchers ---------------------------------------------------------------------------------------------


def dot_options(device, *tensors):
    """DOT and PRECISION of a product: 16-bit operands of one dtype as they are, everything else in float32."""
    dtypes = {t.dtype for t in tensors if t is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return {"DOT": TYPES[dtype], "PRECISION": runtime.dot_precision(device, dtype)}


def widest(*tensors):
    """The tensor with the largest elements: what the tables go by."""
    return max((t for t in tensors if t is not None), key=torch.Tensor.element_size)


def num_programs(rows, E, N, device, BLOCK_M, BLOCK_N):
    """Programs that share the tiles: no more than there can be tiles."""
    tiles = (triton.cdiv(rows, BLOCK_M) + E + 1) * triton.cdiv(N, BLOCK_N)
    return min(PROGRAMS * runtime.num_processors(device), tiles)


def block_groups(E):
    return max(16, triton.next_power_of_2(E + 1))


def strides(tensor, dims):
    return tensor.stride() if tensor is not None else (0,) * dims


def tma_reads(tensor):
    """Whether a descriptor can stand for it: its last dimension contiguous, what lies between rows and its address multiples of 16 bytes."""
    *outer, last = tensor.stride()
    return (last == 1 and tensor.data_ptr() % 16 == 0 and all(n > 0 for n in tensor.shape)
            and all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in outer))


def product(a, b, offs, bias, c, *, a2=None, b2=None, rest=True, activation=0):
    """c = activation(a b + a2 b2 + bias) by groups. offs None: one group of all rows. a2 has a's strides. rest: write zeros
    behind the last group."""
    (E, K, N), T = b.shape, c.shape[0]
    if T == 0:
        return c

    n_last = b.stride(2) == 1
    rows_of_b = b if n_last else b.mT
    by_pointers = a.dtype != b.dtype or a2 is not None or not (tma_reads(a) and tma_reads(rows_of_b))

    def run(BLOCK_M, BLOCK_N, BLOCK_K, TMA=False, **options):
        TMA = TMA and not by_pointers  # tuning tries every row
        a_read, b_read = a, b
        if TMA:
            a_read = TensorDescriptor.from_tensor(a, [BLOCK_M, BLOCK_K])
            b_read = TensorDescriptor.from_tensor(rows_of_b, [1, BLOCK_K, BLOCK_N] if n_last else [1, BLOCK_N, BLOCK_K])
        grouped_gemm_fwd_kernel[(num_programs(T, E, N, c.device, BLOCK_M, BLOCK_N),)](
            a_read, b_read, a2, b2, bias, c, offs, T, E, K, N, *a.stride(), *b.stride(), *strides(b2, 3), *strides(bias, 2), c.stride(0),
            HAS_OFFS=offs is not None, REST=rest, HAS_SECOND=a2 is not None, HAS_BIAS=bias is not None,
            ACTIVATION=activation, **dot_options(c.device, a, b, b2), BLOCK_E=block_groups(E), GROUP_M=GROUP_M,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, TMA=TMA, N_LAST=TMA and n_last, **options,
        )

    FWD.launch(widest(a, b), run, rows=triton.cdiv(T, E), pointers=int(by_pointers))
    return c


def weight_gradient(a, b, offs, out, *, order=None, A=1, gather=""):
    """out[e] = a[rows of e]^T b[rows of e]; out (E, K, N) in any strides. gather names the operand, "a" or "b", whose rows are
    rows order // A. The gradient is computed in the order in which it lies."""
    c = out
    if c.stride(2) != 1 and c.stride(1) == 1:
        a, b, c, gather = b, a, c.mT, {"a": "b", "b": "a"}.get(gather, "")
    E, K, N = c.shape
    T = order.shape[0] if order is not None else a.shape[0]

    def run(BLOCK_K, BLOCK_N, **options):
        grouped_gemm_wgrad_kernel[(E * triton.cdiv(K, BLOCK_K) * triton.cdiv(N, BLOCK_N),)](
            a, b, c, offs, order, T, E, K, N, A, *a.stride(), *b.stride(), *c.stride(),
            HAS_OFFS=offs is not None, GATHER_A="a" in gather, GATHER_B="b" in gather, **dot_options(c.device, a, b), GROUP_M=GROUP_M,
            BLOCK_K=BLOCK_K, BLOCK_N=BLOCK_N, **options,
        )

    WGRAD.launch(widest(a, b), run)
    return out


def column_sums(x, offs, E, *, order=None, A=1, weights=None):
    """(E, N) float32: the sum of each group's rows of x, or of rows order // A times weights[order]."""
    N = x.shape[1]
    out = torch.empty(E, N, dtype=torch.float32, device=x.device)
    grouped_sum_kernel[triton.cdiv(N, BLOCK_SUM_N), E](
        x, out, offs, order, weights, order.shape[0] if order is not None else x.shape[0], E, N, A, *x.stride(),
        HAS_OFFS=offs is not None, GATHER=order is not None, BLOCK_N=BLOCK_SUM_N, BLOCK_R=BLOCK_SUM_R,
    )
    return out


def grouped_gemm_fwd_triton(a, b, offs, bias):
    return product(a, b, offs.contiguous(), bias, a.new_empty(a.shape[0], b.shape[2]))


def grouped_gemm_bwd_triton(dy, a, b, offs, need_a, need_b, need_bias):
    E, K, N = b.shape
    offs = offs.contiguous()
    k_last = b.stride(1) == 1 and b.stride(2) != 1
    da = product(dy, b.mT, offs, None, a.new_empty(a.shape)) if need_a else a.new_empty(0)
    db = b.new_empty((E, N, K) if k_last else (E, K, N)) if need_b else b.new_empty(0)
    if need_b:
        weight_gradient(a, dy, offs, db.mT if k_last else db)
    return da, db, column_sums(dy, offs, E) if need_bias else a.new_empty(0)


def grouped_wgrad_fwd_triton(a, b, offs):
    return weight_gradient(a, b, offs.contiguous(), a.new_empty(offs.shape[0], a.shape[1], b.shape[1]))


def grouped_wgrad_bwd_triton(dy, a, b, offs):
    offs = offs.contiguous()
    return product(b, dy.mT, offs, None, a.new_empty(a.shape)), product(a, dy, offs, None, b.new_empty(b.shape))
