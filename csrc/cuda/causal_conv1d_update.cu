// The decoding step of the convolution: new positions against a rolling state of the last inputs, updated in place. And the states
// after packed sequences. Layouts: x, y [B, D, L], conv_state [slots, D, state_len] in any strides, y contiguous.
//
// Memory bandwidth is the limit: the state is read and written once. One new position and a state of at most four columns that shifts,
// as models decode, has a kernel whose threads hold the state in registers: a channel whose columns are one vector, or a few
// neighbouring channels of each column, whichever has unit stride. All else, several positions, a long state or one that is a ring,
// goes through a kernel for any strides, a thread for each channel.
#include <initializer_list>

#include "kernels.h"

#include "causal_conv1d.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int64_t kMostBlocks = 65535;  // along y of a grid

// The taps of n channels: taps[k] of the input k positions back, taps[kTaps] the bias.
template <int n> TZ_DEVICE void load_weights(const CausalConv1dUpdateParams& p, int64_t d, float (&taps)[kTaps + 1][n]) {
  if (p.W == kTaps && p.weight_stride_w == 1 && p.weight_stride_d == kTaps && reinterpret_cast<uintptr_t>(p.weight) % kVectorBytes == 0) {
    float all[n * kTaps];  // side by side, as models have them
    load_floats<n * kTaps>(p.weight_dtype, p.weight, d * kTaps, all);
#pragma unroll
    for (int j = 0; j < n; j++) {
#pragma unroll
      for (int k = 0; k < kTaps; k++) taps[k][j] = all[j * kTaps + kTaps - 1 - k];
      taps[kTaps][j] = p.bias ? load_float(p.weight_dtype, p.bias, d + j) : 0;
    }
    return;
  }
  Element rmem[kTaps + 1][n]{};
#pragma unroll
  for (int j = 0; j < n; j++) {
#pragma unroll
    for (int k = 0; k < kTaps; k++)
      if (k < p.W) rmem[k][j] = load_element(p.weight_dtype, p.weight, (d + j) * p.weight_stride_d + (p.W - 1 - k) * p.weight_stride_w);
    if (p.bias) rmem[kTaps][j] = load_element(p.weight_dtype, p.bias, d + j);
  }
#pragma unroll
  for (int k = 0; k <= kTaps; k++)
#pragma unroll
    for (int j = 0; j < n; j++) taps[k][j] = to_float(p.weight_dtype, rmem[k][j]);
}
TZ_DEVICE int64_t slot_of(const CausalConv1dUpdateParams& p, int64_t b) {
  const int64_t slot = p.conv_state_indices ? p.conv_state_indices[b] : b;
  return slot < p.num_slots ? slot : -1;
}
template <class S> TZ_DEVICE S* state_of(const CausalConv1dUpdateParams& p, int64_t slot, int64_t d) {
  return static_cast<S*>(p.conv_state) + slot * p.state_stride_s + d * p.state_stride_d;
}

