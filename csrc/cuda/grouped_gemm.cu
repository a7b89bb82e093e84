// Grouped products: c[r] = act(a[r] b[e] + bias[e]) for the rows r of each group e, [offs[e - 1], offs[e]); rows behind the last group
// are zero. A linear layer is one group. Layouts: a [T, K], b [E, K, N] in any strides, c [T, N].
//
// How many rows a group has is known on the device only: a fixed number of blocks, as many as the GPU holds, walks over the tiles
// group by group, each finds its own (find_tile in group_tiles.cuh). Limited by the tensor cores with many rows a group, by reading b with few.
#include "kernels.h"

#include "activation.cuh"
#include "gemm.cuh"

namespace terrazzo { namespace cuda {
namespace {

struct ProductArgs {
  GroupRows rows;
  int groups, N, depth, depth2;  // depth2 0: no second product
  Operand a, b, b2;
  int64_t stride_e, stride_e2;   // of b, in bytes
  DType bias_dtype, c_dtype;
  Activation activation;
  bool vectors;                  // c may be written 16 bytes at a time
  const void* bias;
  int64_t bias_stride_e;
  void* c;
};

template <class T, bool kBRowsOfK, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks) grouped_gemm_kernel(const ProductArgs p) {
  TZ_DYNAMIC_SHARED(T, ring);
  Product<T, true, kBRowsOfK, Shape> product;
  GroupTile tile;
  for (int64_t number = blockIdx.x; find_tile<Shape::kBlockM>(p.rows, p.groups, ceil_div(p.N, Shape::kBlockN), number, tile); number += gridDim.x) {
    const bool rest = tile.e >= p.rows.E;
    const int n = tile.column * Shape::kBlockN;
    product.clear(product.acc);
    __syncthreads();  // the strips of the tile before are read
#pragma unroll 1
    for (int part = 0; part < (p.depth2 ? 2 : 1); part++) {
      Operand b = p.b;
      if (part) b = p.b2;
      const char* matrix = b.data + (part ? p.stride_e2 : p.stride_e) * tile.e;
      product.a.begin([&](int i) {
        return Outer{p.a.data + (tile.row + i) * p.a.stride_i + (part ? p.depth * p.a.stride_k : 0), tile.end - tile.row - i};
      });
      product.b.begin([&](int i) { return Outer{matrix + (n + i) * b.stride_i, p.N - n - i}; });
      product.add(ring, p.a, b, rest ? 0 : part ? p.depth2 : p.depth);
    }
    product.template results<8>(ring, [&](int row, int column, float(&v)[8]) {
      const int left = p.N - n - column;
      if (tile.row + row >= tile.end || left <= 0) return;
      if (p.bias && !rest) {
        float bias[8];
        load_columns(p.bias_dtype, p.bias, tile.e * p.bias_stride_e + n + column, left, false, bias);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] += bias[j];
      }
      activate(p.activation, v);
      store_columns(v, p.c_dtype, p.c, int64_t{tile.row + row} * p.N + n + column, left, p.vectors);
    });
  }
}

cudaError_t product(const GroupedGemmCudaParams& p, cudaStream_t stream) {
  if (p.a_dtype == DType::f64 || p.T > kMostRows || p.E > INT32_MAX / 2 || p.N > INT32_MAX / 2 || p.K > INT32_MAX / 2 || p.K2 > INT32_MAX / 2)
    return cudaErrorInvalidValue;
  if (p.T == 0 || p.E == 0 || p.N == 0) return cudaSuccess;
  DType compute = compute_dtype(p.a_dtype, p.b.dtype);
  if (p.K2) compute = compute_dtype(compute, p.b2.dtype);
  const bool b_rows = rows_of_k(p.b);
  ProductArgs args{};
  args.rows = {p.offs, static_cast<int>(p.E), static_cast<int>(p.T)}, args.groups = static_cast<int>(p.E) + p.rest;
  args.N = static_cast<int>(p.N), args.depth = static_cast<int>(p.K), args.depth2 = static_cast<int>(p.K2);
  args.a = operand(p.a_dtype, p.a, p.a_stride_m, p.a_stride_k, true, compute);
  if (p.K2 && p.K * size_of(p.a_dtype) % kVectorBytes) args.a.way = Way::elements;  // the second part is not aligned
  args.b = operand(p.b, b_rows, compute), args.stride_e = p.b.stride_e * size_of(p.b.dtype);
  args.b2 = operand(p.b2, b_rows, compute), args.stride_e2 = p.b2.stride_e * size_of(p.b2.dtype);
  args.bias_dtype = p.bias_dtype, args.c_dtype = p.a_dtype, args.activation = p.activation;
  args.bias = p.bias, args.bias_stride_e = p.bias_stride_e, args.c = p.c, args.vectors = aligned(p.c, p.N, size_of(p.a_dtype));
  return with_product(compute, p.T, p.E, p.N, b_rows, [&](auto t, auto shape, auto rows) {
    using Shape = decltype(shape);
    constexpr bool kRows = decltype(rows)::v;
    return launch(grouped_gemm_kernel<decltype(t), kRows, Shape>, dim3(walking_blocks<Shape>(p.T, args.groups, ceil_div(p.N, Shape::kBlockN))),
                  Shape::kThreads, Product<decltype(t), true, kRows, Shape>::kSharedBytes, stream, args);
  });
}

}  // namespace

cudaError_t experts_product_cuda(const GroupedGemmCudaParams& p, cudaStream_t stream) { return product(p, stream); }
cudaError_t grouped_gemm_cuda(const GroupedGemmParams& p, cudaStream_t stream) { return product({p, true, 0, {}}, stream); }
cudaError_t linear_fwd_cuda(const GroupedGemmParams& p, cudaStream_t stream) { return grouped_gemm_cuda(p, stream); }

}}  // namespace terrazzo::cuda
