// Matrix products in tiles: acc (kBlockM x kBlockN) += a b, a sum over k. What grouped products, weight gradients and experts share.
//
// A block's operands come by cp.async into a ring of kStages pieces of kBlockK, each warp multiplies kWarpM x kWarpN of them by
// mma.sync. 16-bit types multiply as they are; everything else is float, split into two tf32 numbers (big, small) and multiplied
// as small big + big small + big big, which keeps float's digits; an operand stored in 16 bits has no small part. Floats are summed
// piece by piece, and the pieces then: of one long sum more than the last digits are lost.
// Operands lie in shared memory as in memory, rows of k or rows of m (n), so that 16-byte pieces fit whichever stride is one; operands
// with neither, or not aligned, come element by element. The results leave through shared memory, a warp's strip at a time: a
// lane then holds neighbouring columns of a row, and whatever follows the product is written once, in a loop.
#pragma once
#include "group_tiles.cuh"
#include "tile.cuh"

namespace terrazzo { namespace cuda {

constexpr int kStripRows = 32;  // accumulator rows of a warp that lie in shared memory at a time

template <int M, int N, int K, int WarpsM, int WarpsN, int Stages, int Blocks> struct TileShape {
  static constexpr int kBlockM = M, kBlockN = N, kBlockK = K, kStages = Stages;
  static constexpr int kWarpsM = WarpsM, kWarpsN = WarpsN, kWarps = WarpsM * WarpsN, kThreads = kWarps * kWarp;
  static constexpr int kWarpM = M / WarpsM, kWarpN = N / WarpsN;
  static constexpr int kBlocks = Blocks;  // a multiprocessor: one loads while another multiplies
  static_assert(kWarpM % kStripRows == 0 && kWarpN % 16 == 0);
};
// few: rows of a decoding step, where reading b is all there is; many: the tensor cores are the limit.
template <class T> struct Shapes {
  using few = TileShape<32, 64, 64, 1, 4, 4, 4>;
  using many = TileShape<128, 128, 32, 2, 2, 3, 2>;
};
template <> struct Shapes<float> {
  using few = TileShape<32, 64, 32, 1, 4, 3, 4>;
  using many = TileShape<64, 64, 32, 2, 2, 3, 2>;
};

// How elements come into shared memory: 16 bytes at a time; four at a time, converted; one by one.
enum class Way { async, convert, elements };

// Element (i, k) of an operand at data + i * stride_i + k * stride_k, in bytes; i is a row of a or a column of b.
struct Operand {
  DType dtype;
  Way way;
  const char* data;
  int64_t stride_i, stride_k;
};
// Where outer index i begins (at k = 0), and how many from i on exist.
struct Outer {
  const char* address;
  int left;
};

// 16 bytes of a tile; the elements from `left` on are zero.
template <class T> TZ_DEVICE void fill_chunk(T* to, const Operand& op, const char* from, int left, int64_t stride) {
  constexpr int kChunk = kVectorBytes / sizeof(T);
  if (op.way == Way::async) {
    const int bytes = (left < 0 ? 0 : left < kChunk ? left : kChunk) * static_cast<int>(sizeof(T));
    cp_async_16(to, bytes ? from : op.data, bytes);
    return;
  }
  float v[kChunk];
  if (sizeof(T) == 4 && op.way == Way::convert && left >= kChunk) {
    load_floats<kChunk>(op.dtype, from, 0, v);
  } else {
#pragma unroll
    for (int j = 0; j < kChunk; j++) v[j] = j < left ? load_float(op.dtype, from + j * stride, 0) : 0.0f;
  }
  store_vector(to_vector<T>(v), to);
}

// An operand's tile in shared memory, kOuter x kDepth: rows of k (element (i, k) at tile[i * kPitch + k]) or rows of i. Each thread
// brings the same chunks of every piece.
template <class T, bool kRowsOfK, int kOuter, int kDepth, int kThreads> struct OperandTile {
  static constexpr int kChunk = kVectorBytes / sizeof(T), kRows = kRowsOfK ? kOuter : kDepth, kColumns = kRowsOfK ? kDepth : kOuter;
  static constexpr int kPitch = kColumns + (sizeof(T) == 2 || !kRowsOfK ? 8 : 4);  // no bank conflicts of ldmatrix, or of a fragment's floats
  static constexpr int kElements = kRows * kPitch;
  static constexpr int kChunks = kColumns / kChunk, kStep = kThreads / kChunks, kPasses = kRows / kStep;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0);
  static constexpr int kStrideI = kRowsOfK ? kPitch : 1, kStrideK = kRowsOfK ? 1 : kPitch;

