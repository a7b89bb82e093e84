#include <cmath>

#include "../cuda/params.h"
#include "glue.h"

namespace terrazzo {
namespace {

constexpr const char *kEntropy = "entropy_patch", *kCut = "patch_lengths_from_entropies", *kTokens = "patch_lengths_from_tokens",
                     *kState = "PatcherState", *kIds = "patch_ids_from_lengths";

// valid_lengths [B] int32, each 0 to L. On a GPU nobody looks: kernels take what lies outside for the nearest.
const int32_t* checked_valid(const OptTensor& valid, int64_t B, int64_t L, const char* op) {
  if (!valid) return nullptr;
  check_device(*valid, op, "valid_lengths");
  check_shape(*valid, {B}, op, "valid_lengths");
  TZ_CHECK(valid->scalar_type() == ScalarType::Int && (B <= 1 || valid->stride(0) == 1), op, "valid_lengths must be contiguous int32");
  const int32_t* lengths = static_cast<const int32_t*>(data(*valid));
  for (int64_t b = 0; runs_on_cpu(*valid) && b < B; b++)
    TZ_CHECK(lengths[b] >= 0 && lengths[b] <= L, op, "valid_lengths must be 0 to ", L, ", got ", lengths[b], " at row ", b);
  return lengths;
}

// cu_seqlens [texts + 1] int32 as they are on the device.
OptTensor device_cu_seqlens(const OptTensor& cu_seqlens, int64_t B, const char* op) {
  if (!cu_seqlens) return std::nullopt;
  check_device(*cu_seqlens, op, "cu_seqlens");
  TZ_CHECK(cu_seqlens->scalar_type() == ScalarType::Int, op, "cu_seqlens must be int32");
  TZ_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 2, op, "cu_seqlens must be (sequences + 1,) with at least one sequence");
  TZ_CHECK(B == 1, op, "cu_seqlens needs a batch of 1 (all sequences packed into one row), got ", B);
  return cast_contiguous(cu_seqlens, ScalarType::Int);
}

// The outputs of a cut and the kernel's view of them: segments for the CPU, texts for a GPU.
struct Cut {
  Tensor starts, ids, lengths, counts;
  std::vector<Segment> segments;
  OptTensor cu_seqlens, runs, largest;
  PatchParams p{};
  PatchTexts texts{};

