#include "../cuda/params.h"
#include "glue.h"

namespace terrazzo {
namespace {

constexpr const char* kOp = "mamba_chunk_scan_combined";

// What forward and backward share: converted operands, checked shapes, segments.
struct ScanCall {
  Tensor x, dt, A, B, C;
  OptTensor D, dt_bias, initial;
  ScalarType acc;
  std::vector<Segment> segments;
  OptTensor seq_idx, cu_seqlens;
  std::vector<Tensor> scratch;  // of CUDA kernels
  ChunkScanCudaParams p{};

  ScanCall(const Tensor& x_in, const Tensor& dt_in, const Tensor& A_in, const Tensor& B_in, const Tensor& C_in, const OptTensor& D_in,
           const OptTensor& dt_bias_in, const OptTensor& initial_in, const OptTensor& seq_idx_in, const OptTensor& cu_seqlens_in,
           bool dt_softplus, double dt_min, double dt_max)
      : x(x_in), dt(dt_in), A(A_in), B(B_in), C(C_in), D(D_in), dt_bias(dt_bias_in), initial(initial_in), seq_idx(seq_idx_in), cu_seqlens(cu_seqlens_in) {
    check_shape(x, {-1, -1, -1, -1}, kOp, "x");
    check_shape(B, {x.size(0), x.size(1), -1, -1}, kOp, "B");
    check_device(x, kOp, "x");
    p.B = x.size(0), p.L = x.size(1), p.H = x.size(2), p.P = x.size(3), p.G = B.size(2), p.N = B.size(3);
    TZ_CHECK(p.G > 0 && p.H % p.G == 0, kOp, "the groups of B must divide the ", p.H, " heads, got ", p.G);
    check_shape(C, {p.B, p.L, p.G, p.N}, kOp, "C");
    check_shape(dt, {p.B, p.L, p.H}, kOp, "dt");
    check_shape(A, {p.H}, kOp, "A");
    if (D && D->dim() == 2) check_shape(*D, {p.H, p.P}, kOp, "D");
    else check_shape(D, {p.H}, kOp, "D");
    check_shape(dt_bias, {p.H}, kOp, "dt_bias");
    p.sequences = num_sequences(p.B, cu_seqlens);
    check_shape(initial, {p.sequences, p.H, p.P, p.N}, kOp, "initial_states");
    if (runs_on_cpu(x)) segments = make_segments(p.B, p.L, seq_idx, cu_seqlens, kOp);
    else place_sequences();
    acc = acc_scalar(x.scalar_type());
    x = unit_stride_last(x);
    B = unit_stride_last(cast(B, x.scalar_type()));
    C = unit_stride_last(cast(C, x.scalar_type()));
    if (acc == ScalarType::Double || dt.scalar_type() == ScalarType::Double) dt = cast(dt, acc);
    A = cast_contiguous(A, acc);
    D = cast_contiguous(D, acc);
    dt_bias = cast_contiguous(dt_bias, acc);
    initial = cast_contiguous(initial, acc);
    p.x_dtype = dtype_from(x.scalar_type(), kOp, "x");
    p.dt_dtype = dtype_from(dt.scalar_type(), kOp, "dt");
    p.state_dtype = dtype_from(acc, kOp, "states");
    p.dt_softplus = dt_softplus, p.dt_min = dt_min, p.dt_max = dt_max;
    p.D_has_p = D && D->dim() == 2;
    p.x = data(x), p.x_stride_b = x.stride(0), p.x_stride_l = x.stride(1), p.x_stride_h = x.stride(2);
    p.dt = data(dt), p.dt_stride_b = dt.stride(0), p.dt_stride_l = dt.stride(1), p.dt_stride_h = dt.stride(2);
    p.A = data(A), p.D = data(D), p.dt_bias = data(dt_bias);
    p.Bm = data(B), p.B_stride_b = B.stride(0), p.B_stride_l = B.stride(1), p.B_stride_g = B.stride(2);
    p.C = data(C), p.C_stride_b = C.stride(0), p.C_stride_l = C.stride(1), p.C_stride_g = C.stride(2);
    p.segments = segments.data(), p.num_segments = static_cast<int64_t>(segments.size());
    p.initial_states = data(initial);
    if (runs_on_cpu(x)) return;
    const int64_t chunks = scan_chunks(p);
    if (cu_seqlens) p.first_chunks = scratch_memory({p.sequences + 1}, ScalarType::Int);
    p.chunks = scratch_memory({chunks, static_cast<int64_t>(sizeof(ScanChunk) / sizeof(int32_t))}, ScalarType::Int);
    p.decays = scratch_memory({chunks, p.H, kScanDecays, kScanChunk}, ScalarType::Float);
  }

