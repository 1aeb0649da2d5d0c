// Tables of choices, from which every rank of a low-latency call works out where all rows lie.
//
// A source tells every rank what its call is, and all its tokens' choices, each word in a cell
// {epoch, word} of eight bytes, which arrives whole: no fence, and no flag behind it. No counts are
// exchanged.
#pragma once

#include "comm/choices.cuh"
#include "comm/low_latency.cuh"
#include "common/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"
#include "slab/low_latency.cuh"

namespace epcomm::comm {

// --- headers and tables ------------------------------------------------------------------------

// What a lane tells of a token of this rank: its choice, -1 where it has none, and the weight.
struct OwnEntry {
  i32 expert;
  u32 weight;
  Failure wrong;  // with the choice as it was passed
};

// This lane's choice of a token. What may not be chosen, and what is chosen twice, is left out. By
// all lanes of a warp.
__device__ inline OwnEntry own_entry(const LowLatencyCall& call, const void* topk_idx,
                                     u32 is_64_bit, const float* weights, u32 token) {
  const u32 lane = lane_index(), num_topk = call.shape.num_topk;
  const u64 index = u64(token) * num_topk + lane;
  const i64 given = lane < num_topk ? choice_at(topk_idx, is_64_bit, index) : -1;
  const u32 weight = weights != nullptr && lane < num_topk ? ptx::as_bits(weights[index]) : 0;
  const bool is_bad = given < -1 || given >= i64(call.shape.num_experts);
  const i32 expert = is_bad ? -1 : static_cast<i32>(given);
  bool is_twice = false;
#pragma unroll 1
  for (u32 earlier = 0; earlier + 1 < num_topk; ++earlier) {
    const i32 other = __shfl_sync(kFullWarp, expert, earlier);
    is_twice = is_twice || (earlier < lane && expert >= 0 && expert == other);
  }
  return {is_twice ? -1 : expert, weight,
          is_bad     ? kBadExpert
          : is_twice ? kExpertTwice
                     : kNoFailure};
}

// A warp's n-th piece of all tables: of the last blocks, as they have the fewest rows to send, and
// not of a block's first warp, which begins the call.
struct TablePiece {
  u32 peer;
  u32 place;  // 0 the header, then tokens

  __device__ __forceinline__ explicit TablePiece(u32 n) {
    constexpr u32 kWarps = kLowLatencyThreads / kWarpSize - 1;
    static_assert(kWarps > 0, "the first warp sends no tables");
    const u32 block = gridDim.x - 1 - blockIdx.x + n * gridDim.x;
    const u32 piece = block * kWarps + warp_index() - 1;
    peer = piece % kNumRanks;
    place = warp_index() == 0 ? ~0u : piece / kNumRanks;
  }

