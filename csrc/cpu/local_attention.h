// What the forward and the backward of local_attention share: blocks of scores, their panels, and the band.
//
// Work comes in blocks of kBlock rows against kBlock columns. The rows' side lies row by row ([kBlock][P], broadcast), the
// columns' side in panels for the register tiles: transposed for products over P (scores), natural for products over the
// columns (weighted sums). Scores are kept in powers of two for float: 2^x needs no range reduction by log 2.
#pragma once
#include "../common/parallel.h"
#include "../common/params.h"
#include "gemm_tile.h"
#include "reduce_max.h"
#include "tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

constexpr int64_t kBlock = kAttentionBlock;
enum LocalScratch { kTransposedSlot, kNaturalSlot, kSecondTransposedSlot, kSecondNaturalSlot, kRowsSlot, kOtherRowsSlot, kLoadSlot, kScoreSlot, kWeightSlot,
                    kOutSlot, kOtherOutSlot };

// What a score is multiplied by beside the scale; exponential() undoes it.
template <class A> constexpr A kScoreUnit = sizeof(A) == 4 ? A(1.44269504088896341) : A(1);
TZ_INLINE float log_units(float x) { return std::log2(x); }
TZ_INLINE double log_units(double x) { return std::log(x); }

// 2^x for x not far above 0; 0 below 2^-126, NaN stays. Relative error 2e-7.
TZ_INLINE Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  typedef V::ints ints;
  const V magic(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const V c = max(x, V(-127.0f)), shifted = c + magic, f = c - (shifted - magic);
  V y(1.54035304e-4f);
  y = fma(y, f, V(1.33335581e-3f));
  y = fma(y, f, V(9.61812911e-3f));
  y = fma(y, f, V(5.55041087e-2f));
  y = fma(y, f, V(2.40226507e-1f));
  y = fma(y, f, V(6.93147181e-1f));
  y = fma(y, f, V(1.0f));
  const V power((V::native)(((ints)shifted.v - (ints)magic.v + 127) << 23));
  return x.v < V(-126.0f).v ? V::native{} : (y * power).v;
}
TZ_INLINE Vec<double> exponential(Vec<double> x) { return exp(x); }

// Row r sees columns r - below .. r + above; [0, length) exist.
struct Band {
  int64_t below, above, length;

  // Columns that the rows [first, last) see, from a multiple of kBlock on.
  TZ_INLINE int64_t column_begin(int64_t first) const { return max_of(0, first - below) / kBlock * kBlock; }
  TZ_INLINE int64_t column_end(int64_t last) const { return min_of(length, last + above); }
  // Whether every pair of a block is seen.
  TZ_INLINE bool holds(int64_t row, int64_t rows, int64_t column) const {
    return column + kBlock <= length && row + rows - 1 - below <= column && column + kBlock - 1 <= row + above;
  }
};
TZ_INLINE Band keys_of_queries(const LocalAttentionParams& p, int64_t length) { return {p.window - 1, p.causal ? 0 : p.window - 1, length}; }
TZ_INLINE Band queries_of_keys(const LocalAttentionParams& p, int64_t length) { return {p.causal ? 0 : p.window - 1, p.window - 1, length}; }

// Scores that the band, or a zero of live (by column, then by row; either may be null), keeps out become -inf.
template <class A>
inline void mask_scores(A* s, const Band& band, int64_t row, int64_t rows, int64_t column, const uint8_t* live_columns, const uint8_t* live_rows) {
  const A out = static_cast<A>(-INFINITY);
  const int64_t columns = min_of(kBlock, band.length - column);
  for (int64_t r = 0; r < rows; r++, s += kBlock) {
    const bool live = !live_rows || live_rows[r];
    const int64_t end = live ? max_of(0, min_of(columns, row + r + band.above + 1 - column)) : 0;
    const int64_t begin = max_of(0, min_of(end, row + r - band.below - column));
    for (int64_t c = 0; c < begin; c++) s[c] = out;
    for (int64_t c = end; c < kBlock; c++) s[c] = out;
    if (live_columns)
      for (int64_t c = begin; c < end; c++) s[c] = live_columns[c] ? s[c] : out;
  }
}

enum class Into { set, add, rescale };

