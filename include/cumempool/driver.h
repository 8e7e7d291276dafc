/* The driver table: every virtual-memory, copy, stream and event call that cumempool makes, and the
 * contract that an implementation must keep. `cuda` (libcuda) and `host` (memfd and mmap) are built
 * in; a program may bring its own. tests/cpp/conformance_*.cpp hold any driver to the contract.
 *
 * Contract, valid for every entry:
 *
 *  C1  Results are numbered as CUresult; 0 is success. An entry never throws and never exits.
 *      On failure it has no effect, and its outputs are unspecified.
 *  C2  Entries may be called from any thread at the same time.
 *  C3  Groups of entries marked [context] need the calling thread's innermost context_enter to
 *      be of that device; elsewhere they fail with CUMEMPOOL_RESULT_INVALID_CONTEXT. The others
 *      need only init(), fence() among them.
 *  C4  Inside context_enter/context_leave, no entry disturbs a stream capture that is under way
 *      on any stream of any thread. fence() disturbs none anywhere.
 *  C5  Sizes and addresses of reserve, create, map, set_access, unmap and unreserve are
 *      multiples of granularity(); others fail with CUMEMPOOL_RESULT_INVALID_VALUE, as does 0
 *      bytes. map takes a whole handle; part of one fails (libcuda says
 *      CUMEMPOOL_RESULT_NOT_SUPPORTED).
 *  C6  unmap takes exactly one (address, bytes) pair given to map, unreserve exactly one given
 *      by reserve; sub-ranges and unions of ranges fail.
 *  C7  release drops the handle at once; the memory goes back to the device when its last
 *      mapping is gone as well. Exported descriptors and imported handles keep it alive too.
 *  C8  Bytes that were mapped and had access set may be read and written by the device until
 *      unmap. New memory has undefined contents. Contents follow the physical handle, not the
 *      address.
 *  C9  Copies and fills are asynchronous: they may have no effect before their stream or an
 *      event recorded behind them is synchronised, or fence() returns. The calling thread keeps
 *      both sides valid until then. Commands of one stream run in order; streams do not wait
 *      for each other unless they are told to (stream_wait_event). The host side of a copy lies
 *      in a single host_register range; where host_register says NOT_SUPPORTED or NOT_PERMITTED,
 *      in any host memory, and the copy may then be over before the call returns.
 *  C10 fence() returns when all work submitted to each of the devices before the call, on any
 *      stream, by any thread of the process, has finished. Captured work is not submitted work. A
 *      device whose primary context is not active has no work. A device that fails does not keep
 *      the call from waiting for the others; the result is the first failure. A driver that waits
 *      for the context (CUMEMPOOL_FENCE_CONTEXT) says STREAM_CAPTURE_UNSUPPORTED where a capture
 *      is in the way, rather than break it.
 *  C11 unmap, release and unreserve do not wait for work in flight: the caller fences first.
 *  C12 Running out of device memory is CUMEMPOOL_RESULT_OUT_OF_MEMORY from create (on some
 *      drivers from map or set_access) and leaves the driver usable.
 *  C13 After fork, the table is not used in the child.
 *  C14 digest() gives the same 128 bits for the same seed and bytes on every driver, and on equal
 *      numbers of bytes different ones for different bytes: bytes that nobody chose with knowledge
 *      of the seed collide with a probability of about 2^-126. cpp/driver/digest.hpp defines it.
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
/* An address that the device can use. On the host driver, the CPU uses the same one. */
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

/* 128 bits that tell contents apart. */
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

/* Bytes that export_handle writes for a fabric handle (CUmemFabricHandle); a POSIX fd is an int. */
enum { CUMEMPOOL_FABRIC_HANDLE_BYTES = 64 };

