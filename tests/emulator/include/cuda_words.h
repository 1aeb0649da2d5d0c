// The words of CUDA C++ that the kernels use, for g++. Included before all else.
//
// A block is an OS thread, so what a block shares is thread_local. A CUDA thread is a fiber of it.
#pragma once

#include "runtime.h"

#define __device__
#define __forceinline__ inline
#define __noinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(num_bytes) __attribute__((aligned(num_bytes)))
// In a function, thread_local implies static; and it may stand behind extern, as static may not.
#define __shared__ thread_local

// What a kernel means by `extern __shared__ u8 shared_memory[]`: as much as an H200 lets a block
// have.
constexpr unsigned kSharedMemoryBytes = 227 * 1024;
extern "C" {
thread_local __align__(128) unsigned char shared_memory[kSharedMemoryBytes];
}

#define threadIdx (emulator::self().thread_idx)
#define blockIdx (emulator::self().block_idx)
#define blockDim (emulator::self().block_dim)
#define gridDim (emulator::self().grid_dim)

inline int __syncthreads_and(int value, emulator::Site site = emulator::Site::current()) {
  return emulator::block_all(0, blockDim.x, value != 0, site);
}

inline void __syncthreads(emulator::Site site = emulator::Site::current()) {
  __syncthreads_and(1, site);
}

inline int __syncthreads_or(int value, emulator::Site site = emulator::Site::current()) {
  return !__syncthreads_and(value == 0, site);
}

// --- warps: all lanes take part ----------------------------------------------------------------

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) emulator::fail("mask %#x: the emulator knows whole warps only", mask);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       emulator::Site site = emulator::Site::current()) {
  check_mask(mask);
  emulator::warp_barrier(site);
}

template <typename T>
const unsigned* gather_words(unsigned mask, T value, emulator::Site site) {
  static_assert(sizeof(T) == sizeof(unsigned), "the emulator shuffles 4-byte words only");
  check_mask(mask);
  return emulator::warp_gather(__builtin_bit_cast(unsigned, value), site);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned lane,
              emulator::Site site = emulator::Site::current()) {
  const unsigned* words = gather_words(mask, value, site);
  return __builtin_bit_cast(T, words[lane % emulator::kWarpLanes]);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta,
                 emulator::Site site = emulator::Site::current()) {
  const unsigned* words = gather_words(mask, value, site);
  const unsigned lane = threadIdx.x % emulator::kWarpLanes;
  return lane < delta ? value : __builtin_bit_cast(T, words[lane - delta]);
}

inline unsigned __ballot_sync(unsigned mask, int value,
                              emulator::Site site = emulator::Site::current()) {
  const unsigned* words = gather_words(mask, value != 0 ? 1u : 0u, site);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < emulator::kWarpLanes; ++lane) bits |= words[lane] << lane;
  return bits;
}

inline int __all_sync(unsigned mask, int value, emulator::Site site = emulator::Site::current()) {
  return __ballot_sync(mask, value, site) == 0xffffffffu;
}

inline int __any_sync(unsigned mask, int value, emulator::Site site = emulator::Site::current()) {
  return __ballot_sync(mask, value, site) != 0;
}

// --- memory ------------------------------------------------------------------------------------

template <typename T>
T atomicAdd(T* address, T value) {
  emulator::maybe_yield();
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <typename T>
T atomicExch(T* address, T value) {
  emulator::maybe_yield();
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}

template <typename T>
T atomicOr(T* address, T value) {
  emulator::maybe_yield();
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

template <typename T>
T atomicMax(T* address, T value) {
  emulator::maybe_yield();
  T before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (before < value && !__atomic_compare_exchange_n(address, &before, value, false,
                                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}

template <typename T>
T atomicCAS(T* address, T expected, T value) {
  emulator::maybe_yield();
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

// NOTE: a fence that ThreadSanitizer does not know; only failure records rely on it.
inline void __threadfence_system() { asm volatile("mfence" ::: "memory"); }

// --- numbers -----------------------------------------------------------------------------------

inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __ffs(int word) { return __builtin_ffs(word); }
