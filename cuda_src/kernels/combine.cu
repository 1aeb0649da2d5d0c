// Brings rows back to their tokens' ranks and sums them.
//
// In:   rows [num_recv, row_bytes] in the order of dispatch, weights [num_recv, num_topk] f32,
//       up to two biases [num_tokens, row_bytes]; positions and counts from route.cu. With
//       kHasFurther further rows of the tokens, already on this GPU: other nodes' sums.
// Out:  sums [num_tokens, row_bytes]: fp32, from the biases, rank ascending, then further rows in
//       order, rounded once; sums of weights [num_tokens, num_topk].
// Grid: as many blocks as the call may use multiprocessors, at most as many as fit at once. In each
//       block kNumSendWarps warps send, one raises flags for them, and the others sum.
//
// A receiver's rows from one source are contiguous, so they are sent as one stream into this rank's
// slot at the source, unit_rows rows a unit, units of all sources taking turns. A unit has a flag;
// tokens are summed as soon as their rows' units are there, while later ones are on their way.
//
// Ordering:
//   acquire of all arrivals (peers are done with their slots)  -> units are sent
//   unit's rows (copy engine) -> bulk_wait -> release of the queue, in the block
//   acquire of the queue -> fence_proxy_async, fence_acq_rel_sys -> store of the unit's flag
//   acquire of the flag by one lane -> __syncwarp              -> loads of the rows by all lanes
// Sending waits for nothing but arrivals, so sums never wait for something that waits for them.
#include "comm/bulk_ring.cuh"
#include "comm/call.cuh"
#include "comm/route_record.cuh"
#include "common/types.cuh"
#include "ptx/convert.cuh"

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

// --- sending -----------------------------------------------------------------------------------

constexpr u32 kFlagQueueLength = 32;
constexpr u32 kNumPeers = kNumRanks > 1 ? kNumRanks - 1 : 1;

struct Unit {
  u32 peer;
  u32 index;
  u32 first_row;  // in the stream
  u32 num_rows;
};

// The q-th unit to be sent, streams taking turns; without rows where its stream has no such unit.
__device__ __forceinline__ Unit unit_at(const CombineParams& params, const Streams& streams,
                                        u32 q) {
  Unit unit;
  unit.index = q / kNumPeers;
  unit.peer = (params.call.rank + 1 + q % kNumPeers) % kNumRanks;
  unit.first_row = unit.index * params.unit_rows;
  const u32 count = streams.count_here[unit.peer];
  unit.num_rows = unit.first_row < count ? min_of(params.unit_rows, count - unit.first_row) : 0;
  return unit;
}

// Where a unit's rows lie among this rank's rows, and in its slot at the peer.
__device__ __forceinline__ const u8* rows_of(const CombineParams& params, const Streams& streams,
                                             const Unit& unit) {
  return params.rows + u64(streams.first_here[unit.peer] + unit.first_row) * params.row_bytes;
}

__device__ __forceinline__ u8* slot_of(const CombineParams& params, const Unit& unit) {
  return slab::slot(params.call.slabs, unit.peer, params.call.rank) +
         u64(unit.first_row) * params.row_bytes;
}

__device__ __forceinline__ void send_weights(const CombineParams& params, const Streams& streams,
                                             const Unit& unit) {
  if (params.num_topk == 0) return;
  const u32* source =
      params.weights + u64(streams.first_here[unit.peer] + unit.first_row) * params.num_topk;
  u8* slot = slab::slot(params.call.slabs, unit.peer, params.call.rank);
  u32* to = reinterpret_cast<u32*>(slot + weights_offset(params, streams.count_here[unit.peer])) +
            u64(unit.first_row) * params.num_topk;
  for (u32 i = lane_index(); i < unit.num_rows * params.num_topk; i += kWarpSize) to[i] = source[i];
}

// Units that are written but have no flag yet. Making writes visible to a peer takes longer than
// sending a unit, so one warp does that for all, many units at a time, and sending goes on.
struct FlagQueue {
  u32 units[kNumSendWarps][kFlagQueueLength];
  u32 num_written[kNumSendWarps];
  u32 num_raised[kNumSendWarps];
  u32 num_ended;  // send warps that will write no more
};

__device__ inline void init_queue(FlagQueue* queue) {
  if (threadIdx.x < kNumSendWarps) {
    queue->num_written[threadIdx.x] = 0;
    queue->num_raised[threadIdx.x] = 0;
  }
  if (threadIdx.x == 0) queue->num_ended = 0;
}

// By one lane of a send warp, in whose view the unit's writes are complete.
__device__ inline void put_unit(FlagQueue* queue, u32 warp, u32 q) {
  const u32 place = queue->num_written[warp];
  while (place - ptx::ld_acquire_cta_shared_u32(&queue->num_raised[warp]) == kFlagQueueLength) {
  }
  queue->units[warp][place % kFlagQueueLength] = q;
  ptx::st_release_cta_shared_u32(&queue->num_written[warp], place + 1);
}

