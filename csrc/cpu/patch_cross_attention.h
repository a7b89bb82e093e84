// What the forward and the backward of patch_cross_attention share.
//
// A patch's queries and the keys they see are two ranges of rows, whichever side the bytes stand on. Heads are lanes: the
// scores of one query and one key are a vector, a lane for each head, so that the softmax over the few keys of a patch has no
// horizontal step. Work is shared out by batch and patch, and where those are few by chunk of heads; a chunk holds whole groups
// of query heads, so each row of dk and dv is one thread's.
#pragma once
#include "../common/parallel.h"
#include "../common/params.h"
#include "tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

enum CrossScratch { kScoreSlot, kSecondSlot, kListSlot, kQueryListSlot, kSumSlot, kBlockSlot };

struct Rows { int64_t begin, end; };

// Patches [first, last) on the byte side, and on the patch side.
TZ_INLINE Rows byte_rows(const PatchCrossAttentionParams& p, int64_t b, int64_t first, int64_t last) {
  const int32_t* starts = p.starts + b * (p.S + 1);
  return {starts[first], starts[last]};
}
TZ_INLINE Rows patch_rows(const PatchCrossAttentionParams& p, int64_t first, int64_t last) { return {first * p.K, last * p.K}; }

TZ_INLINE Rows query_rows(const PatchCrossAttentionParams& p, int64_t b, int64_t first, int64_t last) {
  return p.bytes_ask ? byte_rows(p, b, first, last) : patch_rows(p, first, last);
}
TZ_INLINE Rows key_rows(const PatchCrossAttentionParams& p, int64_t b, int64_t first, int64_t last) {
  return p.bytes_ask ? patch_rows(p, first, last) : byte_rows(p, b, first, last);
}
TZ_INLINE Rows keys_seen_by(const PatchCrossAttentionParams& p, int64_t b, int64_t s) {
  return key_rows(p, b, max_of(0, s - p.window + 1), s + 1);
}
TZ_INLINE Rows queries_that_see(const PatchCrossAttentionParams& p, int64_t b, int64_t s) {
  return query_rows(p, b, s, s + min_of(p.window, p.S - s));
}
TZ_INLINE bool query_is_live(const PatchCrossAttentionParams& p, int64_t b, int64_t row) { return !p.bytes_ask || p.ids[b * p.L + row] >= 0; }
TZ_INLINE bool key_is_live(const PatchCrossAttentionParams& p, int64_t b, int64_t row) {
  return (p.bytes_ask || p.ids[b * p.L + row] >= 0) && (!p.key_mask || p.key_mask[b * p.Lk + row]);
}

// list[n]: the rows of a range that are live.
template <class F> TZ_INLINE int64_t list_rows(Rows rows, int32_t* list, const F& is_live) {
  int64_t n = 0;
  for (int64_t row = rows.begin; row < rows.end; row++)
    if (is_live(row)) list[n++] = static_cast<int32_t>(row);
  return n;
}

// Up to Vec::size query heads from `begin`, and where each finds its key head.
template <class A> struct HeadBlock {
  int64_t begin, n, k_offset[Vec<A>::size], v_offset[Vec<A>::size];
};

// The patch and the heads of one piece of work.
template <class A> struct CrossItem {
  int64_t b, s, kv_begin, kv_end, h_begin, h_end;  // key heads and query heads
  const HeadBlock<A>*begin_blocks, *end_blocks;
};

