// What every collective kernel does alike: epochs, headers, arrival, waits that end, and the way
// out.
//
// Epochs. A rank's calls are numbered; the number lives in device memory, so that a replayed graph
// counts on. All ranks make the same calls in the same order, so their numbers agree.
//
// Arrival. In each call every rank posts its arrival to every peer, and waits for every peer's.
// Calls of one rank run in stream order, so "peer p has arrived at call n" says that p is done
// with call n - 1, and my own start of call n says that all peers are done with call n - 2. Hence
// memory with two halves, used in turn (stages, headers, counts, lists), is never written while a
// peer reads it; memory without halves (slots) is written only after the arrival of call n.
//
// Failure. A wait that passes its deadline writes the host's record and every peer's abort cell.
// Waits look at the own abort cell, so all ranks end; the kernel returns and the context lives.
#pragma once

#include "common/types.cuh"
#include "ptx/memory.cuh"
#include "slab/layout.cuh"

namespace epcomm::comm {

enum Phase : i32 {
  kArrival = 1,
  kCounts,
  kStagedRows,
  kCombineRows,
  kReceived,
  kLowLatencyTables,
  kLowLatencyRows,
  kLowLatencyCells,
};

enum Failure : i32 {
  kNoFailure = 0,
  kTimeout,
  kPeerGaveUp,
  kMismatch,
  kTooManyRows,
  kBadExpert,
  kExpertTwice,
  kLowLatencyMismatch,
  kBadChoices,  // of a rank: the call is given up on all
};

// In host memory that the device can write; the host reads it when something may have failed.
struct FailureRecord {
  i32 failure;  // written last
  i32 phase;
  i32 peer;
  u32 expected;
  u32 seen;
  i32 field;
  i32 values[kMaxRanks];
};

// Lists that a kernel's warps claim from.
constexpr u32 kNumClaims = 2;

// Device memory of one rank that only its own kernels touch.
struct CallState {
  u32 epoch;
  u32 num_finished_blocks;
  u32 has_failed;
  u32 padding;
  u32 claimed[kNumClaims];
};

// Work that warps of all blocks take from one list, a part at a time: those that get on faster take
// more, and parts are begun in the list's order.
class Claims {
 public:
  __device__ __forceinline__ Claims(CallState* state, u32 which)
      : counter_(state->claimed + which) {
    claim();
  }

  // The next part that is this warp's. By all lanes; the claim after it is on its way already.
  __device__ __forceinline__ u32 next() {
    const u32 part = __shfl_sync(kFullWarp, claimed_, 0);
    claim();
    return part;
  }

 private:
  __device__ __forceinline__ void claim() {
    if (lane_index() == 0) claimed_ = atomicAdd(counter_, 1u);
  }

