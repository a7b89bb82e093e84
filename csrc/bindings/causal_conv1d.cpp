#include <cstring>

#include "../cuda/params.h"
#include "glue.h"

namespace terrazzo {
namespace {

constexpr const char* kFn = "causal_conv1d_fn";
constexpr const char* kUpdate = "causal_conv1d_update";

// x with unit stride along channels or positions; anything else is copied once.
Tensor conv_layout(const Tensor& x) { return x.stride(1) == 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x); }

bool channel_last(const Tensor& x) { return x.stride(1) == 1 && x.stride(2) != 1; }

// A new (B, D, L) tensor with x's unit-stride axis.
Tensor empty_like_layout(const Tensor& x) {
  const int64_t B = x.size(0), D = x.size(1), L = x.size(2);
  if (!channel_last(x)) return empty(x, {B, D, L}, x.scalar_type());
  Tensor t = empty(x, {B, L, D}, x.scalar_type());
  return torch::stable::transpose(t, 1, 2);
}

// dy with the unit-stride axis of x, as the CUDA kernels read it.
Tensor lying_like(const Tensor& x, const Tensor& dy) {
  if (!channel_last(x)) return dy.stride(2) == 1 ? dy : torch::stable::contiguous(dy);
  return dy.stride(1) == 1 ? dy : torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(dy, 1, 2)), 1, 2);
}

// What forward and backward share. `x`, `weight`, `bias` and `initial` must outlive the params.
struct ConvCall {
  Tensor x, weight;
  OptTensor bias, initial;
  std::vector<Segment> segments;
  Tensor codes, owners, ends;  // scratch of the CUDA kernels
  CausalConv1dCudaParams p{};

  ConvCall(const Tensor& x_in, const Tensor& weight_in, const OptTensor& bias_in, const OptTensor& seq_idx,
           const OptTensor& cu_seqlens, const OptTensor& initial_states, bool silu)
      : x(x_in), weight(weight_in), bias(bias_in), initial(initial_states), codes(absent(x_in)), owners(codes), ends(codes) {
    TZ_CHECK(x.dim() == 3, kFn, "x must be (B, D, L), got ", x.dim(), " dimensions");
    check_device(x, kFn, "x");
    p.B = x.size(0), p.D = x.size(1), p.L = x.size(2), p.W = weight.dim() == 2 ? weight.size(1) : -1;
    TZ_CHECK(p.W >= 2 && p.W <= 4, kFn, "weight must be (D, 2..4) for the cpu backend, got width ", p.W);
    check_shape(weight, {p.D, p.W}, kFn, "weight");
    check_shape(bias, {p.D}, kFn, "bias");
    check_shape(initial, {num_sequences(p.B, cu_seqlens), p.D, p.W - 1}, kFn, "initial_states");
    const ScalarType xt = x.scalar_type();
    const ScalarType wt = weight_scalar(xt, weight.scalar_type());
    x = conv_layout(x);
    weight = cast(weight, wt);
    bias = cast_contiguous(bias, wt);
    initial = cast(initial, xt);
    if (runs_on_cpu(x)) segments = make_segments(p.B, p.L, seq_idx, cu_seqlens, kFn);
    else find_on_device(seq_idx, cu_seqlens);
    p.x_dtype = p.state_dtype = dtype_from(xt, kFn, "x");
    p.weight_dtype = dtype_from(wt, kFn, "weight");
    p.silu = silu;
    p.x = data(x), p.x_stride_b = x.stride(0), p.x_stride_d = x.stride(1), p.x_stride_l = x.stride(2);
    p.weight = data(weight), p.weight_stride_d = weight.stride(0), p.weight_stride_w = weight.stride(1);
    p.bias = data(bias);
    p.segments = segments.data(), p.num_segments = static_cast<int64_t>(segments.size());
    if (initial) {
      p.initial_states = data(initial);
      p.init_stride_s = initial->stride(0), p.init_stride_d = initial->stride(1), p.init_stride_w = initial->stride(2);
    }
  }

