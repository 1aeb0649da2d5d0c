// Where things lie in a slab. The one table is epcomm/cuda_layout.py; offsets of the fixed part
// come from there as constants (kOffset...), those of the areas, which grow, in SlabLayout.
#pragma once

#include "common/types.cuh"

namespace epcomm::slab {

// A header says what a rank passed to a call; all ranks' must agree in the first kNumAgreed values.
constexpr u32 kHeaderWords = 16;

// Slabs of all ranks as this rank's GPU addresses them, and the areas' places, alike in all.
struct SlabLayout {
  u8* base[kMaxRanks];
  // [2][kNumRanks source][list_tokens] i32: tokens that a source sends here.
  u64 lists_offset;
  // [kMaxRanks source][flag_units] u32: epochs of combine's units.
  u64 flags_offset;
  // [kMaxRanks source][stage_flag_units] u32: epochs of dispatch's units.
  u64 stage_flags_offset;
  // [2][stage_bytes]: rows that peers fetch.
  u64 stage_offset;
  // [kNumRanks - 1][slot_bytes]: rows that peers sent for combine.
  u64 slots_offset;
  u64 stage_bytes;
  u64 slot_bytes;
  u32 list_tokens;
  u32 flag_units;
  u32 stage_flag_units;
  u32 padding;
};

template <typename T>
__device__ __forceinline__ T* at(const SlabLayout& slabs, u32 rank, u64 offset) {
  return reinterpret_cast<T*>(slabs.base[rank] + offset);
}

// Set to 1 + the rank that gave up: every later wait on this slab fails.
__device__ __forceinline__ u64* abort_cell(const SlabLayout& slabs, u32 rank) {
  return at<u64>(slabs, rank, kOffsetAbort);
}

// {epoch, 0} of each source's latest call.
__device__ __forceinline__ u64* arrival_cell(const SlabLayout& slabs, u32 rank, u32 source) {
  return at<u64>(slabs, rank, kOffsetArrival) + source;
}

__device__ __forceinline__ i32* header(const SlabLayout& slabs, u32 rank, u32 epoch, u32 source) {
  return at<i32>(slabs, rank, kOffsetHeaders) + ((epoch % 2) * kMaxRanks + source) * kHeaderWords;
}

// {epoch, rows from source to receiver}.
__device__ __forceinline__ u64* count_cell(const SlabLayout& slabs, u32 rank, u32 epoch, u32 source,
                                           u32 receiver) {
  return at<u64>(slabs, rank, kOffsetCounts) + ((epoch % 2) * kMaxRanks + source) * kMaxRanks +
         receiver;
}

// [kMaxLocalExperts] pairs that a source sends to each of the rank's experts.
__device__ __forceinline__ i32* expert_counts(const SlabLayout& slabs, u32 rank, u32 epoch,
                                              u32 source) {
  return at<i32>(slabs, rank, kOffsetExpertCounts) +
         ((epoch % 2) * kMaxRanks + source) * kMaxLocalExperts;
}

__device__ __forceinline__ i32* list(const SlabLayout& slabs, u32 rank, u32 epoch, u32 source) {
  return at<i32>(slabs, rank, slabs.lists_offset) +
         u64((epoch % 2) * kNumRanks + source) * slabs.list_tokens;
}

__device__ __forceinline__ u32* unit_flags(const SlabLayout& slabs, u32 rank, u32 source) {
  return at<u32>(slabs, rank, slabs.flags_offset) + u64(source) * slabs.flag_units;
}

__device__ __forceinline__ u32* stage_flags(const SlabLayout& slabs, u32 rank, u32 source) {
  return at<u32>(slabs, rank, slabs.stage_flags_offset) + u64(source) * slabs.stage_flag_units;
}

__device__ __forceinline__ u8* stage(const SlabLayout& slabs, u32 rank, u32 epoch) {
  return at<u8>(slabs, rank, slabs.stage_offset + (epoch % 2) * slabs.stage_bytes);
}

// A rank has no slot for itself.
__device__ __forceinline__ u8* slot(const SlabLayout& slabs, u32 rank, u32 source) {
  const u32 index = source < rank ? source : source - 1;
  return at<u8>(slabs, rank, slabs.slots_offset + u64(index) * slabs.slot_bytes);
}

}  // namespace epcomm::slab
