// Rows of ranks with few tokens, as cells: each word with the epoch, which tells by itself that it
// is there. Twice the bytes, and no flag.
#pragma once

#include "comm/granules.cuh"
#include "comm/low_latency.cuh"
#include "common/types.cuh"
#include "ptx/memory.cuh"
#include "slab/low_latency.cuh"

namespace epcomm::comm {

static_assert(kCellTokens <= kMaxCellTokens, "a line has cells for so many rows");

// Whether the rows of a rank with so many tokens cross as cells.
__device__ __forceinline__ bool uses_cells(u32 num_tokens, u32 row_bytes) {
  return num_tokens <= kCellTokens && row_bytes <= kMaxCellRowBytes;
}

// Where the pair of cells with the word at byte `at` lies. A 16-byte vector has this pair and the
// one half a granule's cells behind it, so that a warp writes whole lines.
__device__ __forceinline__ u64* cells_at(u64* row, u32 at) {
  const u32 granule = at / kGranuleBytes, lane = at % kGranuleBytes / sizeof(Vec16);
  const u32 half = at % sizeof(Vec16) / (2 * sizeof(u32));
  return row + granule * (kGranuleBytes / sizeof(u32)) + (half * kWarpSize + lane) * 2;
}

// The cell of the word at byte `at`.
__device__ __forceinline__ u64* cell_at(u64* row, u32 at) {
  return cells_at(row, at) + at / sizeof(u32) % 2;
}

__device__ __forceinline__ void put_cell(u64* row, u32 at, u32 word, u32 epoch) {
  ptx::st_relaxed_sys_u64(cell_at(row, at), cell_of(epoch, word));
}

__device__ __forceinline__ void put_cells(u64* row, u32 at, const Vec16& v, u32 epoch) {
  u64* cells = cells_at(row, at);
  ptx::st_relaxed_sys_u64x2(cells, {cell_of(epoch, v.word[0]), cell_of(epoch, v.word[1])});
  ptx::st_relaxed_sys_u64x2(cells + 2 * kWarpSize,
                            {cell_of(epoch, v.word[2]), cell_of(epoch, v.word[3])});
}

// The cells of a vector, as they are now.
struct VecCells {
  ptx::U64Pair half[2];
};

__device__ __forceinline__ VecCells look_at_cells(u64* row, u32 at) {
  const u64* cells = cells_at(row, at);
  return {ptx::ld_relaxed_sys_u64x2(cells), ptx::ld_relaxed_sys_u64x2(cells + 2 * kWarpSize)};
}

// The first of a vector's cells that was not there, or null.
__device__ __forceinline__ const u64* late_cell(u64* row, u32 at, const VecCells& seen, u32 epoch) {
  const u64* late = nullptr;
#pragma unroll
  for (u32 i = 4; i-- > 0;) {
    const bool is_late = static_cast<u32>(seen.half[i / 2].value[i % 2] >> 32) != epoch;
    if (is_late) late = cells_at(row, at) + i / 2 * 2 * kWarpSize + i % 2;
  }
  return late;
}

__device__ __forceinline__ Vec16 words_of(const VecCells& seen) {
  Vec16 v;
#pragma unroll
  for (u32 i = 0; i < 4; ++i) v.word[i] = static_cast<u32>(seen.half[i / 2].value[i % 2]);
  return v;
}

// One thread's wait for a cell that was late. Masks who does not send it.
__device__ __forceinline__ Outcome await_cell(const LowLatencyCall& call, const Round& round,
                                              u32 peer, const u64* late) {
  const Outcome outcome = await_slowly(call, kLowLatencyCells, peer, round.epoch, late).outcome;
  if (outcome == Outcome::kMissing) mask(call, peer);
  return outcome;
}

}  // namespace epcomm::comm
