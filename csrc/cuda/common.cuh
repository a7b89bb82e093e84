// What every CUDA kernel here is written in: dtypes, 16-byte vectors, sums over warps and blocks, shared memory, launches.
// Compiled by nvcc, and by g++ against csrc/emulator for the tests.
#pragma once
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define TZ_DEVICE __device__ __forceinline__
// Arrays in shared memory: a fixed number of elements, or as many as the launch asks for (one such array a kernel).
#define TZ_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define TZ_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char tz_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(tz_dynamic_shared)
#else
#include "../emulator/emulator.h"
#define TZ_DEVICE inline __attribute__((always_inline))
#define TZ_SHARED(T, name, count)      \
  static const char name##_key = 0;    \
  T(&name)[count] = *static_cast<T(*)[count]>(::emu::static_shared(&name##_key, sizeof(T) * (count)))
#define TZ_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::emu::dynamic_shared())
#endif

#include <cstdint>
#include <utility>

#include "../common/params.h"

namespace terrazzo { namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVectorBytes = 16;

template <class A, class B> __host__ __device__ constexpr auto ceil_div(A a, B b) { return (a + b - 1) / b; }

// ---- dtypes: elements are stored in T and computed with in float --------------------------------------------
TZ_DEVICE float to_float(float x) { return x; }
TZ_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
TZ_DEVICE float to_float(__half x) { return __half2float(x); }
TZ_DEVICE void from_float(float x, float& out) { out = x; }
TZ_DEVICE void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16(x); }
TZ_DEVICE void from_float(float x, __half& out) { out = __float2half(x); }

// f(T{}) for the type of a dtype; the launchers' way from a runtime dtype to a kernel.
template <class F> cudaError_t with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(__nv_bfloat16{});
    case DType::f16: return f(__half{});
    default: return cudaErrorInvalidValue;
  }
}
inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// ---- vectors: n neighbours in one access of at most 16 bytes ------------------------------------------------
template <class T, int n> struct alignas(sizeof(T) * n) Vector {
  static_assert(sizeof(T) * n <= kVectorBytes, "one access moves at most 16 bytes");
  T data[n];
};
template <class T, int n> TZ_DEVICE Vector<T, n> load_vector(const T* p) {
#if !defined(__CUDACC__)
  ::emu::check_aligned(p, sizeof(T) * n);
#endif
  return *reinterpret_cast<const Vector<T, n>*>(p);
}
template <class T, int n> TZ_DEVICE void store_vector(const Vector<T, n>& v, T* p) {
#if !defined(__CUDACC__)
  ::emu::check_aligned(p, sizeof(T) * n);
#endif
  *reinterpret_cast<Vector<T, n>*>(p) = v;
}
template <class T, int n> TZ_DEVICE void to_floats(const Vector<T, n>& v, float (&out)[n]) {
#pragma unroll
  for (int i = 0; i < n; i++) out[i] = to_float(v.data[i]);
}
template <class T, int n> TZ_DEVICE Vector<T, n> to_vector(const float (&v)[n]) {
  Vector<T, n> out;
#pragma unroll
  for (int i = 0; i < n; i++) from_float(v[i], out.data[i]);
  return out;
}

