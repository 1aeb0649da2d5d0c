// Moves every row to its final positions.
//
// In:   rows [num_tokens, row_bytes], and what travels with each row: scales [num_tokens,
//       num_scales] 4-byte words of any strides, choices [num_tokens, num_topk], their weights.
//       positions, work and summary from route.cu.
// Out:  the same for the rows that arrive; choices as local expert ids, -1 where elsewhere.
// Grid: as many blocks as the call may use multiprocessors, at most as many as fit at once. In each
//       block kNumStageWarps warps stage and the others fetch, at the same time.
//
// Each row with what travels with it is one staged row in this rank's slab; receivers fetch it
// whole, so a row crosses the link in one piece. Rows that stay here go straight to the output.
// Staging uses ordinary loads and stores and fetching the copy engine: a multiprocessor's copy
// engine alone would not keep up with both. kNumStageWarps tokens are a unit, with one flag at
// every peer; fetching begins with the first unit, and the work list has rows in the order in which
// units are staged.
//
// It may be launched ahead, before the host knows how many rows arrive, with outputs as large as
// the host expects. Where more arrive, this rank only stages, so that no peer waits for it, and a
// second launch fetches: it resumes the same call, whose number only moves on when the rows have
// arrived. Where a stage is too small, which is so on all ranks, a launch ahead does nothing; hosts
// make slabs larger and launch anew.
//
// Ordering:
//   staged rows of a unit -> barrier of the stage warps -> release of the unit's flag at each peer
//   acquire of the flag by the lane that fetches the row -> fence_proxy_async, __syncwarp -> fetch
// The stage has two halves: see comm/call.cuh for why a half is free when it is written. Staging
// waits for nothing, so fetching never waits for something that waits for it.
#include "comm/bulk_ring.cuh"
#include "comm/call.cuh"
#include "comm/route_record.cuh"
#include "common/types.cuh"

namespace epcomm {

enum Launch : u32 {
  kWhole,    // the outputs have room for all rows, and stages too
  kAhead,    // that is not known yet
  kResumes,  // after kAhead, where only the outputs had no room
};

struct DispatchParams {
  comm::Call call;
  const u8* rows;
  const u32* scales;
  const void* topk_idx;
  const u32* topk_weights;
  u8* recv_rows;
  u32* recv_scales;
  void* recv_topk_idx;
  u32* recv_topk_weights;
  u32 num_out_rows;  // that the outputs have room for
  u32 launch;        // a Launch
  const i32* positions;
  const comm::WorkItem* work;
  const comm::RouteSummary* summary;
  i64 scales_token_stride;  // in words
  i64 scales_stride;
  u32 num_tokens;
  u32 row_bytes;
  u32 num_scales;
  u32 num_topk;
  u32 is_64_bit;
  u32 num_worst_tokens;
  i32 first_expert;
  i32 num_local_experts;
  u32 staged_row_bytes;  // row, scales, choices and weights, a multiple of 16
  u32 padding;
};

static_assert(sizeof(DispatchParams) == kDispatchParamsBytes,
              "epcomm/engines/cuda_params.py differs");

// What travels with a row, as words behind it: scales, choices, weights.
class Side {
 public:
  __device__ __forceinline__ explicit Side(const DispatchParams& params) : p_(params) {}

  __device__ __forceinline__ u32 num_words() const { return p_.num_scales + 2 * p_.num_topk; }

  // Word i of one of this rank's tokens.
  __device__ __forceinline__ u32 own_word(u32 token, u32 i) const {
    if (i < p_.num_scales) {
      return p_.scales[i64(token) * p_.scales_token_stride + i64(i) * p_.scales_stride];
    }
    i -= p_.num_scales;
    const u64 row = u64(token) * p_.num_topk;
    if (i < p_.num_topk) {
      return p_.is_64_bit ? u32(static_cast<const i64*>(p_.topk_idx)[row + i])
                          : static_cast<const u32*>(p_.topk_idx)[row + i];
    }
    return p_.topk_weights[row + i - p_.num_topk];
  }

