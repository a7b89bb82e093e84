// Choosing experts: the A largest of a token's E scores, the lower index of equals, with their weights, and the gradient of the logits.
// Scores are the softmax or sigmoid of the logits, or the logits (the weights are then the softmax of the chosen ones); a bias counts for
// choosing only; with groups only experts of the best groups can be chosen; weights may be divided by their norm. See pyops/moe.py.
// Layouts: logits [T, E] in any strides, weights and indices [T, A] and dlogits [T, E] contiguous.
//
// Launches and latency are the limit, a token is E numbers. A warp has a token. What is chosen by lies in shared memory; each of the A
// best is the largest of those that stand behind the last one in the order (value falling, index rising), so that nothing is marked, no
// list is kept and no branch depends on more than one comparison. Everything else is computed again where it is needed, from logits in L1.
#include "kernels.h"

#include "common.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kThreads = 128, kTokens = kThreads / kWarp;
constexpr float kNormFloor = 1e-20f;

TZ_DEVICE bool softmax_of_all(const MoeRouteParams& p) { return p.softmax_first && !p.sigmoid; }
TZ_DEVICE bool softmax_of_chosen(const MoeRouteParams& p) { return !p.softmax_first && !p.sigmoid; }

// f(i) over i = 0 .. n - 1, by a warp: the sum, and the largest (of the numbers among them) or `least`.
template <class F> TZ_DEVICE float sum_over(int n, const F& f) {
  float sum = 0;
  for (int i = threadIdx.x % kWarp; i < n; i += kWarp) sum += f(i);
  return warp_sum(sum);
}
template <class F> TZ_DEVICE float max_over(int n, float least, const F& f) {
  float top = least;
  for (int i = threadIdx.x % kWarp; i < n; i += kWarp) top = fmaxf(top, f(i));
  return warp_max(top);
}

// The scores of token t.
struct Scores {
  const MoeRouteParams& p;
  const int64_t row;
  float top = 0, factor = 1;

  TZ_DEVICE Scores(const MoeRouteParams& params, int64_t t) : p(params), row(t * params.logits_stride_t) {
    if (!softmax_of_all(p)) return;
    top = max_over(static_cast<int>(p.E), -INFINITY, [&](int e) { return logit(e); });
    factor = 1 / sum_over(static_cast<int>(p.E), [&](int e) { return expf(logit(e) - top); });
  }
  TZ_DEVICE float logit(int e) const { return load_float(p.dtype, p.logits, row + e * p.logits_stride_e); }
  TZ_DEVICE float operator()(int e) const {
    const float v = logit(e);
    return p.sigmoid ? sigmoid(v) : softmax_of_all(p) ? expf(v - top) * factor : v;
  }
};

// The weights of the chosen experts, before norm and scale. An index of no expert has none.
struct Chosen {
  const Scores& scores;
  const int32_t* ids;  // [A]
  const int A;
  float top = 0, factor = 1;

  TZ_DEVICE Chosen(const Scores& all, int64_t t) : scores(all), ids(all.p.indices + t * all.p.A), A(static_cast<int>(all.p.A)) {
    if (!softmax_of_chosen(all.p)) return;
    top = max_over(A, -INFINITY, [&](int a) { return has(a) ? scores(ids[a]) : -INFINITY; });
    factor = 1 / sum_over(A, [&](int a) { return has(a) ? expf(scores(ids[a]) - top) : 0.0f; });
  }
  TZ_DEVICE bool has(int a) const { return ids[a] >= 0 && ids[a] < scores.p.E; }
  TZ_DEVICE float operator()(int a) const {
    if (!has(a)) return 0;
    const float s = scores(ids[a]);
    return softmax_of_chosen(scores.p) ? expf(s - top) * factor : s;
  }
  TZ_DEVICE float norm() const {
    const float order = static_cast<float>(scores.p.norm_order);
    if (order == INFINITY) return max_over(A, 0, *this);
    if (order == 1) return sum_over(A, *this);
    if (order == 2) return sqrtf(sum_over(A, [&](int a) { return (*this)(a) * (*this)(a); }));
    return powf(sum_over(A, [&](int a) { return powf((*this)(a), order); }), 1 / order);
  }
};

