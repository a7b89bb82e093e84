// The gate of the memory-bound kernels: sigmoid and SiLU cheap enough to hide behind DRAM.
//
// sigmoid(x) = 1 / (1 + 2^(-x log2 e)). 2^t = 2^n * 2^f with n = round(t): degree-5 polynomial in f (relative error
// 9e-8), exponent added as an integer, the argument clamped so that no special case is left, reciprocal by estimate
// and one Newton step. Relative error below 3e-7 wherever sigmoid(x) > 2^-120; NaN stays NaN in silu and its derivative.
#pragma once
#include "vec.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

TZ_INLINE Vec<float> reciprocal(Vec<float> d) {
#if defined(__AVX512F__)
  const Vec<float> r((Vec<float>::native)_mm512_rcp14_ps((__m512)d.v));
#elif defined(__AVX2__)
  const Vec<float> r((Vec<float>::native)_mm256_rcp_ps((__m256)d.v));
#else
  const Vec<float> r((Vec<float>::native)_mm_rcp_ps((__m128)d.v));
#endif
  return r + r * (Vec<float>(1.0f) - d * r);
}

TZ_INLINE Vec<float> fast_sigmoid(Vec<float> x) {
  using V = Vec<float>;
  typedef V::ints ints;
  const V c = min(max(x, V(-83.0f)), V(83.0f));
  const V minus_log2e(-1.44269504088896341f), magic(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  const V shifted = fma(c, minus_log2e, magic);
  const V n = shifted - magic;
  const V f = V(c.v * minus_log2e.v - n.v);
  V p(0.0013264727f);
  p = fma(p, f, V(0.009671513f));
  p = fma(p, f, V(0.055507336f));
  p = fma(p, f, V(0.24022242f));
  p = fma(p, f, V(0.693147f));
  p = fma(p, f, V(1.0f));
  const V e((V::native)((ints)p.v + ((ints)shifted.v << 23)));
  return reciprocal(V(1.0f) + e);
}
TZ_INLINE Vec<double> fast_sigmoid(Vec<double> x) { return sigmoid(x); }

template <class A> TZ_INLINE Vec<A> fast_silu(Vec<A> x) { return x * fast_sigmoid(x); }
// d silu(x) / dx, given s = sigmoid(x).
template <class A> TZ_INLINE Vec<A> silu_slope(Vec<A> x, Vec<A> s) { return fma(x * s, Vec<A>(A(1)) - s, s); }

}}}  // namespace terrazzo::cpu::TZ_ISA
