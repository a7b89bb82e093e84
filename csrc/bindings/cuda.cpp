// How the glue launches CUDA kernels, and what it tells of them. Nothing here needs more than a CPU-only torch to link: CUDA's runtime
// is linked statically, and the one function that only a CUDA torch has is a weak symbol.
#include <atomic>

#include "glue.h"

namespace terrazzo { namespace cuda {

#if defined(TZ_WITH_CUDA)

// In libtorch_cuda of every torch this package runs with; torch::stable's way to a stream's handle came with 2.13 only. Null in a
// CPU-only torch, where no tensor can ask for it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

cudaStream_t current_stream(const Tensor& t) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream, "terrazzo: this torch has no CUDA streams; install a CUDA build of torch");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

namespace {
std::atomic<uint64_t> g_counts[cpu::kNumKernels];

std::string why(cudaError_t error) {
  int device = 0, major = 0, minor = 0;
  if (error != cudaErrorNoKernelImageForDevice || cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return cudaGetErrorString(error);
  return missing_capability(major, minor);
}
}  // namespace

void check_launch(cudaError_t error, const char* kernel) {
  STD_TORCH_CHECK(error == cudaSuccess, "terrazzo: the CUDA kernel ", kernel, " could not be launched: ", why(error));
}
void check_launch(cudaError_t error, cpu::KernelId id) {
  check_launch(error, cpu::kKernelNames[id]);
  g_counts[id].fetch_add(1, std::memory_order_relaxed);
}
uint64_t kernel_count(int id) { return g_counts[id].load(std::memory_order_relaxed); }
void reset_kernel_counts() {
  for (auto& c : g_counts) c = 0;
}

const char* archs() { return TZ_CUDA_ARCHS; }
int toolkit_version() { return CUDART_VERSION; }
int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

#else

uint64_t kernel_count(int) { return 0; }
void reset_kernel_counts() {}
const char* archs() { return ""; }
int toolkit_version() { return 0; }
int driver_version() { return 0; }

#endif

std::string missing_capability(int major, int minor) {
  const std::string number = std::to_string(major * 10 + minor);
  return std::string("this build of terrazzo has CUDA kernels for ") + archs() + ", this GPU is sm_" + number +
         (major < 8 ? "; they need sm_80 or newer" : "; build it from source with TERRAZZO_CUDA_ARCHS=" + number);
}

}}  // namespace terrazzo::cuda
