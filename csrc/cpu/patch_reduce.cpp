// One row for each patch of bytes: y[s] = max, mean or min of h[l] over the bytes l of patch s; zeros where it is empty.
//   h [B, L, D], y [B, S, D]. A NaN among a patch's values is its result, as in torch.
//   backward: mean gives every byte dy / n; max and min give dy to the bytes that hold it, in equal parts.
//
// Memory decides: a patch's rows are read one behind the other into a row of scratch that stays in L1. Every patch is one
// thread's.
#include "../common/parallel.h"
#include "../common/params.h"
#include "tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

constexpr int kRowSlot = 0;
constexpr int64_t kSerialElements = 16384;

template <class A> TZ_INLINE Vec<A> combine(PatchReduction reduce, Vec<A> acc, Vec<A> x) {
  if (reduce == PatchReduction::mean) return acc + x;
  const Vec<A> best = reduce == PatchReduction::amax ? max(x, acc) : min(x, acc);  // a NaN in x stays
  return acc.v == acc.v ? best.v : acc.v;
}

// The bytes of patch s of row b, calling fn(l) for each.
template <class F> TZ_INLINE int64_t for_bytes(const PatchReduceParams& p, int64_t b, int64_t s, const F& fn) {
  const int32_t* starts = p.starts + b * (p.S + 1) + s;
  int64_t n = 0;
  for (int64_t l = starts[0]; l < starts[1]; l++)
    if (p.ids[b * p.L + l] >= 0) fn(l), n++;
  return n;
}

template <class T, PatchReduction kReduce> void reduce_patches(const PatchReduceParams& p) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t width = ceil_div(p.D, V::size) * V::size, bytes = ceil_div(p.L, max_of(p.S, 1)) + 1;
  parallel_for(0, p.B * p.S, max_of(1, kSerialElements / (bytes * p.D)), [&](int64_t begin, int64_t end) {
    A* row = scratch<A>(kRowSlot, width);
    for (int64_t item = begin; item < end; item++) {
      const int64_t b = item / p.S, s = item % p.S;
      bool first = true;
      const int64_t n = for_bytes(p, b, s, [&](int64_t l) TZ_LAMBDA {
        const T* h = static_cast<const T*>(p.h) + b * p.h_stride_b + l * p.h_stride_l;
        int64_t d = 0;
        if (first) {
          for (; d + V::size <= p.D; d += V::size) V::load(h + d).store(row + d);
          if (d < p.D) load_n<A>(h + d, p.D - d).store(row + d);
        } else {
          for (; d + V::size <= p.D; d += V::size) combine(kReduce, V::load(row + d), V::load(h + d)).store(row + d);
          if (d < p.D) combine(kReduce, V::load(row + d), load_n<A>(h + d, p.D - d)).store(row + d);
        }
        first = false;
      });
      if (n == 0)
        for (int64_t d = 0; d < width; d++) row[d] = 0;
      const V factor(kReduce == PatchReduction::mean && n ? A(1) / static_cast<A>(n) : A(1));
      T* y = static_cast<T*>(p.y) + item * p.D;
      for (int64_t d = 0; d < p.D; d += V::size) {
        const V v = V::load(row + d);
        store_n(kReduce == PatchReduction::mean ? v * factor : v, y + d, p.D - d);
      }
    }
  });
}

// dh of rows [begin, end) is zero: bytes of no patch.
template <class T> void clear_rows(const PatchReduceParams& p, int64_t b, int64_t begin, int64_t end) {
  if (end > begin) std::memset((void*)(static_cast<T*>(p.dh) + (b * p.L + begin) * p.D), 0, static_cast<size_t>((end - begin) * p.D) * sizeof(T));
}

template <class T> void reduce_patches_backward(const PatchReduceParams& p) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t bytes = ceil_div(p.L, max_of(p.S, 1)) + 1;
  const bool mean = p.reduce == PatchReduction::mean;
  parallel_for(0, p.B * p.S, max_of(1, kSerialElements / (bytes * p.D)), [&](int64_t begin, int64_t end) {
    A* share = scratch<A>(kRowSlot, ceil_div(p.D, V::size) * V::size);  // what each byte that holds the result gets
    for (int64_t item = begin; item < end; item++) {
      const int64_t b = item / p.S, s = item % p.S;
      const int32_t* starts = p.starts + b * (p.S + 1);
      if (s == 0) clear_rows<T>(p, b, 0, starts[0]);
      if (s == p.S - 1) clear_rows<T>(p, b, starts[p.S], p.L);
      const T *y = static_cast<const T*>(p.y) + item * p.D, *dy = static_cast<const T*>(p.dy) + item * p.D;
      const auto row_of = [&](int64_t l) TZ_LAMBDA { return static_cast<const T*>(p.h) + b * p.h_stride_b + l * p.h_stride_l; };
      const auto holders = [&](int64_t l, int64_t d) TZ_LAMBDA -> V {  // one where byte l holds the result
        const V h = load_n<A>(row_of(l) + d, p.D - d), r = load_n<A>(y + d, p.D - d);
        return h.v == r.v ? V(A(1)).v : V::zero().v;
      };
      for (int64_t d = 0; d < p.D; d += V::size) V::zero().store(share + d);
      const int64_t n = for_bytes(p, b, s, [&](int64_t l) TZ_LAMBDA {
        if (!mean)
          for (int64_t d = 0; d < p.D; d += V::size) (V::load(share + d) + holders(l, d)).store(share + d);
      });
      for (int64_t d = 0; d < p.D; d += V::size)
        (load_n<A>(dy + d, p.D - d) / (mean ? V(static_cast<A>(n)) : V::load(share + d))).store(share + d);
      for (int64_t l = starts[s]; l < starts[s + 1]; l++) {
        if (p.ids[b * p.L + l] < 0) {
          clear_rows<T>(p, b, l, l + 1);
          continue;
        }
        T* dh = static_cast<T*>(p.dh) + (b * p.L + l) * p.D;
        for (int64_t d = 0; d < p.D; d += V::size) {
          const V part = V::load(share + d), held = mean ? V(A(1)) : holders(l, d);
          store_n(V(held.v != V::zero().v ? part.v : V::zero().v), dh + d, p.D - d);
        }
      }
    }
  });
}

}  // namespace

void patch_reduce_fwd(const PatchReduceParams& p) {
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    switch (p.reduce) {
      case PatchReduction::amax: return reduce_patches<T, PatchReduction::amax>(p);
      case PatchReduction::mean: return reduce_patches<T, PatchReduction::mean>(p);
      case PatchReduction::amin: return reduce_patches<T, PatchReduction::amin>(p);
    }
  });
}
void patch_reduce_bwd(const PatchReduceParams& p) {
  with_type(p.dtype, [&](auto t) { reduce_patches_backward<decltype(t)>(p); });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