// How the work is cut into items: chunks of key heads, each with its blocks.
template <class A> struct CrossPlan {
  static constexpr int64_t kSerialProducts = 65536;
  const PatchCrossAttentionParams& p;
  int64_t group = p.H / p.Hk;
  int64_t kv_heads = p.B * p.S >= 8 * max_threads() ? p.Hk : min_of(p.Hk, max_of(1, Vec<A>::size / group));  // of a chunk
  int64_t chunks = ceil_div(p.Hk, kv_heads), blocks = ceil_div(kv_heads * group, Vec<A>::size);              // blocks of a chunk
  HeadBlock<A>* list = scratch<HeadBlock<A>>(kBlockSlot, chunks * blocks);

  explicit CrossPlan(const PatchCrossAttentionParams& params) : p(params) {
    for (int64_t at = 0; at < chunks * blocks; at++) {
      const int64_t chunk = at / blocks, begin = chunk * kv_heads * group + at % blocks * Vec<A>::size;
      HeadBlock<A>& block = list[at];
      block.begin = begin, block.n = min_of(Vec<A>::size, min_of(p.H, (chunk + 1) * kv_heads * group) - begin);
      for (int64_t i = 0; i < block.n; i++)
        block.k_offset[i] = (begin + i) / group * p.k_stride_h, block.v_offset[i] = (begin + i) / group * p.v_stride_h;
    }
  }
  CrossItem<A> item(int64_t index) const {
    const int64_t patch = index / chunks, chunk = index % chunks, first = chunk * kv_heads, last = min_of(p.Hk, first + kv_heads);
    const HeadBlock<A>* own = list + chunk * blocks;
    return {patch / p.S, patch % p.S, first, last, first * group, last * group, own, own + ceil_div((last - first) * group, Vec<A>::size)};
  }
  template <bool kStream = false, class F> void for_items(const F& fn) const {
    const int64_t rows = ceil_div(p.L, max_of(p.S, 1)) + 1;
    const int64_t grain = max_of(1, kSerialProducts / (rows * p.K * min_of(p.window, p.S + 1) * p.H * p.P / chunks + 1));
    parallel_for(0, p.B * p.S * chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; index++) fn(item(index));
      if constexpr (kStream) stream_fence();
    });
  }
};

// Lane i of the result: the sum of m[i].
template <int bit, class A> TZ_INLINE void fold(Vec<A>* m) {
  if constexpr (bit > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < bit; i++) {
      swap_blocks<bit>(m[i], m[i + bit], std::make_integer_sequence<int, Vec<A>::size>());
      m[i] = m[i] + m[i + bit];
    }
    fold<bit / 2>(m);
  }
}

template <class A, class T> TZ_INLINE Vec<A> partial_dot(const T* a, const T* b, int64_t P) {
  constexpr int64_t V = Vec<A>::size;
  Vec<A> sum = Vec<A>::zero();
  int64_t c = 0;
  for (; c + V <= P; c += V) sum = fma(Vec<A>::load(a + c), Vec<A>::load(b + c), sum);
  if (c < P) sum = fma(load_n<A>(a + c, P - c), load_n<A>(b + c, P - c), sum);
  return sum;
}

// Lane i: the dot product of head i of a (heads `stride` apart) and of b at offset[i]; zero behind the block's heads.
template <class A, class T> TZ_INLINE Vec<A> head_dots(const T* a, int64_t stride, const T* b, const int64_t* offset, int64_t n, int64_t P) {
  constexpr int V = Vec<A>::size;
  Vec<A> m[V];
  if (n == V) {
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) m[i] = partial_dot<A>(a + i * stride, b + offset[i], P);
  } else {
    for (int i = 0; i < V; i++) m[i] = i < n ? partial_dot<A>(a + i * stride, b + offset[i], P) : Vec<A>::zero();
  }
  fold<V / 2>(m);
  return m[0];
}

