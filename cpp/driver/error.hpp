// The exception of the core. It carries everything a person needs to act (R12). The abi layer turns
// it into a status code and the calling thread's last error.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "cumempool/status.h"

namespace cumempool {

class Error : public std::exception {
 public:
  Error(cumempool_status code, std::string description)
      : status(code), problem(std::move(description)) {}

  // "sleep of tag 'kv' on device 0 (2.00 MiB): cuMemCreate returned CUDA_ERROR_OUT_OF_MEMORY (2)"
  std::string message() const;
  // The same without the advice, for a list of failures.
  std::string account() const;
  const char* what() const noexcept override;

  cumempool_status status;
  std::string problem;  // the failure in words; "" if the driver call says it all
  std::string operation;
  std::string tag;
  int device = -1;
  std::uint64_t bytes = 0;
  std::string driver_call;
  cumempool_result result = CUMEMPOOL_RESULT_SUCCESS;
  std::uint64_t free_bytes = 0;
  std::uint64_t total_bytes = 0;
  std::string advice;
  std::vector<std::string> secondary;
  bool pin_refused = false;  // the driver refused to pin host memory, and works on

 private:
  mutable std::string text_;
};

// Returns "CUDA_ERROR_..."; "CUDA_ERROR_UNRECOGNIZED" for unknown numbers.
const char* result_name(cumempool_result result) noexcept;

// Whether a device that returns this has lost its context, which runs nothing more.
bool loses_context(cumempool_result result) noexcept;

// Returns "14.96 GiB", "2.00 MiB", "512 bytes".
std::string format_bytes(std::uint64_t bytes);

}  // namespace cumempool
