// Causal depthwise convolution, backward. With g[l] = dy[l] * act'(pre[l]), the pre-activation recomputed:
//   dx[m] = sum_w weight[w] * g[m + (W-1) - w],   dweight[w] = sum_l g[l] * x[l - (W-1) + w],   dbias = sum_l g[l].
//
// Strip by strip over x and dy: step l computes g[l], then finishes dx[l - (W-1)], carrying the last W-1 g's from strip to
// strip. A part of a segment takes W-1 steps before its first dx (those finish the gradient of the initial state, or
// rows of the part before) and W-1 steps after its last g that counts. As in the forward, strips of kRows steps read
// channel-last memory as it lies and everything else goes through tiles in L1.
// The sums over positions go to one partial result per chunk of positions, added up in order at the end, so they
// don't depend on the number of threads.
#include "causal_conv1d.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

constexpr int kRows = 4;
// Channels of one work item: what is kept of them stays in L1 beside the strip's rows.
constexpr int64_t kGradD = 256;

// What is kept of a work item's channels from step to step, kKept vectors for each vector of channels: W taps and the
// bias, W + 1 sums (dweight and dbias of this chunk), g of the last W-1 steps, oldest first, and of the strip's.
template <int W> constexpr int kSums = W + 1;
template <int W> constexpr int kCarry = 2 * W + 2;
template <int W> constexpr int kKept = kCarry<W> + W - 1 + kRows;

// g of kCount steps: row 0 of x and dy is the first. cols is a multiple of kPair.
template <class T, class A, int W, bool kSilu, int kCount>
__attribute__((noinline)) void slope_strip(const T* x_row, int64_t x_ld, const T* dy_row, int64_t dy_ld, A* kept, int64_t cols) {
  using V = Vec<A>;
  const Rows<const T> x(x_row, x_ld), before(x_row - (W - 1) * x_ld, x_ld), dy(dy_row, dy_ld);
  for (int64_t c = 0; c < cols; c += V::size) {
    A* block = kept + c * kKept<W>;
    A* g = block + (kCarry<W> + W - 1) * V::size;
    if (kCount > 1)
      for (int r = 0; r < kCount; r++) {
        prefetch(x.at(kCount + r) + c);
        prefetch(dy.at(kCount + r) + c);
      }
    V pre[kCount], s[kCount];
    if (kSilu) {
#pragma GCC unroll 8
      for (int r = 0; r < kCount; r++) pre[r] = V::load(block + W * V::size);
#pragma GCC unroll 4
      for (int w = 0; w < W; w++) {
        const V tap = V::load(block + w * V::size);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; r++)
          pre[r] = fma(V::load((r + w < W - 1 ? before.at(r + w) : x.at(r + w - (W - 1))) + c), tap, pre[r]);
      }
      fast_sigmoid<kCount>(pre, s);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; r++) {
      const V grad = V::load(dy.at(r) + c);
      (kSilu ? grad * silu_slope(pre[r], s[r]) : grad).store(g + r * V::size);
    }
  }
}

// The sums and dx of kCount steps from their g; row 0 of x is the first step, row 0 of dx is the input W-1 positions before
// it. kSum: the steps count for dweight and dbias. A phase of its own, so that neither has more live values than registers,
// nor one chain of operations so long that the next vector's doesn't fit beside it in the processor's window.
template <class T, class A, int W, bool kSum, bool kStream, int kCount>
__attribute__((noinline)) void sum_strip(const T* x_row, int64_t x_ld, T* dx_row, int64_t dx_ld, A* kept, int64_t cols) {
  using V = Vec<A>;
  const Rows<const T> x(x_row, x_ld), before(x_row - (W - 1) * x_ld, x_ld);
  const Rows<T> dx(dx_row, dx_ld);
  for (int64_t c = 0; c < cols; c += kPair<A>) {
    V out[2][kCount];
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      const int64_t at = c + v * V::size;
      A* block = kept + at * kKept<W>;
      A* carry = block + kCarry<W> * V::size;
      V g[kCount + W - 1];
#pragma GCC unroll 16
      for (int r = 0; r < kCount + W - 1; r++) g[r] = V::load(carry + r * V::size);
      if (kSum) {
#pragma GCC unroll 5
        for (int w = 0; w <= W; w++) {
          A* at_sum = block + (kSums<W> + w) * V::size;
          V sum = V::load(at_sum);
#pragma GCC unroll 8
          for (int r = 0; r < kCount; r++)
            sum = w == W ? sum + g[W - 1 + r]
                         : fma(g[W - 1 + r], V::load((r + w < W - 1 ? before.at(r + w) : x.at(r + w - (W - 1))) + at), sum);
          sum.store(at_sum);
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < W; k++) {
        const V tap = V::load(block + (W - 1 - k) * V::size);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; r++) out[v][r] = k == 0 ? g[r] * tap : fma(g[r + k], tap, out[v][r]);
      }
#pragma GCC unroll 4
      for (int k = 0; k < W - 1; k++) g[kCount + k].store(carry + k * V::size);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; r++) store_pair<kStream>(out[0][r], out[1][r], dx.at(r) + c);
  }
}

