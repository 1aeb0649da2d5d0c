// Meets all ranks, and compares what they are about to do: before slabs grow, which all must do.
//
// In:   the call's header. Out: nothing; a failure goes to the record.
// Grid: one block.
//
// Ordering: that of an arrival, see comm/call.cuh. A rank whose slab is large enough makes the call
// itself meanwhile; its header carries the same call, and its kernel meets this one.
#include "comm/call.cuh"
#include "common/types.cuh"

namespace epcomm {

struct AgreeParams {
  comm::Call call;
};

static_assert(sizeof(AgreeParams) == kAgreeParamsBytes, "epcomm/engines/cuda_params.py differs");

}  // namespace epcomm

extern "C" __global__ void __launch_bounds__(1024, 1)
    epcomm_agree(const __grid_constant__ epcomm::AgreeParams params) {
  using namespace epcomm;
  const comm::Call& call = params.call;
  const u32 epoch = comm::begin(call);
  if (!comm::may_begin(call)) return;
  comm::post_arrival(call, epoch);
  comm::wait_arrival(call, comm::kArrival, epoch, blockDim.x);
  comm::finish(call, epoch);
}
