// What ThreadSanitizer must be told about fibers and copies; nothing in other builds.
//
// Whoever reads and writes memory has an identity: a fiber, the copies that it starts, the block
// itself, which keeps the books. Copies have eyes of their own: what they read must have been
// written before a fence_copies, or published after one. So each fiber has one identity more, its
// fences', which learns from the fiber in fence_copies alone and goes along to every meeting. A
// copy reads with what the fences know. It writes with what the fiber knows: that others are done
// with the memory takes no fence.
#pragma once

#include <mutex>
#include <vector>

#ifdef EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>

extern "C" void __tsan_read_range(void* address, unsigned long size);
extern "C" void __tsan_write_range(void* address, unsigned long size);
#endif

namespace emulator {

class Identity {
 public:
#ifdef EMULATOR_TSAN
  void make() { handle_ = __tsan_create_fiber(0); }
  void make_of_thread() { handle_ = __tsan_get_current_fiber(); }
  bool is_made() const { return handle_ != nullptr; }
  void enter() const { __tsan_switch_to_fiber(handle_, __tsan_switch_to_fiber_no_sync); }

 private:
  void* handle_ = nullptr;
#else
  void make() {}
  void make_of_thread() {}
  bool is_made() const { return true; }
  void enter() const {}
#endif
};

// The identities of one rank. Making one takes long; and what one knows from an earlier launch of
// the same rank is known to all of a later one.
class Identities {
 public:
  void lend(Identity& identity) {
    if (identity.is_made()) return;
    std::lock_guard lock(mutex_);
    if (free_.empty()) {
      identity.make();
    } else {
      identity = free_.back();
      free_.pop_back();
    }
  }

  void take_back(const Identity& identity) {
    if (!identity.is_made()) return;
    std::lock_guard lock(mutex_);
    free_.push_back(identity);
  }

 private:
  std::mutex mutex_;
  std::vector<Identity> free_;
};

// All that the current identity did and knows is from now on known to whoever observes the key.
inline void publish([[maybe_unused]] const void* key) {
#ifdef EMULATOR_TSAN
  __tsan_release(const_cast<void*>(key));
#endif
}

inline void observe([[maybe_unused]] const void* key) {
#ifdef EMULATOR_TSAN
  __tsan_acquire(const_cast<void*>(key));
#endif
}

// The current identity reads or writes memory, by code that ThreadSanitizer does not see.
inline void note_read([[maybe_unused]] const void* address, [[maybe_unused]] unsigned num_bytes) {
#ifdef EMULATOR_TSAN
  __tsan_read_range(const_cast<void*>(address), num_bytes);
#endif
}

inline void note_write([[maybe_unused]] void* address, [[maybe_unused]] unsigned num_bytes) {
#ifdef EMULATOR_TSAN
  __tsan_write_range(address, num_bytes);
#endif
}

// NOTE: ThreadSanitizer takes part in memcpy and memset even where the caller is not compiled for
// it.
inline void move_bytes(void* to, const void* from, unsigned long num_bytes) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(num_bytes)::"memory");
}

inline void fill_bytes(void* to, unsigned char value, unsigned long num_bytes) {
  asm volatile("rep stosb" : "+D"(to), "+c"(num_bytes) : "a"(value) : "memory");
}

}  // namespace emulator
