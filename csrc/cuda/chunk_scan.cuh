// What the kernels of the Mamba-2 scan share: chunks, tiles, products that keep float's digits.
//
// Every sequence (a row, or a range of cu_seqlens) is cut into chunks of kScanChunk positions from its own start. Per chunk and head
// chunk_scan_states.cu writes, of every position l,
//   kDt           dt after bias, softplus and clamp; 0 at padding and behind the end
//   kHi, kLo      cum_l, the sum of dt A from the start of the chunk to l, in two parts: a difference of two large sums keeps its digits
//   kFromStart    exp(cum_l)
//   kToEnd        exp(cum_last - cum_l)
// A position where seq_idx changes starts anew: its step is so negative that nothing before it remains, in values and gradients
// alike, and no other kernel knows of packed rows.
//
// A block has 64 rows of a product, its four warps 16 each. Products of inputs are exact in the tensor cores. Of the others one factor
// (states, weights) is float, and both multiply as tf32: in 16-bit dtypes the other factor is exact in tf32 too, whatever its range,
// and two parts of the float factor give float's digits. In float both have two parts, three products.
#pragma once
#include "kernels.h"
#include "tile.cuh"

namespace terrazzo { namespace cuda { namespace scan {

constexpr int kChunk = kScanChunk, kThreads = 128, kWarps = kThreads / kWarp, kRowsOfWarp = 16;
static_assert(kWarps * kRowsOfWarp == kChunk && kChunk == 2 * kWarp, "a warp for 16 positions, two positions for a lane");
constexpr int kBlocks = kChunk / 8;          // of 8 columns in 64
using Accumulators = float[kBlocks][4];      // 16 x 64 of a warp
using Decays = float[kScanDecays][kChunk];   // of one head in one chunk

// How the forward keeps the states before each chunk for its own use: with bf16 inputs rounded to them, half the bytes of what is most
// of its traffic. fp16's range might not hold them.
template <class T> struct KeptState { using type = float; };
template <> struct KeptState<__nv_bfloat16> { using type = __nv_bfloat16; };

// What may be read in accesses of 16 bytes.
struct Vectors { bool x, B, C, z, dy, states; };
inline Vectors vectors_of(const ChunkScanCudaParams& p) {
  const int64_t bytes = size_of(p.x_dtype), vec = kVectorBytes / bytes;
  const auto rows = [&](const void* base, int64_t width, int64_t a, int64_t b, int64_t c) {
    return width % vec == 0 && aligned(base, a, bytes) && aligned(base, b, bytes) && aligned(base, c, bytes);
  };
  return {rows(p.x, p.P, p.x_stride_b, p.x_stride_l, p.x_stride_h), rows(p.Bm, p.N, p.B_stride_b, p.B_stride_l, p.B_stride_g),
          rows(p.C, p.N, p.C_stride_b, p.C_stride_l, p.C_stride_g), rows(p.z, p.P, p.z_stride_b, p.z_stride_l, p.z_stride_h),
          rows(p.dy, p.P, p.dy_stride_b, p.dy_stride_l, p.dy_stride_h), p.N % 4 == 0};
}

// The launches of chunk_scan_states.cu: chunks and decays; the states before each chunk, or with `reverse` the gradients of those after
// it. That of chunk_scan_bwd_bc.cu: shares of dB and dC.
enum class Pass { forward, again, reverse };  // again: the forward's states for the backward, in float
cudaError_t launch_decays(const ChunkScanCudaParams& p, cudaStream_t stream);
cudaError_t launch_states(const ChunkScanCudaParams& p, Pass pass, cudaStream_t stream);
cudaError_t launch_bwd_bc(const ChunkScanCudaParams& p, cudaStream_t stream);
// Types and sizes that the kernels have no way for: sizes are counted in int, blocks along x of a grid.
inline bool unsupported(const ChunkScanCudaParams& p) {
  const int64_t tiles = ceil_div(p.P, 64) * ceil_div(p.N, 64);
  return p.N == 0 || p.L > INT32_MAX - kChunk || p.H > INT32_MAX || p.P > INT32_MAX / 2 || p.N > INT32_MAX / 2 || ceil_div(p.P, 64) > 65535 ||
         ceil_div(p.N, 64) > 65535 || scan_chunks(p) > INT32_MAX / p.H || p.sequences > INT32_MAX / p.H / tiles || p.x_dtype == DType::f64 ||
         p.dt_dtype == DType::f64 || p.state_dtype != DType::f32;
}

TZ_DEVICE ScanChunk chunk_at(const ChunkScanCudaParams& p, int64_t chunk) { return static_cast<const ScanChunk*>(p.chunks)[chunk]; }
TZ_DEVICE bool is_real(const ScanChunk& chunk, int l) { return chunk.real >> l & 1; }
TZ_DEVICE const float* decays_at(const ChunkScanCudaParams& p, int64_t chunk, int64_t head) {
  return static_cast<const float*>(p.decays) + (chunk * p.H + head) * kScanDecays * kChunk;
}
// exp(cum_l - cum_s), s <= l.
TZ_DEVICE float between(const Decays& d, int l, int s) { return expf((d[kHi][l] - d[kHi][s]) + (d[kLo][l] - d[kLo][s])); }

// ---- tiles in shared memory ----------------------------------------------------------------------------------
// The pitch that keeps fragments free of bank conflicts; floats read by columns (rows of k) need another one.
template <class T> constexpr int pitch_of(int columns, bool rows_of_k = false) { return columns + (sizeof(T) == 4 && rows_of_k ? 4 : 8); }

// kRows x kColumns from rows `stride` apart; zeros in rows that aren't valid(row) and from `columns` on. Asynchronous where vectors.
template <int kRows, int kColumns, class T, class Valid>
TZ_DEVICE void load_tile(T* tile, int pitch, const T* src, int64_t stride, int columns, bool vectors, const Valid& valid) {
  constexpr int kVec = kVectorBytes / static_cast<int>(sizeof(T)), kPieces = kColumns / kVec;
  if (vectors) {
#pragma unroll
    for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
      const int row = i / kPieces, column = i % kPieces * kVec;
      const bool inside = valid(row) && column < columns;
      cp_async_16(tile + row * pitch + column, inside ? src + row * stride + column : src, inside ? kVectorBytes : 0);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
      const int row = i / kColumns, column = i % kColumns;
      if (valid(row) && column < columns) tile[row * pitch + column] = src[row * stride + column];
      else from_float(0, tile[row * pitch + column]);
    }
  }
}
TZ_DEVICE void load_decays(Decays& decays, const float* src) {
  float* to = &decays[0][0];
  for (int i = threadIdx.x; i < kScanDecays * kChunk / 4; i += kThreads) cp_async_16(to + 4 * i, src + 4 * i, kVectorBytes);
}

// ---- fragments as floats -------------------------------------------------------------------------------------
// Pair j of a (16 x 16), v[2 j] and v[2 j + 1], is what load_a packs into a[j]: row g + j % 2 * 8, columns 2 t + j / 2 * 8 and the next.
// Two neighbouring accumulators are such a fragment. For tf32, whose own layout is (t, t + 4), k is permuted in both operands.
template <class T> TZ_DEVICE void unpack(uint32_t pair, float* v) {
  Vector<T, 2> both;
  memcpy(static_cast<void*>(&both), &pair, sizeof(pair));
  v[0] = to_float(both.data[0]), v[1] = to_float(both.data[1]);
}
// Element (m, k) of a is tile[m * pitch + k], or with kTrans tile[k * pitch + m].
template <bool kTrans, class T> TZ_DEVICE void load_a_floats(float (&a)[8], const T* tile, int pitch) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  if constexpr (sizeof(T) == 2) {
    uint32_t r[4];
    if constexpr (kTrans) ldmatrix_x4_trans(r, tile + (lane_id() % 8 + lane_id() / 16 * 8) * pitch + lane_id() / 8 % 2 * 8);
    else load_a(r, tile, pitch);
#pragma unroll
    for (int j = 0; j < 4; j++) unpack<T>(r[j], a + 2 * j);
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int m = g + j % 2 * 8, k = 2 * t + j / 2 * 8;
      if constexpr (kTrans) {
        a[2 * j] = tile[k * pitch + m], a[2 * j + 1] = tile[(k + 1) * pitch + m];
      } else {
        const Vector<T, 2> both = load_vector<T, 2>(tile + m * pitch + k);
        a[2 * j] = both.data[0], a[2 * j + 1] = both.data[1];
      }
    }
  }
}
// Two neighbouring b (16 x 8): element (k, n), n = 0..15, is tile[n * pitch + k], or with kTrans tile[k * pitch + n].
template <bool kTrans, class T> TZ_DEVICE void load_b_floats(float (&b)[2][4], const T* tile, int pitch) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  if constexpr (sizeof(T) == 2) {
    uint32_t r[2][2];
    if constexpr (kTrans) load_b_trans(r, tile, pitch);
    else load_b(r, tile, pitch);
#pragma unroll
    for (int j = 0; j < 4; j++) unpack<T>(r[j / 2][j % 2], b[j / 2] + j % 2 * 2);
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int n = g + j / 2 * 8, k = 2 * t + j % 2 * 8;
      float* v = b[j / 2] + j % 2 * 2;
      if constexpr (kTrans) {
        v[0] = tile[k * pitch + n], v[1] = tile[(k + 1) * pitch + n];
      } else {
        const Vector<T, 2> both = load_vector<T, 2>(tile + n * pitch + k);
        v[0] = both.data[0], v[1] = both.data[1];
      }
    }
  }
}