  u32* counter_;
  u32 claimed_ = 0;
};

struct Call {
  slab::SlabLayout slabs;
  CallState* state;
  FailureRecord* record;
  u64 timeout_ns;
  u32 rank;
  i32 header[slab::kHeaderWords];
};

__device__ __forceinline__ u32 begin(const Call& call) {
  return *static_cast<volatile u32*>(&call.state->epoch) + 1;
}

template <typename AnyCall>
__device__ __forceinline__ bool has_failed(const AnyCall& call) {
  return ptx::ld_relaxed_sys_u32(&call.state->has_failed) != 0;
}

// Whether a kernel may go on, told to all threads of its block alike: another block may report a
// failure between the looks of two threads.
__device__ __forceinline__ bool may_begin(const Call& call) {
  return __syncthreads_and(!has_failed(call));
}

// Writes the record, once; later failures of the same Buffer follow from the first.
template <typename AnyCall>
__device__ inline void report(const AnyCall& call, Failure failure, Phase phase, u32 peer,
                              u32 expected, u32 seen) {
  if (atomicExch(&call.state->has_failed, 1u) != 0) return;
  volatile FailureRecord* record = call.record;
  record->phase = phase;
  record->peer = static_cast<i32>(peer);
  record->expected = expected;
  record->seen = seen;
  __threadfence_system();
  record->failure = failure;
}

template <typename AnyCall>
__device__ inline void abort_peers(const AnyCall& call) {
  for (u32 peer = 0; peer < kNumRanks; ++peer) {
    if (peer != call.rank) {
      ptx::st_release_sys_u64(abort_cell(call.slabs, peer), 1 + call.rank);  // of either slab
    }
  }
}

__device__ __forceinline__ bool is_reached(u32 seen, u32 epoch) {
  return static_cast<i32>(seen - epoch) >= 0;
}

// One thread's wait for {epoch, value}; returns false when the call has failed.
template <typename Load>
__device__ inline bool wait_for(const Call& call, Phase phase, u32 peer, u32 epoch, Load load) {
  const u64 start = ptx::global_timer_ns();
  for (u32 spins = 0;; ++spins) {
    const u32 seen = load();
    if (is_reached(seen, epoch)) return true;
    if (spins % 64 != 63) {
      if (spins > 16) ptx::sleep_ns(50);  // leave the memory pipeline to those that have work
      continue;
    }
    if (has_failed(call)) return false;
    const u64 aborted = ptx::ld_acquire_sys_u64(slab::abort_cell(call.slabs, call.rank));
    if (aborted != 0) {
      report(call, kPeerGaveUp, phase, static_cast<u32>(aborted - 1), epoch, seen);
      return false;
    }
    if (ptx::global_timer_ns() - start > call.timeout_ns) {
      report(call, kTimeout, phase, peer, epoch, seen);
      abort_peers(call);
      return false;
    }
  }
}

__device__ __forceinline__ bool wait_cell(const Call& call, Phase phase, u32 peer, u32 epoch,
                                          const u64* cell) {
  return wait_for(call, phase, peer, epoch,
                  [cell] { return static_cast<u32>(ptx::ld_acquire_sys_u64(cell) >> 32); });
}

// Puts this rank's header where a peer reads it. By one thread, before the arrival.
__device__ inline void put_header(const Call& call, u32 epoch, u32 peer) {
  i32* words = slab::header(call.slabs, peer, epoch, call.rank);
  for (u32 i = 0; i < slab::kHeaderWords; ++i) words[i] = call.header[i];
}

// Tells every peer that this rank has arrived. By the first kNumRanks threads of one block; what
// the block's threads wrote before the preceding barrier is visible to whoever sees the arrival.
__device__ __forceinline__ void post_arrival(const Call& call, u32 epoch) {
  if (threadIdx.x < kNumRanks) {
    put_header(call, epoch, threadIdx.x);
    ptx::st_release_sys_u64(slab::arrival_cell(call.slabs, threadIdx.x, call.rank), u64(epoch)
                                                                                        << 32);
  }
}

// Reports a value in which some rank's header differs. Several blocks may; all write the same.
__device__ inline void report_mismatch(const Call& call, u32 epoch, u32 field) {
  volatile FailureRecord* record = call.record;
  record->field = static_cast<i32>(field);
  for (u32 peer = 0; peer < kNumRanks; ++peer) {
    record->values[peer] = slab::header(call.slabs, call.rank, epoch, peer)[field];
  }
  __threadfence_system();
  record->failure = kMismatch;
}

// Whether all ranks' headers agree; reports the first value in which one does not. By all lanes of
// a warp, a value each; all headers have arrived. Every rank finds the same.
// NOTE: a function of its own, so that it takes no registers of those that move rows.
__device__ __noinline__ bool headers_agree(const Call& call, u32 epoch) {
  static_assert(kNumAgreed <= kWarpSize, "a lane a value");
  const u32 field = lane_index();
  i32 values[kNumRanks] = {};
#pragma unroll
  for (u32 peer = 0; peer < kNumRanks; ++peer) {
    if (field < kNumAgreed) values[peer] = slab::header(call.slabs, call.rank, epoch, peer)[field];
  }
  bool differs = false;
#pragma unroll
  for (u32 peer = 1; peer < kNumRanks; ++peer) differs = differs || values[peer] != values[0];
  const u32 differing = __ballot_sync(kFullWarp, differs);
  const u32 before = (1u << field) - 1;
  if (differs && (differing & before) == 0) report_mismatch(call, epoch, field);
  return differing == 0;
}

// Barriers of a block beside __syncthreads, by number; those of low-latency kernels are in
// comm/crews.cuh.
constexpr u32 kArrivalBarrier = 1;
constexpr u32 kStageBarrier = 2;

// Waits for all ranks' arrival and compares their headers. By the first num_threads threads of a
// block, whole warps; returns to all of them whether the call may go on.
__device__ inline bool wait_arrival(const Call& call, Phase phase, u32 epoch, u32 num_threads) {
  bool is_good = true;
  if (threadIdx.x < kNumRanks) {
    is_good = wait_cell(call, phase, threadIdx.x, epoch,
                        slab::arrival_cell(call.slabs, call.rank, threadIdx.x));
  }
  if (!ptx::barrier_sync_and(kArrivalBarrier, num_threads, is_good)) return false;
  if (warp_index() == 0) is_good = headers_agree(call, epoch);
  return ptx::barrier_sync_and(kArrivalBarrier, num_threads, is_good);
}

// Counts a block in; true, for all its threads, in the block that came last.
__device__ inline bool is_last_block(u32* counter) {
  bool is_last = false;
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = ptx::add_acq_rel_gpu_u32(counter, 1) == gridDim.x - 1;
    if (is_last) *counter = 0;
  }
  return __syncthreads_or(is_last) != 0;
}

// Ends the call: the next kernel on this rank's stream has the next epoch. By all threads.
__device__ inline void finish(const Call& call, u32 epoch) {
  if (is_last_block(&call.state->num_finished_blocks) && threadIdx.x == 0) {
    for (u32 i = 0; i < kNumClaims; ++i) call.state->claimed[i] = 0;
    call.state->epoch = epoch;
  }
}

}  // namespace epcomm::comm
