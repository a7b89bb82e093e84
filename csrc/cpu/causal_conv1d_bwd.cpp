// Causal depthwise convolution, backward. With g[l] = dy[l] * act'(pre[l]), the pre-activation recomputed:
//   dx[m] = sum_w weight[w] * g[m + (W-1) - w],   dweight[w] = sum_l g[l] * x[l - (W-1) + w],   dbias = sum_l g[l].
//
// One pass over x and dy: step l computes g[l] and finishes dx[l - (W-1)], carrying the last W-1 g's from strip to
// strip. A part of a segment takes W-1 steps before its first dx (those belong to the initial state or to the part
// before) and W-1 steps after its last g. The sums over positions go to one partial result per chunk of positions,
// added up in order at the end, so they don't depend on the number of threads.
#include "causal_conv1d.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

constexpr int kRows = 8;

// Rows of T with channels adjacent.
template <class T> struct Rows {
  T* data;
  int64_t ld;
  TZ_INLINE T* row(int64_t r) const { return data + r * ld; }
};

// What one work item keeps of its channels, in the accumulation type, each row kBlockD apart.
template <class A> struct Carry {
  A* g;        // [W-1], g of the last W-1 steps, oldest first
  A* dweight;  // [W + 1], sums of this part, dbias last
  int64_t dweight_ld;
};

// n steps from step l: g[l..l+n) from x and dy, dx for l-(W-1).. into `dx` (null: nobody's), plus `add` where not null.
// kGrad: g is computed, else it is zero (past the segment's end). kSum: it counts for dweight.
template <class X, class T, class DX, class A, int W, bool kSilu, bool kGrad, bool kSum, bool kStream, int kCount>
TZ_INLINE void gradient_strip(const X* x, int64_t x_ld, const T* dy, int64_t dy_ld, DX* dx, int64_t dx_ld, const A* add,
                              const Carry<A>& carry, const A* weight, int64_t weight_ld, int64_t cols) {
  using V = Vec<A>;
  const auto one_vector = [&](int64_t c, int64_t width) TZ_LAMBDA {
    V taps[W], before[W - 1], g[W], sums[W + 1], bias;
    for (int w = 0; w < W; w++) taps[w] = load_n<A>(weight + w * weight_ld + c, width);
    for (int k = 0; k < W - 1; k++) g[k] = V::load(carry.g + k * kBlockD + c);
    if (kGrad) {
      bias = load_n<A>(weight + W * weight_ld + c, width);
      for (int k = 0; k < W - 1; k++) before[k] = load_n<A>(x + (k - (W - 1)) * x_ld + c, width);
    }
    if (kSum)
      for (int w = 0; w <= W; w++) sums[w] = V::load(carry.dweight + w * carry.dweight_ld + c);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; r++) {
      g[W - 1] = V::zero();
      if (kGrad) {
        const V now = load_n<A>(x + r * x_ld + c, width);
        g[W - 1] = load_n<A>(dy + r * dy_ld + c, width);
        if (kSilu) {
          V pre = fma(now, taps[W - 1], bias);
          for (int k = W - 2; k >= 0; k--) pre = fma(before[k], taps[k], pre);
          g[W - 1] = g[W - 1] * silu_slope(pre, fast_sigmoid(pre));
        }
        if (kSum) {
          for (int k = 0; k < W - 1; k++) sums[k] = fma(g[W - 1], before[k], sums[k]);
          sums[W - 1] = fma(g[W - 1], now, sums[W - 1]);
          sums[W] = sums[W] + g[W - 1];
        }
        for (int k = 0; k < W - 2; k++) before[k] = before[k + 1];
        before[W - 2] = now;
      }
      V out = g[0] * taps[W - 1];
      for (int k = 1; k < W; k++) out = fma(g[k], taps[W - 1 - k], out);
      for (int k = 0; k < W - 1; k++) g[k] = g[k + 1];
      if (dx) {
        if (add) out = out + V::load(add + c);
        if (kStream && width == V::size) out.stream(dx + r * dx_ld + c);
        else store_n(out, dx + r * dx_ld + c, width);
      }
    }
    for (int k = 0; k < W - 1; k++) g[k].store(carry.g + k * kBlockD + c);
    if (kSum)
      for (int w = 0; w <= W; w++) sums[w].store(carry.dweight + w * carry.dweight_ld + c);
  };
  int64_t c = 0;
  for (; c + V::size <= cols; c += V::size) one_vector(c, V::size);
  if (c < cols) one_vector(c, cols - c);
}

