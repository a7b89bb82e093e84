// Mamba-2 chunk scan, backward: every gradient of chunk_scan_fwd.cu but z's (in training the gate stands outside), the states computed again.
// With E[l, s] = exp(cum_l - cum_s) for s <= l, H the state before a chunk and dH the gradient of the state after it:
//   1. decays, H and dH (chunk_scan_states.cu);
//   2. per chunk and head   dx = dt (exp(cum_last - cum) B dH^T + (C B^T * E)^T dy) + D dy, and from its terms ddt and shares of dA, dD
//      and ddt_bias: the kernel here;
//   3. per chunk and group  dB and dC (chunk_scan_bwd_bc.cu).
// The gradient of a step's exponent is the sum of what crosses the step: what leaves through positions at or after it, what entered
// before it, and the state that passes. It is summed from those terms, never as a difference of totals: after a reset it is exactly
// zero. Shares of sums go to rows of their own, which a further kernel adds up in a fixed order: no atomics.
//
// As in the forward the states, here two, are most of the bytes, and each tile of them is read once: B, C, H and dH of a tile of n come
// in together, two stages. Everything else of a head in a chunk stays in registers: the scores, which weigh dy, and their gradients.
#include "chunk_scan.cuh"

namespace terrazzo { namespace cuda {
namespace scan {
namespace {

enum Held { kEnter, kThrough = 2, kPassing = 4, kHeld };  // of a lane's two rows twice, and the passing state

template <class T> struct BackwardSmem {
  static constexpr int kTileN = sizeof(T) == 4 ? 16 : 32;
  static constexpr int kPitchN = pitch_of<T>(kTileN), kPitchState = pitch_of<float>(kTileN), kPitchX = pitch_of<T>(64);
  static constexpr int kPitchCrossing = kChunk + 1;
  struct Stage {
    float state[64 * kPitchState], dstate[64 * kPitchState];
    T B[kChunk * kPitchN], C[kChunk * kPitchN];
  };
  union {
    Stage stages[2];
    float crossing[kChunk * kPitchCrossing];  // once the stages are done with
  };
  T x[kChunk * kPitchX], dy[kChunk * kPitchX];
  Decays decays;
  float direct[kChunk], enter[kChunk], through[kChunk], after[2][kChunk], columns[2][kChunk];
  float held[kHeld][kThreads];  // sums of each thread that registers have no room for
};

// The sum over a row of a warp's 16 x 64, of which each lane of four has a part.
TZ_DEVICE float row_sum(float v) { return warp_sum(v, 4); }
// Sums of two neighbours a lane, over all lanes up to this one.
TZ_DEVICE void prefix_sums(double (&v)[2]) {
  v[1] += v[0];
  double sum = v[1];
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const double before = __shfl_up_sync(kAllLanes, sum, lanes);
    if (lane_id() >= lanes) sum += before;
  }
  const double before = __shfl_up_sync(kAllLanes, sum, 1);
  if (lane_id() > 0) v[0] += before, v[1] += before;
}

// dx and ddt of a head in a chunk; its shares of dA, ddt_bias and dD. Grid: chunks x heads. A warp has 16 positions.
template <class T> __global__ void __launch_bounds__(kThreads) chunk_scan_bwd_x_kernel(const ChunkScanCudaParams p, const Vectors vectors) {
  using Smem = BackwardSmem<T>;
  constexpr int kTileN = Smem::kTileN;
  TZ_DYNAMIC_SHARED(Smem, smem);
  const int N = static_cast<int>(p.N), P = static_cast<int>(p.P), H = static_cast<int>(p.H), tid = threadIdx.x;
  const int64_t chunk_id = static_cast<int>(blockIdx.x) / H, share = blockIdx.x;
  const int head = static_cast<int>(blockIdx.x) % H, group = head / (H / static_cast<int>(p.G)), first_row = tid / kWarp * kRowsOfWarp;
  const int half = tid / kChunk, column = tid % kChunk;  // for sums over tiles
  const ScanChunk chunk = chunk_at(p, chunk_id);
  float* dD = p.D ? static_cast<float*>(p.dD_partials) + share * (p.D_has_p ? P : 1) : nullptr;
  if (chunk.begin >= chunk.end) {  // the whole block
    if (tid == 0) static_cast<float*>(p.dA_partials)[share] = static_cast<float*>(p.dbias_partials)[share] = 0;
    if (dD)
      for (int i = tid; i < (p.D_has_p ? P : 1); i += kThreads) dD[i] = 0;
    return;
  }
  const auto real = [&](int l) { return is_real(chunk, l); };

  const T* B = static_cast<const T*>(p.Bm) + chunk.row * p.B_stride_b + chunk.begin * p.B_stride_l + group * p.B_stride_g;
  const T* C = static_cast<const T*>(p.C) + chunk.row * p.C_stride_b + chunk.begin * p.C_stride_l + group * p.C_stride_g;
  const T* x = static_cast<const T*>(p.x) + chunk.row * p.x_stride_b + chunk.begin * p.x_stride_l + head * p.x_stride_h;
  const T* dy = static_cast<const T*>(p.dy) + chunk.row * p.dy_stride_b + chunk.begin * p.dy_stride_l + head * p.dy_stride_h;
  T* dx = static_cast<T*>(p.dx) + ((chunk.row * p.L + chunk.begin) * H + head) * P;
  const int64_t state_at = (chunk_id * H + head) * P * N;
  const Decays& d = smem->decays;
  load_decays(smem->decays, decays_at(p, chunk_id, head));

  Accumulators scores, dscores;  // [s, l]
  clear(scores);
  clear(dscores);
  float sum_of_D = 0;  // dD where D is [H]
#pragma unroll
  for (int i = 0; i < kHeld; i++) smem->held[i][tid] = 0;
  for (int p0 = 0; p0 < P; p0 += 64) {
    const auto load = [&](int step, int stage_id) {
      auto& stage = smem->stages[stage_id];
      const int n0 = step * kTileN;
      const auto in_p = [&](int row) { return p0 + row < P; };
      load_tile<kChunk, kTileN>(stage.C, Smem::kPitchN, C + n0, p.C_stride_l, N - n0, vectors.C, real);
      load_tile<kChunk, kTileN>(stage.B, Smem::kPitchN, B + n0, p.B_stride_l, N - n0, vectors.B, real);
      const int64_t at = state_at + static_cast<int64_t>(p0) * N + n0;
      load_tile<64, kTileN>(stage.state, Smem::kPitchState, static_cast<const float*>(p.states) + at, N, N - n0, vectors.states, in_p);
      load_tile<64, kTileN>(stage.dstate, Smem::kPitchState, static_cast<const float*>(p.dstates) + at, N, N - n0, vectors.states, in_p);
    };
    load_tile<kChunk, 64>(smem->x, Smem::kPitchX, x + p0, p.x_stride_l, P - p0, vectors.x, real);
    load_tile<kChunk, 64>(smem->dy, Smem::kPitchX, dy + p0, p.dy_stride_l, P - p0, vectors.dy, real);

    // what enters the state after the chunk, B dH^T, and what leaves the one before it, C H^T, both [l, p]; with the first p the scores B C^T
    Accumulators entering, leaving;
    clear(entering);
    clear(leaving);
    walk<2>(ceil_div(N, kTileN), load, [&](int step, int stage_id) {
      const auto& stage = smem->stages[stage_id];
      const T *B_rows = stage.B + first_row * Smem::kPitchN, *C_rows = stage.C + first_row * Smem::kPitchN;
      const int depth = rounded(N - step * kTileN);
      if (p0 == 0) add_inputs<kTileN>(scores, B_rows, stage.C, Smem::kPitchN, depth, first_row, kChunk);
      add_product<Input<T>, Weighted<T, true>, false, kTileN>(
          entering, [&](int n, float (&v)[8]) { load_a_floats<false>(v, B_rows + n, Smem::kPitchN); }, stage.dstate, Smem::kPitchState, 0, depth, P - p0);
      add_product<Input<T>, Weighted<T, true>, false, kTileN>(
          leaving, [&](int n, float (&v)[8]) { load_a_floats<false>(v, C_rows + n, Smem::kPitchN); }, stage.state, Smem::kPitchState, 0, depth, P - p0);
      float passing = 0;
      for (int i = tid; i < 64 * kTileN; i += kThreads) {
        const int at = i / kTileN * Smem::kPitchState + i % kTileN;
        passing += stage.state[at] * stage.dstate[at];
      }
      smem->held[kPassing][tid] += passing;
    });
    if (p0 == 0)
      for_pairs(scores, first_row, [&](int, int s, int l, float& a, float& b) {
        a = s <= l ? a * between(d, l, s) : 0;
        b = s <= l + 1 ? b * between(d, l + 1, s) : 0;
      });

    // dx, and the products of its terms with x and dy
    const auto value = [&](const T* tile, int l, int c) { return to_float(tile[l * Smem::kPitchX + c]); };
    float enter[2] = {}, through[2] = {};
    for_pairs(entering, first_row, [&](int i, int l, int c, float& a, float& b) {
      a *= d[kToEnd][l], b *= d[kToEnd][l];
      enter[i] += a * value(smem->x, l, c) + b * value(smem->x, l, c + 1);
    });
    for_pairs(leaving, first_row, [&](int i, int l, int c, float a, float b) { through[i] += a * value(smem->dy, l, c) + b * value(smem->dy, l, c + 1); });
#pragma unroll
    for (int i = 0; i < 2; i++) smem->held[kEnter + i][tid] += enter[i], smem->held[kThrough + i][tid] += through[i];
    add_product<Weighted<T, false>, Input<T>, true, kChunk>(entering, [&](int l, float (&v)[8]) { fragment_of(scores, l, v); }, smem->dy, Smem::kPitchX,
                                                            first_row, kChunk, P - p0);
    for_pairs(entering, first_row, [&](int, int l, int c, float a, float b) {
      const int left = chunk.begin + l < chunk.end ? P - p0 - c : 0;
      if (left <= 0) return;
      a *= d[kDt][l], b *= d[kDt][l];
      if (p.D) {
        const float* at = static_cast<const float*>(p.D) + (p.D_has_p ? static_cast<int64_t>(head) * P + p0 + c : head);
        a += at[0] * value(smem->dy, l, c);
        b += at[p.D_has_p && left > 1] * value(smem->dy, l, c + 1);
      }
      const bool kept = real(l);
      store_pair(kept ? a : 0, kept ? b : 0, dx + static_cast<int64_t>(l) * H * P + p0 + c, left, P % 2 == 0);
    });

    // x dy^T [s, l], and dD
    add_inputs<64>(dscores, smem->x + first_row * Smem::kPitchX, smem->dy, Smem::kPitchX, rounded(P - p0), first_row, kChunk);
    if (p.D) {
      float sum = 0;
#pragma unroll 8
      for (int l = half * kChunk / 2; l < (half + 1) * kChunk / 2; l++) sum += value(smem->x, l, column) * value(smem->dy, l, column);
      smem->columns[half][column] = sum;
    }
    __syncthreads();  // and the next p overwrites x and dy
    if (p.D && tid < 64 && p0 + tid < P) {
      const float sum = smem->columns[0][tid] + smem->columns[1][tid];
      if (p.D_has_p) dD[p0 + tid] = sum;
      else sum_of_D += sum;
    }
  }

  // what positions of the chunk give each other, without dt_s: `direct` to s as a factor, `crossing` to those that step between s and l
  float direct[2] = {};
#pragma unroll
  for (int j = 0; j < kBlocks; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int s = first_row + fragment_row(i), l = 8 * j + fragment_column(i);
      const float v = dscores[j][i] * scores[j][i];
      direct[i / 2] += v;
      smem->crossing[s * Smem::kPitchCrossing + l] = s < l ? v * d[kDt][s] : 0;
    }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float sums_of_row[3] = {row_sum(direct[i]), row_sum(smem->held[kEnter + i][tid]), row_sum(smem->held[kThrough + i][tid])};
    if (lane_id() % 4 == 0) {
      const int l = first_row + fragment_row(2 * i);
      smem->direct[l] = sums_of_row[0], smem->enter[l] = sums_of_row[1], smem->through[l] = sums_of_row[2];
    }
  }
  __syncthreads();

