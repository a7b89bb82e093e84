// The gate of the memory-bound kernels: sigmoid and SiLU cheap enough to hide behind DRAM.
//
// sigmoid(x) = 1 / (1 + 2^(-x log2 e)). 2^t = 2^n * 2^f with n = round(t): degree-5 polynomial in f (relative error
// 9e-8), exponent added as an integer, the argument clamped so that no special case is left, reciprocal by estimate
// and one Newton step. Relative error below 3e-7 wherever sigmoid(x) > 2^-120; NaN stays NaN in silu (the clamp drops
// it, the product brings it back) and in its derivative.
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

// s[i] = sigmoid(x[i]) of n vectors in lockstep: one chain of dependent operations is some 70 cycles long, several
// side by side keep the multipliers busy.
template <int n> TZ_INLINE void fast_sigmoid(const Vec<float>* x, Vec<float>* s) {
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
  for (int i = 0; i < n; i++) p[i] = V(1.0f) + V((V::native)((ints)p[i].v + ((ints)shifted[i].v << 23)));
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) s[i] = reciprocal(p[i]);
}
template <int n> TZ_INLINE void fast_sigmoid(const Vec<double>* x, Vec<double>* s) {
  for (int i = 0; i < n; i++) s[i] = sigmoid(x[i]);
}
template <class A> TZ_INLINE Vec<A> fast_sigmoid(Vec<A> x) {
  Vec<A> s;
  fast_sigmoid<1>(&x, &s);
  return s;
}
template <class A> TZ_INLINE Vec<A> fast_silu(Vec<A> x) { return x * fast_sigmoid(x); }
template <int n, class A> TZ_INLINE void fast_silu(Vec<A>* x) {
  Vec<A> s[n];
  fast_sigmoid<n>(x, s);
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) x[i] = x[i] * s[i];
}
// d silu(x) / dx, given s = sigmoid(x).
template <class A> TZ_INLINE Vec<A> silu_slope(Vec<A> x, Vec<A> s) { return fma(x * s, Vec<A>(A(1)) - s, s); }

}}}  // namespace terrazzo::cpu::TZ_ISA
