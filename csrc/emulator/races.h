// Data races: two threads touch the same byte, at least one writes, and nothing orders them. Found in whatever order the threads ran.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emu {

// What the running thread looks like to the detector. A barrier raises barrier_epoch, __syncwarp raises warp_epoch.
struct Clock {
  int64_t block;
  int thread;
  uint32_t barrier_epoch, warp_epoch;
};

// In the runtime: the running thread's clock, whether an address is a thread's own stack, and where a race is reported.
Clock clock_now();
bool on_a_stack(const void* p);
void report_race(const char* what, const void* p, int64_t other_block, int other_thread);

enum class Access { read, write, atomic };
bool detecting_races();                     // whether the kernels were compiled for it
void note(const void* p, size_t bytes, Access access);
void forget(const void* p, size_t bytes);   // memory that another block used before
void forget_everything();                   // a new launch
void fences_used();                         // this launch orders threads of different blocks: those are no longer judged

}  // namespace emu
