#include <cstring>

#include "../common/parallel.h"
#include "../cuda/params.h"
#include "glue.h"

namespace terrazzo {
namespace {

constexpr const char* kOp = "fused_experts";

// Pairs of token and expert, sorted by expert (ties in token order); pairs with an index >= E get no slot. On a GPU the kernels
// sort them, and every pair has room for a slot.
struct Slots {
  Tensor indices;  // contiguous
  std::vector<int32_t> offs, tokens, places;
  std::vector<Tensor> on_device;

  Slots(const Tensor& indices_in, int64_t E) : indices(cast_contiguous(indices_in, ScalarType::Int)) {
    if (runs_on_cpu(indices)) sort(E);
  }

  void sort(int64_t E) {
    offs.assign(E, 0), places.assign(indices.numel(), -1);
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

  // What the kernels take.
  void set(FusedExpertsCudaParams& p) {
    p.indices = static_cast<const int32_t*>(data(indices));
    if (runs_on_cpu(indices)) {
      p.S = static_cast<int64_t>(tokens.size());
      p.offs = offs.data(), p.tokens = tokens.data(), p.places = places.data();
      return;
    }
    const int64_t pairs = p.S = indices.numel();
    for (int64_t n : {p.E, pairs, pairs, pairs, sort_scratch(pairs, p.E + 1)}) on_device.push_back(empty(indices, {n}, ScalarType::Int));
    const auto at = [&](int i) { return static_cast<int32_t*>(mutable_data(on_device[i])); };
    p.rows = {{pairs, p.E, p.indices, at(1), at(2), at(0)}, at(3), p.A, at(4)};
    p.offs = p.rows.offs, p.tokens = p.rows.tokens, p.places = p.rows.inverse;
  }
};

// Whether two weights lie alike, from expert to expert apart.
bool alike(const Tensor& a, const Tensor& b) { return a.scalar_type() == b.scalar_type() && a.stride(1) == b.stride(1) && a.stride(2) == b.stride(2); }

// The weights of a layer, as they are stored or packed: matrices [D, N1], [D, F] or none, and [F, D] for each expert.
struct ExpertWeights {
  int64_t E, N1, F;
  bool separate_up;
  WeightMatrix w1{}, w_up{}, w2{};
  std::vector<Tensor> copies;  // of w1 and w_up, where they were needed

  // w1 (E, N1, D), w_up (E, F, D), w2 (E, D, F), any strides.
  ExpertWeights(const Tensor& x, const Tensor& w1_in, const OptTensor& w_up_in, const Tensor& w2_in) : separate_up(w_up_in.has_value()) {
    check_shape(x, {-1, -1}, kOp, "x");
    const int64_t D = x.size(1);
    check_shape(w1_in, {-1, -1, D}, kOp, "w_gate_up");
    E = w1_in.size(0), N1 = w1_in.size(1);
    check_shape(w2_in, {E, D, -1}, kOp, "w_down");
    F = w2_in.size(2);
    check_shape(w_up_in, {E, F, D}, kOp, "w_up");
    w2 = strided(x, w2_in, "w_down");
    if (w_up_in && !runs_on_cpu(x) && !alike(w1_in, *w_up_in)) {  // gate and up are one operand of the kernels: odd pairs are copied
      const ScalarType type = w1_in.scalar_type() == w_up_in->scalar_type() ? w1_in.scalar_type() : acc_scalar(x.scalar_type());
      copies = {cast_contiguous(w1_in, type), cast_contiguous(*w_up_in, type)};
      w1 = strided(x, copies[0], "w_gate_up"), w_up = strided(x, copies[1], "w_up");
      return;
    }
    w1 = strided(x, w1_in, "w_gate_up");
    if (w_up_in) w_up = strided(x, *w_up_in, "w_up");
  }

