// Where patches begin: starts[b, s], s = 0..S, is the place of the first byte of row b whose id is at least s, or L. So patch s lies within
// [starts[b, s], starts[b, s + 1]); bytes of no patch (negative ids) may stand anywhere in it. Ids that fall along a row give ranges
// that are wrong but lie within the row.
//
// A byte fills the starts between the id before it and its own. Only a tile that has such a byte looks for the id before the tile, past
// bytes of no patch: altogether no more than once over the row. No atomics, nothing to clear first.
#pragma once
#include "common.cuh"

namespace terrazzo { namespace cuda {

constexpr int kStartThreads = 256;

// Over the threads of a block that hold an id, one that isn't negative: that of the nearest before this thread, and of the last of all;
// `before` where there is none.
struct Nearest { int previous, last; };
TZ_DEVICE Nearest nearest_ids(int id, int before) {
  TZ_SHARED(int, warps_smem, kStartThreads / kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned live = __ballot_sync(kAllLanes, id >= 0), below = live & ((1u << lane) - 1);
  const int in_warp = __shfl_sync(kAllLanes, id, below ? 31 - __clz(static_cast<int>(below)) : 0);
  const int of_warp = __shfl_sync(kAllLanes, id, live ? 31 - __clz(static_cast<int>(live)) : 0);
  if (lane == 0) warps_smem[warp] = live ? of_warp : -1;
  __syncthreads();
  Nearest found{before, before};
#pragma unroll
  for (int w = 0; w < kStartThreads / kWarp; w++) {
    if (warps_smem[w] < 0) continue;
    found.last = warps_smem[w];
    if (w < warp) found.previous = warps_smem[w];
  }
  if (below) found.previous = in_warp;
  __syncthreads();  // the next call overwrites
  return found;
}

// Grid: rows x tiles of kStartThreads bytes, at least one tile.
static __global__ void __launch_bounds__(kStartThreads) patch_starts_kernel(const int32_t* __restrict__ ids /* [B, L] */,
                                                                            int32_t* __restrict__ starts /* [B, S + 1] */, const int64_t L, const int64_t S,
                                                                            const unsigned tiles) {
  const int64_t b = blockIdx.x / tiles, first = static_cast<int64_t>(blockIdx.x % tiles) * kStartThreads, l = first + threadIdx.x;
  const bool last_tile = first + kStartThreads >= L;
  ids += b * L, starts += b * (S + 1);
  const int id = l < L ? ids[l] : -1;

  int before = -1;
  if (__syncthreads_or(id >= 0) || last_tile)
    for (int64_t at = first; at > 0 && before < 0; at -= kStartThreads) before = nearest_ids(ids[at - kStartThreads + threadIdx.x], -1).last;

  const Nearest found = nearest_ids(id, before);
  if (id >= 0)
    for (int64_t s = int64_t{found.previous} + 1; s <= id && s <= S; s++) starts[s] = static_cast<int32_t>(l);
  if (last_tile)
    for (int64_t s = int64_t{found.last} + 1 + threadIdx.x; s <= S; s += kStartThreads) starts[s] = static_cast<int32_t>(L);
}

inline cudaError_t find_patch_starts(const int32_t* ids, int32_t* starts, int64_t B, int64_t L, int64_t S, cudaStream_t stream) {
  const int64_t tiles = L ? ceil_div(L, kStartThreads) : 1;
  if (B * tiles > INT32_MAX) return cudaErrorInvalidValue;
  return launch(patch_starts_kernel, dim3(static_cast<unsigned>(B * tiles)), kStartThreads, 0, stream, ids, starts, L, S, static_cast<unsigned>(tiles));
}

}}  // namespace terrazzo::cuda
