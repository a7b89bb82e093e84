// The thin layer between torch's stable ABI and the torch-free kernels: pointers, strides, dtypes, segments.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/params.h"
#include "../cpu/kernels.h"
#if defined(TZ_CUDA_EMULATED) || defined(TZ_WITH_CUDA)
#include "../cuda/kernels.h"
#endif

namespace terrazzo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// A broken rule: the message starts with the op's public name.
#define TZ_CHECK(cond, op, ...) STD_TORCH_CHECK(cond, "terrazzo.", op, ": ", __VA_ARGS__)

inline DType dtype_from(ScalarType t, const char* op, const char* name) {
  switch (t) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: TZ_CHECK(false, op, name, " must be float32, float64, bfloat16 or float16, got ", torch::headeronly::toString(t));
  }
}
inline ScalarType acc_scalar(ScalarType t) { return t == ScalarType::Double ? t : ScalarType::Float; }

// The dtype a weight is read in beside x: its own, but float64 only together with x.
inline ScalarType weight_scalar(ScalarType x, ScalarType weight) {
  return x == ScalarType::Double || weight == ScalarType::Double ? acc_scalar(x) : weight;
}

// A new contiguous tensor on `like`'s device, contents undefined. Straight from the allocator: torch's dispatcher takes another
// microsecond, a quarter of a decoding step's overhead.
Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype);
// From now on `empty` fills what it returns with NaN: tests ask for it, so that an output that was never written shows.
void poison_new_tensors(bool poison);
inline Tensor zeros(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_zeros(like, shape, dtype);
}
// What an op returns in place of a tensor that nobody asked for.
inline Tensor absent(const Tensor& like) { return empty(like, {0}, like.scalar_type()); }
inline Tensor cast(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }
inline OptTensor cast(const OptTensor& t, ScalarType dtype) { return t ? OptTensor(cast(*t, dtype)) : std::nullopt; }
inline Tensor cast_contiguous(const Tensor& t, ScalarType dtype) {
  Tensor c = cast(t, dtype);
  return c.is_contiguous() ? c : torch::stable::contiguous(c);
}
inline OptTensor cast_contiguous(const OptTensor& t, ScalarType dtype) {
  return t ? OptTensor(cast_contiguous(*t, dtype)) : std::nullopt;
}
// The tensor itself where its last dimension has unit stride, else a contiguous copy.
inline Tensor unit_stride_last(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 ? t : torch::stable::contiguous(t);
}
inline const void* data(const Tensor& t) { return t.const_data_ptr(); }
inline const void* data(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }
inline void* mutable_data(const Tensor& t) { return t.mutable_data_ptr(); }
inline void* mutable_data(const OptTensor& t) { return t ? t->mutable_data_ptr() : nullptr; }

inline void check_cpu(const Tensor& t, const char* op, const char* name) {
  TZ_CHECK(t.is_cpu(), op, name, " must be on the CPU for the cpu backend");
}
inline void check_float(const Tensor& t, const char* op, const char* name) { dtype_from(t.scalar_type(), op, name); }
inline void check_float(const OptTensor& t, const char* op, const char* name) {
  if (t) check_float(*t, op, name);
}
// An op writes into this tensor of the caller's: no two of its elements may be one place in memory.
inline void check_writable(const Tensor& t, const char* op, const char* name) {
  for (int64_t d = 0; d < t.dim(); d++) TZ_CHECK(t.stride(d) != 0 || t.size(d) <= 1, op, name, " is updated in place and must not be expanded");
}
// Rank and sizes; -1 accepts any size.
using Shape = std::initializer_list<int64_t>;
void check_shape(const Tensor& t, Shape shape, const char* op, const char* name);
void check_shape(const OptTensor& t, Shape shape, const char* op, const char* name);

// Weights packed before the call, as a matrix [K, N] for each of E experts: the tensor is (E, panels, K, kPanel), its panels
// an even number; int8 ones have scale (E, N) float32.
WeightMatrix packed_matrix(const Tensor& w, const OptTensor& scale, int64_t E, int64_t K, int64_t N, ScalarType x, const char* op, const char* name);

// The independent sequences of a batch: rows, split where seq_idx [B, L] int32 changes, or the ranges of
// cu_seqlens [S + 1] int32 (B must be 1). The first segment of a row (range) takes its initial state, the last
// one that isn't padding gives its final state; negative seq_idx is padding.
std::vector<Segment> make_segments(int64_t B, int64_t L, const OptTensor& seq_idx, const OptTensor& cu_seqlens, const char* op);
inline int64_t num_sequences(int64_t B, const OptTensor& cu_seqlens) { return cu_seqlens ? cu_seqlens->numel() - 1 : B; }

