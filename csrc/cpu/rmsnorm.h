// The gated RMS norm of one group of channels, forward: of rmsnorm_gated, and of what norm_linear multiplies.
#pragma once
#include "activation.h"
#include "tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

// Vectors worked on side by side.
constexpr int kLanes = 4;

// step(width tag, c) over n channels: kLanes vectors at a time, then one by one.
template <int lanes> struct Lanes { static constexpr int value = lanes; };
template <class A, class F> TZ_INLINE void for_vectors(int64_t n, const F& step) {
  int64_t c = 0;
  for (; c + kLanes * Vec<A>::size <= n; c += kLanes * Vec<A>::size) step(Lanes<kLanes>{}, c);
  for (; c < n; c += Vec<A>::size) step(Lanes<1>{}, c);
}

// One group of n channels; u[n]: room for the gated input.
template <class T, bool kBefore, bool kStream>
inline void norm_group(const T* x, const T* z, const acc_t<T>* weight, T* y, int64_t n, double eps, acc_t<T>* u) {
  using A = acc_t<T>;
  using V = Vec<A>;
  V squares = V::zero();
  for_vectors<A>(n, [&](auto tag, int64_t c) TZ_LAMBDA {
    constexpr int lanes = decltype(tag)::value;
    V v[lanes], gate[lanes];
    load_some<lanes>(x + c, n - c, v);
    if (!kBefore && z) {
      load_some<lanes>(z + c, n - c, gate);
      fast_silu<lanes>(gate);
      for (int i = 0; i < lanes; i++) v[i] = v[i] * gate[i];
      store_some<lanes, false>(v, u + c, n - c);
    }
    V sum = v[0] * v[0];
    for (int i = 1; i < lanes; i++) sum = fma(v[i], v[i], sum);
    squares = squares + sum;
  });
  const V rms(A(1) / std::sqrt(reduce_add(squares) / static_cast<A>(n) + static_cast<A>(eps)));
  for_vectors<A>(n, [&](auto tag, int64_t c) TZ_LAMBDA {
    constexpr int lanes = decltype(tag)::value;
    V v[lanes], w[lanes], gate[lanes];
    if (!kBefore && z) load_some<lanes>(u + c, n - c, v);
    else load_some<lanes>(x + c, n - c, v);
    load_some<lanes>(weight + c, n - c, w);
    for (int i = 0; i < lanes; i++) v[i] = v[i] * rms * w[i];
    if (kBefore && z) {
      load_some<lanes>(z + c, n - c, gate);
      fast_silu<lanes>(gate);
      for (int i = 0; i < lanes; i++) v[i] = v[i] * gate[i];
    }
    store_some<lanes, kStream>(v, y + c, n - c);
  });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
