// Loads, stores and fences that CUDA C++ has no plain words for. Names: operation_order_scope_type.
//
// Every statement carries a "memory" clobber: without it the compiler may move ordinary accesses
// across an acquire or a release.
#pragma once

#include "common/types.cuh"

namespace epcomm::ptx {

__device__ __forceinline__ u64 ld_acquire_sys_u64(const u64* address) {
  u64 value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ u32 ld_acquire_sys_u32(const u32* address) {
  u32 value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void st_release_sys_u64(u64* address, u64 value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ void st_release_sys_u32(u32* address, u32 value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ u32 ld_relaxed_sys_u32(const u32* address) {
  u32 value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void st_relaxed_sys_u32(u32* address, u32 value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// For cells that tell by their value that they have arrived, and order nothing else.
__device__ __forceinline__ u64 ld_relaxed_sys_u64(const u64* address) {
  u64 value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void st_relaxed_sys_u64(u64* address, u64 value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// Two neighbours; each is whole, the pair need not be.
struct U64Pair {
  u64 value[2];
};

__device__ __forceinline__ U64Pair ld_relaxed_sys_u64x2(const u64* address) {
  U64Pair pair;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(pair.value[0]), "=l"(pair.value[1])
               : "l"(address)
               : "memory");
  return pair;
}

__device__ __forceinline__ void st_relaxed_sys_u64x2(u64* address, const U64Pair& pair) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(pair.value[0]),
               "l"(pair.value[1])
               : "memory");
}

__device__ __forceinline__ void fence_acq_rel_sys() {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
}

// Between warps of a block, through shared memory.
__device__ __forceinline__ u32 ld_acquire_cta_shared_u32(const u32* address) {
  u32 value;
  asm volatile("ld.acquire.cta.shared.u32 %0, [%1];"
               : "=r"(value)
               : "r"(static_cast<u32>(__cvta_generic_to_shared(address)))
               : "memory");
  return value;
}

__device__ __forceinline__ void st_release_cta_shared_u32(u32* address, u32 value) {
  asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(
                   static_cast<u32>(__cvta_generic_to_shared(address))),
               "r"(value)
               : "memory");
}

// Adds, and returns what was there before.
__device__ __forceinline__ u32 add_acq_rel_gpu_u32(u32* address, u32 value) {
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(address), "r"(value)
               : "memory");
  return before;
}

// A row is read once: it need not displace anything in L1.
__device__ __forceinline__ Vec16 ld_no_allocate_vec16(const void* address) {
  Vec16 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void st_no_allocate_vec16(void* address, const Vec16& v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address),
               "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

// Orders this thread's ordinary accesses before its later bulk copies, and the other way round.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

// A barrier among num_threads threads of the block; __syncthreads is barrier 0. By all lanes of
// each warp, at one place: aligned barriers take lanes that are together, which __syncwarp brings
// about. NOTE: aligned, as __syncthreads is. The other kind ended a kernel with an illegal
// instruction where lanes of a warp came to it one after another, though all of them came (H200,
// CUDA 13.0).
__device__ __forceinline__ void barrier_sync(u32 barrier, u32 num_threads) {
  __syncwarp();
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// The same; tells all of them whether it holds for each.
__device__ __forceinline__ bool barrier_sync_and(u32 barrier, u32 num_threads, bool holds) {
  u32 all;
  __syncwarp();
  asm volatile(
      "{.reg .pred p, q;\n"
      "setp.ne.u32 p, %3, 0;\n"
      "barrier.red.and.aligned.pred q, %1, %2, p;\n"
      "selp.u32 %0, 1, 0, q;}"
      : "=r"(all)
      : "r"(barrier), "r"(num_threads), "r"(u32(holds))
      : "memory");
  return all != 0;
}

__device__ __forceinline__ u64 global_timer_ns() {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

__device__ __forceinline__ void sleep_ns(u32 duration) {
  asm volatile("nanosleep.u32 %0;" ::"r"(duration) : "memory");
}

}  // namespace epcomm::ptx
