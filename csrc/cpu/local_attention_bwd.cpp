// Sliding-window attention, backward. With w[i, j] = exp(scale q[i] . k[j] - lse[i]), g = dy and D[i] = g[i] . y[i]:
//   dv[j] = sum over i of w[i, j] g[i];   ds[i, j] = w[i, j] (g[i] . v[j] - D[i]);
//   dq[i] = scale sum over j of ds[i, j] k[j];   dk[j] = scale sum over i of ds[i, j] q[i].
//
// Two passes over the band, each writing its own rows once: blocks of queries against their keys (D, dq), then blocks of keys
// against their queries (dk, dv, the query heads of a key head in order). Weights are computed again from lse in both; nothing
// of the size of the band is kept.
#include "local_attention.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

// delta[r] = dy[r] . y[r]
template <class A> void row_products(const A* a, const A* b, int64_t rows, int64_t P, A* delta) {
  using V = Vec<A>;
  for (int64_t r = 0; r < rows; r++) {
    V sum = V::zero();
    for (int64_t c = 0; c < P; c += V::size) sum = fma(load_n<A>(a + r * P + c, P - c), load_n<A>(b + r * P + c, P - c), sum);
    delta[r] = reduce_add(sum);
  }
}

template <class A> void backward_queries(const LocalAttentionParams& p, const AttentionRun& run, int64_t kv) {
  using V = Vec<A>;
  constexpr int64_t NR = kTileCols<A>;
  const int64_t width = padded_width(p, NR), group = p.H / p.Hk;
  const Band band = keys_of_queries(p, run.end - run.begin);
  const int64_t key_begin = band.column_begin(run.first), key_end = band.column_end(run.last), span = round_up(key_end - key_begin, kBlock);
  A *keys = scratch<A>(kTransposedSlot, span * p.P), *natural_keys = scratch<A>(kNaturalSlot, span * width);
  A* values = scratch<A>(kSecondTransposedSlot, span * p.P);
  A *q = scratch<A>(kRowsSlot, kBlock * p.P), *dy = scratch<A>(kOtherRowsSlot, kBlock * p.P), *dq = scratch<A>(kOutSlot, kBlock * width);
  A *s = scratch<A>(kScoreSlot, kBlock * kBlock), *dw = scratch<A>(kWeightSlot, kBlock * kBlock);
  pack_blocks<A>(p, k_rows(p, run, kv), key_begin, key_end, keys, natural_keys);
  pack_blocks<A>(p, v_rows(p, run, kv), key_begin, key_end, values, static_cast<A*>(nullptr));
  const uint8_t* live = p.key_mask ? p.key_mask + run.batch * p.L + run.begin : nullptr;
  for (int64_t h = kv * group; h < (kv + 1) * group; h++)
    for (int64_t row = run.first; row < run.last; row += kBlock) {
      const int64_t rows = min_of(kBlock, run.last - row), end = band.column_end(row + rows), at_row = (run.batch * p.H + h) * p.L + run.begin + row;
      const A* lse = static_cast<const A*>(p.lse) + at_row;
      A* delta = static_cast<A*>(p.delta) + at_row;
      contiguous_rows(p, p.y, run, p.H, h).load(row, rows, p.P, q);
      contiguous_rows(p, p.dy, run, p.H, h).load(row, rows, p.P, dy);
      row_products(q, dy, rows, p.P, delta);
      q_rows(p, run, h).load(row, rows, p.P, q);
      scale_all(q, rows * p.P, static_cast<A>(p.scale) * kScoreUnit<A>);
      std::memset(dq, 0, static_cast<size_t>(rows * width) * sizeof(A));
      for (int64_t column = band.column_begin(row); column < end; column += kBlock) {
        const int64_t at = column - key_begin;
        multiply_panels<Into::set>(q, p.P, rows, p.P, keys + at * p.P, p.P * NR, kBlock, s, kBlock);
        if (live || !band.holds(row, rows, column)) mask_scores(s, band, row, rows, column, live ? live + column : nullptr, nullptr);
        multiply_panels<Into::set>(dy, p.P, rows, p.P, values + at * p.P, p.P * NR, kBlock, dw, kBlock);
        for (int64_t r = 0; r < rows; r++)
          for (int64_t c = r * kBlock; c < (r + 1) * kBlock; c += V::size)
            (exponential(V::load(s + c) - V(lse[r])) * (V::load(dw + c) - V(delta[r]))).store(s + c);
        multiply_panels<Into::add>(s, kBlock, rows, kBlock, natural_keys + at * width, kBlock * NR, width, dq, width);
      }
      scale_all(dq, rows * width, static_cast<A>(p.scale));
      store_tile(dq, width, p.dtype, p.dq, ((run.batch * p.L + run.begin + row) * p.H + h) * p.P, p.H * p.P, int64_t(1), rows, p.P);
    }
}

