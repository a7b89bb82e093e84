// Every CPU kernel, once per ISA build. A kernel file defines `void <name>(const <Params>&)` inside
// namespace terrazzo::cpu::TZ_ISA; `terrazzo::cpu::run(<name>, params)` in the glue calls the build that the
// machine (or TERRAZZO_CPU_ISA) picks.
#pragma once
#include "../common/params.h"

// Those whose files are compiled for AVX512-BF16 too (setup.py).
#define TZ_BF16_KERNELS(X)                       \
  X(grouped_gemm, GroupedGemmParams)             \
  X(grouped_gemm_bwd, GroupedGemmBwdParams)      \
  X(grouped_wgrad, GroupedWgradParams)           \
  X(grouped_wgrad_bwd, GroupedWgradBwdParams)    \
  X(experts_wgrad, GroupedWgradParams)           \
  X(linear_fwd, GroupedGemmParams)               \
  X(linear_bwd, GroupedGemmBwdParams)            \
  X(norm_linear, NormLinearParams)               \
  X(fused_experts_fwd, FusedExpertsParams)       \
  X(fused_experts_bwd, FusedExpertsParams)

#define TZ_CPU_KERNELS(X)                              \
  X(causal_conv1d_fwd, CausalConv1dParams)             \
  X(causal_conv1d_bwd, CausalConv1dParams)             \
  X(causal_conv1d_update, CausalConv1dUpdateParams)    \
  X(chunk_scan_fwd, ChunkScanParams)                   \
  X(chunk_scan_bwd, ChunkScanParams)                   \
  X(state_update, StateUpdateParams)                   \
  X(rmsnorm_gated_fwd, RmsnormGatedParams)             \
  X(rmsnorm_gated_bwd, RmsnormGatedParams)             \
  TZ_BF16_KERNELS(X)                                   \
  X(moe_route_fwd, MoeRouteParams)                     \
  X(moe_route_bwd, MoeRouteParams)                     \
  X(moe_permute, MoePermuteParams)                     \
  X(moe_unpermute_fwd, MoeUnpermuteParams)             \
  X(moe_unpermute_bwd, MoeUnpermuteParams)             \
  X(calibrate, CalibrateParams)                        \
  /* patches and local attention */                    \
  X(patch_reduce_fwd, PatchReduceParams)               \
  X(patch_reduce_bwd, PatchReduceParams)               \
  X(patch_cross_attention_fwd, PatchCrossAttentionParams) \
  X(patch_cross_attention_bwd, PatchCrossAttentionParams) \
  X(local_attention_fwd, LocalAttentionParams)         \
  X(local_attention_bwd, LocalAttentionParams)         \
  X(attention_update, AttentionUpdateParams)           \
  /* byte-latent: patches and hash embeddings */       \
  X(entropy_patch_fwd, EntropyPatchParams)             \
  X(entropy_patch_bwd, PatchEntropyParams)             \
  X(patch_cut, PatchParams)                            \
  X(patch_cut_tokens, PatchParams)                     \
  X(patcher_update, PatcherUpdateParams)               \
  X(patch_ids, PatchIdsParams)                         \
  X(byte_hash_ids, ByteHashParams)                     \
  X(byte_hash_rows, ByteHashParams)                    \
  X(byte_hash_embedding_fwd, ByteHashParams)           \
  X(byte_hash_embedding_bwd, ByteHashParams)

namespace terrazzo { namespace cpu {

#define TZ_DECLARE(name, Params)                     \
  namespace portable { void name(const Params&); }   \
  namespace avx2 { void name(const Params&); }       \
  namespace avx512 { void name(const Params&); }
TZ_CPU_KERNELS(TZ_DECLARE)
#undef TZ_DECLARE

// What TZ_BF16_KERNELS doesn't name is avx512's.
namespace avx512_bf16 {
using namespace avx512;
#define TZ_DECLARE(name, Params) void name(const Params&);
TZ_BF16_KERNELS(TZ_DECLARE)
#undef TZ_DECLARE
}  // namespace avx512_bf16

}}  // namespace terrazzo::cpu