// int32 slots of each row in a state with num_slots slots: -1 (a padding row) or a slot. Null when row b owns slot b. On a GPU the
// values aren't read here: kernels take any other slot for padding.
const int32_t* checked_slots(const OptTensor& indices, int64_t B, int64_t num_slots, const char* op, const char* name);

namespace cpu {
enum class Isa { portable, avx2, avx512, avx512_bf16, amx };  // amx: the kernels of avx512_bf16, with tiles
// Chosen once: TERRAZZO_CPU_ISA, else the best that this machine runs. Throws if a forced one cannot run.
Isa isa();
const char* isa_name();

// How often each kernel ran: the proof of which backend served a call.
#define TZ_ENUM(name, Params) name##_id,
enum KernelId { TZ_CPU_KERNELS(TZ_ENUM) kNumKernels };
#undef TZ_ENUM
void count(KernelId id);
uint64_t kernel_count(int id);
void reset_kernel_counts();
extern const char* const kKernelNames[kNumKernels];

// The build decides which ISAs are in (setup.py defines TZ_BUILD_<ISA>); portable always is.
#ifdef TZ_BUILD_AVX512_BF16
#define TZ_AVX512_BF16(name) case Isa::avx512_bf16: case Isa::amx: return avx512_bf16::name(params);
#else
#define TZ_AVX512_BF16(name)
#endif
#ifdef TZ_BUILD_AVX512
#define TZ_AVX512(name) case Isa::avx512: return avx512::name(params);
#else
#define TZ_AVX512(name)
#endif
#ifdef TZ_BUILD_AVX2
#define TZ_AVX2(name) case Isa::avx2: return avx2::name(params);
#else
#define TZ_AVX2(name)
#endif
#define TZ_RUN(name, Params)                      \
  inline void run_##name(const Params& params) {  \
    count(name##_id);                             \
    switch (isa()) {                              \
      TZ_AVX512_BF16(name)                        \
      TZ_AVX512(name)                             \
      TZ_AVX2(name)                               \
      default: return portable::name(params);     \
    }                                             \
  }
TZ_CPU_KERNELS(TZ_RUN)
#undef TZ_RUN
}  // namespace cpu

// TZ_RUN_WHERE(x, kernel, params): the kernel of x's device. setup.py defines TZ_WITH_CUDA where the CUDA kernels are built in. With
// TZ_CUDA_EMULATED, the tests' build, they are called on CPU tensors, see csrc/emulator. TZ_RUN_CUDA: the same for x on a GPU, of a
// kernel that the CPU has none of.
#if defined(TZ_CUDA_EMULATED)
inline bool runs_on_cpu(const Tensor&) { return false; }
namespace cuda {
void check_launch(cudaError_t error, const char* kernel);
}
#define TZ_RUN_WHERE(x, name, params) cuda::check_launch(cuda::name##_cuda(params, nullptr), #name)
#define TZ_RUN_CUDA(x, name, params) TZ_RUN_WHERE(x, name, params)
#elif defined(TZ_WITH_CUDA)
inline bool runs_on_cpu(const Tensor& x) { return x.is_cpu(); }
namespace cuda {
// The current stream of t's GPU.
cudaStream_t current_stream(const Tensor& t);
// Raises with the kernel's name when a launch failed, else counts it.
void check_launch(cudaError_t error, cpu::KernelId id);
void check_launch(cudaError_t error, const char* kernel);  // counts nothing
template <class Kernel, class P, class Q> void run(const Tensor& x, Kernel kernel, cudaError_t (*launcher)(const P&, cudaStream_t), const Q& params) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  check_launch(launcher(params, current_stream(x)), kernel);
}
}  // namespace cuda
#define TZ_RUN_WHERE(x, name, params) (runs_on_cpu(x) ? cpu::run_##name(params) : cuda::run(x, cpu::name##_id, cuda::name##_cuda, params))
#define TZ_RUN_CUDA(x, name, params) cuda::run(x, #name, cuda::name##_cuda, params)
#else
inline bool runs_on_cpu(const Tensor&) { return true; }
#define TZ_RUN_WHERE(x, name, params) cpu::run_##name(params)
#define TZ_RUN_CUDA(x, name, params) static_cast<void>(params)
#endif

// A device that TZ_RUN_WHERE has kernels for. That a call's tensors lie on one GPU is checked for all ops at once (library.cpp).
inline void check_device(const Tensor& t, const char* op, const char* name) {
#if defined(TZ_WITH_CUDA)
  TZ_CHECK(t.is_cpu() || t.is_cuda(), op, name, " must be on the CPU or on a CUDA device");
#else
  check_cpu(t, op, name);
#endif
}

