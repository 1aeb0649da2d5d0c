// Choices as callers pass them.
#pragma once

#include "common/types.cuh"

namespace epcomm::comm {

__device__ __forceinline__ i64 choice_at(const void* topk_idx, u32 is_64_bit, u64 index) {
  return is_64_bit ? static_cast<const i64*>(topk_idx)[index]
                   : i64(static_cast<const i32*>(topk_idx)[index]);
}

// Choices that a lane reads together: one wait for memory, not one a choice.
constexpr u32 kChoiceBatch = 8;

// The bits [begin, end) of a word; end may lie past it, and begin past end.
__device__ __forceinline__ u32 bits_between(u32 begin, u32 end) {
  const u32 below_end = end < 32 ? (1u << end) - 1 : ~0u;
  return begin < 32 ? below_end & ~((1u << begin) - 1) : 0;
}

// Goes through the choices of a warp's tokens, [first, first + kWarpSize). By all lanes: lanes read
// neighbouring choices, so that a read of the warp is of few lines, whatever num_topk is.
//   use(expert, own)   by all lanes, each with a choice or -1; it may be no expert at all. The
//                      choices of token first + lane_index() are with the lanes of the bits own.
template <typename Use>
__device__ __forceinline__ void for_choices(const void* topk_idx, u32 is_64_bit, u32 num_topk,
                                            u32 first, u32 num_tokens, Use use) {
  const u32 number = min_of(num_tokens - first, kWarpSize) * num_topk;
  const u32 own_begin = lane_index() * num_topk, own_end = own_begin + num_topk;
  for (u32 batch = 0; batch < number; batch += kChoiceBatch * kWarpSize) {
    i64 experts[kChoiceBatch];
#pragma unroll
    for (u32 j = 0; j < kChoiceBatch; ++j) {
      const u32 at = batch + j * kWarpSize + lane_index();
      experts[j] =
          at < number ? choice_at(topk_idx, is_64_bit, u64(first) * num_topk + at) : i64(-1);
    }
#pragma unroll
    for (u32 j = 0; j < kChoiceBatch; ++j) {
      const u32 begin = batch + j * kWarpSize;
      if (begin >= number) break;
      const u32 own = bits_between(own_begin > begin ? own_begin - begin : 0,
                                   own_end > begin ? own_end - begin : 0);
      use(experts[j], own);
    }
  }
}

}  // namespace epcomm::comm
