// Weight gradients of grouped products: db[e] = a[rows of e]^T dy[rows of e], and dbias[e] = the sum of the rows of dy.
// Layouts: a [T, K], dy [T, N] in any strides, db [E, K, N].
//
// A block has one tile of one group's gradient and walks over the group's rows in order: nothing is split, sums always have
// the same order. Rows are what is summed over, so both operands lie in shared memory as rows of their outer index and are transposed
// on the way to the registers (ldmatrix). Limited by the tensor cores with many rows a group, by writing db with few.
#include "kernels.h"

#include "gemm.cuh"

namespace terrazzo { namespace cuda {
namespace {

struct WgradArgs {
  GroupRows rows;
  int K, N;
  Operand a, dy;
  const int32_t *a_rows, *dy_rows;
  DType db_dtype;
  bool vectors;
  void* db;
  int64_t db_stride_e, db_stride_k;
};

// Grid: groups x tiles of db.
template <class T, class Shape> __global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks) grouped_wgrad_kernel(const WgradArgs p) {
  TZ_DYNAMIC_SHARED(T, ring);
  const int tiles_k = ceil_div(p.K, Shape::kBlockM), tiles_n = ceil_div(p.N, Shape::kBlockN);
  const int64_t tiles = int64_t{tiles_k} * tiles_n, inside = blockIdx.x % tiles, band = inside / (kBand * int64_t{tiles_n}) * kBand;
  const int64_t in_band = inside - band * tiles_n, band_rows = tiles_k - band < kBand ? tiles_k - band : kBand;
  const int e = static_cast<int>(blockIdx.x / tiles);
  const int k = static_cast<int>(band + in_band % band_rows) * Shape::kBlockM, n = static_cast<int>(in_band / band_rows) * Shape::kBlockN;
  const int begin = p.rows.end(e - 1), depth = max(p.rows.end(e) - begin, 0);

  Product<T, false, false, Shape> product;
  product.clear(product.acc);
  if (depth > 0) {
    product.a.begin([&](int i) { return Outer{p.a.data + (k + i) * p.a.stride_i + (p.a_rows ? 0 : begin * p.a.stride_k), p.K - k - i}; });
    product.b.begin([&](int i) { return Outer{p.dy.data + (n + i) * p.dy.stride_i + (p.dy_rows ? 0 : begin * p.dy.stride_k), p.N - n - i}; });
    product.add(ring, p.a, p.dy, depth, p.a_rows ? p.a_rows + begin : nullptr, p.dy_rows ? p.dy_rows + begin : nullptr);
  }
  product.template results<8>(ring, [&](int row, int column, const float(&v)[8]) {
    const int left = p.N - n - column;
    if (k + row >= p.K || left <= 0) return;
    store_columns(v, p.db_dtype, p.db, e * p.db_stride_e + (k + row) * p.db_stride_k + n + column, left, p.vectors);
  });
}

cudaError_t weight_gradient(const GroupedWgradCudaParams& p, cudaStream_t stream) {
  if (p.a_dtype == DType::f64 || p.T > kMostRows || p.E > INT32_MAX / 2 || p.N > INT32_MAX / 2 || p.K > INT32_MAX / 2) return cudaErrorInvalidValue;
  if (p.E == 0 || p.K == 0 || p.N == 0) return cudaSuccess;
  const DType compute = compute_dtype(p.a_dtype, p.dy_dtype);
  WgradArgs args{};
  args.rows = {p.offs, static_cast<int>(p.E), static_cast<int>(p.T)}, args.K = static_cast<int>(p.K), args.N = static_cast<int>(p.N);
  args.a = operand(p.a_dtype, p.a, p.a_stride_k, p.a_stride_m, false, compute);
  args.dy = operand(p.dy_dtype, p.dy, p.dy_stride_n, p.dy_stride_m, false, compute);
  args.a_rows = p.a_rows, args.dy_rows = p.dy_rows, args.db_dtype = p.db_dtype, args.db = p.db;
  args.db_stride_e = p.db_stride_e, args.db_stride_k = p.db_stride_k;
  args.vectors = aligned(p.db, p.db_stride_k, size_of(p.db_dtype)) && aligned(p.db, p.db_stride_e, size_of(p.db_dtype));
  return with_type(compute, [&](auto t) {
    using T = decltype(t);
    using Few = typename Shapes<T>::few;
    using Many = typename Shapes<T>::many;
    const auto run = [&](auto shape) {
      using Shape = decltype(shape);
      const int64_t blocks = p.E * ceil_div(p.K, Shape::kBlockM) * ceil_div(p.N, Shape::kBlockN);
      if (blocks > INT32_MAX) return cudaErrorInvalidValue;
      return launch(grouped_wgrad_kernel<T, Shape>, dim3(static_cast<unsigned>(blocks)), Shape::kThreads, Product<T, false, false, Shape>::kSharedBytes,
                    stream, args);
    };
    return p.K <= Many::kBlockM / 2 || p.N <= Many::kBlockN / 2 ? run(Few{}) : run(Many{});  // half of a large tile would be empty
  });
}

// ---- sums of rows --------------------------------------------------------------------------------------------
constexpr int kSumWarps = 16, kSumThreads = kSumWarps * kWarp, kUnroll = 4;
constexpr int64_t kMostBlocks = 65535;  // along y of a grid

// out [E, N]. Grid: 32 columns x groups; a warp has every 16th row, four of them under way at once.
__global__ void __launch_bounds__(kSumThreads) grouped_sum_kernel(const GroupedWgradCudaParams p) {
  TZ_SHARED(float, sums_smem, kSumThreads);
  const GroupRows rows{p.offs, static_cast<int>(p.E), static_cast<int>(p.T)};
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  const int64_t n = int64_t{blockIdx.x} * kWarp + lane;
  for (int e = blockIdx.y; e < rows.E; e += gridDim.y) {
    const int end = rows.end(e);
    float sum = 0;
    for (int64_t row = rows.end(e - 1) + warp; row < end && n < p.N; row += kSumWarps * kUnroll) {
      Element dy_rmem[kUnroll]{};
      float weight[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; i++) {
        const int64_t r = row + i * kSumWarps;
        if (r < end) dy_rmem[i] = load_element(p.dy_dtype, p.dy, (p.dy_rows ? p.dy_rows[r] : r) * p.dy_stride_m + n * p.dy_stride_n);
        weight[i] = p.weights && r < end ? p.weights[p.weight_rows[r]] : 1.0f;
      }
#pragma unroll
      for (int i = 0; i < kUnroll; i++) sum += weight[i] * to_float(p.dy_dtype, dy_rmem[i]);
    }
    sums_smem[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && n < p.N) {
#pragma unroll
      for (int w = 1; w < kSumWarps; w++) sum += sums_smem[w * kWarp + lane];
      store_float(sum, p.db_dtype, p.db, e * p.db_stride_e + n);
    }
    __syncthreads();
  }
}

cudaError_t row_sums(const GroupedWgradCudaParams& p, cudaStream_t stream) {
  if (p.dy_dtype == DType::f64 || p.T > kMostRows || p.E > INT32_MAX / 2 || p.N > INT32_MAX / 2) return cudaErrorInvalidValue;
  if (p.E == 0 || p.N == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.N, kWarp)), static_cast<unsigned>(p.E < kMostBlocks ? p.E : kMostBlocks));
  return launch(grouped_sum_kernel, grid, kSumThreads, 0, stream, p);
}

}  // namespace

