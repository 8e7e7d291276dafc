// Allocations of host memory that fail on request: operator new of this whole program.
#pragma once

#include <cstdint>

namespace cumempool::tests {

// False under sanitizers, which bring an operator new of their own: nothing is counted or fails
// then.
bool allocations_can_fail() noexcept;

// Calls of operator new by this thread so far.
std::uint64_t allocations() noexcept;

enum class Lack { kOnce, kForGood };

// While it lives, the n-th call of operator new (1 = the next one) throws std::bad_alloc, alone or
// with all later ones: in this thread, or, counted together, in all threads. Drivers are exempt:
// what they answer is failed by FaultDriver. One at a time.
class AllocationFailure {
 public:
  enum class Where { kThisThread, kEverywhere };

  AllocationFailure(std::uint64_t nth, Lack lack, Where where) noexcept;
  ~AllocationFailure();
  AllocationFailure(const AllocationFailure&) = delete;
  AllocationFailure(AllocationFailure&&) = delete;
  AllocationFailure& operator=(const AllocationFailure&) = delete;
  AllocationFailure& operator=(AllocationFailure&&) = delete;

  // Whether any call has failed.
  static bool reached() noexcept;
};

}  // namespace cumempool::tests
