// The two crews of a block of a low-latency kernel: some warps send, the others receive, both at
// once, so that what arrives is worked on while rows are still being sent. A crew's threads meet
// apart from the other's.
#pragma once

#include "common/types.cuh"
#include "ptx/memory.cuh"

namespace epcomm::comm {

template <u32 kFirstWarp, u32 kWarps, u32 kBarrier>
struct Crew {
  static constexpr u32 kNumWarps = kWarps;
  static constexpr u32 kNumThreads = kWarps * kWarpSize;

  // Whether this thread belongs to it.
  static __device__ __forceinline__ bool has_me() {
    return threadIdx.x - kFirstWarp * kWarpSize < kNumThreads;  // those before it wrap around
  }

  // This thread's, and its warp's, number in the crew.
  static __device__ __forceinline__ u32 thread() { return threadIdx.x - kFirstWarp * kWarpSize; }
  static __device__ __forceinline__ u32 warp() { return warp_index() - kFirstWarp; }

  static __device__ __forceinline__ void meet() { ptx::barrier_sync(kBarrier, kNumThreads); }
  static __device__ __forceinline__ bool meet_and(bool holds) {
    return ptx::barrier_sync_and(kBarrier, kNumThreads, holds);
  }
};

constexpr u32 kNumSendWarps = kNumGroups * kGroupWarps;
constexpr u32 kLowLatencyThreads = (kNumSendWarps + kNumReceiveWarps) * kWarpSize;

using Senders = Crew<0, kNumSendWarps, 1>;
using Receivers = Crew<kNumSendWarps, kNumReceiveWarps, 2>;

// A group: a few of the senders, who move a part of a row together.
constexpr u32 kGroupThreads = kGroupWarps * kWarpSize;

__device__ __forceinline__ u32 group_index() { return warp_index() / kGroupWarps; }
__device__ __forceinline__ u32 warp_in_group() { return warp_index() % kGroupWarps; }
__device__ __forceinline__ void group_barrier() {
  ptx::barrier_sync(3 + group_index(), kGroupThreads);
}

}  // namespace epcomm::comm
