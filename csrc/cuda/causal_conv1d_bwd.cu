// Causal depthwise convolution, backward. With g[l] = dy[l] act'(pre[l]), pre computed again:
//   dx[l] = sum_k weight[W-1-k] g[l+k],   dweight[W-1-k] = sum_l g[l] x[l-k],   dbias = sum_l g[l],
// each sum within a run; what lies before a run gives dinitial_states, and dfinal_states adds to the last inputs' dx. dy lies like x.
//
// Memory bandwidth is the limit: x and dy read once, dx written once. Threads walk along positions as in the forward, with the gradients
// of the last W - 1 inputs, not yet complete, beside the inputs: what position l knows of its run decides where its g goes, and it is
// looked at once. Channel last, a thread has four channels and a walk of its own; dx of a walk's end needs g of W - 1 positions more.
// Channel first, a thread has 16 bytes of positions and computes g of the W - 1 behind them too: 3 in 11 (fp32: 3 in 7) are computed
// twice, which costs less than shuffles and what they would carry from tile to tile. Sums over positions become a row of partial
// sums a block, which a second kernel adds up: no atomics, and the same bits on every GPU.
#include "kernels.h"

#include "causal_conv1d.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kSteps = 4;     // positions whose loads are under way at once
constexpr int kBehind = kTaps - 1;                // positions after which an input's gradient is complete
constexpr int kSums = kTaps + 1;                  // dweight, dbias

TZ_DEVICE float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * (1 + x * (1 - s));
}

template <int n> struct ConvGradient : ConvWindow<n> {
  float pending[kTaps][n];  // pending[k]: dx of k positions back, so far
  float sums[kSums][n];     // sums[k]: dweight as taps; dbias

  TZ_DEVICE void clear_pending() {
#pragma unroll
    for (int k = 0; k < kTaps; k++)
#pragma unroll
      for (int j = 0; j < n; j++) pending[k][j] = 0;
  }
  TZ_DEVICE void clear() {
    clear_pending();
#pragma unroll
    for (int k = 0; k < kSums; k++)
#pragma unroll
      for (int j = 0; j < n; j++) sums[k][j] = 0;
  }

  // Position l with its input and dy. inside: it lies in the row and its g is needed, otherwise x and dy are zero. counted: this thread
  // adds it to its sums. out: dx of position l - kBehind.
  template <class T>
  TZ_DEVICE void step(const CausalConv1dCudaParams& p, const float (&x)[n], const float (&dy)[n], unsigned code, int64_t b, int l, int64_t d,
                      bool inside, bool counted, float (&out)[n]) {
    const int W = static_cast<int>(p.W), reach = inside ? reach_of(code, W) : -1;
    this->push(x);
    if (code) this->template enter<T>(p, code, b, l, d);
    float g[n];
    if (p.silu) {
      this->convolve(W, g);
#pragma unroll
      for (int j = 0; j < n; j++) g[j] = dy[j] * silu_slope(g[j]);
    } else {
#pragma unroll
      for (int j = 0; j < n; j++) g[j] = dy[j];
    }
    if (counted && reach >= 0) {
#pragma unroll
      for (int j = 0; j < n; j++) {
#pragma unroll
        for (int k = 0; k < kTaps; k++)
          if (k < W) sums[k][j] += g[j] * this->inputs[k][j];
        sums[kTaps][j] += g[j];
      }
    }
#pragma unroll
    for (int k = 0; k < kTaps; k++) {
      if (k > reach) continue;
#pragma unroll
      for (int j = 0; j < n; j++) pending[k][j] += this->taps[k][j] * g[j];
    }
    const int left = static_cast<int>(left_of(code));
    if (left && p.dfinal_states) {
      const T* dfinal = static_cast<const T*>(p.dfinal_states) + owner_of(p, b, l) * p.dfinal_stride_s + d * p.dfinal_stride_d;
#pragma unroll
      for (int j = 0; j < n; j++) pending[0][j] += to_float(dfinal[j * p.dfinal_stride_d + (W - 1 - left) * p.dfinal_stride_w]);
    }
#pragma unroll
    for (int j = 0; j < n; j++) {
      out[j] = pending[kBehind][j];
#pragma unroll
      for (int k = kBehind; k > 0; k--) pending[k][j] = pending[k - 1][j];
      pending[0][j] = 0;
    }
  }
};

// Row `row` of the partial sums, tap k (0: the last weight) or the bias (kTaps), channel d.
TZ_DEVICE float* partial_at(const CausalConv1dCudaParams& p, int64_t row, int k, int64_t d) {
  const int64_t w = k == kTaps ? p.W : p.W - 1 - k;
  return static_cast<float*>(p.partials) + (row * (p.W + 1) + w) * p.D + d;
}

