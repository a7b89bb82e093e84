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

// A stable sort of n numbers by keys from 0 up to a limit, see radix_sort.cuh: passes of so many bits, over so many tiles.
constexpr int64_t kSortTile = 2048, kSortBits = 10;
struct SortPlan { int64_t tiles, bins; int passes, bits; };
inline SortPlan sort_plan(int64_t n, int64_t limit) {
  int bits = 1;
  while (bits < 63 && (limit - 1) >> bits) bits++;
  SortPlan plan{};
  plan.tiles = n > 0 ? (n + kSortTile - 1) / kSortTile : 1;
  plan.passes = static_cast<int>((bits + kSortBits - 1) / kSortBits);
  plan.bits = (bits + plan.passes - 1) / plan.passes, plan.bins = int64_t{1} << plan.bits;
  return plan;
}
inline int64_t sort_scratch(int64_t n, int64_t limit) {  // int32 numbers
  const SortPlan plan = sort_plan(n, limit);
  return (plan.tiles + 1) * plan.bins + (plan.passes > 1 ? n : 0);
}

struct MoePermuteCudaParams : MoePermuteParams {
  int32_t* tokens;  int64_t A;  // [pairs] the token at each place, order / A; or null
  int32_t* sort;                // [sort_scratch(pairs, E + 1)]
};
struct MoeUnpermuteCudaParams : MoeUnpermuteParams {  // weights of the forward may be null: ones
  const int32_t* live;  // [1] how many of the rows count, the first ones; null: all
};

