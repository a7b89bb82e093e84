// What the convolution's kernels share: what a position knows of its run, the window of inputs that moves along a run, tiles.
//
// A run is a stretch of positions that belong together: a row, or within it a range of cu_seqlens, split where seq_idx changes. A
// sequence is a row or a range: its first run takes the initial state, its last run that isn't padding gives the final state. Of all
// this a position needs little, which fits in a byte, its code; of nearly all positions the code is 0.
#pragma once
#include "common.cuh"
#include "params.h"

namespace terrazzo { namespace cuda {

constexpr int kTaps = 4;            // the widest filter; taps that a narrower one lacks are neither read nor used
constexpr int kConvThreads = 128;
constexpr int kConvChannels = 4;    // of a thread, channel last: what it holds of 8 would leave room for half as many warps

// ---- codes ---------------------------------------------------------------------------------------------------
constexpr unsigned kMissing = 3;    // how many of the W - 1 inputs before this one are not of its run
constexpr unsigned kInitial = 4;    // those are of the initial state; otherwise zero
constexpr unsigned kLeft = 24;      // times 8: the distance to the end of its sequence, of an input that is part of the final state
constexpr unsigned kPadding = 32;   // of no sequence

TZ_DEVICE unsigned left_of(unsigned code) { return (code & kLeft) / 8; }
// The inputs of its own run that lie before a position, W - 1 at most; -1 in padding.
TZ_DEVICE int reach_of(unsigned code, int W) { return code & kPadding ? -1 : W - 1 - static_cast<int>(code & kMissing); }

// The code of position l < L.
TZ_DEVICE unsigned code_at(const CausalConv1dCudaParams& p, int64_t b, int l) {
  if (p.codes) return p.codes[b * p.codes_stride_b + l];
  const int before = static_cast<int>(p.W) - 1, left = static_cast<int>(p.L) - l;
  return (l < before ? static_cast<unsigned>(before - l) | kInitial : 0) | (left <= before ? static_cast<unsigned>(left) * 8 : 0);
}
TZ_DEVICE int64_t owner_of(const CausalConv1dCudaParams& p, int64_t b, int l) { return p.owners ? p.owners[b * p.L + l] : b; }

// Whether positions l .. l + n - 1 need no code: l is a multiple of n. Inputs outside the row count as zeros.
template <int n> TZ_DEVICE bool ordinary(const CausalConv1dCudaParams& p, int64_t b, int l) {
  if (p.codes) {
    const Vector<uint8_t, n> codes = load_vector<uint8_t, n>(p.codes + b * p.codes_stride_b + l);
    unsigned any = 0;
#pragma unroll
    for (int i = 0; i < n; i++) any |= codes.data[i];
    return any == 0;
  }
  return (!p.initial_states || l >= p.W - 1) && (!p.dfinal_states || l + n <= p.L - (p.W - 1));
}

// ---- sequences; whatever cu_seqlens holds, the positions lie within the row -------------------------------------
TZ_DEVICE int clamp(int v, int low, int high) { return v < low ? low : v > high ? high : v; }
TZ_DEVICE int begin_of(const CausalConv1dCudaParams& p, int64_t s) {
  return p.cu_seqlens ? clamp(p.cu_seqlens[s * p.cu_seqlens_stride], 0, static_cast<int>(p.L)) : 0;
}
TZ_DEVICE int64_t row_of(const CausalConv1dCudaParams& p, int64_t s) { return p.cu_seqlens ? 0 : s; }

// Of sequence s: where it begins and where its last run ends, how many inputs of that run a window has, W at most, and whether the
// initial state lies before those.
struct LastRun {
  int64_t row;
  int begin, end, count;
  bool initial;
};
TZ_DEVICE LastRun last_run(const CausalConv1dCudaParams& p, int64_t s) {
  const int64_t row = row_of(p, s);
  const int begin = begin_of(p, s), L = static_cast<int>(p.L);
  const int end = p.ends ? p.ends[s] : p.cu_seqlens ? clamp(p.cu_seqlens[(s + 1) * p.cu_seqlens_stride], begin, L) : L;
  if (end <= begin) return {row, begin, end, 0, true};  // nothing but padding: the state passes through
  const unsigned code = code_at(p, row, end - 1);
  return {row, begin, end, reach_of(code, static_cast<int>(p.W)) + 1, (code & kInitial) != 0};
}

// ---- the window: n channels' inputs at a position and before it ---------------------------------------------------
template <int n> struct ConvWindow {
  float taps[kTaps][n];    // taps[k]: of the input k positions back
  float bias[n];
  float inputs[kTaps][n];  // inputs[k]: k positions back

  TZ_DEVICE void push(const float (&x)[n]) {
#pragma unroll
    for (int j = 0; j < n; j++) {
#pragma unroll
      for (int k = kTaps - 1; k > 0; k--) inputs[k][j] = inputs[k - 1][j];
      inputs[0][j] = x[j];
    }
  }

  // What a position with a code sees in place of what lies before its run. Later positions of the run see the same.
  template <class T> TZ_DEVICE void enter(const CausalConv1dCudaParams& p, unsigned code, int64_t b, int l, int64_t d) {
    const int W = static_cast<int>(p.W), reach = reach_of(code, W);
    const T* init = nullptr;
    if ((code & kInitial) && p.initial_states) init = static_cast<const T*>(p.initial_states) + owner_of(p, b, l) * p.init_stride_s + d * p.init_stride_d;
#pragma unroll
    for (int k = 0; k < kTaps; k++) {
      if (k <= reach || k >= W) continue;
#pragma unroll
      for (int j = 0; j < n; j++) inputs[k][j] = init ? to_float(init[j * p.init_stride_d + (W - 1 - k + reach) * p.init_stride_w]) : 0;
    }
  }

  TZ_DEVICE void convolve(int W, float (&out)[n]) const {
#pragma unroll
    for (int j = 0; j < n; j++) out[j] = bias[j];
#pragma unroll
    for (int k = 0; k < kTaps; k++) {
      if (k >= W) continue;
#pragma unroll
      for (int j = 0; j < n; j++) out[j] += taps[k][j] * inputs[k][j];
    }
  }
};

// Taps and bias of the n channels that begin at `own` of a block's, which begin at d: read once a block, along memory. All threads
// call it.
template <int n> TZ_DEVICE void load_taps(const CausalConv1dCudaParams& p, int64_t d, int channels, int own, ConvWindow<n>& window) {
  constexpr int kMost = kWarp * n;
  TZ_SHARED(float, taps_smem, (kTaps + 1) * kMost);
  const int W = static_cast<int>(p.W);
  for (int i = threadIdx.x; i < channels * (W + 1); i += kConvThreads) {
    const int c = i / (W + 1), w = i % (W + 1);
    float v = 0;
    if (d + c < p.D && w < W) v = load_float(p.weight_dtype, p.weight, (d + c) * p.weight_stride_d + w * p.weight_stride_w);
    if (d + c < p.D && w == W && p.bias) v = load_float(p.weight_dtype, p.bias, d + c);
    taps_smem[(w < W ? W - 1 - w : kTaps) * kMost + c] = v;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kTaps; k++)
    if (k < W) load_floats(taps_smem + k * kMost + own, window.taps[k]);
  load_floats(taps_smem + kTaps * kMost + own, window.bias);
}

// The same of one channel, without a block's help.
TZ_DEVICE void load_taps(const CausalConv1dCudaParams& p, int64_t d, ConvWindow<1>& window) {
#pragma unroll
  for (int k = 0; k < kTaps; k++)
    if (k < p.W) window.taps[k][0] = load_float(p.weight_dtype, p.weight, d * p.weight_stride_d + (p.W - 1 - k) * p.weight_stride_w);
  window.bias[0] = p.bias ? load_float(p.weight_dtype, p.bias, d) : 0;
}

// n positions from l on of a channel, zeros outside the row. kAligned: one access, for n divides l and L.
template <class T, int n, bool kAligned> TZ_DEVICE Vector<T, n> load_piece(const T* row, int l, int L) {
  Vector<T, n> v{};
  if (kAligned) {
    if (l >= 0 && l < L) v = load_vector<T, n>(row + l);
  } else {
#pragma unroll
    for (int i = 0; i < n; i++)
      if (l + i >= 0 && l + i < L) v.data[i] = row[l + i];
  }
  return v;
}
template <class T, int n, bool kAligned> TZ_DEVICE void store_piece(const Vector<T, n>& v, T* row, int l, int L) {
  if (kAligned) {
    store_vector(v, row + l);
  } else {
#pragma unroll
    for (int i = 0; i < n; i++)
      if (l + i < L) row[l + i] = v.data[i];
  }
}

// ---- tiles ---------------------------------------------------------------------------------------------------
// A block has `span` positions of some channels of one row. `lanes` threads, a power of two, lie side by side along the axis of unit
// stride. Channel last: lanes x n channels, the span divided among the other threads. Channel first: a channel for each team of lanes.
struct ConvTiles {
  int lanes, span;
  unsigned num_l, num_d;
};
struct ConvPlace {
  int64_t b, tile_l, tile_d;
  int lane, team;
};
TZ_DEVICE ConvPlace place_of(const ConvTiles& tiles) {
  const unsigned rest = blockIdx.x / tiles.num_d;
  return {rest / tiles.num_l, rest % tiles.num_l, blockIdx.x % tiles.num_d, static_cast<int>(threadIdx.x) % tiles.lanes, static_cast<int>(threadIdx.x) / tiles.lanes};
}

inline int conv_lanes(int64_t vectors, int least) {
  int lanes = least;
  while (lanes < kWarp && lanes < vectors) lanes *= 2;
  return lanes;
}
// Tiles of `span` positions x `channels` channels; fn(tiles, blocks) launches.
template <class F> cudaError_t with_tiles(const CausalConv1dParams& p, int lanes, int64_t span, int64_t channels, const F& fn) {
  const int64_t num_l = ceil_div(p.L, span), num_d = ceil_div(p.D, channels), blocks = p.B * num_l * num_d;
  if (p.L > INT32_MAX / 2 || blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  return fn(ConvTiles{lanes, static_cast<int>(span), static_cast<unsigned>(num_l), static_cast<unsigned>(num_d)}, dim3(static_cast<unsigned>(blocks)));
}
// Whether a tensor's vectors can be read in accesses of 16 bytes: `along` is the stride between neighbouring vectors' axes, which doesn't
// matter where that axis has one element.
inline bool conv_aligned(const CausalConv1dParams& p, const void* base, int64_t stride_b, int64_t stride_along) {
  const int64_t bytes = size_of(p.x_dtype);
  const bool one = conv_channel_last(p) ? p.L == 1 : p.D == 1;
  return aligned(base, p.B == 1 ? 0 : stride_b, bytes) && aligned(base, one ? 0 : stride_along, bytes);
}
inline int64_t along(const CausalConv1dParams& p, int64_t stride_d, int64_t stride_l) { return conv_channel_last(p) ? stride_l : stride_d; }

// Fills p.codes, p.owners and, where `ends` says so, p.ends; does nothing where nothing is packed.
cudaError_t causal_conv1d_runs(const CausalConv1dCudaParams& p, bool ends, cudaStream_t stream);

}}  // namespace terrazzo::cuda
