// The crews of a block of a low-latency kernel. In dispatch some warps send rows and the others
// receive them, both at once, so that what arrives is worked on while rows are still being sent;
// tables are sent by those who have nothing else to do at first, the receivers. A crew's threads
// meet apart from the other's. In combine no warp only receives, so all are of both crews: they
// send, and then receive; half of them would sum what is sent half as fast.
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

// Barriers of a block beside __syncthreads, by number; there are 16.
constexpr u32 kSendersBarrier = 1;
constexpr u32 kReceiversBarrier = 2;
constexpr u32 kFirstGroupBarrier = 3;
static_assert(kFirstGroupBarrier + kNumGroups <= 16, "a barrier a group");

using Senders = Crew<0, kNumGroups * kGroupWarps, kSendersBarrier>;
constexpr bool kHasReceivers = kNumReceiveWarps > 0;
using Receivers = Crew<kHasReceivers ? Senders::kNumWarps : 0,
                       kHasReceivers ? kNumReceiveWarps : Senders::kNumWarps, kReceiversBarrier>;

constexpr u32 kLowLatencyThreads = (Senders::kNumWarps + kNumReceiveWarps) * kWarpSize;
static_assert(kLowLatencyThreads <= 1024, "a block has no more");

// A group: a few of the senders, who move a part of a row together.
constexpr u32 kGroupThreads = kGroupWarps * kWarpSize;

__device__ __forceinline__ u32 group_index() { return warp_index() / kGroupWarps; }
__device__ __forceinline__ u32 warp_in_group() { return warp_index() % kGroupWarps; }
__device__ __forceinline__ void group_barrier() {
  ptx::barrier_sync(kFirstGroupBarrier + group_index(), kGroupThreads);
}

}  // namespace epcomm::comm
