// Embeddings of bytes and of the hashed n-grams that end at them: hash and primes as in csrc/cpu/byte_hash_embedding.cpp.
//   y[t] = byte_embedding[tokens[t]] + sum over functions f and sizes g of table[id(t, f, g)]
//   id   = (sum over j < n of tokens[t - n + 1 + j] p^j, in int64 that wraps) mod vocab (never negative) + vocab (f G + g)
// Layouts: tokens [B, L], ids [B, L, F G], y [B, L, D] contiguous, table and byte_embedding with a row stride.
//
// The gather is the limit: every position reads F G + 1 rows that lie anywhere. Ids are computed first, 8 bytes beside each row, by a thread
// for each position and function, each size from the next smaller by Horner. Then a thread has 16 bytes of the table's channels of one
// position and reads kRows rows at a time, all under way at once.
#include "kernels.h"

#include "common.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kThreads = 128, kRows = 4;

// What a launch hashes with: the sizes [first, first + count) of the group_sizes.
constexpr int kPrimes = 11, kSizes = 32;
struct Hashes {
  uint64_t primes[kPrimes] = {1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899, 9576890767, 3628273133, 2860486313, 5463458053, 3367900313};
  int64_t sizes[kSizes];
  int first, count;
};

// Where the text of a position begins. Ends that are out of order give a place in front of the position all the same.
TZ_DEVICE int64_t text_begin(const ByteHashCudaParams& p, int64_t position) {
  if (!p.cu_seqlens) return position / p.L * p.L;
  int64_t low = 0, high = p.texts + 1;  // how many of the ends are at most `position`, by halving
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.cu_seqlens[middle] <= position) low = middle + 1;
    else high = middle;
  }
  const int64_t begin = low > 0 ? p.cu_seqlens[low - 1] : 0;
  return begin < 0 ? 0 : begin;
}

// A thread for each position and function.
__global__ void __launch_bounds__(kThreads) byte_hash_ids_kernel(const ByteHashCudaParams p, const Hashes hashes) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= p.B * p.L * p.functions) return;
  const unsigned functions = static_cast<unsigned>(p.functions), f = static_cast<unsigned>(item) % functions;
  const int64_t position = static_cast<unsigned>(item) / functions, available = position - text_begin(p, position) + 1;
  const uint64_t prime = hashes.primes[f % kPrimes];
  int64_t table = static_cast<int64_t>(f) * p.groups + hashes.first;
  int64_t* ids = p.ids + position * p.functions * p.groups;
  uint64_t hash = 0;
  int64_t size = 0;
  for (int g = 0; g < hashes.count; g++, table++) {
    if (hashes.sizes[g] < size) hash = 0, size = 0;  // sizes usually rise
    for (; size < hashes.sizes[g]; size++) hash = hash * prime + (size < available ? static_cast<uint64_t>(p.tokens[position - size]) : 0);
    const int64_t rest = static_cast<int64_t>(hash) % p.vocab;
    ids[table] = (rest < 0 ? rest + p.vocab : rest) + table * p.vocab;
  }
}

// Grid: tiles of `positions` positions. W: the table's type; the byte embedding and y are of another one or the same.
template <class W, int kVec> __global__ void __launch_bounds__(kThreads) byte_hash_embedding_fwd_kernel(const ByteHashCudaParams p, const int positions) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * positions, left = p.B * p.L - first;
  const int pieces = static_cast<int>(p.D / kVec), count = pieces * static_cast<int>(left < positions ? left : positions);
  const int n = static_cast<int>(p.functions * p.groups);
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int position = i / pieces;
    const int64_t t = first + position, d = static_cast<int64_t>(i - position * pieces) * kVec, token = p.tokens[t];
    const int64_t* ids = p.ids + t * n;
    const W* table = static_cast<const W*>(p.table) + d;
    float acc[kVec] = {};
    if (token >= 0 && token < p.byte_rows) load_floats<kVec>(p.dtype, p.byte_embedding, token * p.byte_stride + d, acc);
    for (int k = 0; k < n; k += kRows) {
      Vector<W, kVec> rows_rmem[kRows];
#pragma unroll
      for (int r = 0; r < kRows; r++)
        if (k + r < n) rows_rmem[r] = load_vector<W, kVec>(table + ids[k + r] * p.table_stride);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (k + r >= n) continue;
        float v[kVec];
        to_floats(rows_rmem[r], v);
#pragma unroll
        for (int j = 0; j < kVec; j++) acc[j] += v[j];
      }
    }
    store_floats(acc, p.dtype, p.y, t * p.D + d);
  }
}

// Positions of a block: as many pieces as leave few threads idle at the end.
int positions_of(int64_t pieces) { return static_cast<int>(pieces >= 4 * kThreads ? 1 : pieces >= kWarp ? 4 : 4 * kThreads / pieces); }

}  // namespace

cudaError_t byte_hash_ids_cuda(const ByteHashCudaParams& p, cudaStream_t stream) {
  const int64_t threads = p.B * p.L * p.functions;
  if (threads == 0) return cudaSuccess;
  if (threads > INT32_MAX) return cudaErrorInvalidValue;
  for (int64_t first = 0; first < p.groups; first += kSizes) {
    Hashes hashes{};
    hashes.first = static_cast<int>(first), hashes.count = static_cast<int>(p.groups - first < kSizes ? p.groups - first : kSizes);
    for (int g = 0; g < hashes.count; g++) hashes.sizes[g] = p.group_sizes[first + g];
    const cudaError_t error = launch(byte_hash_ids_kernel, dim3(static_cast<unsigned>(ceil_div(threads, kThreads))), kThreads, 0, stream, p, hashes);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t byte_hash_embedding_fwd_cuda(const ByteHashCudaParams& p, cudaStream_t stream) {
  if (p.dtype == DType::f64) return cudaErrorInvalidValue;
  if (p.B * p.L == 0) return cudaSuccess;
  if (p.B * p.L > INT32_MAX || p.D > INT32_MAX / kThreads) return cudaErrorInvalidValue;
  const cudaError_t error = byte_hash_ids_cuda(p, stream);
  if (error != cudaSuccess) return error;
  return with_type(p.table_dtype, [&](auto w) {
    using W = decltype(w);
    constexpr int kVec = kVectorBytes / sizeof(W);
    const auto run = [&](auto kernel, int vec) {
      const int positions = positions_of(p.D / vec);
      return launch(kernel, dim3(static_cast<unsigned>(ceil_div(p.B * p.L, positions))), kThreads, 0, stream, p, positions);
    };
    const int64_t bytes = size_of(p.dtype);
    const bool rows_aligned = p.D % kVec == 0 && aligned(p.table, p.table_stride, sizeof(W)) && aligned(p.byte_embedding, p.byte_stride, bytes) &&
                              aligned(p.y, p.D, bytes);
    return rows_aligned ? run(byte_hash_embedding_fwd_kernel<W, kVec>, kVec) : run(byte_hash_embedding_fwd_kernel<W, 1>, 1);
  });
}

}}  // namespace terrazzo::cuda
