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
cudaError_t causal_conv1d_fwd_cuda(const CausalConv1dCudaParams& p, cudaStream_t stream);
cudaError_t causal_conv1d_bwd_cuda(const CausalConv1dCudaParams& p, cudaStream_t stream);
cudaError_t causal_conv1d_update_cuda(const CausalConv1dUpdateParams& p, cudaStream_t stream);
cudaError_t causal_conv1d_varlen_states_cuda(const CausalConv1dStatesParams& p, cudaStream_t stream);
cudaError_t state_update_cuda(const StateUpdateParams& p, cudaStream_t stream);
cudaError_t grouped_gemm_cuda(const GroupedGemmParams& p, cudaStream_t stream);
cudaError_t grouped_gemm_bwd_cuda(const GroupedGemmBwdParams& p, cudaStream_t stream);
cudaError_t grouped_wgrad_cuda(const GroupedWgradParams& p, cudaStream_t stream);
cudaError_t grouped_wgrad_bwd_cuda(const GroupedWgradBwdParams& p, cudaStream_t stream);
cudaError_t linear_fwd_cuda(const GroupedGemmParams& p, cudaStream_t stream);
cudaError_t linear_bwd_cuda(const GroupedGemmBwdParams& p, cudaStream_t stream);
cudaError_t experts_product_cuda(const GroupedGemmCudaParams& p, cudaStream_t stream);
cudaError_t fused_experts_fwd_cuda(const FusedExpertsCudaParams& p, cudaStream_t stream);
cudaError_t fused_experts_bwd_cuda(const FusedExpertsCudaParams& p, cudaStream_t stream);
cudaError_t experts_wgrad_cuda(const GroupedWgradCudaParams& p, cudaStream_t stream);
// ids [B, L], starts [B, S + 1]; live [B, L] if wanted: which bytes key_mask [B, L] (or null) shows as keys.
cudaError_t find_patch_starts(const int32_t* ids, int32_t* starts, int64_t B, int64_t L, int64_t S, const uint8_t* key_mask, uint8_t* live,
                              cudaStream_t stream);
cudaError_t patch_cross_attention_fwd_cuda(const PatchCrossAttentionCudaParams& p, cudaStream_t stream);
cudaError_t patch_cross_attention_bwd_cuda(const PatchCrossAttentionCudaParams& p, cudaStream_t stream);
cudaError_t local_attention_fwd_cuda(const LocalAttentionCudaParams& p, cudaStream_t stream);
cudaError_t local_attention_bwd_cuda(const LocalAttentionCudaParams& p, cudaStream_t stream);
cudaError_t moe_route_fwd_cuda(const MoeRouteCudaParams& p, cudaStream_t stream);
cudaError_t moe_route_bwd_cuda(const MoeRouteCudaParams& p, cudaStream_t stream);
cudaError_t moe_permute_cuda(const MoePermuteCudaParams& p, cudaStream_t stream);
cudaError_t moe_unpermute_fwd_cuda(const MoeUnpermuteCudaParams& p, cudaStream_t stream);
cudaError_t moe_unpermute_bwd_cuda(const MoeUnpermuteCudaParams& p, cudaStream_t stream);
cudaError_t byte_hash_ids_cuda(const ByteHashCudaParams& p, cudaStream_t stream);
cudaError_t byte_hash_rows_cuda(const ByteHashCudaParams& p, cudaStream_t stream);
cudaError_t byte_hash_embedding_fwd_cuda(const ByteHashCudaParams& p, cudaStream_t stream);
cudaError_t byte_hash_embedding_bwd_cuda(const ByteHashCudaParams& p, cudaStream_t stream);
cudaError_t patch_reduce_fwd_cuda(const PatchReduceCudaParams& p, cudaStream_t stream);
cudaError_t patch_reduce_bwd_cuda(const PatchReduceCudaParams& p, cudaStream_t stream);

cudaError_t entropy_patch_fwd_cuda(const EntropyPatchCudaParams& p, cudaStream_t stream);
cudaError_t entropy_patch_bwd_cuda(const PatchEntropyParams& p, cudaStream_t stream);
cudaError_t patch_cut_cuda(const PatchCudaParams& p, cudaStream_t stream);
cudaError_t patch_cut_tokens_cuda(const PatchCudaParams& p, cudaStream_t stream);
cudaError_t patcher_update_cuda(const PatcherUpdateParams& p, cudaStream_t stream);
cudaError_t patch_ids_cuda(const PatchIdsCudaParams& p, cudaStream_t stream);

}}  // namespace terrazzo::cuda
