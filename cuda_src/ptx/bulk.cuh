// Bulk copies between global and shared memory (sm_90 and later), and the barriers they complete
// on.
//
// Addresses and sizes are multiples of 16 bytes. PTX ISA, "cp.async.bulk" and "mbarrier".
#pragma once

#include "common/types.cuh"

namespace epcomm::ptx {

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Makes barriers for copies that one thread at a time announces.
__device__ __forceinline__ void mbarrier_init(u64* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// Makes initialised barriers known to the copy engine. By the thread that made them.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Waits until the barrier's phase of this parity is complete. All bytes of its copies are then
// visible to the waiting thread.
__device__ __forceinline__ void mbarrier_wait(u64* barrier, u32 parity) {
  u32 is_complete = 0;
  while (!is_complete) {
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(is_complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// Starts a copy into shared memory; it completes the barrier's current phase.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, u32 num_bytes,
                                          u64* barrier) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(num_bytes)
      : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(num_bytes), "r"(shared_address(barrier))
      : "memory");
}

// Starts a copy out of shared memory; it belongs to the thread's open group.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, u32 num_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(num_bytes)
               : "memory");
}

// Closes the thread's open group.
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all but the latest groups have read their shared memory: it may be written again.
template <u32 kNumPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kNumPending) : "memory");
}

// Waits until all but the latest groups have written their global memory.
template <u32 kNumPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kNumPending) : "memory");
}

}  // namespace epcomm::ptx
