// What CUDA kernels take beside csrc/common/params.h: scratch memory, which the caller allocates.
#pragma once
#include "../common/params.h"

namespace terrazzo {

struct RmsnormGatedCudaParams : RmsnormGatedParams {
  void* partials;  // [norm_partials(p), D] float, of the backward alone
};
// Blocks of the backward for each group, and rows of its partial sums: they fill a large GPU, and are still few.
inline int64_t norm_partials(const RmsnormGatedParams& p) {
  const int64_t wanted = 512 * p.group_size / p.D;
  return wanted < 1 ? 1 : wanted < p.rows ? wanted : p.rows;
}

struct PatchCrossAttentionCudaParams : PatchCrossAttentionParams {
  int32_t* patch_starts;                // [B, S + 1]; in the place of `starts`
  uint8_t* live;                        // [B, L] where patches ask
};
struct LocalAttentionCudaParams : LocalAttentionParams {
  const int32_t* cu_seqlens;  int64_t cu_seqlens_stride, sequences;  // [sequences + 1] or null; in the place of `runs`
  int32_t* bounds;                      // [2, L] with cu_seqlens
};

}  // namespace terrazzo
