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

}  // namespace epcomm

extern "C" __global__ void __launch_bounds__(1024, 1)
    epcomm_layout(const __grid_constant__ epcomm::LayoutParams params) {
  using namespace epcomm;
  extern __shared__ __align__(128) u8 shared_memory[];
  // [num_experts] pairs an expert, then [kNumRanks] tokens a rank.
  i32* per_expert = reinterpret_cast<i32*>(shared_memory);
  i32* per_rank = per_expert + params.num_experts;
  for (u32 i = threadIdx.x; i < params.num_experts + kNumRanks; i += blockDim.x) per_expert[i] = 0;
  __syncthreads();
  const u32 experts_per_rank = params.num_experts / kNumRanks;
  for (u32 token = threadIdx.x; token < params.num_tokens; token += blockDim.x) {
    u32 ranks = 0;
    for (u32 k = 0; k < params.num_topk; ++k) {
      const i64 expert =
          comm::choice_at(params.topk_idx, params.is_64_bit, u64(token) * params.num_topk + k);
      if (expert == -1) continue;
      if (expert < -1 || expert >= i64(params.num_experts)) {
        params.record->failure = comm::kBadExpert;
        continue;
      }
      atomicAdd(per_expert + expert, 1);
      ranks |= 1u << (u32(expert) / experts_per_rank);
    }
    for (u32 rank = 0; rank < kNumRanks; ++rank) {
      const bool goes = (ranks >> rank) & 1;
      params.is_token_in_rank[u64(token) * kNumRanks + rank] = goes;
      if (goes) atomicAdd(per_rank + rank, 1);
    }
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < params.num_experts; i += blockDim.x) {
    params.num_tokens_per_expert[i] = per_expert[i];
  }
  if (threadIdx.x < kNumRanks) params.num_tokens_per_rank[threadIdx.x] = per_rank[threadIdx.x];
}
