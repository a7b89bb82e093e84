// Attention between patches and their bytes, backward. With w[i, j] the softmax, g = dy and D[i] = sum over j of w[i, j] (g[i] . v[j]):
//   dv[j] = sum over i of w[i, j] g[i];   ds[i, j] = w[i, j] (g[i] . v[j] - D[i]);
//   dq[i] = scale sum over j of ds[i, j] k[j];   dk[j] = scale sum over i of ds[i, j] q[i].
//
// Two steps for each patch. As a queries' patch: w from scratch, D and dq, and for each query and head three numbers are kept
// (largest score, inverse sum, D). As a keys' patch: w and ds again from those, for the queries that see it, then dk and dv.
// Without a window both are the same patch and follow each other while its rows are in the cache; with one, all first steps
// come before the second. Each row of a gradient is written once, by one thread, in a fixed order.
#include "patch_cross_attention.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

template <class T> struct Backward {
  using A = acc_t<T>;
  using V = Vec<A>;
  const PatchCrossAttentionParams& p;
  CrossPlan<A> plan{p};

  TZ_INLINE const T* q_row(int64_t b, int64_t row, int64_t h) const {
    return static_cast<const T*>(p.q) + b * p.q_stride_b + row * p.q_stride_l + h * p.q_stride_h;
  }
  TZ_INLINE const T* dy_row(int64_t b, int64_t row, int64_t h) const { return static_cast<const T*>(p.dy) + ((b * p.Lq + row) * p.H + h) * p.P; }
  TZ_INLINE A* stats(int64_t b, int64_t row, int64_t h) const { return static_cast<A*>(p.stats) + (b * p.Lq + row) * 3 * p.H + h; }

  void queries(const CrossItem<A>& item) const {
    const int64_t b = item.b;
    T* dq = static_cast<T*>(p.dq) + b * p.Lq * p.H * p.P;
    const auto [queries, list, n] = asking(p, item, dq);
    A* w = scratch<A>(kScoreSlot, (n + 1) * V::size);
    A* ds = scratch<A>(kSecondSlot, (n + 1) * V::size);
    const T* k = static_cast<const T*>(p.k) + b * p.k_stride_b;
    const T* v = static_cast<const T*>(p.v) + b * p.v_stride_b;
    for (int64_t row = queries.begin; row < queries.end; row++) {
      if (n == 0 || !query_is_live(p, b, row)) {
        clear_heads(dq, row, row + 1, p.H, p.P, item.h_begin, item.h_end);
        continue;
      }
      for (const HeadBlock<A>* heads = item.begin_blocks; heads != item.end_blocks; heads++) {
        const int64_t h = heads->begin;
        V top, D = V::zero();
        V inverse;
        for (int64_t i = 0; i < n; i++) score(p, q_row(b, row, h), k + list[i] * p.k_stride_l, *heads, w + i * V::size);
        softmax(w, n, &top, &inverse);
        for (int64_t i = 0; i < n; i++) {
          const V dw = head_dots<A>(dy_row(b, row, h), p.P, v + list[i] * p.v_stride_l, heads->v_offset, heads->n, p.P);
          dw.store(ds + i * V::size);
          D = fma(V::load(w + i * V::size), dw, D);
        }
        const V factor(static_cast<A>(p.scale));
        for (int64_t i = 0; i < n; i++) (V::load(w + i * V::size) * factor * (V::load(ds + i * V::size) - D)).store(ds + i * V::size);
        A* kept = stats(b, row, h);
        store_n(top, kept, heads->n), store_n(inverse, kept + p.H, heads->n), store_n(D, kept + 2 * p.H, heads->n);
        for (int64_t i = 0; i < heads->n; i++) {
          T* out = dq + (row * p.H + h + i) * p.P;
          weighted_sum(ds + i, k + heads->k_offset[i], list, p.k_stride_l, n, p.P,
                       [&](int64_t c, V value) TZ_LAMBDA { store_n(value, out + c, p.P - c); });
        }
      }
    }
  }

  void keys(const CrossItem<A>& item) const {
    const int64_t b = item.b;
    const Rows keys = key_rows(p, b, item.s, item.s + 1), queries = queries_that_see(p, b, item.s);
    T *dk = static_cast<T*>(p.dk) + b * p.Lk * p.Hk * p.P, *dv = static_cast<T*>(p.dv) + b * p.Lk * p.Hk * p.P;
    const auto clear = [&](int64_t from, int64_t to) {
      clear_heads(dk, from, to, p.Hk, p.P, item.kv_begin, item.kv_end);
      clear_heads(dv, from, to, p.Hk, p.P, item.kv_begin, item.kv_end);
    };
    if (!p.bytes_ask) for_bytes_outside(p, b, item.s, clear);
    int32_t* list = scratch<int32_t>(kQueryListSlot, queries.end - queries.begin + 1);
    const int64_t n = list_rows(queries, list, [&](int64_t row) TZ_LAMBDA { return query_is_live(p, b, row); });
    A* w = scratch<A>(kScoreSlot, (n + 1) * V::size);
    A* ds = scratch<A>(kSecondSlot, (n + 1) * V::size);
    const int64_t width = ceil_div(p.P, V::size) * V::size, size = (item.kv_end - item.kv_begin) * width;
    A *sum_k = scratch<A>(kSumSlot, 2 * size), *sum_v = sum_k + size;
    const T *q = q_row(b, 0, 0), *dy = dy_row(b, 0, 0);
    const V scale(static_cast<A>(p.scale));
    for (int64_t row = keys.begin; row < keys.end; row++) {
      if (n == 0 || !key_is_live(p, b, row)) {
        clear(row, row + 1);
        continue;
      }
      std::memset(sum_k, 0, static_cast<size_t>(2 * size) * sizeof(A));
      const T* k = static_cast<const T*>(p.k) + b * p.k_stride_b + row * p.k_stride_l;
      const T* v = static_cast<const T*>(p.v) + b * p.v_stride_b + row * p.v_stride_l;
      for (const HeadBlock<A>* heads = item.begin_blocks; heads != item.end_blocks; heads++) {
        const int64_t h = heads->begin;
        for (int64_t i = 0; i < n; i++) {
          const A* kept = stats(b, list[i], h);
          const V top = load_n<A>(kept, heads->n), inverse = load_n<A>(kept + p.H, heads->n), D = load_n<A>(kept + 2 * p.H, heads->n);
          const V s = scale * head_dots<A>(q_row(b, list[i], h), p.q_stride_h, k, heads->k_offset, heads->n, p.P);
          const V dw = head_dots<A>(dy_row(b, list[i], h), p.P, v, heads->v_offset, heads->n, p.P);
          const V weight = exp(s - top) * inverse;
          weight.store(w + i * V::size);
          (weight * scale * (dw - D)).store(ds + i * V::size);
        }
        for (int64_t i = 0; i < heads->n; i++) {
          const int64_t at = ((h + i) / plan.group - item.kv_begin) * width;
          weighted_sum(ds + i, q + (h + i) * p.q_stride_h, list, p.q_stride_l, n, p.P,
                       [&](int64_t c, V value) TZ_LAMBDA { (V::load(sum_k + at + c) + value).store(sum_k + at + c); });
          weighted_sum(w + i, dy + (h + i) * p.P, list, p.H * p.P, n, p.P,
                       [&](int64_t c, V value) TZ_LAMBDA { (V::load(sum_v + at + c) + value).store(sum_v + at + c); });
        }
      }
      for (int64_t h = item.kv_begin; h < item.kv_end; h++) {
        const int64_t at = (h - item.kv_begin) * width, out = (row * p.Hk + h) * p.P;
        for (int64_t c = 0; c < p.P; c += V::size) {
          store_n(V::load(sum_k + at + c), dk + out + c, p.P - c);
          store_n(V::load(sum_v + at + c), dv + out + c, p.P - c);
        }
      }
    }
  }

  void run() const {
    if (p.window == 1) return plan.for_items([&](const CrossItem<A>& item) { queries(item), keys(item); });
    plan.for_items([&](const CrossItem<A>& item) { queries(item); });
    plan.for_items([&](const CrossItem<A>& item) { keys(item); });
  }
};

}  // namespace

void patch_cross_attention_bwd(const PatchCrossAttentionParams& p) {
  with_type(p.dtype, [&](auto t) { Backward<decltype(t)>{p}.run(); });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
