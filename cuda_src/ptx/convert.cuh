// Conversions between fp32 and the 16-bit formats, two values a word; round to nearest even.
#pragma once

#include "common/types.cuh"

namespace epcomm::ptx {

__device__ __forceinline__ float as_float(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ u32 as_bits(float value) { return __float_as_uint(value); }

// The lower half of the word gets the first value.
__device__ __forceinline__ u32 cvt_rn_bf16x2_f32(float low, float high) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ u32 cvt_rn_f16x2_f32(float low, float high) {
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ float cvt_f32_f16(u16 half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

}  // namespace epcomm::ptx
