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
#include "comm/call.cuh"
#include "common/types.cuh"
#include "kernels/combine_rows.cuh"
#include "kernels/combine_send.cuh"
#include "kernels/combine_sum.cuh"

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
