// Routing of tokens to experts and the way back.
//
//   route      per token: scores = softmax or sigmoid of the logits; the top_k best by score + bias, inside the best groups;
//              weights = their scores, normalised and scaled. stats[t] = (sum of exponentials or 0, norm) for the backward.
//   permute    counting sort of the pairs (token, expert) by expert, ties in token order
//   unpermute  y[t] = sum over a of weights[t, a] * rows[inverse[t, a]]
//
// Sources: transformers' DBRX, Mixtral, DeepSeek-V3 and gpt-oss routers.
#include "../common/parallel.h"
#include "../common/params.h"
#include "tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

enum Slot { kSlotRow, kSlotGroups };

// All numbers of one row stand in scratch, padded to whole vectors.
template <class A> struct RouteRow {
  A *logits, *scores, *choice;
};

// Positions of the k largest of choice[n], largest first, the lower index first among equals; taken entries become -inf.
template <class A> void take_best(A* choice, int64_t n, int64_t k, int32_t* best) {
  for (int64_t a = 0; a < k; a++) {
    int64_t at = 0;
    for (int64_t e = 1; e < n; e++)
      if (choice[e] > choice[at]) at = e;
    best[a] = static_cast<int32_t>(at);
    choice[at] = -INFINITY;
  }
}

template <class A> A norm_of(const A* weights, int64_t k, double order) {
  A sum = 0;
  for (int64_t a = 0; a < k; a++) {
    const A w = std::abs(weights[a]);
    if (order == 1) sum += w;
    else if (order == 2) sum += w * w;
    else sum = w > sum ? w : sum;
  }
  return order == 2 ? std::sqrt(sum) : sum;
}

// exp(x - max) over n padded values; returns their sum.
template <class A> A exponentials(const A* x, int64_t n, A* out) {
  A top = x[0];
  for (int64_t e = 1; e < n; e++) top = x[e] > top ? x[e] : top;
  A sum = 0;
  for (int64_t e = 0; e < n; e += Vec<A>::size) exp(Vec<A>::load(x + e) - Vec<A>(top)).store(out + e);
  for (int64_t e = 0; e < n; e++) sum += out[e];
  return sum;
}

// choice = -inf outside the topk_group best groups.
template <class A> void keep_groups(const MoeRouteParams& p, A* choice) {
  const int64_t size = p.E / p.n_group;
  A* best = scratch<A>(kSlotGroups, 2 * p.n_group);
  for (int64_t g = 0; g < p.n_group; g++) {
    A first = -INFINITY, second = -INFINITY;
    for (int64_t e = g * size; e < (g + 1) * size; e++) {
      if (choice[e] > first) second = first, first = choice[e];
      else if (choice[e] > second) second = choice[e];
    }
    best[g] = p.bias && size > 1 ? first + second : first;
    best[p.n_group + g] = 0;
  }
  for (int64_t kept = 0; kept < p.topk_group; kept++) {
    int64_t at = -1;
    for (int64_t g = 0; g < p.n_group; g++)
      if (best[p.n_group + g] == 0 && (at < 0 || best[g] > best[at])) at = g;
    best[p.n_group + at] = 1;
  }
  for (int64_t g = 0; g < p.n_group; g++)
    for (int64_t e = g * size; e < (g + 1) * size && best[p.n_group + g] == 0; e++) choice[e] = -INFINITY;
}

