#include "../cuda/params.h"
#include "attention.h"
#include "patch_ids.h"

namespace terrazzo {
namespace {

constexpr const char* kCross = "patch_cross_attention";

void clear(const Tensor& t) { torch::stable::fill_(t, 0.0); }

struct CrossCall {
  Heads heads;
  int64_t Lq, Lk;
  OptTensor mask;
  PatchIds patches;
  OptTensor starts, live;  // scratch of the CUDA kernels
  PatchCrossAttentionCudaParams p{};

  CrossCall(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& patch_ids, int64_t num_patches, bool bytes_ask, int64_t k_per_patch,
            double scale, int64_t window, const OptTensor& key_mask, const OptTensor& cu_seqlens)
      : heads(q, k, v, kCross), Lq(heads.q.size(1)), Lk(heads.k.size(1)), mask(checked_mask(key_mask, heads.q.size(0), Lk, kCross)),
        patches(patch_ids, heads.q.size(0), bytes_ask ? Lq : Lk, num_patches, cu_seqlens, kCross) {
    heads.fill(p, kCross);
    TZ_CHECK(k_per_patch >= 1 && window >= 1, kCross, "k_per_patch and window must be positive, got ", k_per_patch, " and ", window);
    p.bytes_ask = bytes_ask, p.S = num_patches, p.K = k_per_patch, p.window = window, p.scale = scale;
    p.Lq = Lq, p.Lk = Lk, p.L = bytes_ask ? Lq : Lk;
    const int64_t rows = bytes_ask ? Lk : Lq;
    TZ_CHECK(rows == num_patches * k_per_patch, kCross, bytes_ask ? "k" : "q", " must hold num_patches * k_per_patch = ", num_patches * k_per_patch,
             " rows, got ", rows);
    p.ids = patches.values(), p.starts = patches.starts.data(), p.key_mask = static_cast<const uint8_t*>(data(mask));
    if (runs_on_cpu(q)) return;
    starts = empty(q, {p.B, p.S + 1}, ScalarType::Int);
    p.patch_starts = static_cast<int32_t*>(mutable_data(starts));
    if (bytes_ask) return;
    live = empty(q, {p.B, p.L}, ScalarType::Byte);
    p.live = static_cast<uint8_t*>(mutable_data(live));
  }
  bool has_work() const { return p.B > 0 && p.S > 0; }
};

}  // namespace

Tensor patch_cross_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& patch_ids, int64_t num_patches,
    bool bytes_ask, int64_t k_per_patch, double scale, int64_t window, const OptTensor& key_mask, const OptTensor& cu_seqlens) {
  CrossCall call(q, k, v, patch_ids, num_patches, bytes_ask, k_per_patch, scale, window, key_mask, cu_seqlens);
  Tensor y = like(call.heads.q);
  call.p.y = mutable_data(y);
  if (!call.has_work()) clear(y);
  TZ_RUN_WHERE(q, patch_cross_attention_fwd, call.p);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> patch_cross_attention_bwd(const Tensor& dy_in, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& patch_ids, int64_t num_patches, bool bytes_ask, int64_t k_per_patch, double scale, int64_t window,
    const OptTensor& key_mask, const OptTensor& cu_seqlens) {
  CrossCall call(q, k, v, patch_ids, num_patches, bytes_ask, k_per_patch, scale, window, key_mask, cu_seqlens);
  PatchCrossAttentionCudaParams& p = call.p;
  check_shape(dy_in, {p.B, p.Lq, p.H, p.P}, kCross, "dy");
  const ScalarType dtype = q.scalar_type();
  const Tensor dy = cast_contiguous(dy_in, dtype), stats = empty(q, {p.B, p.Lq, 3, p.H}, acc_scalar(dtype));
  Tensor dq = like(call.heads.q), dk = like(call.heads.k), dv = like(call.heads.v);
  p.dy = data(dy), p.stats = mutable_data(stats), p.dq = mutable_data(dq), p.dk = mutable_data(dk), p.dv = mutable_data(dv);
  if (!call.has_work()) clear(dq), clear(dk), clear(dv);
  TZ_RUN_WHERE(q, patch_cross_attention_bwd, p);
  return {dq, cast(dk, k.scalar_type()), cast(dv, v.scalar_type())};
}

}  // namespace terrazzo
