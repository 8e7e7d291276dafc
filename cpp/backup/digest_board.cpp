// Digests of device memory in the making: what to read and what came out, in pinned host memory
// that the device uses directly.
#include "backup/digest_board.hpp"

#include <algorithm>
#include <exception>

#include "backup/host_pages.hpp"

namespace cumempool::backup {

DigestBoard::DigestBoard(driver::Driver driver, CopyQueue& queue)
    : driver_(driver), queue_(queue) {}

DigestBoard::~DigestBoard() { release(); }

void DigestBoard::begin(std::size_t count) {
  added_ = started_ = 0;
  if (count <= room_) return;
  if (data_ != nullptr && release() == 0) {
    throw Error(CUMEMPOOL_DRIVER_ERROR,
                "memory for digests could not be unpinned to make it larger");
  }
  constexpr std::size_t kEach = sizeof(cumempool_extent) + sizeof(cumempool_digest);
  const std::size_t wanted = (count * kEach + kHugePage - 1) / kHugePage * kHugePage;
  std::size_t got = 0;
  std::byte* data = reserve_pages(wanted, wanted, got);
  try {
    commit_pages(data, wanted, -1);
    driver_.host_register(queue_.device(), data, wanted);
  } catch (const std::exception&) {
    unreserve_pages(data, wanted);
    throw;
  }
  data_ = data;
  held_bytes_ = wanted;
  room_ = wanted / kEach;
  extents_ = reinterpret_cast<cumempool_extent*>(data_);
  digests_ = reinterpret_cast<cumempool_digest*>(extents_ + room_);
}

void DigestBoard::add(cumempool_address address, std::size_t bytes) {
  extents_[added_++] = {address, bytes};
}

std::size_t DigestBoard::start(std::uint64_t seed, std::size_t count) {
  queue_.digest(seed, extents_ + started_, count, digests_ + started_);
  started_ += count;
  return queue_.mark();
}

std::uint64_t DigestBoard::release() noexcept {
  if (data_ == nullptr) return 0;
  const auto& table = driver_.table();
  // Memory that the driver would not take back stays mapped: it may still write to it.
  if (table.host_unregister(table.self, queue_.device(), data_) != CUMEMPOOL_RESULT_SUCCESS) {
    return 0;
  }
  unreserve_pages(data_, held_bytes_);
  const std::size_t bytes = held_bytes_.exchange(0);
  data_ = nullptr;
  room_ = 0;
  return bytes;
}

}  // namespace cumempool::backup
