// A layer of experts, forward: y[t] = sum over a of weight[t, a] (gate(x[t] w1[e] + bias1[e]) w2[e] + bias2[e]), e = expert a of t.
//
//   0. pairs of token and choice are sorted by expert: a pair's place is its slot (moe_permute.cu)
//   1. h[slot] = gate(x[token] w1, x[token] w_up): rows of x are gathered as they are loaded, the gate works on the accumulators; both
//      products are kept for the backward where asked for, as floats in w1's order of columns
//   2. slots = h w2 + bias2 (grouped_gemm.cu)
//   3. y[t] = weighted sum of the token's slots, in the order of its choices (moe_unpermute.cu)
//
// g and u are computed in one tile: its columns alternate in eights, g u g u ..., or one by one where the weights do, so that x is read
// once and a thread finds both of a column. Limited by the tensor cores with many tokens, by reading the weights with few.
#include "fused_experts.cuh"

namespace terrazzo { namespace cuda {
namespace {

struct GateArgs {
  GroupRows rows;
  int F, depth;
  bool paired, interleaved;  // u in eights beside g; or behind each g. Neither: no gate
  Operand x, w;
  const char* w_up;
  int64_t stride_e, stride_up_e;  // in bytes
  const int32_t* tokens;
  const float *bias, *bias_up;    // of columns of g (interleaved: of both), of u; or null
  int64_t bias_stride_e, bias_up_stride_e;
  GateParams gate;
  DType h_dtype;
  bool vectors, vectors_saved;
  void* h;
  float* saved;  // [S, columns], or null
  int64_t columns;
};

TZ_DEVICE void add_bias(const float* bias, int left, float* v) {
#pragma unroll
  for (int j = 0; j < 8; j++)
    if (j < left) v[j] += bias[j];
}

template <class T, bool kBRowsOfK, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks) fused_experts_fwd_gate_kernel(const GateArgs p) {
  TZ_DYNAMIC_SHARED(T, ring);
  const bool both = p.paired || p.interleaved;
  const int width = both ? Shape::kBlockN / 2 : Shape::kBlockN;  // columns of h in a tile
  Product<T, true, kBRowsOfK, Shape> product;
  GroupTile tile;
  for (int64_t number = blockIdx.x; find_tile<Shape::kBlockM>(p.rows, p.rows.E, ceil_div(p.F, width), number, tile); number += gridDim.x) {
    const int first = tile.column * width;
    const char *matrix = p.w.data + tile.e * p.stride_e, *up = p.paired ? p.w_up + tile.e * p.stride_up_e : nullptr;
    product.clear(product.acc);
    __syncthreads();  // the strips of the tile before are read
    product.a.begin([&](int i) {
      const int slot = tile.row + i;
      return Outer{p.x.data + (slot < tile.end ? p.tokens[slot] : 0) * p.x.stride_i, tile.end - slot};
    });
    product.b.begin([&](int i) {
      if (!p.paired) {
        const int column = first * (p.interleaved ? 2 : 1) + i;
        return Outer{matrix + column * p.w.stride_i, (p.interleaved ? 2 : 1) * p.F - column};
      }
      const int column = first + i / 16 * 8 + i % 8;
      return Outer{(i / 8 % 2 ? up : matrix) + column * p.w.stride_i, p.F - column};
    });
    product.add(ring, p.x, p.w, p.depth);

    product.template results<16>(ring, [&](int row, int column, float(&v)[16]) {
      const int64_t slot = tile.row + row;
      if (slot >= tile.end) return;
      const int n = first + (both ? column / 2 : column), left = p.F - n;  // columns of h, of which v has 8, or 16 without a gate
      if (left <= 0) return;
      const int64_t first_column = p.interleaved ? 2 * n : n;
      const bool second = p.interleaved || !both;  // v[8...] are the neighbours of v[0...7]
      const int left_products = p.interleaved ? 2 * left : left;
      if (p.bias) {
        const float* bias = p.bias + tile.e * p.bias_stride_e + first_column;
        add_bias(bias, left_products, v);
        if (second) add_bias(bias + 8, left_products - 8, v + 8);
      }
      if (p.bias_up) add_bias(p.bias_up + tile.e * p.bias_up_stride_e + n, left, v + 8);
      float g[8], u[8], h[8], by_g[8], by_u[8];
      if (p.saved) {
        if (second) {
          store_columns(v, DType::f32, p.saved, slot * p.columns + first_column, left_products, p.vectors_saved);
        } else {
#pragma unroll
          for (int j = 0; j < 8; j++) g[j] = v[j], u[j] = v[8 + j];
          store_columns(g, DType::f32, p.saved, slot * p.columns + n, left, p.vectors_saved);
          store_columns(u, DType::f32, p.saved, slot * p.columns + p.F + n, left, p.vectors_saved);
        }
      }
      for (int part = 0; part < (both ? 1 : 2); part++) {
#pragma unroll
        for (int j = 0; j < 8; j++) g[j] = p.interleaved ? v[2 * j] : part ? v[8 + j] : v[j], u[j] = p.interleaved ? v[2 * j + 1] : v[8 + j];
        gate(p.gate, g, u, h, by_g, by_u);
        store_columns(h, p.h_dtype, p.h, slot * p.F + n + part * 8, left - part * 8, p.vectors);
      }
    });
  }
}

cudaError_t first_product(const FusedExpertsCudaParams& p, cudaStream_t stream) {
  const bool separate = p.w_up.data, both_halves = p.gated && !p.interleaved && !separate, b_rows = rows_of_k(p.w1);
  const DType compute = compute_dtype(p.x_dtype, p.w1.dtype);
  const int64_t bytes = size_of(p.w1.dtype);
  GateArgs args{};
  args.rows = slot_rows(p), args.F = static_cast<int>(p.F), args.depth = static_cast<int>(p.D);
  args.paired = p.gated && !p.interleaved, args.interleaved = p.interleaved;
  args.x = operand(p.x_dtype, p.x, p.x_stride_t, p.x_stride_d, true, compute);
  args.w = operand(p.w1, b_rows, compute), args.stride_e = p.w1.stride_e * bytes;
  if (args.paired) {
    args.w_up = separate ? static_cast<const char*>(p.w_up.data) : args.w.data + p.F * args.w.stride_i;
    args.stride_up_e = separate ? p.w_up.stride_e * bytes : args.stride_e;
    if (!aligned(args.w_up, args.stride_up_e, 1)) args.w.way = Way::elements;
  }
  args.tokens = p.tokens;
  args.bias = static_cast<const float*>(p.bias1), args.bias_stride_e = p.N1;
  args.bias_up = separate ? static_cast<const float*>(p.bias_up) : both_halves && p.bias1 ? args.bias + p.F : nullptr;
  args.bias_up_stride_e = separate ? p.F : p.N1;
  args.gate = gate_params(p), args.h_dtype = p.x_dtype, args.h = p.h, args.vectors = aligned(p.h, p.F, size_of(p.x_dtype));
  args.saved = static_cast<float*>(p.saved), args.columns = product_columns(p);
  args.vectors_saved = aligned(p.saved, args.columns, 4) && p.F % 4 == 0;
  const int64_t N = p.gated ? 2 * p.F : p.F;
  return with_product(compute, p.S, p.E, N, b_rows, [&](auto t, auto shape, auto rows) {
    using T = decltype(t);
    using Shape = decltype(shape);
    constexpr bool kRows = decltype(rows)::v;
    return launch(fused_experts_fwd_gate_kernel<T, kRows, Shape>, dim3(walking_blocks<Shape>(p.S, p.E, ceil_div(N, Shape::kBlockN))), Shape::kThreads,
                  Product<T, true, kRows, Shape>::kSharedBytes, stream, args);
  });
}

}  // namespace

cudaError_t fused_experts_fwd_cuda(const FusedExpertsCudaParams& p, cudaStream_t stream) {
  if (!fits(p)) return cudaErrorInvalidValue;
  if (p.T == 0 || p.D == 0) return cudaSuccess;
  cudaError_t error = moe_permute_cuda(p.rows, stream);
  if (error == cudaSuccess) error = first_product(p, stream);
  if (error == cudaSuccess) error = slots_product(p, p.h, p.F, p.w2, p.F, {}, 0, p.bias2, stream);
  if (error == cudaSuccess) error = sum_slots(p, p.weights, p.y, stream);
  return error;
}

}}  // namespace terrazzo::cuda
