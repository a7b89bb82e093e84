// C[M, N] (+)= A[M, K] B[K, N] for one block of C, in the accumulation type: the heart of the expert and linear kernels.
//
// Five ways, chosen by the number of rows and B's layout, so that weights are read as they are stored:
//   blocked  any strides: kBlockK rows of B at a time go into panels of kPanel columns, A into rows of kBlockK; both
//            convert to the accumulation type on the way. Register tiles of gemm_tile.h do the rest.
//   dot      few rows, B contiguous along K (x W^T with W as stored): vectors run along K, nothing is packed.
//   swapped  more rows of that layout: C^T = W x^T. Rows of W are read where they lie, rows of x go into panels.
//   axpy     very few rows, B contiguous along N: rows of B are scaled and added to C, which stays in cache.
//   panels   B packed before the call (WeightMatrix): its panels are read where they lie, converted in registers.
// With AVX512-BF16, blocked, dot and panels multiply bfloat16 as it is where both operands are; blocked, swapped and panels by AMX tiles
// where the machine has them (gemm_bf16.h).
// The order of the sum of one element depends on K, the way, its group's rows and, swapped, its place among them (rows that fill no panel
// are dot products), not on how C was cut for the threads.
// Sums of kBlockK terms are made apart and then added to C: one long chain of float32 roundings would be off twice as far.
#pragma once
#include "../common/parallel.h"
#include "gemm_bf16.h"
#include "gemm_tile.h"
#include "tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

constexpr int64_t kBlockK = 256;   // rows of a packed panel: 16 KB, half of a first-level cache
constexpr int64_t kBlockM = 96;    // rows of A packed at once: 96 KB
constexpr int64_t kPackAhead = 16; // rows of B fetched ahead while packing
constexpr int64_t kDotRows = 96;   // at most so many rows by dot products, half of it where B is converted for every
                                   // tile of rows; beyond, packing costs less than adding up lanes
constexpr int64_t kSwapRows = 256; // at most so many rows by swapping: their panels of kSwapBytes a row are 1 MB
constexpr int64_t kSwapBytes = 4096;
constexpr int64_t kSwapTiles = 1 << 18; // elements in panels for tiles
constexpr int64_t kAxpyRows = 24;  // at most so many rows by axpy; beyond, C's passes through the cache cost more
constexpr int64_t kStreamRows = 4; // at most so many rows read one row of B at a time: one sequential stream a thread
constexpr int64_t kDotCache = 1 << 15;  // elements of A that stay in a second-level cache beside rows of B
constexpr int64_t kDotMinK = 1024;      // shorter sums pay too much for adding up their lanes
constexpr int64_t kStreamAhead = 8192;  // bytes fetched ahead of a stream

// Scratch slots of this file; callers use kGemmSlots and up.
enum GemmSlot { kSlotA, kSlotB, kSlotTurned, kGemmSlots };

// A[M, K]; row m lies at rows[m] when the rows are gathered. `narrow`: float32 that may be rounded to bfloat16, what it stands for being of that type.
struct MatrixA {
  DType dtype;
  const void* data;
  int64_t stride_m, stride_k;
  const int32_t* rows;
  bool narrow = false;
};
struct MatrixB {  // B[K, N], see WeightMatrix
  DType dtype;
  const void* data;
  int64_t stride_k, stride_n, panel = 0;
  bool int8 = false;
  const float* scale = nullptr;
  bool narrow = false;
};
inline MatrixB expert_matrix(const WeightMatrix& w, int64_t e) {
  const void* data = w.int8 ? static_cast<const int8_t*>(w.data) + e * w.stride_e : element(w.data, w.dtype, e * w.stride_e);
  return {w.dtype, data, w.stride_k, w.stride_n, w.panel, w.int8, w.scale ? w.scale + e * w.scale_stride_e : nullptr};
}

enum class GemmWay { blocked, dot, swapped, axpy, panels };

// How many rows are multiplied by dot products at most.
inline int64_t dot_rows_of(DType dtype) {
#if defined(__AVX512BF16__)
  if (dtype == DType::bf16 && tiles()) return kRowsForTiles - 1;
#endif
  return size_of(dtype) == 2 ? kDotRows / 2 : kDotRows;
}

// Whether so many rows are multiplied by swapping: where a second-level cache has room for their panels beside a stream of W (measured on
// Intel's CPUs of 2 MB), and at least one panel is full.
inline bool swaps(int64_t M, [[maybe_unused]] int64_t K, DType dtype) {
  if (second_level_cache() < (2 << 20)) return false;
#if defined(__AVX512BF16__)
  if (dtype == DType::bf16) return tiles() && M > kStreamRows && K % (2 * kTileEdge) == 0;
#endif
  return M >= max_of(16, dtype == DType::f64 ? kTileCols<double> : kTileCols<float>) && M <= kSwapRows;
}

inline GemmWay gemm_way(int64_t M, int64_t K, int64_t N, const MatrixB& b) {
  if (b.panel) return GemmWay::panels;
  if (K > 1 && b.stride_k == 1 && swaps(M, K, b.dtype)) return GemmWay::swapped;
  if (M <= dot_rows_of(b.dtype) && K > 1 && b.stride_k == 1) return GemmWay::dot;
  if (M <= kAxpyRows && N > 1 && b.stride_n == 1) return GemmWay::axpy;
  return GemmWay::blocked;
}

// Rows [m, m + rows) x columns [k, k + cols) of A -> dst with `ld`, converted.
template <class A>
inline void pack_a(const MatrixA& a, int64_t m, int64_t rows, int64_t k, int64_t cols, A* dst, int64_t ld) {
  if (!a.rows) return load_tile<A>(a.dtype, a.data, m * a.stride_m + k * a.stride_k, a.stride_m, a.stride_k, rows, cols, dst, ld);
  for (int64_t i = 0; i < rows; i++)
    load_tile<A>(a.dtype, a.data, a.rows[m + i] * a.stride_m + k * a.stride_k, 0, a.stride_k, 1, cols, dst + i * ld, ld);
}

// ---- blocked -------------------------------------------------------------------------------------------------

// Panels of a block are one line further apart than they are long: a power of two would share cache sets.
constexpr int64_t panel_stride(int64_t kc) { return (kc + 1) * kPanel; }