  Cut(const Tensor& like, int64_t B, int64_t L, double threshold, int64_t rule, double threshold_add, double patch_size, int64_t max_length,
      const OptTensor& cu_seqlens_in, const OptTensor& valid_lengths, bool next, const char* op) {
    TZ_CHECK(rule >= 0 && rule < kPatchRules, op, "rule must be 0 to ", kPatchRules - 1, ", got ", rule);
    p.rule = static_cast<PatchRule>(rule);
    TZ_CHECK(L >= 1 && L < INT32_MAX, op, "L must be 1 to ", INT32_MAX - 1, ", got ", L);
    TZ_CHECK(max_length >= 0 && max_length <= INT32_MAX, op, "max_patch_length must be positive, got ", max_length);
    TZ_CHECK(std::isfinite(threshold) && std::isfinite(threshold_add), op, "threshold and threshold_add must be finite");
    TZ_CHECK((p.rule != PatchRule::top && p.rule != PatchRule::fixed) || patch_size >= 1, op, "patch_size must be at least 1, got ", patch_size);
    TZ_CHECK(!cu_seqlens_in || (!valid_lengths && !next), op, "cu_seqlens excludes valid_lengths and include_next");
    const int32_t* valid = checked_valid(valid_lengths, B, L, op);
    p.B = B, p.L = L, p.next = next;
    const int64_t N = L + next;
    if (runs_on_cpu(like)) {
      segments = make_segments(B, L, std::nullopt, cu_seqlens_in, op);
      for (int64_t b = 0; valid && b < B; b++) segments[b].end = valid[b];
      p.segments = segments.data(), p.num_segments = static_cast<int64_t>(segments.size());
    } else {
      cu_seqlens = device_cu_seqlens(cu_seqlens_in, B, op);
      texts.cu_seqlens = static_cast<const int32_t*>(data(cu_seqlens)), texts.num_texts = num_sequences(B, cu_seqlens), texts.valid_lengths = valid;
      if (patch_tiles(N) > 1) runs = empty(like, {B, patch_tiles(N), 3}, ScalarType::Int);
      if (p.rule == PatchRule::top) largest = empty(like, {texts.num_texts}, ScalarType::Long);
      texts.runs = static_cast<int32_t*>(mutable_data(runs)), texts.largest = static_cast<uint64_t*>(mutable_data(largest));
    }
    p.threshold = threshold, p.threshold_add = threshold_add, p.patch_size = patch_size, p.max_length = max_length;
    starts = empty(like, {B, N}, ScalarType::Bool), ids = empty(like, {B, N}, ScalarType::Int);
    lengths = empty(like, {B, N}, ScalarType::Int), counts = empty(like, {B}, ScalarType::Int);
    p.starts = static_cast<uint8_t*>(mutable_data(starts)), p.ids = static_cast<int32_t*>(mutable_data(ids));
    p.lengths = static_cast<int32_t*>(mutable_data(lengths)), p.counts = static_cast<int32_t*>(mutable_data(counts));
  }
  bool needs_entropies() const { return p.rule <= PatchRule::top; }
  void read(const Tensor& entropies) {
    p.dtype = dtype_from(entropies.scalar_type(), kCut, "entropies");
    p.entropies = data(entropies), p.entropies_stride_b = entropies.stride(0), p.entropies_stride_l = entropies.stride(1);
  }
};

PatchEntropyParams entropy_params(const Tensor& logits, const OptTensor& valid_lengths) {
  check_device(logits, kEntropy, "logits");
  check_shape(logits, {-1, -1, -1}, kEntropy, "logits");
  PatchEntropyParams p{};
  p.dtype = dtype_from(logits.scalar_type(), kEntropy, "logits");
  p.B = logits.size(0), p.L = logits.size(1), p.V = logits.size(2);
  TZ_CHECK(p.V >= 1, kEntropy, "V must be positive, got 0");
  p.logits = data(logits), p.logits_stride_b = logits.stride(0), p.logits_stride_l = logits.stride(1);
  p.valid_lengths = checked_valid(valid_lengths, p.B, p.L, kEntropy);
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> entropy_patch_fwd(const Tensor& logits_in, double threshold, int64_t rule, double threshold_add,
    double patch_size, int64_t max_length, const OptTensor& cu_seqlens, const OptTensor& valid_lengths, bool next) {
  const Tensor logits = unit_stride_last(logits_in);
  PatchEntropyParams p = entropy_params(logits, valid_lengths);
  Cut cut(logits, p.B, p.L, threshold, rule, threshold_add, patch_size, max_length, cu_seqlens, valid_lengths, next, kEntropy);
  TZ_CHECK(cut.needs_entropies(), kEntropy, "rule must be one of entropies, got ", rule);
  Tensor entropies = empty(logits, {p.B, p.L}, acc_scalar(logits.scalar_type()));
  p.entropies = mutable_data(entropies);
  cut.read(entropies);
  const EntropyPatchCudaParams both{{p, cut.p}, cut.texts};
  TZ_RUN_WHERE(logits, entropy_patch_fwd, both);
  return {entropies, cut.starts, cut.ids, cut.lengths, cut.counts};
}

Tensor entropy_patch_bwd(const Tensor& dentropies_in, const Tensor& logits_in, const OptTensor& valid_lengths) {
  const Tensor logits = unit_stride_last(logits_in);
  PatchEntropyParams p = entropy_params(logits, valid_lengths);
  check_shape(dentropies_in, {p.B, p.L}, kEntropy, "dentropies");
  const Tensor dentropies = cast_contiguous(dentropies_in, acc_scalar(logits.scalar_type()));
  Tensor dlogits = empty(logits, {p.B, p.L, p.V}, logits.scalar_type());
  p.dentropies = data(dentropies), p.dlogits = mutable_data(dlogits);
  TZ_RUN_WHERE(logits, entropy_patch_bwd, p);
  return dlogits;
}

// `source` is entropies, or tokens for the rules that read them.
std::tuple<Tensor, Tensor, Tensor, Tensor> patch_cut(const Tensor& source, double threshold, int64_t rule, double threshold_add, double patch_size,
    int64_t max_length, int64_t offset, const OptTensor& cu_seqlens, const OptTensor& valid_lengths, bool next) {
  const char* op = rule <= static_cast<int64_t>(PatchRule::top) ? kCut : kTokens;
  check_device(source, op, op == kCut ? "entropies" : "tokens");
  check_shape(source, {-1, -1}, op, op == kCut ? "entropies" : "tokens");
  Cut cut(source, source.size(0), source.size(1), threshold, rule, threshold_add, patch_size, max_length, cu_seqlens, valid_lengths, next, op);
  if (cut.needs_entropies()) {
    cut.read(source);
    const PatchCudaParams p{cut.p, cut.texts};
    TZ_RUN_WHERE(source, patch_cut, p);
  } else {
    const Tensor tokens = cast_contiguous(source, ScalarType::Long);
    cut.p.tokens = static_cast<const int64_t*>(data(tokens)), cut.p.offset = offset;
    const PatchCudaParams p{cut.p, cut.texts};
    TZ_RUN_WHERE(source, patch_cut_tokens, p);
  }
  return {cut.starts, cut.ids, cut.lengths, cut.counts};
}

std::tuple<Tensor, Tensor> patcher_update(const Tensor& entropies_in, const Tensor& state, const Tensor& before, double threshold, int64_t rule,
    double threshold_add, int64_t max_length) {
  check_device(entropies_in, kState, "entropies");
  check_device(state, kState, "state");
  check_device(before, kState, "before");
  check_shape(entropies_in, {-1, -1}, kState, "entropies");
  PatcherUpdateParams p{};
  p.B = entropies_in.size(0), p.K = entropies_in.size(1);
  check_shape(state, {p.B, 3}, kState, "state");
  check_shape(before, {p.B}, kState, "before");
  TZ_CHECK(state.scalar_type() == ScalarType::Long && state.is_contiguous() && before.is_contiguous(), kState, "state must be contiguous int64");
  TZ_CHECK(rule >= 0 && rule < static_cast<int64_t>(PatchRule::top), kState, "rule must be threshold, monotonic or combined, got ", rule);
  p.dtype = dtype_from(before.scalar_type(), kState, "before"), p.rule = static_cast<PatchRule>(rule);
  p.threshold = threshold, p.threshold_add = threshold_add, p.max_length = max_length;
  const Tensor entropies = cast_contiguous(entropies_in, before.scalar_type());
  Tensor starts = empty(entropies, {p.B, p.K}, ScalarType::Bool), ids = empty(entropies, {p.B, p.K}, ScalarType::Int);
  p.entropies = data(entropies), p.state = static_cast<int64_t*>(mutable_data(state)), p.before = mutable_data(before);
  p.starts = static_cast<uint8_t*>(mutable_data(starts)), p.ids = static_cast<int32_t*>(mutable_data(ids));
  TZ_RUN_WHERE(before, patcher_update, p);
  return {starts, ids};
}

Tensor patch_ids(const Tensor& lengths_in, int64_t length) {
  check_device(lengths_in, kIds, "lengths");
  check_shape(lengths_in, {-1, -1}, kIds, "lengths");
  const Tensor lengths = cast_contiguous(lengths_in, ScalarType::Long);
  PatchIdsCudaParams p{};
  p.B = lengths.size(0), p.S = lengths.size(1), p.L = length;
  TZ_CHECK(length >= 0 && length < INT32_MAX && (length == 0 || p.S >= 1), kIds, "length must be 0 to ", INT32_MAX - 1, " with at least one patch, got ",
           length, " with ", p.S);
  p.lengths = static_cast<const int64_t*>(data(lengths));
  for (int64_t i = 0; runs_on_cpu(lengths) && i < p.B * p.S; i++)  // the last of a row is not read
    TZ_CHECK(p.lengths[i] >= 0 || (i + 1) % p.S == 0, kIds, "lengths must not be negative, got ", p.lengths[i], " at row ", i / p.S);
  Tensor ids = empty(lengths, {p.B, p.L}, ScalarType::Int);
  p.ids = static_cast<int32_t*>(mutable_data(ids));
  const bool sums_wanted = !runs_on_cpu(lengths) && patch_id_tiles(p.S) > 1;
  const Tensor sums = sums_wanted ? empty(lengths, {p.B, patch_id_tiles(p.S)}, ScalarType::Int) : absent(lengths);
  p.sums = static_cast<int32_t*>(mutable_data(sums));
  TZ_RUN_WHERE(lengths, patch_ids, p);
  return ids;
}

}  // namespace terrazzo