  __device__ __forceinline__ bool is_token(const LowLatencyCall& call) const {
    return place - 1 < call.shape.num_tokens;  // 0 wraps around
  }
};

// Reads what a warp tells first: it is on its way, and looked through, while the call begins.
__device__ __forceinline__ OwnEntry first_entry(const LowLatencyCall& call, const void* topk_idx,
                                                u32 is_64_bit, const float* weights) {
  const TablePiece piece(0);
  if (!piece.is_token(call)) return {-1, 0, kNoFailure};
  return own_entry(call, topk_idx, is_64_bit, weights, piece.place - 1);
}

// Tells every peer what this call is and what its tokens choose. weights: null in dispatch. entry:
// the warp's first. By all threads; each warp for itself.
__device__ __forceinline__ void send_tables(const LowLatencyCall& call, const Round& round,
                                            const void* topk_idx, u32 is_64_bit,
                                            const float* weights, OwnEntry entry) {
  const LowLatencyShape& shape = call.shape;
  const u32 lane = lane_index();
#pragma unroll 1
  for (u32 n = 0;; ++n) {
    const TablePiece piece(n);
    const bool is_token = piece.is_token(call);
    if (!is_token && piece.place != 0) break;
    if (n > 0 && is_token) {
      entry = own_entry(call, topk_idx, is_64_bit, weights, piece.place - 1);
    }
    if ((round.masked >> piece.peer) & 1) continue;
    if (!is_token) {
      if (lane >= slab::kLowLatencyHeaderWords) continue;
      const u32 word = reinterpret_cast<const u32*>(&shape)[lane];
      u64* cells = slab::header_cells(call.slabs, piece.peer, round.slot, call.rank);
      ptx::st_relaxed_sys_u64(cells + lane, cell_of(round.epoch, word));
      continue;
    }
    if (piece.peer == call.rank && entry.wrong != kNoFailure) {
      volatile FailureRecord* record = call.record;
      record->failure = entry.wrong;
    }
    if (lane >= shape.num_topk) continue;
    const u32 index = (piece.place - 1) * shape.num_topk + lane;
    u64* cells =
        slab::table(call.slabs, piece.peer, round.slot, call.rank) + index * slab::kEntryWords;
    const u64 expert = cell_of(round.epoch, static_cast<u32>(entry.expert));
    if (weights != nullptr) {
      ptx::st_relaxed_sys_u64x2(cells, {expert, cell_of(round.epoch, entry.weight)});
    } else {
      ptx::st_relaxed_sys_u64(cells, expert);
    }
  }
}

// What a block's threads found out about sources, as bits. In shared memory.
struct Arrivals {
  u32 missing;
  u32 has_failed;
  u32 has_headers;  // a hint
};

__device__ __forceinline__ void note(Arrivals* arrivals, u32 source, Outcome outcome) {
  if (outcome == Outcome::kMissing) atomicOr(&arrivals->missing, 1u << source);
  if (outcome == Outcome::kFailed) atomicOr(&arrivals->has_failed, 1u);
}

// Reports the first value in which a source differs from this rank. By one thread; every rank that
// sees the same sources finds that somebody differs.
__device__ inline void report_mismatch(const LowLatencyCall& call, const LowLatencyShape* headers,
                                       u32 sources) {
  const u32* own = reinterpret_cast<const u32*>(&call.shape);
#pragma unroll 1
  for (u32 i = 0; i < kNumLowLatencyAgreed; ++i) {
#pragma unroll 1
    for (u32 source = 0; source < kNumRanks; ++source) {
      if (((sources >> source) & 1) == 0) continue;
      if (reinterpret_cast<const u32*>(headers + source)[i] == own[i]) continue;
      // Several blocks may come here; all write the same.
      volatile FailureRecord* record = call.record;
      record->field = static_cast<i32>(i);
#pragma unroll 1
      for (u32 p = 0; p < kNumRanks; ++p) {
        record->values[p] = static_cast<i32>(reinterpret_cast<const u32*>(headers + p)[i]);
      }
      __threadfence_system();
      record->failure = kLowLatencyMismatch;
      return;
    }
  }
}

// Waits for the headers of some sources, into shared memory: zeros for a source whose does not
// come. By all threads; false, to all of them, where the call has failed or a source passes other
// values. meanwhile() is called by warps that wait for none, until has_headers.
template <typename Meanwhile>
__device__ inline bool read_headers(const LowLatencyCall& call, const Round& round, u32 sources,
                                    LowLatencyShape* headers, Arrivals* arrivals,
                                    Meanwhile meanwhile) {
  constexpr u32 kWords = slab::kLowLatencyHeaderWords;
  const u32* own = reinterpret_cast<const u32*>(&call.shape);
  bool is_good = true;
#pragma unroll 1
  for (u32 i = threadIdx.x; i < kNumRanks * kWords; i += blockDim.x) {
    const u32 source = i / kWords;
    Awaited awaited = {Outcome::kMissing, 0};
    if ((sources >> source) & 1) {
      const u64* cell = slab::header_cells(call.slabs, call.rank, round.slot, source) + i % kWords;
      awaited = await(call, kLowLatencyTables, source, round.epoch, cell);
      note(arrivals, source, awaited.outcome);
    }
    reinterpret_cast<u32*>(headers)[i] = awaited.word;
    const bool may_differ =
        awaited.outcome == Outcome::kMissing || i % kWords >= kNumLowLatencyAgreed;
    if (awaited.outcome == Outcome::kFailed || (!may_differ && awaited.word != own[i % kWords])) {
      is_good = false;
    }
  }
  if (warp_index() * kWarpSize < kNumRanks * kWords) {
    __syncwarp();
    if (lane_index() == 0) ptx::st_release_cta_shared_u32(&arrivals->has_headers, 1);
  } else {
    meanwhile();
  }
  // All threads must come to the same end, and others may note more as soon as they go on.
  is_good = __syncthreads_and(is_good);
  if (!is_good && threadIdx.x == 0 && arrivals->has_failed == 0) {
    report_mismatch(call, headers, sources & ~arrivals->missing);
  }
  return is_good;
}

// Entries of tables, several of a thread on their way together. By all threads.
//   place(i, &source)          the cells of entry i, and whose it is
//   use(i, expert, weight)     is called for each that arrives
template <bool kHasWeights, typename PlaceOf, typename Use>
__device__ __forceinline__ void read_entries(const LowLatencyCall& call, const Round& round,
                                             u32 begin, u32 end, Arrivals* arrivals, PlaceOf place,
                                             Use use) {
  constexpr u32 kUnroll = 4, kWords = kHasWeights ? 2 : 1;
#pragma unroll 1
  for (u32 first = begin + threadIdx.x; first < end; first += kUnroll * blockDim.x) {
    ptx::U64Pair found[kUnroll];
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      const u32 i = first + j * blockDim.x;
      if (i >= end) continue;
      u32 source;
      const u64* cells = place(i, &source);
      if constexpr (kHasWeights) {
        found[j] = ptx::ld_relaxed_sys_u64x2(cells);
      } else {
        found[j].value[0] = ptx::ld_relaxed_sys_u64(cells);
      }
    }
    const u32 last = min_of(first + (kUnroll - 1) * blockDim.x, end - 1);
#pragma unroll 1
    for (u32 i = first; i <= last; i += blockDim.x) {
      u32 source;
      const u64* cells = place(i, &source);
      Outcome outcome = Outcome::kArrived;
      u32 words[kWords];
#pragma unroll
      for (u32 w = 0; w < kWords; ++w) {
        const u64 cell = found[0].value[w];
        // Those behind it move up: what is done with one is there once.
#pragma unroll
        for (u32 j = 0; j + 1 < kUnroll; ++j) found[j].value[w] = found[j + 1].value[w];
        words[w] = static_cast<u32>(cell);
        if (static_cast<u32>(cell >> 32) == round.epoch) continue;
        if (outcome != Outcome::kArrived) continue;
        const Awaited awaited =
            await_slowly(call, kLowLatencyTables, source, round.epoch, cells + w);
        outcome = awaited.outcome;
        words[w] = awaited.word;
      }
      if (outcome == Outcome::kArrived) {
        use(i, static_cast<i32>(words[0]), words[kWords - 1]);
      } else {
        note(arrivals, source, outcome);
        return;
      }
    }
  }
}

