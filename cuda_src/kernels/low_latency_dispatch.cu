// Sends each token's row once to every rank that holds one of its experts, and gives it to these.
//
// In:   rows [num_tokens, hidden] bf16, choices [num_tokens, num_topk] i32 or i64, -1 for none.
// Out:  recv_rows [local experts, num_recv_rows, hidden] bf16, or e4m3 with recv_scales [local
//       experts, scales of a row, num_recv_rows]; an expert's rows by source rank, then token;
//       recv_count [local experts], src_info [local experts, num_recv_rows] with -1 behind the
//       rows, layout_range [local experts, kNumRanks] begin << 32 | count. Received rows are added
//       to recv_stats, waiting times to wait_stats.
// Grid: at most as many blocks as fit at once, of kNumGroups groups of kGroupWarps warps.
//
// Every rank gets all tables of choices. A row, cast to fp8 on its way, goes into this rank's line
// of the slot at each receiver, at the token's index, with its scales behind it. A group sends a
// part of a row and raises its flag; another fetches it from the slot and writes it to all experts
// that it is for. Rows of a rank with few tokens cross as cells, without flags. See
// comm/low_latency.cuh for the ordering.
//
// A source that is masked before its tables are seen gives nothing. One that dies between its table
// and its rows leaves rows that are zeros in whole or in part, in this call only.
#include "comm/choice_tables.cuh"
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

