// Transitions: sleep, wake, swap, and what prepares and ends them.
#include <algorithm>
#include <memory>

#include "program.hpp"

namespace cumempool::fuzz {
namespace {

// The arrays that a request points to.
struct Request {
  Request(const SleepSpec& spec, const Model& model, const Machine& machine) {
    for (const SleepSpec::Action& action : spec.actions) {
      actions.push_back({model.tags.at(action.tag).name.c_str(),
                         action.discard ? CUMEMPOOL_ON_SLEEP_DISCARD : CUMEMPOOL_ON_SLEEP_OFFLOAD});
    }
    for (int device = 0; spec.streams && device < kDevices; ++device) {
      streams.push_back(machine.stream(device));
    }
    raw.size = sizeof raw;
    raw.drop_backups = spec.drop_backups ? 1 : 0;
    raw.tags = actions.data();
    raw.tag_count = actions.size();
    raw.dead = spec.dead.data();
    raw.dead_count = spec.dead.size();
    raw.streams = streams.data();
    raw.stream_count = streams.size();
  }

  std::vector<cumempool_tag_action> actions;
  std::vector<cumempool_device_stream> streams;
  cumempool_sleep_request raw{};
};

bool capturing(const Machine& machine) {
  for (int device = 0; device < kDevices; ++device) {
    if (machine.capturing(device)) return true;
  }
  return false;
}

std::vector<const char*> names_of(const WakeSpec& spec, const Model& model) {
  std::vector<const char*> names;
  for (std::size_t tag = 0; tag < kTags; ++tag) {
    if (spec.tags.at(tag)) names.push_back(model.tags.at(tag).name.c_str());
  }
  return names;
}

}  // namespace

// ---- requests -----------------------------------------------------------------------------------

// Whole blocks, parts of any alignment, ranges that reach over borders, and all of it.
std::vector<cumempool_extent> Program::dead_ranges(std::uint8_t choice) const {
  std::vector<cumempool_extent> dead;
  const std::size_t count = choice % 5U;
  if (model_.blocks.empty()) return dead;
  for (std::size_t i = 0; i < count; ++i) {
    const Block& block = model_.blocks[(choice * 7U + i * 3U) % model_.blocks.size()];
    switch ((choice / 5U + i) % 6) {
      case 0:
        dead.push_back({block.address, block.bytes});
        break;
      case 1:
        dead.push_back({block.address + 512, 512});
        break;
      case 2:
        dead.push_back({block.address + 500 + 8 * choice, 700});
        break;
      case 3:
        dead.push_back({block.address - 10, 3000});
        break;
      case 4:
        dead.push_back({block.address + block.bytes - 1024, 2 * block.bytes});
        break;
      default:
        dead.push_back({block.address + block.bytes / 2, ~std::uint64_t{0} >> 16U});
        break;
    }
  }
  return dead;
}

// a: tags, and bit 7 = undeclared ones as well; b: which of them are discarded, bit 5 = with the
// program's streams, bit 6 = drop backups; c: dead ranges, bit 7 = while a wake is under way.
SleepSpec Program::sleep_spec(const Operation& operation) const {
  SleepSpec spec;
  for (std::size_t tag = 0; tag < kTags; ++tag) {
    if ((operation.a >> tag & 1U) == 0) continue;
    if (!model_.tags.at(tag).declared && (operation.a & 0x80U) == 0) continue;
    spec.actions.push_back({tag, (operation.b >> tag & 1U) != 0});
  }
  spec.streams = (operation.b & 0x20U) != 0;
  spec.drop_backups = (operation.b & 0x40U) != 0;
  spec.dead = dead_ranges(operation.c & 0x7FU);
  return spec;
}

// What may be in the way of backups.
Expectation Program::expect_backups(const SleepSpec& spec) const {
  Expectation expected;
  for (const SleepSpec::Action& action : spec.actions) {
    if (!model_.tags.at(action.tag).declared) return Expectation::of(CUMEMPOOL_UNKNOWN_TAG);
  }
  for (const Block& block : model_.blocks) {
    const SleepSpec::Action* action = spec.action_of(block);
    if (action == nullptr || spec.discards(block) || !block.awake() || !model_.current(block)) {
      continue;
    }
    const Tag& tag = model_.tags.at(block.tag);
    if (tag.tier == CUMEMPOOL_BACKUP_PINNED && settings_.host_limit_pages != 0 &&
        settings_.overflow == Settings::Overflow::kNone) {
      expected.or_else(CUMEMPOOL_OUT_OF_HOST_MEMORY);
    }
    if (tag.tier == CUMEMPOOL_BACKUP_FILE && tag.bad_directory) {
      expected.or_else(CUMEMPOOL_BACKUP_FAILED);
    }
    if (tag.tier != CUMEMPOOL_BACKUP_PEER) continue;
    expected.or_else(CUMEMPOOL_OUT_OF_MEMORY);
    if (tag.peer == block.device) expected.or_else(CUMEMPOOL_UNSUPPORTED);
  }
  return expected;
}

Expectation Program::expect_sleep(const SleepSpec& spec) const {
  Expectation expected = expect_backups(spec);
  if (spec.streams && capturing(machine_)) {
    expected.or_else(CUMEMPOOL_CAPTURING);
    if (warm_) expected.success = false;
  }
  expect_willing(expected, spec, true);
  const bool open = slot_ && !slot_->lasting && slot_->allocator == model_.allocator;
  for (const SleepSpec::Action& action : spec.actions) {
    if (open && action.tag == slot_->tag) expected.or_else(CUMEMPOOL_IN_USE).success = false;
  }
  return expected;
}

// Memory that must not go, or cannot.
void Program::expect_willing(Expectation& expected, const SleepSpec& spec, bool pins_count) const {
  for (const Block& block : model_.blocks) {
    if (spec.action_of(block) == nullptr || !block.awake() || !model_.current(block)) continue;
    if (pins_count && !model_.tags.at(block.tag).pins.empty()) {
      expected.or_else(CUMEMPOOL_IN_USE).success = false;
    }
    if (block.ordinary()) expected.or_else(CUMEMPOOL_UNSUPPORTED).success = false;
  }
}

std::optional<Program::Room> Program::room() const {
  if (under_way()) return std::nullopt;
  Room free{};
  for (int device = 0; device < kDevices; ++device) {
    free.at(static_cast<std::size_t>(device)) = machine_.free_bytes(device);
  }
  return free;
}

// A wake takes what is free, and what a sleep of the same transition gives back; no more, and where
// that is enough it must do.
void Program::expect_room(Expectation& expected, const WakeSpec& wake,
                          const std::optional<Room>& room, const SleepSpec* sleep) const {
  if (!room || (sleep != nullptr && shared_elsewhere())) expected.or_else(CUMEMPOOL_OUT_OF_MEMORY);
  if (!room) return;
  Room needed{};
  Room left = *room;
  for (const Block& block : model_.blocks) {
    if (!model_.current(block)) continue;
    const auto device = static_cast<std::size_t>(block.device);
    if (wake.wakes(block)) needed.at(device) += block.bytes;
    if (sleep != nullptr && block.awake() && sleep->action_of(block) != nullptr) {
      left.at(device) += block.bytes;
    }
  }
  for (std::size_t device = 0; device < kDevices; ++device) {
    if (needed.at(device) <= left.at(device)) continue;
    expected.or_else(CUMEMPOOL_OUT_OF_MEMORY);
    if (!model_.disturbed) expected.success = false;  // else memory may be held still
  }
}

// ---- reports ------------------------------------------------------------------------------------

// R13: where nothing has failed, the rows add up to what the model says happened.
void Program::check_report(cumempool_report* report, const SleepSpec* sleep,
                           const WakeSpec* wake) const {
  MUST_HOLD(report != nullptr, "there is no report");
  const std::unique_ptr<cumempool_report, decltype(&cumempool_report_destroy)> owner(
      report, &cumempool_report_destroy);
  std::size_t count = 0;
  (void)cumempool_report_problems(report, &count);
  if (model_.disturbed) return;
  MUST_HOLD(count == 0, "a report has problems although nothing has failed");
  cumempool_report_row told{};
  const cumempool_report_row* rows = cumempool_report_rows(report, &count);
  for (std::size_t i = 0; i < count; ++i) {
    told.allocations += rows[i].allocations;
    told.freed_bytes += rows[i].freed_bytes;
    told.mapped_bytes += rows[i].mapped_bytes;
    told.backed_up_bytes += rows[i].backed_up_bytes;
    told.clean_bytes += rows[i].clean_bytes;
    told.restored_bytes += rows[i].restored_bytes;
    told.discarded_bytes += rows[i].discarded_bytes;
  }
  cumempool_report_row expected{};
  std::uint64_t kept_or_given_up = 0;
  for (const Block& block : model_.blocks) {
    if (!model_.current(block)) continue;
    const SleepSpec::Action* action = sleep == nullptr ? nullptr : sleep->action_of(block);
    const bool forgotten = action != nullptr && sleep->discards(block) && sleep->drop_backups &&
                           block.state == CUMEMPOOL_ASLEEP_BACKED_UP;
    if (action != nullptr && block.awake()) {
      expected.allocations += 1;
      expected.freed_bytes += block.bytes;
      kept_or_given_up += block.bytes;
    } else if (forgotten) {
      expected.allocations += 1;
      kept_or_given_up += block.backup_bytes;
    } else if (wake != nullptr && wake->wakes(block)) {
      expected.allocations += 1;
      expected.mapped_bytes += block.bytes;
      if (block.state == CUMEMPOOL_ASLEEP_BACKED_UP) expected.restored_bytes += block.backup_bytes;
    }
  }
  MUST_HOLD(told.allocations == expected.allocations, "a report miscounts the allocations");
  MUST_HOLD(told.freed_bytes == expected.freed_bytes, "a report miscounts what was freed");
  MUST_HOLD(told.mapped_bytes == expected.mapped_bytes, "a report miscounts what was mapped");
  MUST_HOLD(told.restored_bytes == expected.restored_bytes, "a report miscounts what was restored");
  MUST_HOLD(told.backed_up_bytes + told.discarded_bytes == kept_or_given_up,
            "a report does not add up to what went to sleep");
  MUST_HOLD(told.clean_bytes <= told.backed_up_bytes, "more is clean than was kept");
}

// ---- sleep, wake, swap --------------------------------------------------------------------------

// R4: a failed sleep changes nothing; where its undoing failed as well, it says so.
void Program::take_on_failed_sleep(const Result& result, const SleepSpec& spec, bool is_swap) {
  if (!result.disturbed) return;  // then there is nothing to take on, as check() will see
  for (const cumempool_allocation_info& info : infos()) {
    for (Block& block : model_.blocks) {
      if (block.address != info.address) continue;
      const auto wrong = model_.take_on(block, info, spec, is_swap, result.secondary != 0);
      MUST_HOLD(!wrong, *wrong);
    }
  }
}

void Program::run_sleep(const Operation& operation) {
  const SleepSpec spec = sleep_spec(operation);
  const bool at_once = (operation.c & 0x80U) != 0;
  // A wake under way writes to device memory, which the host driver has in files.
  if (!at_once || full_disk_) settle_waking();
  const Request request(spec, model_, machine_);
  cumempool_report* report = nullptr;
  Result result;
  {
    std::optional<FullDisk> full;
    if (full_disk_) full.emplace(*full_disk_);
    result = call([&] { return cumempool_sleep(allocator_, &request.raw, &report); });
  }
  settle_waking();
  if (full_disk_ && !result.ok()) model_.disturbed = result.disturbed = true;
  full_disk_.reset();
  judge(result, expect_sleep(spec));
  if (result.ok()) {
    check_report(report, &spec, nullptr);
    model_.sleep(spec);
  } else {
    take_on_failed_sleep(result, spec, false);
  }
}

// a: tags, bit 6 = undeclared ones as well, bit 7 = all; b: bit 0 = with the program's streams, bit
// 1 = while a wake is under way.
void Program::run_wake(const Operation& operation) {
  WakeSpec spec;
  spec.all = (operation.a & 0x80U) != 0;
  for (std::size_t tag = 0; tag < kTags; ++tag) {
    const bool known = model_.tags.at(tag).declared || (operation.a & 0x40U) != 0;
    spec.tags.at(tag) = known && (operation.a >> tag & 1U) != 0;
  }
  wake_now(spec, (operation.b & 2U) != 0, (operation.b & 1U) != 0);
}

void Program::wake_now(const WakeSpec& spec, bool at_once, bool with_streams) {
  if (!at_once) settle_waking();
  const auto names = names_of(spec, model_);
  static const char* const none = nullptr;
  const char* const* tags = spec.all ? nullptr : names.empty() ? &none : names.data();
  std::vector<cumempool_device_stream> streams;
  for (int device = 0; with_streams && device < kDevices; ++device) {
    streams.push_back(machine_.stream(device));
  }
  const std::optional<Room> free = room();
  cumempool_report* report = nullptr;
  const Result result = call([&] {
    return cumempool_wake(allocator_, tags, names.size(), streams.data(), streams.size(), &report);
  });
  settle_waking();
  Expectation expected;
  if (with_streams && capturing(machine_)) {
    expected.or_else(CUMEMPOOL_CAPTURING);
    if (warm_) expected.success = false;
  }
  for (std::size_t tag = 0; !spec.all && tag < kTags; ++tag) {
    if (spec.tags.at(tag) && !model_.tags.at(tag).declared) {
      expected = Expectation::of(CUMEMPOOL_UNKNOWN_TAG);
    }
  }
  expect_room(expected, spec, free, nullptr);
  judge(result, expected);
  if (!result.ok()) return;
  check_report(report, nullptr, &spec);
  model_.wake(spec);
}

// a: tags to sleep, bit 5 = with the program's streams, bits 6 and 7 = dead ranges; b: as for
// sleep; c: tags to wake, bit 5 = all others, bit 7 = while a wake is under way.
void Program::run_swap(const Operation& operation) {
  SleepSpec sleep = sleep_spec({operation.kind, static_cast<std::uint8_t>(operation.a & 0x1FU),
                                static_cast<std::uint8_t>(operation.b & 0x5FU),
                                static_cast<std::uint8_t>(operation.a >> 6U)});
  sleep.streams = (operation.a & 0x20U) != 0;
  WakeSpec wake;
  wake.all = (operation.c & 0x20U) != 0;
  bool both = false;
  for (std::size_t tag = 0; tag < kTags; ++tag) {
    const bool leaves = std::any_of(sleep.actions.begin(), sleep.actions.end(),
                                    [tag](const auto& action) { return action.tag == tag; });
    wake.except.at(tag) = leaves;
    wake.tags.at(tag) = model_.tags.at(tag).declared && (operation.c >> tag & 1U) != 0;
    both = both || (!wake.all && leaves && wake.tags.at(tag));
  }
  if ((operation.c & 0x80U) == 0) settle_waking();
  const Request request(sleep, model_, machine_);
  const auto names = names_of(wake, model_);
  static const char* const none = nullptr;
  cumempool_swap_request raw{};
  raw.size = sizeof raw;
  raw.sleep = &request.raw;
  raw.wake_tags = wake.all ? nullptr : names.empty() ? &none : names.data();
  raw.wake_tag_count = wake.all ? 0 : names.size();
  const std::optional<Room> free = room();
  cumempool_report* report = nullptr;
  Result result = call([&] { return cumempool_swap(allocator_, &raw, &report); });
  settle_waking();
  // Memory that others hold is not free when it is released: it is as if they had taken it.
  if (!result.ok() && shared_elsewhere()) model_.disturbed = result.disturbed = true;
  Expectation expected = expect_sleep(sleep);
  expect_room(expected, wake, free, &sleep);
  judge(result, both ? Expectation::of(CUMEMPOOL_INVALID_ARGUMENT) : expected);
  if (result.ok()) {
    check_report(report, &sleep, &wake);
    model_.sleep(sleep);
    model_.wake(wake);
  } else if (!both) {
    take_on_failed_sleep(result, sleep, true);
  }
}

// ---- beside them --------------------------------------------------------------------------------

// As sleep, and b: bit 7 = the holders of pins yield; changes nothing but what is pinned.
void Program::run_prepare(const Operation& operation) {
  const SleepSpec spec = sleep_spec(operation);
  if ((operation.c & 0x80U) == 0) settle_waking();
  const Request request(spec, model_, machine_);
  const bool yield = (operation.b & 0x80U) != 0;
  std::vector<const char*> yielding;
  for (const SleepSpec::Action& action : spec.actions) {
    if (yield) yielding.push_back(model_.tags.at(action.tag).name.c_str());
  }
  std::uint64_t pinned = 0;
  const Result result = call([&] {
    return cumempool_prepare(allocator_, &request.raw, yielding.data(), yielding.size(), &pinned);
  });
  settle_waking();
  Expectation expected = expect_backups(spec);
  expect_willing(expected, spec, !yield);
  judge(result, expected);
}

void Program::run_release(const Operation& /*operation*/) {
  std::uint64_t released = 0;
  const Result result = call([&] { return cumempool_release_host_memory(allocator_, &released); });
  judge(result, {});
  const bool needed =
      std::any_of(model_.blocks.begin(), model_.blocks.end(),
                  [this](const Block& block) { return model_.current(block) && !block.awake(); });
  if (model_.disturbed || needed || !views_.empty() || !old_.empty()) return;
  MUST_HOLD(machine_.counters().registered_bytes == 0, "host memory stays pinned for nothing");
}

// a: bit 0 = by force; c: bit 7 = while a wake is under way. A new allocator takes its place.
void Program::run_close(const Operation& operation) {
  const bool force = (operation.a & 1U) != 0;
  if (old_.size() == 3) return;
  if ((operation.c & 0x80U) == 0) settle_waking();
  const Result result = call([&] { return cumempool_allocator_close(allocator_, force ? 1 : 0); });
  settle_waking();
  const bool lives = std::any_of(model_.blocks.begin(), model_.blocks.end(),
                                 [this](const Block& block) { return model_.current(block); });
  const bool views = has_view(model_.allocator);
  const bool bound = slot_ && slot_->allocator == model_.allocator;
  Expectation expected;
  if (!force && (lives || views || bound)) expected = Expectation::of(CUMEMPOOL_IN_USE);
  if (force && views) expected.or_else(CUMEMPOOL_DRIVER_ERROR);
  judge(result, expected);
  if (result.status == CUMEMPOOL_IN_USE) return;
  drop_waking();  // and nothing fails from here on
  expected.success = true;
  if (!result.ok()) {
    judge(call([&] { return cumempool_allocator_close(allocator_, 1); }), expected);
  }
  cumempool_address address = 0;
  judge(call([&] { return cumempool_malloc(allocator_, "weights", 0, kPage, &address); }),
        Expectation::of(CUMEMPOOL_CLOSED));
  for (Block& block : model_.blocks) {
    if (model_.current(block)) model_.vacate(block);
  }
  old_.push_back(allocator_);
  make_allocator();
}

}  // namespace cumempool::fuzz