// One part of a segment: `rows` positions, cols channels. x, dy and dx start at its first position; `more` positions of
// the segment (at most W-1) follow it. window: the inputs of 2(W-1) positions from W-1 before the part. early[W-1]
// receives the gradients of those before the part; late: the gradients of the final state, added to the W-1 positions
// that end where the segment ends (null: none).
template <class T, class A, int W, bool kSilu, bool kStream>
void gradient_part(Rows<const T> x, Rows<const T> dy, Rows<T> dx, const A* window, A* early, const A* late, int64_t rows,
                   int64_t more, const Carry<A>& carry, const A* weight, int64_t weight_ld, int64_t cols) {
  fill_tile(carry.g, kBlockD, W - 1, ceil_div(cols, Vec<A>::size) * Vec<A>::size, A(0));
  const int64_t steps = rows + W - 1, length = rows + more;  // length: positions with a g
  // First W-1 steps: inputs from the window, results to `early`.
  int64_t l = 0;
  for (; l < W - 1; l++) {
    const A* in = window + (l + W - 1) * kBlockD;
    const T* grad = dy.row(l);
    A* out = early + l * kBlockD;
    const A* add = late && l - (W - 1) >= length - (W - 1) ? late + (l - length) * kBlockD : nullptr;
    if (l < rows)
      gradient_strip<A, T, A, A, W, kSilu, true, true, false, 1>(in, kBlockD, grad, dy.ld, out, kBlockD, add, carry, weight, weight_ld, cols);
    else if (l < length)
      gradient_strip<A, T, A, A, W, kSilu, true, false, false, 1>(in, kBlockD, grad, dy.ld, out, kBlockD, add, carry, weight, weight_ld, cols);
    else
      gradient_strip<A, T, A, A, W, kSilu, false, false, false, 1>(in, kBlockD, grad, dy.ld, out, kBlockD, add, carry, weight, weight_ld, cols);
  }
  for (; l + kRows <= rows; l += kRows)
    gradient_strip<T, T, T, A, W, kSilu, true, true, kStream, kRows>(x.row(l), x.ld, dy.row(l), dy.ld, dx.row(l - (W - 1)), dx.ld,
                                                                     nullptr, carry, weight, weight_ld, cols);
  for (; l < rows; l++)
    gradient_strip<T, T, T, A, W, kSilu, true, true, kStream, 1>(x.row(l), x.ld, dy.row(l), dy.ld, dx.row(l - (W - 1)), dx.ld,
                                                                 nullptr, carry, weight, weight_ld, cols);
  // Last W-1 steps: positions after the part, or past the segment's end.
  for (; l < steps; l++) {
    T* out = dx.row(l - (W - 1));
    const A* add = late && l >= length ? late + (l - length) * kBlockD : nullptr;
    if (l < length)
      gradient_strip<T, T, T, A, W, kSilu, true, false, kStream, 1>(x.row(l), x.ld, dy.row(l), dy.ld, out, dx.ld, add, carry, weight, weight_ld, cols);
    else
      gradient_strip<T, T, T, A, W, kSilu, false, false, kStream, 1>(nullptr, 0, nullptr, 0, out, dx.ld, add, carry, weight, weight_ld, cols);
  }
}

// dinitial_states of the segment's slot: rows[W-1] of channels d..d+cols.
template <class A> void store_dinitial(const CausalConv1dParams& p, const Segment& segment, const A* rows, int64_t d, int64_t cols) {
  store_tile(rows, kBlockD, p.state_dtype, p.dinitial_states, segment.init * p.dinit_stride_s + d * p.dinit_stride_d,
             p.dinit_stride_w, p.dinit_stride_d, p.W - 1, cols);
}
template <class A> void load_dfinal(const CausalConv1dParams& p, const Segment& segment, A* rows, int64_t d, int64_t cols) {
  load_tile<A>(p.state_dtype, p.dfinal_states, segment.final * p.dfinal_stride_s + d * p.dfinal_stride_d,
               p.dfinal_stride_w, p.dfinal_stride_d, p.W - 1, cols, rows, kBlockD);
}

