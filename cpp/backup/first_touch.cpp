// Has several threads fault memory in, in order, ahead of the thread that pins it.
#include "backup/first_touch.hpp"

#include <unistd.h>

#include <algorithm>
#include <exception>
#include <utility>

namespace cumempool::backup {
namespace {

// A byte per page: MADV_POPULATE_WRITE would hold the lock of the whole address space meanwhile,
// and with it everybody who maps or pins memory. Memory that is not there shows up as the failure
// of whoever pins it.
void touch(const PageRange& range) {
  static const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (std::size_t at = 0; at < range.bytes; at += page) {
    *const_cast<volatile std::byte*>(range.data + at) = std::byte{0};
  }
}

}  // namespace

FirstTouch::FirstTouch(std::vector<PageRange> ranges, unsigned threads, std::function<bool()> room)
    : ranges_(std::move(ranges)), room_(std::move(room)), touched_(ranges_.size()) {
  const std::size_t count = std::min<std::size_t>(threads, ranges_.size());
  threads_.reserve(count);
  try {
    while (threads_.size() < count) threads_.emplace_back([this] { work(); });
  } catch (const std::exception&) {
    // No more threads, or no memory for them: those that there are do it, or wait() itself.
  }
}

FirstTouch::~FirstTouch() {
  stop_ = true;
  for (std::thread& thread : threads_) thread.join();
}

void FirstTouch::work() noexcept {
  while (!stop_ && touch_next()) {
  }
}

bool FirstTouch::has_room() noexcept {
  if (!room_) return true;
  const std::lock_guard lock(room_mutex_);
  return room_();
}

bool FirstTouch::touch_next() noexcept {
  const std::size_t index = next_++;
  if (index >= ranges_.size()) return false;
  if (!has_room()) {
    {
      const std::lock_guard lock(mutex_);
      full_ = true;
    }
    stop_ = true;
    done_.notify_all();
    return false;
  }
  touch(ranges_[index]);
  {
    const std::lock_guard lock(mutex_);
    touched_[index] = true;
  }
  done_.notify_all();
  return true;
}

bool FirstTouch::wait(std::size_t index) {
  if (threads_.empty()) {
    while (next_ <= index && touch_next()) {
    }
  }
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return touched_[index] || full_; });
  return touched_[index];
}

unsigned FirstTouch::default_threads() noexcept {
  return std::clamp(std::thread::hardware_concurrency() * 3 / 4, 1U, 16U);
}

}  // namespace cumempool::backup