// --- where rows lie ----------------------------------------------------------------------------

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
struct Chunk {
  Range ranges[kNumRanks];
  Choice choices[kChunkEntries];  // a token's are at its number in the chunk times num_topk
  u32 num_choices[kChunkEntries];
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

// Works out the choices of tokens [begin, end) of a source. By all threads, which then meet.
//   kept   the source's choices as local experts, or kNotHere; null where the block keeps none
//   spans  [local experts] the source's rows from first_token on; left with those behind the chunk
template <bool kHasWeights>
__device__ __forceinline__ void place_chunk(const LowLatencyCall& call, const Round& round,
                                            u32 source, u32 first_token, u32 begin, u32 end,
                                            const u16* kept, Span* spans, Chunk* chunk,
                                            Arrivals* arrivals) {
  const u32 num_topk = call.shape.num_topk, num_local = num_local_experts(call);
  const u32 chunk_begin = begin * num_topk;
  auto place = [&](u32 i, u32 local, u32 weight) {
    if (i >= chunk_begin) {
      chunk->choices[i - chunk_begin] = {local, 0, i % num_topk, weight};
    } else if (local != kNoRow) {
      atomicAdd(&spans[local].next, 1u);
    }
  };
  if (kept != nullptr) {
#pragma unroll 1
    for (u32 i = first_token * num_topk + threadIdx.x; i < end * num_topk; i += blockDim.x) {
      place(i, kept[i] == kNotHere ? kNoRow : kept[i], 0);
    }
  } else {
    const u64* table = slab::table(call.slabs, call.rank, round.slot, source);
    read_entries<kHasWeights>(
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
  __syncthreads();
  if (warp_index() == 0 && arrivals->missing == 0 && arrivals->has_failed == 0) {
#pragma unroll 1
    for (u32 token = 0; token < end - begin; ++token) {
      place_choices(chunk->choices + token * num_topk, num_topk, spans, chunk->num_choices + token);
    }
  }
  __syncthreads();
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
// chunk.
struct Parts {
  u32 source;
  u32 first_token;  // of the chunk
  u32 begin;
  u32 end;
  u32 num_parts;  // of a row
  u32 num_topk;
  const Chunk* chunk;

  __device__ __forceinline__ Part part(u32 item) const {
    const u32 token = item / num_parts, place = token - first_token;
    return {source,
            token,
            item % num_parts,
            num_parts,
            chunk->choices + place * num_topk,
            chunk->num_choices[place]};
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

// Gives every part of the sources' rows to one block; neighbouring ones to the same. By all
// threads; false where the call has failed.
//   kept                     all sources' choices, or null: see place_chunk
//   span_of(source, expert)  where the source's rows lie at an expert
//   serve(parts)             is called by all threads for what the block has in hand
template <bool kHasWeights, typename SpanOf, typename Serve>
__device__ inline bool for_each_part(const LowLatencyCall& call, const Round& round, u32 sources,
                                     const LowLatencyShape* headers, const u16* kept, Span* spans,
                                     Chunk* chunk, Arrivals* arrivals, SpanOf span_of,
                                     Serve serve) {
  if (threadIdx.x < kNumRanks) {
    chunk->ranges[threadIdx.x] = range_of(call, sources, headers, threadIdx.x);
  }
  __syncthreads();  // arrivals begin anew, too
#pragma unroll 1
  for (u32 source = 0; source < kNumRanks; ++source) {
    if (chunk->ranges[source].begin >= chunk->ranges[source].end) continue;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < num_local_experts(call); i += blockDim.x) {
      spans[i] = span_of(source, i);
    }
    if (threadIdx.x == 0) arrivals->missing = 0;
    __syncthreads();
    u32 counted = 0;
#pragma unroll 1
    for (u32 token = chunk->ranges[source].first_token();
         token < chunk->ranges[source].end_token();) {
      const Range& range = chunk->ranges[source];
      const u32 next = min_of(token + kChunkEntries / call.shape.num_topk, range.end_token());
      place_chunk<kHasWeights>(call, round, source, counted, token, next,
                               kept == nullptr ? nullptr : kept + range.first_entry, spans, chunk,
                               arrivals);
      if (arrivals->has_failed != 0) return false;
      if (arrivals->missing != 0) {
        if (threadIdx.x == 0) mask(call, source);
        break;
      }
      serve(Parts{source, token, max_of(range.begin, token * range.num_parts),
                  min_of(range.end, next * range.num_parts), range.num_parts, call.shape.num_topk,
                  chunk});
      __syncthreads();
      counted = token = next;
    }
    __syncthreads();
  }
  return true;
}

}  // namespace epcomm::comm
