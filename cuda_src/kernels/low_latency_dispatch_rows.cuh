// What the kernel is told, and where rows lie on their way: see low_latency_dispatch.cu.
#pragma once

#include "comm/cell_rows.cuh"
#include "comm/fp8.cuh"
#include "comm/low_latency.cuh"
#include "common/types.cuh"

namespace epcomm {

struct LowLatencyDispatchParams {
  comm::LowLatencyCall call;
  const u8* rows;
  const void* topk_idx;
  u8* recv_rows;
  u32* recv_scales;
  i32* recv_count;
  i32* src_info;
  i64* layout_range;
  i32* recv_stats;
  u32 is_64_bit;
  u32 num_scales;  // words of a row
};

static_assert(sizeof(LowLatencyDispatchParams) == kLowLatencyDispatchParamsBytes,
              "epcomm/engines/cuda_params.py differs");

// Bytes of a row's values, in the slot and in the output.
__device__ __forceinline__ u32 data_bytes(const LowLatencyDispatchParams& params) {
  return params.call.shape.hidden * (kIsFp8 ? 1 : 2);
}

__device__ __forceinline__ u32 slot_row_bytes(const LowLatencyDispatchParams& params) {
  return ceil_div<u32>(data_bytes(params) + params.num_scales * 4, sizeof(Vec16)) * sizeof(Vec16);
}

// Where a source's row lies in a rank's slot.
__device__ __forceinline__ u8* slot_row(const LowLatencyDispatchParams& params,
                                        const comm::Round& round, u32 rank, u32 source, u32 token) {
  const u64 index = source * params.call.shape.num_max_tokens + token;
  return slab::rows(params.call.slabs, rank, round.slot) + index * slot_row_bytes(params);
}

// Whether rows of a rank with so many tokens cross as cells.
__device__ __forceinline__ bool uses_cells(const LowLatencyDispatchParams& params, u32 num_tokens) {
  return comm::uses_cells(num_tokens, slot_row_bytes(params));
}

// Words of scales that a granule of values has.
__device__ __forceinline__ u32 scales_of_granule(const LowLatencyDispatchParams& params) {
  return params.call.shape.format == comm::kPackedScales ? 1 : 4;
}

}  // namespace epcomm
