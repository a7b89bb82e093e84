#include <algorithm>

#include "../cuda/params.h"
#include "glue.h"

namespace terrazzo {
namespace {

constexpr const char* kOp = "byte_hash_embedding";
constexpr int64_t kMaxGroupSize = 1 << 20;

// Tokens and n-gram sizes, checked, in the kernel's own form. What tensors hold is only looked at on the CPU.
struct HashCall {
  Tensor tokens;
  OptTensor cu;
  std::vector<int64_t> group_sizes;
  std::vector<Segment> segments;
  ByteHashCudaParams p{};

  HashCall(const Tensor& tokens_in, std::vector<int64_t> sizes, int64_t num_functions, int64_t vocab, const OptTensor& cu_seqlens)
      : tokens(cast_contiguous(tokens_in, ScalarType::Long)), group_sizes(std::move(sizes)) {
    check_device(tokens, kOp, "tokens");
    check_shape(tokens, {-1, -1}, kOp, "tokens");
    TZ_CHECK(vocab >= 1 && num_functions >= 0, kOp, "vocab must be positive and num_functions not negative, got ", vocab, " and ", num_functions);
    for (int64_t size : group_sizes) TZ_CHECK(size >= 1 && size <= kMaxGroupSize, kOp, "group_sizes must be 1 to ", kMaxGroupSize, ", got ", size);
    p.B = tokens.size(0), p.L = tokens.size(1);
    if (runs_on_cpu(tokens)) segments = make_segments(p.B, p.L, std::nullopt, cu_seqlens, kOp);
    else if (cu_seqlens) use_texts(*cu_seqlens);
    p.segments = segments.data(), p.num_segments = static_cast<int64_t>(segments.size());
    p.groups = static_cast<int64_t>(group_sizes.size()), p.functions = num_functions, p.vocab = vocab;
    p.group_sizes = group_sizes.data(), p.tokens = static_cast<const int64_t*>(data(tokens));
    TZ_CHECK(pairs() < INT32_MAX && p.functions * p.groups < INT32_MAX, kOp, "positions x n-grams must fit int32");
  }
  void use_texts(const Tensor& cu_seqlens) {
    TZ_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 2, kOp,
             "cu_seqlens must be (sequences + 1,) int32 with at least one sequence");
    check_device(cu_seqlens, kOp, "cu_seqlens");
    TZ_CHECK(p.B == 1, kOp, "cu_seqlens needs a batch of 1 (all sequences packed into one row), got ", p.B);
    cu = cast_contiguous(cu_seqlens, ScalarType::Int);
    p.cu_seqlens = static_cast<const int32_t*>(data(cu)), p.texts = cu->numel() - 1;
  }
  int64_t pairs() const { return p.B * p.L * p.functions * p.groups; }
  // Every token names a row of the byte embedding, every hash one of the table.
  void check_rows(int64_t byte_rows, int64_t table_rows) {
    TZ_CHECK(table_rows / p.vocab >= p.functions * p.groups, kOp, "table must have at least functions x groups x vocab = ",
             p.functions * p.groups, " x ", p.vocab, " rows, got ", table_rows);
    for (int64_t i = 0; runs_on_cpu(tokens) && i < p.B * p.L; i++)
      TZ_CHECK(p.tokens[i] >= 0 && p.tokens[i] < byte_rows, kOp, "tokens must be 0 to ", byte_rows - 1, ", got ", p.tokens[i]);
    p.byte_rows = byte_rows, p.table_rows = table_rows;
  }
};

// The pairs (position, n-gram) sorted by row of the table, stably, by counting 11 bits at a time; the rows that occur,
// and where the pairs of each begin.
struct SortedRows {
  std::vector<int32_t> order;
  std::vector<int64_t> rows, runs;

