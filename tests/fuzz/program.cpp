// The frame of a program: its allocator, its operations one by one, and how their ends are judged.
#include "program.hpp"

#include <sstream>

namespace cumempool::fuzz {

std::string text_of(cumempool_address address) {
  std::ostringstream text;
  text << "0x" << std::hex << address;
  return text.str();
}

Program::Program(const Settings& settings)
    : settings_(settings), machine_(settings.pages_per_device, settings.peers_reach_each_other) {
  make_allocator();
}

// ---- calls --------------------------------------------------------------------------------------

// R12: an error says what failed, and agrees with the status.
Result Program::result_of(cumempool_status status, std::uint64_t failures_before) {
  Result result;
  result.status = status;
  result.disturbed = machine_.faults().failures() != failures_before;
  model_.disturbed = model_.disturbed || result.disturbed;
  if (result.ok()) {
    note(result.disturbed ? "    ok, with failures" : "    ok");
    return result;
  }
  const cumempool_error& error = *cumempool_last_error();
  result.message = error.message;
  result.secondary = error.secondary_count;
  note("    " + result.message);
  MUST_HOLD(error.status == status, "the last error is of another call");
  MUST_HOLD(!result.message.empty() && *error.operation != '\0', "an error says nothing");
  MUST_HOLD((*error.driver_call == '\0') == (error.result == CUMEMPOOL_RESULT_SUCCESS),
            "an error names a driver call without its result, or the other way round");
  MUST_HOLD((*error.driver_call == '\0') == (*error.result_name == '\0'),
            "an error has a result without a name");
  for (std::size_t i = 0; i < error.secondary_count; ++i) {
    MUST_HOLD(*error.secondary[i] != '\0', "a secondary failure says nothing");
  }
  return result;
}

void Program::judge(const Result& result, const Expectation& expected) const {
  const std::string how = "it ended with status " + std::to_string(result.status);
  if (result.ok()) {
    MUST_HOLD(expected.success, "it succeeded, and must not");
    return;
  }
  if (expected.failures.count(result.status) != 0) return;
  MUST_HOLD(result.disturbed, how + ", and nothing was in its way");
  switch (result.status) {
    case CUMEMPOOL_OUT_OF_MEMORY:
    case CUMEMPOOL_OUT_OF_HOST_MEMORY:
    case CUMEMPOOL_DRIVER_ERROR:
    case CUMEMPOOL_BACKUP_FAILED:
    case CUMEMPOOL_UNSUPPORTED:
      return;
    default:
      MUST_HOLD(false, how + ", which is not what a failed driver call is called");
  }
}

void Program::fail_nothing() {
  machine_.faults().fail_nothing();
  armed_ = false;
  full_disk_.reset();
}

// ---- allocators ---------------------------------------------------------------------------------

void Program::make_allocator() {
  fail_nothing();
  cumempool_allocator_options options{};
  options.size = sizeof options;
  options.retain_backups = settings_.retain_backups ? 1 : 0;
  options.host_backup_limit = settings_.host_limit_pages * kPage;
  if (settings_.overflow != Settings::Overflow::kNone) {
    const bool file = settings_.overflow == Settings::Overflow::kFile;
    options.overflow = {sizeof options.overflow,
                        file ? CUMEMPOOL_BACKUP_FILE : CUMEMPOOL_BACKUP_PAGEABLE,
                        file ? file_directory().c_str() : nullptr, 0, 0};
  }
  judge(call([&] { return cumempool_allocator_create(&machine_.table(), &options, &allocator_); }),
        {});
  // The model knows no memory that comes back at some later time.
  judge(call([&] { return cumempool_set_free_wait(allocator_, CUMEMPOOL_FREE_WAITS); }), {});
  model_.allocator += 1;
  model_.reset_tags();
  peers_used_ = false;
  margin_ = 0;
  for (std::size_t tag = 0; tag < 3; ++tag) {
    Tag& declared = model_.tags.at(tag);
    declared.declared = true;
    declared.zero_on_wake = tag == 2;
    judge(call([&] {
            return cumempool_declare_tag(
                allocator_, declared.name.c_str(), CUMEMPOOL_ON_SLEEP_UNSET,
                declared.zero_on_wake ? CUMEMPOOL_ON_WAKE_ZERO : CUMEMPOOL_ON_WAKE_UNSET);
          }),
          {});
  }
  warm_up();
}

// The first use of a device tries its properties with a granule. What the driver does not take back
// of that is nobody's: it is left out of what fails.
void Program::warm_up() {
  warm_ = true;
  for (int device = 0; device < kDevices; ++device) {
    const std::uint64_t free = machine_.free_bytes(device);
    cumempool_address address = 0;
    const Result result =
        call([&] { return cumempool_malloc(allocator_, "weights", device, kPage, &address); });
    judge(result, free >= kPage ? Expectation{} : Expectation::of(CUMEMPOOL_OUT_OF_MEMORY));
    if (result.ok()) judge(call([&] { return cumempool_free(address); }), {});
    warm_ = warm_ && result.ok();
  }
}

// ---- operations ---------------------------------------------------------------------------------

void Program::run(const Operation& operation) {
  note(text_of(operation));
  dispatch(operation);
  check();
}

void Program::dispatch(const Operation& operation) {
  using Run = void (Program::*)(const Operation&);
  const auto repeatable = [&](Run carry_out) {
    last_ = operation;
    (this->*carry_out)(operation);
  };
  const auto settled = [&](Run carry_out) {
    settle_waking();
    (this->*carry_out)(operation);
  };
  switch (operation.kind) {
    case Kind::kNothing:
      return;
    case Kind::kMalloc:
      return repeatable(&Program::run_malloc);
    case Kind::kFree:
      return run_free(operation);
    case Kind::kWrite:
      return run_write(operation);
    case Kind::kStreamWrite:
      return run_stream_write(operation);
    case Kind::kSynchronize:
      return machine_.synchronize();
    case Kind::kSleep:
      return repeatable(&Program::run_sleep);
    case Kind::kWake:
      return repeatable(&Program::run_wake);
    case Kind::kSwap:
      return repeatable(&Program::run_swap);
    case Kind::kAgain:
      fail_nothing();
      if (last_) dispatch(*last_);
      return;
    case Kind::kWakeBegin:
      return repeatable(&Program::run_wake_begin);
    case Kind::kWakingWait:
      return run_waking_wait(operation);
    case Kind::kWakingFinish:
      return run_waking_finish(operation);
    case Kind::kPrepare:
      return repeatable(&Program::run_prepare);
    case Kind::kPin:
      return settled(&Program::run_pin);
    case Kind::kUnpin:
      return settled(&Program::run_unpin);
    case Kind::kSetBackup:
      return settled(&Program::run_set_backup);
    case Kind::kSetMemory:
      return settled(&Program::run_set_memory);
    case Kind::kDeclare:
      return settled(&Program::run_declare);
    case Kind::kView:
      return settled(&Program::run_view);
    case Kind::kViewWrite:
      return settled(&Program::run_view_write);
    case Kind::kViewEnd:
      return settled(&Program::run_view_end);
    case Kind::kExport:
      return settled(&Program::run_export);
    case Kind::kExportEnd:
      return settled(&Program::run_export_end);
    case Kind::kSharedOpen:
      return settled(&Program::run_shared_open);
    case Kind::kSharedWrite:
      return settled(&Program::run_shared_write);
    case Kind::kSharedClose:
      return settled(&Program::run_shared_close);
    case Kind::kReleaseHostMemory:
      return settled(&Program::run_release);
    case Kind::kFind:
      return run_find(operation);
    case Kind::kFail:
      return run_fail(operation);
    case Kind::kFailNothing:
      return fail_nothing();
    case Kind::kCapture: {
      const int device = operation.a % kDevices;
      return machine_.set_capturing(device, !machine_.capturing(device));
    }
    case Kind::kSlot:
      return run_slot(operation);
    case Kind::kClose:
      return run_close(operation);
    case Kind::kPreserve:
      return settled(&Program::run_preserve);
    case Kind::kMargin:
      return run_margin(operation);
  }
}

}  // namespace cumempool::fuzz
