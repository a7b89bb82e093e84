// Where patches begin, given entropies or tokens: the rules are those of csrc/cpu/entropy_patch.cpp.
// Layouts: source [B, L] in any strides (tokens contiguous); starts, ids and lengths [B, N], N = L or L + 1; counts [B].
//
// What a position needs from those before it is little: where the last patch began by the rule, and how many patches there are.
// A maximum length needs no state of its own, since a position also starts a patch where its distance from the last start by the
// rule is a multiple of it, and how many such places lie in a gap is a division. So what positions a..b do to those behind is a Run of three
// numbers, and Runs join associatively. One kernel writes the Run of every tile; the next joins the Runs before its tile (and those
// behind, for the number of patches), and places its patches: two launches, no atomics, nothing waits for another block. A row of
// one tile takes the second kernel alone. A warp votes on 32 positions at a time; its votes stay in registers between the two looks.
//
// The rule that takes a text's largest entropies first finds the last one taken: a radix select, a block for each text.
#include "kernels.h"

#include "patch_cut.cuh"

namespace terrazzo { namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kWords = kPatchTile / kThreads;  // words: votes of a warp
static_assert(kWords * kThreads == kPatchTile);
constexpr int kSelectThreads = 256, kDigits = 256;
constexpr int kBlocksPerSm = 6;  // at most 40 registers, without spilling

// Starts by the rule: the first, the last, and how many patches begin from the first to the last; first < 0: there are none.
struct Run {
  int first, last, patches;
};
TZ_DEVICE Run no_run() { return {-1, -1, 0}; }

// `limit`: the longest a patch may get, so long that it never does where there is none.
TZ_DEVICE Run joined(const Run& a, const Run& b, int limit) {
  if (a.first < 0) return b;
  if (b.first < 0) return a;
  return {a.first, b.last, a.patches + (b.first - a.last - 1) / limit + b.patches};
}
// Patches that begin in [0, end), of a row that has this Run: and where the last of them does.
TZ_DEVICE int patches_until(const Run& run, int end, int limit) { return run.first < 0 ? 0 : run.patches + (end - 1 - run.last) / limit; }
TZ_DEVICE int last_begin(const Run& run, int end, int limit) { return run.first < 0 ? 0 : run.last + (end - 1 - run.last) / limit * limit; }

// The positions of a row that are no padding.
TZ_DEVICE int live_end(const PatchCudaParams& p, int64_t row) {
  const int64_t valid = p.valid_lengths ? p.valid_lengths[row] : p.L;
  return static_cast<int>(max(int64_t{0}, min(valid, p.L)) + p.next);
}
TZ_DEVICE int text_begin(const PatchCudaParams& p, int64_t text) { return static_cast<int>(max(int64_t{0}, min(static_cast<int64_t>(p.cu_seqlens[text]), p.L))); }

// The last text of row 0 that begins at or before a position.
TZ_DEVICE int text_of(const PatchCudaParams& p, int position) {
  int low = 0, high = static_cast<int>(p.num_texts) - 1;
  while (low < high) {
    const int middle = high - (high - low) / 2;
    if (p.cu_seqlens[middle] <= position) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Rises with the entropy, of equals it is larger for the earlier; NaN is above everything. `place` in the text counts from 1.
TZ_DEVICE uint64_t key_of(float e, int place) {
  const unsigned bits = __float_as_uint(e == 0 ? 0.0f : e), order = e != e ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;
  return static_cast<uint64_t>(order) << 32 | ~static_cast<unsigned>(place);
}

// Does position i of a text start a patch by the rule? `at` is the element of that position.
template <class S> TZ_DEVICE bool starts_by_rule(const PatchCudaParams& p, const S* at, int64_t stride, int i, int64_t text, int size) {
  if (p.rule == PatchRule::bytes) return true;
  if (p.rule == PatchRule::fixed) return i % size == 0;
  if (i < 2) return true;
  if constexpr (std::is_same_v<S, int64_t>) {
    const int64_t byte = at[-1] - p.offset;
    return byte < 0 || (space_like(byte) && !space_like(at[-2] - p.offset));
  } else {
    const float e = to_float(at[-stride]);
    if (p.rule == PatchRule::top) return key_of(e, i - 1) >= p.largest[text];
    return unsure(p.rule, i, e, to_float(at[-2 * stride]), in_dtype<S>(p.threshold), static_cast<float>(p.threshold_add));
  }
}

// The votes of this warp on its kWords * 32 positions from `first`, and their Run.
template <class S> TZ_DEVICE Run vote(const PatchCudaParams& p, int64_t row, int first, int end, int limit, int size, unsigned (&words)[kWords]) {
  const int lane = threadIdx.x % kWarp;
  const bool tokens = std::is_same_v<S, int64_t>;
  const int64_t stride = tokens ? 1 : p.entropies_stride_l;
  const S* source = static_cast<const S*>(tokens ? static_cast<const void*>(p.tokens) : p.entropies) + row * (tokens ? p.L : p.entropies_stride_b);
  int64_t text = p.cu_seqlens ? text_of(p, first + lane) : row;
  Run run = no_run();
  int patches = 0;
#pragma unroll
  for (int k = 0; k < kWords; k++) {
    const int base = first + k * kWarp, position = base + lane;
    bool start = false;
    if (position < end) {
      int begin = 0;
      if (p.cu_seqlens) {
        while (text + 1 < p.num_texts && p.cu_seqlens[text + 1] <= position) text++;
        begin = min(text_begin(p, text), position);
      }
      start = starts_by_rule(p, source + position * stride, stride, position - begin, text, size);
    }
    const unsigned votes = words[k] = __ballot_sync(kAllLanes, start);
    if (!votes) continue;
    const unsigned below = votes & lanes_below(lane);
    const int before = below ? base + highest(below) : run.last;
    if (start) patches += 1 + (before < 0 ? 0 : (position - before - 1) / limit);
    if (run.first < 0) run.first = base + __ffs(static_cast<int>(votes)) - 1;
    run.last = base + highest(votes);
  }
  run.patches = warp_sum(patches);
  return run;
}

// The Run of tiles [begin, end) of a row, in lane 0: lane i has the i-th part of them.
TZ_DEVICE Run run_of_tiles(const Run* runs, int begin, int end, int limit) {
  const int lane = threadIdx.x % kWarp, part = ceil_div(end - begin, kWarp);
  Run run = no_run();
  for (int tile = begin + lane * part; tile < min(begin + (lane + 1) * part, end); tile++) run = joined(run, runs[tile], limit);
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const Run next{__shfl_down_sync(kAllLanes, run.first, lanes), __shfl_down_sync(kAllLanes, run.last, lanes), __shfl_down_sync(kAllLanes, run.patches, lanes)};
    if (lane + lanes < kWarp) run = joined(run, next, limit);
  }
  return run;
}

// Grid: rows x tiles.
template <class S> __global__ void __launch_bounds__(kThreads, kBlocksPerSm) patch_runs_kernel(const PatchCudaParams p, const int tiles, const int limit, const int size) {
  const int64_t row = blockIdx.x / static_cast<unsigned>(tiles);
  const int tile = blockIdx.x % static_cast<unsigned>(tiles), warp = threadIdx.x / kWarp;
  TZ_SHARED(Run, warps_smem, kWarps);
  unsigned words[kWords];
  const Run mine = vote<S>(p, row, tile * static_cast<int>(kPatchTile) + warp * kWords * kWarp, live_end(p, row), limit, size, words);
  if (threadIdx.x % kWarp == 0) warps_smem[warp] = mine;
  __syncthreads();
  if (threadIdx.x > 0) return;
  Run run = warps_smem[0];
#pragma unroll
  for (int w = 1; w < kWarps; w++) run = joined(run, warps_smem[w], limit);
  reinterpret_cast<Run*>(p.runs)[row * tiles + tile] = run;
}

template <class S> __global__ void __launch_bounds__(kThreads, kBlocksPerSm) patch_cut_kernel(const PatchCudaParams p, const int tiles, const int limit, const int size) {
  const int64_t row = blockIdx.x / static_cast<unsigned>(tiles);
  const int tile = blockIdx.x % static_cast<unsigned>(tiles), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int N = static_cast<int>(p.L) + p.next, end = live_end(p, row), first = tile * static_cast<int>(kPatchTile), mine = first + warp * kWords * kWarp;
  uint8_t* starts = p.starts + row * N;
  int32_t *ids = p.ids + row * N, *lengths = p.lengths + row * N;
  TZ_SHARED(Run, warps_smem, kWarps);
  TZ_SHARED(Run, tiles_smem, 2);  // before this tile; this one and those behind

  // the Runs of this tile's warps and of the other tiles
  unsigned words[kWords];
  const Run own = vote<S>(p, row, mine, end, limit, size, words);
  if (lane == 0) warps_smem[warp] = own;
  if (tiles > 1 && warp < 2) {
    const Run run = run_of_tiles(reinterpret_cast<const Run*>(p.runs) + row * tiles, warp ? tile : 0, warp ? tiles : tile, limit);
    if (lane == 0) tiles_smem[warp] = run;
  }
  __syncthreads();
  Run before = tiles > 1 ? tiles_smem[0] : no_run(), whole = tiles > 1 ? joined(before, tiles_smem[1], limit) : no_run();
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    if (tiles == 1) whole = joined(whole, warps_smem[w], limit);
    if (w < warp) before = joined(before, warps_smem[w], limit);
  }
  const int count = patches_until(whole, end, limit);

  // starts, ids, and the length of each patch that ends here
  int last = before.last, begin = last_begin(before, mine, limit), patches = patches_until(before, mine, limit);
#pragma unroll
  for (int k = 0; k < kWords; k++) {
    const int base = mine + k * kWarp, position = base + lane;
    const unsigned up_to_here = lanes_below(lane) | 1u << lane;
    const int by_rule = words[k] & up_to_here ? base + highest(words[k] & up_to_here) : last;
    const bool live = position < end, start = live && (position - by_rule) % limit == 0;
    const unsigned votes = __ballot_sync(kAllLanes, start);
    const int id = patches + __popc(votes & up_to_here) - 1;
    if (position < N) {
      starts[position] = start;
      ids[position] = live ? id : -1;
      if (start && id > 0) lengths[id - 1] = position - (votes & lanes_below(lane) ? base + highest(votes & lanes_below(lane)) : begin);
      if (position >= count) lengths[position] = 0;
    }
    if (words[k]) last = base + highest(words[k]);
    if (votes) begin = base + highest(votes);
    patches += __popc(votes);
  }
  if (tile > 0 || threadIdx.x > 0) return;
  p.counts[row] = count;
  if (count > 0) lengths[count - 1] = end - last_begin(whole, end, limit);
}

// largest[text]: the key of the last of its floor(length / patch_size) - 2 largest entropies, so that those have no smaller one.
// A byte of the keys at a time, from the highest: how many have each value among those that agree in the bytes above. Grid: texts.
template <class S> __global__ void __launch_bounds__(kSelectThreads) patch_top_kernel(const PatchCudaParams p) {
  const int64_t text = blockIdx.x, row = p.cu_seqlens ? 0 : text;
  const int begin = p.cu_seqlens ? text_begin(p, text) : 0, end = p.cu_seqlens ? text_begin(p, text + 1) : live_end(p, row) - p.next;
  const int candidates = end - begin + p.next - 2;
  const double wanted = floor(static_cast<double>(end - begin) / p.patch_size) - 2;
  if (candidates <= 0 || wanted < 1) {
    if (threadIdx.x == 0) p.largest[text] = ~uint64_t{0};
    return;
  }
  const int64_t stride = p.entropies_stride_l;
  const S* e = static_cast<const S*>(p.entropies) + row * p.entropies_stride_b + begin * stride;
  TZ_SHARED(int, counts_smem, kDigits);
  TZ_SHARED(int, chosen_smem, 2);  // the digit, and how many of its keys are taken
  uint64_t prefix = 0, mask = 0;
  int left = static_cast<int>(min(wanted, static_cast<double>(candidates)));
  for (int shift = 56; shift >= 0; shift -= 8) {
    uint64_t digit = kDigits - 1;
    bool all = false;                              // every key that agrees is taken: the bytes below may be anything
    if (shift >= 32 || candidates >> shift > 0) {  // else every key has this digit
      counts_smem[threadIdx.x] = 0;
      __syncthreads();
      for (int place = 1 + threadIdx.x; place <= candidates; place += kSelectThreads) {
        const uint64_t key = key_of(to_float(e[place * stride]), place);
        if ((key & mask) == prefix) atomicAdd(&counts_smem[key >> shift & (kDigits - 1)], 1);
      }
      __syncthreads();
      int above = 0;
      for (int d = kDigits - 1; d > static_cast<int>(threadIdx.x); d--) above += counts_smem[d];
      if (above < left && above + counts_smem[threadIdx.x] >= left) chosen_smem[0] = threadIdx.x, chosen_smem[1] = left - above;
      __syncthreads();
      digit = static_cast<uint64_t>(chosen_smem[0]), left = chosen_smem[1];
      all = counts_smem[digit] == left;
      __syncthreads();  // the next digit overwrites
    }
    prefix |= digit << shift, mask |= uint64_t{kDigits - 1} << shift;
    if (all) break;
  }
  if (threadIdx.x == 0) p.largest[text] = prefix;
}
static_assert(kSelectThreads == kDigits, "a thread for each digit");

template <class S> cudaError_t cut(const PatchCudaParams& p, cudaStream_t stream) {
  const int64_t N = p.L + p.next, tiles = patch_tiles(N);
  if (p.B == 0) return cudaSuccess;
  if (N > INT32_MAX - kPatchTile || p.B * tiles > INT32_MAX || p.num_texts >= INT32_MAX) return cudaErrorInvalidValue;
  const int limit = p.max_length ? static_cast<int>(p.max_length) : INT32_MAX;  // further than any position is from another
  const int size = static_cast<int>(p.patch_size < static_cast<double>(N) ? p.patch_size : static_cast<double>(N));
  const dim3 grid(static_cast<unsigned>(p.B * tiles));
  if constexpr (!std::is_same_v<S, int64_t>) {
    if (p.rule == PatchRule::top) {
      const cudaError_t error = launch(patch_top_kernel<S>, dim3(static_cast<unsigned>(p.num_texts)), kSelectThreads, 0, stream, p);
      if (error != cudaSuccess) return error;
    }
  }
  if (tiles > 1) {
    const cudaError_t error = launch(patch_runs_kernel<S>, grid, kThreads, 0, stream, p, static_cast<int>(tiles), limit, size);
    if (error != cudaSuccess) return error;
  }
  return launch(patch_cut_kernel<S>, grid, kThreads, 0, stream, p, static_cast<int>(tiles), limit, size);
}

}  // namespace

cudaError_t patch_cut_cuda(const PatchCudaParams& p, cudaStream_t stream) {
  return with_type(p.dtype, [&](auto t) { return cut<decltype(t)>(p, stream); });
}
cudaError_t patch_cut_tokens_cuda(const PatchCudaParams& p, cudaStream_t stream) { return cut<int64_t>(p, stream); }

}}  // namespace terrazzo::cuda
