/* The driver table: every virtual-memory, copy, stream and event call that cumempool makes, and the
 * contract that an implementation must keep. `cuda` (libcuda) and `host` (memfd and mmap) are built
 * in; a program may bring its own. tests/cpp/conformance_*.cpp hold any driver to the contract.
 *
 * Contract, valid for every entry:
 *
 *  C1  Results are numbered as CUresult; 0 is success. An entry never throws and never exits.
 *      If it fails, it has no effect, and its outputs are unspecified.
 *  C2  Any thread may call any entry at the same time.
 *  C3  An entry marked [context] needs the calling thread's innermost context_enter to be of its
 *      device; otherwise it fails with CUMEMPOOL_RESULT_INVALID_CONTEXT. The others, such as
 *      fence(), need only init().
 *  C4  Inside context_enter/context_leave, no entry disturbs a stream capture under way on any
 *      stream of any thread. fence() never disturbs one.
 *  C5  Sizes and addresses of reserve, create, map, set_access, unmap and unreserve are
 *      multiples of granularity(). Other values, and 0 bytes, fail with
 *      CUMEMPOOL_RESULT_INVALID_VALUE. map takes a whole handle; a part of one fails (libcuda
 *      returns CUMEMPOOL_RESULT_NOT_SUPPORTED).
 *  C6  unmap takes exactly one (address, bytes) pair given to map, unreserve exactly one given
 *      by reserve; sub-ranges and unions of ranges fail.
 *  C7  release drops the handle at once. The memory goes back to the device when its last mapping,
 *      its last imported handle and its last exported descriptor are gone as well.
 *  C8  A device may read and write mapped bytes from set_access to unmap. New memory has undefined
 *      contents. Contents follow the physical handle, not the address.
 *  C9  Copies and fills are asynchronous: they may have no effect before their stream or an
 *      event recorded behind them is synchronised, or fence() returns. The caller keeps both sides
 *      valid until then. Commands of one stream run in order. Streams do not wait for each other,
 *      except by stream_wait_event. The host side of a copy lies in a single host_register range.
 *      If host_register returns NOT_SUPPORTED or NOT_PERMITTED, it lies in any host memory, and
 *      the copy may be over before the call returns.
 *  C10 fence() returns when all work submitted to each of the devices before the call, on any
 *      stream, by any thread of the process, has finished. Captured work is not submitted work. A
 *      device whose primary context is not active has no work. If a device fails, the call still
 *      waits for the others and returns the first failure. A driver that waits for the context
 *      (CUMEMPOOL_FENCE_CONTEXT) returns STREAM_CAPTURE_UNSUPPORTED rather than break a capture.
 *  C11 unmap, release and unreserve do not wait for work in flight: the caller fences first.
 *  C12 If device memory runs out, create (on some drivers map or set_access) returns
 *      CUMEMPOOL_RESULT_OUT_OF_MEMORY, and the driver stays usable.
 *  C13 A forked child does not use the table.
 *  C14 digest() gives the same 128 bits for the same seed and bytes on every driver. Different
 *      contents of equal size, chosen without knowledge of the seed, collide with a probability of
 *      about 2^-126. cpp/driver/digest.hpp defines the digest.
 */
#ifndef CUMEMPOOL_DRIVER_H
#define CUMEMPOOL_DRIVER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Numbered as CUresult, so that a CUresult can be stored as it is. */
typedef int32_t cumempool_result;
/* An address in device memory. On the host driver, the CPU uses the same address. */
typedef uint64_t cumempool_address;
/* Physical memory: a CUmemGenericAllocationHandle. */
typedef uint64_t cumempool_physical;
/* A CUstream; 0 is the legacy default stream. */
typedef uint64_t cumempool_stream;
/* A CUevent. */
typedef uint64_t cumempool_event;

/* A range of device memory. */
typedef struct cumempool_extent {
  cumempool_address address;
  uint64_t bytes;
} cumempool_extent;

/* A 128-bit hash of contents. */
typedef struct cumempool_digest {
  uint64_t low;
  uint64_t high;
} cumempool_digest;