template <class A, class S> void route_token(const MoeRouteParams& p, int64_t t, const RouteRow<A>& row) {
  const S* logits = static_cast<const S*>(p.logits) + t * p.logits_stride_t;
  int32_t* indices = p.indices + t * p.top_k;
  S* weights = static_cast<S*>(p.weights) + t * p.top_k;
  A* stats = static_cast<A*>(p.stats) + 2 * t;
  bool broken = false;
  for (int64_t e = 0; e < p.E; e++) {
    row.logits[e] = load1<A>(logits + e * p.logits_stride_e);
    broken |= row.logits[e] != row.logits[e];
  }
  if (broken) {
    for (int64_t a = 0; a < p.top_k; a++) indices[a] = static_cast<int32_t>(a), store1(static_cast<A>(NAN), weights + a);
    stats[0] = stats[1] = NAN;
    return;
  }
  A sum = 0;
  if (p.sigmoid) {
    for (int64_t e = 0; e < p.E; e += Vec<A>::size) sigmoid(Vec<A>::load(row.logits + e)).store(row.scores + e);
  } else if (p.softmax_first) {
    sum = exponentials(row.logits, p.E, row.scores);
    for (int64_t e = 0; e < p.E; e++) row.scores[e] /= sum;
  } else {
    std::memcpy(row.scores, row.logits, static_cast<size_t>(p.E) * sizeof(A));
  }
  const A* bias = static_cast<const A*>(p.bias);
  for (int64_t e = 0; e < p.E; e++) row.choice[e] = row.scores[e] + (bias ? bias[e] : A(0));
  if (p.n_group > 0) keep_groups(p, row.choice);
  take_best(row.choice, p.E, p.top_k, indices);
  A* chosen = row.choice;
  for (int64_t a = 0; a < p.top_k; a++) chosen[a] = row.scores[indices[a]];
  if (!p.softmax_first && !p.sigmoid) {
    A top = chosen[0];
    for (int64_t a = 1; a < p.top_k; a++) top = chosen[a] > top ? chosen[a] : top;
    for (int64_t a = 0; a < p.top_k; a++) sum += chosen[a] = std::exp(chosen[a] - top);
    for (int64_t a = 0; a < p.top_k; a++) chosen[a] /= sum;
  }
  const A norm = p.norm_order ? norm_of(chosen, p.top_k, p.norm_order) : A(1);
  for (int64_t a = 0; a < p.top_k; a++) store1(static_cast<A>(chosen[a] / norm * p.scale), weights + a);
  stats[0] = sum, stats[1] = norm;
}

// The gradient of the chosen scores behind norm and scale: dweights -> dscores, in place; `chosen` are the scores.
template <class A> void through_norm(const MoeRouteParams& p, const A* chosen, A norm, A* grad) {
  A dot = 0, top = 0;
  for (int64_t a = 0; a < p.top_k; a++) {
    grad[a] *= static_cast<A>(p.scale);
    dot += grad[a] * chosen[a];
    top = std::abs(chosen[a]) > top ? std::abs(chosen[a]) : top;
  }
  if (!p.norm_order) return;
  A largest = 0;  // torch shares the slope of a maximum among equals
  for (int64_t a = 0; a < p.top_k; a++) largest += std::abs(chosen[a]) == top;
  for (int64_t a = 0; a < p.top_k; a++) {
    const A sign = chosen[a] < 0 ? A(-1) : A(1);
    A slope = sign;
    if (p.norm_order == 2) slope = chosen[a] / norm;
    else if (p.norm_order != 1) slope = std::abs(chosen[a]) == top ? sign / largest : A(0);
    grad[a] = grad[a] / norm - dot / (norm * norm) * slope;
  }
}

template <class A, class S> void route_token_bwd(const MoeRouteParams& p, int64_t t, const RouteRow<A>& row) {
  const S *logits = static_cast<const S*>(p.logits) + t * p.logits_stride_t, *dweights = static_cast<const S*>(p.dweights) + t * p.top_k;
  S* dlogits = static_cast<S*>(p.dlogits) + t * p.E;
  const int32_t* indices = p.indices + t * p.top_k;
  const A* stats = static_cast<const A*>(p.stats) + 2 * t;
  A *chosen = row.choice, *grad = row.choice + p.E;
  for (int64_t e = 0; e < p.E; e++) row.logits[e] = load1<A>(logits + e * p.logits_stride_e), row.scores[e] = 0;
  const bool over_all = p.softmax_first && !p.sigmoid;
  A top = over_all ? row.logits[0] : row.logits[indices[0]];
  for (int64_t e = 1; e < (over_all ? p.E : p.top_k); e++) {
    const A x = over_all ? row.logits[e] : row.logits[indices[e]];
    top = x > top ? x : top;
  }
  const auto score = [&](A x) { return p.sigmoid ? sigmoid1(x) : std::exp(x - top) / stats[0]; };
  for (int64_t a = 0; a < p.top_k; a++) {
    chosen[a] = score(row.logits[indices[a]]);
    grad[a] = load1<A>(dweights + a);
  }
  through_norm(p, chosen, stats[1], grad);
  A dot = 0;
  for (int64_t a = 0; a < p.top_k; a++) dot += grad[a] * chosen[a];
  for (int64_t a = 0; a < p.top_k; a++) {
    if (p.sigmoid) row.scores[indices[a]] = grad[a] * chosen[a] * (A(1) - chosen[a]);
    else row.scores[indices[a]] = chosen[a] * (over_all ? grad[a] : grad[a] - dot);
  }
  for (int64_t e = 0; e < p.E; e++) store1(static_cast<A>(over_all ? row.scores[e] - dot * score(row.logits[e]) : row.scores[e]), dlogits + e);
}

