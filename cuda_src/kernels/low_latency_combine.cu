// Brings experts' rows back to their tokens' ranks and sums them, weighted.
//
// In:   rows [local experts, num_recv_rows, hidden] bf16 and layout_range from dispatch; choices
//       [num_tokens, num_topk] i32 or i64, weights [num_tokens, num_topk] f32 of this rank's
//       tokens.
// Out:  sums [num_tokens, hidden] bf16; waiting times are added to wait_stats.
// Grid: at most as many blocks as fit at once, of warps that send and then receive: see
// comm/crews.cuh.
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
#include "kernels/low_latency_combine_few.cuh"
#include "kernels/low_latency_combine_receive.cuh"
#include "kernels/low_latency_combine_rows.cuh"
#include "kernels/low_latency_combine_send.cuh"

namespace epcomm {

// In shared memory.
struct Sources {
  comm::LowLatencyShape headers[kNumRanks];
  comm::Arrivals arrivals;
};

// Keeps the ranges that dispatch laid out. By all threads, before they meet.
__device__ __forceinline__ void keep_ranges(const LowLatencyCombineParams& params, u64* ranges) {
  const u32 number = min_of(params.call.shape.num_experts, kKeptRanges);
#pragma unroll 1
  for (u32 i = threadIdx.x; i < number; i += blockDim.x) {
    ranges[i] = params.layout_range[i];
  }
}

// Waits for what sources say of their calls, and looks at their choices where these may be few.
// By all threads; false, to all of them, where the call may not go on.
//   taking_part  the sources that take part, as bits
__device__ __forceinline__ bool find_sources(const comm::LowLatencyCall& call,
                                             const comm::Round& round, bool tries_few,
                                             Sources* sources, ptx::U64Pair* entry,
                                             u32* taking_part) {
  constexpr u32 kAll = (1u << kNumRanks) - 1;
  comm::Arrivals* arrivals = &sources->arrivals;
  u32 wanted = kAll & ~round.masked, unseen = 0;
  // Twice at most: what takes part by another block's word has come.
#pragma unroll 1
  for (u32 look = 0; look < 2; ++look) {
    if (threadIdx.x == 0) *arrivals = {~wanted, 0, 0, 0};
    __syncthreads();
    if (!comm::read_headers<Everyone>(call, round, wanted, sources->headers, arrivals, [&] {
          if (tries_few) *entry = comm::guess_entry<Everyone, true>(call, round, arrivals);
        })) {
      return false;
    }
    const u32 seen = kAll & ~arrivals->missing;
    *taking_part = call.can_mask
                       ? comm::agree_on_sources<Everyone>(call, round, seen, &arrivals->taking_part)
                       : seen;
    unseen = *taking_part & ~seen;
    if (unseen == 0) return true;
    wanted = *taking_part;
  }
  if (threadIdx.x == 0) comm::report_unseen(call, round, unseen);
  return false;
}

}  // namespace epcomm

extern "C" __global__ void __launch_bounds__(epcomm::comm::kLowLatencyThreads, 1)
    epcomm_low_latency_combine(const __grid_constant__ epcomm::LowLatencyCombineParams params) {
  using namespace epcomm;
  extern __shared__ __align__(128) u8 shared_memory[];  // Stages, then Span[local experts]
  Stages* stages = reinterpret_cast<Stages*>(shared_memory);
  __shared__ Sources sources;
  __shared__ union {
    comm::Batch batch;
    comm::Few few;
  } tables;
  __shared__ u64 ranges[kKeptRanges];
  const comm::LowLatencyCall& call = params.call;
  __shared__ comm::Round round;
  if (!comm::begin(call, &round)) return;
  const bool sends = (call.phases & comm::kSends) != 0, tries_few = may_be_few(params);
  if (sends) {
    comm::send_tables(call, round, params.topk_idx, params.is_64_bit, params.topk_weights);
    keep_ranges(params, ranges);
  }
  if (tries_few) comm::clear<Everyone>(call, &tables.few);
  ptx::U64Pair entry_seen = {};
  u32 taking_part = 0;
  bool is_good = find_sources(call, round, tries_few, &sources, &entry_seen, &taking_part);
  const bool are_few = is_good && tries_few && comm::are_few(call, sources.headers);
  if (are_few) {
    comm::Few& few = tables.few;
    if (threadIdx.x == 0) comm::number(call, sources.headers, &few);
    is_good = read_few(call, round, sources.headers, entry_seen, &sources.arrivals, &few);
    if (is_good) send_few(params, round, sources.headers, ranges, &few);
  } else if (is_good && sends) {
    is_good = comm::for_each_part<Everyone, true>(
        call, round, taking_part, sources.headers, nullptr,
        reinterpret_cast<comm::Span*>(stages + 1), &tables.batch, &sources.arrivals,
        [&](u32 source, u32 expert) {
          const u32 i = expert * kNumRanks + source;
          const u64 range = i < kKeptRanges ? ranges[i] : static_cast<u64>(params.layout_range[i]);
          const u32 begin = static_cast<u32>(range >> 32), count = static_cast<u32>(range);
          return comm::Span{begin, min_of(begin + count, comm::num_recv_rows(call))};
        },
        [&](const comm::Parts& parts) {
          const u32 num_tokens = sources.headers[parts.source].num_tokens;
          send_parts(params, round, parts, uses_cells(params, num_tokens), stages);
        });
  }
  // A warp sums as soon as it has sent, whatever the block's others still send.
  if (is_good && call.phases & comm::kReceives) {
    sum_tokens(params, round, are_few ? &tables.few : nullptr);
  }
  comm::finish(call, round);
}
