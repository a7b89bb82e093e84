#include "glue.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../common/parallel.h"

namespace terrazzo {

namespace {
std::atomic<bool> g_poison{false};

void fill_with_nan(const Tensor& t) {
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
#if defined(TZ_WITH_CUDA)
  if (t.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(t.get_device());
    STD_TORCH_CHECK(cudaMemsetAsync(mutable_data(t), 0xff, bytes, cuda::current_stream(t)) == cudaSuccess, "terrazzo: cannot fill a new tensor");
    return;
  }
#endif
  std::memset(mutable_data(t), 0xff, bytes);
}
}  // namespace

void poison_new_tensors(bool poison) { g_poison = poison; }

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  int32_t device = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(shape[d], 1);
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), type, device, index, &handle));
  Tensor t(handle);
  if (g_poison.load(std::memory_order_relaxed)) fill_with_nan(t);
  return t;
}

void check_shape(const Tensor& t, Shape shape, const char* op, const char* name) {
  bool ok = t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t* s = shape.begin(); ok && s != shape.end(); s++, d++) ok = *s < 0 || t.size(d) == *s;
  if (ok) return;
  std::string want, got;
  for (int64_t s : shape) want += (want.empty() ? "" : ", ") + (s < 0 ? std::string("*") : std::to_string(s));
  for (int64_t i = 0; i < t.dim(); i++) got += (got.empty() ? "" : ", ") + std::to_string(t.size(i));
  TZ_CHECK(false, op, name, " must have shape (", want, "), got (", got, ")");
}

void check_shape(const OptTensor& t, Shape shape, const char* op, const char* name) {
  if (t) check_shape(*t, shape, op, name);
}

namespace {

// Splits positions [begin, end) of row b where seq_idx changes.
void append_segments(std::vector<Segment>& out, int64_t b, int64_t begin, int64_t end, int64_t state, const int32_t* seq_idx,
                     int64_t stride) {
  const size_t first = out.size();
  if (!seq_idx || begin == end) {
    out.push_back({b, begin, end, state, state, false});
    return;
  }
  for (int64_t l = begin; l < end;) {
    const int32_t id = seq_idx[l * stride];
    int64_t stop = l + 1;
    while (stop < end && seq_idx[stop * stride] == id) stop++;
    out.push_back({b, l, stop, l == begin && id >= 0 ? state : -1, -1, id < 0});
    l = stop;
  }
  for (size_t i = out.size(); i-- > first;) {
    if (out[i].padding) continue;
    out[i].final = state;
    return;
  }
  out.push_back({b, begin, begin, state, state, false});  // nothing but padding: the state passes through
}

}  // namespace

WeightMatrix packed_matrix(const Tensor& w, const OptTensor& scale, int64_t E, int64_t K, int64_t N, ScalarType x, const char* op, const char* name) {
  check_cpu(w, op, name);
  check_shape(w, {E, (N + 2 * kPanel - 1) / (2 * kPanel) * 2, K, kPanel}, op, name);
  const bool int8 = w.scalar_type() == ScalarType::Char;
  TZ_CHECK(w.is_contiguous(), op, name, " must be what pack_weight returned: contiguous");
  TZ_CHECK(int8 == scale.has_value(), op, name, int8 ? ": int8 panels need their scales" : ": only int8 panels have scales");
  TZ_CHECK((x == ScalarType::Double) == (w.scalar_type() == ScalarType::Double), op, "float64 goes with float64 only");
  check_shape(scale, {E, N}, op, "scale");
  if (scale) TZ_CHECK(scale->scalar_type() == ScalarType::Float && scale->is_contiguous(), op, "scale must be contiguous float32");
  return {int8 ? DType::f32 : dtype_from(w.scalar_type(), op, name), data(w), w.stride(0), 0, 0, K * kPanel, int8,
          static_cast<const float*>(data(scale)), N};
}

