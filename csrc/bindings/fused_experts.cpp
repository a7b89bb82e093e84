#include <cstring>

#include "../common/parallel.h"
#include "glue.h"

namespace terrazzo {
namespace {

constexpr const char* kOp = "fused_experts";

// Pairs of token and expert, sorted by expert (ties in token order); pairs with an index >= E get no slot.
struct Slots {
  Tensor indices;  // contiguous
  std::vector<int32_t> offs, tokens, places;

  Slots(const Tensor& indices_in, int64_t E) : indices(cast_contiguous(indices_in, ScalarType::Int)), offs(E, 0), places(indices.numel(), -1) {
    const int32_t* expert = static_cast<const int32_t*>(data(indices));
    const int64_t pairs = indices.numel(), A = indices.size(1);
    for (int64_t i = 0; i < pairs; i++) {
      TZ_CHECK(expert[i] >= 0, kOp, "topk_indices must not be negative, got ", expert[i], " at pair ", i);
      if (expert[i] < E) offs[expert[i]]++;
    }
    int32_t total = 0;
    for (int32_t& end : offs) total += end, end = total - end;  // starts for now
    tokens.resize(total);
    for (int64_t i = 0; i < pairs; i++) {
      if (expert[i] >= E) continue;
      places[i] = offs[expert[i]]++;
      tokens[places[i]] = static_cast<int32_t>(i / A);
    }
  }
};

struct ExpertsCall {
  Tensor x, weights;
  OptTensor bias1, bias_up, bias2;
  Slots slots;
  FusedExpertsParams p{};

  ExpertsCall(const Tensor& x_in, const Tensor& w1, const OptTensor& w_up, const Tensor& w2, const Tensor& weights_in, const Tensor& indices,
              const OptTensor& bias1_in, const OptTensor& bias_up_in, const OptTensor& bias2_in, int64_t activation, bool interleaved,
              double alpha, double limit)
      : x(cast_contiguous(x_in, x_in.scalar_type())), weights(weights_in), bias1(bias1_in), bias_up(bias_up_in), bias2(bias2_in),
        slots(checked_indices(x_in, w1, indices), w1.size(0)) {
    p.T = x.size(0), p.D = x.size(1), p.E = w1.size(0), p.N1 = w1.size(1), p.F = w2.dim() == 3 ? w2.size(2) : 0, p.A = indices.size(1);
    p.S = static_cast<int64_t>(slots.tokens.size());
    check_shape(w1, {p.E, p.N1, p.D}, kOp, "w_gate_up");
    check_shape(w2, {p.E, p.D, p.F}, kOp, "w_down");
    check_shape(w_up, {p.E, p.F, p.D}, kOp, "w_up");
    check_shape(weights, {p.T, p.A}, kOp, "topk_weights");
    check_shape(bias1, {p.E, p.N1}, kOp, "bias_gate_up");
    check_shape(bias_up, {p.E, p.F}, kOp, "bias_up");
    check_shape(bias2, {p.E, p.D}, kOp, "bias_down");
    for (const Tensor* t : std::initializer_list<const Tensor*>{&x, &w1, &w2, &weights}) check_cpu(*t, kOp, "every tensor");
    p.gated = w_up || p.N1 == 2 * p.F;
    TZ_CHECK(w_up ? p.N1 == p.F && !interleaved : p.gated || p.N1 == p.F, kOp, "w_gate_up must have F or 2 F columns for F = ", p.F,
             " rows of w_down, got ", p.N1);
    TZ_CHECK(activation >= 0 && activation < kActivations, kOp, "unknown activation ", activation);
    p.activation = static_cast<Activation>(activation), p.interleaved = interleaved && p.gated, p.alpha = alpha, p.limit = limit;
    TZ_CHECK(p.gated || p.activation != Activation::swiglu_oai, kOp, "swiglu_oai is a gate: w_gate_up must have 2 F columns");
    const ScalarType xt = x.scalar_type(), acc = acc_scalar(xt);
    for (const Tensor* w : std::initializer_list<const Tensor*>{&w1, &w2, w_up ? &*w_up : &w1})
      TZ_CHECK((w->scalar_type() == ScalarType::Double) == (xt == ScalarType::Double), kOp, "float64 goes with float64 only");
    p.x_dtype = dtype_from(xt, kOp, "x");
    p.w1_dtype = dtype_from(w1.scalar_type(), kOp, "w_gate_up");
    p.w2_dtype = dtype_from(w2.scalar_type(), kOp, "w_down");
    p.x = data(x), p.x_stride_t = p.D, p.x_stride_d = 1;
    p.w1 = data(w1), p.w1_stride_e = w1.stride(0), p.w1_stride_k = w1.stride(2), p.w1_stride_n = w1.stride(1);
    p.w2 = data(w2), p.w2_stride_e = w2.stride(0), p.w2_stride_k = w2.stride(2), p.w2_stride_n = w2.stride(1);
    if (w_up) {
      p.w_up_dtype = dtype_from(w_up->scalar_type(), kOp, "w_up");
      p.w_up = data(*w_up), p.w_up_stride_e = w_up->stride(0), p.w_up_stride_k = w_up->stride(2), p.w_up_stride_n = w_up->stride(1);
    }
    weights = cast_contiguous(weights, acc), bias1 = cast_contiguous(bias1, acc), bias_up = cast_contiguous(bias_up, acc);
    bias2 = cast_contiguous(bias2, acc);
    p.weights = data(weights), p.bias1 = data(bias1), p.bias_up = data(bias_up), p.bias2 = data(bias2);
    p.indices = static_cast<const int32_t*>(data(slots.indices)), p.offs = slots.offs.data(), p.tokens = slots.tokens.data(), p.places = slots.places.data();
  }

