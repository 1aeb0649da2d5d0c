// Stands in for cuda_src/ptx/convert.cuh: the same functions on the CPU.
#pragma once

#include "common/types.cuh"

namespace epcomm::ptx {

inline float as_float(u32 bits) { return __builtin_bit_cast(float, bits); }
inline u32 as_bits(float value) { return __builtin_bit_cast(u32, value); }

// What a GPU makes of every NaN.
constexpr u32 kNan16 = 0x7fff;

// To nearest, ties to even.
inline u32 cvt_rn_bf16_f32(float value) {
  const u32 bits = as_bits(value);
  return value != value ? kNan16 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline u32 cvt_rn_f16_f32(float value) {
  const u32 sign = as_bits(value) >> 16 & 0x8000, size = as_bits(value) & 0x7fffffff;
  if (value != value) return kNan16;
  if (size >= 0x47800000) return sign | 0x7c00;  // 2^16 and more: infinity
  if (size < 0x38800000) {
    // Below 2^-14, the least normal value: 0.5 has the step that is wanted, 2^-24, and the addition
    // rounds to it.
    return sign | (as_bits(as_float(size) + 0.5f) - as_bits(0.5f));
  }
  const u32 rounded = size + 0xfff + (size >> 13 & 1);
  return sign | (rounded - 0x38000000) >> 13;
}

inline u32 cvt_rn_bf16x2_f32(float low, float high) {
  return cvt_rn_bf16_f32(low) | cvt_rn_bf16_f32(high) << 16;
}

inline u32 cvt_rn_f16x2_f32(float low, float high) {
  return cvt_rn_f16_f32(low) | cvt_rn_f16_f32(high) << 16;
}

inline float add_rn_f32(float a, float b) { return a + b; }
inline float mul_rn_f32(float a, float b) { return a * b; }
inline float div_rn_f32(float a, float b) { return a / b; }

inline float cvt_f32_f16(u16 half) {
  const u32 sign = (half & 0x8000u) << 16, size = half & 0x7fffu;
  if (size >= 0x7c00) return as_float(sign | 0x7f800000 | (size & 0x3ff) << 13);
  if (size >= 0x400) return as_float(sign | ((size << 13) + 0x38000000));
  const float value = static_cast<float>(size) * 0x1p-24f;
  return sign ? -value : value;
}

}  // namespace epcomm::ptx
