// Packed sequences: a batch of rows becomes a list of segments, each an independent sequence.
#pragma once
#include <cstdint>

namespace terrazzo {

// Positions [begin, end) of row `batch` are one sequence. `init` and `final` index the caller's initial and
// final states; -1 means zeros before the sequence, or a final state nobody asked for.
// `padding` marks positions with a negative seq_idx: outputs there are zero and nothing flows through them.
struct Segment {
  int64_t batch, begin, end;
  int64_t init, final;
  bool padding;
};

}  // namespace terrazzo
