// Every native schema on one screen, and the Python module that loads them.
#include <Python.h>

#include "bindings/glue.h"
#include "common/parallel.h"
#include "cuda/ops.h"

STABLE_TORCH_LIBRARY(terrazzo, m) {
  // causal depthwise convolution: states are (sequences, D, W-1); absent outputs come back empty
  m.def("causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? cu_seqlens, Tensor? initial_states, bool return_final_states, bool silu) -> (Tensor, Tensor)");
  m.def("causal_conv1d_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? cu_seqlens, Tensor? initial_states, Tensor? dfinal_states, bool silu) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, Tensor? cache_seqlens, Tensor? conv_state_indices) -> Tensor");
  m.def("causal_conv1d_varlen_states(Tensor x, Tensor cu_seqlens, int state_len) -> Tensor");
  // Mamba-2
  m.def("chunk_scan_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, float dt_min, float dt_max, bool return_final_states) -> (Tensor, Tensor)");
  m.def("chunk_scan_bwd(Tensor dy, Tensor? dfinal_states, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, float dt_min, float dt_max) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // into y and dx, which may be some heads of a larger tensor: for scans whose blocks of heads go from rank to rank, on CPUs alone
  m.def("chunk_scan_fwd_into(Tensor(a!) y, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, float dt_min, float dt_max, bool return_final_states) -> Tensor");
  m.def("chunk_scan_bwd_into(Tensor(a!) dx, Tensor dy, Tensor? dfinal_states, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, float dt_min, float dt_max) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices) -> Tensor");
  m.def("rmsnorm_gated_fwd(Tensor x, Tensor weight, Tensor? z, float eps, int group_size, bool norm_before_gate) -> Tensor");
  m.def("rmsnorm_gated_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? z, float eps, int group_size, bool norm_before_gate) -> (Tensor, Tensor, Tensor)");
  // mixture of experts and linear layers: b is (E, K, N) in any strides, offs the row ends of the groups
  m.def("grouped_gemm_fwd(Tensor a, Tensor b, Tensor offs, Tensor? bias) -> Tensor");
  m.def("grouped_wgrad_fwd(Tensor a, Tensor b, Tensor offs) -> Tensor");
  m.def("grouped_wgrad_bwd(Tensor dy, Tensor a, Tensor b, Tensor offs) -> (Tensor, Tensor)");
  m.def("grouped_gemm_bwd(Tensor dy, Tensor a, Tensor b, Tensor offs, bool need_a, bool need_b, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("linear_bwd(Tensor dy, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("norm_linear(Tensor x, Tensor weight, Tensor? weight2, Tensor? weight3, Tensor? norm_weight, float eps, int activation, bool gated, Tensor? residual) -> Tensor");
  m.def("linear_fwd(Tensor x, Tensor weight, Tensor? bias, int activation) -> Tensor");
  m.def("fused_experts_fwd(Tensor x, Tensor w1, Tensor? w_up, Tensor w2, Tensor topk_weights, Tensor topk_indices, Tensor? bias1, Tensor? bias_up, Tensor? bias2, int activation, bool interleaved, float alpha, float limit, bool save) -> (Tensor, Tensor)");
  m.def("fused_experts_bwd(Tensor dy, Tensor x, Tensor w1, Tensor? w_up, Tensor w2, Tensor topk_weights, Tensor topk_indices, Tensor? bias1, Tensor? bias_up, Tensor? bias2, int activation, bool interleaved, float alpha, float limit, Tensor saved, bool need_x, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // weights packed by pack_weight: (experts, panels, K, 16), for inference alone
  m.def("grouped_gemm_packed(Tensor a, Tensor b, Tensor? scale, Tensor offs, Tensor? bias, int N) -> Tensor");
  m.def("fused_experts_packed(Tensor x, Tensor w1, Tensor? w_up, Tensor w2, Tensor? scale1, Tensor? scale_up, Tensor? scale2, Tensor topk_weights, Tensor topk_indices, Tensor? bias1, Tensor? bias_up, Tensor? bias2, int N1, int F, int activation, bool interleaved, float alpha, float limit) -> Tensor");
  m.def("moe_route_fwd(Tensor logits, Tensor? bias, int top_k, float norm_order, bool softmax_first, bool sigmoid, int n_group, int topk_group, float scale) -> (Tensor, Tensor)");
  m.def("moe_route_bwd(Tensor dweights, Tensor logits, Tensor indices, float norm_order, bool softmax_first, bool sigmoid, float scale) -> Tensor");
  m.def("moe_permute(Tensor indices, int num_experts) -> (Tensor, Tensor, Tensor)");
  m.def("moe_unpermute_fwd(Tensor rows, Tensor inverse, Tensor weights) -> Tensor");
  m.def("moe_unpermute_bwd(Tensor dy, Tensor rows, Tensor inverse, Tensor weights) -> (Tensor, Tensor)");
  // patches and local attention: q is (B, queries, H, P), k and v (B, keys, Hk, P), patch_ids (B, L)
  m.def("patch_reduce_fwd(Tensor h, Tensor patch_ids, int num_patches, int reduce) -> Tensor");
  m.def("patch_reduce_bwd(Tensor dy, Tensor h, Tensor y, Tensor patch_ids, int reduce) -> Tensor");
  m.def("patch_cross_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor patch_ids, int num_patches, bool bytes_ask, int k_per_patch, float scale, int window, Tensor? key_mask, Tensor? cu_seqlens) -> Tensor");
  m.def("patch_cross_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor patch_ids, int num_patches, bool bytes_ask, int k_per_patch, float scale, int window, Tensor? key_mask, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)");
  m.def("local_attention_fwd(Tensor q, Tensor k, Tensor v, int window, bool causal, float scale, Tensor? key_mask, Tensor? cu_seqlens) -> (Tensor, Tensor)");
  m.def("local_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, int window, bool causal, float scale, Tensor? key_mask, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)");
  // decoding: qkv is (B, (H + 2 Hk) P), the caches (B, Hk, slots, P), cos and sin (B or 1, pairs of channels)
  m.def("attention_update(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, int length, Tensor? lengths, Tensor? cos, Tensor? sin, bool interleaved, int window, float scale) -> Tensor");
  // byte-latent: patches (rule is PatchRule; lengths come zero-padded to the width of ids) and hash embeddings
  m.def("entropy_patch_fwd(Tensor logits, float threshold, int rule, float threshold_add, float patch_size, int max_length, Tensor? cu_seqlens, Tensor? valid_lengths, bool next) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("entropy_patch_bwd(Tensor dentropies, Tensor logits, Tensor? valid_lengths) -> Tensor");
  m.def("patch_cut(Tensor source, float threshold, int rule, float threshold_add, float patch_size, int max_length, int offset, Tensor? cu_seqlens, Tensor? valid_lengths, bool next) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("patcher_update(Tensor entropies, Tensor(a!) state, Tensor(b!) before, float threshold, int rule, float threshold_add, int max_length) -> (Tensor, Tensor)");
  m.def("patch_ids(Tensor lengths, int length) -> Tensor");
  m.def("byte_hash_ids(Tensor tokens, int[] group_sizes, int num_functions, int vocab, Tensor? cu_seqlens) -> Tensor");
  m.def("byte_hash_embedding_fwd(Tensor tokens, Tensor table, Tensor byte_embedding, int[] group_sizes, int num_functions, int vocab, Tensor? cu_seqlens, bool sparse_grad) -> Tensor");
  m.def("byte_hash_embedding_bwd(Tensor dy, Tensor tokens, Tensor table_like, int table_rows, Tensor byte_like, int byte_rows, int[] group_sizes, int num_functions, int vocab, Tensor? cu_seqlens, bool sparse_grad, bool need_table, bool need_bytes) -> (Tensor, Tensor, Tensor)");
  // measuring this machine: see bench/roofline.py
  m.def("calibrate(Tensor(a!) buffer, int kind, int iterations) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(terrazzo, CPU, m) {
#define TZ_IMPL(name) m.impl(#name, TORCH_BOX(&terrazzo::name))
  TZ_IMPL(causal_conv1d_fwd);
  TZ_IMPL(causal_conv1d_bwd);
  TZ_IMPL(causal_conv1d_update);
  TZ_IMPL(causal_conv1d_varlen_states);
  TZ_IMPL(chunk_scan_fwd);
  TZ_IMPL(chunk_scan_bwd);
  TZ_IMPL(chunk_scan_fwd_into);
  TZ_IMPL(chunk_scan_bwd_into);
  TZ_IMPL(selective_state_update);
  TZ_IMPL(rmsnorm_gated_fwd);
  TZ_IMPL(rmsnorm_gated_bwd);
  TZ_IMPL(grouped_gemm_fwd);
  TZ_IMPL(grouped_wgrad_fwd);
  TZ_IMPL(grouped_wgrad_bwd);
  TZ_IMPL(grouped_gemm_bwd);
  TZ_IMPL(norm_linear);
  TZ_IMPL(linear_bwd);
  TZ_IMPL(linear_fwd);
  TZ_IMPL(fused_experts_fwd);
  TZ_IMPL(fused_experts_bwd);
  TZ_IMPL(grouped_gemm_packed);
  TZ_IMPL(fused_experts_packed);
  TZ_IMPL(moe_route_fwd);
  TZ_IMPL(moe_route_bwd);
  TZ_IMPL(moe_permute);
  TZ_IMPL(moe_unpermute_fwd);
  TZ_IMPL(moe_unpermute_bwd);
  TZ_IMPL(patch_reduce_fwd);
  TZ_IMPL(patch_reduce_bwd);
  TZ_IMPL(patch_cross_attention_fwd);
  TZ_IMPL(patch_cross_attention_bwd);
  TZ_IMPL(local_attention_fwd);
  TZ_IMPL(local_attention_bwd);
  TZ_IMPL(attention_update);
  TZ_IMPL(entropy_patch_fwd);
  TZ_IMPL(entropy_patch_bwd);
  TZ_IMPL(patch_cut);
  TZ_IMPL(patcher_update);
  TZ_IMPL(patch_ids);
  TZ_IMPL(byte_hash_ids);
  TZ_IMPL(byte_hash_embedding_fwd);
  TZ_IMPL(byte_hash_embedding_bwd);
  TZ_IMPL(calibrate);
#undef TZ_IMPL
}

#if defined(TZ_WITH_CUDA)
namespace {

// torch takes the CUDA implementation as soon as one tensor is on a GPU: here all must be, and on the same one.
class OneDevice {
 public:
  void operator()(const terrazzo::Tensor& t) {
    if (!first_) first_ = &t;
    STD_TORCH_CHECK(t.is_cuda() && t.get_device() == first_->get_device(), "terrazzo: all tensors of one call must be on the same CUDA device, got ",
                    name(*first_), " and ", name(t));
  }
  void operator()(const terrazzo::OptTensor& t) {
    if (t) (*this)(*t);
  }
  template <class T> void operator()(const T&) {}

 private:
  static std::string name(const terrazzo::Tensor& t) {
    return t.is_cuda() ? "cuda:" + std::to_string(t.get_device()) : t.is_cpu() ? "cpu" : "another device";
  }
  const terrazzo::Tensor* first_ = nullptr;
};

template <auto op> struct OnOneDevice;
template <class R, class... Args, R (*op)(Args...)> struct OnOneDevice<op> {
  static R run(Args... args) {
    OneDevice check;
    (check(args), ...);
    return op(args...);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(terrazzo, CUDA, m) {
#define TZ_IMPL(name) m.impl(#name, TORCH_BOX(&OnOneDevice<&terrazzo::name>::run));
  TZ_CUDA_OPS(TZ_IMPL)
#undef TZ_IMPL
}
#endif

namespace {

PyObject* counts_of(uint64_t (*count)(int)) {
  PyObject* counts = PyDict_New();
  for (int i = 0; counts && i < terrazzo::cpu::kNumKernels; i++) {
    PyObject* n = PyLong_FromUnsignedLongLong(count(i));
    if (!n || PyDict_SetItemString(counts, terrazzo::cpu::kKernelNames[i], n) < 0) {
      Py_XDECREF(n);
      Py_DECREF(counts);
      return nullptr;
    }
    Py_DECREF(n);
  }
  return counts;
}

PyObject* kernel_counts(PyObject*, PyObject*) { return counts_of(&terrazzo::cpu::kernel_count); }
PyObject* cuda_kernel_counts(PyObject*, PyObject*) { return counts_of(&terrazzo::cuda::kernel_count); }

PyObject* reset_kernel_counts(PyObject*, PyObject*) {
  terrazzo::cpu::reset_kernel_counts();
  terrazzo::cuda::reset_kernel_counts();
  Py_RETURN_NONE;
}

PyObject* isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(terrazzo::cpu::isa_name());
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
}

PyObject* second_level_cache(PyObject*, PyObject*) { return PyLong_FromLongLong(terrazzo::second_level_cache()); }

PyObject* assume_second_level_cache(PyObject*, PyObject* bytes) {
  const long long number = PyLong_AsLongLong(bytes);
  if (number == -1 && PyErr_Occurred()) return nullptr;
  terrazzo::assume_second_level_cache(number);
  Py_RETURN_NONE;
}

PyObject* poison_new_tensors(PyObject*, PyObject* poison) {
  const int truth = PyObject_IsTrue(poison);
  if (truth < 0) return nullptr;
  terrazzo::poison_new_tensors(truth == 1);
  Py_RETURN_NONE;
}

#define TZ_NAME(name) #name " "
PyObject* cuda(PyObject*, PyObject*) {
  if (!*terrazzo::cuda::archs()) Py_RETURN_NONE;
  return Py_BuildValue("{s:s,s:s,s:i,s:i}", "archs", terrazzo::cuda::archs(), "ops", TZ_CUDA_OPS(TZ_NAME) "", "toolkit", terrazzo::cuda::toolkit_version(),
                       "driver", terrazzo::cuda::driver_version());
}
#undef TZ_NAME

PyObject* missing_capability(PyObject*, PyObject* args) {
  int major = 0, minor = 0;
  if (!PyArg_ParseTuple(args, "ii", &major, &minor)) return nullptr;
  return PyUnicode_FromString(terrazzo::cuda::missing_capability(major, minor).c_str());
}

PyMethodDef methods[] = {
    {"kernel_counts", kernel_counts, METH_NOARGS, "How often each native CPU kernel ran."},
    {"cuda_kernel_counts", cuda_kernel_counts, METH_NOARGS, "How often each CUDA kernel was launched."},
    {"cuda", cuda, METH_NOARGS, "None without CUDA kernels, else what they were built for, their ops, and the versions of CUDA."},
    {"missing_capability", missing_capability, METH_VARARGS, "What is said on a GPU of this compute capability, if it has no kernels."},
    {"reset_kernel_counts", reset_kernel_counts, METH_NOARGS, "Sets every count to zero."},
    {"isa", isa, METH_NOARGS, "The ISA build in use: portable, avx2, avx512, avx512_bf16 or amx."},
    {"second_level_cache", second_level_cache, METH_NOARGS, "Bytes of a core's second-level cache, 0 where unknown."},
    {"assume_second_level_cache", assume_second_level_cache, METH_O, "Another second_level_cache() (for tests); negative: the machine's."},
    {"poison_new_tensors", poison_new_tensors, METH_O, "Whether outputs are filled with NaN before a kernel writes them (for tests)."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
