#include "glue.h"

namespace terrazzo {

double calibrate(const Tensor& buffer, int64_t kind, int64_t iterations) {
  constexpr const char* op = "calibrate";
  check_cpu(buffer, op, "buffer");
  TZ_CHECK(buffer.scalar_type() == ScalarType::Float && buffer.is_contiguous(), op, "buffer must be contiguous float32");
  TZ_CHECK(buffer.numel() >= 64 && reinterpret_cast<uintptr_t>(data(buffer)) % 64 == 0, op,
           "buffer must hold at least 64 elements, aligned to 64 bytes");
  TZ_CHECK(kind >= 0 && kind <= static_cast<int64_t>(CalibrateKind::scale), op, "kind must be 0 (fma), 1 (read), 2 (copy) or 3 (scale), got ", kind);
  double checksum = 0;
  CalibrateParams p{};
  p.kind = static_cast<CalibrateKind>(kind);
  p.buffer = static_cast<float*>(mutable_data(buffer)), p.count = buffer.numel();
  p.iterations = iterations;
  p.checksum = &checksum;
  cpu::run_calibrate(p);
  return checksum;
}

}  // namespace terrazzo
