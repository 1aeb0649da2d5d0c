// A warp's ring of shared-memory slots: pieces come in by bulk copies and leave by bulk copies, so
// that a warp keeps kNumStages pieces in flight with one thread issuing.
//
// Ordering: the barrier of a slot orders its arrival before the warp's reads. A slot is loaded
// again only when the copies that leave it have read it (bulk_wait_read) and all lanes are past
// reading it
// (__syncwarp).
#pragma once

#include "common/types.cuh"
#include "ptx/bulk.cuh"
#include "ptx/memory.cuh"

namespace epcomm::comm {

// A piece to move; num_bytes is a multiple of 16. tag: whatever its mover wants back.
struct Piece {
  const u8* source;
  u32 num_bytes;
  u32 tag;
};

class BulkRing {
 public:
  // memory: this block's dynamic shared memory, 128-byte aligned. warp: this one's index among the
  // num_warps that have a ring. slot_bytes: of the longest piece, a multiple of 16.
  __device__ __forceinline__ BulkRing(u8* memory, u32 warp, u32 num_warps, u32 slot_bytes)
      : slots_(memory + u64(warp) * kNumStages * slot_bytes), slot_bytes_(slot_bytes) {
    u64* behind = reinterpret_cast<u64*>(memory + u64(num_warps) * kNumStages * slot_bytes);
    barriers_ = behind + warp * kNumStages;
    notes_ = reinterpret_cast<Note*>(behind + num_warps * kNumStages) + warp * kNumNotes;
    if (lane_index() == 0) {
      for (u32 i = 0; i < kNumStages; ++i) ptx::mbarrier_init(barriers_ + i);
      ptx::fence_mbarrier_init();
      ptx::fence_proxy_async();
    }
    __syncwarp();
  }

  // Moves pieces until there are no more. By all lanes of the warp; so are all three functions
  // called.
  //   next(piece)                 sets the next piece; false where there is none
  //   send(slot, num_bytes, tag)  issues what leaves the slot: bulk_store by lane 0
  //   sent(tag)                   is called when all that the piece issued is written, in order
  template <typename Next, typename Send, typename Sent>
  __device__ __forceinline__ void move(Next next, Send send, Sent sent) {
    const bool is_issuer = lane_index() == 0;
    u32 num_loaded = 0, num_sent = 0;
    bool has_more = true;
    while (has_more && num_loaded < kNumStages - 1) has_more = load(num_loaded, next);
    for (u32 k = 0; k < num_loaded; ++k) {
      const u32 stage = k % kNumStages;
      ptx::mbarrier_wait(barriers_ + stage, k / kNumStages % 2);
      send(slots_ + u64(stage) * slot_bytes_, note(k).num_bytes, note(k).tag);
      if (is_issuer) {
        ptx::bulk_commit();
        ptx::bulk_wait_read<1>();  // the next load takes the slot of piece k - 1
      }
      __syncwarp();
      if (has_more) has_more = load(num_loaded, next);
      if (k >= kLag) {
        if (is_issuer) ptx::bulk_wait<kLag>();
        sent(note(num_sent++).tag);
      }
    }
    if (is_issuer) ptx::bulk_wait<0>();
    while (num_sent < num_loaded) sent(note(num_sent++).tag);
    __syncwarp();
  }

 private:
  struct Note {
    u32 num_bytes;
    u32 tag;
  };

  // A piece's writes are waited for only this many pieces later, so that the ring stays full; its
  // note is needed until then.
  static constexpr u32 kLag = kRingLag;
  static constexpr u32 kNumNotes = kRingLag + kNumStages;

  __device__ __forceinline__ Note& note(u32 k) { return notes_[k % kNumNotes]; }

  template <typename Next>
  __device__ __forceinline__ bool load(u32& k, Next next) {
    Piece piece;
    if (!next(&piece)) return false;
    const u32 stage = k % kNumStages;
    if (lane_index() == 0) {
      note(k) = {piece.num_bytes, piece.tag};
      ptx::bulk_load(slots_ + u64(stage) * slot_bytes_, piece.source, piece.num_bytes,
                     barriers_ + stage);
    }
    ++k;
    __syncwarp();
    return true;
  }

  u8* slots_;
  u64* barriers_;
  Note* notes_;
  u32 slot_bytes_;
};

}  // namespace epcomm::comm
