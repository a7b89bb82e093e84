// Attention between patches and their bytes: y[i] = sum over the keys j that i sees of softmax_j(scale q[i] . k[j]) v[j]; else zeros.
//   q [B, Lq, H, P], k and v [B, Lk, Hk, P], ids [B, L] the patch of each byte, not decreasing where it isn't negative. Patches ask (each
//   patch's K queries see its bytes) or bytes ask (each byte sees its patch's K keys), and the patches before within a window.
//   (Pagnoni et al. 2024, Byte Latent Transformer.)
//
// Bytes of a patch lie side by side, so the pairs that count are a band, for the kernels of attention.cuh. What is found here is where the
// patches begin: one pass over the ids. The tensor cores multiply more pairs than count, some 16 queries by the keys of 16 patches, which
// they have time for: the limit are the bytes of q, k, v and y.
#include "attention.cuh"
#include "kernels.h"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kStartThreads = 256, kLook = 8;  // positions a lane looks at in one step back
constexpr int64_t kMostBlocks = 65535;         // along y of a grid

// starts[b, s]: the first byte whose id is s or more, L without one; so bytes of no patch may stand anywhere between two. A byte that is
// first to reach a patch, or several, writes where they begin. No atomics, nothing to clear first.
// live[b, l], if wanted: whether byte l is a key that may be seen. A lane has one byte; position L ends the row with id S. Ids that are not
// sorted leave starts that mean nothing, but inside [0, L].
__global__ void __launch_bounds__(kStartThreads)
patch_starts_kernel(const int32_t* __restrict__ ids /* [B, L] */, int32_t* __restrict__ starts /* [B, S + 1] */,
                    const uint8_t* __restrict__ key_mask /* [B, L] or null */, uint8_t* __restrict__ live /* [B, L] or null */, const int64_t B,
                    const int L, const int S) {
  const int warp_first = static_cast<int>(blockIdx.x) * kStartThreads + static_cast<int>(threadIdx.x) / kWarp * kWarp, l = warp_first + lane_id();
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y) {
    const int32_t* row = ids + b * L;
    const int id = l < L ? min(max(row[l], -1), S) : l == L ? S : -1;
    if (live && l < L) live[b * L + l] = id >= 0 && id < S && (!key_mask || key_mask[b * L + l]);
    if (!__any_sync(kAllLanes, id >= 0)) continue;

    // the id before each byte: the largest of the lanes before, or of the nearest bytes in front of the warp that have one
    int reached = id;
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const int other = __shfl_up_sync(kAllLanes, reached, lanes);
      if (lane_id() >= lanes) reached = max(reached, other);
    }
    int before = -1;
    for (int at = warp_first; before < 0 && at > 0; at -= kLook * kWarp) {
      for (int i = 0; i < kLook; i++) {
        const int place = at - 1 - i * kWarp - lane_id();
        if (place >= 0) before = max(before, min(row[place], S));
      }
      for (int lanes = 1; lanes < kWarp; lanes *= 2) before = max(before, __shfl_xor_sync(kAllLanes, before, lanes));
    }
    int previous = __shfl_up_sync(kAllLanes, reached, 1);
    previous = max(lane_id() == 0 ? -1 : previous, before);

    // the whole warp writes for one lane after the other: behind the last patch there may be many empty ones
    for (unsigned todo = __ballot_sync(kAllLanes, id > previous); todo; todo &= todo - 1) {
      const int lane = __ffs(static_cast<int>(todo)) - 1;
      const int from = __shfl_sync(kAllLanes, previous, lane) + 1, to = __shfl_sync(kAllLanes, id, lane);
      for (int s = from + lane_id(); s <= to; s += kWarp) starts[b * (S + 1) + s] = warp_first + lane;
    }
  }
}

// The band of the patches; false where a size is out of range.
bool fill(Attention& a, const PatchCrossAttentionCudaParams& p) {
  if (!fill_attention(a, p, p.Lq, p.Lk) || p.S > INT32_MAX / 2 || p.K > INT32_MAX / 2) return false;
  a.bytes_ask = p.bytes_ask, a.K = static_cast<int>(p.K), a.S = static_cast<int>(p.S);
  a.window = static_cast<int>(p.window < p.S ? p.window : p.S);
  a.ids = p.ids, a.starts = p.patch_starts, a.live = p.bytes_ask ? p.key_mask : p.live;
  return true;
}

cudaError_t find_starts(const PatchCrossAttentionCudaParams& p, cudaStream_t stream) {
  return find_patch_starts(p.ids, p.patch_starts, p.B, p.L, p.S, p.bytes_ask ? nullptr : p.key_mask, p.bytes_ask ? nullptr : p.live, stream);
}

}  // namespace

cudaError_t find_patch_starts(const int32_t* ids, int32_t* starts, int64_t B, int64_t L, int64_t S, const uint8_t* key_mask, uint8_t* live,
                              cudaStream_t stream) {
  if (L > INT32_MAX / 2 || S > INT32_MAX / 2) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(ceil_div(L + 1, kStartThreads)), static_cast<unsigned>(B < kMostBlocks ? B : kMostBlocks));
  return launch(patch_starts_kernel, grid, kStartThreads, 0, stream, ids, starts, key_mask, live, B, static_cast<int>(L), static_cast<int>(S));
}

cudaError_t patch_cross_attention_fwd_cuda(const PatchCrossAttentionCudaParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.Lq == 0) return cudaSuccess;
  Attention a{};
  if (!fill(a, p)) return cudaErrorInvalidValue;
  if (!p.bytes_ask) {  // keys of patches lie by arithmetic
    const cudaError_t error = find_starts(p, stream);
    if (error != cudaSuccess) return error;
  }
  return attention_fwd(a, p.dtype, stream);
}

cudaError_t patch_cross_attention_bwd_cuda(const PatchCrossAttentionCudaParams& p, cudaStream_t stream) {
  if (p.B == 0) return cudaSuccess;
  Attention a{};
  if (!fill(a, p)) return cudaErrorInvalidValue;
  a.y = {}, a.lse = static_cast<float*>(p.stats), a.delta = a.lse + p.B * p.H * p.Lq;
  cudaError_t error = find_starts(p, stream);
  if (error == cudaSuccess && p.Lq > 0) error = attention_bwd_queries(a, p.dtype, stream);
  if (error == cudaSuccess && p.Lk > 0) error = attention_bwd_keys(a, p.dtype, stream);
  return error;
}

}}  // namespace terrazzo::cuda