  // Eight lanes write 128 bytes at a time: where those are two rows, of rows four apart, for neighbours' would meet in banks.
  TZ_DEVICE static int first_row() {
    const int row = static_cast<int>(threadIdx.x) / kChunks;
    return kChunks == 4 ? row / 8 * 8 + row % 8 / 2 + row % 2 * 4 : row;
  }
  static_assert(kChunks > 4 || (kChunks == 4 && kStep % 8 == 0));

  const char* address[kRowsOfK ? kPasses : 1];  // null outside
  int left;                                      // of the chunk's outer indices, where they are neighbours

  // outer_at(i): the Outer of index i of the tile.
  template <class F> TZ_DEVICE void begin(const F& outer_at) {
    const int row = first_row(), column = threadIdx.x % kChunks * kChunk;
    if constexpr (kRowsOfK) {
#pragma unroll
      for (int pass = 0; pass < kPasses; pass++) {
        const Outer outer = outer_at(row + pass * kStep);
        address[pass] = outer.left > 0 ? outer.address : nullptr;
      }
    } else {
      const Outer outer = outer_at(column);
      address[0] = outer.address, left = outer.left;
    }
  }
  // The piece from k on, of which left_k exist. rows: where rows of k come from, or null.
  TZ_DEVICE void fill(T* tile, const Operand& op, int k, int left_k, const int32_t* rows) const {
    const int row = first_row(), column = threadIdx.x % kChunks * kChunk;
#pragma unroll
    for (int pass = 0; pass < kPasses; pass++) {
      const int r = row + pass * kStep;
      if constexpr (kRowsOfK) {
        const bool exists = address[pass] && left_k > column;
        const char* from = exists ? address[pass] + (k + column) * op.stride_k : nullptr;
        fill_chunk(tile + r * kPitch + column, op, from, exists ? left_k - column : 0, op.stride_k);
      } else {
        const int64_t source = r >= left_k ? 0 : rows ? rows[k + r] : k + r;
        fill_chunk(tile + r * kPitch + column, op, address[0] + source * op.stride_k, r < left_k ? left : 0, op.stride_i);
      }
    }
  }
};

template <class T, bool kARowsOfK, bool kBRowsOfK, class Shape> struct Product {
  using TileA = OperandTile<T, kARowsOfK, Shape::kBlockM, Shape::kBlockK, Shape::kThreads>;
  using TileB = OperandTile<T, kBRowsOfK, Shape::kBlockN, Shape::kBlockK, Shape::kThreads>;
  static constexpr int kStage = TileA::kElements + TileB::kElements, kStages = Shape::kStages, kBlockK = Shape::kBlockK;
  static constexpr int kM = Shape::kWarpM / 16, kN = Shape::kWarpN / 8;
  static constexpr int kStripPitch = Shape::kWarpN + 4;
  static constexpr size_t kRingBytes = sizeof(T) * kStage * kStages, kStripBytes = sizeof(float) * Shape::kWarps * kStripRows * kStripPitch;
  static constexpr size_t kSharedBytes = kRingBytes > kStripBytes ? kRingBytes : kStripBytes;

  TileA a;
  TileB b;
  using Accumulators = float[kM][kN][4];
  Accumulators acc;

  TZ_DEVICE static int warp_m() { return static_cast<int>(threadIdx.x) / kWarp / Shape::kWarpsN; }
  TZ_DEVICE static int warp_n() { return static_cast<int>(threadIdx.x) / kWarp % Shape::kWarpsN; }

  TZ_DEVICE static void clear(Accumulators& acc) {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int n = 0; n < kN; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[m][n][i] = 0;
  }

  // acc += the sum over k < depth, from where a.begin and b.begin stand. The ring is free for others when this returns.
  TZ_DEVICE void add(T* ring, const Operand& op_a, const Operand& op_b, int depth, const int32_t* a_rows = nullptr, const int32_t* b_rows = nullptr) {
    const int steps = ceil_div(depth, kBlockK);
    const auto fill = [&](int step) {
      T* stage = ring + step % kStages * kStage;
      if (step < steps) {
        a.fill(stage, op_a, step * kBlockK, depth - step * kBlockK, a_rows);
        b.fill(stage + TileA::kElements, op_b, step * kBlockK, depth - step * kBlockK, b_rows);
      }
      cp_async_commit();
    };
#pragma unroll 1
    for (int step = 0; step < kStages - 1; step++) fill(step);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the piece is there, and nobody reads the one before
      fill(step + kStages - 1);
      const T* stage = ring + step % kStages * kStage;
      if constexpr (sizeof(T) == 2) {
        multiply_piece(acc, stage, stage + TileA::kElements);
      } else {
        Accumulators sums;
        clear(sums);
        multiply_piece(sums, stage, stage + TileA::kElements, op_a.dtype == DType::f32, op_b.dtype == DType::f32);
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int n = 0; n < kN; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][n][i] += sums[m][n][i];
      }
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  // sums += a piece; split: whether a float operand has small parts.
  TZ_DEVICE void multiply_piece(Accumulators& sums, const T* tile_a, const T* tile_b, bool split_a = true, bool split_b = true) const {
    tile_a += warp_m() * Shape::kWarpM * TileA::kStrideI, tile_b += warp_n() * Shape::kWarpN * TileB::kStrideI;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int k = 0; k < kBlockK; k += 16) {
        uint32_t a_rmem[kM][4];
#pragma unroll
        for (int m = 0; m < kM; m++) {
          const T* from = tile_a + m * 16 * TileA::kStrideI + k * TileA::kStrideK;
          if constexpr (kARowsOfK) load_a(a_rmem[m], from, TileA::kPitch);
          else load_a_trans(a_rmem[m], from, TileA::kPitch);
        }
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
          uint32_t b_rmem[2][2];
          const T* from = tile_b + n * 8 * TileB::kStrideI + k * TileB::kStrideK;
          if constexpr (kBRowsOfK) load_b(b_rmem, from, TileB::kPitch);
          else load_b_trans(b_rmem, from, TileB::kPitch);
#pragma unroll
          for (int m = 0; m < kM; m++) {
            multiply<T>(sums[m][n], a_rmem[m], b_rmem[0]);
            multiply<T>(sums[m][n + 1], a_rmem[m], b_rmem[1]);
          }
        }
      }
    } else {
      const int row = lane_id() / 4, column = lane_id() % 4;
#pragma unroll
      for (int k = 0; k < kBlockK; k += 8) {
        uint32_t a_big[kM][4], a_small[kM][4];
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            split_tf32(tile_a[(m * 16 + row + i % 2 * 8) * TileA::kStrideI + (k + column + i / 2 * 4) * TileA::kStrideK], a_big[m][i], a_small[m][i]);
#pragma unroll
        for (int n = 0; n < kN; n++) {
          uint32_t b_big[2], b_small[2];
#pragma unroll
          for (int i = 0; i < 2; i++)
            split_tf32(tile_b[(n * 8 + row) * TileB::kStrideI + (k + column + i * 4) * TileB::kStrideK], b_big[i], b_small[i]);
#pragma unroll
          for (int m = 0; m < kM; m++) {
            if (split_a) mma_m16n8k8_tf32(sums[m][n], a_small[m], b_big);
            if (split_b) mma_m16n8k8_tf32(sums[m][n], a_big[m], b_small);
            mma_m16n8k8_tf32(sums[m][n], a_big[m], b_big);
          }
        }
      }
    }
  }

  // use(row, column, v) for kUnit neighbouring columns of a row of the tile at a time; every lane of a warp makes the same number of
  // calls, neighbouring lanes for neighbouring columns of the same row. `strips`: the ring. The block must meet before it is filled again.
  template <int kUnit, class F> TZ_DEVICE void results(void* strips, const F& use) {
    constexpr int kUnits = Shape::kWarpN / kUnit;
    float* strip = static_cast<float*>(strips) + threadIdx.x / kWarp * kStripRows * kStripPitch;
#pragma unroll
    for (int part = 0; part < Shape::kWarpM / kStripRows; part++) {
#pragma unroll
      for (int m = 0; m < kStripRows / 16; m++)
#pragma unroll
        for (int n = 0; n < kN; n++)
#pragma unroll
          for (int i = 0; i < 4; i += 2) {
            const float(&from)[4] = acc[part * (kStripRows / 16) + m][n];
            store_vector(Vector<float, 2>{{from[i], from[i + 1]}}, strip + (m * 16 + fragment_row(i)) * kStripPitch + n * 8 + fragment_column(i));
          }
      __syncwarp();
#pragma unroll 1
      for (int unit = lane_id(); unit < kStripRows * kUnits; unit += kWarp) {
        const int row = unit / kUnits, column = unit % kUnits * kUnit;
        float v[kUnit];
        load_floats(strip + row * kStripPitch + column, v);
        use(warp_m() * Shape::kWarpM + part * kStripRows + row, warp_n() * Shape::kWarpN + column, v);
      }
      __syncwarp();
    }
  }
};

