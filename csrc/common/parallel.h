// Threads, scratch memory and what the machine has for the kernels, without torch.
//
// The torch glue installs torch's own thread pool with set_thread_pool(); without it (sanitizer harness)
// work runs serially. Scratch memory is kept per thread and reused, so a call causes no page faults.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace terrazzo {

using RangeFn = void (*)(const void* ctx, int64_t begin, int64_t end);
using ParallelForFn = void (*)(int64_t begin, int64_t end, int64_t grain, const void* ctx, RangeFn fn);

// Installs the pool: `threads` answers how many threads `run` may use now.
void set_thread_pool(ParallelForFn run, int (*threads)());
void run_parallel(int64_t begin, int64_t end, int64_t grain, const void* ctx, RangeFn fn);
int max_threads();

// Whether kernels may multiply by AMX tiles (of bfloat16): off until use_tiles(true), which needs tiles_granted(), the processor's
// word and the kernel's permission for this process.
bool tiles_granted();
void use_tiles(bool use);
bool tiles();

// Bytes of a core's second-level cache, which decides how products are cut; 0 where the system doesn't say. Tests assume others; a
// negative number asks the system again.
int64_t second_level_cache();
void assume_second_level_cache(int64_t bytes);

// fn(begin, end) over disjoint ranges that cover [begin, end), each of at least `grain` items; serially when
// the range is not larger than `grain`. Which thread gets which range depends on the number of threads:
// results must not. (A lambda type is local to the caller's namespace, so each ISA build has its own copy.)
template <class F>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& fn) {
  if (end <= begin) return;
  if (end - begin <= grain) return fn(begin, end);
  run_parallel(begin, end, grain, &fn, [](const void* ctx, int64_t b, int64_t e) { (*static_cast<const F*>(ctx))(b, e); });
}

// At least `bytes` of this thread's scratch memory, 64-byte aligned, contents undefined. One buffer per slot;
// a slot is valid until this thread asks for the same slot again. Throws std::bad_alloc.
constexpr int kScratchSlots = 16;
void* scratch_bytes(int slot, size_t bytes);
template <class T> inline T* scratch(int slot, int64_t count) {
  return static_cast<T*>(scratch_bytes(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace terrazzo
