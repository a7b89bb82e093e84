// Pairs (token, choice) sorted by expert, stably; those of no expert of ours last.
//   order [pairs] the pair at each place, inverse [pairs] the place of each pair, offs [E] the end of each expert's places; and for
//   fused_experts, whose slots these places are, tokens [pairs] the token at each place
//
// Latency is the limit: a pair is 12 bytes. Up to 1023 experts are one pass of radix_sort.cuh, up to 2048 pairs one launch; more of both
// take more of them. Nothing is asked of the device on the way.
#include "kernels.h"

#include "radix_sort.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kThreads = 128;

struct ExpertKeys {
  const int32_t* indices;
  int E;
  TZ_DEVICE int operator()(int pair) const { return indices[pair] >= 0 && indices[pair] < E ? indices[pair] : E; }
};

// offs[e]: how many of the sorted pairs are of the experts 0 .. e, by halving.
__global__ void __launch_bounds__(kThreads) moe_permute_ends_kernel(const ExpertKeys keys, const int32_t* __restrict__ order, const int64_t pairs,
                                                                    int32_t* __restrict__ offs) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= keys.E) return;
  int64_t low = 0, high = pairs;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys(order[middle]) <= e) low = middle + 1;
    else high = middle;
  }
  offs[e] = static_cast<int32_t>(low);
}

}  // namespace

cudaError_t moe_permute_cuda(const MoePermuteCudaParams& p, cudaStream_t stream) {
  if (p.pairs > INT32_MAX || p.E >= INT32_MAX) return cudaErrorInvalidValue;
  const ExpertKeys keys{p.indices, static_cast<int>(p.E)};
  const bool one_pass = sort_plan(p.pairs, p.E + 1).passes == 1;
  const Sorted sorted{p.order, p.inverse, one_pass ? p.offs : nullptr, keys.E, p.tokens, static_cast<int>(p.A)};
  const cudaError_t error = radix_sort(keys, p.pairs, p.E + 1, sorted, p.sort, stream);
  if (error != cudaSuccess || one_pass) return error;
  return launch(moe_permute_ends_kernel, dim3(static_cast<unsigned>(ceil_div(p.E, kThreads))), kThreads, 0, stream, keys,
                static_cast<const int32_t*>(p.order), p.pairs, p.offs);
}

}}  // namespace terrazzo::cuda
