// Every PTX instruction written by hand, and nothing else. Each wrapper has the instruction for nvcc and the emulator's form for
// g++; kernels call the wrappers. Legal from sm_80 on. Sections named are those of the PTX ISA manual.
#pragma once
#include "common.cuh"

#if defined(__CUDACC__)
#define TZ_SITE
#else
#include "../emulator/tensor_core.h"
#define TZ_SITE , ::emu::Site site = ::emu::Site::current()
#endif

namespace terrazzo { namespace cuda {

// "cp.async": 16 bytes global -> shared, both aligned to 16. Of the source only source_bytes are read, the rest becomes zero.
TZ_DEVICE void cp_async_16(void* shared, const void* global, int source_bytes TZ_SITE) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global), "r"(source_bytes) : "memory");
#else
  ::emu::async_copy(shared, global, 16, static_cast<size_t>(source_bytes), site);
#endif
}

// The same of 4 bytes.
TZ_DEVICE void cp_async_4(void* shared, const void* global, int source_bytes TZ_SITE) {
#if defined(__CUDACC__)
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global), "r"(source_bytes) : "memory");
#else
  ::emu::async_copy(shared, global, 4, static_cast<size_t>(source_bytes), site);
#endif
}

// "cp.async.commit_group": the copies since the last one are a group.
TZ_DEVICE void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  ::emu::async_commit();
#endif
}

// "cp.async.wait_group": at most the last `pending` groups of this thread are still under way.
template <int pending> TZ_DEVICE void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#else
  ::emu::async_wait(pending);
#endif
}

// "ldmatrix": four 8 x 8 matrices of 16-bit elements from shared memory; lane 8 i + k gives the address of row k of matrix i.
TZ_DEVICE void ldmatrix_x4(uint32_t (&fragment)[4], const void* row TZ_SITE) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))) : "memory");
#else
  ::emu::ldmatrix_x4<false>(fragment, row, site);
#endif
}

// "ldmatrix" with .trans: the same, each matrix transposed.
TZ_DEVICE void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row TZ_SITE) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))) : "memory");
#else
  ::emu::ldmatrix_x4<true>(fragment, row, site);
#endif
}

// "mma", "Matrix Fragments for mma.m16n8k16 with floating point type": acc (16, 8) += a (16, 16) b (16, 8).
TZ_DEVICE void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16 TZ_SITE) {
#if defined(__CUDACC__)
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  ::emu::mma_m16n8k16<__nv_bfloat16>(acc, a, b, site);
#endif
}
TZ_DEVICE void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half TZ_SITE) {
#if defined(__CUDACC__)
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  ::emu::mma_m16n8k16<__half>(acc, a, b, site);
#endif
}

// "mma", "Matrix Fragments for mma.m16n8k8" with .tf32: acc (16, 8) += a (16, 8) b (8, 8); registers hold floats.
TZ_DEVICE void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] TZ_SITE) {
#if defined(__CUDACC__)
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  ::emu::mma_m16n8k8_tf32(acc, a, b, site);
#endif
}

// "ex2": 2^x to 2^-22 of itself, 0 where that is less than 2^-126; exactly 1 of 0. One instruction where exp2f takes four.
TZ_DEVICE float exp2_approx(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

// "cvt" with .rna.tf32: the float nearest to x that tf32 has, as its bits.
TZ_DEVICE uint32_t to_tf32(float x) {
#if defined(__CUDACC__)
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  return ::emu::round_tf32(x);
#endif
}

}}  // namespace terrazzo::cuda