// B[k, k + kc) x [n, n + nb) -> panels of kPanel columns, columns beyond nb up to a whole register tile zero.
template <class A> inline void pack_b(const MatrixB& b, int64_t k, int64_t kc, int64_t n, int64_t nb, A* panels) {
  const int64_t stride = panel_stride(kc), columns = round_up(nb, max_of(kPanel, kTileCols<A>));
  if (b.stride_n == 1) {
    with_type(b.dtype, [&](auto t) {
      using S = decltype(t);
      for (int64_t i = 0; i < kc; i++) {
        const S* src = static_cast<const S*>(b.data) + (k + i) * b.stride_k + n;
        A* dst = panels + i * kPanel;
        int64_t j = 0;
        for (; j + kPanel <= nb; j += kPanel, dst += stride) {
          prefetch_l2(src + kPackAhead * b.stride_k + j);
#pragma GCC unroll 8
          for (int64_t v = 0; v < kPanel; v += Vec<A>::size) Vec<A>::load(src + j + v).store(dst + v);
        }
        for (; j < columns; j += kPanel, dst += stride)
          for (int64_t v = 0; v < kPanel; v++) dst[v] = j + v < nb ? load1<A>(src + j + v) : A(0);
      }
    });
    return;
  }
  for (int64_t j = 0; j < columns; j += kPanel, panels += stride) {
    const int64_t valid = min_of(kPanel, max_of(nb - j, 0));
    if (valid < kPanel) std::memset(panels, 0, static_cast<size_t>(kc * kPanel) * sizeof(A));
    for (int64_t i = 0; i < kc && valid > 0; i += kPanel) {
      const int64_t at = (k + i) * b.stride_k + (n + j) * b.stride_n;
      for (int64_t next = 0; next < kPanel; next++) prefetch_l2(element(b.data, b.dtype, at + (kPanel + next) * b.stride_n));
      load_tile<A>(b.dtype, b.data, at, b.stride_k, b.stride_n, min_of(kPanel, kc - i), valid, panels + i * kPanel, kPanel);
    }
  }
}

// What to fetch while a tile is summed: `step` bytes further with every step of K; a register tile's panels `across` apart.
struct Fetch {
  const char* at;
  int64_t step, across;
};

#if defined(__AVX512BF16__)
// Whether both operands are bfloat16, or may be.
inline bool in_pairs(const MatrixA& a, const MatrixB& b) {
  const auto is = [](DType dtype, bool narrow) { return dtype == DType::bf16 || (narrow && dtype == DType::f32); };
  return is(a.dtype, a.narrow) && is(b.dtype, b.narrow) && !b.int8;
}
// Calls f(pointer) with a matrix's type, bfloat16 or float32.
template <class F> TZ_INLINE void with_narrow(DType dtype, const void* data, const F& f) {
  if (dtype == DType::f32) f(static_cast<const float*>(data));
  else f(static_cast<const bf16*>(data));
}

inline void pack_a(const MatrixA& a, int64_t m, int64_t rows, int64_t k, int64_t cols, Pair* dst, int64_t ld) {
  with_narrow(a.dtype, a.data, [&](auto* p) {
    if (!a.rows) return pack_pair_rows(p + m * a.stride_m + k * a.stride_k, a.stride_m, a.stride_k, rows, cols, dst, ld);
    for (int64_t i = 0; i < rows; i++) pack_pair_rows(p + a.rows[m + i] * a.stride_m + k * a.stride_k, a.stride_m, a.stride_k, 1, cols, dst + i * ld, ld);
  });
}
inline void pack_b(const MatrixB& b, int64_t k, int64_t kc, int64_t n, int64_t nb, Pair* panels) {
  with_narrow(b.dtype, b.data, [&](auto* p) {
    pack_pair_panels(p + k * b.stride_k + n * b.stride_n, b.stride_k, b.stride_n, kc, nb, round_up(nb, kTileCols<float>), kPackAhead, panels, panel_stride(ceil_div(kc, 2)));
  });
}
#endif

// c += the product of R rows of A and one register tile's columns of panels, whose elements convert in registers.
template <int R, bool kFetch, class A, class S>
TZ_INLINE void multiply_panels(Tile<A, R>& c, const A* a, int64_t lda, const S* b0, const S* b1, int64_t kc, Fetch fetch) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < kc; k++) {
    if (kFetch) {
#pragma GCC unroll 8
      for (int64_t line = 0; line < kTileCols<A>; line += kPanel) prefetch_l2(fetch.at + line / kPanel * fetch.across);
      fetch.at += fetch.step;
    }
    const Vec<A> v0 = Vec<A>::load(b0), v1 = Vec<A>::load(b1);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      const Vec<A> s(a[i * lda + k]);
      c.c[i][0] = fma(s, v0, c.c[i][0]);
      c.c[i][1] = fma(s, v1, c.c[i][1]);
    }
    b0 += kPanel;
    b1 += kPanel;
  }
}

#if defined(__AVX512BF16__)
// The same with pairs; kc counts them.
template <int R, bool kFetch, class S>
TZ_INLINE void multiply_panels(Tile<float, R>& c, const Pair* a, int64_t lda, const S* b0, const S* b1, int64_t kc, Fetch fetch) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < kc; k++) {
    if (kFetch) {
      prefetch_l2(fetch.at);
      prefetch_l2(fetch.at + fetch.across);
      fetch.at += fetch.step;
    }
    const __m512i v0 = panel_pairs(b0), v1 = panel_pairs(b1);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      const __m512i s = _mm512_set1_epi32(static_cast<int>(a[i * lda + k].bits));
      c.c[i][0] = add_products(c.c[i][0], s, v0);
      c.c[i][1] = add_products(c.c[i][1], s, v1);
    }
    b0 += kPanel * sizeof(Pair) / sizeof(S);
    b1 += kPanel * sizeof(Pair) / sizeof(S);
  }
}
#endif

