// Stands in for cuda_src/ptx/async.cuh: the same functions on the CPU.
#pragma once

#include "common/types.cuh"

namespace epcomm::ptx {

inline void copy_async_vec16(Vec16* shared, const void* global) {
  emulator::start_vector(shared, global);
}

inline void copy_async_commit() { emulator::commit_vectors(); }

template <u32 kNumPending>
inline void copy_async_wait() {
  emulator::wait_vectors(kNumPending);
}

}  // namespace epcomm::ptx
