// Stands in for cuda_src/ptx/bulk.cuh: the same functions on the CPU.
#pragma once

#include "common/types.cuh"

namespace epcomm::ptx {

inline void mbarrier_init(u64* barrier) { emulator::barrier_init(barrier); }
inline void fence_mbarrier_init() {}
inline void mbarrier_wait(u64* barrier, u32 parity) { emulator::barrier_wait(barrier, parity); }

inline void bulk_load(void* shared, const void* global, u32 num_bytes, u64* barrier) {
  emulator::start_load(shared, global, num_bytes, barrier);
}

inline void bulk_store(void* global, const void* shared, u32 num_bytes) {
  emulator::start_store(global, shared, num_bytes);
}

inline void bulk_commit() { emulator::commit_stores(); }

template <u32 kNumPending>
inline void bulk_wait_read() {
  emulator::wait_stores_read(kNumPending);
}

template <u32 kNumPending>
inline void bulk_wait() {
  emulator::wait_stores(kNumPending);
}

}  // namespace epcomm::ptx
