#include "glue.h"

namespace terrazzo {
namespace {

// Row ends of the groups: int32, contiguous, not decreasing, at most T.
Tensor checked_offs(const Tensor& offs, int64_t E, int64_t T, const char* op) {
  check_cpu(offs, op, "offs");
  check_shape(offs, {E}, op, "offs");
  TZ_CHECK(offs.scalar_type() == ScalarType::Int, op, "offs must be int32");
  const Tensor ends = offs.is_contiguous() ? offs : torch::stable::contiguous(offs);
  const int32_t* end = static_cast<const int32_t*>(data(ends));
  for (int64_t e = 0, before = 0; e < E; before = end[e++])
    TZ_CHECK(end[e] >= before && end[e] <= T, op, "offs must not decrease and end at most at ", T, ", the number of rows, got ", end[e],
             " after ", before, " at group ", e);
  return ends;
}

GroupedGemmParams product_params(const Tensor& a, const Tensor& b, const OptTensor& bias, const char* op) {
  check_cpu(a, op, "a");
  check_cpu(b, op, "b");
  check_shape(a, {-1, b.size(1)}, op, "a");
  check_shape(bias, {b.size(0), b.size(2)}, op, "bias");
  const ScalarType at = a.scalar_type();
  GroupedGemmParams p{};
  p.T = a.size(0), p.E = b.size(0), p.K = b.size(1), p.N = b.size(2);
  p.a_dtype = dtype_from(at, op, "a");
  p.b_dtype = dtype_from(b.scalar_type(), op, "b");
  TZ_CHECK((at == ScalarType::Double) == (b.scalar_type() == ScalarType::Double), op, "float64 goes with float64 only");
  p.a = data(a), p.a_stride_m = a.stride(0), p.a_stride_k = a.stride(1);
  p.b = data(b), p.b_stride_e = b.stride(0), p.b_stride_k = b.stride(1), p.b_stride_n = b.stride(2);
  p.bias_dtype = p.a_dtype;
  return p;
}

void set_bias(GroupedGemmParams& p, const OptTensor& bias, const char* op) {
  if (!bias) return;
  p.bias_dtype = dtype_from(bias->scalar_type(), op, "bias");
  p.bias = data(bias), p.bias_stride_e = bias->stride(0);
}

}  // namespace

Tensor grouped_gemm_fwd(const Tensor& a, const Tensor& b, const Tensor& offs, const OptTensor& bias_in) {
  constexpr const char* kOp = "grouped_mm";
  check_shape(b, {-1, -1, -1}, kOp, "b");
  const OptTensor bias = bias_in ? OptTensor(unit_stride_last(*bias_in)) : std::nullopt;
  GroupedGemmParams p = product_params(a, b, bias, kOp);
  const Tensor ends = checked_offs(offs, p.E, p.T, kOp);
  p.offs = static_cast<const int32_t*>(data(ends));
  set_bias(p, bias, kOp);
  Tensor c = empty(a, {p.T, p.N}, a.scalar_type());
  p.c = mutable_data(c);
  cpu::run_grouped_gemm(p);
  return c;
}

// db [E, K, N] contiguous, or its transpose [E, N, K] when k_last.
Tensor grouped_gemm_wgrad(const Tensor& a, const Tensor& dy, const Tensor& offs, bool k_last, ScalarType dtype) {
  constexpr const char* kOp = "grouped_mm backward";
  check_cpu(a, kOp, "a");
  check_cpu(dy, kOp, "dy");
  check_shape(a, {-1, -1}, kOp, "a");
  check_shape(dy, {a.size(0), -1}, kOp, "dy");
  const Tensor ends = checked_offs(offs, offs.numel(), a.size(0), kOp);
  const Tensor &left = k_last ? dy : a, &right = k_last ? a : dy;  // db^T = dy^T a
  GroupedWgradParams p{};
  p.T = a.size(0), p.E = offs.numel(), p.K = left.size(1), p.N = right.size(1);
  p.a_dtype = dtype_from(left.scalar_type(), kOp, "a");
  p.dy_dtype = dtype_from(right.scalar_type(), kOp, "dy");
  p.db_dtype = dtype_from(dtype, kOp, "b");
  p.a = data(left), p.a_stride_m = left.stride(0), p.a_stride_k = left.stride(1);
  p.dy = data(right), p.dy_stride_m = right.stride(0), p.dy_stride_n = right.stride(1);
  p.offs = static_cast<const int32_t*>(data(ends));
  Tensor db = empty(a, {p.E, p.K, p.N}, dtype);
  p.db = mutable_data(db), p.db_stride_e = p.K * p.N, p.db_stride_k = p.N;
  cpu::run_grouped_gemm_wgrad(p);
  return db;
}

Tensor linear_fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias_in, int64_t activation) {
  constexpr const char* kOp = "linear";
  check_shape(weight, {-1, -1}, kOp, "weight");
  TZ_CHECK(activation >= 0 && activation < kActivations - 1, kOp, "unknown activation ", activation);
  const OptTensor bias = bias_in ? OptTensor(unit_stride_last(*bias_in)) : std::nullopt;
  check_shape(x, {-1, weight.size(1)}, kOp, "x");
  check_shape(bias, {weight.size(0)}, kOp, "bias");
  check_cpu(x, kOp, "x");
  check_cpu(weight, kOp, "weight");
  const ScalarType xt = x.scalar_type();
  TZ_CHECK((xt == ScalarType::Double) == (weight.scalar_type() == ScalarType::Double), kOp, "float64 goes with float64 only");
  GroupedGemmParams p{};
  p.T = x.size(0), p.E = 1, p.K = weight.size(1), p.N = weight.size(0);
  p.a_dtype = p.bias_dtype = dtype_from(xt, kOp, "x");
  p.b_dtype = dtype_from(weight.scalar_type(), kOp, "weight");
  p.activation = static_cast<Activation>(activation);
  p.a = data(x), p.a_stride_m = x.stride(0), p.a_stride_k = x.stride(1);
  p.b = data(weight), p.b_stride_k = weight.stride(1), p.b_stride_n = weight.stride(0);
  if (bias) {
    p.bias_dtype = dtype_from(bias->scalar_type(), kOp, "bias");
    p.bias = data(bias);
  }
  const int32_t end = static_cast<int32_t>(p.T);
  p.offs = &end;
  Tensor y = empty(x, {p.T, p.N}, xt);
  p.c = mutable_data(y);
  cpu::run_linear(p);
  return y;
}

}  // namespace terrazzo