namespace cuda {
// What the binary holds, for Python; all empty or zero without CUDA kernels.
const char* archs();     // "sm_80 sm_90a compute_100": machine code, and PTX for what is newer
int toolkit_version();   // 13000: of CUDA 13.0
int driver_version();    // the newest CUDA that this machine's driver runs, 0 without one
// What is said on a GPU that none of archs() runs on.
std::string missing_capability(int major, int minor);
uint64_t kernel_count(int id);
void reset_kernel_counts();
}  // namespace cuda

// The ops themselves (csrc/library.cpp holds their schemas).
std::tuple<Tensor, Tensor> causal_conv1d_fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias,
    const OptTensor& seq_idx, const OptTensor& cu_seqlens, const OptTensor& initial_states, bool return_final_states, bool silu);
std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
    const OptTensor& bias, const OptTensor& seq_idx, const OptTensor& cu_seqlens, const OptTensor& initial_states,
    const OptTensor& dfinal_states, bool silu);
Tensor causal_conv1d_update(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptTensor& bias, bool silu,
    const OptTensor& cache_seqlens, const OptTensor& conv_state_indices);
Tensor causal_conv1d_varlen_states(const Tensor& x, const Tensor& cu_seqlens, int64_t state_len);
std::tuple<Tensor, Tensor> chunk_scan_fwd(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias, const OptTensor& initial_states, const OptTensor& seq_idx,
    const OptTensor& cu_seqlens, bool dt_softplus, double dt_min, double dt_max, bool return_final_states);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> chunk_scan_bwd(const Tensor& dy,
    const OptTensor& dfinal_states, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptTensor& D, const OptTensor& dt_bias, const OptTensor& initial_states, const OptTensor& seq_idx,
    const OptTensor& cu_seqlens, bool dt_softplus, double dt_min, double dt_max);
// The same into y and dx, which may be some heads of a larger tensor; on the CPU alone.
Tensor chunk_scan_fwd_into(const Tensor& y, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias, const OptTensor& initial_states, const OptTensor& seq_idx,
    const OptTensor& cu_seqlens, bool dt_softplus, double dt_min, double dt_max, bool return_final_states);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> chunk_scan_bwd_into(const Tensor& dx, const Tensor& dy,
    const OptTensor& dfinal_states, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptTensor& D, const OptTensor& dt_bias, const OptTensor& initial_states, const OptTensor& seq_idx,
    const OptTensor& cu_seqlens, bool dt_softplus, double dt_min, double dt_max);
Tensor selective_state_update(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
    const Tensor& C, const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias, bool dt_softplus,
    const OptTensor& state_batch_indices);
Tensor rmsnorm_gated_fwd(const Tensor& x, const Tensor& weight, const OptTensor& z, double eps, int64_t group_size,
    bool norm_before_gate);
std::tuple<Tensor, Tensor, Tensor> rmsnorm_gated_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, const OptTensor& z,
    double eps, int64_t group_size, bool norm_before_gate);
Tensor grouped_gemm_fwd(const Tensor& a, const Tensor& b, const Tensor& offs, const OptTensor& bias);
Tensor grouped_wgrad_fwd(const Tensor& a, const Tensor& b, const Tensor& offs);
std::tuple<Tensor, Tensor> grouped_wgrad_bwd(const Tensor& dy, const Tensor& a, const Tensor& b, const Tensor& offs);
std::tuple<Tensor, Tensor, Tensor> grouped_gemm_bwd(const Tensor& dy, const Tensor& a, const Tensor& b, const Tensor& offs, bool need_a,
    bool need_b, bool need_bias);
std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, bool need_x, bool need_weight,
    bool need_bias);
Tensor linear_fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias, int64_t activation);
Tensor norm_linear(const Tensor& x, const Tensor& weight, const OptTensor& weight2, const OptTensor& weight3, const OptTensor& norm_weight, double eps,
    int64_t activation, bool gated, const OptTensor& residual);
