// Gradients of the hash embeddings: dtable[row] = the sum of dy[t] over the pairs (t, id) whose id is row, dbytes the same of the tokens.
//   dy [B, L, D] contiguous, dtable [table_rows, D] or, sparse, [rows that occur, D], dbytes [byte_rows, D]
//
// Pairs are sorted by row (radix_sort.cuh), stably, so that a row's pairs are a run of rising positions. A block sums kChunk of them, one
// after the other, and writes the sum of every run that lies within; of a run that goes on in front or behind it leaves a part, and
// a second kernel adds the parts in order. No atomics: neither order nor rounding depends on timing, and the many positions of one byte
// keep many blocks busy. The limit is one read of dy for each pair, mostly from L2, and of a dense gradient its zeros.
#include "kernels.h"

#include "radix_sort.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kThreads = 128, kRows = 4, kChunk = static_cast<int>(kSumChunk);

// The row of each pair; what is none counts as `rows`.
struct RowKeys {
  const int64_t* values;
  int64_t rows;
  TZ_DEVICE int64_t operator()(int pair) const { return values[pair] >= 0 && values[pair] < rows ? values[pair] : rows; }
};

// Sorted pairs to be summed by row.
struct RowSums {
  RowKeys keys;
  const int32_t* order;   // [n]
  int64_t n, D;
  int per_position;       // pairs of each position
  const int32_t* places;  // [n] where the sum of each pair's row goes, or null: to its row
  const void* dy;
  DType out_dtype;
  void* out;
  float* parts;           // [chunks, 2, D]: of the run that comes from in front, of the one that goes on behind

  TZ_DEVICE int64_t key(int64_t i) const { return i >= 0 && i < n ? keys(order[i]) : -1; }
  TZ_DEVICE int64_t place(int64_t i, int64_t key) const { return places ? places[i] : key; }
};

// Grid: chunks x tiles of channels.
template <class T, int kVec> __global__ void __launch_bounds__(kThreads) byte_hash_embedding_sums_kernel(const RowSums s) {
  TZ_SHARED(int64_t, keys_smem, kChunk + 2);  // from the pair in front to the one behind
  TZ_SHARED(int, positions_smem, kChunk);
  const int64_t chunk = blockIdx.x, begin = chunk * kChunk;
  const int count = static_cast<int>(s.n - begin < kChunk ? s.n - begin : kChunk);
  for (int i = threadIdx.x; i < count + 2; i += kThreads) keys_smem[i] = s.key(begin + i - 1);
  for (int i = threadIdx.x; i < count; i += kThreads) positions_smem[i] = s.order[begin + i] / s.per_position;
  __syncthreads();
  // signed numbers: with unsigned ones nvcc loses sight of what lies side by side, and stores a vector element by element
  const int64_t d = int64_t{static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x)} * kVec;
  if (d >= s.D) return;

  const T* dy = static_cast<const T*>(s.dy) + d;
  float* parts = s.parts + chunk * 2 * s.D + d;
  float acc[kVec] = {};
  bool begun = keys_smem[0] != keys_smem[1];  // the run began in this chunk
  for (int first = 0; first < count; first += kRows) {
    Vector<T, kVec> rows_rmem[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++)
      if (first + r < count) rows_rmem[r] = load_vector<T, kVec>(dy + positions_smem[first + r] * s.D);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int i = first + r;
      if (i >= count) continue;
      float v[kVec];
      to_floats(rows_rmem[r], v);
#pragma unroll
      for (int j = 0; j < kVec; j++) acc[j] += v[j];
      const int64_t key = keys_smem[i + 1];
      if (key == keys_smem[i + 2]) continue;
      if (!begun) store_floats(acc, parts);
      else if (key < s.keys.rows) store_floats(acc, s.out_dtype, s.out, s.place(begin + i, key) * s.D + d);
      begun = true;
#pragma unroll
      for (int j = 0; j < kVec; j++) acc[j] = 0;
    }
  }
  if (keys_smem[count] == keys_smem[count + 1]) store_floats(acc, parts + (begun ? s.D : 0));
}

// The sum of the run that begins in this chunk and goes on behind it, if there is one. The same grid, a thread for a channel.
__global__ void __launch_bounds__(kThreads) byte_hash_embedding_join_kernel(const RowSums s) {
  const int64_t chunk = blockIdx.x, end = (chunk + 1) * kChunk, key = s.key(end - 1);
  if (key < 0 || key >= s.keys.rows || s.key(end) != key || s.key(end - kChunk - 1) == key) return;
  int64_t more = 0;  // chunks behind that it reaches into, 32 looked at a time
  for (unsigned reached = kAllLanes; reached == kAllLanes;) {
    reached = __ballot_sync(kAllLanes, s.key(end + (more + threadIdx.x % kWarp) * kChunk) == key);
    more += __popc(reached);
  }
  const int64_t d = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (d >= s.D) return;
  const float* parts = s.parts + chunk * 2 * s.D + d;
  float sum = parts[s.D];
#pragma unroll 4
  for (int64_t c = 1; c <= more; c++) sum += parts[c * 2 * s.D];
  store_float(sum, s.out_dtype, s.out, s.place(end - 1, key) * s.D + d);
}

// ---- sparse: the rows that occur -----------------------------------------------------------------------------
// Whether sorted pair i is the first of its row.
TZ_DEVICE int begins(const RowSums& s, int64_t i) { return i < s.n && s.key(i) != s.key(i - 1); }

