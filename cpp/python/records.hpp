// The records of the C interface as Python sees them, each from one list of its fields.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "cumempool/cumempool.h"

namespace cumempool::python {

// Dictionaries, field by field: the classes of the package take them as arguments.
pybind11::dict fields_of(const cumempool_error& error);
pybind11::dict fields_of(const cumempool_device_probe& probe);
pybind11::dict fields_of(const cumempool_allocation_info& info);
pybind11::dict fields_of(const cumempool_snapshot& snapshot);

// What a transition did. Made before it, so that nothing can fail between its success and the
// caller; what is read of it takes memory then.
class Report {
 public:
  // Takes it over.
  void set(cumempool_report* report) noexcept { report_.reset(report); }

  double seconds() const { return cumempool_report_seconds(report_.get()); }
  pybind11::list rows() const;
  pybind11::list problems() const;

 private:
  struct Destroy {
    void operator()(cumempool_report* report) const { cumempool_report_destroy(report); }
  };
  std::unique_ptr<cumempool_report, Destroy> report_;
};

}  // namespace cumempool::python
