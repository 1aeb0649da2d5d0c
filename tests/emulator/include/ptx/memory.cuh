// Stands in for cuda_src/ptx/memory.cuh: the same functions on the CPU.
#pragma once

#include "common/types.cuh"

namespace epcomm::ptx {

template <typename T>
inline T load_acquire(const T* address) {
  emulator::poll();
  const T value = __atomic_load_n(address, __ATOMIC_ACQUIRE);
  emulator::observe_fences(address);
  return value;
}

template <typename T>
inline void store_release(T* address, T value) {
  emulator::publish_fences(address);
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
  emulator::maybe_nap();
}

inline u64 ld_acquire_sys_u64(const u64* address) { return load_acquire(address); }
inline u32 ld_acquire_sys_u32(const u32* address) { return load_acquire(address); }
inline void st_release_sys_u64(u64* address, u64 value) { store_release(address, value); }
inline void st_release_sys_u32(u32* address, u32 value) { store_release(address, value); }

inline u64 ld_relaxed_sys_u64(const u64* address) {
  emulator::poll();
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}

inline u32 ld_relaxed_sys_u32(const u32* address) {
  emulator::maybe_yield();
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}

inline void st_relaxed_sys_u64(u64* address, u64 value) {
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
  emulator::maybe_nap();
}

struct U64Pair {
  u64 value[2];
};

inline U64Pair ld_relaxed_sys_u64x2(const u64* address) {
  if (reinterpret_cast<u64>(address) % sizeof(U64Pair) != 0) {
    emulator::fail("%p is not aligned to 16 bytes", static_cast<const void*>(address));
  }
  return {ld_relaxed_sys_u64(address), ld_relaxed_sys_u64(address + 1)};
}

inline void st_relaxed_sys_u64x2(u64* address, const U64Pair& pair) {
  if (reinterpret_cast<u64>(address) % sizeof(U64Pair) != 0) {
    emulator::fail("%p is not aligned to 16 bytes", static_cast<const void*>(address));
  }
  st_relaxed_sys_u64(address, pair.value[0]);
  st_relaxed_sys_u64(address + 1, pair.value[1]);
}

inline u32 ld_acquire_cta_shared_u32(const u32* address) { return load_acquire(address); }
inline void st_release_cta_shared_u32(u32* address, u32 value) { store_release(address, value); }

inline void fence_acq_rel_sys() { emulator::fence_memory(); }

inline void st_relaxed_sys_u32(u32* address, u32 value) {
  emulator::publish_fences(address);
  emulator::begin_relaxed();
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
  emulator::end_relaxed();
  emulator::maybe_nap();
}

inline u32 add_acq_rel_gpu_u32(u32* address, u32 value) {
  emulator::maybe_yield();
  emulator::publish_fences(address);
  const u32 before = __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
  emulator::observe_fences(address);
  return before;
}

inline void check_aligned(const void* address) {
  if (reinterpret_cast<u64>(address) % sizeof(Vec16) != 0) {
    emulator::fail("%p is not aligned to 16 bytes", address);
  }
}

inline Vec16 ld_no_allocate_vec16(const void* address) {
  check_aligned(address);
  emulator::maybe_yield();
  return *static_cast<const Vec16*>(address);
}

inline void st_no_allocate_vec16(void* address, const Vec16& v) {
  check_aligned(address);
  emulator::maybe_yield();
  *static_cast<Vec16*>(address) = v;
}

inline void fence_proxy_async() { emulator::fence_copies(); }

inline bool barrier_sync_and(u32 barrier, u32 num_threads, bool holds,
                             emulator::Site site = emulator::Site::current()) {
  emulator::warp_barrier(site);  // aligned: all lanes of a warp come to one place
  return emulator::block_all(barrier, num_threads, holds, site);
}

inline void barrier_sync(u32 barrier, u32 num_threads,
                         emulator::Site site = emulator::Site::current()) {
  emulator::warp_barrier(site);
  emulator::block_all(barrier, num_threads, true, site);
}

inline u64 global_timer_ns() { return emulator::now_ns(); }

inline void sleep_ns(u32) { emulator::poll(); }

}  // namespace epcomm::ptx
