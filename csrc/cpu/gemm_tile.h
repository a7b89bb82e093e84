// Register micro-kernels shared by the GEMM-shaped CPU kernels.
//
// A tile is R x kCols accumulators held in registers, kCols = two vectors. The right operand comes in panels:
// kCols contiguous columns per k, so every load is a whole cache line; the left operand is broadcast from any
// two strides and needs no packing. 6 x 16 fills the sixteen AVX2 registers (12 accumulators, two columns, one
// broadcast) and reaches the FMA peak from L1; 4 x 16 reaches two thirds of it. AVX-512 has 32 registers: 8 x 32.
#pragma once
#include <type_traits>
#include <utility>
#include "vec.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 6;
#endif
template <class A> constexpr int kTileCols = 2 * Vec<A>::size;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class A, int R> struct Tile {
  static constexpr int V = Vec<A>::size;
  Vec<A> c[R][2];

  TZ_INLINE void zero() {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) c[i][0] = c[i][1] = Vec<A>::zero();
  }
  // c[i] = rows[i], rows `stride` apart.
  TZ_INLINE void load(const A* rows, int64_t stride) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      c[i][0] = Vec<A>::load(rows + i * stride);
      c[i][1] = Vec<A>::load(rows + i * stride + V);
    }
  }
  // c[i] += rows[i], rows `stride` apart.
  TZ_INLINE void add(const A* rows, int64_t stride) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      c[i][0] = c[i][0] + Vec<A>::load(rows + i * stride);
      c[i][1] = c[i][1] + Vec<A>::load(rows + i * stride + V);
    }
  }
  // c[i] = factor * rows[i], rows `stride` apart.
  TZ_INLINE void load_scaled(const A* rows, int64_t stride, Vec<A> factor) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      c[i][0] = factor * Vec<A>::load(rows + i * stride);
      c[i][1] = factor * Vec<A>::load(rows + i * stride + V);
    }
  }
  TZ_INLINE void store(A* rows, int64_t stride) const {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      c[i][0].store(rows + i * stride);
      c[i][1].store(rows + i * stride + V);
    }
  }
  // c[i] *= factors[i]
  TZ_INLINE void scale_rows(const A* factors) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      const Vec<A> f(factors[i]);
      c[i][0] = c[i][0] * f;
      c[i][1] = c[i][1] * f;
    }
  }
  // c[i] += sum over k < K of a[i * a_row + k * a_k] * panel[k]
  TZ_INLINE void multiply(const A* a, int64_t a_row, int64_t a_k, const A* panel, int64_t K) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < K; k++) {
      const Vec<A> b0 = Vec<A>::load(panel), b1 = Vec<A>::load(panel + V);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        const Vec<A> s(a[i * a_row]);
        c[i][0] = fma(s, b0, c[i][0]);
        c[i][1] = fma(s, b1, c[i][1]);
      }
      a += a_k;
      panel += 2 * V;
    }
  }
  // The R x R triangle of multiply(): row i takes k <= i (kLower) or k >= i. Elements outside are not read into
  // the sums, so an infinity there stays where it belongs.
  template <bool kLower> TZ_INLINE void multiply_triangle(const A* a, int64_t a_row, const A* panel) {
#pragma GCC unroll 8
    for (int k = 0; k < R; k++) {
      const Vec<A> b0 = Vec<A>::load(panel + k * 2 * V), b1 = Vec<A>::load(panel + k * 2 * V + V);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        if (kLower ? k > i : k < i) continue;
        const Vec<A> s(a[i * a_row + k]);
        c[i][0] = fma(s, b0, c[i][0]);
        c[i][1] = fma(s, b1, c[i][1]);
      }
    }
  }
};

template <int R, class F> TZ_INLINE void call_with_rows(int64_t rows, int64_t begin, const F& fn) {
  if constexpr (R > 1)
    if (rows < R) return call_with_rows<R - 1>(rows, begin, fn);
  fn(begin, std::integral_constant<int, R>());
}

// Splits `n` rows into tiles of nearly equal height, at most kMax: fn(begin, integral_constant<height>).
// 128 rows become eighteen sixes and four fives: a tail of two rows would run at a third of the speed.
template <int kMax = kTileRows, class F> TZ_INLINE void for_row_tiles(int64_t n, const F& fn) {
  if (n <= 0) return;
  const int64_t tiles = (n + kMax - 1) / kMax, height = n / tiles, taller = n % tiles;
  for (int64_t t = 0, begin = 0; t < tiles; t++) {
    const int64_t rows = height + (t < taller);
    call_with_rows<kMax>(rows, begin, fn);
    begin += rows;
  }
}

