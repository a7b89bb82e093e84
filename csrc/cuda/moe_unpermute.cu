// Each token's rows summed up again: y[t] = sum over a of weights[t, a] rows[inverse[t, a]].
// Layouts: rows [T * A, D] with a row stride, weights and inverse [T, A], y [T, D] and drows [T * A, D] contiguous. inverse is a
// permutation; a place that isn't one of the rows counts for nothing. The same sums a token's slots in fused_experts, where the rows of
// pairs of no expert of ours, behind `live` of them, hold nothing.
//
// Memory bandwidth is the limit: rows read once, y written once. Forward: a thread has 16 bytes of the channels of one token and reads
// kRows rows of it at a time, all under way at once. Backward: a warp has one pair, so that dweights is a sum over lanes; drows of
// every pair is written once, and dy comes from L1 or L2 for all but one of a token's pairs, neighbours in a block.
#include "kernels.h"

#include "common.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kThreads = 128, kRows = 4, kSteps = 2;
constexpr int kPairs = kThreads / kWarp;  // of a block of the backward

// Grid: tiles of `tokens` tokens.
template <class T, int kVec> __global__ void __launch_bounds__(kThreads) moe_unpermute_fwd_kernel(const MoeUnpermuteCudaParams p, const int tokens) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * tokens, left = p.T - first;
  const int pieces = static_cast<int>(p.D / kVec), count = pieces * static_cast<int>(left < tokens ? left : tokens), A = static_cast<int>(p.A);
  const int64_t rows = p.live ? *p.live : p.T * A;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int token = i / pieces;
    const int64_t t = first + token, d = static_cast<int64_t>(i - token * pieces) * kVec;
    const int32_t* inverse = p.inverse + t * A;
    const float* weights = static_cast<const float*>(p.weights) + (p.weights ? t * A : 0);
    float acc[kVec] = {};
    for (int a = 0; a < A; a += kRows) {
      Vector<T, kVec> rows_rmem[kRows];
      bool live[kRows];
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const int place = a + r < A ? inverse[a + r] : -1;
        live[r] = place >= 0 && place < rows;
        if (live[r]) rows_rmem[r] = load_vector<T, kVec>(static_cast<const T*>(p.rows) + place * p.rows_stride + d);
      }
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (!live[r]) continue;
        const float weight = p.weights ? weights[a + r] : 1.0f;
        float v[kVec];
        to_floats(rows_rmem[r], v);
#pragma unroll
        for (int j = 0; j < kVec; j++) acc[j] += weight * v[j];
      }
    }
    store_vector(to_vector<T>(acc), static_cast<T*>(p.y) + t * p.D + d);
  }
}

// Grid: tiles of kPairs pairs.
template <class T, int kVec> __global__ void __launch_bounds__(kThreads) moe_unpermute_bwd_kernel(const MoeUnpermuteCudaParams p) {
  constexpr int kStep = kWarp * kVec;
  const int lane = threadIdx.x % kWarp;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kPairs + threadIdx.x / kWarp;
  if (pair >= p.T * p.A) return;  // a whole warp
  const int64_t place = p.inverse[pair];
  const bool live = place >= 0 && place < p.T * p.A;
  const T* dy = static_cast<const T*>(p.dy) + pair / p.A * p.D;
  const T* row = static_cast<const T*>(p.rows) + place * p.rows_stride;
  T* drow = static_cast<T*>(p.drows) + place * p.D;
  const float weight = static_cast<const float*>(p.weights)[pair];
  float dot = 0;
  for (int64_t first = lane * kVec; live && first < p.D; first += kSteps * kStep) {
    Vector<T, kVec> dy_rmem[kSteps], row_rmem[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      const int64_t d = first + i * kStep;
      if (d < p.D) dy_rmem[i] = load_vector<T, kVec>(dy + d), row_rmem[i] = load_vector<T, kVec>(row + d);
    }
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      const int64_t d = first + i * kStep;
      if (d >= p.D) continue;
      float grad[kVec], v[kVec];
      to_floats(dy_rmem[i], grad);
      to_floats(row_rmem[i], v);
#pragma unroll
      for (int j = 0; j < kVec; j++) dot += grad[j] * v[j], grad[j] *= weight;
      store_vector(to_vector<T>(grad), drow + d);
    }
  }
  dot = warp_sum(dot);
  if (lane == 0) static_cast<float*>(p.dweights)[pair] = dot;
}

// fn(T{}, vector width)
template <int value> struct Constant { static constexpr int v = value; };
template <class F> cudaError_t with_shape(const MoeUnpermuteCudaParams& p, bool rows_aligned, const F& fn) {
  if (p.T * p.A > INT32_MAX || p.D > INT32_MAX / kThreads) return cudaErrorInvalidValue;
  return with_type(p.dtype, [&](auto t) {
    constexpr int kVec = kVectorBytes / sizeof(t);
    return rows_aligned && p.D % kVec == 0 && aligned(p.rows, p.rows_stride, sizeof(t)) ? fn(t, Constant<kVec>{}) : fn(t, Constant<1>{});
  });
}
// Tokens of a block: as many pieces as leave few threads idle at the end.
int tokens_of(int64_t pieces) { return static_cast<int>(pieces >= 4 * kThreads ? 1 : pieces >= kWarp ? 4 : 4 * kThreads / pieces); }
unsigned count(int64_t n) { return static_cast<unsigned>(n); }

}  // namespace

cudaError_t moe_unpermute_fwd_cuda(const MoeUnpermuteCudaParams& p, cudaStream_t stream) {
  if (p.T == 0 || p.D == 0) return cudaSuccess;
  return with_shape(p, aligned(p.y, p.D, size_of(p.dtype)), [&](auto t, auto vec) {
    const int tokens = tokens_of(p.D / decltype(vec)::v);
    return launch(moe_unpermute_fwd_kernel<decltype(t), decltype(vec)::v>, dim3(count(ceil_div(p.T, tokens))), kThreads, 0, stream, p, tokens);
  });
}

cudaError_t moe_unpermute_bwd_cuda(const MoeUnpermuteCudaParams& p, cudaStream_t stream) {
  if (p.T * p.A == 0) return cudaSuccess;
  const int64_t bytes = size_of(p.dtype);
  return with_shape(p, aligned(p.dy, p.D, bytes) && aligned(p.drows, p.D, bytes), [&](auto t, auto vec) {
    return launch(moe_unpermute_bwd_kernel<decltype(t), decltype(vec)::v>, dim3(count(ceil_div(p.T * p.A, kPairs))), kThreads, 0, stream, p);
  });
}

}}  // namespace terrazzo::cuda
