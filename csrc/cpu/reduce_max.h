// The largest lane of a vector.
#pragma once
#include "vec.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

template <class A> TZ_INLINE A reduce_max(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_reduce_max_ps((__m512)v.v);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128((__m256)v.v), _mm256_extractf128_ps((__m256)v.v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
  }
#endif
  A m = v.v[0];
  for (int i = 1; i < Vec<A>::size; i++) m = v.v[i] > m ? v.v[i] : m;
  return m;
}

}}}  // namespace terrazzo::cpu::TZ_ISA
