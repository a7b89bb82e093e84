// Stacks that switch by hand, twelve instructions a switch. Sanitizers are told where they are, when there are any.
#pragma once
#include <cstddef>

namespace emu {

constexpr size_t kStackBytes = 256 * 1024;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;      // lowest address; null for the host's own stack
  void* fake_stack = nullptr; // AddressSanitizer's
};

// Makes `fiber` start `entry` at the next switch to it. entry never returns.
void prepare(Fiber& fiber, char* stack, void (*entry)());
void switch_fibers(Fiber& from, Fiber& to);
// The first thing that entry does.
void fiber_started();

}  // namespace emu
