// One decoding step of the selective scan, state updated in place. Per row b, head h (group g = h / (H/G)):
//   dt' = softplus?(dt + dt_bias),  state[p,n] = exp(dt' A) state[p,n] + dt' x[p] B[n],
//   out[p] = (sum_n C[n] state[p,n] + D x[p]) * silu(z[p]).
//
// The state's traffic is all that should count: its rows are walked strictly in order, read and written once. Where dt,
// A and dt_bias don't vary inside a head (Mamba-2: stride 0) the decay is one number per head, otherwise (Mamba-1) a
// vector of exponentials per row. `out` is computed from the new state before it is rounded to the state's type.
#include "../common/parallel.h"
#include "../common/params.h"
#include "activation.h"
#include "tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

enum UpdateScratch { kHeadSlot, kStepSlot };
constexpr int64_t kAhead = 4096;  // bytes
// Vectors of B and of C that stay in registers beside a row: only AVX-512 has registers to spare.
#if defined(__AVX512F__)
constexpr int kHeld = 8;
#else
constexpr int kHeld = 0;
#endif
// State elements that take about 20 us; less is not worth another thread.
constexpr int64_t kSerialElements = 65536;

TZ_INLINE bool any_nan(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a.v, (__m512)b.v, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a.v, (__m256)b.v, _CMP_UNORD_Q)) != 0;
#else
  return _mm_movemask_ps(_mm_cmpunord_ps((__m128)a.v, (__m128)b.v)) != 0;
#endif
}

// out[i] = the sum over the elements of row(i), for P rows in order. A sum inside a vector is a chain of shuffles and
// additions; a whole vector of rows goes through it together.
template <class A, class F> TZ_INLINE void sum_rows(int64_t P, A* out, const F& row) {
  using V = Vec<A>;
  for (int64_t i = 0; i < P; i += V::size) {
    V sums[V::size];
    const int64_t count = min_of(P - i, V::size);
    for (int64_t r = 0; r < count; r++) sums[r] = row(i + r);
    for (int64_t r = count; r < V::size; r++) sums[r] = V::zero();
    store_n(reduce_rows(sums), out + i, count);
  }
}

