// Allocations that wake: physical memory mapped ahead of the copies into it, all of it given up
// again if something fails.
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
  // Called when all copies into an allocation are in the queue of its device.
  using Queued = std::function<void(const Record& record, backup::CopyQueue& queue)>;

  // With `queued`, memory may be in use before all of it has arrived. Then undo() calls `withdraw`
  // first, behind which nobody gets any more of it.
  Restore(Allocator& allocator, const char* operation, Report& report, Queued queued = {},
          std::function<void()> withdraw = {});

  // Takes on what was claimed, in the order in which it shall be ready. Throws Error.
  void plan(std::vector<RecordPointer> claimed);
  std::vector<int> devices();
  // Device memory that it has to take.
  std::uint64_t bytes_on(int device) const;
  // Device memory that the next allocation of a device has to take; none is left: see done().
  std::uint64_t next_bytes(int device);
  bool done(int device);

  // Maps the next allocation of a device and starts the copies into it. Throws Error.
  void bring_next(int device);
  // The same for all that are left, in turns between the devices.
  void bring_all();
  // Waits for the copies. Throws Error.
  void finish();
  // Changes the states.
  void commit();

  // Takes back what was mapped so far. Memory that copies may still write to stays mapped (R5), and
  // so does what the driver refuses to unmap: it is leaked, and the next wake uses it again.
  void undo(Error& failure);

 private:
  void bring(DeviceTransfer& transfer, std::size_t position);
  void attach(std::size_t index);
  void explain(Error& error, std::size_t failed) const;
  void load(backup::Transfer& streams, Record& record);
  void detach(Record& record, bool may_be_written_to);
  // The devices with access to what was attached on one.
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
  std::vector<bool> held_before_;                         // of records_: takes no device memory
  std::vector<std::shared_ptr<backup::Backup>> dropped_;  // outside of the records' lock
  std::vector<int> busy_;  // devices that could not be asked, after a failure
  DeviceTransfers transfers_;
};

struct WakeRequest {
  std::set<const Tag*> tags;  // ignored where `all`
  bool all = false;
  std::set<const Record*> first;  // before all others
  std::vector<cumempool_device_stream> streams;

  // Of an asynchronous wake: called once it is known what will wake and that there is room for it,
  // when all copies into an allocation are in the queue, and before what has arrived is taken back.
  std::function<void(const std::vector<RecordPointer>& records)> planned;
  Restore::Queued queued;
  std::function<void()> withdraw;
};

}  // namespace cumempool::pool
