// db[e] = a[rows of e]^T dy[rows of e] for every group: the weight gradient of a grouped product.
#pragma once
#include "../common/params.h"
#include "gemm.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

// Scratch slots of grouped kernels, beside gemm.h's.
enum GroupedSlot { kSlotC = kGemmSlots, kSlotTasks, kGroupedSlots };

template <class A> inline void weight_gradient(const GroupedWgradParams& p) {
  const Groups groups{p.E, p.offs};
  const ColumnBlocks blocks = cut_columns(p.N, packed_width(), p.E * ceil_div(p.K, kBlockRows));
  const int64_t columns = blocks.count, heights = ceil_div(p.K, kBlockRows), height = ceil_div(p.K, heights);
  run_tasks(p.E * heights * columns, p.E * p.K * p.N + groups.total() * p.K * p.N, [&](int64_t task) {
    const int64_t e = task / (heights * columns), k = task / columns % heights * height, n = blocks.begin(task % columns);
    const int64_t rows = min_of(height, p.K - k), nb = blocks.width(task % columns), count = groups.rows(e), first = groups.begin(e);
    const int64_t ldc = round_up(nb, max_of(kPanel, kTileCols<A>));
    A* c = scratch<A>(kSlotC, rows * ldc);
    MatrixA a{p.a_dtype, element(p.a, p.a_dtype, first * p.a_stride_m), p.a_stride_k, p.a_stride_m, nullptr};
    MatrixB dy{p.dy_dtype, element(p.dy, p.dy_dtype, first * p.dy_stride_m), p.dy_stride_m, p.dy_stride_n};
    a.narrow = dy.narrow = p.db_dtype == DType::bf16 && (p.a_dtype == DType::bf16 || p.dy_dtype == DType::bf16);
    if (count > 0) gemm_block(GemmWay::blocked, a, k, rows, dy, n, nb, count, c, ldc);
    else std::memset(c, 0, static_cast<size_t>(rows * ldc) * sizeof(A));
    store_tile<A>(c, ldc, p.db_dtype, p.db, e * p.db_stride_e + k * p.db_stride_k + n, p.db_stride_k, 1, rows, nb);
  });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
