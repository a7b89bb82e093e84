// dB and dC of the Mamba-2 scan (chunk_scan_bwd.cu), per chunk and group. With w_s = exp(cum_last - cum_s) dt_s, sums over the heads:
//   dS[l, s] = sum of dy x^T exp(cum_l - cum_s) dt_s for s <= l,
//   dC = dS B + sum of exp(cum) dy H,   dB = dS^T C + sum of w x dH.
//
// The states of all heads are read once more, they are the most of the bytes; x and dy come a second time for each further 64 of n. A
// block walks over the heads of its split, in tiles of 32 of p, two stages of cp.async; dS, dB and dC stay in registers from head to
// head. A group's heads are split over blocks where chunks alone would not fill the GPU; each split has a share of dB and dC of its own.
#include "chunk_scan.cuh"

namespace terrazzo { namespace cuda { namespace scan {
namespace {

constexpr int kTileP = 32;

template <class T> struct GroupSmem {
  static constexpr int kPitchX = pitch_of<T>(kTileP), kPitchState = pitch_of<float>(64, true), kPitchRows = pitch_of<T>(64, true);
  struct Stage {
    float state[kTileP * kPitchState], dstate[kTileP * kPitchState];
    T x[kChunk * kPitchX], dy[kChunk * kPitchX];
    Decays decays;
  };
  struct Last {
    float dS[kChunk * kPitchState];
    T B[kChunk * kPitchRows], C[kChunk * kPitchRows];
  };
  union {
    Stage stages[2];
    Last last;  // once all heads are through
  };
};

// Grid: chunks x groups x splits (x), tiles of n (y). A warp has 16 positions.
template <class T>
__global__ void __launch_bounds__(kThreads) chunk_scan_bwd_bc_kernel(const ChunkScanCudaParams p, const Vectors vectors, const int splits) {
  using Smem = GroupSmem<T>;
  TZ_DYNAMIC_SHARED(Smem, smem);
  const int N = static_cast<int>(p.N), P = static_cast<int>(p.P), H = static_cast<int>(p.H), G = static_cast<int>(p.G);
  const int split = static_cast<int>(blockIdx.x) % splits, group = static_cast<int>(blockIdx.x) / splits % G, n0 = static_cast<int>(blockIdx.y) * 64;
  const int64_t chunk_id = static_cast<int>(blockIdx.x) / splits / G;
  const int first_row = threadIdx.x / kWarp * kRowsOfWarp, group_heads = H / G, split_heads = ceil_div(group_heads, splits);
  const int first_head = group * group_heads + split * split_heads, heads = min(split_heads, group_heads - split * split_heads);
  const int tiles = ceil_div(P, kTileP), steps = heads * tiles;
  const ScanChunk chunk = chunk_at(p, chunk_id);
  if (chunk.begin >= chunk.end) return;  // the whole block
  const auto real = [&](int l) { return is_real(chunk, l); };

  const auto load = [&](int step, int stage_id) {
    auto& stage = smem->stages[stage_id];
    const int head = first_head + step / tiles, p0 = step % tiles * kTileP;
    const auto in_p = [&](int row) { return p0 + row < P; };
    const T* x = static_cast<const T*>(p.x) + chunk.row * p.x_stride_b + chunk.begin * p.x_stride_l + head * p.x_stride_h + p0;
    const T* dy = static_cast<const T*>(p.dy) + chunk.row * p.dy_stride_b + chunk.begin * p.dy_stride_l + head * p.dy_stride_h + p0;
    load_tile<kChunk, kTileP>(stage.x, Smem::kPitchX, x, p.x_stride_l, P - p0, vectors.x, real);
    load_tile<kChunk, kTileP>(stage.dy, Smem::kPitchX, dy, p.dy_stride_l, P - p0, vectors.dy, real);
    const int64_t at = ((chunk_id * H + head) * P + p0) * N + n0;
    load_tile<kTileP, 64>(stage.state, Smem::kPitchState, static_cast<const float*>(p.states) + at, N, N - n0, vectors.states, in_p);
    load_tile<kTileP, 64>(stage.dstate, Smem::kPitchState, static_cast<const float*>(p.dstates) + at, N, N - n0, vectors.states, in_p);
    load_decays(stage.decays, decays_at(p, chunk_id, head));
  };

  Accumulators dS, dB, dC, dscores;  // [l, s], [s, n], [l, n], [l, s] of one head
  clear(dS);
  clear(dB);
  clear(dC);
  clear(dscores);
  walk<2>(steps, load, [&](int step, int stage_id) {
    const auto& stage = smem->stages[stage_id];
    const Decays& d = stage.decays;
    const T *x_rows = stage.x + first_row * Smem::kPitchX, *dy_rows = stage.dy + first_row * Smem::kPitchX;
    const int depth = rounded(P - step % tiles * kTileP);
    add_inputs<kTileP>(dscores, dy_rows, stage.x, Smem::kPitchX, depth, 0, first_row + kRowsOfWarp);
    // the products with the states, rows weighted beforehand
    const auto weighted = [&](const T* rows, int k, const float (&weight)[2], float (&v)[8]) {
      load_a_floats<false>(v, rows + k, Smem::kPitchX);
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] *= weight[i / 2 % 2];
    };
    const int row0 = first_row + fragment_row(0), row1 = first_row + fragment_row(2);
    const float from_state[2] = {d[kFromStart][row0], d[kFromStart][row1]};
    const float to_state[2] = {d[kToEnd][row0] * d[kDt][row0], d[kToEnd][row1] * d[kDt][row1]};
    add_product<Weighted<T, false>, Weighted<T, false>, true, kTileP>(
        dC, [&](int k, float (&v)[8]) { weighted(dy_rows, k, from_state, v); }, stage.state, Smem::kPitchState, 0, depth, N - n0);
    add_product<Weighted<T, false>, Weighted<T, false>, true, kTileP>(
        dB, [&](int k, float (&v)[8]) { weighted(x_rows, k, to_state, v); }, stage.dstate, Smem::kPitchState, 0, depth, N - n0);
    if ((step + 1) % tiles == 0) {  // the head is through
#pragma unroll
      for (int j = 0; j < kBlocks; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int l = first_row + fragment_row(i), s = 8 * j + fragment_column(i);
          if (s <= l) dS[j][i] += dscores[j][i] * between(d, l, s) * d[kDt][s];
        }
      clear(dscores);
    }
  });

