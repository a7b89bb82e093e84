// Causal depthwise convolution, forward: y[l] = act(bias + sum_w weight[w] * x[l - (W-1) + w]) per channel.
//
// Channel-last memory is read as it lies: strips of kRows positions by two vectors of channels, whose
// activations run side by side. Everything else - other layouts, the first W-1 positions of a segment (they
// read its initial state or zeros), rows left over by the strips, channels left over by the pairs of vectors - goes through
// tiles of kTileL x kTileD in L1, in the accumulation type, and the same strip code.
#include "causal_conv1d.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

constexpr int kRows = 4;

// y[kCount][cols] from x[kCount][cols] and the W-1 rows before it; cols is a multiple of kPair.
template <class T, class A, int W, bool kSilu, bool kStream, int kCount>
__attribute__((noinline)) void conv_strip(const T* x_row, int64_t x_ld, T* y_row, int64_t y_ld, const A* weight, int64_t cols) {
  using V = Vec<A>;
  const Rows<const T> x(x_row, x_ld), before(x_row - (W - 1) * x_ld, x_ld);
  const Rows<T> y(y_row, y_ld);
  for (int64_t c = 0; c < cols; c += kPair<A>) {
    V out[2][kCount];
    if (kCount > 1)
      for (int r = 0; r < kCount; r++) prefetch(x.at(kCount + r) + c);
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      const int64_t at = c + v * V::size;
      const A* block = weight + at * (W + 1);
      V in[kCount + W - 1];
#pragma GCC unroll 16
      for (int r = 0; r < kCount + W - 1; r++) in[r] = V::load((r < W - 1 ? before.at(r) : x.at(r - (W - 1))) + at);
#pragma GCC unroll 8
      for (int r = 0; r < kCount; r++) out[v][r] = V::load(block + W * V::size);
#pragma GCC unroll 4
      for (int w = 0; w < W; w++) {
        const V tap = V::load(block + w * V::size);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; r++) out[v][r] = fma(in[r + w], tap, out[v][r]);
      }
      if (kSilu) fast_silu<kCount>(out[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; r++) store_pair<kStream>(out[0][r], out[1][r], y.at(r) + c);
  }
}

// Positions begin..end of a segment, channels d..d+cols, through tiles.
template <class T, int W, bool kSilu>
void conv_tiles(const CausalConv1dParams& p, const Segment& segment, int64_t begin, int64_t end, int64_t d, int64_t cols,
                const acc_t<T>* weight) {
  using A = acc_t<T>;
  A* in = scratch<A>(kInputSlot, (kTileL + W - 1) * kTileD);
  A* out = scratch<A>(kOutputSlot, kTileL * kTileD);
  for (int64_t c = d; c < d + cols; c += kTileD)
    for (int64_t l = begin; l < end; l += kTileL) {
      const int64_t width = min_of(kTileD, d + cols - c), rows = min_of(kTileL, end - l);
      const int64_t whole = ceil_div(width, kPair<A>) * kPair<A>;
      load_inputs<T>(p, segment, l - (W - 1), rows + W - 1, c, width, in, kTileD);
      const A* x = in + (W - 1) * kTileD;
      int64_t r = 0;
      for (; r + kRows <= rows; r += kRows)
        conv_strip<A, A, W, kSilu, false, kRows>(x + r * kTileD, kTileD, out + r * kTileD, kTileD, weight + c * (W + 1), whole);
      for (; r < rows; r++)
        conv_strip<A, A, W, kSilu, false, 1>(x + r * kTileD, kTileD, out + r * kTileD, kTileD, weight + c * (W + 1), whole);
      T* y = static_cast<T*>(p.y) + segment.batch * p.y_stride_b + c * p.y_stride_d + l * p.y_stride_l;
      store_tile(out, kTileD, y, p.y_stride_l, p.y_stride_d, rows, width);
    }
}

// The same, straight from memory where that is channel-last.
template <class T, int W, bool kSilu>
void conv_part(const CausalConv1dParams& p, const Segment& segment, int64_t begin, int64_t end, int64_t d, int64_t cols,
               const acc_t<T>* weight, bool direct, bool stream) {
  using A = acc_t<T>;
  const int64_t whole = direct ? cols / kPair<A> * kPair<A> : 0;
  if (whole > 0) {
    const T* x = static_cast<const T*>(p.x) + segment.batch * p.x_stride_b + d;
    T* y = static_cast<T*>(p.y) + segment.batch * p.y_stride_b + d;
    int64_t l = max_of(begin, min_of(end, segment.begin + W - 1));
    conv_tiles<T, W, kSilu>(p, segment, begin, l, d, whole, weight);
    for (; l + kRows <= end; l += kRows) {
      const T* in = x + l * p.x_stride_l;
      T* out = y + l * p.y_stride_l;
      if (stream) conv_strip<T, A, W, kSilu, true, kRows>(in, p.x_stride_l, out, p.y_stride_l, weight + d * (W + 1), whole);
      else conv_strip<T, A, W, kSilu, false, kRows>(in, p.x_stride_l, out, p.y_stride_l, weight + d * (W + 1), whole);
    }
    conv_tiles<T, W, kSilu>(p, segment, l, end, d, whole, weight);
  }
  conv_tiles<T, W, kSilu>(p, segment, begin, end, d + whole, cols - whole, weight);
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
    A* window = scratch<A>(kInputSlot, 3 * kBlockD);
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
  const A* weight = load_weights<A>(p);
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
          conv_part<T, decltype(width)::value, decltype(silu)::value>(p, segment, begin, end, d, cols, weight, direct, stream);
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
