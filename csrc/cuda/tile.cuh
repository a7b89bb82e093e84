// Tiles for the tensor cores: fragments of 16 x 16 and 16 x 8 in registers, filled from shared memory. 16-bit types multiply as they
// are, floats as tf32. A tile in shared memory is rows of `pitch` elements; a pitch of 16 bytes more than a multiple of 128 bytes keeps
// ldmatrix free of bank conflicts.
//
// In a fragment lane l owns rows g = l / 4 and g + 8 and columns 2 t and 2 t + 1, t = l % 4, of every 16 x 8 block of accumulators:
// acc[0..1] of row g, acc[2..3] of row g + 8.
#pragma once
#include "ptx.cuh"

namespace terrazzo { namespace cuda {

TZ_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
TZ_DEVICE int fragment_row(int i) { return lane_id() / 4 + i / 2 * 8; }        // of acc[i]
TZ_DEVICE int fragment_column(int i) { return lane_id() % 4 * 2 + i % 2; }

// a (16 x 16) from rows of k: the tile's element (m, k) is tile[m * pitch + k].
template <class T> TZ_DEVICE void load_a(uint32_t (&a)[4], const T* tile, int pitch) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  ldmatrix_x4(a, tile + lane_id() % 16 * pitch + lane_id() / 16 * 8);
}
// The same from rows of m: element (m, k) is tile[k * pitch + m].
template <class T> TZ_DEVICE void load_a_trans(uint32_t (&a)[4], const T* tile, int pitch) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  ldmatrix_x4_trans(a, tile + (lane_id() % 8 + lane_id() / 16 * 8) * pitch + lane_id() / 8 % 2 * 8);
}
// Two neighbouring b (16 x 8) from rows of k: element (k, n) is tile[n * pitch + k], n = 0..15.
template <class T> TZ_DEVICE void load_b(uint32_t (&b)[2][2], const T* tile, int pitch) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  uint32_t r[4];
  ldmatrix_x4(r, tile + (lane_id() % 8 + lane_id() / 16 * 8) * pitch + lane_id() / 8 % 2 * 8);
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}
// The same from rows of n: element (k, n) is tile[k * pitch + n].
template <class T> TZ_DEVICE void load_b_trans(uint32_t (&b)[2][2], const T* tile, int pitch) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  uint32_t r[4];
  ldmatrix_x4_trans(r, tile + lane_id() % 16 * pitch + lane_id() / 16 * 8);
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}
// acc (16 x 8) += a b.
template <class T> TZ_DEVICE void multiply(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k16(acc, a, b, T{}); }

// tf32, k = 8: a (16 x 8) with element (m, k) at tile[m * pitch + k], b (8 x 8) with element (k, n) at tile[n * pitch + k].
TZ_DEVICE void load_a_tf32(uint32_t (&a)[4], const float* tile, int pitch) {
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = to_tf32(tile[(lane_id() / 4 + i % 2 * 8) * pitch + lane_id() % 4 + i / 2 * 4]);
}
TZ_DEVICE void load_b_tf32(uint32_t (&b)[2], const float* tile, int pitch) {
#pragma unroll
  for (int i = 0; i < 2; i++) b[i] = to_tf32(tile[lane_id() / 4 * pitch + lane_id() % 4 + i * 4]);
}

// x as the sum of two tf32 numbers, 22 bits of it: products of floats keep their digits as big big + big small + small big.
// The rest is rounded by an addition: mma doesn't read the bits behind, and what isn't finite is in `big` already.
TZ_DEVICE void split_tf32(float x, uint32_t& big, uint32_t& small) {
  big = to_tf32(x);
  small = __float_as_uint(x - __uint_as_float(big)) + 0x1000u;
}

// compute(i, stage) for i < count, the tiles of load(i, stage) under way one step ahead where there are two stages.
template <int kStages, class Load, class Compute> TZ_DEVICE void walk(int count, const Load& load, const Compute& compute) {
  const auto start = [&](int i) {
    load(i, kStages == 1 ? 0 : i % 2);
    cp_async_commit();
  };
  if (kStages == 2 && count > 0) start(0);
  for (int i = 0; i < count; i++) {
    if (kStages == 1) start(i);
    else if (i + 1 < count) start(i + 1);
    if (kStages == 2 && i + 1 < count) cp_async_wait<1>();
    else cp_async_wait<0>();
    __syncthreads();
    compute(i, kStages == 1 ? 0 : i % 2);
    __syncthreads();  // the next load overwrites what other warps may still read
  }
}

}}  // namespace terrazzo::cuda
