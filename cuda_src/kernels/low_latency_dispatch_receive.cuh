// Receiving of low_latency_dispatch.cu: who takes part, counts, and rows for the experts.
#pragma once

#include "comm/cell_rows.cuh"
#include "comm/choice_tables.cuh"
#include "comm/few_choices.cuh"
#include "comm/granules.cuh"
#include "comm/low_latency.cuh"
#include "comm/row_parts.cuh"
#include "common/types.cuh"
#include "kernels/low_latency_dispatch_rows.cuh"

namespace epcomm {

using comm::Receivers;

// In shared memory.
struct Sources {
  comm::LowLatencyShape headers[kNumRanks];
  comm::Arrivals arrivals;
  u32 num_entries;
  u32 are_few;             // and not counted, but in Few
  u16 kept[kKeptEntries];  // all sources' choices, where they are no more
};

// Counts the rows of some sources, those whose tables arrive, for each local expert, or keeps their
// choices where these are few. By receivers; false, to all of them, where the call has failed.
__device__ inline bool count_rows(const LowLatencyDispatchParams& params, const comm::Round& round,
                                  u32 wanted, Sources* sources, u32* counts, comm::Few* few) {
  const comm::LowLatencyCall& call = params.call;
  const u32 num_local = num_local_experts(call);
  comm::Arrivals* arrivals = &sources->arrivals;
#pragma unroll 1
  for (u32 i = Receivers::thread(); i < kNumRanks * num_local; i += Receivers::kNumThreads) {
    counts[i] = 0;
  }
  const bool may_be_few = comm::may_be_few(call) && slot_row_bytes(params) <= kMaxCellRowBytes;
  if (may_be_few) comm::clear<Receivers>(call, few);
  if (Receivers::thread() == 0) *arrivals = {~wanted, 0, 0, 0};
  Receivers::meet();
  ptx::U64Pair entry = {};
  if (!comm::read_headers<Receivers>(call, round, wanted, sources->headers, arrivals, [&] {
        if (may_be_few) entry = comm::guess_entry<Receivers, false>(call, round, arrivals);
      })) {
    return false;
  }
  const comm::EntryEnds ends(call, sources->headers);
  const bool are_few = may_be_few && comm::are_few(call, sources->headers);
  if (Receivers::thread() == 0) {
    sources->num_entries = ends.last();
    sources->are_few = are_few;
    if (are_few) comm::number(call, sources->headers, few);
  }
  if (are_few) {
    return comm::read_few_entries<Receivers, false>(
        call, round, sources->headers, entry, arrivals, [&](u32 i, i32 expert, u32) {
          few->expert[i] = static_cast<u32>(expert);
          if (expert < 0) return;
          comm::keep(call, few, i, static_cast<u32>(expert) - call.rank * num_local);
        });
  }
  comm::read_entries<Receivers, false>(
      call, round, 0, ends.last(), arrivals,
      [&](u32 i, u32* whose) {
        u32 begin;
        *whose = ends.source_of(i, &begin);
        return slab::table(call.slabs, call.rank, round.slot, *whose) +
               (i - begin) * slab::kEntryWords;
      },
      [&](u32 i, i32 expert, u32) {
        const u32 local = static_cast<u32>(expert) - call.rank * num_local;
        const bool is_here = expert >= 0 && local < num_local;
        if (i < kKeptEntries) sources->kept[i] = is_here ? static_cast<u16>(local) : comm::kNotHere;
        if (!is_here) return;
        u32 begin;
        const u32 source = ends.source_of(i, &begin);
        atomicAdd(&counts[source * num_local + local], 1u);
      });
  Receivers::meet();
  return arrivals->has_failed == 0;
}

// Finds the sources that take part, and counts their rows. By receivers; false, to all of them,
// where the call has failed.
__device__ __forceinline__ bool find_sources(const LowLatencyDispatchParams& params,
                                             const comm::Round& round, Sources* sources,
                                             u32* counts, comm::Few* few) {
  const comm::LowLatencyCall& call = params.call;
  constexpr u32 kAll = (1u << kNumRanks) - 1;
  u32 wanted = kAll & ~round.masked, unseen = 0;
  // Twice at most: what takes part by another block's word has come whole.
#pragma unroll 1
  for (u32 look = 0; look < 2; ++look) {
    if (!count_rows(params, round, wanted, sources, counts, few)) return false;
    if (!call.can_mask) return true;
    const u32 seen = kAll & ~sources->arrivals.missing;
    const u32 taking_part =
        comm::agree_on_sources<Receivers>(call, round, seen, &sources->arrivals.taking_part);
    if (taking_part == seen && taking_part == wanted) return true;
    wanted = taking_part;  // what came of a source that is missing was counted: not the next time
    unseen = taking_part & ~seen;
  }
  if (Receivers::thread() == 0) comm::report_unseen(call, round, unseen);
  return false;
}

// Rows of each source for each local expert, as counted.
struct Counts {
  const u32* counts;
  u32 num_local;