// C[mc rows] (+)= A times panels; column(j) is where column j of the panels begins. Meanwhile what fetch(j) says comes
// nearer, each register tile its share of it, so that memory is read while the multipliers work.
template <class P, class A, class Column, class Ahead>
inline void multiply_block(const P* packed_a, int64_t lda, int64_t mc, int64_t kc, int64_t nb, A* c, int64_t ldc, bool first, const Column& column,
                           const Ahead& ahead) {
  const int64_t tiles = ceil_div(mc, kTileRows);
  for (int64_t j = 0; j < nb; j += kTileCols<A>) {
    const auto *b0 = column(j), *b1 = column(j + Vec<A>::size);
    constexpr int64_t row_of_b = std::is_same_v<P, Pair> ? kPanel * static_cast<int64_t>(sizeof(Pair) / sizeof(*b0)) : kPanel;
    const Fetch fetch = ahead(j);
    int64_t t = 0;
    for_row_tiles(mc, [&](int64_t row, auto height) TZ_LAMBDA {
      constexpr int R = decltype(height)::value;
      Tile<A, R> tile;
      const P* a = packed_a + row * lda;
      A* at = c + row * ldc + j;
      tile.zero();
      const int64_t begin = fetch.at ? t * kc / tiles : kc, end = fetch.at ? (t + 1) * kc / tiles : kc;
      const Fetch share{fetch.at + begin * fetch.step, fetch.step, fetch.across};
      multiply_panels<R, false>(tile, a, lda, b0, b1, begin, share);
      multiply_panels<R, true>(tile, a + begin, lda, b0 + begin * row_of_b, b1 + begin * row_of_b, end - begin, share);
      multiply_panels<R, false>(tile, a + end, lda, b0 + end * row_of_b, b1 + end * row_of_b, kc - end, share);
      if (!first) tile.add(at, ldc);
      tile.store(at, ldc);
      t++;
    });
  }
}

// P is what the operands are packed as: A, or pairs, of which half as many cover K.
template <class P, class A>
inline void gemm_blocked(const MatrixA& a, int64_t m, int64_t rows, const MatrixB& b, int64_t n, int64_t nb, int64_t K, A* c,
                         int64_t ldc, bool accumulate) {
  constexpr int64_t each = std::is_same_v<P, Pair> ? 2 : 1;  // elements of K in one of P
  constexpr int64_t block = each * kBlockK;
  P* packed_a = scratch<P>(kSlotA, kBlockM * kBlockK);
  P* panels = scratch<P>(kSlotB, ceil_div(round_up(nb, max_of(kPanel, kTileCols<A>)), kPanel) * panel_stride(kBlockK));
  const int64_t size = size_of(b.dtype);
  for (int64_t k = 0; k < K; k += block) {
    const int64_t cols = min_of(block, K - k), kc = ceil_div(cols, each);
    pack_b(b, k, cols, n, nb, panels);
    for (int64_t i = 0; i < rows; i += kBlockM) {
      const int64_t mc = min_of(kBlockM, rows - i);
      pack_a(a, m + i, mc, k, cols, packed_a, kBlockK);
#if defined(__AVX512BF16__)
      if constexpr (std::is_same_v<P, Pair>)
        if (tiles() && kc % kTileEdge == 0) {
          multiply_tiles(packed_a, kBlockK, mc, kc, panels, panel_stride(kc), nb, c + i * ldc, ldc, k == 0 && !accumulate);
          continue;
        }
#endif
      const bool fetch = i == 0 && b.stride_n == 1 && k + cols < K;  // the rows of B that are packed next
      const char* rows = static_cast<const char*>(element(b.data, b.dtype, (k + cols) * b.stride_k + n));
      multiply_block(packed_a, kBlockK, mc, kc, nb, c + i * ldc, ldc, k == 0 && !accumulate,
                     [&](int64_t j) { return panels + j / kPanel * panel_stride(kc) + j % kPanel; },
                     [&](int64_t j) { return Fetch{fetch ? rows + j * size : nullptr, each * b.stride_k * size, each == 2 ? b.stride_k * size : kPanel * size}; });
    }
  }
}

// ---- dot: B contiguous along K -------------------------------------------------------------------------------

// The sums of four vectors.
TZ_INLINE void reduce_four(const Vec<float>* v, float* out) {
#if defined(__AVX512F__)
  __m256 y[4];
  for (int i = 0; i < 4; i++) y[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i].v), _mm512_extractf32x8_ps((__m512)v[i].v, 1));
#elif defined(__AVX2__)
  const __m256 y[4] = {(__m256)v[0].v, (__m256)v[1].v, (__m256)v[2].v, (__m256)v[3].v};
#endif
#if defined(__AVX2__)
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(y[0], y[1]), _mm256_hadd_ps(y[2], y[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#else
  for (int i = 0; i < 4; i++) out[i] = reduce_add(v[i]);
#endif
}
TZ_INLINE void reduce_four(const Vec<double>* v, double* out) {
  for (int i = 0; i < 4; i++) out[i] = reduce_add(v[i]);
}

#if defined(__AVX512F__)
constexpr int kDotTileRows = 6, kDotTileCols = 4;
#else
constexpr int kDotTileRows = 4, kDotTileCols = 3;
#endif

// Elements of K in a vector of packed A, which are multiplied as they are (float, double) or in pairs.
template <class P> constexpr int64_t kDotLanes = kVecBytes / static_cast<int64_t>(sizeof(P));

// A vector of n <= V elements of an operand as the products take them, by what A is packed as.
template <class A, class S> TZ_INLINE Vec<A> dot_operand(const A*, const S* p, int64_t n) { return load_n<A>(p, n); }
template <class A> TZ_INLINE Vec<A> add_products(Vec<A> sum, Vec<A> a, Vec<A> b) { return fma(a, b, sum); }
#if defined(__AVX512BF16__)
TZ_INLINE __m512i dot_operand(const bf16*, const bf16* p, int64_t n) { return pairs_of(p, n); }
#endif

// C[R, W] (+)= rows of a times rows of w, both contiguous along K; a is padded with zeros to whole vectors. U vectors
// of each row are summed apart, where few rows leave too few independent sums.
template <int R, int W, int U, class P, class S, class A>
TZ_INLINE void dot_tile(const P* a, int64_t lda, const S* w, int64_t ldw, int64_t K, Fetch fetch, A* c, int64_t ldc, bool accumulate) {
  constexpr int64_t V = kDotLanes<P>;
  using Operand = decltype(dot_operand(a, w, V));
  Vec<A> sum[R][W][U];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < W; j++)
#pragma GCC unroll 8
      for (int u = 0; u < U; u++) sum[i][j][u] = Vec<A>::zero();
  const auto step = [&](int64_t k, int u, const Operand* v) TZ_LAMBDA {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      const Operand x = dot_operand(a, a + i * lda + k, V);
#pragma GCC unroll 8
      for (int j = 0; j < W; j++) sum[i][j][u] = add_products(sum[i][j][u], x, v[j]);
    }
  };
  int64_t k = 0;
  for (; k + U * V <= K; k += U * V) {
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) {
      prefetch_l2(fetch.at);
      fetch.at += fetch.step;
      Operand v[W];
#pragma GCC unroll 8
      for (int j = 0; j < W; j++) v[j] = dot_operand(a, w + j * ldw + k + u * V, V);
      step(k + u * V, u, v);
    }
  }
  for (; k < K; k += V) {
    Operand v[W];
    for (int j = 0; j < W; j++) v[j] = dot_operand(a, w + j * ldw + k, K - k);
    step(k, 0, v);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) {
    Vec<A> total[4] = {Vec<A>::zero(), Vec<A>::zero(), Vec<A>::zero(), Vec<A>::zero()};
#pragma GCC unroll 8
    for (int j = 0; j < W; j++) {
      total[j] = sum[i][j][0];
#pragma GCC unroll 8
      for (int u = 1; u < U; u++) total[j] = total[j] + sum[i][j][u];
    }
    A out[4];
    reduce_four(total, out);
    for (int j = 0; j < W; j++) c[i * ldc + j] = accumulate ? c[i * ldc + j] + out[j] : out[j];
  }
}

