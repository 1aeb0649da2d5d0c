// Counting of low_latency_dispatch.cu: who takes part, and how many rows each expert gets.
#pragma once

#include "comm/choice_tables.cuh"
#include "comm/few_choices.cuh"
#include "comm/low_latency.cuh"
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

}  // namespace epcomm
