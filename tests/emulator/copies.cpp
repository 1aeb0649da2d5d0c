// Bulk copies, which do as late as they may what they must do, or earlier, by lot.
#include "block.h"
#include "runtime.h"

namespace emulator {
namespace {

constexpr std::uint16_t kMark = 0xba44;
constexpr unsigned char kInFlight = 0xa5;
constexpr unsigned kVectorBytes = 16;

BarrierState& state_of(Barrier* barrier) {
  BarrierState& state = *reinterpret_cast<BarrierState*>(barrier);
  if (!block().owns_shared(barrier, sizeof *barrier) || state.mark != kMark) {
    fail("no barrier was made at %p", static_cast<void*>(barrier));
  }
  return state;
}

void check_copy(const void* global, const void* shared, unsigned num_bytes) {
  const auto bits = reinterpret_cast<std::uintptr_t>(global) |
                    reinterpret_cast<std::uintptr_t>(shared) | num_bytes;
  if (bits % 16 != 0 || num_bytes == 0) {
    fail("a bulk copy of %u bytes between %p and %p: no multiples of 16", num_bytes, global,
         shared);
  }
  if (!block().owns_shared(shared, num_bytes)) {
    fail("a bulk copy of %u bytes at %p leaves the block's shared memory", num_bytes, shared);
  }
}

// Lets a copy start with what its thread and its thread's fences know.
Copy& start(Copy copy) {
  Fiber& fiber = block().current();
  block().identities().lend(fiber.reader);
  block().identities().lend(fiber.writer);
  fiber.copies.push_back(std::make_unique<Copy>(std::move(copy)));
  Copy& started = *fiber.copies.back();
  publish_all(fiber, &started);
  {
    InNameOf name(fiber.writer);
    observe(&started);
  }
  InNameOf name(fiber.reader);
  observe(fences_key(&started));
  return started;
}

void read(Copy& copy, const Fiber& fiber) {
  if (copy.is_read) return;
  copy.is_read = true;
  copy.held.resize(copy.num_bytes);
  move_bytes(copy.held.data(), copy.from, copy.num_bytes);
  InNameOf name(fiber.reader);
  note_read(copy.from, copy.num_bytes);
  publish(&copy.is_read);
}

void write(Copy& copy, const Fiber& fiber) {
  read(copy, fiber);
  if (copy.is_written) return;
  copy.is_written = true;
  move_bytes(copy.to, copy.held.data(), copy.num_bytes);
  InNameOf name(fiber.writer);
  observe(&copy.is_read);
  note_write(copy.to, copy.num_bytes);
  publish(&copy.is_written);
}

// What was published under a key is known to the thread, and to copies that it starts later.
void observe_copy(const Fiber& fiber, const void* key) {
  {
    InNameOf name(fiber.identity);
    observe(key);
  }
  InNameOf name(fiber.fences);
  observe(key);
}

// Ends a load of any thread of the block.
void finish_load(Fiber& fiber, std::size_t index) {
  Copy& copy = *fiber.copies[index];
  write(copy, fiber);
  {
    InNameOf name(fiber.writer);
    publish(copy.barrier);
    publish(fences_key(copy.barrier));
  }
  BarrierState& state = *reinterpret_cast<BarrierState*>(copy.barrier);
  state.loader = 0;
  ++state.num_phases;
  fiber.copies.erase(fiber.copies.begin() + static_cast<std::ptrdiff_t>(index));
}

void finish_load_of(Barrier* barrier) {
  const unsigned loader = state_of(barrier).loader;
  if (loader == 0) return;
  Fiber& fiber = block().fiber(loader - 1);
  for (std::size_t i = 0; i < fiber.copies.size(); ++i) {
    if (fiber.copies[i]->barrier == barrier) return finish_load(fiber, i);
  }
}

// In the thread's own name: it reads and writes as the thread itself would.
void finish_vector(const VectorCopy& copy) {
  move_bytes(copy.to, copy.from, kVectorBytes);
  note_read(copy.from, kVectorBytes);
  note_write(copy.to, kVectorBytes);
}

bool is_due(const Fiber& fiber, const Copy& copy, unsigned num_pending) {
  return copy.barrier == nullptr && copy.group + num_pending < fiber.num_groups;
}

}  // namespace

void move_some_copy(Fiber& fiber, Random& random) {
  if (fiber.copies.empty()) return;
  const unsigned i = random.draw(static_cast<unsigned>(fiber.copies.size()));
  Copy& copy = *fiber.copies[i];
  if (random.is_one_in(2)) {
    read(copy, fiber);
  } else if (copy.barrier != nullptr) {
    finish_load(fiber, i);
  } else {
    write(copy, fiber);
  }
}

void check_no_copies(const Fiber& fiber) {
  if (!fiber.copies.empty()) fail("the thread ends before its bulk copies do");
  if (!fiber.vector_copies.empty()) fail("the thread ends before its copies of vectors do");
}

void barrier_init(Barrier* barrier) {
  InRuntime runtime;
  if (!block().owns_shared(barrier, sizeof *barrier)) {
    fail("a barrier at %p, outside of the block's shared memory", static_cast<void*>(barrier));
  }
  *reinterpret_cast<BarrierState*>(barrier) = {kMark, 0, 0};
}

void barrier_arrive(Barrier* barrier) {
  InRuntime runtime;
  BarrierState& state = state_of(barrier);
  if (state.loader != 0) fail("a second arrival in one phase of a barrier");
  publish_all(block().current(), barrier);
  ++state.num_phases;
}

void barrier_wait(Barrier* barrier, unsigned parity) {
  InRuntime runtime;
  Block& own = block();
  const Fiber& fiber = own.current();
  while (state_of(barrier).num_phases % 2 == parity) {
    if (own.random().is_one_in(4)) finish_load_of(barrier);
    own.poll();
  }
  observe_all(fiber, barrier);
}

void start_load(void* shared, const void* global, unsigned num_bytes, Barrier* barrier) {
  InRuntime runtime;
  check_copy(global, shared, num_bytes);
  BarrierState& state = state_of(barrier);
  if (state.loader != 0) fail("a second arrival in one phase of a barrier");
  const Fiber& fiber = block().current();
  state.loader = static_cast<std::uint16_t>(fiber.index + 1);
  publish_all(fiber, barrier);
  Copy& copy = start({shared, global, num_bytes, barrier});
  if (block().random().is_one_in(2)) read(copy, fiber);
  // The copy may have begun.
  fill_bytes(shared, kInFlight, num_bytes);
  InNameOf name(fiber.writer);
  note_write(shared, num_bytes);
}

void start_store(void* global, const void* shared, unsigned num_bytes) {
  InRuntime runtime;
  check_copy(global, shared, num_bytes);
  const Fiber& fiber = block().current();
  Copy& copy = start({global, shared, num_bytes, nullptr, fiber.num_groups});
  if (block().random().is_one_in(2)) read(copy, fiber);
}

void commit_stores() { ++block().current().num_groups; }

void wait_stores_read(unsigned num_pending) {
  InRuntime runtime;
  Fiber& fiber = block().current();
  for (const auto& copy : fiber.copies) {
    if (!is_due(fiber, *copy, num_pending)) continue;
    read(*copy, fiber);
    observe_copy(fiber, &copy->is_read);
  }
}

void wait_stores(unsigned num_pending) {
  InRuntime runtime;
  Fiber& fiber = block().current();
  for (std::size_t i = 0; i < fiber.copies.size();) {
    Copy& copy = *fiber.copies[i];
    if (!is_due(fiber, copy, num_pending)) {
      ++i;
      continue;
    }
    write(copy, fiber);
    observe_copy(fiber, &copy.is_written);
    fiber.copies.erase(fiber.copies.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void start_vector(void* shared, const void* global) {
  check_copy(global, shared, kVectorBytes);
  Fiber& fiber = block().current();
  fill_bytes(shared, kInFlight, kVectorBytes);
  note_write(shared, kVectorBytes);
  const VectorCopy copy = {shared, global, fiber.num_vector_groups};
  // Early or late: what lies there may change meanwhile.
  if (block().random().is_one_in(4)) {
    finish_vector(copy);
  } else {
    fiber.vector_copies.push_back(copy);
  }
}

void commit_vectors() { ++block().current().num_vector_groups; }

void wait_vectors(unsigned num_pending) {
  Fiber& fiber = block().current();
  auto& copies = fiber.vector_copies;
  while (!copies.empty() && copies.front().group + num_pending < fiber.num_vector_groups) {
    finish_vector(copies.front());
    copies.pop_front();
  }
}

}  // namespace emulator
