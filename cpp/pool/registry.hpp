// Which live allocation of the process an address belongs to, whichever allocator made it.
#pragma once

#include <map>
#include <mutex>

#include "pool/record_set.hpp"

namespace cumempool::pool {

// Thread-safe, one per process; torch frees by pointer alone, from any thread, at any time.
class Registry {
 public:
  static Registry& instance();

  void add(const RecordPointer& record);
  // Removes and returns the record that starts exactly at `address`, or null.
  RecordPointer take(cumempool_address address);
  // The record that holds `address`, anywhere inside it, or null.
  RecordPointer find(cumempool_address address) const;

 private:
  mutable std::mutex mutex_;
  std::map<cumempool_address, RecordPointer> records_;
};

}  // namespace cumempool::pool