template <class P, class S, class A>
inline void dot_rows(const P* a, int64_t lda, int64_t rows, const S* w, int64_t ldw, int64_t nb, int64_t K, A* c, int64_t ldc,
                     bool accumulate) {
  constexpr int64_t step = kDotLanes<P> * static_cast<int64_t>(sizeof(S));
  const auto address = [&](int64_t j) { return reinterpret_cast<const char*>(w + j * ldw); };
  if (rows <= kStreamRows) {
    call_with_rows<kStreamRows>(rows, 0, [&](int64_t, auto height) TZ_LAMBDA {
      constexpr int R = decltype(height)::value;
      for (int64_t j = 0; j < nb; j++) dot_tile<R, 1, R == 1 ? 8 : R == 2 ? 4 : 2>(a, lda, w + j * ldw, ldw, K, Fetch{address(j) + kStreamAhead, step, 0}, c + j, ldc, accumulate);
    });
    return;
  }
  constexpr int W = kDotTileCols;
  const int64_t tiles = ceil_div(rows, kDotTileRows), share = W * step / tiles;  // each tile fetches its part of later rows
  const int64_t block = max_of(kDotMinK, round_up(kDotCache / rows, 64));
  for (int64_t k = 0; k < K; k += block) {
    const int64_t kc = min_of(block, K - k);
    const bool add = accumulate || k > 0;
    for (int64_t j = 0; j < nb; j += W) {
      int64_t tile = 0;
      for_row_tiles<kDotTileRows>(rows, [&](int64_t row, auto height) TZ_LAMBDA {
        constexpr int R = decltype(height)::value;
        const int64_t part = tile++ * W * kc / tiles;
        const Fetch fetch{address(j + 2 * W + part / kc) + (k + part % kc) * static_cast<int64_t>(sizeof(S)), share, 0};
        const P* x = a + row * lda + k;
        const S* y = w + j * ldw + k;
        A* out = c + row * ldc + j;
        if (nb - j >= W) return dot_tile<R, W, 1>(x, lda, y, ldw, kc, fetch, out, ldc, add);
        for (int64_t i = 0; i < nb - j; i++) dot_tile<R, 1, 1>(x, lda, y + i * ldw, ldw, kc, fetch, out + i, ldc, add);  // same order
      });
    }
  }
}

template <class A>
inline void gemm_dot(const MatrixA& a, int64_t m, int64_t rows, const MatrixB& b, int64_t n, int64_t nb, int64_t K, A* c, int64_t ldc,
                     bool accumulate) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<A, float>)
    if (in_pairs(a, b) && b.dtype == DType::bf16) {
      const int64_t ld = round_up(K, 2 * kPairs) / 2 + kPanel;
      Pair* pairs = scratch<Pair>(kSlotA, rows * ld);
      pack_a(a, m, rows, 0, K, pairs, ld);
      const bf16* w = static_cast<const bf16*>(b.data) + n * b.stride_n;
      return dot_rows(reinterpret_cast<const bf16*>(pairs), 2 * ld, rows, w, b.stride_n, nb, K, c, ldc, accumulate);
    }
#endif
  const int64_t padded = round_up(K, Vec<A>::size), lda = padded + kPanel;
  A* packed = scratch<A>(kSlotA, rows * lda);
  pack_a(a, m, rows, 0, K, packed, lda);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t k = K; k < padded; k++) packed[i * lda + k] = A(0);
  with_type(b.dtype, [&](auto t) {
    const auto* w = static_cast<const decltype(t)*>(b.data) + n * b.stride_n;
    dot_rows(packed, lda, rows, w, b.stride_n, nb, K, c, ldc, accumulate);
  });
}

// ---- swapped: B contiguous along K, more rows ------------------------------------------------------------------
// W = B^T has a row for each column of C. What dot products read again for every four or six rows of W, all of A, is here read for every
// kTileRows of it, and no lanes are added up; against `blocked`, W is neither transposed nor copied.

// Rows [m, m + rows) x columns [k, k + kc) of A -> panels of kTileCols rows, `stride` apart; rows up to a whole panel are zero.
template <class A>
inline void pack_row_panels(const MatrixA& a, int64_t m, int64_t rows, int64_t k, int64_t kc, A* panels, int64_t stride) {
  constexpr int64_t C = kTileCols<A>;
  for (int64_t p = 0; p < rows; p += C, panels += stride) {
    const int64_t valid = min_of(C, rows - p);
    if (valid < C) std::memset(panels, 0, static_cast<size_t>(kc * C) * sizeof(A));
    if (!a.rows) {
      load_tile<A>(a.dtype, a.data, (m + p) * a.stride_m + k * a.stride_k, a.stride_k, a.stride_m, kc, valid, panels, C);
    } else {
      A* gathered = scratch<A>(kSlotA, C * kc);
      pack_a(a, m + p, valid, k, kc, gathered, kc);
      load_tile<A>(gathered, 1, kc, kc, valid, panels, C);
    }
  }
}

