// Summing of combine.cu: tokens whose rows are there.
#pragma once

#include "comm/call.cuh"
#include "common/types.cuh"
#include "kernels/combine_rows.cuh"
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"

namespace epcomm {

// How a 32-bit word of a row holds its values.
#if kDtype == kDtypeFloat32
constexpr u32 kPerWord = 1;
__device__ __forceinline__ void widen(u32 word, float* out) { out[0] = ptx::as_float(word); }
__device__ __forceinline__ u32 narrow(const float* in) { return ptx::as_bits(in[0]); }
#elif kDtype == kDtypeBfloat16
constexpr u32 kPerWord = 2;
__device__ __forceinline__ void widen(u32 word, float* out) {
  out[0] = ptx::as_float(word << 16);
  out[1] = ptx::as_float(word & 0xffff0000u);
}
__device__ __forceinline__ u32 narrow(const float* in) {
  return ptx::cvt_rn_bf16x2_f32(in[0], in[1]);
}
#else
constexpr u32 kPerWord = 2;
__device__ __forceinline__ void widen(u32 word, float* out) {
  out[0] = ptx::cvt_f32_f16(static_cast<u16>(word));
  out[1] = ptx::cvt_f32_f16(static_cast<u16>(word >> 16));
}
__device__ __forceinline__ u32 narrow(const float* in) {
  return ptx::cvt_rn_f16x2_f32(in[0], in[1]);
}
#endif
constexpr u32 kVecSize = 4 * kPerWord;

__device__ __forceinline__ void add(const Vec16& v, float* sums) {
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    float wide[kPerWord];
    widen(v.word[i], wide);
#pragma unroll
    for (u32 j = 0; j < kPerWord; ++j) {
      sums[i * kPerWord + j] = ptx::add_rn_f32(sums[i * kPerWord + j], wide[j]);
    }
  }
}

// Waits until the rows of kSumTokens neighbouring tokens are there. By all lanes of a warp;
// returns, in lane i * kNumRanks + r, the place on rank r of the i-th token's row, or -1. is_good
// tells whether the call may go on.
__device__ inline i32 wait_rows(const CombineParams& params, const Streams& streams,
                                u32 first_token, u32 epoch, bool* is_good) {
  const comm::Call& call = params.call;
  const u32 lane = lane_index(), rank = lane % kNumRanks;
  const u32 token = first_token + lane / kNumRanks;
  const bool exists = lane < kSumTokens * kNumRanks && token < params.num_tokens;
  const i32 position = exists ? params.positions[u64(token) * kNumRanks + rank] : -1;
  bool is_here = true;
  if (rank != call.rank && position >= 0) {
    const u32 unit = (static_cast<u32>(position) - streams.first_there[rank]) / params.unit_rows;
    const u32* flag = slab::unit_flags(call.slabs, call.rank, rank) + unit;
    is_here = comm::wait_for(call, comm::kCombineRows, rank, epoch,
                             [flag] { return ptx::ld_acquire_sys_u32(flag); });
  }
  *is_good = __all_sync(kFullWarp, is_here);
  __syncwarp();  // a vote orders no memory: what one lane acquired, all will read
  return position;
}

// Where a token's row on one rank was received, given its place there.
__device__ __forceinline__ const u8* row_from(const CombineParams& params, const Streams& streams,
                                              u32 rank, i32 place) {
  if (rank == params.call.rank) return params.rows + u64(place) * params.row_bytes;
  const u32 index = static_cast<u32>(place) - streams.first_there[rank];
  return slab::slot(params.call.slabs, params.call.rank, rank) + u64(index) * params.row_bytes;
}

__device__ __forceinline__ const u32* weights_from(const CombineParams& params,
                                                   const Streams& streams, u32 rank, i32 place) {
  if (rank == params.call.rank) return params.weights + u64(place) * params.num_topk;
  const u32 index = static_cast<u32>(place) - streams.first_there[rank];
  const u8* slot = slab::slot(params.call.slabs, params.call.rank, rank);
  return reinterpret_cast<const u32*>(slot + weights_offset(params, streams.count_there[rank])) +
         u64(index) * params.num_topk;
}

// Calls with each further row of a token, in order.
template <typename Add>
__device__ __forceinline__ void for_further(const CombineParams& params, u32 token, Add add_row) {
#if kHasFurther
  for (u32 i = 0; i < params.num_further; ++i) {
    const i32 row = params.further_places[u64(token) * params.num_further + i];
    if (row >= 0) add_row(static_cast<u32>(row));
  }
#endif
}

