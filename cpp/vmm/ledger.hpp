// What the owners of this folder hold from the driver, in bytes: created minus released, and so on
// (R13). Each owner enters its own successful driver calls and nothing else.
#pragma once

#include <atomic>
#include <cstdint>

namespace cumempool::vmm {

struct Ledger {
  std::atomic<std::uint64_t> reserved_bytes{0};
  std::atomic<std::uint64_t> physical_bytes{0};
  std::atomic<std::uint64_t> mapped_bytes{0};
};

}  // namespace cumempool::vmm
