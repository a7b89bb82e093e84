// The pairs of token and choice sorted by expert on the device, ties in the order of the pairs: a counting sort without atomics.
//
//   1. a warp counts the experts of its unit, a run of neighbouring pairs: counts[e, unit]
//   2. counts become what earlier units have of the same expert, offs the total of each     3. offs become running sums
//   4. each warp places its pairs: offs[e - 1] + what earlier units have + rank within the unit
//
// Few pairs (a decoding step) are sorted by one block in one launch. Small beside the products: 20 bytes a pair, and 12 E a unit.
#include "kernels.h"

#include "common.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int64_t kFewUnits = 8;  // of one block

struct Units {
  int64_t count, pairs;  // pairs of each
  int bits;              // of an expert, or of E
};

// 32 neighbouring pairs: the lane's expert (E for none of ours) and the lanes that have the same.
struct Round {
  int expert;
  unsigned same;
  TZ_DEVICE Round(const ExpertRowsParams& p, const Units& units, int64_t pair, int64_t end) {
    const int E = static_cast<int>(p.E), given = pair < end ? p.indices[pair] : E;
    expert = given >= 0 && given < E ? given : E, same = kAllLanes;
    for (int bit = 0; bit < units.bits; bit++) {
      const bool set = expert >> bit & 1;
      const unsigned votes = __ballot_sync(kAllLanes, set);
      same &= set ? votes : ~votes;
    }
  }
  TZ_DEVICE int rank(int lane) const { return __popc(same & ((1u << lane) - 1)); }
};

TZ_DEVICE int64_t unit_end(const ExpertRowsParams& p, const Units& units, int64_t unit) { return min((unit + 1) * units.pairs, p.pairs); }

TZ_DEVICE void count_unit(const ExpertRowsParams& p, const Units& units, int64_t unit, int lane) {
  for (int64_t e = lane; e < p.E; e += kWarp) p.counts[e * units.count + unit] = 0;
  __syncwarp();
  const int64_t end = unit_end(p, units, unit);
  for (int64_t first = unit * units.pairs; first < end; first += kWarp) {
    const Round round(p, units, first + lane, end);
    if (round.expert < p.E && round.rank(lane) == 0) p.counts[round.expert * units.count + unit] += __popc(round.same);
    __syncwarp();
  }
}

TZ_DEVICE int running_sum(int v, int lane) {
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int other = __shfl_up_sync(kAllLanes, v, lanes);
    if (lane >= lanes) v += other;
  }
  return v;
}

TZ_DEVICE void sum_units(const ExpertRowsParams& p, const Units& units, int64_t e, int lane) {
  int32_t* counts = p.counts + e * units.count;
  int before = 0;
  for (int64_t first = 0; first < units.count; first += kWarp) {
    const int64_t unit = first + lane;
    const int mine = unit < units.count ? counts[unit] : 0, sum = running_sum(mine, lane);
    if (unit < units.count) counts[unit] = before + sum - mine;
    before += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  if (lane == 0) p.offs[e] = before;
}

TZ_DEVICE void sum_experts(const ExpertRowsParams& p, int lane) {
  int before = 0;
  for (int64_t first = 0; first < p.E; first += kWarp) {
    const int64_t e = first + lane;
    const int sum = running_sum(e < p.E ? p.offs[e] : 0, lane);
    if (e < p.E) p.offs[e] = before + sum;
    before += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
}

TZ_DEVICE void place_unit(const ExpertRowsParams& p, const Units& units, int64_t unit, int lane) {
  const int64_t end = unit_end(p, units, unit);
  for (int64_t first = unit * units.pairs; first < end; first += kWarp) {
    const int64_t pair = first + lane;
    const Round round(p, units, pair, end);
    int32_t place = -1;
    int32_t* before = p.counts + round.expert * units.count + unit;
    if (round.expert < p.E) {
      place = (round.expert ? p.offs[round.expert - 1] : 0) + *before + round.rank(lane);
      p.order[place] = static_cast<int32_t>(pair);
      p.tokens[place] = static_cast<int32_t>(pair / p.A);
    }
    if (pair < end) p.places[pair] = place;
    __syncwarp();
    if (round.expert < p.E && round.rank(lane) == 0) *before += __popc(round.same);
    __syncwarp();
  }
}

enum class Phase { count, sum_units, sum_experts, place };

template <Phase phase> __global__ void __launch_bounds__(kThreads) expert_rows_kernel(const ExpertRowsParams p, const Units units) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if constexpr (phase == Phase::count) {
    if (warp < units.count) count_unit(p, units, warp, lane);
  } else if constexpr (phase == Phase::sum_units) {
    if (warp < p.E) sum_units(p, units, warp, lane);
  } else if constexpr (phase == Phase::sum_experts) {
    if (warp == 0) sum_experts(p, lane);
  } else {
    if (warp < units.count) place_unit(p, units, warp, lane);
  }
}

__global__ void __launch_bounds__(kThreads) expert_rows_one_block_kernel(const ExpertRowsParams p, const Units units) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (warp < units.count) count_unit(p, units, warp, lane);
  __syncthreads();
  for (int64_t e = warp; e < p.E; e += kWarps) sum_units(p, units, e, lane);
  __syncthreads();
  if (warp == 0) sum_experts(p, lane);
  __syncthreads();
  if (warp < units.count) place_unit(p, units, warp, lane);
}
static_assert(kFewUnits <= kWarps);

}  // namespace

cudaError_t expert_rows_cuda(const ExpertRowsParams& p, cudaStream_t stream) {
  if (p.pairs > INT32_MAX || p.E > INT32_MAX / 2) return cudaErrorInvalidValue;
  if (p.E == 0) return cudaSuccess;
  Units units{expert_row_units(p.pairs), 0, 0};
  if (units.count) units.pairs = ceil_div(ceil_div(p.pairs, units.count), kWarp) * kWarp;
  while (p.E >> units.bits) units.bits++;
  if (units.count <= kFewUnits) return launch(expert_rows_one_block_kernel, dim3(1), kThreads, 0, stream, p, units);
  const dim3 by_unit(static_cast<unsigned>(ceil_div(units.count, kWarps))), by_expert(static_cast<unsigned>(ceil_div(p.E, kWarps)));
  cudaError_t error = launch(expert_rows_kernel<Phase::count>, by_unit, kThreads, 0, stream, p, units);
  if (error == cudaSuccess) error = launch(expert_rows_kernel<Phase::sum_units>, by_expert, kThreads, 0, stream, p, units);
  if (error == cudaSuccess) error = launch(expert_rows_kernel<Phase::sum_experts>, dim3(1), kThreads, 0, stream, p, units);
  if (error == cudaSuccess) error = launch(expert_rows_kernel<Phase::place>, by_unit, kThreads, 0, stream, p, units);
  return error;
}

}}  // namespace terrazzo::cuda