  // Where the sequences lie stands on the device: kernels read it there.
  void find_on_device(const OptTensor& seq_idx, const OptTensor& cu_seqlens) {
    p.num_sequences = num_sequences(p.B, cu_seqlens);
    if (cu_seqlens) {
      TZ_CHECK(cu_seqlens->scalar_type() == ScalarType::Int, kFn, "cu_seqlens must be int32");
      TZ_CHECK(cu_seqlens->dim() == 1 && p.num_sequences >= 1, kFn, "cu_seqlens must be (sequences + 1,) with at least one sequence");
      TZ_CHECK(p.B == 1, kFn, "cu_seqlens needs a batch of 1 (all sequences packed into one row), got ", p.B);
      p.cu_seqlens = static_cast<const int32_t*>(data(*cu_seqlens)), p.cu_seqlens_stride = cu_seqlens->stride(0);
    }
    if (seq_idx) {
      TZ_CHECK(seq_idx->scalar_type() == ScalarType::Int, kFn, "seq_idx must be int32");
      check_shape(*seq_idx, {p.B, p.L}, kFn, "seq_idx");
      p.seq_idx = static_cast<const int32_t*>(data(*seq_idx)), p.seq_idx_stride_b = seq_idx->stride(0), p.seq_idx_stride_l = seq_idx->stride(1);
      ends = empty(x, {p.num_sequences}, ScalarType::Int);
      p.ends = static_cast<int32_t*>(mutable_data(ends));
    }
    if (!seq_idx && !cu_seqlens) return;
    p.codes_stride_b = conv_codes(p.L);
    codes = empty(x, {p.B, p.codes_stride_b}, ScalarType::Byte);
    owners = empty(x, {p.B, p.L}, ScalarType::Int);
    p.codes = static_cast<uint8_t*>(mutable_data(codes)), p.owners = static_cast<int32_t*>(mutable_data(owners));
  }
};

}  // namespace