std::vector<Segment> make_segments(int64_t B, int64_t L, const OptTensor& seq_idx, const OptTensor& cu_seqlens, const char* op) {
  const int32_t* ids = nullptr;
  int64_t stride_b = 0, stride_l = 0;
  if (seq_idx) {
    TZ_CHECK(seq_idx->scalar_type() == ScalarType::Int, op, "seq_idx must be int32");
    check_cpu(*seq_idx, op, "seq_idx");
    check_shape(*seq_idx, {B, L}, op, "seq_idx");
    ids = static_cast<const int32_t*>(data(*seq_idx));
    stride_b = seq_idx->stride(0);
    stride_l = seq_idx->stride(1);
  }
  std::vector<Segment> out;
  if (!cu_seqlens) {
    for (int64_t b = 0; b < B; b++) append_segments(out, b, 0, L, b, ids ? ids + b * stride_b : nullptr, stride_l);
    return out;
  }
  TZ_CHECK(cu_seqlens->scalar_type() == ScalarType::Int, op, "cu_seqlens must be int32");
  check_cpu(*cu_seqlens, op, "cu_seqlens");
  TZ_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 2, op, "cu_seqlens must be (sequences + 1,) with at least one sequence");
  TZ_CHECK(B == 1, op, "cu_seqlens needs a batch of 1 (all sequences packed into one row), got ", B);
  const int32_t* cu = static_cast<const int32_t*>(data(*cu_seqlens));
  const int64_t stride = cu_seqlens->stride(0), S = cu_seqlens->numel() - 1;
  TZ_CHECK(cu[0] == 0 && cu[S * stride] == L, op, "cu_seqlens must start at 0 and end at ", L, ", got ", cu[0], " and ", cu[S * stride]);
  for (int64_t s = 0; s < S; s++) {
    const int64_t begin = cu[s * stride], end = cu[(s + 1) * stride];
    TZ_CHECK(begin >= 0 && begin <= end && end <= L, op, "cu_seqlens must not decrease, got ", begin, " then ", end, " at index ", s + 1);
    append_segments(out, 0, begin, end, s, ids, stride_l);
  }
  return out;
}

const int32_t* checked_slots(const OptTensor& indices, int64_t B, int64_t num_slots, const char* op, const char* name) {
  TZ_CHECK(indices || num_slots == B, op, "the state has ", num_slots, " slots for ", B, " rows");
  if (!indices) return nullptr;
  check_device(*indices, op, name);
  check_shape(*indices, {B}, op, name);
  TZ_CHECK(indices->scalar_type() == ScalarType::Int && (B <= 1 || indices->stride(0) == 1), op, name, " must be contiguous int32");
  const int32_t* slots = static_cast<const int32_t*>(data(*indices));
  if (!runs_on_cpu(*indices)) return slots;
  for (int64_t b = 0; b < B; b++)
    TZ_CHECK(slots[b] >= -1 && slots[b] < num_slots, op, name, " must be -1 or below ", num_slots, ", got ", slots[b], " at row ", b);
  return slots;
}

namespace cpu {
namespace {

bool runs(Isa isa) {
  __builtin_cpu_init();
  switch (isa) {
#ifdef TZ_BUILD_AVX512_BF16
    case Isa::avx512_bf16: return runs(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::amx: return runs(Isa::avx512_bf16) && tiles_granted();
#endif
#ifdef TZ_BUILD_AVX512
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq");
#endif
#ifdef TZ_BUILD_AVX2
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    default: return isa == Isa::portable;
  }
}

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr int kIsas = 5;

Isa choose() {
  const char* forced = std::getenv("TERRAZZO_CPU_ISA");
  if (!forced || !*forced) {
    int best = kIsas - 1;
    while (!runs(static_cast<Isa>(best))) best--;
    return static_cast<Isa>(best);
  }
  for (int i = 0; i < kIsas; i++) {
    if (std::strcmp(forced, kIsaNames[i]) != 0) continue;
    STD_TORCH_CHECK(runs(static_cast<Isa>(i)), "TERRAZZO_CPU_ISA=", forced, ": this processor or this build cannot run it; unset the variable");
    return static_cast<Isa>(i);
  }
  STD_TORCH_CHECK(false, "TERRAZZO_CPU_ISA must be portable, avx2, avx512, avx512_bf16 or amx, got ", forced);
}

std::atomic<uint64_t> g_counts[kNumKernels];

}  // namespace

Isa isa() {
  static const Isa chosen = [] {
    const Isa isa = choose();
    use_tiles(isa == Isa::amx);
    return isa;
  }();
  return chosen;
}
const char* isa_name() { return kIsaNames[static_cast<int>(isa())]; }
void count(KernelId id) { g_counts[id].fetch_add(1, std::memory_order_relaxed); }

#define TZ_NAME(name, Params) #name,
const char* const kKernelNames[kNumKernels] = {TZ_CPU_KERNELS(TZ_NAME)};
#undef TZ_NAME
uint64_t kernel_count(int id) { return g_counts[id].load(std::memory_order_relaxed); }
void reset_kernel_counts() {
  for (auto& c : g_counts) c = 0;
}

}  // namespace cpu

namespace {
void torch_parallel_for_adapter(int64_t begin, int64_t end, int64_t grain, const void* ctx, RangeFn fn) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { fn(ctx, b, e); });
}
const bool g_pool_installed = [] {
  set_thread_pool(&torch_parallel_for_adapter, [] { return static_cast<int>(torch::stable::get_num_threads()); });
  return true;
}();
}  // namespace

}  // namespace terrazzo