// h, slots and dproducts are in x's dtype; tokens, places and offs are what `rows` makes. Pairs of no expert of ours have places too,
// behind those of all others.
struct FusedExpertsCudaParams : FusedExpertsParams {
  MoePermuteCudaParams rows;
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

// Packed sequences are found on the device, into a byte and an owner for each position: see csrc/cuda/causal_conv1d.cuh.
struct CausalConv1dCudaParams : CausalConv1dParams {
  int64_t num_sequences;                                               // rows, or ranges of cu_seqlens
  const int32_t* seq_idx;  int64_t seq_idx_stride_b, seq_idx_stride_l; // [B, L] or null
  const int32_t* cu_seqlens;  int64_t cu_seqlens_stride;               // [num_sequences + 1] or null; B is 1
  uint8_t* codes;  int64_t codes_stride_b;                             // [B, conv_codes(L)] scratch, null where nothing is packed
  int32_t* owners;                                                     // [B, L] scratch, null where nothing is packed: the sequence
  int32_t* ends;                                                       // [num_sequences] scratch, null without seq_idx
  void* partials;                                                      // [conv_partials(p), W + 1, D] float, of the backward alone
};
// Bytes of a row of codes: rows are aligned, and a little may be read behind their end.
inline int64_t conv_codes(int64_t L) { return (L + 15) / 16 * 16 + 16; }
// Which axis has unit stride, in x and in everything laid out like it.
inline bool conv_channel_last(const CausalConv1dParams& p) { return p.L == 1 ? p.x_stride_d == 1 : p.x_stride_l != 1; }
// Positions of a block of the backward: as many as leave 512 blocks, for a block writes a row of partial sums.
inline int64_t conv_span(const CausalConv1dParams& p) {
  const int64_t channels = conv_channel_last(p) ? 128 : 4;
  int64_t span = 1024;
  while (span > 64 && p.B * ((p.L + span - 1) / span) * ((p.D + channels - 1) / channels) < 512) span /= 2;
  return span;
}
inline int64_t conv_partials(const CausalConv1dParams& p) { return p.B * ((p.L + conv_span(p) - 1) / conv_span(p)); }

// states[s, w] = the last state_len inputs of sequence s, zeros before a shorter one.
struct CausalConv1dStatesParams {
  DType dtype;
  int64_t T, D, num_sequences, state_len;
  const void* x;  int64_t x_stride_t, x_stride_d;                      // [T, D]
  const int32_t* cu_seqlens;  int64_t cu_seqlens_stride;               // [num_sequences + 1]
  void* states;                                                        // [num_sequences, state_len, D] contiguous
};

struct MoeRouteCudaParams : MoeRouteParams {
  float* scores;  // [T, E + n_group] of the forward, or null: they lie in shared memory
};
constexpr int64_t kMostSharedScores = 3072;  // of a token

struct ByteHashCudaParams : ByteHashParams {
  const int32_t* cu_seqlens;  int64_t texts;  // [texts + 1] or null; in the place of `segments`
  // backward only
  int32_t* sort;                              // scratch of sorting by row of the table and by byte
  int32_t* pairs;                             // [B L functions groups] sorted by row of the table; in the place of `order` and `runs`
  int32_t* positions;                         // [B L] scratch: sorted by byte
  float* parts;                               // [chunks of kSumChunk pairs or positions, 2, D] scratch
  int32_t* places;  int64_t* names;           // [pairs] sparse: the row of `names` that each pair belongs to, and these rows of the table
  int32_t* count;                             // [1] sparse: how many names there are
};
constexpr int64_t kSumChunk = 64;

struct PatchReduceCudaParams : PatchReduceParams {
  int32_t* patch_starts;                // [B, S + 1]; in the place of `starts`
};

// Texts on the device, in place of PatchParams::segments, and scratch of a cut.
struct PatchTexts {
  const int32_t* cu_seqlens;  int64_t num_texts;  // [num_texts + 1], or null: one text for each row
  const int32_t* valid_lengths;                   // [B] or null
  int32_t* runs;                                  // [B, patch_tiles(N), 3] where a row has several tiles
  uint64_t* largest;                              // [num_texts] of the rule `top`
};
struct PatchCudaParams : PatchParams, PatchTexts {};
struct EntropyPatchCudaParams : EntropyPatchParams, PatchTexts {};
constexpr int64_t kPatchTile = 2048;  // positions of a block
inline int64_t patch_tiles(int64_t positions) { return (positions + kPatchTile - 1) / kPatchTile; }

struct PatchIdsCudaParams : PatchIdsParams {
  int32_t* sums;  // [B, patch_id_tiles(S)] where a row has several tiles
};
constexpr int64_t kPatchIdTile = 256;  // patches of a block
inline int64_t patch_id_tiles(int64_t patches) { return (patches + kPatchIdTile - 1) / kPatchIdTile; }

// A chunk of the scan: positions [begin, end) of a row; bit l of `real` says that position begin + l isn't padding. Chunks that no
// sequence needs are empty.
struct ScanChunk {
  int32_t row, begin, end, unused;
  uint64_t real;
};
constexpr int kScanChunk = 64;  // positions
enum ScanDecay { kDt, kHi, kLo, kFromStart, kToEnd, kScanDecays };  // of every position, see chunk_scan.cuh

struct ChunkScanCudaParams : ChunkScanParams {  // without segments: sequences are found on the device
  const int32_t* seq_idx;  int64_t seq_idx_stride_b, seq_idx_stride_l;  // [B, L], or null
  const int32_t* cu_seqlens;  int64_t cu_seqlens_stride;                // [sequences + 1], or null: a row is a sequence
  int64_t sequences;
  void* first_chunks;                                                   // [sequences + 1] int32, with cu_seqlens
  void* chunks;                                                         // [scan_chunks(p)] ScanChunk
  void* decays;                                                         // [scan_chunks(p), H, kScanDecays, kScanChunk] float
  void* states;                                                         // [scan_chunks(p), H, P, N] before each chunk: float, bf16 in its forward
  // of the backward alone
  void* dstates;                                                        // like states, after each chunk
  void* dA_partials;  void* dbias_partials;                             // [scan_chunks(p), H] float
  void* dD_partials;                                                    // [scan_chunks(p), H or H P] float, or null
  void* dB_partials;  void* dC_partials;                                // [scan_splits(p), B, L, G, N] float; dB and dC where that is 1
};
// With cu_seqlens, as many as the sequences may need at most.
inline int64_t scan_chunks(const ChunkScanCudaParams& p) {
  return p.cu_seqlens ? p.L / kScanChunk + p.sequences : p.B * ((p.L + kScanChunk - 1) / kScanChunk);
}
// Blocks of heads that dB and dC are summed over: enough of them to fill a large GPU, their shares no larger than x.
inline int64_t scan_splits(const ChunkScanCudaParams& p) {
  const int64_t heads = p.H / p.G, blocks = scan_chunks(p) * p.G, room = heads * p.P / (p.N > 0 ? 4 * p.N : 1);
  int64_t splits = blocks > 0 ? (264 + blocks - 1) / blocks : 1;
  if (splits > room) splits = room;
  if (splits > heads) splits = heads;
  if (splits < 1) return 1;
  const int64_t each = (heads + splits - 1) / splits;
  return (heads + each - 1) / each;
}

}  // namespace terrazzo
