// Lets one transition of an allocator through at a time. No lock is held while it runs (R7).
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

namespace cumempool::pool {

class Turnstile {
 public:
  // The right to run a transition; ends with the object.
  class Turn {
   public:
    // Waits for the transition of another thread. Throws Error (CUMEMPOOL_BUSY) where the calling
    // thread is inside one itself.
    Turn(Turnstile& turnstile, const char* operation);
    // Does not wait, and throws nothing: see taken().
    Turn(Turnstile& turnstile, const char* operation, std::try_to_lock_t);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

    bool taken() const noexcept { return taken_; }

   private:
    Turnstile& turnstile_;
    bool taken_ = true;
  };

  // Throws Error (CUMEMPOOL_BUSY) where the calling thread is inside a transition.
  void refuse_inside(const char* operation) const;

 private:
  void refuse_locked(const char* operation) const;

  mutable std::mutex mutex_;
  std::condition_variable free_;
  std::thread::id owner_;
  const char* operation_ = nullptr;  // null = nobody is inside
};

}  // namespace cumempool::pool