// ---- products ------------------------------------------------------------------------------------------------
// How a factor multiplies in tf32 beside inputs of type T: the inputs themselves; float factors, with kFull to all their digits.
template <class T> struct Input {
  static constexpr int kParts = sizeof(T) == 4 ? 2 : 1;
  static constexpr bool kRound = sizeof(T) == 4;
};
template <class T, bool kFull> struct Weighted {
  static constexpr int kParts = sizeof(T) == 4 || kFull ? 2 : 1;
  static constexpr bool kRound = true;
};
template <int kParts, int n> struct Tf32 { uint32_t parts[kParts][n]; };
template <class Factor, int n> TZ_DEVICE Tf32<Factor::kParts, n> split(const float (&v)[n]) {
  Tf32<Factor::kParts, n> out;
#pragma unroll
  for (int i = 0; i < n; i++) {
    if constexpr (Factor::kParts == 2) split_tf32(v[i], out.parts[0][i], out.parts[1][i]);
    else out.parts[0][i] = Factor::kRound ? to_tf32(v[i]) : __float_as_uint(v[i]);
  }
  return out;
}
// acc (16 x 8) += a (16 x 16) b (16 x 8). Where digits count, products of 16 of k are added up on their own, small parts first: three
// times as many sums would round in a long accumulator.
template <int kPartsA, int kPartsB> TZ_DEVICE void multiply_tf32(float (&acc)[4], const Tf32<kPartsA, 8>& a, const Tf32<kPartsB, 4>& b) {
  const auto add = [&](float (&to)[4], int i, int j) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const uint32_t (&v)[8] = a.parts[i];
      const uint32_t (&w)[4] = b.parts[j];
      mma_m16n8k8_tf32(to, {v[4 * k], v[4 * k + 2], v[4 * k + 1], v[4 * k + 3]}, {w[2 * k], w[2 * k + 1]});
    }
  };
  if constexpr (kPartsA + kPartsB == 2) return add(acc, 0, 0);
  float sum[4] = {};
  if constexpr (kPartsA == 2) add(sum, 1, 0);
  if constexpr (kPartsB == 2) add(sum, 0, 1);
  add(sum, 0, 0);
