// Brings experts' rows back to their tokens' ranks and sums them, weighted.
//
// In:   rows [local experts, num_recv_rows, hidden] bf16 and layout_range from dispatch; choices
//       [num_tokens, num_topk] i32 or i64, weights [num_tokens, num_topk] f32 of this rank's
//       tokens.
// Out:  sums [num_tokens, hidden] bf16; waiting times are added to wait_stats.
// Grid: at most as many blocks as fit at once, of kNumGroups groups of kGroupWarps warps.
//
// Every rank gets all tables of choices and weights, finds the rows of each source's tokens, and
// sends into the slot at the source:
//   by rank:   one row a token, in its own line: its experts' weighted rows summed in fp32, choices
//              ascending, and rounded to bf16; the source sums ranks in fp32, ascending
//   by expert: every expert's row as it is, in the choice's line; the source sums in fp32, choices
//              ascending
// The source rounds once more, to bf16. By rank, rows of a source with few tokens cross as cells,
// without flags. See comm/low_latency.cuh for the ordering.
//
// A source's own table tells it whom to wait for: what the caller passed may have changed by then.
#include "comm/choice_tables.cuh"
#include "comm/few_choices.cuh"
#include "comm/low_latency.cuh"
#include "comm/row_parts.cuh"
#include "common/types.cuh"
#include "ptx/convert.cuh"

namespace epcomm {

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

// The vectors of a part that a thread of its group has: from first, kStep apart, below end.
struct Vectors {
  u32 first;
  u32 end;
};

constexpr u32 kStep = kGroupWarps * comm::kGranuleBytes;

__device__ __forceinline__ Vectors vectors_of(const LowLatencyCombineParams& params, u32 part,
                                              u32 num_parts) {
  const u32 row_bytes = row_bytes_of(params);
  const comm::Granules granules = comm::granules_of(row_bytes, part, num_parts);
  const u32 thread = comm::warp_in_group() * kWarpSize + lane_index();
  return {granules.begin * comm::kGranuleBytes + thread * static_cast<u32>(sizeof(Vec16)),
          min_of<u32>(granules.end * comm::kGranuleBytes, row_bytes)};
}

// --- sending -----------------------------------------------------------------------------------

__device__ __forceinline__ const u8* expert_row(const LowLatencyCombineParams& params,
                                                const comm::Choice& choice) {
  const u64 index = u64(choice.expert) * comm::num_recv_rows(params.call) + choice.row;
  return params.rows + index * row_bytes_of(params);
}

// Whether a source's rows cross as cells.
__device__ __forceinline__ bool uses_cells(const LowLatencyCombineParams& params, u32 num_tokens) {
  return params.call.shape.format == kByRank && comm::uses_cells(num_tokens, row_bytes_of(params));
}

// Sends the weighted sums of a part's rows. So many rows are on their way together, and so many
// vectors of each: one after the other they take as much longer.
template <u32 kRows, u32 kUnroll>
__device__ __forceinline__ void send_sums(const LowLatencyCombineParams& params,
                                          const comm::Round& round, const comm::Part& part,
                                          bool is_in_cells) {
  const comm::LowLatencyCall& call = params.call;
  u64* cells =
      slab::cell_row(call.slabs, part.source, round.slot, call.rank, is_in_cells ? part.token : 0);
  u8* to = slot_row(params, round, part.source, call.rank, part.token);
  const Vectors vectors = vectors_of(params, part.index, part.num_parts);
#pragma unroll 1
  for (u32 at = vectors.first; at < vectors.end; at += kUnroll * kStep) {
    Sums sums[kUnroll];
#pragma unroll 1
    for (u32 first = 0; first < part.num_choices; first += kRows) {
      const comm::Choice* choices = part.choices + first;
      const u32 number = min_of(kRows, part.num_choices - first);
      Vec16 v[kRows][kUnroll];
#pragma unroll
      for (u32 i = 0; i < kRows; ++i) {
        if (i >= number || choices[i].row == comm::kNoRow) continue;
        const u8* row = expert_row(params, choices[i]);
#pragma unroll
        for (u32 j = 0; j < kUnroll; ++j) {
          if (at + j * kStep < vectors.end) {
            v[i][j] = ptx::ld_no_allocate_vec16(row + at + j * kStep);
          }
        }
      }
#pragma unroll
      for (u32 i = 0; i < kRows; ++i) {
        if (i >= number || choices[i].row == comm::kNoRow) continue;
#pragma unroll
        for (u32 j = 0; j < kUnroll; ++j) {
          if (at + j * kStep < vectors.end) {
            sums[j].add(v[i][j], ptx::as_float(choices[i].weight));
          }
        }
      }
    }
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      if (at + j * kStep >= vectors.end) continue;
      if (is_in_cells) {
        comm::put_cells(cells, at + j * kStep, sums[j].rounded(), round.epoch);
      } else {
        ptx::st_no_allocate_vec16(to + at + j * kStep, sums[j].rounded());
      }
    }
  }
}

