// A layer of experts, backward, up to the gradients of its activations (weight gradients are grouped products of what is left here,
// see csrc/bindings/fused_experts.cpp):
//
//   0. slots again, as in the forward
//   1. dh[slot] = dy[token] w2^T stays in the accumulators: h is computed again from the saved products; <dh, h>, a part for each
//      warp's columns; h becomes weight * h; dproducts = weight * dh through the gate
//   2. dweights = the parts, in order, + <dy, bias2>
//   3. slots = dproducts w1^T (+ dproducts w_up^T);  dx[t] = the sum of the token's slots
#include "fused_experts.cuh"

namespace terrazzo { namespace cuda {
namespace {

struct GateBwdArgs {
  GroupRows rows;
  int F, depth;
  bool interleaved;
  Operand dy, w;
  int64_t stride_e;  // in bytes
  const int32_t *tokens, *order;
  const float* weights;  // [T, A]
  const float* saved;    // [S, columns]
  int64_t columns;
  GateParams gate;
  DType dtype;
  bool vectors_saved, vectors_h, vectors_products;
  void *h, *dproducts;
  float* partials;  // [S, parts]
  int64_t parts;
};

template <class T, bool kBRowsOfK, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks) fused_experts_bwd_gate_kernel(const GateBwdArgs p) {
  constexpr int kRowLanes = Shape::kWarpN / 8;  // lanes that share a row of the results
  TZ_DYNAMIC_SHARED(T, ring);
  Product<T, true, kBRowsOfK, Shape> product;
  GroupTile tile;
  for (int64_t number = blockIdx.x; find_tile<Shape::kBlockM>(p.rows, p.rows.E, ceil_div(p.F, Shape::kBlockN), number, tile); number += gridDim.x) {
    const int first = tile.column * Shape::kBlockN;
    const char* matrix = p.w.data + tile.e * p.stride_e;
    product.clear(product.acc);
    __syncthreads();  // the strips of the tile before are read
    product.a.begin([&](int i) {
      const int slot = tile.row + i;
      return Outer{p.dy.data + (slot < tile.end ? p.tokens[slot] : 0) * p.dy.stride_i, tile.end - slot};
    });
    product.b.begin([&](int i) { return Outer{matrix + (first + i) * p.w.stride_i, p.F - first - i}; });
    product.add(ring, p.dy, p.w, p.depth);

    product.template results<8>(ring, [&](int row, int column, float(&dh)[8]) {
      const int64_t slot = tile.row + row;
      const int n = first + column, left = p.F - n;
      float dot = 0;
      if (slot < tile.end && left > 0) {
        // the gate once more, and through it
        float g[8], u[8] = {}, h[8], by_g[8], by_u[8], both[16];
        const int64_t products = slot * p.columns;
        if (p.interleaved) {
          load_columns(DType::f32, p.saved, products + 2 * n, 2 * left, p.vectors_saved, both);
#pragma unroll
          for (int j = 0; j < 8; j++) g[j] = both[2 * j], u[j] = both[2 * j + 1];
        } else {
          load_columns(DType::f32, p.saved, products + n, left, p.vectors_saved, g);
          if (p.gate.gated) load_columns(DType::f32, p.saved, products + p.F + n, left, p.vectors_saved, u);
        }
        gate(p.gate, g, u, h, by_g, by_u);
        const float weight = p.weights[p.order[slot]];
#pragma unroll
        for (int j = 0; j < 8; j++) {
          dot += dh[j] * h[j];
          h[j] *= weight, dh[j] *= weight;
          by_g[j] *= dh[j], by_u[j] *= dh[j];
          both[2 * j] = by_g[j], both[2 * j + 1] = by_u[j];
        }
        store_columns(h, p.dtype, p.h, slot * p.F + n, left, p.vectors_h);
        if (p.interleaved) {
          store_columns(both, p.dtype, p.dproducts, products + 2 * n, 2 * left, p.vectors_products);
        } else {
          store_columns(by_g, p.dtype, p.dproducts, products + n, left, p.vectors_products);
          if (p.gate.gated) store_columns(by_u, p.dtype, p.dproducts, products + p.F + n, left, p.vectors_products);
        }
      }
      dot = warp_sum(dot, kRowLanes);
      if (slot < tile.end && lane_id() % kRowLanes == 0) p.partials[slot * p.parts + tile.column * Shape::kWarpsN + column / Shape::kWarpN] = dot;
    });
  }
}

cudaError_t through_gates(const FusedExpertsCudaParams& p, int64_t& parts, cudaStream_t stream) {
  const WeightMatrix w = transposed(p.w2);
  const bool b_rows = rows_of_k(w);
  const DType compute = compute_dtype(p.x_dtype, w.dtype);
  GateBwdArgs args{};
  args.rows = slot_rows(p), args.F = static_cast<int>(p.F), args.depth = static_cast<int>(p.D), args.interleaved = p.interleaved;
  args.dy = operand(p.x_dtype, p.dy, p.D, 1, true, compute);
  args.w = operand(w, b_rows, compute), args.stride_e = w.stride_e * size_of(w.dtype);
  args.tokens = p.tokens, args.order = p.rows.order, args.weights = static_cast<const float*>(p.weights);
  args.saved = static_cast<const float*>(p.saved), args.columns = product_columns(p), args.gate = gate_params(p), args.dtype = p.x_dtype;
  const int64_t bytes = size_of(p.x_dtype);
  args.vectors_saved = aligned(p.saved, p.F, 4) && aligned(p.saved, args.columns, 4), args.vectors_h = aligned(p.h, p.F, bytes);
  args.vectors_products = aligned(p.dproducts, p.F, bytes) && aligned(p.dproducts, args.columns, bytes);
  args.h = p.h, args.dproducts = p.dproducts, args.partials = p.partials;
  return with_product(compute, p.S, p.E, p.F, b_rows, [&](auto t, auto shape, auto rows) {
    using T = decltype(t);
    using Shape = decltype(shape);
    constexpr bool kRows = decltype(rows)::v;
    const int64_t tiles = ceil_div(p.F, Shape::kBlockN);
    args.parts = parts = tiles * Shape::kWarpsN;
    return launch(fused_experts_bwd_gate_kernel<T, kRows, Shape>, dim3(walking_blocks<Shape>(p.S, p.E, tiles)), Shape::kThreads,
                  Product<T, true, kRows, Shape>::kSharedBytes, stream, args);
  });
}

// A warp for each pair: its parts, and <dy, bias2>; zero where the expert is none of ours.
constexpr int kThreads = 256;
__global__ void __launch_bounds__(kThreads) fused_experts_bwd_weights_kernel(const FusedExpertsCudaParams p, const int64_t parts) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (pair >= p.S) return;
  const int32_t slot = p.places[pair];
  float sum = 0;
  if (slot < p.offs[p.E - 1]) {
    for (int64_t i = lane_id(); i < parts; i += kWarp) sum += p.partials[slot * parts + i];
    const float* bias = p.bias2 ? static_cast<const float*>(p.bias2) + p.indices[pair] * p.D : nullptr;
    for (int64_t d = lane_id(); bias && d < p.D; d += kWarp) sum += bias[d] * load_float(p.x_dtype, p.dy, pair / p.A * p.D + d);
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) static_cast<float*>(p.dweights)[pair] = sum;
}

}  // namespace

cudaError_t fused_experts_bwd_cuda(const FusedExpertsCudaParams& p, cudaStream_t stream) {
  if (!fits(p)) return cudaErrorInvalidValue;
  cudaError_t error = moe_permute_cuda(p.rows, stream);  // the weight gradients read offs even if there is no token
  if (error != cudaSuccess || p.T == 0 || p.D == 0) return error;
  int64_t parts = 0;
  error = through_gates(p, parts, stream);
  if (error == cudaSuccess)
    error = launch(fused_experts_bwd_weights_kernel, dim3(static_cast<unsigned>(ceil_div(p.S, kThreads / kWarp))), kThreads, 0, stream, p, parts);
  if (error != cudaSuccess || !p.dx) return error;
  const int64_t K2 = p.w_up.data ? p.F : 0;
  error = slots_product(p, p.dproducts, product_columns(p), transposed(p.w1), p.N1, transposed(p.w_up), K2, nullptr, stream);
  return error != cudaSuccess ? error : sum_slots(p, nullptr, p.dx, stream);
}

}}  // namespace terrazzo::cuda