template <class T, int kVec>
__global__ void __launch_bounds__(kConvThreads, kVec == 1 ? 6 : 3) causal_conv1d_bwd_channel_last_kernel(const CausalConv1dCudaParams p, const ConvTiles tiles) {
  const ConvPlace at = place_of(tiles);
  const int channels = tiles.lanes * kVec, teams = kConvThreads / tiles.lanes, walk = tiles.span / teams, L = static_cast<int>(p.L);
  ConvGradient<kVec> window;
  load_taps<kVec>(p, at.tile_d * channels, channels, at.lane * kVec, window);
  window.clear();
  const int64_t d = at.tile_d * channels + at.lane * kVec;
  const int first = static_cast<int>(at.tile_l) * tiles.span + at.team * walk, last = min(first + walk, L);

  if (d < p.D && first < L) {
    const T* x = static_cast<const T*>(p.x) + at.b * p.x_stride_b + d;
    const T* dy = static_cast<const T*>(p.dy) + at.b * p.dy_stride_b + d;
    T* dx = static_cast<T*>(p.dx) + at.b * p.dx_stride_b + d;
    const int stop = min(last + static_cast<int>(p.W) - 1, L);  // behind it, g counts for nothing here

    // the inputs before the walk
#pragma unroll
    for (int k = 0; k < kTaps; k++) {
      Vector<T, kVec> v{};
      if (k + 1 < p.W && first - 1 - k >= 0) v = load_vector<T, kVec>(x + (first - 1 - k) * p.x_stride_l);
      to_floats(v, window.inputs[k]);
    }

    const auto step = [&](int l, const Vector<T, kVec>& x_l, const Vector<T, kVec>& dy_l, unsigned code) {
      float in[kVec], slope[kVec], out[kVec];
      to_floats(x_l, in);
      to_floats(dy_l, slope);
      window.template step<T>(p, in, slope, code, at.b, l, d, l < stop, l < last, out);
      const int done = l - kBehind;
      if (done >= first && done < last) store_vector(to_vector<T>(out), dx + done * p.dx_stride_l);
    };
    for (int l = first; l < last + kBehind; l += kSteps) {
      Vector<T, kVec> x_rmem[kSteps], dy_rmem[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; s++) {
        x_rmem[s] = dy_rmem[s] = {};
        if (l + s >= stop) continue;
        x_rmem[s] = load_vector<T, kVec>(x + (l + s) * p.x_stride_l);
        dy_rmem[s] = load_vector<T, kVec>(dy + (l + s) * p.dy_stride_l);
      }
      if (l >= L || ordinary<kSteps>(p, at.b, l)) {
#pragma unroll
        for (int s = 0; s < kSteps; s++) step(l + s, x_rmem[s], dy_rmem[s], 0);
      } else {
#pragma unroll 1
        for (int i = l; i < l + kSteps; i++) {
          Vector<T, kVec> x_l{}, dy_l{};
          if (i < stop) x_l = load_vector<T, kVec>(x + i * p.x_stride_l), dy_l = load_vector<T, kVec>(dy + i * p.dy_stride_l);
          step(i, x_l, dy_l, i < stop ? code_at(p, at.b, i) : 0);
        }
      }
    }
  }

  // the block's row of partial sums: the teams' in order
  constexpr int kMost = kConvThreads * kVec;
  TZ_SHARED(float, sums_smem, kSums * kMost);
#pragma unroll
  for (int k = 0; k < kSums; k++)
#pragma unroll
    for (int j = 0; j < kVec; j++) sums_smem[k * kMost + at.team * channels + at.lane * kVec + j] = window.sums[k][j];
  __syncthreads();
  for (int i = threadIdx.x; i < kSums * channels; i += kConvThreads) {
    const int k = i / channels, c = i % channels;
    if ((k >= p.W && k < kTaps) || at.tile_d * channels + c >= p.D) continue;
    float sum = 0;
    for (int t = 0; t < teams; t++) sum += sums_smem[k * kMost + t * channels + c];
    *partial_at(p, at.b * tiles.num_l + at.tile_l, k, at.tile_d * channels + c) = sum;
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kConvThreads, 6) causal_conv1d_bwd_channel_first_kernel(const CausalConv1dCudaParams p, const ConvTiles tiles) {
  constexpr int kVec = kVectorBytes / sizeof(T);
  const ConvPlace at = place_of(tiles);
  const int L = static_cast<int>(p.L), first = static_cast<int>(at.tile_l) * tiles.span;
  const int64_t d = at.tile_d * (kConvThreads / tiles.lanes) + at.team;
  ConvGradient<1> window;
  window.clear();
  if (d < p.D) {
    const T* x = static_cast<const T*>(p.x) + at.b * p.x_stride_b + d * p.x_stride_d;
    const T* dy = static_cast<const T*>(p.dy) + at.b * p.dy_stride_b + d * p.dy_stride_d;
    T* dx = static_cast<T*>(p.dx) + at.b * p.dx_stride_b + d * p.dx_stride_d;
    load_taps(p, d, window);

    for (int l = first + at.lane * kVec; l < min(first + tiles.span, L); l += tiles.lanes * kVec) {
      const Vector<T, kVec> x_own = load_piece<T, kVec, kAligned>(x, l, L), dy_own = load_piece<T, kVec, kAligned>(dy, l, L);
      const Vector<T, kVec> x_before = load_piece<T, kVec, kAligned>(x, l - kVec, L);
      const Vector<T, kVec> x_behind = load_piece<T, kVec, kAligned>(x, l + kVec, L), dy_behind = load_piece<T, kVec, kAligned>(dy, l + kVec, L);
      const int last = min(l + kVec, L), stop = min(l + kVec + static_cast<int>(p.W) - 1, L);
#pragma unroll
      for (int k = 0; k + 1 < kTaps; k++) window.inputs[k][0] = to_float(x_before.data[kVec - 1 - k]);
      window.clear_pending();
      float out[1];
      if (ordinary<kVec>(p, at.b, l) && (l + kVec >= L || ordinary<kSteps>(p, at.b, l + kVec))) {
        Vector<T, kVec> dx_own;
#pragma unroll
        for (int j = 0; j < kVec + kBehind; j++) {
          const float in[1] = {to_float(j < kVec ? x_own.data[j % kVec] : x_behind.data[j % kVec])};
          const float slope[1] = {to_float(j < kVec ? dy_own.data[j % kVec] : dy_behind.data[j % kVec])};
          window.template step<T>(p, in, slope, 0, at.b, l + j, d, l + j < stop, j < kVec && l + j < last, out);
          if (j >= kBehind) from_float(out[0], dx_own.data[j - kBehind]);
        }
        store_piece<T, kVec, kAligned>(dx_own, dx, l, L);
      } else {
#pragma unroll 1
        for (int m = l; m < last + kBehind; m++) {
          const float in[1] = {m < stop ? to_float(x[m]) : 0}, slope[1] = {m < stop ? to_float(dy[m]) : 0};
          window.template step<T>(p, in, slope, m < stop ? code_at(p, at.b, m) : 0, at.b, m, d, m < stop, m < last, out);
          if (m - kBehind >= l) from_float(out[0], dx[m - kBehind]);
        }
      }
    }
  }

  // the block's row of partial sums: a channel's lanes
#pragma unroll
  for (int k = 0; k < kSums; k++) {
    const float sum = warp_sum(window.sums[k][0], tiles.lanes);
    if (at.lane == 0 && d < p.D && (k < p.W || k == kTaps)) *partial_at(p, at.b * tiles.num_l + at.tile_l, k, d) = sum;
  }
}

// dweight [D, W] and dbias [D] from partials [rows, W + 1, D]. Grid: tiles of d x W + 1.
__global__ void __launch_bounds__(kColumnSumThreads) causal_conv1d_bwd_sums_kernel(const CausalConv1dCudaParams p, const int64_t rows) {
  const int w = static_cast<int>(blockIdx.y);
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x % kSumColumns;
  const float sum = column_sum(static_cast<const float*>(p.partials) + w * p.D + d, rows, (p.W + 1) * p.D, d < p.D);
  if (threadIdx.x >= kSumColumns || d >= p.D) return;
  if (w < p.W) static_cast<float*>(p.dweight)[d * p.W + w] = sum;
  else if (p.dbias) static_cast<float*>(p.dbias)[d] = sum;
}

// dinitial_states, from the first W - 1 positions of each sequence's first run and from its final state. A thread for each channel of
// a sequence.
template <class T> __global__ void __launch_bounds__(kConvThreads) causal_conv1d_bwd_states_kernel(const CausalConv1dCudaParams p, const unsigned num_d) {
  const int64_t s = blockIdx.x / num_d, d = static_cast<int64_t>(blockIdx.x % num_d) * kConvThreads + threadIdx.x;
  if (d >= p.D) return;
  const int W = static_cast<int>(p.W), columns = W - 1;
  ConvWindow<1> window;
  load_taps(p, d, window);
  const int64_t row = row_of(p, s);
  const int begin = begin_of(p, s);
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride_b + d * p.x_stride_d;
  const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride_b + d * p.dy_stride_d;
  const T* init = static_cast<const T*>(p.initial_states) + s * p.init_stride_s + d * p.init_stride_d;

  // what the state's last columns still are of the final state
  float dinit[kTaps - 1];
  LastRun run{};
  if (p.dfinal_states) run = last_run(p, s);
#pragma unroll
  for (int w = 0; w < kTaps - 1; w++) {
    dinit[w] = 0;
    if (p.dfinal_states && run.initial && w >= run.count && w < columns)
      dinit[w] = to_float(static_cast<const T*>(p.dfinal_states)[s * p.dfinal_stride_s + d * p.dfinal_stride_d + (w - run.count) * p.dfinal_stride_w]);
  }

  // inputs[k]: the state's last column first
#pragma unroll
  for (int k = 0; k < kTaps; k++) window.inputs[k][0] = k < columns ? to_float(init[(columns - 1 - k) * p.init_stride_w]) : 0;
#pragma unroll
  for (int i = 0; i < kTaps - 1; i++) {
    const int l = begin + i;
    if (i >= columns || l >= p.L) continue;
    const unsigned code = code_at(p, row, l);
    if (!(code & kInitial) || reach_of(code, W) != i || owner_of(p, row, l) != s) continue;
    const float in[1] = {to_float(x[l * p.x_stride_l])};
    window.push(in);
    float g[1] = {1};
    if (p.silu) {
      window.convolve(W, g);
      g[0] = silu_slope(g[0]);
    }
    g[0] *= to_float(dy[l * p.dy_stride_l]);
#pragma unroll
    for (int w = 0; w < kTaps - 1; w++)
#pragma unroll
      for (int k = 0; k < kTaps; k++)  // column w lies k positions before l
        if (w >= i && w < columns && k == columns - w + i) dinit[w] += g[0] * window.taps[k][0];
  }
  for (int w = 0; w < columns; w++) {
    float v = 0;
#pragma unroll
    for (int i = 0; i < kTaps - 1; i++)
      if (i == w) v = dinit[i];
    from_float(v, static_cast<T*>(p.dinitial_states)[s * p.dinit_stride_s + d * p.dinit_stride_d + w * p.dinit_stride_w]);
  }
}

}  // namespace