__device__ inline void send_row(const LowLatencyCombineParams& params, const comm::Part& part,
                                const comm::Choice& choice, u8* to) {
  constexpr u32 kUnroll = 4;
  const Vectors vectors = vectors_of(params, part.index, part.num_parts);
  const bool is_here = choice.row != comm::kNoRow;
  const u8* row = is_here ? expert_row(params, choice) : nullptr;
#pragma unroll 1
  for (u32 at = vectors.first; at < vectors.end; at += kUnroll * kStep) {
    Vec16 v[kUnroll] = {};
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      if (is_here && at + j * kStep < vectors.end) {
        v[j] = ptx::ld_no_allocate_vec16(row + at + j * kStep);
      }
    }
#pragma unroll
    for (u32 j = 0; j < kUnroll; ++j) {
      if (at + j * kStep < vectors.end) ptx::st_no_allocate_vec16(to + at + j * kStep, v[j]);
    }
  }
}

// Sends what this rank's experts have for a part of a source's token. By all threads of a group.
__device__ __forceinline__ void send_part(const LowLatencyCombineParams& params,
                                          const comm::Round& round, const comm::Part& part,
                                          bool is_in_cells) {
  const comm::LowLatencyCall& call = params.call;
  const bool is_by_rank = call.shape.format == kByRank;
  if (is_by_rank) {
    send_sums<4, 2>(params, round, part, is_in_cells);
    if (is_in_cells) return;
  } else {
#pragma unroll 1
    for (u32 i = 0; i < part.num_choices; ++i) {
      const comm::Choice& choice = part.choices[i];
      send_row(params, part, choice, slot_row(params, round, part.source, choice.k, part.token));
    }
  }
  comm::group_barrier();
  if (comm::warp_in_group() != 0 || lane_index() >= (is_by_rank ? 1 : part.num_choices)) return;
  const u32 line = is_by_rank ? call.rank : part.choices[lane_index()].k;
  ptx::st_release_sys_u32(slab::flags(call.slabs, part.source, round.slot, line) + part.item(),
                          round.epoch);
}

// Sends parts of a source's rows. By all threads.
__device__ __forceinline__ void send_parts(const LowLatencyCombineParams& params,
                                           const comm::Round& round, comm::Parts parts,
                                           bool are_in_cells) {
#pragma unroll 1
  for (u32 item = parts.begin + comm::group_index(); item < parts.end; item += kNumGroups) {
    const comm::Part part = parts.part(item);
    if (part.num_choices > 0) send_part(params, round, part, are_in_cells);
  }
}

// --- receiving ---------------------------------------------------------------------------------

// Lines that a token's rows come in, by lane: whom from, and with what weight.
struct Line {
  bool is_used;
  u32 holder;
  float weight;
};