// One position, at most kTaps columns. kColumns: of one access; kVec: channels of one access. Grid: tiles of channels x rows.
template <class S, int kColumns, int kVec> __global__ void __launch_bounds__(kConvThreads, 8) causal_conv1d_update_one_kernel(const CausalConv1dUpdateParams p) {
  const int64_t d = (static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x) * kVec;
  if (d >= p.D) return;
  float taps[kTaps + 1][kVec];
  load_weights(p, d, taps);
  for (int64_t b = blockIdx.y; b < p.B; b += gridDim.y) {
    const int64_t slot = slot_of(p, b);
    float out[kVec] = {};
    if (slot >= 0) {
      // held[i]: the state's columns, the newest last; those of a shorter state are the last ones
      S* state = state_of<S>(p, slot, d);
      Vector<S, kVec> held[kTaps + 1]{};
      const int absent = kTaps - static_cast<int>(p.state_len);
      if constexpr (kColumns == kTaps) {
        const Vector<S, kTaps> row = load_vector<S, kTaps>(state);
#pragma unroll
        for (int i = 0; i < kTaps; i++) held[i].data[0] = row.data[i];
      } else {
#pragma unroll
        for (int i = 0; i < kTaps; i++)
          if (i >= absent) held[i] = load_vector<S, kVec>(state + (i - absent) * p.state_stride_w);
      }
      float x[kVec];
      if constexpr (kVec > 1) load_floats<kVec>(p.x_dtype, p.x, b * p.x_stride_b + d, x);
      else x[0] = load_float(p.x_dtype, p.x, b * p.x_stride_b + d * p.x_stride_d);
      held[kTaps] = to_vector<S>(x);
#pragma unroll
      for (int j = 0; j < kVec; j++) {
        out[j] = taps[kTaps][j] + taps[0][j] * x[j];
#pragma unroll
        for (int k = 1; k < kTaps; k++)
          if (k < p.W) out[j] += taps[k][j] * to_float(held[kTaps - k].data[j]);
        if (p.silu) out[j] = silu(out[j]);
      }
      if constexpr (kColumns == kTaps) {
        Vector<S, kTaps> row;
#pragma unroll
        for (int i = 0; i < kTaps; i++) row.data[i] = held[i + 1].data[0];
        store_vector(row, state);
      } else {
#pragma unroll
        for (int i = 0; i < kTaps; i++)
          if (i >= absent) store_vector(held[i + 1], state + (i - absent) * p.state_stride_w);
      }
    }
#pragma unroll
    for (int j = 0; j < kVec; j++) store_float(out[j], p.x_dtype, p.y, b * p.y_stride_b + d + j);
  }
}

// Anything: a thread for each channel. Grid: tiles of channels x rows.
template <class S> __global__ void __launch_bounds__(kConvThreads) causal_conv1d_update_any_kernel(const CausalConv1dUpdateParams p) {
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x;
  if (d >= p.D) return;
  const int L = static_cast<int>(p.L), len = static_cast<int>(p.state_len);
  float taps[kTaps + 1][1];
  load_weights(p, d, taps);
  const auto input = [&](int64_t b, int l) { return load_float(p.x_dtype, p.x, b * p.x_stride_b + d * p.x_stride_d + l * p.x_stride_l); };
  for (int64_t b = blockIdx.y; b < p.B; b += gridDim.y) {
    const int64_t slot = slot_of(p, b), y = b * p.y_stride_b + d * p.y_stride_d;
    if (slot < 0) {
      for (int l = 0; l < L; l++) store_float(0, p.x_dtype, p.y, y + l * p.y_stride_l);
      continue;
    }
    S* state = state_of<S>(p, slot, d);
    int next = len;  // where the first new input goes, or would go: behind the last one
    if (p.cache_seqlens) next = (p.cache_seqlens[b] % len + len) % len;

    // outputs: before[k] is the input k + 1 positions back
    float before[kTaps - 1];
#pragma unroll
    for (int k = 0; k < kTaps - 1; k++) {
      const int column = next - 1 - k;
      before[k] = k + 1 < p.W ? to_float(state[(column < 0 ? column + len : column) * p.state_stride_w]) : 0;
    }
    for (int l = 0; l < L; l++) {
      const float x = input(b, l);
      float out = taps[kTaps][0] + taps[0][0] * x;
#pragma unroll
      for (int k = 1; k < kTaps; k++)
        if (k < p.W) out += taps[k][0] * before[k - 1];
      store_float(p.silu ? silu(out) : out, p.x_dtype, p.y, y + l * p.y_stride_l);
#pragma unroll
      for (int k = kTaps - 2; k > 0; k--) before[k] = before[k - 1];
      before[0] = x;
    }

    // the window shifted, or the new inputs' columns of the ring
    for (int w = 0; !p.cache_seqlens && w + L < len; w++) state[w * p.state_stride_w] = state[(w + L) * p.state_stride_w];
    for (int l = max(L - len, 0); l < L; l++) {
      const int column = p.cache_seqlens ? (next + l) % len : len - L + l;
      from_float(input(b, l), state[column * p.state_stride_w]);
    }
  }
}

