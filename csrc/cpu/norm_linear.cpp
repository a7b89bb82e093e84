// Products of one input with up to three weights, for decoding: y = act([w; w2; w3] n + residual), n = x or its RMS norm,
// or y = act(w n) * (w2 n) + residual. A decoding step is as fast as its weights are read: what stands between two reads of
// megabytes (the norm, the gate, the sum) is done here where it is in a cache anyway, and the weights of one input share one
// parallel region. Blocks of columns are tasks, as in grouped_gemm.cpp.
#include "gate.h"
#include "rmsnorm.h"
#include "wgrad.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

enum NormLinearScratch { kSlotNorm = kGroupedSlots, kSlotNormWeight };

// The rows' norms, rounded as x is, in this thread's scratch.
template <class A> const void* normed_rows(const NormLinearParams& p) {
  const void* out = nullptr;
  with_type(p.dtype, [&](auto t) {
    using S = decltype(t);
    if constexpr (std::is_same_v<acc_t<S>, A>) {
      const A* weight = static_cast<const A*>(p.norm_weight);
      if (p.norm_dtype != dtype_of<A>::value) {
        A* copy = scratch<A>(kSlotNormWeight, p.K);
        load_tile<A>(p.norm_dtype, p.norm_weight, 0, 0, 1, 1, p.K, copy, p.K);
        weight = copy;
      }
      S* rows = scratch<S>(kSlotNorm, p.T * p.K);
      const S* x = static_cast<const S*>(p.x);
      for (int64_t i = 0; i < p.T; i++) norm_group<S, true, false>(x + i * p.x_stride, nullptr, weight, rows + i * p.K, p.K, p.eps, nullptr);
      out = rows;
    }
  });
  return out;
}

// out[nb] = act(c) [* u] [+ residual], rounded.
template <Activation act, bool kGated, class A, class S>
TZ_INLINE void finish_row(const A* c, const A* u, const S* residual, int64_t nb, S* out) {
  constexpr int64_t V = Vec<A>::size;
  for (int64_t j = 0; j < nb; j += V) {
    const int64_t left = nb - j;
    Vec<A> v = Vec<A>::load(c + j);
    if constexpr (kGated) v = gate<act>(v, Vec<A>::load(u + j), {}).h;
    else v = activate<act>(v);
    if (residual) v = v + load_n<A>(residual + j, left);
    store_n(v, out + j, left);
  }
}

// Rows x columns [n, n + nb) of y from a block of products: c, and u behind it when gated.
template <class A>
void finish_block(const NormLinearParams& p, int64_t row, int64_t rows, int64_t n, int64_t nb, const A* c, const A* u, int64_t ldc) {
  with_type(p.dtype, [&](auto t) {
    using S = decltype(t);
    if constexpr (std::is_same_v<acc_t<S>, A>)
      with_activation(p.activation, [&](auto act) {
        constexpr Activation kAct = decltype(act)::value;
        for (int64_t i = 0; i < rows; i++) {
          const S* residual = p.residual ? static_cast<const S*>(p.residual) + (row + i) * p.residual_stride + n : nullptr;
          S* out = static_cast<S*>(p.y) + (row + i) * p.columns + n;
          if (p.gated) finish_row<kAct, true>(c + i * ldc, u + i * ldc, residual, nb, out);
          else finish_row<kAct, false>(c + i * ldc, u, residual, nb, out);
        }
      });
  });
}

template <class A> void run(const NormLinearParams& p) {
  MatrixA x{p.dtype, p.x, p.x_stride, 1, nullptr};
  if (p.norm_weight) x.data = normed_rows<A>(p), x.stride_m = p.K;
  const int64_t parts = p.gated ? 1 : p.num_weights;
  const int64_t most = block_rows(gemm_way(min_of(p.T, kBlockRows), p.K, p.weights[0].N, expert_matrix(p.weights[0].matrix, 0)));
  const int64_t height = ceil_div(p.T, ceil_div(p.T, most));
  ColumnBlocks blocks[kMaxWeights];
  int64_t first_column[kMaxWeights], first_task[kMaxWeights + 1] = {}, columns = 0;
  for (int64_t i = 0; i < parts; i++) {
    const NormLinearWeight& w = p.weights[i];
    blocks[i] = cut_columns(w.N, usual_width(gemm_way(height, p.K, w.N, expert_matrix(w.matrix, 0)), height), parts);
    first_column[i] = columns;
    first_task[i + 1] = first_task[i] + blocks[i].count;
    columns += w.N;
  }
  run_tasks(first_task[parts], p.T * columns * p.K * (p.gated ? 2 : 1), [&](int64_t task) {
    int64_t i = parts - 1;
    while (first_task[i] > task) i--;
    const int64_t block = task - first_task[i], n = blocks[i].begin(block), nb = blocks[i].width(block);
    const int64_t ldc = round_up(nb, max_of(kPanel, kTileCols<A>));
    A* c = scratch<A>(kSlotC, (p.gated ? 2 : 1) * height * ldc);
    for (int64_t row = 0; row < p.T; row += height) {
      const int64_t rows = min_of(height, p.T - row);
      for (int64_t part = 0; part < (p.gated ? 2 : 1); part++) {
        const MatrixB b = expert_matrix(p.weights[i + part].matrix, 0);
        gemm_block(gemm_way(height, p.K, p.weights[i].N, b), x, row, rows, b, n, nb, p.K, c + part * height * ldc, ldc);
      }
      finish_block(p, row, rows, first_column[i] + n, nb, c, c + height * ldc, ldc);
    }
  });
}

}  // namespace

void norm_linear(const NormLinearParams& p) {
  if (p.T == 0) return;
  p.dtype == DType::f64 ? run<double>(p) : run<float>(p);
}

}}}  // namespace terrazzo::cpu::TZ_ISA
