// Sends each token's row once to every rank that holds one of its experts, and gives it to these.
//
// In:   rows [num_tokens, hidden] bf16, choices [num_tokens, num_topk] i32 or i64, -1 for none.
// Out:  recv_rows [local experts, num_recv_rows, hidden] bf16, or e4m3 with recv_scales [local
//       experts, scales of a row, num_recv_rows]; an expert's rows by source rank, then token;
//       recv_count [local experts], src_info [local experts, num_recv_rows] with -1 behind the
//       rows, layout_range [local experts, kNumRanks] begin << 32 | count. Received rows are added
//       to recv_stats, waiting times to wait_stats.
// Grid: at most as many blocks as fit at once, of two crews: see comm/crews.cuh.
//
// Every rank gets all tables of choices. A row, cast to fp8 on its way, goes into this rank's line
// of the slot at each receiver, at the token's index, with its scales behind it. A group of senders
// sends a part of a row and raises its flag; receivers fetch it from the slot, a slice a warp, and
// write it to all experts that it is for. Rows of a rank with few tokens cross as cells, without
// flags. See comm/low_latency.cuh for the ordering.
//
// A source that is masked before its tables are seen gives nothing. One that dies between its table
// and its rows leaves rows that are zeros in whole or in part, in this call only.
#include "comm/choice_tables.cuh"
#include "comm/few_choices.cuh"
#include "comm/low_latency.cuh"
#include "kernels/low_latency_dispatch_count.cuh"
#include "kernels/low_latency_dispatch_receive.cuh"
#include "kernels/low_latency_dispatch_rows.cuh"
#include "kernels/low_latency_dispatch_send.cuh"

static_assert(epcomm::comm::kHasReceivers, "else nobody sends tables, or receives");

extern "C" __global__ void __launch_bounds__(epcomm::comm::kLowLatencyThreads, 1)
    epcomm_low_latency_dispatch(const __grid_constant__ epcomm::LowLatencyDispatchParams params) {
  using namespace epcomm;
  // Span[local experts], then u32[kNumRanks][local experts]: rows from each source.
  extern __shared__ __align__(128) u8 shared_memory[];
  __shared__ Sources sources;
  __shared__ union {
    comm::Batch batch;
    comm::Few few;
  } tables;
  const comm::LowLatencyCall& call = params.call;
  __shared__ comm::Round round;
  // What is sent first is read while the call begins.
  OwnPart own;
  const bool sends = (call.phases & comm::kSends) != 0;
  if (sends && Senders::has_me()) load_part(params, own_item(0), &own);
  if (!comm::begin(call, &round)) return;
  if (Senders::has_me()) {
    if (sends) send_rows(params, round, &own);
  } else {
    if (sends) comm::send_tables(call, round, params.topk_idx, params.is_64_bit, nullptr);
    if (call.phases & comm::kReceives) {
      const u32 num_local = num_local_experts(call);
      comm::Span* spans = reinterpret_cast<comm::Span*>(shared_memory);
      u32* counts = reinterpret_cast<u32*>(spans + num_local);
      const bool is_good = find_sources(params, round, &sources, counts, &tables.few);
      if (is_good && sources.are_few) {
        receive_few(params, round, sources, &tables.few);
        const FewCounts few = {tables.few, num_local};
        // By a block that has none of the rows, where they do not go round.
        if (blockIdx.x == gridDim.x - 1) write_counts(params, few);
        fill_tails(params, few);
      } else if (is_good) {
        const Counts all = {counts, num_local};
        if (blockIdx.x == 0) write_counts(params, all);
        fill_tails(params, all);
        comm::for_each_part<Receivers, false>(
            call, round, ~sources.arrivals.missing, sources.headers,
            sources.num_entries <= kKeptEntries ? sources.kept : nullptr, spans, &tables.batch,
            &sources.arrivals,
            [=](u32 source, u32 expert) {
              u32 begin = 0;
#pragma unroll 1
              for (u32 s = 0; s < source; ++s) begin += counts[s * num_local + expert];
              return comm::Span{begin, comm::kNoRow};
            },
            [&](const comm::Parts& parts) {
              const u32 num_tokens = sources.headers[parts.source].num_tokens;
              receive_parts(params, round, parts,
                            num_slices_of(params, sources.headers, parts.source),
                            uses_cells(params, num_tokens));
            });
      }
    }
  }
  comm::finish(call, round);
}
