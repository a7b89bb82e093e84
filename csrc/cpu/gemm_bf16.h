// Products of bfloat16 in AVX512-BF16: vdpbf16ps adds two products of bfloat16 to a float32 sum, twice the multiply-adds of float32,
// and nothing is converted. It takes subnormal numbers for zero. Operands are pairs of elements k, k + 1; an odd K ends with a zero.
//
// Here is what gemm.h's ways need of pairs: packing either operand from any strides (float32 is rounded where its MatrixA or
// MatrixB says so), reading panels, and adding products.
#pragma once
#include "gemm_tile.h"
#include "tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

struct Pair { uint32_t bits; };

#if defined(__AVX512BF16__)

constexpr int64_t kPairs = 16;  // in a vector

TZ_INLINE __mmask32 first(int64_t n) { return n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1; }

// The pairs of 32 consecutive elements; those from n on are zero.
TZ_INLINE __m512i pairs_of(const bf16* p, int64_t n) { return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(first(n), p); }
TZ_INLINE __m512i pairs_of(const float* p, int64_t n) {
  const __mmask32 m = first(n);
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(m >> 16, p + 16), _mm512_maskz_loadu_ps(static_cast<__mmask16>(m), p));
}
// The first n of 16 consecutive elements.
TZ_INLINE __m256i words_of(const bf16* p, int64_t n) { return n >= 16 ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(static_cast<__mmask16>(first(n)), p); }
TZ_INLINE __m256i words_of(const float* p, int64_t n) { return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(static_cast<__mmask16>(first(n)), p)); }