// ---- choosing ------------------------------------------------------------------------------------------------
TZ_DEVICE float orderable(float v) { return v == v ? v : INFINITY; }  // NaN first, as torch sorts it

struct Place { float value; int index; };
// a stands before b: larger, or equal with the lower index.
TZ_DEVICE bool before(const Place& a, const Place& b) { return a.value > b.value || (a.value == b.value && a.index < b.index); }

// The first of n values behind `last`.
TZ_DEVICE Place next_largest(const float* values, int n, const Place& last) {
  Place best{-INFINITY, INT32_MAX};
  for (int i = threadIdx.x % kWarp; i < n; i += kWarp) {
    const Place place{values[i], i};
    if (before(last, place) && before(place, best)) best = place;
  }
#pragma unroll
  for (int lanes = kWarp / 2; lanes; lanes /= 2) {
    const Place other{__shfl_xor_sync(kAllLanes, best.value, lanes), __shfl_xor_sync(kAllLanes, best.index, lanes)};
    if (before(other, best)) best = other;
  }
  return best;
}

// Experts outside the topk_group best groups get -inf. worth [n_group] is scratch.
TZ_DEVICE void mask_groups(const MoeRouteParams& p, float* choice, float* worth) {
  const int lane = threadIdx.x % kWarp, groups = static_cast<int>(p.n_group), size = static_cast<int>(p.E) / groups;
  for (int g = 0; g < groups; g++) {
    float first = -INFINITY, second = -INFINITY;  // the two best
    for (int i = lane; i < size; i += kWarp) {
      const float v = choice[g * size + i];
      second = fmaxf(second, fminf(first, v)), first = fmaxf(first, v);
    }
#pragma unroll
    for (int lanes = kWarp / 2; lanes; lanes /= 2) {
      const float f = __shfl_xor_sync(kAllLanes, first, lanes), s = __shfl_xor_sync(kAllLanes, second, lanes);
      second = fmaxf(fmaxf(second, s), fminf(first, f)), first = fmaxf(first, f);
    }
    if (lane == 0) worth[g] = orderable(p.two_best && size > 1 ? first + second : first);
  }
  __syncwarp();
  Place last{INFINITY, -1};  // stands before everything
  for (int i = 0; i < static_cast<int>(p.topk_group); i++) last = next_largest(worth, groups, last);
  for (int e = lane; e < static_cast<int>(p.E); e += kWarp)
    if (before(last, {worth[e / size], e / size})) choice[e] = -INFINITY;
  __syncwarp();
}

// Grid: tiles of kTokens tokens.
__global__ void __launch_bounds__(kThreads) moe_route_fwd_kernel(const MoeRouteCudaParams p) {
  TZ_DYNAMIC_SHARED(float, rows_smem);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, E = static_cast<int>(p.E), A = static_cast<int>(p.A);
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kTokens + warp;
  if (t >= p.T) return;  // a whole warp, and no barrier follows
  float* choice = p.scores ? p.scores + t * (p.E + p.n_group) : rows_smem + warp * (p.E + p.n_group);
  int32_t* ids = p.indices + t * A;

  const Scores scores(p, t);
  bool nan = false;
  for (int e = lane; e < E; e += kWarp) {
    const float s = scores(e);
    nan |= s != s;
    choice[e] = orderable(p.bias ? s + static_cast<const float*>(p.bias)[e] : s);
  }
  __syncwarp();
  if (__any_sync(kAllLanes, nan)) {
    for (int a = lane; a < A; a += kWarp) ids[a] = a, store_float(NAN, p.dtype, p.weights, t * A + a);
    return;
  }
  if (p.n_group) mask_groups(p, choice, choice + E);
  Place last{INFINITY, -1};
  for (int a = 0; a < A; a++) {
    last = next_largest(choice, E, last);
    if (lane == 0) ids[a] = last.index;
  }
  __syncwarp();

  const Chosen weights(scores, t);
  float scale = static_cast<float>(p.scale);
  if (p.norm_order > 0) scale /= weights.norm() + kNormFloor;
  for (int a = lane; a < A; a += kWarp) store_float(weights(a) * scale, p.dtype, p.weights, t * A + a);
}