// Positions begin..end of a segment, channels d..d+cols; dweight: this chunk's sums of these channels.
template <class T, int W, bool kSilu>
void backward_part(const CausalConv1dParams& p, const Segment& segment, int64_t begin, int64_t end, int64_t d, int64_t cols,
                   const acc_t<T>* weight, acc_t<T>* dweight, bool direct, bool stream) {
  using A = acc_t<T>;
  A* window = scratch<A>(kWindowSlot, 2 * (W - 1) * kBlockD);
  A* rows = scratch<A>(kCarrySlot, 3 * (W - 1) * kBlockD);
  A* early = rows + (W - 1) * kBlockD;
  A* late_rows = early + (W - 1) * kBlockD;
  const T* x = static_cast<const T*>(p.x) + segment.batch * p.x_stride_b + d * p.x_stride_d;
  const T* dy = static_cast<const T*>(p.dy) + segment.batch * p.dy_stride_b + d * p.dy_stride_d;
  T* dx = static_cast<T*>(p.dx) + segment.batch * p.dx_stride_b + d * p.dx_stride_d;
  const bool has_late = p.dfinal_states && segment.final >= 0;
  const bool has_early = p.dinitial_states && segment.init >= 0;

  // One piece of the part: all of it where memory is channel-last, a tile otherwise.
  const auto piece = [&](int64_t l, int64_t n, int64_t c, int64_t width, auto run) {
    const int64_t more = min_of(W - 1, segment.end - (l + n));
    // `late` reaches W-1 positions back from the segment's end: into this piece where it ends fewer positions before.
    const A* late = nullptr;
    if (has_late && more < W - 1) {
      load_dfinal<A>(p, segment, late_rows, d + c, width);
      late = late_rows;
    }
    load_inputs<T>(p, segment, l - (W - 1), 2 * (W - 1), d + c, width, window, kBlockD);
    const Carry<A> carry{rows, dweight + c, p.D};
    run(late, more, carry);
    if (has_early && l == segment.begin) store_dinitial<A>(p, segment, early, d + c, width);
  };

  if (direct) {
    piece(begin, end - begin, 0, cols, [&](const A* late, int64_t more, const Carry<A>& carry) {
      const auto part = stream ? gradient_part<T, A, W, kSilu, true> : gradient_part<T, A, W, kSilu, false>;
      part({x + begin * p.x_stride_l, p.x_stride_l}, {dy + begin * p.dy_stride_l, p.dy_stride_l},
           {dx + begin * p.dx_stride_l, p.dx_stride_l}, window, early, late, end - begin, more, carry, weight + d, p.D, cols);
    });
    return;
  }
  A* x_tile = scratch<A>(kTileSlot, (kTileL + 2 * (W - 1)) * kTileD);
  A* dy_tile = scratch<A>(kTile2Slot, (kTileL + W - 1) * kTileD);
  A* dx_tile = scratch<A>(kTile3Slot, kTileL * kTileD);
  for (int64_t c = 0; c < cols; c += kTileD)
    for (int64_t l = begin; l < end; l += kTileL) {
      const int64_t width = min_of(kTileD, cols - c), n = min_of(kTileL, end - l);
      piece(l, n, c, width, [&](const A* late, int64_t more, const Carry<A>& carry) {
        load_inputs<T>(p, segment, l - (W - 1), n + more + W - 1, d + c, width, x_tile, kTileD);
        load_tile<A>(dy + c * p.dy_stride_d + l * p.dy_stride_l, p.dy_stride_l, p.dy_stride_d, n + more, width, dy_tile, kTileD);
        gradient_part<A, A, W, kSilu, false>({x_tile + (W - 1) * kTileD, kTileD}, {dy_tile, kTileD}, {dx_tile, kTileD}, window,
                                             early, late, n, more, carry, weight + d + c, p.D, width);
        store_tile(dx_tile, kTileD, dx + c * p.dx_stride_d + l * p.dx_stride_l, p.dx_stride_l, p.dx_stride_d, n, width);
      });
    }
}

