"""One decoding step of attention. Source: flash_attn_with_kvcache of Dao 2023 (FlashAttention-2), its rotary embedding included."""
import torch

from . import checks, dispatch, kernels
from .reference import attention_update as reference

OP = "attention_update"


def _cpu_limit(qkv, k_cache, v_cache, *angles):
    if dispatch.needs_grad(qkv, k_cache, v_cache, *angles):
        return "the decoding step has no gradient on the cpu backend; call it under torch.no_grad()"
    if any(cache.stride(-1) != 1 and cache.shape[-1] > 1 for cache in (k_cache, v_cache)):
        return f"the caches must have unit stride along P, got {k_cache.stride(-1)} and {v_cache.stride(-1)}"
    return dispatch.cpu_dtypes(qkv, *angles)


_ENTRY = dispatch.register(OP, "attention_update", ("attention_update",), op=OP, cpu=_cpu_limit)


def attention_update(qkv, k_cache, v_cache, cache_seqlens, *, rotary_cos=None, rotary_sin=None, rotary_interleaved=False, window=None, scale=None,
                     backend=None):
    """Attention of one new position of every row over a cache, which takes the position in.

    Args:
        qkv: (B, (H + 2 Hk) P) float32, bfloat16, float16 or float64: H queries, Hk keys and Hk values side by side, as a product with the
            three weights gives them. Query head h reads key head h // (H // Hk).
        k_cache, v_cache: (B, Hk, slots, P) in qkv's dtype, updated in place. Position t lies in slot t; with a window in slot t % window.
        cache_seqlens: int, or (B,) int32 or int64: the positions that came before, where rows differ.
        rotary_cos, rotary_sin: (1 or B, R) of this position, any float dtype, or None: the first 2 R channels of queries and keys are turned
            before the key is kept; channel i with i + R, or (rotary_interleaved) 2 i with 2 i + 1.
        window: how many positions are seen, this one included; None: all. Each needs a slot.
        scale: multiplies the scores; P ** -0.5 by default.
        backend: "cpu", "reference" or None to choose.

    Returns:
        (B, H P) in qkv's dtype, computed in float32 (float64 for float64). The cpu backend has no gradient: under grad mode with inputs that
        need one, the reference serves the call.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to::

        q, k, v = qkv.unflatten(1, (-1, P)).split([H, Hk, Hk], 1)
        k_cache[:, :, cache_seqlens], v_cache[:, :, cache_seqlens] = rotary(k), v
        seen = slice(0, cache_seqlens + 1)
        F.scaled_dot_product_attention(rotary(q)[:, :, None], k_cache[:, :, seen], v_cache[:, :, seen], enable_gqa=True)
    """
    if not torch.compiler.is_compiling():
        y = _fast(qkv, k_cache, v_cache, cache_seqlens, rotary_cos, rotary_sin, rotary_interleaved, window, scale, backend)
        if y is not None:
            return y
    checks.check_flags(OP, rotary_interleaved=rotary_interleaved)
    length, lengths, scale = _check(qkv, k_cache, v_cache, cache_seqlens, rotary_cos, rotary_sin, window, scale)
    chosen, _ = dispatch.pick(OP, qkv, k_cache, v_cache, rotary_cos, rotary_sin, backend=backend)
    if chosen != "reference":
        return kernels.ops(chosen).attention_update(qkv, k_cache, v_cache, length, lengths, rotary_cos, rotary_sin, rotary_interleaved,
                                                    window or 0, scale)
    dispatch.count(OP, chosen)
    return reference.attention_update(qkv, k_cache, v_cache, cache_seqlens, rotary_cos, rotary_sin, rotary_interleaved, window, scale)


