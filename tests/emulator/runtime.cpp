// Blocks, fibers and how they meet.
#include "runtime.h"

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <thread>

#include "block.h"

// Saves what a function must keep, and goes on where `to` was left.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

namespace emulator {
namespace {

constexpr std::size_t kStackBytes = 64 * 1024;
constexpr unsigned kNumSaved = 6;  // registers that emulator_switch saves
constexpr std::uint64_t kStackMark = 0x5afe57acc5afe57aull;
constexpr unsigned kMaxSharedBytes = 227 * 1024;  // as in cuda_words.h
constexpr unsigned kGuardBytes = 1024;
constexpr unsigned char kGuard = 0xc7;

thread_local Block* running = nullptr;

// How often, and for how long, a warp is passed over.
constexpr unsigned kPicksBetweenHolds = 1000, kMostPicksHeld = 3000, kMostTries = 16;

constexpr unsigned kMaxRanks = 16;
Identities identities[kMaxRanks];

std::mutex failure_mutex;
char failure_text[1024];
std::atomic<bool> has_failure = false;

// Keeps the first failure's text; all blocks end at their next step.
void record_failure(const char* format, va_list arguments) {
  std::lock_guard lock(failure_mutex);
  if (!has_failure) {
    const Thread& thread = self();
    const int used =
        std::snprintf(failure_text, sizeof failure_text,
                      "block %u, thread %u: ", thread.block_idx.x, thread.thread_idx.x);
    std::vsnprintf(failure_text + used, sizeof failure_text - used, format, arguments);
  }
  has_failure = true;
}

void run_fiber() { block().run_current(); }

}  // namespace

Block& block() { return *running; }

const Thread& self() { return block().current().thread; }

unsigned long long now_ns() {
  return static_cast<unsigned long long>(std::chrono::steady_clock::now().time_since_epoch() /
                                         std::chrono::nanoseconds(1));
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record_failure(format, arguments);
  va_end(arguments);
  block().leave();
}

// --- a block -----------------------------------------------------------------------------------

Block::Block(void (*entry)(const void*), const void* params, const Thread& shape,
             unsigned char* shared_memory, unsigned shared_bytes, std::uint64_t seed,
             Identities& identities)
    : entry_(entry),
      params_(params),
      shared_memory_(shared_memory),
      shared_bytes_(shared_bytes),
      random_(seed),
      fibers_(shape.block_dim.x),
      warps_(shape.block_dim.x / kWarpLanes),
      barriers_(kNumBarriers),
      identities_(identities) {
  identity_.make_of_thread();
  running = this;
  for (unsigned i = 0; i < shared_bytes_; ++i) {
    shared_memory_[i] = static_cast<unsigned char>(random_.draw(256));
  }
  std::memset(shared_memory_ + shared_bytes_, kGuard, kGuardBytes);
  stacks_ = static_cast<unsigned char*>(mmap(nullptr, fibers_.size() * kStackBytes,
                                             PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  publish(&start_);
  for (unsigned i = 0; i < fibers_.size(); ++i) {
    Fiber& fiber = fibers_[i];
    fiber.thread = shape;
    fiber.thread.thread_idx.x = i;
    fiber.index = i;
    identities_.lend(fiber.identity);
    identities_.lend(fiber.fences);
    unsigned char* stack = stacks_ + i * kStackBytes;
    std::memcpy(stack, &kStackMark, sizeof kStackMark);
    // As if it had been left at run_fiber's first instruction: saved registers, where to return to,
    // and one word that makes the stack aligned as after a call.
    void** top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
    *--top = reinterpret_cast<void*>(&run_fiber);
    fiber.stack_pointer = top - kNumSaved;
    ready_.push_back(&fiber);
  }
}

Block::~Block() {
  for (Fiber& fiber : fibers_) {
    for (const Identity* identity :
         {&fiber.identity, &fiber.fences, &fiber.fenced, &fiber.reader, &fiber.writer}) {
      identities_.take_back(*identity);
    }
  }
  munmap(stacks_, fibers_.size() * kStackBytes);
  running = nullptr;
}

void Block::run() {
  if (has_failure) return;
  current_ = pick();
  emulator_switch(&stack_pointer_, current_->stack_pointer);
  if (has_failure) return;
  observe(&end_);
}

void Block::run_current() {
  Fiber& fiber = *current_;
  fiber.fences.enter();
  observe(&start_);
  fiber.identity.enter();
  observe(&start_);
  entry_(params_);
  publish(&end_);
  identity_.enter();
  check_no_copies(fiber);
  if (std::memcmp(stacks_ + fiber.index * kStackBytes, &kStackMark, sizeof kStackMark) != 0) {
    fail("the thread's stack is too small");
  }
  ++num_done_;
  has_moved_ = true;
  if (num_done_ == num_threads()) {
    check_guard();
    leave();
  }
  go_on();
  __builtin_unreachable();
}

void Block::check_guard() {
  for (unsigned i = shared_bytes_; i < shared_bytes_ + kGuardBytes; ++i) {
    if (shared_memory_[i] != kGuard) {
      fail("byte %u of %u of the block's shared memory was written", i, shared_bytes_);
    }
  }
}

void Block::leave() {
  identity_.enter();
  void* nowhere;
  emulator_switch(&nowhere, stack_pointer_);
  __builtin_unreachable();
}

// By the runtime.
void Block::go_on() {
  Fiber* const before = current_;
  current_ = pick();
  if (current_ == before) return;
  emulator_switch(&before->stack_pointer, current_->stack_pointer);
  identity_.enter();
}

Fiber* Block::pick() {
  if (has_failure) leave();
  if (ready_.empty()) {
    if (polling_.empty()) report_deadlock();
    ready_.swap(polling_);
    if (!has_moved_) rest();
    has_moved_ = false;
  }
  if (random_.is_one_in(8)) move_some_copy(fibers_[random_.draw(num_threads())], random_);
  if (++num_picks_ > hold_end_ && random_.is_one_in(kPicksBetweenHolds)) {
    held_warp_ = random_.draw(static_cast<unsigned>(warps_.size()));
    hold_end_ = num_picks_ + random_.draw(kMostPicksHeld);
  }
  unsigned i = random_.draw(static_cast<unsigned>(ready_.size()));
  for (unsigned tries = 0; is_held(*ready_[i]) && tries < kMostTries; ++tries) {
    i = random_.draw(static_cast<unsigned>(ready_.size()));
  }
  Fiber* const next = ready_[i];
  ready_[i] = ready_.back();
  ready_.pop_back();
  return next;
}

// A slow warp shows who does not wait for it.
bool Block::is_held(const Fiber& fiber) const {
  return num_picks_ <= hold_end_ && fiber.index / kWarpLanes == held_warp_;
}

// All threads wait for what other blocks or copies do.
void Block::rest() {
  if (++num_idle_turns_ % 16 == 0) {
    usleep(20);
  } else {
    sched_yield();
  }
}

void Block::report_deadlock() {
  for (const auto* meetings : {&barriers_, &warps_}) {
    for (const Meeting& meeting : *meetings) {
      if (meeting.waiting.empty()) continue;
      fail("%zu of %u threads wait for ever at %s line %u; %u of the block's %u have ended",
           meeting.waiting.size(), meeting.num_expected, meeting.site.file_name(),
           meeting.site.line(), num_done_, num_threads());
    }
  }
  fail("no thread can go on");
}

void Block::meet(Meeting& meeting, unsigned num_expected, const Site& site) {
  if (meeting.waiting.empty()) {
    meeting.site = site;
    meeting.num_expected = num_expected;
  } else if (meeting.site.line() != site.line() || meeting.num_expected != num_expected ||
             std::strcmp(meeting.site.file_name(), site.file_name()) != 0) {
    fail("threads meet at different places: %s line %u (of %u) and %s line %u (of %u)",
         meeting.site.file_name(), meeting.site.line(), meeting.num_expected, site.file_name(),
         site.line(), num_expected);
  }
  has_moved_ = true;
  meeting.waiting.push_back(current_);
  if (meeting.waiting.size() == num_expected) {
    for (Fiber* fiber : meeting.waiting) ready_.push_back(fiber);
    meeting.waiting.clear();
    ++meeting.num_rounds;
    meeting.round().is_all = true;
  }
  go_on();
}

void Block::poll() {
  polling_.push_back(current_);
  go_on();
}

void Block::yield() {
  has_moved_ = true;
  ready_.push_back(current_);
  go_on();
}

bool Block::owns_shared(const void* address, unsigned num_bytes) const {
  const unsigned char* begin = static_cast<const unsigned char*>(address);
  return begin >= shared_memory_ && begin + num_bytes <= shared_memory_ + shared_bytes_;
}

// --- meeting -----------------------------------------------------------------------------------

void publish_all(const Fiber& fiber, const void* key) {
  {
    InNameOf name(fiber.identity);
    publish(key);
  }
  InNameOf name(fiber.fences);
  publish(fences_key(key));
}

void observe_all(const Fiber& fiber, const void* key) {
  {
    InNameOf name(fiber.identity);
    observe(key);
  }
  InNameOf name(fiber.fences);
  observe(fences_key(key));
}

bool block_all(unsigned barrier, unsigned num_threads, bool value, Site site) {
  InRuntime runtime;
  Block& own = block();
  const Fiber& fiber = own.current();
  Meeting& meeting = own.barrier(barrier);
  Meeting::Round& round = meeting.round();
  round.is_all = round.is_all && value;
  publish_all(fiber, &round);
  own.meet(meeting, num_threads, site);
  observe_all(fiber, &round);
  return round.is_all;
}

const unsigned* warp_gather(unsigned value, Site site) {
  InRuntime runtime;
  Block& own = block();
  Meeting& meeting = own.warp();
  Meeting::Round& round = meeting.round();
  round.words[own.current().index % kWarpLanes] = value;
  own.meet(meeting, kWarpLanes, site);
  return round.words;
}

void warp_barrier(Site site) {
  InRuntime runtime;
  Block& own = block();
  const Fiber& fiber = own.current();
  Meeting& meeting = own.warp();
  Meeting::Round& round = meeting.round();
  publish_all(fiber, &round);
  own.meet(meeting, kWarpLanes, site);
  observe_all(fiber, &round);
}

void fence_copies() {
  {
    InRuntime runtime;
    const Fiber& fiber = block().current();
    {
      InNameOf name(fiber.identity);
      publish(&fiber);
    }
    InNameOf name(fiber.fences);
    observe(&fiber);
  }
  maybe_yield();
}

void publish_fences(const void* address) {
  InRuntime runtime;
  InNameOf name(block().current().fences);
  publish(fences_key(address));
}

void observe_fences(const void* address) {
  InRuntime runtime;
  InNameOf name(block().current().fences);
  observe(fences_key(address));
}

void fence_memory() {
  {
    InRuntime runtime;
    Fiber& fiber = block().current();
    block().identities().lend(fiber.fenced);
    {
      InNameOf name(fiber.identity);
      publish(&fiber.fenced);
    }
    InNameOf name(fiber.fenced);
    observe(&fiber.fenced);
  }
  maybe_yield();
}

void begin_relaxed() {
  Fiber& fiber = block().current();
  {
    InRuntime runtime;
    block().identities().lend(fiber.fenced);
  }
  fiber.fenced.enter();
}

void end_relaxed() { block().current().identity.enter(); }

void poll() {
  InRuntime runtime;
  block().poll();
}

void maybe_yield() {
  InRuntime runtime;
  Block& own = block();
  if (own.random().is_one_in(32)) own.yield();
}

void maybe_nap() {
  if (block().random().is_one_in(8)) usleep(block().random().draw(200));
  maybe_yield();
}

}  // namespace emulator

// --- launches ----------------------------------------------------------------------------------

// Runs a kernel to its end, and returns null, or what it did wrong.
extern "C" const char* emulator_launch(void (*entry)(const void*),
                                       unsigned char* (*shared_memory)(), const void* params,
                                       unsigned num_blocks, unsigned num_threads,
                                       unsigned shared_bytes, unsigned long long seed,
                                       unsigned rank) {
  using namespace emulator;
  std::vector<std::thread> threads;
  if (shared_bytes + kGuardBytes > kMaxSharedBytes || num_threads % kWarpLanes != 0) {
    return "the emulator has no such blocks";
  }
  for (unsigned i = 0; i < num_blocks; ++i) {
    threads.emplace_back([=] {
      Thread shape;
      shape.block_idx.x = i;
      shape.block_dim.x = num_threads;
      shape.grid_dim.x = num_blocks;
      const std::uint64_t own_seed = (seed * 1000003 + i + 1) * 0x9e3779b97f4a7c15ull;
      Block own(entry, params, shape, shared_memory(), shared_bytes, own_seed, identities[rank]);
      if (own.random().is_one_in(4)) usleep(own.random().draw(300));
      own.run();
    });
  }
  for (std::thread& thread : threads) thread.join();
  return has_failure ? failure_text : nullptr;
}

// Ends all launches.
extern "C" void emulator_stop() {
  using namespace emulator;
  std::lock_guard lock(failure_mutex);
  if (!has_failure) std::strcpy(failure_text, "stopped");
  has_failure = true;
}

// Forgets a failure, once all launches have ended.
extern "C" void emulator_reset() { emulator::has_failure = false; }
