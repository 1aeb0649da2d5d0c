// What the kernel is told, where rows lie, and sums: see low_latency_combine.cu.
#pragma once

#include "comm/cell_rows.cuh"
#include "comm/granules.cuh"
#include "comm/low_latency.cuh"
#include "common/types.cuh"
#include "ptx/convert.cuh"

namespace epcomm {

static_assert(!comm::kHasReceivers, "all warps send, then receive");

struct LowLatencyCombineParams {
  comm::LowLatencyCall call;
  const u8* rows;
  const void* topk_idx;
  const float* topk_weights;
  const i64* layout_range;
  u8* out;
  u32 is_64_bit;
  u32 padding;
};

static_assert(sizeof(LowLatencyCombineParams) == kLowLatencyCombineParamsBytes,
              "epcomm/engines/cuda_params.py differs");

// As epcomm.engines.base.CombinePrecision.
enum Precision : u32 { kByRank = 0, kByExpert };

__device__ __forceinline__ u32 row_bytes_of(const LowLatencyCombineParams& params) {
  return params.call.shape.hidden * 2;
}

// All warps of a block are senders, and then receivers: see comm/crews.cuh.
using Everyone = comm::Senders;

// Ranges of dispatch's layout that a block keeps.
constexpr u32 kKeptRanges = 512;

// Where a line's row of a token lies in the slot at the token's rank.
__device__ __forceinline__ u8* slot_row(const LowLatencyCombineParams& params,
                                        const comm::Round& round, u32 rank, u32 line, u32 token) {
  const u64 index = line * params.call.shape.num_max_tokens + token;
  return slab::rows(params.call.slabs, rank, round.slot) + index * row_bytes_of(params);
}

constexpr u32 kVecSize = 8;

struct Sums {
  float value[kVecSize] = {};

  __device__ __forceinline__ void add(const Vec16& v) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      value[2 * i] = ptx::add_rn_f32(value[2 * i], ptx::as_float(v.word[i] << 16));
      value[2 * i + 1] = ptx::add_rn_f32(value[2 * i + 1], ptx::as_float(v.word[i] & 0xffff0000u));
    }
  }

  __device__ __forceinline__ void add(const Vec16& v, float weight) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const float low = ptx::as_float(v.word[i] << 16);
      const float high = ptx::as_float(v.word[i] & 0xffff0000u);
      value[2 * i] = ptx::add_rn_f32(value[2 * i], ptx::mul_rn_f32(low, weight));
      value[2 * i + 1] = ptx::add_rn_f32(value[2 * i + 1], ptx::mul_rn_f32(high, weight));
    }
  }

  __device__ __forceinline__ Vec16 rounded() const {
    Vec16 v;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      v.word[i] = ptx::cvt_rn_bf16x2_f32(value[2 * i], value[2 * i + 1]);
    }
    return v;
  }
};

// Bytes of a row that some warps share, of which a thread has the vectors from first on, as many
// vectors apart as the warps have threads, below end.
struct Vectors {
  u32 first;
  u32 end;
};

// thread: among those of the warps.
__device__ __forceinline__ Vectors vectors_of(const LowLatencyCombineParams& params,
                                              const comm::Granules& granules, u32 thread) {
  return {granules.begin * comm::kGranuleBytes + thread * static_cast<u32>(sizeof(Vec16)),
          min_of<u32>(granules.end * comm::kGranuleBytes, row_bytes_of(params))};
}

// Whether a source's rows cross as cells.
__device__ __forceinline__ bool uses_cells(const LowLatencyCombineParams& params, u32 num_tokens) {
  return params.call.shape.format == kByRank && comm::uses_cells(num_tokens, row_bytes_of(params));
}

}  // namespace epcomm
