// Attention on a band, forward: y, and for the backward the logarithm of the softmax's sum. attention.cuh says how.
//   q, y [B, Lq, H, P], k and v [B, Lk, Hk, P], lse [B, H, Lq].
//
// A block has 64 queries of one head, a warp 16. Scores, online softmax and the weighted sum of a tile of keys stay in registers; keys and
// values of the next tile are under way meanwhile. Limited by tensor cores, and by the bytes of k and v where the band is short.
#include "attention.cuh"
#include "kernels.h"

namespace terrazzo { namespace cuda {
namespace {

template <class T, int kP> struct Shape {
  static constexpr int kRowBytes = kP * sizeof(T);
  static constexpr int kM = 16 * kAttentionWarps;
  static constexpr int kN = kRowBytes <= 128 ? 64 : kRowBytes <= 256 ? 32 : 16;
  static constexpr int kBlocksPerSm = kRowBytes <= 128 ? 3 : 2;  // registers for so many, without spilling
  static constexpr int kStages = kRowBytes <= 512 ? 2 : 1;  // else more than 99 KiB
  static constexpr size_t kShared = sizeof(T) * kPitch<T, kP> * (kM + 2 * kStages * kN);
};

template <class T, int kP>
__global__ void __launch_bounds__(kAttentionThreads, (Shape<T, kP>::kBlocksPerSm)) attention_fwd_kernel(const Attention p) {
  using S = Shape<T, kP>;
  constexpr int kM = S::kM, kN = S::kN, kPitchP = kPitch<T, kP>;
  TZ_DYNAMIC_SHARED(T, q_smem);                              // [kM][P]
  T* const k_smem = q_smem + kM * kPitchP;                   // [stages][kN][P]
  T* const v_smem = k_smem + S::kStages * kN * kPitchP;
  const Place at = place_of_block(p.H, p.Lq, kM);
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * 16;
  T* const q_rows = q_smem + warp_row * kPitchP;

  load_tile<T, kP, kM>(q_smem, head_at<T>(p.q, at.b, at.h), p.q.stride_l, at.first, p.Lq, p.P, p.vectors);
  cp_async_commit();
  WarpSpans spans;
  const Span keys = find_spans(spans, at.first, kM, warp_row, [&](int i) { return keys_of_query(p, at.b, i); });

  const int64_t kv = at.h / (p.H / p.Hk);
  const T* k = head_at<T>(p.k, at.b, kv);
  const T* v = head_at<T>(p.v, at.b, kv);
  Softmax softmax;
  float out[kP / 8][4] = {};
  walk<S::kStages>(
      keys.begin < keys.end ? ceil_div(keys.end - keys.begin, kN) : 0,
      [&](int i, int stage) {
        load_tile<T, kP, kN>(k_smem + stage * kN * kPitchP, k, p.k.stride_l, keys.begin + i * kN, keys.end, p.P, p.vectors);
        load_tile<T, kP, kN>(v_smem + stage * kN * kPitchP, v, p.v.stride_l, keys.begin + i * kN, keys.end, p.P, p.vectors);
      },
      [&](int i, int stage) {
        const int first = keys.begin + i * kN;
        if (!spans.meet(first, kN)) return;
        const unsigned live = live_columns<kN>(p, at.b, first);
        float s[kN / 8][4], factor[2];
        row_products<T, kP, kN, false>(s, q_rows, k_smem + stage * kN * kPitchP, p.P);
        to_scores<kN>(s, p.unit, spans, !p.live && spans.hold(first, kN), first, live);
        softmax.step<kN>(s, factor);
        if (__any_sync(kAllLanes, factor[0] != 1 || factor[1] != 1)) {
#pragma unroll
          for (int n = 0; n < kP / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) out[n][e] *= factor[e / 2];
        }
        add_weighted_rows<T, kP, kN, kP>(out, s, v_smem + stage * kN * kPitchP, p.P);
      });

  cp_async_wait<0>();
  __syncthreads();  // where there was nothing to walk the queries are still under way
  float lse[2], inverse[2];
  softmax.finish(lse, inverse);
  store_rows<T, kP, kP>(out, inverse[0], inverse[1], q_rows, head_at<T>(p.y, at.b, at.h), p.y.stride_l, at.first + warp_row, p.Lq, p.P, p.vectors);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int i = at.first + warp_row + fragment_row(2 * r);
    if (p.lse && lane_id() % 4 == 0 && i < p.Lq) p.lse[(static_cast<int64_t>(at.b) * p.H + at.h) * p.Lq + i] = lse[r];
  }
}

}  // namespace

cudaError_t attention_fwd(const Attention& p, DType dtype, cudaStream_t stream) {
  return with_head(dtype, p.P, [&](auto t, auto width) {
    using S = Shape<decltype(t), decltype(width)::v>;
    const unsigned blocks = static_cast<unsigned>(ceil_div(p.Lq, S::kM)) * static_cast<unsigned>(p.H) * static_cast<unsigned>(p.B);
    return launch(attention_fwd_kernel<decltype(t), decltype(width)::v>, dim3(blocks), kAttentionThreads, S::kShared, stream, p);
  });
}

}}  // namespace terrazzo::cuda
