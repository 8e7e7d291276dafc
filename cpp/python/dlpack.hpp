// The part of the DLPack 0.x exchange format that is needed to hand one-dimensional byte memory to
// torch; field order and meaning are those of the published format.
#pragma once

#include <cstdint>

namespace cumempool::python {

enum DlDeviceType : std::int32_t { kDlCpu = 1, kDlCuda = 2 };
constexpr std::uint8_t kDlUnsigned = 1;

struct DlDevice {
  DlDeviceType device_type;
  std::int32_t device_id;
};

struct DlDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct DlTensor {
  void* data;
  DlDevice device;
  std::int32_t ndim;
  DlDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DlManagedTensor {
  DlTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DlManagedTensor* self);
};

}  // namespace cumempool::python
