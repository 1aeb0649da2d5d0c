// Copies of single vectors from global to shared memory that a thread waits for later (sm_80 and
// later). PTX ISA, "cp.async".
#pragma once

#include "common/types.cuh"

namespace epcomm::ptx {

// Starts a copy; it belongs to the thread's open group. Both addresses are multiples of 16 bytes.
__device__ __forceinline__ void copy_async_vec16(Vec16* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<u32>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}

// Closes the thread's open group.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the thread's latest groups are in shared memory, for itself to read.
template <u32 kNumPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNumPending) : "memory");
}

}  // namespace epcomm::ptx
