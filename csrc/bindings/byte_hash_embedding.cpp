#include "glue.h"

namespace terrazzo {
namespace {

constexpr const char* kOp = "byte_hash_embedding";
constexpr int64_t kMaxGroupSize = 1 << 20;

// Tokens and n-gram sizes, checked, in the kernel's own form.
struct HashCall {
  Tensor tokens;
  std::vector<int64_t> group_sizes;
  std::vector<Segment> segments;
  ByteHashParams p{};

  HashCall(const Tensor& tokens_in, std::vector<int64_t> sizes, int64_t num_functions, int64_t vocab, const OptTensor& cu_seqlens)
      : tokens(cast_contiguous(tokens_in, ScalarType::Long)), group_sizes(std::move(sizes)) {
    check_cpu(tokens, kOp, "tokens");
    check_shape(tokens, {-1, -1}, kOp, "tokens");
    TZ_CHECK(vocab >= 1 && num_functions >= 0, kOp, "vocab must be positive and num_functions not negative, got ", vocab, " and ", num_functions);
    for (int64_t size : group_sizes) TZ_CHECK(size >= 1 && size <= kMaxGroupSize, kOp, "group_sizes must be 1 to ", kMaxGroupSize, ", got ", size);
    p.B = tokens.size(0), p.L = tokens.size(1);
    segments = make_segments(p.B, p.L, std::nullopt, cu_seqlens, kOp);
    p.segments = segments.data(), p.num_segments = static_cast<int64_t>(segments.size());
    p.groups = static_cast<int64_t>(group_sizes.size()), p.functions = num_functions, p.vocab = vocab;
    p.group_sizes = group_sizes.data(), p.tokens = static_cast<const int64_t*>(data(tokens));
    TZ_CHECK(pairs() < INT32_MAX && p.functions * p.groups < INT32_MAX, kOp, "positions x n-grams must fit int32");
  }
  int64_t pairs() const { return p.B * p.L * p.functions * p.groups; }
  // Every token names a row of the byte embedding, every hash one of the table.
  void check_rows(int64_t byte_rows, int64_t table_rows) {
    TZ_CHECK(table_rows / p.vocab >= p.functions * p.groups, kOp, "table must have at least functions x groups x vocab = ",
             p.functions * p.groups, " x ", p.vocab, " rows, got ", table_rows);
    for (int64_t i = 0; i < p.B * p.L; i++)
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

}  // namespace

Tensor byte_hash_ids(const Tensor& tokens, std::vector<int64_t> group_sizes, int64_t num_functions, int64_t vocab, const OptTensor& cu_seqlens) {
  HashCall call(tokens, std::move(group_sizes), num_functions, vocab, cu_seqlens);
  ByteHashParams& p = call.p;
  Tensor ids = empty(call.tokens, {p.B, p.L, p.functions * p.groups}, ScalarType::Long);
  p.ids = static_cast<int64_t*>(mutable_data(ids));
  if (call.pairs()) cpu::run_byte_hash_ids(p);
  return ids;
}

Tensor byte_hash_embedding_fwd(const Tensor& tokens, const Tensor& table_in, const Tensor& byte_in, std::vector<int64_t> group_sizes,
    int64_t num_functions, int64_t vocab, const OptTensor& cu_seqlens, bool) {
  HashCall call(tokens, std::move(group_sizes), num_functions, vocab, cu_seqlens);
  ByteHashParams& p = call.p;
  const Tensor table = unit_stride_last(table_in), byte = unit_stride_last(byte_in);
  check_cpu(table, kOp, "table");
  check_cpu(byte, kOp, "byte_embedding");
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
  cpu::run_byte_hash_embedding_fwd(p);
  return y;
}

// Gradients of the table (dense, or the values of the rows that the third output names) and of the byte embedding.
std::tuple<Tensor, Tensor, Tensor> byte_hash_embedding_bwd(const Tensor& dy_in, const Tensor& tokens, const Tensor& table_like, int64_t table_rows,
    const Tensor& byte_like, int64_t byte_rows, std::vector<int64_t> group_sizes, int64_t num_functions, int64_t vocab, const OptTensor& cu_seqlens,
    bool sparse_grad, bool need_table, bool need_bytes) {
  HashCall call(tokens, std::move(group_sizes), num_functions, vocab, cu_seqlens);
  ByteHashParams& p = call.p;
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
  if (need_table) {
    const Tensor ids = empty(call.tokens, {call.pairs()}, ScalarType::Long);
    p.ids = static_cast<int64_t*>(mutable_data(ids));
    if (call.pairs()) cpu::run_byte_hash_rows(p);
    sorted.emplace(static_cast<const int64_t*>(data(ids)), call.pairs(), table_rows);
    p.num_rows = static_cast<int64_t>(sorted->rows.size()), p.sparse = sparse_grad;
    p.order = sorted->order.data(), p.runs = sorted->runs.data(), p.rows = sorted->rows.data();
    dtable = sparse_grad ? empty(table_like, {p.num_rows, p.D}, table_like.scalar_type()) : zeros(table_like, {table_rows, p.D}, table_like.scalar_type());
    p.dtable = mutable_data(dtable);
    if (sparse_grad) {
      rows = empty(call.tokens, {p.num_rows}, ScalarType::Long);
      int64_t* out = static_cast<int64_t*>(mutable_data(rows));
      for (int64_t u = 0; u < p.num_rows; u++) out[u] = sorted->rows[u];
    }
  }
  cpu::run_byte_hash_embedding_bwd(p);
  return {dtable, cast(dbytes, dtype), rows};
}

}  // namespace terrazzo
