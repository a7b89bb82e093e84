// Gated RMS norm over groups of the last dimension, forward and backward (mamba_ssm's RMSNormGated):
//   norm_before_gate: y = x rms * weight * silu(z);   otherwise y = u rms(u) * weight with u = x silu(z).
// rms = 1 / sqrt(mean(v^2) + eps) over each group of group_size channels.
//
// A row stays in L1/L2 between the pass that sums and the pass that writes, so DRAM sees every operand once. The sums
// of dweight go to one partial row per fixed block of rows, added up in order: independent of the number of threads.
#include "../common/parallel.h"
#include "../common/params.h"
#include "rmsnorm.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

enum NormScratch { kWeightSlot, kPartialSlot, kRowSlot };
constexpr int64_t kSerialElements = 32768;
constexpr int64_t kMaxPartials = 64;

template <class A> const A* weight_row(const RmsnormGatedParams& p) {
  if (p.weight_dtype == dtype_of<A>::value) return static_cast<const A*>(p.weight);
  A* copy = scratch<A>(kWeightSlot, p.D);
  load_tile<A>(p.weight_dtype, p.weight, 0, 0, 1, 1, p.D, copy, p.D);
  return copy;
}

// fn(row, first channel) for every group of rows [first, last).
template <class F> TZ_INLINE void for_groups(const RmsnormGatedParams& p, int64_t first, int64_t last, const F& fn) {
  for (int64_t r = first; r < last; r++)
    for (int64_t d = 0; d < p.D; d += p.group_size) fn(r, d);
}
// Where group d of row r starts in a matrix with a row stride; null stays null.
template <class T> TZ_INLINE const T* group_at(const void* base, int64_t stride, int64_t r, int64_t d) {
  return base ? static_cast<const T*>(base) + r * stride + d : nullptr;
}
template <class T> TZ_INLINE T* group_at(void* base, int64_t stride, int64_t r, int64_t d) {
  return base ? static_cast<T*>(base) + r * stride + d : nullptr;
}

// ---- forward -----------------------------------------------------------------------------------------------
template <class T> void forward(const RmsnormGatedParams& p) {
  using A = acc_t<T>;
  const A* weight = weight_row<A>(p);
  const int64_t bytes = p.rows * p.D * static_cast<int64_t>(sizeof(T));
  const bool stream = bytes > kStreamBytes && reinterpret_cast<uintptr_t>(p.y) % 64 == 0 &&
                      p.group_size * static_cast<int64_t>(sizeof(T)) % 64 == 0;
  const auto group = p.norm_before_gate ? (stream ? norm_group<T, true, true> : norm_group<T, true, false>)
                                        : (stream ? norm_group<T, false, true> : norm_group<T, false, false>);
  parallel_for(0, p.rows, max_of(1, kSerialElements / p.D), [&](int64_t first, int64_t last) {
    A* u = scratch<A>(kRowSlot, p.group_size);
    for_groups(p, first, last, [&](int64_t r, int64_t d) {
      group(group_at<T>(p.x, p.x_stride, r, d), group_at<T>(p.z, p.z_stride, r, d), weight + d, group_at<T>(p.y, p.D, r, d),
            p.group_size, p.eps, u);
    });
    if (stream) stream_fence();
  });
}

