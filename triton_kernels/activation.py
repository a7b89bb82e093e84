"""The activations of linear layers and experts, with their slopes; numbers as in pyops/activations.py.

gelu_tanh(x) = x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), which is the tanh form without its cancellation. NaN stays NaN.
"""
import triton
import triton.language as tl

NONE, SILU, GELU, GELU_TANH, RELU, RELU2, SWIGLU_OAI = (tl.constexpr(i) for i in range(7))


@triton.jit
def activation_curve(x, ACTIVATION: tl.constexpr):
    """The activation of float32 x, and its slope."""
    if ACTIVATION == SILU:
        s = tl.sigmoid(x)
        value = x * s
        slope = s + value * (1 - s)
    elif ACTIVATION == GELU:
        phi = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
        value = x * phi
        slope = phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == GELU_TANH:
        scale = 1.5957691216057308  # 2 sqrt(2 / pi)
        s = tl.sigmoid(scale * x * (1 + 0.044715 * x * x))
        value = x * s
        slope = s + value * (1 - s) * scale * (1 + 3 * 0.044715 * x * x)
    elif ACTIVATION == RELU:
        value = tl.where(x < 0, 0.0, x)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == RELU2:
        r = tl.where(x < 0, 0.0, x)
        value = r * r
        slope = r + r
    else:
        value = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def gate_curve(g, u, alpha, limit, ACTIVATION: tl.constexpr):
    """h = act(g) u, or (u + 1) g sigmoid(alpha g) of clamped g and u; and the derivatives of h by g and u."""
    if ACTIVATION == SWIGLU_OAI:
        clamped_g = tl.where(g > limit, limit, g)
        clamped_u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        s = tl.sigmoid(alpha * clamped_g)
        glu = clamped_g * s
        h = (clamped_u + 1) * glu
        by_g = tl.where(g > limit, 0.0, (clamped_u + 1) * (s + alpha * glu * (1 - s)))
        by_u = tl.where(clamped_u == u, glu, 0.0)
    else:
        by_u, slope = activation_curve(g, ACTIVATION)
        h = by_u * u
        by_g = slope * u
    return h, by_g, by_u
