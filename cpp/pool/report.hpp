// What a transition did, per tag and device.
#pragma once

#include <chrono>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "cumempool/cumempool.h"
#include "pool/record.hpp"

namespace cumempool::pool {

struct Report {
  double seconds = 0;
  std::vector<cumempool_report_row> rows;  // names live as long as the process
  std::vector<std::string> problems;

  // Adds a problem; for those that there is room reserved for, without memory.
  void problem(std::string&& text) noexcept {
    try {
      problems.push_back(std::move(text));
    } catch (const std::exception&) {
      return;  // the numbers of the rows tell of it all the same
    }
  }

  // The row of a record's tag and device, made at first use.
  cumempool_report_row& row(const Record& record);
};

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace cumempool::pool
