#include "fiber.h"

#if !defined(__x86_64__)
#error "the CUDA emulator switches stacks by hand and knows x86-64 only"
#endif

#define TZ_WEAK __attribute__((weak))
extern "C" {
void emu_switch_stacks(void** save, void* to);
TZ_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
TZ_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}

asm(R"(
.text
.type emu_switch_stacks, @function
emu_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_stacks, .-emu_switch_stacks
)");

namespace emu {
namespace {

const void* host_bottom = nullptr;  // the host's stack, as the sanitizer told the first fiber
size_t host_size = 0;

}  // namespace

void prepare(Fiber& fiber, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 64);
  *--top = nullptr;  // where entry would return to; also aligns its frame
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber = {top, stack, nullptr};
}

void switch_fibers(Fiber& from, Fiber& to) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack ? to.stack : host_bottom, to.stack ? kStackBytes : host_size);
  emu_switch_stacks(&from.stack_pointer, to.stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void fiber_started() {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!host_bottom) host_bottom = bottom, host_size = size;  // only the host starts the first one
}

}  // namespace emu
