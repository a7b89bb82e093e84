// Every CUDA launcher. They enqueue on `stream` and return what the launch returned; pointers are device pointers, everything has
// been checked by the caller. Of float64 they return cudaErrorInvalidValue.
#pragma once
#include <cuda_runtime_api.h>

#include "params.h"

namespace terrazzo { namespace cuda {

cudaError_t chunk_scan_fwd_cuda(const ChunkScanCudaParams& p, cudaStream_t stream);
cudaError_t chunk_scan_bwd_cuda(const ChunkScanCudaParams& p, cudaStream_t stream);
cudaError_t rmsnorm_gated_fwd_cuda(const RmsnormGatedCudaParams& p, cudaStream_t stream);
cudaError_t rmsnorm_gated_bwd_cuda(const RmsnormGatedCudaParams& p, cudaStream_t stream);
cudaError_t state_update_cuda(const StateUpdateParams& p, cudaStream_t stream);

}}  // namespace terrazzo::cuda
