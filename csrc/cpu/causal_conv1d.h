// What the causal_conv1d kernels share: how positions are cut into work, the inputs before a position, the weights.
//
// Segments are laid end to end on one axis of `total` positions, cut into chunks of fixed length; a chunk holds parts
// of one or more segments. The cut depends on sizes only, so neither do reductions over chunks depend on threads.
#pragma once
#include "../common/parallel.h"
#include "../common/params.h"
#include "activation.h"
#include "tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

// Scratch slots: the first three belong to the calling thread for the whole call, the others to one work item.
enum ConvScratch { kPrefixSlot, kWeightSlot, kPartialSlot, kInputSlot, kGradSlot, kOutputSlot, kCarrySlot };

// Channels of one work item; channels x positions of a tile in L1. kBlockD and kTileD are whole vectors.
constexpr int64_t kBlockD = 1024, kTileD = 32, kTileL = 128;

struct ConvChunks {
  const int64_t* start;  // [num_segments + 1], the axis position where each segment starts
  int64_t total, length, count;
};

inline ConvChunks make_chunks(const CausalConv1dParams& p, int64_t min_length, int64_t max_count) {
  int64_t* start = scratch<int64_t>(kPrefixSlot, p.num_segments + 1);
  start[0] = 0;
  for (int64_t s = 0; s < p.num_segments; s++) start[s + 1] = start[s] + (p.segments[s].end - p.segments[s].begin);
  const int64_t total = start[p.num_segments];
  const int64_t length = max_of(min_length, ceil_div(total, max_count));
  return {start, total, length, ceil_div(total, length)};
}

// f(segment, begin, end) for every part of a segment inside a chunk.
template <class F> inline void for_each_part(const CausalConv1dParams& p, const ConvChunks& chunks, int64_t chunk, const F& f) {
  int64_t at = chunk * chunks.length;
  const int64_t stop = min_of(at + chunks.length, chunks.total);
  int64_t low = 0, high = p.num_segments;  // the last segment with start <= at
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (chunks.start[middle] <= at ? low : high) = middle;
  }
  for (int64_t s = low; at < stop; s++) {
    const Segment& segment = p.segments[s];
    const int64_t begin = segment.begin + (at - chunks.start[s]);
    const int64_t end = min_of(segment.end, begin + (stop - at));
    if (end > begin) f(segment, begin, end);
    at += end - begin;
  }
}

// Four rows behind one another, and four more for the prefetch, at ld elements each. The compiler is kept from seeing how
// the multiples of ld relate: it would give every row a pointer of its own and spill most of them.
template <class T> struct Rows {
  T *base, *next;
  int64_t ld, ld3;
  TZ_INLINE Rows(T* first, int64_t stride) : base(first), next(first + 4 * stride), ld(stride), ld3(3 * stride) {
    asm("" : "+r"(next), "+r"(ld3));
  }
  TZ_INLINE T* at(int r) const {
    T* from = r < 4 ? base : next;
    r %= 4;
    return r == 3 ? from + ld3 : from + r * ld;
  }
};

// The strips take two vectors of channels at a time.
template <class A> constexpr int64_t kPair = 2 * Vec<A>::size;
// Channels rounded up to whole pairs of any ISA: the row length of buffers that hold all channels.
inline int64_t padded(int64_t D) { return ceil_div(D, 32) * 32; }

// Weights of all channels, `rows` vectors for each vector of channels: [D / V][rows][V], of which the first W + 1 are the
// taps and the bias. Channel c's block is at c * rows (c a whole vector): one pointer with constant offsets serves a
// strip, where a row per tap would take one each and the compiler runs out of registers.
template <class A, class Params> void load_weights(const Params& p, int64_t d, int64_t cols, int64_t rows, A* dst) {
  constexpr int64_t V = Vec<A>::size;
  for (int64_t c = 0; c < cols; c += V) {
    const int64_t width = min_of(V, cols - c);
    A* block = dst + c * rows;
    load_tile<A>(p.weight_dtype, p.weight, (d + c) * p.weight_stride_d, p.weight_stride_w, p.weight_stride_d, p.W, width, block, V);
    if (p.bias) load_tile<A>(p.weight_dtype, p.bias, d + c, 0, 1, 1, width, block + p.W * V, V);
    else fill_tile(block + p.W * V, V, 1, V, A(0));
  }
}
template <class A, class Params> const A* load_weights(const Params& p) {
  A* weight = scratch<A>(kWeightSlot, (p.W + 1) * padded(p.D));
  load_weights(p, 0, p.D, p.W + 1, weight);
  return weight;
}

// dst[rows][ld]: the inputs of channels d..d+cols at positions l..l+rows of a segment; positions before its begin
// come from its initial state (at most W-1 of them) or are zero, positions from its end on are zero.
template <class T, class A>
inline void load_inputs(const CausalConv1dParams& p, const Segment& segment, int64_t l, int64_t rows, int64_t d, int64_t cols,
                        A* dst, int64_t ld) {
  const int64_t before = min_of(rows, max_of(0, segment.begin - l));
  if (before > 0) {
    const int64_t column = l - (segment.begin - (p.W - 1));
    if (p.initial_states && segment.init >= 0)
      load_tile<A>(p.state_dtype, p.initial_states,
                   segment.init * p.init_stride_s + d * p.init_stride_d + column * p.init_stride_w, p.init_stride_w,
                   p.init_stride_d, before, cols, dst, ld);
    else
      fill_tile(dst, ld, before, cols, A(0));
  }
  const int64_t inside = max_of(0, min_of(rows, segment.end - l) - before);
  if (inside > 0)
    load_tile<A>(static_cast<const T*>(p.x) + segment.batch * p.x_stride_b + d * p.x_stride_d + (l + before) * p.x_stride_l,
                 p.x_stride_l, p.x_stride_d, inside, cols, dst + before * ld, ld);
  const int64_t covered = before + inside;
  if (covered < rows) fill_tile(dst + covered * ld, ld, rows - covered, cols, A(0));
}

// True where a matrix of T may be written with streaming stores: every row starts on a cache line.
template <class T> inline bool rows_aligned(const void* base, int64_t stride_a, int64_t stride_b) {
  return reinterpret_cast<uintptr_t>(base) % 64 == 0 && stride_a * static_cast<int64_t>(sizeof(T)) % 64 == 0 &&
         stride_b * static_cast<int64_t>(sizeof(T)) % 64 == 0;
}

// f(width, silu), both as types with a constant `value`.
template <int W_> struct ConvWidth { static constexpr int value = W_; };
template <bool b> struct ConvFlag { static constexpr bool value = b; };
template <class F> TZ_INLINE void with_conv_variant(int64_t W, bool silu, const F& f) {
  if (W == 2) return silu ? f(ConvWidth<2>{}, ConvFlag<true>{}) : f(ConvWidth<2>{}, ConvFlag<false>{});
  if (W == 3) return silu ? f(ConvWidth<3>{}, ConvFlag<true>{}) : f(ConvWidth<3>{}, ConvFlag<false>{});
  return silu ? f(ConvWidth<4>{}, ConvFlag<true>{}) : f(ConvWidth<4>{}, ConvFlag<false>{});
}

}}}  // namespace terrazzo::cpu::TZ_ISA