enum {
  CUMEMPOOL_RESULT_SUCCESS = 0,
  CUMEMPOOL_RESULT_INVALID_VALUE = 1,
  CUMEMPOOL_RESULT_OUT_OF_MEMORY = 2,
  CUMEMPOOL_RESULT_NOT_INITIALIZED = 3,
  CUMEMPOOL_RESULT_DEINITIALIZED = 4,
  CUMEMPOOL_RESULT_NO_DEVICE = 100,
  CUMEMPOOL_RESULT_INVALID_DEVICE = 101,
  CUMEMPOOL_RESULT_INVALID_CONTEXT = 201,
  CUMEMPOOL_RESULT_ALREADY_MAPPED = 208,
  CUMEMPOOL_RESULT_NOT_MAPPED = 211,
  CUMEMPOOL_RESULT_OPERATING_SYSTEM = 304,
  CUMEMPOOL_RESULT_INVALID_HANDLE = 400,
  CUMEMPOOL_RESULT_NOT_FOUND = 500,
  CUMEMPOOL_RESULT_NOT_READY = 600,
  CUMEMPOOL_RESULT_ILLEGAL_ADDRESS = 700, /* sticky: the device's context is lost */
  CUMEMPOOL_RESULT_HOST_MEMORY_ALREADY_REGISTERED = 712,
  CUMEMPOOL_RESULT_HOST_MEMORY_NOT_REGISTERED = 713,
  CUMEMPOOL_RESULT_NOT_PERMITTED = 800,
  CUMEMPOOL_RESULT_NOT_SUPPORTED = 801,
  CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED = 900
};

/* Bits of cumempool_memory_properties.handle_types; values of CUmemAllocationHandleType. */
enum { CUMEMPOOL_HANDLE_POSIX_FD = 1u, CUMEMPOOL_HANDLE_FABRIC = 8u };

/* Size of the fabric handle (CUmemFabricHandle) that export_handle writes; a POSIX fd is an int. */
enum { CUMEMPOOL_FABRIC_HANDLE_BYTES = 64 };

typedef enum cumempool_device_attribute {
  CUMEMPOOL_ATTRIBUTE_VIRTUAL_MEMORY = 0, /* virtual memory management is supported */
  CUMEMPOOL_ATTRIBUTE_POSIX_FD = 1,       /* claims to export POSIX file descriptors */
  CUMEMPOOL_ATTRIBUTE_FABRIC = 2,         /* claims to export fabric handles */
  CUMEMPOOL_ATTRIBUTE_RDMA = 3,           /* claims to create memory for GPUDirect RDMA */
  CUMEMPOOL_ATTRIBUTE_COMPUTE_MAJOR = 4,
  CUMEMPOOL_ATTRIBUTE_COMPUTE_MINOR = 5,
  CUMEMPOOL_ATTRIBUTE_HOST_NUMA = 6, /* NUMA node of the nearest host memory; -1 = unknown */
  CUMEMPOOL_ATTRIBUTE_FENCE = 7      /* the cumempool_fence_way in use */
} cumempool_device_attribute;

/* The way in which fence() waits for a device: the first of these that was seen to wait there. */
typedef enum cumempool_fence_way {
  CUMEMPOOL_FENCE_UNTRIED = 0,           /* no fence() of the device so far */
  CUMEMPOOL_FENCE_HOST_REGISTRATION = 1, /* pins and unpins a page of host memory */
  CUMEMPOOL_FENCE_ALLOCATION = 2,        /* allocates and frees a small block of device memory */
  CUMEMPOOL_FENCE_CONTEXT = 3,           /* synchronises the context; refused while capturing */
  CUMEMPOOL_FENCE_NONE = 4               /* none waits: fence() returns NOT_SUPPORTED */
} cumempool_fence_way;

