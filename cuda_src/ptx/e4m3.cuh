// From fp32 to e4m3, to nearest even. PTX ISA, "cvt".
#pragma once

#include "common/types.cuh"
#include "ptx/convert.cuh"

namespace epcomm::ptx {

// In integer arithmetic, for GPUs without the instruction, and for the emulator.
__device__ __forceinline__ u32 e4m3_of(float value) {
  const u32 sign = (as_bits(value) >> 24) & 0x80, size = as_bits(value) & 0x7fffffff;
  if (size > 0x7f800000) return 0x7f;
  if (size >= 0x43e00000) return sign | 0x7e;  // 448 and more
  if (size < 0x3c800000) {
    // Below 2^-6, the least normal value: 2^14 has the step that is wanted, 2^-9, and the addition
    // rounds to it.
    return sign | (as_bits(add_rn_f32(as_float(size), 16384.0f)) - 0x46800000);
  }
  const u32 rounded = size + 0x7ffff + ((size >> 20) & 1);
  return sign | ((rounded >> 20) - 960);  // exponents begin at -6 in place of -126
}

// Two values in the lower half of the word, those beyond 448 as 448.
__device__ __forceinline__ u32 cvt_rn_satfinite_e4m3x2_f32(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return e4m3_of(low) | (e4m3_of(high) << 8);
#endif
}

}  // namespace epcomm::ptx