cudaError_t causal_conv1d_bwd_cuda(const CausalConv1dCudaParams& p, cudaStream_t stream) {
  if (p.D == 0) return cudaSuccess;
  return with_type(p.x_dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kVec = kVectorBytes / sizeof(T);
    const auto all_aligned = conv_aligned(p, p.x, p.x_stride_b, along(p, p.x_stride_d, p.x_stride_l)) &&
                             conv_aligned(p, p.dy, p.dy_stride_b, along(p, p.dy_stride_d, p.dy_stride_l)) &&
                             conv_aligned(p, p.dx, p.dx_stride_b, along(p, p.dx_stride_d, p.dx_stride_l));
    const int64_t span = conv_span(p), rows = conv_partials(p);
    const auto channel_last = [&](auto kernel, int vec) {
      const int lanes = conv_lanes(ceil_div(p.D, vec), 8);  // so that a walk is at least kSteps long
      return with_tiles(p, lanes, span, lanes * vec, [&](ConvTiles tiles, dim3 grid) { return launch(kernel, grid, kConvThreads, 0, stream, p, tiles); });
    };
    const auto channel_first = [&](auto kernel) {
      const int lanes = conv_lanes(ceil_div(p.L < span ? p.L : span, kVec), 1);
      return with_tiles(p, lanes, span, kConvThreads / lanes, [&](ConvTiles tiles, dim3 grid) { return launch(kernel, grid, kConvThreads, 0, stream, p, tiles); });
    };

    cudaError_t error = causal_conv1d_runs(p, p.dfinal_states != nullptr, stream);
    if (error != cudaSuccess) return error;
    if (conv_channel_last(p))
      error = all_aligned && p.D % kConvChannels == 0 ? channel_last(causal_conv1d_bwd_channel_last_kernel<T, kConvChannels>, kConvChannels)
                                                  : channel_last(causal_conv1d_bwd_channel_last_kernel<T, 1>, 1);
    else
      error = all_aligned && p.L % kVec == 0 ? channel_first(causal_conv1d_bwd_channel_first_kernel<T, true>) : channel_first(causal_conv1d_bwd_channel_first_kernel<T, false>);
    if (error != cudaSuccess) return error;
    const dim3 columns(static_cast<unsigned>(ceil_div(p.D, kSumColumns)), static_cast<unsigned>(p.W + 1));
    error = launch(causal_conv1d_bwd_sums_kernel, columns, kColumnSumThreads, 0, stream, p, rows);
    if (error != cudaSuccess || !p.initial_states || p.num_sequences == 0) return error;
    const int64_t num_d = ceil_div(p.D, kConvThreads), blocks = p.num_sequences * num_d;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    return launch(causal_conv1d_bwd_states_kernel<T>, dim3(static_cast<unsigned>(blocks)), kConvThreads, 0, stream, p, static_cast<unsigned>(num_d));
  });
}

}}  // namespace terrazzo::cuda
