#include "glue.h"

namespace terrazzo {
namespace {

// Row ends of the groups: int32, contiguous, not decreasing, at most T (on a GPU nobody looks).
Tensor checked_offs(const Tensor& offs, int64_t E, int64_t T, const char* op) {
  check_device(offs, op, "offs");
  check_shape(offs, {E}, op, "offs");
  TZ_CHECK(offs.scalar_type() == ScalarType::Int, op, "offs must be int32");
  const Tensor ends = offs.is_contiguous() ? offs : torch::stable::contiguous(offs);
  if (!runs_on_cpu(ends)) return ends;
  const int32_t* end = static_cast<const int32_t*>(data(ends));
  for (int64_t e = 0, before = 0; e < E; before = end[e++])
    TZ_CHECK(end[e] >= before && end[e] <= T, op, "offs must not decrease and end at most at ", T, ", the number of rows, got ", end[e],
             " after ", before, " at group ", e);
  return ends;
}

// c[rows of e] = a b[e]; b is [E, K, N] behind three strides.
GroupedGemmParams product_params(const Tensor& a, const Tensor& b, int64_t E, int64_t K, int64_t N, int64_t stride_e, int64_t stride_k,
                                 int64_t stride_n, const int32_t* offs, const char* op) {
  TZ_CHECK((a.scalar_type() == ScalarType::Double) == (b.scalar_type() == ScalarType::Double), op, "float64 goes with float64 only");
  GroupedGemmParams p{};
  p.T = a.size(0), p.E = E, p.K = K, p.N = N, p.offs = offs;
  p.a_dtype = p.bias_dtype = dtype_from(a.scalar_type(), op, "the first argument");
  p.a = data(a), p.a_stride_m = a.stride(0), p.a_stride_k = a.stride(1);
  p.b = {dtype_from(b.scalar_type(), op, "the weight"), data(b), stride_e, stride_k, stride_n, 0, false, nullptr, 0};
  return p;
}

void set_bias(GroupedGemmParams& p, const OptTensor& bias, const char* op) {
  if (!bias) return;
  p.bias_dtype = dtype_from(bias->scalar_type(), op, "bias");
  p.bias = data(bias), p.bias_stride_e = bias->dim() == 2 ? bias->stride(0) : 0;
}

// db[e] = a[rows of e]^T dy[rows of e] into a contiguous [E, K, N].
GroupedWgradParams wgrad_params(const Tensor& a, const Tensor& dy, int64_t E, const int32_t* offs, Tensor& db, const char* op) {
  GroupedWgradParams p{};
  p.T = a.size(0), p.E = E, p.K = a.size(1), p.N = dy.size(1), p.offs = offs;
  p.a_dtype = dtype_from(a.scalar_type(), op, "a"), p.dy_dtype = dtype_from(dy.scalar_type(), op, "dy");
  p.db_dtype = dtype_from(db.scalar_type(), op, "the weight");
  p.a = data(a), p.a_stride_m = a.stride(0), p.a_stride_k = a.stride(1);
  p.dy = data(dy), p.dy_stride_m = dy.stride(0), p.dy_stride_n = dy.stride(1);
  p.db = mutable_data(db), p.db_stride_e = p.K * p.N, p.db_stride_k = p.N;
  return p;
}

// The one group of a linear layer: its end, which only the CPU kernels read.
struct OneGroup {
  int32_t end;
  bool on_cpu;
  explicit OneGroup(const Tensor& x) : end(static_cast<int32_t>(x.size(0))), on_cpu(runs_on_cpu(x)) {}
  const int32_t* offs() const { return on_cpu ? &end : nullptr; }
};

// Column sums of each group's dy, as the weight gradient of rows of ones (which the CUDA kernels don't read).
struct Ones {
  float f32 = 1;
  double f64 = 1;
  GroupedWgradParams sums(const Tensor& dy, int64_t E, const int32_t* offs, Tensor& out, const char* op) const {
    GroupedWgradParams p = wgrad_params(dy, dy, E, offs, out, op);
    const bool wide = dy.scalar_type() == ScalarType::Double;
    p.a_dtype = wide ? DType::f64 : DType::f32, p.a = wide ? static_cast<const void*>(&f64) : &f32;
    p.K = 1, p.a_stride_m = p.a_stride_k = 0, p.db_stride_e = p.db_stride_k = p.N;
    return p;
  }
};

OptTensor unit_stride_bias(const OptTensor& t) { return t ? OptTensor(unit_stride_last(*t)) : std::nullopt; }

}  // namespace

Tensor grouped_gemm_fwd(const Tensor& a, const Tensor& b, const Tensor& offs, const OptTensor& bias_in) {
  constexpr const char* kOp = "grouped_mm";
  check_device(a, kOp, "a");
  check_device(b, kOp, "b");
  check_shape(b, {-1, -1, -1}, kOp, "b");
  check_shape(a, {-1, b.size(1)}, kOp, "a");
  check_shape(bias_in, {b.size(0), b.size(2)}, kOp, "bias");
  const OptTensor bias = unit_stride_bias(bias_in);
  const Tensor ends = checked_offs(offs, b.size(0), a.size(0), kOp);
  GroupedGemmParams p = product_params(a, b, b.size(0), b.size(1), b.size(2), b.stride(0), b.stride(1), b.stride(2),
                                       static_cast<const int32_t*>(data(ends)), kOp);
  set_bias(p, bias, kOp);
  Tensor c = empty(a, {p.T, p.N}, a.scalar_type());
  p.c = mutable_data(c);
  TZ_RUN_WHERE(a, grouped_gemm, p);
  return c;
}

// The product with weights packed by pack_weight: [E, panels, K, kPanel], see packed_matrix.
Tensor grouped_gemm_packed(const Tensor& a, const Tensor& b, const OptTensor& scale, const Tensor& offs, const OptTensor& bias_in, int64_t N) {
  constexpr const char* kOp = "grouped_mm";
  check_cpu(a, kOp, "a");
  check_shape(a, {-1, -1}, kOp, "a");
  check_shape(b, {-1, -1, a.size(1), kPanel}, kOp, "b");
  check_shape(bias_in, {b.size(0), N}, kOp, "bias");
  const OptTensor bias = unit_stride_bias(bias_in);
  const Tensor ends = checked_offs(offs, b.size(0), a.size(0), kOp);
  GroupedGemmParams p{};
  p.T = a.size(0), p.E = b.size(0), p.K = a.size(1), p.N = N, p.offs = static_cast<const int32_t*>(data(ends));
  p.a_dtype = p.bias_dtype = dtype_from(a.scalar_type(), kOp, "a");
  p.a = data(a), p.a_stride_m = a.stride(0), p.a_stride_k = a.stride(1);
  p.b = packed_matrix(b, scale, p.E, p.K, N, a.scalar_type(), kOp, "b");
  set_bias(p, bias, kOp);
  Tensor c = empty(a, {p.T, p.N}, a.scalar_type());
  p.c = mutable_data(c);
  TZ_RUN_WHERE(a, grouped_gemm, p);  // always the CPU: checked above
  return c;
}

// da, db and dbias [E, N]; db is [E, N, K] when b is contiguous along K (its gradient then is, too), else [E, K, N].
std::tuple<Tensor, Tensor, Tensor> grouped_gemm_bwd(const Tensor& dy, const Tensor& a, const Tensor& b, const Tensor& offs, bool need_a,
    bool need_b, bool need_bias) {
  constexpr const char* kOp = "grouped_mm backward";
  check_device(dy, kOp, "dy");
  check_device(a, kOp, "a");
  check_device(b, kOp, "b");
  check_shape(b, {-1, -1, -1}, kOp, "b");
  const int64_t E = b.size(0), K = b.size(1), N = b.size(2);
  check_shape(a, {-1, K}, kOp, "a");
  check_shape(dy, {a.size(0), N}, kOp, "dy");
  const Tensor ends = checked_offs(offs, E, a.size(0), kOp);
  const int32_t* end = static_cast<const int32_t*>(data(ends));
  Tensor da = absent(a), db = absent(b), dbias = absent(a);
  GroupedGemmBwdParams p{};
  if (need_a) {
    da = empty(a, {a.size(0), K}, dy.scalar_type());
    p.da = product_params(dy, b, E, N, K, b.stride(0), b.stride(2), b.stride(1), end, kOp);
    p.da.c = mutable_data(da);
  }
  if (need_b) {
    const bool k_last = b.stride(1) == 1 && b.stride(2) != 1;
    db = k_last ? empty(b, {E, N, K}, b.scalar_type()) : empty(b, {E, K, N}, b.scalar_type());
    p.db = k_last ? wgrad_params(dy, a, E, end, db, kOp) : wgrad_params(a, dy, E, end, db, kOp);
  }
  const Ones ones;
  if (need_bias) {
    dbias = empty(a, {E, N}, acc_scalar(a.scalar_type()));
    p.dbias = ones.sums(dy, E, end, dbias, kOp);
  }
  TZ_RUN_WHERE(a, grouped_gemm_bwd, p);
  return {da, db, dbias};
}

namespace {

Tensor checked_wgrad_ends(const Tensor& a, const Tensor& b, const Tensor& offs) {
  check_device(a, "gmm", "a");
  check_device(b, "gmm", "b");
  check_shape(a, {-1, -1}, "gmm", "a");
  check_shape(b, {a.size(0), -1}, "gmm", "b");
  return checked_offs(offs, offs.numel(), a.size(0), "gmm");
}

}  // namespace

Tensor grouped_wgrad_fwd(const Tensor& a, const Tensor& b, const Tensor& offs) {
  const Tensor ends = checked_wgrad_ends(a, b, offs);
  Tensor y = empty(a, {offs.numel(), a.size(1), b.size(1)}, a.scalar_type());
  TZ_RUN_WHERE(a, grouped_wgrad, wgrad_params(a, b, offs.numel(), static_cast<const int32_t*>(data(ends)), y, "gmm"));
  return y;
}

std::tuple<Tensor, Tensor> grouped_wgrad_bwd(const Tensor& dy, const Tensor& a, const Tensor& b, const Tensor& offs) {
  const Tensor ends = checked_wgrad_ends(a, b, offs);
  const int64_t E = offs.numel(), K = a.size(1), N = b.size(1);
  check_shape(dy, {E, K, N}, "gmm backward", "dy");
  const int32_t* end = static_cast<const int32_t*>(data(ends));
  Tensor da = empty(a, {a.size(0), K}, b.scalar_type()), db = empty(a, {a.size(0), N}, a.scalar_type());
  GroupedWgradBwdParams p{};
  p.da = product_params(b, dy, E, N, K, dy.stride(0), dy.stride(2), dy.stride(1), end, "gmm backward");
  p.dy = product_params(a, dy, E, K, N, dy.stride(0), dy.stride(1), dy.stride(2), end, "gmm backward");
  p.da.c = mutable_data(da), p.dy.c = mutable_data(db);
  TZ_RUN_WHERE(a, grouped_wgrad_bwd, p);
  return {cast(da, a.scalar_type()), cast(db, b.scalar_type())};
}

Tensor linear_fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias_in, int64_t activation) {
  constexpr const char* kOp = "linear";
  check_device(x, kOp, "x");
  check_device(weight, kOp, "weight");
  check_shape(weight, {-1, -1}, kOp, "weight");
  check_shape(x, {-1, weight.size(1)}, kOp, "x");
  check_shape(bias_in, {weight.size(0)}, kOp, "bias");
  TZ_CHECK(activation >= 0 && activation < kActivations - 1, kOp, "unknown activation ", activation);
  TZ_CHECK(x.size(0) <= INT32_MAX, kOp, "x must have fewer than 2^31 rows, got ", x.size(0));
  const OptTensor bias = unit_stride_bias(bias_in);
  const OneGroup group(x);
  GroupedGemmParams p = product_params(x, weight, 1, weight.size(1), weight.size(0), 0, weight.stride(1), weight.stride(0), group.offs(), kOp);
  p.activation = static_cast<Activation>(activation);
  set_bias(p, bias, kOp);
  Tensor y = empty(x, {p.T, p.N}, x.scalar_type());
  p.c = mutable_data(y);
  TZ_RUN_WHERE(x, linear_fwd, p);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, bool need_x, bool need_weight,
    bool need_bias) {
  constexpr const char* kOp = "linear backward";
  check_device(dy, kOp, "dy");
  check_device(x, kOp, "x");
  check_device(weight, kOp, "weight");
  check_shape(weight, {-1, -1}, kOp, "weight");
  check_shape(x, {-1, weight.size(1)}, kOp, "x");
  check_shape(dy, {x.size(0), weight.size(0)}, kOp, "dy");
  const OneGroup group(x);
  Tensor dx = absent(x), dweight = absent(weight), dbias = absent(x);
  GroupedGemmBwdParams p{};
  if (need_x) {
    dx = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
    p.da = product_params(dy, weight, 1, weight.size(0), weight.size(1), 0, weight.stride(0), weight.stride(1), group.offs(), kOp);
    p.da.c = mutable_data(dx);
  }
  if (need_weight) {
    dweight = empty(weight, {weight.size(0), weight.size(1)}, weight.scalar_type());
    p.db = wgrad_params(dy, x, 1, group.offs(), dweight, kOp);
  }
  const Ones ones;
  if (need_bias) {
    dbias = empty(x, {weight.size(0)}, acc_scalar(x.scalar_type()));
    p.dbias = ones.sums(dy, 1, group.offs(), dbias, kOp);
  }
  TZ_RUN_WHERE(x, linear_bwd, p);
  return {dx, dweight, dbias};
}

}  // namespace terrazzo
