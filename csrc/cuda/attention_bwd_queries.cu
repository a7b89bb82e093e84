// Attention on a band, backward by queries. With w[i, j] = 2^(score[i, j] - lse[i]), g = dy and delta[i] = sum over j of w[i, j] (g[i] . v[j]):
//   ds[i, j] = w[i, j] (g[i] . v[j] - delta[i]);   dq[i] = scale sum over j of ds[i, j] k[j].
//
// As the forward, with two products over P for each tile of keys and one weighted sum. Where the forward has kept y and lse, delta is
// g . y; else the keys are walked once before, for both. That delta has the same bits as g . v where a query sees a single key: its
// gradients are exactly zero. lse and delta are left to the pass by keys.
#include "attention.cuh"
#include "kernels.h"

namespace terrazzo { namespace cuda {
namespace {

// Wide heads are shared out over kSplit warps, each with all of the scores and a part of dq's channels.
template <class T, int kP> struct Shape {
  static constexpr int kRowBytes = kP * sizeof(T);
  static constexpr int kSplit = kRowBytes <= 256 ? 1 : 2;
  static constexpr int kM = 16 * kAttentionWarps / kSplit, kN = kRowBytes <= 256 ? 32 : 16;
  static constexpr int kBlocksPerSm = kRowBytes <= 128 ? 3 : 2;  // registers for so many, without spilling
  static constexpr int kStages = kRowBytes <= 512 ? 2 : 1;
  static constexpr size_t kShared = sizeof(T) * kPitch<T, kP> * (2 * kM + 2 * kStages * kN);
};

// The lane's part of a row's dy . y, channels in the order of its accesses.
template <class T> TZ_DEVICE float partial_dot(const T* a, const T* b, int P, bool vectors) {
  constexpr int kVec = kVectorBytes / sizeof(T);
  float sum = 0;
  if (!vectors) {
    for (int c = lane_id() % 4; c < P; c += 4) sum += to_float(a[c]) * to_float(b[c]);
    return sum;
  }
  for (int c = lane_id() % 4 * kVec; c < P; c += 4 * kVec) {
    float x[kVec], y[kVec];
    load_floats<T, kVec>(a + c, x);
    load_floats<T, kVec>(b + c, y);
#pragma unroll
    for (int j = 0; j < kVec; j++) sum += x[j] * y[j];
  }
  return sum;
}

template <class T, int kP>
__global__ void __launch_bounds__(kAttentionThreads, (Shape<T, kP>::kBlocksPerSm)) attention_bwd_queries_kernel(const Attention p) {
  using S = Shape<T, kP>;
  constexpr int kM = S::kM, kN = S::kN, kPitchP = kPitch<T, kP>, kColumns = kP / S::kSplit;
  TZ_DYNAMIC_SHARED(T, q_smem);                              // [kM][P]
  T* const dy_smem = q_smem + kM * kPitchP;
  T* const k_smem = dy_smem + kM * kPitchP;                  // [stages][kN][P]
  T* const v_smem = k_smem + S::kStages * kN * kPitchP;
  const Place at = place_of_block(p.H, p.Lq, kM);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warp_row = warp / S::kSplit * 16, column = warp % S::kSplit * kColumns;
  const T* const q_rows = q_smem + warp_row * kPitchP;
  const T* const dy_rows = dy_smem + warp_row * kPitchP;
  const int64_t stats = (static_cast<int64_t>(at.b) * p.H + at.h) * p.Lq;

  const T* dy = head_at<T>(p.dy, at.b, at.h);
  load_tile<T, kP, kM>(q_smem, head_at<T>(p.q, at.b, at.h), p.q.stride_l, at.first, p.Lq, p.P, p.vectors);
  load_tile<T, kP, kM>(dy_smem, dy, p.dy.stride_l, at.first, p.Lq, p.P, p.vectors);
  cp_async_commit();
  WarpSpans spans;
  const Span keys = find_spans(spans, at.first, kM, warp_row, [&](int i) { return keys_of_query(p, at.b, i); });
  const int tiles = keys.begin < keys.end ? ceil_div(keys.end - keys.begin, kN) : 0;

  const int64_t kv = at.h / (p.H / p.Hk);
  const T* k = head_at<T>(p.k, at.b, kv);
  const T* v = head_at<T>(p.v, at.b, kv);
  const auto load = [&](int i, int stage) {
    load_tile<T, kP, kN>(k_smem + stage * kN * kPitchP, k, p.k.stride_l, keys.begin + i * kN, keys.end, p.P, p.vectors);
    load_tile<T, kP, kN>(v_smem + stage * kN * kPitchP, v, p.v.stride_l, keys.begin + i * kN, keys.end, p.P, p.vectors);
  };
  // scores and dy . v of a tile
  const auto products = [&](int first, int stage, float (&s)[kN / 8][4], float (&dw)[kN / 8][4]) {
    const unsigned live = live_columns<kN>(p, at.b, first);
    row_products<T, kP, kN, false>(s, q_rows, k_smem + stage * kN * kPitchP, p.P);
    row_products<T, kP, kN, false>(dw, dy_rows, v_smem + stage * kN * kPitchP, p.P);
    to_scores<kN>(s, p.unit, spans, !p.live && spans.hold(first, kN), first, live);
  };

  float lse[2] = {INFINITY, INFINITY}, delta[2] = {0, 0};
  if (p.y.base) {
    const T* y = head_at<T>(p.y, at.b, at.h);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int i = at.first + warp_row + fragment_row(2 * r);
      if (i < p.Lq) {
        lse[r] = p.lse[stats + i];
        delta[r] = partial_dot(dy + i * p.dy.stride_l, y + i * p.y.stride_l, p.P, p.vectors);
      }
      delta[r] = quad_sum(delta[r]);
    }
  } else {
    Softmax softmax;
    walk<S::kStages>(tiles, load, [&](int i, int stage) {
      const int first = keys.begin + i * kN;
      if (!spans.meet(first, kN)) return;
      float w[kN / 8][4], dw[kN / 8][4], factor[2];
      products(first, stage, w, dw);
      softmax.step<kN>(w, factor);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        delta[r] *= factor[r];
#pragma unroll
        for (int n = 0; n < kN / 8; n++) delta[r] += w[n][2 * r] * dw[n][2 * r] + w[n][2 * r + 1] * dw[n][2 * r + 1];
      }
    });
    float inverse[2];
    softmax.finish(lse, inverse);
#pragma unroll
    for (int r = 0; r < 2; r++) delta[r] = quad_sum(delta[r]) * inverse[r];
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int i = at.first + warp_row + fragment_row(2 * r);
    if (column > 0 || lane_id() % 4 > 0 || i >= p.Lq) continue;
    p.delta[stats + i] = delta[r];
    if (!p.y.base) p.lse[stats + i] = lse[r];
  }

