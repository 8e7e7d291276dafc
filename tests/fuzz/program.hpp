// The program that an input describes: carries out its operations on the library, and holds each of
// them to the model.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "finding.hpp"
#include "machine.hpp"
#include "model.hpp"
#include "operation.hpp"

namespace cumempool::fuzz {

// How a call ended.
struct Result {
  bool ok() const noexcept { return status == CUMEMPOOL_OK; }

  cumempool_status status = CUMEMPOOL_OK;
  std::string message;
  std::size_t secondary = 0;
  bool disturbed = false;  // a driver call failed meanwhile, or others took what it needed
};

// How a call that nothing disturbs may end.
struct Expectation {
  static Expectation of(cumempool_status only) {
    return only == CUMEMPOOL_OK ? Expectation{} : Expectation{false, {only}};
  }
  Expectation& or_else(cumempool_status status) {
    failures.insert(status);
    return *this;
  }

  bool success = true;
  std::set<cumempool_status> failures;
};

class Program {
 public:
  explicit Program(const Settings& settings);
  ~Program() = default;
  Program(const Program&) = delete;
  Program(Program&&) = delete;
  Program& operator=(const Program&) = delete;
  Program& operator=(Program&&) = delete;

  void run(const Operation& operation);
  // Looks at all contents once more, and gives everything back.
  void end();

 private:
  struct View {
    cumempool_backup_view view{};
    std::size_t allocator = 0;
    std::uint64_t block = 0;
    std::uint64_t epoch = 0;
    std::size_t offset = 0;
    bool writable = false;
    Contents contents;
  };
  struct Export {
    int descriptor;
    int device;
    std::uint64_t block;
    std::uint64_t generation;
    std::uint64_t bytes;
  };
  // A wake in a thread of its own. While it is not settled, nobody knows what is awake.
  struct Waking {
    cumempool_waking* handle = nullptr;
    std::vector<std::uint64_t> blocks;
    bool settled = false;
    bool crowded = false;  // something may have been in its way
    std::uint64_t failures_before = 0;
    cumempool_status status = CUMEMPOOL_OK;  // once settled
  };
  struct Slot {
    std::uint32_t number;
    std::size_t allocator;
    std::size_t tag;
    bool preserves;
    bool lasting;  // its tag may sleep
  };

  // ---- calls and their judgement (program.cpp)
  template <typename Call>
  Result call(const Call& made) {
    const std::uint64_t before = machine_.faults().failures();
    return result_of(made(), before);
  }
  Result result_of(cumempool_status status, std::uint64_t failures_before);
  void judge(const Result& result, const Expectation& expected) const;
  void fail_nothing();
  void make_allocator();
  void warm_up();
  void dispatch(const Operation& operation);

  // ---- memory (program_memory.cpp)
  void run_malloc(const Operation& operation);
  void run_free(const Operation& operation);
  void run_write(const Operation& operation);
  void run_stream_write(const Operation& operation);
  void run_find(const Operation& operation);
  void run_slot(const Operation& operation);
  void run_preserve(const Operation& operation);
  void run_margin(const Operation& operation);
  Expectation expect_malloc(const Tag& tag, int device, std::size_t bytes);
  Block& add_block(cumempool_address address, std::size_t tag, int device, std::size_t bytes);
  void free_block(std::uint64_t id);
  Block* any_block(std::uint8_t choice);
  Block* writable_block(std::uint8_t choice);

  // ---- policies (program_policies.cpp)
  void run_declare(const Operation& operation);
  void run_set_backup(const Operation& operation);
  void run_set_memory(const Operation& operation);
  void run_pin(const Operation& operation);
  void run_unpin(const Operation& operation);
  void run_fail(const Operation& operation);

  // ---- transitions (program_transitions.cpp)
  void run_sleep(const Operation& operation);
  void run_wake(const Operation& operation);
  void run_swap(const Operation& operation);
  void run_prepare(const Operation& operation);
  void run_release(const Operation& operation);
  void run_close(const Operation& operation);
  SleepSpec sleep_spec(const Operation& operation) const;
  std::vector<cumempool_extent> dead_ranges(std::uint8_t choice) const;
  Expectation expect_sleep(const SleepSpec& spec) const;
  Expectation expect_backups(const SleepSpec& spec) const;
  void expect_willing(Expectation& expected, const SleepSpec& spec, bool pins_count) const;
  using Room = std::array<std::uint64_t, kDevices>;
  std::optional<Room> room() const;
  void expect_room(Expectation& expected, const WakeSpec& wake, const std::optional<Room>& room,
                   const SleepSpec* sleep) const;
  void take_on_failed_sleep(const Result& result, const SleepSpec& spec, bool is_swap);
  void check_report(cumempool_report* report, const SleepSpec* sleep, const WakeSpec* wake) const;
  void wake_now(const WakeSpec& spec, bool at_once, bool streams);

  // ---- asynchronous wakes (program_waking.cpp)
  void run_wake_begin(const Operation& operation);
  void run_waking_wait(const Operation& operation);
  void run_waking_finish(const Operation& operation);
  void settle_waking();
  void drop_waking();
  bool under_way() const noexcept { return waking_.handle != nullptr && !waking_.settled; }
  bool waking_has(std::uint64_t id) const;

  // ---- views (program_views.cpp)
  void run_view(const Operation& operation);
  void run_view_write(const Operation& operation);
  void run_view_end(const Operation& operation);
  void check_view(const View& view) const;
  void end_view(std::size_t index);
  bool has_view(std::size_t allocator) const;

  // ---- sharing (program_sharing.cpp)
  void run_export(const Operation& operation);
  void run_export_end(const Operation& operation);
  void run_shared_open(const Operation& operation);
  void run_shared_write(const Operation& operation);
  void run_shared_close(const Operation& operation);
  void check_share(const Share& share);
  void close_share(std::size_t index, bool close_first);
  bool shared_elsewhere() const {
    return !exports_.empty() || !model_.shares.empty() || shares_leaked_;
  }

  // ---- what must hold at any time (program_checks.cpp)
  void check();
  void check_contents();
  void check_block(const cumempool_allocation_info& info, Block& block) const;
  void check_tags(const cumempool_snapshot* snapshot) const;
  void check_numbers(const cumempool_snapshot* snapshot) const;
  std::vector<cumempool_allocation_info> infos() const;

  // ---- the end (program_end.cpp)
  void wake_and_free(std::size_t tag);
  void end_sharing();
  void end_old();

  const Settings settings_;
  Machine machine_;
  Model model_;
  cumempool_allocator* allocator_ = nullptr;
  std::vector<cumempool_allocator*> old_;  // closed by force, with addresses that were not freed
  std::vector<View> views_;
  std::vector<Export> exports_;
  Waking waking_;
  std::optional<Slot> slot_;
  std::optional<Operation> last_;  // of those that kAgain repeats
  std::uint64_t next_block_ = 1;
  bool armed_ = false;
  bool warm_ = false;  // all devices have been used by the allocator
  bool peers_used_ = false;
  bool shares_leaked_ = false;  // the driver has refused to take memory of a share back
  std::uint64_t margin_ = 0;
  std::optional<std::uint64_t> full_disk_;
};

std::string text_of(cumempool_address address);

}  // namespace cumempool::fuzz