// One row of the state: row[n] = decay * row[n] + dtx * Bm[n]; returns what adds up to sum_n C[n] row[n].
// decay: one value, or (kDecayRow) exp(dt * A[n]).
template <bool kDecayRow, class S, class A>
TZ_INLINE Vec<A> update_row(S* row, int64_t N, A decay, A dt, const A* a, A dtx, const A* Bm, const A* C) {
  using V = Vec<A>;
  constexpr int kUnroll = 4;
  V sums[kUnroll];
  for (int u = 0; u < kUnroll; u++) sums[u] = V::zero();
  const V decay_v(decay), dt_v(dt), dtx_v(dtx);
  const auto step = [&](int64_t n) TZ_LAMBDA {
    const V factor = kDecayRow ? exp(dt_v * V::load(a + n)) : decay_v;
    const V next = fma(V::load(Bm + n), dtx_v, factor * V::load(row + n));
    next.store(row + n);
    return next;
  };
  int64_t n = 0;
  for (; n + kUnroll * V::size <= N; n += kUnroll * V::size) {
    for (int64_t byte = 0; byte < kUnroll * V::size * static_cast<int64_t>(sizeof(S)); byte += 64)
      prefetch(reinterpret_cast<const char*>(row + n) + kAhead + byte);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; u++) sums[u] = fma(step(n + u * V::size), V::load(C + n + u * V::size), sums[u]);
  }
  for (; n + V::size <= N; n += V::size) sums[0] = fma(step(n), V::load(C + n), sums[0]);
  if (n < N) {
    const V factor = kDecayRow ? exp(dt_v * load_n<A>(a + n, N - n)) : decay_v;
    const V next = fma(load_n<A>(Bm + n, N - n), dtx_v, factor * load_n<A>(row + n, N - n));
    store_n(next, row + n, N - n);
    sums[1] = fma(next, load_n<A>(C + n, N - n), sums[1]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// All rows of a head, kHeld vectors each, ld elements apart: with B and C loaded once a vector of the state costs three
// multiplications, a load and a store. No prefetch: rows this fast keep the processor's own busy.
template <class S, class A>
TZ_INLINE void update_held(S* rows, int64_t ld, int64_t P, A decay, A dt, const A* x, const A* Bm, const A* C, A* out) {
  using V = Vec<A>;
  V b[kHeld], c[kHeld];
  for (int i = 0; i < kHeld; i++) {
    b[i] = V::load(Bm + i * V::size);
    c[i] = V::load(C + i * V::size);
  }
  const V decay_v(decay);
  sum_rows(P, out, [&](int64_t r) TZ_LAMBDA {
    S* row = rows + r * ld;
    const V dtx(dt * x[r]);
    V sums[2] = {V::zero(), V::zero()};
#pragma GCC unroll 8
    for (int i = 0; i < kHeld; i++) {
      const V next = fma(b[i], dtx, decay_v * V::load(row + i * V::size));
      next.store(row + i * V::size);
      sums[i % 2] = fma(next, c[i], sums[i % 2]);
    }
    return sums[0] + sums[1];
  });
}

// The same for a bf16 row of which N is a multiple of two vectors, as even and odd elements: their halves of a 32-bit
// word need a shift or a mask, no shuffle. B and C come split in the same way (split_pairs).
TZ_INLINE Vec<float> update_row_pairs(bf16* row, int64_t N, float decay, float dtx, const float* Bm, const float* C) {
  using V = Vec<float>;
  typedef V::native native;
  typedef V::uints uints;
  const V decay_v(decay), dtx_v(dtx);
  V even_sum = V::zero(), odd_sum = V::zero();
  const auto rounded = [](uints u) TZ_LAMBDA { return u + ((u >> 16) & 1u) + 0x7fffu; };
  for (int64_t n = 0; n < N; n += 2 * V::size) {
    prefetch(reinterpret_cast<const char*>(row + n) + kAhead);
    uints raw;
    std::memcpy(&raw, row + n, sizeof(raw));
    const V even = fma(V::load(Bm + n), dtx_v, decay_v * V((native)(raw << 16)));
    const V odd = fma(V::load(Bm + n + V::size), dtx_v, decay_v * V((native)(raw & 0xffff0000u)));
    even_sum = fma(even, V::load(C + n), even_sum);
    odd_sum = fma(odd, V::load(C + n + V::size), odd_sum);
    const uints next = (rounded((uints)even.v) >> 16) | (rounded((uints)odd.v) & 0xffff0000u);
    std::memcpy(row + n, &next, sizeof(next));
    if (__builtin_expect(any_nan(even, odd), 0))
      for (int i = 0; i < V::size; i++) {
        from_acc(even.v[i], row + n + 2 * i);
        from_acc(odd.v[i], row + n + 2 * i + 1);
      }
  }
  return even_sum + odd_sum;
}
// Each pair of vectors becomes its even elements, then its odd ones. N is a multiple of two vectors.
inline void split_pairs(const float* from, int64_t N, float* to) {
  constexpr int64_t size = Vec<float>::size;
  for (int64_t n = 0; n < N; n += 2 * size)
    for (int64_t i = 0; i < size; i++) {
      to[n + i] = from[n + 2 * i];
      to[n + size + i] = from[n + 2 * i + 1];
    }
}

// The vector at base + offset in the accumulation type: where it lies if it can be used there, else copied.
template <class A> const A* as_row(DType dtype, const void* base, int64_t offset, int64_t stride, int64_t n, A* copy) {
  if (dtype == dtype_of<A>::value && stride == 1) return static_cast<const A*>(base) + offset;
  load_tile<A>(dtype, base, offset, 0, stride, 1, n, copy, n);
  return copy;
}
template <class A> A one(DType dtype, const void* base, int64_t offset) {
  A value;
  load_tile<A>(dtype, base, offset, 0, 1, 1, 1, &value, 1);
  return value;
}

// dt' and exp(dt' A) of the heads first..last of all rows, where neither varies inside a head.
template <class A> void head_steps(const StateUpdateParams& p, int64_t first, int64_t last, A* dt, A* decay) {
  using V = Vec<A>;
  for (int64_t item = first, n; item < last; item += n, dt += n, decay += n) {
    const int64_t b = item / p.H, h = item % p.H;
    n = min_of(last - item, p.H - h);
    load_tile<A>(p.dt_dtype, p.dt, b * p.dt_stride_b + h * p.dt_stride_h, 0, p.dt_stride_h, 1, n, dt, n);
    if (p.dt_bias) {
      load_tile<A>(p.param_dtype, p.dt_bias, h * p.dt_bias_stride_h, 0, p.dt_bias_stride_h, 1, n, decay, n);
      for (int64_t i = 0; i < n; i++) dt[i] += decay[i];
    }
    load_tile<A>(p.param_dtype, p.A, h * p.A_stride_h, 0, p.A_stride_h, 1, n, decay, n);
    for (int64_t i = 0; i < n; i += V::size) {
      V step = load_n<A>(dt + i, n - i);
      if (p.dt_softplus) step = softplus(step);
      store_n(step, dt + i, n - i);
      store_n(exp(step * load_n<A>(decay + i, n - i)), decay + i, n - i);
    }
  }
}

// One head of one row. per_head: dt' and exp(dt' A) are these two numbers.
template <class S>
void update_head(const StateUpdateParams& p, int64_t b, int64_t h, int64_t slot, bool per_head, acc_t<S> dt, acc_t<S> decay) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t g = h / (p.H / p.G);
  A* copies = scratch<A>(kHeadSlot, 3 * p.P + 5 * p.N);
  A* out = copies;
  A *x_copy = out + p.P, *z_copy = x_copy + p.P /* D's too */, *B_copy = z_copy + p.P, *C_copy = B_copy + p.N, *A_copy = C_copy + p.N;
  A *B_split = A_copy + p.N, *C_split = B_split + p.N;
  const A* x = as_row<A>(p.x_dtype, p.x, b * p.x_stride_b + h * p.x_stride_h, p.x_stride_p, p.P, x_copy);
  const A* Bm = as_row<A>(p.x_dtype, p.Bm, b * p.B_stride_b + g * p.B_stride_g, p.B_stride_n, p.N, B_copy);
  const A* C = as_row<A>(p.x_dtype, p.C, b * p.C_stride_b + g * p.C_stride_g, p.C_stride_n, p.N, C_copy);
  S* state = static_cast<S*>(p.state) + slot * p.state_stride_s + h * p.state_stride_h;

  if (per_head) {
    const bool pairs = dtype_of<S>::value == DType::bf16 && p.N % (2 * V::size) == 0;
    if constexpr (dtype_of<S>::value == DType::bf16) {
      if (pairs) {
        split_pairs(Bm, p.N, B_split);
        split_pairs(C, p.N, C_split);
        sum_rows(p.P, out, [&](int64_t i) TZ_LAMBDA {
          return update_row_pairs(state + i * p.state_stride_p, p.N, decay, dt * x[i], B_split, C_split);
        });
      }
    }
    const bool held = !pairs && p.N == kHeld * V::size;
    if constexpr (kHeld > 0)
      if (held) update_held(state, p.state_stride_p, p.P, decay, dt, x, Bm, C, out);
    if (!pairs && !held)
      sum_rows(p.P, out, [&](int64_t i) TZ_LAMBDA {
        return update_row<false, S, A>(state + i * p.state_stride_p, p.N, decay, dt, nullptr, dt * x[i], Bm, C);
      });
  } else {
    sum_rows(p.P, out, [&](int64_t i) TZ_LAMBDA {
      A dt = one<A>(p.dt_dtype, p.dt, b * p.dt_stride_b + h * p.dt_stride_h + i * p.dt_stride_p);
      if (p.dt_bias) dt += one<A>(p.param_dtype, p.dt_bias, h * p.dt_bias_stride_h + i * p.dt_bias_stride_p);
      if (p.dt_softplus) dt = softplus(dt);
      const A* a = as_row<A>(p.param_dtype, p.A, h * p.A_stride_h + i * p.A_stride_p, p.A_stride_n, p.N, A_copy);
      return update_row<true, S, A>(state + i * p.state_stride_p, p.N, A(0), dt, a, dt * x[i], Bm, C);
    });
  }
  if (p.D && p.D_stride_p == 0) {
    const A skip = one<A>(p.param_dtype, p.D, h * p.D_stride_h);
    for (int64_t i = 0; i < p.P; i++) out[i] += skip * x[i];
  } else if (p.D) {
    const A* skip = as_row<A>(p.param_dtype, p.D, h * p.D_stride_h, p.D_stride_p, p.P, z_copy);
    for (int64_t i = 0; i < p.P; i++) out[i] += skip[i] * x[i];
  }
  if (p.z) {
    const A* z = as_row<A>(p.x_dtype, p.z, b * p.z_stride_b + h * p.z_stride_h, p.z_stride_p, p.P, z_copy);
    for (int64_t i = 0; i < p.P; i += V::size)
      store_n(load_n<A>(out + i, p.P - i) * fast_silu(load_n<A>(z + i, p.P - i)), out + i, p.P - i);
  }
  store_tile(out, p.P, p.x_dtype, p.out, (b * p.H + h) * p.P, p.P, 1, 1, p.P);
}

template <class S> void update(const StateUpdateParams& p) {
  using A = acc_t<S>;
  const bool per_head = (p.A_stride_p == 0 || p.P == 1) && (p.A_stride_n == 0 || p.N == 1) &&
                        (p.dt_stride_p == 0 || p.P == 1) && (!p.dt_bias || p.dt_bias_stride_p == 0 || p.P == 1);
  const int64_t grain = max_of(1, kSerialElements / max_of(1, p.P * p.N));
  parallel_for(0, p.B * p.H, grain, [&](int64_t first, int64_t last) {
    A *dt = scratch<A>(kStepSlot, 2 * (last - first)), *decay = dt + (last - first);
    if (per_head) head_steps(p, first, last, dt, decay);
    for (int64_t item = first; item < last; item++) {
      const int64_t b = item / p.H, h = item % p.H;
      const int64_t slot = p.state_batch_indices ? p.state_batch_indices[b] : b;
      if (slot >= 0) {
        update_head<S>(p, b, h, slot, per_head, per_head ? dt[item - first] : A(0), per_head ? decay[item - first] : A(0));
        continue;
      }
      with_type(p.x_dtype, [&](auto t) {
        std::memset(static_cast<decltype(t)*>(p.out) + item * p.P, 0, static_cast<size_t>(p.P) * sizeof(t));
      });
    }
  });
}

}  // namespace

void state_update(const StateUpdateParams& p) {
  if (p.P == 0) return;
  with_type(p.state_dtype, [&](auto s) { update<decltype(s)>(p); });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
