// Where torch's tensors lie while a test runs compiled kernels on their memory: the allocator of CPU tensors, with a list. It leaves room
// between tensors, so that what reaches beyond one doesn't land in the next.
#include <c10/core/Allocator.h>

#include <cstdlib>
#include <map>
#include <mutex>

namespace {

constexpr size_t kBetween = 512, kAlignment = 64;
std::mutex mutex;
std::map<void*, size_t> live;  // tensor: bytes

void release(void* data) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    live.erase(data);
  }
  std::free(data);
}

struct Recording final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (posix_memalign(&data, kAlignment, bytes + kBetween)) throw std::bad_alloc();
    const std::lock_guard<std::mutex> lock(mutex);
    live[data] = bytes;
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} recording;

c10::Allocator* before = nullptr;

}  // namespace

#define TZ_EXPORT extern "C" __attribute__((visibility("default")))
TZ_EXPORT void emulator_record_allocations(int on) {
  if (on) before = c10::GetAllocator(c10::DeviceType::CPU);
  c10::SetAllocator(c10::DeviceType::CPU, on ? &recording : before);
}
// Writes (address, bytes) of up to `room` live tensors; returns how many there are.
TZ_EXPORT size_t emulator_allocations(uint64_t* out, size_t room) {
  const std::lock_guard<std::mutex> lock(mutex);
  size_t i = 0;
  for (const auto& [data, bytes] : live) {
    if (i < room) out[2 * i] = reinterpret_cast<uint64_t>(data), out[2 * i + 1] = bytes;
    i++;
  }
  return live.size();
}