  // Writes the words of one arrived row to the outputs. By all lanes of a warp.
  template <typename Word>
  __device__ __forceinline__ void receive(u32 position, Word word) const {
    for (u32 i = lane_index(); i < p_.num_scales; i += kWarpSize) {
      p_.recv_scales[u64(position) * p_.num_scales + i] = word(i);
    }
    for (u32 i = lane_index(); i < p_.num_topk; i += kWarpSize) {
      const i32 expert = static_cast<i32>(word(p_.num_scales + i)) - p_.first_expert;
      const bool is_here = expert >= 0 && expert < p_.num_local_experts;
      put_choice(u64(position) * p_.num_topk + i, is_here ? expert : -1);
      p_.recv_topk_weights[u64(position) * p_.num_topk + i] =
          is_here ? word(p_.num_scales + p_.num_topk + i) : 0;
    }
  }

  __device__ __forceinline__ void put_choice(u64 index, i32 expert) const {
    if (p_.is_64_bit) {
      static_cast<i64*>(p_.recv_topk_idx)[index] = expert;
    } else {
      static_cast<i32*>(p_.recv_topk_idx)[index] = expert;
    }
  }

 private:
  const DispatchParams& p_;
};

// Where a token of this rank goes: its place here, and whether any other rank gets it.
struct Destinations {
  i32 own_position;
  bool has_remote;
};

__device__ __forceinline__ Destinations destinations_of(const DispatchParams& params, u32 token) {
  const u32 me = params.call.rank, lane = lane_index();
  const i32 position = lane < kNumRanks ? params.positions[u64(token) * kNumRanks + lane] : -1;
  const u32 ranks = __ballot_sync(kFullWarp, position >= 0);
  return {__shfl_sync(kFullWarp, position, me), (ranks & ~(1u << me)) != 0};
}

constexpr u32 kUnroll = 8;

// Copies a row to one or two places. By all lanes of a warp; num_bytes is a multiple of 16.
__device__ inline void copy_row(const u8* source, u8* to, u8* also_to, u32 num_bytes) {
  const u32 num_vecs = num_bytes / sizeof(Vec16);
  for (u32 i = lane_index(); i < num_vecs; i += kWarpSize * kUnroll) {
    Vec16 v[kUnroll];
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      const u32 at = i + j * kWarpSize;
      if (at < num_vecs) v[j] = ptx::ld_no_allocate_vec16(source + u64(at) * sizeof(Vec16));
    }
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      const u32 at = i + j * kWarpSize;
      if (at >= num_vecs) continue;
      if (to != nullptr) ptx::st_no_allocate_vec16(to + u64(at) * sizeof(Vec16), v[j]);
      if (also_to != nullptr) ptx::st_no_allocate_vec16(also_to + u64(at) * sizeof(Vec16), v[j]);
    }
  }
}

// --- staging -----------------------------------------------------------------------------------

// What a launch does: whether it stages, and whether it writes outputs.
struct Steps {
  bool stages;
  bool receives;
};

__device__ inline void stage_row(const DispatchParams& params, Steps steps, u32 token, u8* stage) {
  const Side side(params);
  const Destinations to = destinations_of(params, token);
  u8* staged =
      steps.stages && to.has_remote ? stage + u64(token) * params.staged_row_bytes : nullptr;
  u8* own = steps.receives && to.own_position >= 0
                ? params.recv_rows + u64(to.own_position) * params.row_bytes
                : nullptr;
  if (staged == nullptr && own == nullptr) return;
  copy_row(params.rows + u64(token) * params.row_bytes, staged, own, params.row_bytes);
  if (staged != nullptr) {
    u32* words = reinterpret_cast<u32*>(staged + params.row_bytes);
    for (u32 i = lane_index(); i < side.num_words(); i += kWarpSize) {
      words[i] = side.own_word(token, i);
    }
  }
  if (own != nullptr) {
    side.receive(to.own_position, [&](u32 i) { return side.own_word(token, i); });
  }
}

