// What both low-latency kernels do alike: epochs, slots, waits, masks and the way out.
//
// Epochs. A rank's calls are numbered in device memory; all ranks make the same calls in the same
// order, so their numbers agree, in replayed graphs too. Every block counts for itself, in a record
// that only it touches, so no block has to know that the others are done: all kernels have as many.
// Everything that ranks wait for is a cell that holds the call's epoch, so nothing is reset between
// calls. A kernel that only receives takes its epoch from its call's ticket, which the kernel that
// sent has written.
//
// Slots. Call n uses slot n % 2. A rank writes into a peer's slot only when the peer has posted
// that it received the slot's last call. A kernel posts, before it waits for anything, what earlier
// kernels of its rank have received: at the latest, the kernel that sends call n + 2 posts call n.
// So a rank is at most one call ahead of its peers: it sends call n + 2 once they have begun n + 1,
// or called n's hook and begun any other.
//
// Ordering:
//   reads of a slot -> end of the kernel -> a later kernel of the stream -> release of received, by
//   one of its blocks
//   acquire of received by a lane of each block -> __syncthreads -> stores into the peer's slot
//   stores of a part's row by a group of warps -> the group's barrier -> release of the part's flag
//   acquire of a flag by a lane of each warp -> __syncwarp -> loads of the row by all lanes
// Rows of a rank with few tokens cross without flags: see comm/cell_rows.cuh. Warps receive while
// others send: see comm/crews.cuh. All blocks are resident at once, and sending waits for nothing
// but what peers' kernels of the same call post at their beginning, and, in combine, for tables,
// which go out before anything else is waited for.
//
// Code. A kernel runs once from end to end, so every instruction is fetched anew, which takes
// longer than to run it. Only loops that keep several reads on their way are unrolled.
// What is called from one place is inlined: elsewhere a kernel's params are read from memory.
//
// Masks. With can_mask a peer that does not answer in time is masked, in place of a failure; masked
// peers get nothing, and nobody waits for them.
//
// Signs of life. Whoever waits for a dead rank is itself late by a deadline. To a rank that the
// dead one had served before, and that is in the next call, both look alike, and no choice of
// deadlines tells them apart: that of a wait would have to exceed the longest call, and the wait is
// part of one. So a rank that waits shows it, every eighth of a deadline, to all that it does not
// mask; and a wait's deadline counts from its begin or the awaited rank's last sign. Rows are
// waited for an eighth of a deadline longer: while others wait for tables, and where a rank
// died before its table was whole, it is to be found by that.
//   A live rank is not masked, or named in a failure, unless it waits nowhere for seven eighths of
//   a deadline, as when its host or its other kernels take so long: between two of its signs lie an
//   eighth and that time.
//   A dead rank is masked, or named, a deadline after the wait for it began, or after its last
//   sign; for rows an eighth more. Every wait ends, whatever signs there are: ranks out of step, as
//   a caller may have unmasked them, wait for each other. Where nobody is masked it does so after
//   two deadlines, as the first that fails ends the call of all. With can_mask after kNumRanks, and
//   one dead rank makes no wait so long. Who waits for a live rank waits, over others perhaps, for
//   one that waits for the dead rank; each of them does so for nine eighths of a deadline in all,
//   as then it masks it; there are kNumRanks - 2, and 9/8 of that is less than kNumRanks. Where
//   several die one after another, the first line may not hold.
// Signs order nothing, and tell nothing of a call: a rank in an earlier one has yet to send what is
// waited for, and what a rank in a later one has sent arrives. They belong to a slab: in calls on
// another, as after growth, a rank that waits shows nothing.
#pragma once

#include "comm/call.cuh"
#include "comm/crews.cuh"
#include "common/types.cuh"
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

// What a block of all kernels remembers: in a sector of its own, which others do not queue for.
struct BlockState {
  u32 epoch;
  u32 padding;
  u32 slot_epoch[2];     // of each slot's last call that was sent
  u32 slot_masked[2];    // and the peers that it left out, as bits
  u32 slot_received[2];  // of each slot's last call that was received
};

