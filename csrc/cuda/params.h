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
  void* states;                                                         // [scan_chunks(p), H, P, N] float, before each chunk
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