// Sums one vector of a token's row; at: the byte where it lies in a row.
__device__ __forceinline__ void sum_vec(const CombineParams& params, const u8* const* rows,
                                        u32 token, u64 at) {
  const u64 out_row = u64(token) * params.row_bytes;
  Vec16 v[kNumRanks];
#pragma unroll
  for (u32 rank = 0; rank < kNumRanks; ++rank) {
    if (rows[rank] != nullptr) v[rank] = ptx::ld_no_allocate_vec16(rows[rank] + at);
  }
  float sums[kVecSize];
#pragma unroll
  for (u32 j = 0; j < kVecSize; ++j) sums[j] = 0.0f;
  if (params.bias[0] != nullptr) {
    // The first bias is the start itself: 0.0 + -0.0 would lose its sign.
    const Vec16 bias = ptx::ld_no_allocate_vec16(params.bias[0] + out_row + at);
#pragma unroll
    for (u32 j = 0; j < 4; ++j) widen(bias.word[j], sums + j * kPerWord);
  }
  if (params.bias[1] != nullptr) {
    add(ptx::ld_no_allocate_vec16(params.bias[1] + out_row + at), sums);
  }
#pragma unroll
  for (u32 rank = 0; rank < kNumRanks; ++rank) {
    if (rows[rank] != nullptr) add(v[rank], sums);
  }
  for_further(params, token, [&](u32 row) {
    add(ptx::ld_no_allocate_vec16(params.further_rows + u64(row) * params.row_bytes + at), sums);
  });
  Vec16 out;
#pragma unroll
  for (u32 j = 0; j < 4; ++j) out.word[j] = narrow(sums + j * kPerWord);
  ptx::st_no_allocate_vec16(params.out_rows + out_row + at, out);
}

// Sums the vectors [begin, end) of a token's row. position: from wait_rows; place: of the token
// there.
__device__ inline void sum_row(const CombineParams& params, const Streams& streams, u32 token,
                               i32 position, u32 place, u32 begin, u32 end) {
  const u8* rows[kNumRanks];
#pragma unroll
  for (u32 rank = 0; rank < kNumRanks; ++rank) {
    const i32 at = __shfl_sync(kFullWarp, position, place * kNumRanks + rank);
    rows[rank] = at < 0 ? nullptr : row_from(params, streams, rank, at);
  }
  for (u32 i = begin + lane_index(); i < end; i += kWarpSize) {
    sum_vec(params, rows, token, u64(i) * sizeof(Vec16));
  }
}

__device__ inline void sum_weights(const CombineParams& params, const Streams& streams, u32 token,
                                   i32 position, u32 place) {
  for (u32 k = 0; k < params.num_topk; k += kWarpSize) {
    const u32 at = k + lane_index();
    float sum = 0.0f;
    for (u32 rank = 0; rank < kNumRanks; ++rank) {
      const i32 row = __shfl_sync(kFullWarp, position, place * kNumRanks + rank);
      if (row < 0 || at >= params.num_topk) continue;
      sum = ptx::add_rn_f32(sum, ptx::as_float(weights_from(params, streams, rank, row)[at]));
    }
    for_further(params, token, [&](u32 row) {
      if (at >= params.num_topk) return;
      const u32 weight = params.further_weights[u64(row) * params.num_topk + at];
      sum = ptx::add_rn_f32(sum, ptx::as_float(weight));
    });
    if (at < params.num_topk) {
      params.out_weights[u64(token) * params.num_topk + at] = ptx::as_bits(sum);
    }
  }
}

__device__ inline void sum_tokens(const CombineParams& params, const Streams& streams, u32 epoch) {
  const u32 num_vecs = params.row_bytes / sizeof(Vec16);
  const u32 num_parts = ceil_div(num_vecs, kSumVecs);
  const u32 num_items = ceil_div(params.num_tokens, kSumTokens) * num_parts;
  comm::Claims claims(params.call.state, 1);
  for (u32 item = claims.next(); item < num_items; item = claims.next()) {
    const u32 first_token = item / num_parts * kSumTokens, part = item % num_parts;
    bool is_good;
    const i32 position = wait_rows(params, streams, first_token, epoch, &is_good);
    if (!is_good) return;
    const u32 begin = part * kSumVecs, end = min_of(begin + kSumVecs, num_vecs);
    for (u32 i = 0; i < min_of(kSumTokens, params.num_tokens - first_token); ++i) {
      sum_row(params, streams, first_token + i, position, i, begin, end);
      if (part == 0) sum_weights(params, streams, first_token + i, position, i);
    }
  }
}

}  // namespace epcomm
