// Where things lie in a low-latency slab. The one table is epcomm/cuda_layout.py; offsets come from
// there as constants.
//
// Calls use two slots in turn. Tables, headers and flags hold epochs and nothing else ever, so what
// an earlier call left is never taken for a later one's.
#pragma once

#include "common/types.cuh"

namespace epcomm::slab {

// Words that a rank tells of a call.
constexpr u32 kLowLatencyHeaderWords = 8;
// Words of a table's entry: a choice, and its weight.
constexpr u32 kEntryWords = 2;

struct LowLatencySlabs {
  u8* base[kMaxRanks];
  u64 rows_bytes;  // of each slot
};

template <typename T>
__device__ __forceinline__ T* at(const LowLatencySlabs& slabs, u32 rank, u64 offset) {
  return reinterpret_cast<T*>(slabs.base[rank] + offset);
}

// Set to 1 + the rank that gave up: every later wait on this slab fails.
__device__ __forceinline__ u64* abort_cell(const LowLatencySlabs& slabs, u32 rank) {
  return at<u64>(slabs, rank, kOffsetLowLatencyAbort);
}

// Epoch of the slot's last call that a peer has received.
__device__ __forceinline__ u32* received_cell(const LowLatencySlabs& slabs, u32 rank, u32 slot,
                                              u32 peer) {
  return at<u32>(slabs, rank, kOffsetLowLatencyReceived) + slot * kMaxRanks + peer;
}

// Not 0 where a peer has shown that it waits in a kernel; who sees it takes it.
__device__ __forceinline__ u64* sign_cell(const LowLatencySlabs& slabs, u32 rank, u32 peer) {
  return at<u64>(slabs, rank, kOffsetLowLatencySigns) + peer;
}

// [kLowLatencyHeaderWords] {epoch, word}.
__device__ __forceinline__ u64* header_cells(const LowLatencySlabs& slabs, u32 rank, u32 slot,
                                             u32 source) {
  return at<u64>(slabs, rank, kOffsetLowLatencyHeaders) +
         (slot * kMaxRanks + source) * kLowLatencyHeaderWords;
}

// [kMaxLowLatencyTokens * kMaxLowLatencyTopk][kEntryWords] {epoch, word}: the source's choices.
__device__ __forceinline__ u64* table(const LowLatencySlabs& slabs, u32 rank, u32 slot,
                                      u32 source) {
  return at<u64>(slabs, rank, kOffsetLowLatencyTables) +
         u64(slot * kNumRanks + source) * kMaxLowLatencyTokens * kMaxLowLatencyTopk * kEntryWords;
}

// [kMaxLowLatencyTokens] epochs of the parts of a line's rows.
__device__ __forceinline__ u32* flags(const LowLatencySlabs& slabs, u32 rank, u32 slot, u32 line) {
  return at<u32>(slabs, rank, kOffsetLowLatencyFlags) +
         (slot * kMaxLowLatencyTopk + line) * kMaxLowLatencyTokens;
}

// [kMaxCellRowBytes / 4] {epoch, word}: a row of a line, of a rank with few tokens, and nothing
// else ever.
__device__ __forceinline__ u64* cell_row(const LowLatencySlabs& slabs, u32 rank, u32 slot, u32 line,
                                         u32 token) {
  const u64 index = (slot * kNumRanks + line) * kMaxCellTokens + token;
  return at<u64>(slabs, rank, kOffsetLowLatencyCells) + index * (kMaxCellRowBytes / sizeof(u32));
}

// [lines][most tokens] rows of the call's size. A line is a source rank, or a choice.
__device__ __forceinline__ u8* rows(const LowLatencySlabs& slabs, u32 rank, u32 slot) {
  return at<u8>(slabs, rank, kOffsetLowLatencyRows + slot * slabs.rows_bytes);
}

}  // namespace epcomm::slab
