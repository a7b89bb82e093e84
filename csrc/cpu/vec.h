// The small SIMD vocabulary of the CPU kernels: Vec<float> and Vec<double>, as wide as the ISA build.
//
// A kernel file is compiled once per ISA (portable 16 bytes, avx2 32, avx512 64) with TZ_ISA naming the build;
// everything here lives in that inline namespace, so the builds never share a symbol. Elements of any storage
// type (float, double, bf16, f16) load into and store from the accumulation type; tails take a count.
// Kernel files use no std containers: an inline std symbol compiled for AVX-512 could be picked by the linker
// for everybody.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include "../common/types.h"
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#else
#include <emmintrin.h>
#endif

#ifndef TZ_ISA
#error "compile kernel files with -DTZ_ISA=portable|avx2|avx512"
#endif

#define TZ_INLINE inline __attribute__((always_inline))

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

// ---- scalar conversions ------------------------------------------------------------------------------------
TZ_INLINE float bits_to_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
TZ_INLINE uint32_t float_to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

TZ_INLINE float to_acc(float v) { return v; }
TZ_INLINE double to_acc(double v) { return v; }
TZ_INLINE float to_acc(int8_t v) { return v; }
TZ_INLINE float to_acc(bf16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }
TZ_INLINE float to_acc(f16 v) {
  // Shift the 15 magnitude bits into a float and rescale by 2^112: exact for subnormals too.
  const uint32_t magnitude = v.bits & 0x7fffu;
  const float scaled = bits_to_float(magnitude << 13) * 0x1p112f;
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t bits = magnitude >= 0x7c00u ? (0x7f800000u | (magnitude << 13)) : float_to_bits(scaled);
  return bits_to_float(bits | sign);
}

TZ_INLINE void from_acc(float v, float* out) { *out = v; }
TZ_INLINE void from_acc(double v, double* out) { *out = v; }
TZ_INLINE void from_acc(float v, double* out) { *out = v; }
TZ_INLINE void from_acc(double v, float* out) { *out = static_cast<float>(v); }
TZ_INLINE void from_acc(float v, bf16* out) {
  const uint32_t u = float_to_bits(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u | ((u >> 16) & 0x8000u) : rounded);
}
TZ_INLINE void from_acc(float v, f16* out) {
  const uint32_t u = float_to_bits(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) h = 0x7e00u;                      // NaN
  else if (magnitude >= 0x47800000u) h = 0x7c00u;                // >= 65536: infinity
  else if (magnitude < 0x38800000u) h = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;  // subnormal
  else h = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  out->bits = static_cast<uint16_t>(h | sign);
}

// ---- Vec ---------------------------------------------------------------------------------------------------
template <class T> struct Vec;

template <> struct Vec<float> {
  static constexpr int size = kVecBytes / 4;
  typedef float native __attribute__((vector_size(kVecBytes), may_alias));
  typedef int32_t ints __attribute__((vector_size(kVecBytes), may_alias));
  typedef uint32_t uints __attribute__((vector_size(kVecBytes), may_alias));
  native v;
  TZ_INLINE Vec() {}
  TZ_INLINE Vec(native n) : v(n) {}
  TZ_INLINE Vec(float s) : v(s - native{}) {}
  TZ_INLINE static Vec zero() { return Vec(native{}); }

  TZ_INLINE static Vec load(const float* p) { native n; std::memcpy(&n, p, kVecBytes); return n; }
  TZ_INLINE static Vec load(const double* p) { Vec r; for (int i = 0; i < size; i++) r.v[i] = static_cast<float>(p[i]); return r; }
  TZ_INLINE static Vec load(const bf16* p) {
#if defined(__AVX512F__)
    return Vec((native)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
#elif defined(__AVX2__)
    return Vec((native)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
#else
    return Vec((native)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)p)));
#endif
  }
  TZ_INLINE static Vec load(const f16* p) {
#if defined(__AVX512F__)
    return Vec((native)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__AVX2__)
    return Vec((native)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
    Vec r; for (int i = 0; i < size; i++) r.v[i] = to_acc(p[i]); return r;
#endif
  }
  TZ_INLINE static Vec load(const int8_t* p) {
#if defined(__AVX512F__)
    return Vec((native)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))));
#elif defined(__AVX2__)
    return Vec((native)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))));
#else
    Vec r; for (int i = 0; i < size; i++) r.v[i] = p[i]; return r;