// ---- neighbouring columns, of which `left` exist ---------------------------------------------------------------
template <int n> TZ_DEVICE void load_columns(DType dtype, const void* base, int64_t offset, int left, bool vectors, float (&out)[n]) {
  if (vectors && left >= n) return load_floats<n>(dtype, base, offset, out);
#pragma unroll
  for (int j = 0; j < n; j++) out[j] = j < left ? load_float(dtype, base, offset + j) : 0.0f;
}
template <int n> TZ_DEVICE void store_columns(const float (&v)[n], DType dtype, void* base, int64_t offset, int left, bool vectors) {
  if (!vectors || left < n) {
#pragma unroll
    for (int j = 0; j < n; j++)
      if (j < left) store_float(v[j], dtype, base, offset + j);
  } else if (dtype == DType::f32) {
    store_floats(v, static_cast<float*>(base) + offset);
  } else if (dtype == DType::bf16) {
    store_floats(v, static_cast<__nv_bfloat16*>(base) + offset);
  } else {
    store_floats(v, static_cast<__half*>(base) + offset);
  }
}

// ---- host --------------------------------------------------------------------------------------------------------
// An operand that multiplies as `compute`; strides in elements, stride_e from group to group. k_rows: it lies in shared memory as rows of k.
inline Operand operand(DType dtype, const void* data, int64_t stride_i, int64_t stride_k, bool k_rows, DType compute, int64_t stride_e = 0) {
  const int64_t bytes = size_of(dtype), unit = k_rows ? stride_k : stride_i, other = k_rows ? stride_i : stride_k;
  const bool pieces = unit == 1 && aligned(data, other, bytes) && stride_e * bytes % kVectorBytes == 0;
  const Way way = !pieces ? Way::elements : dtype == compute ? Way::async : Way::convert;
  return {dtype, way, static_cast<const char*>(data), stride_i * bytes, stride_k * bytes};
}
// A weight [E, K, N], in shared memory the way its smaller stride says.
inline bool rows_of_k(const WeightMatrix& b) { return b.stride_k <= b.stride_n; }
inline Operand operand(const WeightMatrix& b, bool k_rows, DType compute) {
  return operand(b.dtype, b.data, b.stride_n, b.stride_k, k_rows, compute, b.stride_e);
}
// What two operands multiply as.
inline DType compute_dtype(DType a, DType b) { return a == b ? a : DType::f32; }

