// Attention on a band, backward by keys. With w and ds as in attention_bwd_queries.cu, both again from lse and delta:
//   dv[j] = sum over i of w[i, j] dy[i];   dk[j] = scale sum over i of ds[i, j] q[i].
//
// A block has 64 keys of one key head and walks the queries that see some of them, the query heads of its head one after the other: no
// atomics. Scores are taken transposed, keys in the rows, so that weights are the left operands of both sums as they come.
#include "attention.cuh"
#include "kernels.h"

namespace terrazzo { namespace cuda {
namespace {

// Wide heads are shared out over kSplit warps, each with all of the scores and a part of the channels of dk and dv.
template <class T, int kP> struct Shape {
  static constexpr int kRowBytes = kP * sizeof(T);
  static constexpr int kSplit = kRowBytes <= 256 ? 1 : 2;
  static constexpr int kM = 16 * kAttentionWarps / kSplit, kN = kRowBytes <= 256 ? 32 : 16;
  static constexpr int kBlocksPerSm = kRowBytes <= 128 ? 3 : 2;  // registers for so many, without spilling
  static constexpr int kStages = kRowBytes <= 512 ? 2 : 1;
  static constexpr size_t kTiles = kPitch<T, kP> * (2 * kM + 2 * kStages * kN), kShared = sizeof(T) * kTiles + sizeof(float) * 2 * kStages * kN;
};

template <class T, int kP>
__global__ void __launch_bounds__(kAttentionThreads, (Shape<T, kP>::kBlocksPerSm)) attention_bwd_keys_kernel(const Attention p) {
  using S = Shape<T, kP>;
  constexpr int kM = S::kM, kN = S::kN, kPitchP = kPitch<T, kP>, kColumns = kP / S::kSplit;
  TZ_DYNAMIC_SHARED(T, k_smem);                              // [kM][P]
  T* const v_smem = k_smem + kM * kPitchP;
  T* const q_smem = v_smem + kM * kPitchP;                   // [stages][kN][P]
  T* const dy_smem = q_smem + S::kStages * kN * kPitchP;
  float* const lse_smem = reinterpret_cast<float*>(k_smem + S::kTiles);  // [stages][kN]
  float* const delta_smem = lse_smem + S::kStages * kN;
  const Place at = place_of_block(p.Hk, p.Lk, kM);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warp_row = warp / S::kSplit * 16, column = warp % S::kSplit * kColumns;

  load_tile<T, kP, kM>(k_smem, head_at<T>(p.k, at.b, at.h), p.k.stride_l, at.first, p.Lk, p.P, p.vectors);
  load_tile<T, kP, kM>(v_smem, head_at<T>(p.v, at.b, at.h), p.v.stride_l, at.first, p.Lk, p.P, p.vectors);
  cp_async_commit();
  WarpSpans spans;
  const Span queries = find_spans(spans, at.first, kM, warp_row, [&](int j) { return queries_of_key(p, at.b, j); });

  const int tiles = queries.begin < queries.end ? ceil_div(queries.end - queries.begin, kN) : 0, group = p.H / p.Hk;
  float dk[kColumns / 8][4] = {}, dv[kColumns / 8][4] = {};
  walk<S::kStages>(
      tiles * group,
      [&](int i, int stage) {
        const int h = at.h * group + i / tiles, first = queries.begin + i % tiles * kN;
        load_tile<T, kP, kN>(q_smem + stage * kN * kPitchP, head_at<T>(p.q, at.b, h), p.q.stride_l, first, queries.end, p.P, p.vectors);
        load_tile<T, kP, kN>(dy_smem + stage * kN * kPitchP, head_at<T>(p.dy, at.b, h), p.dy.stride_l, first, queries.end, p.P, p.vectors);
        const int column_of_thread = static_cast<int>(threadIdx.x) % kN, row = first + column_of_thread;
        if (static_cast<int>(threadIdx.x) < 2 * kN) {
          const bool is_lse = static_cast<int>(threadIdx.x) < kN;
          const float* from = (is_lse ? p.lse : p.delta) + (static_cast<int64_t>(at.b) * p.H + h) * p.Lq;
          float* to = (is_lse ? lse_smem : delta_smem) + stage * kN + column_of_thread;
          cp_async_4(to, row < queries.end ? from + row : from, row < queries.end ? 4 : 0);
        }
      },
      [&](int i, int stage) {
        const int first = queries.begin + i % tiles * kN;
        if (!spans.meet(first, kN)) return;
        const T* q_tile = q_smem + stage * kN * kPitchP;
        const T* dy_tile = dy_smem + stage * kN * kPitchP;
        float w[kN / 8][4], ds[kN / 8][4];
        row_products<T, kP, kN, true>(w, k_smem + warp_row * kPitchP, q_tile, p.P);
        row_products<T, kP, kN, true>(ds, v_smem + warp_row * kPitchP, dy_tile, p.P);
        to_scores<kN>(w, p.unit, spans, spans.hold(first, kN), first, ~0u);
#pragma unroll
        for (int n = 0; n < kN / 8; n++) {
          const int columns = stage * kN + 8 * n + fragment_column(0);
          const Vector<float, 2> lse = load_vector<float, 2>(lse_smem + columns), delta = load_vector<float, 2>(delta_smem + columns);
#pragma unroll
          for (int e = 0; e < 4; e++) {
            w[n][e] = exp2_approx(w[n][e] - lse.data[e % 2]);
            ds[n][e] = w[n][e] * (ds[n][e] - delta.data[e % 2]);
          }
        }
        add_weighted_rows<T, kP, kN, kColumns>(dv, w, dy_tile + column, p.P - column);
        add_weighted_rows<T, kP, kN, kColumns>(dk, ds, q_tile + column, p.P - column);
      });
  cp_async_wait<0>();
  __syncthreads();  // where there was nothing to walk the keys are still under way
  store_rows<T, kP, kColumns>(dk, p.scale, p.scale, k_smem + warp_row * kPitchP + column, head_at<T>(p.dk, at.b, at.h) + column, p.dk.stride_l,
                              at.first + warp_row, p.Lk, p.P - column, p.vectors);
  store_rows<T, kP, kColumns>(dv, 1, 1, v_smem + warp_row * kPitchP + column, head_at<T>(p.dv, at.b, at.h) + column, p.dv.stride_l,
                              at.first + warp_row, p.Lk, p.P - column, p.vectors);
}

}  // namespace

cudaError_t attention_bwd_keys(const Attention& p, DType dtype, cudaStream_t stream) {
  return with_head(dtype, p.P, [&](auto t, auto width) {
    using S = Shape<decltype(t), decltype(width)::v>;
    const unsigned blocks = static_cast<unsigned>(ceil_div(p.Lk, S::kM)) * static_cast<unsigned>(p.Hk) * static_cast<unsigned>(p.B);
    return launch(attention_bwd_keys_kernel<decltype(t), decltype(width)::v>, dim3(blocks), kAttentionThreads, S::kShared, stream, p);
  });
}

}}  // namespace terrazzo::cuda
