// Where rows lie, by the tables of choices, and which part of them each block moves.
//
// A source's rows at an expert lie one behind the other, by token, so a token's row is found by
// counting the choices before it. Blocks count for themselves, in batches of neighbouring tokens.
#pragma once

#include "comm/choice_tables.cuh"
#include "comm/low_latency.cuh"
#include "common/types.cuh"
#include "slab/low_latency.cuh"

namespace epcomm::comm {

constexpr u32 kNoRow = ~0u;

// A choice of another rank's expert, among those that a block keeps.
constexpr u16 kNotHere = 0xffff;
static_assert(kMaxLocalExperts < kNotHere, "a kept choice has 16 bits");

// A choice of a token for an expert of this rank, and where the expert has the token's row.
struct Choice {
  u32 expert;
  u32 row;
  u32 k;
  u32 weight;
};

// A source's rows at an expert of this rank that are not placed yet.
struct Span {
  u32 next;
  u32 end;
};

// What a block has of a source's parts.
struct Range {
  u32 begin;
  u32 end;
  u32 num_parts;    // of a row
  u32 first_entry;  // of the source among all sources' choices

  __device__ __forceinline__ u32 first_token() const { return begin / num_parts; }
  __device__ __forceinline__ u32 end_token() const { return ceil_div(end, num_parts); }
};

// A block's ranges, and some neighbouring tokens of a source. In shared memory.
struct Batch {
  Range ranges[kNumRanks];
  Choice choices[kBatchEntries];  // a token's are at its number in the batch times num_topk
  u32 num_choices[kBatchEntries];
};

// Gives a token's choices for this rank's experts their rows, and puts them in front. By a warp.
__device__ inline void place_choices(Choice* choices, u32 num_topk, Span* spans, u32* number) {
  const u32 lane = lane_index();
  Choice own = {kNoRow, 0, 0, 0};
  if (lane < num_topk) own = choices[lane];
  const bool is_here = own.expert != kNoRow;
  if (is_here) {
    own.row = spans[own.expert].next;
    spans[own.expert].next = own.row + 1;
    // A row that dispatch did not give: the caller passes other choices than those.
    if (own.row >= spans[own.expert].end) own.row = kNoRow;
  }
  const u32 here = __ballot_sync(kFullWarp, is_here);
  __syncwarp();
  if (is_here) choices[__popc(here & ((1u << lane) - 1))] = own;
  if (lane == 0) *number = __popc(here);
  __syncwarp();
}

// Works out the choices of tokens [begin, end) of a source. By a crew, which then meets.
//   kept   the source's choices as local experts, or kNotHere; null where the block keeps none
//   spans  [local experts] the source's rows from first_token on; left with those behind the batch
template <typename AnyCrew, bool kHasWeights>
__device__ __forceinline__ void place_batch(const LowLatencyCall& call, const Round& round,
                                            u32 source, u32 first_token, u32 begin, u32 end,
                                            const u16* kept, Span* spans, Batch* batch,
                                            Arrivals* arrivals) {
  const u32 num_topk = call.shape.num_topk, num_local = num_local_experts(call);
  const u32 batch_begin = begin * num_topk;
  auto place = [&](u32 i, u32 local, u32 weight) {
    if (i >= batch_begin) {
      batch->choices[i - batch_begin] = {local, 0, i % num_topk, weight};
    } else if (local != kNoRow) {
      atomicAdd(&spans[local].next, 1u);
    }
  };
  if (kept != nullptr) {
#pragma unroll 1
    for (u32 i = first_token * num_topk + AnyCrew::thread(); i < end * num_topk;
         i += AnyCrew::kNumThreads) {
      place(i, kept[i] == kNotHere ? kNoRow : kept[i], 0);
    }
  } else {
    const u64* table = slab::table(call.slabs, call.rank, round.slot, source);
    read_entries<AnyCrew, kHasWeights>(
        call, round, first_token * num_topk, end * num_topk, arrivals,
        [=](u32 i, u32* whose) {
          *whose = source;
          return table + i * slab::kEntryWords;
        },
        [&](u32 i, i32 expert, u32 weight) {
          const u32 local = static_cast<u32>(expert) - call.rank * num_local;
          place(i, expert >= 0 && local < num_local ? local : kNoRow, weight);
        });
  }
  AnyCrew::meet();
  if (AnyCrew::warp() == 0 && arrivals->missing == 0 && arrivals->has_failed == 0) {
#pragma unroll 1
    for (u32 token = 0; token < end - begin; ++token) {
      place_choices(batch->choices + token * num_topk, num_topk, spans, batch->num_choices + token);
    }
  }
  AnyCrew::meet();
}

// A part of a row that came, or goes, along a token's choices.
struct Part {
  u32 source;
  u32 token;
  u32 index;
  u32 num_parts;
  const Choice* choices;
  u32 num_choices;