/* Properties of the memory that create() makes; granularity() depends on them. */
typedef struct cumempool_memory_properties {
  int32_t device;        /* ordinal of the device in this driver */
  uint32_t handle_types; /* bits of CUMEMPOOL_HANDLE_*; 0 = no export */
  uint32_t rdma;         /* 1 = GPUDirect RDMA capable */
  uint32_t reserved;     /* 0 */
} cumempool_memory_properties;

/* context_enter fills it for context_leave on the same thread. Tokens nest like a stack. */
typedef struct cumempool_context_token {
  uint64_t context;
  int32_t capture_mode;
  int32_t device;
} cumempool_context_token;

/* Values of CUmemAccess_flags. */
typedef enum cumempool_access {
  CUMEMPOOL_ACCESS_READ = 1,
  CUMEMPOOL_ACCESS_READ_WRITE = 3
} cumempool_access;

#define CUMEMPOOL_DRIVER_VERSION 3u

/* digest() takes addresses and sizes that are multiples of this. */
enum { CUMEMPOOL_DIGEST_ALIGNMENT = 16 };

typedef struct cumempool_driver {
  uint32_t version; /* CUMEMPOOL_DRIVER_VERSION */
  uint32_t size;    /* sizeof(cumempool_driver) */
  const char *name; /* "cuda", "host", ... */
  void *self;       /* first argument of every entry */

  /* Makes the driver usable. Idempotent. Creates no context. */
  cumempool_result (*init)(void *self);
  cumempool_result (*driver_version)(void *self, int *version); /* 13000 is CUDA 13.0 */
  cumempool_result (*device_count)(void *self, int *count);
  cumempool_result (*device_name)(void *self, int device, char *name, size_t bytes);
  cumempool_result (*device_attribute)(void *self, int device, cumempool_device_attribute attribute,
                                       int *value);
  /* Writes 1 if `device` can get access to memory of `peer`, else 0. */
  cumempool_result (*peer_access)(void *self, int device, int peer, int *possible);
  /* [context] Writes the free and total bytes of the device. */
  cumempool_result (*memory_info)(void *self, int device, uint64_t *free_bytes,
                                  uint64_t *total_bytes);

  /* The primary context. active: whether it exists. retain and release hold it by count; one
   * release too many fails with CUMEMPOOL_RESULT_INVALID_CONTEXT. */
  cumempool_result (*context_active)(void *self, int device, int *active);
  cumempool_result (*context_retain)(void *self, int device);
  cumempool_result (*context_release)(void *self, int device);
  /* Makes the retained primary context current for this thread, and protects captures (C4). */
  cumempool_result (*context_enter)(void *self, int device, cumempool_context_token *token);
  /* Restores the context from before the matching context_enter. */
  cumempool_result (*context_leave)(void *self, const cumempool_context_token *token);

  /* Writes the unit in bytes of every size and address, for exactly these properties. */
  cumempool_result (*granularity)(void *self, const cumempool_memory_properties *properties,
                                  size_t *bytes);
  cumempool_result (*reserve)(void *self, size_t bytes, cumempool_address *address);
  cumempool_result (*unreserve)(void *self, cumempool_address address, size_t bytes);
  cumempool_result (*create)(void *self, size_t bytes,
                             const cumempool_memory_properties *properties,
                             cumempool_physical *physical);
  cumempool_result (*release)(void *self, cumempool_physical physical);
  cumempool_result (*map)(void *self, cumempool_address address, size_t bytes,
                          cumempool_physical physical);
  cumempool_result (*unmap)(void *self, cumempool_address address, size_t bytes);
  /* Gives each listed device access to a mapped range. A driver may refuse READ alone with
   * CUMEMPOOL_RESULT_NOT_SUPPORTED. */
  cumempool_result (*set_access)(void *self, cumempool_address address, size_t bytes,
                                 const int *devices, size_t device_count, cumempool_access access);
  /* Writes an int (a POSIX fd, close-on-exec, owned by the caller) or a fabric handle. */
  cumempool_result (*export_handle)(void *self, cumempool_physical physical, uint32_t handle_type,
                                    void *exported);
  /* Makes a handle from the output of export_handle, of this or another process. The caller keeps
   * the fd. */
  cumempool_result (*import_handle)(void *self, const void *exported, uint32_t handle_type,
                                    cumempool_physical *physical);

  /* [context] Ordinary device memory (cudaMalloc), accessible to its device, for libraries that can
   * register no other. It has no handle, and can be neither mapped elsewhere nor exported.
   * deallocate waits for work in flight on the device, and takes exactly one address given by
   * allocate. */
  cumempool_result (*allocate)(void *self, int device, size_t bytes, cumempool_address *address);
  cumempool_result (*deallocate)(void *self, int device, cumempool_address address);

  /* [context] Pins host memory for asynchronous copies from and to any device. Address and size are
   * multiples of the page size. */
  cumempool_result (*host_register)(void *self, int device, void *pointer, size_t bytes);
  /* [context] Takes exactly one pointer given to host_register. Waits for copies of any device that
   * use it. */
  cumempool_result (*host_unregister)(void *self, int device, void *pointer);

  /* [context] Streams that do not wait for the legacy default stream. */
  cumempool_result (*stream_create)(void *self, int device, cumempool_stream *stream);
  cumempool_result (*stream_destroy)(void *self, int device, cumempool_stream stream);
  cumempool_result (*stream_synchronize)(void *self, int device, cumempool_stream stream);
  /* [context] Writes 1 if a capture is under way on this very stream, else 0. Never disturbs it. */
  cumempool_result (*stream_is_capturing)(void *self, int device, cumempool_stream stream,
                                          int *capturing);
  /* [context] Events without timing. */
  cumempool_result (*event_create)(void *self, int device, cumempool_event *event);
  cumempool_result (*event_destroy)(void *self, int device, cumempool_event event);
  cumempool_result (*event_record)(void *self, int device, cumempool_event event,
                                   cumempool_stream stream);
  cumempool_result (*event_synchronize)(void *self, int device, cumempool_event event);
  /* [context] Returns CUMEMPOOL_RESULT_NOT_READY until the work recorded in the event has finished.
   * Success counts as event_synchronize. Polling comes to an end on every driver. */
  cumempool_result (*event_query)(void *self, int device, cumempool_event event);
  /* [context] Later work of the stream waits for the work recorded in the event; the calling thread
   * does not. The event may belong to another device. */
  cumempool_result (*stream_wait_event)(void *self, int device, cumempool_stream stream,
                                        cumempool_event event);

  /* [context] Asynchronous (C9). The device has access to its ranges. */
  cumempool_result (*copy_to_host)(void *self, int device, void *destination,
                                   cumempool_address source, size_t bytes, cumempool_stream stream);
  cumempool_result (*copy_to_device)(void *self, int device, cumempool_address destination,
                                     const void *source, size_t bytes, cumempool_stream stream);
  /* [context] Copies between device ranges that do not overlap, of one device or of two. `device`
   * has access to both. */
  cumempool_result (*copy_on_device)(void *self, int device, cumempool_address destination,
                                     cumempool_address source, size_t bytes,
                                     cumempool_stream stream);
  cumempool_result (*fill)(void *self, int device, cumempool_address destination, uint8_t byte,
                           size_t bytes, cumempool_stream stream);
  /* [context] Asynchronous (C9). Writes the digest (C14) of each extent of 16 to 2^32 bytes. Both
   * arrays lie in host_register memory, aligned as their elements. Takes no device memory except
   * for its code; a call with 0 extents only loads that. Returns CUMEMPOOL_RESULT_NOT_SUPPORTED if
   * the device cannot run it. */
  cumempool_result (*digest)(void *self, int device, uint64_t seed, const cumempool_extent *extents,
                             size_t count, cumempool_digest *digests, cumempool_stream stream);
  /* Waits for all submitted work of the listed devices (C10). Needs neither context_enter (C3) nor
   * a retained context. */
  cumempool_result (*fence)(void *self, const int *devices, size_t count);
} cumempool_driver;

#ifdef __cplusplus
}
#endif

#endif /* CUMEMPOOL_DRIVER_H */