  SortedRows(const int64_t* ids, int64_t pairs, int64_t table_rows) : order(pairs) {
    constexpr int kBits = 11;
    std::vector<int32_t> other(pairs);
    for (int64_t i = 0; i < pairs; i++) order[i] = static_cast<int32_t>(i);
    for (int shift = 0; shift < 63 && (table_rows - 1) >> shift > 0; shift += kBits) {
      std::vector<int64_t> next(1 << kBits, 0);
      const auto digit = [&](int32_t pair) { return (ids[pair] >> shift) & ((1 << kBits) - 1); };
      for (int32_t pair : order) next[digit(pair)]++;
      int64_t start = 0;
      for (int64_t& n : next) {
        const int64_t count = n;
        n = start, start += count;
      }
      for (int32_t pair : order) other[next[digit(pair)]++] = pair;
      order.swap(other);
    }
    for (int64_t i = 0; i < pairs; i++)
      if (i == 0 || ids[order[i]] != ids[order[i - 1]]) rows.push_back(ids[order[i]]), runs.push_back(i);
    runs.push_back(pairs);
  }
};

// What the backward works in where kernels don't run on the CPU.
struct DeviceScratch {
  Tensor sort, pairs, positions, parts, places, names, count;

  DeviceScratch(HashCall& call, bool need_table, bool need_bytes, bool sparse)
      : DeviceScratch(call, need_table ? call.pairs() : 0, need_bytes ? call.p.B * call.p.L : 0, need_table && sparse ? call.pairs() : 0, call.tokens) {}
  DeviceScratch(HashCall& call, int64_t pairs_, int64_t positions_, int64_t sparse, const Tensor& like)
      : sort(empty(like, {std::max(sort_scratch(pairs_, call.p.table_rows + 1), sort_scratch(positions_, call.p.byte_rows + 1))}, ScalarType::Int)),
        pairs(empty(like, {pairs_}, ScalarType::Int)), positions(empty(like, {positions_}, ScalarType::Int)),
        parts(empty(like, {(std::max(pairs_, positions_) + kSumChunk - 1) / kSumChunk, 2, call.p.D}, ScalarType::Float)),
        places(empty(like, {sparse}, ScalarType::Int)), names(empty(like, {sparse}, ScalarType::Long)), count(zeros(like, {1}, ScalarType::Int)) {
    ByteHashCudaParams& p = call.p;
    p.sort = ints(sort), p.pairs = ints(pairs), p.positions = ints(positions), p.parts = static_cast<float*>(mutable_data(parts));
    p.places = ints(places), p.names = static_cast<int64_t*>(mutable_data(names)), p.count = ints(count);
  }
  static int32_t* ints(const Tensor& t) { return static_cast<int32_t*>(mutable_data(t)); }
  // The only number that is waited for: a sparse gradient has as many rows as occur.
  int64_t num_rows() const { return *static_cast<const int32_t*>(data(torch::stable::to(count, torch::stable::Device(torch::headeronly::DeviceType::CPU)))); }
};

}  // namespace

Tensor byte_hash_ids(const Tensor& tokens, std::vector<int64_t> group_sizes, int64_t num_functions, int64_t vocab, const OptTensor& cu_seqlens) {
  HashCall call(tokens, std::move(group_sizes), num_functions, vocab, cu_seqlens);
  ByteHashCudaParams& p = call.p;
  Tensor ids = empty(call.tokens, {p.B, p.L, p.functions * p.groups}, ScalarType::Long);
  p.ids = static_cast<int64_t*>(mutable_data(ids));
  if (call.pairs()) TZ_RUN_WHERE(tokens, byte_hash_ids, p);
  return ids;
}

Tensor byte_hash_embedding_fwd(const Tensor& tokens, const Tensor& table_in, const Tensor& byte_in, std::vector<int64_t> group_sizes,
    int64_t num_functions, int64_t vocab, const OptTensor& cu_seqlens, bool) {
  HashCall call(tokens, std::move(group_sizes), num_functions, vocab, cu_seqlens);
  ByteHashCudaParams& p = call.p;
  const Tensor table = unit_stride_last(table_in), byte = unit_stride_last(byte_in);
  check_device(table, kOp, "table");
  check_device(byte, kOp, "byte_embedding");
  check_shape(byte, {-1, -1}, kOp, "byte_embedding");
  p.D = byte.size(1);
  check_shape(table, {-1, p.D}, kOp, "table");
  TZ_CHECK(p.D >= 1, kOp, "D must be positive, got 0");
  p.dtype = dtype_from(byte.scalar_type(), kOp, "byte_embedding"), p.table_dtype = dtype_from(table.scalar_type(), kOp, "table");
  TZ_CHECK((p.dtype == DType::f64) == (p.table_dtype == DType::f64), kOp, "float64 goes with float64 only");
  call.check_rows(byte.size(0), table.size(0));
  p.table = data(table), p.table_stride = table.stride(0), p.byte_embedding = data(byte), p.byte_stride = byte.stride(0);
  Tensor y = empty(byte, {p.B, p.L, p.D}, byte.scalar_type());
  p.y = mutable_data(y);
  const bool on_cpu = runs_on_cpu(byte);
  const Tensor ids = on_cpu ? absent(call.tokens) : empty(call.tokens, {call.pairs()}, ScalarType::Long);
  p.ids = on_cpu ? nullptr : static_cast<int64_t*>(mutable_data(ids));
  TZ_RUN_WHERE(byte, byte_hash_embedding_fwd, p);
  return y;
}

