// Receiving of low_latency_dispatch.cu: rows, for the experts.
#pragma once

#include "comm/cell_rows.cuh"
#include "comm/few_choices.cuh"
#include "comm/granules.cuh"
#include "comm/low_latency.cuh"
#include "comm/row_parts.cuh"
#include "common/types.cuh"
#include "kernels/low_latency_dispatch_count.cuh"
#include "kernels/low_latency_dispatch_rows.cuh"

namespace epcomm {

// Writes a word of a row's scales to all experts that it is for.
__device__ __forceinline__ void give_scale(const LowLatencyDispatchParams& params,
                                           const comm::Part& part, u32 index, u32 scale) {
  const u64 num_rows = comm::num_recv_rows(params.call);
#pragma unroll 1
  for (u32 i = 0; i < part.num_choices; ++i) {
    const comm::Choice& choice = part.choices[i];
    const u64 line = u64(choice.expert) * params.num_scales + index;
    params.recv_scales[line * num_rows + choice.row] = scale;
  }
}

// What a lane has of a slice: a vector of each granule, from first on, and words of scales.
struct Share {
  u32 first;
  u32 end;
  u32 first_scale;
  u32 end_scale;
};

__device__ __forceinline__ Share share_of(const LowLatencyDispatchParams& params, u32 index,
                                          u32 num_parts, const comm::Slice& slice) {
  const comm::Granules granules =
      comm::granules_of(comm::granules_of(data_bytes(params), index, num_parts), slice);
  const u32 number = scales_of_granule(params), lane = lane_index();
  return {granules.begin * comm::kGranuleBytes + lane * static_cast<u32>(sizeof(Vec16)),
          min_of<u32>(granules.end * comm::kGranuleBytes, data_bytes(params)),
          granules.begin * number + lane, min_of(granules.end * number, params.num_scales)};
}

// Into how many slices receivers cut a source's parts.
__device__ __forceinline__ u32 num_slices_of(const LowLatencyDispatchParams& params,
                                             const comm::LowLatencyShape* headers, u32 source) {
  u32 num_parts_in_all = 0;
#pragma unroll
  for (u32 s = 0; s < kNumRanks; ++s) {
    num_parts_in_all += headers[s].num_tokens * headers[s].num_parts;
  }
  const comm::Granules first =
      comm::granules_of(data_bytes(params), 0, max_of(1u, headers[source].num_parts));
  return comm::num_slices_of(first.end, num_parts_in_all, gridDim.x * Receivers::kNumWarps);
}

// Writes vectors of a row, one of each granule from first on, to all experts that it is for.
template <u32 kNumber>
__device__ __forceinline__ void give_values(const LowLatencyDispatchParams& params,
                                            const comm::Part& part, u32 first, u32 end,
                                            const Vec16 (&v)[kNumber]) {
  const u64 num_rows = comm::num_recv_rows(params.call), row_bytes = data_bytes(params);
#pragma unroll 1
  for (u32 i = 0; i < part.num_choices; ++i) {
    const comm::Choice& choice = part.choices[i];
    u8* to = params.recv_rows + (choice.expert * num_rows + choice.row) * row_bytes + first;
#pragma unroll
    for (u32 j = 0; j < kNumber; ++j) {
      if (first + j * comm::kGranuleBytes < end)
        ptx::st_no_allocate_vec16(to + j * comm::kGranuleBytes, v[j]);
    }
  }
}

// Receives a slice of a part from the slot. By all lanes of a warp.
__device__ __forceinline__ void receive_from_slot(const LowLatencyDispatchParams& params,
                                                  const comm::Round& round, const comm::Part& part,
                                                  const comm::Slice& slice) {
  constexpr u32 kUnroll = 4;
  const comm::LowLatencyCall& call = params.call;
  const comm::Outcome outcome = comm::await_part(call, round, part.source, part.item());
  if (outcome == comm::Outcome::kFailed) return;
  const bool is_here = outcome == comm::Outcome::kArrived;
  const u8* row = slot_row(params, round, call.rank, part.source, part.token);
  const Share share = share_of(params, part.index, part.num_parts, slice);
#pragma unroll 1
  for (u32 first = share.first; first < share.end; first += kUnroll * comm::kGranuleBytes) {
    Vec16 v[kUnroll] = {};
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      if (is_here && first + j * comm::kGranuleBytes < share.end) {
        v[j] = ptx::ld_no_allocate_vec16(row + first + j * comm::kGranuleBytes);
      }
    }
    give_values(params, part, first, share.end, v);
  }
  const u32* scales = reinterpret_cast<const u32*>(row + data_bytes(params));
#pragma unroll 1
  for (u32 k = share.first_scale; k < share.end_scale; k += kWarpSize) {
    give_scale(params, part, k, is_here ? scales[k] : 0);
  }
}

// What a lane saw of a slice that comes in cells, at its first look: on its way while it is worked
// out for whom the part is.
//   kVecs  vectors that are on their way together
template <u32 kVecs>
struct SeenPart {
  u64* row;
  Share share;
  u64 scale;  // all that a lane has of the scales, as a rule
  comm::VecCells values[kVecs];
};

template <u32 kVecs>
__device__ __forceinline__ void look_at_values(SeenPart<kVecs>* seen, u32 first) {
#pragma unroll
  for (u32 j = 0; j < kVecs; ++j) {
    const u32 at = first + j * comm::kGranuleBytes;
    if (at < seen->share.end) seen->values[j] = comm::look_at_cells(seen->row, at);
  }
}

