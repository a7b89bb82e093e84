// What the bindings of the attention ops share.
#pragma once
#include "glue.h"

namespace terrazzo {

// q, k and v in q's dtype, heads that fit.
struct Heads {
  Tensor q, k, v;

  Heads(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const char* op)
      : q(unit_stride_last(q_in)), k(unit_stride_last(cast(k_in, q_in.scalar_type()))), v(unit_stride_last(cast(v_in, q_in.scalar_type()))) {
    check_device(q, op, "q");
    check_device(k, op, "k");
    check_device(v, op, "v");
    check_shape(q, {-1, -1, -1, -1}, op, "q");
    check_shape(k, {q.size(0), -1, -1, q.size(3)}, op, "k");
    check_shape(v, {k.size(0), k.size(1), k.size(2), k.size(3)}, op, "v");
    TZ_CHECK(k.size(2) > 0 && q.size(2) > 0 && q.size(2) % k.size(2) == 0, op, "the heads of k must divide the ", q.size(2), " heads of q, got ", k.size(2));
    TZ_CHECK(q.size(3) > 0, op, "P must be positive, got 0");
  }
  template <class Params> void fill(Params& p, const char* op) const {
    p.dtype = dtype_from(q.scalar_type(), op, "q");
    p.B = q.size(0), p.H = q.size(2), p.Hk = k.size(2), p.P = q.size(3);
    p.q = data(q), p.q_stride_b = q.stride(0), p.q_stride_l = q.stride(1), p.q_stride_h = q.stride(2);
    p.k = data(k), p.k_stride_b = k.stride(0), p.k_stride_l = k.stride(1), p.k_stride_h = k.stride(2);
    p.v = data(v), p.v_stride_b = v.stride(0), p.v_stride_l = v.stride(1), p.v_stride_h = v.stride(2);
  }
};

inline Tensor like(const Tensor& t) { return empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type()); }

inline OptTensor checked_mask(const OptTensor& key_mask, int64_t B, int64_t keys, const char* op) {
  if (!key_mask) return std::nullopt;
  check_device(*key_mask, op, "key_mask");
  check_shape(*key_mask, {B, keys}, op, "key_mask");
  TZ_CHECK(key_mask->scalar_type() == ScalarType::Bool, op, "key_mask must be bool, True where a key may be seen");
  return cast_contiguous(key_mask, ScalarType::Bool);
}

}  // namespace terrazzo
