// Receiving of low_latency_combine.cu: whom a token's rows come from, and their sum.
#pragma once

#include "comm/cell_rows.cuh"
#include "comm/few_choices.cuh"
#include "comm/granules.cuh"
#include "comm/low_latency.cuh"
#include "common/types.cuh"
#include "kernels/low_latency_combine_rows.cuh"

namespace epcomm {

// Lines that a token's rows come in, by lane: whom from, and with what weight.
struct Line {
  bool is_used;
  u32 holder;
  float weight;
};

// This lane's line of a token, of which it has a choice. By all lanes of a warp.
__device__ __forceinline__ Line line_of(const comm::LowLatencyCall& call, u32 expert, u32 weight) {
  const u32 lane = lane_index();
  const bool is_chosen = static_cast<i32>(expert) >= 0;
  const u32 holder = is_chosen ? expert / num_local_experts(call) : kNumRanks;
  if (call.shape.format == kByExpert) return {is_chosen, holder, ptx::as_float(weight)};
  u32 ranks = 0;
#pragma unroll
  for (u32 rank = 0; rank < kNumRanks; ++rank) {
    if (__any_sync(kFullWarp, holder == rank)) ranks |= 1u << rank;
  }
  return {lane < kNumRanks && ((ranks >> lane) & 1) != 0, lane, 1.0f};
}

// The same, of choices that the block keeps.
__device__ __forceinline__ Line kept_line(const comm::LowLatencyCall& call, const comm::Few& few,
                                          u32 token) {
  const u32 lane = lane_index(), num_topk = call.shape.num_topk;
  const u32 entry = few.first_entry[call.rank] + token * num_topk + lane;
  return line_of(call, lane < num_topk ? few.expert[entry] : ~0u, 0);
}

// The same, of choices as this rank sent them to itself.
__device__ inline Line own_line(const LowLatencyCombineParams& params, const comm::Round& round,
                                u32 token) {
  const comm::LowLatencyCall& call = params.call;
  const u32 lane = lane_index(), num_topk = call.shape.num_topk;
  u32 expert = ~0u, weight = 0;
  if (lane < num_topk) {
    const u64* cells = slab::table(call.slabs, call.rank, round.slot, call.rank) +
                       (token * num_topk + lane) * slab::kEntryWords;
    const ptx::U64Pair entry = ptx::ld_relaxed_sys_u64x2(cells);
    comm::Awaited found[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      found[i] = {comm::Outcome::kArrived, static_cast<u32>(entry.value[i])};
      if (static_cast<u32>(entry.value[i] >> 32) != round.epoch) {
        found[i] =
            comm::await_slowly(call, comm::kLowLatencyTables, call.rank, round.epoch, cells + i);
      }
    }
    if (found[0].outcome == comm::Outcome::kArrived) expert = found[0].word;
    weight = found[1].word;
  }
  return line_of(call, expert, weight);
}

// Ranks whose vectors a thread has on their way together.
constexpr u32 kBatch = 4;

// Sums what a warp has of one of this rank's tokens whose rows come in cells, from the ranks of
// `lines`. By all lanes of the warp.
__device__ __forceinline__ void sum_cells(const LowLatencyCombineParams& params,
                                          const comm::Round& round, u32 token,
                                          const Vectors& vectors, u32 lines) {
  const comm::LowLatencyCall& call = params.call;
  u8* out = params.out + u64(token) * row_bytes_of(params);
#pragma unroll 1
  for (u32 at = vectors.first; at < vectors.end; at += comm::kGranuleBytes) {
    Sums sums;
#pragma unroll
    for (u32 first = 0; first < kNumRanks; first += kBatch) {
      comm::VecCells seen[kBatch];
      while (true) {
        const u64* late = nullptr;
        u32 peer = 0;
#pragma unroll
        for (u32 rank = first; rank < first + kBatch && rank < kNumRanks; ++rank) {
          if (((lines >> rank) & 1) == 0) continue;
          u64* row = slab::cell_row(call.slabs, call.rank, round.slot, rank, token);
          seen[rank - first] = comm::look_at_cells(row, at);
        }
#pragma unroll
        for (u32 rank = first; rank < first + kBatch && rank < kNumRanks; ++rank) {
          if (late != nullptr || ((lines >> rank) & 1) == 0) continue;
          u64* row = slab::cell_row(call.slabs, call.rank, round.slot, rank, token);
          late = comm::late_cell(row, at, seen[rank - first], round.epoch);
          peer = rank;
        }
        if (late == nullptr) break;
        const comm::Outcome outcome = comm::await_cell(call, round, peer, late);
        if (outcome == comm::Outcome::kFailed) return;
        if (outcome == comm::Outcome::kMissing) lines &= ~(1u << peer);
      }
#pragma unroll
      for (u32 rank = first; rank < first + kBatch && rank < kNumRanks; ++rank) {
        if ((lines >> rank) & 1) sums.add(comm::words_of(seen[rank - first]));
      }
    }
    ptx::st_no_allocate_vec16(out + at, sums.rounded());
  }
}

// Sums what a warp has of one of this rank's tokens, whose rows are in the slot. By all lanes of
// the warp.
//   lines   those that have arrived, as bits
//   weight  that of this lane's line, by expert
__device__ __forceinline__ void sum_rows(const LowLatencyCombineParams& params,
                                         const comm::Round& round, u32 token,
                                         const Vectors& vectors, u32 lines, float weight) {
  const comm::LowLatencyCall& call = params.call;
  const u64 line_bytes = u64(call.shape.num_max_tokens) * row_bytes_of(params);
  const u8* rows = slot_row(params, round, call.rank, 0, token);
  u8* out = params.out + u64(token) * row_bytes_of(params);
  const bool is_by_rank = call.shape.format == kByRank;
  // All lanes go round alike: weights come from other lanes.
#pragma unroll 1
  for (u32 at = vectors.first; __any_sync(kFullWarp, at < vectors.end); at += comm::kGranuleBytes) {
    const bool is_inside = at < vectors.end;
    Sums sums;
    if (is_by_rank) {
#pragma unroll
      for (u32 first = 0; first < kNumRanks; first += kBatch) {
        Vec16 v[kBatch];
#pragma unroll
        for (u32 rank = first; rank < first + kBatch && rank < kNumRanks; ++rank) {
          if (is_inside && (lines >> rank) & 1) {
            v[rank - first] = ptx::ld_no_allocate_vec16(rows + rank * line_bytes + at);
          }
        }
#pragma unroll
        for (u32 rank = first; rank < first + kBatch && rank < kNumRanks; ++rank) {
          if (is_inside && (lines >> rank) & 1) sums.add(v[rank - first]);
        }
      }
    } else {
#pragma unroll 1
      for (u32 k = 0; k < call.shape.num_topk; ++k) {
        const float its_weight = __shfl_sync(kFullWarp, weight, k);
        if (is_inside && (lines >> k) & 1) {
          sums.add(ptx::ld_no_allocate_vec16(rows + k * line_bytes + at), its_weight);
        }
      }
    }
    if (is_inside) ptx::st_no_allocate_vec16(out + at, sums.rounded());
  }
}

// Sums a slice of a part of one of this rank's tokens. By all lanes of a warp.
//   few  choices of all sources, by rank, or null
__device__ __forceinline__ void sum_slice(const LowLatencyCombineParams& params,
                                          const comm::Round& round, u32 item,
                                          const comm::Slice& slice, const comm::Few* few) {
  const comm::LowLatencyCall& call = params.call;
  const u32 num_parts = call.shape.num_parts, token = item / num_parts;
  const Line line = few != nullptr ? kept_line(call, *few, token) : own_line(params, round, token);
  const bool is_in_cells = uses_cells(params, call.shape.num_tokens);
  comm::Outcome outcome = comm::Outcome::kMissing;
  if (line.is_used && ((round.masked >> line.holder) & 1) == 0) {
    outcome = comm::Outcome::kArrived;
    if (!is_in_cells) {
      const u32* flag = slab::flags(call.slabs, call.rank, round.slot, lane_index()) + item;
      outcome = comm::await(call, comm::kLowLatencyRows, line.holder, round.epoch, flag).outcome;
    }
    if (outcome == comm::Outcome::kMissing) comm::mask(call, line.holder);
  }
  const u32 lines = __ballot_sync(kFullWarp, outcome == comm::Outcome::kArrived);
  __syncwarp();  // a vote orders no memory: what one lane acquired, all will read
  if (__any_sync(kFullWarp, outcome == comm::Outcome::kFailed)) return;
  const comm::Granules part = comm::granules_of(row_bytes_of(params), item % num_parts, num_parts);
  const Vectors vectors = vectors_of(params, comm::granules_of(part, slice), lane_index());
  if (is_in_cells) {
    sum_cells(params, round, token, vectors, lines);
  } else {
    sum_rows(params, round, token, vectors, lines, line.weight);
  }
}

// Sums all of this rank's tokens. Each warp for itself. few: see sum_slice.
__device__ __forceinline__ void sum_tokens(const LowLatencyCombineParams& params,
                                           const comm::Round& round, const comm::Few* few) {
  const comm::LowLatencyShape& shape = params.call.shape;
  const u32 num_items = shape.num_tokens * shape.num_parts,
            num_warps = gridDim.x * Everyone::kNumWarps;
  const comm::Granules first = comm::granules_of(row_bytes_of(params), 0, shape.num_parts);
  const u32 num_slices = comm::num_slices_of(first.end, num_items, num_warps);
#pragma unroll 1
  for (u32 i = blockIdx.x + gridDim.x * Everyone::warp(); i < num_items * num_slices;
       i += num_warps) {
    sum_slice(params, round, i / num_slices, {i % num_slices, num_slices}, few);
  }
}

}  // namespace epcomm
