// What the forward and the backward of the Mamba-2 chunk scan share: chunk length, decays, packing, states.
#pragma once
#include "../common/parallel.h"
#include "../common/params.h"
#include "gemm_tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

template <class A> constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(A));  // elements of a cache line

// Positions per chunk, whatever the caller's chunk_size says; a multiple of the tile width, and for AVX2 of the
// tile height too. See docs/chunk_scan.md for 32, 48 and 64 measured.
#if defined(__AVX512F__)
constexpr int kChunk = 64;
#else
constexpr int kChunk = 48;
#endif
static_assert(kChunk % kTileCols<float> == 0 && kChunk % kTileCols<double> == 0, "chunk columns fill whole panels");

// One head in one chunk. Positions past the end of the chunk hold dt = 0 and the last cumulative decay.
template <class A> struct ChunkDecay {
  alignas(64) A raw[kChunk];         // dt + dt_bias
  alignas(64) A soft[kChunk];        // after softplus, before the clamp
  alignas(64) A dt[kChunk];
  alignas(64) A hi[kChunk];          // cum_l = sum of dt A from the start of the chunk to l, inclusive, in two parts:
  alignas(64) A lo[kChunk];          // a difference of two large sums keeps its precision
  alignas(64) A from_start[kChunk];  // exp(cum_l)
  alignas(64) A to_end[kChunk];      // exp(cum_last - cum_l)
  A total;                           // exp(cum_last)

  // exp(cum_l - cum_s), vectors over either index.
  TZ_INLINE static Vec<A> between(Vec<A> hi_l, Vec<A> lo_l, Vec<A> hi_s, Vec<A> lo_s) {
    return exp((hi_l - hi_s) + (lo_l - lo_s));
  }

  // From raw[0..q).
  void compute(int64_t q, A decay, const ChunkScanParams& p) {
    constexpr int V = Vec<A>::size;
    for (int64_t l = q; l < kChunk; l++) raw[l] = 0;
    const Vec<A> dt_min(static_cast<A>(p.dt_min)), dt_max(static_cast<A>(p.dt_max));
    for (int64_t l = 0; l < kChunk; l += V) {
      Vec<A> v = Vec<A>::load(raw + l);
      if (p.dt_softplus) v = softplus(v);
      v.store(soft + l);
      min(max(v, dt_min), dt_max).store(dt + l);
    }
    for (int64_t l = q; l < kChunk; l++) dt[l] = 0;
    // exp of the floor is zero already; without it one reset would swallow the small steps after it.
    constexpr double kFloor = sizeof(A) == 4 ? -128.0 : -800.0, kCeiling = 1e30;
    double cum = 0;
    for (int64_t l = 0; l < kChunk; l++) {
      double step = static_cast<double>(dt[l]) * static_cast<double>(decay);
      step = step < kFloor ? kFloor : step > kCeiling ? kCeiling : step;
      if (l < q) cum += step;
      hi[l] = static_cast<A>(cum);
      lo[l] = static_cast<A>(cum - static_cast<double>(hi[l]));
    }
    const Vec<A> zero = Vec<A>::zero(), last_hi(hi[kChunk - 1]), last_lo(lo[kChunk - 1]);
    for (int64_t l = 0; l < kChunk; l += V) {
      const Vec<A> hi_l = Vec<A>::load(hi + l), lo_l = Vec<A>::load(lo + l);
      between(hi_l, lo_l, zero, zero).store(from_start + l);
      between(last_hi, last_lo, hi_l, lo_l).store(to_end + l);
    }
    total = from_start[kChunk - 1];
  }
};

template <class A, class S>
inline void load_dt_as(const ChunkScanParams& p, int64_t b, int64_t l0, int64_t q, int64_t h0, int64_t heads, ChunkDecay<A>* out) {
  const A* bias = static_cast<const A*>(p.dt_bias);
  for (int64_t l = 0; l < q; l++) {
    const S* row = static_cast<const S*>(p.dt) + b * p.dt_stride_b + (l0 + l) * p.dt_stride_l + h0 * p.dt_stride_h;
    for (int64_t h = 0; h < heads; h++)
      out[h].raw[l] = static_cast<A>(to_acc(row[h * p.dt_stride_h])) + (bias ? bias[h0 + h] : A(0));
  }
}

