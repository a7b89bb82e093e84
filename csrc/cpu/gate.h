// Activations of experts and linear layers, with their slopes.
//
// gelu(x) = x Phi(x), its erf by the rational function of XLA and Eigen (3e-7 of the largest value);
// gelu_tanh(x) = x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), which is the tanh form without its cancellation.
#pragma once
#include "../common/params.h"
#include "activation.h"
#include "tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {

TZ_INLINE Vec<float> erf(Vec<float> x) {
  using V = Vec<float>;
  const V y = clamp(x, 4.0f), s = y * y;
  V p(-2.72614225801306e-10f);
  p = fma(p, s, V(2.77068142495902e-08f));
  p = fma(p, s, V(-2.10102402082508e-06f));
  p = fma(p, s, V(-5.69250639462346e-05f));
  p = fma(p, s, V(-7.34990630326855e-04f));
  p = fma(p, s, V(-2.95459980854025e-03f));
  p = fma(p, s, V(-1.60960333262415e-02f));
  V q(-1.45660718464996e-05f);
  q = fma(q, s, V(-2.13374055278905e-04f));
  q = fma(q, s, V(-1.68282697438203e-03f));
  q = fma(q, s, V(-7.37332916720468e-03f));
  q = fma(q, s, V(-1.42647390514189e-02f));
  return y * p / q;
}
TZ_INLINE Vec<double> erf(Vec<double> x) {
  Vec<double> r;
  for (int i = 0; i < Vec<double>::size; i++) r.v[i] = std::erf(static_cast<double>(x.v[i]));
  return r;
}

// A value and the slope there.
template <class A> struct Curve { Vec<A> value, slope; };

template <Activation act, class A> TZ_INLINE Curve<A> activation_curve(Vec<A> x) {
  using V = Vec<A>;
  const V one(A(1)), zero = V::zero();
  if constexpr (act == Activation::silu) {
    const V s = fast_sigmoid(x);
    return {x * s, silu_slope(x, s)};
  } else if constexpr (act == Activation::gelu) {
    const V phi = V(A(0.5)) * (one + erf(x * V(A(0.70710678118654752440))));
    const V density = V(A(0.39894228040143267794)) * exp(V(A(-0.5)) * x * x);
    return {x * phi, fma(x, density, phi)};
  } else if constexpr (act == Activation::gelu_tanh) {
    const V square = x * x, scale(A(1.59576912160573071176));  // 2 sqrt(2 / pi)
    const V s = fast_sigmoid(scale * x * fma(V(A(0.044715)), square, one));
    const V inner = scale * fma(V(A(3 * 0.044715)), square, one);
    return {x * s, fma(x * s * (one - s), inner, s)};
  } else if constexpr (act == Activation::relu) {
    return {max(x, zero), V(typename V::native(x.v > zero.v ? one.v : zero.v))};
  } else if constexpr (act == Activation::relu2) {
    const V r = max(x, zero);
    return {r * r, r + r};
  } else {
    return {x, one};
  }
}
template <Activation act, class A> TZ_INLINE Vec<A> activate(Vec<A> x) { return activation_curve<act>(x).value; }

// Calls f(integral_constant<Activation>) with an activation known at run time (swiglu_oai is a gate, see below).
template <class F> TZ_INLINE void with_activation(Activation act, const F& f) {
  switch (act) {
    case Activation::silu: return f(std::integral_constant<Activation, Activation::silu>());
    case Activation::gelu: return f(std::integral_constant<Activation, Activation::gelu>());
    case Activation::gelu_tanh: return f(std::integral_constant<Activation, Activation::gelu_tanh>());
    case Activation::relu: return f(std::integral_constant<Activation, Activation::relu>());
    case Activation::relu2: return f(std::integral_constant<Activation, Activation::relu2>());
    case Activation::swiglu_oai: return f(std::integral_constant<Activation, Activation::swiglu_oai>());
    default: return f(std::integral_constant<Activation, Activation::none>());
  }
}

// The gate between an expert's two products: h = act(g) u, or (u + 1) g sigmoid(alpha g) of clamped g and u.
struct GateConstants {
  double alpha, limit;
};
// h and its derivatives by g and u.
template <class A> struct Gate { Vec<A> h, by_g, by_u; };

template <Activation act, class A> TZ_INLINE Gate<A> gate(Vec<A> g, Vec<A> u, GateConstants constants) {
  using V = Vec<A>;
  if constexpr (act == Activation::swiglu_oai) {
    const V one(A(1)), zero = V::zero(), limit(static_cast<A>(constants.limit)), alpha(static_cast<A>(constants.alpha));
    const V gc = min(g, limit), uc = max(min(u, limit), zero - limit), s = fast_sigmoid(alpha * gc), glu = gc * s;
    const V slope = fma(alpha * glu, one - s, s) * (uc + one);
    const V inside_g(typename V::native(g.v > limit.v ? zero.v : slope.v));
    const V inside_u(typename V::native(uc.v == u.v ? glu.v : zero.v));
    return {(uc + one) * glu, inside_g, inside_u};
  } else {
    const Curve<A> c = activation_curve<act>(g);
    return {c.value * u, c.slope * u, c.value};
  }
}

}}}  // namespace terrazzo::cpu::TZ_ISA