// The run's blocks are keys here.
template <class A> void backward_keys(const LocalAttentionParams& p, const AttentionRun& run, int64_t kv) {
  using V = Vec<A>;
  constexpr int64_t NR = kTileCols<A>;
  const int64_t width = padded_width(p, NR), group = p.H / p.Hk, height = run.last - run.first;
  const Band band = queries_of_keys(p, run.end - run.begin);
  const int64_t query_begin = band.column_begin(run.first), query_end = band.column_end(run.last), span = round_up(query_end - query_begin, kBlock);
  A *queries = scratch<A>(kTransposedSlot, span * p.P), *natural_queries = scratch<A>(kNaturalSlot, span * width);
  A *dys = scratch<A>(kSecondTransposedSlot, span * p.P), *natural_dys = scratch<A>(kSecondNaturalSlot, span * width);
  A *k = scratch<A>(kRowsSlot, kBlock * p.P), *v = scratch<A>(kOtherRowsSlot, kBlock * p.P);
  A *dk = scratch<A>(kOutSlot, height * width), *dv = scratch<A>(kOtherOutSlot, height * width);
  A *s = scratch<A>(kScoreSlot, kBlock * kBlock), *dw = scratch<A>(kWeightSlot, kBlock * kBlock);
  std::memset(dk, 0, static_cast<size_t>(height * width) * sizeof(A));
  std::memset(dv, 0, static_cast<size_t>(height * width) * sizeof(A));
  const uint8_t* live = p.key_mask ? p.key_mask + run.batch * p.L + run.begin : nullptr;
  alignas(64) A lse[kBlock], delta[kBlock];
  for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
    pack_blocks<A>(p, q_rows(p, run, h), query_begin, query_end, queries, natural_queries);
    pack_blocks<A>(p, contiguous_rows(p, p.dy, run, p.H, h), query_begin, query_end, dys, natural_dys);
    const int64_t head = (run.batch * p.H + h) * p.L + run.begin;
    for (int64_t row = run.first; row < run.last; row += kBlock) {
      const int64_t rows = min_of(kBlock, run.last - row), end = band.column_end(row + rows);
      A *dk_rows = dk + (row - run.first) * width, *dv_rows = dv + (row - run.first) * width;
      k_rows(p, run, kv).load(row, rows, p.P, k);
      scale_all(k, rows * p.P, static_cast<A>(p.scale) * kScoreUnit<A>);
      v_rows(p, run, kv).load(row, rows, p.P, v);
      for (int64_t column = band.column_begin(row); column < end; column += kBlock) {
        const int64_t at = column - query_begin, columns = min_of(kBlock, band.length - column);
        for (int64_t c = 0; c < kBlock; c++) {
          lse[c] = c < columns ? static_cast<const A*>(p.lse)[head + column + c] : static_cast<A>(INFINITY);
          delta[c] = c < columns ? static_cast<const A*>(p.delta)[head + column + c] : A(0);
        }
        multiply_panels<Into::set>(k, p.P, rows, p.P, queries + at * p.P, p.P * NR, kBlock, s, kBlock);
        if (live || !band.holds(row, rows, column)) mask_scores(s, band, row, rows, column, nullptr, live ? live + row : nullptr);
        for (int64_t r = 0; r < rows; r++)
          for (int64_t c = 0; c < kBlock; c += V::size)
            exponential(V::load(s + r * kBlock + c) - V::load(lse + c)).store(s + r * kBlock + c);
        multiply_panels<Into::add>(s, kBlock, rows, kBlock, natural_dys + at * width, kBlock * NR, width, dv_rows, width);
        multiply_panels<Into::set>(v, p.P, rows, p.P, dys + at * p.P, p.P * NR, kBlock, dw, kBlock);
        for (int64_t r = 0; r < rows; r++)
          for (int64_t c = 0; c < kBlock; c += V::size) {
            const int64_t i = r * kBlock + c;
            (V::load(s + i) * (V::load(dw + i) - V::load(delta + c))).store(s + i);
          }
        multiply_panels<Into::add>(s, kBlock, rows, kBlock, natural_queries + at * width, kBlock * NR, width, dk_rows, width);
      }
    }
  }
  scale_all(dk, height * width, static_cast<A>(p.scale));
  const int64_t out = ((run.batch * p.L + run.begin + run.first) * p.Hk + kv) * p.P;
  store_tile(dk, width, p.dtype, p.dk, out, p.Hk * p.P, int64_t(1), height, p.P);
  store_tile(dv, width, p.dtype, p.dv, out, p.Hk * p.P, int64_t(1), height, p.P);
}

template <class A> void backward(const LocalAttentionParams& p) {
  const int64_t items = p.num_runs * p.Hk;
  parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) backward_queries<A>(p, p.runs[item / p.Hk], item % p.Hk);
  });
  parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) backward_keys<A>(p, p.runs[item / p.Hk], item % p.Hk);
  });
}

}  // namespace

void local_attention_bwd(const LocalAttentionParams& p) {
  if (p.dtype == DType::f64) backward<double>(p);
  else backward<float>(p);
}

}}}  // namespace terrazzo::cpu::TZ_ISA
