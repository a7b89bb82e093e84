// CUDA for g++: what a kernel and its launcher find in the place of <cuda_runtime.h>, so that the file nvcc compiles runs on a
// CPU under test. One fiber per CUDA thread, one block at a time; see README.md here for what is checked.
//
// The real CUDA headers supply the types (bf16, half, float4, dim3, cudaLaunchConfig_t); this one supplies the functions.
// Functions that threads meet in take the caller's source line, for the checks and their messages.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>
#include <tuple>
#include <type_traits>

#undef __launch_bounds__
#define __launch_bounds__(...)

inline dim3 blockDim, gridDim;  // variables, not macros: cudaLaunchConfig_t has members of these names

namespace emu {

using Site = std::source_location;
constexpr int kProcessors = 2;  // so few that blocks which walk over tiles have several each

// The running CUDA thread.
struct Thread {
  uint3 index, block;
  int number, lane;  // number within the block
};
extern Thread* current;

enum class Order { forward, reversed, random };
struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;
};
extern Options options;
struct Statistics {
  int64_t launches, ldmatrix, bank_conflicts;  // conflicts: wavefronts of ldmatrix beyond the first of each 8 x 8 matrix
};
extern Statistics statistics;
extern std::string last_error;                 // of the last launch that failed

[[noreturn]] void fail(const std::string& what, Site site);  // ends the launch; the message names block, thread and line
void check_aligned(const void* p, size_t bytes, Site site = Site::current());

void* static_shared(const void* key, size_t bytes);  // this block's variable of that key, filled with NaN at first sight
void* dynamic_shared();
// The offset in this block's dynamic shared memory; fails unless [p, p + bytes) lies inside.
uint32_t shared_offset(const void* p, size_t bytes, Site site);

int barrier(bool predicate, Site site);  // how many threads brought a true predicate

// Every lane of the mask brings `in` and `out`; when all are there, combine runs once for all of them.
struct Lanes {
  uint32_t mask;
  const void* in[32];
  void* out[32];
};
enum class Collective { syncwarp, shuffle, vote, ldmatrix, mma };
void collective(uint32_t mask, Collective kind, const char* name, const void* in, void* out, void (*combine)(const Lanes&), Site site);

void count_ldmatrix(int conflicts);  // in the runtime: kernels may be compiled for the race detector

// Copies happen as late as they may, at the wait; until then the destination is NaN.
void async_copy(void* shared, const void* global, size_t bytes, size_t source_bytes, Site site);
void async_commit();
void async_wait(size_t pending);

void fence();                                              // __threadfence: threads of different blocks may now be ordered
uint64_t atomic(void* p, size_t bytes, uint64_t (*change)(uint64_t old, uint64_t operand, uint64_t expected), uint64_t operand, uint64_t expected = 0);

// A launch's arguments as nvcc's kernels receive them: one after the other, by value.
struct Value {
  const void* data;
  size_t bytes;
};
struct Launch {
  const void* kernel;  // the function
  uint32_t grid[3], block[3];
  uint64_t dynamic_shared;
  uint64_t count;
  const Value* values;
};
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* arguments, const Value* values, size_t count);
cudaError_t allow_shared(const void* kernel, int bytes);

template <class T> uint64_t to_bits(T v) {
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(T));
  return bits;
}
template <class T> T from_bits(uint64_t bits) {
  T v;
  memcpy(static_cast<void*>(&v), &bits, sizeof(T));
  return v;
}

// Lane `source` of the same warp gives its value; the value is poison when that lane is not in the mask.
template <class T> T shuffle(uint32_t mask, T value, int source, const char* name, Site site) {
  struct In { T value; int source; } in{value, source};
  T out;
  collective(mask, Collective::shuffle, name, &in, &out, [](const Lanes& lanes) {
    for (int l = 0; l < 32; l++) {
      if (!(lanes.mask >> l & 1)) continue;
      const int from = static_cast<const In*>(lanes.in[l])->source;
      if (lanes.mask >> from & 1) memcpy(lanes.out[l], &static_cast<const In*>(lanes.in[from])->value, sizeof(T));
      else memset(lanes.out[l], 0xff, sizeof(T));
    }
  }, site);
  return out;
}
inline void check_width(int width, const char* name, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail(std::string(name) + ": the width must be a power of two up to 32", site);
}

}  // namespace emu

// ---- device side -------------------------------------------------------------------------------------------
#define threadIdx (::emu::current->index)
#define blockIdx (::emu::current->block)

inline void __syncthreads(emu::Site site = emu::Site::current()) { emu::barrier(false, site); }
inline int __syncthreads_count(int p, emu::Site site = emu::Site::current()) { return emu::barrier(p != 0, site); }
inline int __syncthreads_or(int p, emu::Site site = emu::Site::current()) { return emu::barrier(p != 0, site) != 0; }
inline int __syncthreads_and(int p, emu::Site site = emu::Site::current()) { return emu::barrier(p == 0, site) == 0; }
inline void __syncwarp(unsigned mask = ~0u, emu::Site site = emu::Site::current()) {
  emu::collective(mask, emu::Collective::syncwarp, "__syncwarp", nullptr, nullptr, [](const emu::Lanes&) {}, site);
}