// counts [tiles]: how many rows begin in each tile of kSortTile pairs.
__global__ void __launch_bounds__(kSortThreads) byte_hash_embedding_count_kernel(const RowSums s, int32_t* __restrict__ counts) {
  int n = 0;
  for (int r = 0; r < kSortRounds; r++) n += begins(s, static_cast<int64_t>(blockIdx.x) * kSortTile + r * kSortThreads + threadIdx.x);
  const int all = block_exclusive(n);
  if (threadIdx.x == 0) counts[blockIdx.x] = all;
}

// places [n]: each pair's row among those that occur; names: these rows. counts are those of the tiles before.
__global__ void __launch_bounds__(kSortThreads) byte_hash_embedding_places_kernel(const RowSums s, const int32_t* __restrict__ counts,
                                                                                  int32_t* __restrict__ places, int64_t* __restrict__ names) {
  int before = counts[blockIdx.x];
  for (int r = 0; r < kSortRounds; r++) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kSortTile + r * kSortThreads + threadIdx.x;
    const int first = begins(s, i);
    int place = first;
    const int all = block_exclusive(place);
    place += before + first - 1;
    if (i < s.n) places[i] = place;
    if (first) names[place] = s.key(i);
    before += all;
  }
}

RowSums table_sums(const ByteHashCudaParams& p) {
  RowSums s{};
  s.keys = {p.ids, p.table_rows}, s.order = p.pairs, s.n = p.B * p.L * p.functions * p.groups, s.D = p.D;
  s.per_position = static_cast<int>(p.functions * p.groups), s.places = p.sparse ? p.places : nullptr;
  s.dy = p.dy, s.out_dtype = p.table_dtype, s.out = p.dtable, s.parts = p.parts;
  return s;
}

cudaError_t sum_rows(const RowSums& s, DType dtype, cudaStream_t stream) {
  if (s.n == 0) return cudaSuccess;
  const unsigned chunks = static_cast<unsigned>(ceil_div(s.n, kChunk));
  const auto tiles = [&](int vec) { return static_cast<unsigned>(ceil_div(s.D, int64_t{kThreads} * vec)); };
  const cudaError_t error = with_type(dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kVec = kVectorBytes / sizeof(T);
    const bool rows_aligned = s.D % kVec == 0 && aligned(s.dy, s.D, sizeof(T)) && aligned(s.out, s.D, size_of(s.out_dtype)) && aligned(s.parts, s.D, 4);
    return rows_aligned ? launch(byte_hash_embedding_sums_kernel<T, kVec>, dim3(chunks, tiles(kVec)), kThreads, 0, stream, s)
                        : launch(byte_hash_embedding_sums_kernel<T, 1>, dim3(chunks, tiles(1)), kThreads, 0, stream, s);
  });
  if (error != cudaSuccess) return error;
  return launch(byte_hash_embedding_join_kernel, dim3(chunks, tiles(1)), kThreads, 0, stream, s);
}

}  // namespace

// ids, and the pairs sorted by them; sparse: which rows occur, and how many in p.count.
cudaError_t byte_hash_rows_cuda(const ByteHashCudaParams& p, cudaStream_t stream) {
  const RowSums s = table_sums(p);
  if (s.n == 0) return cudaSuccess;
  cudaError_t error = byte_hash_ids_cuda(p, stream);
  if (error != cudaSuccess) return error;
  error = radix_sort(s.keys, s.n, p.table_rows + 1, {p.pairs}, p.sort, stream);
  if (error != cudaSuccess || !p.sparse) return error;
  SortPass scan{};
  scan.tiles = static_cast<unsigned>(ceil_div(s.n, kSortTile)), scan.bins = 1, scan.counts = p.sort, scan.totals = p.count;
  error = launch(byte_hash_embedding_count_kernel, dim3(scan.tiles), kSortThreads, 0, stream, s, scan.counts);
  if (error != cudaSuccess) return error;
  error = launch(sort_scan_kernel, dim3(1), kSortThreads, 0, stream, scan);
  if (error != cudaSuccess) return error;
  return launch(byte_hash_embedding_places_kernel, dim3(scan.tiles), kSortThreads, 0, stream, s, static_cast<const int32_t*>(scan.counts), p.places, p.names);
}

cudaError_t byte_hash_embedding_bwd_cuda(const ByteHashCudaParams& p, cudaStream_t stream) {
  if (p.dtype == DType::f64 || p.table_dtype == DType::f64) return cudaErrorInvalidValue;
  if (p.D > 65535 * int64_t{kThreads}) return cudaErrorInvalidValue;
  if (p.dbytes && p.B * p.L > 0) {
    RowSums s{};
    s.keys = {p.tokens, p.byte_rows}, s.order = p.positions, s.n = p.B * p.L, s.D = p.D, s.per_position = 1;
    s.dy = p.dy, s.out_dtype = DType::f32, s.out = p.dbytes, s.parts = p.parts;
    cudaError_t error = radix_sort(s.keys, s.n, p.byte_rows + 1, {p.positions}, p.sort, stream);
    if (error == cudaSuccess) error = sum_rows(s, p.dtype, stream);
    if (error != cudaSuccess) return error;
  }
  return p.dtable ? sum_rows(table_sums(p), p.dtype, stream) : cudaSuccess;
}

}}  // namespace terrazzo::cuda
