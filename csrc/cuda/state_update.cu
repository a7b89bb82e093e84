// One decoding step of the Mamba scan, the state updated in place (mamba_ssm's selective_state_update). For each row b and head h,
// with dt' = softplus?(dt + dt_bias) and g = h / (H / G):
//   state[p, n] = exp(dt' A) state[p, n] + dt' x[p] B[g, n],   out[p] = sum_n state[p, n] C[g, n] + D x[p],   out *= silu(z).
// Layouts: state [slots, H, P, N] with unit stride n, everything else in any strides.
//
// Memory bandwidth is the limit: the state is read and written once, all else is small beside it. A block has one head and a tile
// of p; a team of lanes has kRows rows of the state at a time, each lane a piece of 16 bytes of each, all loaded before the first
// use. Where dt, A and dt_bias are the same for all of a head (stride 0, as Mamba-2 callers pass them) the exponential is computed
// once a thread, otherwise (Mamba-1) for each element.
#include "kernels.h"

#include "common.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 2;  // 4 need registers that cost more warps than the loads are worth
// Registers for so many, without spilling.
template <class S> constexpr int blocks_per_sm(bool per_head) { return (per_head ? 6 : 5) - (sizeof(S) == 2); }
constexpr int64_t kMostBlocks = 65535;  // along y or z of a grid

// kVec neighbours of a vector with any stride.
template <int kVec> TZ_DEVICE void load_strided(DType dtype, const void* base, int64_t offset, int64_t stride, bool vectors, float (&v)[kVec]) {
  if (vectors) return load_floats<kVec>(dtype, base, offset, v);
  Element rmem[kVec];
#pragma unroll
  for (int j = 0; j < kVec; j++) rmem[j] = load_element(dtype, base, offset + j * stride);
#pragma unroll
  for (int j = 0; j < kVec; j++) v[j] = to_float(dtype, rmem[j]);
}

// Grid: heads x tiles of p x rows. lanes: of a team, a power of two. S: the state's type. kPerHead: dt and A don't vary in a head;
// vectors: B, C and A come in vectors too.
template <class S, int kVec, bool kPerHead>
__global__ void __launch_bounds__(kThreads, blocks_per_sm<S>(kPerHead)) state_update_kernel(const StateUpdateParams p, const int lanes, const bool vectors) {
  constexpr int kSteps = kPerHead ? 1 : kRows;  // different step sizes of a thread
  const int team = threadIdx.x / lanes, lane = threadIdx.x % lanes, teams = kThreads / lanes;
  const int N = static_cast<int>(p.N), P = static_cast<int>(p.P);
  const int64_t h = blockIdx.x, g = blockIdx.x / (static_cast<unsigned>(p.H) / static_cast<unsigned>(p.G));
  const int first = static_cast<int>(blockIdx.y) * teams * kRows + team;  // row r of this team is first + r teams

  for (int64_t b = blockIdx.z; b < p.B; b += gridDim.z) {
    const int64_t slot = p.state_batch_indices ? p.state_batch_indices[b] : b;
    if (slot < 0 || slot >= p.num_slots) {
      for (int r = 0; r < kRows; r++)
        if (lane == 0 && first + r * teams < P) store_float(0, p.x_dtype, p.out, (b * p.H + h) * P + first + r * teams);
      continue;
    }
    S* state = static_cast<S*>(p.state) + slot * p.state_stride_s + h * p.state_stride_h + first * p.state_stride_p;
    const int64_t state_step = teams * p.state_stride_p;
    // the state's first pieces and all that stands beside it are under way before anything is waited for
    Vector<S, kVec> state_rmem[kRows]{};
    const auto load_state = [&](int n) {
#pragma unroll
      for (int r = 0; r < kRows; r++)
        if (n < N && first + r * teams < P) state_rmem[r] = load_vector<S, kVec>(state + r * state_step + n);
    };
    if (kPerHead) load_state(lane * kVec);
    Element dt_rmem[kSteps], bias_rmem[kSteps]{}, A_rmem{}, x_rmem[kRows]{}, z_rmem[kRows]{}, D_rmem[kRows]{};
#pragma unroll
    for (int r = 0; r < kSteps; r++) {
      const int i = min(first + r * teams, P - 1);
      dt_rmem[r] = load_element(p.dt_dtype, p.dt, b * p.dt_stride_b + h * p.dt_stride_h + i * p.dt_stride_p);
      if (p.dt_bias) bias_rmem[r] = load_element(p.param_dtype, p.dt_bias, h * p.dt_bias_stride_h + i * p.dt_bias_stride_p);
    }
    if (kPerHead) A_rmem = load_element(p.param_dtype, p.A, h * p.A_stride_h);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int i = first + r * teams;
      if (i >= P) continue;
      x_rmem[r] = load_element(p.x_dtype, p.x, b * p.x_stride_b + h * p.x_stride_h + i * p.x_stride_p);
      if (lane == 0 && p.z) z_rmem[r] = load_element(p.x_dtype, p.z, b * p.z_stride_b + h * p.z_stride_h + i * p.z_stride_p);
      if (lane == 0 && p.D) D_rmem[r] = load_element(p.param_dtype, p.D, h * p.D_stride_h + i * p.D_stride_p);
    }

    float dt[kSteps], dtx[kRows], out[kRows] = {};
#pragma unroll
    for (int r = 0; r < kSteps; r++) {
      dt[r] = to_float(p.dt_dtype, dt_rmem[r]);
      if (p.dt_bias) dt[r] += to_float(p.param_dtype, bias_rmem[r]);
      if (p.dt_softplus) dt[r] = softplus(dt[r]);
    }
    const float head_decay = kPerHead ? expf(dt[0] * to_float(p.param_dtype, A_rmem)) : 0;
#pragma unroll
    for (int r = 0; r < kRows; r++) dtx[r] = dt[r % kSteps] * to_float(p.x_dtype, x_rmem[r]);

    for (int n = lane * kVec; n < N; n += lanes * kVec) {
      if (!kPerHead) load_state(n);
      float B[kVec], C[kVec];
      load_strided<kVec>(p.x_dtype, p.Bm, b * p.B_stride_b + g * p.B_stride_g + n * p.B_stride_n, p.B_stride_n, vectors, B);
      load_strided<kVec>(p.x_dtype, p.C, b * p.C_stride_b + g * p.C_stride_g + n * p.C_stride_n, p.C_stride_n, vectors, C);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const int i = first + r * teams;
        if (i >= P) continue;
        float v[kVec], A[kVec];
        to_floats(state_rmem[r], v);
        if (!kPerHead) load_strided<kVec>(p.param_dtype, p.A, h * p.A_stride_h + i * p.A_stride_p + n * p.A_stride_n, p.A_stride_n, vectors, A);
#pragma unroll
        for (int j = 0; j < kVec; j++) {
          v[j] = (kPerHead ? head_decay : expf(dt[r % kSteps] * A[j])) * v[j] + dtx[r] * B[j];
          out[r] += v[j] * C[j];
        }
        store_vector(to_vector<S>(v), state + r * state_step + n);
      }
      if (kPerHead) load_state(n + lanes * kVec);
    }

    // the sums over n, skip, gate
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int i = first + r * teams;
      float y = warp_sum(out[r], lanes);
      if (lane > 0 || i >= P) continue;
      if (p.D) y += to_float(p.x_dtype, x_rmem[r]) * to_float(p.param_dtype, D_rmem[r]);
      if (p.z) y *= silu(to_float(p.x_dtype, z_rmem[r]));
      store_float(y, p.x_dtype, p.out, (b * p.H + h) * P + i);
    }
  }
}

