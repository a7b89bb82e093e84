// Every CUDA launcher. They enqueue on `stream` and return what the launch returned; pointers are device pointers, everything has
// been checked by the caller. Of float64 they return cudaErrorInvalidValue.
#pragma once
#include <cuda_runtime_api.h>

#include "params.h"

namespace terrazzo { namespace cuda {

cudaError_t rmsnorm_gated_fwd_cuda(const RmsnormGatedCudaParams& p, cudaStream_t stream);
cudaError_t rmsnorm_gated_bwd_cuda(const RmsnormGatedCudaParams& p, cudaStream_t stream);
cudaError_t state_update_cuda(const StateUpdateParams& p, cudaStream_t stream);
cudaError_t patch_cross_attention_fwd_cuda(const PatchCrossAttentionCudaParams& p, cudaStream_t stream);
cudaError_t patch_cross_attention_bwd_cuda(const PatchCrossAttentionCudaParams& p, cudaStream_t stream);
cudaError_t local_attention_fwd_cuda(const LocalAttentionCudaParams& p, cudaStream_t stream);
cudaError_t local_attention_bwd_cuda(const LocalAttentionCudaParams& p, cudaStream_t stream);

}}  // namespace terrazzo::cuda
