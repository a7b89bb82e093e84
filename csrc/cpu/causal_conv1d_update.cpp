// Causal depthwise convolution, decoding: L new positions (usually one) against a rolling state of the last inputs.
//
// Every row b works on slot conv_state_indices[b] (or b). The state is a window that shifts left, or with
// cache_seqlens a ring whose next write goes to column cache_seqlens[b] % state_len. One new position against a
// contiguous (D, 4) window, the layout of Hugging Face's cache, has a path of its own that shifts, appends and
// multiplies two channels to a register without a transpose; the rest goes through tiles of kTileD channels.
#include "causal_conv1d.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

constexpr int64_t kUpdateBlock = 512;
// Channels that take about 20 us; less is not worth another thread.
constexpr int64_t kSerialChannels = 16384;

template <class T> void zero_outputs(const CausalConv1dUpdateParams& p, int64_t b, int64_t d, int64_t cols) {
  T zero;
  std::memset(&zero, 0, sizeof(T));
  for (int64_t c = d; c < d + cols; c++)
    for (int64_t l = 0; l < p.L; l++)
      static_cast<T*>(p.y)[b * p.y_stride_b + c * p.y_stride_d + l * p.y_stride_l] = zero;
}

// ---- any layout --------------------------------------------------------------------------------------------
// State column that held the input `back` positions before the new ones.
inline int64_t column_before(const CausalConv1dUpdateParams& p, int64_t b, int64_t back) {
  if (!p.cache_seqlens) return p.state_len - back;
  return (p.cache_seqlens[b] % p.state_len - back + p.state_len) % p.state_len;
}

template <class T, class S> void roll_state(const CausalConv1dUpdateParams& p, int64_t b, S* state, const T* x, int64_t cols) {
  using A = acc_t<T>;
  for (int64_t c = 0; c < cols; c++) {
    S* column = state + c * p.state_stride_d;
    const T* input = x + c * p.x_stride_d;
    const int64_t kept = p.cache_seqlens ? 0 : max_of(0, p.state_len - p.L);
    for (int64_t w = 0; w < kept; w++) column[w * p.state_stride_w] = column[(w + p.L) * p.state_stride_w];
    for (int64_t l = max_of(0, p.L - p.state_len); l < p.L; l++) {
      const int64_t w = p.cache_seqlens ? (p.cache_seqlens[b] + l) % p.state_len : p.state_len - p.L + l;
      store1(load1<A>(input + l * p.x_stride_l), column + w * p.state_stride_w);
    }
  }
}

template <class T>
void update_tile(const CausalConv1dUpdateParams& p, int64_t b, int64_t slot, int64_t d, int64_t cols, const acc_t<T>* weight) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t before = p.W - 1;
  A* in = scratch<A>(kInputSlot, (before + p.L) * kTileD);
  A* out = scratch<A>(kOutputSlot, p.L * kTileD);
  const T* x = static_cast<const T*>(p.x) + b * p.x_stride_b + d * p.x_stride_d;
  T* y = static_cast<T*>(p.y) + b * p.y_stride_b + d * p.y_stride_d;
  const int64_t state_offset = slot * p.state_stride_s + d * p.state_stride_d;
  for (int64_t k = 0; k < before; k++)
    load_tile<A>(p.state_dtype, p.conv_state, state_offset + column_before(p, b, before - k) * p.state_stride_w, 0,
                 p.state_stride_d, 1, cols, in + k * kTileD, kTileD);
  load_tile<A>(x, p.x_stride_l, p.x_stride_d, p.L, cols, in + before * kTileD, kTileD);
  for (int64_t l = 0; l < p.L; l++)
    for (int64_t c = 0; c < cols; c += V::size) {
      const A* block = weight + (d + c) * (p.W + 1);
      V sum = V::load(block + p.W * V::size);
      for (int64_t w = p.W - 1; w >= 0; w--) sum = fma(V::load(in + (l + w) * kTileD + c), V::load(block + w * V::size), sum);
      (p.silu ? fast_silu(sum) : sum).store(out + l * kTileD + c);
    }
  with_type(p.state_dtype, [&](auto s) {
    roll_state<T>(p, b, static_cast<decltype(s)*>(p.conv_state) + state_offset, x, cols);
  });
  store_tile(out, kTileD, y, p.y_stride_l, p.y_stride_d, p.L, cols);
}

template <class T> void update_any(const CausalConv1dUpdateParams& p) {
  using A = acc_t<T>;
  const A* weight = load_weights<A>(p);
  const int64_t blocks = ceil_div(p.D, kTileD);
  parallel_for(0, p.B * blocks, max_of(1, kSerialChannels / (4 * kTileD * p.L)), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; item++) {
      const int64_t b = item / blocks, d = item % blocks * kTileD, cols = min_of(kTileD, p.D - d);
      const int64_t slot = p.conv_state_indices ? p.conv_state_indices[b] : b;
      if (slot < 0) zero_outputs<T>(p, b, d, cols);
      else update_tile<T>(p, b, slot, d, cols, weight);
    }
  });
}