// An empty segment hands its final state through to its initial state.
template <class A> void empty_segments(const CausalConv1dParams& p) {
  if (!p.dinitial_states) return;
  A* rows = scratch<A>(kCarrySlot, (p.W - 1) * kBlockD);
  for (int64_t s = 0; s < p.num_segments; s++) {
    const Segment& segment = p.segments[s];
    if (segment.init < 0 || (segment.begin < segment.end && !segment.padding)) continue;
    for (int64_t d = 0; d < p.D; d += kBlockD) {
      const int64_t cols = min_of(kBlockD, p.D - d);
      if (p.dfinal_states && segment.final >= 0 && !segment.padding) load_dfinal<A>(p, segment, rows, d, cols);
      else fill_tile(rows, kBlockD, p.W - 1, cols, A(0));
      store_dinitial<A>(p, segment, rows, d, cols);
    }
  }
}

// dweight[D][W] and dbias[D] from partial[chunks][W + 1][D], chunk by chunk in order.
template <class A> void reduce_partials(const CausalConv1dParams& p, const A* partial, int64_t chunks) {
  const int64_t stride = (p.W + 1) * p.D;
  parallel_for(0, ceil_div(p.D, kTileD), 8, [&](int64_t first, int64_t last) {
    alignas(64) A sums[5 * kTileD];
    for (int64_t block = first; block < last; block++) {
      const int64_t d = block * kTileD, cols = min_of(kTileD, p.D - d);
      fill_tile(sums, kTileD, p.W + 1, cols, A(0));
      for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t w = 0; w <= p.W; w++) {
          const A* part = partial + chunk * stride + w * p.D + d;
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

template <class T> void backward(const CausalConv1dParams& p) {
  using A = acc_t<T>;
  const ConvChunks chunks = make_chunks(p, 128, 64);
  A* weight = scratch<A>(kWeightSlot, (p.W + 1) * p.D);
  load_weights(p, weight, p.D);
  const int64_t partial_size = (p.W + 1) * p.D;
  A* partial = scratch<A>(kPartialSlot, chunks.count * partial_size);
  const bool direct = p.x_stride_d == 1 && p.dy_stride_d == 1 && p.dx_stride_d == 1;
  const bool stream = direct && chunks.total * p.D * static_cast<int64_t>(sizeof(T)) > kStreamBytes &&
                      rows_aligned<T>(p.dx, p.dx_stride_b, p.dx_stride_l);
  const int64_t blocks = ceil_div(p.D, kBlockD);
  with_conv_variant(p.W, p.silu, [&](auto width, auto silu) {
    const int64_t grain = max_of(1, 32768 / (chunks.length * min_of(kBlockD, p.D)));
    parallel_for(0, chunks.count * blocks, grain, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; item++) {
        const int64_t chunk = item / blocks, d = item % blocks * kBlockD, cols = min_of(kBlockD, p.D - d);
        A* dweight = partial + chunk * partial_size + d;
        fill_tile(dweight, p.D, p.W + 1, cols, A(0));
        for_each_part(p, chunks, chunk, [&](const Segment& segment, int64_t begin, int64_t end) {
          if (segment.padding) return zero_part<T>(p, segment, begin, end, d, cols);
          backward_part<T, decltype(width)::value, decltype(silu)::value>(p, segment, begin, end, d, cols, weight, dweight,
                                                                           direct, stream);
        });
      }
      if (stream) stream_fence();
    });
  });
  empty_segments<A>(p);
  reduce_partials(p, partial, chunks.count);
}

}  // namespace

void causal_conv1d_bwd(const CausalConv1dParams& p) {
  if (p.D == 0) return;
  with_type(p.x_dtype, [&](auto t) { backward<decltype(t)>(p); });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
