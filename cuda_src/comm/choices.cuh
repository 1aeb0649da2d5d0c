// Choices as callers pass them.
#pragma once

#include "common/types.cuh"

namespace epcomm::comm {

__device__ __forceinline__ i64 choice_at(const void* topk_idx, u32 is_64_bit, u64 index) {
  return is_64_bit ? static_cast<const i64*>(topk_idx)[index]
                   : i64(static_cast<const i32*>(topk_idx)[index]);
}

}  // namespace epcomm::comm
