// The first two steps of the Mamba-2 scan (chunk_scan_fwd.cu, chunk_scan_bwd.cu), for both directions:
//   1. cuts sequences into chunks, and writes each chunk's dt and cumulated decays (chunk_scan.cuh says which);
//   2. carries states through every sequence, keeping the one before each chunk,
//        state[p, n] = exp(cum_last) state[p, n] + sum over l of exp(cum_last - cum_l) dt_l x[l, p] B[l, n],
//      or from the last chunk to the first their gradients, keeping the one after each chunk,
//        dstate[p, n] = exp(cum_last) dstate[p, n] + sum over l of exp(cum_l) dy[l, p] C[l, n].
//
// Writing the states is most of all bytes: a block keeps 64 x 64 of one in the accumulators of its four warps for a whole sequence,
// instead of a kernel per chunk and one that adds them up, which would move them three times. The next chunk is on its way by cp.async
// while one is multiplied. They are carried with float's digits in every dtype: callers get them in float, and dA is summed from them.
#include "chunk_scan.cuh"

namespace terrazzo { namespace cuda { namespace scan {
namespace {

constexpr int kHeads = 16;             // per block of the decays
constexpr int kSearchThreads = 256;
constexpr double kPassing = -128;      // exp of it is zero in float; without a floor one reset would swallow the small steps after it
constexpr double kReset = -1e4;        // outweighs what growing states may add within a chunk
constexpr double kCeiling = 1e30;

struct Range { int32_t start, end; };
TZ_DEVICE int32_t clamped(int64_t v, int64_t low, int64_t high) { return static_cast<int32_t>(v < low ? low : v > high ? high : v); }
TZ_DEVICE Range range_of(const ChunkScanCudaParams& p, int64_t sequence) {
  if (!p.cu_seqlens) return {0, static_cast<int32_t>(p.L)};
  const int32_t start = clamped(p.cu_seqlens[sequence * p.cu_seqlens_stride], 0, p.L);
  return {start, clamped(p.cu_seqlens[(sequence + 1) * p.cu_seqlens_stride], start, p.L)};
}

// ---- chunks and decays ---------------------------------------------------------------------------------------
// first[s] = how many chunks the sequences before s have, at most `chunks`. One block: a run of sequences for each thread.
__global__ void __launch_bounds__(kSearchThreads) chunk_scan_first_kernel(const ChunkScanCudaParams p, const int chunks) {
  TZ_SHARED(int, counts_smem, kSearchThreads);
  int32_t* first = static_cast<int32_t*>(p.first_chunks);
  const auto count = [&](int64_t s) {
    const Range range = range_of(p, s);
    return ceil_div(range.end - range.start, kChunk);
  };
  const int64_t run = ceil_div(p.sequences, kSearchThreads), begin = threadIdx.x * run, end = min(begin + run, p.sequences);
  int sum = 0;
  for (int64_t s = begin; s < end; s++) sum = min(sum + count(s), chunks);
  counts_smem[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (unsigned i = 0; i < threadIdx.x; i++) sum = min(sum + counts_smem[i], chunks);
  for (int64_t s = begin; s < end; s++) {
    first[s] = sum;
    sum = min(sum + count(s), chunks);
    if (s + 1 == p.sequences) first[s + 1] = sum;
  }
}

// The chunk of that number, without `real`, and the first position of its sequence.
TZ_DEVICE ScanChunk find_chunk(const ChunkScanCudaParams& p, int chunk, int& start) {
  start = 0;
  if (!p.cu_seqlens) {
    const int per_row = static_cast<int>(ceil_div(p.L, kChunk)), begin = chunk % per_row * kChunk;
    return {chunk / per_row, begin, static_cast<int32_t>(min(int64_t{begin} + kChunk, p.L)), 0, 0};
  }
  const int32_t* first = static_cast<const int32_t*>(p.first_chunks);
  int64_t low = 0, high = p.sequences;  // the sequence s with first[s] <= chunk < first[s + 1]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (first[middle + 1] > chunk) high = middle;
    else low = middle + 1;
  }
  if (low == p.sequences) return {0, 0, 0, 0, 0};
  const Range range = range_of(p, low);
  start = range.start;
  const int begin = start + (chunk - first[low]) * kChunk;
  return {0, begin, min(begin + kChunk, range.end), 0, 0};
}

// Grid: chunks x tiles of heads. A warp has a head at a time, a lane two neighbouring positions.
__global__ void __launch_bounds__(kThreads) chunk_scan_decays_kernel(const ChunkScanCudaParams p) {
  TZ_SHARED(float, dt_smem, kHeads * (kChunk + 1));
  TZ_SHARED(unsigned, masks_smem, 2 * 2);  // real positions, those that start anew
  const int chunk_id = blockIdx.x, warp = threadIdx.x / kWarp, lane = lane_id(), first_head = static_cast<int>(blockIdx.y) * kHeads;
  int start;
  ScanChunk chunk = find_chunk(p, chunk_id, start);

  // which positions are real, and where another sequence of seq_idx begins
  if (threadIdx.x < kChunk) {
    const int l = chunk.begin + static_cast<int>(threadIdx.x);
    bool real = l < chunk.end, anew = false;
    if (real && p.seq_idx) {
      const int32_t* ids = p.seq_idx + chunk.row * p.seq_idx_stride_b + l * p.seq_idx_stride_l;
      real = ids[0] >= 0;
      anew = real && l > start && ids[0] != ids[-p.seq_idx_stride_l];
    }
    const unsigned reals = __ballot_sync(kAllLanes, real), anews = __ballot_sync(kAllLanes, anew);
    if (lane == 0) masks_smem[warp] = reals, masks_smem[2 + warp] = anews;
  }
  __syncthreads();
  chunk.real = masks_smem[0] | static_cast<uint64_t>(masks_smem[1]) << 32;
  if (threadIdx.x == 0 && blockIdx.y == 0) static_cast<ScanChunk*>(p.chunks)[chunk_id] = chunk;

  // steps, heads as neighbours: so they lie in memory
  constexpr int kRounds = kHeads * kChunk / kThreads;
  const int own = static_cast<int>(threadIdx.x) % kHeads;
  const bool exists = first_head + own < p.H;
  const float bias = exists && p.dt_bias ? static_cast<const float*>(p.dt_bias)[first_head + own] : 0.0f;
  Element dt_rmem[kRounds]{};
#pragma unroll
  for (int i = 0; i < kRounds; i++) {
    const int l = (static_cast<int>(threadIdx.x) + i * kThreads) / kHeads;
    if (exists && is_real(chunk, l))
      dt_rmem[i] = load_element(p.dt_dtype, p.dt, chunk.row * p.dt_stride_b + (chunk.begin + l) * p.dt_stride_l + (first_head + own) * p.dt_stride_h);
  }
#pragma unroll
  for (int i = 0; i < kRounds; i++) {
    const int l = (static_cast<int>(threadIdx.x) + i * kThreads) / kHeads;
    float dt = to_float(p.dt_dtype, dt_rmem[i]) + bias;
    if (p.dt_softplus) dt = softplus(dt);
    dt = fminf(fmaxf(dt, static_cast<float>(p.dt_min)), static_cast<float>(p.dt_max));
    dt_smem[own * (kChunk + 1) + l] = exists && is_real(chunk, l) ? dt : 0;
  }
  __syncthreads();

  // sums over the chunk
  for (int i = warp; i < kHeads && first_head + i < p.H; i += kWarps) {
    const int head = first_head + i;
    const double A = static_cast<const float*>(p.A)[head];
    Vector<float, 2> dt, hi, lo, from_start, to_end;
    double cum[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int l = 2 * lane + j;
      dt.data[j] = dt_smem[i * (kChunk + 1) + l];
      cum[j] = fmin(fmax(static_cast<double>(dt.data[j]) * A, kPassing), kCeiling);
      if (masks_smem[2 + l / kWarp] >> l % kWarp & 1) cum[j] = kReset;
    }
    cum[1] += cum[0];
    double sum = cum[1];
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const double before = __shfl_up_sync(kAllLanes, sum, lanes);
      if (lane >= lanes) sum += before;
    }
    const double before = __shfl_up_sync(kAllLanes, sum, 1);
    if (lane > 0) cum[0] += before, cum[1] += before;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      hi.data[j] = static_cast<float>(cum[j]);
      lo.data[j] = static_cast<float>(fma(static_cast<double>(hi.data[j]), -1.0, cum[j]));  // a difference: of two, g++ 12 makes vectors, and 0
    }
    const float last_hi = __shfl_sync(kAllLanes, hi.data[1], kWarp - 1), last_lo = __shfl_sync(kAllLanes, lo.data[1], kWarp - 1);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      from_start.data[j] = expf(hi.data[j]);
      to_end.data[j] = expf((last_hi - hi.data[j]) + (last_lo - lo.data[j]));
    }
    float* out = const_cast<float*>(decays_at(p, chunk_id, head)) + 2 * lane;
    store_vector(dt, out + kDt * kChunk);
    store_vector(hi, out + kHi * kChunk);
    store_vector(lo, out + kLo * kChunk);
    store_vector(from_start, out + kFromStart * kChunk);
    store_vector(to_end, out + kToEnd * kChunk);
  }
}

// ---- states --------------------------------------------------------------------------------------------------
template <class T> struct StatesSmem {
  static constexpr int kPitch = pitch_of<T>(64, true);
  struct Stage {
    T values[kChunk * kPitch], rows[kChunk * kPitch];
    Decays decays;
  } stages[2];
};

// Forward: values = x, rows = B, given = initial states, last = final states. Reverse: values = dy, rows = C, given and last the gradients
// of the final and the initial states.
template <class T, class S> struct StatesOperands {
  const T* values;  int64_t values_stride_b, values_stride_l, values_stride_h;  bool values_vectors;
  const T* rows;  int64_t rows_stride_b, rows_stride_l, rows_stride_g;  bool rows_vectors;
  const float* given;
  S* states;
  float* last;
};

// Grid: sequences x heads x tiles of p x tiles of n, all in x. A warp has 16 of p. S: what states are kept in.
template <class T, class S, bool kReverse>
__global__ void __launch_bounds__(kThreads, 2) chunk_scan_states_kernel(const ChunkScanCudaParams p, const StatesOperands<T, S> o) {
  using Smem = StatesSmem<T>;
  TZ_DYNAMIC_SHARED(Smem, smem);
  const int N = static_cast<int>(p.N), P = static_cast<int>(p.P), H = static_cast<int>(p.H);
  const int tiles_n = ceil_div(N, 64), tiles = ceil_div(P, 64) * tiles_n;
  const int tile = static_cast<int>(blockIdx.x) % tiles, head = static_cast<int>(blockIdx.x) / tiles % H, first_row = threadIdx.x / kWarp * kRowsOfWarp;
  const int64_t sequence = static_cast<int>(blockIdx.x) / tiles / H, group = head / (H / static_cast<int>(p.G));
  const int p0 = tile / tiles_n * 64, n0 = tile % tiles_n * 64;
  const int32_t* firsts = static_cast<const int32_t*>(p.first_chunks);
  const int per_row = static_cast<int>(ceil_div(p.L, kChunk));
  const int64_t first = firsts ? firsts[sequence] : sequence * per_row;
  const int count = firsts ? static_cast<int>(firsts[sequence + 1] - first) : per_row;
  const auto chunk_of = [&](int i) { return first + (kReverse ? count - 1 - i : i); };
  // element (row, column) of this tile in a state, and how many columns are left from there
  const int64_t in_state = static_cast<int64_t>(p0) * N + n0;
  const auto left = [&](int row, int column) { return p0 + row < P ? N - n0 - column : 0; };
  const bool pairs = N % 2 == 0;

  Accumulators state;
  clear(state);
  if (o.given) {
    const float* given = o.given + (sequence * H + head) * P * N + in_state;
    const bool given_pairs = pairs && reinterpret_cast<uintptr_t>(o.given) % (2 * sizeof(float)) == 0;
    for_pairs(state, first_row, [&](int, int row, int column, float& a, float& b) {
      float v[2];
      load_pair(given + static_cast<int64_t>(row) * N + column, left(row, column), given_pairs, v);
      a = v[0], b = v[1];
    });
  }

  const auto load = [&](int i, const ScanChunk& chunk) {
    auto& stage = smem->stages[i % 2];
    const auto real = [&](int l) { return is_real(chunk, l); };
    load_tile<kChunk, 64>(stage.values, Smem::kPitch, o.values + chunk.row * o.values_stride_b + chunk.begin * o.values_stride_l + head * o.values_stride_h + p0,
                          o.values_stride_l, P - p0, o.values_vectors, real);
    load_tile<kChunk, 64>(stage.rows, Smem::kPitch, o.rows + chunk.row * o.rows_stride_b + chunk.begin * o.rows_stride_l + group * o.rows_stride_g + n0,
                          o.rows_stride_l, N - n0, o.rows_vectors, real);
    load_decays(stage.decays, decays_at(p, chunk_of(i), head));
    cp_async_commit();
  };
  ScanChunk ahead{};  // read one step before it is needed
  if (count > 0) load(0, chunk_at(p, chunk_of(0)));
  if (count > 1) ahead = chunk_at(p, chunk_of(1));

  for (int i = 0; i < count; i++) {
    if (i + 1 < count) load(i + 1, ahead);
    if (i + 2 < count) ahead = chunk_at(p, chunk_of(i + 2));
    S* out = o.states + (chunk_of(i) * H + head) * P * N + in_state;
    for_pairs(state, first_row, [&](int, int row, int column, float a, float b) {
      store_pair(a, b, out + static_cast<int64_t>(row) * N + column, left(row, column), pairs);
    });
    if (i + 1 < count) cp_async_wait<1>();
    else cp_async_wait<0>();
    __syncthreads();

    const auto& stage = smem->stages[i % 2];
    const Decays& d = stage.decays;
    const float total = d[kFromStart][kChunk - 1];
#pragma unroll
    for (int j = 0; j < kBlocks; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) state[j][e] *= total;
    const auto weighted_values = [&](int l0, float (&v)[8]) {
      load_a_floats<true>(v, stage.values + l0 * Smem::kPitch + first_row, Smem::kPitch);
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const int l = l0 + lane_id() % 4 * 2 + e / 4 * 8 + e % 2;
        v[e] *= kReverse ? d[kFromStart][l] : d[kToEnd][l] * d[kDt][l];
      }
    };
    if (p0 + first_row < P)
      add_product<Weighted<T, true>, Input<T>, true, kChunk>(state, weighted_values, stage.rows, Smem::kPitch, 0, kChunk, N - n0);
    __syncthreads();  // the next load overwrites this stage
  }

