// Causal depthwise convolution, forward: y[l] = act(bias + sum_k weight[W-1-k] x[l-k]), k < W. Before a run stands the initial state or
// zeros. Layouts: x, y [B, D, L] with unit stride along D (channel last) or L (channel first), weight [D, W], states [S, D, W-1].
//
// Memory bandwidth is the limit: x read once, y written once. Channel last, a thread has 16 bytes of channels and walks along
// positions, the last W inputs in registers; the first W - 1 of a walk come from L2 a second time. Channel first, a thread has 16 bytes
// of positions of one channel, and the 16 bytes before, which its neighbour has loaded too, from L1. Positions at the boundaries of
// runs go one by one through a loop that looks at their codes (causal_conv1d.cuh); all others don't know of packing.
#include "kernels.h"

#include "causal_conv1d.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kSteps = 8;    // positions whose loads are under way at once, channel last
constexpr int kPieces = 2;   // and pieces of 16 bytes, channel first

// y at the window's position.
template <class T, int n> TZ_DEVICE Vector<T, n> output(const CausalConv1dCudaParams& p, const ConvWindow<n>& window, unsigned code) {
  float out[n];
  window.convolve(static_cast<int>(p.W), out);
#pragma unroll
  for (int j = 0; j < n; j++) {
    if (p.silu) out[j] = silu(out[j]);
    if (code & kPadding) out[j] = 0;
  }
  return to_vector<T>(out);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_fwd_channel_last_kernel(const CausalConv1dCudaParams p, const ConvTiles tiles) {
  const ConvPlace at = place_of(tiles);
  const int channels = tiles.lanes * kVec, walk = tiles.span * tiles.lanes / kConvThreads, L = static_cast<int>(p.L);
  ConvWindow<kVec> window;
  load_taps(p, at.tile_d * channels, channels, at.lane * kVec, window);
  const int64_t d = at.tile_d * channels + at.lane * kVec;
  const int first = static_cast<int>(at.tile_l) * tiles.span + at.team * walk, last = min(first + walk, L);
  if (d >= p.D || first >= L) return;
  const T* x = static_cast<const T*>(p.x) + at.b * p.x_stride_b + d;
  T* y = static_cast<T*>(p.y) + at.b * p.y_stride_b + d;

  // the inputs before the walk
#pragma unroll
  for (int k = 0; k < kTaps; k++) {
    Vector<T, kVec> v{};
    if (k + 1 < p.W && first - 1 - k >= 0) v = load_vector<T, kVec>(x + (first - 1 - k) * p.x_stride_l);
    to_floats(v, window.inputs[k]);
  }

  const auto step = [&](int l, const Vector<T, kVec>& v, unsigned code) {
    float in[kVec];
    to_floats(v, in);
    window.push(in);
    if (code) window.template enter<T>(p, code, at.b, l, d);
    store_vector(output<T>(p, window, code), y + l * p.y_stride_l);
  };
  for (int l = first; l < last; l += kSteps) {
    Vector<T, kVec> x_rmem[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; s++)
      if (l + s < last) x_rmem[s] = load_vector<T, kVec>(x + (l + s) * p.x_stride_l);
    if (ordinary<kSteps>(p, at.b, l)) {
#pragma unroll
      for (int s = 0; s < kSteps; s++)
        if (l + s < last) step(l + s, x_rmem[s], 0);
    } else {
#pragma unroll 1
      for (int i = l; i < min(l + kSteps, last); i++) step(i, load_vector<T, kVec>(x + i * p.x_stride_l), code_at(p, at.b, i));
    }
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_fwd_channel_first_kernel(const CausalConv1dCudaParams p, const ConvTiles tiles) {
  constexpr int kVec = kVectorBytes / sizeof(T);
  const ConvPlace at = place_of(tiles);
  const int L = static_cast<int>(p.L), piece = tiles.lanes * kVec, first = static_cast<int>(at.tile_l) * tiles.span;
  const int64_t d = at.tile_d * (kConvThreads / tiles.lanes) + at.team;
  if (d >= p.D) return;
  const T* x = static_cast<const T*>(p.x) + at.b * p.x_stride_b + d * p.x_stride_d;
  T* y = static_cast<T*>(p.y) + at.b * p.y_stride_b + d * p.y_stride_d;
  ConvWindow<1> window;
  load_taps(p, d, window);

  for (int begin = first + at.lane * kVec; begin < min(first + tiles.span, L); begin += kPieces * piece) {
    Vector<T, kVec> own[kPieces], before[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      own[i] = load_piece<T, kVec, kAligned>(x, begin + i * piece, L);
      before[i] = load_piece<T, kVec, kAligned>(x, begin + i * piece - kVec, L);
    }
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const int l = begin + i * piece;
      if (l >= min(first + tiles.span, L)) continue;
#pragma unroll
      for (int k = 0; k + 1 < kTaps; k++) window.inputs[k][0] = to_float(before[i].data[kVec - 1 - k]);
      if (ordinary<kVec>(p, at.b, l)) {
        Vector<T, kVec> out;
#pragma unroll
        for (int j = 0; j < kVec; j++) {
          const float in[1] = {to_float(own[i].data[j])};
          window.push(in);
          out.data[j] = output<T>(p, window, 0).data[0];
        }
        store_piece<T, kVec, kAligned>(out, y, l, L);
      } else {
#pragma unroll 1
        for (int m = l; m < min(l + kVec, L); m++) {
          const float in[1] = {to_float(x[m])};
          const unsigned code = code_at(p, at.b, m);
          window.push(in);
          if (code) window.template enter<T>(p, code, at.b, m, d);
          y[m] = output<T>(p, window, code).data[0];
        }
      }
    }
  }
}

// final_states: the last inputs of each sequence's last run. A thread for each channel of a sequence.
template <class T> __global__ void __launch_bounds__(kConvThreads) causal_conv1d_fwd_states_kernel(const CausalConv1dCudaParams p, const unsigned num_d) {
  const int64_t s = blockIdx.x / num_d, d = static_cast<int64_t>(blockIdx.x % num_d) * kConvThreads + threadIdx.x;
  if (d >= p.D) return;
  const LastRun run = last_run(p, s);
  const T* x = static_cast<const T*>(p.x) + run.row * p.x_stride_b + d * p.x_stride_d;
  const T* init = static_cast<const T*>(p.initial_states) + s * p.init_stride_s + d * p.init_stride_d;
  T* final_state = static_cast<T*>(p.final_states) + s * p.final_stride_s + d * p.final_stride_d;
  const int columns = static_cast<int>(p.W) - 1;
  for (int w = 0; w < columns; w++) {
    T v{};
    if (columns - 1 - w < run.count) v = x[(run.end - columns + w) * p.x_stride_l];
    else if (p.initial_states && run.initial) v = init[(w + run.count) * p.init_stride_w];
    final_state[w * p.final_stride_w] = v;
  }
}

}  // namespace

cudaError_t causal_conv1d_fwd_cuda(const CausalConv1dCudaParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.D == 0) return cudaSuccess;
  return with_type(p.x_dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kVec = kVectorBytes / sizeof(T);
    const bool ends_aligned = conv_aligned(p, p.x, p.x_stride_b, along(p, p.x_stride_d, p.x_stride_l)) &&
                              conv_aligned(p, p.y, p.y_stride_b, along(p, p.y_stride_d, p.y_stride_l));
    // as long as leaves 1024 blocks, and no longer than the row
    const auto longest = [&](int64_t span, int64_t least, int64_t channels) {
      while (span > least && (span / 2 >= p.L || p.B * ceil_div(p.L, span) * ceil_div(p.D, channels) < 1024)) span /= 2;
      return span;
    };
    const auto channel_last = [&](auto kernel, int vec) {
      const int lanes = conv_lanes(ceil_div(p.D, vec), 1), teams = kConvThreads / lanes;
      return with_tiles(p, lanes, longest(8 * kSteps * teams, kSteps * teams, lanes * vec), lanes * vec, [&](ConvTiles tiles, dim3 grid) {
        return launch(kernel, grid, kConvThreads, 0, stream, p, tiles);
      });
    };
    const auto channel_first = [&](auto kernel) {
      const int lanes = conv_lanes(ceil_div(p.L, kVec), 1), teams = kConvThreads / lanes;
      return with_tiles(p, lanes, longest(4 * lanes * kVec, lanes * kVec, teams), teams, [&](ConvTiles tiles, dim3 grid) {
        return launch(kernel, grid, kConvThreads, 0, stream, p, tiles);
      });
    };

    cudaError_t error = causal_conv1d_runs(p, p.final_states != nullptr, stream);
    if (error != cudaSuccess) return error;
    if (conv_channel_last(p))
      error = ends_aligned && p.D % kConvChannels == 0 ? channel_last(causal_conv1d_fwd_channel_last_kernel<T, kConvChannels>, kConvChannels) : channel_last(causal_conv1d_fwd_channel_last_kernel<T, 1>, 1);
    else
      error = ends_aligned && p.L % kVec == 0 ? channel_first(causal_conv1d_fwd_channel_first_kernel<T, true>) : channel_first(causal_conv1d_fwd_channel_first_kernel<T, false>);
    if (error != cudaSuccess || !p.final_states || p.num_sequences == 0) return error;
    const int64_t num_d = ceil_div(p.D, kConvThreads), blocks = p.num_sequences * num_d;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    return launch(causal_conv1d_fwd_states_kernel<T>, dim3(static_cast<unsigned>(blocks)), kConvThreads, 0, stream, p, static_cast<unsigned>(num_d));
  });
}

}}  // namespace terrazzo::cuda