// Blocks that walk over the tiles: what the GPU holds, no more than there can be.
template <class Shape> unsigned walking_blocks(int64_t T, int64_t groups, int64_t columns) {
  const int64_t most = (ceil_div(T, Shape::kBlockM) + groups) * columns, held = int64_t{num_processors()} * Shape::kBlocks;
  return static_cast<unsigned>(most < held ? most : held);
}
// Whether tiles of few rows serve better: groups are short, or large tiles would leave processors idle.
template <class T> bool few_rows(int64_t rows, int64_t groups, int64_t N) {
  using Many = typename Shapes<T>::many;
  return ceil_div(rows, groups) <= Shapes<T>::few::kBlockM || ceil_div(rows, Many::kBlockM) * ceil_div(N, Many::kBlockN) < num_processors();
}
template <bool value> struct Flag { static constexpr bool v = value; };
// fn(T{}, Shape{}, rows of k in b) for what the kernels of grouped rows are instantiated with.
template <class F> cudaError_t with_product(DType compute, int64_t rows, int64_t groups, int64_t N, bool b_rows_of_k, const F& fn) {
  return with_type(compute, [&](auto t) {
    using T = decltype(t);
    const auto with_shape = [&](auto b_rows) {
      if (few_rows<T>(rows, groups, N)) return fn(t, typename Shapes<T>::few{}, b_rows);
      return fn(t, typename Shapes<T>::many{}, b_rows);
    };
    return b_rows_of_k ? with_shape(Flag<true>{}) : with_shape(Flag<false>{});
  });
}

}}  // namespace terrazzo::cuda
