// The activations of linear layers and experts, with their slopes, of n columns at a time.
//
// gelu_tanh(x) = x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), which is the tanh form without its cancellation. NaN stays NaN.
#pragma once
#include "common.cuh"

namespace terrazzo { namespace cuda {

// An activation and its slope there.
template <Activation act> TZ_DEVICE void curve(float x, float& value, float& slope) {
  if constexpr (act == Activation::silu) {
    const float s = sigmoid(x);
    value = x * s, slope = s + value * (1 - s);
  } else if constexpr (act == Activation::gelu) {
    const float phi = 0.5f + 0.5f * erff(x * 0.70710678f);
    value = x * phi, slope = phi + x * 0.39894228f * expf(-0.5f * x * x);
  } else if constexpr (act == Activation::gelu_tanh) {
    constexpr float kScale = 1.59576912f;  // 2 sqrt(2 / pi)
    const float s = sigmoid(kScale * x * (1 + 0.044715f * x * x));
    value = x * s, slope = s + value * (1 - s) * kScale * (1 + 3 * 0.044715f * x * x);
  } else if constexpr (act == Activation::relu) {
    value = x < 0 ? 0 : x, slope = x > 0 ? 1 : 0;
  } else if constexpr (act == Activation::relu2) {
    const float r = x < 0 ? 0 : x;
    value = r * r, slope = r + r;
  } else {
    value = x, slope = 1;
  }
}

// f(integral constant) of an activation that is known at run time.
template <Activation act> struct ActivationConstant { static constexpr Activation v = act; };
template <class F> TZ_DEVICE void with_activation(Activation act, const F& f) {
  switch (act) {
    case Activation::silu: return f(ActivationConstant<Activation::silu>{});
    case Activation::gelu: return f(ActivationConstant<Activation::gelu>{});
    case Activation::gelu_tanh: return f(ActivationConstant<Activation::gelu_tanh>{});
    case Activation::relu: return f(ActivationConstant<Activation::relu>{});
    case Activation::relu2: return f(ActivationConstant<Activation::relu2>{});
    case Activation::swiglu_oai: return f(ActivationConstant<Activation::swiglu_oai>{});
    default: return f(ActivationConstant<Activation::none>{});
  }
}

template <int n> TZ_DEVICE void activate(Activation act, float (&x)[n]) {
  if (act == Activation::none) return;
  with_activation(act, [&](auto constant) {
#pragma unroll
    for (int j = 0; j < n; j++) {
      float slope;
      curve<decltype(constant)::v>(x[j], x[j], slope);
    }
  });
}

// What stands between an expert's products: h = act(g) u, or (u + 1) g sigmoid(alpha g) of clamped g and u, or without a gate act(g).
struct GateParams {
  Activation activation;
  bool gated;
  float alpha, limit;
};
// h and its derivatives by g and u; u is left alone without a gate.
template <int n> TZ_DEVICE void gate(const GateParams& p, const float (&g)[n], const float (&u)[n], float (&h)[n], float (&by_g)[n], float (&by_u)[n]) {
  with_activation(p.activation, [&](auto constant) {
    constexpr Activation kAct = decltype(constant)::v;
#pragma unroll
    for (int j = 0; j < n; j++) {
      if constexpr (kAct == Activation::swiglu_oai) {
        const float gc = g[j] > p.limit ? p.limit : g[j], uc = u[j] > p.limit ? p.limit : u[j] < -p.limit ? -p.limit : u[j];
        const float s = sigmoid(p.alpha * gc), glu = gc * s;
        h[j] = (uc + 1) * glu;
        by_g[j] = g[j] > p.limit ? 0 : (uc + 1) * (s + p.alpha * glu * (1 - s));
        by_u[j] = uc == u[j] ? glu : 0;
      } else {
        float value, slope;
        curve<kAct>(g[j], value, slope);
        h[j] = p.gated ? value * u[j] : value, by_g[j] = p.gated ? slope * u[j] : slope, by_u[j] = value;
      }
    }
  });
}

}}  // namespace terrazzo::cuda