// Lanes of a and b exchanged in pairs `Step` apart: the low half takes a's kept lanes, the high half b's. The lane
// numbers are constants, so each call is one or two shuffle instructions.
template <int Step, bool kHigh, class Native, size_t... I>
TZ_INLINE Native exchange_lanes(Native a, Native b, std::index_sequence<I...>) {
  constexpr int V = sizeof...(I);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((I & Step) ? (kHigh ? V + I : V + I - Step) : (kHigh ? I + Step : I))...);
#else
  using Int = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  typedef Int Lanes __attribute__((vector_size(sizeof(Native))));
  constexpr Lanes lanes = {static_cast<Int>((I & Step) ? (kHigh ? V + I : V + I - Step) : (kHigh ? I + Step : I))...};
  return __builtin_shuffle(a, b, lanes);
#endif
}

template <int Step, class Native, int V> TZ_INLINE void transpose_steps(Native (&r)[V]) {
  if constexpr (Step < V) {
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) {
      if (i & Step) continue;
      const Native a = r[i], b = r[i + Step];
      r[i] = exchange_lanes<Step, false>(a, b, std::make_index_sequence<V>());
      r[i + Step] = exchange_lanes<Step, true>(a, b, std::make_index_sequence<V>());
    }
    transpose_steps<2 * Step>(r);
  }
}

// dst[j * dst_stride + i] = src[i * src_stride + j] for a square block of one vector's size.
template <class A> TZ_INLINE void transpose_block(const A* src, int64_t src_stride, A* dst, int64_t dst_stride) {
  constexpr int V = Vec<A>::size;
  typename Vec<A>::native r[V];
#pragma GCC unroll 16
  for (int i = 0; i < V; i++) r[i] = Vec<A>::load(src + i * src_stride).v;
  transpose_steps<1>(r);
#pragma GCC unroll 16
  for (int i = 0; i < V; i++) Vec<A>(r[i]).store(dst + i * dst_stride);
}

// dst[j * dst_stride + i] = src[i * src_stride + j] for rows x cols elements.
template <class A>
inline void transpose(const A* src, int64_t src_stride, int64_t rows, int64_t cols, A* dst, int64_t dst_stride) {
  constexpr int64_t V = Vec<A>::size;
  const int64_t full_rows = rows / V * V, full_cols = cols / V * V;
  for (int64_t i = 0; i < full_rows; i += V)
    for (int64_t j = 0; j < full_cols; j += V)
      transpose_block(src + i * src_stride + j, src_stride, dst + j * dst_stride + i, dst_stride);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = i < full_rows ? full_cols : 0; j < cols; j++) dst[j * dst_stride + i] = src[i * src_stride + j];
}

// rows [n, K] with a row stride -> panels [columns / kTileCols][K][kTileCols] holding the transpose, columns n
// up to `columns` zero.
template <class A>
inline void pack_transposed(const A* rows, int64_t stride, int64_t n, int64_t K, int64_t columns, A* panels) {
  constexpr int64_t NR = kTileCols<A>;
  for (int64_t c = 0; c < columns; c += NR, panels += K * NR) {
    const int64_t valid = n - c < NR ? (n > c ? n - c : 0) : NR;
    if (valid < NR) std::memset(panels, 0, static_cast<size_t>(K * NR) * sizeof(A));
    if (valid > 0) transpose(rows + c * stride, stride, valid, K, panels, NR);
  }
}

// One row of n elements of any storage type -> kTileCols wide slices `slice_stride` apart, zero padded.
template <class A, class S, class F> TZ_INLINE void for_row_vectors(const S* row, int64_t n, int64_t slice_stride, const F& fn) {
  constexpr int64_t V = Vec<A>::size, NR = kTileCols<A>;
  for (int64_t j = 0; j < round_up(n, NR); j += V) {
    const Vec<A> v = n - j >= V ? Vec<A>::load(row + j) : n > j ? load_n<A>(row + j, n - j) : Vec<A>::zero();
    fn(j / NR * slice_stride + j % NR, v);
  }
}

}}}  // namespace terrazzo::cpu::TZ_ISA
