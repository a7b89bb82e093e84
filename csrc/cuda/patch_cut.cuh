// The rules of patching, shared by the kernels that cut whole rows and those that continue them: see csrc/cpu/entropy_patch.cpp.
#pragma once
#include "common.cuh"

namespace terrazzo { namespace cuda {

// The threshold in the entropies' own dtype, as torch compares them.
template <class T> TZ_DEVICE float in_dtype(double value) {
  T rounded;
  from_float(static_cast<float>(value), rounded);
  return to_float(rounded);
}

// Does position i >= 2 of a text start a patch, given the entropy e at i - 1 and the one before it?
TZ_DEVICE bool unsure(PatchRule rule, int64_t i, float e, float before, float threshold, float threshold_add) {
  if (rule == PatchRule::threshold) return e > threshold;
  if (rule == PatchRule::monotonic) return i == 2 || e - before > threshold;
  return i == 2 || (i != 3 && e > threshold && e - before > threshold_add);
}

// No digit, no letter, and not inside a longer UTF-8 character. One comparison each: below 0 is far above as unsigned.
TZ_DEVICE bool space_like(int64_t byte) {
  const bool digit = static_cast<uint64_t>(byte - '0') < 10, letter = static_cast<uint64_t>((byte | 32) - 'a') < 26;
  return !digit && !letter && static_cast<uint64_t>(byte - 0x80) >= 0x40;
}

// Bits of a warp's vote.
TZ_DEVICE unsigned lanes_below(int lane) { return (1u << lane) - 1; }
TZ_DEVICE int highest(unsigned votes) { return kWarp - 1 - __clz(static_cast<int>(votes)); }

}}  // namespace terrazzo::cuda
