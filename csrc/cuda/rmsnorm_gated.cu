// Gated RMS norm over groups of the last dimension, forward and backward (mamba_ssm's RMSNormGated):
//   norm_before_gate: y = x rms(x) * weight * silu(z);   otherwise y = u rms(u) * weight with u = x silu(z).
// rms(v) = 1 / sqrt(mean(v^2) + eps) over each group of n = group_size channels. Layouts: x, z, dy [rows, D] with a row stride,
// y, dx, dz contiguous, weight [D].
//
// Memory bandwidth is the limit: x and z read once, y written once. A team of threads, a warp or a block, has one group of one row,
// each thread kHeld pieces of 16 bytes that stay in registers between the pass that sums and the pass that writes; what a group of
// more than 8192 16-bit channels has beyond them is read again. The backward computes the norm again instead of storing it. Its
// blocks walk over rows of one group and write their share of dweight to a row of partial sums each, which a second kernel adds
// up: no atomics, and the same bits on every GPU.
#include "kernels.h"

#include "common.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kHeld = 2;
__host__ __device__ constexpr int threads_of(int team) { return team < 128 ? 128 : team; }
constexpr int64_t kMostBlocks = 65535;           // along y or z of a grid

// Sums over the kTeam threads that share a group.
template <int kTeam, int n> TZ_DEVICE void team_sum(float (&v)[n]) {
  static_assert(kTeam == kWarp || kTeam == threads_of(kTeam), "a team is a warp or the block");
  if constexpr (kTeam > kWarp) {
    block_sum<kTeam>(v);
  } else {
#pragma unroll
    for (int i = 0; i < n; i++) v[i] = warp_sum(v[i]);
  }
}

template <class T> TZ_DEVICE const T* group_at(const void* base, int64_t stride, int64_t row, int64_t first) {
  return base ? static_cast<const T*>(base) + row * stride + first : nullptr;
}
template <class T> TZ_DEVICE T* group_at(void* base, int64_t stride, int64_t row, int64_t first) {
  return base ? static_cast<T*>(base) + row * stride + first : nullptr;
}

// ---- forward -------------------------------------------------------------------------------------------------
// Grid: groups x tiles of rows (along y, then z), a team for each row of a tile.
template <class T, int kVec, int kTeam> __global__ void __launch_bounds__(threads_of(kTeam)) rmsnorm_gated_fwd_kernel(const RmsnormGatedCudaParams p) {
  const int lane = threadIdx.x % kTeam, n = static_cast<int>(p.group_size);
  const int64_t tile = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y, first = blockIdx.x * p.group_size;
  const int64_t row = tile * (threads_of(kTeam) / kTeam) + threadIdx.x / kTeam;
  if (row >= p.rows) return;  // a whole team
  const T* x = group_at<T>(p.x, p.x_stride, row, first);
  const T* z = group_at<T>(p.z, p.z_stride, row, first);
  T* y = group_at<T>(p.y, p.D, row, first);
  const bool gate_first = z && !p.norm_before_gate;

  // the held pieces, all loads before the first use
  Vector<T, kVec> x_rmem[kHeld], z_rmem[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; i++) {
    const int c = (i * kTeam + lane) * kVec;
    if (c < n) x_rmem[i] = load_vector<T, kVec>(x + c);
    if (c < n && z) z_rmem[i] = load_vector<T, kVec>(z + c);
  }

  // the mean of squares of x, or of x silu(z)
  const auto values = [&](const Vector<T, kVec>& xs, const Vector<T, kVec>& zs, float (&v)[kVec]) {
    to_floats(xs, v);
    if (!gate_first) return;
#pragma unroll
    for (int j = 0; j < kVec; j++) v[j] *= silu(to_float(zs.data[j]));
  };
  float squares[1] = {0};
  const auto add_squares = [&](const Vector<T, kVec>& xs, const Vector<T, kVec>& zs) {
    float v[kVec];
    values(xs, zs, v);
#pragma unroll
    for (int j = 0; j < kVec; j++) squares[0] += v[j] * v[j];
  };
#pragma unroll
  for (int i = 0; i < kHeld; i++)
    if ((i * kTeam + lane) * kVec < n) add_squares(x_rmem[i], z_rmem[i]);
  for (int c = (kHeld * kTeam + lane) * kVec; c < n; c += kTeam * kVec)
    add_squares(load_vector<T, kVec>(x + c), load_vector<T, kVec>((z ? z : x) + c));
  team_sum<kTeam>(squares);
  const float rms = rsqrtf(squares[0] / static_cast<float>(n) + static_cast<float>(p.eps));

  // scale, gate, write
  const auto write = [&](int c, const Vector<T, kVec>& xs, const Vector<T, kVec>& zs) {
    float v[kVec], w[kVec];
    values(xs, zs, v);
    load_floats<kVec>(p.weight_dtype, p.weight, first + c, w);
#pragma unroll
    for (int j = 0; j < kVec; j++) {
      v[j] *= rms * w[j];
      if (z && !gate_first) v[j] *= silu(to_float(zs.data[j]));
    }
    store_vector(to_vector<T>(v), y + c);
  };
#pragma unroll
  for (int i = 0; i < kHeld; i++)
    if ((i * kTeam + lane) * kVec < n) write((i * kTeam + lane) * kVec, x_rmem[i], z_rmem[i]);
  for (int c = (kHeld * kTeam + lane) * kVec; c < n; c += kTeam * kVec)
    write(c, load_vector<T, kVec>(x + c), load_vector<T, kVec>((z ? z : x) + c));
}

