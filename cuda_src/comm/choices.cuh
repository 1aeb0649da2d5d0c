// Choices as callers pass them.
#pragma once

#include "common/types.cuh"

namespace epcomm::comm {

__device__ __forceinline__ i64 choice_at(const void* topk_idx, u32 is_64_bit, u64 index) {
  return is_64_bit ? static_cast<const i64*>(topk_idx)[index]
                   : i64(static_cast<const i32*>(topk_idx)[index]);
}

// Choices of a token that are read together: one wait for memory, not one a choice.
constexpr u32 kChoiceBatch = 8;

// Calls with each choice of a token that is not -1; it may be no expert at all.
template <typename Use>
__device__ __forceinline__ void for_choices(const void* topk_idx, u32 is_64_bit, u32 num_topk,
                                            u32 token, Use use) {
  for (u32 first = 0; first < num_topk; first += kChoiceBatch) {
    i64 experts[kChoiceBatch];
#pragma unroll
    for (u32 j = 0; j < kChoiceBatch; ++j) {
      const u64 at = u64(token) * num_topk + first + j;
      experts[j] = first + j < num_topk ? choice_at(topk_idx, is_64_bit, at) : -1;
    }
#pragma unroll
    for (u32 j = 0; j < kChoiceBatch; ++j) {
      if (experts[j] != -1) use(experts[j]);
    }
  }
}

}  // namespace epcomm::comm
