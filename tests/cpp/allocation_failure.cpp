// Allocations of host memory that fail on request.
#include "allocation_failure.hpp"

#include <atomic>
#include <cstdlib>
#include <new>

#include "fault_driver.hpp"

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#endif

namespace cumempool::tests {
namespace {

std::atomic<bool> armed{false};
std::atomic<bool> everywhere{false};
std::atomic<bool> for_good{false};
std::atomic<bool> failed{false};
std::atomic<std::int64_t> left{0};
thread_local bool chosen = false;
thread_local std::uint64_t counted = 0;

#ifndef SANITIZED
bool must_fail() noexcept {
  ++counted;
  if (!armed || (!chosen && !everywhere) || driver::FaultDriver::inside_call()) return false;
  const std::int64_t now = left.fetch_sub(1);
  if (now > 1 || (now < 1 && !for_good)) return false;
  failed = true;
  return true;
}
#endif

}  // namespace

bool allocations_can_fail() noexcept {
#ifdef SANITIZED
  return false;
#else
  return true;
#endif
}

AllocationFailure::AllocationFailure(std::uint64_t nth, Lack lack, Where where) noexcept {
  left = static_cast<std::int64_t>(nth);
  for_good = lack == Lack::kForGood;
  everywhere = where == Where::kEverywhere;
  failed = false;
  chosen = true;
  armed = true;
}

AllocationFailure::~AllocationFailure() {
  armed = false;
  chosen = false;
}

std::uint64_t allocations() noexcept { return counted; }

bool AllocationFailure::reached() noexcept { return failed; }

}  // namespace cumempool::tests

#ifndef SANITIZED
void* operator new(std::size_t bytes) {
  if (!cumempool::tests::must_fail()) {
    if (void* const memory = std::malloc(bytes == 0 ? 1 : bytes)) return memory;
  }
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t /*bytes*/) noexcept { std::free(memory); }
#endif