def _check(qkv, k_cache, v_cache, cache_seqlens, rotary_cos, rotary_sin, window, scale):
    """The arguments of the native op that stand for cache_seqlens and scale."""
    checks.check_tensor(OP, "qkv", qkv, 2, "(B, (H + 2 Hk) P)")
    B = qkv.shape[0]
    checks.check_tensor(OP, "k_cache", k_cache, 4, "(B, Hk, slots, P)", qkv, dtypes=(qkv.dtype,))
    _, Hk, slots, P = k_cache.shape
    checks.check_positive(OP, Hk=Hk, P=P)
    checks.check_shape(OP, "k_cache", k_cache, (B, None, None, None), "(B, Hk, slots, P)")
    checks.check_tensor(OP, "v_cache", v_cache, 4, "(B, Hk, slots, P)", qkv, dtypes=(qkv.dtype,))
    checks.check_shape(OP, "v_cache", v_cache, tuple(k_cache.shape), "(B, Hk, slots, P)")
    heads = qkv.shape[1] // P - 2 * Hk
    if qkv.shape[1] % P or heads < 1 or heads % Hk:
        checks.fail(OP, f"qkv must be (B, (H + 2 Hk) P) with H a multiple of Hk = {Hk} and P = {P}, got {checks.describe(qkv)}")
    if window is not None:
        checks.check_count(OP, "window", window, 1)
    length, lengths = (0, cache_seqlens) if isinstance(cache_seqlens, torch.Tensor) else (cache_seqlens, None)
    if lengths is not None:
        checks.check_tensor(OP, "cache_seqlens", lengths, 1, "int or (B,)", qkv, dtypes=(torch.int32, torch.int64))
        checks.check_shape(OP, "cache_seqlens", lengths, (B,), "(B,)")
        checks.check_not_negative(OP, "cache_seqlens", lengths)
        longest = int(lengths.max()) if checks.has_values(lengths) and B else 0
    else:
        checks.check_count(OP, "cache_seqlens", length, 0)
        longest = length
    seen = longest + 1 if window is None else min(longest + 1, window)
    if seen > slots:
        checks.fail(OP, f"k_cache must have a slot for each of the {seen} positions that are seen, got {slots}")
    if (rotary_cos is None) != (rotary_sin is None):
        checks.fail(OP, "rotary_cos and rotary_sin go together, one is missing")
    if rotary_cos is not None:
        checks.check_tensor(OP, "rotary_cos", rotary_cos, 2, "(1 or B, R)", qkv)
        if rotary_cos.shape[0] not in (1, B) or 2 * rotary_cos.shape[1] > P:
            checks.fail(OP, f"rotary_cos must be (1 or B, R) with B = {B} and 2 R at most P = {P}, got {checks.describe(rotary_cos)}")
        checks.check_optional(OP, "rotary_sin", rotary_sin, tuple(rotary_cos.shape), "like rotary_cos", qkv)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.check_writable(OP, name, cache)
    return length, lengths, checks.attention_scale(OP, scale, P)


def _fast(qkv, k_cache, v_cache, cache_seqlens, rotary_cos, rotary_sin, rotary_interleaved, window, scale, backend):
    """Straight to the kernel, which checks everything before it touches memory; None when it cannot serve the call or refuses it."""
    try:
        if not qkv.is_cpu or not dispatch.cpu_may_serve(_ENTRY, backend) or dispatch.needs_grad(qkv, k_cache, v_cache, rotary_cos, rotary_sin):
            return None
        if type(rotary_interleaved) is not bool or (window is not None and (type(window) is not int or window < 1)):
            return None
        length, lengths = (cache_seqlens, None) if isinstance(cache_seqlens, int) else (0, cache_seqlens)
        scale = k_cache.shape[3] ** -0.5 if scale is None else scale
        if type(scale) is not float or scale != scale:
            return None
        return torch.ops.terrazzo.attention_update.default(qkv, k_cache, v_cache, length, lengths, rotary_cos, rotary_sin, rotary_interleaved,
                                                           window or 0, scale)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, ZeroDivisionError):
        return None


@kernels.register_fake("attention_update")
def _(qkv, k_cache, v_cache, length, lengths, cos, sin, interleaved, window, scale):
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * k_cache.shape[1] * k_cache.shape[3])
