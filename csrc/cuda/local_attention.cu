// Sliding-window attention: y[i] = sum over the keys j in i's window of softmax_j(scale q[i] . k[j]) v[j]; zeros without a key.
//   q, y [B, L, H, P], k and v [B, L, Hk, P], lse [B, H, L] the logarithm to base 2 of the softmax's sum, +inf where nothing is seen.
//
// The kernels are those of attention.cuh. Where sequences are packed, what is found here is where that of each position begins and ends.
#include "attention.cuh"
#include "kernels.h"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kBoundThreads = 256;

// cu_seqlens that don't rise from 0 to L leave bounds that mean nothing, but inside [0, L].
__global__ void __launch_bounds__(kBoundThreads)
sequence_bounds_kernel(const int32_t* __restrict__ cu_seqlens /* [sequences + 1] */, const int64_t stride, const int64_t sequences,
                       int32_t* __restrict__ bounds /* [2, L] */, const int L) {
  const int l = static_cast<int>(blockIdx.x) * kBoundThreads + static_cast<int>(threadIdx.x);
  if (l >= L) return;
  int64_t low = 0, high = sequences;  // cu_seqlens[low] <= l < cu_seqlens[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (cu_seqlens[middle * stride] <= l) low = middle;
    else high = middle;
  }
  bounds[l] = min(max(cu_seqlens[low * stride], 0), L);
  bounds[L + l] = min(max(cu_seqlens[(low + 1) * stride], 0), L);
}

// The band of the window, its bounds found; a.B == 0 where there is nothing to do.
cudaError_t prepare(Attention& a, const LocalAttentionCudaParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.L == 0) return cudaSuccess;
  if (!fill_attention(a, p, p.L, p.L)) return cudaErrorInvalidValue;
  a.before = static_cast<int>(p.window < p.L ? p.window : p.L) - 1, a.behind = p.causal ? 0 : a.before;
  a.live = p.key_mask, a.lse = static_cast<float*>(p.lse), a.delta = static_cast<float*>(p.delta);
  if (!p.cu_seqlens) return cudaSuccess;
  a.bounds = p.bounds;
  return launch(sequence_bounds_kernel, dim3(static_cast<unsigned>(ceil_div(p.L, kBoundThreads))), kBoundThreads, 0, stream, p.cu_seqlens,
                p.cu_seqlens_stride, p.sequences, p.bounds, static_cast<int>(p.L));
}

}  // namespace

cudaError_t local_attention_fwd_cuda(const LocalAttentionCudaParams& p, cudaStream_t stream) {
  Attention a{};
  const cudaError_t error = prepare(a, p, stream);
  if (error != cudaSuccess || a.B == 0) return error;
  return attention_fwd(a, p.dtype, stream);
}

cudaError_t local_attention_bwd_cuda(const LocalAttentionCudaParams& p, cudaStream_t stream) {
  Attention a{};
  cudaError_t error = prepare(a, p, stream);
  if (error != cudaSuccess || a.B == 0) return error;
  error = attention_bwd_queries(a, p.dtype, stream);
  return error == cudaSuccess ? attention_bwd_keys(a, p.dtype, stream) : error;
}

}}  // namespace terrazzo::cuda
