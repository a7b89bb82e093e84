// What the two directions of fused_experts share on the host.
#pragma once
#include "kernels.h"

#include "activation.cuh"
#include "gemm.cuh"

namespace terrazzo { namespace cuda {

inline GateParams gate_params(const FusedExpertsParams& p) { return {p.activation, p.gated, static_cast<float>(p.alpha), static_cast<float>(p.limit)}; }
inline GroupRows slot_rows(const FusedExpertsParams& p) { return {p.offs, static_cast<int>(p.E), static_cast<int>(p.S)}; }
inline int64_t product_columns(const FusedExpertsParams& p) { return p.N1 + (p.w_up.data ? p.F : 0); }
inline bool fits(const FusedExpertsParams& p) {
  return p.x_dtype != DType::f64 && p.S <= kMostRows && p.E <= INT32_MAX / 2 && p.D <= INT32_MAX / 2 && product_columns(p) <= INT32_MAX / 2;
}
inline WeightMatrix transposed(WeightMatrix w) {
  std::swap(w.stride_k, w.stride_n);
  return w;
}

// rows[slot] = a[slot] w [+ a's columns from w's rows on times w2] + bias, in x's dtype.
inline cudaError_t slots_product(const FusedExpertsParams& p, const void* a, int64_t a_stride, const WeightMatrix& w, int64_t K,
                                 const WeightMatrix& w2, int64_t K2, const void* bias, cudaStream_t stream) {
  GroupedGemmCudaParams g{};
  g.a_dtype = p.x_dtype, g.bias_dtype = DType::f32, g.T = p.S, g.E = p.E, g.K = K, g.N = p.D, g.offs = p.offs;
  g.a = a, g.a_stride_m = a_stride, g.a_stride_k = 1, g.b = w, g.K2 = K2, g.b2 = w2;
  g.bias = bias, g.bias_stride_e = p.D, g.c = p.slots;
  return experts_product_cuda(g, stream);
}

// y[t] = the sum over a of weight * slots[place]; weight 1 when `weights` is null. In x's dtype.
inline cudaError_t sum_slots(const FusedExpertsParams& p, const void* weights, void* y, cudaStream_t stream) {
  MoeUnpermuteCudaParams u{};
  u.dtype = p.x_dtype, u.T = p.T, u.A = p.A, u.D = p.D, u.rows = p.slots, u.rows_stride = p.D, u.inverse = p.places, u.live = p.offs + p.E - 1;
  u.weights = weights, u.y = y;
  return moe_unpermute_fwd_cuda(u, stream);
}

}}  // namespace terrazzo::cuda
