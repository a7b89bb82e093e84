// Loops that measure what this machine can do: the limits that every benchmark row is divided by.
//
//   fma    12 independent chains of fused multiply-adds in registers: peak arithmetic in float32
//   read   eight sequential streams per chunk, summed: memory bandwidth of a kernel that only reads
//   copy   first half of the buffer to the second with non-temporal stores: one that reads and writes elsewhere
//   scale  the whole buffer multiplied in place: one that updates a state
//
// The caller takes the time. Work is cut into a fixed number of chunks, whatever the number of threads.
#include "../common/parallel.h"
#include "../common/params.h"
#include "vec.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

using V = Vec<float>;
constexpr int kChains = 12;          // enough to cover the latency of two FMA units
constexpr int kChunks = 64;          // pieces of the buffer, shared out between the threads
constexpr int kStreams = 8;          // one stream alone leaves a quarter of the read bandwidth unused
constexpr int64_t kPrefetch = 256;   // floats ahead of the loads

// kCalibrateFmas multiply-adds; the seed keeps the compiler from folding them.
float fma_block(float seed) {
  V acc[kChains];
  for (int i = 0; i < kChains; i++) acc[i] = V(seed + i);
  const V factor(0.9999f), addend(seed);
  for (int64_t n = kCalibrateFmas / (kChains * V::size); n > 0; n--) {
    for (int i = 0; i < kChains; i++) acc[i] = fma(acc[i], factor, addend);
  }
  V sum = V::zero();
  for (int i = 0; i < kChains; i++) sum = sum + acc[i];
  return reduce_add(sum);
}

// n is a multiple of kStreams * V::size.
float read_chunk(const float* p, int64_t n) {
  V acc[kStreams];
  for (int s = 0; s < kStreams; s++) acc[s] = V::zero();
  const int64_t stream = n / kStreams;
  for (int64_t i = 0; i < stream; i += V::size) {
    for (int s = 0; s < kStreams; s++) acc[s] = acc[s] + V::load(p + s * stream + i);
  }
  V sum = V::zero();
  for (int s = 0; s < kStreams; s++) sum = sum + acc[s];
  return reduce_add(sum);
}

void copy_chunk(const float* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; i += 2 * V::size) {
    prefetch(src + i + kPrefetch);
    V::load(src + i).stream(dst + i);
    V::load(src + i + V::size).stream(dst + i + V::size);
  }
  stream_fence();
}

void scale_chunk(float* p, int64_t n) {
  const V factor(0.9999f);
  for (int64_t i = 0; i < n; i += 2 * V::size) {
    prefetch(p + i + kPrefetch);
    (V::load(p + i) * factor).store(p + i);
    (V::load(p + i + V::size) * factor).store(p + i + V::size);
  }
}

}  // namespace

void calibrate(const CalibrateParams& p) {
  double partial[kChunks] = {};
  if (p.kind == CalibrateKind::fma) {
    parallel_for(0, kChunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c++) {
        float chain = p.buffer[c];  // each block starts from the last one's result, or all but one would be dropped
        for (int64_t n = 0; n < p.iterations; n++) chain = fma_block(chain * 1e-9f + 1.0f);
        partial[c] = chain;
      }
    });
  } else {
    // Every chunk starts and ends on a cache line; the few floats left over are not touched.
    const int64_t half = p.kind == CalibrateKind::copy ? p.count / 2 : p.count;
    const int64_t chunk = half / (kChunks * 256) * 256;
    for (int64_t n = 0; n < p.iterations; n++) {
      parallel_for(0, kChunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; c++) {
          float* at = p.buffer + c * chunk;
          if (p.kind == CalibrateKind::read) partial[c] += read_chunk(at, chunk);
          else if (p.kind == CalibrateKind::copy) copy_chunk(at, at + kChunks * chunk, chunk);
          else scale_chunk(at, chunk);
        }
      });
    }
  }
  *p.checksum = 0;
  for (double v : partial) *p.checksum += v;
}

}}}  // namespace terrazzo::cpu::TZ_ISA
