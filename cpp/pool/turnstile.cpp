// Lets one transition of an allocator through at a time. No lock is held while it runs (R7).
#include "pool/turnstile.hpp"

#include <string>

#include "driver/error.hpp"

namespace cumempool::pool {

void Turnstile::refuse_locked(const char* operation) const {
  if (operation_ == nullptr || owner_ != std::this_thread::get_id()) return;
  Error error(CUMEMPOOL_BUSY,
              std::string("called from inside a ") + operation_ + " of the same allocator");
  error.operation = operation;
  error.advice = "call it after that one has returned";
  throw error;
}

void Turnstile::refuse_inside(const char* operation) const {
  const std::lock_guard lock(mutex_);
  refuse_locked(operation);
}

Turnstile::Turn::Turn(Turnstile& turnstile, const char* operation) : turnstile_(turnstile) {
  std::unique_lock lock(turnstile_.mutex_);
  turnstile_.refuse_locked(operation);
  turnstile_.free_.wait(lock, [this] { return turnstile_.operation_ == nullptr; });
  turnstile_.operation_ = operation;
  turnstile_.owner_ = std::this_thread::get_id();
}

Turnstile::Turn::Turn(Turnstile& turnstile, const char* operation, std::try_to_lock_t)
    : turnstile_(turnstile) {
  const std::lock_guard lock(turnstile_.mutex_);
  taken_ = turnstile_.operation_ == nullptr;
  if (!taken_) return;
  turnstile_.operation_ = operation;
  turnstile_.owner_ = std::this_thread::get_id();
}

Turnstile::Turn::~Turn() {
  if (!taken_) return;
  {
    const std::lock_guard lock(turnstile_.mutex_);
    turnstile_.operation_ = nullptr;
  }
  turnstile_.free_.notify_one();
}

}  // namespace cumempool::pool
