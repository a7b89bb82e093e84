// A layer of experts, backward, up to the gradients of its activations (weight gradients are grouped products of what is
// left here, see csrc/bindings/fused_experts.cpp):
//
//   1. dh = dy[tokens] w2^T, unweighted
//   2. per slot: dweight = <dh, h> + <dy, bias2>; h becomes weight * h; the products' gradients are weight * dh through the gate
//   3. slots = dproducts w1^T (+ w_up^T);  dx[t] = sum over the token's slots
#include "fused_experts.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

template <class A> void gradient_of_h(const FusedExpertsParams& p) {
  const MatrixA dy{p.x_dtype, p.dy, p.D, 1, p.tokens};
  for_blocks(slot_groups(p), p.F, p.D, transposed(expert_matrix(p.w2, 0)), kSlotTasks,
             [&](int64_t e, int64_t row, int64_t rows, int64_t n, int64_t nb, GemmWay way) {
    const int64_t ldc = round_up(nb, max_of(kPanel, kTileCols<A>));
    A* c = scratch<A>(kSlotC, rows * ldc);
    gemm_block(way, dy, row, rows, transposed(expert_matrix(p.w2, e)), n, nb, p.D, c, ldc);
    store_tile<A>(c, ldc, static_cast<A*>(p.dh) + row * p.F + n, p.F, 1, rows, nb);
  });
}

// nb columns of a slot: dg and du from g, u and dh, h times the weight; returns the columns' part of <dh, h>.
template <Activation act, bool kGated, class A>
TZ_INLINE A gate_columns(const A* g, const A* u, const A* dh, int64_t nb, GateConstants constants, A weight, A* h, A* dg, A* du) {
  constexpr int64_t V = Vec<A>::size;
  const Vec<A> w(weight);
  Vec<A> sum = Vec<A>::zero();
  for (int64_t j = 0; j < nb; j += V) {
    const int64_t left = nb - j;
    const Vec<A> x = load_n<A>(g + j, left), d = load_n<A>(dh + j, left), wd = w * d;
    if constexpr (kGated) {
      const Gate<A> at = gate<act>(x, load_n<A>(u + j, left), constants);
      sum = fma(d, at.h, sum);
      store_n(w * at.h, h + j, left);
      store_n(wd * at.by_g, dg + j, left);
      store_n(wd * at.by_u, du + j, left);
    } else {
      const Curve<A> at = activation_curve<act>(x);
      sum = fma(d, at.value, sum);
      store_n(w * at.value, h + j, left);
      store_n(wd * at.slope, dg + j, left);
    }
  }
  return reduce_add(sum);
}

// g and u lie `step` apart from each other's next: 2 when interleaved.
template <class A> TZ_INLINE void read_columns(const A* src, int64_t step, int64_t n, A* dst) {
  for (int64_t j = 0; j < n; j++) dst[j] = src[j * step];
}
template <class A> TZ_INLINE void write_columns(const A* src, int64_t n, A* dst, int64_t step) {
  for (int64_t j = 0; j < n; j++) dst[j * step] = src[j];
}

template <Activation act, bool kGated, class A> A gate_slot(const FusedExpertsParams& p, int64_t s, A weight) {
  const int64_t columns = product_columns(p), step = p.interleaved ? 2 : 1, up = p.interleaved ? 1 : p.F;
  const A* saved = static_cast<const A*>(p.saved) + s * columns;
  A* dproducts = static_cast<A*>(p.dproducts) + s * columns;
  A *h = static_cast<A*>(p.h) + s * p.F, *dh = static_cast<A*>(p.dh) + s * p.F;
  A* part = scratch<A>(kSlotC, 6 * kGateBlock);
  A *g = part, *u = g + kGateBlock, *d = u + kGateBlock, *wh = d + kGateBlock, *dg = wh + kGateBlock, *du = dg + kGateBlock;
  A dweight = 0;
  for (int64_t j = 0; j < p.F; j += kGateBlock) {
    const int64_t nb = min_of(kGateBlock, p.F - j);
    read_columns(saved + j * step, step, nb, g);
    if (kGated) read_columns(saved + j * step + up, step, nb, u);
    read_columns(dh + j, 1, nb, d);
    dweight += gate_columns<act, kGated>(g, u, d, nb, {p.alpha, p.limit}, weight, wh, dg, du);
    write_columns(wh, nb, h + j, 1);
    write_columns(dg, nb, dproducts + j * step, step);
    if (kGated) write_columns(du, nb, dproducts + j * step + up, step);
  }
  return dweight;
}

