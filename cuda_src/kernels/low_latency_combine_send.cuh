// Sending of low_latency_combine.cu: what this rank's experts have for a source's tokens.
#pragma once

#include "comm/cell_rows.cuh"
#include "comm/granules.cuh"
#include "comm/low_latency.cuh"
#include "comm/row_parts.cuh"
#include "common/types.cuh"
#include "kernels/low_latency_combine_rows.cuh"
#include "ptx/async.cuh"

namespace epcomm {

// Between a thread's vectors of a part that its group sends.
constexpr u32 kSendStep = kGroupWarps * comm::kGranuleBytes;

__device__ __forceinline__ Vectors sent_vectors(const LowLatencyCombineParams& params,
                                                const comm::Part& part) {
  return vectors_of(params, comm::granules_of(row_bytes_of(params), part.index, part.num_parts),
                    comm::warp_in_group() * kWarpSize + lane_index());
}

__device__ __forceinline__ const u8* expert_row(const LowLatencyCombineParams& params,
                                                const comm::Choice& choice) {
  const u64 index = u64(choice.expert) * comm::num_recv_rows(params.call) + choice.row;
  return params.rows + index * row_bytes_of(params);
}

// Where the sums of a token's rows go: into its row of the slot, or into its cells.
struct SumsTarget {
  u8* row;
  u64* cells;
  bool is_in_cells;

  __device__ __forceinline__ SumsTarget(const LowLatencyCombineParams& params,
                                        const comm::Round& round, const comm::Part& part,
                                        bool is_in_cells)
      : row(slot_row(params, round, part.source, params.call.rank, part.token)),
        cells(slab::cell_row(params.call.slabs, part.source, round.slot, params.call.rank,
                             part.token)),
        is_in_cells(is_in_cells) {}

  __device__ __forceinline__ void put(u32 at, const Sums& sums, u32 epoch) const {
    if (is_in_cells) {
      comm::put_cells(cells, at, sums.rounded(), epoch);
    } else {
      ptx::st_no_allocate_vec16(row + at, sums.rounded());
    }
  }
};

// Vectors of experts' rows that each thread has on their way into shared memory. They take no
// registers there, so they are more than loads could be, however few choices a token has here. A
// few of a choice go together: what is done once for each choice is so much less. In shared memory.
struct Stages {
  Vec16 vectors[kNumSumStages][kStageVectors][Everyone::kNumThreads];
};

// Fetches a part's vectors: of each choice a few, and then the next few.
class Fetch {
 public:
  __device__ __forceinline__ Fetch(const LowLatencyCombineParams& params, const comm::Part& part,
                                   const Vectors& vectors, Stages* stages)
      : params_(params), part_(part), at_(vectors.first), end_(vectors.end), stages_(stages) {
#pragma unroll 1
    for (u32 i = 0; i < kNumSumStages; ++i) start();
  }

  // Adds the oldest vectors that are on their way, of a choice, and starts to fetch others.
  __device__ __forceinline__ void add(const comm::Choice& choice, Sums* sums) {
    ptx::copy_async_wait<kNumSumStages - 1>();
    if (choice.row != comm::kNoRow) {
#pragma unroll
      for (u32 i = 0; i < kStageVectors; ++i) {
        // What lies behind the end was not fetched, and is not sent.
        sums[i].add(*stage(i), ptx::as_float(choice.weight));
      }
    }
    start();
  }

 private:
  __device__ __forceinline__ Vec16* stage(u32 i) {
    return &stages_->vectors[stage_][i][Everyone::thread()];
  }

  __device__ __forceinline__ void start() {
    if (at_ < end_) {
      const comm::Choice& choice = part_.choices[i_];
      if (choice.row != comm::kNoRow) {
        const u8* row = expert_row(params_, choice);
#pragma unroll
        for (u32 i = 0; i < kStageVectors; ++i) {
          const u32 at = at_ + i * kSendStep;
          if (at < end_) ptx::copy_async_vec16(stage(i), row + at);
        }
      }
      if (++i_ == part_.num_choices) {
        i_ = 0;
        at_ += kStageVectors * kSendStep;
      }
    }
    ptx::copy_async_commit();  // also where nothing is left: the wait counts
    if (++stage_ == kNumSumStages) stage_ = 0;
  }