#pragma unroll
  for (int i = 0; i < 4; i++) acc[i] += sum[i];
}

// acc (16 x 64) += a b over those k of 0..kDepth that lie in [begin, end), for the first `columns` of b: load(k, v) gives a's fragment at k.
template <class A, class B, bool kTransB, int kDepth, class T, class Load>
TZ_DEVICE void add_product(Accumulators& acc, const Load& load, const T* b, int pitch, int begin, int end, int columns) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    if (k < begin || k >= end) continue;
    float v[8], w[2][4];
    load(k, v);
    const auto a = split<A>(v);
#pragma unroll
    for (int j = 0; j < kBlocks; j += 2) {
      if (8 * j >= columns) continue;
      load_b_floats<kTransB>(w, kTransB ? b + k * pitch + 8 * j : b + 8 * j * pitch + k, pitch);
      multiply_tf32(acc[j], a, split<B>(w[0]));
      multiply_tf32(acc[j + 1], a, split<B>(w[1]));
    }
  }
}
// acc (16 x 64) += a b of inputs over k in 0..end, for the columns from `first` to `last`, multiples of 16. Both in rows, k neighbours.
template <int kDepth, class T> TZ_DEVICE void add_inputs(Accumulators& acc, const T* a, const T* b, int pitch, int end, int first, int last) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    if (k >= end) continue;
    if constexpr (sizeof(T) == 2) {
      uint32_t v[4], w[2][2];
      load_a(v, a + k, pitch);
#pragma unroll
      for (int j = 0; j < kBlocks; j += 2) {
        if (8 * j < first || 8 * j >= last) continue;
        load_b(w, b + 8 * j * pitch + k, pitch);
        multiply<T>(acc[j], v, w[0]);
        multiply<T>(acc[j + 1], v, w[1]);
      }
    } else {
      float v[8], w[2][4];
      load_a_floats<false>(v, a + k, pitch);
      const auto parts = split<Input<T>>(v);
#pragma unroll
      for (int j = 0; j < kBlocks; j += 2) {
        if (8 * j < first || 8 * j >= last) continue;
        load_b_floats<false>(w, b + 8 * j * pitch + k, pitch);
        multiply_tf32(acc[j], parts, split<Input<T>>(w[0]));
        multiply_tf32(acc[j + 1], parts, split<Input<T>>(w[1]));
      }
    }
  }
}
// Accumulators as the a of a product, 16 x 16 from column k on.
TZ_DEVICE void fragment_of(const Accumulators& acc, int k, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = acc[k / 8 + i / 4][i % 4];
}
TZ_DEVICE void clear(Accumulators& acc) {
#pragma unroll
  for (int j = 0; j < kBlocks; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) acc[j][i] = 0;
}
// f(i, row, column, a, b) for the pairs of neighbours a, b among a lane's accumulators; row is its i-th, i = 0 or 1, of `first_row` on.
template <class F> TZ_DEVICE void for_pairs(Accumulators& acc, int first_row, const F& f) {
#pragma unroll
  for (int j = 0; j < kBlocks; j++)
#pragma unroll
    for (int i = 0; i < 4; i += 2) f(i / 2, first_row + fragment_row(i), 8 * j + fragment_column(i), acc[j][i], acc[j][i + 1]);
}
// a and b to p[0] and p[1], of which `left` are there.
template <class T> TZ_DEVICE void store_pair(float a, float b, T* p, int left, bool pairs) {
  if (left <= 0) return;
  if (pairs) {
    const float v[2] = {a, b};
    return store_vector(to_vector<T>(v), p);
  }
  from_float(a, p[0]);
  if (left > 1) from_float(b, p[1]);
}
template <class T> TZ_DEVICE void load_pair(const T* p, int left, bool pairs, float (&v)[2]) {
  v[0] = v[1] = 0;
  if (left <= 0) return;
  if (pairs) return load_floats<T, 2>(p, v);
  v[0] = to_float(p[0]);
  if (left > 1) v[1] = to_float(p[1]);
}

TZ_DEVICE int rounded(int n) { return ceil_div(n, 16) * 16; }

}}}  // namespace terrazzo::cuda::scan
