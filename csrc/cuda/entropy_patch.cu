// Entropy of the softmax of every row of logits, in nats, and its gradient; csrc/cuda/patch_cut.cu cuts the patches from it.
//   H = log s - t / s with a = x - max x, s = sum e^a, t = sum e^a a;   dx = -dH p (log p + H) = -dH / s e^a (a - t / s)
// Layouts: logits [B, L, V] with unit stride v, entropies and their gradient [B, L], dlogits [B, L, V] contiguous.
//
// Memory bandwidth is the limit: the logits are read once. A team of lanes, up to a whole block, has one row; each lane keeps a
// maximum and sums of its own, rescaled where the next pieces have a higher maximum, and the team's are brought to one maximum
// at the end. So a row of any length takes one pass and one meeting. A team is as small as the row allows: of BLT's 260 logits
// eight lanes have 33 each, where 32 lanes would spend as long on the last 4 as on 128. The backward computes the sums again instead of
// storing them; its second look at the logits finds them in the cache.
#include "kernels.h"

#include "common.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kVec = 4;                 // 16 bytes of float32, 8 of 16-bit types: rows of 260 are aligned to no more
constexpr int kPieces = 4;              // vectors of a lane under way at once
constexpr int kLeastLanes = 8, kPiecesOfLane = 16;  // a team grows until its lanes have no more pieces than this
constexpr float kFloor = -87.0f;        // e^a below this is no normal number, and adds nothing to a sum that holds 1
constexpr int64_t kMostBlocks = 65535;  // along y of a grid
__host__ __device__ constexpr int threads_of(bool block_teams) { return block_teams ? 256 : 128; }

struct Softmax {
  float top, sum, dot;  // the highest logit; sums of e^a and of e^a a
};

TZ_DEVICE float floored(float a) { return a < kFloor ? kFloor : a; }  // NaN stays
TZ_DEVICE float origin(float top) { return top == -INFINITY ? 0.0f : top; }

// s seen from a higher maximum: e^a shrinks by e^-d, and every a by d.
TZ_DEVICE Softmax raised(const Softmax& s, float top) {
  const float d = floored(s.top - origin(top)), factor = __expf(d);
  return {top, s.sum * factor, (s.dot + d * s.sum) * factor};
}

template <int n> TZ_DEVICE void add(Softmax& s, const float (&x)[n]) {
  float top = s.top;
#pragma unroll
  for (int j = 0; j < n; j++) top = fmaxf(top, x[j]);
  s = raised(s, top);
#pragma unroll
  for (int j = 0; j < n; j++) {
    const float a = floored(x[j] - origin(top)), e = __expf(a);
    s.sum += e, s.dot += e * a;
  }
}

// What this lane has of a row.
template <class T, int vec> TZ_DEVICE Softmax lane_softmax(const T* x, int V, int lane, int lanes) {
  Softmax s{-INFINITY, 0.0f, 0.0f};
  const int step = lanes * vec;
  int c = lane * vec;
  for (; c + (kPieces - 1) * step < V; c += kPieces * step) {
    Vector<T, vec> x_rmem[kPieces];
    float v[kPieces * vec];
#pragma unroll
    for (int i = 0; i < kPieces; i++) x_rmem[i] = load_vector<T, vec>(x + c + i * step);
#pragma unroll
    for (int i = 0; i < kPieces * vec; i++) v[i] = to_float(x_rmem[i / vec].data[i % vec]);
    add(s, v);
  }
  for (; c < V; c += step) {
    float v[vec];
    load_floats<T, vec>(x + c, v);
    add(s, v);
  }
  return s;
}

// The sums of a whole team, in each of its lanes.
template <bool kBlockTeams> TZ_DEVICE Softmax team_softmax(Softmax s, int lanes) {
  s = raised(s, warp_max(s.top, lanes));
  s.sum = warp_sum(s.sum, lanes), s.dot = warp_sum(s.dot, lanes);
  if constexpr (kBlockTeams) {
    constexpr int kWarps = threads_of(true) / kWarp;
    TZ_SHARED(Softmax, warps_smem, kWarps);
    if (threadIdx.x % kWarp == 0) warps_smem[threadIdx.x / kWarp] = s;
    __syncthreads();
    s = warps_smem[0];
#pragma unroll
    for (int w = 1; w < kWarps; w++) {
      const Softmax other = warps_smem[w];
      const float top = fmaxf(s.top, other.top);
      const Softmax left = raised(s, top), right = raised(other, top);
      s = {top, left.sum + right.sum, left.dot + right.dot};
    }
    __syncthreads();  // the next row overwrites
  }
  return s;
}

// f(row, its logits, is it no padding, its softmax, lane, lanes) for every row of this team. Grid: tiles of l x batch rows. Everyone of
// a block comes along to the end, since teams share warps.
template <class T, int vec, bool kBlockTeams, class F> TZ_DEVICE void for_rows(const PatchEntropyParams& p, int lanes, const F& f) {
  if (kBlockTeams) lanes = threads_of(true);
  const int lane = static_cast<int>(threadIdx.x) % lanes, V = static_cast<int>(p.V);
  const int64_t l = static_cast<int64_t>(blockIdx.x) * (threads_of(kBlockTeams) / lanes) + threadIdx.x / lanes;
  for (int64_t b = blockIdx.y; b < p.B; b += gridDim.y) {
    const T* x = static_cast<const T*>(p.logits) + b * p.logits_stride_b + l * p.logits_stride_l;
    const bool live = l < (p.valid_lengths ? min(p.L, static_cast<int64_t>(p.valid_lengths[b])) : p.L);
    const Softmax mine = live ? lane_softmax<T, vec>(x, V, lane, lanes) : Softmax{-INFINITY, 0.0f, 0.0f};
    const Softmax s = team_softmax<kBlockTeams>(mine, min(lanes, kWarp));
    if (l < p.L) f(b * p.L + l, x, live, s, lane, lanes);
  }
}

