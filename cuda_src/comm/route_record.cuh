// What route.cu leaves in device memory for the kernels that move rows. A handle owns it.
#pragma once

#include "common/types.cuh"

namespace epcomm::comm {

constexpr u32 kTokenBits = 28;

// One row to fetch: {source rank and token, place here}.
struct WorkItem {
  u32 source_and_token;
  u32 position;

  __device__ __forceinline__ static WorkItem make(u32 source, u32 token, u32 position) {
    return {(source << kTokenBits) | token, position};
  }
  __device__ __forceinline__ u32 source() const { return source_and_token >> kTokenBits; }
  __device__ __forceinline__ u32 token() const {
    return source_and_token & ((1u << kTokenBits) - 1);
  }
};

struct RouteSummary {
  u32 num_recv;
  u32 num_remote;
  u32 is_valid;    // 0: the route failed, on every rank alike, and nothing may move along it
  u32 max_tokens;  // of any rank
};

}  // namespace epcomm::comm