// Gradients of the table (dense, or the values of the rows that the third output names) and of the byte embedding.
std::tuple<Tensor, Tensor, Tensor> byte_hash_embedding_bwd(const Tensor& dy_in, const Tensor& tokens, const Tensor& table_like, int64_t table_rows,
    const Tensor& byte_like, int64_t byte_rows, std::vector<int64_t> group_sizes, int64_t num_functions, int64_t vocab, const OptTensor& cu_seqlens,
    bool sparse_grad, bool need_table, bool need_bytes) {
  HashCall call(tokens, std::move(group_sizes), num_functions, vocab, cu_seqlens);
  ByteHashCudaParams& p = call.p;
  call.check_rows(byte_rows, table_rows);
  check_shape(dy_in, {p.B, p.L, -1}, kOp, "dy");
  p.D = dy_in.size(2);
  const ScalarType dtype = byte_like.scalar_type();
  p.dtype = dtype_from(dtype, kOp, "byte_embedding"), p.table_dtype = dtype_from(table_like.scalar_type(), kOp, "table");
  TZ_CHECK((p.dtype == DType::f64) == (p.table_dtype == DType::f64), kOp, "float64 goes with float64 only");
  const Tensor dy = cast_contiguous(dy_in, dtype);
  p.dy = data(dy);
  Tensor dtable = absent(table_like), dbytes = absent(byte_like), rows = empty(call.tokens, {0}, ScalarType::Long);
  if (need_bytes) {
    dbytes = zeros(dy, {byte_rows, p.D}, acc_scalar(dtype));
    p.dbytes = mutable_data(dbytes);
  }
  std::optional<SortedRows> sorted;
  std::optional<DeviceScratch> scratch;
  if (!runs_on_cpu(dy)) scratch.emplace(call, need_table, need_bytes, sparse_grad);
  const Tensor ids = empty(call.tokens, {need_table ? call.pairs() : 0}, ScalarType::Long);
  if (need_table) {
    p.ids = static_cast<int64_t*>(mutable_data(ids)), p.sparse = sparse_grad;
    if (call.pairs()) TZ_RUN_WHERE(dy, byte_hash_rows, p);
    if (scratch) {
      if (sparse_grad) p.num_rows = scratch->num_rows(), rows = torch::stable::narrow(scratch->names, 0, 0, p.num_rows);
    } else {
      sorted.emplace(p.ids, call.pairs(), table_rows);
      p.num_rows = static_cast<int64_t>(sorted->rows.size());
      p.order = sorted->order.data(), p.runs = sorted->runs.data(), p.rows = sorted->rows.data();
      if (sparse_grad) {
        rows = empty(call.tokens, {p.num_rows}, ScalarType::Long);
        std::copy(sorted->rows.begin(), sorted->rows.end(), static_cast<int64_t*>(mutable_data(rows)));
      }
    }
    dtable = sparse_grad ? empty(table_like, {p.num_rows, p.D}, table_like.scalar_type()) : zeros(table_like, {table_rows, p.D}, table_like.scalar_type());
    p.dtable = mutable_data(dtable);
  }
  TZ_RUN_WHERE(dy, byte_hash_embedding_bwd, p);
  return {dtable, cast(dbytes, dtype), rows};
}

}  // namespace terrazzo