  if (o.last) {
    float* last = o.last + (sequence * H + head) * P * N + in_state;
    for_pairs(state, first_row, [&](int, int row, int column, float a, float b) {
      store_pair(a, b, last + static_cast<int64_t>(row) * N + column, left(row, column), pairs);
    });
  }
}

template <class T, class S, bool kReverse> cudaError_t launch_states_of(const ChunkScanCudaParams& p, cudaStream_t stream) {
  const Vectors vectors = vectors_of(p);
  StatesOperands<T, S> o;
  if (kReverse)
    o = {static_cast<const T*>(p.dy), p.dy_stride_b, p.dy_stride_l, p.dy_stride_h, vectors.dy, static_cast<const T*>(p.C), p.C_stride_b, p.C_stride_l,
         p.C_stride_g, vectors.C, static_cast<const float*>(p.dfinal_states), static_cast<S*>(p.dstates), static_cast<float*>(p.dinitial_states)};
  else
    o = {static_cast<const T*>(p.x), p.x_stride_b, p.x_stride_l, p.x_stride_h, vectors.x, static_cast<const T*>(p.Bm), p.B_stride_b, p.B_stride_l,
         p.B_stride_g, vectors.B, static_cast<const float*>(p.initial_states), static_cast<S*>(p.states), static_cast<float*>(p.final_states)};
  const int64_t blocks = p.sequences * p.H * ceil_div(p.P, 64) * ceil_div(p.N, 64);
  if (blocks == 0) return cudaSuccess;
  return launch(chunk_scan_states_kernel<T, S, kReverse>, dim3(static_cast<unsigned>(blocks)), kThreads, sizeof(StatesSmem<T>), stream, p, o);
}

}  // namespace

cudaError_t launch_decays(const ChunkScanCudaParams& p, cudaStream_t stream) {
  const int64_t chunks = scan_chunks(p);
  if (p.cu_seqlens) {
    const cudaError_t error = launch(chunk_scan_first_kernel, dim3(1), kSearchThreads, 0, stream, p, static_cast<int>(chunks));
    if (error != cudaSuccess) return error;
  }
  if (chunks == 0) return cudaSuccess;
  return launch(chunk_scan_decays_kernel, dim3(static_cast<unsigned>(chunks), static_cast<unsigned>(ceil_div(p.H, kHeads))), kThreads, 0, stream, p);
}

cudaError_t launch_states(const ChunkScanCudaParams& p, Pass pass, cudaStream_t stream) {
  return with_type(p.x_dtype, [&](auto t) {
    using T = decltype(t);
    if (pass == Pass::reverse) return launch_states_of<T, float, true>(p, stream);
    return pass == Pass::again ? launch_states_of<T, float, false>(p, stream) : launch_states_of<T, typename KeptState<T>::type, false>(p, stream);
  });
}

}}}  // namespace terrazzo::cuda::scan
