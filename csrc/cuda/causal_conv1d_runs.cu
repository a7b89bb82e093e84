// Packed sequences of the convolution as a code and an owner for each position (see causal_conv1d.cuh), found on the device: a
// binary search in cu_seqlens and W - 1 looks back in seq_idx for each position. A few bytes a position, beside all channels of it.
#include "kernels.h"

#include "causal_conv1d.cuh"

namespace terrazzo { namespace cuda {
namespace {

TZ_DEVICE int id_at(const CausalConv1dCudaParams& p, int64_t b, int l) { return p.seq_idx[b * p.seq_idx_stride_b + l * p.seq_idx_stride_l]; }

// ends[s]: behind the last position of sequence s that isn't padding; its begin where there is none. A warp for each, from the end.
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_ends_kernel(const CausalConv1dCudaParams p) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * (kConvThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (s >= p.num_sequences) return;  // a whole warp
  const int begin = begin_of(p, s), L = static_cast<int>(p.L);
  const int end = p.cu_seqlens ? clamp(p.cu_seqlens[(s + 1) * p.cu_seqlens_stride], begin, L) : L;
  int found = begin;
  for (int at = end; at > begin; at -= kWarp) {
    const int l = at - 1 - lane;
    const unsigned real = __ballot_sync(kAllLanes, l >= begin && id_at(p, row_of(p, s), l) >= 0);
    if (!real) continue;
    found = at - (__ffs(static_cast<int>(real)) - 1);
    break;
  }
  if (lane == 0) p.ends[s] = found;
}

// A thread for each byte of codes; those behind a row's end are 0. Grid: rows x tiles.
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_codes_kernel(const CausalConv1dCudaParams p, const unsigned tiles) {
  const int64_t b = blockIdx.x / tiles;
  const int l = static_cast<int>(blockIdx.x % tiles) * kConvThreads + static_cast<int>(threadIdx.x), L = static_cast<int>(p.L);
  if (l >= p.codes_stride_b) return;
  uint8_t* code = p.codes + b * p.codes_stride_b + l;
  if (l >= L) {
    *code = 0;
    return;
  }

  // the last sequence that begins at l or before: empty ones begin with the next
  int64_t s = b;
  int begin = 0;
  if (p.cu_seqlens) {
    s = 0;
    for (int64_t high = p.num_sequences; high - s > 1;) {
      const int64_t middle = (s + high) / 2;
      if (p.cu_seqlens[middle * p.cu_seqlens_stride] <= l) s = middle;
      else high = middle;
    }
    begin = min(begin_of(p, s), l);
  }
  p.owners[b * p.L + l] = static_cast<int32_t>(s);

  // back until the run, or W - 1 positions, are over
  const int id = p.seq_idx ? id_at(p, b, l) : 0, before = static_cast<int>(p.W) - 1;
  if (id < 0) {
    *code = kPadding;
    return;
  }
  int reach = 0;
  while (reach < before && l - reach > begin && (!p.seq_idx || id_at(p, b, l - reach - 1) == id)) reach++;
  unsigned found = static_cast<unsigned>(before - reach);
  if (reach < before && reach == l - begin) found |= kInitial;

  // an input of the final state: near the end, and of the same run as the last input
  if (p.dfinal_states) {
    const int end = p.ends ? p.ends[s] : clamp(p.cu_seqlens[(s + 1) * p.cu_seqlens_stride], 0, L);
    const int left = end - l;
    bool kept = left >= 1 && left <= before;
    for (int i = 1; p.seq_idx && kept && i < left; i++) kept = id_at(p, b, l + i) == id;
    if (kept) found |= static_cast<unsigned>(left) * 8;
  }
  *code = static_cast<uint8_t>(found);
}

}  // namespace

cudaError_t causal_conv1d_runs(const CausalConv1dCudaParams& p, bool ends, cudaStream_t stream) {
  if (!p.codes || p.B == 0) return cudaSuccess;
  if (ends && p.ends) {
    const int64_t blocks = ceil_div(p.num_sequences, kConvThreads / kWarp);
    if (blocks > INT32_MAX || p.L > INT32_MAX / 2) return cudaErrorInvalidValue;
    const cudaError_t error = launch(causal_conv1d_ends_kernel, dim3(static_cast<unsigned>(blocks)), kConvThreads, 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  const int64_t tiles = ceil_div(p.codes_stride_b, kConvThreads);
  if (p.B * tiles > INT32_MAX || p.L > INT32_MAX / 2) return cudaErrorInvalidValue;
  return launch(causal_conv1d_codes_kernel, dim3(static_cast<unsigned>(p.B * tiles)), kConvThreads, 0, stream, p, static_cast<unsigned>(tiles));
}

}}  // namespace terrazzo::cuda
