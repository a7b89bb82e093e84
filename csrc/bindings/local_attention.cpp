#include <algorithm>

#include "../cuda/params.h"
#include "attention.h"

namespace terrazzo {
namespace {

constexpr const char* kLocal = "local_attention";

struct LocalCall {
  Heads heads;
  OptTensor mask;
  std::vector<AttentionRun> runs;
  OptTensor bounds;  // scratch of the CUDA kernels
  LocalAttentionCudaParams p{};

  LocalCall(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window, bool causal, double scale, const OptTensor& key_mask,
            const OptTensor& cu_seqlens)
      : heads(q, k, v, kLocal), mask(checked_mask(key_mask, heads.q.size(0), heads.q.size(1), kLocal)) {
    heads.fill(p, kLocal);
    p.L = heads.q.size(1);
    TZ_CHECK(heads.k.size(1) == p.L, kLocal, "k must have as many positions as q, ", p.L, ", got ", heads.k.size(1));
    TZ_CHECK(window >= 1, kLocal, "window must be positive, got ", window);
    p.window = std::min(window, std::max<int64_t>(p.L, 1)), p.causal = causal, p.scale = scale;
    p.key_mask = static_cast<const uint8_t*>(data(mask));
    if (runs_on_cpu(q)) cut_into_runs(cu_seqlens);
    else if (cu_seqlens) pack(*cu_seqlens);
  }

  void cut_into_runs(const OptTensor& cu_seqlens) {
    // as many rows as their band has columns: keys are then packed about twice
    const int64_t rows = std::clamp<int64_t>((p.window + kAttentionBlock - 1) / kAttentionBlock * kAttentionBlock, 256, 2048);
    for (const Segment& s : make_segments(p.B, p.L, std::nullopt, cu_seqlens, kLocal))
      for (int64_t first = 0; first < s.end - s.begin; first += rows) runs.push_back({s.batch, s.begin, s.end, first, std::min(first + rows, s.end - s.begin)});
    p.runs = runs.data(), p.num_runs = static_cast<int64_t>(runs.size());
  }

  // The sequences' ends stay on the device: what can be said without reading them.
  void pack(const Tensor& cu_seqlens) {
    check_device(cu_seqlens, kLocal, "cu_seqlens");
    TZ_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 2, kLocal,
             "cu_seqlens must be (sequences + 1,) int32 with at least one sequence");
    TZ_CHECK(p.B == 1, kLocal, "cu_seqlens needs a batch of 1 (all sequences packed into one row), got ", p.B);
    bounds = empty(cu_seqlens, {2, p.L}, ScalarType::Int);
    p.cu_seqlens = static_cast<const int32_t*>(data(cu_seqlens)), p.cu_seqlens_stride = cu_seqlens.stride(0);
    p.sequences = cu_seqlens.numel() - 1, p.bounds = static_cast<int32_t*>(mutable_data(bounds));
  }
};

}  // namespace

std::tuple<Tensor, Tensor> local_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window, bool causal, double scale,
    const OptTensor& key_mask, const OptTensor& cu_seqlens) {
  LocalCall call(q, k, v, window, causal, scale, key_mask, cu_seqlens);
  LocalAttentionCudaParams& p = call.p;
  Tensor y = like(call.heads.q), lse = empty(q, {p.B, p.H, p.L}, acc_scalar(q.scalar_type()));
  p.y = mutable_data(y), p.lse = mutable_data(lse);
  TZ_RUN_WHERE(q, local_attention_fwd, p);
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor> local_attention_bwd(const Tensor& dy_in, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& y_in,
    const Tensor& lse_in, int64_t window, bool causal, double scale, const OptTensor& key_mask, const OptTensor& cu_seqlens) {
  LocalCall call(q, k, v, window, causal, scale, key_mask, cu_seqlens);
  LocalAttentionCudaParams& p = call.p;
  check_shape(dy_in, {p.B, p.L, p.H, p.P}, kLocal, "dy");
  check_shape(y_in, {p.B, p.L, p.H, p.P}, kLocal, "y");
  check_shape(lse_in, {p.B, p.H, p.L}, kLocal, "lse");
  const ScalarType dtype = q.scalar_type();
  const Tensor dy = cast_contiguous(dy_in, dtype), y = cast_contiguous(y_in, dtype), lse = cast_contiguous(lse_in, acc_scalar(dtype));
  const Tensor delta = empty(q, {p.B, p.H, p.L}, acc_scalar(dtype));
  Tensor dq = like(call.heads.q), dk = like(call.heads.k), dv = like(call.heads.v);
  p.dy = data(dy), p.y = const_cast<void*>(data(y)), p.lse = const_cast<void*>(data(lse)), p.delta = mutable_data(delta);
  p.dq = mutable_data(dq), p.dk = mutable_data(dk), p.dv = mutable_data(dv);
  TZ_RUN_WHERE(q, local_attention_bwd, p);
  return {dq, cast(dk, k.scalar_type()), cast(dv, v.scalar_type())};
}

}  // namespace terrazzo