#if defined(__AVX512BF16__)
// The same in pairs.
inline void pack_row_panels(const MatrixA& a, int64_t m, int64_t rows, int64_t k, int64_t kc, Pair* panels, int64_t stride) {
  if (!a.rows)
    return with_narrow(a.dtype, a.data, [&](auto* p) {
      pack_pair_panels(p + m * a.stride_m + k * a.stride_k, a.stride_k, a.stride_m, kc, rows, round_up(rows, kPanel), 0, panels, stride);
    });
  const int64_t ld = round_up(kc, 2 * kPairs) / 2;
  Pair* gathered = scratch<Pair>(kSlotA, kPanel * ld);
  for (int64_t p = 0; p < rows; p += kPanel, panels += stride) {
    const int64_t valid = min_of(kPanel, rows - p);
    pack_a(a, m + p, valid, k, kc, gathered, ld);
    pack_pair_panels(reinterpret_cast<const bf16*>(gathered), 1, 2 * ld, kc, valid, kPanel, 0, panels, stride);
  }
}
#endif

// t[R, a panel's rows] (+)= R rows of w times the panel. Meanwhile the stored rows [fetch, end), `step` bytes apart, of elements of `size`
// bytes, come into the second-level cache.
template <int R, class A>
TZ_INLINE void swapped_tile(const A* w, int64_t ldw, const A* panel, int64_t kc, A* t, int64_t ldt, bool add, const char* fetch, const char* end, int64_t step, int64_t size) {
  constexpr int64_t V = Vec<A>::size, line = 64 / static_cast<int64_t>(sizeof(A));
  Tile<A, R> sum;
  sum.zero();
  const auto term = [&](int64_t k) TZ_LAMBDA {
    const Vec<A> x0 = Vec<A>::load(panel + k * 2 * V), x1 = Vec<A>::load(panel + k * 2 * V + V);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      const Vec<A> s(w[i * ldw + k]);
      sum.c[i][0] = fma(s, x0, sum.c[i][0]);
      sum.c[i][1] = fma(s, x1, sum.c[i][1]);
    }
  };
  int64_t k = 0;
  for (; k + line <= kc; k += line) {
    for (const char* row = fetch; row < end; row += step) prefetch_l2(row + k * size);
#pragma GCC unroll 8
    for (int64_t u = 0; u < line; u++) term(k + u);
  }
  for (; k < kc; k++) term(k);
  if (add) sum.add(t, ldt);
  sum.store(t, ldt);
}

// C[rows, height] (+)= rows of x, padded with zeros to whole vectors, times rows of w, which are in a cache: what doesn't fill a panel.
template <class A>
__attribute__((noinline)) void dot_rest(const A* x, int64_t ldx, int64_t rows, const A* w, int64_t ldw, int64_t height, int64_t kc, A* c, int64_t ldc, bool add) {
  constexpr int W = kDotTileCols;
  for_row_tiles<kDotTileRows>(rows, [&](int64_t row, auto tall) TZ_LAMBDA {
    constexpr int R = decltype(tall)::value;
    const A* at = x + row * ldx;
    int64_t j = 0;
    for (; j + W <= height; j += W) dot_tile<R, W, 1>(at, ldx, w + j * ldw, ldw, kc, Fetch{reinterpret_cast<const char*>(w), 0, 0}, c + row * ldc + j, ldc, add);
    for (; j < height; j++) dot_tile<R, 1, 1>(at, ldx, w + j * ldw, ldw, kc, Fetch{reinterpret_cast<const char*>(w), 0, 0}, c + row * ldc + j, ldc, add);
  });
}

template <class A, class S>
inline void swapped_rows(const MatrixA& a, int64_t m, int64_t rows, const S* w, int64_t ldw, int64_t nb, int64_t K, A* c, int64_t ldc, bool accumulate) {
  constexpr int64_t C = kTileCols<A>, size = sizeof(S), block = kSwapBytes / static_cast<int64_t>(sizeof(A)), stride = (block + 1) * C, ld = block + kPanel;
  const int64_t left = rows % C, rest = 8 * left < 7 * C ? left : 0, filled = rows - rest;  // a panel that is nearly full is worth filling up
  const int64_t panels = ceil_div(filled, C), ldt = panels * C;
  A* x = scratch<A>(kSlotB, panels * stride + rest * ld);
  A* x_rest = x + panels * stride;
  A* t = scratch<A>(kSlotTurned, nb * ldt);
  if (accumulate) load_tile<A>(c, 1, ldc, nb, filled, t, ldt);
  for (int64_t k = 0; k < K; k += block) {
    const int64_t kc = min_of(block, K - k);
    const bool add = k > 0 || accumulate;
    pack_row_panels(a, m, filled, k, kc, x, stride);
    pack_a(a, m + filled, rest, k, kc, x_rest, ld);
    for (int64_t i = 0; i < rest; i++)
      for (int64_t u = kc; u < round_up(kc, Vec<A>::size); u++) x_rest[i * ld + u] = A(0);
    A* converted = std::is_same_v<A, S> ? nullptr : scratch<A>(kSlotA, kTileRows * ld);
    for_row_tiles(nb, [&](int64_t row, auto height) TZ_LAMBDA {
      constexpr int R = decltype(height)::value;
      const S* stored = w + row * ldw + k;
      const auto run = [&](const A* from, int64_t ldf) TZ_LAMBDA {
        const char* next = reinterpret_cast<const char*>(stored + R * ldw);  // its rows are shared out to the panels
        for (int64_t p = 0; p < panels; p++) {
          const char *fetch = next + R * p / panels * ldw * size, *end = next + R * (p + 1) / panels * ldw * size;
          for (int64_t part = 0; part < kc; part += kBlockK)
            swapped_tile<R>(from + part, ldf, x + p * stride + part * C, min_of(kBlockK, kc - part), t + row * ldt + p * C, ldt, part > 0 || add,
                            fetch + part * size, end + part * size, ldw * size, size);
        }
        if (rest > 0) dot_rest(x_rest, ld, rest, from, ldf, R, kc, c + filled * ldc + row, ldc, add);
      };
      if constexpr (std::is_same_v<A, S>) {
        run(stored, ldw);
      } else {
        load_tile<A>(stored, ldw, 1, R, kc, converted, ld);
        run(converted, ld);
      }
    });
  }
  load_tile<A>(t, 1, ldt, filled, nb, c, ldc);
}