// ---- backward ------------------------------------------------------------------------------------------------
// With v the normalised input, v^ = v rms and e = d loss / d v^:  dv = rms (e - v^ mean(e v^)).
// Grid: groups x programs. Program i has the tiles of rows i, i + programs, ...
template <class T, int kVec, int kTeam> __global__ void __launch_bounds__(threads_of(kTeam)) rmsnorm_gated_bwd_kernel(const RmsnormGatedCudaParams p) {
  constexpr int kTeams = threads_of(kTeam) / kTeam, kHeldChannels = kHeld * kTeam * kVec;
  const int lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam, n = static_cast<int>(p.group_size);
  const int64_t program = blockIdx.y, first = blockIdx.x * p.group_size;
  const bool gate_first = p.z && !p.norm_before_gate, gate_last = p.z && p.norm_before_gate;
  float* partial = static_cast<float*>(p.partials) + program * p.D + first;
  float dw_rmem[kHeld][kVec] = {};
  bool first_row = true;

  for (int64_t row = program * kTeams + team; row < p.rows; row += static_cast<int64_t>(gridDim.y) * kTeams) {
    const T* x = group_at<T>(p.x, p.x_stride, row, first);
    const T* z = group_at<T>(p.z, p.z_stride, row, first);
    const T* dy = group_at<T>(p.dy, p.dy_stride, row, first);
    T* dx = group_at<T>(p.dx, p.D, row, first);
    T* dz = group_at<T>(p.dz, p.D, row, first);
    Vector<T, kVec> x_rmem[kHeld], z_rmem[kHeld], dy_rmem[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
      const int c = (i * kTeam + lane) * kVec;
      if (c >= n) continue;
      x_rmem[i] = load_vector<T, kVec>(x + c);
      dy_rmem[i] = load_vector<T, kVec>(dy + c);
      if (z) z_rmem[i] = load_vector<T, kVec>(z + c);
    }

    // sums of v^2 and e v
    float sums[2] = {0, 0};
    const auto add = [&](int c, const Vector<T, kVec>& xs, const Vector<T, kVec>& zs, const Vector<T, kVec>& dys) {
      float w[kVec];
      load_floats<kVec>(p.weight_dtype, p.weight, first + c, w);
#pragma unroll
      for (int j = 0; j < kVec; j++) {
        float v = to_float(xs.data[j]), e = to_float(dys.data[j]) * w[j];
        if (gate_first) v *= silu(to_float(zs.data[j]));
        if (gate_last) e *= silu(to_float(zs.data[j]));
        sums[0] += v * v, sums[1] += e * v;
      }
    };
#pragma unroll
    for (int i = 0; i < kHeld; i++)
      if ((i * kTeam + lane) * kVec < n) add((i * kTeam + lane) * kVec, x_rmem[i], z_rmem[i], dy_rmem[i]);
    for (int c = kHeldChannels + lane * kVec; c < n; c += kTeam * kVec)
      add(c, load_vector<T, kVec>(x + c), load_vector<T, kVec>((z ? z : x) + c), load_vector<T, kVec>(dy + c));
    team_sum<kTeam>(sums);
    const float rms = rsqrtf(sums[0] / static_cast<float>(n) + static_cast<float>(p.eps));
    const float slope = sums[1] / static_cast<float>(n) * rms;  // mean(e v^)

    // dx, dz; dw[j] grows
    const auto write = [&](int c, const Vector<T, kVec>& xs, const Vector<T, kVec>& zs, const Vector<T, kVec>& dys, float (&dw)[kVec]) {
      float w[kVec], dxs[kVec], dzs[kVec];
      load_floats<kVec>(p.weight_dtype, p.weight, first + c, w);
#pragma unroll
      for (int j = 0; j < kVec; j++) {
        const float xv = to_float(xs.data[j]), grad = to_float(dys.data[j]);
        float s = 0, gate = 1, slope_of_gate = 0;
        if (z) {
          const float zv = to_float(zs.data[j]);
          s = sigmoid(zv), gate = zv * s, slope_of_gate = s * (1 + zv * (1 - s));
        }
        if (gate_first) {
          const float normed = xv * gate * rms, dv = rms * (grad * w[j] - normed * slope);
          dw[j] += grad * normed;
          dxs[j] = dv * gate, dzs[j] = dv * xv * slope_of_gate;
        } else {
          const float normed = xv * rms, dvalue = grad * normed;
          dw[j] += dvalue * gate;
          dxs[j] = rms * (grad * w[j] * gate - normed * slope), dzs[j] = dvalue * w[j] * slope_of_gate;
        }
      }
      store_vector(to_vector<T>(dxs), dx + c);
      if (dz) store_vector(to_vector<T>(dzs), dz + c);
    };
#pragma unroll
    for (int i = 0; i < kHeld; i++)
      if ((i * kTeam + lane) * kVec < n) write((i * kTeam + lane) * kVec, x_rmem[i], z_rmem[i], dy_rmem[i], dw_rmem[i]);
    for (int c = kHeldChannels + lane * kVec; c < n; c += kTeam * kVec) {
      float dw[kVec] = {};
      if (!first_row) load_floats(partial + c, dw);  // the thread's own: a team is the block where a group is this long
      write(c, load_vector<T, kVec>(x + c), load_vector<T, kVec>((z ? z : x) + c), load_vector<T, kVec>(dy + c), dw);
      store_floats(dw, partial + c);
    }
    first_row = false;
  }

  // the block's row of partial sums
  if constexpr (kTeams == 1) {
#pragma unroll
    for (int i = 0; i < kHeld; i++)
      if ((i * kTeam + lane) * kVec < n) store_floats(dw_rmem[i], partial + (i * kTeam + lane) * kVec);
    for (int c = kHeldChannels + lane; first_row && c < n; c += kTeam) partial[c] = 0;  // no row came here
  } else {
    TZ_SHARED(float, teams_smem, kTeams * kHeldChannels);
#pragma unroll
    for (int i = 0; i < kHeld; i++) store_floats(dw_rmem[i], teams_smem + team * kHeldChannels + (i * kTeam + lane) * kVec);
    __syncthreads();
    for (int c = threadIdx.x; c < n; c += threads_of(kTeam)) {
      float sum = 0;
#pragma unroll
      for (int t = 0; t < kTeams; t++) sum += teams_smem[t * kHeldChannels + c];
      partial[c] = sum;
    }
  }
}

