// Sending of low_latency_dispatch.cu: rows, cast to fp8 on their way, to the ranks of their
// choices.
#pragma once

#include "comm/cell_rows.cuh"
#include "comm/choices.cuh"
#include "comm/fp8.cuh"
#include "comm/granules.cuh"
#include "comm/low_latency.cuh"
#include "common/types.cuh"
#include "kernels/low_latency_dispatch_rows.cuh"

namespace epcomm {

using comm::Senders;

// What a lane sends of a granule: 16 bytes, and a word of scales where has_scale.
struct Sent {
  Vec16 values;
  u32 scale;
};

#if kIsFp8

struct Loaded {
  Vec16 first;
  Vec16 second;
};

__device__ __forceinline__ Loaded load(const u8* row, u32 at) {
  return {ptx::ld_no_allocate_vec16(row + 2 * at),
          ptx::ld_no_allocate_vec16(row + 2 * at + sizeof(Vec16))};
}

__device__ __forceinline__ Sent prepare(const LowLatencyDispatchParams& params, const Loaded& in) {
  const comm::CastValues cast = comm::cast_to_fp8(in.first, in.second, params.call.shape.format);
  return {cast.values, cast.scale};
}

// Gives a granule's scales to put(index, scale), by the lanes that have one.
template <typename Put>
__device__ __forceinline__ void put_scales(const LowLatencyDispatchParams& params, u32 granule,
                                           u32 scale, Put put) {
  const u32 number = scales_of_granule(params), step = kWarpSize / number;
  const u32 index = granule * number + lane_index() / step;
  if (lane_index() % step == 0 && index < params.num_scales) put(index, scale);
}

#else

struct Loaded {
  Vec16 first;
};

__device__ __forceinline__ Loaded load(const u8* row, u32 at) {
  return {ptx::ld_no_allocate_vec16(row + at)};
}

__device__ __forceinline__ Sent prepare(const LowLatencyDispatchParams&, const Loaded& in) {
  return {in.first, 0};
}

template <typename Put>
__device__ __forceinline__ void put_scales(const LowLatencyDispatchParams&, u32, u32, Put) {}

#endif

// A part of a row that a group sends, as far as it is read at once: in registers.
struct OwnPart {
  static constexpr u32 kUnroll = 2;
  i64 expert;  // this lane's choice
  Loaded loaded[kUnroll];
};

__device__ __forceinline__ comm::Granules granules_of(const LowLatencyDispatchParams& params,
                                                      u32 item) {
  const u32 num_parts = params.call.shape.num_parts;
  return comm::granules_of(data_bytes(params), item % num_parts, num_parts);
}

// Reads this warp's granules from first on.
__device__ __forceinline__ void load_granules(const LowLatencyDispatchParams& params, u32 token,
                                              u32 first, u32 end, OwnPart* own) {
  const u8* row = params.rows + u64(token) * params.call.shape.hidden * 2;
#pragma unroll
  for (u32 j = 0; j < OwnPart::kUnroll; ++j) {
    const u32 granule = first + j * kGroupWarps;
    const u32 at = granule * comm::kGranuleBytes + lane_index() * sizeof(Vec16);
    own->loaded[j] = {};
    if (granule < end && at < data_bytes(params)) own->loaded[j] = load(row, at);
  }
}

// The n-th part that a group sends.
__device__ __forceinline__ u32 own_item(u32 n) {
  return blockIdx.x + gridDim.x * (comm::group_index() + n * kNumGroups);
}

// Reads the beginning of a part, and for whom it is. By all threads of a group.
__device__ __forceinline__ void load_part(const LowLatencyDispatchParams& params, u32 item,
                                          OwnPart* own) {
  const comm::LowLatencyShape& shape = params.call.shape;
  if (item >= shape.num_tokens * shape.num_parts) return;
  const u32 token = item / shape.num_parts, lane = lane_index();
  own->expert = -1;
  if (lane < shape.num_topk) {
    own->expert =
        comm::choice_at(params.topk_idx, params.is_64_bit, u64(token) * shape.num_topk + lane);
  }
  const comm::Granules granules = granules_of(params, item);
  load_granules(params, token, granules.begin + comm::warp_in_group(), granules.end, own);
}

// The ranks that get a token, as bits, from the lanes' choices. By all lanes of a warp.
__device__ inline u32 ranks_of(const LowLatencyDispatchParams& params, const comm::Round& round,
                               i64 expert) {
  const bool is_valid = expert >= 0 && expert < i64(params.call.shape.num_experts);
  const u32 holder =
      is_valid ? static_cast<u32>(expert) / num_local_experts(params.call) : kNumRanks;
  u32 ranks = 0;
#pragma unroll
  for (u32 rank = 0; rank < kNumRanks; ++rank) {
    if (__any_sync(kFullWarp, holder == rank)) ranks |= 1u << rank;
  }
  return ranks & ~round.masked;
}

// Puts what a warp has of a granule where a rank finds it.
__device__ __forceinline__ void send_granule(const LowLatencyDispatchParams& params,
                                             const comm::Round& round, u32 rank, u32 token,
                                             u32 granule, const Sent& sent, bool in_cells) {
  const u32 at = granule * comm::kGranuleBytes + lane_index() * sizeof(Vec16),
            me = params.call.rank;
  const bool is_inside = at < data_bytes(params);
  if (in_cells) {
    u64* row = slab::cell_row(params.call.slabs, rank, round.slot, me, token);
    if (is_inside) comm::put_cells(row, at, sent.values, round.epoch);
    put_scales(params, granule, sent.scale, [&](u32 index, u32 scale) {
      comm::put_cell(row, data_bytes(params) + index * sizeof(u32), scale, round.epoch);
    });
  } else {
    u8* to = slot_row(params, round, rank, me, token);
    if (is_inside) ptx::st_no_allocate_vec16(to + at, sent.values);
    put_scales(params, granule, sent.scale, [&](u32 index, u32 scale) {
      reinterpret_cast<u32*>(to + data_bytes(params))[index] = scale;
    });
  }
}

// Writes a part to some ranks. By all threads of a group.
__device__ __forceinline__ void send_part(const LowLatencyDispatchParams& params,
                                          const comm::Round& round, u32 item, u32 ranks,
                                          OwnPart* own, bool in_cells) {
  const u32 token = item / params.call.shape.num_parts;
  const comm::Granules granules = granules_of(params, item);
  u32 num_loaded = OwnPart::kUnroll;
#pragma unroll 1
  for (u32 granule = granules.begin + comm::warp_in_group(); granule < granules.end;
       granule += kGroupWarps) {
    if (num_loaded == 0) {
      load_granules(params, token, granule, granules.end, own);
      num_loaded = OwnPart::kUnroll;
    }
    const Sent sent = prepare(params, own->loaded[0]);
    // Those behind it move up: the cast, which is long, is there once.
#pragma unroll
    for (u32 j = 0; j + 1 < OwnPart::kUnroll; ++j) own->loaded[j] = own->loaded[j + 1];
    --num_loaded;
#pragma unroll 1
    for (u32 rank = 0; rank < kNumRanks; ++rank) {
      if ((ranks >> rank) & 1) send_granule(params, round, rank, token, granule, sent, in_cells);
    }
  }
}

// Sends all rows of this rank. own: the group's first part. By senders; each group for itself.
__device__ inline void send_rows(const LowLatencyDispatchParams& params, const comm::Round& round,
                                 OwnPart* own) {
  const comm::LowLatencyCall& call = params.call;
  const u32 num_items = call.shape.num_tokens * call.shape.num_parts;
  const bool in_cells = uses_cells(params, call.shape.num_tokens);
#pragma unroll 1
  for (u32 n = 0; own_item(n) < num_items; ++n) {
    const u32 item = own_item(n);
    if (n > 0) load_part(params, item, own);
    const u32 ranks = ranks_of(params, round, own->expert);
    if (ranks == 0) continue;
    send_part(params, round, item, ranks, own, in_cells);
    if (in_cells) continue;
    comm::group_barrier();
    if (comm::warp_in_group() == 0 && lane_index() < kNumRanks && (ranks >> lane_index()) & 1) {
      ptx::st_release_sys_u32(slab::flags(call.slabs, lane_index(), round.slot, call.rank) + item,
                              round.epoch);
    }
  }
}

}  // namespace epcomm