// Device memory of one rank that only its own kernels touch.
struct LowLatencyState {
  u32 num_finished_blocks;  // of a call whose waits are summed
  u32 has_failed;
  u32 waited_us[kMaxRanks];
  u64 verdicts[kMaxRanks];      // {epoch, whether the source takes part in this call}
  u64 shown_ns;                 // when this rank last showed that it waits
  u64 sign_seen_ns[kMaxRanks];  // and when it last saw that of each peer
  u64 padding[2];
  BlockState blocks[kMaxLowLatencyBlocks];
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

static_assert(sizeof(BlockState) == 32, "a sector");
static_assert(sizeof(LowLatencyState) == kLowLatencyStateBytes,
              "epcomm/engines/cuda_params.py differs");

// One call, as a block sees it. In shared memory.
struct Round {
  u32 epoch;
  u32 slot;
  u32 masked;       // peers that get nothing, as bits
  u32 received[2];  // of each slot, what is posted
  u32 is_unposted;  // and whether it is not yet
};

// A cell: an epoch, and what it is of.
__device__ __forceinline__ u64 cell_of(u32 epoch, u32 word) { return (u64(epoch) << 32) | word; }

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
  return call.can_mask && peer != call.rank && ptx::ld_relaxed_sys_u32(&call.masks[peer]) != 0;
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

// Looks at a cell {epoch, word}, which orders nothing else, or at a flag, which is an epoch and
// orders what was written before it. Returns the epoch.
__device__ __forceinline__ u32 look(Phase phase, const void* cell, u32* word) {
  const bool is_word = phase == kLowLatencyTables || phase == kLowLatencyCells;
  if (!is_word) return ptx::ld_acquire_sys_u32(static_cast<const u32*>(cell));
  const u64 value = ptx::ld_relaxed_sys_u64(static_cast<const u64*>(cell));
  *word = static_cast<u32>(value);
  return static_cast<u32>(value >> 32);
}

// Whether a cell is what is waited for. A peer may have received this very call already, when other
// blocks have sent all that it needs; no other cell can be ahead.
__device__ __forceinline__ bool is_there(Phase phase, u32 seen, u32 epoch) {
  return phase == kReceived ? is_reached(seen, epoch) : seen == epoch;
}

constexpr u32 kSignsPerDeadline = 8;

// The deadline of a wait: see above for that of rows.
__device__ __forceinline__ u64 deadline_ns(const LowLatencyCall& call, Phase phase) {
  const bool is_for_rows = phase == kLowLatencyRows || phase == kLowLatencyCells;
  return call.timeout_ns + (is_for_rows ? call.timeout_ns / 8 : 0);
}

// Shows all peers, at intervals, that this rank waits: by one thread of all that do.
__device__ __forceinline__ void show_sign(const LowLatencyCall& call, u64 now) {
  u64* shown_ns = &call.state->shown_ns;
  const u64 before = ptx::ld_relaxed_sys_u64(shown_ns);
  if (now < before + call.timeout_ns / kSignsPerDeadline) return;
  if (atomicCAS(shown_ns, before, now) != before) return;
#pragma unroll 1
  for (u32 peer = 0; peer < kNumRanks; ++peer) {
    if (is_masked(call, peer)) continue;
    ptx::st_relaxed_sys_u64(slab::sign_cell(call.slabs, peer, call.rank), 1);
  }
}

// When this rank last saw that a peer waits.
__device__ __forceinline__ u64 last_sign_ns(const LowLatencyCall& call, u32 peer, u64 now) {
  u64* seen_ns = &call.state->sign_seen_ns[peer];
  u64* sign = slab::sign_cell(call.slabs, call.rank, peer);
  if (ptx::ld_relaxed_sys_u64(sign) != 0) {
    ptx::st_relaxed_sys_u64(seen_ns, now);  // before other threads can no longer see the sign
    ptx::st_relaxed_sys_u64(sign, 0);
  }
  return ptx::ld_relaxed_sys_u64(seen_ns);
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
    if (is_masked(call, peer)) return {Outcome::kMissing, 0};
    if (has_failed(call)) return {Outcome::kFailed, 0};
    const u64 aborted = ptx::ld_acquire_sys_u64(slab::abort_cell(call.slabs, call.rank));
    if (aborted != 0) {
      report(call, kPeerGaveUp, phase, static_cast<u32>(aborted - 1), epoch, seen);
      return {Outcome::kFailed, 0};
    }
    const u64 now = ptx::global_timer_ns(), timeout_ns = deadline_ns(call, phase);
    show_sign(call, now);
    const u64 since = max_of(start, last_sign_ns(call, peer, now));
    const u64 most_ns = timeout_ns * (call.can_mask ? kNumRanks : 2);
    if (now > since + timeout_ns || now > start + most_ns) {
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

// A part of a row from a source, by all lanes of a warp. Masks who does not send it.
__device__ inline Outcome await_part(const LowLatencyCall& call, const Round& round, u32 source,
                                     u32 item) {
  u32 outcome = 0;
  if (lane_index() == 0) {
    const u32* flag = slab::flags(call.slabs, call.rank, round.slot, source) + item;
    outcome = static_cast<u32>(await(call, kLowLatencyRows, source, round.epoch, flag).outcome);
  }
  outcome = __shfl_sync(kFullWarp, outcome, 0);
  __syncwarp();  // a shuffle orders no memory: what one lane acquired, all will read
  if (static_cast<Outcome>(outcome) == Outcome::kMissing) mask(call, source);
  return static_cast<Outcome>(outcome);
}

// --- beginning and end -------------------------------------------------------------------------

// Zero is what memory begins with, so it is no epoch.
__device__ __forceinline__ u32 epoch_after(u32 epoch) { return epoch == ~0u ? 2 : epoch + 1; }

// The block that posts what was received: it sends no tables and few rows, as a rule.
__device__ __forceinline__ bool is_poster() { return blockIdx.x == gridDim.x / 2; }

// Posts to peers what was received of each slot. By all lanes of a warp.
__device__ __forceinline__ void post_received(const LowLatencyCall& call, u32 masked,
                                              const u32* received) {
  const u32 lane = lane_index(), slot = lane / kMaxRanks, peer = lane % kMaxRanks;
  if (slot > 1 || peer >= kNumRanks || peer == call.rank || ((masked >> peer) & 1) != 0) return;
  ptx::st_release_sys_u32(slab::received_cell(call.slabs, peer, slot, call.rank),
                          slot == 0 ? received[0] : received[1]);
}

// Begins a call: posts what was received, counts the call, and waits, where it sends, until peers
// have received the slot's last call. By all threads; false, to all of them, where the call may not
// go on.
__device__ inline bool begin(const LowLatencyCall& call, Round* round) {
  BlockState& own = call.state->blocks[blockIdx.x];
  const volatile BlockState& state = own;
  const bool sends = (call.phases & kSends) != 0, receives = (call.phases & kReceives) != 0;
  bool is_good = true;
  if (warp_index() == 0) {
    const u32 lane = lane_index(), peer = lane % kMaxRanks;
    const bool is_peer = lane < 2 * kMaxRanks && peer < kNumRanks && peer != call.rank;
    // All that is needed is read at once, of both slots, before it is known which one it is.
    const u32 epoch =
        sends ? epoch_after(state.epoch) : *static_cast<const volatile u32*>(call.ticket);
    const u32 slot_epoch[2] = {state.slot_epoch[0], state.slot_epoch[1]};
    const u32 slot_masked[2] = {state.slot_masked[0], state.slot_masked[1]};
    const u32 received[2] = {state.slot_received[0], state.slot_received[1]};
    is_good = !has_failed(call);
    bool leaves_out = peer < kNumRanks && is_masked(call, peer);
    u32 seen = 0;
    if (sends && is_peer) {
      seen = ptx::ld_acquire_sys_u32(
          slab::received_cell(call.slabs, call.rank, lane / kMaxRanks, peer));
    }
    const u32 slot = epoch % 2, last = slot == 0 ? slot_epoch[0] : slot_epoch[1];
    const u32 left_out = slot == 0 ? slot_masked[0] : slot_masked[1];
    seen = __shfl_sync(kFullWarp, seen, slot * kMaxRanks + peer);
    const bool waits = sends && is_good && is_peer && lane < kNumRanks && !leaves_out &&
                       ((left_out >> peer) & 1) == 0;
    const bool must_wait = waits && !is_there(kReceived, seen, last);
    // Before anything is waited for: a peer's kernel may wait for this before it posts the next.
    const bool posts = is_poster() && __any_sync(kFullWarp, must_wait);
    if (posts) post_received(call, __ballot_sync(kFullWarp, leaves_out), received);
    if (must_wait) {
      const u32* cell = slab::received_cell(call.slabs, call.rank, slot, peer);
      const Outcome outcome = await_slowly(call, kReceived, peer, last, cell).outcome;
      is_good = outcome != Outcome::kFailed;
      leaves_out = outcome == Outcome::kMissing;
      if (leaves_out) mask(call, peer);
    }
    const u32 masked = __ballot_sync(kFullWarp, leaves_out && lane < kNumRanks);
    __syncwarp();  // a vote orders no memory: all lanes have read what is written now
    if (lane == 0) {
      *round = {epoch, slot, masked, {received[0], received[1]}, is_poster() && !posts};
      if (sends) {
        own.epoch = epoch;
        own.slot_epoch[slot] = epoch;
        own.slot_masked[slot] = masked;
        if (call.ticket != nullptr && blockIdx.x == 0) *call.ticket = epoch;
      }
      // Not yet, but when the next kernel reads it.
      if (receives) own.slot_received[slot] = epoch;
    }
  }
  const bool is_good_for_all = __syncthreads_and(is_good);
  // Else by a warp that has least to do, as a release takes longer than all of the above: a sender
  // of no rows, or, where all receive, one between those that read headers and the first choices.
  constexpr u32 kPostingWarp = kHasReceivers ? Senders::kNumWarps - 1 : Senders::kNumWarps / 2;
  if (warp_index() == kPostingWarp && is_poster() && round->is_unposted) {
    post_received(call, round->masked, round->received);
  }
  return is_good_for_all;
}

// Adds this call's waits to the caller's. By all threads.
__device__ __noinline__ void add_waits(const LowLatencyCall& call) {
  LowLatencyState& state = *call.state;
  if (!is_last_block(&state.num_finished_blocks)) return;
  const u32 peer = threadIdx.x;
  if (peer >= kNumRanks) return;
  call.wait_stats[peer] += state.waited_us[peer];
  state.waited_us[peer] = 0;
}

// Ends a call. By all threads.
__device__ __forceinline__ void finish(const LowLatencyCall& call, const Round& round) {
  if (call.can_mask && (call.phases & kSends)) {
    __syncthreads();
    if (threadIdx.x == 0) {
      u32 left_out = 0;
#pragma unroll 1
      for (u32 i = 0; i < kNumRanks; ++i) left_out |= is_masked(call, i) ? 1u << i : 0;
      call.state->blocks[blockIdx.x].slot_masked[round.slot] = left_out;
    }
  }
  if (call.wait_stats != nullptr) add_waits(call);
}

}  // namespace epcomm::comm