// Stages this block's units, lowest tokens first. By all stage warps.
__device__ inline void stage_units(const DispatchParams& params, Steps steps, u32 warp, u32 epoch) {
  const comm::Call& call = params.call;
  u8* stage = slab::stage(call.slabs, call.rank, epoch);
  const u32 num_units = ceil_div(params.num_tokens, kNumStageWarps);
  for (u32 unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    const u32 token = unit * kNumStageWarps + warp;
    if (token < params.num_tokens) stage_row(params, steps, token, stage);
    if (!steps.stages) continue;
    ptx::barrier_sync(comm::kStageBarrier, kNumStageWarps * kWarpSize);
    // Another warp for each unit: raising flags takes as long as the unit's writes are on their
    // way.
    const u32 raiser = unit / gridDim.x % kNumStageWarps;
    if (warp == raiser && lane_index() < kNumRanks && lane_index() != call.rank) {
      ptx::st_release_sys_u32(slab::stage_flags(call.slabs, lane_index(), call.rank) + unit, epoch);
    }
  }
}

// --- fetching ----------------------------------------------------------------------------------

// Rows of the work list for one warp, in the list's order, each staged when it is given out. All
// calls by all lanes.
class Fetches {
 public:
  __device__ __forceinline__ Fetches(const DispatchParams& params, u32 epoch)
      : p_(params),
        epoch_(epoch),
        num_items_(params.summary->num_remote),
        claims_(params.call.state, 0) {
    read_ahead();
  }

  // Sets the next row to fetch; false where there is none, or the call has failed.
  __device__ __forceinline__ bool next(comm::WorkItem* item) {
    if (place_ == kBatch) {
      begin_ = next_begin_;
      batch_ = next_batch_;
      place_ = 0;
      read_ahead();
      if (!wait_batch()) return false;
    }
    if (begin_ + place_ >= num_items_) return false;
    item->source_and_token = __shfl_sync(kFullWarp, batch_.source_and_token, place_);
    item->position = __shfl_sync(kFullWarp, batch_.position, place_);
    ++place_;
    return true;
  }

 private:
  // Rows that are claimed together, and whose flags are looked at together.
  static constexpr u32 kBatch = 4;

  // Reads the batch after this one, so that its latency is hidden.
  __device__ __forceinline__ void read_ahead() {
    next_begin_ = claims_.next() * kBatch;
    const u32 at = next_begin_ + lane_index();
    if (lane_index() < kBatch && at < num_items_) next_batch_ = p_.work[at];
  }

  __device__ __forceinline__ bool wait_batch() {
    bool is_good = true;
    if (lane_index() < kBatch && begin_ + lane_index() < num_items_) {
      const u32* flag = slab::stage_flags(p_.call.slabs, p_.call.rank, batch_.source()) +
                        batch_.token() / kNumStageWarps;
      is_good = comm::wait_for(p_.call, comm::kStagedRows, batch_.source(), epoch_,
                               [flag] { return ptx::ld_acquire_sys_u32(flag); });
    }
#if kUseBulk
    ptx::fence_proxy_async();
#endif
    __syncwarp();  // a vote orders no memory: what one lane acquired, others will read
    return __all_sync(kFullWarp, is_good);
  }

  const DispatchParams& p_;
  u32 epoch_, num_items_;
  comm::Claims claims_;
  u32 begin_ = 0, next_begin_ = 0, place_ = kBatch;
  comm::WorkItem batch_ = {0, 0}, next_batch_ = {0, 0};
};

__device__ __forceinline__ const u8* staged_row(const DispatchParams& params, u32 epoch,
                                                const comm::WorkItem& item) {
  return slab::stage(params.call.slabs, item.source(), epoch) +
         u64(item.token()) * params.staged_row_bytes;
}