  __device__ __forceinline__ u32 of(u32 source, u32 expert) const {
    return counts[source * num_local + expert];
  }

  __device__ __forceinline__ u32 end(u32 expert) const {
    u32 end = 0;
#pragma unroll 1
    for (u32 source = 0; source < kNumRanks; ++source) end += of(source, expert);
    return end;
  }
};

// The same, of choices that are few.
struct FewCounts {
  const comm::Few& few;
  u32 num_local;

  __device__ __forceinline__ u32 of(u32 source, u32 expert) const {
    return few.rows_before(num_local, expert, few.first_entry[source + 1]) -
           few.rows_before(num_local, expert, few.first_entry[source]);
  }

  __device__ __forceinline__ u32 end(u32 expert) const {
    return few.rows_before(num_local, expert, few.first_entry[kNumRanks]);
  }
};

// Tells how many rows every expert got, and from whom. By receivers of a block.
template <typename AnyCounts>
__device__ __forceinline__ void write_counts(const LowLatencyDispatchParams& params,
                                             const AnyCounts& counts) {
  const u32 num_local = num_local_experts(params.call);
#pragma unroll 1
  for (u32 expert = Receivers::thread(); expert < num_local; expert += Receivers::kNumThreads) {
    u32 begin = 0;
#pragma unroll 1
    for (u32 source = 0; source < kNumRanks; ++source) {
      const u32 count = counts.of(source, expert);
      params.layout_range[expert * kNumRanks + source] =
          static_cast<i64>(comm::cell_of(begin, count));
      begin += count;
    }
    params.recv_count[expert] = static_cast<i32>(begin);
    if (params.recv_stats != nullptr) params.recv_stats[expert] += static_cast<i32>(begin);
  }
}

// Marks the places behind every expert's rows. By receivers.
template <typename AnyCounts>
__device__ __forceinline__ void fill_tails(const LowLatencyDispatchParams& params,
                                           const AnyCounts& counts) {
  const u32 num_local = num_local_experts(params.call);
  const u32 num_rows = comm::num_recv_rows(params.call);
#pragma unroll 1
  for (u32 expert = blockIdx.x; expert < num_local; expert += gridDim.x) {
    const u32 end = counts.end(expert);
#pragma unroll 1
    for (u32 row = end + Receivers::thread(); row < num_rows; row += Receivers::kNumThreads) {
      params.src_info[u64(expert) * num_rows + row] = -1;
    }
  }
}

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

// What a lane has of a slice: vectors from first on, kStep apart, and words of scales.
struct Share {
  static constexpr u32 kStep = comm::kGranuleBytes;
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

// Writes vectors of a row, kStep apart from first on, to all experts that it is for.
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
      if (first + j * Share::kStep < end) ptx::st_no_allocate_vec16(to + j * Share::kStep, v[j]);
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
  for (u32 first = share.first; first < share.end; first += kUnroll * Share::kStep) {
    Vec16 v[kUnroll] = {};
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      if (is_here && first + j * Share::kStep < share.end) {
        v[j] = ptx::ld_no_allocate_vec16(row + first + j * Share::kStep);
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
    const u32 at = first + j * Share::kStep;
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
  for (u32 first = share.first; first < share.end; first += kVecs * Share::kStep) {
    if (first != share.first) look_at_values(&seen, first);
    while (true) {
      const u64* late = nullptr;
#pragma unroll
      for (u32 j = 0; j < kVecs; ++j) {
        const u32 at = first + j * Share::kStep;
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
    const comm::Part part = comm::place_few(call, few, item, [=](u32, u32 local, u32 entry) {
      return few->rows_before(num_local, local, entry);
    });
    if (part.num_choices == 0) continue;
    receive_cells(params, round, part, seen);
    write_sources(params, part, slice);
  }
}

}  // namespace epcomm