// Two rows of 16, one behind the other, as 16 pairs.
TZ_INLINE __m512i interleave(__m512i rows) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, rows);
}
// Elements k, k + 1 of x = 0..15, which lie side by side.
template <class S> TZ_INLINE __m512i pairs_across(const S* p, int64_t stride_k, int64_t k, int64_t kc, int64_t valid) {
  const __m256i low = words_of(p + k * stride_k, valid), high = k + 1 < kc ? words_of(p + (k + 1) * stride_k, valid) : _mm256_setzero_si256();
  return interleave(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}
template <class S> TZ_INLINE uint32_t word(const S* p) {
  bf16 v;
  from_acc(to_acc(*p), &v);
  return v.bits;
}
template <class S> TZ_INLINE Pair pair_at(const S* p, int64_t stride_k, int64_t k, int64_t kc) {
  return {word(p + k * stride_k) | (k + 1 < kc ? word(p + (k + 1) * stride_k) << 16 : 0u)};
}
TZ_INLINE void transpose_pairs(__m512i* m) { transpose(reinterpret_cast<Vec<float>*>(m)); }

// Rows x = 0..rows of kc elements -> dst[x * ld + pair], up to a whole vector of pairs.
template <class S> inline void pack_pair_rows(const S* src, int64_t stride_x, int64_t stride_k, int64_t rows, int64_t kc, Pair* dst, int64_t ld) {
  if (stride_k == 1) {
    for (int64_t x = 0; x < rows; x++)
      for (int64_t k = 0; k < kc; k += 2 * kPairs) _mm512_storeu_si512(dst + x * ld + k / 2, pairs_of(src + x * stride_x + k, kc - k));
    return;
  }
  for (int64_t x = 0; x < rows; x += kPairs) {
    const int64_t valid = min_of(kPairs, rows - x);
    for (int64_t k = 0; k < kc; k += 2 * kPairs) {
      if (stride_x == 1) {
        __m512i m[kPairs];
        for (int64_t i = 0; i < kPairs; i++) m[i] = k + 2 * i < kc ? pairs_across(src + x, stride_k, k + 2 * i, kc, valid) : _mm512_setzero_si512();
        transpose_pairs(m);
        for (int64_t i = 0; i < valid; i++) _mm512_storeu_si512(dst + (x + i) * ld + k / 2, m[i]);
      } else {
        for (int64_t i = 0; i < valid; i++)
          for (int64_t pair = 0; pair < kPairs; pair++)
            dst[(x + i) * ld + k / 2 + pair] = k + 2 * pair < kc ? pair_at(src + (x + i) * stride_x, stride_k, k + 2 * pair, kc) : Pair{0};
      }
    }
  }
}

// kc x nb elements -> panels of kPanel columns, `stride` pairs apart: dst[panel * stride + pair * kPanel + column]; columns from nb on are zero.
template <class S>
inline void pack_pair_panels(const S* src, int64_t stride_k, int64_t stride_x, int64_t kc, int64_t nb, int64_t columns, int64_t ahead, Pair* dst, int64_t stride) {
  static_assert(kPanel == kPairs, "a panel's row is one vector");
  if (stride_x == 1) {
    for (int64_t k = 0; k < kc; k += 2)
      for (int64_t j = 0; j < columns; j += kPanel) {
        prefetch_l2(src + (k + ahead) * stride_k + j);
        prefetch_l2(src + (k + 1 + ahead) * stride_k + j);
        _mm512_storeu_si512(dst + j / kPanel * stride + k / 2 * kPanel, pairs_across(src + j, stride_k, k, kc, max_of(nb - j, 0)));
      }
    return;
  }
  for (int64_t j = 0; j < columns; j += kPanel, dst += stride) {
    const int64_t valid = min_of(kPanel, max_of(nb - j, 0));
    for (int64_t k = 0; k < kc; k += 2 * kPairs) {
      const int64_t pairs = min_of(kPairs, ceil_div(kc - k, 2));
      __m512i m[kPairs];
      for (int64_t x = 0; x < kPanel; x++) {
        const S* column = src + (j + x) * stride_x;
        if (x >= valid) {
          m[x] = _mm512_setzero_si512();
        } else if (stride_k == 1) {
          prefetch_l2(column + kPanel * stride_x + k);
          m[x] = pairs_of(column + k, kc - k);
        } else {
          alignas(64) Pair one[kPairs];
          for (int64_t pair = 0; pair < kPairs; pair++) one[pair] = pair < pairs ? pair_at(column, stride_k, k + 2 * pair, kc) : Pair{0};
          m[x] = _mm512_load_si512(one);
        }
      }
      transpose_pairs(m);
      for (int64_t pair = 0; pair < pairs; pair++) _mm512_storeu_si512(dst + (k / 2 + pair) * kPanel, m[pair]);
    }
  }
}

TZ_INLINE Vec<float> add_products(Vec<float> sum, __m512i a, __m512i b) {
  return (Vec<float>::native)_mm512_dpbf16_ps((__m512)sum.v, (__m512bh)a, (__m512bh)b);
}
// A vector of pairs of a panel: packed as pairs, or as rows of bf16 (WeightMatrix), which two rows of one panel become in a register.
TZ_INLINE __m512i panel_pairs(const Pair* p) { return _mm512_loadu_si512(p); }
TZ_INLINE __m512i panel_pairs(const bf16* p) { return interleave(_mm512_loadu_si512(p)); }

// ---- AMX tiles ---------------------------------------------------------------------------------------------------
// tdpbf16ps adds 16 x 16 sums of 32 products each: eight times what vdpbf16ps does in its time. Rows of A as packed above are rows of a
// tile, and 16 pairs of a panel are one. 32 x 32 of C are four tiles, with two of A and two of B beside them.

// All tiles 16 rows of 64 bytes; afterwards the thread's configuration is what it was (other libraries keep theirs).
class Tiles {
 public:
  Tiles() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("sttilecfg %0" : "=m"(before_) : : "memory");
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  ~Tiles() { __asm__ volatile("ldtilecfg %0" : : "m"(before_) : "memory"); }
  Tiles(const Tiles&) = delete;

 private:
  struct alignas(64) Saved { uint8_t bytes[64]; } before_;
};
#define TZ_TILE_LOAD(tile, base, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(base), "r"(static_cast<int64_t>(stride)) : "memory")
#define TZ_TILE_STORE(tile, base, stride) __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(base), "r"(static_cast<int64_t>(stride)) : "memory")
#define TZ_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : : : "memory")
#define TZ_TILE_MULTIPLY(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : : : "memory")

constexpr int64_t kTileEdge = 16;    // rows of a tile, floats of its rows, and pairs of K
constexpr int64_t kRowsForTiles = 9;  // rows of A from which packing B for tiles costs less than dot products

// C[32 or 16 rows, 32] (+)= A's rows of kc pairs, a multiple of kTileEdge, times two panels; `add`: to what is there.
template <bool kTwo>
TZ_INLINE void tile_products(const Pair* a, int64_t lda, const Pair* b0, const Pair* b1, int64_t kc, float* c, int64_t ldc, bool add) {
  constexpr int64_t size = sizeof(Pair);
  float* below = c + kTileEdge * ldc;
  if (add) {
    TZ_TILE_LOAD(0, c, ldc * size);
    TZ_TILE_LOAD(1, c + kTileEdge, ldc * size);
    if constexpr (kTwo) {
      TZ_TILE_LOAD(2, below, ldc * size);
      TZ_TILE_LOAD(3, below + kTileEdge, ldc * size);
    }
  } else {
    TZ_TILE_ZERO(0);
    TZ_TILE_ZERO(1);
    if constexpr (kTwo) {
      TZ_TILE_ZERO(2);
      TZ_TILE_ZERO(3);
    }
  }
  for (int64_t k = 0; k < kc; k += kTileEdge) {
    TZ_TILE_LOAD(4, a + k, lda * size);
    TZ_TILE_LOAD(6, b0 + k * kPanel, kPanel * size);
    TZ_TILE_MULTIPLY(0, 4, 6);
    TZ_TILE_LOAD(7, b1 + k * kPanel, kPanel * size);
    TZ_TILE_MULTIPLY(1, 4, 7);
    if constexpr (kTwo) {
      TZ_TILE_LOAD(5, a + kTileEdge * lda + k, lda * size);
      TZ_TILE_MULTIPLY(2, 5, 6);
      TZ_TILE_MULTIPLY(3, 5, 7);
    }
  }
  TZ_TILE_STORE(0, c, ldc * size);
  TZ_TILE_STORE(1, c + kTileEdge, ldc * size);
  if constexpr (kTwo) {
    TZ_TILE_STORE(2, below, ldc * size);
    TZ_TILE_STORE(3, below + kTileEdge, ldc * size);
  }
}

// C[mc, nb] (+)= A times panels `stride` pairs apart; columns up to a multiple of 32 are written. A's buffer has room for a multiple of
// kTileEdge rows: what its rows from mc on hold stays in rows that nobody sees.
inline void multiply_tiles(const Pair* a, int64_t lda, int64_t mc, int64_t kc, const Pair* panels, int64_t stride, int64_t nb, float* c, int64_t ldc, bool first) {
  alignas(64) float tail[kTileEdge * 2 * kTileEdge];
  const Tiles configured;
  for (int64_t j = 0; j < nb; j += 2 * kTileEdge, panels += 2 * stride) {
    int64_t i = 0;
    for (; i + 2 * kTileEdge <= mc; i += 2 * kTileEdge) tile_products<true>(a + i * lda, lda, panels, panels + stride, kc, c + i * ldc + j, ldc, !first);
    if (i + kTileEdge <= mc) {
      tile_products<false>(a + i * lda, lda, panels, panels + stride, kc, c + i * ldc + j, ldc, !first);
      i += kTileEdge;
    }
    if (i < mc) {
      tile_products<false>(a + i * lda, lda, panels, panels + stride, kc, tail, 2 * kTileEdge, false);
      for (int64_t r = 0; r < mc - i; r++)
        for (int64_t v = 0; v < 2; v++) {
          float* at = c + (i + r) * ldc + j + v * kTileEdge;
          const __m512 sum = _mm512_load_ps(tail + (2 * r + v) * kTileEdge);
          _mm512_storeu_ps(at, first ? sum : _mm512_add_ps(_mm512_loadu_ps(at), sum));
        }
    }
  }
}

// The 16 x 16 sums at s, `ld` apart, turned: (+)= the first `valid` rows of c.
TZ_INLINE void store_turned(const float* s, int64_t ld, int64_t valid, float* c, int64_t ldc, bool first) {
  Vec<float> v[kTileEdge];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTileEdge; i++) v[i] = Vec<float>::load(s + i * ld);
  transpose(v);
  for (int64_t i = 0; i < valid; i++) (first ? v[i] : Vec<float>::load(c + i * ldc) + v[i]).store(c + i * ldc);
}