template <u32 kVecs>
__device__ __forceinline__ SeenPart<kVecs> look_at_part(const LowLatencyDispatchParams& params,
                                                        const comm::Round& round, u32 source,
                                                        u32 token, u32 index, u32 num_parts,
                                                        const comm::Slice& slice) {
  const comm::LowLatencyCall& call = params.call;
  SeenPart<kVecs> seen;
  seen.row = slab::cell_row(call.slabs, call.rank, round.slot, source, token);
  seen.share = share_of(params, index, num_parts, slice);
  look_at_values(&seen, seen.share.first);
  const u32 at = data_bytes(params) + seen.share.first_scale * sizeof(u32);
  const bool has_scale = seen.share.first_scale < seen.share.end_scale;
  seen.scale = has_scale ? ptx::ld_relaxed_sys_u64(comm::cell_at(seen.row, at)) : 0;
  return seen;
}

// Receives a slice that comes in cells; zeros for what does not come. By all lanes of a warp.
template <u32 kVecs>
__device__ __forceinline__ void receive_cells(const LowLatencyDispatchParams& params,
                                              const comm::Round& round, const comm::Part& part,
                                              SeenPart<kVecs>& seen) {
  const comm::LowLatencyCall& call = params.call;
  const Share& share = seen.share;
  bool is_missing = false;
#pragma unroll 1
  for (u32 first = share.first; first < share.end; first += kVecs * comm::kGranuleBytes) {
    if (first != share.first) look_at_values(&seen, first);
    while (true) {
      const u64* late = nullptr;
#pragma unroll
      for (u32 j = 0; j < kVecs; ++j) {
        const u32 at = first + j * comm::kGranuleBytes;
        if (late == nullptr && at < share.end) {
          late = comm::late_cell(seen.row, at, seen.values[j], round.epoch);
        }
      }
      if (late == nullptr || is_missing) break;
      const comm::Outcome outcome = comm::await_cell(call, round, part.source, late);
      if (outcome == comm::Outcome::kFailed) return;
      is_missing = outcome == comm::Outcome::kMissing;
      look_at_values(&seen, first);
    }
    Vec16 v[kVecs];
#pragma unroll
    for (u32 j = 0; j < kVecs; ++j) {
      v[j] = is_missing ? Vec16{} : comm::words_of(seen.values[j]);
    }
    give_values(params, part, first, share.end, v);
  }
#pragma unroll 1
  for (u32 k = share.first_scale; k < share.end_scale; k += kWarpSize) {
    comm::Awaited found = {comm::Outcome::kArrived, static_cast<u32>(seen.scale)};
    if (k != share.first_scale || static_cast<u32>(seen.scale >> 32) != round.epoch) {
      const u64* cell = comm::cell_at(seen.row, data_bytes(params) + k * sizeof(u32));
      found = comm::await(call, comm::kLowLatencyCells, part.source, round.epoch, cell);
    }
    if (found.outcome == comm::Outcome::kFailed) return;
    if (found.outcome == comm::Outcome::kMissing) comm::mask(call, part.source);
    give_scale(params, part, k, found.word);
  }
}

// Tells experts whose row they got, once for each row. By all lanes of a warp.
__device__ __forceinline__ void write_sources(const LowLatencyDispatchParams& params,
                                              const comm::Part& part, const comm::Slice& slice) {
  const u32 lane = lane_index();
  if (part.index != 0 || slice.index != 0 || lane >= part.num_choices) return;
  const comm::Choice& choice = part.choices[lane];
  const u64 line = u64(choice.expert) * comm::num_recv_rows(params.call);
  params.src_info[line + choice.row] = static_cast<i32>(part.token);
}

// Receives parts of a source's rows for all experts that they are for. By receivers; each warp for
// itself.
__device__ __forceinline__ void receive_parts(const LowLatencyDispatchParams& params,
                                              const comm::Round& round, comm::Parts parts,
                                              u32 num_slices, bool are_in_cells) {
#pragma unroll 1
  for (u32 i = parts.begin * num_slices + Receivers::warp(); i < parts.end * num_slices;
       i += Receivers::kNumWarps) {
    const comm::Part part = parts.part(i / num_slices);
    const comm::Slice slice = {i % num_slices, num_slices};
    if (part.num_choices == 0) continue;
    if (are_in_cells) {
      // A vector at a time, as registers are scarce here: this is not what few tokens take.
      SeenPart<1> seen = look_at_part<1>(params, round, part.source, part.token, part.index,
                                         part.num_parts, slice);
      receive_cells(params, round, part, seen);
    } else {
      receive_from_slot(params, round, part, slice);
    }
    write_sources(params, part, slice);
  }
}

// Receives all sources' rows where they are few. By receivers; each warp for itself.
__device__ __forceinline__ void receive_few(const LowLatencyDispatchParams& params,
                                            const comm::Round& round, const Sources& sources,
                                            comm::Few* few) {
  const comm::LowLatencyCall& call = params.call;
  const u32 num_local = num_local_experts(call);
  const u32 num_slices = num_slices_of(params, sources.headers, call.rank);
  const u32 end = few->first_item[kNumRanks] * num_slices;
#pragma unroll 1
  for (u32 i = blockIdx.x + gridDim.x * Receivers::warp(); i < end;
       i += gridDim.x * Receivers::kNumWarps) {
    const comm::FewItem item = comm::few_item(call, *few, sources.headers, i / num_slices);
    const comm::Slice slice = {i % num_slices, num_slices};
    SeenPart<2> seen =
        look_at_part<2>(params, round, item.source, item.token, item.index, item.num_parts, slice);
    const comm::Part part = comm::place_few<Receivers>(
        call, few, item,
        [=](u32, u32 local, u32 entry) { return few->rows_before(num_local, local, entry); });
    if (part.num_choices == 0) continue;
    receive_cells(params, round, part, seen);
    write_sources(params, part, slice);
  }
}

}  // namespace epcomm