std::tuple<Tensor, Tensor> causal_conv1d_fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias,
    const OptTensor& seq_idx, const OptTensor& cu_seqlens, const OptTensor& initial_states, bool return_final_states, bool silu) {
  ConvCall call(x, weight, bias, seq_idx, cu_seqlens, initial_states, silu);
  CausalConv1dCudaParams& p = call.p;
  Tensor y = empty_like_layout(call.x);
  p.y = mutable_data(y), p.y_stride_b = y.stride(0), p.y_stride_d = y.stride(1), p.y_stride_l = y.stride(2);
  Tensor final_states = absent(x);
  if (return_final_states) {
    final_states = empty(x, {num_sequences(p.B, cu_seqlens), p.D, p.W - 1}, x.scalar_type());
    p.final_states = mutable_data(final_states);
    p.final_stride_s = final_states.stride(0), p.final_stride_d = final_states.stride(1), p.final_stride_w = final_states.stride(2);
  }
  TZ_RUN_WHERE(x, causal_conv1d_fwd, p);
  return {y, final_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(const Tensor& dy_in, const Tensor& x, const Tensor& weight,
    const OptTensor& bias, const OptTensor& seq_idx, const OptTensor& cu_seqlens, const OptTensor& initial_states,
    const OptTensor& dfinal_in, bool silu) {
  ConvCall call(x, weight, bias, seq_idx, cu_seqlens, initial_states, silu);
  CausalConv1dCudaParams& p = call.p;
  check_shape(dy_in, {p.B, p.D, p.L}, kFn, "dy");
  check_shape(dfinal_in, {num_sequences(p.B, cu_seqlens), p.D, p.W - 1}, kFn, "dfinal_states");
  const ScalarType xt = x.scalar_type();
  const Tensor dy = runs_on_cpu(x) ? cast(dy_in, xt) : lying_like(call.x, cast(dy_in, xt));
  const OptTensor dfinal = cast(dfinal_in, xt);
  p.dy = data(dy), p.dy_stride_b = dy.stride(0), p.dy_stride_d = dy.stride(1), p.dy_stride_l = dy.stride(2);
  if (dfinal) {
    p.dfinal_states = data(dfinal);
    p.dfinal_stride_s = dfinal->stride(0), p.dfinal_stride_d = dfinal->stride(1), p.dfinal_stride_w = dfinal->stride(2);
  }
  Tensor dx = empty_like_layout(call.x);
  p.dx = mutable_data(dx), p.dx_stride_b = dx.stride(0), p.dx_stride_d = dx.stride(1), p.dx_stride_l = dx.stride(2);
  Tensor dweight = empty(x, {p.D, p.W}, acc_scalar(xt));
  p.dweight = mutable_data(dweight);
  Tensor dbias = absent(x), dinitial = absent(x);
  if (bias) {
    dbias = empty(x, {p.D}, acc_scalar(xt));
    p.dbias = mutable_data(dbias);
  }
  if (call.initial) {
    // zeros: a row that starts with padding uses no initial state, and its kernel on the CPU writes none
    const std::vector<int64_t> shape{call.initial->size(0), p.D, p.W - 1};
    dinitial = runs_on_cpu(x) ? zeros(x, shape, xt) : empty(x, shape, xt);
    p.dinitial_states = mutable_data(dinitial);
    p.dinit_stride_s = dinitial.stride(0), p.dinit_stride_d = dinitial.stride(1), p.dinit_stride_w = dinitial.stride(2);
  }
  const Tensor partials = runs_on_cpu(x) ? absent(x) : empty(x, {conv_partials(p), p.W + 1, p.D}, ScalarType::Float);
  p.partials = mutable_data(partials);
  TZ_RUN_WHERE(x, causal_conv1d_bwd, p);
  dweight = cast(dweight, weight.scalar_type());
  if (bias) dbias = cast(dbias, bias->scalar_type());
  if (initial_states) dinitial = cast(dinitial, initial_states->scalar_type());
  return {dx, dweight, dbias, dinitial};
}

Tensor causal_conv1d_update(const Tensor& x, const Tensor& conv_state, const Tensor& weight_in, const OptTensor& bias_in, bool silu,
    const OptTensor& cache_seqlens, const OptTensor& conv_state_indices) {
  CausalConv1dUpdateParams p{};
  TZ_CHECK(x.dim() == 3, kUpdate, "x must be (B, D, L), got ", x.dim(), " dimensions");
  check_device(x, kUpdate, "x");
  check_device(conv_state, kUpdate, "conv_state");
  p.B = x.size(0), p.D = x.size(1), p.L = x.size(2), p.W = weight_in.dim() == 2 ? weight_in.size(1) : -1;
  TZ_CHECK(p.D > 0 && p.L > 0, kUpdate, "x must not be empty along D or L");
  TZ_CHECK(p.W >= 2 && p.W <= 4, kUpdate, "weight must be (D, 2..4) for the cpu backend, got width ", p.W);
  check_shape(weight_in, {p.D, p.W}, kUpdate, "weight");
  check_shape(bias_in, {p.D}, kUpdate, "bias");
  check_shape(conv_state, {-1, p.D, -1}, kUpdate, "conv_state");
  p.num_slots = conv_state.size(0), p.state_len = conv_state.size(2);
  check_writable(conv_state, kUpdate, "conv_state");
  TZ_CHECK(p.state_len >= p.W - 1, kUpdate, "conv_state must hold at least ", p.W - 1, " positions, got ", p.state_len);
  const ScalarType xt = x.scalar_type();
  const ScalarType wt = weight_scalar(xt, weight_in.scalar_type());
  TZ_CHECK((conv_state.scalar_type() == ScalarType::Double) == (xt == ScalarType::Double), kUpdate,
           "conv_state must be float64 exactly when x is");
  check_float(bias_in, kUpdate, "bias");
  const Tensor weight = cast(weight_in, wt);
  const OptTensor bias = cast_contiguous(bias_in, wt);
  p.x_dtype = dtype_from(xt, kUpdate, "x");
  p.weight_dtype = dtype_from(wt, kUpdate, "weight");
  p.state_dtype = dtype_from(conv_state.scalar_type(), kUpdate, "conv_state");
  p.silu = silu;
  p.x = data(x), p.x_stride_b = x.stride(0), p.x_stride_d = x.stride(1), p.x_stride_l = x.stride(2);
  p.conv_state = mutable_data(conv_state);
  p.state_stride_s = conv_state.stride(0), p.state_stride_d = conv_state.stride(1), p.state_stride_w = conv_state.stride(2);
  p.weight = data(weight), p.weight_stride_d = weight.stride(0), p.weight_stride_w = weight.stride(1);
  p.bias = data(bias);
  if (cache_seqlens) {
    check_device(*cache_seqlens, kUpdate, "cache_seqlens");
    check_shape(*cache_seqlens, {p.B}, kUpdate, "cache_seqlens");
    TZ_CHECK(cache_seqlens->scalar_type() == ScalarType::Int && (p.B <= 1 || cache_seqlens->stride(0) == 1), kUpdate,
             "cache_seqlens must be contiguous int32");
    p.cache_seqlens = static_cast<const int32_t*>(data(*cache_seqlens));
    for (int64_t b = 0; runs_on_cpu(x) && b < p.B; b++)
      TZ_CHECK(p.cache_seqlens[b] >= 0, kUpdate, "cache_seqlens must not be negative, got ", p.cache_seqlens[b], " at row ", b);
  }
  p.conv_state_indices = checked_slots(conv_state_indices, p.B, p.num_slots, kUpdate, "conv_state_indices");
  Tensor y = empty(x, {p.B, p.D, p.L}, xt);
  p.y = mutable_data(y), p.y_stride_b = y.stride(0), p.y_stride_d = y.stride(1), p.y_stride_l = y.stride(2);
  TZ_RUN_WHERE(x, causal_conv1d_update, p);
  return y;
}

Tensor causal_conv1d_varlen_states(const Tensor& x, const Tensor& cu_seqlens, int64_t state_len) {
  constexpr const char* op = "causal_conv1d_varlen_states";
  check_device(x, op, "x");
  check_shape(x, {-1, -1}, op, "x");
  TZ_CHECK(state_len >= 1, op, "state_len must be positive, got ", state_len);
  if (!runs_on_cpu(x)) {
    check_shape(cu_seqlens, {-1}, op, "cu_seqlens");
    TZ_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.numel() >= 2, op, "cu_seqlens must be (sequences + 1,) int32 with at least one sequence");
    CausalConv1dStatesParams p{dtype_from(x.scalar_type(), op, "x"), x.size(0), x.size(1), cu_seqlens.numel() - 1, state_len, data(x), x.stride(0), x.stride(1),
                               static_cast<const int32_t*>(data(cu_seqlens)), cu_seqlens.stride(0), nullptr};
    const Tensor states = empty(x, {p.num_sequences, state_len, p.D}, x.scalar_type());
    p.states = mutable_data(states);
    TZ_RUN_CUDA(x, causal_conv1d_varlen_states, p);
    return torch::stable::transpose(states, 1, 2);
  }
  const int64_t T = x.size(0), D = x.size(1), size = static_cast<int64_t>(x.element_size());
  const auto segments = make_segments(1, T, std::nullopt, OptTensor(cu_seqlens), op);
  const int64_t S = static_cast<int64_t>(segments.size());
  // Rows of positions are contiguous in (S, state_len, D); the caller sees its transpose (S, D, state_len).
  Tensor states = torch::stable::new_zeros(x, {S, state_len, D}, x.scalar_type());
  const Tensor rows = unit_stride_last(x);
  const char* src = static_cast<const char*>(data(rows));
  char* dst = static_cast<char*>(mutable_data(states));
  for (int64_t s = 0; s < S; s++) {
    const int64_t count = std::min(state_len, segments[s].end - segments[s].begin);
    for (int64_t i = 0; i < count && D > 0; i++)
      std::memcpy(dst + ((s + 1) * state_len - count + i) * D * size, src + (segments[s].end - count + i) * rows.stride(0) * size,
                  static_cast<size_t>(D * size));
  }
  return torch::stable::transpose(states, 1, 2);
}

}  // namespace terrazzo
