#include "../cuda/params.h"
#include "glue.h"

namespace terrazzo {
namespace {

constexpr const char *kRoute = "moe_route", *kPermute = "moe_permute", *kUnpermute = "moe_unpermute";

MoeRouteCudaParams route_params(const Tensor& logits, const OptTensor& bias, int64_t top_k, double norm_order, bool softmax_first, bool sigmoid,
                            int64_t n_group, int64_t topk_group, double scale) {
  check_device(logits, kRoute, "router_logits");
  check_shape(logits, {-1, -1}, kRoute, "router_logits");
  MoeRouteCudaParams p{};
  p.dtype = dtype_from(logits.scalar_type(), kRoute, "router_logits");
  p.T = logits.size(0), p.E = logits.size(1), p.A = top_k;
  check_shape(bias, {p.E}, kRoute, "bias");
  TZ_CHECK(top_k >= 1 && top_k <= p.E && p.E <= INT32_MAX, kRoute, "top_k must be 1 to ", p.E, ", the number of experts, got ", top_k);
  TZ_CHECK(n_group >= 0 && (n_group == 0 || (p.E % n_group == 0 && topk_group >= 1 && topk_group <= n_group)), kRoute,
           "n_group must divide ", p.E, " and topk_group be 1 to n_group, got ", n_group, " and ", topk_group);
  p.softmax_first = softmax_first, p.sigmoid = sigmoid, p.two_best = sigmoid || bias;
  p.n_group = n_group, p.topk_group = topk_group, p.norm_order = norm_order, p.scale = scale;
  p.logits = data(logits), p.logits_stride_t = logits.stride(0), p.logits_stride_e = logits.stride(1);
  p.bias = data(bias);
  return p;
}

// The rows, their places and weights; every place named once.
struct UnpermuteCall {
  Tensor rows, inverse, weights;
  MoeUnpermuteCudaParams p{};