  float dq[kColumns / 8][4] = {};
  walk<S::kStages>(tiles, load, [&](int i, int stage) {
    const int first = keys.begin + i * kN;
    if (!spans.meet(first, kN)) return;
    float ds[kN / 8][4], dw[kN / 8][4];
    products(first, stage, ds, dw);
#pragma unroll
    for (int n = 0; n < kN / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) ds[n][e] = exp2_approx(ds[n][e] - lse[e / 2]) * (dw[n][e] - delta[e / 2]);
    add_weighted_rows<T, kP, kN, kColumns>(dq, ds, k_smem + stage * kN * kPitchP + column, p.P - column);
  });
  cp_async_wait<0>();
  __syncthreads();  // where there was nothing to walk the queries are still under way
  store_rows<T, kP, kColumns>(dq, p.scale, p.scale, q_smem + warp_row * kPitchP + column, head_at<T>(p.dq, at.b, at.h) + column, p.dq.stride_l,
                              at.first + warp_row, p.Lq, p.P - column, p.vectors);
}

}  // namespace

cudaError_t attention_bwd_queries(const Attention& p, DType dtype, cudaStream_t stream) {
  return with_head(dtype, p.P, [&](auto t, auto width) {
    using S = Shape<decltype(t), decltype(width)::v>;
    const unsigned blocks = static_cast<unsigned>(ceil_div(p.Lq, S::kM)) * static_cast<unsigned>(p.H) * static_cast<unsigned>(p.B);
    return launch(attention_bwd_queries_kernel<decltype(t), decltype(width)::v>, dim3(blocks), kAttentionThreads, S::kShared, stream, p);
  });
}

}}  // namespace terrazzo::cuda
