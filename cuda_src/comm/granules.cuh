// Rows in pieces: a part of a row is some of its granules, and a slice is some of a part's.
#pragma once

#include "common/types.cuh"

namespace epcomm::comm {

// What a warp moves in one access: a row is cut into such granules, and a part is some of them.
constexpr u32 kGranuleBytes = kWarpSize * sizeof(Vec16);

struct Granules {
  u32 begin;
  u32 end;
};

__device__ __forceinline__ Granules granules_of(u32 num_bytes, u32 part, u32 num_parts) {
  const u32 number = ceil_div(num_bytes, kGranuleBytes);
  const u32 size = ceil_div(number, num_parts);
  return {min_of(part * size, number), min_of((part + 1) * size, number)};
}

// What one warp receives of a part.
struct Slice {
  u32 index;
  u32 num_slices;  // of the part
};

// A slice's granules; none where there are more slices than those.
__device__ __forceinline__ Granules granules_of(const Granules& part, const Slice& slice) {
  const u32 size = ceil_div(part.end - part.begin, slice.num_slices);
  return {min_of(part.begin + slice.index * size, part.end),
          min_of(part.begin + (slice.index + 1) * size, part.end)};
}

// Into how many slices parts of so many granules are cut, so that few parts keep many warps busy.
__device__ __forceinline__ u32 num_slices_of(u32 num_granules, u32 num_parts, u32 num_warps) {
  return max_of(1u, min_of(num_granules, num_warps / max_of(1u, num_parts)));
}

}  // namespace epcomm::comm
