// Causal depthwise convolution, forward: y[l] = act(bias + sum_w weight[w] * x[l - (W-1) + w]) per channel.
//
// Channel-last memory is read as it lies: strips of kRows positions, one vector of channels at a time, the taps and
// the W-1 inputs before in registers. Other layouts pass through transposed tiles of kTileL x kTileD in L1 and the
// same strip code. The first W-1 positions of a segment read its initial state (or zeros) instead of x.
#include "causal_conv1d.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

constexpr int kRows = 4;

// y[n][cols] from x[n][cols] and the W-1 rows before: history[W-1][history_ld], or x's own rows where it is null.
template <class T, class A, int W, bool kSilu, bool kStream, int kCount>
TZ_INLINE void conv_strip(const T* x, int64_t x_ld, T* y, int64_t y_ld, const A* history, int64_t history_ld,
                          const A* weight, int64_t weight_ld, int64_t n, int64_t cols) {
  using V = Vec<A>;
  const auto one_vector = [&](int64_t c, int64_t width) TZ_LAMBDA {
    V taps[W], before[W - 1];
    for (int w = 0; w < W; w++) taps[w] = load_n<A>(weight + w * weight_ld + c, width);
    const V bias = load_n<A>(weight + W * weight_ld + c, width);
    for (int k = 0; k < W - 1; k++)
      before[k] = history ? load_n<A>(history + k * history_ld + c, width)
                          : load_n<A>(x + (k - (W - 1)) * x_ld + c, width);
    const auto one_row = [&](int64_t r) TZ_LAMBDA {
      const V now = load_n<A>(x + r * x_ld + c, width);
      V sum = fma(now, taps[W - 1], bias);
      for (int k = W - 2; k >= 0; k--) sum = fma(before[k], taps[k], sum);
      for (int k = 0; k < W - 2; k++) before[k] = before[k + 1];
      before[W - 2] = now;
      if (kSilu) sum = fast_silu(sum);
      if (kStream && width == V::size) sum.stream(y + r * y_ld + c);
      else store_n(sum, y + r * y_ld + c, width);
    };
    if (kCount > 0) {
#pragma GCC unroll 8
      for (int r = 0; r < kCount; r++) one_row(r);
    } else {
      for (int64_t r = 0; r < n; r++) one_row(r);
    }
  };
  int64_t c = 0;
  for (; c + V::size <= cols; c += V::size) one_vector(c, V::size);
  if (c < cols) one_vector(c, cols - c);
}

template <class T, class A, int W, bool kSilu, bool kStream>
void conv_rows(const T* x, int64_t x_ld, T* y, int64_t y_ld, const A* history, int64_t history_ld, const A* weight,
               int64_t weight_ld, int64_t rows, int64_t cols) {
  for (int64_t l = 0; l < rows; l += kRows) {
    const int64_t n = min_of(kRows, rows - l);
    const A* before = l == 0 ? history : nullptr;
    if (n == kRows)
      conv_strip<T, A, W, kSilu, kStream, kRows>(x + l * x_ld, x_ld, y + l * y_ld, y_ld, before, history_ld, weight,
                                                 weight_ld, n, cols);
    else
      conv_strip<T, A, W, kSilu, kStream, 0>(x + l * x_ld, x_ld, y + l * y_ld, y_ld, before, history_ld, weight, weight_ld,
                                             n, cols);
  }
}

// Positions begin..end of a segment, channels d..d+cols.
template <class T, int W, bool kSilu>
void conv_part(const CausalConv1dParams& p, const Segment& segment, int64_t begin, int64_t end, int64_t d, int64_t cols,
               const acc_t<T>* weight, int64_t weight_ld, bool direct, bool stream) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(p.x) + segment.batch * p.x_stride_b + d * p.x_stride_d;
  T* y = static_cast<T*>(p.y) + segment.batch * p.y_stride_b + d * p.y_stride_d;
  if (direct) {
    const A* history = nullptr;
    if (begin - segment.begin < W - 1) {
      A* window = scratch<A>(kWindowSlot, (W - 1) * kBlockD);
      load_inputs<T>(p, segment, begin - (W - 1), W - 1, d, cols, window, kBlockD);
      history = window;
    }
    const auto rows = stream ? conv_rows<T, A, W, kSilu, true> : conv_rows<T, A, W, kSilu, false>;
    return rows(x + begin * p.x_stride_l, p.x_stride_l, y + begin * p.y_stride_l, p.y_stride_l, history, kBlockD,
                weight + d, weight_ld, end - begin, cols);
  }
  A* in = scratch<A>(kTileSlot, (kTileL + W - 1) * kTileD);
  A* out = scratch<A>(kTile2Slot, kTileL * kTileD);
  for (int64_t c = 0; c < cols; c += kTileD)
    for (int64_t l = begin; l < end; l += kTileL) {
      const int64_t tile_cols = min_of(kTileD, cols - c), tile_rows = min_of(kTileL, end - l);
      load_inputs<T>(p, segment, l - (W - 1), tile_rows + W - 1, d + c, tile_cols, in, kTileD);
      conv_rows<A, A, W, kSilu, false>(in + (W - 1) * kTileD, kTileD, out, kTileD, nullptr, 0, weight + d + c, weight_ld,
                                       tile_rows, tile_cols);
      store_tile(out, kTileD, y + c * p.y_stride_d + l * p.y_stride_l, p.y_stride_l, p.y_stride_d, tile_rows, tile_cols);
    }
}

