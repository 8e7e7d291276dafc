// The part of the DLPack 0.x exchange format that hands one-dimensional byte memory to torch.
#pragma once

#include <cstdint>

namespace cumempool::python {

// Device types.
constexpr std::int32_t kDlCpu = 1;
constexpr std::int32_t kDlCuda = 2;
// The type code of unsigned integers.
constexpr std::uint8_t kDlUnsigned = 1;

// DLManagedTensor with its DLTensor, DLDevice and DLDataType written out: the same fields in the
// same order, and so the same layout.
struct DlManagedTensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
  void* manager_ctx;
  void (*deleter)(DlManagedTensor* self);
};
static_assert(sizeof(DlManagedTensor) == 64, "a DLManagedTensor of a 64-bit system has 64 bytes");

}  // namespace cumempool::python