// This lane's line of a token, of which it has a choice. By all lanes of a warp.
__device__ __forceinline__ Line line_of(const comm::LowLatencyCall& call, u32 expert, u32 weight) {
  const u32 lane = lane_index();
  const bool is_chosen = static_cast<i32>(expert) >= 0;
  const u32 holder = is_chosen ? expert / num_local_experts(call) : kNumRanks;
  if (call.shape.format == kByExpert) return {is_chosen, holder, ptx::as_float(weight)};
  u32 ranks = 0;
#pragma unroll
  for (u32 rank = 0; rank < kNumRanks; ++rank) {
    if (__any_sync(kFullWarp, holder == rank)) ranks |= 1u << rank;
  }
  return {lane < kNumRanks && ((ranks >> lane) & 1) != 0, lane, 1.0f};
}

// Reads a token's choices, as this rank sent them to itself. By all lanes of a warp.
__device__ inline Line own_line(const LowLatencyCombineParams& params, const comm::Round& round,
                                u32 token) {
  const comm::LowLatencyCall& call = params.call;
  const u32 lane = lane_index(), num_topk = call.shape.num_topk;
  u32 expert = ~0u, weight = 0;
  if (lane < num_topk) {
    const u64* cells = slab::table(call.slabs, call.rank, round.slot, call.rank) +
                       (token * num_topk + lane) * slab::kEntryWords;
    const ptx::U64Pair entry = ptx::ld_relaxed_sys_u64x2(cells);
    comm::Awaited found[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      found[i] = {comm::Outcome::kArrived, static_cast<u32>(entry.value[i])};
      if (static_cast<u32>(entry.value[i] >> 32) != round.epoch) {
        found[i] =
            comm::await_slowly(call, comm::kLowLatencyTables, call.rank, round.epoch, cells + i);
      }
    }
    if (found[0].outcome == comm::Outcome::kArrived) expert = found[0].word;
    weight = found[1].word;
  }
  return line_of(call, expert, weight);
}

// Sums a part of one of this rank's tokens whose rows come in cells, from the ranks of `lines`. By
// all threads of a group.
__device__ __forceinline__ void sum_cells(const LowLatencyCombineParams& params,
                                          const comm::Round& round, u32 item, u32 lines) {
  constexpr u32 kBatch = 4;
  const comm::LowLatencyCall& call = params.call;
  const u32 num_parts = call.shape.num_parts, token = item / num_parts;
  u8* out = params.out + u64(token) * row_bytes_of(params);
  const Vectors vectors = vectors_of(params, item % num_parts, num_parts);
#pragma unroll 1
  for (u32 at = vectors.first; at < vectors.end; at += kStep) {
    Sums sums;
#pragma unroll
    for (u32 first = 0; first < kNumRanks; first += kBatch) {
      comm::VecCells seen[kBatch];
      while (true) {
        const u64* late = nullptr;
        u32 peer = 0;
#pragma unroll
        for (u32 rank = first; rank < first + kBatch && rank < kNumRanks; ++rank) {
          if (((lines >> rank) & 1) == 0) continue;
          u64* row = slab::cell_row(call.slabs, call.rank, round.slot, rank, token);
          seen[rank - first] = comm::look_at_cells(row, at);
        }
#pragma unroll
        for (u32 rank = first; rank < first + kBatch && rank < kNumRanks; ++rank) {
          if (late != nullptr || ((lines >> rank) & 1) == 0) continue;
          u64* row = slab::cell_row(call.slabs, call.rank, round.slot, rank, token);
          late = comm::late_cell(row, at, seen[rank - first], round.epoch);
          peer = rank;
        }
        if (late == nullptr) break;
        const comm::Outcome outcome = comm::await_cell(call, round, peer, late);
        if (outcome == comm::Outcome::kFailed) return;
        if (outcome == comm::Outcome::kMissing) lines &= ~(1u << peer);
      }
#pragma unroll
      for (u32 rank = first; rank < first + kBatch && rank < kNumRanks; ++rank) {
        if ((lines >> rank) & 1) sums.add(comm::words_of(seen[rank - first]));
      }
    }
    ptx::st_no_allocate_vec16(out + at, sums.rounded());
  }
}

