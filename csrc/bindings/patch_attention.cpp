#include "patch_ids.h"

namespace terrazzo {
namespace {

constexpr const char* kReduce = "patch_reduce";

PatchReduceParams reduce_params(const Tensor& h, const PatchIds& patches, int64_t num_patches, int64_t reduce) {
  PatchReduceParams p{};
  p.dtype = dtype_from(h.scalar_type(), kReduce, "h");
  TZ_CHECK(reduce >= 0 && reduce < kPatchReductions, kReduce, "reduce must be 0 to ", kPatchReductions - 1, ", got ", reduce);
  p.reduce = static_cast<PatchReduction>(reduce);
  p.B = h.size(0), p.L = h.size(1), p.D = h.size(2), p.S = num_patches;
  TZ_CHECK(p.D > 0, kReduce, "D must be positive, got 0");
  p.ids = patches.values(), p.starts = patches.starts.data();
  p.h = data(h), p.h_stride_b = h.stride(0), p.h_stride_l = h.stride(1);
  return p;
}

}  // namespace

Tensor patch_reduce_fwd(const Tensor& h_in, const Tensor& patch_ids, int64_t num_patches, int64_t reduce) {
  check_cpu(h_in, kReduce, "h");
  check_shape(h_in, {-1, -1, -1}, kReduce, "h");
  const Tensor h = unit_stride_last(h_in);
  const PatchIds patches(patch_ids, h.size(0), h.size(1), num_patches, std::nullopt, kReduce);
  PatchReduceParams p = reduce_params(h, patches, num_patches, reduce);
  Tensor y = empty(h, {p.B, p.S, p.D}, h.scalar_type());
  p.y = mutable_data(y);
  cpu::run_patch_reduce_fwd(p);
  return y;
}

Tensor patch_reduce_bwd(const Tensor& dy_in, const Tensor& h_in, const Tensor& y_in, const Tensor& patch_ids, int64_t reduce) {
  check_cpu(h_in, kReduce, "h");
  check_shape(h_in, {-1, -1, -1}, kReduce, "h");
  check_shape(y_in, {h_in.size(0), -1, h_in.size(2)}, kReduce, "y");
  check_shape(dy_in, {h_in.size(0), y_in.size(1), h_in.size(2)}, kReduce, "dy");
  const Tensor h = unit_stride_last(h_in), y = cast_contiguous(y_in, h.scalar_type()), dy = cast_contiguous(dy_in, h.scalar_type());
  const PatchIds patches(patch_ids, h.size(0), h.size(1), y.size(1), std::nullopt, kReduce);
  PatchReduceParams p = reduce_params(h, patches, y.size(1), reduce);
  Tensor dh = empty(h, {p.B, p.L, p.D}, h.scalar_type());
  p.y = const_cast<void*>(data(y)), p.dy = data(dy), p.dh = mutable_data(dh);
  if (p.S == 0) torch::stable::fill_(dh, 0.0);
  cpu::run_patch_reduce_bwd(p);
  return dh;
}

}  // namespace terrazzo
