// Where this rank's tokens go.
//
// In:   topk_idx [num_tokens, num_topk] i32 or i64, -1 for no choice.
// Out:  num_tokens_per_rank [kNumRanks], num_tokens_per_expert [num_experts], is_token_in_rank
//       [num_tokens, kNumRanks].
// Grid: one block. It counts in shared memory, so that nothing has to be zeroed before.
// No peer takes part.
#include "comm/call.cuh"
#include "comm/choices.cuh"
#include "common/types.cuh"

namespace epcomm {

struct LayoutParams {
  const void* topk_idx;
  i32* num_tokens_per_rank;
  i32* num_tokens_per_expert;
  bool* is_token_in_rank;
  comm::FailureRecord* record;
  u32 num_tokens;
  u32 num_topk;
  u32 num_experts;
  u32 is_64_bit;
};

static_assert(sizeof(LayoutParams) == kLayoutParamsBytes, "epcomm/engines/cuda_params.py differs");

// Counts the choices of a warp's tokens, from first on, and returns the ranks that hold those of
// the lane's token, as bits. By all lanes of a warp.
__device__ inline u32 count_choices(const LayoutParams& params, u32 first, i32* per_expert) {
  const u32 experts_per_rank = params.num_experts / kNumRanks;
  u32 ranks = 0;
  const auto count = [&](i64 expert, u32 own) {
    const bool is_expert = expert >= 0 && expert < i64(params.num_experts);
    if (is_expert) atomicAdd(per_expert + expert, 1);
    if (!is_expert && expert != -1) params.record->failure = comm::kBadExpert;
    const u32 holder = is_expert ? u32(expert) / experts_per_rank : kNumRanks;
#pragma unroll
    for (u32 rank = 0; rank < kNumRanks; ++rank) {
      const u32 here = __ballot_sync(kFullWarp, holder == rank);
      if ((here & own) != 0) ranks |= 1u << rank;
    }
  };
  comm::for_choices(params.topk_idx, params.is_64_bit, params.num_topk, first, params.num_tokens,
                    count);
  return ranks;
}

}  // namespace epcomm

extern "C" __global__ void __launch_bounds__(kRouteThreads, 1)
    epcomm_layout(const __grid_constant__ epcomm::LayoutParams params) {
  using namespace epcomm;
  extern __shared__ __align__(128) u8 shared_memory[];
  // [num_experts] pairs an expert, then [kNumRanks] tokens a rank.
  i32* per_expert = reinterpret_cast<i32*>(shared_memory);
  i32* per_rank = per_expert + params.num_experts;
  for (u32 i = threadIdx.x; i < params.num_experts + kNumRanks; i += blockDim.x) per_expert[i] = 0;
  __syncthreads();
  // By whole warps, which count a rank's tokens with one vote: all would add to few counters.
  u32 num_tokens_of_rank = 0;  // of rank lane_index()
  for (u32 first = warp_index() * kWarpSize; first < params.num_tokens; first += blockDim.x) {
    const u32 token = first + lane_index();
    const bool exists = token < params.num_tokens;
    const u32 ranks = count_choices(params, first, per_expert);
#pragma unroll
    for (u32 rank = 0; rank < kNumRanks; ++rank) {
      const bool goes = (ranks >> rank) & 1;
      if (exists) params.is_token_in_rank[u64(token) * kNumRanks + rank] = goes;
      const u32 going = __ballot_sync(kFullWarp, goes);
      if (rank == lane_index()) num_tokens_of_rank += __popc(going);
    }
  }
  if (lane_index() < kNumRanks) atomicAdd(per_rank + lane_index(), i32(num_tokens_of_rank));
  __syncthreads();
  for (u32 i = threadIdx.x; i < params.num_experts; i += blockDim.x) {
    params.num_tokens_per_expert[i] = per_expert[i];
  }
  if (threadIdx.x < kNumRanks) params.num_tokens_per_rank[threadIdx.x] = per_rank[threadIdx.x];
}