  // Before the routing is sorted: whatever the sort reads.
  static const Tensor& checked_indices(const Tensor& x, const Tensor& w1, const Tensor& indices) {
    check_cpu(indices, kOp, "topk_indices");
    check_shape(x, {-1, -1}, kOp, "x");
    check_shape(w1, {-1, -1, x.size(1)}, kOp, "w_gate_up");
    check_shape(indices, {x.size(0), -1}, kOp, "topk_indices");
    TZ_CHECK(indices.scalar_type() == ScalarType::Int, kOp, "topk_indices must be int32");
    return indices;
  }

  int64_t columns() const { return p.N1 + (p.w_up ? p.F : 0); }
};

// Rows of a contiguous matrix, one for each slot.
Tensor gather_rows(const Tensor& rows, const std::vector<int32_t>& index) {
  const int64_t D = rows.size(1), S = static_cast<int64_t>(index.size());
  Tensor out = empty(rows, {S, D}, rows.scalar_type());
  const size_t bytes = static_cast<size_t>(D) * rows.element_size();
  const char* src = static_cast<const char*>(data(rows));
  char* dst = static_cast<char*>(mutable_data(out));
  parallel_for(0, S, 64, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++) std::memcpy(dst + s * bytes, src + index[s] * bytes, bytes);
  });
  return out;
}

// A matrix [S, columns] behind a pointer: what the weight gradients multiply.
struct Rows {
  DType dtype;
  const void* data;
  int64_t stride, columns;
};

// [E, a.columns, b.columns] = a^T b of every group.
Tensor grouped_gradient(const ExpertsCall& call, const Rows& a, const Rows& b, ScalarType dtype) {
  GroupedWgradParams p{};
  p.T = call.p.S, p.E = call.p.E, p.K = a.columns, p.N = b.columns, p.offs = call.p.offs;
  p.a_dtype = a.dtype, p.dy_dtype = b.dtype, p.db_dtype = dtype_from(dtype, kOp, "a weight");
  p.a = a.data, p.a_stride_m = a.stride, p.a_stride_k = 1;
  p.dy = b.data, p.dy_stride_m = b.stride, p.dy_stride_n = 1;
  Tensor db = empty(call.x, {p.E, p.K, p.N}, dtype);
  p.db = mutable_data(db), p.db_stride_e = p.K * p.N, p.db_stride_k = p.N;
  cpu::run_experts_wgrad(p);
  return db;
}

// The gradient of a weight [E, out, in], laid out as the weight is: `out` rows of products, `in` what they multiplied.
Tensor weight_gradient(const ExpertsCall& call, const Tensor& weight, const Rows& out, const Rows& in) {
  if (weight.stride(2) == 1 || weight.stride(1) != 1) return grouped_gradient(call, out, in, weight.scalar_type());
  return torch::stable::transpose(grouped_gradient(call, in, out, weight.scalar_type()), 1, 2);
}

}  // namespace

