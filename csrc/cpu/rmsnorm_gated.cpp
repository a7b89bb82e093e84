// Gated RMS norm over groups of the last dimension, forward and backward (mamba_ssm's RMSNormGated):
//   norm_before_gate: y = x rms * weight * silu(z);   otherwise y = u rms(u) * weight with u = x silu(z).
// rms = 1 / sqrt(mean(v^2) + eps) over each group of group_size channels.
//
// A row stays in L1/L2 between the pass that sums and the pass that writes, so DRAM sees every operand once. The sums
// of dweight go to one partial row per fixed block of rows, added up in order: independent of the number of threads.
#include "../common/parallel.h"
#include "../common/params.h"
#include "activation.h"
#include "tile.h"

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

template <bool kStream, class A, class T> TZ_INLINE void put(Vec<A> v, T* p, int64_t n) {
  if (kStream && n >= Vec<A>::size) v.stream(p);
  else store_n(v, p, n);
}

// ---- forward -----------------------------------------------------------------------------------------------
// One group of n channels; u[n]: room for the gated input.
template <class T, bool kBefore, bool kStream>
void norm_group(const T* x, const T* z, const acc_t<T>* weight, T* y, int64_t n, double eps, acc_t<T>* u) {
  using A = acc_t<T>;
  using V = Vec<A>;
  V squares[2] = {V::zero(), V::zero()};
  const auto gated = [&](int64_t c) TZ_LAMBDA {
    V v = load_n<A>(x + c, n - c);
    if (!kBefore && z) {
      v = v * fast_silu(load_n<A>(z + c, n - c));
      store_n(v, u + c, n - c);
    }
    return v;
  };
  int64_t c = 0;
  for (; c + 2 * V::size <= n; c += 2 * V::size)
    for (int k = 0; k < 2; k++) {
      const V v = gated(c + k * V::size);
      squares[k] = fma(v, v, squares[k]);
    }
  for (; c < n; c += V::size) {
    const V v = gated(c);
    squares[0] = fma(v, v, squares[0]);
  }
  const V rms(A(1) / std::sqrt(reduce_add(squares[0] + squares[1]) / static_cast<A>(n) + static_cast<A>(eps)));
  for (c = 0; c < n; c += V::size) {
    const V v = !kBefore && z ? load_n<A>(u + c, n - c) : load_n<A>(x + c, n - c);
    V out = v * rms * load_n<A>(weight + c, n - c);
    if (kBefore && z) out = out * fast_silu(load_n<A>(z + c, n - c));
    put<kStream>(out, y + c, n - c);
  }
}

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
    for (int64_t r = first; r < last; r++)
      for (int64_t d = 0; d < p.D; d += p.group_size)
        group(static_cast<const T*>(p.x) + r * p.x_stride + d,
              p.z ? static_cast<const T*>(p.z) + r * p.z_stride + d : nullptr, weight + d,
              static_cast<T*>(p.y) + r * p.D + d, p.group_size, p.eps, u);
    if (stream) stream_fence();
  });
}

// ---- backward ----------------------------------------------------------------------------------------------
// One group of n channels. With v the normalised input, v^ = v rms and e = d loss / d v^:
// dv = rms (e - v^ mean(e v^)). gate[n]: room for silu(z).
template <class T, bool kBefore, bool kStream>
void norm_group_backward(const T* x, const T* z, const acc_t<T>* weight, const T* dy, T* dx, T* dz, acc_t<T>* dweight,
                         int64_t n, double eps, acc_t<T>* gate) {
  using A = acc_t<T>;
  using V = Vec<A>;
  V squares = V::zero(), products = V::zero();
  for (int64_t c = 0; c < n; c += V::size) {
    const int64_t width = n - c;
    V v = load_n<A>(x + c, width), e = load_n<A>(dy + c, width) * load_n<A>(weight + c, width);
    if (z) {
      const V s = fast_sigmoid(load_n<A>(z + c, width));
      store_n(s, gate + c, width);
      const V silu = load_n<A>(z + c, width) * s;
      if (kBefore) e = e * silu;
      else v = v * silu;
    }
    squares = fma(v, v, squares);
    products = fma(e, v, products);
  }
  const A mean_square = reduce_add(squares) / static_cast<A>(n);
  const A scale = A(1) / std::sqrt(mean_square + static_cast<A>(eps));
  const V rms(scale), slope(reduce_add(products) / static_cast<A>(n) * scale);  // mean(e v^)
  for (int64_t c = 0; c < n; c += V::size) {
    const int64_t width = n - c;
    const V input = load_n<A>(x + c, width), w = load_n<A>(weight + c, width), grad = load_n<A>(dy + c, width);
    V silu(A(1)), silu_grad(A(0));
    if (z) {
      const V zv = load_n<A>(z + c, width), s = load_n<A>(gate + c, width);
      silu = zv * s;
      silu_grad = silu_slope(zv, s);
    }
    V normed, dv, out, dgate;
    if (kBefore) {
      normed = input * rms;
      dv = rms * (grad * w * silu - normed * slope);
      out = dv;
      dgate = grad * w * normed;
    } else {
      normed = input * silu * rms;
      dv = rms * (grad * w - normed * slope);
      out = dv * silu;
      dgate = dv * input;
    }
    put<kStream>(out, dx + c, width);
    if (dz) put<kStream>(dgate * silu_grad, dz + c, width);
    store_n(load_n<A>(dweight + c, width) + grad * normed * (kBefore ? silu : V(A(1))), dweight + c, width);
  }
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
      for (int64_t r = i * block; r < min_of(p.rows, (i + 1) * block); r++)
        for (int64_t d = 0; d < p.D; d += p.group_size)
          group(static_cast<const T*>(p.x) + r * p.x_stride + d,
                p.z ? static_cast<const T*>(p.z) + r * p.z_stride + d : nullptr, weight + d,
                static_cast<const T*>(p.dy) + r * p.dy_stride + d, static_cast<T*>(p.dx) + r * p.D + d,
                p.dz ? static_cast<T*>(p.dz) + r * p.D + d : nullptr, dweight + d, p.group_size, p.eps, gate);
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