// Sums a part of one of this rank's tokens. By all threads of a group; each warp for itself.
__device__ __forceinline__ void sum_part(const LowLatencyCombineParams& params,
                                         const comm::Round& round, u32 item) {
  const comm::LowLatencyCall& call = params.call;
  const u32 num_parts = call.shape.num_parts, token = item / num_parts;
  const Line line = own_line(params, round, token);
  const bool is_in_cells = uses_cells(params, call.shape.num_tokens);
  comm::Outcome outcome = comm::Outcome::kMissing;
  if (line.is_used && ((round.masked >> line.holder) & 1) == 0) {
    outcome = comm::Outcome::kArrived;
    if (!is_in_cells) {
      const u32* flag = slab::flags(call.slabs, call.rank, round.slot, lane_index()) + item;
      outcome = comm::await(call, comm::kLowLatencyRows, line.holder, round.epoch, flag).outcome;
    }
    if (outcome == comm::Outcome::kMissing) comm::mask(call, line.holder);
  }
  const u32 lines = __ballot_sync(kFullWarp, outcome == comm::Outcome::kArrived);
  __syncwarp();  // a vote orders no memory: what one lane acquired, all will read
  if (__any_sync(kFullWarp, outcome == comm::Outcome::kFailed)) return;
  if (is_in_cells) {
    sum_cells(params, round, item, lines);
    return;
  }
  const u64 line_bytes = u64(call.shape.num_max_tokens) * row_bytes_of(params);
  const u8* rows = slot_row(params, round, call.rank, 0, token);
  u8* out = params.out + u64(token) * row_bytes_of(params);
  const Vectors vectors = vectors_of(params, item % num_parts, num_parts);
  const bool is_by_rank = call.shape.format == kByRank;
  // All lanes go round alike: weights come from other lanes.
#pragma unroll 1
  for (u32 at = vectors.first; __any_sync(kFullWarp, at < vectors.end); at += kStep) {
    const bool is_inside = at < vectors.end;
    Sums sums;
    if (is_by_rank) {
      Vec16 v[kNumRanks];
#pragma unroll
      for (u32 rank = 0; rank < kNumRanks; ++rank) {
        if (is_inside && (lines >> rank) & 1) {
          v[rank] = ptx::ld_no_allocate_vec16(rows + rank * line_bytes + at);
        }
      }
#pragma unroll
      for (u32 rank = 0; rank < kNumRanks; ++rank) {
        if (is_inside && (lines >> rank) & 1) sums.add(v[rank]);
      }
    } else {
#pragma unroll 1
      for (u32 k = 0; k < call.shape.num_topk; ++k) {
        const float weight = __shfl_sync(kFullWarp, line.weight, k);
        if (is_inside && (lines >> k) & 1) {
          sums.add(ptx::ld_no_allocate_vec16(rows + k * line_bytes + at), weight);
        }
      }
    }
    if (is_inside) ptx::st_no_allocate_vec16(out + at, sums.rounded());
  }
}

// --- few tokens --------------------------------------------------------------------------------
//
// NOTE: from the headers on, calls with few tokens share no code with others: what only these need
// would be fetched with what those run.

__device__ __forceinline__ bool may_be_few(const LowLatencyCombineParams& params) {
  const comm::LowLatencyCall& call = params.call;
  return call.phases == (comm::kSends | comm::kReceives) && comm::may_be_few(call) &&
         uses_cells(params, call.shape.num_tokens) && call.shape.num_experts <= kKeptRanges;
}

