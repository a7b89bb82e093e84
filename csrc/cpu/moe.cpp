// Choosing experts, sorting tokens by expert, and summing each token's rows up again.
//   route:      the A largest of E scores a token (ties: the lower index), their weights, and the gradient of the logits
//   permute:    counting sort of the pairs (token, choice) by expert, stable; indices >= E go last
//   unpermute:  y[t] = sum over a of weights[t, a] rows[inverse[t, a]]
//
// A token's scores lie in a padded scratch row; each of the largest is a vector maximum and a look for where it stands:
// a sorted list of the best so far took 1.3 to 3 times as long, its branches depend on the data.
// Sorting is one thread's work: two passes over 4-byte indices. Every token's result is one thread's, in a fixed order.
#include "../common/parallel.h"
#include "../common/params.h"
#include "reduce_max.h"
#include "tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

enum RouteScratch { kScoreSlot, kChoiceSlot, kChosenSlot, kIdSlot, kGroupSlot };
constexpr int64_t kSerialElements = 16384;

template <class A> TZ_INLINE int64_t padded(int64_t n) { return ceil_div(n, Vec<A>::size) * Vec<A>::size; }

// One bit for each lane that equals `value`.
template <class A> TZ_INLINE uint64_t equal_lanes(Vec<A> v, A value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_cmp_ps_mask((__m512)v.v, _mm512_set1_ps(value), _CMP_EQ_OQ);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v.v, _mm256_set1_ps(value), _CMP_EQ_OQ)));
#endif
  uint64_t bits = 0;
  for (int i = 0; i < Vec<A>::size; i++) bits |= static_cast<uint64_t>(v.v[i] == value) << i;
  return bits;
}

// s[padded(n)] becomes its softmax; the padding counts for nothing.
template <class A> void softmax(A* s, int64_t n) {
  using V = Vec<A>;
  const int64_t end = padded<A>(n);
  for (int64_t c = n; c < end; c++) s[c] = -INFINITY;
  V top = V::load(s), sum = V::zero();
  for (int64_t c = V::size; c < end; c += V::size) top = max(top, V::load(s + c));
  const V highest(reduce_max(top));
  for (int64_t c = 0; c < end; c += V::size) {
    const V e = exp(V::load(s + c) - highest);
    e.store(s + c);
    sum = sum + e;
  }
  const V scale(A(1) / reduce_add(sum));
  for (int64_t c = 0; c < end; c += V::size) (V::load(s + c) * scale).store(s + c);
}

// Scores of token t: softmax or sigmoid of its logits, or the logits.
template <class T> void load_scores(const MoeRouteParams& p, int64_t t, acc_t<T>* s) {
  using A = acc_t<T>;
  using V = Vec<A>;
  load_tile<A>(static_cast<const T*>(p.logits) + t * p.logits_stride_t, 0, p.logits_stride_e, 1, p.E, s, p.E);
  if (p.sigmoid) {
    for (int64_t c = p.E; c < padded<A>(p.E); c++) s[c] = 0;
    for (int64_t c = 0; c < p.E; c += V::size) sigmoid(V::load(s + c)).store(s + c);
  } else if (p.softmax_first) {
    softmax(s, p.E);
  }
}

template <class A> bool has_nan(const A* s, int64_t n) {
  bool found = false;
  for (int64_t i = 0; i < n; i++) found |= s[i] != s[i];
  return found;
}

// ids[k]: where the k largest of n values stand, the largest first, and the first of equals; values[padded(n)] is used
// up: what was taken becomes NaN, which is no maximum and equals nothing. No branch depends on the values.
template <class A> void largest(A* values, int64_t n, int64_t k, int32_t* ids) {
  using V = Vec<A>;
  const int64_t end = padded<A>(n);
  for (int64_t c = n; c < end; c++) values[c] = static_cast<A>(NAN);
  for (int64_t j = 0; j < k; j++) {
    V top(static_cast<A>(-INFINITY));
    for (int64_t c = 0; c < end; c += V::size) top = max(top, V::load(values + c));
    const A highest = reduce_max(top);
    int64_t found = n - 1;
    for (int64_t c = 0; c < end; c += 64) {
      uint64_t bits = 0;
      for (int64_t i = 0; i < min_of(64, end - c); i += V::size) bits |= equal_lanes(V::load(values + c + i), highest) << i;
      if (!bits) continue;
      found = c + __builtin_ctzll(bits);
      break;
    }
    ids[j] = static_cast<int32_t>(found);
    values[found] = static_cast<A>(NAN);
  }
}