// The same grid. d(w / n) = dw / n - w <dw, w> dn / n^2 with n the norm; the softmax over all takes its share from every expert.
__global__ void __launch_bounds__(kThreads) moe_route_bwd_kernel(const MoeRouteCudaParams p) {
  const int lane = threadIdx.x % kWarp, E = static_cast<int>(p.E), A = static_cast<int>(p.A);
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kWarp;
  if (t >= p.T) return;
  const Scores scores(p, t);
  const Chosen w(scores, t);
  const auto dweight = [&](int a) { return load_float(p.dtype, p.dweights, t * A + a); };
  const float scale = static_cast<float>(p.scale), order = static_cast<float>(p.norm_order);
  float norm = 1, n = 1, slope_of_all = 0, ties = 1;
  if (order > 0) {
    norm = w.norm(), n = norm + kNormFloor;
    slope_of_all = sum_over(A, [&](int a) { return dweight(a) * w(a); }) / n;
    if (order == INFINITY) ties = sum_over(A, [&](int a) { return w(a) == norm ? 1.0f : 0.0f; });
  }
  const auto dw = [&](int a, float v) {  // the gradient of w(a) = v
    if (!(order > 0)) return scale * dweight(a);
    float slope = v > 0 ? 1 : 0;  // d norm / d v
    if (order == INFINITY) slope = v == norm ? 1 / ties : 0;
    else if (order == 2 && v > 0) slope = v / norm;
    else if (order != 1 && v > 0) slope = powf(v / norm, order - 1);
    return scale * (dweight(a) - slope_of_all * slope) / n;
  };
  const float inside = p.sigmoid ? 0 : sum_over(A, [&](int a) {
    const float v = w(a);
    return dw(a, v) * v;
  });

  for (int e = lane; e < E; e += kWarp) store_float(softmax_of_all(p) ? -scores(e) * inside : 0, p.dtype, p.dlogits, t * E + e);
  __syncwarp();  // the chosen ones again
  for (int a = lane; a < A; a += kWarp) {
    if (!w.has(a)) continue;
    const float v = w(a), d = dw(a, v);
    store_float(p.sigmoid ? d * v * (1 - v) : v * (d - inside), p.dtype, p.dlogits, t * E + w.ids[a]);
  }
}

bool can_run(const MoeRouteCudaParams& p) { return p.dtype != DType::f64 && p.E <= INT32_MAX - kWarp && ceil_div(p.T, kTokens) <= INT32_MAX; }
dim3 grid(const MoeRouteCudaParams& p) { return dim3(static_cast<unsigned>(ceil_div(p.T, kTokens))); }

}  // namespace

cudaError_t moe_route_fwd_cuda(const MoeRouteCudaParams& p, cudaStream_t stream) {
  if (!can_run(p)) return cudaErrorInvalidValue;
  if (p.T == 0) return cudaSuccess;
  const size_t shared = p.scores ? 0 : static_cast<size_t>(kTokens * (p.E + p.n_group)) * sizeof(float);
  return launch(moe_route_fwd_kernel, grid(p), kThreads, shared, stream, p);
}

cudaError_t moe_route_bwd_cuda(const MoeRouteCudaParams& p, cudaStream_t stream) {
  if (!can_run(p)) return cudaErrorInvalidValue;
  if (p.T == 0) return cudaSuccess;
  return launch(moe_route_bwd_kernel, grid(p), kThreads, 0, stream, p);
}

}}  // namespace terrazzo::cuda