// out[r, c] = (rescale: factors[r] * out +, add: out +) sum over k < K of a[r * lda + k] panels[k][c].
template <Into kInto, class A>
TZ_INLINE void multiply_panels(const A* a, int64_t lda, int64_t rows, int64_t K, const A* panels, int64_t panel_stride, int64_t columns, A* out,
                               int64_t ldo, const A* factors = nullptr) {
  constexpr int64_t NR = kTileCols<A>;
  for (int64_t c = 0; c < columns; c += NR, panels += panel_stride)
    for_row_tiles(rows, [&](int64_t r, auto height) TZ_LAMBDA {
      Tile<A, decltype(height)::value> tile;
      if constexpr (kInto == Into::set) tile.zero();
      else tile.load(out + r * ldo + c, ldo);
      if constexpr (kInto == Into::rescale) tile.scale_rows(factors + r);
      tile.multiply(a + r * lda, lda, 1, panels, K);
      tile.store(out + r * ldo + c, ldo);
    });
}

// A [B, L, heads, P] tensor's head, as rows of one sequence.
struct HeadRows {
  DType dtype;
  const void* base;
  int64_t offset, stride;

  template <class A> TZ_INLINE void load(int64_t row, int64_t rows, int64_t P, A* out) const {
    load_tile(dtype, base, offset + row * stride, stride, int64_t(1), rows, P, out, P);
  }
};
TZ_INLINE HeadRows q_rows(const LocalAttentionParams& p, const AttentionRun& run, int64_t h) {
  return {p.dtype, p.q, run.batch * p.q_stride_b + run.begin * p.q_stride_l + h * p.q_stride_h, p.q_stride_l};
}
TZ_INLINE HeadRows k_rows(const LocalAttentionParams& p, const AttentionRun& run, int64_t h) {
  return {p.dtype, p.k, run.batch * p.k_stride_b + run.begin * p.k_stride_l + h * p.k_stride_h, p.k_stride_l};
}
TZ_INLINE HeadRows v_rows(const LocalAttentionParams& p, const AttentionRun& run, int64_t h) {
  return {p.dtype, p.v, run.batch * p.v_stride_b + run.begin * p.v_stride_l + h * p.v_stride_h, p.v_stride_l};
}
TZ_INLINE HeadRows contiguous_rows(const LocalAttentionParams& p, const void* base, const AttentionRun& run, int64_t heads, int64_t h) {
  return {p.dtype, base, ((run.batch * p.L + run.begin) * heads + h) * p.P, heads * p.P};
}

TZ_INLINE int64_t padded_width(const LocalAttentionParams& p, int64_t tile) { return round_up(p.P, tile); }

// Rows [begin, end) of a head, begin a multiple of kBlock, as panels block by block: transposed [kBlock columns of P] and
// natural [P padded columns of kBlock]; either may be null. Rows behind the end are zeros.
template <class A>
inline void pack_blocks(const LocalAttentionParams& p, const HeadRows& head, int64_t begin, int64_t end, A* transposed, A* natural) {
  constexpr int64_t NR = kTileCols<A>;
  const int64_t width = padded_width(p, NR);
  A* rows = scratch<A>(kLoadSlot, kBlock * p.P);
  for (int64_t row = begin; row < end; row += kBlock) {
    const int64_t n = min_of(kBlock, end - row);
    head.load(row, n, p.P, rows);
    if (transposed) {
      pack_transposed(rows, p.P, n, p.P, kBlock, transposed);
      transposed += kBlock * p.P;
    }
    if (natural) {
      for (int64_t r = 0; r < n; r++)
        for_row_vectors<A>(rows + r * p.P, p.P, kBlock * NR, [&](int64_t at, Vec<A> value) TZ_LAMBDA { value.store(natural + r * NR + at); });
      for (int64_t r = n; r < kBlock; r++)
        for (int64_t c = 0; c < width; c += NR) std::memset(natural + c * kBlock + r * NR, 0, sizeof(A) * NR);
      natural += kBlock * width;
    }
  }
}

template <class A> TZ_INLINE void scale_all(A* x, int64_t n, A factor) {
  int64_t i = 0;
  for (; i + Vec<A>::size <= n; i += Vec<A>::size) (Vec<A>::load(x + i) * Vec<A>(factor)).store(x + i);
  for (; i < n; i++) x[i] *= factor;
}

}}}  // namespace terrazzo::cpu::TZ_ISA
