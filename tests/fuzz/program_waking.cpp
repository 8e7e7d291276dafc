// Wakes in a thread of their own.
#include <algorithm>

#include "program.hpp"

namespace cumempool::fuzz {

bool Program::waking_has(std::uint64_t id) const {
  return under_way() && std::count(waking_.blocks.begin(), waking_.blocks.end(), id) != 0;
}

// a: tags, bit 7 = all; b: a block that is to be first, 255 = none; c: bit 0 = the program's
// streams.
void Program::run_wake_begin(const Operation& operation) {
  if (waking_.handle != nullptr) drop_waking();
  WakeSpec spec;
  spec.all = (operation.a & 0x80U) != 0;
  std::vector<const char*> names;
  for (std::size_t tag = 0; tag < kTags; ++tag) {
    spec.tags.at(tag) = model_.tags.at(tag).declared && (operation.a >> tag & 1U) != 0;
    if (spec.tags.at(tag)) names.push_back(model_.tags.at(tag).name.c_str());
  }
  Expectation expected;
  std::vector<cumempool_address> first;
  const Block* wanted = operation.b == 255 ? nullptr : any_block(operation.b);
  if (wanted != nullptr) first.push_back(wanted->address);
  std::vector<cumempool_device_stream> streams;
  if ((operation.c & 1U) != 0) streams.push_back(machine_.stream(0));
  if (!streams.empty() && machine_.capturing(0)) {
    expected.or_else(CUMEMPOOL_CAPTURING);
    if (warm_) expected.success = false;
  }
  expect_room(expected, spec, room(), nullptr);
  if (wanted != nullptr && !model_.current(*wanted)) {
    expected = Expectation::of(CUMEMPOOL_NOT_OWNED);
  }
  static const char* const none = nullptr;
  Waking begun;
  begun.failures_before = machine_.faults().failures();
  begun.crowded = armed_;
  const Result result = call([&] {
    return cumempool_wake_begin(allocator_,
                                spec.all        ? nullptr
                                : names.empty() ? &none
                                                : names.data(),
                                names.size(), first.data(), first.size(), streams.data(),
                                streams.size(), &begun.handle);
  });
  judge(result, expected);
  if (!result.ok()) return;
  for (const Block& block : model_.blocks) {
    if (model_.current(block) && !block.vacated && spec.wakes(block)) {
      begun.blocks.push_back(block.id);
    }
  }
  waking_ = std::move(begun);
}

// a: the block; b: the stream's device. The program's work on that stream sees the contents.
void Program::run_waking_wait(const Operation& operation) {
  Block* block = any_block(operation.a);
  if (waking_.handle == nullptr || block == nullptr) return;
  const int device = operation.b % kDevices;
  const bool mine = model_.current(*block);
  const bool part = waking_has(block->id);
  Result result = call([&] {
    return cumempool_waking_wait(waking_.handle, block->address, machine_.stream(device));
  });
  // A wake that fails takes back what it has handed out, at any time until it has ended.
  const bool quiet =
      !waking_.crowded && !armed_ && machine_.faults().failures() == waking_.failures_before;
  if (!mine) return judge(result, Expectation::of(CUMEMPOOL_NOT_OWNED));
  if (waking_.settled) {
    // Whatever became of the wake: it tells, or what is awake is there.
    const bool failed = waking_.status != CUMEMPOOL_OK;
    MUST_HOLD(result.ok() ? block->awake() : failed || !block->awake() || result.disturbed,
              "waiting for memory after a wake does not tell what became of it");
    return;
  }
  if (!quiet) return;  // settle_waking() looks at how it ended
  Expectation expected;
  if (!block->awake() && !part) expected = Expectation::of(CUMEMPOOL_INVALID_ARGUMENT);
  if (machine_.capturing(device)) expected.or_else(CUMEMPOOL_CAPTURING);
  judge(result, expected);
  if (!result.ok() || !part) return;
  machine_.synchronize();
  // Contents that were discarded and come back as zeros are only known once the wake has ended.
  const auto wrong = block->contents.difference(bytes_at(block->address));
  MUST_HOLD(!wrong, "a stream that waits sees wrong contents");
}

// a modulo 3: wait for the end, ask whether it has ended, or drop the handle.
void Program::run_waking_finish(const Operation& operation) {
  if (waking_.handle == nullptr) return;
  switch (operation.a % 3) {
    case 0: {
      if (under_way()) return settle_waking();
      cumempool_report* report = nullptr;
      const Result result = call([&] { return cumempool_waking_finish(waking_.handle, &report); });
      MUST_HOLD(result.status == waking_.status && report == nullptr,
                "a wake that has ended ends in another way when it is asked again");
      return;
    }
    case 1:
      (void)cumempool_waking_done(waking_.handle);
      return;
    default:
      drop_waking();
  }
}

void Program::settle_waking() {
  if (!under_way()) return;
  cumempool_report* report = nullptr;
  note("  the wake ends");
  Result result = call([&] { return cumempool_waking_finish(waking_.handle, &report); });
  result.disturbed = machine_.faults().failures() != waking_.failures_before;
  model_.disturbed = model_.disturbed || result.disturbed;
  MUST_HOLD(cumempool_waking_done(waking_.handle) == 1, "a wake that has ended goes on");
  waking_.settled = true;
  waking_.status = result.status;
  Expectation expected;
  if (waking_.crowded) expected.or_else(CUMEMPOOL_OUT_OF_MEMORY);
  judge(result, expected);
  if (!result.ok()) return;
  MUST_HOLD(report != nullptr, "there is no report");
  cumempool_report_destroy(report);
  for (const std::uint64_t id : waking_.blocks) {
    Block* block = model_.find(id);
    if (block != nullptr) model_.wake(*block);
  }
}

// That its end cannot enter a context has no remedy: nothing fails meanwhile.
void Program::drop_waking() {
  settle_waking();
  fail_nothing();
  cumempool_waking_destroy(waking_.handle);
  waking_ = Waking{};
}

}  // namespace cumempool::fuzz
