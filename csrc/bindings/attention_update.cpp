#include "glue.h"

namespace terrazzo {
namespace {

constexpr const char* kOp = "attention_update";

// Rows of cos or sin, (1, R) or (B, R): data and the stride of a row.
struct Angles {
  Tensor rows;
  int64_t stride;
  Angles(const Tensor& t, int64_t B, int64_t R, const char* name) : rows(unit_stride_last(t)) {
    check_cpu(t, kOp, name);
    check_shape(t, {-1, R}, kOp, name);
    TZ_CHECK(t.size(0) == 1 || t.size(0) == B, kOp, name, " must have 1 row or ", B, ", got ", t.size(0));
    stride = rows.size(0) == 1 ? 0 : rows.stride(0);
  }
};

}  // namespace

Tensor attention_update(const Tensor& qkv_in, const Tensor& k_cache, const Tensor& v_cache, int64_t length, const OptTensor& lengths_in,
    const OptTensor& cos_in, const OptTensor& sin_in, bool interleaved, int64_t window, double scale) {
  check_cpu(qkv_in, kOp, "qkv"), check_cpu(k_cache, kOp, "k_cache"), check_cpu(v_cache, kOp, "v_cache");
  check_shape(qkv_in, {-1, -1}, kOp, "qkv");
  const Tensor qkv = unit_stride_last(qkv_in);
  const ScalarType dtype = qkv.scalar_type();
  AttentionUpdateParams p{};
  p.dtype = dtype_from(dtype, kOp, "qkv"), p.B = qkv.size(0), p.interleaved = interleaved, p.window = window, p.scale = scale, p.length = length;
  check_shape(k_cache, {p.B, -1, -1, -1}, kOp, "k_cache");
  check_shape(v_cache, {p.B, k_cache.size(1), k_cache.size(2), k_cache.size(3)}, kOp, "v_cache");
  check_writable(k_cache, kOp, "k_cache"), check_writable(v_cache, kOp, "v_cache");
  p.Hk = k_cache.size(1), p.P = k_cache.size(3);
  const int64_t slots = k_cache.size(2), heads = p.P > 0 ? qkv.size(1) / p.P : 0;
  TZ_CHECK(p.Hk > 0 && p.P > 0, kOp, "k_cache must not be empty along Hk or P");
  p.H = heads - 2 * p.Hk;
  TZ_CHECK(heads * p.P == qkv.size(1) && p.H > 0 && p.H % p.Hk == 0, kOp, "qkv must be (B, (H + 2 * Hk) * P) wide with H a multiple of Hk = ", p.Hk,
           " and P = ", p.P, ", got ", qkv.size(1));
  TZ_CHECK(k_cache.scalar_type() == dtype && v_cache.scalar_type() == dtype, kOp, "k_cache and v_cache must have qkv's dtype");
  TZ_CHECK((p.P == 1 || k_cache.stride(3) == 1) && (p.P == 1 || v_cache.stride(3) == 1), kOp, "k_cache and v_cache must have unit stride along P");
  TZ_CHECK(window >= 0, kOp, "window must not be negative, got ", window);
  OptTensor lengths;
  if (lengths_in) {
    check_cpu(*lengths_in, kOp, "cache_seqlens");
    check_shape(*lengths_in, {p.B}, kOp, "cache_seqlens");
    const ScalarType it = lengths_in->scalar_type();
    TZ_CHECK(it == ScalarType::Int || it == ScalarType::Long, kOp, "cache_seqlens must be int32 or int64");
    lengths = cast_contiguous(*lengths_in, ScalarType::Long);
    p.lengths = static_cast<const int64_t*>(data(lengths));
  }
  for (int64_t b = 0; b < (p.lengths ? p.B : 1); b++) {
    const int64_t before = p.lengths ? p.lengths[b] : length;
    TZ_CHECK(before >= 0, kOp, "cache_seqlens must not be negative, got ", before);
    const int64_t seen = window && window <= before ? window : before + 1;
    TZ_CHECK(seen <= slots, kOp, "k_cache must have a slot for each of the ", seen, " positions that are seen, got ", slots);
  }
  TZ_CHECK(static_cast<bool>(cos_in) == static_cast<bool>(sin_in), kOp, "rotary_cos and rotary_sin go together");
  std::optional<Angles> cos, sin;
  if (cos_in) {
    cos.emplace(*cos_in, p.B, -1, "rotary_cos");
    p.R = cos->rows.size(1);
    check_float(*sin_in, kOp, "rotary_sin");
    sin.emplace(cast(*sin_in, cos_in->scalar_type()), p.B, p.R, "rotary_sin");
    TZ_CHECK(2 * p.R <= p.P, kOp, "rotary_cos must turn at most P / 2 = ", p.P / 2, " pairs of channels, got ", p.R);
    p.rotary_dtype = dtype_from(cos_in->scalar_type(), kOp, "rotary_cos");
    p.cos = data(cos->rows), p.cos_stride_b = cos->stride, p.sin = data(sin->rows), p.sin_stride_b = sin->stride;
  }
  p.qkv = data(qkv), p.qkv_stride_b = qkv.stride(0);
  p.k_cache = mutable_data(k_cache), p.k_stride_b = k_cache.stride(0), p.k_stride_h = k_cache.stride(1), p.k_stride_s = k_cache.stride(2);
  p.v_cache = mutable_data(v_cache), p.v_stride_b = v_cache.stride(0), p.v_stride_h = v_cache.stride(1), p.v_stride_s = v_cache.stride(2);
  Tensor y = empty(qkv, {p.B, p.H * p.P}, dtype);
  p.y = mutable_data(y);
  cpu::run_attention_update(p);
  return y;
}

}  // namespace terrazzo
