#include "glue.h"

namespace terrazzo {
namespace {

MoeRouteParams route_params(const Tensor& logits, int64_t top_k, double norm_order, bool softmax_first, bool sigmoid, double scale) {
  constexpr const char* kOp = "moe_route";
  check_cpu(logits, kOp, "router_logits");
  check_shape(logits, {-1, -1}, kOp, "router_logits");
  MoeRouteParams p{};
  p.dtype = dtype_from(logits.scalar_type(), kOp, "router_logits");
  p.T = logits.size(0), p.E = logits.size(1), p.top_k = top_k, p.norm_order = norm_order, p.scale = scale;
  p.softmax_first = softmax_first, p.sigmoid = sigmoid;
  TZ_CHECK(top_k >= 1 && top_k <= p.E, kOp, "top_k must be between 1 and the ", p.E, " experts, got ", top_k);
  p.logits = data(logits), p.logits_stride_t = logits.stride(0), p.logits_stride_e = logits.stride(1);
  return p;
}

// Rows and pairs of an unpermutation; a place outside the rows is refused before it is read.
MoeUnpermuteParams unpermute_params(const Tensor& rows, const Tensor& inverse, const Tensor& weights) {
  constexpr const char* kOp = "moe_unpermute";
  check_cpu(rows, kOp, "rows");
  check_cpu(inverse, kOp, "inverse");
  check_cpu(weights, kOp, "weights");
  check_shape(rows, {-1, -1}, kOp, "rows");
  check_shape(weights, {inverse.size(0), inverse.size(1)}, kOp, "weights");
  TZ_CHECK(inverse.scalar_type() == ScalarType::Int && inverse.is_contiguous(), kOp, "inverse must be contiguous int32");
  MoeUnpermuteParams p{};
  p.dtype = dtype_from(rows.scalar_type(), kOp, "rows");
  p.T = inverse.size(0), p.A = inverse.size(1), p.D = rows.size(1), p.rows = data(rows), p.rows_stride = rows.stride(0);
  p.inverse = static_cast<const int32_t*>(data(inverse)), p.weights = data(weights);
  for (int64_t i = 0; i < p.T * p.A; i++)
    TZ_CHECK(p.inverse[i] >= 0 && p.inverse[i] < rows.size(0), kOp, "inverse must lie below ", rows.size(0), ", got ", p.inverse[i]);
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> moe_route_fwd(const Tensor& logits, const OptTensor& bias_in, int64_t top_k, double norm_order,
    bool softmax_first, bool sigmoid, int64_t n_group, int64_t topk_group, double scale) {
  constexpr const char* kOp = "moe_route";
  MoeRouteParams p = route_params(logits, top_k, norm_order, softmax_first, sigmoid, scale);
  check_shape(bias_in, {p.E}, kOp, "bias");
  TZ_CHECK(n_group == 0 || (n_group > 0 && p.E % n_group == 0 && topk_group >= 1 && topk_group <= n_group && topk_group * (p.E / n_group) >= top_k),
           kOp, "n_group and topk_group do not fit ", p.E, " experts and top_k ", top_k);
  const ScalarType acc = acc_scalar(logits.scalar_type());
  const OptTensor bias = cast_contiguous(bias_in, acc);
  p.bias = data(bias), p.n_group = n_group, p.topk_group = topk_group;
  Tensor weights = empty(logits, {p.T, top_k}, logits.scalar_type()), indices = empty(logits, {p.T, top_k}, ScalarType::Int);
  Tensor stats = empty(logits, {p.T, 2}, acc);
  p.weights = mutable_data(weights), p.indices = static_cast<int32_t*>(mutable_data(indices)), p.stats = mutable_data(stats);
  cpu::run_moe_route_fwd(p);
  return {weights, indices, stats};
}

Tensor moe_route_bwd(const Tensor& dweights_in, const Tensor& logits, const Tensor& indices, const Tensor& stats, double norm_order,
    bool softmax_first, bool sigmoid, double scale) {
  constexpr const char* kOp = "moe_route backward";
  const int64_t top_k = indices.size(1);
  MoeRouteParams p = route_params(logits, top_k, norm_order, softmax_first, sigmoid, scale);
  check_shape(indices, {p.T, top_k}, kOp, "indices");
  check_shape(stats, {p.T, 2}, kOp, "stats");
  check_shape(dweights_in, {p.T, top_k}, kOp, "dweights");
  TZ_CHECK(indices.scalar_type() == ScalarType::Int && indices.is_contiguous() && stats.is_contiguous(), kOp, "indices must be contiguous int32");
  p.indices = static_cast<int32_t*>(mutable_data(indices));
  for (int64_t i = 0; i < p.T * top_k; i++) TZ_CHECK(p.indices[i] >= 0 && p.indices[i] < p.E, kOp, "index out of range: ", p.indices[i]);
  const Tensor dweights = cast_contiguous(dweights_in, logits.scalar_type());
  Tensor dlogits = empty(logits, {p.T, p.E}, logits.scalar_type());
  p.stats = mutable_data(stats), p.dweights = data(dweights), p.dlogits = mutable_data(dlogits);
  cpu::run_moe_route_bwd(p);
  return dlogits;
}

std::tuple<Tensor, Tensor, Tensor> moe_permute(const Tensor& indices_in, int64_t num_experts) {
  constexpr const char* kOp = "moe_permute";
  check_cpu(indices_in, kOp, "indices");
  check_shape(indices_in, {-1, -1}, kOp, "indices");
  TZ_CHECK(indices_in.scalar_type() == ScalarType::Int, kOp, "indices must be int32");
  TZ_CHECK(num_experts >= 1 && indices_in.numel() <= INT32_MAX, kOp, "num_experts must be positive and indices hold fewer than 2^31 pairs");
  const Tensor indices = cast_contiguous(indices_in, ScalarType::Int);
  const ScalarType i32 = ScalarType::Int;
  Tensor order = empty(indices, {indices.numel()}, i32), inverse = empty(indices, {indices.size(0), indices.size(1)}, i32);
  Tensor offs = empty(indices, {num_experts}, i32);
  MoePermuteParams p{indices.numel(), num_experts, static_cast<const int32_t*>(data(indices)), static_cast<int32_t*>(mutable_data(order)),
                     static_cast<int32_t*>(mutable_data(inverse)), static_cast<int32_t*>(mutable_data(offs))};
  for (int64_t i = 0; i < p.pairs; i++) TZ_CHECK(p.indices[i] >= 0, kOp, "indices must not be negative, got ", p.indices[i]);
  cpu::run_moe_permute(p);
  return {order, inverse, offs};
}

Tensor moe_unpermute_fwd(const Tensor& rows_in, const Tensor& inverse_in, const Tensor& weights_in) {
  const Tensor rows = unit_stride_last(rows_in), weights = cast_contiguous(weights_in, acc_scalar(rows.scalar_type()));
  const Tensor inverse = cast_contiguous(inverse_in, inverse_in.scalar_type());
  MoeUnpermuteParams p = unpermute_params(rows, inverse, weights);
  Tensor y = empty(rows, {p.T, p.D}, rows.scalar_type());
  p.y = mutable_data(y);
  cpu::run_moe_unpermute_fwd(p);
  return y;
}

std::tuple<Tensor, Tensor> moe_unpermute_bwd(const Tensor& dy_in, const Tensor& rows_in, const Tensor& inverse_in, const Tensor& weights_in) {
  const Tensor rows = unit_stride_last(rows_in), dy = cast_contiguous(dy_in, rows.scalar_type());
  const Tensor weights = cast_contiguous(weights_in, acc_scalar(rows.scalar_type())), inverse = cast_contiguous(inverse_in, inverse_in.scalar_type());
  MoeUnpermuteParams p = unpermute_params(rows, inverse, weights);
  check_shape(dy, {p.T, p.D}, "moe_unpermute backward", "dy");
  Tensor drows = zeros(rows, {rows.size(0), p.D}, rows.scalar_type()), dweights = empty(weights, {p.T, p.A}, weights.scalar_type());
  p.dy = data(dy), p.drows = mutable_data(drows), p.dweights = mutable_data(dweights);
  cpu::run_moe_unpermute_bwd(p);
  return {drows, cast(dweights, weights_in.scalar_type())};
}

}  // namespace terrazzo