// Experts outside the topk_group best groups get -inf. ids has room for the groups, worth for them twice over.
template <class A> void mask_groups(const MoeRouteParams& p, A* choice, int32_t* ids, A* worth) {
  const int64_t size = p.E / p.n_group;
  A* chosen = worth + padded<A>(p.n_group);
  for (int64_t g = 0; g < p.n_group; g++) {
    A first = -INFINITY, second = -INFINITY;
    for (int64_t i = g * size; i < (g + 1) * size; i++) {
      const A v = choice[i];
      if (v > first) second = first, first = v;
      else if (v > second) second = v;
    }
    worth[g] = p.two_best && size > 1 ? first + second : first;
    chosen[g] = 0;
  }
  largest(worth, p.n_group, p.topk_group, ids);
  for (int64_t i = 0; i < p.topk_group; i++) chosen[ids[i]] = 1;
  for (int64_t i = 0; i < p.E; i++)
    if (chosen[i / size] == 0) choice[i] = -INFINITY;
}

constexpr double kNormFloor = 1e-20;

template <class A> A norm_of(const A* w, int64_t n, double order) {
  A sum = 0;
  if (order == INFINITY) {
    for (int64_t i = 0; i < n; i++) sum = w[i] > sum ? w[i] : sum;
    return sum;
  }
  for (int64_t i = 0; i < n; i++) sum += order == 1 ? w[i] : order == 2 ? w[i] * w[i] : std::pow(w[i], static_cast<A>(order));
  return order == 1 ? sum : order == 2 ? std::sqrt(sum) : std::pow(sum, static_cast<A>(1 / order));
}

// w[A]: the chosen scores, or the softmax of the chosen logits; before norm and scale.
template <class A> void chosen_scores(const MoeRouteParams& p, const A* s, const int32_t* ids, A* w) {
  for (int64_t a = 0; a < p.A; a++) w[a] = s[ids[a]];
  if (!p.sigmoid && !p.softmax_first) softmax(w, p.A);
}

struct RouteRows {  // what one thread works in
  template <class A> static A* scores(const MoeRouteParams& p) { return scratch<A>(kScoreSlot, padded<A>(p.E)); }
  template <class A> static A* chosen(const MoeRouteParams& p) { return scratch<A>(kChosenSlot, padded<A>(p.A)); }
};

template <class T> void route(const MoeRouteParams& p) {
  using A = acc_t<T>;
  parallel_for(0, p.T, max_of(1, kSerialElements / p.E), [&](int64_t begin, int64_t end) {
    A *s = RouteRows::scores<A>(p), *w = RouteRows::chosen<A>(p);
    A *choice = scratch<A>(kChoiceSlot, padded<A>(p.E)), *worth = scratch<A>(kGroupSlot, 2 * padded<A>(p.n_group + 1));
    const A* bias = static_cast<const A*>(p.bias);
    int32_t* group_ids = scratch<int32_t>(kIdSlot, p.n_group + 1);
    for (int64_t t = begin; t < end; t++) {
      int32_t* ids = p.indices + t * p.A;
      load_scores<T>(p, t, s);
      const bool nan = has_nan(s, p.sigmoid || !p.softmax_first ? p.E : 1);  // a softmax is NaN everywhere or nowhere
      if (nan) {
        for (int64_t a = 0; a < p.A; a++) ids[a] = static_cast<int32_t>(a);
      } else {
        if (bias)
          for (int64_t e = 0; e < p.E; e++) choice[e] = s[e] + bias[e];
        else
          for (int64_t e = 0; e < p.E; e++) choice[e] = s[e];
        if (p.n_group) mask_groups(p, choice, group_ids, worth);
        largest(choice, p.E, p.A, ids);
      }
      chosen_scores(p, s, ids, w);
      A scale = static_cast<A>(p.scale);
      if (p.norm_order > 0) scale /= norm_of(w, p.A, p.norm_order) + static_cast<A>(kNormFloor);
      for (int64_t a = 0; a < p.A; a++) store1(nan ? static_cast<A>(NAN) : w[a] * scale, static_cast<T*>(p.weights) + t * p.A + a);
    }
  });
}

// dw[A] becomes the gradient of the chosen scores w: through the scale, and the norm where there is one.
template <class A> void norm_backward(const MoeRouteParams& p, const A* w, A* dw) {
  const A scale = static_cast<A>(p.scale);
  if (p.norm_order <= 0) {
    for (int64_t a = 0; a < p.A; a++) dw[a] *= scale;
    return;
  }
  const A norm = norm_of(w, p.A, p.norm_order), n = norm + static_cast<A>(kNormFloor);
  A dot = 0, ties = 0;
  for (int64_t a = 0; a < p.A; a++) dot += dw[a] * w[a], ties += w[a] == norm;
  for (int64_t a = 0; a < p.A; a++) {
    A slope = w[a] > 0;  // d norm / d w[a]
    if (p.norm_order == INFINITY) slope = w[a] == norm ? 1 / ties : 0;
    else if (p.norm_order != 1 && w[a] > 0) slope = p.norm_order == 2 ? w[a] / norm : std::pow(w[a] / norm, static_cast<A>(p.norm_order - 1));
    dw[a] = scale * (dw[a] - dot / n * slope) / n;
  }
}

