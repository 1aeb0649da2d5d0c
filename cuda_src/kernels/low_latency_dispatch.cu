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
// that it is for. See comm/low_latency.cuh for the ordering.
//
// A source that is masked before its tables are seen gives nothing. One that dies between its table
// and its rows leaves rows of zeros, in this call only.
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

// Puts a granule's scales behind the row's values.
__device__ __forceinline__ void send_scales(const LowLatencyDispatchParams& params, u8* to,
                                            u32 granule, u32 scale) {
  const u32 number = scales_of_granule(params), step = kWarpSize / number;
  const u32 index = granule * number + lane_index() / step;
  if (lane_index() % step != 0 || index >= params.num_scales) return;
  reinterpret_cast<u32*>(to + data_bytes(params))[index] = scale;
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

__device__ __forceinline__ void send_scales(const LowLatencyDispatchParams&, u8*, u32, u32) {}

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

// Writes a part into the slots of some ranks. By all threads of a group.
__device__ inline void send_part(const LowLatencyDispatchParams& params, const comm::Round& round,
                                 u32 item, u32 ranks, OwnPart* own) {
  const u32 token = item / params.call.shape.num_parts, me = params.call.rank;
  const comm::Granules granules = granules_of(params, item);
  for (u32 first = granules.begin + comm::warp_in_group(); first < granules.end;) {
#pragma unroll
    for (u32 j = 0; j < OwnPart::kUnroll; ++j) {
      const u32 granule = first + j * kGroupWarps;
      if (granule >= granules.end) continue;
      const u32 at = granule * comm::kGranuleBytes + lane_index() * sizeof(Vec16);
      const Sent sent = prepare(params, own->loaded[j]);
#pragma unroll
      for (u32 i = 0; i < kNumRanks; ++i) {
        if (((ranks >> i) & 1) == 0) continue;
        u8* to = slot_row(params, round, i, me, token);
        if (at < data_bytes(params)) ptx::st_no_allocate_vec16(to + at, sent.values);
        send_scales(params, to, granule, sent.scale);
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
    send_part(params, round, item, ranks, own);
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
        if (expert < 0 || local >= num_local) return;
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
    // Another block saw a source that this one did not wait for long enough: it is there now.
    const bool has_all = (taking_part & ~seen) == 0 && (seen & ~taking_part) == 0;
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

// Writes a part of a row to all experts that it is for. By all threads of a group.
__device__ inline void receive_part(const LowLatencyDispatchParams& params,
                                    const comm::Round& round, const comm::Part& part) {
  constexpr u32 kUnroll = 4;
  const comm::LowLatencyCall& call = params.call;
  if (part.num_choices == 0) return;
  const comm::Outcome outcome =
      comm::await_part(call, round, part.source, part.source, part.item());
  if (outcome == comm::Outcome::kFailed) return;
  const bool is_here = outcome == comm::Outcome::kArrived;
  const u32 num_rows = comm::num_recv_rows(call), row_bytes = data_bytes(params);
  const u8* row = slot_row(params, round, call.rank, part.source, part.token);
  const comm::Granules granules = comm::granules_of(row_bytes, part.index, part.num_parts);
  const u32 end = min_of<u32>(granules.end * comm::kGranuleBytes, row_bytes);
  constexpr u32 kStep = kGroupWarps * comm::kGranuleBytes;
  const u32 thread = comm::warp_in_group() * kWarpSize + lane_index();
  for (u32 first = granules.begin * comm::kGranuleBytes + thread * sizeof(Vec16); first < end;
       first += kUnroll * kStep) {
    Vec16 v[kUnroll] = {};
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      if (is_here && first + j * kStep < end) {
        v[j] = ptx::ld_no_allocate_vec16(row + first + j * kStep);
      }
    }
    for (u32 i = 0; i < part.num_choices; ++i) {
      const comm::Choice& choice = part.choices[i];
      u8* to = params.recv_rows + (u64(choice.expert) * num_rows + choice.row) * row_bytes;
#pragma unroll
      for (u32 j = 0; j < kUnroll; ++j) {
        if (first + j * kStep < end) ptx::st_no_allocate_vec16(to + first + j * kStep, v[j]);
      }
    }
  }
#if kIsFp8
  const u32* scales = reinterpret_cast<const u32*>(row + row_bytes);
  const u32 number = scales_of_granule(params);
  const u32 end_scale = min_of(granules.end * number, params.num_scales);
  for (u32 k = granules.begin * number + thread; k < end_scale; k += comm::kGroupThreads) {
    const u32 scale = is_here ? scales[k] : 0;
    for (u32 i = 0; i < part.num_choices; ++i) {
      const comm::Choice& choice = part.choices[i];
      params.recv_scales[(u64(choice.expert) * params.num_scales + k) * num_rows + choice.row] =
          scale;
    }
  }
#endif
  if (part.index == 0 && thread < part.num_choices) {
    const comm::Choice& choice = part.choices[thread];
    params.src_info[u64(choice.expert) * num_rows + choice.row] = static_cast<i32>(part.token);
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
          call, round, ~sources.arrivals.missing, sources.headers, spans, &chunk, &sources.arrivals,
          [=](u32 source, u32 expert) {
            u32 begin = 0;
            for (u32 s = 0; s < source; ++s) begin += counts[s * num_local + expert];
            return comm::Span{begin, comm::kNoRow};
          },
          [&](const comm::Part& part) { receive_part(params, round, part); });
    }
  }
  comm::finish(call, round);
}
