// The patches of a batch of bytes, for the ops that take patch_ids.
#pragma once
#include <algorithm>

#include "glue.h"

namespace terrazzo {

// Ids as int32, and on the CPU where each patch of each row begins, [B, S + 1]: elsewhere a kernel finds that. Ids that are not negative
// may not decrease along a row, and with cu_seqlens no patch may lie in two sequences.
struct PatchIds {
  Tensor ids;
  std::vector<int32_t> starts;

  PatchIds(const Tensor& ids_in, int64_t B, int64_t L, int64_t S, const OptTensor& cu_seqlens, const char* op)
      : ids(cast_contiguous(ids_in, ScalarType::Int)) {
    check_device(ids, op, "patch_ids");
    check_shape(ids, {B, L}, op, "patch_ids");
    TZ_CHECK(S >= 0 && L <= INT32_MAX, op, "num_patches must not be negative, got ", S);
    if (!runs_on_cpu(ids)) return;
    starts.assign(static_cast<size_t>(B * (S + 1)), static_cast<int32_t>(L));
    std::vector<Segment> sequences;
    if (cu_seqlens) sequences = make_segments(B, L, std::nullopt, cu_seqlens, op);
    for (int64_t b = 0; b < B; b++) {
      const int32_t* row = values() + b * L;
      int32_t* start = starts.data() + b * (S + 1);
      int64_t next = 0, before = -1, last = 0;  // patches below `next` have begun; the id before and where it stood
      size_t sequence = 0;
      for (int64_t l = 0; l < L; l++) {
        while (sequence < sequences.size() && sequences[sequence].end <= l) sequence++;
        if (row[l] < 0) continue;
        TZ_CHECK(row[l] >= before, op, "patch_ids must not decrease along a row, got ", before, " then ", row[l], " at position ", l, " of row ", b);
        TZ_CHECK(!cu_seqlens || row[l] != before || last >= sequences[sequence].begin, op, "a patch must not lie in two sequences of cu_seqlens, patch ",
                 row[l], " does at position ", l);
        before = row[l], last = l;
        for (; next <= std::min<int64_t>(row[l], S); next++) start[next] = static_cast<int32_t>(l);
      }
    }
  }
  const int32_t* values() const { return static_cast<const int32_t*>(data(ids)); }
};

}  // namespace terrazzo