// Keeps the choices of all sources. entry: the thread's first, as far as it was seen. By all
// threads; false, to all of them, where the call has failed.
__device__ __forceinline__ bool read_few(const comm::LowLatencyCall& call, const comm::Round& round,
                                         const comm::LowLatencyShape* headers,
                                         const ptx::U64Pair& entry, comm::Arrivals* arrivals,
                                         comm::Few* few) {
  return comm::read_few_entries<true>(
      call, round, headers, entry, arrivals, [&](u32 i, i32 expert, u32 weight) {
        few->expert[i] = static_cast<u32>(expert);
        few->weight[i] = weight;
        if (expert < 0) return;
        comm::keep(call, few, i, static_cast<u32>(expert) - call.rank * num_local_experts(call));
      });
}

// Sends all parts of all sources' rows where they are few. Returns which part of this rank's tokens
// the group sums first: others than those that send, where groups are enough. By all threads; each
// group for itself.
__device__ __forceinline__ u32 send_few(const LowLatencyCombineParams& params,
                                        const comm::Round& round,
                                        const comm::LowLatencyShape* headers, const u64* ranges,
                                        comm::Few* few) {
  const comm::LowLatencyCall& call = params.call;
  const u32 num_local = num_local_experts(call);
  const u32 end = few->first_item[kNumRanks], step = gridDim.x * kNumGroups;
  u32 i = blockIdx.x + gridDim.x * comm::group_index();
#pragma unroll 1
  for (; i < end; i += step) {
    const comm::Part part = comm::place_few(
        call, few, comm::few_item(call, *few, headers, i), [=](u32 source, u32 local, u32 entry) {
          const u64 range = ranges[local * kNumRanks + source];
          const u32 begin = static_cast<u32>(range >> 32), count = static_cast<u32>(range);
          const u32 row = begin + few->rows_before(num_local, local, entry) -
                          few->rows_before(num_local, local, few->first_entry[source]);
          // A row that dispatch did not give: the caller passes other choices than those.
          return row < min_of(begin + count, comm::num_recv_rows(call)) ? row : comm::kNoRow;
        });
    if (part.num_choices > 0) send_sums<8, 1>(params, round, part, true);
  }
  return i - end;
}

// This lane's line of a token, from choices that the block keeps. By all lanes of a warp.
__device__ __forceinline__ Line kept_line(const comm::LowLatencyCall& call, const comm::Few& few,
                                          u32 token) {
  const u32 lane = lane_index(), num_topk = call.shape.num_topk;
  const u32 entry = few.first_entry[call.rank] + token * num_topk + lane;
  return line_of(call, lane < num_topk ? few.expert[entry] : ~0u, 0);
}

// Sums this rank's tokens, a group's parts from first_item on. By all threads; each warp for
// itself.
__device__ __forceinline__ void sum_few(const LowLatencyCombineParams& params,
                                        const comm::Round& round, const comm::Few& few,
                                        u32 first_item) {
  const comm::LowLatencyShape& shape = params.call.shape;
  const u32 end = shape.num_tokens * shape.num_parts;
#pragma unroll 1
  for (u32 item = first_item; item < end; item += gridDim.x * kNumGroups) {
    const Line line = kept_line(params.call, few, item / shape.num_parts);
    sum_cells(params, round, item, __ballot_sync(kFullWarp, line.is_used));
  }
}

// In shared memory.
struct Sources {
  comm::LowLatencyShape headers[kNumRanks];
  comm::Arrivals arrivals;
};

// Waits for what sources say of their calls, and looks at their choices where these may be few.
// By all threads; false, to all of them, where the call may not go on.
//   taking_part  the sources that take part, as bits
__device__ __forceinline__ bool find_sources(const comm::LowLatencyCall& call,
                                             const comm::Round& round, bool tries_few,
                                             Sources* sources, ptx::U64Pair* entry,
                                             u32* taking_part) {
  constexpr u32 kAll = (1u << kNumRanks) - 1;
  comm::Arrivals* arrivals = &sources->arrivals;
  u32 wanted = kAll & ~round.masked;
  while (true) {
    if (threadIdx.x == 0) *arrivals = {~wanted, 0, 0, 0};
    __syncthreads();
    if (!comm::read_headers(call, round, wanted, sources->headers, arrivals, [&] {
          if (tries_few) *entry = comm::guess_entry<true>(call, round, arrivals);
        })) {
      return false;
    }
    const u32 seen = kAll & ~arrivals->missing;
    *taking_part =
        call.can_mask ? comm::agree_on_sources(call, round, seen, &arrivals->taking_part) : seen;
    if ((*taking_part & ~seen) == 0) return true;
    wanted = *taking_part;  // what only another block waited for long enough is there
  }
}

}  // namespace epcomm

