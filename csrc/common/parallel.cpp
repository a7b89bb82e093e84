#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include <unistd.h>

namespace terrazzo {
namespace {

std::atomic<ParallelForFn> g_run{nullptr};
std::atomic<int (*)()> g_threads{nullptr};

struct ScratchArena {
  void* data[kScratchSlots] = {};
  size_t size[kScratchSlots] = {};
  ~ScratchArena() {
    for (void* p : data) std::free(p);
  }
};

}  // namespace

void set_thread_pool(ParallelForFn run, int (*threads)()) {
  g_threads = threads;
  g_run = run;
}

void run_parallel(int64_t begin, int64_t end, int64_t grain, const void* ctx, RangeFn fn) {
  if (ParallelForFn run = g_run) return run(begin, end, grain, ctx, fn);
  fn(ctx, begin, end);
}

int max_threads() {
  auto threads = g_threads.load();
  return threads ? threads() : 1;
}

int64_t second_level_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 0;
}

void* scratch_bytes(int slot, size_t bytes) {
  static thread_local ScratchArena arena;
  if (arena.size[slot] < bytes) {
    std::free(arena.data[slot]);
    arena.size[slot] = 0;
    size_t rounded = (bytes + 4095) / 4096 * 4096;
    arena.data[slot] = std::aligned_alloc(4096, rounded);
    if (!arena.data[slot]) throw std::bad_alloc();
    arena.size[slot] = rounded;
  }
  return arena.data[slot];
}

}  // namespace terrazzo