// Decays of `heads` heads from h0 on, in the chunk at [l0, l0 + q) of row b.
template <class A>
inline void chunk_decays(const ChunkScanParams& p, int64_t b, int64_t l0, int64_t q, int64_t h0, int64_t heads, ChunkDecay<A>* out) {
  switch (p.dt_dtype) {
    case DType::f32: load_dt_as<A, float>(p, b, l0, q, h0, heads, out); break;
    case DType::f64: load_dt_as<A, double>(p, b, l0, q, h0, heads, out); break;
    case DType::bf16: load_dt_as<A, bf16>(p, b, l0, q, h0, heads, out); break;
    case DType::f16: load_dt_as<A, f16>(p, b, l0, q, h0, heads, out); break;
  }
  for (int64_t h = 0; h < heads; h++) out[h].compute(q, static_cast<const A*>(p.A)[h0 + h], p);
}

// Row stride of packed B and C. A power of two would put a column of rows into a few cache sets and evict itself.
template <class A> constexpr int64_t padded_row(int64_t N) { return round_up(N, kLine<A>) + kLine<A>; }

// Rows [q, n] of any storage type -> the accumulation type, rows padded_row(n) apart.
template <class A, class S> inline void copy_rows(const S* src, int64_t stride, int64_t q, int64_t n, A* dst) {
  constexpr int64_t V = Vec<A>::size;
  for (int64_t l = 0; l < q; l++)
    for (int64_t j = 0; j < n; j += V) store_n(load_n<A>(src + l * stride + j, n - j), dst + l * padded_row<A>(n) + j, n - j);
}

// A head's state: the caller's [P, N] <-> panels [P / kTileCols][N][kTileCols], P zero padded; null reads as zeros.
template <class A> inline void load_state(const A* src, int64_t P, int64_t N, A* panels) {
  if (src) return pack_transposed(src, N, P, N, round_up(P, kTileCols<A>), panels);
  std::memset(panels, 0, static_cast<size_t>(round_up(P, kTileCols<A>) * N) * sizeof(A));
}
template <class A> inline void store_state(const A* panels, int64_t P, int64_t N, A* dst) {
  constexpr int64_t NR = kTileCols<A>;
  for (int64_t c = 0; c < P; c += NR) transpose(panels + c * N, NR, N, P - c < NR ? P - c : NR, dst + c * N, N);
}

// out = total * state + sum over l < q of coef[l, n] * values[l, p]: coef rows padded, values in panels of kChunk rows.
template <class A>
inline void update_state(A* out, A total, const A* state, const A* coef, const A* values, int64_t q, int64_t P, int64_t N) {
  constexpr int64_t NR = kTileCols<A>;
  for_row_tiles(N, [&](int64_t n, auto rows) {
    for (int64_t c = 0; c < P; c += NR) {
      const int64_t at = c * N + n * NR;
      Tile<A, decltype(rows)::value> acc;
      acc.load_scaled(state + at, NR, Vec<A>(total));
      acc.multiply(coef + n, 1, padded_row<A>(N), values + c * kChunk, q);
      acc.store(out + at, NR);
    }
  });
}

// Writes one tile row of up to kTileCols values at `out`; `stream` bypasses the caches (out suitably aligned).
template <class A, class T> TZ_INLINE void store_columns(const Vec<A> (&c)[2], T* out, int64_t columns, bool stream) {
  constexpr int64_t V = Vec<A>::size;
  if (columns >= 2 * V) {
    if (stream) {
      c[0].stream(out);
      c[1].stream(out + V);
    } else {
      c[0].store(out);
      c[1].store(out + V);
    }
    return;
  }
  store_n(c[0], out, columns < V ? columns : V);
  if (columns > V) store_n(c[1], out + V, columns - V);
}

// Non-temporal stores pay for outputs beyond 8 MB (the L2 of a core and its share of L3), with the heads that other calls write; rows must be whole vectors.
template <class T> inline bool stream_output(const ChunkScanParams& p, const void* out) {
  const int64_t vector = Vec<acc_t<T>>::size * static_cast<int64_t>(sizeof(T));
  const auto whole = [&](int64_t stride) { return stride * static_cast<int64_t>(sizeof(T)) % vector == 0; };
  return p.B * p.L * p.out_stride_l * static_cast<int64_t>(sizeof(T)) > (int64_t(8) << 20) && reinterpret_cast<uintptr_t>(out) % vector == 0 &&
         whole(p.P) && whole(p.out_stride_l) && whole(p.out_stride_b);
}

// Hands out consecutive pieces of one scratch buffer, each a multiple of 64 bytes.
template <class A> struct Carver {
  A* next;
  TZ_INLINE A* take(int64_t count) {
    A* r = next;
    next += round_up(count, kLine<A>);
    return r;
  }
};

}}}  // namespace terrazzo::cpu::TZ_ISA
