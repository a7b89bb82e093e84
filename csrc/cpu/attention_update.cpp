// One position's attention over a cache that takes it in: the rotary embedding of q and k, the write of k and v, and
//   y[h] = sum_s softmax(scale q[h] . k_cache[s]) v_cache[s]
// over the positions that the cache holds; query head h reads key head h / (H / Hk).
//
// A key head is a task: its keys are read once for all of its queries, kKeyBlock at a time, then its values. The keys that
// a vector of scores stands for are summed together (reduce_rows). Scores of a head stay in scratch, so that one maximum
// does for all. Results don't depend on how the heads are dealt to threads.
#include "../common/parallel.h"
#include "../common/params.h"
#include "tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

enum AttentionUpdateScratch { kQuerySlot, kTurnSlot, kScoreSlot, kSumSlot };
constexpr int64_t kKeyBlock = 64;
constexpr int64_t kSerialReads = 131072;  // elements of keys and values, some 10 us; less is not worth another thread
constexpr int kSums = 4;                  // vectors of a row of values that are summed side by side

template <class A> TZ_INLINE int64_t padded(int64_t n) { return ceil_div(n, Vec<A>::size) * Vec<A>::size; }

// Turns `x` by the angles of `turn` (R cosines, then R sines): pairs of neighbours, or channel i with i + R.
template <class A> TZ_INLINE void rotate(A* x, const A* turn, int64_t R, bool interleaved) {
  for (int64_t i = 0; i < R; i++) {
    A &a = interleaved ? x[2 * i] : x[i], &b = interleaved ? x[2 * i + 1] : x[i + R];
    const A before = a;
    a = before * turn[i] - b * turn[R + i];
    b = b * turn[i] + before * turn[R + i];
  }
}

// Scores of the keys [s, s + n) for one query, n <= a vector of them.
template <class A, class T> TZ_INLINE Vec<A> score_keys(const A* q, const T* keys, int64_t stride, int64_t n, int64_t P) {
  using V = Vec<A>;
  V sums[V::size];
#pragma GCC unroll 16
  for (int64_t i = 0; i < V::size; i++) {
    sums[i] = V::zero();
    if (i >= n) continue;
    const T* key = keys + i * stride;
    int64_t c = 0;
    for (; c + V::size <= P; c += V::size) sums[i] = fma(V::load(q + c), V::load(key + c), sums[i]);
    if (c < P) sums[i] = fma(V::load(q + c), load_n<A>(key + c, P - c), sums[i]);  // q is padded with zeros
  }
  return reduce_rows(sums);
}