extern "C" __global__ void __launch_bounds__(epcomm::comm::kLowLatencyThreads, 1)
    epcomm_low_latency_combine(const __grid_constant__ epcomm::LowLatencyCombineParams params) {
  using namespace epcomm;
  extern __shared__ __align__(128) u8 shared_memory[];  // Span[local experts]
  __shared__ Sources sources;
  __shared__ union {
    comm::Chunk chunk;
    comm::Few few;
  } tables;
  __shared__ u64 ranges[kKeptRanges];
  const comm::LowLatencyCall& call = params.call;
  __shared__ comm::Round round;
  // On its way while the call begins.
  const bool tries_few = may_be_few(params);
  const u32 num_kept = min_of(call.shape.num_experts, kKeptRanges);
  i64 range = 0;
  comm::OwnEntry entry = {};
  if (call.phases & comm::kSends) {
    if (threadIdx.x < num_kept) range = params.layout_range[threadIdx.x];
    entry = comm::first_entry(call, params.topk_idx, params.is_64_bit, params.topk_weights);
  }
  if (!comm::begin(call, &round)) return;
  if (call.phases & comm::kSends) {
    comm::send_tables(call, round, params.topk_idx, params.is_64_bit, params.topk_weights, entry);
#pragma unroll 1
    for (u32 i = threadIdx.x; i < num_kept; i += blockDim.x) {
      ranges[i] = i == threadIdx.x ? range : params.layout_range[i];
    }
  }
  if (tries_few) comm::clear(call, &tables.few);
  ptx::U64Pair entry_seen = {};
  u32 taking_part = 0;
  bool is_good = find_sources(call, round, tries_few, &sources, &entry_seen, &taking_part);
  if (is_good && tries_few && comm::are_few(call, sources.headers)) {
    comm::Few& few = tables.few;
    if (threadIdx.x == 0) comm::number(call, sources.headers, &few);
    if (read_few(call, round, sources.headers, entry_seen, &sources.arrivals, &few)) {
      const u32 first_item = send_few(params, round, sources.headers, ranges, &few);
      sum_few(params, round, few, first_item);
    }
    comm::finish(call, round);
    return;
  }
  if (is_good && call.phases & comm::kSends) {
    is_good = comm::for_each_part<true>(
        call, round, taking_part, sources.headers, nullptr,
        reinterpret_cast<comm::Span*>(shared_memory), &tables.chunk, &sources.arrivals,
        [&](u32 source, u32 expert) {
          const u32 i = expert * kNumRanks + source;
          const u64 range = i < kKeptRanges ? ranges[i] : static_cast<u64>(params.layout_range[i]);
          const u32 begin = static_cast<u32>(range >> 32), count = static_cast<u32>(range);
          return comm::Span{begin, min_of(begin + count, comm::num_recv_rows(call))};
        },
        [&](const comm::Parts& parts) {
          const u32 num_tokens = sources.headers[parts.source].num_tokens;
          send_parts(params, round, parts, uses_cells(params, num_tokens));
        });
  }
  if (is_good && call.phases & comm::kReceives) {
    const u32 num_items = call.shape.num_tokens * call.shape.num_parts;
#pragma unroll 1
    for (u32 item = blockIdx.x + gridDim.x * comm::group_index(); item < num_items;
         item += gridDim.x * kNumGroups) {
      sum_part(params, round, item);
    }
  }
  comm::finish(call, round);
}