// The sum over i < n of w[i * Vec::size] rows[list[i] * stride .. + P], given to put(c, vector) in pieces of a vector; `wide` of
// them at a time while so many are left.
template <int wide, class A, class T, class F>
TZ_INLINE void weighted_sum(const A* w, const T* rows, const int32_t* list, int64_t stride, int64_t n, int64_t begin, int64_t P, const F& put) {
  constexpr int64_t V = Vec<A>::size;
  int64_t c = begin;
  for (; c + wide * V <= P; c += wide * V) {
    Vec<A> sum[wide];
#pragma GCC unroll 8
    for (int j = 0; j < wide; j++) sum[j] = Vec<A>::zero();
    for (int64_t i = 0; i < n; i++) {
      const T* row = rows + list[i] * stride + c;
      const Vec<A> f(w[i * V]);
#pragma GCC unroll 8
      for (int j = 0; j < wide; j++) sum[j] = fma(f, Vec<A>::load(row + j * V), sum[j]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < wide; j++) put(c + j * V, sum[j]);
  }
  if constexpr (wide > 1) {
    if (c < P) weighted_sum<wide / 2>(w, rows, list, stride, n, c, P, put);
  } else if (c < P) {
    Vec<A> sum = Vec<A>::zero();
    for (int64_t i = 0; i < n; i++) sum = fma(Vec<A>(w[i * V]), load_n<A>(rows + list[i] * stride + c, P - c), sum);
    put(c, sum);
  }
}
template <class A, class T, class F>
TZ_INLINE void weighted_sum(const A* w, const T* rows, const int32_t* list, int64_t stride, int64_t n, int64_t P, const F& put) {
  weighted_sum<8>(w, rows, list, stride, n, 0, P, put);
}

// Queries are taken a few at a time, in steps: all scores, then all exponentials, then all sums over the keys. The latency of an
// exponential, which the sums wait for, is then hidden behind the others.
TZ_INLINE int64_t queries_at_a_time(int64_t keys) { return max_of(1, min_of(16, 64 / max_of(keys, 1))); }

// The score of one query and one key, a lane for each head.
template <class A, class T>
TZ_INLINE void score(const PatchCrossAttentionParams& p, const T* q, const T* k, const HeadBlock<A>& heads, A* out) {
  (Vec<A>(static_cast<A>(p.scale)) * head_dots<A>(q, p.q_stride_h, k, heads.k_offset, heads.n, p.P)).store(out);
}

// Scores of one query become the softmax over its keys; also the largest score and the inverse of the sum of exponentials.
template <class A> TZ_INLINE void softmax(A* scores, int64_t n, Vec<A>* top, Vec<A>* inverse) {
  using V = Vec<A>;
  V highest(static_cast<A>(-INFINITY)), sum = V::zero();
  for (int64_t i = 0; i < n; i++) highest = max(V::load(scores + i * V::size), highest);
  for (int64_t i = 0; i < n; i++) {
    const V e = exp(V::load(scores + i * V::size) - highest);
    e.store(scores + i * V::size);
    sum = sum + e;
  }
  *top = highest, *inverse = V(A(1)) / sum;
  for (int64_t i = 0; i < n; i++) (V::load(scores + i * V::size) * *inverse).store(scores + i * V::size);
}

// Rows [begin, end) of a contiguous [B, rows, heads, P] tensor, heads [first, last): zeros.
template <class T> TZ_INLINE void clear_heads(T* base, int64_t row_begin, int64_t row_end, int64_t H, int64_t P, int64_t first, int64_t last) {
  for (int64_t row = row_begin; row < row_end; row++)
    std::memset((void*)(base + (row * H + first) * P), 0, static_cast<size_t>((last - first) * P) * sizeof(T));
}

// Bytes in front of the first patch and behind the last one: fn(begin, end), by whoever has that patch.
template <class F> TZ_INLINE void for_bytes_outside(const PatchCrossAttentionParams& p, int64_t b, int64_t s, const F& fn) {
  const int32_t* starts = p.starts + b * (p.S + 1);
  if (s == 0) fn(0, starts[0]);
  if (s == p.S - 1) fn(starts[p.S], p.L);
}

// The queries of an item's patch and the live keys that they see.
struct Asking {
  Rows queries;
  const int32_t* keys;
  int64_t n;
};

// In `out`, a tensor like q, bytes outside all patches get zeros.
template <class A, class T> TZ_INLINE Asking asking(const PatchCrossAttentionParams& p, const CrossItem<A>& item, T* out) {
  if (p.bytes_ask)
    for_bytes_outside(p, item.b, item.s, [&](int64_t from, int64_t to) { clear_heads(out, from, to, p.H, p.P, item.h_begin, item.h_end); });
  const Rows keys = keys_seen_by(p, item.b, item.s);
  int32_t* list = scratch<int32_t>(kListSlot, keys.end - keys.begin + 1);
  const int64_t n = list_rows(keys, list, [&](int64_t row) TZ_LAMBDA { return key_is_live(p, item.b, row); });
  return {query_rows(p, item.b, item.s, item.s + 1), list, n};
}

}}}  // namespace terrazzo::cpu::TZ_ISA