#endif
  }
  TZ_INLINE void store(float* p) const { std::memcpy(p, &v, kVecBytes); }
  TZ_INLINE void store(double* p) const { for (int i = 0; i < size; i++) p[i] = v[i]; }
  TZ_INLINE void store(bf16* p) const {
#if defined(__AVX512F__) || defined(__AVX2__)
    const ints u = (ints)v;
    const ints rounded = (ints)((uints)(u + 0x7fff + (ints)(((uints)u >> 16) & 1u)) >> 16);
    const ints nan = (ints)(((uints)u >> 16) & 0x8000u) | 0x7fc0;
    const ints h = (v == v) ? rounded : nan;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)h));
#else
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)h, (__m256i)h), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#endif
#else
    for (int i = 0; i < size; i++) from_acc(static_cast<float>(v[i]), p + i);
#endif
  }
  TZ_INLINE void store(f16* p) const {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < size; i++) from_acc(static_cast<float>(v[i]), p + i);
#endif
  }
  // Non-temporal store of a whole vector; p must be aligned to sizeof(element) * size.
  TZ_INLINE void stream(float* p) const {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)v);
#else
    _mm_stream_ps(p, (__m128)v);
#endif
  }
  TZ_INLINE void stream(double* p) const { store(p); }
  template <class S> TZ_INLINE void stream(S* p) const {
    alignas(64) S tmp[size];
    store(tmp);
#if defined(__AVX512F__)
    _mm256_stream_si256((__m256i*)p, _mm256_load_si256((const __m256i*)tmp));
#elif defined(__AVX2__)
    _mm_stream_si128((__m128i*)p, _mm_load_si128((const __m128i*)tmp));
#else
    std::memcpy(p, tmp, sizeof(tmp));
#endif
  }
};

template <> struct Vec<double> {
  static constexpr int size = kVecBytes / 8;
  typedef double native __attribute__((vector_size(kVecBytes), may_alias));
  native v;
  TZ_INLINE Vec() {}
  TZ_INLINE Vec(native n) : v(n) {}
  TZ_INLINE Vec(double s) : v(s - native{}) {}
  TZ_INLINE static Vec zero() { return Vec(native{}); }
  TZ_INLINE static Vec load(const double* p) { native n; std::memcpy(&n, p, kVecBytes); return n; }
  template <class S> TZ_INLINE static Vec load(const S* p) { Vec r; for (int i = 0; i < size; i++) r.v[i] = to_acc(p[i]); return r; }
  TZ_INLINE void store(double* p) const { std::memcpy(p, &v, kVecBytes); }
  TZ_INLINE void store(float* p) const { for (int i = 0; i < size; i++) p[i] = static_cast<float>(v[i]); }
  template <class S> TZ_INLINE void store(S* p) const { for (int i = 0; i < size; i++) from_acc(static_cast<float>(v[i]), p + i); }
  template <class S> TZ_INLINE void stream(S* p) const { store(p); }
};

// Tails: the first n elements (0 <= n <= size); the rest of a loaded vector is zero.
template <class A, class S> TZ_INLINE Vec<A> load_n(const S* p, int64_t n) {
  if (n >= Vec<A>::size) return Vec<A>::load(p);
  alignas(64) S tmp[Vec<A>::size];
  std::memset((void*)tmp, 0, sizeof(tmp));
  for (int64_t i = 0; i < n; i++) tmp[i] = p[i];
  return Vec<A>::load(tmp);
}
template <class A, class S> TZ_INLINE void store_n(Vec<A> v, S* p, int64_t n) {
  if (n >= Vec<A>::size) return v.store(p);
  alignas(64) S tmp[Vec<A>::size];
  v.store(tmp);
  for (int64_t i = 0; i < n; i++) p[i] = tmp[i];
}

template <class A> TZ_INLINE Vec<A> operator+(Vec<A> a, Vec<A> b) { return a.v + b.v; }
template <class A> TZ_INLINE Vec<A> operator-(Vec<A> a, Vec<A> b) { return a.v - b.v; }
template <class A> TZ_INLINE Vec<A> operator*(Vec<A> a, Vec<A> b) { return a.v * b.v; }
template <class A> TZ_INLINE Vec<A> operator/(Vec<A> a, Vec<A> b) { return a.v / b.v; }
// a * b + c, fused where the ISA has it (the builds pass -ffp-contract=fast, so a plain expression fuses too).
template <class A> TZ_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) { return a.v * b.v + c.v; }
// NaN in `a` stays NaN.
template <class A> TZ_INLINE Vec<A> max(Vec<A> a, Vec<A> b) { return b.v > a.v ? b.v : a.v; }
template <class A> TZ_INLINE Vec<A> min(Vec<A> a, Vec<A> b) { return b.v < a.v ? b.v : a.v; }