bool same_for_heads(const StateUpdateParams& p) {
  return (p.A_stride_p == 0 || p.P == 1) && (p.A_stride_n == 0 || p.N == 1) && (p.dt_stride_p == 0 || p.P == 1) &&
         (!p.dt_bias || p.dt_bias_stride_p == 0 || p.P == 1);
}

}  // namespace

cudaError_t state_update_cuda(const StateUpdateParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.H == 0 || p.P == 0) return cudaSuccess;
  if (p.N > INT32_MAX / 2 || p.P > INT32_MAX / 2 || p.H > INT32_MAX || p.x_dtype == DType::f64 || p.dt_dtype == DType::f64 || p.param_dtype == DType::f64) return cudaErrorInvalidValue;
  const bool per_head = same_for_heads(p);
  return with_type(p.state_dtype, [&](auto s) {
    using S = decltype(s);
    constexpr int kVec = kVectorBytes / sizeof(S);
    const auto run = [&](auto kernel, int vec, bool vectors) {
      int lanes = 1;
      while (lanes < kWarp && lanes * vec < p.N) lanes *= 2;
      const int64_t rows = int64_t{kThreads} / lanes * kRows;
      const dim3 grid(static_cast<unsigned>(p.H), static_cast<unsigned>(ceil_div(p.P, rows)), static_cast<unsigned>(p.B < kMostBlocks ? p.B : kMostBlocks));
      return launch(kernel, grid, kThreads, 0, stream, p, lanes, vectors);
    };
    const bool state_aligned = p.N % kVec == 0 && aligned(p.state, p.state_stride_s, sizeof(S)) && aligned(p.state, p.state_stride_h, sizeof(S)) &&
                               aligned(p.state, p.state_stride_p, sizeof(S));
    if (!state_aligned) return per_head ? run(state_update_kernel<S, 1, true>, 1, false) : run(state_update_kernel<S, 1, false>, 1, false);
    const int64_t bytes = size_of(p.x_dtype), param_bytes = size_of(p.param_dtype);
    const bool vectors = p.B_stride_n == 1 && aligned(p.Bm, p.B_stride_b, bytes) && aligned(p.Bm, p.B_stride_g, bytes) &&
                         p.C_stride_n == 1 && aligned(p.C, p.C_stride_b, bytes) && aligned(p.C, p.C_stride_g, bytes) &&
                         (per_head || (p.A_stride_n == 1 && aligned(p.A, p.A_stride_h, param_bytes) && aligned(p.A, p.A_stride_p, param_bytes)));
    return per_head ? run(state_update_kernel<S, kVec, true>, kVec, vectors) : run(state_update_kernel<S, kVec, false>, kVec, vectors);
  });
}

}}  // namespace terrazzo::cuda