#if kUseBulk

__device__ inline void fetch_rows(const DispatchParams& params, u32 warp, u32 num_warps, u32 epoch,
                                  u8* shared_memory) {
  const Side side(params);
  const bool has_side = side.num_words() > 0;
  Fetches fetches(params, epoch);
  comm::BulkRing ring(shared_memory, warp, num_warps, params.staged_row_bytes);
  ring.move(
      [&](comm::Piece* piece) {
        comm::WorkItem item;
        if (!fetches.next(&item)) return false;
        *piece = {staged_row(params, epoch, item), params.staged_row_bytes, item.position};
        return true;
      },
      [&](u8* slot, u32, u32 position) {
        if (lane_index() == 0) {
          ptx::bulk_store(params.recv_rows + u64(position) * params.row_bytes, slot,
                          params.row_bytes);
        }
        if (has_side) {
          const u32* words = reinterpret_cast<const u32*>(slot + params.row_bytes);
          side.receive(position, [&](u32 i) { return words[i]; });
        }
      },
      [](u32) {});
}

#else  // 16-byte loads and stores, for GPUs without bulk copies

__device__ inline void fetch_rows(const DispatchParams& params, u32, u32, u32 epoch, u8*) {
  const Side side(params);
  Fetches fetches(params, epoch);
  comm::WorkItem item;
  while (fetches.next(&item)) {
    const u8* staged = staged_row(params, epoch, item);
    copy_row(staged, params.recv_rows + u64(item.position) * params.row_bytes, nullptr,
             params.row_bytes);
    const u32* words = reinterpret_cast<const u32*>(staged + params.row_bytes);
    side.receive(item.position, [&](u32 i) { return words[i]; });
  }
}

#endif

// Marks the rows past the last as having no choices.
__device__ inline void fill_tail(const DispatchParams& params) {
  const Side side(params);
  const u64 begin = u64(params.summary->num_recv) * params.num_topk;
  const u64 end = u64(params.num_worst_tokens) * params.num_topk;
  const u64 thread = u64(blockIdx.x) * blockDim.x + threadIdx.x;
  for (u64 i = begin + thread; i < end; i += u64(gridDim.x) * blockDim.x) side.put_choice(i, -1);
}

}  // namespace epcomm

extern "C" __global__ void __launch_bounds__(kMaxDispatchThreads, 1)
    epcomm_dispatch(const __grid_constant__ epcomm::DispatchParams params) {
  using namespace epcomm;
  extern __shared__ __align__(128) u8 shared_memory[];
  const comm::Call& call = params.call;
  const u32 epoch = comm::begin(call);
  const comm::RouteSummary summary = *params.summary;
  const bool is_ahead = params.launch == kAhead;
  const bool fits = u64(summary.max_tokens) * params.staged_row_bytes <= call.slabs.stage_bytes;
  const Steps steps = {params.launch != kResumes,
                       !is_ahead || summary.num_recv <= params.num_out_rows};
  // A failed route leaves nothing to go by; every rank's route failed alike.
  const bool is_good = summary.is_valid != 0 && (fits || !is_ahead);
  if (!comm::may_begin(call) || !is_good) return;
  if (blockIdx.x == 0 && steps.stages) comm::post_arrival(call, epoch);
  if (params.num_worst_tokens > 0) fill_tail(params);
  const u32 num_fetch_warps = blockDim.x / kWarpSize - kNumStageWarps;
  if (warp_index() >= num_fetch_warps) {
    stage_units(params, steps, warp_index() - num_fetch_warps, epoch);
  } else if (steps.receives &&
             comm::wait_arrival(call, comm::kArrival, epoch, num_fetch_warps * kWarpSize)) {
    fetch_rows(params, warp_index(), num_fetch_warps, epoch, shared_memory);
  }
  comm::finish(call, steps.receives ? epoch : epoch - 1);
}