  const LowLatencyCombineParams& params_;
  const comm::Part& part_;
  u32 at_, end_;
  Stages* stages_;
  u32 i_ = 0, stage_ = 0;
};

// Sends the weighted sums of a part's rows. By all threads of a group.
__device__ __forceinline__ void send_sums(const LowLatencyCombineParams& params,
                                          const comm::Round& round, const comm::Part& part,
                                          const SumsTarget& target, Stages* stages) {
  const Vectors vectors = sent_vectors(params, part);
  Fetch fetch(params, part, vectors, stages);
#pragma unroll 1
  for (u32 at = vectors.first; at < vectors.end; at += kStageVectors * kSendStep) {
    Sums sums[kStageVectors];
#pragma unroll 1
    for (u32 i = 0; i < part.num_choices; ++i) fetch.add(part.choices[i], sums);
#pragma unroll
    for (u32 i = 0; i < kStageVectors; ++i) {
      if (at + i * kSendStep < vectors.end) target.put(at + i * kSendStep, sums[i], round.epoch);
    }
  }
}

__device__ inline void send_row(const LowLatencyCombineParams& params, const comm::Part& part,
                                const comm::Choice& choice, u8* to) {
  constexpr u32 kUnroll = 4;
  const Vectors vectors = sent_vectors(params, part);
  const bool is_here = choice.row != comm::kNoRow;
  const u8* row = is_here ? expert_row(params, choice) : nullptr;
#pragma unroll 1
  for (u32 at = vectors.first; at < vectors.end; at += kUnroll * kSendStep) {
    Vec16 v[kUnroll] = {};
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      if (is_here && at + j * kSendStep < vectors.end) {
        v[j] = ptx::ld_no_allocate_vec16(row + at + j * kSendStep);
      }
    }
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      if (at + j * kSendStep < vectors.end)
        ptx::st_no_allocate_vec16(to + at + j * kSendStep, v[j]);
    }
  }
}

// Sends what this rank's experts have for a part of a source's token. By all threads of a group.
__device__ __forceinline__ void send_part(const LowLatencyCombineParams& params,
                                          const comm::Round& round, const comm::Part& part,
                                          bool is_in_cells, Stages* stages) {
  const comm::LowLatencyCall& call = params.call;
  const bool is_by_rank = call.shape.format == kByRank;
  if (is_by_rank) {
    send_sums(params, round, part, {params, round, part, is_in_cells}, stages);
    if (is_in_cells) return;
  } else {
#pragma unroll 1
    for (u32 i = 0; i < part.num_choices; ++i) {
      const comm::Choice& choice = part.choices[i];
      send_row(params, part, choice, slot_row(params, round, part.source, choice.k, part.token));
    }
  }
  comm::group_barrier();
  if (comm::warp_in_group() != 0 || lane_index() >= (is_by_rank ? 1 : part.num_choices)) return;
  const u32 line = is_by_rank ? call.rank : part.choices[lane_index()].k;
  ptx::st_release_sys_u32(slab::flags(call.slabs, part.source, round.slot, line) + part.item(),
                          round.epoch);
}

// Sends parts of a source's rows. Each group for itself.
__device__ __forceinline__ void send_parts(const LowLatencyCombineParams& params,
                                           const comm::Round& round, comm::Parts parts,
                                           bool are_in_cells, Stages* stages) {
#pragma unroll 1
  for (u32 item = parts.begin + comm::group_index(); item < parts.end; item += kNumGroups) {
    const comm::Part part = parts.part(item);
    if (part.num_choices > 0) send_part(params, round, part, are_in_cells, stages);
  }
}

}  // namespace epcomm
