#include "../cuda/params.h"
#include "patch_ids.h"

namespace terrazzo {
namespace {

constexpr const char* kOp = "patch_reduce";

Tensor starts_scratch(const Tensor& h, int64_t S) {
  return runs_on_cpu(h) ? absent(h) : empty(h, {h.size(0), S + 1}, ScalarType::Int);
}
// `starts` is scratch for kernels that don't run on the CPU.
PatchReduceCudaParams reduce_params(const Tensor& h, const PatchIds& patches, const Tensor& starts, int64_t num_patches, int64_t reduce) {
  PatchReduceCudaParams p{};
  p.dtype = dtype_from(h.scalar_type(), kOp, "h");
  TZ_CHECK(reduce >= 0 && reduce < kPatchReductions, kOp, "reduce must be 0 to ", kPatchReductions - 1, ", got ", reduce);
  p.reduce = static_cast<PatchReduction>(reduce);
  p.B = h.size(0), p.L = h.size(1), p.D = h.size(2), p.S = num_patches;
  TZ_CHECK(p.D > 0, kOp, "D must be positive, got 0");
  p.ids = patches.values(), p.starts = patches.starts.data(), p.patch_starts = static_cast<int32_t*>(mutable_data(starts));
  p.h = data(h), p.h_stride_b = h.stride(0), p.h_stride_l = h.stride(1);
  return p;
}

}  // namespace

Tensor patch_reduce_fwd(const Tensor& h_in, const Tensor& patch_ids, int64_t num_patches, int64_t reduce) {
  check_device(h_in, kOp, "h");
  check_shape(h_in, {-1, -1, -1}, kOp, "h");
  const Tensor h = unit_stride_last(h_in);
  const PatchIds patches(patch_ids, h.size(0), h.size(1), num_patches, std::nullopt, kOp);
  const Tensor starts = starts_scratch(h, num_patches);
  PatchReduceCudaParams p = reduce_params(h, patches, starts, num_patches, reduce);
  Tensor y = empty(h, {p.B, p.S, p.D}, h.scalar_type());
  p.y = mutable_data(y);
  TZ_RUN_WHERE(h, patch_reduce_fwd, p);
  return y;
}

Tensor patch_reduce_bwd(const Tensor& dy_in, const Tensor& h_in, const Tensor& y_in, const Tensor& patch_ids, int64_t reduce) {
  check_device(h_in, kOp, "h");
  check_shape(h_in, {-1, -1, -1}, kOp, "h");
  check_shape(y_in, {h_in.size(0), -1, h_in.size(2)}, kOp, "y");
  check_shape(dy_in, {h_in.size(0), y_in.size(1), h_in.size(2)}, kOp, "dy");
  const Tensor h = unit_stride_last(h_in), y = cast_contiguous(y_in, h.scalar_type()), dy = cast_contiguous(dy_in, h.scalar_type());
  const PatchIds patches(patch_ids, h.size(0), h.size(1), y.size(1), std::nullopt, kOp);
  const Tensor starts = starts_scratch(h, y.size(1));
  PatchReduceCudaParams p = reduce_params(h, patches, starts, y.size(1), reduce);
  Tensor dh = empty(h, {p.B, p.L, p.D}, h.scalar_type());
  p.y = const_cast<void*>(data(y)), p.dy = data(dy), p.dh = mutable_data(dh);
  if (p.S == 0) torch::stable::fill_(dh, 0.0);
  TZ_RUN_WHERE(h, patch_reduce_bwd, p);
  return dh;
}

}  // namespace terrazzo
