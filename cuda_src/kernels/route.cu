// Final positions of all rows, before any row moves.
//
// In:   is_token_in_rank [num_tokens, kNumRanks], num_tokens_per_expert [num_experts]; or in their
//       place topk_idx [num_tokens, num_topk] i32 or i64, -1 for no choice.
// Out:  positions [num_tokens, kNumRanks] i32: each row's place on each receiver, or -1.
//       work [rows from other ranks] {source rank, token, place here}, sources taking turns.
//       counts [kNumRanks source, kNumRanks receiver] i32; summary, for later kernels; HostSummary,
//       for the host.
// Grid: kNumRanks blocks; block d speaks to receiver d and listens to source d. All fit on any GPU
//       at once, and each sends its counts before it waits for the others'.
//
// Ordering:
//   header and expert counts for receiver d  -> release of my count cells   (block d)
//   acquire of all count cells of d and me   -> first positions; compared headers (block me)
//   tokens listed at receiver d              -> release of listed[me] at d  (block d)
//   acquire of listed[d]                     -> reads of source d's list    (block d)
// Lists have no second half: they are written only after all counts have arrived, when every
// receiver is done with earlier calls.
#include "comm/call.cuh"
#include "comm/choices.cuh"
#include "comm/route_record.cuh"
#include "common/types.cuh"