// --- sending -----------------------------------------------------------------------------------

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
template <bool kInCells>
__device__ __forceinline__ void send_granule(const LowLatencyDispatchParams& params,
                                             const comm::Round& round, u32 rank, u32 token,
                                             u32 granule, const Sent& sent) {
  const u32 at = granule * comm::kGranuleBytes + lane_index() * sizeof(Vec16),
            me = params.call.rank;
  const bool is_inside = at < data_bytes(params);
  if (kInCells) {
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
template <bool kInCells>
__device__ inline void send_part(const LowLatencyDispatchParams& params, const comm::Round& round,
                                 u32 item, u32 ranks, OwnPart* own) {
  const u32 token = item / params.call.shape.num_parts;
  const comm::Granules granules = granules_of(params, item);
  for (u32 first = granules.begin + comm::warp_in_group(); first < granules.end;) {
#pragma unroll
    for (u32 j = 0; j < OwnPart::kUnroll; ++j) {
      const u32 granule = first + j * kGroupWarps;
      if (granule >= granules.end) continue;
      const Sent sent = prepare(params, own->loaded[j]);
#pragma unroll
      for (u32 i = 0; i < kNumRanks; ++i) {
        if ((ranks >> i) & 1) send_granule<kInCells>(params, round, i, token, granule, sent);
      }
    }
    first += OwnPart::kUnroll * kGroupWarps;
    load_granules(params, token, first, granules.end, own);
  }
}

// Sends all rows of this rank. own: the group's first part. By all threads.
__device__ inline void send_rows(const LowLatencyDispatchParams& params, const comm::Round& round,
                                 OwnPart* own) {
  const comm::LowLatencyCall& call = params.call;
  const u32 num_items = call.shape.num_tokens * call.shape.num_parts;
  for (u32 n = 0; own_item(n) < num_items; ++n) {
    const u32 item = own_item(n);
    if (n > 0) load_part(params, item, own);
    const u32 ranks = ranks_of(params, round, own->expert);
    if (ranks == 0) continue;
    if (uses_cells(params, call.shape.num_tokens)) {
      send_part<true>(params, round, item, ranks, own);
      continue;
    }
    send_part<false>(params, round, item, ranks, own);
    comm::group_barrier();
    if (comm::warp_in_group() == 0 && lane_index() < kNumRanks && (ranks >> lane_index()) & 1) {
      ptx::st_release_sys_u32(slab::flags(call.slabs, lane_index(), round.slot, call.rank) + item,
                              round.epoch);
    }
  }
}

// --- receiving ---------------------------------------------------------------------------------

// Whether a source takes part in this call: the first block to know says so, and all follow.
__device__ inline bool decide(const comm::LowLatencyCall& call, u32 epoch, u32 source,
                              bool is_here) {
  u64* verdict = &call.state->verdicts[source];
  u64 before = *static_cast<volatile u64*>(verdict);
  while (static_cast<u32>(before >> 32) != epoch) {
    const u64 found = atomicCAS(verdict, before, comm::cell_of(epoch, is_here));
    if (found == before) return is_here;
    before = found;
  }
  return (before & 1) != 0;
}

// In shared memory.
struct Sources {
  comm::LowLatencyShape headers[kNumRanks];
  comm::Arrivals arrivals;
  u32 taking_part;  // as bits
  u32 num_entries;
  u16 kept[kKeptEntries];  // all sources' choices, where they are no more
};

// Counts the rows of some sources, those whose tables arrive, for each local expert. By all
// threads; false, to all of them, where the call has failed.
__device__ inline bool count_rows(const LowLatencyDispatchParams& params, const comm::Round& round,
                                  u32 wanted, Sources* sources, u32* counts) {
  const comm::LowLatencyCall& call = params.call;
  const u32 num_local = num_local_experts(call), num_topk = call.shape.num_topk;
  comm::Arrivals* arrivals = &sources->arrivals;
  for (u32 i = threadIdx.x; i < kNumRanks * num_local; i += blockDim.x) counts[i] = 0;
  if (threadIdx.x == 0) *arrivals = {~wanted, 0};
  __syncthreads();
  if (!comm::read_headers(call, round, wanted, sources->headers, arrivals)) return false;
  u32 ends[kNumRanks], end = 0;
#pragma unroll
  for (u32 source = 0; source < kNumRanks; ++source) {
    end += sources->headers[source].num_tokens * num_topk;
    ends[source] = end;
  }
  if (threadIdx.x == 0) sources->num_entries = end;
  auto source_of = [&ends](u32 i, u32* begin) {
    u32 source = 0;
    *begin = 0;
#pragma unroll
    for (u32 s = 0; s + 1 < kNumRanks; ++s) {
      if (i >= ends[s]) {
        source = s + 1;
        *begin = ends[s];
      }
    }
    return source;
  };
  comm::read_entries<false>(
      call, round, 0, end, arrivals,
      [&](u32 i, u32* whose) {
        u32 begin;
        *whose = source_of(i, &begin);
        return slab::table(call.slabs, call.rank, round.slot, *whose) +
               (i - begin) * slab::kEntryWords;
      },
      [&](u32 i, i32 expert, u32) {
        const u32 local = static_cast<u32>(expert) - call.rank * num_local;
        const bool is_here = expert >= 0 && local < num_local;
        if (i < kKeptEntries) sources->kept[i] = is_here ? static_cast<u16>(local) : comm::kNotHere;
        if (!is_here) return;
        u32 begin;
        atomicAdd(&counts[source_of(i, &begin) * num_local + local], 1u);
      });
  __syncthreads();
  return arrivals->has_failed == 0;
}

// Finds the sources that take part, and counts their rows. By all threads; false, to all of them,
// where the call has failed.
__device__ __noinline__ bool find_sources(const LowLatencyDispatchParams& params,
                                          const comm::Round& round, Sources* sources, u32* counts) {
  const comm::LowLatencyCall& call = params.call;
  constexpr u32 kAll = (1u << kNumRanks) - 1;
  u32 wanted = kAll & ~round.masked;
  while (true) {
    if (!count_rows(params, round, wanted, sources, counts)) return false;
    const u32 seen = kAll & ~sources->arrivals.missing;
    if (!call.can_mask) return true;
    if (warp_index() == 0) {
      const u32 source = lane_index();
      bool takes_part = false;
      if (source < kNumRanks) {
        takes_part = decide(call, round.epoch, source, (seen >> source) & 1);
        if (!takes_part && source != call.rank) comm::mask(call, source);
      }
      const u32 bits = __ballot_sync(kFullWarp, takes_part);
      if (source == 0) sources->taking_part = bits;
    }
    __syncthreads();
    const u32 taking_part = sources->taking_part;
    // Another block may have seen a source that this one did not wait for long enough: it is there
    // now. And what came of a source that is missing was counted: not the next time.
    const bool has_all = taking_part == seen && taking_part == wanted;
    __syncthreads();
    if (has_all) return true;
    wanted = taking_part;
  }
}

// Tells how many rows every expert got, and from whom. By all threads of a block.
__device__ inline void write_counts(const LowLatencyDispatchParams& params, const u32* counts) {
  const u32 num_local = num_local_experts(params.call);
  for (u32 expert = threadIdx.x; expert < num_local; expert += blockDim.x) {
    u32 begin = 0;
    for (u32 source = 0; source < kNumRanks; ++source) {
      const u32 count = counts[source * num_local + expert];
      params.layout_range[expert * kNumRanks + source] =
          static_cast<i64>(comm::cell_of(begin, count));
      begin += count;
    }
    params.recv_count[expert] = static_cast<i32>(begin);
    if (params.recv_stats != nullptr) params.recv_stats[expert] += static_cast<i32>(begin);
  }
}

// Marks the places behind every expert's rows. By all threads.
__device__ inline void fill_tails(const LowLatencyDispatchParams& params, const u32* counts) {
  const u32 num_local = num_local_experts(params.call);
  const u32 num_rows = comm::num_recv_rows(params.call);
  for (u32 expert = blockIdx.x; expert < num_local; expert += gridDim.x) {
    u32 end = 0;
    for (u32 source = 0; source < kNumRanks; ++source) end += counts[source * num_local + expert];
    for (u32 row = end + threadIdx.x; row < num_rows; row += blockDim.x) {
      params.src_info[u64(expert) * num_rows + row] = -1;
    }
  }
}

// Writes a vector of a row's values to all experts that it is for.
__device__ __forceinline__ void give_values(const LowLatencyDispatchParams& params,
                                            const comm::Part& part, u32 at, const Vec16& v) {
  const u64 num_rows = comm::num_recv_rows(params.call), row_bytes = data_bytes(params);
  for (u32 i = 0; i < part.num_choices; ++i) {
    const comm::Choice& choice = part.choices[i];
    u8* to = params.recv_rows + (choice.expert * num_rows + choice.row) * row_bytes;
    ptx::st_no_allocate_vec16(to + at, v);
  }
}

// The same with a word of its scales.
__device__ __forceinline__ void give_scale(const LowLatencyDispatchParams& params,
                                           const comm::Part& part, u32 index, u32 scale) {
  const u64 num_rows = comm::num_recv_rows(params.call);
  for (u32 i = 0; i < part.num_choices; ++i) {
    const comm::Choice& choice = part.choices[i];
    const u64 line = u64(choice.expert) * params.num_scales + index;
    params.recv_scales[line * num_rows + choice.row] = scale;
  }
}

// What a thread of a group has of a part: vectors from first on, kStep apart, and words of scales.
struct Share {
  static constexpr u32 kStep = kGroupWarps * comm::kGranuleBytes;
  u32 first;
  u32 end;
  u32 first_scale;
  u32 end_scale;
};

__device__ __forceinline__ Share share_of(const LowLatencyDispatchParams& params,
                                          const comm::Part& part) {
  const comm::Granules granules = comm::granules_of(data_bytes(params), part.index, part.num_parts);
  const u32 thread = comm::warp_in_group() * kWarpSize + lane_index();
  const u32 number = scales_of_granule(params);
  return {granules.begin * comm::kGranuleBytes + thread * static_cast<u32>(sizeof(Vec16)),
          min_of<u32>(granules.end * comm::kGranuleBytes, data_bytes(params)),
          granules.begin * number + thread, min_of(granules.end * number, params.num_scales)};
}

// Receives a part from the slot. By all threads of a group.
__device__ __forceinline__ void receive_from_slot(const LowLatencyDispatchParams& params,
                                                  const comm::Round& round,
                                                  const comm::Part& part) {
  constexpr u32 kUnroll = 4;
  const comm::LowLatencyCall& call = params.call;
  const comm::Outcome outcome =
      comm::await_part(call, round, part.source, part.source, part.item());
  if (outcome == comm::Outcome::kFailed) return;
  const bool is_here = outcome == comm::Outcome::kArrived;
  const u8* row = slot_row(params, round, call.rank, part.source, part.token);
  const Share share = share_of(params, part);
  for (u32 first = share.first; first < share.end; first += kUnroll * Share::kStep) {
    Vec16 v[kUnroll] = {};
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      if (is_here && first + j * Share::kStep < share.end) {
        v[j] = ptx::ld_no_allocate_vec16(row + first + j * Share::kStep);
      }
    }
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      if (first + j * Share::kStep < share.end) {
        give_values(params, part, first + j * Share::kStep, v[j]);
      }
    }
  }
  const u32* scales = reinterpret_cast<const u32*>(row + data_bytes(params));
  for (u32 k = share.first_scale; k < share.end_scale; k += comm::kGroupThreads) {
    give_scale(params, part, k, is_here ? scales[k] : 0);
  }
}

