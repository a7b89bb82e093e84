"""What kernels look up in sorted arrays on the device: the text of a position, the patch of a byte."""
import triton
import triton.language as tl


@triton.jit
def count_at_most(sorted_ptr, size, values, steps):
    """How many of sorted_ptr[0:size] are <= each of values, by halving; steps is size.bit_length()."""
    low = tl.zeros_like(values)
    high = low + size
    for _ in range(steps):
        middle = low + (high - low) // 2
        searching = low < high
        below = searching & (tl.load(sorted_ptr + middle, mask=searching, other=0) <= values)
        low = tl.where(below, middle + 1, low)
        high = tl.where(searching & (below == 0), middle, high)
    return low