template <class T> void route_backward(const MoeRouteParams& p) {
  using A = acc_t<T>;
  parallel_for(0, p.T, max_of(1, kSerialElements / p.E), [&](int64_t begin, int64_t end) {
    A *s = RouteRows::scores<A>(p), *w = RouteRows::chosen<A>(p), *dw = scratch<A>(kChoiceSlot, p.A);
    for (int64_t t = begin; t < end; t++) {
      const int32_t* ids = p.indices + t * p.A;
      load_scores<T>(p, t, s);
      chosen_scores(p, s, ids, w);
      load_tile<A>(static_cast<const T*>(p.dweights) + t * p.A, 0, 1, 1, p.A, dw, p.A);
      norm_backward(p, w, dw);
      A dot = 0;
      for (int64_t a = 0; a < p.A; a++) dot += dw[a] * w[a];
      // softmax over all: -s dot everywhere; the chosen ones have a gradient of their own on top
      const bool everywhere = p.softmax_first && !p.sigmoid;
      for (int64_t e = 0; e < p.E; e++) s[e] = everywhere ? -s[e] * dot : A(0);
      for (int64_t a = 0; a < p.A; a++) s[ids[a]] += p.sigmoid ? dw[a] * w[a] * (1 - w[a]) : w[a] * (everywhere ? dw[a] : dw[a] - dot);
      store_tile<A>(s, p.E, static_cast<T*>(p.dlogits) + t * p.E, p.E, 1, 1, p.E);
    }
  });
}

// ---- unpermute ---------------------------------------------------------------------------------------------
template <class T> void unpermute(const MoeUnpermuteParams& p) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const A* weights = static_cast<const A*>(p.weights);
  parallel_for(0, p.T, max_of(1, kSerialElements / (p.A * p.D)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t d = 0; d < p.D; d += V::size) {
        V sum = V::zero();
        for (int64_t a = 0; a < p.A; a++) {
          const T* row = static_cast<const T*>(p.rows) + p.inverse[t * p.A + a] * p.rows_stride;
          sum = fma(load_n<A>(row + d, p.D - d), V(weights[t * p.A + a]), sum);
        }
        store_n(sum, static_cast<T*>(p.y) + t * p.D + d, p.D - d);
      }
  });
}

// drows of every pair once, since inverse is a permutation; dweights is their dot product with dy.
template <class T> void unpermute_backward(const MoeUnpermuteParams& p) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const A* weights = static_cast<const A*>(p.weights);
  parallel_for(0, p.T, max_of(1, kSerialElements / (p.A * p.D)), [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin * p.A; pair < end * p.A; pair++) {
      const T* dy = static_cast<const T*>(p.dy) + pair / p.A * p.D;
      const T* row = static_cast<const T*>(p.rows) + p.inverse[pair] * p.rows_stride;
      T* drow = static_cast<T*>(p.drows) + p.inverse[pair] * p.D;
      const V w(weights[pair]);
      V dot = V::zero();
      for (int64_t d = 0; d < p.D; d += V::size) {
        const V g = load_n<A>(dy + d, p.D - d);
        dot = fma(g, load_n<A>(row + d, p.D - d), dot);
        store_n(g * w, drow + d, p.D - d);
      }
      static_cast<A*>(p.dweights)[pair] = reduce_add(dot);
    }
  });
}

}  // namespace

void moe_route_fwd(const MoeRouteParams& p) {
  with_type(p.dtype, [&](auto t) { route<decltype(t)>(p); });
}
void moe_route_bwd(const MoeRouteParams& p) {
  with_type(p.dtype, [&](auto t) { route_backward<decltype(t)>(p); });
}

void moe_permute(const MoePermuteParams& p) {
  int32_t* offs = p.offs;
  for (int64_t e = 0; e < p.E; e++) offs[e] = 0;
  for (int64_t i = 0; i < p.pairs; i++)
    if (p.indices[i] < p.E) offs[p.indices[i]]++;
  int32_t start = 0;
  for (int64_t e = 0; e < p.E; e++) {  // starts for now; each placed pair moves its expert's on, to the end at last
    const int32_t count = offs[e];
    offs[e] = start, start += count;
  }
  for (int64_t i = 0; i < p.pairs; i++) {
    int32_t& next = p.indices[i] < p.E ? offs[p.indices[i]] : start;
    p.inverse[i] = next;
    p.order[next++] = static_cast<int32_t>(i);
  }
}

void moe_unpermute_fwd(const MoeUnpermuteParams& p) {
  with_type(p.dtype, [&](auto t) { unpermute<decltype(t)>(p); });
}
void moe_unpermute_bwd(const MoeUnpermuteParams& p) {
  with_type(p.dtype, [&](auto t) { unpermute_backward<decltype(t)>(p); });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