// Receives a part that comes in cells; zeros for what does not come. By all threads of a group.
__device__ __forceinline__ void receive_cells(const LowLatencyDispatchParams& params,
                                              const comm::Round& round, const comm::Part& part) {
  constexpr u32 kUnroll = 2;
  const comm::LowLatencyCall& call = params.call;
  u64* row = slab::cell_row(call.slabs, call.rank, round.slot, part.source, part.token);
  const Share share = share_of(params, part);
  // All that a thread has of the scales, as a rule: on its way with the values.
  const bool has_scale = share.first_scale < share.end_scale;
  const u64* scale_cell = comm::cell_at(row, data_bytes(params) + share.first_scale * sizeof(u32));
  const u64 scale = has_scale ? ptx::ld_relaxed_sys_u64(scale_cell) : 0;
  bool is_missing = false;
  for (u32 first = share.first; first < share.end; first += kUnroll * Share::kStep) {
    comm::VecCells seen[kUnroll];
    while (true) {
      const u64* late = nullptr;
#pragma unroll
      for (u32 j = 0; j < kUnroll; ++j) {
        const u32 at = first + j * Share::kStep;
        if (at < share.end) seen[j] = comm::look_at_cells(row, at);
      }
#pragma unroll
      for (u32 j = 0; j < kUnroll; ++j) {
        const u32 at = first + j * Share::kStep;
        if (late == nullptr && at < share.end) {
          late = comm::late_cell(row, at, seen[j], round.epoch);
        }
      }
      if (late == nullptr || is_missing) break;
      const comm::Outcome outcome = comm::await_cell(call, round, part.source, late);
      if (outcome == comm::Outcome::kFailed) return;
      is_missing = outcome == comm::Outcome::kMissing;
    }
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      const u32 at = first + j * Share::kStep;
      if (at < share.end)
        give_values(params, part, at, is_missing ? Vec16{} : comm::words_of(seen[j]));
    }
  }
  for (u32 k = share.first_scale; k < share.end_scale; k += comm::kGroupThreads) {
    comm::Awaited found = {comm::Outcome::kArrived, static_cast<u32>(scale)};
    if (k != share.first_scale || static_cast<u32>(scale >> 32) != round.epoch) {
      const u64* cell = comm::cell_at(row, data_bytes(params) + k * sizeof(u32));
      found = comm::await(call, comm::kLowLatencyCells, part.source, round.epoch, cell);
    }
    if (found.outcome == comm::Outcome::kFailed) return;
    give_scale(params, part, k, found.word);
  }
}