template <class A> TZ_INLINE A reduce_add(Vec<A> a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __m256 x = (__m256)a.v;
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_reduce_add_ps((__m512)a.v);
#endif
  A s = 0;
  for (int i = 0; i < Vec<A>::size; i++) s += a.v[i];
  return s;
}

// ---- transcendental functions ------------------------------------------------------------------------------
// exp: Cody-Waite reduction and a degree-6 polynomial, under 2 ulp; exp(-inf) = 0, overflow gives inf, NaN stays.
TZ_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  typedef V::native native;
  typedef V::ints ints;
  const native lo = V(-104.0f).v, hi = V(88.8f).v;
  native c = x.v < lo ? lo : x.v;
  c = c > hi ? hi : c;
  const native magic = V(12582912.0f).v;                 // 1.5 * 2^23: adding it rounds to the nearest integer
  const native shifted = c * V(1.44269504088896341f).v + magic;
  const native n = shifted - magic;
  native r = c - n * V(0.693359375f).v;
  r = r - n * V(-2.12194440e-4f).v;
  native p = V(1.9875691500e-4f).v;
  p = p * r + V(1.3981999507e-3f).v;
  p = p * r + V(8.3334519073e-3f).v;
  p = p * r + V(4.1665795894e-2f).v;
  p = p * r + V(1.6666665459e-1f).v;
  p = p * r + V(5.0000001201e-1f).v;
  p = p * (r * r) + r + V(1.0f).v;
  // 2^n in two factors, so that subnormal results and n = 128 come out right.
  const ints k = (ints)shifted - (ints)magic;
  const ints half = k >> 1;
  const native s1 = (native)((half + 127) << 23), s2 = (native)((k - half + 127) << 23);
  native y = p * s1 * s2;
  y = x.v > hi ? V(INFINITY).v : y;
  y = x.v < lo ? native{} : y;
  return (x.v == x.v) ? y : x.v;
}
TZ_INLINE Vec<double> exp(Vec<double> x) {
  Vec<double> r;
  for (int i = 0; i < Vec<double>::size; i++) r.v[i] = std::exp(static_cast<double>(x.v[i]));
  return r;
}
template <class A> TZ_INLINE Vec<A> sigmoid(Vec<A> x) { return Vec<A>(A(1)) / (Vec<A>(A(1)) + exp(Vec<A>(A(0)) - x)); }
template <class A> TZ_INLINE Vec<A> silu(Vec<A> x) { return x / (Vec<A>(A(1)) + exp(Vec<A>(A(0)) - x)); }

// Scalar forms, for per-head work: libm.
template <class A> TZ_INLINE A softplus(A x) { return x > A(20) ? x : std::log1p(std::exp(x)); }
template <class A> TZ_INLINE A sigmoid1(A x) { return A(1) / (A(1) + std::exp(-x)); }

// softplus on a vector: max(x, 0) + log1p(u) with u = exp(-|x|), and log1p(u) = 2 atanh(u / (2 + u)).
TZ_INLINE Vec<float> softplus(Vec<float> x) {
  using V = Vec<float>;
  const V u = exp(min(x, V(0.0f) - x));
  const V t = u / (u + V(2.0f)), t2 = t * t;
  V series(2.0f / 15);
  series = fma(series, t2, V(2.0f / 13));
  series = fma(series, t2, V(2.0f / 11));
  series = fma(series, t2, V(2.0f / 9));
  series = fma(series, t2, V(2.0f / 7));
  series = fma(series, t2, V(2.0f / 5));
  series = fma(series, t2, V(2.0f / 3));
  series = fma(series, t2, V(2.0f));
  const V y = fma(series, t, max(x, V(0.0f)));
  return V(x.v > V(20.0f).v ? x.v : y.v);
}
TZ_INLINE Vec<double> softplus(Vec<double> x) {
  Vec<double> r;
  for (int i = 0; i < Vec<double>::size; i++) r.v[i] = softplus<double>(x.v[i]);
  return r;
}

TZ_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
TZ_INLINE void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
// After streaming stores, before the data is handed to another thread.
TZ_INLINE void stream_fence() { _mm_sfence(); }

}}}  // namespace terrazzo::cpu::TZ_ISA
