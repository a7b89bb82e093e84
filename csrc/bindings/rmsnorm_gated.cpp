#include "../cuda/params.h"
#include "glue.h"

namespace terrazzo {
namespace {

constexpr const char* kOp = "rmsnorm_gated";

// Rows of the last dimension with one row stride; anything else is copied.
struct NormCall {
  Tensor x, weight;
  OptTensor z;
  RmsnormGatedCudaParams p{};

  NormCall(const Tensor& x_in, const Tensor& weight_in, const OptTensor& z_in, double eps, int64_t group_size, bool norm_before_gate)
      : x(unit_stride_last(x_in)), weight(weight_in), z(z_in) {
    check_shape(x, {-1, -1}, kOp, "x");
    check_device(x, kOp, "x");
    p.rows = x.size(0), p.D = x.size(1), p.group_size = group_size, p.eps = eps, p.norm_before_gate = norm_before_gate;
    TZ_CHECK(group_size > 0 && p.D % group_size == 0, kOp, "group_size must divide ", p.D, ", got ", group_size);
    check_shape(weight, {p.D}, kOp, "weight");
    check_shape(z, {p.rows, p.D}, kOp, "z");
    const ScalarType xt = x.scalar_type();
    const ScalarType wt = weight_scalar(xt, weight.scalar_type());
    weight = cast_contiguous(weight, wt);
    p.x_dtype = dtype_from(xt, kOp, "x");
    p.weight_dtype = dtype_from(wt, kOp, "weight");
    p.x = data(x), p.x_stride = x.stride(0), p.weight = data(weight);
    if (z) {
      z = unit_stride_last(cast(*z, xt));
      p.z = data(z), p.z_stride = z->stride(0);
    }
  }
};

}  // namespace

Tensor rmsnorm_gated_fwd(const Tensor& x, const Tensor& weight, const OptTensor& z, double eps, int64_t group_size,
    bool norm_before_gate) {
  NormCall call(x, weight, z, eps, group_size, norm_before_gate);
  Tensor y = empty(x, {call.p.rows, call.p.D}, x.scalar_type());
  call.p.y = mutable_data(y);
  TZ_RUN_WHERE(x, rmsnorm_gated_fwd, call.p);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> rmsnorm_gated_bwd(const Tensor& dy_in, const Tensor& x, const Tensor& weight, const OptTensor& z,
    double eps, int64_t group_size, bool norm_before_gate) {
  NormCall call(x, weight, z, eps, group_size, norm_before_gate);
  RmsnormGatedCudaParams& p = call.p;
  check_shape(dy_in, {p.rows, p.D}, kOp, "dy");
  const Tensor dy = unit_stride_last(cast(dy_in, x.scalar_type()));
  p.dy = data(dy), p.dy_stride = dy.stride(0);
  Tensor dx = empty(x, {p.rows, p.D}, x.scalar_type()), dz = absent(x);
  Tensor dweight = empty(x, {p.D}, acc_scalar(x.scalar_type()));
  p.dx = mutable_data(dx), p.dweight = mutable_data(dweight);
  if (z) {
    dz = empty(x, {p.rows, p.D}, x.scalar_type());
    p.dz = mutable_data(dz);
  }
  const Tensor partials = runs_on_cpu(x) ? absent(x) : empty(x, {norm_partials(p), p.D}, ScalarType::Float);
  p.partials = mutable_data(partials);
  TZ_RUN_WHERE(x, rmsnorm_gated_bwd, p);
  if (z) dz = cast(dz, z->scalar_type());
  return {dx, cast(dweight, weight.scalar_type()), dz};
}

}  // namespace terrazzo