// Raises the flags of all units that this block sends. By one warp; lane i serves send warp i.
__device__ inline void raise_flags(const CombineParams& params, const Streams& streams,
                                   FlagQueue* queue, u32 epoch) {
  const u32 lane = lane_index();
  u32 raised = 0;
  bool has_ended = false;
  while (!has_ended) {
    // Looked at before the queues: what was put before the end is then seen below.
    has_ended = ptx::ld_acquire_cta_shared_u32(&queue->num_ended) == kNumSendWarps;
    u32 written = raised;
    if (lane < kNumSendWarps) written = ptx::ld_acquire_cta_shared_u32(&queue->num_written[lane]);
    if (__any_sync(kFullWarp, written != raised)) {
#if kUseBulk
      ptx::fence_proxy_async();
#endif
      ptx::fence_acq_rel_sys();
      for (; raised != written; ++raised) {
        const Unit unit = unit_at(params, streams, queue->units[lane][raised % kFlagQueueLength]);
        u32* flags = slab::unit_flags(params.call.slabs, unit.peer, params.call.rank);
        ptx::st_relaxed_sys_u32(flags + unit.index, epoch);
      }
      if (lane < kNumSendWarps) ptx::st_release_cta_shared_u32(&queue->num_raised[lane], raised);
    }
    has_ended = __all_sync(kFullWarp, has_ended);
  }
}

// Units for one warp, in the order in which they are sent. All calls by all lanes.
class Units {
 public:
  __device__ __forceinline__ Units(const CombineParams& params, const Streams& streams)
      : p_(params), streams_(streams), claims_(params.call.state, 0) {
    u32 longest = 0;
    for (u32 peer = 0; peer < kNumRanks; ++peer) {
      const u32 count = peer == params.call.rank ? 0 : streams.count_here[peer];
      if (count > longest) longest = count;
    }
    end_ = ceil_div(longest, params.unit_rows) * kNumPeers;
  }

  // Sets the number of the next unit that has rows; false where there is none.
  __device__ __forceinline__ bool next(u32* q) {
    do {
      *q = claims_.next();
      if (*q >= end_) return false;
    } while (unit_at(p_, streams_, *q).num_rows == 0);
    return true;
  }

 private:
  const CombineParams& p_;
  const Streams& streams_;
  comm::Claims claims_;
  u32 end_;
};

#if kUseBulk

__device__ inline void send_units(const CombineParams& params, const Streams& streams,
                                  FlagQueue* queue, u8* shared_memory) {
  Units units(params, streams);
  comm::BulkRing ring(shared_memory, warp_index(), kNumSendWarps,
                      params.unit_rows * params.row_bytes);
  ring.move(
      [&](comm::Piece* piece) {
        u32 q;
        if (!units.next(&q)) return false;
        const Unit unit = unit_at(params, streams, q);
        *piece = {rows_of(params, streams, unit), unit.num_rows * params.row_bytes, q};
        return true;
      },
      [&](u8* slot, u32 num_bytes, u32 q) {
        const Unit unit = unit_at(params, streams, q);
        if (lane_index() == 0) ptx::bulk_store(slot_of(params, unit), slot, num_bytes);
        send_weights(params, streams, unit);
      },
      [&](u32 q) {
        if (lane_index() == 0) put_unit(queue, warp_index(), q);
      });
}

#else

__device__ inline void send_units(const CombineParams& params, const Streams& streams,
                                  FlagQueue* queue, u8*) {
  Units units(params, streams);
  u32 q;
  while (units.next(&q)) {
    const Unit unit = unit_at(params, streams, q);
    send_weights(params, streams, unit);
    const u8* source = rows_of(params, streams, unit);
    u8* to = slot_of(params, unit);
    for (u32 i = lane_index(); i < unit.num_rows * params.row_bytes / sizeof(Vec16);
         i += kWarpSize) {
      ptx::st_no_allocate_vec16(to + u64(i) * sizeof(Vec16),
                                ptx::ld_no_allocate_vec16(source + u64(i) * sizeof(Vec16)));
    }
    __syncwarp();
    if (lane_index() == 0) put_unit(queue, warp_index(), q);
  }
}

#endif

// --- summing -----------------------------------------------------------------------------------

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

extern "C" __global__ void __launch_bounds__(kCombineThreads, 1)
    epcomm_combine(const __grid_constant__ epcomm::CombineParams params) {
  using namespace epcomm;
  extern __shared__ __align__(128) u8 shared_memory[];
  __shared__ Streams streams;
  __shared__ FlagQueue queue;
  const comm::Call& call = params.call;
  const u32 epoch = comm::begin(call);
  if (!comm::may_begin(call) || params.summary->is_valid == 0) return;
  if (blockIdx.x == 0) comm::post_arrival(call, epoch);
  init_queue(&queue);
  find_streams(params, &streams);
  if (comm::wait_arrival(call, comm::kArrival, epoch, blockDim.x)) {
    if (warp_index() < kNumSendWarps) {
      send_units(params, streams, &queue, shared_memory);
      if (lane_index() == 0) atomicAdd(&queue.num_ended, 1u);
    } else if (warp_index() == kNumSendWarps) {
      raise_flags(params, streams, &queue, epoch);
    } else {
      sum_tokens(params, streams, epoch);
    }
  }
  comm::finish(call, epoch);
}
