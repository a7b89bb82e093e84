// What the two directions of fused_experts share: the expert matrices, the layout of the first product, the combination
// of slots into tokens.
#pragma once
#include "gate.h"
#include "wgrad.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

constexpr int64_t kGateBlock = 512;  // columns gated at a time: g, u and h stay in a first-level cache

inline MatrixB transposed(const MatrixB& b) { return {b.dtype, b.data, b.stride_n, b.stride_k}; }

// Between the products rows of float32 stand for rows of x's type.
inline MatrixA scratch_rows(const FusedExpertsParams& p, DType dtype, const void* data, int64_t stride) {
  return {dtype, data, stride, 1, nullptr, p.x_dtype == DType::bf16};
}

inline int64_t product_columns(const FusedExpertsParams& p) { return p.N1 + (p.w_up.data ? p.F : 0); }
inline Groups slot_groups(const FusedExpertsParams& p) { return {p.E, p.offs}; }

// y[t] = sum over a of weight * slots[place]; weight 1 when `weights` is null.
template <class A> inline void combine(const FusedExpertsParams& p, const A* weights, void* y) {
  with_type(p.x_dtype, [&](auto t) {
    using S = decltype(t);
    constexpr int64_t V = Vec<A>::size;
    parallel_for(0, p.T, max_of(1, 65536 / (p.A * p.D)), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; token++) {
        const int32_t* place = p.places + token * p.A;
        S* out = static_cast<S*>(y) + token * p.D;
        for (int64_t d = 0; d < p.D; d += V) {
          Vec<A> sum = Vec<A>::zero();
          for (int64_t a = 0; a < p.A; a++)
            if (place[a] >= 0)
              sum = fma(Vec<A>(weights ? weights[token * p.A + a] : A(1)), load_n<A>(static_cast<const A*>(p.slots) + place[a] * p.D + d, p.D - d), sum);
          store_n(sum, out + d, p.D - d);
        }
      }
    });
  });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