// kCount steps of all of a work item's channels.
template <class T, class A, int W, bool kSilu, bool kSum, bool kStream, int kCount>
TZ_INLINE void gradient_strip(const T* x, int64_t x_ld, const T* dy, int64_t dy_ld, T* dx, int64_t dx_ld, A* kept, int64_t cols) {
  slope_strip<T, A, W, kSilu, kCount>(x, x_ld, dy, dy_ld, kept, cols);
  sum_strip<T, A, W, kSum, kStream, kCount>(x, x_ld, dx, dx_ld, kept, cols);
}

// Positions begin..end of a segment: steps run from 0 at `begin` to end - begin + W-1.
struct Part {
  const Segment& segment;
  int64_t begin, end;
};

// rows[n][kTileD] are finished gradients of the inputs at steps from, from+1, ..: adds what comes from the final
// state, then stores them to dinitial_states or dx.
template <class T, class A>
void store_gradients(const CausalConv1dParams& p, const Part& part, A* rows, int64_t from, int64_t n, int64_t d, int64_t cols) {
  const Segment& segment = part.segment;
  const int64_t remaining = segment.end - part.begin;  // the step that finishes the first input of the final state
  const int64_t late = max_of(0, remaining - from);
  if (p.dfinal_states && segment.final >= 0 && late < n) {
    alignas(64) A dfinal[3 * kTileD];
    load_tile<A>(p.state_dtype, p.dfinal_states,
                 segment.final * p.dfinal_stride_s + d * p.dfinal_stride_d + (from + late - remaining) * p.dfinal_stride_w,
                 p.dfinal_stride_w, p.dfinal_stride_d, n - late, cols, dfinal, kTileD);
    for (int64_t r = late; r < n; r++)
      for (int64_t c = 0; c < cols; c++) rows[r * kTileD + c] += dfinal[(r - late) * kTileD + c];
  }
  const int64_t early = min_of(n, max_of(0, p.W - 1 - from));
  if (early > 0 && part.begin == segment.begin && p.dinitial_states && segment.init >= 0)
    store_tile(rows, kTileD, p.state_dtype, p.dinitial_states,
               segment.init * p.dinit_stride_s + d * p.dinit_stride_d + from * p.dinit_stride_w, p.dinit_stride_w,
               p.dinit_stride_d, early, cols);
  T* dx = static_cast<T*>(p.dx) + segment.batch * p.dx_stride_b + d * p.dx_stride_d;
  store_tile(rows + early * kTileD, kTileD, dx + (part.begin + from + early - (p.W - 1)) * p.dx_stride_l, p.dx_stride_l,
             p.dx_stride_d, n - early, cols);
}

// Steps from..to of a part, channels d..d+cols, through tiles. `kept` starts at channel d.
template <class T, int W, bool kSilu>
void gradient_tiles(const CausalConv1dParams& p, const Part& part, int64_t from, int64_t to, int64_t d, int64_t cols,
                    acc_t<T>* kept) {
  using A = acc_t<T>;
  A* in = scratch<A>(kInputSlot, (kTileL + W - 1) * kTileD);
  A* grad = scratch<A>(kGradSlot, kTileL * kTileD);
  A* out = scratch<A>(kOutputSlot, kTileL * kTileD);
  const int64_t counted = part.end - part.begin, inside = part.segment.end - part.begin;
  for (int64_t c = 0; c < cols; c += kTileD)
    for (int64_t l = from; l < to; l += kTileL) {
      const int64_t width = min_of(kTileD, cols - c), n = min_of(kTileL, to - l);
      const int64_t whole = ceil_div(width, kPair<A>) * kPair<A>;
      load_inputs<T>(p, part.segment, part.begin + l - (W - 1), n + W - 1, d + c, width, in, kTileD);
      const int64_t has_grad = max_of(0, min_of(n, inside - l));  // no gradient comes from beyond the segment
      load_tile<A>(static_cast<const T*>(p.dy) + part.segment.batch * p.dy_stride_b + (d + c) * p.dy_stride_d +
                       (part.begin + l) * p.dy_stride_l,
                   p.dy_stride_l, p.dy_stride_d, has_grad, width, grad, kTileD);
      fill_tile(grad + has_grad * kTileD, kTileD, n - has_grad, width, A(0));
      const A* x = in + (W - 1) * kTileD;
      A* here = kept + c * kKept<W>;
      const int64_t sums = max_of(0, min_of(n, counted - l));
      int64_t r = 0;
      for (; r + kRows <= sums; r += kRows)
        gradient_strip<A, A, W, kSilu, true, false, kRows>(x + r * kTileD, kTileD, grad + r * kTileD, kTileD, out + r * kTileD,
                                                           kTileD, here, whole);
      for (; r < sums; r++)
        gradient_strip<A, A, W, kSilu, true, false, 1>(x + r * kTileD, kTileD, grad + r * kTileD, kTileD, out + r * kTileD,
                                                       kTileD, here, whole);
      for (; r < n; r++)
        gradient_strip<A, A, W, kSilu, false, false, 1>(x + r * kTileD, kTileD, grad + r * kTileD, kTileD, out + r * kTileD,
                                                        kTileD, here, whole);
      store_gradients<T>(p, part, out, l, n, d + c, width);
    }
}

