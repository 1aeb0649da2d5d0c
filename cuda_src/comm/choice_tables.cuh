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

// A receiver warp's n-th piece of all tables: of the last blocks, as they have the fewest rows
// where rows do not go round.
struct TablePiece {
  u32 peer;
  u32 place;  // 0 the header, then tokens

  __device__ __forceinline__ explicit TablePiece(u32 n) {
    const u32 block = gridDim.x - 1 - blockIdx.x + n * gridDim.x;
    const u32 piece = block * Receivers::kNumWarps + Receivers::warp();
    peer = piece % kNumRanks;
    place = piece / kNumRanks;
  }

  __device__ __forceinline__ bool is_token(const LowLatencyCall& call) const {
    return place - 1 < call.shape.num_tokens;  // 0 wraps around
  }
};

// Tells every peer what this call is and what its tokens choose. weights: null in dispatch. By
// receivers; each warp for itself.
__device__ __forceinline__ void send_tables(const LowLatencyCall& call, const Round& round,
                                            const void* topk_idx, u32 is_64_bit,
                                            const float* weights) {
  const LowLatencyShape& shape = call.shape;
  const u32 lane = lane_index();
#pragma unroll 1
  for (u32 n = 0;; ++n) {
    const TablePiece piece(n);
    const bool is_token = piece.is_token(call);
    if (!is_token && piece.place != 0) break;
    OwnEntry entry = {-1, 0, kNoFailure};
    if (is_token) entry = own_entry(call, topk_idx, is_64_bit, weights, piece.place - 1);
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
  u32 taking_part;  // as this rank's blocks agreed
};

__device__ __forceinline__ void note(Arrivals* arrivals, u32 source, Outcome outcome) {
  if (outcome == Outcome::kMissing) atomicOr(&arrivals->missing, 1u << source);
  if (outcome == Outcome::kFailed) atomicOr(&arrivals->has_failed, 1u);
}

// Whether another thread may have noted it meanwhile: a hint.
__device__ __forceinline__ bool is_missing(const Arrivals* arrivals, u32 source) {
  return ((*static_cast<const volatile u32*>(&arrivals->missing) >> source) & 1) != 0;
}

// Whether a source takes part in this call: the first block to know says so, and all follow.
__device__ inline bool decide(const LowLatencyCall& call, u32 epoch, u32 source, bool is_here) {
  u64* verdict = &call.state->verdicts[source];
  u64 before = ptx::ld_relaxed_sys_u64(verdict);
  while (static_cast<u32>(before >> 32) != epoch) {
    const u64 found = atomicCAS(verdict, before, cell_of(epoch, is_here));
    if (found == before) return is_here;
    before = found;
  }
  return (before & 1) != 0;
}

// Agrees with this rank's other blocks on the sources that take part, and masks the others; what a
// kernel that sends decided holds for the one that receives. seen: those that this block has seen.
// By a crew; the same to all.
template <typename AnyCrew>
__device__ inline u32 agree_on_sources(const LowLatencyCall& call, const Round& round, u32 seen,
                                       u32* taking_part) {
  if (AnyCrew::warp() == 0) {
    const u32 source = lane_index();
    bool takes_part = false;
    if (source < kNumRanks) {
      takes_part = decide(call, round.epoch, source, (seen >> source) & 1);
      if (!takes_part && source != call.rank) mask(call, source);
    }
    const u32 bits = __ballot_sync(kFullWarp, takes_part);
    if (source == 0) *taking_part = bits;
  }
  AnyCrew::meet();
  const u32 bits = *taking_part;
  AnyCrew::meet();
  return bits;
}

// Reports a source that takes part, as another block saw it, and that this block does not see: it
// wrote a later call over it. By one thread.
__device__ inline void report_unseen(const LowLatencyCall& call, const Round& round, u32 unseen) {
  report(call, kTimeout, kLowLatencyTables, __ffs(static_cast<int>(unseen)) - 1, round.epoch, 0);
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
// come. By a crew; false, to all of it, where the call has failed or a source passes other values.
// meanwhile() is called by warps that wait for none, until has_headers.
template <typename AnyCrew, typename Meanwhile>
__device__ inline bool read_headers(const LowLatencyCall& call, const Round& round, u32 sources,
                                    LowLatencyShape* headers, Arrivals* arrivals,
                                    Meanwhile meanwhile) {
  constexpr u32 kWords = slab::kLowLatencyHeaderWords;
  const u32* own = reinterpret_cast<const u32*>(&call.shape);
  bool is_good = true;
#pragma unroll 1
  for (u32 i = AnyCrew::thread(); i < kNumRanks * kWords; i += AnyCrew::kNumThreads) {
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
  if (AnyCrew::warp() * kWarpSize < kNumRanks * kWords) {
    __syncwarp();
    if (lane_index() == 0) ptx::st_release_cta_shared_u32(&arrivals->has_headers, 1);
  } else {
    meanwhile();
  }
  // All threads must come to the same end, and others may note more as soon as they go on.
  is_good = AnyCrew::meet_and(is_good);
  if (!is_good && AnyCrew::thread() == 0 && arrivals->has_failed == 0) {
    report_mismatch(call, headers, sources & ~arrivals->missing);
  }
  return is_good;
}

// Where each source's entries end, among those of all sources.
struct EntryEnds {
  u32 ends[kNumRanks];

  __device__ __forceinline__ EntryEnds(const LowLatencyCall& call, const LowLatencyShape* headers) {
    u32 end = 0;
#pragma unroll
    for (u32 source = 0; source < kNumRanks; ++source) {
      end += headers[source].num_tokens * call.shape.num_topk;
      ends[source] = end;
    }
  }

  __device__ __forceinline__ u32 last() const { return ends[kNumRanks - 1]; }

  // Whose an entry is, and where its source's begin.
  __device__ __forceinline__ u32 source_of(u32 i, u32* begin) const {
    u32 source = 0;
    *begin = 0;
#pragma unroll
    for (u32 s = 0; s + 1 < kNumRanks; ++s) {
      if (i >= ends[s]) {
        source = s + 1;
        *begin = ends[s];
      }
    }
    return source;
  }
};

// Entries of tables, several of a thread on their way together. A thread that misses one still
// looks at its others: every source whose table is not whole must be noted, or its rows would be
// counted. By a crew.
//   place(i, &source)          the cells of entry i, and whose it is
//   use(i, expert, weight)     is called for each that arrives
template <typename AnyCrew, bool kHasWeights, typename PlaceOf, typename Use>
__device__ __forceinline__ void read_entries(const LowLatencyCall& call, const Round& round,
                                             u32 begin, u32 end, Arrivals* arrivals, PlaceOf place,
                                             Use use) {
  constexpr u32 kUnroll = 4, kWords = kHasWeights ? 2 : 1, kStride = AnyCrew::kNumThreads;
#pragma unroll 1
  for (u32 first = begin + AnyCrew::thread(); first < end; first += kUnroll * kStride) {
    ptx::U64Pair found[kUnroll];
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      const u32 i = first + j * kStride;
      if (i >= end) continue;
      u32 source;
      const u64* cells = place(i, &source);
      if constexpr (kHasWeights) {
        found[j] = ptx::ld_relaxed_sys_u64x2(cells);
      } else {
        found[j].value[0] = ptx::ld_relaxed_sys_u64(cells);
      }
    }
    const u32 last = min_of(first + (kUnroll - 1) * kStride, end - 1);
#pragma unroll 1
    for (u32 i = first; i <= last; i += kStride) {
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
        // Whoever is missing already is not waited for again.
        Awaited awaited = {Outcome::kMissing, 0};
        if (!is_missing(arrivals, source)) {
          awaited = await_slowly(call, kLowLatencyTables, source, round.epoch, cells + w);
        }
        outcome = awaited.outcome;
        words[w] = awaited.word;
      }
      if (outcome == Outcome::kArrived) {
        use(i, static_cast<i32>(words[0]), words[kWords - 1]);
        continue;
      }
      note(arrivals, source, outcome);
      if (outcome == Outcome::kFailed) return;
    }
  }
}

}  // namespace epcomm::comm
