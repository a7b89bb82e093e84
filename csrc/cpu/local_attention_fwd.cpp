// Sliding-window attention, forward: y[i] = sum over the keys j in i's window of softmax_j(scale q[i] . k[j]) v[j].
//   q [B, L, H, P], k and v [B, L, Hk, P], y like q, lse [B, H, L]. A query without a key gets zeros.
//
// One piece of work is a run of query blocks of one sequence and key head. Its keys and values are packed once into panels, for
// all query heads that read them; then each block of 64 queries walks the blocks of its band: scores by register tiles, mask at
// the band's edges only, online softmax, weighted sum by register tiles. (Dao 2023, FlashAttention-2, on a band.)
#include "local_attention.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

// One block of scores becomes weights; top and sum move on, factor[r] is what the row's output so far must be multiplied by.
template <class A> TZ_INLINE void softmax_rows(A* s, int64_t rows, A* top, A* sum, A* factor) {
  using V = Vec<A>;
  alignas(64) A added[kBlock] = {};
  for (int64_t r = 0; r < rows; r++, s += kBlock) {
    V highest = V::load(s);
    for (int64_t c = V::size; c < kBlock; c += V::size) highest = max(V::load(s + c), highest);
    const A found = reduce_max(highest), next = found > top[r] ? found : top[r], base = next == static_cast<A>(-INFINITY) ? A(0) : next;
    V total = V::zero();
    for (int64_t c = 0; c < kBlock; c += V::size) {
      const V e = exponential(V::load(s + c) - V(base));
      e.store(s + c);
      total = total + e;
    }
    factor[r] = top[r] - base;
    top[r] = next;
    added[r] = reduce_add(total);
  }
  for (int64_t r = 0; r < rows; r += V::size) {
    const V f = exponential(V::load(factor + r));
    f.store(factor + r);
    fma(V::load(sum + r), f, V::load(added + r)).store(sum + r);
  }
}

template <class A> void forward_run(const LocalAttentionParams& p, const AttentionRun& run, int64_t kv) {
  constexpr int64_t NR = kTileCols<A>;
  const int64_t width = padded_width(p, NR), group = p.H / p.Hk, length = run.end - run.begin;
  const Band band = keys_of_queries(p, length);
  const int64_t key_begin = band.column_begin(run.first), key_end = band.column_end(run.last), span = round_up(key_end - key_begin, kBlock);
  A *keys = scratch<A>(kTransposedSlot, span * p.P), *values = scratch<A>(kNaturalSlot, span * width);
  A *q = scratch<A>(kRowsSlot, kBlock * p.P), *s = scratch<A>(kScoreSlot, kBlock * kBlock), *out = scratch<A>(kOutSlot, kBlock * width);
  pack_blocks<A>(p, k_rows(p, run, kv), key_begin, key_end, keys, nullptr);
  pack_blocks<A>(p, v_rows(p, run, kv), key_begin, key_end, static_cast<A*>(nullptr), values);
  const uint8_t* live = p.key_mask ? p.key_mask + run.batch * p.L + run.begin : nullptr;
  alignas(64) A top[kBlock], sum[kBlock], factor[kBlock] = {};
  for (int64_t h = kv * group; h < (kv + 1) * group; h++)
    for (int64_t row = run.first; row < run.last; row += kBlock) {
      const int64_t rows = min_of(kBlock, run.last - row), end = band.column_end(row + rows);
      q_rows(p, run, h).load(row, rows, p.P, q);
      scale_all(q, rows * p.P, static_cast<A>(p.scale) * kScoreUnit<A>);
      std::memset(out, 0, static_cast<size_t>(rows * width) * sizeof(A));
      for (int64_t r = 0; r < kBlock; r++) top[r] = static_cast<A>(-INFINITY), sum[r] = 0;
      for (int64_t column = band.column_begin(row); column < end; column += kBlock) {
        const int64_t at = column - key_begin;
        multiply_panels<Into::set>(q, p.P, rows, p.P, keys + at * p.P, p.P * NR, kBlock, s, kBlock);
        if (live || !band.holds(row, rows, column)) mask_scores(s, band, row, rows, column, live ? live + column : nullptr, nullptr);
        softmax_rows(s, rows, top, sum, factor);
        multiply_panels<Into::rescale>(s, kBlock, rows, kBlock, values + at * width, kBlock * NR, width, out, width, factor);
      }
      A* lse = static_cast<A*>(p.lse) + (run.batch * p.H + h) * p.L + run.begin + row;
      for (int64_t r = 0; r < rows; r++) {
        const bool empty = sum[r] == 0;
        lse[r] = empty ? static_cast<A>(INFINITY) : top[r] + log_units(sum[r]);
        scale_all(out + r * width, p.P, empty ? A(0) : A(1) / sum[r]);
      }
      store_tile(out, width, p.dtype, p.y, ((run.batch * p.L + run.begin + row) * p.H + h) * p.P, p.H * p.P, int64_t(1), rows, p.P);
    }
}

}  // namespace

void local_attention_fwd(const LocalAttentionParams& p) {
  parallel_for(0, p.num_runs * p.Hk, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      if (p.dtype == DType::f64) forward_run<double>(p, p.runs[item / p.Hk], item % p.Hk);
      else forward_run<float>(p, p.runs[item / p.Hk], item % p.Hk);
    }
  });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