template <class F> void for_tokens(const MoeRouteParams& p, const F& fn) {
  with_type(p.dtype, [&](auto s) {
    using S = decltype(s);
    using A = acc_t<S>;
    parallel_for(0, p.T, max_of(1, 16384 / (p.E * (p.top_k + 4))), [&](int64_t begin, int64_t end) {
      const int64_t padded = ceil_div(p.E, Vec<A>::size) * Vec<A>::size;
      A* base = scratch<A>(kSlotRow, 4 * padded);
      for (int64_t i = 0; i < 4 * padded; i++) base[i] = 0;
      for (int64_t t = begin; t < end; t++) fn(s, t, RouteRow<A>{base, base + padded, base + 2 * padded});
    });
  });
}

}  // namespace

void moe_route_fwd(const MoeRouteParams& p) {
  for_tokens(p, [&](auto s, int64_t t, const auto& row) { route_token<acc_t<decltype(s)>, decltype(s)>(p, t, row); });
}
void moe_route_bwd(const MoeRouteParams& p) {
  for_tokens(p, [&](auto s, int64_t t, const auto& row) { route_token_bwd<acc_t<decltype(s)>, decltype(s)>(p, t, row); });
}

void moe_permute(const MoePermuteParams& p) {
  int32_t* next = scratch<int32_t>(kSlotRow, p.E + 1);
  std::memset(next, 0, static_cast<size_t>(p.E + 1) * sizeof(int32_t));
  const auto bin = [&](int64_t pair) { return p.indices[pair] < p.E ? p.indices[pair] : p.E; };
  for (int64_t pair = 0; pair < p.pairs; pair++) next[bin(pair)]++;
  int32_t total = 0;
  for (int64_t e = 0; e <= p.E; e++) {
    const int32_t count = next[e];
    next[e] = total;
    total += count;
    if (e < p.E) p.offs[e] = total;
  }
  for (int64_t pair = 0; pair < p.pairs; pair++) {
    const int32_t place = next[bin(pair)]++;
    p.inverse[pair] = place;
    p.order[place] = static_cast<int32_t>(pair);
  }
}

void moe_unpermute_fwd(const MoeUnpermuteParams& p) {
  with_type(p.dtype, [&](auto s) {
    using S = decltype(s);
    using A = acc_t<S>;
    const A* weights = static_cast<const A*>(p.weights);
    parallel_for(0, p.T, max_of(1, 65536 / (p.A * p.D)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        for (int64_t d = 0; d < p.D; d += Vec<A>::size) {
          Vec<A> sum = Vec<A>::zero();
          for (int64_t a = 0; a < p.A; a++)
            sum = fma(Vec<A>(weights[t * p.A + a]), load_n<A>(static_cast<const S*>(p.rows) + p.inverse[t * p.A + a] * p.rows_stride + d, p.D - d), sum);
          store_n(sum, static_cast<S*>(p.y) + t * p.D + d, p.D - d);
        }
    });
  });
}

// drows[inverse[t, a]] = weights[t, a] dy[t] (each row has one pair; the caller has zeroed the others), dweights = <dy, row>.
void moe_unpermute_bwd(const MoeUnpermuteParams& p) {
  with_type(p.dtype, [&](auto s) {
    using S = decltype(s);
    using A = acc_t<S>;
    const A* weights = static_cast<const A*>(p.weights);
    parallel_for(0, p.T, max_of(1, 65536 / (p.A * p.D)), [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin * p.A; pair < end * p.A; pair++) {
        const S *dy = static_cast<const S*>(p.dy) + pair / p.A * p.D, *row = static_cast<const S*>(p.rows) + p.inverse[pair] * p.rows_stride;
        S* drow = static_cast<S*>(p.drows) + static_cast<int64_t>(p.inverse[pair]) * p.D;
        Vec<A> dot = Vec<A>::zero();
        for (int64_t d = 0; d < p.D; d += Vec<A>::size) {
          const Vec<A> v = load_n<A>(dy + d, p.D - d);
          dot = fma(v, load_n<A>(row + d, p.D - d), dot);
          store_n(Vec<A>(weights[pair]) * v, drow + d, p.D - d);
        }
        static_cast<A*>(p.dweights)[pair] = reduce_add(dot);
      }
    });
  });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
