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

}  // namespace terrazzo
