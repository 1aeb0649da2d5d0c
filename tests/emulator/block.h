// A block while it runs.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "order.h"
#include "runtime.h"

namespace emulator {

// A copy on its way. Only what must have happened has surely happened.
struct Copy {
  void* to;
  const void* from;
  unsigned num_bytes;
  Barrier* barrier;    // of a load; null for a store
  unsigned group = 0;  // of a store: which of its thread's groups it belongs to
  bool is_read = false, is_written = false;
  std::vector<unsigned char> held = {};
};

// A vector on its way into shared memory, which its thread alone will read.
struct VectorCopy {
  void* to;
  const void* from;
  unsigned group;
};

// The barrier's state, in the barrier's own memory.
struct BarrierState {
  std::uint16_t mark;
  std::uint16_t loader;      // 1 + the thread whose load the current phase waits for, or 0
  std::uint32_t num_phases;  // that are complete
};
static_assert(sizeof(BarrierState) == sizeof(Barrier));

struct Fiber {
  Thread thread;
  void* stack_pointer = nullptr;
  unsigned index = 0;
  Identity identity, fences;
  Identity fenced, reader, writer;  // made when first needed
  std::vector<std::unique_ptr<Copy>> copies;
  unsigned num_groups = 0;  // closed ones
  std::deque<VectorCopy> vector_copies;
  unsigned num_vector_groups = 0;
};

// Where threads wait for one another, again and again. What they leave there is kept for two
// rounds: some are still to leave the last one when others come to the next.
struct Meeting {
  struct Round {
    bool is_all = true;               // of block_all
    unsigned words[kWarpLanes] = {};  // of warp_gather
  };
  std::vector<Fiber*> waiting = {};
  Site site = {};             // where the first one came, and all must come
  unsigned num_expected = 0;  // as the first one said, and all must say
  unsigned num_rounds = 0;
  Round rounds[2];

  Round& round() { return rounds[num_rounds % 2]; }
};

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2 + 1) { next(); }
  // Below a bound.
  unsigned draw(unsigned bound) { return static_cast<unsigned>((next() >> 33) % bound); }
  bool is_one_in(unsigned n) { return draw(n) == 0; }

 private:
  std::uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    return state_ ^= state_ << 17;
  }
  std::uint64_t state_;
};

class Block {
 public:
  Block(void (*entry)(const void*), const void* params, const Thread& shape,
        unsigned char* shared_memory, unsigned shared_bytes, std::uint64_t seed,
        Identities& identities);
  ~Block();

  // Runs all threads to their end, or until some block of any launch fails.
  void run();

  Fiber& current() { return *current_; }
  const Identity& identity() const { return identity_; }
  Identities& identities() { return identities_; }
  Random& random() { return random_; }
  Meeting& barrier(unsigned index) { return barriers_[index]; }
  Meeting& warp() { return warps_[current_->index / kWarpLanes]; }

  // The current fiber waits: until all came to the meeting, until others had their turn, or not at
  // all but others may come first.
  void meet(Meeting& meeting, unsigned num_expected, const Site& site);
  void poll();
  void yield();
  [[noreturn]] void leave();

  Fiber& fiber(unsigned index) { return fibers_[index]; }
  unsigned num_threads() const { return static_cast<unsigned>(fibers_.size()); }
  bool owns_shared(const void* address, unsigned num_bytes) const;

  // Called first by every fiber.
  [[noreturn]] void run_current();

 private:
  void go_on();
  Fiber* pick();
  void rest();
  bool is_held(const Fiber& fiber) const;
  void check_guard();
  [[noreturn]] void report_deadlock();

  void (*entry_)(const void*);
  const void* params_;
  unsigned char* shared_memory_;
  unsigned shared_bytes_;
  Random random_;
  std::vector<Fiber> fibers_;
  std::vector<Meeting> warps_, barriers_;
  std::vector<Fiber*> ready_, polling_;
  Fiber* current_ = nullptr;
  unsigned num_done_ = 0, num_idle_turns_ = 0;
  bool has_moved_ = false;
  unsigned num_picks_ = 0;
  unsigned held_warp_ = ~0u, hold_end_ = 0;  // a warp that is passed over, until so many picks
  unsigned char* stacks_;
  void* stack_pointer_ = nullptr;  // of the OS thread
  Identities& identities_;
  Identity identity_;
  char start_ = 0, end_ = 0;  // keys: what the block's OS thread knows at either end
};

Block& block();

// Within it the current thread does the runtime's work, not its own.
class InRuntime {
 public:
  InRuntime() { block().identity().enter(); }
  ~InRuntime() { block().current().identity.enter(); }
  InRuntime(const InRuntime&) = delete;
};

// Within it the runtime does somebody's work.
class InNameOf {
 public:
  explicit InNameOf(const Identity& identity) { identity.enter(); }
  ~InNameOf() { block().identity().enter(); }
  InNameOf(const InNameOf&) = delete;
};

// Key of what fences know of what is published under another one.
inline const void* fences_key(const void* key) { return static_cast<const char*>(key) + 1; }

// All that the thread knows, and what its fences know. By the runtime.
void publish_all(const Fiber& fiber, const void* key);
void observe_all(const Fiber& fiber, const void* key);

// For the scheduler: some copy of the block goes one step further, by lot.
void move_some_copy(Fiber& fiber, Random& random);
// A thread ends: nothing of its own may be on its way.
void check_no_copies(const Fiber& fiber);

}  // namespace emulator