cudaError_t experts_wgrad_cuda(const GroupedWgradCudaParams& p, cudaStream_t stream) { return p.K ? weight_gradient(p, stream) : row_sums(p, stream); }
cudaError_t grouped_wgrad_cuda(const GroupedWgradParams& p, cudaStream_t stream) {
  return weight_gradient({p, nullptr, nullptr, nullptr, nullptr}, stream);
}

cudaError_t grouped_wgrad_bwd_cuda(const GroupedWgradBwdParams& p, cudaStream_t stream) {
  const cudaError_t error = grouped_gemm_cuda(p.da, stream);
  return error != cudaSuccess ? error : grouped_gemm_cuda(p.dy, stream);
}

cudaError_t grouped_gemm_bwd_cuda(const GroupedGemmBwdParams& p, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (p.da.c) error = grouped_gemm_cuda(p.da, stream);
  if (error == cudaSuccess && p.db.db) error = grouped_wgrad_cuda(p.db, stream);
  if (error == cudaSuccess && p.dbias.db) error = row_sums({p.dbias, nullptr, nullptr, nullptr, nullptr}, stream);
  return error;
}
cudaError_t linear_bwd_cuda(const GroupedGemmBwdParams& p, cudaStream_t stream) { return grouped_gemm_bwd_cuda(p, stream); }

}}  // namespace terrazzo::cuda