template <class T> T __shfl_sync(unsigned mask, T v, int lane, int width = 32, emu::Site site = emu::Site::current()) {
  emu::check_width(width, "__shfl_sync", site);
  return emu::shuffle(mask, v, (emu::current->lane & ~(width - 1)) | (lane & (width - 1)), "__shfl_sync", site);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, emu::Site site = emu::Site::current()) {
  emu::check_width(width, "__shfl_xor_sync", site);
  const int lane = emu::current->lane, other = lane ^ bits;
  return emu::shuffle(mask, v, other / width > lane / width ? lane : other, "__shfl_xor_sync", site);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, emu::Site site = emu::Site::current()) {
  emu::check_width(width, "__shfl_down_sync", site);
  const int lane = emu::current->lane, d = static_cast<int>(delta);
  return emu::shuffle(mask, v, lane % width + d >= width ? lane : lane + d, "__shfl_down_sync", site);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, emu::Site site = emu::Site::current()) {
  emu::check_width(width, "__shfl_up_sync", site);
  const int lane = emu::current->lane, d = static_cast<int>(delta);
  return emu::shuffle(mask, v, lane % width < d ? lane : lane - d, "__shfl_up_sync", site);
}
inline unsigned __ballot_sync(unsigned mask, int p, emu::Site site = emu::Site::current()) {
  unsigned out;
  emu::collective(mask, emu::Collective::vote, "__ballot_sync", &p, &out, [](const emu::Lanes& lanes) {
    unsigned votes = 0;
    for (int l = 0; l < 32; l++)
      if ((lanes.mask >> l & 1) && *static_cast<const int*>(lanes.in[l])) votes |= 1u << l;
    for (int l = 0; l < 32; l++)
      if (lanes.mask >> l & 1) *static_cast<unsigned*>(lanes.out[l]) = votes;
  }, site);
  return out;
}
template <class T> unsigned __match_any_sync(unsigned mask, T v, emu::Site site = emu::Site::current()) {  // lanes with an equal value
  unsigned out;
  emu::collective(mask, emu::Collective::vote, "__match_any_sync", &v, &out, [](const emu::Lanes& lanes) {
    for (int l = 0; l < 32; l++) {
      unsigned same = 0;
      for (int k = 0; k < 32 && (lanes.mask >> l & 1); k++)
        if ((lanes.mask >> k & 1) && *static_cast<const T*>(lanes.in[k]) == *static_cast<const T*>(lanes.in[l])) same |= 1u << k;
      if (lanes.mask >> l & 1) *static_cast<unsigned*>(lanes.out[l]) = same;
    }
  }, site);
  return out;
}
inline int __any_sync(unsigned mask, int p, emu::Site site = emu::Site::current()) { return __ballot_sync(mask, p, site) != 0; }
inline int __all_sync(unsigned mask, int p, emu::Site site = emu::Site::current()) { return __ballot_sync(mask, p, site) == mask; }

#define TZ_EMULATED_ATOMIC(name, result)                                                                                   \
  template <class T> T name(T* p, std::type_identity_t<T> value) {                                                        \
    return emu::from_bits<T>(emu::atomic(p, sizeof(T), [](uint64_t old_bits, uint64_t operand, uint64_t) {                 \
      const T old = emu::from_bits<T>(old_bits), v = emu::from_bits<T>(operand);                                          \
      return emu::to_bits<T>(result);                                                                                     \
    }, emu::to_bits<T>(value)));                                                                                          \
  }
TZ_EMULATED_ATOMIC(atomicAdd, static_cast<T>(old + v))
TZ_EMULATED_ATOMIC(atomicMax, old < v ? v : old)
TZ_EMULATED_ATOMIC(atomicMin, v < old ? v : old)
TZ_EMULATED_ATOMIC(atomicOr, static_cast<T>(old | v))
TZ_EMULATED_ATOMIC(atomicExch, (static_cast<void>(old), v))
#undef TZ_EMULATED_ATOMIC
template <class T> T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emu::from_bits<T>(emu::atomic(p, sizeof(T), [](uint64_t old, uint64_t operand, uint64_t wanted) { return old == wanted ? operand : old; },
                                       emu::to_bits<T>(value), emu::to_bits<T>(expected)));
}
inline void __threadfence() { emu::fence(); }
inline void __threadfence_block() {}

template <class T> T __ldg(const T* p) { return *p; }
template <class A, class B> std::common_type_t<A, B> min(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return y < x ? y : x;
}
template <class A, class B> std::common_type_t<A, B> max(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return x < y ? y : x;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __uint_as_float(unsigned bits) { return emu::from_bits<float>(bits); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(emu::to_bits(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
[[noreturn]] inline void __trap(emu::Site site = emu::Site::current()) { emu::fail("__trap", site); }

// ---- host side ---------------------------------------------------------------------------------------------
template <class... P, class... A> cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
  std::tuple<P...> values(static_cast<P>(args)...);
  auto body = [&] { std::apply(kernel, values); };
  return std::apply([&](const P&... value) {
    const emu::Value all[] = {{&value, sizeof(P)}...};
    return emu::launch(*config, reinterpret_cast<const void*>(kernel), [](void* b) { (*static_cast<decltype(body)*>(b))(); }, &body, all, sizeof...(P));
  }, values);
}
template <class F> cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorNotSupported;
  return emu::allow_shared(reinterpret_cast<const void*>(kernel), value);
}
