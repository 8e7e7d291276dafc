// Composes the message of an Error, and names driver results.
#include "driver/error.hpp"

#include <array>
#include <cstdio>

namespace cumempool {
namespace {

// Returns "sleep of tag 'kv' on device 0 (2.00 MiB)", without the unknown parts.
std::string subject(const Error& error) {
  std::string text = error.operation;
  if (!error.tag.empty()) {
    text += (text.empty() ? "tag '" : " of tag '") + error.tag + "'";
  }
  if (error.device >= 0) {
    text += (text.empty() ? "device " : " on device ") + std::to_string(error.device);
  }
  if (error.bytes > 0) {
    const std::string size = format_bytes(error.bytes);
    text += text.empty() ? size : " (" + size + ")";
  }
  return text;
}

// Returns "cuMemCreate returned CUDA_ERROR_OUT_OF_MEMORY (2)", or "" if no driver call failed.
std::string failed_call(const Error& error) {
  if (error.driver_call.empty()) {
    return {};
  }
  return error.driver_call + " returned " + result_name(error.result) + " (" +
         std::to_string(error.result) + ")";
}

void append(std::string& text, const char* separator, const std::string& part) {
  if (part.empty()) {
    return;
  }
  if (!text.empty()) {
    text += separator;
  }
  text += part;
}

}  // namespace

std::string Error::message() const {
  std::string text = account();
  append(text, ". ", advice);
  return text;
}

std::string Error::account() const {
  std::string body = problem;
  append(body, "; ", failed_call(*this));
  if (total_bytes > 0) {
    append(body, "; ", format_bytes(free_bytes) + " of " + format_bytes(total_bytes) + " are free");
  }
  std::string text = subject(*this);
  append(text, ": ", body);
  for (std::size_t i = 0; i < secondary.size(); ++i) {
    append(text, i == 0 ? "; then also failed: " : ", ", secondary[i]);
  }
  return text;
}

const char* Error::what() const noexcept {
  try {
    text_ = message();
    return text_.c_str();
  } catch (const std::exception&) {  // no memory left to compose the sentence
    return "cumempool error";
  }
}

const char* result_name(cumempool_result result) noexcept {
  switch (result) {
#define CUMEMPOOL_RESULT(number, name) \
  case number:                         \
    return #name;
#include "driver/results.inc"
#undef CUMEMPOOL_RESULT
    default:
      return "CUDA_ERROR_UNRECOGNIZED";
  }
}

bool loses_context(cumempool_result result) noexcept {
  switch (result) {
    case 214:  // CUDA_ERROR_ECC_UNCORRECTABLE
    case 220:  // CUDA_ERROR_NVLINK_UNCORRECTABLE
    case CUMEMPOOL_RESULT_ILLEGAL_ADDRESS:
    case 702:  // CUDA_ERROR_LAUNCH_TIMEOUT
    case 709:  // CUDA_ERROR_CONTEXT_IS_DESTROYED
    case 710:  // CUDA_ERROR_ASSERT
    case 714:  // CUDA_ERROR_HARDWARE_STACK_ERROR
    case 715:  // CUDA_ERROR_ILLEGAL_INSTRUCTION
    case 716:  // CUDA_ERROR_MISALIGNED_ADDRESS
    case 717:  // CUDA_ERROR_INVALID_ADDRESS_SPACE
    case 718:  // CUDA_ERROR_INVALID_PC
    case 719:  // CUDA_ERROR_LAUNCH_FAILED
      return true;
    default:
      return false;
  }
}

std::string format_bytes(std::uint64_t bytes) {
  constexpr std::array<const char*, 6> units = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  constexpr double step = 1024.0;
  if (bytes < 1024) {
    return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
  }
  double value = static_cast<double>(bytes) / step;
  std::size_t unit = 0;
  // 1023.995 and above would print as "1024.00" although there is a larger unit.
  while (value >= 1023.995 && unit + 1 < units.size()) {
    value /= step;
    ++unit;
  }
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.2f %s", value, units[unit]);
  return text.data();
}

}  // namespace cumempool