std::tuple<Tensor, Tensor> fused_experts_fwd(const Tensor& x, const Tensor& w1, const OptTensor& w_up, const Tensor& w2,
    const Tensor& weights, const Tensor& indices, const OptTensor& bias1, const OptTensor& bias_up, const OptTensor& bias2,
    int64_t activation, bool interleaved, double alpha, double limit, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts_bwd(const Tensor& dy, const Tensor& x, const Tensor& w1, const OptTensor& w_up, const Tensor& w2,
    const Tensor& weights, const Tensor& indices, const OptTensor& bias1, const OptTensor& bias_up, const OptTensor& bias2,
    int64_t activation, bool interleaved, double alpha, double limit,
    const Tensor& saved, bool need_x, bool need_weights);
Tensor grouped_gemm_packed(const Tensor& a, const Tensor& b, const OptTensor& scale, const Tensor& offs, const OptTensor& bias, int64_t N);
Tensor fused_experts_packed(const Tensor& x, const Tensor& w1, const OptTensor& w_up, const Tensor& w2, const OptTensor& scale1,
    const OptTensor& scale_up, const OptTensor& scale2, const Tensor& weights, const Tensor& indices, const OptTensor& bias1, const OptTensor& bias_up,
    const OptTensor& bias2, int64_t N1, int64_t F, int64_t activation, bool interleaved, double alpha, double limit);
std::tuple<Tensor, Tensor> moe_route_fwd(const Tensor& logits, const OptTensor& bias, int64_t top_k, double norm_order, bool softmax_first,
    bool sigmoid, int64_t n_group, int64_t topk_group, double scale);
Tensor moe_route_bwd(const Tensor& dweights, const Tensor& logits, const Tensor& indices, double norm_order, bool softmax_first, bool sigmoid,
    double scale);
std::tuple<Tensor, Tensor, Tensor> moe_permute(const Tensor& indices, int64_t num_experts);
Tensor moe_unpermute_fwd(const Tensor& rows, const Tensor& inverse, const Tensor& weights);
std::tuple<Tensor, Tensor> moe_unpermute_bwd(const Tensor& dy, const Tensor& rows, const Tensor& inverse, const Tensor& weights);
// patches and local attention
Tensor patch_reduce_fwd(const Tensor& h, const Tensor& patch_ids, int64_t num_patches, int64_t reduce);
Tensor patch_reduce_bwd(const Tensor& dy, const Tensor& h, const Tensor& y, const Tensor& patch_ids, int64_t reduce);
Tensor patch_cross_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& patch_ids, int64_t num_patches,
    bool bytes_ask, int64_t k_per_patch, double scale, int64_t window, const OptTensor& key_mask, const OptTensor& cu_seqlens);
std::tuple<Tensor, Tensor, Tensor> patch_cross_attention_bwd(const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& patch_ids, int64_t num_patches, bool bytes_ask, int64_t k_per_patch, double scale, int64_t window,
    const OptTensor& key_mask, const OptTensor& cu_seqlens);
std::tuple<Tensor, Tensor> local_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window, bool causal, double scale,
    const OptTensor& key_mask, const OptTensor& cu_seqlens);
std::tuple<Tensor, Tensor, Tensor> local_attention_bwd(const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& y,
    const Tensor& lse, int64_t window, bool causal, double scale, const OptTensor& key_mask, const OptTensor& cu_seqlens);
Tensor attention_update(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, int64_t length, const OptTensor& lengths, const OptTensor& cos,
    const OptTensor& sin, bool interleaved, int64_t window, double scale);
// byte-latent
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> entropy_patch_fwd(const Tensor& logits, double threshold, int64_t rule, double threshold_add,
    double patch_size, int64_t max_length, const OptTensor& cu_seqlens, const OptTensor& valid_lengths, bool next);
Tensor entropy_patch_bwd(const Tensor& dentropies, const Tensor& logits, const OptTensor& valid_lengths);
std::tuple<Tensor, Tensor, Tensor, Tensor> patch_cut(const Tensor& source, double threshold, int64_t rule, double threshold_add, double patch_size,
    int64_t max_length, int64_t offset, const OptTensor& cu_seqlens, const OptTensor& valid_lengths, bool next);
std::tuple<Tensor, Tensor> patcher_update(const Tensor& entropies, const Tensor& state, const Tensor& before, double threshold, int64_t rule,
    double threshold_add, int64_t max_length);
Tensor patch_ids(const Tensor& lengths, int64_t length);
Tensor byte_hash_ids(const Tensor& tokens, std::vector<int64_t> group_sizes, int64_t num_functions, int64_t vocab, const OptTensor& cu_seqlens);
Tensor byte_hash_embedding_fwd(const Tensor& tokens, const Tensor& table, const Tensor& byte_embedding, std::vector<int64_t> group_sizes,
    int64_t num_functions, int64_t vocab, const OptTensor& cu_seqlens, bool sparse_grad);
std::tuple<Tensor, Tensor, Tensor> byte_hash_embedding_bwd(const Tensor& dy, const Tensor& tokens, const Tensor& table_like, int64_t table_rows,
    const Tensor& byte_like, int64_t byte_rows, std::vector<int64_t> group_sizes, int64_t num_functions, int64_t vocab, const OptTensor& cu_seqlens,
    bool sparse_grad, bool need_table, bool need_bytes);
double calibrate(const Tensor& buffer, int64_t kind, int64_t iterations);

}  // namespace terrazzo
