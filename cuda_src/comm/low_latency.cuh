// What both low-latency kernels do alike: epochs, tables of choices, waits, masks and the way out.
//
// Epochs. A rank's calls are numbered in device memory; all ranks make the same calls in the same
// order, so their numbers agree, in replayed graphs too. Everything that ranks wait for is a cell
// that holds the call's epoch, so nothing is reset between calls. A kernel that only receives takes
// its epoch from its call's ticket, which the kernel that sent has written.
//
// Slots. Call n uses slot n % 2. A rank writes into a peer's slot only when the peer has posted
// that it received the slot's last call.
//
// Tables. A source tells every rank all its choices, each in a cell {epoch, word} of eight bytes,
// which arrives whole: no fence, and no flag behind it. From the tables every rank works out where
// all rows lie, so that no counts are exchanged.
//
// Ordering:
//   reads of a slot -> end of the block -> acquire and release of the block count -> release of
//   received, by the last block
//   acquire of received by a lane of each block -> __syncthreads -> stores into the peer's slot
//   stores of a part's row by a group of warps -> the group's barrier -> release of the part's flag
//   acquire of the flag by one lane of each warp -> __syncwarp -> loads of the row by all lanes
// A kernel sends before it receives, all blocks are resident at once, and sending waits for nothing
// but what earlier kernels of peers post, and, in combine, for tables, which are sent first.
//
// Masks. With can_mask a peer that does not answer in time is masked, in place of a failure; masked
// peers get nothing, and nobody waits for them.
#pragma once

#include "comm/call.cuh"
#include "comm/choices.cuh"
#include "common/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"
#include "slab/low_latency.cuh"