// All steps of a part, straight from memory where that is channel-last.
template <class T, int W, bool kSilu>
void gradient_part(const CausalConv1dParams& p, const Part& part, int64_t d, int64_t cols, acc_t<T>* kept, bool direct,
                   bool stream) {
  using A = acc_t<T>;
  constexpr int64_t V = Vec<A>::size;
  for (int64_t c = 0; c < cols; c += V) fill_tile(kept + c * kKept<W> + kCarry<W> * V, V, W - 1, V, A(0));
  const int64_t counted = part.end - part.begin, steps = counted + W - 1;
  const int64_t whole = direct ? cols / kPair<A> * kPair<A> : 0;
  if (whole > 0) {
    const Segment& segment = part.segment;
    const T* x = static_cast<const T*>(p.x) + segment.batch * p.x_stride_b + d + part.begin * p.x_stride_l;
    const T* dy = static_cast<const T*>(p.dy) + segment.batch * p.dy_stride_b + d + part.begin * p.dy_stride_l;
    T* dx = static_cast<T*>(p.dx) + segment.batch * p.dx_stride_b + d + part.begin * p.dx_stride_l;
    int64_t l = W - 1;
    gradient_tiles<T, W, kSilu>(p, part, 0, l, d, whole, kept);
    for (; l + kRows <= counted; l += kRows) {
      const T *in = x + l * p.x_stride_l, *grad = dy + l * p.dy_stride_l;
      T* out = dx + (l - (W - 1)) * p.dx_stride_l;
      if (stream)
        gradient_strip<T, A, W, kSilu, true, true, kRows>(in, p.x_stride_l, grad, p.dy_stride_l, out, p.dx_stride_l, kept, whole);
      else
        gradient_strip<T, A, W, kSilu, true, false, kRows>(in, p.x_stride_l, grad, p.dy_stride_l, out, p.dx_stride_l, kept, whole);
    }
    gradient_tiles<T, W, kSilu>(p, part, l, steps, d, whole, kept);
  }
  if (whole < cols) gradient_tiles<T, W, kSilu>(p, part, 0, steps, d + whole, cols - whole, kept + whole * kKept<W>);
}

// An empty or padding segment: its initial state gets what comes from its final state, or zeros.
template <class A> void empty_segments(const CausalConv1dParams& p) {
  if (!p.dinitial_states) return;
  A* rows = scratch<A>(kCarrySlot, (p.W - 1) * kBlockD);
  for (int64_t s = 0; s < p.num_segments; s++) {
    const Segment& segment = p.segments[s];
    if (segment.init < 0 || (segment.begin < segment.end && !segment.padding)) continue;
    for (int64_t d = 0; d < p.D; d += kBlockD) {
      const int64_t cols = min_of(kBlockD, p.D - d);
      if (p.dfinal_states && segment.final >= 0 && !segment.padding)
        load_tile<A>(p.state_dtype, p.dfinal_states, segment.final * p.dfinal_stride_s + d * p.dfinal_stride_d,
                     p.dfinal_stride_w, p.dfinal_stride_d, p.W - 1, cols, rows, kBlockD);
      else
        fill_tile(rows, kBlockD, p.W - 1, cols, A(0));
      store_tile(rows, kBlockD, p.state_dtype, p.dinitial_states, segment.init * p.dinit_stride_s + d * p.dinit_stride_d,
                 p.dinit_stride_w, p.dinit_stride_d, p.W - 1, cols);
    }
  }
}