template <class A, class S> A dot_bias(const FusedExpertsParams& p, int64_t e, int64_t token) {
  const A* bias = static_cast<const A*>(p.bias2) + e * p.D;
  const S* dy = static_cast<const S*>(p.dy) + token * p.D;
  A sum = 0;
  for (int64_t d = 0; d < p.D; d++) sum += bias[d] * load1<A>(dy + d);
  return sum;
}

template <class A> void through_gates(const FusedExpertsParams& p) {
  const A* weights = static_cast<const A*>(p.weights);
  A* dweights = static_cast<A*>(p.dweights);
  with_type(p.x_dtype, [&](auto t) {
    using S = decltype(t);
    with_activation(p.activation, [&](auto act) {
      constexpr Activation kAct = decltype(act)::value;
      parallel_for(0, p.T * p.A, max_of(1, 32768 / p.F), [&](int64_t begin, int64_t end) {
        for (int64_t pair = begin; pair < end; pair++) {
          const int64_t s = p.places[pair];
          if (s < 0) dweights[pair] = 0;
          else if (p.gated) dweights[pair] = gate_slot<kAct, true, A>(p, s, weights[pair]);
          else dweights[pair] = gate_slot<kAct, false, A>(p, s, weights[pair]);
          if (s >= 0 && p.bias2) dweights[pair] += dot_bias<A, S>(p, p.indices[pair], pair / p.A);
        }
      });
    });
  });
}

template <class A> void gradient_of_x(const FusedExpertsParams& p) {
  const int64_t columns = product_columns(p);
  const MatrixA by_w1 = scratch_rows(p, dtype_of<A>::value, p.dproducts, columns);
  const MatrixA by_w_up = scratch_rows(p, dtype_of<A>::value, static_cast<A*>(p.dproducts) + p.N1, columns);
  for_blocks(slot_groups(p), p.D, p.N1, transposed(expert_matrix(p.w1, 0)), kSlotTasks,
             [&](int64_t e, int64_t row, int64_t rows, int64_t n, int64_t nb, GemmWay way) {
    const int64_t ldc = round_up(nb, max_of(kPanel, kTileCols<A>));
    A* c = scratch<A>(kSlotC, rows * ldc);
    gemm_block(way, by_w1, row, rows, transposed(expert_matrix(p.w1, e)), n, nb, p.N1, c, ldc);
    if (p.w_up.data) {
      const MatrixB up = transposed(expert_matrix(p.w_up, e));
      gemm_block(gemm_way(slot_groups(p).rows(e), p.F, p.D, up), by_w_up, row, rows, up, n, nb, p.F, c, ldc, true);
    }
    store_tile<A>(c, ldc, static_cast<A*>(p.slots) + row * p.D + n, p.D, 1, rows, nb);
  });
  combine<A>(p, nullptr, p.dx);
}

template <class A> void run(const FusedExpertsParams& p) {
  gradient_of_h<A>(p);
  through_gates<A>(p);
  if (p.dx) gradient_of_x<A>(p);
}

}  // namespace

void fused_experts_bwd(const FusedExpertsParams& p) { p.x_dtype == DType::f64 ? run<double>(p) : run<float>(p); }

}}}  // namespace terrazzo::cpu::TZ_ISA