typedef enum cumempool_device_attribute {
  CUMEMPOOL_ATTRIBUTE_VIRTUAL_MEMORY = 0, /* virtual memory management is supported */
  CUMEMPOOL_ATTRIBUTE_POSIX_FD = 1,       /* says it can export POSIX file descriptors */
  CUMEMPOOL_ATTRIBUTE_FABRIC = 2,         /* says it can export fabric handles */
  CUMEMPOOL_ATTRIBUTE_RDMA = 3,           /* says it can make memory for GPUDirect RDMA */
  CUMEMPOOL_ATTRIBUTE_COMPUTE_MAJOR = 4,
  CUMEMPOOL_ATTRIBUTE_COMPUTE_MINOR = 5,
  CUMEMPOOL_ATTRIBUTE_HOST_NUMA = 6, /* NUMA node of the nearest host memory; -1 = not known */
  CUMEMPOOL_ATTRIBUTE_FENCE = 7      /* the cumempool_fence_way in use */
} cumempool_device_attribute;

/* How fence() waits for a device: the first of these that was seen to wait there. */
typedef enum cumempool_fence_way {
  CUMEMPOOL_FENCE_UNTRIED = 0,           /* there was no fence() of the device so far */
  CUMEMPOOL_FENCE_HOST_REGISTRATION = 1, /* a page of host memory is pinned and unpinned */
  CUMEMPOOL_FENCE_ALLOCATION = 2,        /* a small block of device memory is made and freed */
  CUMEMPOOL_FENCE_CONTEXT = 3,           /* the context is synchronised; refused while capturing */
  CUMEMPOOL_FENCE_NONE = 4               /* none waits: fence() says NOT_SUPPORTED */
} cumempool_fence_way;

/* What create() makes; granularity() depends on it. */
typedef struct cumempool_memory_properties {
  int32_t device;        /* device ordinal as the driver counts them */
  uint32_t handle_types; /* bit set of CUMEMPOOL_HANDLE_*; 0 = cannot be exported */
  uint32_t rdma;         /* 1 = GPUDirect RDMA capable */
  uint32_t reserved;     /* 0 */
} cumempool_memory_properties;

/* Filled by context_enter, needed by context_leave on the same thread; nests like a stack. */
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

/* Addresses and sizes that digest() takes are multiples of this. */
enum { CUMEMPOOL_DIGEST_ALIGNMENT = 16 };

