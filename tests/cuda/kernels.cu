// Small kernels for the tests of the emulator, correct ones and ones with a planted fault. A program:
//   kernels NAME [forward|reversed|random] [SEED]
// runs one of them on exactly sized buffers, compares with the host's own result, and says OK or what went wrong.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "cuda/tile.cuh"

using namespace terrazzo::cuda;
typedef __nv_bfloat16 bf16;

enum Fault { kNone, kNoSync, kOutOfBounds, kWrongLane, kWrongMask, kUnwritten, kMisaligned, kDivergent, kEarlyExit, kWeakWait, kNoSyncAfterWait, kNoSyncBefore, kNoPadding };

// ---- a sum over a block's 128 values, with the faults of reductions
template <Fault fault> __global__ void __launch_bounds__(128) sum_kernel(const float* __restrict__ x /* [128] */, float* __restrict__ y /* [1] */) {
  TZ_SHARED(float, sums_smem, 8);
  const int tid = threadIdx.x;
  float v;
  if (fault == kMisaligned) v = load_vector<float, 4>(x + 1).data[0];
  else v = x[tid + (fault == kOutOfBounds && tid == 127)];
  for (int lanes = 16; lanes; lanes /= 2) {
    const unsigned mask = fault == kWrongMask ? 0x0000ffffu : kAllLanes;
    if (fault == kWrongLane) v += __shfl_down_sync(mask, v, lanes + 1);
    else v += __shfl_xor_sync(mask, v, lanes);
  }
  if (tid % 32 == 0 && !(fault == kUnwritten && tid == 32)) sums_smem[tid / 32] = v;
  if (fault == kEarlyExit && tid >= 96) return;
  if (fault == kDivergent) {
    if (tid < 32) __syncthreads();
    else __syncthreads();
  } else if (fault != kNoSync) {
    __syncthreads();
  }
  if (tid == 0) y[0] = sums_smem[0] + sums_smem[1] + sums_smem[2] + sums_smem[3];
}

// ---- neighbours of one warp through shared memory: only a race detector sees that the __syncwarp is missing
template <Fault fault> __global__ void __launch_bounds__(32) rotate_kernel(const float* __restrict__ x /* [32] */, float* __restrict__ y /* [32] */) {
  TZ_SHARED(float, values_smem, 32);
  values_smem[threadIdx.x] = x[threadIdx.x];
  if (fault == kNone) __syncwarp();
  y[threadIdx.x] = values_smem[(threadIdx.x + 1) % 32];
}

