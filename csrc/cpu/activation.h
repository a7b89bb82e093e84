// The gate of the memory-bound kernels: sigmoid and SiLU cheap enough to hide behind DRAM.
//
// sigmoid(x) = 1 / (1 + 2^(-x log2 e)). 2^t = 2^n * 2^f with n = round(t): degree-5 polynomial in f (relative error
// 9e-8), exponent added as an integer, the argument clamped so that no special case is left, then one division: it has a unit
// of its own, where an estimate and a Newton step would take three operations from the multipliers. Relative error below 3e-7 wherever sigmoid(x) > 2^-120; NaN stays NaN in silu (the clamp drops
// it, the product brings it back) and in its derivative.
#pragma once
#include "vec.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

// x inside [-bound, bound]; two instructions, which a vector `?:` is not.
TZ_INLINE Vec<float> clamp(Vec<float> x, float bound) {
#if defined(__AVX512F__)
  return Vec<float>((Vec<float>::native)_mm512_min_ps(_mm512_max_ps((__m512)x.v, _mm512_set1_ps(-bound)), _mm512_set1_ps(bound)));
#elif defined(__AVX2__)
  return Vec<float>((Vec<float>::native)_mm256_min_ps(_mm256_max_ps((__m256)x.v, _mm256_set1_ps(-bound)), _mm256_set1_ps(bound)));
#else
  return Vec<float>((Vec<float>::native)_mm_min_ps(_mm_max_ps((__m128)x.v, _mm_set1_ps(-bound)), _mm_set1_ps(bound)));
#endif
}

// d[i] = 1 + exp(-x[i]), what sigmoid divides by, of n vectors in lockstep: one chain of dependent operations is some 70
// cycles long, several side by side keep the multipliers busy.
template <int n> TZ_INLINE void one_plus_exp(const Vec<float>* x, Vec<float>* d) {
  using V = Vec<float>;
  typedef V::ints ints;
  const V minus_log2e(-1.44269504088896341f), magic(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  V shifted[n], f[n], p[n];
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) f[i] = clamp(x[i], 83.0f);
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) shifted[i] = fma(f[i], minus_log2e, magic);
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) f[i] = V(f[i].v * minus_log2e.v - (shifted[i] - magic).v);
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) p[i] = fma(V(0.0013264727f), f[i], V(0.009671513f));
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) p[i] = fma(p[i], f[i], V(0.055507336f));
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) p[i] = fma(p[i], f[i], V(0.24022242f));
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) p[i] = fma(p[i], f[i], V(0.693147f));
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) p[i] = fma(p[i], f[i], V(1.0f));
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) d[i] = V(1.0f) + V((V::native)((ints)p[i].v + ((ints)shifted[i].v << 23)));
}
template <int n> TZ_INLINE void one_plus_exp(const Vec<double>* x, Vec<double>* d) {
  for (int i = 0; i < n; i++) d[i] = Vec<double>(1.0) + exp(Vec<double>(0.0) - x[i]);
}
// s[i] = sigmoid(x[i]).
template <int n, class A> TZ_INLINE void fast_sigmoid(const Vec<A>* x, Vec<A>* s) {
  one_plus_exp<n>(x, s);
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) s[i] = Vec<A>(A(1)) / s[i];
}
template <class A> TZ_INLINE Vec<A> fast_sigmoid(Vec<A> x) {
  Vec<A> s;
  fast_sigmoid<1>(&x, &s);
  return s;
}
template <int n, class A> TZ_INLINE void fast_silu(Vec<A>* x) {
  Vec<A> d[n];
  one_plus_exp<n>(x, d);
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) x[i] = x[i] / d[i];
}
template <class A> TZ_INLINE Vec<A> fast_silu(Vec<A> x) {
  fast_silu<1>(&x);
  return x;
}
// d silu(x) / dx, given s = sigmoid(x).
template <class A> TZ_INLINE Vec<A> silu_slope(Vec<A> x, Vec<A> s) { return fma(x * s, Vec<A>(A(1)) - s, s); }

}}}  // namespace terrazzo::cpu::TZ_ISA
