// What kernels on the CPU ask of the runtime (runtime.cpp, copies.cpp).
//
// A block is an OS thread, a CUDA thread a fiber of it, and a warp 32 fibers that follow one
// another. The next fiber is drawn by lot whenever one waits, so threads meet in any order.
#pragma once

#include <source_location>

namespace emulator {

using Site = std::source_location;

constexpr unsigned kWarpLanes = 32;
constexpr unsigned kNumBarriers = 16;

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// What a thread knows of itself.
struct Thread {
  Dim3 thread_idx, block_idx, block_dim, grid_dim;
};

const Thread& self();

// Ends the launch with a message: the kernel did what no kernel may do.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// --- meeting -----------------------------------------------------------------------------------

// Waits for so many threads of the block, which must come to the same place; true if each of them
// gave true. barrier: below kNumBarriers.
bool block_all(unsigned barrier, unsigned num_threads, bool value, Site site);

// Waits for all lanes of the warp, which must come to the same place, and returns what each of them
// gave. Orders no memory. The result lives until the warp's next call but one.
const unsigned* warp_gather(unsigned value, Site site);

// Waits for all lanes of the warp; orders their memory accesses.
void warp_barrier(Site site);

// --- waiting -----------------------------------------------------------------------------------

// Lets others go on: the thread waits in a loop for what somebody else will do.
void poll();

// Lets others go on now and then, by lot.
void maybe_yield();

// What the thread has just published may be all that others see of the block for a while, by lot.
void maybe_nap();

unsigned long long now_ns();

// --- bulk copies -------------------------------------------------------------------------------

using Barrier = unsigned long long;

void barrier_init(Barrier* barrier);
void barrier_arrive(Barrier* barrier);
void barrier_wait(Barrier* barrier, unsigned parity);
void start_load(void* shared, const void* global, unsigned num_bytes, Barrier* barrier);
void start_store(void* global, const void* shared, unsigned num_bytes);
void commit_stores();
void wait_stores_read(unsigned num_pending);
void wait_stores(unsigned num_pending);

// Copies of vectors into shared memory, for the thread itself.
void start_vector(void* shared, const void* global);
void commit_vectors();
void wait_vectors(unsigned num_pending);

// Makes the thread's memory accesses known to copies that start later.
void fence_copies();

// What a release and an acquire at this address pass on about fence_copies.
void publish_fences(const void* address);
void observe_fences(const void* address);

// A fence. Relaxed stores between begin_relaxed and end_relaxed publish what the thread knew then.
void fence_memory();
void begin_relaxed();
void end_relaxed();

}  // namespace emulator