// ---- one position, contiguous (D, 4) window ----------------------------------------------------------------
#if defined(__AVX2__)
TZ_INLINE __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
TZ_INLINE __m256 widen8(__m128i bits, bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
TZ_INLINE __m256 widen8(__m128i bits, f16) { return _mm256_cvtph_ps(bits); }
template <class S> TZ_INLINE __m256 load8(const S* p) { return widen8(_mm_loadu_si128((const __m128i*)p), S{}); }

// Sums of four for eight channels, two in each of a..d, in order.
TZ_INLINE __m256 sum_fours(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));  // channels 0 2 4 6 | 1 3 5 7
  return _mm256_permutevar8x32_ps(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Shifts x into eight channels' windows and returns their products with the weights, summed per channel.
template <class WT> TZ_INLINE __m256 shift_dot8(float* state, const float* x, const WT* weight) {
  const __m256 input = load8(x);
  __m256 product[4];
  for (int i = 0; i < 4; i++) {
    const __m256i pick = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), _mm256_set1_epi32(2 * i));
    const __m256 shifted = _mm256_permute_ps(load8(state + 8 * i), 0x39);
    const __m256 window = _mm256_blend_ps(shifted, _mm256_permutevar8x32_ps(input, pick), 0x88);
    _mm256_storeu_ps(state + 8 * i, window);
    product[i] = _mm256_mul_ps(window, load8(weight + 8 * i));
  }
  return sum_fours(product[0], product[1], product[2], product[3]);
}
// Two-byte elements: a channel's window is one 64-bit lane.
template <class S, class WT> TZ_INLINE __m256 shift_dot8(S* state, const S* x, const WT* weight) {
  const __m128i input = _mm_loadu_si128((const __m128i*)x);
  __m256 product[4];
  for (int i = 0; i < 2; i++) {
    const __m256i newest = _mm256_slli_epi64(_mm256_cvtepu16_epi64(i ? _mm_unpackhi_epi64(input, input) : input), 48);
    const __m256i old = _mm256_loadu_si256((const __m256i*)(state + 16 * i));
    const __m256i window = _mm256_or_si256(_mm256_srli_epi64(old, 16), newest);
    _mm256_storeu_si256((__m256i*)(state + 16 * i), window);
    product[2 * i] = _mm256_mul_ps(widen8(_mm256_castsi256_si128(window), S{}), load8(weight + 16 * i));
    product[2 * i + 1] = _mm256_mul_ps(widen8(_mm256_extracti128_si256(window, 1), S{}), load8(weight + 16 * i + 8));
  }
  return sum_fours(product[0], product[1], product[2], product[3]);
}
#endif

// pre[cols]: the pre-activations without bias; the windows state[cols][4] take x[cols] in.
template <class T, class WT> void shift_dot(T* state, const T* x, const WT* weight, acc_t<T>* pre, int64_t cols) {
  using A = acc_t<T>;
  int64_t c = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(T) < 8)
    for (; c + 8 <= cols; c += 8) _mm256_storeu_ps(pre + c, shift_dot8(state + 4 * c, x + c, weight + 4 * c));
#endif
  for (; c < cols; c++) {
    T* window = state + 4 * c;
    for (int w = 0; w < 3; w++) window[w] = window[w + 1];
    window[3] = x[c];
    A sum = 0;
    for (int w = 0; w < 4; w++) sum += load1<A>(window + w) * load1<A>(weight + 4 * c + w);
    pre[c] = sum;
  }
}

template <class T, class WT> void update_window4(const CausalConv1dUpdateParams& p) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const WT* bias = static_cast<const WT*>(p.bias);
  const int64_t blocks = ceil_div(p.D, kUpdateBlock);
  parallel_for(0, p.B * blocks, kSerialChannels / kUpdateBlock, [&](int64_t first, int64_t last) {
    alignas(64) A pre[kUpdateBlock];
    for (int64_t item = first; item < last; item++) {
      const int64_t b = item / blocks, d = item % blocks * kUpdateBlock, cols = min_of(kUpdateBlock, p.D - d);
      const int64_t slot = p.conv_state_indices ? p.conv_state_indices[b] : b;
      if (slot < 0) {
        zero_outputs<T>(p, b, d, cols);
        continue;
      }
      shift_dot(static_cast<T*>(p.conv_state) + slot * p.state_stride_s + 4 * d,
                static_cast<const T*>(p.x) + b * p.x_stride_b + d, static_cast<const WT*>(p.weight) + 4 * d, pre, cols);
      T* y = static_cast<T*>(p.y) + b * p.y_stride_b + d;
      int64_t c = 0;
      for (; c + 4 * V::size <= cols; c += 4 * V::size) {
        V v[4];
        for (int i = 0; i < 4; i++) {
          v[i] = V::load(pre + c + i * V::size);
          if (bias) v[i] = v[i] + V::load(bias + d + c + i * V::size);
        }
        if (p.silu) fast_silu<4>(v);
        store_pair<false>(v[0], v[1], y + c);
        store_pair<false>(v[2], v[3], y + c + 2 * V::size);
      }
      for (; c < cols; c += V::size) {
        V v = load_n<A>(pre + c, cols - c);
        if (bias) v = v + load_n<A>(bias + d + c, cols - c);
        store_n(p.silu ? fast_silu(v) : v, y + c, cols - c);
      }
    }
  });
}

template <class T> void update(const CausalConv1dUpdateParams& p) {
  const bool window4 = p.L == 1 && p.W == 4 && p.state_len == 4 && !p.cache_seqlens && p.state_stride_w == 1 &&
                       p.state_stride_d == 4 && p.state_dtype == p.x_dtype && p.x_stride_d == 1 && p.y_stride_d == 1 &&
                       p.weight_stride_w == 1 && p.weight_stride_d == 4;
  if (window4 && p.weight_dtype == p.x_dtype) return update_window4<T, T>(p);
  if (window4 && p.weight_dtype == dtype_of<acc_t<T>>::value) return update_window4<T, acc_t<T>>(p);
  update_any<T>(p);
}

}  // namespace

void causal_conv1d_update(const CausalConv1dUpdateParams& p) {
  if (p.B == 0 || p.D == 0 || p.L == 0) return;
  with_type(p.x_dtype, [&](auto t) { update<decltype(t)>(p); });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
