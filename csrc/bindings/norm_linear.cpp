#include "glue.h"

namespace terrazzo {
namespace {

constexpr const char* kOp = "norm_linear";

}  // namespace

Tensor norm_linear(const Tensor& x_in, const Tensor& weight, const OptTensor& weight2, const OptTensor& weight3, const OptTensor& norm_weight_in,
    double eps, int64_t activation, bool gated, const OptTensor& residual_in) {
  check_cpu(x_in, kOp, "x");
  check_shape(x_in, {-1, -1}, kOp, "x");
  const Tensor x = unit_stride_last(x_in);
  NormLinearParams p{};
  const ScalarType dtype = x.scalar_type();
  p.dtype = dtype_from(dtype, kOp, "x"), p.T = x.size(0), p.K = x.size(1), p.eps = eps, p.gated = gated;
  TZ_CHECK(p.K > 0, kOp, "x must not be empty along K");
  TZ_CHECK(activation >= 0 && activation < kActivations - 1, kOp, "unknown activation ", activation);
  p.activation = static_cast<Activation>(activation);
  const auto add = [&](const Tensor& w, const char* name) {
    check_cpu(w, kOp, name);
    check_shape(w, {-1, p.K}, kOp, name);
    TZ_CHECK(w.size(0) > 0, kOp, name, " must not be empty");
    TZ_CHECK((w.scalar_type() == ScalarType::Double) == (dtype == ScalarType::Double), kOp, "float64 goes with float64 only");
    p.weights[p.num_weights++] = {{dtype_from(w.scalar_type(), kOp, name), data(w), 0, w.stride(1), w.stride(0), 0, false, nullptr, 0}, w.size(0)};
    p.columns += w.size(0);
  };
  add(weight, "weight");
  if (weight2) add(*weight2, "weight2");
  TZ_CHECK(weight2 || !weight3, kOp, "weight3 goes behind weight2");
  if (weight3) add(*weight3, "weight3");
  if (gated) {
    TZ_CHECK(p.num_weights == 2 && p.weights[0].N == p.weights[1].N, kOp, "gated needs weight and weight2 of one shape, and no third");
    p.columns = p.weights[0].N;
  }
  OptTensor norm_weight, residual;
  if (norm_weight_in) {
    check_cpu(*norm_weight_in, kOp, "norm_weight");
    check_shape(*norm_weight_in, {p.K}, kOp, "norm_weight");
    norm_weight = cast_contiguous(*norm_weight_in, weight_scalar(dtype, norm_weight_in->scalar_type()));
    p.norm_dtype = dtype_from(norm_weight->scalar_type(), kOp, "norm_weight"), p.norm_weight = data(norm_weight);
  }
  if (residual_in) {
    check_cpu(*residual_in, kOp, "residual");
    check_shape(*residual_in, {p.T, p.columns}, kOp, "residual");
    check_float(*residual_in, kOp, "residual");
    residual = unit_stride_last(cast(*residual_in, dtype));
    p.residual = data(residual), p.residual_stride = residual->stride(0);
  }
  p.x = data(x), p.x_stride = x.stride(0);
  Tensor y = empty(x, {p.T, p.columns}, dtype);
  p.y = mutable_data(y);
  cpu::run_norm_linear(p);
  return y;
}

}  // namespace terrazzo