// ---- c = a b^T: 64 x 64 x 32 tiles, 4 warps of 32 x 32, two stages of cp.async, ldmatrix, mma.sync
constexpr int kBlockM = 64, kBlockN = 64, kBlockK = 32;
__host__ __device__ constexpr int pitch_of(Fault fault) { return fault == kNoPadding ? kBlockK : kBlockK + 8; }
template <Fault fault, class T>
__global__ void __launch_bounds__(128) gemm_kernel(const T* __restrict__ a /* [M, K] */, const T* __restrict__ b /* [N, K] */, T* __restrict__ c /* [M, N] */,
                                                   const int M, const int N, const int K) {
  constexpr int kPitch = pitch_of(fault);
  TZ_DYNAMIC_SHARED(T, a_smem);
  T* const b_smem = a_smem + 2 * kBlockM * kPitch;
  const int tid = threadIdx.x, warp = tid / kWarp, warp_m = warp % 2 * 32, warp_n = warp / 2 * 32;
  const int first_m = blockIdx.y * kBlockM, first_n = blockIdx.x * kBlockN;
  const auto load = [&](int stage, int k0) {
    for (int i = tid; i < kBlockM * kBlockK / 8; i += 128) {
      const int row = i / (kBlockK / 8), k = i % (kBlockK / 8) * 8;
      const int m = min(first_m + row, M - 1), n = min(first_n + row, N - 1), kk = min(k0 + k, K - 8);
      cp_async_16(a_smem + (stage * kBlockM + row) * kPitch + k, a + static_cast<int64_t>(m) * K + kk, first_m + row < M && k0 + k < K ? 16 : 0);
      cp_async_16(b_smem + (stage * kBlockN + row) * kPitch + k, b + static_cast<int64_t>(n) * K + kk, first_n + row < N && k0 + k < K ? 16 : 0);
    }
    cp_async_commit();
  };
  float acc[2][4][4] = {};
  const int steps = ceil_div(K, kBlockK);
  load(0, 0);
  for (int step = 0; step < steps; step++) {
    const bool more = step + 1 < steps;
    if (more) load((step + 1) % 2, (step + 1) * kBlockK);
    if (more) cp_async_wait<fault == kWeakWait ? 2 : 1>();
    else cp_async_wait<0>();
    if (fault != kNoSyncAfterWait) __syncthreads();
    const T* a_tile = a_smem + step % 2 * kBlockM * kPitch;
    const T* b_tile = b_smem + step % 2 * kBlockN * kPitch;
#pragma unroll
    for (int k = 0; k < kBlockK; k += 16) {
      uint32_t a_frag[2][4], b_frag[2][2][2];
#pragma unroll
      for (int i = 0; i < 2; i++) load_a(a_frag[i], a_tile + (warp_m + 16 * i) * kPitch + k, kPitch);
#pragma unroll
      for (int j = 0; j < 2; j++) load_b(b_frag[j], b_tile + (warp_n + 16 * j) * kPitch + k, kPitch);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) multiply<T>(acc[i][j], a_frag[i], b_frag[j / 2][j % 2]);
    }
    if (fault != kNoSyncBefore) __syncthreads();  // the next load overwrites what other warps may still read
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int m = first_m + warp_m + 16 * i + fragment_row(e), n = first_n + warp_n + 8 * j + fragment_column(e);
        if (m < M && n < N) from_float(acc[i][j][e], c[static_cast<int64_t>(m) * N + n]);
      }
}

// ---- one warp: c (16, 16) = a (16, 16) b (16, 16) with b in rows of k, through ldmatrix.trans; and the same in tf32
template <class T> __global__ void __launch_bounds__(32) product_kernel(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ c) {
  TZ_DYNAMIC_SHARED(T, tiles_smem);
  for (int i = threadIdx.x; i < 256; i += 32) tiles_smem[i / 16 * 24 + i % 16] = a[i], tiles_smem[(16 + i / 16) * 24 + i % 16] = b[i];
  __syncwarp();
  uint32_t a_frag[4], b_frag[2][2];
  load_a(a_frag, tiles_smem, 24);
  load_b_trans(b_frag, tiles_smem + 16 * 24, 24);
  float acc[2][4] = {};
  for (int j = 0; j < 2; j++) {
    multiply<T>(acc[j], a_frag, b_frag[j]);
    for (int e = 0; e < 4; e++) c[fragment_row(e) * 16 + 8 * j + fragment_column(e)] = acc[j][e];
  }
}
__global__ void __launch_bounds__(32) product_tf32_kernel(const float* __restrict__ a /* [16, 16] */, const float* __restrict__ b_rows /* [n, k] */, float* __restrict__ c) {
  float acc[2][4] = {};
  for (int j = 0; j < 2; j++) {
    for (int k = 0; k < 16; k += 8) {
      uint32_t a_frag[4], b_frag[2];
      load_a_tf32(a_frag, a + k, 16);
      load_b_tf32(b_frag, b_rows + 8 * j * 16 + k, 16);
      mma_m16n8k8_tf32(acc[j], a_frag, b_frag);
    }
    for (int e = 0; e < 4; e++) c[fragment_row(e) * 16 + 8 * j + fragment_column(e)] = acc[j][e];
  }
}

// ---- warp and block operations against their definitions, and integer atomics
__global__ void __launch_bounds__(64) operations_kernel(int* __restrict__ out /* [64, 8] */, int* __restrict__ counts /* [4] */) {
  const int tid = threadIdx.x, lane = tid % 32;
  int* mine = out + tid * 8;
  mine[0] = __shfl_sync(kAllLanes, tid, 5);
  mine[1] = __shfl_up_sync(kAllLanes, tid, 3);
  mine[2] = __shfl_down_sync(kAllLanes, tid, 3, 8);
  mine[3] = __shfl_xor_sync(kAllLanes, tid, 6);
  mine[4] = static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0));
  mine[5] = lane < 16 ? __any_sync(0x0000ffffu, lane == 3) : __any_sync(0xffff0000u, lane == 3);  // half warps on their own
  mine[6] = __syncthreads_count(tid % 5 == 0);
  mine[7] = atomicAdd(counts, 1) >= 0;
  atomicMax(counts + 1, tid);
  atomicCAS(counts + 2, 0, 7);
}