// states [S, state_len, D]: a thread for each vector. Grid: sequences x tiles.
template <class T, int kVec>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_varlen_states_kernel(const CausalConv1dStatesParams p, const unsigned tiles) {
  const int64_t s = blockIdx.x / tiles, i = static_cast<int64_t>(blockIdx.x % tiles) * kConvThreads + threadIdx.x, vectors = p.D / kVec;
  if (i >= p.state_len * vectors) return;
  const int64_t w = i / vectors, d = i % vectors * kVec;
  int64_t begin = p.cu_seqlens[s * p.cu_seqlens_stride], end = p.cu_seqlens[(s + 1) * p.cu_seqlens_stride];
  begin = begin < 0 ? 0 : begin, end = end > p.T ? p.T : end;
  const int64_t t = end - p.state_len + w;
  Vector<T, kVec> v{};
  if (t >= begin) v = load_vector<T, kVec>(static_cast<const T*>(p.x) + t * p.x_stride_t + d * p.x_stride_d);
  store_vector(v, static_cast<T*>(p.states) + (s * p.state_len + w) * p.D + d);
}

}  // namespace

cudaError_t causal_conv1d_update_cuda(const CausalConv1dUpdateParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.D == 0 || p.L == 0) return cudaSuccess;
  if (p.x_dtype == DType::f64 || p.weight_dtype == DType::f64 || p.L > INT32_MAX / 4 || p.state_len > INT32_MAX / 4) return cudaErrorInvalidValue;
  return with_type(p.state_dtype, [&](auto s) {
    using S = decltype(s);
    constexpr int kVec = 4;
    const auto run = [&](auto kernel, int vec) {
      const dim3 grid(static_cast<unsigned>(ceil_div(p.D, int64_t{kConvThreads} * vec)), static_cast<unsigned>(p.B < kMostBlocks ? p.B : kMostBlocks));
      return launch(kernel, grid, kConvThreads, 0, stream, p);
    };
    // accesses of kVec elements, of up to 16 bytes
    const auto vectors = [](const void* base, std::initializer_list<int64_t> strides, int64_t bytes) {
      bool fine = reinterpret_cast<uintptr_t>(base) % (kVec * bytes) == 0;
      for (int64_t stride : strides) fine = fine && stride % kVec == 0;
      return fine;
    };
    if (p.L > 1 || p.cache_seqlens || p.state_len > kTaps) return run(causal_conv1d_update_any_kernel<S>, 1);
    if (p.state_len == kTaps && p.state_stride_w == 1 && vectors(p.conv_state, {p.state_stride_s, p.state_stride_d}, sizeof(S)))
      return run(causal_conv1d_update_one_kernel<S, kTaps, 1>, 1);
    if (p.D % kVec == 0 && p.state_stride_d == 1 && p.x_stride_d == 1 && vectors(p.conv_state, {p.state_stride_s, p.state_stride_w}, sizeof(S)) &&
        vectors(p.x, {p.x_stride_b}, size_of(p.x_dtype)))
      return run(causal_conv1d_update_one_kernel<S, 1, kVec>, kVec);
    return run(causal_conv1d_update_one_kernel<S, 1, 1>, 1);
  });
}

cudaError_t causal_conv1d_varlen_states_cuda(const CausalConv1dStatesParams& p, cudaStream_t stream) {
  if (p.num_sequences == 0 || p.D == 0) return cudaSuccess;
  return with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kVec = kVectorBytes / sizeof(T);
    const auto run = [&](auto kernel, int64_t vec) {
      const int64_t tiles = ceil_div(p.state_len * (p.D / vec), kConvThreads), blocks = p.num_sequences * tiles;
      if (blocks > INT32_MAX) return cudaErrorInvalidValue;
      return launch(kernel, dim3(static_cast<unsigned>(blocks)), kConvThreads, 0, stream, p, static_cast<unsigned>(tiles));
    };
    if (p.D % kVec == 0 && p.x_stride_d == 1 && aligned(p.x, p.x_stride_t, sizeof(T)) && aligned(p.states, 0, sizeof(T)))
      return run(causal_conv1d_varlen_states_kernel<T, kVec>, kVec);
    return run(causal_conv1d_varlen_states_kernel<T, 1>, 1);
  });
}

}}  // namespace terrazzo::cuda
