// Sending of combine.cu: this rank's rows, unit by unit, and their flags.
#pragma once

#include "comm/bulk_ring.cuh"
#include "comm/call.cuh"
#include "common/types.cuh"
#include "kernels/combine_rows.cuh"
#include "ptx/bulk.cuh"
#include "ptx/memory.cuh"

namespace epcomm {

constexpr u32 kFlagQueueLength = 32;
constexpr u32 kNumPeers = kNumRanks > 1 ? kNumRanks - 1 : 1;

struct Unit {
  u32 peer;
  u32 index;
  u32 first_row;  // in the stream
  u32 num_rows;
};

// The q-th unit to be sent, streams taking turns; without rows where its stream has no such unit.
__device__ __forceinline__ Unit unit_at(const CombineParams& params, const Streams& streams,
                                        u32 q) {
  Unit unit;
  unit.index = q / kNumPeers;
  unit.peer = (params.call.rank + 1 + q % kNumPeers) % kNumRanks;
  unit.first_row = unit.index * params.unit_rows;
  const u32 count = streams.count_here[unit.peer];
  unit.num_rows = unit.first_row < count ? min_of(params.unit_rows, count - unit.first_row) : 0;
  return unit;
}

// Where a unit's rows lie among this rank's rows, and in its slot at the peer.
__device__ __forceinline__ const u8* rows_of(const CombineParams& params, const Streams& streams,
                                             const Unit& unit) {
  return params.rows + u64(streams.first_here[unit.peer] + unit.first_row) * params.row_bytes;
}

__device__ __forceinline__ u8* slot_of(const CombineParams& params, const Unit& unit) {
  return slab::slot(params.call.slabs, unit.peer, params.call.rank) +
         u64(unit.first_row) * params.row_bytes;
}

__device__ __forceinline__ void send_weights(const CombineParams& params, const Streams& streams,
                                             const Unit& unit) {
  if (params.num_topk == 0) return;
  const u32* source =
      params.weights + u64(streams.first_here[unit.peer] + unit.first_row) * params.num_topk;
  u8* slot = slab::slot(params.call.slabs, unit.peer, params.call.rank);
  u32* to = reinterpret_cast<u32*>(slot + weights_offset(params, streams.count_here[unit.peer])) +
            u64(unit.first_row) * params.num_topk;
  for (u32 i = lane_index(); i < unit.num_rows * params.num_topk; i += kWarpSize) to[i] = source[i];
}

// Units that are written but have no flag yet. Making writes visible to a peer takes longer than
// sending a unit, so one warp does that for all, many units at a time, and sending goes on.
struct FlagQueue {
  u32 units[kNumSendWarps][kFlagQueueLength];
  u32 num_written[kNumSendWarps];
  u32 num_raised[kNumSendWarps];
  u32 num_ended;  // send warps that will write no more
};

__device__ inline void init_queue(FlagQueue* queue) {
  if (threadIdx.x < kNumSendWarps) {
    queue->num_written[threadIdx.x] = 0;
    queue->num_raised[threadIdx.x] = 0;
  }
  if (threadIdx.x == 0) queue->num_ended = 0;
}

// By one lane of a send warp, in whose view the unit's writes are complete.
__device__ inline void put_unit(FlagQueue* queue, u32 warp, u32 q) {
  const u32 place = queue->num_written[warp];
  while (place - ptx::ld_acquire_cta_shared_u32(&queue->num_raised[warp]) == kFlagQueueLength) {
  }
  queue->units[warp][place % kFlagQueueLength] = q;
  ptx::st_release_cta_shared_u32(&queue->num_written[warp], place + 1);
}

// Raises the flags of all units that this block sends. By one warp; lane i serves send warp i.
__device__ inline void raise_flags(const CombineParams& params, const Streams& streams,
                                   FlagQueue* queue, u32 epoch) {
  const u32 lane = lane_index();
  u32 raised = 0;
  bool has_ended = false;
  while (!has_ended) {
    // Looked at before the queues: what was put before the end is then seen below.
    has_ended = ptx::ld_acquire_cta_shared_u32(&queue->num_ended) == kNumSendWarps;
    u32 written = raised;
    if (lane < kNumSendWarps) written = ptx::ld_acquire_cta_shared_u32(&queue->num_written[lane]);
    if (__any_sync(kFullWarp, written != raised)) {
#if kUseBulk
      ptx::fence_proxy_async();
#endif
      ptx::fence_acq_rel_sys();
      for (; raised != written; ++raised) {
        const Unit unit = unit_at(params, streams, queue->units[lane][raised % kFlagQueueLength]);
        u32* flags = slab::unit_flags(params.call.slabs, unit.peer, params.call.rank);
        ptx::st_relaxed_sys_u32(flags + unit.index, epoch);
      }
      if (lane < kNumSendWarps) ptx::st_release_cta_shared_u32(&queue->num_raised[lane], raised);
    }
    has_ended = __all_sync(kFullWarp, has_ended);
  }
}

// Units for one warp, in the order in which they are sent. All calls by all lanes.
class Units {
 public:
  __device__ __forceinline__ Units(const CombineParams& params, const Streams& streams)
      : p_(params), streams_(streams), claims_(params.call.state, 0) {
    u32 longest = 0;
    for (u32 peer = 0; peer < kNumRanks; ++peer) {
      const u32 count = peer == params.call.rank ? 0 : streams.count_here[peer];
      if (count > longest) longest = count;
    }
    end_ = ceil_div(longest, params.unit_rows) * kNumPeers;
  }