  // The states before each chunk, which the backward computes again in float.
  void keep_states(ScalarType dtype) { p.states = scratch_memory({scan_chunks(p), p.H, p.P, p.N}, dtype); }

  void* scratch_memory(const std::vector<int64_t>& shape, ScalarType dtype) {
    scratch.push_back(empty(x, shape, dtype));
    return mutable_data(scratch.back());
  }

  // Kernels write y or dx, which may be some heads of a larger tensor.
  void place_output(const Tensor& out, const char* name) {
    check_shape(out, {p.B, p.L, p.H, p.P}, kOp, name);
    TZ_CHECK(out.scalar_type() == x.scalar_type(), kOp, name, " must have the dtype of x");
    TZ_CHECK((p.P == 1 || out.stride(3) == 1) && (p.H == 1 || out.stride(2) == p.P), kOp, "the heads of ", name, " must be contiguous");
    p.out_stride_b = out.stride(0), p.out_stride_l = out.stride(1);
  }

  // Where the sequences begin stands on the device: kernels read it there.
  void place_sequences() {
    if (seq_idx) {
      TZ_CHECK(seq_idx->scalar_type() == ScalarType::Int, kOp, "seq_idx must be int32");
      check_shape(*seq_idx, {p.B, p.L}, kOp, "seq_idx");
      p.seq_idx = static_cast<const int32_t*>(data(*seq_idx)), p.seq_idx_stride_b = seq_idx->stride(0), p.seq_idx_stride_l = seq_idx->stride(1);
    }
    if (cu_seqlens) {
      TZ_CHECK(cu_seqlens->scalar_type() == ScalarType::Int, kOp, "cu_seqlens must be int32");
      TZ_CHECK(cu_seqlens->dim() == 1 && p.sequences >= 1, kOp, "cu_seqlens must be (sequences + 1,) with at least one sequence");
      TZ_CHECK(p.B == 1, kOp, "cu_seqlens needs a batch of 1 (all sequences packed into one row), got ", p.B);
      p.cu_seqlens = static_cast<const int32_t*>(data(*cu_seqlens)), p.cu_seqlens_stride = cu_seqlens->stride(0);
    }
  }
};

// A new tensor for y or dx.
Tensor output_like(const Tensor& x) {
  check_shape(x, {-1, -1, -1, -1}, kOp, "x");
  return empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
}

}  // namespace

Tensor chunk_scan_fwd_into(const Tensor& y, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptTensor& D, const OptTensor& z_in, const OptTensor& dt_bias, const OptTensor& initial_states, const OptTensor& seq_idx,
    const OptTensor& cu_seqlens, bool dt_softplus, double dt_min, double dt_max, bool return_final_states) {
  ScanCall call(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max);
  ChunkScanCudaParams& p = call.p;
  check_shape(z_in, {p.B, p.L, p.H, p.P}, kOp, "z");
  OptTensor z;
  if (z_in) {
    z = unit_stride_last(cast(*z_in, x.scalar_type()));
    p.z = data(z), p.z_stride_b = z->stride(0), p.z_stride_l = z->stride(1), p.z_stride_h = z->stride(2);
  }
  call.place_output(y, "y");
  p.y = mutable_data(y);
  Tensor states = empty(x, return_final_states ? std::vector<int64_t>{p.sequences, p.H, p.P, p.N} : std::vector<int64_t>{0}, call.acc);
  if (return_final_states) p.final_states = mutable_data(states);
  if (!runs_on_cpu(x)) call.keep_states(p.x_dtype == DType::bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  TZ_RUN_WHERE(x, chunk_scan_fwd, p);
  return states;
}

std::tuple<Tensor, Tensor> chunk_scan_fwd(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias, const OptTensor& initial_states, const OptTensor& seq_idx,
    const OptTensor& cu_seqlens, bool dt_softplus, double dt_min, double dt_max, bool return_final_states) {
  Tensor y = output_like(x);
  Tensor states = chunk_scan_fwd_into(y, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, return_final_states);
  return {y, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> chunk_scan_bwd_into(const Tensor& dx, const Tensor& dy_in,
    const OptTensor& dfinal_in, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptTensor& D, const OptTensor& dt_bias, const OptTensor& initial_states, const OptTensor& seq_idx,
    const OptTensor& cu_seqlens, bool dt_softplus, double dt_min, double dt_max) {
  ScanCall call(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max);
  ChunkScanCudaParams& p = call.p;
  check_shape(dy_in, {p.B, p.L, p.H, p.P}, kOp, "dy");
  check_shape(dfinal_in, {p.sequences, p.H, p.P, p.N}, kOp, "dfinal_states");
  Tensor dy = cast(dy_in, x.scalar_type());
  if (dy.stride(3) != 0 || !runs_on_cpu(x)) dy = unit_stride_last(dy);
  p.dy = data(dy);
  p.dy_stride_b = dy.stride(0), p.dy_stride_l = dy.stride(1), p.dy_stride_h = dy.stride(2);
  p.dy_stride_p = p.P == 1 ? 1 : dy.stride(3);
  const OptTensor dfinal = cast_contiguous(dfinal_in, call.acc);
  p.dfinal_states = data(dfinal);
  const ScalarType acc = call.acc;
  call.place_output(dx, "dx");
  Tensor ddt = empty(x, {p.B, p.L, p.H}, acc), dA = empty(x, {p.H}, acc);
  Tensor dB = empty(x, {p.B, p.L, p.G, p.N}, acc), dC = empty(x, {p.B, p.L, p.G, p.N}, acc);
  p.dx = mutable_data(dx), p.ddt = mutable_data(ddt), p.dA = mutable_data(dA), p.dB = mutable_data(dB), p.dC = mutable_data(dC);
  Tensor dD = absent(x), ddt_bias = absent(x), dinitial = absent(x);
  if (D) {
    dD = empty(x, p.D_has_p ? std::vector<int64_t>{p.H, p.P} : std::vector<int64_t>{p.H}, acc);
    p.dD = mutable_data(dD);
  }
  if (dt_bias) {
    ddt_bias = empty(x, {p.H}, acc);
    p.ddt_bias = mutable_data(ddt_bias);
  }
  if (initial_states) {
    // zeros: a row that starts with padding uses no initial state, and its kernel on the CPU writes none
    const std::vector<int64_t> shape{p.sequences, p.H, p.P, p.N};
    dinitial = runs_on_cpu(x) ? zeros(x, shape, acc) : empty(x, shape, acc);
    p.dinitial_states = mutable_data(dinitial);
  }
  if (!runs_on_cpu(x)) {
    const int64_t chunks = scan_chunks(p), splits = scan_splits(p);
    call.keep_states(ScalarType::Float);
    p.dstates = call.scratch_memory({chunks, p.H, p.P, p.N}, ScalarType::Float);
    p.dA_partials = call.scratch_memory({chunks, p.H}, ScalarType::Float);
    p.dbias_partials = call.scratch_memory({chunks, p.H}, ScalarType::Float);
    if (D) p.dD_partials = call.scratch_memory({chunks, p.H, p.D_has_p ? p.P : 1}, ScalarType::Float);
    p.dB_partials = splits == 1 ? p.dB : call.scratch_memory({splits, p.B, p.L, p.G, p.N}, ScalarType::Float);
    p.dC_partials = splits == 1 ? p.dC : call.scratch_memory({splits, p.B, p.L, p.G, p.N}, ScalarType::Float);
  }
  TZ_RUN_WHERE(x, chunk_scan_bwd, p);
  if (D) dD = cast(dD, D->scalar_type());
  if (dt_bias) ddt_bias = cast(ddt_bias, dt_bias->scalar_type());
  if (initial_states) dinitial = cast(dinitial, initial_states->scalar_type());
  return {cast(ddt, dt.scalar_type()), cast(dA, A.scalar_type()), cast(dB, B.scalar_type()), cast(dC, C.scalar_type()), dD, ddt_bias, dinitial};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> chunk_scan_bwd(const Tensor& dy,
    const OptTensor& dfinal_states, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptTensor& D, const OptTensor& dt_bias, const OptTensor& initial_states, const OptTensor& seq_idx,
    const OptTensor& cu_seqlens, bool dt_softplus, double dt_min, double dt_max) {
  Tensor dx = output_like(x);
  return std::tuple_cat(std::tuple(dx), chunk_scan_bwd_into(dx, dy, dfinal_states, x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, cu_seqlens,
                                                            dt_softplus, dt_min, dt_max));
}

}  // namespace terrazzo
