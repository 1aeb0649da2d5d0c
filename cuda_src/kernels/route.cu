// Final positions of all rows, before any row moves.
//
// In:   is_token_in_rank [num_tokens, kNumRanks], num_tokens_per_expert [num_experts]; or in their
//       place topk_idx [num_tokens, num_topk] i32 or i64, -1 for no choice.
// Out:  positions [num_tokens, kNumRanks] i32: each row's place on each receiver, or -1.
//       work [rows from other ranks] {source rank, token, place here}, sources taking turns.
//       counts [kNumRanks source, kNumRanks receiver] i32; summary, for later kernels; HostSummary,
//       for the host.
// Grid: kNumRanks blocks; block d speaks to receiver d and listens to source d. All fit on any GPU
//       at once, and each sends before it waits for the others.
//
// Ordering, once for all that ranks tell each other:
//   tokens, header and expert counts for receiver d -> release of my count cells (block d)
//   acquire of all count cells -> first positions, source d's list; compared headers (block me)
// All of that has two halves: see comm/call.cuh for why a half is free when it is written.
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

// Whether token first + lane_index() goes to a receiver. By all lanes of a warp. The choices of its
// tokens there are added to pairs, and is_bad is set where one is no expert; neither where pairs is
// null.
__device__ __forceinline__ bool goes_to(const RouteParams& params, u32 first, u32 receiver,
                                        i32* pairs, bool* is_bad) {
  if (!params.makes_layout) {
    const u32 token = first + lane_index();
    return token < params.num_tokens && params.is_token_in_rank[u64(token) * kNumRanks + receiver];
  }
  const u32 num_local = params.num_experts / kNumRanks;
  bool goes = false;
  const auto look = [&](i64 expert, u32 own) {
    const i64 local = expert - i64(receiver) * num_local;
    const bool is_there = local >= 0 && local < num_local;
    if ((__ballot_sync(kFullWarp, is_there) & own) != 0) goes = true;
    if (pairs == nullptr) return;
    if (is_there) atomicAdd(pairs + local, 1);
    if (expert < -1 || expert >= params.num_experts) *is_bad = true;
  };
  comm::for_choices(params.topk_idx, params.is_64_bit, params.num_topk, first, params.num_tokens,
                    look);
  return goes;
}

// A span of tokens, and which of them go to a receiver. kWarpSize neighbouring tokens are a group,
// and a thread has one token of each of its warp's groups: as many as a word has bits.
class Span {
 public:
  // Looks at the tokens from begin on. By all threads; see goes_to for pairs and is_bad.
  //   starts  [blockDim.x] in shared memory
  __device__ __forceinline__ Span(const RouteParams& params, u32 begin, u32 receiver, i32* pairs,
                                  bool* is_bad, u32* starts)
      : begin_(begin), num_tokens_(params.num_tokens), starts_(starts) {
    __syncthreads();  // others may still read the starts of the span before
    starts[threadIdx.x] = 0;
    __syncthreads();
    for (u32 turn = 0; turn < kTurns && first_of(turn) < num_tokens_; ++turn) {
      const bool goes = goes_to(params, first_of(turn), receiver, pairs, is_bad);
      if (goes) kept_ |= 1u << turn;
      const u32 going = __ballot_sync(kFullWarp, goes);
      if (lane_index() == 0) starts[group_of(turn)] = __popc(going);
    }
    __syncthreads();
    const u32 before = exclusive_scan(starts[threadIdx.x], &total_);
    starts[threadIdx.x] = before;
    __syncthreads();
  }

  __device__ __forceinline__ static u32 size() { return blockDim.x * kTurns; }

  // Tokens of the span that go.
  __device__ __forceinline__ u32 total() const { return total_; }

  // Calls with each token of this thread, whether it goes, and how many of the span's go before it.
  template <typename Use>
  __device__ __forceinline__ void for_tokens(Use use) const {
    for (u32 turn = 0; turn < kTurns && first_of(turn) < num_tokens_; ++turn) {
      const bool goes = (kept_ >> turn) % 2 != 0;
      const u32 before = __ballot_sync(kFullWarp, goes) & ((1u << lane_index()) - 1);
      const u32 token = first_of(turn) + lane_index();
      if (token < num_tokens_) use(token, goes, starts_[group_of(turn)] + __popc(before));
    }
  }

 private:
  static constexpr u32 kTurns = 32;  // bits of kept_
  static_assert(kTurns == kWarpSize, "a thread has one group of the scan");

  __device__ __forceinline__ u32 group_of(u32 turn) const {
    return turn * (blockDim.x / kWarpSize) + warp_index();
  }
  __device__ __forceinline__ u32 first_of(u32 turn) const {
    return begin_ + group_of(turn) * kWarpSize;
  }

  u32 begin_, num_tokens_;
  const u32* starts_;
  u32 total_ = 0, kept_ = 0;
};

// Beside a rank's counts: some of its choices are no experts. Every block of it sees that.
constexpr u32 kHasBadChoices = 1u << 31;