  // after[r] = the sum over s <= r < l of crossing[s, l], what the chunk itself carries over step r + 1: sums down the columns, in two
  // halves, then along the rows
  float sum = 0;
#pragma unroll 8
  for (int s = half * kChunk / 2; s < (half + 1) * kChunk / 2; s++) {
    float& v = smem->crossing[s * Smem::kPitchCrossing + column];
    sum += v, v = sum;
  }
  __syncthreads();
  sum = 0;
#pragma unroll 8
  for (int l = half * kChunk / 2; l < (half + 1) * kChunk / 2; l++) {
    const float lower = smem->crossing[column * Smem::kPitchCrossing + l], upper = smem->crossing[(kChunk / 2 - 1) * Smem::kPitchCrossing + l];
    if (l > column) sum += column < kChunk / 2 ? lower : lower + upper;
  }
  smem->after[half][column] = sum;
  float sums[2] = {smem->held[kPassing][tid], sum_of_D};
  block_sum<kThreads>(sums);  // and a barrier
  if (tid >= kWarp) return;

  // one warp, two positions a lane: the gradient of each step's exponent, then of dt before bias, softplus and clamp. Long sums of what
  // nearly cancels: in double, for these few
  const float A = static_cast<const float*>(p.A)[head];
  const double passing = static_cast<double>(d[kFromStart][kChunk - 1]) * sums[0];
  double before[2], later[2], dA = 0;
  float dbias = 0;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int l = 2 * tid + j, mirrored = kChunk - 1 - l;
    before[j] = static_cast<double>(d[kDt][l]) * smem->enter[l];
    later[j] = static_cast<double>(smem->through[mirrored]) * d[kFromStart][mirrored];
  }
  prefix_sums(before);
  prefix_sums(later);  // from the end: this lane's are those of positions 63 - 2 lane and the one before it
#pragma unroll
  for (int j = 0; j < 2; j++) before[j] += static_cast<double>(smem->after[0][2 * tid + j]) + smem->after[1][2 * tid + j];
  const double last_before = __shfl_up_sync(kAllLanes, before[1], 1);
  const double later_at[2] = {__shfl_sync(kAllLanes, later[1], kWarp - 1 - tid), __shfl_sync(kAllLanes, later[0], kWarp - 1 - tid)};
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int l = 2 * tid + j;
    const double da = later_at[j] + (j ? before[0] : tid > 0 ? last_before : 0) + passing;
    float ddt = 0;
    if (real(l)) {
      float raw = load_float(p.dt_dtype, p.dt, chunk.row * p.dt_stride_b + (chunk.begin + l) * p.dt_stride_l + head * p.dt_stride_h), slope = 1;
      if (p.dt_bias) raw += static_cast<const float*>(p.dt_bias)[head];
      if (p.dt_softplus) slope = sigmoid(raw), raw = softplus(raw);
      if (raw >= static_cast<float>(p.dt_min) && raw <= static_cast<float>(p.dt_max)) ddt = slope * static_cast<float>(smem->direct[l] + smem->enter[l] + A * da);
    }
    if (chunk.begin + l < chunk.end) static_cast<float*>(p.ddt)[(chunk.row * p.L + chunk.begin + l) * H + head] = ddt;
    dA += da * d[kDt][l], dbias += ddt;
  }
  const float dA_sum = warp_sum(static_cast<float>(dA));
  dbias = warp_sum(dbias);
  if (tid > 0) return;
  static_cast<float*>(p.dA_partials)[share] = dA_sum;
  static_cast<float*>(p.dbias_partials)[share] = dbias;
  if (dD && !p.D_has_p) dD[0] = sums[1];
}

