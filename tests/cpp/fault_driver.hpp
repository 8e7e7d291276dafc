// A driver that passes every call on to another one, counts it, lets a test watch it, and fails the
// calls that the test has planned to fail.
//
//   FaultDriver faults(*host);
//   faults.fail_nth("map", 3, CUMEMPOOL_RESULT_OUT_OF_MEMORY);  // the third map from now on
//   use(faults.table());
//   EXPECT_EQ(faults.failures(), 1u);
//
// Entries are named as in cumempool_driver; a name that it does not have throws
// std::invalid_argument. A failed call does not reach the other driver: it has no effect (C1).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

#include "cumempool/driver.h"

namespace cumempool::driver {

class FaultDriver {
 public:
  enum class Repeat { kOnce, kFromThenOn };
  using Observer = std::function<void(const char* entry)>;

  // `inner` outlives this object, and this object everything that uses table().
  explicit FaultDriver(const cumempool_driver& inner);
  FaultDriver(const FaultDriver&) = delete;
  FaultDriver(FaultDriver&&) = delete;
  FaultDriver& operator=(const FaultDriver&) = delete;
  FaultDriver& operator=(FaultDriver&&) = delete;
  ~FaultDriver() = default;

  // Named as the inner driver, so that the core treats it alike.
  const cumempool_driver& table() const noexcept { return table_; }

  // Fails the n-th call (1 = the next one) of an entry from now on with `result`. Several may be
  // planned; a call that two of them fail returns the result of the one planned first.
  void fail_nth(std::string_view entry, std::uint64_t n, cumempool_result result,
                Repeat repeat = Repeat::kOnce);
  // The same, counting the calls of all entries but the excluded ones.
  void fail_nth_of_any(std::uint64_t n, cumempool_result result, Repeat repeat = Repeat::kOnce);
  // Takes an entry out of fail_nth_of_any and calls(). A context_leave that fails, say, would leave
  // the thread in a state that no caller can mend.
  void exclude(std::string_view entry);
  // Drops what was planned; counts and exclusions stay.
  void fail_nothing();

  // Called before each call, also before one that fails, on the thread that makes it and with no
  // lock held: it may block, and may use the table.
  void observe(Observer observer);

  std::uint64_t calls(std::string_view entry) const;
  std::uint64_t calls() const;     // of all entries but the excluded ones
  std::uint64_t failures() const;  // calls that were failed
  void reset_counts();

  // Whether the calling thread is inside a call of any such driver.
  static bool inside_call() noexcept;

  static const std::vector<const char*>& entries();  // all names, in the order of the table

  // For the table only: counts a call, and decides its fate.
  cumempool_result before(std::size_t entry);
  const cumempool_driver& inner() const noexcept { return inner_; }

 private:
  struct Plan {
    std::optional<std::size_t> entry;  // none = any
    std::uint64_t calls_left = 1;      // 1 = the next call fails
    cumempool_result result = CUMEMPOOL_RESULT_SUCCESS;
    Repeat repeat = Repeat::kOnce;
    bool spent = false;
  };

  cumempool_result decide(std::size_t entry);

  const cumempool_driver& inner_;
  cumempool_driver table_{};
  mutable std::mutex mutex_;  // guards everything below
  std::vector<std::uint64_t> calls_;
  std::vector<bool> excluded_;
  std::vector<Plan> plans_;
  std::uint64_t failures_ = 0;
  std::shared_ptr<const Observer> observer_;
};

}  // namespace cumempool::driver
