// Patches of texts that arrive a block at a time, and the patch of every position from lengths: see csrc/cpu/entropy_patch.cpp.
//
// patcher_update: a warp for each row, 32 positions at a time as in patch_cut.cu; the state is read at the beginning and written at
// the end. patch_ids: a block for each tile of patches. It adds up the lengths before its tile from the tiles' sums, and fills its own
// positions, each looking for its patch among the tile's ends in shared memory. Sums stop at the row's length, so that 32 bits hold them.
#include "kernels.h"

#include "patch_cut.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kThreads = static_cast<int>(kPatchIdTile), kWarps = kThreads / kWarp;

// ---- one more block of entropies -----------------------------------------------------------------------------
template <class T> __global__ void __launch_bounds__(kWarp) patcher_update_kernel(const PatcherUpdateParams p) {
  const int lane = threadIdx.x;
  const unsigned up_to_here = lanes_below(lane) | 1u << lane;
  const float threshold = in_dtype<T>(p.threshold), threshold_add = static_cast<float>(p.threshold_add);
  const int64_t row = blockIdx.x, seen = p.state[3 * row];
  const T* entropies = static_cast<const T*>(p.entropies) + row * p.K;
  T* carried = static_cast<T*>(p.before) + row;
  int64_t last = -p.state[3 * row + 1], id = p.state[3 * row + 2];  // where the open patch began; position 0 is the first of this block
  float before_block = to_float(*carried);
  __syncwarp();  // before anyone writes
  for (int64_t base = 0; base < p.K; base += kWarp) {
    const int64_t position = base + lane, i = seen + 1 + position;  // i: the position of the text that this entropy decides
    const bool live = position < p.K;
    const float e = live ? to_float(entropies[position]) : 0.0f, below = __shfl_up_sync(kAllLanes, e, 1);
    const bool by_rule = live && (i < 2 || unsure(p.rule, i, e, lane ? below : before_block, threshold, threshold_add));
    const unsigned rule_votes = __ballot_sync(kAllLanes, by_rule);
    const int64_t distance = position - (rule_votes & up_to_here ? base + highest(rule_votes & up_to_here) : last);
    const bool start = live && (p.max_length ? distance % p.max_length == 0 : distance == 0);
    const unsigned votes = __ballot_sync(kAllLanes, start);
    if (live) {
      p.starts[row * p.K + position] = start;
      p.ids[row * p.K + position] = static_cast<int32_t>(id + __popc(votes & up_to_here));
    }
    if (votes) last = base + highest(votes);
    id += __popc(votes);
    before_block = __shfl_sync(kAllLanes, e, kWarp - 1);
  }
  if (lane > 0) return;
  p.state[3 * row] = seen + p.K, p.state[3 * row + 1] = p.K - last, p.state[3 * row + 2] = id;
  *carried = entropies[p.K - 1];
}

// ---- ids -----------------------------------------------------------------------------------------------------
// a + b, or `most`: sums of lengths need not go on behind a row's end. Both are at most `most`.
TZ_DEVICE unsigned add_up_to(unsigned a, unsigned b, unsigned most) { return min(a + b, most); }

// How many positions patch s of a row takes if there is room. The last takes what is left.
TZ_DEVICE unsigned length_of(const PatchIdsCudaParams& p, int64_t row, int64_t s) {
  if (s >= p.S - 1) return s == p.S - 1 ? static_cast<unsigned>(p.L) : 0;
  return static_cast<unsigned>(max(int64_t{0}, min(p.lengths[row * p.S + s], p.L)));
}

// Inclusive sums over the threads of a block, at most `most`.
TZ_DEVICE unsigned block_scan(unsigned v, unsigned most) {
  TZ_SHARED(unsigned, warps_smem, kWarps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const unsigned other = __shfl_up_sync(kAllLanes, v, lanes);
    if (lane >= lanes) v = add_up_to(v, other, most);
  }
  if (lane == kWarp - 1) warps_smem[warp] = v;
  __syncthreads();
  for (int w = 0; w < warp; w++) v = add_up_to(v, warps_smem[w], most);
  __syncthreads();  // the next call overwrites
  return v;
}

// Grid: rows x tiles of patches.
__global__ void __launch_bounds__(kThreads) patch_sums_kernel(const PatchIdsCudaParams p, const int tiles) {
  const int64_t row = blockIdx.x / static_cast<unsigned>(tiles), s = static_cast<int64_t>(blockIdx.x % static_cast<unsigned>(tiles)) * kThreads + threadIdx.x;
  const unsigned sum = block_scan(length_of(p, row, s), static_cast<unsigned>(p.L));
  if (threadIdx.x == kThreads - 1) p.sums[blockIdx.x] = static_cast<int32_t>(sum);
}

__global__ void __launch_bounds__(kThreads) patch_ids_kernel(const PatchIdsCudaParams p, const int tiles) {
  const int64_t row = blockIdx.x / static_cast<unsigned>(tiles);
  const int tile = blockIdx.x % static_cast<unsigned>(tiles);
  const unsigned L = static_cast<unsigned>(p.L);
  TZ_SHARED(unsigned, ends_smem, kThreads);
  TZ_SHARED(unsigned, begin_smem, 1);

  // where this tile begins, and where each of its patches ends
  unsigned before = 0;
  for (int t = threadIdx.x; t < tile; t += kThreads) before = add_up_to(before, static_cast<unsigned>(p.sums[row * tiles + t]), L);
  if (tile > 0) before = block_scan(before, L);
  if (threadIdx.x == kThreads - 1) begin_smem[0] = before;
  __syncthreads();
  const unsigned begin = begin_smem[0];
  const unsigned within = block_scan(length_of(p, row, static_cast<int64_t>(tile) * kThreads + threadIdx.x), L);
  ends_smem[threadIdx.x] = add_up_to(begin, within, L);
  __syncthreads();

  const unsigned end = ends_smem[kThreads - 1];
  for (unsigned position = begin + threadIdx.x; position < end; position += kThreads) {
    int low = 0, high = kThreads - 1;  // the first whose end lies behind the position
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ends_smem[middle] > position) high = middle;
      else low = middle + 1;
    }
    p.ids[row * p.L + position] = tile * kThreads + low;
  }
}

}  // namespace

cudaError_t patcher_update_cuda(const PatcherUpdateParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.K == 0) return cudaSuccess;
  if (p.B > INT32_MAX) return cudaErrorInvalidValue;
  return with_type(p.dtype, [&](auto t) { return launch(patcher_update_kernel<decltype(t)>, dim3(static_cast<unsigned>(p.B)), kWarp, 0, stream, p); });
}

cudaError_t patch_ids_cuda(const PatchIdsCudaParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.L == 0) return cudaSuccess;
  const int64_t tiles = patch_id_tiles(p.S);
  if (p.B * tiles > INT32_MAX || p.S > INT32_MAX - kPatchIdTile) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(p.B * tiles));
  if (tiles > 1) {
    const cudaError_t error = launch(patch_sums_kernel, grid, kThreads, 0, stream, p, static_cast<int>(tiles));
    if (error != cudaSuccess) return error;
  }
  return launch(patch_ids_kernel, grid, kThreads, 0, stream, p, static_cast<int>(tiles));
}

}}  // namespace terrazzo::cuda
