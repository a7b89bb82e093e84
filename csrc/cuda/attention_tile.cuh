// Tiles and products of the attention kernels. Products are mma.sync: 16-bit types as they are, floats as three products of tf32 (big small
// + small big + big big: 22 bits of each factor). What one product leaves in accumulators is the next one's left operand without leaving
// registers.
#pragma once
#include "tile.cuh"

namespace terrazzo { namespace cuda {

constexpr int kAttentionThreads = 128, kAttentionWarps = kAttentionThreads / kWarp;
constexpr int kChunk = 32;  // channels from P up to a multiple of this are zeros in a tile; what is beyond isn't touched

// ---- tiles ---------------------------------------------------------------------------------------------------
template <class T, int kP> constexpr int kPitch = kP + kVectorBytes / static_cast<int>(sizeof(T));

// Rows [first, first + kRows) of a head into a tile: zeros from row `end` and from channel P on.
template <class T, int kP, int kRows> TZ_DEVICE void load_tile(T* tile, const T* head, int64_t stride, int first, int end, int P, bool vectors) {
  constexpr int kVec = kVectorBytes / sizeof(T), kPieces = kP / kVec;
  for (int i = threadIdx.x; i < kRows * kPieces; i += kAttentionThreads) {
    const int row = i / kPieces, c = i % kPieces * kVec;
    if (c / kChunk * kChunk >= P) continue;
    T* to = tile + row * kPitch<T, kP> + c;
    const T* from = head + (first + row) * stride + c;
    const bool there = first + row < end;
    if (vectors) {
      cp_async_16(to, there && c < P ? from : head, there && c < P ? kVectorBytes : 0);
    } else {
      for (int j = 0; j < kVec; j++) {
        to[j] = T{};
        if (there && c + j < P) to[j] = from[j];
      }
    }
  }
}

// A warp's 16 rows from accumulators, row g times factor_a and row g + 8 times factor_b, through its own part of a tile to the rows
// from `first` on of a head, of which `channels` exist.
template <class T, int kP, int kColumns>
TZ_DEVICE void store_rows(const float (&out)[kColumns / 8][4], float factor_a, float factor_b, T* tile, T* head, int64_t stride, int first, int end,
                          int channels, bool vectors) {
  constexpr int kVec = kVectorBytes / sizeof(T), kPieces = kColumns / kVec;
#pragma unroll
  for (int n = 0; n < kColumns / 8; n++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float pair[2] = {out[n][2 * r] * (r ? factor_b : factor_a), out[n][2 * r + 1] * (r ? factor_b : factor_a)};
      store_vector(to_vector<T>(pair), tile + fragment_row(2 * r) * kPitch<T, kP> + 8 * n + fragment_column(0));
    }
  __syncwarp();
  for (int i = lane_id(); i < 16 * kPieces; i += kWarp) {
    const int row = i / kPieces, c = i % kPieces * kVec;
    if (first + row >= end || c >= channels) continue;
    const T* from = tile + row * kPitch<T, kP> + c;
    T* to = head + (first + row) * stride + c;
    if (vectors) store_vector(load_vector<T, kVec>(from), to);
    else for (int j = 0; j < kVec && c + j < channels; j++) to[j] = from[j];
  }
}

// ---- products ------------------------------------------------------------------------------------------------
// A left operand: 16 rows, kStep of k.
template <class T> constexpr int kStep = sizeof(T) == 2 ? 16 : 8;
template <class T> struct Left { uint32_t v[4]; };
template <> struct Left<float> { uint32_t big[4], small[4]; };

TZ_DEVICE uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
TZ_DEVICE uint32_t pack(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// From a tile's rows.
template <class T> TZ_DEVICE void load_left(Left<T>& a, const T* tile, int pitch) { load_a(a.v, tile, pitch); }
TZ_DEVICE void load_left(Left<float>& a, const float* tile, int pitch) {
#pragma unroll
  for (int i = 0; i < 4; i++) split_tf32(tile[(lane_id() / 4 + i % 2 * 8) * pitch + lane_id() % 4 + i / 2 * 4], a.big[i], a.small[i]);
}
// From accumulators (16 x 8 each): columns 8 n on. For floats the lane's two columns stand for k = t and t + 4; add_columns reads rows of the
// right operand in the same order.
template <class T, int n> TZ_DEVICE void to_left(Left<T>& a, const float (&acc)[n][4], int at) {
#pragma unroll
  for (int i = 0; i < 4; i++) a.v[i] = pack(acc[at + i / 2][i % 2 * 2], acc[at + i / 2][i % 2 * 2 + 1], T{});
}
template <int n> TZ_DEVICE void to_left(Left<float>& a, const float (&acc)[n][4], int at) {
#pragma unroll
  for (int i = 0; i < 4; i++) split_tf32(acc[at][i % 2 * 2 + i / 2], a.big[i], a.small[i]);
}

// acc (16 x 8) += a b in three products of tf32. The cross terms go in the order of the factors q k and dy v, whichever side is the left
// one: the backward's two passes must find the same bits.
template <bool kKeysLeft>
TZ_DEVICE void multiply_tf32x3(float (&acc)[4], const Left<float>& a, const uint32_t (&big)[2], const uint32_t (&small)[2]) {
  if (kKeysLeft) mma_m16n8k8_tf32(acc, a.big, small);
  mma_m16n8k8_tf32(acc, a.small, big);
  if (!kKeysLeft) mma_m16n8k8_tf32(acc, a.big, small);
  mma_m16n8k8_tf32(acc, a.big, big);
}

// acc (two of 16 x 8) += a b, b from 16 rows of a tile whose columns are k.
template <bool kKeysLeft, class T> TZ_DEVICE void add_rows(float (&acc_a)[4], float (&acc_b)[4], const Left<T>& a, const T* tile, int pitch) {
  uint32_t b[2][2];
  load_b(b, tile, pitch);
  multiply<T>(acc_a, a.v, b[0]);
  multiply<T>(acc_b, a.v, b[1]);
}
template <bool kKeysLeft> TZ_DEVICE void add_rows(float (&acc_a)[4], float (&acc_b)[4], const Left<float>& a, const float* tile, int pitch) {
#pragma unroll
  for (int j = 0; j < 2; j++) {
    uint32_t big[2], small[2];
#pragma unroll
    for (int i = 0; i < 2; i++) split_tf32(tile[(8 * j + lane_id() / 4) * pitch + lane_id() % 4 + 4 * i], big[i], small[i]);
    multiply_tf32x3<kKeysLeft>(j ? acc_b : acc_a, a, big, small);
  }
}
// The same, b from rows of a tile that are k, 16 columns of it.
template <class T> TZ_DEVICE void add_columns(float (&acc_a)[4], float (&acc_b)[4], const Left<T>& a, const T* tile, int pitch) {
  uint32_t b[2][2];
  load_b_trans(b, tile, pitch);
  multiply<T>(acc_a, a.v, b[0]);
  multiply<T>(acc_b, a.v, b[1]);
}
TZ_DEVICE void add_columns(float (&acc_a)[4], float (&acc_b)[4], const Left<float>& a, const float* tile, int pitch) {
#pragma unroll
  for (int j = 0; j < 2; j++) {
    uint32_t big[2], small[2];
#pragma unroll
    for (int i = 0; i < 2; i++) split_tf32(tile[(2 * (lane_id() % 4) + i) * pitch + 8 * j + lane_id() / 4], big[i], small[i]);
    multiply_tf32x3<false>(j ? acc_b : acc_a, a, big, small);
  }
}

// s (16 x kN) = left (16 rows of P) . right (kN rows of P)
template <class T, int kP, int kN, bool kKeysLeft> TZ_DEVICE void row_products(float (&s)[kN / 8][4], const T* left, const T* right, int P) {
#pragma unroll
  for (int n = 0; n < kN / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = 0;
#pragma unroll
  for (int chunk = 0; chunk < kP; chunk += kChunk) {
    if (chunk >= P) break;
#pragma unroll
    for (int c = chunk; c < chunk + kChunk; c += kStep<T>) {
      Left<T> a;
      load_left(a, left + c, kPitch<T, kP>);
#pragma unroll
      for (int n = 0; n < kN; n += 16) add_rows<kKeysLeft>(s[n / 8], s[n / 8 + 1], a, right + n * kPitch<T, kP> + c, kPitch<T, kP>);
    }
  }
}

// out (16 x kColumns) += w (16 x kN) rows (kN x kColumns), of which the first `channels` columns count.
template <class T, int kP, int kN, int kColumns>
TZ_DEVICE void add_weighted_rows(float (&out)[kColumns / 8][4], const float (&w)[kN / 8][4], const T* rows, int channels) {
  Left<T> a[kN / kStep<T>];
#pragma unroll
  for (int k = 0; k < kN / kStep<T>; k++) to_left(a[k], w, k * kStep<T> / 8);
#pragma unroll
  for (int chunk = 0; chunk < kColumns; chunk += kChunk) {
    if (chunk >= channels) break;
#pragma unroll
    for (int k = 0; k < kN / kStep<T>; k++)
#pragma unroll
      for (int c = chunk; c < chunk + kChunk; c += 16)
        add_columns(out[c / 8], out[c / 8 + 1], a[k], rows + k * kStep<T> * kPitch<T, kP> + c, kPitch<T, kP>);
  }
}

// ---- softmax -------------------------------------------------------------------------------------------------
TZ_DEVICE float quad_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}
TZ_DEVICE float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, 1));
  return fmaxf(v, __shfl_xor_sync(kAllLanes, v, 2));
}

// Online softmax of a lane's two rows: the largest score so far, and the lane's part of the sum of 2^(score - top).
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};

  // Scores of one more tile become weights; factor: what everything summed before must be multiplied by.
  template <int kN> TZ_DEVICE void step(float (&s)[kN / 8][4], float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float highest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kN / 8; n++) highest = fmaxf(highest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      highest = fmaxf(top[r], quad_max(highest));
      const float base = highest == -INFINITY ? 0.0f : highest;  // nothing seen so far
      factor[r] = exp2_approx(top[r] - base);
      top[r] = highest;
      total[r] *= factor[r];
#pragma unroll
      for (int n = 0; n < kN / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          s[n][2 * r + i] = exp2_approx(s[n][2 * r + i] - base);
          total[r] += s[n][2 * r + i];
        }
    }
  }
  // The logarithm of the whole sum, and its inverse; +inf and 0 where nothing was seen.
  TZ_DEVICE void finish(float (&lse)[2], float (&inverse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float sum = quad_sum(total[r]);
      lse[r] = sum == 0 ? INFINITY : top[r] + log2f(sum);
      inverse[r] = sum == 0 ? 0.0f : 1.0f / sum;
    }
  }
};

}}  // namespace terrazzo::cuda