#if defined(__AVX512BF16__)
// By tiles: 32 rows of W where they lie times 32 rows of A, a panel of whose pairs is a tile's other operand.
inline void swapped_tiles(const MatrixA& a, int64_t m, int64_t rows, const bf16* w, int64_t ldw, int64_t nb, int64_t K, float* c, int64_t ldc, bool accumulate) {
  constexpr int64_t unit = 2 * kTileEdge;
  const int64_t panels = ceil_div(rows, kTileEdge), block = min_of(K, kSwapTiles / (panels * kTileEdge) / unit * unit), stride = panel_stride(block / 2);
  Pair* x = scratch<Pair>(kSlotB, panels * stride);
  bf16* edge = scratch<bf16>(kSlotTurned, unit * block);
  for (int64_t k = 0; k < K; k += block) {
    const int64_t kc = min_of(block, K - k);
    pack_row_panels(a, m, rows, k, kc, x, stride);
    multiply_stored(w + k, ldw, nb, kc, x, stride, rows, edge, c, ldc, k == 0 && !accumulate);
  }
}
#endif

template <class A>
inline void gemm_swapped(const MatrixA& a, int64_t m, int64_t rows, const MatrixB& b, int64_t n, int64_t nb, int64_t K, A* c, int64_t ldc, bool accumulate) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<A, float>)
    if (b.dtype == DType::bf16 && in_pairs(a, b)) return swapped_tiles(a, m, rows, static_cast<const bf16*>(b.data) + n * b.stride_n, b.stride_n, nb, K, c, ldc, accumulate);
#endif
  with_type(b.dtype, [&](auto t) {
    using S = decltype(t);
    if constexpr (std::is_same_v<A, double> == std::is_same_v<S, double>)
      swapped_rows(a, m, rows, static_cast<const S*>(b.data) + n * b.stride_n, b.stride_n, nb, K, c, ldc, accumulate);
  });
}

// ---- axpy: B contiguous along N ------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kAxpyTileRows = 4;
#else
constexpr int kAxpyTileRows = 2;
#endif
constexpr int kAxpyTileK = 4;

// c[R, nb] += a[R, F] w[F, nb]. Meanwhile kFetch rows of `fetch`, as far apart as w's, are fetched.
template <int R, int F, int kFetch, class A, class S>
TZ_INLINE void axpy_tile(const A* a, int64_t lda, const S* w, int64_t ldw, int64_t nb, const S* fetch, A* c, int64_t ldc) {
  constexpr int64_t V = Vec<A>::size;
  Vec<A> factor[R][F];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int f = 0; f < F; f++) factor[i][f] = Vec<A>(a[i * lda + f]);
  const auto step = [&](int64_t j, const Vec<A>* v) TZ_LAMBDA {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      Vec<A> sum = factor[i][0] * v[0];
#pragma GCC unroll 8
      for (int f = 1; f < F; f++) sum = fma(factor[i][f], v[f], sum);
      (Vec<A>::load(c + i * ldc + j) + sum).store(c + i * ldc + j);
    }
  };
  int64_t j = 0;
  for (; j + V <= nb; j += V) {
    if (j * static_cast<int64_t>(sizeof(S)) % 64 == 0) {
#pragma GCC unroll 8
      for (int f = 0; f < kFetch; f++) prefetch_l2(fetch + f * ldw + j);
    }
    Vec<A> v[F];
#pragma GCC unroll 8
    for (int f = 0; f < F; f++) v[f] = Vec<A>::load(w + f * ldw + j);
    step(j, v);
  }
  if (j < nb) {  // c has room for a whole vector
    Vec<A> v[F];
    for (int f = 0; f < F; f++) v[f] = load_n<A>(w + f * ldw + j, nb - j);
    step(j, v);
  }
}

// F rows of w; the tiles share out the F rows after the next F.
template <int F, class A, class S>
TZ_INLINE void axpy_rows(const A* a, int64_t lda, int64_t rows, const S* w, int64_t ldw, int64_t nb, A* c, int64_t ldc) {
  const int64_t tiles = ceil_div(rows, kAxpyTileRows);
  int64_t t = 0;
  for_row_tiles<kAxpyTileRows>(rows, [&](int64_t row, auto height) TZ_LAMBDA {
    constexpr int R = decltype(height)::value;
    const S* fetch = w + (2 * F + t++ * F / tiles) * ldw;
    if (tiles == 1) axpy_tile<R, F, F>(a + row * lda, lda, w, ldw, nb, fetch, c + row * ldc, ldc);
    else axpy_tile<R, F, (F + 1) / 2>(a + row * lda, lda, w, ldw, nb, fetch, c + row * ldc, ldc);
  });
}

template <class A>
inline void gemm_axpy(const MatrixA& a, int64_t m, int64_t rows, const MatrixB& b, int64_t n, int64_t nb, int64_t K, A* c, int64_t ldc,
                      bool accumulate) {
  A* packed = scratch<A>(kSlotA, rows * K);
  pack_a(a, m, rows, 0, K, packed, K);
  if (!accumulate)
    for (int64_t i = 0; i < rows; i++) std::memset(c + i * ldc, 0, static_cast<size_t>(round_up(nb, Vec<A>::size)) * sizeof(A));
  with_type(b.dtype, [&](auto t) {
    const auto* w = static_cast<const decltype(t)*>(b.data) + n;
    int64_t k = 0;
    for (; k + kAxpyTileK <= K; k += kAxpyTileK) axpy_rows<kAxpyTileK>(packed + k, K, rows, w + k * b.stride_k, b.stride_k, nb, c, ldc);
    for (; k < K; k++) axpy_rows<1>(packed + k, K, rows, w + k * b.stride_k, b.stride_k, nb, c, ldc);
  });
}

// ---- panels: B packed before the call ------------------------------------------------------------------------

// Few rows read each panel from end to end, one sequential stream a register tile; U sums hide the multiplier's latency.
template <int R, int U, class A, class S>
TZ_INLINE void panel_stream(const A* a, int64_t lda, const S* b0, const S* b1, int64_t K, int64_t across, A* c, int64_t ldc) {
  for (int64_t begin = 0; begin < K; begin += U * kBlockK) {
    const int64_t end = min_of(K, begin + U * kBlockK);
    Tile<A, R> sum[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) sum[u].zero();
    int64_t k = begin;
    for (; k + U <= end; k += U)
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) {
        const Fetch fetch{reinterpret_cast<const char*>(b0 + (k + u) * kPanel) + kStreamAhead, 0, across};
        multiply_panels<R, true>(sum[u], a + k + u, lda, b0 + (k + u) * kPanel, b1 + (k + u) * kPanel, 1, fetch);
      }
    multiply_panels<R, false>(sum[0], a + k, lda, b0 + k * kPanel, b1 + k * kPanel, end - k, Fetch{});
#pragma GCC unroll 4
    for (int u = 1; u < U; u++)
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        sum[0].c[i][0] = sum[0].c[i][0] + sum[u].c[i][0];
        sum[0].c[i][1] = sum[0].c[i][1] + sum[u].c[i][1];
      }
    if (begin > 0) sum[0].add(c, ldc);
    sum[0].store(c, ldc);
  }
}