// Sends a receiver the tokens of a span that go there, behind those of the spans before.
__device__ inline void send_tokens(const comm::Call& call, u32 epoch, u32 receiver,
                                   const Span& span, u32 num_before) {
  i32* remote = slab::list(call.slabs, receiver, epoch, call.rank) + num_before;
  span.for_tokens([&](u32 token, bool goes, u32 before) {
    if (goes) remote[before] = static_cast<i32>(token);
  });
}

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

// The most tokens of any rank, all of whose headers have arrived.
__device__ inline u32 max_tokens_of(const comm::Call& call, u32 epoch) {
  u32 tokens[kNumRanks], most = 0;
#pragma unroll
  for (u32 source = 0; source < kNumRanks; ++source) {
    tokens[source] = slab::header(call.slabs, call.rank, epoch, source)[kHeaderTokens];
  }
#pragma unroll
  for (u32 source = 0; source < kNumRanks; ++source) most = max_of(most, tokens[source]);
  return most;
}

// Sums expert counts and tells the host. By the block that listens to this rank itself.
__device__ inline void tell_host(const RouteParams& params, u32 epoch,
                                 const comm::RouteSummary& summary) {
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
    params.host->num_recv = static_cast<i32>(summary.num_recv);
    params.host->max_tokens = static_cast<i32>(summary.max_tokens);
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

extern "C" __global__ void __launch_bounds__(kRouteThreads, 1)
    epcomm_route(const __grid_constant__ epcomm::RouteParams params) {
  using namespace epcomm;
  const comm::Call& call = params.call;
  const u32 me = call.rank, other = blockIdx.x;
  const u32 epoch = comm::begin(call);
  __shared__ i32 counts[kNumRanks * kNumRanks];
  __shared__ i32 pairs[kMaxLocalExperts];  // choices of each of the receiver's experts
  if (params.makes_layout) {               // a span begins with a barrier
    for (u32 i = threadIdx.x; i < params.num_experts / kNumRanks; i += blockDim.x) pairs[i] = 0;
  }

  bool is_good = comm::may_begin(call);
  bool is_bad = false;
  __shared__ u32 starts[kRouteThreads];
  const auto look = [&](u32 begin, bool is_first) {
    return Span(params, begin, other, is_first ? pairs : nullptr, &is_bad, starts);
  };
  // As a rule all tokens are in the first span, which is kept.
  const Span first_span = look(0, true);
  const bool is_kept = params.num_tokens <= Span::size();
  u32 total = 0;
  for (u32 begin = 0; begin < params.num_tokens; begin += Span::size()) {
    const Span span = begin == 0 ? first_span : look(begin, true);
    if (is_good) send_tokens(call, epoch, other, span, total);
    total += span.total();
  }
  const u32 has_bad_choices = __syncthreads_or(is_bad) ? kHasBadChoices : 0;
  if (is_good) send_counts(params, epoch, other, total | has_bad_choices, pairs);
  __shared__ u32 bad_ranks;
  is_good = __syncthreads_and(is_good) && wait_counts(call, epoch, counts, &bad_ranks);
  if (other == me) {
    if (is_good && warp_index() == 0) is_good = check_headers(call, epoch, counts, bad_ranks);
    is_good = __syncthreads_and(is_good);
    u32 num_recv = 0, num_own = counts[me * kNumRanks + me];
    for (u32 source = 0; source < kNumRanks; ++source) num_recv += counts[source * kNumRanks + me];
    const u32 max_tokens = is_good ? max_tokens_of(call, epoch) : 0;
    const comm::RouteSummary summary = {num_recv, num_recv - num_own, is_good, max_tokens};
    if (threadIdx.x == 0) *params.summary = summary;
    if (is_good) {
      for (u32 i = threadIdx.x; i < kNumRanks * kNumRanks; i += blockDim.x) {
        params.counts[i] = counts[i];
      }
      tell_host(params, epoch, summary);
    }
  }
  if (is_good) {
    u32 position = 0;  // of the span's first row
    for (u32 source = 0; source < me; ++source) position += counts[source * kNumRanks + other];
    for (u32 begin = 0; begin < params.num_tokens; begin += Span::size()) {
      const Span span = is_kept ? first_span : look(begin, false);
      span.for_tokens([&](u32 token, bool goes, u32 before) {
        params.positions[u64(token) * kNumRanks + other] =
            goes ? static_cast<i32>(position + before) : -1;
      });
      position += span.total();
    }
  }
  if (is_good && other != me) {
    u32 base = 0;
    for (u32 source = 0; source < other; ++source) base += counts[source * kNumRanks + me];
    const i32* tokens = slab::list(call.slabs, me, epoch, other);
    for (u32 i = threadIdx.x; i < u32(counts[other * kNumRanks + me]); i += blockDim.x) {
      params.work[turn_of(counts, me, other, i)] =
          comm::WorkItem::make(other, static_cast<u32>(tokens[i]), base + i);
    }
  }
  comm::finish(call, epoch);
}
