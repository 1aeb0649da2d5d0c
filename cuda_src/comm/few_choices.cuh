// Choices of all sources of a call with few tokens: kept by every block, with a bit for each at its
// expert, so that a warp works out where a token's rows lie by counting bits, with no other warp.
#pragma once

#include "comm/cell_rows.cuh"
#include "comm/choice_tables.cuh"
#include "comm/low_latency.cuh"
#include "comm/row_parts.cuh"
#include "common/types.cuh"

namespace epcomm::comm {

constexpr u32 kFewEntries = 512, kFewWords = 2048;

// In shared memory.
struct Few {
  u32 first_entry[kNumRanks + 1];  // of each source's choices, and the end of all
  u32 first_item[kNumRanks + 1];   // of each source's parts
  u32 expert[kFewEntries];
  u32 weight[kFewEntries];
  u32 chosen[kFewWords];  // bit i % 32 of [i / 32][local expert]: choice i is for it
  // That a warp of the crew has in hand.
  Choice choices[max_of(Senders::kNumWarps, Receivers::kNumWarps)][kWarpSize];

  // Rows of a local expert that come before a choice.
  __device__ __forceinline__ u32 rows_before(u32 num_local, u32 expert, u32 i) const {
    u32 number = 0;
#pragma unroll 1
    for (u32 w = 0; w < i / 32; ++w) number += __popc(chosen[w * num_local + expert]);
    const u32 rest = (1u << i % 32) - 1;
    return rest == 0 ? number : number + __popc(chosen[i / 32 * num_local + expert] & rest);
  }
};

// Whether it is worth a look at the others' numbers of tokens, by this rank's own.
__device__ __forceinline__ bool may_be_few(const LowLatencyCall& call) {
  return !call.can_mask && call.shape.num_tokens <= kCellTokens &&
         kNumRanks * call.shape.num_tokens * call.shape.num_topk <= kFewEntries;
}

// Makes room for choices. By a crew, before it meets.
template <typename AnyCrew>
__device__ __forceinline__ void clear(const LowLatencyCall& call, Few* few) {
  const u32 number = min_of(kFewWords, kFewEntries / 32 * num_local_experts(call));
#pragma unroll 1
  for (u32 i = AnyCrew::thread(); i < number; i += AnyCrew::kNumThreads) few->chosen[i] = 0;
}

// Whether the choices of all sources, by their headers, are few, and their rows cross as cells.
__device__ __forceinline__ bool are_few(const LowLatencyCall& call,
                                        const LowLatencyShape* headers) {
  u32 entries = 0;
  bool are_cells = true;
#pragma unroll
  for (u32 source = 0; source < kNumRanks; ++source) {
    are_cells = are_cells && headers[source].num_tokens <= kCellTokens;
    entries += headers[source].num_tokens * call.shape.num_topk;
  }
  return are_cells && entries <= kFewEntries &&
         ceil_div(entries, 32u) * num_local_experts(call) <= kFewWords;
}

// Tells where each source's choices and parts begin. By one thread.
__device__ __forceinline__ void number(const LowLatencyCall& call, const LowLatencyShape* headers,
                                       Few* few) {
  u32 entry = 0, item = 0;
#pragma unroll 1
  for (u32 source = 0; source <= kNumRanks; ++source) {
    few->first_entry[source] = entry;
    few->first_item[source] = item;
    if (source == kNumRanks) break;
    entry += headers[source].num_tokens * call.shape.num_topk;
    item += headers[source].num_tokens * headers[source].num_parts;
  }
}

// The choice that a thread reads, of all sources': the last threads the first, as the first wait
// for headers.
template <typename AnyCrew>
__device__ __forceinline__ u32 first_few() {
  return AnyCrew::kNumThreads - 1 - AnyCrew::thread();
}

template <bool kHasWeights>
__device__ __forceinline__ ptx::U64Pair look_at_entry(const u64* cells) {
  if constexpr (kHasWeights) return ptx::ld_relaxed_sys_u64x2(cells);
  return {{ptx::ld_relaxed_sys_u64(cells), 0}};
}

template <bool kHasWeights>
__device__ __forceinline__ bool is_entry_there(const ptx::U64Pair& entry, u32 epoch) {
  return static_cast<u32>(entry.value[0] >> 32) == epoch &&
         (!kHasWeights || static_cast<u32>(entry.value[1] >> 32) == epoch);
}

// Looks at this thread's choice until it or the headers are there, as if all sources had as many
// tokens as this rank: as a rule they have, and both come together.
template <typename AnyCrew, bool kHasWeights>
__device__ __forceinline__ ptx::U64Pair guess_entry(const LowLatencyCall& call, const Round& round,
                                                    const Arrivals* arrivals) {
  const u32 number = call.shape.num_tokens * call.shape.num_topk, i = first_few<AnyCrew>();
  ptx::U64Pair entry = {};
  if (i >= kNumRanks * number) return entry;
  const u32 source = i / number;
  const u64* cells = slab::table(call.slabs, call.rank, round.slot, source) +
                     (i - source * number) * slab::kEntryWords;
  for (u32 spins = 0;; ++spins) {
    const bool is_last = ptx::ld_acquire_cta_shared_u32(&arrivals->has_headers) != 0;
    entry = look_at_entry<kHasWeights>(cells);
    if (is_last || is_entry_there<kHasWeights>(entry, round.epoch)) return entry;
    if (spins > kSpinsBeforeSleep) ptx::sleep_ns(50);
  }
}

// Reads the choices of all sources; entry: what this thread saw of its first. By a crew; false, to
// all of it, where the call has failed.
//   use(i, expert, weight)  is called for each
template <typename AnyCrew, bool kHasWeights, typename Use>
__device__ __forceinline__ bool read_few_entries(const LowLatencyCall& call, const Round& round,
                                                 const LowLatencyShape* headers, ptx::U64Pair entry,
                                                 Arrivals* arrivals, Use use) {
  const EntryEnds ends(call, headers);
  bool is_guess = true;
#pragma unroll
  for (u32 source = 0; source < kNumRanks; ++source) {
    is_guess = is_guess && headers[source].num_tokens == call.shape.num_tokens;
  }
#pragma unroll 1
  for (u32 i = first_few<AnyCrew>(); i < ends.last(); i += AnyCrew::kNumThreads) {
    u32 begin;
    const u32 source = ends.source_of(i, &begin);
    const u64* cells =
        slab::table(call.slabs, call.rank, round.slot, source) + (i - begin) * slab::kEntryWords;
    if (!is_guess || !is_entry_there<kHasWeights>(entry, round.epoch)) {
      entry = look_at_entry<kHasWeights>(cells);
    }
    u32 words[2] = {};
    Outcome outcome = Outcome::kArrived;
#pragma unroll
    for (u32 w = 0; w < (kHasWeights ? 2 : 1); ++w) {
      words[w] = static_cast<u32>(entry.value[w]);
      if (static_cast<u32>(entry.value[w] >> 32) == round.epoch) continue;
      if (outcome != Outcome::kArrived) continue;
      const Awaited awaited = await_slowly(call, kLowLatencyTables, source, round.epoch, cells + w);
      outcome = awaited.outcome;
      words[w] = awaited.word;
    }
    if (outcome != Outcome::kArrived) {
      note(arrivals, source, outcome);
      break;
    }
    use(i, static_cast<i32>(words[0]), words[1]);
    is_guess = false;
  }
  AnyCrew::meet();
  return arrivals->has_failed == 0;
}

// Keeps a choice. local: the expert's number on this rank, or one beyond all.
__device__ __forceinline__ void keep(const LowLatencyCall& call, Few* few, u32 i, u32 local) {
  const u32 num_local = num_local_experts(call);
  if (local < num_local) atomicOr(&few->chosen[i / 32 * num_local + local], 1u << i % 32);
}

// A part of all sources' parts.
struct FewItem {
  u32 source;
  u32 token;
  u32 index;
  u32 num_parts;
  u32 entry;  // the first of the token's choices
};

__device__ __forceinline__ FewItem few_item(const LowLatencyCall& call, const Few& few,
                                            const LowLatencyShape* headers, u32 item) {
  u32 source = 0, begin = 0;
#pragma unroll
  for (u32 s = 1; s < kNumRanks; ++s) {
    const u32 first = few.first_item[s];
    if (item >= first) {
      source = s;
      begin = first;
    }
  }
  const u32 num_parts = headers[source].num_parts, token = (item - begin) / num_parts;
  return {source, token, item - begin - token * num_parts, num_parts,
          few.first_entry[source] + token * call.shape.num_topk};
}

// Puts a token's choices for this rank's experts in front, with their rows. By all lanes of a warp.
//   row_of(source, local, i)  the row of choice i
template <typename AnyCrew, typename RowOf>
__device__ __forceinline__ Part place_few(const LowLatencyCall& call, Few* few, const FewItem& item,
                                          RowOf row_of) {
  const u32 lane = lane_index(), i = item.entry + lane;
  Choice* choices = few->choices[AnyCrew::warp()];
  Choice own = {kNoRow, 0, lane, 0};
  if (lane < call.shape.num_topk) own.expert = few->expert[i] - call.rank * num_local_experts(call);
  const bool is_here = own.expert < num_local_experts(call);
  if (is_here) {
    own.row = row_of(item.source, own.expert, i);
    own.weight = few->weight[i];  // none in dispatch, where nobody reads it
  }
  const u32 here = __ballot_sync(kFullWarp, is_here);
  __syncwarp();  // all lanes are done with the choices before
  if (is_here) choices[__popc(here & ((1u << lane) - 1))] = own;
  __syncwarp();
  return {item.source,    item.token, item.index,
          item.num_parts, choices,    static_cast<u32>(__popc(here))};
}

}  // namespace epcomm::comm
