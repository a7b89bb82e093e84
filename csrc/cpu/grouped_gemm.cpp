// Grouped matrix products: c[rows of e] = act(a[rows of e] b[e] + bias[e]), and the weight gradient
// db[e] = a[rows of e]^T dy[rows of e]. A linear layer is the product with one group.
//
// Blocks of each group's output are tasks, taken by the threads one after another, large groups first. A block is summed
// in scratch in the accumulation type (gemm.h) and leaves through an epilogue that adds the bias, activates and rounds.
// Source of the interface: torch.nn.functional.grouped_mm.
#include "gate.h"
#include "wgrad.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

// out[nb] = act(c[nb] + bias[nb]), rounded.
template <Activation act, class A, class S, class Bias>
TZ_INLINE void finish_row(const A* c, const Bias* bias, int64_t nb, S* out) {
  constexpr int64_t V = Vec<A>::size;
  for (int64_t j = 0; j < nb; j += V) {
    const int64_t left = nb - j;
    Vec<A> v = Vec<A>::load(c + j);
    if (bias) v = v + load_n<A>(bias + j, left);
    store_n(activate<act>(v), out + j, left);
  }
}

template <class A> void finish_block(const GroupedGemmParams& p, int64_t e, int64_t row, int64_t rows, int64_t n, int64_t nb, const A* c, int64_t ldc) {
  with_type(p.a_dtype, [&](auto s) {
    using S = decltype(s);
    with_type(p.bias_dtype, [&](auto t) {
      using Bias = decltype(t);
      const Bias* bias = p.bias ? static_cast<const Bias*>(p.bias) + e * p.bias_stride_e + n : nullptr;
      with_activation(p.activation, [&](auto act) {
        for (int64_t i = 0; i < rows; i++)
          finish_row<decltype(act)::value>(c + i * ldc, bias, nb, static_cast<S*>(p.c) + (row + i) * p.N + n);
      });
    });
  });
}

template <class A> void run(const GroupedGemmParams& p) {
  const Groups groups{p.E, p.offs};
  const MatrixA a{p.a_dtype, p.a, p.a_stride_m, p.a_stride_k, nullptr};
  for_blocks(groups, p.N, p.K, expert_matrix(p.b, 0), kSlotTasks, [&](int64_t e, int64_t row, int64_t rows, int64_t n, int64_t nb, GemmWay way) {
    const int64_t ldc = round_up(nb, max_of(kPanel, kTileCols<A>));
    A* c = scratch<A>(kSlotC, rows * ldc);
    gemm_block(way, a, row, rows, expert_matrix(p.b, e), n, nb, p.K, c, ldc);
    finish_block(p, e, row, rows, n, nb, c, ldc);
  });
  const int64_t used = groups.total();
  std::memset(element(p.c, p.a_dtype, used * p.N), 0, static_cast<size_t>((p.T - used) * p.N * size_of(p.a_dtype)));
}

}  // namespace

void grouped_gemm(const GroupedGemmParams& p) { p.a_dtype == DType::f64 ? run<double>(p) : run<float>(p); }
void grouped_wgrad(const GroupedWgradParams& p) { p.a_dtype == DType::f64 ? weight_gradient<double>(p) : weight_gradient<float>(p); }
void grouped_wgrad_bwd(const GroupedWgradBwdParams& p) {
  grouped_gemm(p.da);
  grouped_gemm(p.dy);
}
void experts_wgrad(const GroupedWgradParams& p) { grouped_wgrad(p); }
void grouped_gemm_bwd(const GroupedGemmBwdParams& p) {
  if (p.da.c) grouped_gemm(p.da);
  if (p.db.db) grouped_wgrad(p.db);
  if (p.dbias.db) grouped_wgrad(p.dbias);
}
void linear_fwd(const GroupedGemmParams& p) { grouped_gemm(p); }
void linear_bwd(const GroupedGemmBwdParams& p) { grouped_gemm_bwd(p); }

}}}  // namespace terrazzo::cpu::TZ_ISA
