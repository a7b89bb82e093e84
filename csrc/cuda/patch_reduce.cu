// One row for each patch of bytes: y[b, s] = max, mean or min of h[b, l] over the bytes l of patch s; zeros where it is empty. A NaN among
// a patch's values is its result, as in torch. Layouts: h [B, L, D] with unit stride d, y [B, S, D] and dh [B, L, D] contiguous.
//
// Memory bandwidth is the limit: h is read once, y written once. A block has a few patches, a thread 16 bytes of the channels of one of
// them, so that no lane is idle whatever D is; it reads kRows bytes' rows at a time, all under way at once. Which of them belong to the
// patch is seen while they come: a byte of no patch among them is read in vain.
// Backward: mean gives every byte dy / n; max and min give dy to the bytes that hold it, in equal parts: a look at h that counts them,
// and a second one, from L1 and L2, that writes. Bytes of no patch are zeroed by a kernel of their own: there may be long runs of them.
#include "kernels.h"

#include "common.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kThreads = 128, kRows = 4;
constexpr int kClearThreads = 128, kClearRows = 32;

// The channels [d, d + kVec) of patch s of row b that this thread has at step i of its block, and the patch's range.
template <int kVec> struct Piece {
  int64_t b, s, d, begin, end;
  TZ_DEVICE Piece(const PatchReduceCudaParams& p, int64_t first_patch, int i) {
    // signed numbers: with unsigned ones nvcc loses sight of what lies side by side, and stores a vector element by element
    const int pieces = static_cast<int>(p.D / kVec), patch = i / pieces;
    const unsigned item = static_cast<unsigned>(first_patch) + static_cast<unsigned>(patch);
    b = item / static_cast<unsigned>(p.S), s = item % static_cast<unsigned>(p.S), d = static_cast<int64_t>(i - patch * pieces) * kVec;
    const int32_t* starts = p.patch_starts + b * (p.S + 1) + s;
    begin = starts[0], end = starts[1];
  }
};

// fn(l, h values) for every byte of the patch, in order.
template <class T, int kVec, class F> TZ_DEVICE void for_bytes(const PatchReduceCudaParams& p, const Piece<kVec>& piece, const F& fn) {
  const T* h = static_cast<const T*>(p.h) + piece.b * p.h_stride_b + piece.d;
  const int32_t* ids = p.ids + piece.b * p.L;
  for (int64_t first = piece.begin; first < piece.end; first += kRows) {
    Vector<T, kVec> rows_rmem[kRows];
    bool mine[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int64_t l = first + r;
      mine[r] = l < piece.end && ids[l] == piece.s;
      if (l < piece.end) rows_rmem[r] = load_vector<T, kVec>(h + l * p.h_stride_l);
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (!mine[r]) continue;
      float v[kVec];
      to_floats(rows_rmem[r], v);
      fn(first + r, v);
    }
  }
}

// Grid: tiles of `patches` patches, rows one behind the other. sign: 1 for the largest, -1 for the smallest.
template <class T, int kVec, bool kMean>
__global__ void __launch_bounds__(kThreads) patch_reduce_fwd_kernel(const PatchReduceCudaParams p, const int patches, const float sign) {
  const int64_t first_patch = static_cast<int64_t>(blockIdx.x) * patches, left = p.B * p.S - first_patch;
  const int count = static_cast<int>(p.D / kVec) * static_cast<int>(left < patches ? left : patches);
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const Piece<kVec> piece(p, first_patch, i);
    float acc[kVec] = {};
    int n = 0;
    for_bytes<T>(p, piece, [&](int64_t, const float (&v)[kVec]) {
#pragma unroll
      for (int j = 0; j < kVec; j++) {
        if (kMean) acc[j] += v[j];
        else if (n == 0 || sign * v[j] > sign * acc[j] || v[j] != v[j]) acc[j] = v[j];  // nothing is larger than NaN
      }
      n++;
    });
    if (kMean && n > 0) {
#pragma unroll
      for (int j = 0; j < kVec; j++) acc[j] /= static_cast<float>(n);
    }
    store_vector(to_vector<T>(acc), static_cast<T*>(p.y) + (piece.b * p.S + piece.s) * p.D + piece.d);
  }
}

// The same grid.
template <class T, int kVec, bool kMean> __global__ void __launch_bounds__(kThreads) patch_reduce_bwd_kernel(const PatchReduceCudaParams p, const int patches) {
  const int64_t first_patch = static_cast<int64_t>(blockIdx.x) * patches, left = p.B * p.S - first_patch;
  const int count = static_cast<int>(p.D / kVec) * static_cast<int>(left < patches ? left : patches);
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const Piece<kVec> piece(p, first_patch, i);
    const int64_t at = (piece.b * p.S + piece.s) * p.D + piece.d;
    T* dh = static_cast<T*>(p.dh) + piece.b * p.L * p.D + piece.d;
    float y[kVec], dy[kVec], share[kVec] = {};
    load_floats(static_cast<const T*>(p.dy) + at, dy);
    if constexpr (kMean) {
      const int32_t* ids = p.ids + piece.b * p.L;
      int n = 0;
      for (int64_t l = piece.begin; l < piece.end; l++) n += ids[l] == piece.s;
#pragma unroll
      for (int j = 0; j < kVec; j++) share[j] = dy[j] / static_cast<float>(n);
      for (int64_t l = piece.begin; l < piece.end; l++)
        if (ids[l] == piece.s) store_vector(to_vector<T>(share), dh + l * p.D);
    } else {
      load_floats(static_cast<const T*>(p.y) + at, y);
      for_bytes<T>(p, piece, [&](int64_t, const float (&v)[kVec]) {
#pragma unroll
        for (int j = 0; j < kVec; j++) share[j] += v[j] == y[j];
      });
#pragma unroll
      for (int j = 0; j < kVec; j++) share[j] = dy[j] / share[j];
      for_bytes<T>(p, piece, [&](int64_t l, const float (&v)[kVec]) {
        float dv[kVec];
#pragma unroll
        for (int j = 0; j < kVec; j++) dv[j] = v[j] == y[j] ? share[j] : 0;  // a result of NaN is nobody's
        store_vector(to_vector<T>(dv), dh + l * p.D);
      });
    }
  }
}

