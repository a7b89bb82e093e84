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

// A grouped product as experts need it: rows behind the last group are left alone, and a second product may be added,
// a's columns from K on times b2 (stored as b is).
struct GroupedGemmCudaParams : GroupedGemmParams {
  bool rest;  // rows behind the last group become zero
  int64_t K2;
  WeightMatrix b2;  // [E, K2, N] or none
};

// A weight gradient whose operands' rows lie elsewhere: row r is a_rows[r], dy_rows[r]. With K = 0 there is no a, and
// db [E, N] is the sum of the rows of dy, each times weights[weight_rows[r]] where there are weights.
struct GroupedWgradCudaParams : GroupedWgradParams {
  const int32_t* a_rows;
  const int32_t* dy_rows;
  const float* weights;
  const int32_t* weight_rows;
};

// The pairs of token and choice sorted by expert, ties in the order of the pairs; indices of no expert of ours get no place.
struct ExpertRowsParams {
  int64_t pairs, A, E;
  const int32_t* indices;  // [pairs]
  int32_t* offs;           // [E] the end of each expert's places
  int32_t* order;          // [pairs] the pair at each place; behind offs[E - 1] nothing is written
  int32_t* tokens;         // [pairs] its token, order / A
  int32_t* places;         // [pairs] the place of each pair, or -1
  int32_t* counts;         // [E, expert_row_units(pairs)] scratch
};
// Runs of neighbouring pairs, each sorted by a warp.
inline int64_t expert_row_units(int64_t pairs) {
  const int64_t units = (pairs + 127) / 128;
  return units < 512 ? units : 512;
}

// h, slots and dproducts are in x's dtype; tokens, places and offs are what `rows` makes.
struct FusedExpertsCudaParams : FusedExpertsParams {
  ExpertRowsParams rows;
  float* partials;  // [S, dot_partials(F)] of the backward: parts of <dh, h>
};
inline int64_t dot_partials(int64_t F) { return (F + 63) / 64 * 4; }

struct PatchCrossAttentionCudaParams : PatchCrossAttentionParams {
  int32_t* patch_starts;                // [B, S + 1]; in the place of `starts`
  uint8_t* live;                        // [B, L] where patches ask
};
struct LocalAttentionCudaParams : LocalAttentionParams {
  const int32_t* cu_seqlens;  int64_t cu_seqlens_stride, sequences;  // [sequences + 1] or null; in the place of `runs`
  int32_t* bounds;                      // [2, L] with cu_seqlens
};

}  // namespace terrazzo
