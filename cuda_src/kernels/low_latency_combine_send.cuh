// Sending of low_latency_combine.cu: what this rank's experts have for a source's tokens.
#pragma once

#include "comm/cell_rows.cuh"
#include "comm/granules.cuh"
#include "comm/low_latency.cuh"
#include "comm/row_parts.cuh"
#include "common/types.cuh"
#include "kernels/low_latency_combine_rows.cuh"

namespace epcomm {

using comm::Senders;

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

// Sends the weighted sums of a part's rows. So many rows are on their way together, and so many
// vectors of each: one after the other they take as much longer.
template <u32 kRows, u32 kUnroll>
__device__ __forceinline__ void send_sums(const LowLatencyCombineParams& params,
                                          const comm::Round& round, const comm::Part& part,
                                          bool is_in_cells) {
  const comm::LowLatencyCall& call = params.call;
  u64* cells =
      slab::cell_row(call.slabs, part.source, round.slot, call.rank, is_in_cells ? part.token : 0);
  u8* to = slot_row(params, round, part.source, call.rank, part.token);
  const Vectors vectors = sent_vectors(params, part);
#pragma unroll 1
  for (u32 at = vectors.first; at < vectors.end; at += kUnroll * kSendStep) {
    Sums sums[kUnroll];
#pragma unroll 1
    for (u32 first = 0; first < part.num_choices; first += kRows) {
      const comm::Choice* choices = part.choices + first;
      const u32 number = min_of(kRows, part.num_choices - first);
      Vec16 v[kRows][kUnroll];
#pragma unroll
      for (u32 i = 0; i < kRows; ++i) {
        if (i >= number || choices[i].row == comm::kNoRow) continue;
        const u8* row = expert_row(params, choices[i]);
#pragma unroll
        for (u32 j = 0; j < kUnroll; ++j) {
          if (at + j * kSendStep < vectors.end) {
            v[i][j] = ptx::ld_no_allocate_vec16(row + at + j * kSendStep);
          }
        }
      }
#pragma unroll
      for (u32 i = 0; i < kRows; ++i) {
        if (i >= number || choices[i].row == comm::kNoRow) continue;
#pragma unroll
        for (u32 j = 0; j < kUnroll; ++j) {
          if (at + j * kSendStep < vectors.end) {
            sums[j].add(v[i][j], ptx::as_float(choices[i].weight));
          }
        }
      }
    }
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      if (at + j * kSendStep >= vectors.end) continue;
      if (is_in_cells) {
        comm::put_cells(cells, at + j * kSendStep, sums[j].rounded(), round.epoch);
      } else {
        ptx::st_no_allocate_vec16(to + at + j * kSendStep, sums[j].rounded());
      }
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
                                          bool is_in_cells) {
  const comm::LowLatencyCall& call = params.call;
  const bool is_by_rank = call.shape.format == kByRank;
  if (is_by_rank) {
    send_sums<4, 2>(params, round, part, is_in_cells);
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

// Sends parts of a source's rows. By senders; each group for itself.
__device__ __forceinline__ void send_parts(const LowLatencyCombineParams& params,
                                           const comm::Round& round, comm::Parts parts,
                                           bool are_in_cells) {
#pragma unroll 1
  for (u32 item = parts.begin + comm::group_index(); item < parts.end; item += kNumGroups) {
    const comm::Part part = parts.part(item);
    if (part.num_choices > 0) send_part(params, round, part, are_in_cells);
  }
}

}  // namespace epcomm