// sum[P] += weights[s] * values[s] over n rows, `lanes` vectors of them at a time.
template <int lanes, class A, class T>
TZ_INLINE void add_values(const A* weights, const T* values, int64_t stride, int64_t n, int64_t c, int64_t P, A* sum) {
  using V = Vec<A>;
  V total[lanes];
#pragma GCC unroll 4
  for (int i = 0; i < lanes; i++) total[i] = V::load(sum + c + i * V::size);
  for (int64_t s = 0; s < n; s++) {
    const V w(weights[s]);
    const T* row = values + s * stride + c;
#pragma GCC unroll 4
    for (int i = 0; i < lanes; i++) total[i] = fma(w, lanes == 1 ? load_n<A>(row, P - c) : V::load(row + i * V::size), total[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < lanes; i++) total[i].store(sum + c + i * V::size);
}

// scores[n] become exponentials, and their sum is returned.
template <class A> TZ_INLINE A exponentials(A* scores, int64_t n) {
  using V = Vec<A>;
  A highest = scores[0];
  for (int64_t s = 1; s < n; s++) highest = scores[s] > highest || scores[s] != scores[s] ? scores[s] : highest;
  V total = V::zero();
  for (int64_t s = 0; s < n; s += V::size) {
    V e = exp(V::load(scores + s) - V(highest));
    for (int64_t i = n - s; i < V::size; i++) e.v[i] = A(0);
    e.store(scores + s);
    total = total + e;
  }
  return reduce_add(total);
}

template <class T> void attend(const AttentionUpdateParams& p, int64_t b, int64_t g) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t G = p.H / p.Hk, P = p.P, width = padded<A>(P);
  const int64_t before = p.lengths ? p.lengths[b] : p.length;
  const int64_t slot = p.window ? before % p.window : before, n = p.window ? min_of(before + 1, p.window) : before + 1, room = padded<A>(n);
  const T* qkv = static_cast<const T*>(p.qkv) + b * p.qkv_stride_b;
  T* keys = static_cast<T*>(p.k_cache) + b * p.k_stride_b + g * p.k_stride_h;
  T* values = static_cast<T*>(p.v_cache) + b * p.v_stride_b + g * p.v_stride_h;

  // the queries, padded with zeros and scaled, and the key and value to be kept
  A* q = scratch<A>(kQuerySlot, (G + 1) * width);
  A* turn = scratch<A>(kTurnSlot, 2 * p.R);
  if (p.R) {
    load_tile<A>(p.rotary_dtype, p.cos, b * p.cos_stride_b, 0, 1, 1, p.R, turn, p.R);
    load_tile<A>(p.rotary_dtype, p.sin, b * p.sin_stride_b, 0, 1, 1, p.R, turn + p.R, p.R);
  }
  for (int64_t r = 0; r <= G; r++) {
    A* row = q + r * width;
    const int64_t head = r < G ? g * G + r : p.H + g;
    load_tile<A>(qkv + head * P, 0, 1, 1, P, row, width);
    for (int64_t c = P; c < width; c++) row[c] = A(0);
    rotate(row, turn, p.R, p.interleaved);
    if (r < G)
      for (int64_t c = 0; c < P; c++) row[c] *= static_cast<A>(p.scale);
    else store_tile<A>(row, width, keys + slot * p.k_stride_s, 0, 1, 1, P);
  }
  std::memcpy(values + slot * p.v_stride_s, qkv + (p.H + p.Hk + g) * P, static_cast<size_t>(P) * sizeof(T));

  // scores, and exponentials of them
  A* scores = scratch<A>(kScoreSlot, G * (room + 1));
  A* total = scores + G * room;
  for (int64_t s = 0; s < n; s += V::size)
    for (int64_t r = 0; r < G; r++)
      score_keys(q + r * width, keys + s * p.k_stride_s, p.k_stride_s, min_of(V::size, n - s), P).store(scores + r * room + s);
  for (int64_t r = 0; r < G; r++) total[r] = exponentials(scores + r * room, n);

  // the values they weigh
  A* sum = scratch<A>(kSumSlot, G * width);
  std::memset(sum, 0, static_cast<size_t>(G * width) * sizeof(A));
  for (int64_t s = 0; s < n; s += kKeyBlock)
    for (int64_t r = 0; r < G; r++) {
      const T* block = values + s * p.v_stride_s;
      const A* weights = scores + r * room + s;
      const int64_t count = min_of(kKeyBlock, n - s);
      int64_t c = 0;
      for (; c + kSums * V::size <= P; c += kSums * V::size) add_values<kSums>(weights, block, p.v_stride_s, count, c, P, sum + r * width);
      for (; c < P; c += V::size) add_values<1>(weights, block, p.v_stride_s, count, c, P, sum + r * width);
    }
  T* y = static_cast<T*>(p.y) + (b * p.H + g * G) * P;
  for (int64_t r = 0; r < G; r++)
    for (int64_t c = 0; c < P; c += V::size) store_n(V::load(sum + r * width + c) * V(A(1) / total[r]), y + r * P + c, P - c);
}

}  // namespace

void attention_update(const AttentionUpdateParams& p) {
  int64_t longest = p.length;
  for (int64_t b = 0; b < p.B && p.lengths; b++) longest = max_of(longest, p.lengths[b]);
  const int64_t n = p.window ? min_of(longest + 1, p.window) : longest + 1;
  with_type(p.dtype, [&](auto t) {
    parallel_for(0, p.B * p.Hk, max_of(1, kSerialReads / (2 * n * p.P)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) attend<decltype(t)>(p, i / p.Hk, i % p.Hk);
    });
  });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