#if defined(__CUDACC__)
// For tests/cuda/test_nvcc.py, which looks at what the compiler makes of the wrappers in ptx.cuh.
template __global__ void gemm_kernel<kNone, bf16>(const bf16*, const bf16*, bf16*, int, int, int);
template __global__ void gemm_kernel<kNone, __half>(const __half*, const __half*, __half*, int, int, int);
template __global__ void product_kernel<bf16>(const bf16*, const bf16*, float*);
#else
// ---- host -----------------------------------------------------------------------------------------------------
template <class T> struct Buffer {  // exactly sized, NaN until written: the address sanitizer sees any overrun
  T* data;
  explicit Buffer(size_t n) : data(static_cast<T*>(malloc(n * sizeof(T)))) { memset(static_cast<void*>(data), 0xff, n * sizeof(T)); }
  ~Buffer() { free(data); }
};
uint32_t random_bits = 1;
float random_value() {
  random_bits = random_bits * 1664525u + 1013904223u;
  return static_cast<float>(random_bits >> 24) / 128 - 1;  // exact in bf16, fp16 and tf32
}

bool report(cudaError_t error, double worst, double limit) {
  if (error != cudaSuccess) printf("FAILED: %s\n", emu::last_error.c_str());
  else if (!(worst <= limit)) printf("WRONG: off by %g\n", worst);
  else printf("OK: off by %g, bank conflicts %lld of %lld\n", worst, static_cast<long long>(emu::statistics.bank_conflicts),
              static_cast<long long>(emu::statistics.ldmatrix));
  return error == cudaSuccess && worst <= limit;
}
double larger(double worst, double d) { return d <= worst || worst != worst ? worst : d; }  // NaN stays

template <Fault fault> bool run_sum() {
  Buffer<float> x(128), y(1);
  double expected = 0;
  for (int i = 0; i < 128; i++) expected += x.data[i] = random_value();
  const cudaError_t error = launch(sum_kernel<fault>, dim3(1), 128, 0, nullptr, x.data, y.data);
  return report(error, fabs(y.data[0] - expected), 1e-4);
}

template <Fault fault> bool run_rotate() {
  Buffer<float> x(32), y(32);
  for (int i = 0; i < 32; i++) x.data[i] = random_value();
  const cudaError_t error = launch(rotate_kernel<fault>, dim3(1), 32, 0, nullptr, x.data, y.data);
  double worst = 0;
  for (int i = 0; i < 32 && fault == kNone; i++) worst = larger(worst, fabs(y.data[i] - x.data[(i + 1) % 32]));
  return report(error, worst, 0);
}

template <Fault fault, class T> bool run_gemm(int M, int N, int K) {
  Buffer<T> a(M * K), b(N * K), c(M * N);
  for (int i = 0; i < M * K; i++) from_float(random_value(), a.data[i]);
  for (int i = 0; i < N * K; i++) from_float(random_value(), b.data[i]);
  const size_t shared = 2 * (kBlockM + kBlockN) * pitch_of(fault) * sizeof(T);
  const cudaError_t error = launch(gemm_kernel<fault, T>, dim3(ceil_div(N, kBlockN), ceil_div(M, kBlockM)), 128, shared, nullptr, a.data, b.data, c.data, M, N, K);
  double worst = 0;
  for (int m = 0; m < M && error == cudaSuccess; m++)
    for (int n = 0; n < N; n++) {
      double sum = 0;
      for (int k = 0; k < K; k++) sum += double{to_float(a.data[m * K + k])} * to_float(b.data[n * K + k]);
      worst = larger(worst, fabs(to_float(c.data[m * N + n]) - sum) / (1 + fabs(sum)));
    }
  return report(error, worst, 0.005);
}

