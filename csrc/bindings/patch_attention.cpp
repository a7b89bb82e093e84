#include <algorithm>

#include "glue.h"

namespace terrazzo {
namespace {

constexpr const char *kReduce = "patch_reduce", *kCross = "patch_cross_attention", *kLocal = "local_attention";

// Where each patch of each row begins, [B, S + 1]. Ids that are not negative may not decrease along a row, and with cu_seqlens no
// patch may lie in two sequences.
struct PatchIds {
  Tensor ids;
  std::vector<int32_t> starts;

  PatchIds(const Tensor& ids_in, int64_t B, int64_t L, int64_t S, const OptTensor& cu_seqlens, const char* op)
      : ids(cast_contiguous(ids_in, ScalarType::Int)), starts(static_cast<size_t>(B * (S + 1)), static_cast<int32_t>(L)) {
    check_cpu(ids, op, "patch_ids");
    check_shape(ids, {B, L}, op, "patch_ids");
    TZ_CHECK(S >= 0 && L <= INT32_MAX, op, "num_patches must not be negative, got ", S);
    std::vector<Segment> sequences;
    if (cu_seqlens) sequences = make_segments(B, L, std::nullopt, cu_seqlens, op);
    for (int64_t b = 0; b < B; b++) {
      const int32_t* row = values() + b * L;
      int32_t* start = starts.data() + b * (S + 1);
      int64_t next = 0, before = -1, last = 0;  // patches below `next` have begun; the id before and where it stood
      size_t sequence = 0;
      for (int64_t l = 0; l < L; l++) {
        while (sequence < sequences.size() && sequences[sequence].end <= l) sequence++;
        if (row[l] < 0) continue;
        TZ_CHECK(row[l] >= before, op, "patch_ids must not decrease along a row, got ", before, " then ", row[l], " at position ", l, " of row ", b);
        TZ_CHECK(!cu_seqlens || row[l] != before || last >= sequences[sequence].begin, op, "a patch must not lie in two sequences of cu_seqlens, patch ",
                 row[l], " does at position ", l);
        before = row[l], last = l;
        for (; next <= std::min<int64_t>(row[l], S); next++) start[next] = static_cast<int32_t>(l);
      }
    }
  }
  const int32_t* values() const { return static_cast<const int32_t*>(data(ids)); }
};

// q, k and v in q's dtype, heads that fit.
struct Heads {
  Tensor q, k, v;

  Heads(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const char* op)
      : q(unit_stride_last(q_in)), k(unit_stride_last(cast(k_in, q_in.scalar_type()))), v(unit_stride_last(cast(v_in, q_in.scalar_type()))) {
    check_cpu(q, op, "q");
    check_cpu(k, op, "k");
    check_cpu(v, op, "v");
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

Tensor like(const Tensor& t) { return empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type()); }
void clear(const Tensor& t) { torch::stable::fill_(t, 0.0); }

OptTensor checked_mask(const OptTensor& key_mask, int64_t B, int64_t keys, const char* op) {
  if (!key_mask) return std::nullopt;
  check_cpu(*key_mask, op, "key_mask");
  check_shape(*key_mask, {B, keys}, op, "key_mask");
  TZ_CHECK(key_mask->scalar_type() == ScalarType::Bool, op, "key_mask must be bool, True where a key may be seen");
  return cast_contiguous(key_mask, ScalarType::Bool);
}

PatchReduceParams reduce_params(const Tensor& h, const PatchIds& patches, int64_t num_patches, int64_t reduce) {
  PatchReduceParams p{};
  p.dtype = dtype_from(h.scalar_type(), kReduce, "h");
  TZ_CHECK(reduce >= 0 && reduce < kPatchReductions, kReduce, "reduce must be 0 to ", kPatchReductions - 1, ", got ", reduce);
  p.reduce = static_cast<PatchReduction>(reduce);
  p.B = h.size(0), p.L = h.size(1), p.D = h.size(2), p.S = num_patches;
  TZ_CHECK(p.D > 0, kReduce, "D must be positive, got 0");
  p.ids = patches.values(), p.starts = patches.starts.data();
  p.h = data(h), p.h_stride_b = h.stride(0), p.h_stride_l = h.stride(1);
  return p;
}

struct CrossCall {
  Heads heads;
  int64_t Lq, Lk;
  OptTensor mask;
  PatchIds patches;
  PatchCrossAttentionParams p{};

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
  }
  bool has_work() const { return p.B > 0 && p.S > 0; }
};

struct LocalCall {
  Heads heads;
  OptTensor mask;
  std::vector<AttentionRun> runs;
  LocalAttentionParams p{};