namespace epcomm {

// What the host waits for. In host memory.
struct HostSummary {
  u64 ticket;  // written last
  i32 num_recv;
  i32 max_tokens;
  i32 expert_counts[kMaxLocalExperts];
};

struct RouteParams {
  comm::Call call;
  const bool* is_token_in_rank;
  const i32* num_tokens_per_expert;
  const void* topk_idx;
  i32* positions;
  comm::WorkItem* work;
  i32* counts;
  comm::RouteSummary* summary;
  HostSummary* host;
  u64 ticket;
  u32 num_tokens;
  u32 num_experts;
  u32 num_worst_tokens;
  u32 num_topk;
  u32 is_64_bit;
  u32 makes_layout;  // from topk_idx; else it is there
};

static_assert(sizeof(RouteParams) == kRouteParamsBytes, "epcomm/engines/cuda_params.py differs");

// Header words that every rank's route fills, beside those that must agree.
constexpr u32 kHeaderTokens = kNumAgreed;
constexpr u32 kHeaderWorstTokens = kNumAgreed + 1;

// Sums over the block. Returns the sum of lower threads; total gets the sum of all.
__device__ inline u32 exclusive_scan(u32 value, u32* total) {
  __shared__ u32 warp_sums[32];
  u32 inclusive = value;
  for (u32 step = 1; step < kWarpSize; step *= 2) {
    const u32 other = __shfl_up_sync(kFullWarp, inclusive, step);
    if (lane_index() >= step) inclusive += other;
  }
  if (lane_index() == kWarpSize - 1) warp_sums[warp_index()] = inclusive;
  __syncthreads();
  u32 before = 0, all = 0;
  for (u32 warp = 0; warp < blockDim.x / kWarpSize; ++warp) {
    if (warp == warp_index()) before = all;
    all += warp_sums[warp];
  }
  __syncthreads();
  *total = all;
  return before + inclusive - value;
}

// Whether a token goes to a receiver. Its choices there are added to pairs, and is_bad is set where
// one is no expert; neither where pairs is null.
__device__ __forceinline__ bool goes_to(const RouteParams& params, u32 token, u32 receiver,
                                        i32* pairs, bool* is_bad) {
  if (!params.makes_layout) {
    return params.is_token_in_rank[u64(token) * kNumRanks + receiver];
  }
  const u32 num_local = params.num_experts / kNumRanks;
  bool goes = false;
  comm::for_choices(params.topk_idx, params.is_64_bit, params.num_topk, token, [&](i64 expert) {
    const i64 local = expert - i64(receiver) * num_local;
    const bool is_there = local >= 0 && local < num_local;
    goes = goes || is_there;
    if (pairs == nullptr) return;
    if (is_there) atomicAdd(pairs + local, 1);
    if (expert < 0 || expert >= params.num_experts) *is_bad = true;
  });
  return goes;
}

// Beside a rank's counts: some of its choices are no experts. Every block of it sees that.
constexpr u32 kHasBadChoices = 1u << 31;

// Sends this rank's count for one receiver to all, and its header and expert counts to that one.
__device__ inline void send_counts(const RouteParams& params, u32 epoch, u32 receiver, u32 count,
                                   const i32* pairs) {
  const comm::Call& call = params.call;
  const u32 num_local = params.num_experts / kNumRanks;
  i32* remote = slab::expert_counts(call.slabs, receiver, epoch, call.rank);
  if (!params.makes_layout) pairs = params.num_tokens_per_expert + receiver * num_local;
  for (u32 i = threadIdx.x; i < num_local; i += blockDim.x) remote[i] = pairs[i];
  if (threadIdx.x == 0) comm::put_header(call, epoch, receiver);
  __syncthreads();
  if (threadIdx.x < kNumRanks) {
    ptx::st_release_sys_u64(slab::count_cell(call.slabs, threadIdx.x, epoch, call.rank, receiver),
                            (u64(epoch) << 32) | count);
  }
}

// Waits for all counts, into shared memory. By all threads; false when the call has failed.
//   bad_ranks  in shared memory: the ranks whose choices are bad, as bits; to all blocks of all
//              ranks the same
__device__ inline bool wait_counts(const comm::Call& call, u32 epoch, i32* counts, u32* bad_ranks) {
  if (threadIdx.x == 0) *bad_ranks = 0;
  __syncthreads();
  bool is_good = true;
  if (threadIdx.x < kNumRanks * kNumRanks) {
    const u32 source = threadIdx.x / kNumRanks, receiver = threadIdx.x % kNumRanks;
    const u64* cell = slab::count_cell(call.slabs, call.rank, epoch, source, receiver);
    is_good = comm::wait_cell(call, comm::kCounts, source, epoch, cell);
    const u32 count = static_cast<u32>(ptx::ld_acquire_sys_u64(cell));
    counts[threadIdx.x] = static_cast<i32>(count & ~kHasBadChoices);
    if ((count & kHasBadChoices) != 0) atomicOr(bad_ranks, 1u << source);
  }
  return __syncthreads_and(is_good);
}

// Reports the first rank whose choices are bad. By one thread of a rank.
__device__ inline void report_bad_choices(const comm::Call& call, u32 bad_ranks) {
  volatile comm::FailureRecord* record = call.record;
  record->peer = __ffs(static_cast<int>(bad_ranks)) - 1;
  __threadfence_system();
  record->failure = comm::kBadChoices;
}

// Whether headers agree, all choices are good, and every rank has room for what arrives. By a warp
// of the block that listens to this rank itself; every rank comes to the same answer.
__device__ inline bool check_headers(const comm::Call& call, u32 epoch, const i32* counts,
                                     u32 bad_ranks) {
  if (!comm::headers_agree(call, epoch)) return false;
  if (bad_ranks != 0) {
    if (lane_index() == 0) report_bad_choices(call, bad_ranks);
    return false;
  }
  const u32 receiver = lane_index();
  i32 room = 0, num_recv = 0;
  if (receiver < kNumRanks) {
    room = slab::header(call.slabs, call.rank, epoch, receiver)[kHeaderWorstTokens];
#pragma unroll
    for (u32 source = 0; source < kNumRanks; ++source) {
      num_recv += counts[source * kNumRanks + receiver];
    }
  }
  const u32 lacking = __ballot_sync(kFullWarp, room > 0 && num_recv > room);
  if (lacking == 0) return true;
  if ((lacking >> receiver) % 2 != 0 && (lacking & ((1u << receiver) - 1)) == 0) {
    volatile comm::FailureRecord* record = call.record;
    record->peer = static_cast<i32>(receiver);
    record->expected = static_cast<u32>(room);
    record->seen = static_cast<u32>(num_recv);
    __threadfence_system();
    record->failure = comm::kTooManyRows;
  }
  return false;
}

// Sums expert counts and tells the host. By the block that listens to this rank itself.
__device__ inline void tell_host(const RouteParams& params, u32 epoch, u32 num_recv) {
  const comm::Call& call = params.call;
  const u32 num_local = params.num_experts / kNumRanks;
  for (u32 i = threadIdx.x; i < num_local; i += blockDim.x) {
    i32 sum = 0;
#pragma unroll
    for (u32 source = 0; source < kNumRanks; ++source) {
      sum += slab::expert_counts(call.slabs, call.rank, epoch, source)[i];
    }
    params.host->expert_counts[i] = sum;
  }
  if (threadIdx.x == 0) {
    i32 tokens[kNumRanks], max_tokens = 0;
#pragma unroll
    for (u32 source = 0; source < kNumRanks; ++source) {
      tokens[source] = slab::header(call.slabs, call.rank, epoch, source)[kHeaderTokens];
    }
#pragma unroll
    for (u32 source = 0; source < kNumRanks; ++source) {
      max_tokens = max_of(max_tokens, tokens[source]);
    }
    params.host->num_recv = static_cast<i32>(num_recv);
    params.host->max_tokens = max_tokens;
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) ptx::st_release_sys_u64(&params.host->ticket, params.ticket);
}

// The place of a source's k-th row in the order in which rows are fetched: sources take turns.
__device__ __forceinline__ u32 turn_of(const i32* counts, u32 me, u32 source, u32 k) {
  u32 turn = 0;
  for (u32 other = 0; other < kNumRanks; ++other) {
    if (other == me) continue;
    // Starting behind this rank, so that ranks do not all begin with the same peer.
    const bool is_earlier =
        (other + kNumRanks - me) % kNumRanks < (source + kNumRanks - me) % kNumRanks;
    turn += min_of(static_cast<u32>(counts[other * kNumRanks + me]), k + (is_earlier ? 1u : 0u));
  }
  return turn;
}

}  // namespace epcomm

