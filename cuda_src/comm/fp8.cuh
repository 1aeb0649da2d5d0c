// The fp8 cast: e4m3, one scale a block of 128 values. epcomm/fp8.py is the reference, bit by bit.
#pragma once

#include "common/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/e4m3.cuh"

namespace epcomm::comm {

// As epcomm.engines.base.Fp8Format.
enum Fp8Format : u32 { kNoFp8 = 0, kFloatScales, kPowerOfTwoScales, kPackedScales };

constexpr u32 kFp8Block = 128;
// Values of a lane, which are 16 bytes of fp8, and lanes of a block.
constexpr u32 kCastValues = 16;
constexpr u32 kCastLanes = kFp8Block / kCastValues;

// A warp's values in fp8.
struct CastValues {
  Vec16 values;  // this lane's
  u32 scale;     // of this lane's block, as it is sent; packed: the warp's four
};

// Casts 512 neighbouring values of a row, 16 a lane, zeros behind the row's end. By all lanes.
__device__ inline CastValues cast_to_fp8(const Vec16& first, const Vec16& second, u32 format) {
  u32 largest = 0x38d1b717;  // 1e-4, as smaller blocks are scaled as if they held it
#pragma unroll
  for (u32 i = 0; i < 8; ++i) {
    const u32 word = i < 4 ? first.word[i] : second.word[i - 4];
    // Sizes compare as their bits do.
    const u32 low = (word << 16) & 0x7fffffff, high = word & 0x7fff0000;
    if (low > largest) largest = low;
    if (high > largest) largest = high;
  }
#pragma unroll
  for (u32 step = 1; step < kCastLanes; step *= 2) {
    const u32 other = __shfl_sync(kFullWarp, largest, lane_index() ^ step);
    if (other > largest) largest = other;
  }
  const float amax = ptx::as_float(largest);
  u32 scale = ptx::as_bits(ptx::div_rn_f32(amax, 448.0f));
  float factor;
  if (format == kFloatScales) {
    factor = ptx::div_rn_f32(448.0f, amax);
  } else {
    const u32 exponent = (scale >> 23) + ((scale & 0x7fffff) != 0 ? 1 : 0);
    scale = exponent << 23;
    factor = ptx::as_float((254 - exponent) << 23);
  }
  if (format == kPackedScales) {
    u32 packed = 0;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      packed |= (__shfl_sync(kFullWarp, scale, i * kCastLanes) >> 23) << (8 * i);
    }
    scale = packed;
  }
  CastValues out;
  out.scale = scale;
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    u32 word = 0;
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
      const u32 pair = i < 2 ? first.word[2 * i + j] : second.word[2 * (i - 2) + j];
      const float low = ptx::mul_rn_f32(ptx::as_float(pair << 16), factor);
      const float high = ptx::mul_rn_f32(ptx::as_float(pair & 0xffff0000u), factor);
      word |= ptx::cvt_rn_satfinite_e4m3x2_f32(low, high) << (16 * j);
    }
    out.values.word[i] = word;
  }
  return out;
}

}  // namespace epcomm::comm