  // dC += dS B, dB += dS^T C
  auto& last = smem->last;
  const T* B = static_cast<const T*>(p.Bm) + chunk.row * p.B_stride_b + chunk.begin * p.B_stride_l + group * p.B_stride_g + n0;
  const T* C = static_cast<const T*>(p.C) + chunk.row * p.C_stride_b + chunk.begin * p.C_stride_l + group * p.C_stride_g + n0;
  load_tile<kChunk, 64>(last.B, Smem::kPitchRows, B, p.B_stride_l, N - n0, vectors.B, real);
  load_tile<kChunk, 64>(last.C, Smem::kPitchRows, C, p.C_stride_l, N - n0, vectors.C, real);
  cp_async_commit();
  for_pairs(dS, first_row, [&](int, int l, int s, float a, float b) {
    last.dS[l * Smem::kPitchState + s] = a, last.dS[l * Smem::kPitchState + s + 1] = b;
  });
  cp_async_wait<0>();
  __syncthreads();
  add_product<Weighted<T, false>, Input<T>, true, kChunk>(dC, [&](int s, float (&v)[8]) { fragment_of(dS, s, v); }, last.B, Smem::kPitchRows, 0,
                                                          first_row + kRowsOfWarp, N - n0);
  add_product<Weighted<T, false>, Input<T>, true, kChunk>(
      dB, [&](int l, float (&v)[8]) { load_a_floats<true>(v, last.dS + l * Smem::kPitchState + first_row, Smem::kPitchState); }, last.C, Smem::kPitchRows,
      first_row, kChunk, N - n0);

  const int64_t at = (((split * p.B + chunk.row) * p.L + chunk.begin) * G + group) * N + n0;
  float *dB_out = static_cast<float*>(p.dB_partials) + at, *dC_out = static_cast<float*>(p.dC_partials) + at;
  const auto store = [&](Accumulators& acc, float* out) {
    for_pairs(acc, first_row, [&](int, int l, int column, float a, float b) {
      const int left = chunk.begin + l < chunk.end ? N - n0 - column : 0;
      store_pair(a, b, out + static_cast<int64_t>(l) * G * N + column, left, N % 2 == 0);
    });
  };
  store(dB, dB_out);
  store(dC, dC_out);
}

}  // namespace

cudaError_t launch_bwd_bc(const ChunkScanCudaParams& p, cudaStream_t stream) {
  const int64_t splits = scan_splits(p), blocks = scan_chunks(p) * p.G * splits;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return with_type(p.x_dtype, [&](auto t) {
    using T = decltype(t);
    return launch(chunk_scan_bwd_bc_kernel<T>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(p.N, 64))), kThreads,
                  sizeof(GroupSmem<T>), stream, p, vectors_of(p), static_cast<int>(splits));
  });
}

}}}  // namespace terrazzo::cuda::scan