  UnpermuteCall(const Tensor& rows_in, const Tensor& inverse_in, const Tensor& weights_in)
      : rows(unit_stride_last(rows_in)), inverse(cast_contiguous(inverse_in, ScalarType::Int)),
        weights(cast_contiguous(weights_in, acc_scalar(rows_in.scalar_type()))) {
    check_device(rows, kUnpermute, "rows");
    check_device(inverse, kUnpermute, "inverse");
    check_device(weights, kUnpermute, "weights");
    check_shape(weights, {-1, -1}, kUnpermute, "weights");
    p.T = weights.size(0), p.A = weights.size(1);
    const int64_t pairs = p.T * p.A;
    check_shape(rows, {pairs, -1}, kUnpermute, "rows");
    check_shape(inverse, {pairs}, kUnpermute, "inverse");
    p.D = rows.size(1), p.dtype = dtype_from(rows.scalar_type(), kUnpermute, "rows");
    p.rows = data(rows), p.rows_stride = rows.stride(0), p.weights = data(weights);
    p.inverse = static_cast<const int32_t*>(data(inverse));
    if (!runs_on_cpu(rows)) return;
    std::vector<uint8_t> seen(pairs, 0);
    for (int64_t i = 0; i < pairs; i++) {
      const int64_t place = p.inverse[i];
      TZ_CHECK(place >= 0 && place < pairs && !seen[place], kUnpermute, "inverse must name each of the ", pairs, " rows once, got ", place, " at pair ", i);
      seen[place] = 1;
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor> moe_route_fwd(const Tensor& logits, const OptTensor& bias_in, int64_t top_k, double norm_order, bool softmax_first,
    bool sigmoid, int64_t n_group, int64_t topk_group, double scale) {
  const OptTensor bias = cast_contiguous(bias_in, acc_scalar(logits.scalar_type()));
  MoeRouteCudaParams p = route_params(logits, bias, top_k, norm_order, softmax_first, sigmoid, n_group, topk_group, scale);
  Tensor weights = empty(logits, {p.T, p.A}, logits.scalar_type()), indices = empty(logits, {p.T, p.A}, ScalarType::Int);
  p.weights = mutable_data(weights), p.indices = static_cast<int32_t*>(mutable_data(indices));
  const int64_t held = p.E + p.n_group;
  const Tensor scores = runs_on_cpu(logits) || held <= kMostSharedScores ? absent(logits) : empty(logits, {p.T, held}, ScalarType::Float);
  p.scores = held <= kMostSharedScores ? nullptr : static_cast<float*>(mutable_data(scores));
  TZ_RUN_WHERE(logits, moe_route_fwd, p);
  return {weights, indices};
}

Tensor moe_route_bwd(const Tensor& dweights_in, const Tensor& logits, const Tensor& indices, double norm_order, bool softmax_first, bool sigmoid,
    double scale) {
  check_shape(indices, {logits.size(0), -1}, kRoute, "indices");
  MoeRouteCudaParams p = route_params(logits, std::nullopt, indices.size(1), norm_order, softmax_first, sigmoid, 0, 0, scale);
  check_shape(dweights_in, {p.T, p.A}, kRoute, "dweights");
  const Tensor dweights = cast_contiguous(dweights_in, logits.scalar_type()), ids = cast_contiguous(indices, ScalarType::Int);
  p.dweights = data(dweights), p.indices = const_cast<int32_t*>(static_cast<const int32_t*>(data(ids)));
  for (int64_t i = 0; runs_on_cpu(logits) && i < p.T * p.A; i++)
    TZ_CHECK(p.indices[i] >= 0 && p.indices[i] < p.E, kRoute, "indices must be below ", p.E, ", the number of experts, got ", p.indices[i]);
  Tensor dlogits = empty(logits, {p.T, p.E}, logits.scalar_type());
  p.dlogits = mutable_data(dlogits);
  TZ_RUN_WHERE(logits, moe_route_bwd, p);
  return dlogits;
}

std::tuple<Tensor, Tensor, Tensor> moe_permute(const Tensor& indices_in, int64_t num_experts) {
  check_device(indices_in, kPermute, "indices");
  TZ_CHECK(num_experts >= 1 && num_experts < INT32_MAX && indices_in.numel() < INT32_MAX, kPermute, "num_experts and pairs must fit int32");
  const Tensor indices = cast_contiguous(indices_in, ScalarType::Int);
  MoePermuteCudaParams p{};
  p.pairs = indices.numel(), p.E = num_experts, p.indices = static_cast<const int32_t*>(data(indices));
  int32_t lowest = 0;
  for (int64_t i = 0; runs_on_cpu(indices) && i < p.pairs; i++) lowest = p.indices[i] < lowest ? p.indices[i] : lowest;
  TZ_CHECK(lowest >= 0, kPermute, "indices must not be negative, got ", lowest);
  Tensor order = empty(indices, {p.pairs}, ScalarType::Int), inverse = empty(indices, {p.pairs}, ScalarType::Int);
  Tensor offs = empty(indices, {p.E}, ScalarType::Int);
  p.order = static_cast<int32_t*>(mutable_data(order)), p.inverse = static_cast<int32_t*>(mutable_data(inverse));
  p.offs = static_cast<int32_t*>(mutable_data(offs));
  const Tensor sort = runs_on_cpu(indices) ? absent(indices) : empty(indices, {sort_scratch(p.pairs, p.E + 1)}, ScalarType::Int);
  p.sort = static_cast<int32_t*>(mutable_data(sort));
  TZ_RUN_WHERE(indices, moe_permute, p);
  return {order, inverse, offs};
}

Tensor moe_unpermute_fwd(const Tensor& rows, const Tensor& inverse, const Tensor& weights) {
  UnpermuteCall call(rows, inverse, weights);
  Tensor y = empty(rows, {call.p.T, call.p.D}, rows.scalar_type());
  call.p.y = mutable_data(y);
  TZ_RUN_WHERE(rows, moe_unpermute_fwd, call.p);
  return y;
}

std::tuple<Tensor, Tensor> moe_unpermute_bwd(const Tensor& dy_in, const Tensor& rows, const Tensor& inverse, const Tensor& weights) {
  UnpermuteCall call(rows, inverse, weights);
  MoeUnpermuteCudaParams& p = call.p;
  check_shape(dy_in, {p.T, p.D}, kUnpermute, "dy");
  const Tensor dy = cast_contiguous(dy_in, rows.scalar_type());
  Tensor drows = empty(rows, {p.T * p.A, p.D}, rows.scalar_type()), dweights = empty(rows, {p.T, p.A}, acc_scalar(rows.scalar_type()));
  p.dy = data(dy), p.drows = mutable_data(drows), p.dweights = mutable_data(dweights);
  TZ_RUN_WHERE(rows, moe_unpermute_bwd, p);
  return {drows, cast(dweights, weights.scalar_type())};
}

}  // namespace terrazzo