typedef struct cumempool_driver {
  uint32_t version; /* CUMEMPOOL_DRIVER_VERSION */
  uint32_t size;    /* sizeof(cumempool_driver) */
  const char *name; /* "cuda", "host", ... */
  void *self;       /* first argument of every entry */

  /* Makes the driver usable; idempotent. Creates no context. */
  cumempool_result (*init)(void *self);
  cumempool_result (*driver_version)(void *self, int *version); /* 13000 is CUDA 13.0 */
  cumempool_result (*device_count)(void *self, int *count);
  cumempool_result (*device_name)(void *self, int device, char *name, size_t bytes);
  cumempool_result (*device_attribute)(void *self, int device, cumempool_device_attribute attribute,
                                       int *value);
  /* Whether `device` can be given access to memory of another device. */
  cumempool_result (*peer_access)(void *self, int device, int peer, int *possible);
  /* [context] Bytes free and in total on the device. */
  cumempool_result (*memory_info)(void *self, int device, uint64_t *free_bytes,
                                  uint64_t *total_bytes);

  /* The primary context: whether it exists; holding it (counted: releasing more often than retained
   * fails with CUMEMPOOL_RESULT_INVALID_CONTEXT); making it current. */
  cumempool_result (*context_active)(void *self, int device, int *active);
  cumempool_result (*context_retain)(void *self, int device);
  cumempool_result (*context_release)(void *self, int device);
  /* Makes the retained primary context current for this thread and shields stream captures (C4). */
  cumempool_result (*context_enter)(void *self, int device, cumempool_context_token *token);
  /* Restores what was current before the matching context_enter. */
  cumempool_result (*context_leave)(void *self, const cumempool_context_token *token);

  /* Bytes that every size and address must be a multiple of, for exactly these properties. */
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
  /* Gives each listed device access to a mapped range. READ alone may be refused with
   * CUMEMPOOL_RESULT_NOT_SUPPORTED. */
  cumempool_result (*set_access)(void *self, cumempool_address address, size_t bytes,
                                 const int *devices, size_t device_count, cumempool_access access);
  /* Writes an int (POSIX fd, close-on-exec, owned by the caller) or a fabric handle. */
  cumempool_result (*export_handle)(void *self, cumempool_physical physical, uint32_t handle_type,
                                    void *exported);
  /* Makes a handle from what export_handle wrote, in this or another process; the caller keeps the
   * fd. */
  cumempool_result (*import_handle)(void *self, const void *exported, uint32_t handle_type,
                                    cumempool_physical *physical);

  /* [context] Device memory of the ordinary kind (cudaMalloc), accessible to its device: for those
   * who can register no other. It has no handle, and can be neither mapped elsewhere nor exported.
   * deallocate waits for work in flight on the device; it takes exactly one address given by
   * allocate. */
  cumempool_result (*allocate)(void *self, int device, size_t bytes, cumempool_address *address);
  cumempool_result (*deallocate)(void *self, int device, cumempool_address address);

  /* [context] Pins host memory for asynchronous copies from and to any device. Page multiples. */
  cumempool_result (*host_register)(void *self, int device, void *pointer, size_t bytes);
  /* [context] Takes exactly one pointer given to host_register; waits for copies that use it, of
   * any device. */
  cumempool_result (*host_unregister)(void *self, int device, void *pointer);

  /* [context] Streams that do not wait for the legacy default stream. */
  cumempool_result (*stream_create)(void *self, int device, cumempool_stream *stream);
  cumempool_result (*stream_destroy)(void *self, int device, cumempool_stream stream);
  cumempool_result (*stream_synchronize)(void *self, int device, cumempool_stream stream);
  /* [context] Whether a capture is under way on this very stream; never disturbs it. */
  cumempool_result (*stream_is_capturing)(void *self, int device, cumempool_stream stream,
                                          int *capturing);
  /* [context] Events without timing. */
  cumempool_result (*event_create)(void *self, int device, cumempool_event *event);
  cumempool_result (*event_destroy)(void *self, int device, cumempool_event event);
  cumempool_result (*event_record)(void *self, int device, cumempool_event event,
                                   cumempool_stream stream);
  cumempool_result (*event_synchronize)(void *self, int device, cumempool_event event);
  /* [context] CUMEMPOOL_RESULT_NOT_READY while work recorded in the event has not finished. Success
   * is as good as event_synchronize; asking again and again comes to an end on every driver. */
  cumempool_result (*event_query)(void *self, int device, cumempool_event event);
  /* [context] Later work of the stream waits for what was recorded in the event; the calling thread
   * does not. The event may be of another device. */
  cumempool_result (*stream_wait_event)(void *self, int device, cumempool_stream stream,
                                        cumempool_event event);

  /* [context] Asynchronous (C9). Device ranges lie in mapped memory with access set. */
  cumempool_result (*copy_to_host)(void *self, int device, void *destination,
                                   cumempool_address source, size_t bytes, cumempool_stream stream);
  cumempool_result (*copy_to_device)(void *self, int device, cumempool_address destination,
                                     const void *source, size_t bytes, cumempool_stream stream);
  /* [context] Between device ranges that do not overlap, of one device or of two; `device` has
   * access to both. */
  cumempool_result (*copy_on_device)(void *self, int device, cumempool_address destination,
                                     cumempool_address source, size_t bytes,
                                     cumempool_stream stream);
  cumempool_result (*fill)(void *self, int device, cumempool_address destination, uint8_t byte,
                           size_t bytes, cumempool_stream stream);
  /* [context] Asynchronous (C9). Writes the digest of each extent (C14); extents have from 16 to
   * 2^32 bytes. Both arrays lie in host_register memory, aligned as their elements are. Takes no
   * memory of the device beyond the code that computes, which a call with 0 extents only makes
   * ready; CUMEMPOOL_RESULT_NOT_SUPPORTED where the device cannot run it. */
  cumempool_result (*digest)(void *self, int device, uint64_t seed, const cumempool_extent *extents,
                             size_t count, cumempool_digest *digests, cumempool_stream stream);
  /* Waits for all submitted work of the listed devices (C10). Needs no context_enter (C3), and none
   * of the contexts held. */
  cumempool_result (*fence)(void *self, const int *devices, size_t count);
} cumempool_driver;

#ifdef __cplusplus
}
#endif

#endif /* CUMEMPOOL_DRIVER_H */