// dh of bytes of no patch is zero. Grid: tiles of kClearRows bytes, rows one behind the other; a warp for each byte.
template <class T, int kVec> __global__ void __launch_bounds__(kClearThreads) patch_reduce_clear_kernel(const PatchReduceCudaParams p) {
  const int lane = threadIdx.x % kWarp;
  for (int r = threadIdx.x / kWarp; r < kClearRows; r += kClearThreads / kWarp) {
    const int64_t byte = static_cast<int64_t>(blockIdx.x) * kClearRows + r;
    if (byte >= p.B * p.L) return;
    if (p.ids[byte] >= 0 && p.ids[byte] < p.S) continue;
    const float zeros[kVec] = {};
    for (int64_t d = lane * kVec; d < p.D; d += kWarp * kVec) store_vector(to_vector<T>(zeros), static_cast<T*>(p.dh) + byte * p.D + d);
  }
}

// fn(T{}, vector width, mean or not)
template <int value> struct Constant { static constexpr int v = value; };
template <class F> cudaError_t with_shape(const PatchReduceCudaParams& p, bool rows_aligned, const F& fn) {
  if (p.B * p.S > INT32_MAX || p.B * ceil_div(p.L, kClearRows) > INT32_MAX || p.D > INT32_MAX / kThreads) return cudaErrorInvalidValue;
  return with_type(p.dtype, [&](auto t) {
    constexpr int kVec = kVectorBytes / sizeof(t);
    const auto with_vector = [&](auto vec) {
      return p.reduce == PatchReduction::mean ? fn(t, vec, Constant<1>{}) : fn(t, vec, Constant<0>{});
    };
    return rows_aligned && p.D % kVec == 0 ? with_vector(Constant<kVec>{}) : with_vector(Constant<1>{});
  });
}
bool inputs_aligned(const PatchReduceCudaParams& p) {
  const int64_t bytes = size_of(p.dtype);
  return aligned(p.h, p.h_stride_b, bytes) && aligned(p.h, p.h_stride_l, bytes) && aligned(p.y, p.D, bytes);
}
// Patches of a block: as many pieces as leave few threads idle at the end.
int patches_of(int64_t pieces) { return static_cast<int>(pieces >= 4 * kThreads ? 1 : pieces >= kWarp ? 4 : 4 * kThreads / pieces); }
unsigned count(int64_t n) { return static_cast<unsigned>(n); }

}  // namespace

cudaError_t patch_reduce_fwd_cuda(const PatchReduceCudaParams& p, cudaStream_t stream) {
  if (p.dtype == DType::f64) return cudaErrorInvalidValue;
  if (p.B == 0 || p.S == 0) return cudaSuccess;
  const cudaError_t error = find_patch_starts(p.ids, p.patch_starts, p.B, p.L, p.S, nullptr, nullptr, stream);
  if (error != cudaSuccess) return error;
  return with_shape(p, inputs_aligned(p), [&](auto t, auto vec, auto mean) {
    const int patches = patches_of(p.D / decltype(vec)::v);
    return launch(patch_reduce_fwd_kernel<decltype(t), decltype(vec)::v, decltype(mean)::v != 0>, dim3(count(ceil_div(p.B * p.S, patches))), kThreads, 0, stream,
                  p, patches, p.reduce == PatchReduction::amin ? -1.0f : 1.0f);
  });
}

cudaError_t patch_reduce_bwd_cuda(const PatchReduceCudaParams& p, cudaStream_t stream) {
  if (p.dtype == DType::f64) return cudaErrorInvalidValue;
  if (p.B == 0 || p.L == 0) return cudaSuccess;
  const int64_t bytes = size_of(p.dtype);
  const bool rows_aligned = inputs_aligned(p) && aligned(p.dy, p.D, bytes) && aligned(p.dh, p.D, bytes);
  if (p.S > 0) {
    cudaError_t error = find_patch_starts(p.ids, p.patch_starts, p.B, p.L, p.S, nullptr, nullptr, stream);
    if (error != cudaSuccess) return error;
    error = with_shape(p, rows_aligned, [&](auto t, auto vec, auto mean) {
      const int patches = patches_of(p.D / decltype(vec)::v);
      return launch(patch_reduce_bwd_kernel<decltype(t), decltype(vec)::v, decltype(mean)::v != 0>, dim3(count(ceil_div(p.B * p.S, patches))), kThreads, 0,
                    stream, p, patches);
    });
    if (error != cudaSuccess) return error;
  }
  return with_shape(p, rows_aligned, [&](auto t, auto vec, auto) {
    return launch(patch_reduce_clear_kernel<decltype(t), decltype(vec)::v>, dim3(count(ceil_div(p.B * p.L, kClearRows))), kClearThreads, 0, stream, p);
  });
}

}}  // namespace terrazzo::cuda
