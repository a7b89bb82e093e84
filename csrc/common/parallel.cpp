#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace terrazzo {
namespace {

std::atomic<ParallelForFn> g_run{nullptr};
std::atomic<int (*)()> g_threads{nullptr};
std::atomic<bool> g_tiles{false};
std::atomic<int64_t> g_second_level{-1};

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

bool tiles_granted() {
#if defined(__linux__) && defined(__x86_64__) && defined(SYS_arch_prctl)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kXsave = 1u << 27;  // leaf 7 edx, leaf 1 ecx
  constexpr unsigned kTileState = 3u << 17;                                  // of XCR0: tile configuration and data
  constexpr int kRequestPermission = 0x1023, kTileData = 18;                 // arch_prctl
  unsigned eax, ebx, ecx, edx, low, high;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kXsave)) return false;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
void use_tiles(bool use) { g_tiles = use; }
bool tiles() { return g_tiles.load(std::memory_order_relaxed); }

int64_t second_level_cache() {
  int64_t bytes = g_second_level.load(std::memory_order_relaxed);
  if (bytes >= 0) return bytes;
#ifdef _SC_LEVEL2_CACHE_SIZE
  bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  if (bytes < 0) bytes = 0;
  g_second_level = bytes;
  return bytes;
}
void assume_second_level_cache(int64_t bytes) { g_second_level = bytes; }

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