// ---- backward ----------------------------------------------------------------------------------------------
// One group of n channels. With v the normalised input, v^ = v rms and e = d loss / d v^:
// dv = rms (e - v^ mean(e v^)). gate[n]: room for sigmoid(z).
template <class T, bool kBefore, bool kStream>
void norm_group_backward(const T* x, const T* z, const acc_t<T>* weight, const T* dy, T* dx, T* dz, acc_t<T>* dweight,
                         int64_t n, double eps, acc_t<T>* gate) {
  using A = acc_t<T>;
  using V = Vec<A>;
  V squares = V::zero(), products = V::zero();
  for_vectors<A>(n, [&](auto tag, int64_t c) TZ_LAMBDA {
    constexpr int lanes = decltype(tag)::value;
    V v[lanes], e[lanes], w[lanes], zv[lanes], s[lanes];
    load_some<lanes>(x + c, n - c, v);
    load_some<lanes>(dy + c, n - c, e);
    load_some<lanes>(weight + c, n - c, w);
    for (int i = 0; i < lanes; i++) e[i] = e[i] * w[i];
    if (z) {
      load_some<lanes>(z + c, n - c, zv);
      fast_sigmoid<lanes>(zv, s);
      store_some<lanes, false>(s, gate + c, n - c);
      for (int i = 0; i < lanes; i++) {
        if (kBefore) e[i] = e[i] * zv[i] * s[i];
        else v[i] = v[i] * zv[i] * s[i];
      }
    }
    V square = v[0] * v[0], product = e[0] * v[0];
    for (int i = 1; i < lanes; i++) {
      square = fma(v[i], v[i], square);
      product = fma(e[i], v[i], product);
    }
    squares = squares + square;
    products = products + product;
  });
  const A scale = A(1) / std::sqrt(reduce_add(squares) / static_cast<A>(n) + static_cast<A>(eps));
  const V rms(scale), slope(reduce_add(products) / static_cast<A>(n) * scale);  // mean(e v^)
  for_vectors<A>(n, [&](auto tag, int64_t c) TZ_LAMBDA {
    constexpr int lanes = decltype(tag)::value;
    V input[lanes], w[lanes], grad[lanes], zv[lanes], s[lanes], dw[lanes], dgate[lanes];
    load_some<lanes>(x + c, n - c, input);
    load_some<lanes>(weight + c, n - c, w);
    load_some<lanes>(dy + c, n - c, grad);
    load_some<lanes>(dweight + c, n - c, dw);
    if (z) {
      load_some<lanes>(z + c, n - c, zv);
      load_some<lanes>(gate + c, n - c, s);
    }
    for (int i = 0; i < lanes; i++) {
      const V silu = z ? zv[i] * s[i] : V(A(1));
      if (kBefore) {
        const V normed = input[i] * rms, dvalue = grad[i] * normed;
        dgate[i] = dvalue * w[i];
        dw[i] = fma(dvalue, silu, dw[i]);
        input[i] = rms * (grad[i] * w[i] * silu - normed * slope);
      } else {
        const V normed = input[i] * silu * rms, dv = rms * (grad[i] * w[i] - normed * slope);
        dgate[i] = dv * input[i];
        dw[i] = fma(grad[i], normed, dw[i]);
        input[i] = dv * silu;
      }
      if (z) dgate[i] = dgate[i] * silu_slope(zv[i], s[i]);
    }
    store_some<lanes, kStream>(input, dx + c, n - c);
    if (dz) store_some<lanes, kStream>(dgate, dz + c, n - c);
    store_some<lanes, false>(dw, dweight + c, n - c);
  });
}

template <class T> void backward(const RmsnormGatedParams& p) {
  using A = acc_t<T>;
  const A* weight = weight_row<A>(p);
  const int64_t bytes = p.rows * p.D * static_cast<int64_t>(sizeof(T));
  const bool stream = bytes > kStreamBytes && reinterpret_cast<uintptr_t>(p.dx) % 64 == 0 &&
                      reinterpret_cast<uintptr_t>(p.dz) % 64 == 0 && p.group_size * static_cast<int64_t>(sizeof(T)) % 64 == 0;
  const int64_t block = max_of(8, ceil_div(p.rows, kMaxPartials)), blocks = ceil_div(p.rows, block);
  A* partial = scratch<A>(kPartialSlot, blocks * p.D);
  const auto group = p.norm_before_gate ? (stream ? norm_group_backward<T, true, true> : norm_group_backward<T, true, false>)
                                        : (stream ? norm_group_backward<T, false, true> : norm_group_backward<T, false, false>);
  parallel_for(0, blocks, max_of(1, kSerialElements / (block * p.D)), [&](int64_t first, int64_t last) {
    A* gate = scratch<A>(kRowSlot, p.group_size);
    for (int64_t i = first; i < last; i++) {
      A* dweight = partial + i * p.D;
      fill_tile(dweight, p.D, 1, p.D, A(0));
      for_groups(p, i * block, min_of(p.rows, (i + 1) * block), [&](int64_t r, int64_t d) {
        group(group_at<T>(p.x, p.x_stride, r, d), group_at<T>(p.z, p.z_stride, r, d), weight + d,
              group_at<T>(p.dy, p.dy_stride, r, d), group_at<T>(p.dx, p.D, r, d), group_at<T>(p.dz, p.D, r, d), dweight + d,
              p.group_size, p.eps, gate);
      });
    }
    if (stream) stream_fence();
  });
  A* total = static_cast<A*>(p.dweight);
  if (!total) return;
  fill_tile(total, p.D, 1, p.D, A(0));
  for (int64_t i = 0; i < blocks; i++)
    for (int64_t d = 0; d < p.D; d++) total[d] += partial[i * p.D + d];
}

}  // namespace

void rmsnorm_gated_fwd(const RmsnormGatedParams& p) {
  if (p.D == 0) return;
  with_type(p.x_dtype, [&](auto t) { forward<decltype(t)>(p); });
}

void rmsnorm_gated_bwd(const RmsnormGatedParams& p) {
  if (p.D == 0) return;
  with_type(p.x_dtype, [&](auto t) { backward<decltype(t)>(p); });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
