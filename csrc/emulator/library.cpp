// The tests' op library: the CUDA kernels, emulated, behind the product's own glue, as torch.ops.terrazzo_emulated on CPU tensors.
// The schemas are those of torch.ops.terrazzo; tests/tools/emulator.py defines them and builds this.
#include "../bindings/glue.h"
#include "emulator.h"

namespace terrazzo { namespace cuda {
void check_launch(cudaError_t error, const char* kernel) {
  STD_TORCH_CHECK(error == cudaSuccess, "terrazzo: the emulated kernel ", kernel, " failed with error ", static_cast<int>(error), ": ", emu::last_error);
}
}}  // namespace terrazzo::cuda

STABLE_TORCH_LIBRARY_IMPL(terrazzo_emulated, CPU, m) {
#define TZ_IMPL(name) m.impl(#name, TORCH_BOX(&terrazzo::name))
  TZ_IMPL(chunk_scan_fwd);
  TZ_IMPL(chunk_scan_bwd);
  TZ_IMPL(rmsnorm_gated_fwd);
  TZ_IMPL(rmsnorm_gated_bwd);
  TZ_IMPL(selective_state_update);
#undef TZ_IMPL
}

extern "C" __attribute__((visibility("default"))) void emulator_poison(int poison) { terrazzo::poison_new_tensors(poison != 0); }
