// What the kernel is told, and where rows lie: see combine.cu.
#pragma once

#include "comm/call.cuh"
#include "comm/route_record.cuh"
#include "common/types.cuh"

namespace epcomm {

struct CombineParams {
  comm::Call call;
  const u8* rows;
  const u32* weights;
  const u8* bias[2];
  u8* out_rows;
  u32* out_weights;
  const i32* positions;
  const i32* counts;
  const comm::RouteSummary* summary;
  const u8* further_rows;      // [rows, row_bytes]
  const u32* further_weights;  // [rows, num_topk]
  const i32* further_places;   // [num_tokens, num_further] rows to add to a token, or -1
  u32 num_tokens;
  u32 row_bytes;
  u32 num_topk;   // 0 without weights
  u32 unit_rows;  // what a send warp moves at a time
  u32 num_further;
  u32 padding;
};

static_assert(sizeof(CombineParams) == kCombineParamsBytes,
              "epcomm/engines/cuda_params.py differs");

// Where rows of each rank lie in the streams: worked out once a block.
struct Streams {
  u32 first_here[kNumRanks];   // first row of each source among this rank's rows
  u32 count_here[kNumRanks];   // and their number
  u32 first_there[kNumRanks];  // first of this rank's rows on each receiver
  u32 count_there[kNumRanks];  // and their number
};

__device__ inline void find_streams(const CombineParams& params, Streams* streams) {
  const u32 me = params.call.rank;
  if (threadIdx.x < kNumRanks) {
    const u32 other = threadIdx.x;
    u32 here = 0, there = 0;
    for (u32 source = 0; source < other; ++source) here += params.counts[source * kNumRanks + me];
    for (u32 source = 0; source < me; ++source) there += params.counts[source * kNumRanks + other];
    streams->first_here[other] = here;
    streams->count_here[other] = params.counts[other * kNumRanks + me];
    streams->first_there[other] = there;
    streams->count_there[other] = params.counts[me * kNumRanks + other];
  }
  __syncthreads();
}

// Weights lie behind all rows of a slot.
__device__ __forceinline__ u64 weights_offset(const CombineParams& params, u32 num_rows) {
  return u64(num_rows) * params.row_bytes;
}

}  // namespace epcomm
