// Sending of low_latency_combine.cu where tokens are few.
//
// NOTE: from the headers until it sums, it shares no code with other calls: what only one kind
// needs would be fetched with what the other runs.
#pragma once

#include "comm/choice_tables.cuh"
#include "comm/few_choices.cuh"
#include "comm/low_latency.cuh"
#include "common/types.cuh"
#include "kernels/low_latency_combine_rows.cuh"
#include "kernels/low_latency_combine_send.cuh"

namespace epcomm {

__device__ __forceinline__ bool may_be_few(const LowLatencyCombineParams& params) {
  const comm::LowLatencyCall& call = params.call;
  return (call.phases & comm::kSends) != 0 && comm::may_be_few(call) &&
         uses_cells(params, call.shape.num_tokens) && call.shape.num_experts <= kKeptRanges;
}

// Keeps the choices of all sources. entry: the thread's first, as far as it was seen. By all
// threads; false, to all of them, where the call has failed.
__device__ __forceinline__ bool read_few(const comm::LowLatencyCall& call, const comm::Round& round,
                                         const comm::LowLatencyShape* headers,
                                         const ptx::U64Pair& entry, comm::Arrivals* arrivals,
                                         comm::Few* few) {
  return comm::read_few_entries<Everyone, true>(
      call, round, headers, entry, arrivals, [&](u32 i, i32 expert, u32 weight) {
        few->expert[i] = static_cast<u32>(expert);
        few->weight[i] = weight;
        if (expert < 0) return;
        comm::keep(call, few, i, static_cast<u32>(expert) - call.rank * num_local_experts(call));
      });
}

// Sends the weighted sums of a part's rows. A thread has one or two vectors of it, and loads those
// of all rows together: stages, as others' sums have, would take longer to begin. By all threads of
// a group.
__device__ __forceinline__ void send_few_sums(const LowLatencyCombineParams& params,
                                              const comm::Round& round, const comm::Part& part) {
  constexpr u32 kRows = 8;
  const SumsTarget target(params, round, part, true);
  const Vectors vectors = sent_vectors(params, part);
#pragma unroll 1
  for (u32 at = vectors.first; at < vectors.end; at += kSendStep) {
    Sums sums;
#pragma unroll 1
    for (u32 first = 0; first < part.num_choices; first += kRows) {
      const comm::Choice* choices = part.choices + first;
      const u32 number = min_of(kRows, part.num_choices - first);
      Vec16 v[kRows];
#pragma unroll
      for (u32 i = 0; i < kRows; ++i) {
        if (i >= number || choices[i].row == comm::kNoRow) continue;
        v[i] = ptx::ld_no_allocate_vec16(expert_row(params, choices[i]) + at);
      }
#pragma unroll
      for (u32 i = 0; i < kRows; ++i) {
        if (i >= number || choices[i].row == comm::kNoRow) continue;
        sums.add(v[i], ptx::as_float(choices[i].weight));
      }
    }
    target.put(at, sums, round.epoch);
  }
}

// Sends all parts of all sources' rows where they are few. Each group for itself.
__device__ __forceinline__ void send_few(const LowLatencyCombineParams& params,
                                         const comm::Round& round,
                                         const comm::LowLatencyShape* headers, const u64* ranges,
                                         comm::Few* few) {
  const comm::LowLatencyCall& call = params.call;
  const u32 num_local = num_local_experts(call);
#pragma unroll 1
  for (u32 i = blockIdx.x + gridDim.x * comm::group_index(); i < few->first_item[kNumRanks];
       i += gridDim.x * kNumGroups) {
    const comm::Part part = comm::place_few<Everyone>(
        call, few, comm::few_item(call, *few, headers, i), [=](u32 source, u32 local, u32 entry) {
          const u64 range = ranges[local * kNumRanks + source];
          const u32 begin = static_cast<u32>(range >> 32), count = static_cast<u32>(range);
          const u32 row = begin + few->rows_before(num_local, local, entry) -
                          few->rows_before(num_local, local, few->first_entry[source]);
          // A row that dispatch did not give: the caller passes other choices than those.
          return row < min_of(begin + count, comm::num_recv_rows(call)) ? row : comm::kNoRow;
        });
    if (part.num_choices > 0) send_few_sums(params, round, part);
  }
}

}  // namespace epcomm