extern "C" __global__ void __launch_bounds__(1024, 1)
    epcomm_route(const __grid_constant__ epcomm::RouteParams params) {
  using namespace epcomm;
  const comm::Call& call = params.call;
  const u32 me = call.rank, other = blockIdx.x;
  const u32 epoch = comm::begin(call);
  __shared__ i32 counts[kNumRanks * kNumRanks];
  __shared__ i32 pairs[kMaxLocalExperts];  // choices of each of the receiver's experts
  if (params.makes_layout) {
    for (u32 i = threadIdx.x; i < params.num_experts / kNumRanks; i += blockDim.x) pairs[i] = 0;
    __syncthreads();
  }

  // Neighbouring threads have neighbouring tokens' runs, so a scan over threads orders tokens.
  const u32 run = ceil_div(params.num_tokens, blockDim.x);
  const u32 begin = min_of(threadIdx.x * run, params.num_tokens);
  const u32 end = min_of(begin + run, params.num_tokens);
  u32 mine = 0;
  bool is_bad = false;
  for (u32 token = begin; token < end; ++token) {
    mine += goes_to(params, token, other, pairs, &is_bad);
  }
  u32 total;
  u32 k = exclusive_scan(mine, &total);

  bool is_good = comm::may_begin(call);
  const u32 has_bad_choices = __syncthreads_or(is_bad) ? kHasBadChoices : 0;
  if (is_good) send_counts(params, epoch, other, total | has_bad_choices, pairs);
  __shared__ u32 bad_ranks;
  is_good = __syncthreads_and(is_good) && wait_counts(call, epoch, counts, &bad_ranks);
  if (other == me) {
    if (is_good && warp_index() == 0) is_good = check_headers(call, epoch, counts, bad_ranks);
    is_good = __syncthreads_and(is_good);
    u32 num_recv = 0, num_own = counts[me * kNumRanks + me];
    for (u32 source = 0; source < kNumRanks; ++source) num_recv += counts[source * kNumRanks + me];
    if (threadIdx.x == 0) *params.summary = {num_recv, num_recv - num_own, is_good ? 1u : 0u, 0};
    if (is_good) {
      for (u32 i = threadIdx.x; i < kNumRanks * kNumRanks; i += blockDim.x) {
        params.counts[i] = counts[i];
      }
      tell_host(params, epoch, num_recv);
    }
  }
  if (is_good) {
    u32 first = 0;
    for (u32 source = 0; source < me; ++source) first += counts[source * kNumRanks + other];
    i32* remote_list = slab::list(call.slabs, other, me);
    for (u32 token = begin; token < end; ++token) {
      const u64 at = u64(token) * kNumRanks + other;
      const bool goes = goes_to(params, token, other, nullptr, nullptr);
      params.positions[at] = goes ? static_cast<i32>(first + k) : -1;
      if (goes) remote_list[k++] = static_cast<i32>(token);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::st_release_sys_u64(slab::listed_cell(call.slabs, other, me), u64(epoch) << 32);
      is_good = comm::wait_cell(call, comm::kLists, other, epoch,
                                slab::listed_cell(call.slabs, me, other));
    }
    is_good = __syncthreads_and(is_good);
  }
  if (is_good && other != me) {
    u32 base = 0;
    for (u32 source = 0; source < other; ++source) base += counts[source * kNumRanks + me];
    const i32* tokens = slab::list(call.slabs, me, other);
    for (u32 i = threadIdx.x; i < u32(counts[other * kNumRanks + me]); i += blockDim.x) {
      params.work[turn_of(counts, me, other, i)] =
          comm::WorkItem::make(other, static_cast<u32>(tokens[i]), base + i);
    }
  }
  comm::finish(call, epoch);
}
