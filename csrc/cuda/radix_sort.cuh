// A stable sort of the numbers 0 .. n - 1 by keys from 0 up to a limit, a digit of at most kSortBits bits a pass, the lowest first. A tile
// of kSortTile numbers is one block's. Keys themselves don't move: they are looked up by number.
//   count   how many numbers of each tile have each digit: counts [bins, tiles]
//   scan    of each digit the counts of the tiles before, and the total
//   place   the place of each number: numbers of lower digits + of its digit in tiles before + in this tile before
// One tile needs no more than the last step. Inside a tile each warp has a run of numbers and counts for itself, 32 at a time: lanes that
// hold the same digit find each other. Only integers are added: the result does not depend on any order.
#pragma once
#include "common.cuh"
#include "params.h"

namespace terrazzo { namespace cuda {

constexpr int kSortThreads = 256, kSortWarps = kSortThreads / kWarp, kSortRounds = kSortTile / kSortThreads;

TZ_DEVICE int warp_inclusive(int v) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int other = __shfl_up_sync(kAllLanes, v, lanes);
    if (lane >= lanes) v += other;
  }
  return v;
}

// v becomes the sum of those of the threads before, in a block of kSortThreads; returns that of all.
TZ_DEVICE int block_exclusive(int& v) {
  TZ_SHARED(int, warps_smem, kSortWarps);
  const int warp = threadIdx.x / kWarp, up_to = warp_inclusive(v);
  if (threadIdx.x % kWarp == kWarp - 1) warps_smem[warp] = up_to;
  __syncthreads();
  int before = 0, total = 0;
#pragma unroll
  for (int w = 0; w < kSortWarps; w++) {
    if (w == warp) before = total;
    total += warps_smem[w];
  }
  __syncthreads();  // the next call overwrites
  v = before + up_to - v;
  return total;
}

// What a sort leaves; all but the order may be null.
struct Sorted {
  int32_t* order = nullptr;                        // [n] the number at each place
  int32_t* inverse = nullptr;                      // [n] the place of each number
  int32_t* ends = nullptr;  int num_ends = 0;      // [num_ends] where the numbers of each key end; of a single pass
  int32_t* quotients = nullptr;  int divisor = 1;  // [n] order / divisor
};

// One pass: what it reads and where it leads.
struct SortPass {
  const int32_t* from;   // [n] the numbers as sorted so far, or null: 0, 1, ...
  Sorted to;
  int64_t n;
  unsigned tiles;
  int shift, bins;
  int32_t* counts;       // [bins, tiles], not used when there is one tile
  int32_t* totals;       // [bins]
};

// The number at place i and its digit; -1 and `bins` behind the last.
template <class Keys> TZ_DEVICE void load_digit(const SortPass& pass, const Keys& keys, int64_t i, int& number, int& digit) {
  number = i >= pass.n ? -1 : pass.from ? pass.from[i] : static_cast<int>(i);
  digit = number < 0 ? pass.bins : static_cast<int>(keys(number) >> pass.shift) & (pass.bins - 1);
}

template <class Keys> __global__ void __launch_bounds__(kSortThreads) sort_count_kernel(const SortPass pass, const Keys keys) {
  TZ_DYNAMIC_SHARED(int, bins_smem);
  for (int d = threadIdx.x; d < pass.bins; d += kSortThreads) bins_smem[d] = 0;
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kSortRounds; r++) {
    int number, digit;
    load_digit(pass, keys, static_cast<int64_t>(blockIdx.x) * kSortTile + r * kSortThreads + threadIdx.x, number, digit);
    if (number >= 0) atomicAdd(bins_smem + digit, 1);
  }
  __syncthreads();
  for (int d = threadIdx.x; d < pass.bins; d += kSortThreads) pass.counts[static_cast<int64_t>(d) * pass.tiles + blockIdx.x] = bins_smem[d];
}

// A warp for each digit.
static __global__ void __launch_bounds__(kSortThreads) sort_scan_kernel(const SortPass pass) {
  const int lane = threadIdx.x % kWarp, d = static_cast<int>(blockIdx.x) * kSortWarps + threadIdx.x / kWarp;
  if (d >= pass.bins) return;
  int32_t* counts = pass.counts + static_cast<int64_t>(d) * pass.tiles;
  int before = 0;
  for (unsigned first = 0; first < pass.tiles; first += kWarp) {
    const int v = first + lane < pass.tiles ? counts[first + lane] : 0, up_to = warp_inclusive(v);
    if (first + lane < pass.tiles) counts[first + lane] = before + up_to - v;
    before += __shfl_sync(kAllLanes, up_to, kWarp - 1);
  }
  if (lane == 0) pass.totals[d] = before;
}

