// Mamba-2 chunk scan, forward: state[p, n] = exp(dt A) state[p, n] + dt B[n] x[p],  y[p] = sum_n C[n] state[p, n] + D x[p],  y *= silu(z).
// Layouts: x, z [B, L, H, P] with unit stride p, dt [B, L, H], B, C [B, L, G, N] with unit stride n, y contiguous.
//
// With the decays and the state before every chunk from chunk_scan_states.cu, per chunk and head
//   y[l, p] = exp(cum_l) C[l] state[p] + sum over s <= l of (C[l] B[s]) exp(cum_l - cum_s) dt_s x[s, p] + D x[l, p],  then the gate.
// The states are more bytes than x and y: memory is the limit, and a block takes each tile of a state from it once, of bf16's in bf16.
// Tiles of n come in by cp.async, two stages; the scores C B^T stay in registers, where they are weighted and become a factor themselves.
// C and B, which the heads of a group share, are read by each of their blocks, from L2.
// Dao and Gu, "Transformers are SSMs" (2024), section 6.
#include "chunk_scan.cuh"

namespace terrazzo { namespace cuda {
namespace scan {
namespace {

constexpr int kTileN = 32;

template <class T> struct ForwardSmem {
  using State = typename KeptState<T>::type;
  static constexpr int kPitchN = pitch_of<T>(kTileN), kPitchState = pitch_of<State>(kTileN), kPitchX = pitch_of<T>(64, true);
  struct Stage {
    State state[64 * kPitchState];
    T B[kChunk * kPitchN], C[kChunk * kPitchN];
  } stages[2];
  T x[kChunk * kPitchX];
  Decays decays;
};

// Grid: chunks x heads (x), tiles of p (y). A warp has 16 positions.
template <class T> __global__ void __launch_bounds__(kThreads, 3) chunk_scan_fwd_kernel(const ChunkScanCudaParams p, const Vectors vectors) {
  using Smem = ForwardSmem<T>;
  using State = typename Smem::State;
  constexpr int kStateVec = kVectorBytes / static_cast<int>(sizeof(State));
  TZ_DYNAMIC_SHARED(Smem, smem);
  const int N = static_cast<int>(p.N), P = static_cast<int>(p.P), H = static_cast<int>(p.H);
  const int64_t chunk_id = static_cast<int>(blockIdx.x) / H;
  const int head = static_cast<int>(blockIdx.x) % H, group = head / (H / static_cast<int>(p.G)), p0 = static_cast<int>(blockIdx.y) * 64;
  const int first_row = threadIdx.x / kWarp * kRowsOfWarp;
  const ScanChunk chunk = chunk_at(p, chunk_id);
  if (chunk.begin >= chunk.end) return;  // the whole block
  const auto real = [&](int l) { return is_real(chunk, l); };
  const auto in_p = [&](int row) { return p0 + row < P; };

  const T* B = static_cast<const T*>(p.Bm) + chunk.row * p.B_stride_b + chunk.begin * p.B_stride_l + group * p.B_stride_g;
  const T* C = static_cast<const T*>(p.C) + chunk.row * p.C_stride_b + chunk.begin * p.C_stride_l + group * p.C_stride_g;
  const State* state = static_cast<const State*>(p.states) + ((chunk_id * H + head) * P + p0) * N;
  const auto load = [&](int stage_id, int n0) {
    auto& stage = smem->stages[stage_id];
    load_tile<kChunk, kTileN>(stage.C, Smem::kPitchN, C + n0, p.C_stride_l, N - n0, vectors.C, real);
    load_tile<kChunk, kTileN>(stage.B, Smem::kPitchN, B + n0, p.B_stride_l, N - n0, vectors.B, real);
    load_tile<64, kTileN>(stage.state, Smem::kPitchState, state + n0, N, N - n0, N % kStateVec == 0, in_p);
    cp_async_commit();
  };
  load_tile<kChunk, 64>(smem->x, Smem::kPitchX, static_cast<const T*>(p.x) + chunk.row * p.x_stride_b + chunk.begin * p.x_stride_l + head * p.x_stride_h + p0,
                        p.x_stride_l, P - p0, vectors.x, real);
  load_decays(smem->decays, decays_at(p, chunk_id, head));
  load(0, 0);

  // scores C B^T [l, s] up to the diagonal, and C state^T [l, p]
  Accumulators scores, y;
  clear(scores);
  clear(y);
  // what walk() does, in fewer registers: with it three blocks an SM spill on sm_80
  for (int n0 = 0, step = 0; n0 < N; n0 += kTileN, step++) {
    const bool more = n0 + kTileN < N;
    if (more) load((step + 1) % 2, n0 + kTileN);
    if (more) cp_async_wait<1>();
    else cp_async_wait<0>();
    __syncthreads();
    const auto& stage = smem->stages[step % 2];
    const int depth = rounded(N - n0);
    add_inputs<kTileN>(scores, stage.C + first_row * Smem::kPitchN, stage.B, Smem::kPitchN, depth, 0, first_row + kRowsOfWarp);
    if constexpr (sizeof(State) == 2) {
      static_assert(Smem::kPitchState == Smem::kPitchN);
      add_inputs<kTileN>(y, stage.C + first_row * Smem::kPitchN, stage.state, Smem::kPitchN, depth, 0, P - p0);
    } else {
      add_product<Input<T>, Weighted<T, false>, false, kTileN>(
          y, [&](int n, float (&v)[8]) { load_a_floats<false>(v, stage.C + first_row * Smem::kPitchN + n, Smem::kPitchN); }, stage.state, Smem::kPitchState,
          0, depth, P - p0);
    }
    if (more) __syncthreads();  // the load after the next overwrites this stage
  }

  // what the state gives decays from the start of the chunk on; what positions give each other decays between them
  const Decays& d = smem->decays;
  for_pairs(y, first_row, [&](int, int l, int, float& a, float& b) { a *= d[kFromStart][l], b *= d[kFromStart][l]; });
  for_pairs(scores, first_row, [&](int, int l, int s, float& a, float& b) {
    a = s <= l ? a * between(d, l, s) * d[kDt][s] : 0;
    b = s + 1 <= l ? b * between(d, l, s + 1) * d[kDt][s + 1] : 0;
  });
  add_product<Weighted<T, false>, Input<T>, true, kChunk>(y, [&](int s, float (&v)[8]) { fragment_of(scores, s, v); }, smem->x, Smem::kPitchX, 0,
                                                          first_row + kRowsOfWarp, P - p0);

  // skip, gate; zeros at padding
  const float* D = static_cast<const float*>(p.D);
  const T* z = static_cast<const T*>(p.z) + (p.z ? chunk.row * p.z_stride_b + chunk.begin * p.z_stride_l + head * p.z_stride_h + p0 : 0);
  T* out = static_cast<T*>(p.y) + ((chunk.row * p.L + chunk.begin) * H + head) * P + p0;
  for_pairs(y, first_row, [&](int, int l, int column, float a, float b) {
    const int left = chunk.begin + l < chunk.end ? P - p0 - column : 0;
    if (left <= 0) return;
    if (D) {
      const float* at = p.D_has_p ? D + static_cast<int64_t>(head) * P + p0 + column : D + head;
      a += at[0] * to_float(smem->x[l * Smem::kPitchX + column]);
      b += at[p.D_has_p && left > 1] * to_float(smem->x[l * Smem::kPitchX + column + 1]);
    }
    if (p.z) {
      float gate[2];
      load_pair(z + l * p.z_stride_l + column, left, vectors.z, gate);
      a *= silu(gate[0]), b *= silu(gate[1]);
    }
    const bool kept = real(l);
    store_pair(kept ? a : 0, kept ? b : 0, out + l * p.H * P + column, left, P % 2 == 0);
  });
}

}  // namespace
}  // namespace scan

cudaError_t chunk_scan_fwd_cuda(const ChunkScanCudaParams& p, cudaStream_t stream) {
  if (p.H == 0 || p.P == 0 || p.sequences == 0) return cudaSuccess;
  if (scan::unsupported(p)) return cudaErrorInvalidValue;
  cudaError_t error = scan::launch_decays(p, stream);
  if (error == cudaSuccess) error = scan::launch_states(p, scan::Pass::forward, stream);
  const int64_t blocks = scan_chunks(p) * p.H;
  if (error != cudaSuccess || blocks == 0) return error;
  return with_type(p.x_dtype, [&](auto t) {
    using T = decltype(t);
    return launch(scan::chunk_scan_fwd_kernel<T>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(p.P, 64))), scan::kThreads,
                  sizeof(scan::ForwardSmem<T>), stream, p, scan::vectors_of(p));
  });
}

}}  // namespace terrazzo::cuda