// n neighbours as floats, in as many accesses as they need. Aligned like the accesses.
template <class T, int n> TZ_DEVICE void load_floats(const T* p, float (&out)[n]) {
  constexpr int kPiece = sizeof(T) * n <= kVectorBytes ? n : kVectorBytes / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < n; i += kPiece) {
    const Vector<T, kPiece> v = load_vector<T, kPiece>(p + i);
#pragma unroll
    for (int j = 0; j < kPiece; j++) out[i + j] = to_float(v.data[j]);
  }
}
// The same of a tensor whose dtype is known only here: for operands small beside the rest, weights and per-head parameters.
template <int n> TZ_DEVICE void load_floats(DType dtype, const void* base, int64_t offset, float (&out)[n]) {
  if (dtype == DType::f32) load_floats(static_cast<const float*>(base) + offset, out);
  else if (dtype == DType::bf16) load_floats(static_cast<const __nv_bfloat16*>(base) + offset, out);
  else load_floats(static_cast<const __half*>(base) + offset, out);
}
// One of them, in two steps: converting takes a branch, which waits for the load, so several are all loaded before the first is converted.
struct Element {
  uint32_t bits;
};
TZ_DEVICE Element load_element(DType dtype, const void* base, int64_t offset) {
  if (dtype == DType::f32) return {__float_as_uint(static_cast<const float*>(base)[offset])};
  return {__bfloat16_as_ushort(static_cast<const __nv_bfloat16*>(base)[offset])};  // or a half, as it is
}
TZ_DEVICE float to_float(DType dtype, Element v) {
  if (dtype != DType::f16) return __uint_as_float(dtype == DType::f32 ? v.bits : v.bits << 16);
  return to_float(__ushort_as_half(static_cast<unsigned short>(v.bits)));
}
TZ_DEVICE float load_float(DType dtype, const void* base, int64_t offset) { return to_float(dtype, load_element(dtype, base, offset)); }
// Floats as n neighbours, in as many accesses as they need.
template <class T, int n> TZ_DEVICE void store_floats(const float (&v)[n], T* p) {
  constexpr int kPiece = sizeof(T) * n <= kVectorBytes ? n : kVectorBytes / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < n; i += kPiece) {
    Vector<T, kPiece> out;
#pragma unroll
    for (int j = 0; j < kPiece; j++) from_float(v[i + j], out.data[j]);
    store_vector(out, p + i);
  }
}
template <int n> TZ_DEVICE void store_floats(const float (&v)[n], DType dtype, void* base, int64_t offset) {
  if (dtype == DType::f32) store_floats(v, static_cast<float*>(base) + offset);
  else if (dtype == DType::bf16) store_floats(v, static_cast<__nv_bfloat16*>(base) + offset);
  else store_floats(v, static_cast<__half*>(base) + offset);
}
TZ_DEVICE void store_float(float v, DType dtype, void* base, int64_t offset) {
  if (dtype == DType::f32) static_cast<float*>(base)[offset] = v;
  else if (dtype == DType::bf16) from_float(v, static_cast<__nv_bfloat16*>(base)[offset]);
  else from_float(v, static_cast<__half*>(base)[offset]);
}

// Whether rows that start at p and step by `stride` elements can be read in accesses of 16 bytes. Null can.
inline bool aligned(const void* p, int64_t stride, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0 && (!p || stride * element_bytes % kVectorBytes == 0);
}

// ---- sums, always added in the same order --------------------------------------------------------------------
// Over `width` neighbouring lanes, a power of two; every lane gets the sum.
template <class T> TZ_DEVICE T warp_sum(T v, int width = kWarp) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes; lanes /= 2)
    if (lanes < width) v += __shfl_xor_sync(kAllLanes, v, lanes);
  return v;
}
// The same of the largest; NaN is no number here.
TZ_DEVICE float warp_max(float v, int width = kWarp) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes; lanes /= 2)
    if (lanes < width) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, lanes));
  return v;
}

// n sums over kThreads threads, all of a block. Every thread gets them.
template <int kThreads, int n> TZ_DEVICE void block_sum(float (&v)[n]) {
  constexpr int kWarps = kThreads / kWarp;
  TZ_SHARED(float, warps_smem, kWarps * n);
#pragma unroll
  for (int i = 0; i < n; i++) {
    v[i] = warp_sum(v[i]);
    if (threadIdx.x % kWarp == 0) warps_smem[threadIdx.x / kWarp * n + i] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; i++) {
    v[i] = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) v[i] += warps_smem[w * n + i];
  }
  __syncthreads();  // the next call overwrites
}

// A block that adds up partial sums has kSumColumns columns, each for kColumnSumThreads / kSumColumns threads in turn: thread (i, c) adds the
// rows i, i + that, ... of its column, `stride` elements apart, and the first of them gets the sum.
constexpr int kSumColumns = 32, kColumnSumThreads = 256;
TZ_DEVICE float column_sum(const float* __restrict__ column, int64_t rows, int64_t stride, bool exists) {
  constexpr int kRows = kColumnSumThreads / kSumColumns;
  TZ_SHARED(float, sums_smem, kColumnSumThreads);
  const int first = threadIdx.x / kSumColumns;
  float sum = 0;
  if (exists) {
#pragma unroll 4
    for (int64_t r = first; r < rows; r += kRows) sum += column[r * stride];
  }
  sums_smem[threadIdx.x] = sum;
  __syncthreads();
  if (first == 0) {
#pragma unroll
    for (int i = 1; i < kRows; i++) sum += sums_smem[i * kSumColumns + threadIdx.x];
  }
  return sum;
}

// ---- functions -----------------------------------------------------------------------------------------------
TZ_DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }
TZ_DEVICE float silu(float x) { return x * sigmoid(x); }
TZ_DEVICE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// ---- launches ------------------------------------------------------------------------------------------------
// Multiprocessors of the current GPU, for grids whose blocks walk over tiles.
inline int num_processors() {
#if defined(__CUDACC__)
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return processors > 0 ? processors : 1;
#else
  return ::emu::kProcessors;
#endif
}

constexpr size_t kSharedWithoutAsking = 48 * 1024;

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream, A&&... args) {
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...);
}

}}  // namespace terrazzo::cuda