template <class Keys> __global__ void __launch_bounds__(kSortThreads) sort_place_kernel(const SortPass pass, const Keys keys) {
  TZ_DYNAMIC_SHARED(int, smem);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, bins = pass.bins;
  int *starts_smem = smem, *warps_smem = smem + bins;  // [bins], [kSortWarps, bins]
  const bool alone = pass.tiles == 1;
  for (int i = threadIdx.x; i < kSortWarps * bins; i += kSortThreads) warps_smem[i] = 0;
  __syncthreads();

  // how many numbers of the same digit stand before each one in its warp's run
  int number[kSortRounds], digit[kSortRounds], rank[kSortRounds];
#pragma unroll
  for (int r = 0; r < kSortRounds; r++)
    load_digit(pass, keys, static_cast<int64_t>(blockIdx.x) * kSortTile + (warp * kSortRounds + r) * kWarp + lane, number[r], digit[r]);
#pragma unroll
  for (int r = 0; r < kSortRounds; r++) {
    const unsigned same = __match_any_sync(kAllLanes, digit[r]);
    const int before = __popc(same & ((1u << lane) - 1));
    int* count = warps_smem + warp * bins + digit[r];
    if (number[r] >= 0) rank[r] = *count + before;
    __syncwarp();
    if (number[r] >= 0 && before == 0) *count += __popc(same);
    __syncwarp();
  }
  __syncthreads();

  // warps before, and how many numbers of each digit there are altogether
  for (int d = threadIdx.x; d < bins; d += kSortThreads) {
    int in_tile = 0;
#pragma unroll
    for (int w = 0; w < kSortWarps; w++) {
      const int count = warps_smem[w * bins + d];
      warps_smem[w * bins + d] = in_tile;
      in_tile += count;
    }
    starts_smem[d] = alone ? in_tile : pass.totals[d];
  }
  __syncthreads();

  // numbers of lower digits, and those of this one in tiles before
  int lower = 0;
  for (int first = 0; first < bins; first += kSortThreads) {
    const int d = first + static_cast<int>(threadIdx.x), count = d < bins ? starts_smem[d] : 0;
    int start = count;
    const int all = block_exclusive(start);
    if (d < bins) {
      starts_smem[d] = lower + start + (alone ? 0 : pass.counts[static_cast<int64_t>(d) * pass.tiles + blockIdx.x]);
      if (pass.to.ends && blockIdx.x == 0 && d < pass.to.num_ends) pass.to.ends[d] = lower + start + count;
    }
    lower += all;
  }
  __syncthreads();

#pragma unroll
  for (int r = 0; r < kSortRounds; r++) {
    if (number[r] < 0) continue;
    const int place = starts_smem[digit[r]] + warps_smem[warp * bins + digit[r]] + rank[r];
    pass.to.order[place] = number[r];
    if (pass.to.inverse) pass.to.inverse[number[r]] = place;
    if (pass.to.quotients) pass.to.quotients[place] = number[r] / pass.to.divisor;
  }
}

// keys(i) of the numbers i < n lies in [0, limit); scratch [sort_scratch(n, limit)].
template <class Keys> cudaError_t radix_sort(const Keys& keys, int64_t n, int64_t limit, const Sorted& sorted, int32_t* scratch, cudaStream_t stream) {
  const SortPlan plan = sort_plan(n, limit);
  int32_t* const other = scratch + (plan.tiles + 1) * plan.bins;
  for (int i = 0; i < plan.passes; i++) {
    const bool to_order = (plan.passes - i) % 2;  // the last one does
    SortPass pass{};
    pass.from = i == 0 ? nullptr : to_order ? other : sorted.order;
    pass.to.order = to_order ? sorted.order : other;
    if (i == plan.passes - 1) pass.to = sorted;
    pass.n = n, pass.tiles = static_cast<unsigned>(plan.tiles), pass.shift = i * plan.bits, pass.bins = static_cast<int>(plan.bins);
    pass.totals = scratch, pass.counts = scratch + plan.bins;
    const size_t digits = static_cast<size_t>(plan.bins) * sizeof(int);
    if (plan.tiles > 1) {
      cudaError_t error = launch(sort_count_kernel<Keys>, dim3(pass.tiles), kSortThreads, digits, stream, pass, keys);
      if (error != cudaSuccess) return error;
      error = launch(sort_scan_kernel, dim3(static_cast<unsigned>(ceil_div(plan.bins, kSortWarps))), kSortThreads, 0, stream, pass);
      if (error != cudaSuccess) return error;
    }
    const cudaError_t error = launch(sort_place_kernel<Keys>, dim3(pass.tiles), kSortThreads, (kSortWarps + 1) * digits, stream, pass, keys);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}}  // namespace terrazzo::cuda