// dweight[d] = the sum of the partial sums of column d.
__global__ void __launch_bounds__(kColumnSumThreads) rmsnorm_gated_dweight_kernel(const float* __restrict__ partials /* [rows, D] */,
                                                                            float* __restrict__ dweight /* [D] */, const int rows, const int64_t D) {
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x % kSumColumns;
  const float sum = column_sum(partials + d, rows, D, d < D);
  if (threadIdx.x < kSumColumns && d < D) dweight[d] = sum;
}

// fn(T{}, vector width, team size) for these arguments; `rows_aligned` says whether 16-byte accesses may be used.
template <int value> struct Constant { static constexpr int v = value; };
template <class F> cudaError_t with_shape(const RmsnormGatedCudaParams& p, bool rows_aligned, const F& fn) {
  if (p.group_size > INT32_MAX / 2) return cudaErrorInvalidValue;
  return with_type(p.x_dtype, [&](auto t) {
    constexpr int kVec = kVectorBytes / sizeof(t);
    if (!rows_aligned || p.group_size % kVec || !aligned(p.weight, 0, 1)) {
      if (p.group_size <= kHeld * kWarp) return fn(t, Constant<1>{}, Constant<kWarp>{});
      return fn(t, Constant<1>{}, Constant<512>{});
    }
    if (p.group_size <= kHeld * kWarp * kVec) return fn(t, Constant<kVec>{}, Constant<kWarp>{});
    if (p.group_size <= kHeld * 128 * kVec) return fn(t, Constant<kVec>{}, Constant<128>{});
    return fn(t, Constant<kVec>{}, Constant<512>{});
  });
}
bool inputs_aligned(const RmsnormGatedCudaParams& p) {
  const int64_t bytes = size_of(p.x_dtype);
  return aligned(p.x, p.x_stride, bytes) && aligned(p.z, p.z_stride, bytes);
}
unsigned count(int64_t n) { return static_cast<unsigned>(n); }

}  // namespace