// out[i] = the sum of the partial sums of column i.
__global__ void __launch_bounds__(kColumnSumThreads) chunk_scan_sum_kernel(const float* __restrict__ partials /* [rows, columns] */,
                                                                     float* __restrict__ out /* [columns] */, const int64_t rows, const int64_t columns) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x % kSumColumns;
  const float sum = column_sum(partials + i, rows, columns, i < columns);
  if (threadIdx.x < kSumColumns && i < columns) out[i] = sum;
}
cudaError_t launch_sum(const void* partials, void* out, int64_t rows, int64_t columns, cudaStream_t stream) {
  if (!out || partials == out || columns == 0) return cudaSuccess;
  return launch(chunk_scan_sum_kernel, dim3(static_cast<unsigned>(ceil_div(columns, kSumColumns))), kColumnSumThreads, 0, stream, static_cast<const float*>(partials),
                static_cast<float*>(out), rows, columns);
}

}  // namespace
}  // namespace scan

cudaError_t chunk_scan_bwd_cuda(const ChunkScanCudaParams& p, cudaStream_t stream) {
  if (p.H == 0 || p.P == 0) return cudaSuccess;
  const int64_t chunks = scan_chunks(p), splits = scan_splits(p), width = p.H * (p.D_has_p ? p.P : 1), positions = p.B * p.L * p.G * p.N;
  if (scan::unsupported(p) || ceil_div(positions, kSumColumns) > INT32_MAX) return cudaErrorInvalidValue;
  cudaError_t error = scan::launch_decays(p, stream);
  if (error == cudaSuccess) error = scan::launch_states(p, scan::Pass::again, stream);
  if (error == cudaSuccess) error = scan::launch_states(p, scan::Pass::reverse, stream);
  if (error == cudaSuccess && chunks > 0)
    error = with_type(p.x_dtype, [&](auto t) {
      using T = decltype(t);
      return launch(scan::chunk_scan_bwd_x_kernel<T>, dim3(static_cast<unsigned>(chunks * p.H)), scan::kThreads, sizeof(scan::BackwardSmem<T>), stream, p,
                    scan::vectors_of(p));
    });
  if (error == cudaSuccess && chunks > 0) error = scan::launch_bwd_bc(p, stream);
  if (error == cudaSuccess) error = scan::launch_sum(p.dA_partials, p.dA, chunks, p.H, stream);
  if (error == cudaSuccess) error = scan::launch_sum(p.dbias_partials, p.ddt_bias, chunks, p.H, stream);
  if (error == cudaSuccess) error = scan::launch_sum(p.dD_partials, p.dD, chunks, width, stream);
  if (error == cudaSuccess) error = scan::launch_sum(p.dB_partials, p.dB, splits, positions, stream);
  if (error == cudaSuccess) error = scan::launch_sum(p.dC_partials, p.dC, splits, positions, stream);
  return error;
}

}}  // namespace terrazzo::cuda