// sums[32, 32 or 16] = 32 rows of w, kc elements each where they lie, times two panels or one. Meanwhile `count` rows of W, `step` apart, come into the
// second-level cache.
template <bool kTwo>
TZ_INLINE void stored_products(const bf16* w, int64_t ldw, const Pair* b0, const Pair* b1, int64_t kc, const bf16* fetch, int64_t count, int64_t step, float* sums) {
  constexpr int64_t size = sizeof(bf16), wide = 2 * kTileEdge;
  const bf16* below = w + kTileEdge * ldw;
  TZ_TILE_ZERO(0);
  TZ_TILE_ZERO(1);
  if constexpr (kTwo) {
    TZ_TILE_ZERO(2);
    TZ_TILE_ZERO(3);
  }
  for (int64_t k = 0; k < kc; k += wide) {
    TZ_TILE_LOAD(4, w + k, ldw * size);
    TZ_TILE_LOAD(6, b0 + k / 2 * kPanel, kPanel * static_cast<int64_t>(sizeof(Pair)));
    TZ_TILE_MULTIPLY(0, 4, 6);
    TZ_TILE_LOAD(5, below + k, ldw * size);
    TZ_TILE_MULTIPLY(1, 5, 6);
    if constexpr (kTwo) {
      TZ_TILE_LOAD(7, b1 + k / 2 * kPanel, kPanel * static_cast<int64_t>(sizeof(Pair)));
      TZ_TILE_MULTIPLY(2, 4, 7);
      TZ_TILE_MULTIPLY(3, 5, 7);
    }
    for (int64_t i = 0; i < count; i++) prefetch_l2(fetch + i * step + k);
  }
  TZ_TILE_STORE(0, sums, wide * static_cast<int64_t>(sizeof(float)));
  TZ_TILE_STORE(1, sums + kTileEdge * wide, wide * static_cast<int64_t>(sizeof(float)));
  if constexpr (kTwo) {
    TZ_TILE_STORE(2, sums + kTileEdge, wide * static_cast<int64_t>(sizeof(float)));
    TZ_TILE_STORE(3, sums + kTileEdge * wide + kTileEdge, wide * static_cast<int64_t>(sizeof(float)));
  }
}

