// The few types and helpers that every file needs. NVRTC has no libc headers, so they are made
// here.
#pragma once

namespace epcomm {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

static_assert(sizeof(u32) == 4 && sizeof(u64) == 8, "cells are exchanged between ranks");

constexpr u32 kWarpSize = 32;
constexpr u32 kFullWarp = 0xffffffffu;

// What moves in one access of one thread.
struct alignas(16) Vec16 {
  u32 word[4];
};

template <typename T>
__device__ __forceinline__ T min_of(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
__device__ __forceinline__ constexpr T max_of(T a, T b) {
  return a > b ? a : b;
}

template <typename T>
__device__ __forceinline__ T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

__device__ __forceinline__ u32 lane_index() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ u32 warp_index() { return threadIdx.x / kWarpSize; }

}  // namespace epcomm
