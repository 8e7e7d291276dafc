// Operations that say what later operations do: tags, tiers, backing, pins, and driver calls that
// fail.
#include <algorithm>

#include "program.hpp"

namespace cumempool::fuzz {

// ---- tags ---------------------------------------------------------------------------------------

// a: the tag, or a name that is none; b: what waking discarded memory gives.
void Program::run_declare(const Operation& operation) {
  const auto declare = [&](const std::string& name, cumempool_on_wake on_wake) {
    return call([&] {
      return cumempool_declare_tag(allocator_, name.c_str(), CUMEMPOOL_ON_SLEEP_UNSET, on_wake);
    });
  };
  if (operation.a >= 250) {
    const std::array<std::string, 6> bad = {"",         std::string(256, 'x'), "\xFF",
                                            "\xC0\x80", "\xED\xA0\x80",        "\xE2\x82"};
    judge(declare(bad.at(operation.a - 250U), CUMEMPOOL_ON_WAKE_UNSET),
          Expectation::of(CUMEMPOOL_INVALID_ARGUMENT));
    return;
  }
  Tag& tag = model_.tags.at(operation.a % kTags);
  const auto on_wake = static_cast<cumempool_on_wake>(operation.b % 3);
  judge(declare(tag.name, on_wake), {});
  tag.declared = true;
  if (on_wake != CUMEMPOOL_ON_WAKE_UNSET) tag.zero_on_wake = on_wake == CUMEMPOOL_ON_WAKE_ZERO;
}

// a: the tag; b: the tier; c: the peer.
void Program::run_set_backup(const Operation& operation) {
  Tag& tag = model_.tags.at(operation.a % kTags);
  const std::uint8_t choice = operation.b % 8;
  const bool file = choice == CUMEMPOOL_BACKUP_FILE || choice == 6;
  const bool bad_directory = choice == 6;
  const std::string directory = bad_directory ? file_directory() + "/missing" : file_directory();
  cumempool_backup_policy policy{};
  policy.size = sizeof policy;
  policy.tier = file ? CUMEMPOOL_BACKUP_FILE : static_cast<cumempool_backup_tier>(choice);
  policy.directory = file ? directory.c_str() : nullptr;
  policy.peer_device = operation.c % 8;
  Expectation expected;
  if (!tag.declared) {
    expected = Expectation::of(CUMEMPOOL_UNKNOWN_TAG);
  } else if (choice == 5 || choice == 7) {
    expected = Expectation::of(CUMEMPOOL_INVALID_ARGUMENT);
  } else if (policy.tier == CUMEMPOOL_BACKUP_PEER && policy.peer_device >= kDevices) {
    expected = Expectation::of(CUMEMPOOL_INVALID_ARGUMENT);
  } else if (policy.tier == CUMEMPOOL_BACKUP_PEER && !settings_.peers_reach_each_other) {
    expected = Expectation::of(CUMEMPOOL_UNSUPPORTED);
  }
  const Result result =
      call([&] { return cumempool_set_backup(allocator_, tag.name.c_str(), &policy); });
  judge(result, expected);
  if (!result.ok() || policy.tier == CUMEMPOOL_BACKUP_UNSET) return;
  tag.tier = policy.tier;
  tag.bad_directory = bad_directory;
  tag.peer = policy.peer_device;
  peers_used_ = peers_used_ || tag.tier == CUMEMPOOL_BACKUP_PEER;
}

// a: the tag; b: backing, peers and RDMA.
void Program::run_set_memory(const Operation& operation) {
  Tag& tag = model_.tags.at(operation.a % kTags);
  const bool ordinary = (operation.b & 1U) != 0;
  const bool all_peers = (operation.b & 2U) != 0;
  std::vector<std::int32_t> peers;
  for (int device = 0; device < kDevices; ++device) {
    if ((operation.b >> (2 + device) & 1U) != 0) peers.push_back(device);
  }
  const bool rdma = (operation.b >> (2 + kDevices) & 1U) == 0;
  cumempool_memory_policy policy{};
  policy.size = sizeof policy;
  policy.backing = ordinary ? CUMEMPOOL_BACKING_CUDA_MALLOC : CUMEMPOOL_BACKING_UNSET;
  policy.all_peers = all_peers ? 1 : 0;
  policy.peer_count = static_cast<std::uint32_t>(peers.size());
  policy.peers = peers.data();
  policy.without_rdma = rdma ? 0 : 1;
  const auto backing = ordinary ? CUMEMPOOL_BACKING_CUDA_MALLOC : CUMEMPOOL_BACKING_VMM;
  const bool same = tag.backing == backing && tag.all_peers == all_peers && tag.peers == peers &&
                    tag.rdma == rdma;
  const bool lives =
      std::any_of(model_.blocks.begin(), model_.blocks.end(), [&](const Block& block) {
        return model_.current(block) && &model_.tags.at(block.tag) == &tag;
      });
  const bool wrong = ordinary && (all_peers || !peers.empty() || !rdma);
  Expectation expected;
  if (!tag.declared) {
    expected = Expectation::of(CUMEMPOOL_UNKNOWN_TAG);
  } else if (wrong) {
    expected = Expectation::of(CUMEMPOOL_INVALID_ARGUMENT);
  } else if (!peers.empty() && !settings_.peers_reach_each_other) {
    expected = Expectation::of(CUMEMPOOL_UNSUPPORTED);
  } else if (!same && lives) {
    expected = Expectation::of(CUMEMPOOL_IN_USE);
  }
  const Result result =
      call([&] { return cumempool_set_memory(allocator_, tag.name.c_str(), &policy); });
  judge(result, expected);
  if (!result.ok()) return;
  tag.backing = backing;
  tag.all_peers = all_peers;
  tag.peers = peers;
  tag.rdma = rdma;
}

// ---- pins ---------------------------------------------------------------------------------------

// a: the tag.
void Program::run_pin(const Operation& operation) {
  Tag& tag = model_.tags.at(operation.a % kTags);
  std::uint64_t pin = 0;
  const Result result =
      call([&] { return cumempool_pin(allocator_, tag.name.c_str(), "the fuzzer", &pin); });
  judge(result, Expectation::of(tag.declared ? CUMEMPOOL_OK : CUMEMPOOL_UNKNOWN_TAG));
  if (result.ok()) tag.pins.push_back(pin);
}

// a: the tag, whose last pin goes; where it has none, a pin that is none.
void Program::run_unpin(const Operation& operation) {
  Tag& tag = model_.tags.at(operation.a % kTags);
  const std::uint64_t pin = tag.pins.empty() ? 1'000'000 : tag.pins.back();
  judge(call([&] { return cumempool_unpin(allocator_, pin); }),
        Expectation::of(tag.pins.empty() ? CUMEMPOOL_INVALID_ARGUMENT : CUMEMPOOL_OK));
  if (!tag.pins.empty()) tag.pins.pop_back();
}

// ---- failures -----------------------------------------------------------------------------------

// a: which driver call fails: any, one by name, or writes to files; b: the how manieth; c: the
// result, whether all later ones fail too, or one more.
void Program::run_fail(const Operation& operation) {
  constexpr std::array<cumempool_result, 8> kResults = {CUMEMPOOL_RESULT_OUT_OF_MEMORY,
                                                        CUMEMPOOL_RESULT_INVALID_VALUE,
                                                        719,
                                                        999,
                                                        CUMEMPOOL_RESULT_ILLEGAL_ADDRESS,
                                                        CUMEMPOOL_RESULT_NOT_SUPPORTED,
                                                        CUMEMPOOL_RESULT_NOT_READY,
                                                        CUMEMPOOL_RESULT_OPERATING_SYSTEM};
  fail_nothing();
  if (!warm_) return;
  if (operation.a == 255) {
    // The host driver keeps digests in a file on their way, and needs room for that.
    full_disk_ = (16U + operation.b) * kPage;
    return;
  }
  driver::FaultDriver& faults = machine_.faults();
  const cumempool_result result = kResults.at(operation.c % 8U);
  const auto repeat = (operation.c & 8U) != 0 ? driver::FaultDriver::Repeat::kFromThenOn
                                              : driver::FaultDriver::Repeat::kOnce;
  const std::uint64_t n = 1 + operation.b % 100U;
  if (operation.a < 160) {
    faults.fail_nth_of_any(n, result, repeat);
    if ((operation.c & 16U) != 0) faults.fail_nth_of_any(n + 1 + (operation.c >> 5U), result);
  } else {
    const auto& entries = driver::FaultDriver::entries();
    const std::string entry = entries[(operation.a - 160U) % entries.size()];
    for (const char* excluded :
         {"context_leave", "context_release", "stream_destroy", "event_destroy"}) {
      if (entry == excluded) return;
    }
    faults.fail_nth(entry, 1 + operation.b % 12U, result, repeat);
  }
  armed_ = true;
}

}  // namespace cumempool::fuzz
