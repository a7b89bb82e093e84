// The ops that have CUDA kernels, by their names in csrc/library.cpp: the one list. The package registers these for CUDA tensors,
// the tests run them emulated, Python reads them from the extension. An op of two directions is served once both stand here.
#pragma once

#define TZ_CUDA_OPS(X)              \
  /* convolution */                 \
  X(causal_conv1d_fwd)              \
  X(causal_conv1d_bwd)              \
  X(causal_conv1d_update)           \
  X(causal_conv1d_varlen_states)    \
  /* Mamba-2 */                     \
  X(chunk_scan_fwd)                 \
  X(chunk_scan_bwd)                 \
  X(selective_state_update)         \
  /* gated norm */                  \
  X(rmsnorm_gated_fwd)              \
  X(rmsnorm_gated_bwd)              \
  /* grouped products, linear */    \
  X(grouped_gemm_fwd)               \
  X(grouped_gemm_bwd)               \
  X(grouped_wgrad_fwd)              \
  X(grouped_wgrad_bwd)              \
  X(linear_fwd)                     \
  X(linear_bwd)                     \
  /* routing, permutation */        \
  X(moe_route_fwd)                  \
  X(moe_route_bwd)                  \
  X(moe_permute)                    \
  X(moe_unpermute_fwd)              \
  X(moe_unpermute_bwd)              \
  /* experts */                     \
  X(fused_experts_fwd)              \
  X(fused_experts_bwd)              \
  /* patches */                     \
  X(patch_reduce_fwd)               \
  X(patch_reduce_bwd)               \
  /* attention */                   \
  X(patch_cross_attention_fwd)      \
  X(patch_cross_attention_bwd)      \
  X(local_attention_fwd)            \
  X(local_attention_bwd)            \
  /* entropy */                     \
  X(entropy_patch_fwd)              \
  X(entropy_patch_bwd)              \
  X(patch_cut)                      \
  X(patcher_update)                 \
  X(patch_ids)                      \
  /* hash embeddings */             \
  X(byte_hash_ids)                  \
  X(byte_hash_embedding_fwd)        \
  X(byte_hash_embedding_bwd)        \
  /* end */
