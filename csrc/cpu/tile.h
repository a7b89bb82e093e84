// Small tiles between memory of any element type and layout, and scratch of the accumulation type.
//
// A tile is rows x cols; the memory side has a stride for each (in elements), the scratch side has unit-stride
// columns. Unit-stride columns move as rows, unit-stride rows as in-register transposes, anything else by element.
#pragma once
#include <utility>
#include "vec.h"

#define TZ_LAMBDA __attribute__((always_inline))

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

TZ_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
TZ_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
TZ_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(T{}) with the C++ type of a dtype.
template <class F> TZ_INLINE void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
}

TZ_INLINE int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
TZ_INLINE const void* element(const void* base, DType dtype, int64_t i) { return (const char*)base + i * size_of(dtype); }
TZ_INLINE void* element(void* base, DType dtype, int64_t i) { return (char*)base + i * size_of(dtype); }

template <class A, class S> TZ_INLINE A load1(const S* p) { return static_cast<A>(to_acc(*p)); }
template <class A, class S> TZ_INLINE void store1(A v, S* p) {
  if constexpr (sizeof(S) == 2) from_acc(static_cast<float>(v), p);
  else from_acc(v, p);
}

// Rows become columns: m[i][j] <-> m[j][i], log2(size) rounds of swapping blocks of `bit` elements between rows.
template <int bit, class A, int... k> TZ_INLINE void swap_blocks(Vec<A>& a, Vec<A>& b, std::integer_sequence<int, k...>) {
  constexpr int size = Vec<A>::size;
  const auto low = a.v, high = b.v;
  a.v = __builtin_shufflevector(low, high, ((k & bit) ? size + k - bit : k)...);
  b.v = __builtin_shufflevector(low, high, ((k & bit) ? size + k : k + bit)...);
}
template <int bit, class A> TZ_INLINE void transpose_rounds(Vec<A>* m) {
  if constexpr (bit > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < Vec<A>::size; i++)
      if (!(i & bit)) swap_blocks<bit>(m[i], m[i + bit], std::make_integer_sequence<int, Vec<A>::size>());
    transpose_rounds<bit / 2>(m);
  }
}
template <class A> TZ_INLINE void transpose(Vec<A>* m) { transpose_rounds<Vec<A>::size / 2>(m); }

// The sums of a whole vector of rows, m[i] summed to element i: the transpose's swaps, each followed by an addition that halves
// what is left. m is used up.
template <int bit = 1, class A> TZ_INLINE Vec<A> reduce_rows(Vec<A>* m) {
  if constexpr (bit == Vec<A>::size) {
    return m[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Vec<A>::size; i += 2 * bit) {
      swap_blocks<bit>(m[i], m[i + bit], std::make_integer_sequence<int, Vec<A>::size>());
      m[i] = m[i] + m[i + bit];
    }
    return reduce_rows<2 * bit>(m);
  }
}

template <class A, class S>
inline void load_tile(const S* src, int64_t stride_row, int64_t stride_col, int64_t rows, int64_t cols, A* dst, int64_t ld) {
  constexpr int64_t size = Vec<A>::size;
  if (stride_col == 1) {
    for (int64_t r = 0; r < rows; r++) {
      int64_t c = 0;
      for (; c + size <= cols; c += size) Vec<A>::load(src + r * stride_row + c).store(dst + r * ld + c);
      for (; c < cols; c++) dst[r * ld + c] = load1<A>(src + r * stride_row + c);
    }
    return;
  }
  // Blocks of size x size by transposes. Rows beyond the last whole block are read with what lies behind them, as long
  // as that is inside the tile's own memory; the block at the tile's far end goes by element.
  int64_t done = 0;
  if (stride_row == 1) {
    const int64_t reach = (cols - 1) * stride_col + rows, all_rows = ceil_div(rows, size) * size;
    for (; done + size <= cols && (done + size - 1) * stride_col + all_rows <= reach; done += size)
      for (int64_t r = 0; r < rows; r += size) {
        Vec<A> m[size];
#pragma GCC unroll 16
        for (int64_t i = 0; i < size; i++) m[i] = Vec<A>::load(src + (done + i) * stride_col + r);
        transpose(m);
        if (r + size <= rows) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < size; i++) m[i].store(dst + (r + i) * ld + done);
        } else {
          for (int64_t i = 0; i < rows - r; i++) m[i].store(dst + (r + i) * ld + done);
        }
      }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = done; c < cols; c++) dst[r * ld + c] = load1<A>(src + r * stride_row + c * stride_col);
}

