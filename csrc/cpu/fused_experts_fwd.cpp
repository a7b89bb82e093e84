// A layer of experts, forward. Three phases over slots (pairs of token and expert, sorted by expert):
//
//   1. h = gate(x[tokens] w1 [, x[tokens] w_up]): A is gathered while it is packed, the gate is the epilogue
//   2. slots = h w2 + bias2
//   3. y[t] = sum over the token's slots of weight * slot
//
// Weights are read in the strides they are stored in, once, by the experts that got tokens. Source of the semantics:
// transformers' DbrxExperts and MixtralExperts.
#include "fused_experts.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

// h = gate(g, u) of nb columns of one row.
template <Activation act, bool kGated, class A>
TZ_INLINE void gate_row(const A* g, const A* u, int64_t nb, GateConstants constants, A* h) {
  constexpr int64_t V = Vec<A>::size;
  for (int64_t j = 0; j < nb; j += V) {
    const Vec<A> x = load_n<A>(g + j, nb - j);
    if constexpr (kGated) store_n(gate<act>(x, load_n<A>(u + j, nb - j), constants).h, h + j, nb - j);
    else store_n(activate<act>(x), h + j, nb - j);
  }
}

template <class A> TZ_INLINE void add_row(A* c, const A* bias, int64_t n) {
  for (int64_t j = 0; j < n; j++) c[j] += bias[j];
}

// Columns [n, n + nb) of h for `rows` slots from the block of first products: g at c, u at c + up (up = 1 interleaved).
template <class A>
void gate_block(const FusedExpertsParams& p, int64_t e, int64_t row, int64_t rows, int64_t n, int64_t nb, A* c, int64_t ldc, int64_t up) {
  const A* bias1 = p.bias1 ? static_cast<const A*>(p.bias1) + e * p.N1 : nullptr;
  const A* bias_up = p.w_up.data && p.bias_up ? static_cast<const A*>(p.bias_up) + e * p.F + n : p.w_up.data || !bias1 ? nullptr : bias1 + p.F + n;
  const int64_t first = p.interleaved ? 2 : 1, columns = product_columns(p);
  A* split = scratch<A>(kGroupedSlots, 2 * nb);
  with_activation(p.activation, [&](auto act) {
    constexpr Activation kAct = decltype(act)::value;
    for (int64_t i = 0; i < rows; i++) {
      A *g = c + i * ldc, *u = g + up;
      A* saved = p.saved ? static_cast<A*>(p.saved) + (row + i) * columns : nullptr;
      A* h = static_cast<A*>(p.h) + (row + i) * p.F + n;
      if (bias1) add_row(g, bias1 + first * n, first * nb);
      if (saved) std::memcpy(saved + first * n, g, static_cast<size_t>(first * nb) * sizeof(A));
      if (!p.gated) {
        gate_row<kAct, false>(g, u, nb, {p.alpha, p.limit}, h);
        continue;
      }
      if (p.interleaved) {
        for (int64_t j = 0; j < nb; j++) split[j] = g[2 * j], split[nb + j] = g[2 * j + 1];
        g = split, u = split + nb;
      } else {
        if (bias_up) add_row(u, bias_up, nb);
        if (saved) std::memcpy(saved + p.F + n, u, static_cast<size_t>(nb) * sizeof(A));
      }
      gate_row<kAct, true>(g, u, nb, {p.alpha, p.limit}, h);
    }
  });
}

template <class A> void first_product(const FusedExpertsParams& p) {
  const MatrixA x{p.x_dtype, p.x, p.x_stride_t, p.x_stride_d, p.tokens};
  for_blocks(slot_groups(p), p.F, p.D, expert_matrix(p.w1, 0), kSlotTasks,
             [&](int64_t e, int64_t row, int64_t rows, int64_t n, int64_t nb, GemmWay way) {
    const int64_t first = p.interleaved ? 2 : 1, up = round_up(nb, max_of(kPanel, kTileCols<A>));
    const int64_t ldc = p.gated ? 2 * up : up;
    A* c = scratch<A>(kSlotC, rows * ldc);
    gemm_block(way, x, row, rows, expert_matrix(p.w1, e), first * n, first * nb, p.D, c, ldc);
    if (p.w_up.data) gemm_block(gemm_way(slot_groups(p).rows(e), p.D, p.F, expert_matrix(p.w_up, e)), x, row, rows, expert_matrix(p.w_up, e), n, nb, p.D, c + up, ldc);
    else if (p.gated && !p.interleaved) gemm_block(way, x, row, rows, expert_matrix(p.w1, e), p.F + n, nb, p.D, c + up, ldc);
    gate_block(p, e, row, rows, n, nb, c, ldc, up);
  });
}

template <class A> void second_product(const FusedExpertsParams& p) {
  const MatrixA h = scratch_rows(p, dtype_of<A>::value, p.h, p.F);
  for_blocks(slot_groups(p), p.D, p.F, expert_matrix(p.w2, 0), kSlotTasks,
             [&](int64_t e, int64_t row, int64_t rows, int64_t n, int64_t nb, GemmWay way) {
    const int64_t ldc = round_up(nb, max_of(kPanel, kTileCols<A>));
    A* c = scratch<A>(kSlotC, rows * ldc);
    gemm_block(way, h, row, rows, expert_matrix(p.w2, e), n, nb, p.F, c, ldc);
    const A* bias = p.bias2 ? static_cast<const A*>(p.bias2) + e * p.D + n : nullptr;
    for (int64_t i = 0; i < rows && bias; i++) add_row(c + i * ldc, bias, nb);
    store_tile<A>(c, ldc, static_cast<A*>(p.slots) + row * p.D + n, p.D, 1, rows, nb);
  });
}

template <class A> void run(const FusedExpertsParams& p) {
  first_product<A>(p);
  second_product<A>(p);
  combine<A>(p, static_cast<const A*>(p.weights), p.y);
}

}  // namespace

void fused_experts_fwd(const FusedExpertsParams& p) { p.x_dtype == DType::f64 ? run<double>(p) : run<float>(p); }

}}}  // namespace terrazzo::cpu::TZ_ISA
