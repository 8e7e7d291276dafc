// The restore of allocations: maps device memory ahead of the copies into it, and gives all of it
// back after a failure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <vector>

#include "cumempool/cumempool.h"
#include "pool/allocator.hpp"
#include "pool/transfer.hpp"

namespace cumempool::pool {

// The steps of one wake or swap, in the order of the calls.
class Restore {
 public:
  // Called once all copies into an allocation are in the queue of its device.
  using Queued = std::function<void(const Record& record, backup::CopyQueue& queue)>;

  // With `queued`, programs may use memory before all of it has arrived. Then undo() first calls
  // `withdraw`, after which no more memory is handed out.
  Restore(Allocator& allocator, const char* operation, Report& report, Queued queued = {},
          std::function<void()> withdraw = {});

  // Takes the claimed records, in the order in which they become ready. Throws Error.
  void plan(std::vector<RecordPointer> claimed);
  std::vector<int> devices();
  // The device memory that the restore takes.
  std::uint64_t bytes_on(int device) const;
  // The device memory that the next allocation of a device takes; done() must be false.
  std::uint64_t next_bytes(int device);
  bool done(int device);

  // Maps the next allocation of a device and starts the copies into it. Throws Error.
  void bring_next(int device);
  // Does the same for all remaining allocations, in turns between devices. Throws Error.
  void bring_all();
  // Waits for the copies. Throws Error.
  void finish();
  // Changes the states.
  void commit();

  // Takes back the memory mapped so far. Memory that copies may still write to stays mapped (R5),
  // as does memory that the driver refuses to unmap: it is leaked, and the next wake uses it again.
  void undo(Error& failure);

 private:
  void bring(DeviceTransfer& transfer, std::size_t position);
  void attach(std::size_t index);
  void explain(Error& error, std::size_t failed) const;
  void load(backup::Transfer& streams, Record& record);
  void detach(Record& record, bool may_be_written_to);
  // The devices with access to the memory attached on one device.
  std::vector<int> users_of(int device) const;
  void fence_all();

  Allocator& allocator_;
  const char* operation_;
  Report& report_;
  const Queued queued_;
  const std::function<void()> withdraw_;
  std::vector<RecordPointer> records_;
  std::map<const Tag*, bool> zero_;
  std::vector<std::size_t> attached_;                     // of records_, in order
  std::vector<bool> held_before_;                         // of records_: they take no memory
  std::vector<std::shared_ptr<backup::Backup>> dropped_;  // destroyed outside the records' lock
  std::vector<int> busy_;  // devices that could not be waited for after a failure
  DeviceTransfers transfers_;
};

struct WakeRequest {
  std::set<const Tag*> tags;  // ignored if `all`
  bool all = false;
  std::set<const Record*> first;  // before all others
  std::vector<cumempool_device_stream> streams;

  // For an asynchronous wake. `planned` is called once the records are known and there is room for
  // them; `queued` and `withdraw` as in Restore.
  std::function<void(const std::vector<RecordPointer>& records)> planned;
  Restore::Queued queued;
  std::function<void()> withdraw;
};

}  // namespace cumempool::pool