template <class A, class S>
inline void store_tile(const A* src, int64_t ld, S* dst, int64_t stride_row, int64_t stride_col, int64_t rows, int64_t cols) {
  constexpr int64_t size = Vec<A>::size;
  if (stride_col == 1) {
    for (int64_t r = 0; r < rows; r++) {
      int64_t c = 0;
      for (; c + size <= cols; c += size) Vec<A>::load(src + r * ld + c).store(dst + r * stride_row + c);
      for (; c < cols; c++) store1(src[r * ld + c], dst + r * stride_row + c);
    }
    return;
  }
  int64_t done = 0;
  if (stride_row == 1 && rows >= size) {
    for (; done + size <= cols; done += size)
      for (int64_t r = 0; r + size <= rows; r += size) {
        Vec<A> m[size];
#pragma GCC unroll 16
        for (int64_t i = 0; i < size; i++) m[i] = Vec<A>::load(src + (r + i) * ld + done);
        transpose(m);
#pragma GCC unroll 16
        for (int64_t i = 0; i < size; i++) m[i].store(dst + (done + i) * stride_col + r);
      }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = r < rows / size * size ? done : 0; c < cols; c++)
      store1(src[r * ld + c], dst + r * stride_row + c * stride_col);
}

// The same with the element type known at run time; base + offset is the tile's first element.
template <class A>
inline void load_tile(DType dtype, const void* base, int64_t offset, int64_t stride_row, int64_t stride_col, int64_t rows,
                      int64_t cols, A* dst, int64_t ld) {
  with_type(dtype, [&](auto t) {
    load_tile<A>(static_cast<const decltype(t)*>(base) + offset, stride_row, stride_col, rows, cols, dst, ld);
  });
}
template <class A>
inline void store_tile(const A* src, int64_t ld, DType dtype, void* base, int64_t offset, int64_t stride_row,
                       int64_t stride_col, int64_t rows, int64_t cols) {
  with_type(dtype, [&](auto t) {
    store_tile<A>(src, ld, static_cast<decltype(t)*>(base) + offset, stride_row, stride_col, rows, cols);
  });
}

// Two adjacent vectors, streamed or not. Two bf16 vectors share one pack, one store and one look for NaNs.
template <bool kStream, class A, class S> TZ_INLINE void store_pair(Vec<A> a, Vec<A> b, S* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(A) == 4 && sizeof(S) == 2 && dtype_of<S>::value == DType::bf16) {
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a.v, (__m256)b.v, _CMP_UNORD_Q)) == 0, 1)) {
      const auto rounded = [](__m256i u) TZ_LAMBDA {
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
      };
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded((__m256i)a.v), rounded((__m256i)b.v)), 0xd8);
      if (kStream) _mm256_stream_si256((__m256i*)p, packed);
      else _mm256_storeu_si256((__m256i*)p, packed);
      return;
    }
  }
#endif
  if (kStream) {
    a.stream(p);
    b.stream(p + Vec<A>::size);
  } else {
    a.store(p);
    b.store(p + Vec<A>::size);
  }
}

// n adjacent vectors; a single one may be a tail of `left` elements.
template <int n, class A, class S> TZ_INLINE void load_some(const S* p, int64_t left, Vec<A>* v) {
  if constexpr (n == 1) {
    v[0] = load_n<A>(p, left);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) v[i] = Vec<A>::load(p + i * Vec<A>::size);
  }
}
template <int n, bool kStream, class A, class S> TZ_INLINE void store_some(const Vec<A>* v, S* p, int64_t left) {
  if constexpr (n == 1) {
    if (kStream && left >= Vec<A>::size) v[0].stream(p);
    else store_n(v[0], p, left);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < n; i += 2) store_pair<kStream>(v[i], v[i + 1], p + i * Vec<A>::size);
  }
}

template <class A> inline void fill_tile(A* dst, int64_t ld, int64_t rows, int64_t cols, A value) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < cols; c++) dst[r * ld + c] = value;
}

// Outputs above this many bytes bypass the caches: they would only push out what is still needed.
constexpr int64_t kStreamBytes = 8 << 20;

}}}  // namespace terrazzo::cpu::TZ_ISA