// C[rows, nb] (+)= (W[nb, kc] panels)^T, kc a multiple of two tiles' edges; columns up to a multiple of 32 are written. `edge` has room for
// 32 rows of W.
inline void multiply_stored(const bf16* w, int64_t ldw, int64_t nb, int64_t kc, const Pair* panels, int64_t stride, int64_t rows, bf16* edge, float* c, int64_t ldc, bool first) {
  constexpr int64_t wide = 2 * kTileEdge;
  alignas(64) float sums[wide * wide];
  const Tiles configured;
  const int64_t across = ceil_div(rows, wide);
  for (int64_t j = 0; j < nb; j += wide) {
    const bf16* from = w + j * ldw;
    int64_t ld = ldw;
    if (nb - j < wide) {  // rows beyond the last are not there to be read
      std::memset(edge, 0, static_cast<size_t>(wide * kc) * sizeof(bf16));
      for (int64_t i = 0; i < nb - j; i++) std::memcpy(edge + i * kc, from + i * ldw, static_cast<size_t>(kc) * sizeof(bf16));
      from = edge, ld = kc;
    }
    for (int64_t p = 0; p < across; p++) {
      const Pair* b = panels + 2 * p * stride;
      const int64_t left = rows - p * wide, begin = wide * p / across, count = wide * (p + 1) / across - begin;
      const bf16* fetch = w + (j + wide + begin) * ldw;
      if (left > kTileEdge) stored_products<true>(from, ld, b, b + stride, kc, fetch, count, ldw, sums);
      else stored_products<false>(from, ld, b, b, kc, fetch, count, ldw, sums);
      for (int64_t x = 0; x < min_of(left, wide); x += kTileEdge)
        for (int64_t y = 0; y < wide; y += kTileEdge)
          store_turned(sums + y * wide + x, wide, min_of(kTileEdge, left - x), c + (p * wide + x) * ldc + j + y, ldc, first);
    }
  }
}

#endif

}}}  // namespace terrazzo::cpu::TZ_ISA