  struct Scales {
    const OptTensor &w1, &w_up, &w2;
  };
  // Panels, see packed_matrix.
  ExpertWeights(const Tensor& x, const Tensor& w1_in, const OptTensor& w_up_in, const Tensor& w2_in, const Scales& scales, int64_t N1_in, int64_t F_in)
      : E(w1_in.size(0)), N1(N1_in), F(F_in), separate_up(w_up_in.has_value()) {
    check_shape(x, {-1, -1}, kOp, "x");
    const int64_t D = x.size(1);
    const ScalarType xt = x.scalar_type();
    w1 = packed_matrix(w1_in, scales.w1, E, D, N1, xt, kOp, "w_gate_up"), w2 = packed_matrix(w2_in, scales.w2, E, F, D, xt, kOp, "w_down");
    if (w_up_in) w_up = packed_matrix(*w_up_in, scales.w_up, E, D, F, xt, kOp, "w_up");
  }

 private:
  static WeightMatrix strided(const Tensor& x, const Tensor& w, const char* name) {
    check_device(w, kOp, name);
    TZ_CHECK((w.scalar_type() == ScalarType::Double) == (x.scalar_type() == ScalarType::Double), kOp, "float64 goes with float64 only");
    return {dtype_from(w.scalar_type(), kOp, name), data(w), w.stride(0), w.stride(2), w.stride(1), 0, false, nullptr, 0};
  }
};

struct ExpertsCall {
  Tensor x, weights;
  OptTensor bias1, bias_up, bias2;
  std::vector<Tensor> copies;
  Slots slots;
  FusedExpertsCudaParams p{};

  ExpertsCall(const Tensor& x_in, const ExpertWeights& w, const Tensor& weights_in, const Tensor& indices, const OptTensor& bias1_in,
              const OptTensor& bias_up_in, const OptTensor& bias2_in, int64_t activation, bool interleaved, double alpha, double limit)
      : x(cast_contiguous(x_in, x_in.scalar_type())), weights(weights_in), bias1(bias1_in), bias_up(bias_up_in), bias2(bias2_in),
        copies(w.copies), slots(checked_indices(x_in, indices), w.E) {
    p.T = x.size(0), p.D = x.size(1), p.E = w.E, p.N1 = w.N1, p.F = w.F, p.A = indices.size(1);
    p.w1 = w.w1, p.w_up = w.w_up, p.w2 = w.w2;
    TZ_CHECK(p.E > 0, kOp, "E must be positive, got 0");
    check_shape(weights, {p.T, p.A}, kOp, "topk_weights");
    check_shape(bias1, {p.E, p.N1}, kOp, "bias_gate_up");
    check_shape(bias_up, {p.E, p.F}, kOp, "bias_up");
    check_shape(bias2, {p.E, p.D}, kOp, "bias_down");
    check_device(x, kOp, "x");
    check_device(weights, kOp, "topk_weights");
    p.gated = w.separate_up || p.N1 == 2 * p.F;
    TZ_CHECK(w.separate_up ? p.N1 == p.F && !interleaved : p.gated || p.N1 == p.F, kOp, "w_gate_up must have F or 2 F columns for F = ", p.F,
             " rows of w_down, got ", p.N1);
    TZ_CHECK(activation >= 0 && activation < kActivations, kOp, "unknown activation ", activation);
    p.activation = static_cast<Activation>(activation), p.interleaved = interleaved && p.gated, p.alpha = alpha, p.limit = limit;
    TZ_CHECK(p.gated || p.activation != Activation::swiglu_oai, kOp, "swiglu_oai is a gate: w_gate_up must have 2 F columns");
    TZ_CHECK(!w.w1.panel || w.separate_up || interleaved || !p.gated, kOp, "packed gate and up lie in panels of their own");
    const ScalarType acc = acc_scalar(x.scalar_type());
    p.x_dtype = dtype_from(x.scalar_type(), kOp, "x");
    p.x = data(x), p.x_stride_t = p.D, p.x_stride_d = 1;
    weights = cast_contiguous(weights, acc), bias1 = cast_contiguous(bias1, acc), bias_up = cast_contiguous(bias_up, acc);
    bias2 = cast_contiguous(bias2, acc);
    p.weights = data(weights), p.bias1 = data(bias1), p.bias_up = data(bias_up), p.bias2 = data(bias2);
    slots.set(p);
  }

  // Before the routing is sorted: whatever the sort reads.
  static const Tensor& checked_indices(const Tensor& x, const Tensor& indices) {
    check_device(indices, kOp, "topk_indices");
    check_shape(indices, {x.size(0), -1}, kOp, "topk_indices");
    TZ_CHECK(indices.scalar_type() == ScalarType::Int, kOp, "topk_indices must be int32");
    return indices;
  }