namespace epcomm::comm {

// What one kernel of a call does: both, unless the caller receives later.
constexpr u32 kSends = 1, kReceives = 2;

// What ranks tell each other of a call; all but the last two must agree.
struct LowLatencyShape {
  u32 kind;
  u32 num_max_tokens;
  u32 hidden;
  u32 num_experts;
  u32 num_topk;
  u32 format;  // Fp8Format of dispatch, CombinePrecision of combine
  u32 num_tokens;
  u32 num_parts;  // of each of this rank's rows; parts are sent and flagged apart
};

static_assert(sizeof(LowLatencyShape) == slab::kLowLatencyHeaderWords * sizeof(u32),
              "the header of a call");

// Device memory of one rank that only its own kernels touch.
struct LowLatencyState {
  u32 epoch;
  u32 num_finished_blocks;
  u32 has_failed;
  u32 padding;
  u32 slot_epoch[2];   // of each slot's last call
  u32 slot_masked[2];  // and the peers that it left out, as bits
  u32 waited_us[kMaxRanks];
  u64 verdicts[kMaxRanks];  // {epoch, whether the source takes part in this dispatch}
};

struct LowLatencyCall {
  slab::LowLatencySlabs slabs;
  LowLatencyShape shape;
  LowLatencyState* state;
  FailureRecord* record;
  u32* masks;       // [kNumRanks] not 0 for a masked peer; the host sets and reads them, too
  u32* ticket;      // null where one kernel does both
  i64* wait_stats;  // [kNumRanks] or null
  u64 timeout_ns;
  u32 rank;
  u32 phases;
  u32 can_mask;
  u32 padding;
};

static_assert(sizeof(LowLatencyState) == kLowLatencyStateBytes,
              "epcomm/engines/cuda_params.py differs");

// One call, as a block sees it. In shared memory.
struct Round {
  u32 epoch;
  u32 slot;
  u32 masked;  // peers that get nothing, as bits
};

constexpr u32 kGroupThreads = kGroupWarps * kWarpSize;
constexpr u32 kLowLatencyThreads = kNumGroups * kGroupThreads;

// A few warps that move a part of a row together.
__device__ __forceinline__ u32 group_index() { return warp_index() / kGroupWarps; }
__device__ __forceinline__ u32 warp_in_group() { return warp_index() % kGroupWarps; }
__device__ __forceinline__ void group_barrier() {
  ptx::barrier_sync(1 + group_index(), kGroupThreads);
}

__device__ __forceinline__ u32 num_local_experts(const LowLatencyCall& call) {
  return call.shape.num_experts / kNumRanks;
}

// Rows that an expert has room for.
__device__ __forceinline__ u32 num_recv_rows(const LowLatencyCall& call) {
  return kNumRanks * call.shape.num_max_tokens;
}

// --- waiting -----------------------------------------------------------------------------------

enum class Outcome : u32 { kArrived, kMissing, kFailed };

__device__ __forceinline__ bool is_masked(const LowLatencyCall& call, u32 peer) {
  return peer != call.rank && *static_cast<volatile u32*>(&call.masks[peer]) != 0;
}

__device__ __forceinline__ void mask(const LowLatencyCall& call, u32 peer) {
  atomicExch(&call.masks[peer], 1u);
}

__device__ inline void note_waited(const LowLatencyCall& call, Phase phase, u32 peer, u64 start) {
  if (call.wait_stats == nullptr || phase == kReceived) return;
  const u32 waited_us = static_cast<u32>((ptx::global_timer_ns() - start) / 1000);
  atomicMax(&call.state->waited_us[peer], waited_us);
}

constexpr u32 kSpinsBeforeSleep = 4096;

// What a wait ends with, and the word of a table or a header.
struct Awaited {
  Outcome outcome;
  u32 word;
};

// Looks at a cell {epoch, word}, or at a flag, which is an epoch and orders what was written before
// it. Returns the epoch.
__device__ __forceinline__ u32 look(Phase phase, const void* cell, u32* word) {
  if (phase != kLowLatencyTables) return ptx::ld_acquire_sys_u32(static_cast<const u32*>(cell));
  const u64 value = ptx::ld_relaxed_sys_u64(static_cast<const u64*>(cell));
  *word = static_cast<u32>(value);
  return static_cast<u32>(value >> 32);
}

// Whether a cell is what is waited for. A peer may have received this very call already, when other
// blocks have sent all that it needs; no other cell can be ahead.
__device__ __forceinline__ bool is_there(Phase phase, u32 seen, u32 epoch) {
  return phase == kReceived ? is_reached(seen, epoch) : seen == epoch;
}

// NOTE: a function of its own, so that waiting takes no registers where it is not waited.
__device__ __noinline__ Awaited await_slowly(const LowLatencyCall& call, Phase phase, u32 peer,
                                             u32 epoch, const void* cell) {
  const u64 start = ptx::global_timer_ns();
  u32 word = 0;
  for (u32 spins = 0;; ++spins) {
    const u32 seen = look(phase, cell, &word);
    if (is_there(phase, seen, epoch)) {
      note_waited(call, phase, peer, start);
      return {Outcome::kArrived, word};
    }
    if (spins > kSpinsBeforeSleep) ptx::sleep_ns(50);
    if (spins % 64 != 63) continue;
    if (call.can_mask && is_masked(call, peer)) return {Outcome::kMissing, 0};
    if (has_failed(call)) return {Outcome::kFailed, 0};
    const u64 aborted = ptx::ld_acquire_sys_u64(slab::abort_cell(call.slabs, call.rank));
    if (aborted != 0) {
      report(call, kPeerGaveUp, phase, static_cast<u32>(aborted - 1), epoch, seen);
      return {Outcome::kFailed, 0};
    }
    if (ptx::global_timer_ns() - start > call.timeout_ns) {
      note_waited(call, phase, peer, start);
      if (call.can_mask) return {Outcome::kMissing, 0};
      report(call, kTimeout, phase, peer, epoch, seen);
      abort_peers(call);
      return {Outcome::kFailed, 0};
    }
  }
}

// One thread's wait for a cell's epoch; missing where the peer is masked, or late and may be
// masked.
__device__ __forceinline__ Awaited await(const LowLatencyCall& call, Phase phase, u32 peer,
                                         u32 epoch, const void* cell) {
  u32 word = 0;
  if (is_there(phase, look(phase, cell, &word), epoch)) return {Outcome::kArrived, word};
  return await_slowly(call, phase, peer, epoch, cell);
}

// A part of a row, by all lanes of a warp. Masks who does not send it.
__device__ inline Outcome await_part(const LowLatencyCall& call, const Round& round, u32 peer,
                                     u32 line, u32 item) {
  u32 outcome = 0;
  if (lane_index() == 0) {
    const u32* flag = slab::flags(call.slabs, call.rank, round.slot, line) + item;
    outcome = static_cast<u32>(await(call, kLowLatencyRows, peer, round.epoch, flag).outcome);
  }
  outcome = __shfl_sync(kFullWarp, outcome, 0);
  __syncwarp();  // a shuffle orders no memory: what one lane acquired, all will read
  if (static_cast<Outcome>(outcome) == Outcome::kMissing) mask(call, peer);
  return static_cast<Outcome>(outcome);
}

// --- beginning and end -------------------------------------------------------------------------

// Zero is what memory begins with, so it is no epoch.
__device__ __forceinline__ u32 epoch_after(u32 epoch) { return epoch == ~0u ? 2 : epoch + 1; }

// Begins a call: waits, where it sends, until peers have received the slot's last call. By all
// threads; false, to all of them, where the call may not go on.
__device__ inline bool begin(const LowLatencyCall& call, Round* round) {
  const volatile LowLatencyState& state = *call.state;
  const bool sends = (call.phases & kSends) != 0;
  bool is_good = true;
  if (warp_index() == 0) {
    const u32 lane = lane_index(), peer = lane % kMaxRanks;
    // All that is needed is read at once, of both slots, before it is known which one it is.
    const u32 epoch =
        sends ? epoch_after(state.epoch) : *static_cast<const volatile u32*>(call.ticket);
    const u32 slot_epoch[2] = {state.slot_epoch[0], state.slot_epoch[1]};
    const u32 slot_masked[2] = {state.slot_masked[0], state.slot_masked[1]};
    bool leaves_out = peer < kNumRanks && call.can_mask && is_masked(call, peer);
    u32 seen = 0;
    if (sends && lane < 2 * kMaxRanks && peer < kNumRanks) {
      seen = ptx::ld_acquire_sys_u32(
          slab::received_cell(call.slabs, call.rank, lane / kMaxRanks, peer));
    }
    const u32 slot = epoch % 2, last = slot == 0 ? slot_epoch[0] : slot_epoch[1];
    const u32 left_out = slot == 0 ? slot_masked[0] : slot_masked[1];
    seen = __shfl_sync(kFullWarp, seen, slot * kMaxRanks + peer);
    const bool waits = sends && lane < kNumRanks && !leaves_out && ((left_out >> peer) & 1) == 0;
    if (waits && !is_there(kReceived, seen, last)) {
      const u32* cell = slab::received_cell(call.slabs, call.rank, slot, peer);
      const Outcome outcome = await_slowly(call, kReceived, peer, last, cell).outcome;
      is_good = outcome != Outcome::kFailed;
      leaves_out = outcome == Outcome::kMissing;
      if (leaves_out) mask(call, peer);
    }
    const u32 masked = __ballot_sync(kFullWarp, leaves_out && lane < kNumRanks);
    if (lane == 0) *round = {epoch, slot, masked};
  }
  return __syncthreads_and(is_good && !has_failed(call));
}

// Ends a call. By all threads.
__device__ inline void finish(const LowLatencyCall& call, const Round& round) {
  LowLatencyState& state = *call.state;
  if (!is_last_block(&state.num_finished_blocks)) return;
  const u32 peer = threadIdx.x;
  if ((call.phases & kReceives) && peer < kNumRanks) {
    if (!is_masked(call, peer)) {
      ptx::st_release_sys_u32(slab::received_cell(call.slabs, peer, round.slot, call.rank),
                              round.epoch);
    }
    if (call.wait_stats != nullptr) call.wait_stats[peer] += state.waited_us[peer];
    state.waited_us[peer] = 0;
  }
  if ((call.phases & kSends) && threadIdx.x == 0) {
    u32 left_out = 0;
    for (u32 i = 0; i < kNumRanks; ++i) left_out |= is_masked(call, i) ? 1u << i : 0;
    state.slot_epoch[round.slot] = round.epoch;
    state.slot_masked[round.slot] = left_out;
    state.epoch = round.epoch;
    if (call.ticket != nullptr) *call.ticket = round.epoch;
  }
}

// --- headers and tables ------------------------------------------------------------------------

__device__ __forceinline__ u64 cell_of(u32 epoch, u32 word) { return (u64(epoch) << 32) | word; }

// This lane's choice of a token of this rank, -1 where it has none. What may not be chosen, and
// what is chosen twice, is left out, and reported where asked for. By all lanes of a warp.
__device__ inline i32 own_choice(const LowLatencyCall& call, const void* topk_idx, u32 is_64_bit,
                                 u32 token, bool reports) {
  const u32 lane = lane_index(), num_topk = call.shape.num_topk;
  const i64 given =
      lane < num_topk ? choice_at(topk_idx, is_64_bit, u64(token) * num_topk + lane) : -1;
  const bool is_bad = given < -1 || given >= i64(call.shape.num_experts);
  const i32 expert = is_bad ? -1 : static_cast<i32>(given);
  bool is_twice = false;
  for (u32 earlier = 0; earlier + 1 < num_topk; ++earlier) {
    const i32 other = __shfl_sync(kFullWarp, expert, earlier);
    is_twice = is_twice || (earlier < lane && expert >= 0 && expert == other);
  }
  if (reports && (is_bad || is_twice)) {
    volatile FailureRecord* record = call.record;
    record->failure = is_bad ? kBadExpert : kExpertTwice;
  }
  return is_twice ? -1 : expert;
}

// Tells every peer what this call is and what its tokens choose; a block a peer. weights: null in
// dispatch.
__device__ __noinline__ void send_tables(const LowLatencyCall& call, const Round& round,
                                         const void* topk_idx, u32 is_64_bit,
                                         const float* weights) {
  const LowLatencyShape& shape = call.shape;
  const u32 lane = lane_index();
  // The last blocks, as they have the fewest rows to send.
  for (u32 peer = gridDim.x - 1 - blockIdx.x; peer < kNumRanks; peer += gridDim.x) {
    if ((round.masked >> peer) & 1) continue;
    if (threadIdx.x < slab::kLowLatencyHeaderWords) {
      const u32 word = reinterpret_cast<const u32*>(&shape)[threadIdx.x];
      u64* cells = slab::header_cells(call.slabs, peer, round.slot, call.rank);
      ptx::st_relaxed_sys_u64(cells + threadIdx.x, cell_of(round.epoch, word));
    }
    u64* table = slab::table(call.slabs, peer, round.slot, call.rank);
    for (u32 token = warp_index(); token < shape.num_tokens; token += blockDim.x / kWarpSize) {
      const u32 index = token * shape.num_topk + lane;
      const bool has_weight = weights != nullptr && lane < shape.num_topk;
      const u32 weight = has_weight ? ptx::as_bits(weights[index]) : 0;
      const i32 expert = own_choice(call, topk_idx, is_64_bit, token, peer == call.rank);
      if (lane >= shape.num_topk) continue;
      u64* entry = table + index * slab::kEntryWords;
      ptx::st_relaxed_sys_u64(entry, cell_of(round.epoch, static_cast<u32>(expert)));
      if (has_weight) ptx::st_relaxed_sys_u64(entry + 1, cell_of(round.epoch, weight));
    }
  }
}

// What a block's threads found out about sources, as bits. In shared memory.
struct Arrivals {
  u32 missing;
  u32 has_failed;
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
  for (u32 i = 0; i < kNumLowLatencyAgreed; ++i) {
    for (u32 source = 0; source < kNumRanks; ++source) {
      if (((sources >> source) & 1) == 0) continue;
      if (reinterpret_cast<const u32*>(headers + source)[i] == own[i]) continue;
      // Several blocks may come here; all write the same.
      volatile FailureRecord* record = call.record;
      record->field = static_cast<i32>(i);
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
// values.
__device__ inline bool read_headers(const LowLatencyCall& call, const Round& round, u32 sources,
                                    LowLatencyShape* headers, Arrivals* arrivals) {
  constexpr u32 kWords = slab::kLowLatencyHeaderWords;
  const u32* own = reinterpret_cast<const u32*>(&call.shape);
  bool is_good = true;
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
  for (u32 first = begin + threadIdx.x; first < end; first += kUnroll * blockDim.x) {
    u64 found[kUnroll][kWords];
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      const u32 i = first + j * blockDim.x;
      if (i >= end) continue;
      u32 source;
      const u64* cells = place(i, &source);
#pragma unroll
      for (u32 w = 0; w < kWords; ++w) found[j][w] = ptx::ld_relaxed_sys_u64(cells + w);
    }
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      const u32 i = first + j * blockDim.x;
      if (i >= end) continue;
      u32 source;
      const u64* cells = place(i, &source);
      Outcome outcome = Outcome::kArrived;
      u32 words[kWords];
#pragma unroll
      for (u32 w = 0; w < kWords; ++w) {
        words[w] = static_cast<u32>(found[j][w]);
        if (static_cast<u32>(found[j][w] >> 32) == round.epoch) continue;
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

// Some neighbouring tokens of a source. In shared memory.
struct Chunk {
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
//   spans  [local experts] the source's rows from first_token on; left with those behind the chunk
// NOTE: a function of its own, as its callers need their registers.
template <bool kHasWeights>
__device__ __noinline__ void place_chunk(const LowLatencyCall& call, const Round& round, u32 source,
                                         u32 first_token, u32 begin, u32 end, Span* spans,
                                         Chunk* chunk, Arrivals* arrivals) {
  const u32 num_topk = call.shape.num_topk, num_local = num_local_experts(call);
  const u32 chunk_begin = begin * num_topk;
  const u64* table = slab::table(call.slabs, call.rank, round.slot, source);
  read_entries<kHasWeights>(
      call, round, first_token * num_topk, end * num_topk, arrivals,
      [=](u32 i, u32* whose) {
        *whose = source;
        return table + i * slab::kEntryWords;
      },
      [&](u32 i, i32 expert, u32 weight) {
        const u32 local = static_cast<u32>(expert) - call.rank * num_local;
        const bool is_here = expert >= 0 && local < num_local;
        if (i >= chunk_begin) {
          chunk->choices[i - chunk_begin] = {is_here ? local : kNoRow, 0, i % num_topk, weight};
        } else if (is_here) {
          atomicAdd(&spans[local].next, 1u);
        }
      });
  __syncthreads();
  if (warp_index() == 0 && arrivals->missing == 0 && arrivals->has_failed == 0) {
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

// Gives every part of the sources' rows to one group of one block; neighbouring ones to a block. By
// all threads; false where the call has failed.
//   span_of(source, expert)  where the source's rows lie at an expert
//   serve(part)              is called by all threads of a group
template <bool kHasWeights, typename SpanOf, typename Serve>
__device__ inline bool for_each_part(const LowLatencyCall& call, const Round& round, u32 sources,
                                     const LowLatencyShape* headers, Span* spans, Chunk* chunk,
                                     Arrivals* arrivals, SpanOf span_of, Serve serve) {
  const u32 num_topk = call.shape.num_topk, num_local = num_local_experts(call);
  __syncthreads();  // arrivals begin anew
  u32 total = 0;
  for (u32 source = 0; source < kNumRanks; ++source) {
    if ((sources >> source) & 1) total += headers[source].num_tokens * headers[source].num_parts;
  }
  const u32 first = total * blockIdx.x / gridDim.x, last = total * (blockIdx.x + 1) / gridDim.x;
  u32 base = 0;
  for (u32 source = 0; source < kNumRanks; ++source) {
    if (((sources >> source) & 1) == 0) continue;
    const u32 num_parts = headers[source].num_parts;
    const u32 num_items = headers[source].num_tokens * num_parts;
    const u32 begin = first > base ? first - base : 0;
    const u32 end = last > base ? min_of(last - base, num_items) : 0;
    base += num_items;
    if (begin >= end) continue;
    for (u32 i = threadIdx.x; i < num_local; i += blockDim.x) spans[i] = span_of(source, i);
    if (threadIdx.x == 0) arrivals->missing = 0;
    __syncthreads();
    u32 counted = 0;
    const u32 end_token = ceil_div(end, num_parts);
    for (u32 token = begin / num_parts; token < end_token;) {
      const u32 next = min_of(token + kChunkEntries / num_topk, end_token);
      place_chunk<kHasWeights>(call, round, source, counted, token, next, spans, chunk, arrivals);
      if (arrivals->has_failed != 0) return false;
      if (arrivals->missing != 0) {
        if (threadIdx.x == 0) mask(call, source);
        break;
      }
      const u32 stop = min_of(end, next * num_parts);
      u32 item = token * num_parts;
      if (item < begin) item = begin;
      for (item += group_index(); item < stop; item += kNumGroups) {
        const u32 place = item / num_parts - token;
        serve(Part{source, item / num_parts, item % num_parts, num_parts,
                   chunk->choices + place * num_topk, chunk->num_choices[place]});
      }
      __syncthreads();
      counted = token = next;
    }
    __syncthreads();
  }
  return true;
}

// --- rows in pieces ----------------------------------------------------------------------------

// What a warp moves in one access: a row is cut into such granules, and a part is some of them.
constexpr u32 kGranuleBytes = kWarpSize * sizeof(Vec16);

struct Granules {
  u32 begin;
  u32 end;
};

__device__ __forceinline__ Granules granules_of(u32 num_bytes, u32 part, u32 num_parts) {
  const u32 number = ceil_div(num_bytes, kGranuleBytes);
  const u32 size = ceil_div(number, num_parts);
  return {min_of(part * size, number), min_of((part + 1) * size, number)};
}

}  // namespace epcomm::comm
