#include "glue.h"

namespace terrazzo {
namespace {

constexpr const char* kOp = "selective_state_update";

// A parameter in the accumulation type. Dimensions expanded with stride 0 stay expanded: only the distinct
// elements are converted, so a bf16 dt_bias (H,) seen as (H, P) costs H conversions.
Tensor cast_expanded(const Tensor& t, ScalarType dtype, std::vector<int64_t>& strides) {
  strides.assign(t.strides().begin(), t.strides().end());
  if (t.scalar_type() == dtype) return t;
  Tensor distinct = t;
  for (int64_t d = 0; d < t.dim(); d++)
    if (t.stride(d) == 0 && t.size(d) > 1) distinct = torch::stable::narrow(distinct, d, 0, 1);
  Tensor converted = cast_contiguous(distinct, dtype);
  for (int64_t d = 0; d < t.dim(); d++) strides[d] = converted.size(d) == 1 ? 0 : converted.stride(d);
  return converted;
}

}  // namespace

Tensor selective_state_update(const Tensor& state, const Tensor& x, const Tensor& dt_in, const Tensor& A_in, const Tensor& B_in,
    const Tensor& C_in, const OptTensor& D_in, const OptTensor& z_in, const OptTensor& dt_bias_in, bool dt_softplus,
    const OptTensor& state_batch_indices) {
  StateUpdateParams p{};
  check_shape(x, {-1, -1, -1}, kOp, "x");
  check_shape(B_in, {x.size(0), -1, -1}, kOp, "B");
  check_device(x, kOp, "x");
  check_device(state, kOp, "state");
  p.B = x.size(0), p.H = x.size(1), p.P = x.size(2), p.G = B_in.size(1), p.N = B_in.size(2);
  TZ_CHECK(p.H > 0 && p.P > 0 && p.N > 0, kOp, "x and B must not be empty along H, P or N");
  TZ_CHECK(p.G > 0 && p.H % p.G == 0, kOp, "the groups of B must divide the ", p.H, " heads, got ", p.G);
  check_shape(state, {-1, p.H, p.P, p.N}, kOp, "state");
  check_writable(state, kOp, "state");
  TZ_CHECK(p.N <= 1 || state.stride(3) == 1, kOp, "state must have unit stride along N");
  check_shape(dt_in, {p.B, p.H, p.P}, kOp, "dt");
  check_shape(A_in, {p.H, p.P, p.N}, kOp, "A");
  check_shape(C_in, {p.B, p.G, p.N}, kOp, "C");
  check_shape(D_in, {p.H, p.P}, kOp, "D");
  check_shape(z_in, {p.B, p.H, p.P}, kOp, "z");
  check_shape(dt_bias_in, {p.H, p.P}, kOp, "dt_bias");
  check_float(A_in, kOp, "A"), check_float(B_in, kOp, "B"), check_float(C_in, kOp, "C");
  check_float(D_in, kOp, "D"), check_float(z_in, kOp, "z"), check_float(dt_bias_in, kOp, "dt_bias");
  const ScalarType xt = x.scalar_type(), acc = acc_scalar(xt);
  TZ_CHECK((state.scalar_type() == ScalarType::Double) == (xt == ScalarType::Double), kOp, "state must be float64 exactly when x is");
  std::vector<int64_t> sa, sd, sb, st;
  const bool dt_converts = acc == ScalarType::Double || dt_in.scalar_type() == ScalarType::Double;
  const Tensor dt = cast_expanded(dt_in, dt_converts ? acc : dt_in.scalar_type(), st);
  const Tensor A = cast_expanded(A_in, acc, sa), B = cast(B_in, xt), C = cast(C_in, xt);
  const OptTensor z = cast(z_in, xt);
  p.state_dtype = dtype_from(state.scalar_type(), kOp, "state");
  p.x_dtype = dtype_from(xt, kOp, "x");
  p.dt_dtype = dtype_from(dt.scalar_type(), kOp, "dt");
  p.param_dtype = dtype_from(acc, kOp, "A");
  p.dt_softplus = dt_softplus;
  p.num_slots = state.size(0);
  p.state = mutable_data(state), p.state_stride_s = state.stride(0), p.state_stride_h = state.stride(1), p.state_stride_p = state.stride(2);
  p.x = data(x), p.x_stride_b = x.stride(0), p.x_stride_h = x.stride(1), p.x_stride_p = x.stride(2);
  p.dt = data(dt), p.dt_stride_b = st[0], p.dt_stride_h = st[1], p.dt_stride_p = st[2];
  p.A = data(A), p.A_stride_h = sa[0], p.A_stride_p = sa[1], p.A_stride_n = sa[2];
  p.Bm = data(B), p.B_stride_b = B.stride(0), p.B_stride_g = B.stride(1), p.B_stride_n = B.stride(2);
  p.C = data(C), p.C_stride_b = C.stride(0), p.C_stride_g = C.stride(1), p.C_stride_n = C.stride(2);
  OptTensor D, dt_bias;
  if (D_in) {
    D = cast_expanded(*D_in, acc, sd);
    p.D = data(D), p.D_stride_h = sd[0], p.D_stride_p = sd[1];
  }
  if (z) p.z = data(z), p.z_stride_b = z->stride(0), p.z_stride_h = z->stride(1), p.z_stride_p = z->stride(2);
  if (dt_bias_in) {
    dt_bias = cast_expanded(*dt_bias_in, acc, sb);
    p.dt_bias = data(dt_bias), p.dt_bias_stride_h = sb[0], p.dt_bias_stride_p = sb[1];
  }
  p.state_batch_indices = checked_slots(state_batch_indices, p.B, p.num_slots, kOp, "state_batch_indices");
  Tensor out = empty(x, {p.B, p.H, p.P}, xt);
  p.out = mutable_data(out);
  TZ_RUN_WHERE(x, state_update, p);
  return out;
}

}  // namespace terrazzo