template <class T> void zero_part(const CausalConv1dParams& p, const Segment& segment, int64_t begin, int64_t end, int64_t d, int64_t cols) {
  T* y = static_cast<T*>(p.y) + segment.batch * p.y_stride_b;
  T zero;
  std::memset(&zero, 0, sizeof(T));
  if (p.y_stride_d == 1) {
    for (int64_t l = begin; l < end; l++)
      for (int64_t c = d; c < d + cols; c++) y[l * p.y_stride_l + c] = zero;
  } else {
    for (int64_t c = d; c < d + cols; c++)
      for (int64_t l = begin; l < end; l++) y[l * p.y_stride_l + c * p.y_stride_d] = zero;
  }
}

template <class T> void store_final_states(const CausalConv1dParams& p) {
  using A = acc_t<T>;
  const int64_t width = p.W - 1, blocks = ceil_div(p.D, kBlockD);
  parallel_for(0, p.num_segments * blocks, 8, [&](int64_t first, int64_t last) {
    A* window = scratch<A>(kWindowSlot, 3 * kBlockD);
    for (int64_t item = first; item < last; item++) {
      const Segment& segment = p.segments[item / blocks];
      if (segment.final < 0) continue;
      const int64_t d = item % blocks * kBlockD, cols = min_of(kBlockD, p.D - d);
      load_inputs<T>(p, segment, segment.end - width, width, d, cols, window, kBlockD);
      store_tile(window, kBlockD, p.state_dtype, p.final_states, segment.final * p.final_stride_s + d * p.final_stride_d,
                 p.final_stride_w, p.final_stride_d, width, cols);
    }
  });
}

template <class T> void forward(const CausalConv1dParams& p) {
  using A = acc_t<T>;
  const ConvChunks chunks = make_chunks(p, 64, 1 << 20);
  A* weight = scratch<A>(kWeightSlot, (p.W + 1) * p.D);
  load_weights(p, weight, p.D);
  const bool direct = p.x_stride_d == 1 && p.y_stride_d == 1;
  const bool stream = direct && chunks.total * p.D * static_cast<int64_t>(sizeof(T)) > kStreamBytes &&
                      rows_aligned<T>(p.y, p.y_stride_b, p.y_stride_l);
  const int64_t blocks = ceil_div(p.D, kBlockD);
  with_conv_variant(p.W, p.silu, [&](auto width, auto silu) {
    // About 20 us of work for a thread to be worth waking.
    const int64_t grain = max_of(1, 65536 / (chunks.length * min_of(kBlockD, p.D)));
    parallel_for(0, chunks.count * blocks, grain, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; item++) {
        const int64_t d = item % blocks * kBlockD, cols = min_of(kBlockD, p.D - d);
        for_each_part(p, chunks, item / blocks, [&](const Segment& segment, int64_t begin, int64_t end) {
          if (segment.padding) return zero_part<T>(p, segment, begin, end, d, cols);
          conv_part<T, decltype(width)::value, decltype(silu)::value>(p, segment, begin, end, d, cols, weight, p.D, direct,
                                                                       stream);
        });
      }
      if (stream) stream_fence();
    });
  });
  if (p.final_states) store_final_states<T>(p);
}

}  // namespace

void causal_conv1d_fwd(const CausalConv1dParams& p) {
  if (p.D == 0) return;
  with_type(p.x_dtype, [&](auto t) { forward<decltype(t)>(p); });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