template <class T, int vec, bool kBlockTeams>
__global__ void __launch_bounds__(threads_of(kBlockTeams)) entropy_patch_fwd_kernel(const PatchEntropyParams p, const int lanes) {
  for_rows<T, vec, kBlockTeams>(p, lanes, [&](int64_t row, const T*, bool live, const Softmax& s, int lane, int) {
    if (lane > 0) return;
    const float entropy = s.top == -INFINITY ? NAN : logf(s.sum) - s.dot / s.sum;
    static_cast<float*>(p.entropies)[row] = live ? entropy : 0.0f;
  });
}

template <class T, int vec, bool kBlockTeams>
__global__ void __launch_bounds__(threads_of(kBlockTeams)) entropy_patch_bwd_kernel(const PatchEntropyParams p, const int lanes) {
  for_rows<T, vec, kBlockTeams>(p, lanes, [&](int64_t row, const T* x, bool live, const Softmax& s, int lane, int team) {
    T* dx = static_cast<T*>(p.dlogits) + row * p.V;
    const float scale = live ? -static_cast<const float*>(p.dentropies)[row] / s.sum : 0.0f, shift = s.dot / s.sum;
    const int pieces = static_cast<int>(p.V / vec);
    for (int piece = lane; piece < pieces; piece += team) {
      const int64_t c = int64_t{piece} * vec;  // counted in elements, nvcc loses sight of what lies side by side, and stores one by one
      float v[vec] = {};
      if (live) {
        load_floats<T, vec>(x + c, v);
#pragma unroll
        for (int j = 0; j < vec; j++) {
          const float a = floored(v[j] - s.top);
          v[j] = scale * __expf(a) * (a - shift);
        }
      }
      store_vector(to_vector<T>(v), dx + c);
    }
  });
}

// fn(T{}, vector width, block teams?, lanes) for these arguments.
template <int value> struct Constant { static constexpr int v = value; };
template <class F> cudaError_t with_shape(const PatchEntropyParams& p, bool aligned, const F& fn) {
  if (p.V > INT32_MAX / 2) return cudaErrorInvalidValue;
  return with_type(p.dtype, [&](auto t) {
    const auto with_teams = [&](auto vec) {
      constexpr int64_t kMost = decltype(vec)::v * kPiecesOfLane;
      if (p.V > kWarp * kMost) return fn(t, vec, Constant<true>{}, 0);
      int lanes = kLeastLanes;
      while (lanes < kWarp && lanes * kMost < p.V) lanes *= 2;
      return fn(t, vec, Constant<false>{}, lanes);
    };
    return aligned ? with_teams(Constant<kVec>{}) : with_teams(Constant<1>{});
  });
}

// Whether rows of V elements with these strides can be read in vectors of kVec.
bool rows_aligned(const void* base, int64_t V, int64_t stride_b, int64_t stride_l, DType dtype) {
  return reinterpret_cast<uintptr_t>(base) % (kVec * static_cast<uintptr_t>(size_of(dtype))) == 0 && V % kVec == 0 && stride_b % kVec == 0 && stride_l % kVec == 0;
}
bool logits_aligned(const PatchEntropyParams& p) { return rows_aligned(p.logits, p.V, p.logits_stride_b, p.logits_stride_l, p.dtype); }

dim3 grid_of(const PatchEntropyParams& p, int teams) {
  return dim3(static_cast<unsigned>(ceil_div(p.L, teams)), static_cast<unsigned>(p.B < kMostBlocks ? p.B : kMostBlocks));
}

}  // namespace

cudaError_t entropy_patch_fwd_cuda(const EntropyPatchCudaParams& p, cudaStream_t stream) {
  const PatchEntropyParams& rows = p.entropy;
  if (rows.B == 0) return cudaSuccess;
  const cudaError_t error = with_shape(rows, logits_aligned(rows), [&](auto t, auto vec, auto block_teams, int lanes) {
    constexpr bool kBlockTeams = decltype(block_teams)::v;
    constexpr int kThreads = threads_of(kBlockTeams);
    return launch(entropy_patch_fwd_kernel<decltype(t), decltype(vec)::v, kBlockTeams>, grid_of(rows, kBlockTeams ? 1 : kThreads / lanes), kThreads, 0,
                  stream, rows, lanes);
  });
  return error != cudaSuccess ? error : patch_cut_cuda({p.cut, p}, stream);
}

cudaError_t entropy_patch_bwd_cuda(const PatchEntropyParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.L == 0) return cudaSuccess;
  return with_shape(p, logits_aligned(p) && rows_aligned(p.dlogits, p.V, 0, 0, p.dtype), [&](auto t, auto vec, auto block_teams, int lanes) {
    constexpr bool kBlockTeams = decltype(block_teams)::v;
    constexpr int kThreads = threads_of(kBlockTeams);
    return launch(entropy_patch_bwd_kernel<decltype(t), decltype(vec)::v, kBlockTeams>, grid_of(p, kBlockTeams ? 1 : kThreads / lanes), kThreads, 0, stream,
                  p, lanes);
  });
}

}}  // namespace terrazzo::cuda
