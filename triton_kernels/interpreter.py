"""Corrects Triton 3.9's interpreter, which is silently wrong for bfloat16.

It keeps bfloat16 as 16-bit integers and computes on those: products, sums, comparisons and tl.dot of two bfloat16 blocks
are products and sums of bit patterns, and float32 becomes bfloat16 by cutting digits off where hardware rounds to nearest
even. The corrections compute in float32 and round. They replace private functions, so `correct` refuses any other
version of Triton, and tests/triton/test_interpreter.py shows that each fault is there without them and gone with them.
"""
import numpy as np

VERSION = "3.9."
_corrected = False


def to_float32(bits):
    """bfloat16 bit patterns (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values):
    """float32 rounded to nearest even, as bfloat16 bit patterns (uint16)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def correct():
    """Corrects the interpreter of this process; a second call does nothing."""
    global _corrected
    if _corrected:
        return
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    if not triton.__version__.startswith(VERSION):
        raise RuntimeError(f"terrazzo: the corrections of Triton's interpreter are for version {VERSION}*, got {triton.__version__}")
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, binary_op, unary_op, cast_impl = builder.create_dot, builder.binary_op, builder.unary_op, builder.cast_impl
    bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)

    def is_bfloat16(value):
        return value.dtype.scalar == tl.bfloat16

    def floats(value):
        return to_float32(value.data) if is_bfloat16(value) else value.data

    def create_dot(self, a, b, d, *precision):
        if not (is_bfloat16(a) or is_bfloat16(b)):
            return dot(self, a, b, d, *precision)
        product = np.matmul(floats(a), floats(b), dtype=np.float32)
        return handle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    def corrected_binary_op(self, left, right, op):
        if not (is_bfloat16(left) and is_bfloat16(right)) or op in bitwise:
            return binary_op(self, left, right, op)
        result = op(floats(left), floats(right))
        return handle(result, tl.int1) if result.dtype == np.bool_ else handle(to_bfloat16(result), tl.bfloat16)

    def corrected_unary_op(self, value, op):
        return handle(to_bfloat16(op(floats(value))), tl.bfloat16) if is_bfloat16(value) else unary_op(self, value, op)

    def corrected_cast(self, source, dtype):
        if is_bfloat16(source) == (dtype.scalar == tl.bfloat16):
            return cast_impl(self, source, dtype)
        if is_bfloat16(source):
            as_float32 = handle(to_float32(source.data), tl.float32)
            return as_float32 if dtype.scalar == tl.float32 else cast_impl(self, as_float32, dtype)
        return handle(to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)

    # Every call of one @triton.jit function by another, tl.max and tl.cdiv included, searches triton.language again for what
    # the launch has already put in place: a third of all time. Once per launch and module is enough.
    patch_lang, patched = interpreter._patch_lang, set()

    def patch_lang_once(fn):
        module, outermost = fn.__globals__["__name__"], not patched
        if module in patched:
            return None  # a function that is called looks at nothing
        scope = patch_lang(fn)
        patched.add(module)
        if outermost:  # the launch's own: it ends with scope.restore()
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    builder.create_dot, builder.binary_op = create_dot, corrected_binary_op
    builder.unary_op, builder.cast_impl = corrected_unary_op, corrected_cast
    interpreter._patch_lang = patch_lang_once
    _corrected = True