template <class T> bool run_product() {
  Buffer<T> a(256), b(256);
  Buffer<float> c(256);
  for (int i = 0; i < 256; i++) from_float(random_value(), a.data[i]), from_float(random_value(), b.data[i]);
  constexpr bool tf32 = sizeof(T) == 4;
  cudaError_t error;
  if constexpr (tf32) error = launch(product_tf32_kernel, dim3(1), 32, 0, nullptr, a.data, b.data, c.data);
  else error = launch(product_kernel<T>, dim3(1), 32, 32 * 24 * sizeof(T), nullptr, a.data, b.data, c.data);
  double worst = 0;
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      double sum = 0;
      for (int k = 0; k < 16; k++) sum += double{to_float(a.data[m * 16 + k])} * to_float(b.data[tf32 ? n * 16 + k : k * 16 + n]);
      worst = larger(worst, fabs(c.data[m * 16 + n] - sum));
    }
  return report(error, worst, 1e-5);
}

bool run_operations() {
  Buffer<int> out(64 * 8), counts(4);
  for (int i = 0; i < 4; i++) counts.data[i] = 0;
  const cudaError_t error = launch(operations_kernel, dim3(1), 64, 0, nullptr, out.data, counts.data);
  int wrong = 0;
  for (int tid = 0; tid < 64 && error == cudaSuccess; tid++) {
    const int warp = tid / 32 * 32, lane = tid % 32;
    int votes = 0;
    for (int l = 0; l < 32; l += 3) votes |= 1 << l;
    const int expected[8] = {warp + 5, lane < 3 ? tid : tid - 3, tid % 8 + 3 < 8 ? tid + 3 : tid, tid ^ 6, votes, lane < 16, 13, 1};
    for (int i = 0; i < 8; i++) wrong += out.data[tid * 8 + i] != expected[i];
  }
  wrong += counts.data[0] != 64 || counts.data[1] != 63 || counts.data[2] != 7;
  return report(error, wrong, 0);
}

bool run_bad_launch() {
  Buffer<float> x(128), y(1);
  return report(launch(sum_kernel<kNone>, dim3(1), 100, 0, nullptr, x.data, y.data), 0, 0);
}

const std::map<std::string, bool (*)()> kPrograms = {
    {"sum", run_sum<kNone>}, {"rotate", run_rotate<kNone>}, {"operations", run_operations},
    {"gemm_bf16", [] { return run_gemm<kNone, bf16>(70, 65, 72); }}, {"gemm_fp16", [] { return run_gemm<kNone, __half>(64, 128, 96); }},
    {"product_bf16", run_product<bf16>}, {"product_fp16", run_product<__half>}, {"product_tf32", run_product<float>},
    {"no_sync", run_sum<kNoSync>}, {"out_of_bounds", run_sum<kOutOfBounds>}, {"wrong_lane", run_sum<kWrongLane>}, {"wrong_mask", run_sum<kWrongMask>},
    {"unwritten", run_sum<kUnwritten>}, {"misaligned", run_sum<kMisaligned>}, {"divergent", run_sum<kDivergent>}, {"early_exit", run_sum<kEarlyExit>},
    {"no_syncwarp", run_rotate<kNoSync>}, {"bad_launch", run_bad_launch},
    {"weak_wait", [] { return run_gemm<kWeakWait, bf16>(64, 64, 128); }}, {"no_sync_after_wait", [] { return run_gemm<kNoSyncAfterWait, bf16>(64, 64, 128); }},
    {"no_padding", [] { return run_gemm<kNoPadding, bf16>(64, 64, 32); }}, {"no_sync_before_overwriting", [] { return run_gemm<kNoSyncBefore, bf16>(64, 64, 128); }},
};

int main(int argc, char** argv) {
  const auto found = kPrograms.find(argc > 1 ? argv[1] : "");
  if (found == kPrograms.end()) {
    for (const auto& [name, run] : kPrograms) printf("%s\n", name.c_str());
    return 2;
  }
  const std::string order = argc > 2 ? argv[2] : "forward";
  emu::options.order = order == "reversed" ? emu::Order::reversed : order == "random" ? emu::Order::random : emu::Order::forward;
  emu::options.seed = argc > 3 ? strtoull(argv[3], nullptr, 10) : 1;
  return found->second() ? 0 : 1;
}
#endif