// Receives parts of a source's rows for all experts that they are for. By all threads.
__device__ __forceinline__ void receive_parts(const LowLatencyDispatchParams& params,
                                              const comm::Round& round, comm::Parts parts,
                                              bool are_in_cells) {
  for (u32 item = parts.begin + comm::group_index(); item < parts.end; item += kNumGroups) {
    const comm::Part part = parts.part(item);
    if (part.num_choices == 0) continue;
    if (are_in_cells) {
      receive_cells(params, round, part);
    } else {
      receive_from_slot(params, round, part);
    }
    const u32 thread = comm::warp_in_group() * kWarpSize + lane_index();
    if (part.index == 0 && thread < part.num_choices) {
      const comm::Choice& choice = part.choices[thread];
      const u64 line = u64(choice.expert) * comm::num_recv_rows(params.call);
      params.src_info[line + choice.row] = static_cast<i32>(part.token);
    }
  }
}

}  // namespace epcomm

extern "C" __global__ void __launch_bounds__(epcomm::comm::kLowLatencyThreads, 1)
    epcomm_low_latency_dispatch(const __grid_constant__ epcomm::LowLatencyDispatchParams params) {
  using namespace epcomm;
  // Span[local experts], then u32[kNumRanks][local experts]: rows from each source.
  extern __shared__ __align__(128) u8 shared_memory[];
  __shared__ Sources sources;
  __shared__ comm::Chunk chunk;
  const comm::LowLatencyCall& call = params.call;
  __shared__ comm::Round round;
  // What is sent first is read while the call begins.
  OwnPart own;
  if (call.phases & comm::kSends) load_part(params, own_item(0), &own);
  if (!comm::begin(call, &round)) return;
  if (call.phases & comm::kSends) {
    comm::send_tables(call, round, params.topk_idx, params.is_64_bit, nullptr);
    send_rows(params, round, &own);
  }
  if (call.phases & comm::kReceives) {
    const u32 num_local = num_local_experts(call);
    comm::Span* spans = reinterpret_cast<comm::Span*>(shared_memory);
    u32* counts = reinterpret_cast<u32*>(spans + num_local);
    if (find_sources(params, round, &sources, counts)) {
      if (blockIdx.x == 0) write_counts(params, counts);
      fill_tails(params, counts);
      comm::for_each_part<false>(
          call, round, ~sources.arrivals.missing, sources.headers,
          sources.num_entries <= kKeptEntries ? sources.kept : nullptr, spans, &chunk,
          &sources.arrivals,
          [=](u32 source, u32 expert) {
            u32 begin = 0;
            for (u32 s = 0; s < source; ++s) begin += counts[s * num_local + expert];
            return comm::Span{begin, comm::kNoRow};
          },
          [&](const comm::Parts& parts) {
            const u32 num_tokens = sources.headers[parts.source].num_tokens;
            receive_parts(params, round, parts, uses_cells(params, num_tokens));
          });
    }
  }
  comm::finish(call, round);
}
