// Records of the C interface as Python dictionaries, each made from one list of its fields.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "cumempool/cumempool.h"

namespace cumempool::python {

// Return the fields by name. The classes of the package take them as arguments.
pybind11::dict fields_of(const cumempool_error& error);
pybind11::dict fields_of(const cumempool_device_probe& probe);
pybind11::dict fields_of(const cumempool_allocation_info& info);
pybind11::dict fields_of(const cumempool_snapshot& snapshot);

// The report of a transition. Made before it, so that nothing can fail between its success and the
// caller. Only reading it takes memory.
class ReportObject {
 public:
  // Takes the report over.
  void set(cumempool_report* report) noexcept { report_.reset(report); }

  double seconds() const { return cumempool_report_seconds(report_.get()); }
  pybind11::list rows() const;
  pybind11::list problems() const;

 private:
  std::unique_ptr<cumempool_report, decltype(&cumempool_report_destroy)> report_{
      nullptr, &cumempool_report_destroy};
};

}  // namespace cumempool::python