// P is what A is packed as: what the panels are, or pairs.
template <class P, class A, class S>
inline void panel_blocks(const MatrixA& a, int64_t m, int64_t rows, const S* panels, int64_t panel, int64_t n, int64_t nb, int64_t K, A* c, int64_t ldc) {
  constexpr int64_t each = std::is_same_v<P, Pair> ? 2 : 1, block = each * kBlockK, size = sizeof(S);
  const auto column = [&](int64_t j, int64_t k) { return panels + (n + j) / kPanel * panel + k * kPanel + (n + j) % kPanel; };
  P* packed = scratch<P>(kSlotA, kBlockM * kBlockK);
  for (int64_t k = 0; k < K; k += block) {
    const int64_t cols = min_of(block, K - k);
    for (int64_t i = 0; i < rows; i += kBlockM) {
      const int64_t mc = min_of(kBlockM, rows - i);
      pack_a(a, m + i, mc, k, cols, packed, kBlockK);
      const auto ahead = [&](int64_t j) {  // the block to the right, then the one below
        const S* next = j + kTileCols<A> < nb ? column(j + kTileCols<A>, k) : k + cols < K ? column(0, k + cols) : nullptr;
        return Fetch{i == 0 ? reinterpret_cast<const char*>(next) : nullptr, each * kPanel * size, panel * size};
      };
      multiply_block(packed, kBlockK, mc, ceil_div(cols, each), nb, c + i * ldc, ldc, k == 0, [&](int64_t j) { return column(j, k); }, ahead);
    }
  }
}

#if defined(__AVX512BF16__)
// By tiles: rows k and k + 1 of the panels become pairs, once for all rows of A.
inline void panel_tiles(const MatrixA& a, int64_t m, int64_t rows, const bf16* panels, int64_t panel, int64_t n, int64_t nb, int64_t K, float* c, int64_t ldc) {
  Pair* packed = scratch<Pair>(kSlotA, kBlockM * kBlockK);
  Pair* paired = scratch<Pair>(kSlotB, round_up(nb, kTileCols<float>) / kPanel * panel_stride(kBlockK));
  for (int64_t k = 0; k < K; k += 2 * kBlockK) {
    const int64_t cols = min_of(2 * kBlockK, K - k), kc = cols / 2, stride = panel_stride(kc);
    for (int64_t j = 0; j < nb; j += kPanel) {
      const bf16* from = panels + (n + j) / kPanel * panel + k * kPanel;
      for (int64_t pair = 0; pair < kc; pair++) _mm512_storeu_si512(paired + j / kPanel * stride + pair * kPanel, panel_pairs(from + 2 * pair * kPanel));
    }
    const int64_t filled = ceil_div(nb, kPanel);
    if (filled % 2) std::memset(paired + filled * stride, 0, static_cast<size_t>(kc * kPanel) * sizeof(Pair));
    for (int64_t i = 0; i < rows; i += kBlockM) {
      const int64_t mc = min_of(kBlockM, rows - i);
      pack_a(a, m + i, mc, k, cols, packed, kBlockK);
      multiply_tiles(packed, kBlockK, mc, kc, paired, stride, nb, c + i * ldc, ldc, k == 0);
    }
  }
}
#endif

template <class A, class S>
inline void panel_rows(const MatrixA& a, int64_t m, int64_t rows, const S* panels, int64_t panel, int64_t n, int64_t nb, int64_t K, A* c, int64_t ldc) {
  const auto column = [&](int64_t j, int64_t k) { return panels + (n + j) / kPanel * panel + k * kPanel + (n + j) % kPanel; };
  constexpr int64_t size = sizeof(S);
  if (rows <= kTileRows) {
    A* packed = scratch<A>(kSlotA, rows * K);
    pack_a(a, m, rows, 0, K, packed, K);
    call_with_rows<kTileRows>(rows, 0, [&](int64_t, auto height) TZ_LAMBDA {
      constexpr int R = decltype(height)::value;
      for (int64_t j = 0; j < nb; j += kTileCols<A>)
        panel_stream<R, R == 1 ? 4 : R <= 3 ? 2 : 1>(packed, K, column(j, 0), column(j + Vec<A>::size, 0), K, panel * size, c + j, ldc);
    });
    return;
  }
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<S, bf16>)  // an odd K's last pair would reach into the next panel
    if (K % 2 == 0 && in_pairs(a, {DType::bf16, panels, 0, 0})) {
      if (tiles() && rows >= kRowsForTiles && K % (2 * kTileEdge) == 0) return panel_tiles(a, m, rows, panels, panel, n, nb, K, c, ldc);
      return panel_blocks<Pair>(a, m, rows, panels, panel, n, nb, K, c, ldc);
    }
#endif
  panel_blocks<A>(a, m, rows, panels, panel, n, nb, K, c, ldc);
}

template <class A>
inline void gemm_panels(const MatrixA& a, int64_t m, int64_t rows, const MatrixB& b, int64_t n, int64_t nb, int64_t K, A* c, int64_t ldc) {
  const auto run = [&](auto t) {
    using S = decltype(t);
    if constexpr (std::is_same_v<A, double> == std::is_same_v<S, double>)  // float64 goes with float64 only
      panel_rows(a, m, rows, static_cast<const S*>(b.data), b.panel, n, nb, K, c, ldc);
  };
  if (b.int8) run(int8_t{});
  else with_type(b.dtype, run);
  for (int64_t i = 0; i < rows && b.scale; i++)
    for (int64_t j = 0; j < nb; j += Vec<A>::size) (Vec<A>::load(c + i * ldc + j) * load_n<A>(b.scale + n + j, nb - j)).store(c + i * ldc + j);
}

// ---- one block, and the blocks of a call ---------------------------------------------------------------------