std::tuple<Tensor, Tensor> fused_experts_fwd(const Tensor& x, const Tensor& w1, const OptTensor& w_up, const Tensor& w2, const Tensor& weights,
    const Tensor& indices, const OptTensor& bias1, const OptTensor& bias_up, const OptTensor& bias2, int64_t activation, bool interleaved,
    double alpha, double limit, bool save) {
  ExpertsCall call(x, w1, w_up, w2, weights, indices, bias1, bias_up, bias2, activation, interleaved, alpha, limit);
  FusedExpertsParams& p = call.p;
  const ScalarType xt = x.scalar_type();
  const ScalarType acc = acc_scalar(xt);
  Tensor y = empty(x, {p.T, p.D}, xt), h = empty(x, {p.S, p.F}, acc), rows = empty(x, {p.S, p.D}, acc);
  Tensor saved = empty(x, {save ? p.T * p.A : 0, call.columns()}, acc);
  p.y = mutable_data(y), p.h = mutable_data(h), p.slots = mutable_data(rows);
  if (save) p.saved = mutable_data(saved);
  cpu::run_fused_experts_fwd(p);
  return {y, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts_bwd(const Tensor& dy_in, const Tensor& x, const Tensor& w1,
    const OptTensor& w_up, const Tensor& w2, const Tensor& weights, const Tensor& indices, const OptTensor& bias1, const OptTensor& bias_up,
    const OptTensor& bias2, int64_t activation, bool interleaved, double alpha, double limit, const Tensor& saved, bool need_x, bool need_weights) {
  ExpertsCall call(x, w1, w_up, w2, weights, indices, bias1, bias_up, bias2, activation, interleaved, alpha, limit);
  FusedExpertsParams& p = call.p;
  const ScalarType xt = x.scalar_type(), acc = acc_scalar(xt);
  const int64_t columns = call.columns();
  check_shape(dy_in, {p.T, p.D}, kOp, "dy");
  check_shape(saved, {p.T * p.A, columns}, kOp, "saved");
  const Tensor dy = cast_contiguous(dy_in, xt);
  TZ_CHECK(saved.scalar_type() == acc && saved.is_contiguous(), kOp, "saved must be what the forward returned");
  Tensor h = empty(x, {p.S, p.F}, acc), dh = empty(x, {p.S, p.F}, acc), dproducts = empty(x, {p.S, columns}, acc), rows = empty(x, {p.S, p.D}, acc);
  Tensor dx = need_x ? empty(x, {p.T, p.D}, xt) : absent(x), dweights = empty(x, {p.T, p.A}, acc);
  p.dy = data(dy), p.saved = mutable_data(saved), p.h = mutable_data(h), p.dh = mutable_data(dh), p.dproducts = mutable_data(dproducts);
  p.slots = mutable_data(rows), p.dx = need_x ? mutable_data(dx) : nullptr, p.dweights = mutable_data(dweights);
  cpu::run_fused_experts_bwd(p);

  Tensor dw1 = absent(x), dw_up = absent(x), dw2 = absent(x), dbias1 = absent(x), dbias_up = absent(x), dbias2 = absent(x);
  if (need_weights) {
    const Tensor x_rows = gather_rows(call.x, call.slots.tokens), dy_rows = gather_rows(dy, call.slots.tokens);
    const DType acc_dtype = acc == ScalarType::Double ? DType::f64 : DType::f32;
    const char* products = static_cast<const char*>(data(dproducts));
    const Rows by_x{p.x_dtype, data(x_rows), p.D, p.D}, by_dy{p.x_dtype, data(dy_rows), p.D, p.D}, by_h{acc_dtype, data(h), p.F, p.F};
    const Rows by_w1{acc_dtype, products, columns, p.N1};
    const Rows by_w_up{acc_dtype, products + p.N1 * static_cast<int64_t>(dproducts.element_size()), columns, p.F};
    dw1 = weight_gradient(call, w1, by_w1, by_x);
    if (w_up) dw_up = weight_gradient(call, *w_up, by_w_up, by_x);
    dw2 = weight_gradient(call, w2, by_dy, by_h);
    const double one = 1;
    const float one_f = 1;
    const Rows ones{acc_dtype, acc == ScalarType::Double ? static_cast<const void*>(&one) : &one_f, 0, 1};
    const auto column_sums = [&](const Rows& of) { return torch::stable::select(grouped_gradient(call, ones, of, acc), 1, 0); };
    if (bias1) dbias1 = column_sums(by_w1);
    if (bias_up && w_up) dbias_up = column_sums(by_w_up);
    if (bias2) {
      Tensor by_slot = empty(x, {p.S}, acc);
      const auto sort = [&](auto* out, const auto* in) {
        for (size_t pair = 0; pair < call.slots.places.size(); pair++)
          if (call.slots.places[pair] >= 0) out[call.slots.places[pair]] = in[pair];
      };
      if (acc == ScalarType::Double) sort(static_cast<double*>(mutable_data(by_slot)), static_cast<const double*>(p.weights));
      else sort(static_cast<float*>(mutable_data(by_slot)), static_cast<const float*>(p.weights));
      dbias2 = torch::stable::select(grouped_gradient(call, {ones.dtype, data(by_slot), 1, 1}, by_dy, acc), 1, 0);
    }
  }
  return {dx, dw1, dw_up, dw2, dweights, dbias1, dbias_up, dbias2};
}

}  // namespace terrazzo