  __device__ __forceinline__ u32 item() const { return token * num_parts + index; }
};

// Parts of a source's rows that a block has in hand: items [begin, end), of the tokens of its
// batch.
struct Parts {
  u32 source;
  u32 first_token;  // of the batch
  u32 begin;
  u32 end;
  u32 num_parts;  // of a row
  u32 num_topk;
  const Batch* batch;

  __device__ __forceinline__ Part part(u32 item) const {
    const u32 token = item / num_parts, place = token - first_token;
    return {source,
            token,
            item % num_parts,
            num_parts,
            batch->choices + place * num_topk,
            batch->num_choices[place]};
  }
};

// Divides all parts among the blocks: this one's of a source.
__device__ inline Range range_of(const LowLatencyCall& call, u32 sources,
                                 const LowLatencyShape* headers, u32 source) {
  u32 total = 0, before = 0, first_entry = 0;
#pragma unroll 1
  for (u32 other = 0; other < kNumRanks; ++other) {
    const bool takes_part = ((sources >> other) & 1) != 0;
    const u32 number = takes_part ? headers[other].num_tokens * headers[other].num_parts : 0;
    total += number;
    if (other >= source) continue;
    before += number;
    first_entry += headers[other].num_tokens * call.shape.num_topk;
  }
  const u32 first = total * blockIdx.x / gridDim.x, last = total * (blockIdx.x + 1) / gridDim.x;
  const bool takes_part = ((sources >> source) & 1) != 0;
  const u32 num_parts = headers[source].num_parts;
  const u32 number = takes_part ? headers[source].num_tokens * num_parts : 0;
  return {first > before ? min_of(first - before, number) : 0,
          last > before ? min_of(last - before, number) : 0, num_parts, first_entry};
}

// Gives every part of the sources' rows to one block; neighbouring ones to the same. By a crew;
// false where the call has failed.
//   kept                     all sources' choices, or null: see place_batch
//   span_of(source, expert)  where the source's rows lie at an expert
//   serve(parts)             is called by the crew for what the block has in hand; who is through
//                            with the last does not wait for the others
template <typename AnyCrew, bool kHasWeights, typename SpanOf, typename Serve>
__device__ inline bool for_each_part(const LowLatencyCall& call, const Round& round, u32 sources,
                                     const LowLatencyShape* headers, const u16* kept, Span* spans,
                                     Batch* batch, Arrivals* arrivals, SpanOf span_of,
                                     Serve serve) {
  const u32 thread = AnyCrew::thread();
  if (thread < kNumRanks) batch->ranges[thread] = range_of(call, sources, headers, thread);
  bool is_first = true;
  AnyCrew::meet();  // arrivals begin anew, too
#pragma unroll 1
  for (u32 source = 0; source < kNumRanks; ++source) {
    if (batch->ranges[source].begin >= batch->ranges[source].end) continue;
    if (!is_first) AnyCrew::meet();  // others may be at the source before
    is_first = false;
#pragma unroll 1
    for (u32 i = thread; i < num_local_experts(call); i += AnyCrew::kNumThreads) {
      spans[i] = span_of(source, i);
    }
    if (thread == 0) arrivals->missing = 0;
    AnyCrew::meet();
    u32 counted = 0;
#pragma unroll 1
    for (u32 token = batch->ranges[source].first_token();
         token < batch->ranges[source].end_token();) {
      const Range& range = batch->ranges[source];
      if (counted != 0) AnyCrew::meet();  // others may be at the batch before
      const u32 next = min_of(token + kBatchEntries / call.shape.num_topk, range.end_token());
      place_batch<AnyCrew, kHasWeights>(call, round, source, counted, token, next,
                                        kept == nullptr ? nullptr : kept + range.first_entry, spans,
                                        batch, arrivals);
      if (arrivals->has_failed != 0) return false;
      if (arrivals->missing != 0) {
        if (thread == 0) mask(call, source);
        break;
      }
      serve(Parts{source, token, max_of(range.begin, token * range.num_parts),
                  min_of(range.end, next * range.num_parts), range.num_parts, call.shape.num_topk,
                  batch});
      counted = token = next;
    }
  }
  return true;
}

}  // namespace epcomm::comm
