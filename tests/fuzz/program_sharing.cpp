// Handles that leave the allocator, and memory that is mapped from them.
#include <unistd.h>

#include <algorithm>

#include "program.hpp"

namespace cumempool::fuzz {

// a: the block; b: 1 in 8 as a type of handle that there is not.
void Program::run_export(const Operation& operation) {
  constexpr std::size_t kMostExports = 4;
  Block* block = any_block(operation.a);
  if (block == nullptr || exports_.size() == kMostExports) return;
  const bool fabric = operation.b % 8 == 7;
  Expectation expected;
  if (!model_.current(*block)) {
    expected = Expectation::of(CUMEMPOOL_NOT_OWNED);
  } else if (block->ordinary()) {
    expected = Expectation::of(CUMEMPOOL_UNSUPPORTED);
  } else if (!block->awake()) {
    expected = Expectation::of(CUMEMPOOL_INVALID_ARGUMENT);
  } else if (fabric) {
    expected = Expectation::of(CUMEMPOOL_UNSUPPORTED);
  }
  std::array<int, CUMEMPOOL_FABRIC_HANDLE_BYTES / sizeof(int)> exported{};
  cumempool_allocation_info info{};
  info.size = sizeof info;
  const Result result = call([&] {
    return cumempool_export(allocator_, block->address,
                            fabric ? CUMEMPOOL_HANDLE_FABRIC : CUMEMPOOL_HANDLE_POSIX_FD,
                            exported.data(), &info);
  });
  judge(result, expected);
  if (!result.ok()) return;
  MUST_HOLD(info.address == block->address && info.generation == block->generation,
            "an export says that it is of other memory");
  exports_.push_back({exported[0], block->device, block->id, block->generation, block->bytes});
}

// a: which.
void Program::run_export_end(const Operation& operation) {
  if (exports_.empty()) return;
  const std::size_t index = operation.a % exports_.size();
  MUST_HOLD(::close(exports_[index].descriptor) == 0, "an exported descriptor is not open");
  exports_.erase(exports_.begin() + static_cast<std::ptrdiff_t>(index));
}

// a: which export; b: the device, bit 7 = only to read; c: 1 in 16 with a size that is not its own.
void Program::run_shared_open(const Operation& operation) {
  constexpr std::size_t kMostShares = 4;
  if (exports_.empty() || model_.shares.size() == kMostShares) return;
  const Export& from = exports_[operation.a % exports_.size()];
  const bool reads = (operation.b & 0x80U) != 0;
  const bool wrong_size = operation.c % 16 == 15;
  const bool reaches = settings_.peers_reach_each_other || operation.b % kDevices == from.device;
  Share share{nullptr, 0, from.block, from.generation, false, !reads, Contents(from.bytes)};
  const std::uint64_t before = machine_.faults().failures();
  const Result result = call([&] {
    return cumempool_shared_open(
        &machine_.table(), operation.b % kDevices, CUMEMPOOL_HANDLE_POSIX_FD, &from.descriptor,
        wrong_size ? from.bytes + kPage : from.bytes,
        reads ? CUMEMPOOL_ACCESS_READ : CUMEMPOOL_ACCESS_READ_WRITE, &share.handle);
  });
  Expectation expected;
  if (reads) expected.or_else(CUMEMPOOL_UNSUPPORTED);
  if (wrong_size || !reaches) expected = Expectation::of(CUMEMPOOL_DRIVER_ERROR);
  judge(result, expected);
  // The first failure ends the opening; another one stops its undoing.
  shares_leaked_ = shares_leaked_ || machine_.faults().failures() - before > 1;
  if (!result.ok()) return;
  share.address = cumempool_shared_address(share.handle);
  model_.add(std::move(share));
  check_share(model_.shares.back());
}

void Program::check_share(const Share& share) {
  if (model_.vague(share)) return;
  const Block* block = model_.shown_by(share);
  if (block != nullptr && block->busy) machine_.synchronize();
  const Contents& contents = block == nullptr ? share.contents : block->contents;
  MUST_HOLD(!contents.difference(bytes_at(share.address)), "shared memory shows wrong contents");
}

// a: which; b: the pattern. The owner sees it.
void Program::run_shared_write(const Operation& operation) {
  if (model_.shares.empty()) return;
  Share& share = model_.shares[operation.a % model_.shares.size()];
  check_share(share);
  if (!share.writable || model_.vague(share)) return;
  model_.write(share, operation.b, bytes_at(share.address));
}

// The memory lives as long as this, whatever has become of its owner.
void Program::close_share(std::size_t index, bool close_first) {
  const Share share = model_.shares[index];
  check_share(share);
  if (close_first) {
    const Result result = call([&] { return cumempool_shared_close(share.handle); });
    judge(result, {});
    if (!result.ok()) {  // may be repeated
      fail_nothing();
      judge(call([&] { return cumempool_shared_close(share.handle); }), {});
    }
  }
  const std::uint64_t before = machine_.faults().failures();
  cumempool_shared_destroy(share.handle);
  shares_leaked_ = shares_leaked_ || machine_.faults().failures() != before;
  model_.shares.erase(model_.shares.begin() + static_cast<std::ptrdiff_t>(index));
}

// a: which; b: bit 0 = without closing it before.
void Program::run_shared_close(const Operation& operation) {
  if (model_.shares.empty()) return;
  close_share(operation.a % model_.shares.size(), (operation.b & 1U) == 0);
}

}  // namespace cumempool::fuzz