  LocalCall(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window, bool causal, double scale, const OptTensor& key_mask,
            const OptTensor& cu_seqlens)
      : heads(q, k, v, kLocal), mask(checked_mask(key_mask, heads.q.size(0), heads.q.size(1), kLocal)) {
    heads.fill(p, kLocal);
    p.L = heads.q.size(1);
    TZ_CHECK(heads.k.size(1) == p.L, kLocal, "k must have as many positions as q, ", p.L, ", got ", heads.k.size(1));
    TZ_CHECK(window >= 1, kLocal, "window must be positive, got ", window);
    p.window = std::min(window, std::max<int64_t>(p.L, 1)), p.causal = causal, p.scale = scale;
    // as many rows as their band has columns: keys are then packed about twice
    const int64_t rows = std::clamp<int64_t>((p.window + kAttentionBlock - 1) / kAttentionBlock * kAttentionBlock, 256, 2048);
    for (const Segment& s : make_segments(p.B, p.L, std::nullopt, cu_seqlens, kLocal))
      for (int64_t first = 0; first < s.end - s.begin; first += rows) runs.push_back({s.batch, s.begin, s.end, first, std::min(first + rows, s.end - s.begin)});
    p.runs = runs.data(), p.num_runs = static_cast<int64_t>(runs.size());
    p.key_mask = static_cast<const uint8_t*>(data(mask));
  }
};

}  // namespace

Tensor patch_reduce_fwd(const Tensor& h_in, const Tensor& patch_ids, int64_t num_patches, int64_t reduce) {
  check_cpu(h_in, kReduce, "h");
  check_shape(h_in, {-1, -1, -1}, kReduce, "h");
  const Tensor h = unit_stride_last(h_in);
  const PatchIds patches(patch_ids, h.size(0), h.size(1), num_patches, std::nullopt, kReduce);
  PatchReduceParams p = reduce_params(h, patches, num_patches, reduce);
  Tensor y = empty(h, {p.B, p.S, p.D}, h.scalar_type());
  p.y = mutable_data(y);
  cpu::run_patch_reduce_fwd(p);
  return y;
}

Tensor patch_reduce_bwd(const Tensor& dy_in, const Tensor& h_in, const Tensor& y_in, const Tensor& patch_ids, int64_t reduce) {
  check_cpu(h_in, kReduce, "h");
  check_shape(h_in, {-1, -1, -1}, kReduce, "h");
  check_shape(y_in, {h_in.size(0), -1, h_in.size(2)}, kReduce, "y");
  check_shape(dy_in, {h_in.size(0), y_in.size(1), h_in.size(2)}, kReduce, "dy");
  const Tensor h = unit_stride_last(h_in), y = cast_contiguous(y_in, h.scalar_type()), dy = cast_contiguous(dy_in, h.scalar_type());
  const PatchIds patches(patch_ids, h.size(0), h.size(1), y.size(1), std::nullopt, kReduce);
  PatchReduceParams p = reduce_params(h, patches, y.size(1), reduce);
  Tensor dh = empty(h, {p.B, p.L, p.D}, h.scalar_type());
  p.y = const_cast<void*>(data(y)), p.dy = data(dy), p.dh = mutable_data(dh);
  if (p.S == 0) clear(dh);
  cpu::run_patch_reduce_bwd(p);
  return dh;
}

Tensor patch_cross_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& patch_ids, int64_t num_patches,
    bool bytes_ask, int64_t k_per_patch, double scale, int64_t window, const OptTensor& key_mask, const OptTensor& cu_seqlens) {
  CrossCall call(q, k, v, patch_ids, num_patches, bytes_ask, k_per_patch, scale, window, key_mask, cu_seqlens);
  Tensor y = like(call.heads.q);
  call.p.y = mutable_data(y);
  if (!call.has_work()) clear(y);
  cpu::run_patch_cross_attention_fwd(call.p);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> patch_cross_attention_bwd(const Tensor& dy_in, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& patch_ids, int64_t num_patches, bool bytes_ask, int64_t k_per_patch, double scale, int64_t window,
    const OptTensor& key_mask, const OptTensor& cu_seqlens) {
  CrossCall call(q, k, v, patch_ids, num_patches, bytes_ask, k_per_patch, scale, window, key_mask, cu_seqlens);
  PatchCrossAttentionParams& p = call.p;
  check_shape(dy_in, {p.B, p.Lq, p.H, p.P}, kCross, "dy");
  const ScalarType dtype = q.scalar_type();
  const Tensor dy = cast_contiguous(dy_in, dtype), stats = empty(q, {p.B, p.Lq, 3, p.H}, acc_scalar(dtype));
  Tensor dq = like(call.heads.q), dk = like(call.heads.k), dv = like(call.heads.v);
  p.dy = data(dy), p.stats = mutable_data(stats), p.dq = mutable_data(dq), p.dk = mutable_data(dk), p.dv = mutable_data(dv);
  if (!call.has_work()) clear(dq), clear(dk), clear(dv);
  cpu::run_patch_cross_attention_bwd(p);
  return {dq, cast(dk, k.scalar_type()), cast(dv, v.scalar_type())};
}

std::tuple<Tensor, Tensor> local_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window, bool causal, double scale,
    const OptTensor& key_mask, const OptTensor& cu_seqlens) {
  LocalCall call(q, k, v, window, causal, scale, key_mask, cu_seqlens);
  LocalAttentionParams& p = call.p;
  Tensor y = like(call.heads.q), lse = empty(q, {p.B, p.H, p.L}, acc_scalar(q.scalar_type()));
  p.y = mutable_data(y), p.lse = mutable_data(lse);
  cpu::run_local_attention_fwd(p);
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor> local_attention_bwd(const Tensor& dy_in, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& y_in,
    const Tensor& lse_in, int64_t window, bool causal, double scale, const OptTensor& key_mask, const OptTensor& cu_seqlens) {
  LocalCall call(q, k, v, window, causal, scale, key_mask, cu_seqlens);
  LocalAttentionParams& p = call.p;
  check_shape(dy_in, {p.B, p.L, p.H, p.P}, kLocal, "dy");
  check_shape(y_in, {p.B, p.L, p.H, p.P}, kLocal, "y");
  check_shape(lse_in, {p.B, p.H, p.L}, kLocal, "lse");
  const ScalarType dtype = q.scalar_type();
  const Tensor dy = cast_contiguous(dy_in, dtype), y = cast_contiguous(y_in, dtype), lse = cast_contiguous(lse_in, acc_scalar(dtype));
  const Tensor delta = empty(q, {p.B, p.H, p.L}, acc_scalar(dtype));
  Tensor dq = like(call.heads.q), dk = like(call.heads.k), dv = like(call.heads.v);
  p.dy = data(dy), p.y = const_cast<void*>(data(y)), p.lse = const_cast<void*>(data(lse)), p.delta = mutable_data(delta);
  p.dq = mutable_data(dq), p.dk = mutable_data(dk), p.dv = mutable_data(dv);
  cpu::run_local_attention_bwd(p);
  return {dq, cast(dk, k.scalar_type()), cast(dv, v.scalar_type())};
}

}  // namespace terrazzo
