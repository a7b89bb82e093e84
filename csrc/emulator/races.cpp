// g++ -fsanitize=thread makes a kernel call __tsan_read4(p) and so on before every access to memory. Here these calls are
// answered by a detector that knows CUDA's order of events instead of the host's: libtsan is not linked.
//
// For each byte the last write and the reads since are kept. Two accesses of a block are ordered when a barrier, or for
// threads of one warp a __syncwarp, lies between them; those of different blocks are not, but see fences_used.
#include "races.h"

#include <memory>
#include <unordered_map>

namespace emu {
namespace {

enum class Spread : uint8_t { nobody, thread, warp, block, blocks };  // who read, at most
struct Event {
  int64_t block = 0;
  int thread = 0;
  uint32_t barrier_epoch = 0, warp_epoch = 0;
  Spread spread = Spread::nobody;
  bool atomic = false;
};
struct Byte { Event write, read; };
constexpr size_t kPage = 1024;
struct Page { Byte bytes[kPage]; };

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_number = ~uintptr_t(0);
Page* last_page = nullptr;
bool instrumented = false, fences = false;

Byte& byte_at(uintptr_t address) {
  if (address / kPage != last_number) {
    auto& page = pages[last_number = address / kPage];
    if (!page) page = std::make_unique<Page>();
    last_page = page.get();
  }
  return last_page->bytes[address % kPage];
}

bool ordered(const Event& before, const Clock& now) {
  if (before.spread == Spread::nobody) return true;
  if (before.spread == Spread::blocks || before.block != now.block) return fences;
  if (before.barrier_epoch < now.barrier_epoch) return true;
  if (before.spread == Spread::block || before.thread / 32 != now.thread / 32) return false;
  return before.warp_epoch < now.warp_epoch || (before.spread == Spread::thread && before.thread == now.thread);
}

void note_byte(uintptr_t address, Access access, const Clock& now) {
  Byte& byte = byte_at(address);
  const bool atomic = access == Access::atomic;
  const Event event{now.block, now.thread, now.barrier_epoch, now.warp_epoch, Spread::thread, atomic};
  if (!ordered(byte.write, now) && !(atomic && byte.write.atomic))
    report_race(access == Access::read ? "reads what was written by" : "overwrites what was written by", reinterpret_cast<void*>(address),
                byte.write.block, byte.write.thread);
  Event& read = byte.read;
  if (access == Access::read) {
    if (ordered(read, now)) read = event;
    else if (read.block != now.block) read.spread = Spread::blocks;
    else if (read.thread / 32 != now.thread / 32 || read.spread >= Spread::block) read.spread = read.spread < Spread::block ? Spread::block : read.spread;
    else read.spread = Spread::warp, read.warp_epoch = now.warp_epoch;
    return;
  }
  if (!ordered(read, now)) report_race("overwrites what was read by", reinterpret_cast<void*>(address), read.block, read.thread);
  read = {};
  byte.write = event;
}

}  // namespace

bool detecting_races() { return instrumented; }

void note(const void* p, size_t bytes, Access access) {
  if (!instrumented || on_a_stack(p)) return;
  const Clock now = clock_now();
  if (now.block < 0) return;  // the launcher, outside a kernel
  for (size_t i = 0; i < bytes; i++) note_byte(reinterpret_cast<uintptr_t>(p) + i, access, now);
}

void forget(const void* p, size_t bytes) {
  if (!instrumented) return;
  for (size_t i = 0; i < bytes; i++) byte_at(reinterpret_cast<uintptr_t>(p) + i) = {};
}

void forget_everything() {
  pages.clear();
  last_number = ~uintptr_t(0);
  fences = false;
}

void fences_used() { fences = true; }

}  // namespace emu

// What the compiler calls.
extern "C" {
void __tsan_init() { emu::instrumented = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* p, unsigned long n) { emu::note(p, n, emu::Access::read); }
void __tsan_write_range(void* p, unsigned long n) { emu::note(p, n, emu::Access::write); }
#define TZ_ACCESS(n)                                                                  \
  void __tsan_read##n(void* p) { emu::note(p, n, emu::Access::read); }                \
  void __tsan_write##n(void* p) { emu::note(p, n, emu::Access::write); }              \
  void __tsan_unaligned_read##n(void* p) { emu::note(p, n, emu::Access::read); }      \
  void __tsan_unaligned_write##n(void* p) { emu::note(p, n, emu::Access::write); }
TZ_ACCESS(1)
TZ_ACCESS(2)
TZ_ACCESS(4)
TZ_ACCESS(8)
TZ_ACCESS(16)
}