cudaError_t rmsnorm_gated_fwd_cuda(const RmsnormGatedCudaParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.D == 0) return cudaSuccess;
  return with_shape(p, inputs_aligned(p) && aligned(p.y, p.D, size_of(p.x_dtype)), [&](auto t, auto vec, auto team) {
    constexpr int kTeam = decltype(team)::v, kThreads = threads_of(kTeam);
    const int64_t tiles = ceil_div(p.rows, kThreads / kTeam), z = ceil_div(tiles, kMostBlocks);
    return launch(rmsnorm_gated_fwd_kernel<decltype(t), decltype(vec)::v, kTeam>, dim3(count(p.D / p.group_size), count(ceil_div(tiles, z)), count(z)),
                  kThreads, 0, stream, p);
  });
}

cudaError_t rmsnorm_gated_bwd_cuda(const RmsnormGatedCudaParams& p, cudaStream_t stream) {
  if (p.D == 0) return cudaSuccess;
  const int64_t programs = norm_partials(p), bytes = size_of(p.x_dtype);
  if (programs > 0) {
    const bool rows_aligned = inputs_aligned(p) && aligned(p.dy, p.dy_stride, bytes) && aligned(p.dx, p.D, bytes) && aligned(p.dz, p.D, bytes) &&
                              aligned(p.partials, p.D, 4);
    const cudaError_t error = with_shape(p, rows_aligned, [&](auto t, auto vec, auto team) {
      constexpr int kTeam = decltype(team)::v;
      return launch(rmsnorm_gated_bwd_kernel<decltype(t), decltype(vec)::v, kTeam>, dim3(count(p.D / p.group_size), count(programs)),
                    threads_of(kTeam), 0, stream, p);
    });
    if (error != cudaSuccess) return error;
  }
  return launch(rmsnorm_gated_dweight_kernel, dim3(count(ceil_div(p.D, kSumColumns))), kColumnSumThreads, 0, stream,
                static_cast<const float*>(p.partials), static_cast<float*>(p.dweight), static_cast<int>(programs), p.D);
}

}}  // namespace terrazzo::cuda