  // What stands between the products is kept in.
  ScalarType scratch_type() const { return runs_on_cpu(x) ? acc_scalar(x.scalar_type()) : x.scalar_type(); }
  int64_t columns() const { return p.N1 + (p.w_up.data ? p.F : 0); }

  // The forward; `saved` gets the first products when it has room for them.
  Tensor run(const Tensor& saved) {
    const ScalarType scratch = scratch_type();
    Tensor y = empty(x, {p.T, p.D}, x.scalar_type()), h = empty(x, {p.S, p.F}, scratch), rows = empty(x, {p.S, p.D}, scratch);
    p.y = mutable_data(y), p.h = mutable_data(h), p.slots = mutable_data(rows);
    if (saved.size(0)) p.saved = mutable_data(saved);
    TZ_RUN_WHERE(x, fused_experts_fwd, p);
    return y;
  }
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

// A matrix [S, columns] behind a pointer: what the weight gradients multiply. `index`: where its rows lie, or null.
struct Rows {
  DType dtype;
  const void* data;
  int64_t stride, columns;
  const int32_t* index = nullptr;
};

// [E, a.columns, b.columns] = a^T b of every group.
Tensor grouped_gradient(const ExpertsCall& call, const Rows& a, const Rows& b, ScalarType dtype) {
  GroupedWgradCudaParams p{};
  p.T = call.p.S, p.E = call.p.E, p.K = a.columns, p.N = b.columns, p.offs = call.p.offs;
  p.a_dtype = a.dtype, p.dy_dtype = b.dtype, p.db_dtype = dtype_from(dtype, kOp, "a weight");
  p.a = a.data, p.a_stride_m = a.stride, p.a_stride_k = 1;
  p.dy = b.data, p.dy_stride_m = b.stride, p.dy_stride_n = 1;
  p.a_rows = a.index, p.dy_rows = b.index;
  Tensor db = empty(call.x, {p.E, p.K, p.N}, dtype);
  p.db = mutable_data(db), p.db_stride_e = p.K * p.N, p.db_stride_k = p.N;
  TZ_RUN_WHERE(call.x, experts_wgrad, p);
  return db;
}

// [E, columns]: the sums of each group's rows, on a GPU; there times the pair's weight where `weighted`.
Tensor grouped_sums(const ExpertsCall& call, const Rows& of, bool weighted, ScalarType dtype) {
  GroupedWgradCudaParams p{};
  p.T = call.p.S, p.E = call.p.E, p.N = of.columns, p.offs = call.p.offs;
  p.dy_dtype = of.dtype, p.db_dtype = dtype_from(dtype, kOp, "a bias");
  p.dy = of.data, p.dy_stride_m = of.stride, p.dy_stride_n = 1, p.dy_rows = of.index;
  if (weighted) p.weights = static_cast<const float*>(call.p.weights), p.weight_rows = call.p.rows.order;
  Tensor sums = empty(call.x, {p.E, p.N}, dtype);
  p.db = mutable_data(sums), p.db_stride_e = p.N;
  TZ_RUN_WHERE(call.x, experts_wgrad, p);
  return sums;
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
  ExpertsCall call(x, ExpertWeights(x, w1, w_up, w2), weights, indices, bias1, bias_up, bias2, activation, interleaved, alpha, limit);
  const int64_t slots = save ? call.p.T * call.p.A : 0;
  Tensor saved = empty(x, {slots, call.columns()}, acc_scalar(x.scalar_type()));
  return {call.run(saved), saved};
}

Tensor fused_experts_packed(const Tensor& x, const Tensor& w1, const OptTensor& w_up, const Tensor& w2, const OptTensor& scale1,
    const OptTensor& scale_up, const OptTensor& scale2, const Tensor& weights, const Tensor& indices, const OptTensor& bias1, const OptTensor& bias_up,
    const OptTensor& bias2, int64_t N1, int64_t F, int64_t activation, bool interleaved, double alpha, double limit) {
  const ExpertWeights packed(x, w1, w_up, w2, {scale1, scale_up, scale2}, N1, F);
  ExpertsCall call(x, packed, weights, indices, bias1, bias_up, bias2, activation, interleaved, alpha, limit);
  return call.run(absent(x));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts_bwd(const Tensor& dy_in, const Tensor& x, const Tensor& w1,
    const OptTensor& w_up, const Tensor& w2, const Tensor& weights, const Tensor& indices, const OptTensor& bias1, const OptTensor& bias_up,
    const OptTensor& bias2, int64_t activation, bool interleaved, double alpha, double limit, const Tensor& saved, bool need_x, bool need_weights) {
  ExpertsCall call(x, ExpertWeights(x, w1, w_up, w2), weights, indices, bias1, bias_up, bias2, activation, interleaved, alpha, limit);
  FusedExpertsCudaParams& p = call.p;
  const ScalarType xt = x.scalar_type(), acc = acc_scalar(xt), scratch = call.scratch_type();
  const bool on_cpu = runs_on_cpu(x);
  const int64_t columns = call.columns();
  check_shape(dy_in, {p.T, p.D}, kOp, "dy");
  check_shape(saved, {p.T * p.A, columns}, kOp, "saved");
  const Tensor dy = cast_contiguous(dy_in, xt);
  TZ_CHECK(saved.scalar_type() == acc && saved.is_contiguous(), kOp, "saved must be what the forward returned");
  Tensor h = empty(x, {p.S, p.F}, scratch), dproducts = empty(x, {p.S, columns}, scratch), rows = empty(x, {p.S, p.D}, scratch);
  const Tensor dh = on_cpu ? empty(x, {p.S, p.F}, acc) : absent(x);
  const Tensor partials = on_cpu ? absent(x) : empty(x, {p.S, dot_partials(p.F)}, ScalarType::Float);
  Tensor dx = need_x ? empty(x, {p.T, p.D}, xt) : absent(x), dweights = empty(x, {p.T, p.A}, acc);
  p.dy = data(dy), p.saved = mutable_data(saved), p.h = mutable_data(h), p.dh = mutable_data(dh), p.dproducts = mutable_data(dproducts);
  p.slots = mutable_data(rows), p.dx = need_x ? mutable_data(dx) : nullptr, p.dweights = mutable_data(dweights);
  p.partials = static_cast<float*>(mutable_data(partials));
  TZ_RUN_WHERE(x, fused_experts_bwd, p);

  Tensor dw1 = absent(x), dw_up = absent(x), dw2 = absent(x), dbias1 = absent(x), dbias_up = absent(x), dbias2 = absent(x);
  if (need_weights) {
    const Tensor x_rows = on_cpu ? gather_rows(call.x, call.slots.tokens) : call.x, dy_rows = on_cpu ? gather_rows(dy, call.slots.tokens) : dy;
    const int32_t* gathered = on_cpu ? nullptr : p.tokens;
    const DType acc_dtype = acc == ScalarType::Double ? DType::f64 : DType::f32, stored = dtype_from(scratch, kOp, "x");
    const char* products = static_cast<const char*>(data(dproducts));
    const Rows by_x{p.x_dtype, data(x_rows), p.D, p.D, gathered}, by_dy{p.x_dtype, data(dy_rows), p.D, p.D, gathered}, by_h{stored, data(h), p.F, p.F};
    const Rows by_w1{stored, products, columns, p.N1};
    const Rows by_w_up{stored, products + p.N1 * static_cast<int64_t>(dproducts.element_size()), columns, p.F};
    dw1 = weight_gradient(call, w1, by_w1, by_x);
    if (w_up) dw_up = weight_gradient(call, *w_up, by_w_up, by_x);
    dw2 = weight_gradient(call, w2, by_dy, by_h);
    if (!on_cpu) {
      if (bias1) dbias1 = grouped_sums(call, by_w1, false, acc);
      if (bias_up && w_up) dbias_up = grouped_sums(call, by_w_up, false, acc);
      if (bias2) dbias2 = grouped_sums(call, by_dy, true, acc);
      return {dx, dw1, dw_up, dw2, dweights, dbias1, dbias_up, dbias2};
    }
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