// dweight[D][W] and dbias[D] from partial[chunks][W + 1][ld], chunk by chunk in order.
template <class A> void reduce_partials(const CausalConv1dParams& p, const A* partial, int64_t ld, int64_t chunks) {
  parallel_for(0, ceil_div(p.D, kTileD), 8, [&](int64_t first, int64_t last) {
    alignas(64) A sums[5 * kTileD];
    for (int64_t block = first; block < last; block++) {
      const int64_t d = block * kTileD, cols = min_of(kTileD, p.D - d);
      fill_tile(sums, kTileD, p.W + 1, cols, A(0));
      for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t w = 0; w <= p.W; w++) {
          const A* part = partial + (chunk * (p.W + 1) + w) * ld + d;
          for (int64_t c = 0; c < cols; c++) sums[w * kTileD + c] += part[c];
        }
      if (p.dweight) store_tile(sums, kTileD, static_cast<A*>(p.dweight) + d * p.W, 1, p.W, p.W, cols);
      if (p.dbias) store_tile(sums + p.W * kTileD, kTileD, static_cast<A*>(p.dbias) + d, 0, 1, 1, cols);
    }
  });
}

template <class T> void zero_part(const CausalConv1dParams& p, const Segment& segment, int64_t begin, int64_t end, int64_t d, int64_t cols) {
  T* dx = static_cast<T*>(p.dx) + segment.batch * p.dx_stride_b;
  T zero;
  std::memset(&zero, 0, sizeof(T));
  for (int64_t l = begin; l < end; l++)
    for (int64_t c = d; c < d + cols; c++) dx[l * p.dx_stride_l + c * p.dx_stride_d] = zero;
}

template <int W, class A> void zero_sums(A* kept, int64_t cols) {
  constexpr int64_t V = Vec<A>::size;
  for (int64_t c = 0; c < cols; c += V) fill_tile(kept + c * kKept<W> + kSums<W> * V, V, W + 1, V, A(0));
}
// partial[W + 1][ld] of one chunk, from its first channel on.
template <int W, class A> void store_sums(const A* kept, int64_t cols, A* partial, int64_t ld) {
  constexpr int64_t V = Vec<A>::size;
  for (int64_t c = 0; c < cols; c += V)
    for (int w = 0; w <= W; w++) Vec<A>::load(kept + c * kKept<W> + (kSums<W> + w) * V).store(partial + w * ld + c);
}

template <class T> void backward(const CausalConv1dParams& p) {
  using A = acc_t<T>;
  const ConvChunks chunks = make_chunks(p, 128, 64);
  const int64_t ld = padded(p.D);
  A* partial = scratch<A>(kPartialSlot, chunks.count * (p.W + 1) * ld);
  const bool direct = p.x_stride_d == 1 && p.dy_stride_d == 1 && p.dx_stride_d == 1;
  const bool stream = direct && chunks.total * p.D * static_cast<int64_t>(sizeof(T)) > kStreamBytes &&
                      rows_aligned<T>(p.dx, p.dx_stride_b, p.dx_stride_l);
  const int64_t blocks = ceil_div(p.D, kGradD);
  with_conv_variant(p.W, p.silu, [&](auto width, auto silu) {
    constexpr int W = decltype(width)::value;
    const int64_t grain = max_of(1, 32768 / (chunks.length * min_of(kGradD, p.D)));
    parallel_for(0, chunks.count * blocks, grain, [&](int64_t first, int64_t last) {
      A* kept = scratch<A>(kCarrySlot, kKept<W> * kGradD);
      for (int64_t item = first; item < last; item++) {
        const int64_t chunk = item / blocks, d = item % blocks * kGradD, cols = min_of(kGradD, p.D - d);
        load_weights(p, d, cols, kKept<W>, kept);
        zero_sums<W>(kept, cols);
        for_each_part(p, chunks, chunk, [&](const Segment& segment, int64_t begin, int64_t end) {
          if (segment.padding) return zero_part<T>(p, segment, begin, end, d, cols);
          gradient_part<T, W, decltype(silu)::value>(p, Part{segment, begin, end}, d, cols, kept, direct, stream);
        });
        store_sums<W>(kept, cols, partial + chunk * (W + 1) * ld + d, ld);
      }
      if (stream) stream_fence();
    });
  });
  empty_segments<A>(p);
  reduce_partials(p, partial, ld, chunks.count);
}

}  // namespace

void causal_conv1d_bwd(const CausalConv1dParams& p) {
  if (p.D == 0) return;
  with_type(p.x_dtype, [&](auto t) { backward<decltype(t)>(p); });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