  // Sets the number of the next unit that has rows; false where there is none.
  __device__ __forceinline__ bool next(u32* q) {
    do {
      *q = claims_.next();
      if (*q >= end_) return false;
    } while (unit_at(p_, streams_, *q).num_rows == 0);
    return true;
  }

 private:
  const CombineParams& p_;
  const Streams& streams_;
  comm::Claims claims_;
  u32 end_;
};

#if kUseBulk

__device__ inline void send_units(const CombineParams& params, const Streams& streams,
                                  FlagQueue* queue, u8* shared_memory) {
  Units units(params, streams);
  comm::BulkRing ring(shared_memory, warp_index(), kNumSendWarps,
                      params.unit_rows * params.row_bytes);
  ring.move(
      [&](comm::Piece* piece) {
        u32 q;
        if (!units.next(&q)) return false;
        const Unit unit = unit_at(params, streams, q);
        *piece = {rows_of(params, streams, unit), unit.num_rows * params.row_bytes, q};
        return true;
      },
      [&](u8* slot, u32 num_bytes, u32 q) {
        const Unit unit = unit_at(params, streams, q);
        if (lane_index() == 0) ptx::bulk_store(slot_of(params, unit), slot, num_bytes);
        send_weights(params, streams, unit);
      },
      [&](u32 q) {
        if (lane_index() == 0) put_unit(queue, warp_index(), q);
      });
}

#else

__device__ inline void send_units(const CombineParams& params, const Streams& streams,
                                  FlagQueue* queue, u8*) {
  Units units(params, streams);
  u32 q;
  while (units.next(&q)) {
    const Unit unit = unit_at(params, streams, q);
    send_weights(params, streams, unit);
    const u8* source = rows_of(params, streams, unit);
    u8* to = slot_of(params, unit);
    for (u32 i = lane_index(); i < unit.num_rows * params.row_bytes / sizeof(Vec16);
         i += kWarpSize) {
      ptx::st_no_allocate_vec16(to + u64(i) * sizeof(Vec16),
                                ptx::ld_no_allocate_vec16(source + u64(i) * sizeof(Vec16)));
    }
    __syncwarp();
    if (lane_index() == 0) put_unit(queue, warp_index(), q);
  }
}

#endif

}  // namespace epcomm