// C[rows, nb] (+)= A[m, m + rows) B[:, n, n + nb). c has room for round_up(nb, kTileCols<A>)
// columns, of which those beyond nb are undefined afterwards.
template <class A>
inline void gemm_block(GemmWay way, const MatrixA& a, int64_t m, int64_t rows, const MatrixB& b, int64_t n, int64_t nb, int64_t K, A* c,
                       int64_t ldc, bool accumulate = false) {
  switch (way) {
    case GemmWay::blocked:
#if defined(__AVX512BF16__)
      if constexpr (std::is_same_v<A, float>)
        if (in_pairs(a, b)) return gemm_blocked<Pair>(a, m, rows, b, n, nb, K, c, ldc, accumulate);
      if (rows <= kDotRows / 2 && dot_rows_of(b.dtype) < rows && K > 1 && b.stride_k == 1) return gemm_dot(a, m, rows, b, n, nb, K, c, ldc, accumulate);
#endif
      return gemm_blocked<A>(a, m, rows, b, n, nb, K, c, ldc, accumulate);
    case GemmWay::dot: return gemm_dot(a, m, rows, b, n, nb, K, c, ldc, accumulate);
    case GemmWay::swapped: return gemm_swapped(a, m, rows, b, n, nb, K, c, ldc, accumulate);
    case GemmWay::axpy: return gemm_axpy(a, m, rows, b, n, nb, K, c, ldc, accumulate);
    case GemmWay::panels: return gemm_panels(a, m, rows, b, n, nb, K, c, ldc);  // products of the forward: never accumulated
  }
}

// N columns in blocks of whole register tiles, as equal as those allow.
constexpr int64_t kColumnUnit = 2 * kPanel;
struct ColumnBlocks {
  int64_t N, count;
  int64_t begin(int64_t i) const { return min_of(N, ceil_div(N, kColumnUnit) * i / count * kColumnUnit); }
  int64_t width(int64_t i) const { return begin(i + 1) - begin(i); }
};
// About `width` columns a block, cut so that few groups still give every thread equal work.
inline ColumnBlocks cut_columns(int64_t N, int64_t width, int64_t groups) {
  const int64_t threads = max_threads(), units = ceil_div(N, kColumnUnit);
  int64_t blocks = ceil_div(units, width / kColumnUnit);
  if (groups * blocks < 32 * threads) blocks = round_up(blocks, threads);
  return {N, min_of(blocks, units)};
}

// fn(task) for every task below n, each thread taking the next one: uneven tasks keep every core busy. Work below
// kSerialWork multiply-adds stays on the calling thread.
constexpr int64_t kSerialWork = 200000;
template <class F> inline void run_tasks(int64_t n, int64_t multiply_adds, const F& fn) {
  if (n <= 1 || multiply_adds < kSerialWork) {
    for (int64_t t = 0; t < n; t++) fn(t);
    return;
  }
  int64_t next = 0;
  parallel_for(0, min_of(n, max_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      for (int64_t t; (t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < n;) fn(t);
  });
}

// Rows of a block of C: what stays in a second-level cache while kBlockK rows of B pass by, or beside their panels.
constexpr int64_t kBlockRows = 512;
inline int64_t block_rows(GemmWay way) { return way == GemmWay::swapped ? kSwapRows : kBlockRows; }

// The rows of consecutive groups: group e has the rows [e ? ends[e - 1] : 0, ends[e]).
struct Groups {
  int64_t E;
  const int32_t* ends;
  int64_t begin(int64_t e) const { return e ? ends[e - 1] : 0; }
  int64_t rows(int64_t e) const { return ends[e] - begin(e); }
  int64_t total() const { return E ? ends[E - 1] : 0; }
};

// One group's share of the tasks of a call.
struct GroupTasks {
  int64_t group, rows, row_blocks, first;
  ColumnBlocks columns;
};

// Columns of a block by packing: A is packed once for each, so the more the better, while kBlockRows rows of C and the panels stay
// in a second-level cache (0.8 or 1.6 MB).
inline int64_t packed_width() { return second_level_cache() >= (2 << 20) ? 512 : 256; }

// A block has about packed_width() columns by packing; fewer by dot products, whose rows of B are contiguous each; by swapping, which packs
// A for each, as many as keep C in a second-level cache; by axpy in a first-level cache.
inline int64_t usual_width(GemmWay way, int64_t rows) {
  if (way == GemmWay::swapped) return min_of(1024, max_of((1 << 18) / rows, 256));
  if (way == GemmWay::axpy) return min_of(1024, max_of(8192 / rows, 256));
  return way == GemmWay::dot ? 96 : packed_width();
}

// fn(e, first row, rows, first column, columns, way) over blocks that cover each group's rows x N columns, in parallel,
// large groups first. `b` (any one of the groups' matrices) decides the way of a group by its number of rows.
template <class F> inline void for_blocks(const Groups& groups, int64_t N, int64_t K, const MatrixB& b, int slot, const F& fn) {
  GroupTasks* table = scratch<GroupTasks>(slot, groups.E);
  int64_t active = 0, tasks = 0;
  for (int64_t e = 0; e < groups.E; e++) {
    const int64_t rows = groups.rows(e);
    if (rows == 0) continue;
    int64_t at = active++;
    for (; at > 0 && table[at - 1].rows < rows; at--) table[at] = table[at - 1];
    table[at] = {e, rows, 0, 0, {}};
  }
  for (int64_t i = 0; i < active; i++) {
    GroupTasks& g = table[i];
    const GemmWay way = gemm_way(g.rows, K, N, b);
    g.row_blocks = ceil_div(g.rows, block_rows(way));
    g.columns = cut_columns(N, usual_width(way, ceil_div(g.rows, g.row_blocks)), active * g.row_blocks);
    g.first = tasks;
    tasks += g.row_blocks * g.columns.count;
  }
  run_tasks(tasks, groups.total() * N * K, [&](int64_t task) {
    int64_t i = active - 1;
    while (table[i].first > task) i--;
    const GroupTasks& g = table[i];
    const int64_t block = task - g.first, r = block / g.columns.count, c = block % g.columns.count;
    const int64_t height = ceil_div(g.rows, g.row_blocks), row = r * height;
    fn(g.group, groups.begin(g.group) + row, min_of(height, g.rows - row), g.columns.begin(c), g.columns.width(c), gemm_way(g.rows, K, N, b));
  });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
