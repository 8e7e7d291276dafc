/* cumempool: device memory in tagged pools that can be put to sleep and woken at the same address.
 *
 * Errors: every function returns a cumempool_status unless it says otherwise. If it fails, its
 * outputs are untouched, nothing is lost, and cumempool_last_error() has the reason. No function
 * throws, exits or prints. A function without a status takes NULL as an empty object. A NULL
 * argument or a value outside its enum is CUMEMPOOL_INVALID_ARGUMENT. A call in a child that was
 * forked after a driver was opened is CUMEMPOOL_FORKED. A call that needs an open allocator is
 * CUMEMPOOL_CLOSED after its close. A failed driver call is CUMEMPOOL_DRIVER_ERROR, or
 * CUMEMPOOL_OUT_OF_MEMORY if the device has no room.
 *
 * Threads: any thread may call any function at the same time. Only the end of an object (destroy,
 * end_backup_view) must come after all other calls with it. A transition (sleep, wake, swap,
 * prepare) waits for one of another thread. Inside a transition of the same allocator, on the same
 * thread, it is CUMEMPOOL_BUSY.
 *
 * Units: sizes are bytes. Devices are ordinals of the driver. Texts are UTF-8.
 *
 * Structures that may grow begin with their size. If the caller sets it, the library refuses the
 * size of another version with CUMEMPOOL_INVALID_ARGUMENT. If the library sets it, later versions
 * add fields at the end only: read the fields that the size covers, and step through an array by
 * it.
 */
#ifndef CUMEMPOOL_H
#define CUMEMPOOL_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "cumempool/driver.h"
#include "cumempool/status.h"

#if defined(CUMEMPOOL_BUILDING)
#define CUMEMPOOL_API __attribute__((visibility("default")))
#else
#define CUMEMPOOL_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Returns "0.1.0". Valid for the life of the process. */
CUMEMPOOL_API const char *cumempool_version(void);

/* Returns the calling thread's last failure, which is valid until its next failure. Never NULL. */
CUMEMPOOL_API const cumempool_error *cumempool_last_error(void);

/* Returns "CUDA_ERROR_OUT_OF_MEMORY" for 2; "CUDA_ERROR_UNRECOGNIZED" for unknown numbers. */
CUMEMPOOL_API const char *cumempool_result_name(cumempool_result result);

/* ---- drivers ------------------------------------------------------------------------------ */

/* Writes the `cuda` driver of the process. The first call opens and initialises libcuda; it creates
 * no context. CUMEMPOOL_UNAVAILABLE if the library or a required symbol is missing or cuInit fails.
 */
CUMEMPOOL_API cumempool_status cumempool_cuda_driver(const cumempool_driver **driver);

typedef struct cumempool_host_driver_options {
  uint32_t size;             /* sizeof(cumempool_host_driver_options) */
  int32_t device_count;      /* 1 to 64 */
  uint64_t bytes_per_device; /* a multiple of the granularity */
  uint64_t granularity;      /* a power of two, at least the page size */
  uint32_t handle_types; /* bits of CUMEMPOOL_HANDLE_* that create() and export_handle() grant */
  uint32_t rdma;         /* 1 = create() grants memory for RDMA */
  uint32_t fence;    /* its cumempool_fence_way; 0 = the first. With any other way, host_register()
                      * returns NOT_SUPPORTED, as in confidential computing. */
  uint32_t reserved; /* 0 */
} cumempool_host_driver_options;

/* Creates a `host` driver: devices simulated in host memory, strict about the contract of driver.h.
 * Before cumempool_host_driver_destroy, destroy every allocator and shared mapping on it, and free
 * every address. */
CUMEMPOOL_API cumempool_status cumempool_host_driver_create(
    const cumempool_host_driver_options *options, const cumempool_driver **driver);
CUMEMPOOL_API void cumempool_host_driver_destroy(const cumempool_driver *driver);

/* Queues a host function on the default stream of a host driver's device, as cuLaunchHostFunc does.
 * It runs in order, in the thread that waits for the device. For tests: a slow function makes the
 * device busy. */
CUMEMPOOL_API cumempool_status cumempool_host_driver_launch(const cumempool_driver *driver,
                                                            int device, void (*function)(void *),
                                                            void *argument);

/* The result of cumempool_probe_device, which tries a granule of device memory. */
typedef struct cumempool_device_probe {
  uint32_t size;                 /* sizeof(cumempool_device_probe), set by the caller */
  char name[256];                /* as the driver reports it */
  int32_t compute_capability;    /* 90 is 9.0 */
  int32_t virtual_memory;        /* the device attribute; 1 = supported */
  int32_t usable;                /* 1 = created, mapped, wrote, read back and gave back a granule */
  uint32_t handle_types;         /* CUMEMPOOL_HANDLE_* that create and export granted */
  uint32_t handle_types_claimed; /* the same by the attributes of the device */
  int32_t rdma;                  /* 1 = created memory for GPUDirect RDMA */
  int32_t rdma_claimed;
  int32_t fence;            /* the cumempool_fence_way in use */
  int32_t pins_host_memory; /* 1 = pinned host memory; 0: backups are pageable or files */
  uint64_t granularity;
  uint64_t free_bytes;
  uint64_t total_bytes;
  char reason[512]; /* why it is not usable, or "" */
} cumempool_device_probe;

/* Tries one granule of a device and fills every field but `size`. A failure of the trial is a
 * `reason`, not an error. Leaves no context behind that was not there before. */
CUMEMPOOL_API cumempool_status cumempool_probe_device(const cumempool_driver *driver, int device,
                                                      cumempool_device_probe *probe);

/* The host memory that the kernel leaves this process, page cache included; see
 * cumempool_host_room. */
typedef struct cumempool_host_memory {
  uint32_t size; /* sizeof(cumempool_host_memory), set by the caller */
  uint32_t reserved;
  uint64_t free_bytes;  /* under the limit that leaves the least; UINT64_MAX = unknown */
  uint64_t limit_bytes; /* that limit */
  char source[512];     /* its file: /proc/meminfo, or one of a control group */
} cumempool_host_memory;

/* Reads the limits of the machine and of every control group from the process's own up to the
 * root. */
CUMEMPOOL_API cumempool_status cumempool_host_room(cumempool_host_memory *memory);

/* ---- allocators --------------------------------------------------------------------------- */

typedef struct cumempool_allocator cumempool_allocator;

/* The place of backups. */
typedef enum cumempool_backup_tier {
  CUMEMPOOL_BACKUP_UNSET = 0,
  CUMEMPOOL_BACKUP_PINNED = 1,   /* pinned host memory: at the speed of the link */
  CUMEMPOOL_BACKUP_PAGEABLE = 2, /* host memory that the system may swap out */
  CUMEMPOOL_BACKUP_FILE = 3,     /* a file without a name, which goes with the process */
  CUMEMPOOL_BACKUP_PEER = 4      /* memory of another device, which must reach this one */
} cumempool_backup_tier;

typedef struct cumempool_backup_policy {
  uint32_t size;              /* sizeof(cumempool_backup_policy) */
  cumempool_backup_tier tier; /* UNSET keeps the previous policy */
  const char *directory;      /* FILE: the directory of the file; else NULL */
  int32_t peer_device;        /* PEER: the other device; else 0 */
  uint32_t reserved;          /* 0 */
} cumempool_backup_policy;

typedef struct cumempool_allocator_options {
  uint32_t size;              /* sizeof(cumempool_allocator_options) */
  uint32_t retain_backups;    /* 1 = keep backups while awake, and copy only changed slices later */
  uint64_t host_backup_limit; /* most pinned host bytes for backups; 0 = no limit */
  /* PAGEABLE or FILE takes backups that exceed the limit or that the driver refuses to pin. UNSET
   * refuses them. */
  cumempool_backup_policy overflow;
} cumempool_allocator_options;

/* Creates an allocator on a driver, which must outlive it. */
CUMEMPOOL_API cumempool_status cumempool_allocator_create(
    const cumempool_driver *driver, const cumempool_allocator_options *options,
    cumempool_allocator **allocator);

/* Waits for work in flight and gives everything back. CUMEMPOOL_IN_USE while allocations live,
 * slots are bound or backup views are open. With `force`, physical memory and backups go at once,
 * contents are lost, and each address stays reserved until it is freed. Ordinary memory stays until
 * it is freed. A close that the driver stopped half-way may be repeated. Closing twice is no error.
 */
CUMEMPOOL_API cumempool_status cumempool_allocator_close(cumempool_allocator *allocator, int force);

/* Returns 1 once the allocator is closed, even if the driver refused to take something back. Works
 * in a forked child. */
CUMEMPOOL_API int cumempool_allocator_closed(const cumempool_allocator *allocator);

/* Closes the allocator by force if it is open, and drops the handle. */
CUMEMPOOL_API void cumempool_allocator_destroy(cumempool_allocator *allocator);

typedef enum cumempool_on_sleep {
  CUMEMPOOL_ON_SLEEP_UNSET = 0,
  CUMEMPOOL_ON_SLEEP_OFFLOAD = 1,
  CUMEMPOOL_ON_SLEEP_DISCARD = 2
} cumempool_on_sleep;

typedef enum cumempool_on_wake {
  CUMEMPOOL_ON_WAKE_UNSET = 0,
  CUMEMPOOL_ON_WAKE_UNDEFINED = 1, /* discarded memory wakes with undefined contents */
  CUMEMPOOL_ON_WAKE_ZERO = 2       /* discarded memory wakes filled with zero bytes */
} cumempool_on_wake;

/* Declares a tag, or changes the policy of a declared one. UNSET keeps the previous value. A tag is
 * 1 to 255 bytes of UTF-8. */
CUMEMPOOL_API cumempool_status cumempool_declare_tag(cumempool_allocator *allocator,
                                                     const char *tag, cumempool_on_sleep on_sleep,
                                                     cumempool_on_wake on_wake);

/* The kind of memory of a tag. */
typedef enum cumempool_backing {
  CUMEMPOOL_BACKING_UNSET = 0,
  CUMEMPOOL_BACKING_VMM = 1,        /* virtual memory management: can sleep and be shared */
  CUMEMPOOL_BACKING_CUDA_MALLOC = 2 /* ordinary memory: can do neither; for libraries that can
                                       register no other (legacy IPC) */
} cumempool_backing;

/* Values of cumempool_memory_policy.all_peers. */
enum {
  CUMEMPOOL_PEERS_LISTED = 0, /* the devices in `peers`. If there are none: every device whose
                                 primary context is active, as it becomes so */
  CUMEMPOOL_PEERS_ALL = 1,    /* every device that can reach the memory */
  CUMEMPOOL_PEERS_NONE = 2    /* only the device of the memory */
};

typedef struct cumempool_memory_policy {
  uint32_t size;             /* sizeof(cumempool_memory_policy) */
  cumempool_backing backing; /* UNSET is VMM */
  uint32_t all_peers;        /* CUMEMPOOL_PEERS_*: the other devices that get access */
  uint32_t peer_count;
  const int32_t *peers;  /* devices that get access beside the memory's own, now and at each wake */
  uint32_t without_rdma; /* 0 = memory for GPUDirect RDMA if the device grants it, which costs
                            libcuda a call to the kernel at each map and unmap; 1 = other memory */
  uint32_t reserved;
} cumempool_memory_policy;

/* Sets the kind of memory of a declared tag. CUMEMPOOL_IN_USE while the tag has memory of another
 * kind. CUMEMPOOL_INVALID_ARGUMENT for a peer that does not exist, and for ordinary memory with
 * peers or without RDMA. CUMEMPOOL_UNSUPPORTED for a peer that reaches no other device; malloc
 * returns it if a peer cannot reach the device. */
CUMEMPOOL_API cumempool_status cumempool_set_memory(cumempool_allocator *allocator, const char *tag,
                                                    const cumempool_memory_policy *policy);

/* Pins the memory of a tag for a holder that has registered it elsewhere. Until cumempool_unpin, a
 * sleep of the tag is CUMEMPOOL_IN_USE, and the message names the holder. Waits for a transition of
 * another thread. */
CUMEMPOOL_API cumempool_status cumempool_pin(cumempool_allocator *allocator, const char *tag,
                                             const char *holder, uint64_t *pin);
CUMEMPOOL_API cumempool_status cumempool_unpin(cumempool_allocator *allocator, uint64_t pin);

/* Sets the place of backups of a declared tag, from its next sleep on. The default is PINNED.
 * CUMEMPOOL_UNSUPPORTED if no device can reach the peer. */
CUMEMPOOL_API cumempool_status cumempool_set_backup(cumempool_allocator *allocator, const char *tag,
                                                    const cumempool_backup_policy *policy);

/* Allocates `bytes` of device memory under a declared tag, rounded up to the granularity. Waits for
 * no transition. CUMEMPOOL_OUT_OF_MEMORY if the device has no room beside the memory margin. */
CUMEMPOOL_API cumempool_status cumempool_malloc(cumempool_allocator *allocator, const char *tag,
                                                int device, size_t bytes,
                                                cumempool_address *address);

/* The same, with preserved contents: the memory sleeps and wakes with its tag, and is backed up
 * each time, even if the tag is discarded. */
CUMEMPOOL_API cumempool_status cumempool_malloc_preserved(cumempool_allocator *allocator,
                                                          const char *tag, int device, size_t bytes,
                                                          cumempool_address *address);

/* Preserves the contents of the allocation that holds `address` from now on, even if its tag is
 * discarded. Waits for a transition of another thread. */
CUMEMPOOL_API cumempool_status cumempool_preserve(cumempool_allocator *allocator,
                                                  cumempool_address address);

/* From now on, an allocation (through a slot too) that would leave less than `bytes` of its device
 * free is CUMEMPOOL_OUT_OF_MEMORY. 0, the default, lets allocations take all memory. Wakes ignore
 * the margin. */
CUMEMPOOL_API cumempool_status cumempool_set_memory_margin(cumempool_allocator *allocator,
                                                           uint64_t bytes);

/* Writes the progress of the transition under way, or of the last one: the bytes of the allocations
 * whose copies are done, and of all allocations that it copies or fills. For other threads to poll;
 * never waits. */
CUMEMPOOL_API cumempool_status cumempool_progress(cumempool_allocator *allocator,
                                                  uint64_t *done_bytes, uint64_t *total_bytes);

/* Frees memory of any allocator, awake or asleep, by the address that malloc or a slot returned.
 * Waits for work in flight on the device, up to the time of cumempool_set_free_wait. If a
 * transition is using the allocation, it goes when the transition ends. CUMEMPOOL_NOT_OWNED if no
 * live allocation starts at `address`. */
CUMEMPOOL_API cumempool_status cumempool_free(cumempool_address address);

/* Sets how long a free waits for a busy device, in nanoseconds; 1 ms by default. After that the
 * free returns; the memory counts as pending_free_bytes and goes back as soon as it can. With
 * CUMEMPOOL_FREE_WAITS, a free waits until the memory is back. */
#define CUMEMPOOL_FREE_WAITS UINT64_MAX
CUMEMPOOL_API cumempool_status cumempool_set_free_wait(cumempool_allocator *allocator,
                                                       uint64_t nanoseconds);

/* ---- slots: the functions that torch.cuda.memory.CUDAPluggableAllocator loads by name ----- */

/* Returns the number of pairs cumempool_malloc_<n> / cumempool_free_<n>. */
CUMEMPOOL_API uint32_t cumempool_slot_count(void);

/* Binds a free slot to (allocator, tag). The tag must be declared. It cannot sleep until the slot
 * is unbound (CUMEMPOOL_IN_USE), because a caching allocator above may hand out parts of the slot's
 * memory again. CUMEMPOOL_OUT_OF_SLOTS if all slots are bound. */
CUMEMPOOL_API cumempool_status cumempool_bind_slot(cumempool_allocator *allocator, const char *tag,
                                                   uint32_t *slot);

/* The same for a slot that stays bound while its tag sleeps, such as the slots of pools for CUDA
 * graphs. The program makes sure that nothing uses sleeping memory. */
CUMEMPOOL_API cumempool_status cumempool_bind_lasting_slot(cumempool_allocator *allocator,
                                                           const char *tag, uint32_t *slot);

/* Preserves all memory allocated through a bound slot from now on, until the slot is unbound, as
 * cumempool_malloc_preserved() does. */
CUMEMPOOL_API cumempool_status cumempool_preserve_slot(uint32_t slot);

/* Writes the number of calls of cumempool_malloc_<slot> since the slot was bound. */
CUMEMPOOL_API cumempool_status cumempool_slot_mallocs(uint32_t slot, uint64_t *count);

/* Unbinds a slot. cumempool_malloc_<slot> returns NULL until the slot is bound again;
 * cumempool_free_<slot> still frees memory allocated before. */
CUMEMPOOL_API cumempool_status cumempool_unbind_slot(uint32_t slot);

/* ---- transitions -------------------------------------------------------------------------- */

typedef struct cumempool_device_stream {
  uint32_t size; /* sizeof(cumempool_device_stream) */
  int32_t device;
  cumempool_stream stream;
} cumempool_device_stream;

typedef struct cumempool_tag_action {
  const char *tag;
  cumempool_on_sleep action; /* OFFLOAD or DISCARD */
} cumempool_tag_action;

typedef struct cumempool_sleep_request {
  uint32_t size;         /* sizeof(cumempool_sleep_request) */
  uint32_t drop_backups; /* 1 = DISCARD also drops the backups of memory that is asleep already */
  const cumempool_tag_action *tags;
  size_t tag_count;
  const cumempool_extent *dead; /* ranges whose bytes need no backup, in any order */
  size_t dead_count;
  const cumempool_device_stream *streams; /* the caller's current streams; CUMEMPOOL_CAPTURING if
                                             one is capturing */
  size_t stream_count;
  uint64_t dead_as_of; /* cumempool_moment() from before the caller made the list: memory that may
                          have been handed out since is backed up although it is listed; 0 = the
                          list holds */
} cumempool_sleep_request;

/* Writes a number that grows as slots are bound and memory is allocated. */
CUMEMPOOL_API cumempool_status cumempool_moment(cumempool_allocator *allocator, uint64_t *moment);

/* One tag on one device. */
typedef struct cumempool_report_row {
  uint32_t size; /* bytes from this row to the next */
  int32_t device;
  const char *tag;
  uint64_t allocations;     /* allocations that changed state */
  uint64_t freed_bytes;     /* device memory given back */
  uint64_t mapped_bytes;    /* device memory taken */
  uint64_t backed_up_bytes; /* contents kept: copied now, or clean */
  uint64_t clean_bytes;     /* contents kept without a copy, in a retained backup */
  uint64_t restored_bytes;  /* contents copied back */
  uint64_t discarded_bytes; /* contents dropped: discarded allocations and dead ranges */
  uint64_t zeroed_bytes;
  double copy_seconds; /* duration of the copies of this row */
} cumempool_report_row;

typedef struct cumempool_report cumempool_report;
CUMEMPOOL_API double cumempool_report_seconds(const cumempool_report *report);
CUMEMPOOL_API const cumempool_report_row *cumempool_report_rows(const cumempool_report *report,
                                                                size_t *count);
/* Returns failures that did not stop the transition, as texts. The statistics count their memory.
 */
CUMEMPOOL_API const char *const *cumempool_report_problems(const cumempool_report *report,
                                                           size_t *count);
CUMEMPOOL_API void cumempool_report_destroy(cumempool_report *report);

/* Puts every awake allocation of the listed tags to sleep: all or none. Waits for work in flight on
 * every device with access first. Memory that is asleep already stays as it is. CUMEMPOOL_IN_USE
 * for a tag that is pinned or bound to a slot. If there is no room for a backup, the status depends
 * on the tier: CUMEMPOOL_OUT_OF_HOST_MEMORY, CUMEMPOOL_OUT_OF_MEMORY (PEER),
 * CUMEMPOOL_BACKUP_FAILED (FILE), or CUMEMPOOL_UNSUPPORTED if the driver pins no host memory. */
CUMEMPOOL_API cumempool_status cumempool_sleep(cumempool_allocator *allocator,
                                               const cumempool_sleep_request *request,
                                               cumempool_report **report);

/* Pins the host memory that this sleep will need beyond its free room, so that the sleep only
 * copies. Writes the bytes pinned. Fails as the sleep would, for memory that is pinned to a holder
 * or cannot sleep. `yielding`: tags whose holders unpin before a sleep. A transition that starts
 * meanwhile waits. On failure, host memory pinned so far stays. */
CUMEMPOOL_API cumempool_status cumempool_prepare(cumempool_allocator *allocator,
                                                 const cumempool_sleep_request *request,
                                                 const char *const *yielding, size_t yielding_count,
                                                 uint64_t *pinned_bytes);

/* Wakes every sleeping allocation of the tags (tags NULL = all): all or none. When it returns,
 * every stream sees the restored bytes. Drops backups only after the whole wake has succeeded.
 * CUMEMPOOL_OUT_OF_MEMORY if a device has no room; CUMEMPOOL_BACKUP_FAILED or
 * CUMEMPOOL_BACKUP_DAMAGED if a backup file cannot be read. */
CUMEMPOOL_API cumempool_status cumempool_wake(cumempool_allocator *allocator,
                                              const char *const *tags, size_t tag_count,
                                              const cumempool_device_stream *streams,
                                              size_t stream_count, cumempool_report **report);

typedef struct cumempool_swap_request {
  uint32_t size;     /* sizeof(cumempool_swap_request) */
  uint32_t reserved; /* 0 */
  const cumempool_sleep_request *sleep;
  const char *const *wake_tags; /* NULL = all tags that the sleep does not name */
  size_t wake_tag_count;
} cumempool_swap_request;

/* Puts tags to sleep and wakes others in one transition, all or none, with both directions of the
 * link busy. Takes no device memory beyond the free memory and the memory that the sleep gives
 * back. CUMEMPOOL_INVALID_ARGUMENT for a tag in both lists. Other errors as sleep and wake. */
CUMEMPOOL_API cumempool_status cumempool_swap(cumempool_allocator *allocator,
                                              const cumempool_swap_request *request,
                                              cumempool_report **report);

/* A wake that runs in a thread of its own. */
typedef struct cumempool_waking cumempool_waking;

/* Begins a wake like cumempool_wake(), in the order of allocation, with the allocations of `first`
 * before the rest. Returns once the devices have room for it, which other processes may still take.
 */
CUMEMPOOL_API cumempool_status cumempool_wake_begin(cumempool_allocator *allocator,
                                                    const char *const *tags, size_t tag_count,
                                                    const cumempool_address *first,
                                                    size_t first_count,
                                                    const cumempool_device_stream *streams,
                                                    size_t stream_count, cumempool_waking **waking);
/* Makes later work of the stream, of any device in use, wait until the allocation that holds
 * `address` has its contents. Does not wait for the contents itself. No effect if the allocation is
 * awake. Fails if the wake has failed. */
CUMEMPOOL_API cumempool_status cumempool_waking_wait(cumempool_waking *waking,
                                                     cumempool_address address,
                                                     cumempool_device_stream stream);
/* Returns 1 once the wake has ended, successfully or not. Never waits. */
CUMEMPOOL_API int cumempool_waking_done(const cumempool_waking *waking);
/* Waits for the end. If the wake has failed, everything is asleep as before, and memory that was
 * handed to a stream meanwhile is gone again. Another call fails the same way, or writes NULL as
 * the report. */
CUMEMPOOL_API cumempool_status cumempool_waking_finish(cumempool_waking *waking,
                                                       cumempool_report **report);
/* Waits for the end, and drops the handle. */
CUMEMPOOL_API void cumempool_waking_destroy(cumempool_waking *waking);

/* A lease on the backup of sleeping memory. */
typedef struct cumempool_backup_view {
  uint32_t size; /* sizeof(cumempool_backup_view), set by the caller */
  uint32_t reserved;
  void *data;     /* the backup itself in host memory, not a copy */
  uint64_t bytes; /* as requested */
  void *lease;    /* for cumempool_end_backup_view */
} cumempool_backup_view;

/* Shows the backup of `bytes` at an address of sleeping memory. With `writable` = 1, the next wake
 * restores the bytes that the caller writes there. The view stays valid, and keeps its host memory,
 * until cumempool_end_backup_view; after the wake it shows the restored bytes.
 * CUMEMPOOL_UNSUPPORTED for backups on a peer, CUMEMPOOL_INVALID_ARGUMENT for 0 bytes. */
CUMEMPOOL_API cumempool_status cumempool_view_backup(cumempool_allocator *allocator,
                                                     cumempool_address address, uint64_t bytes,
                                                     int writable, cumempool_backup_view *view);
CUMEMPOOL_API void cumempool_end_backup_view(void *lease);

/* Gives back host memory that holds no contents of sleeping memory: free room, retained backups of
 * awake memory, buffers. Writes the bytes given back. */
CUMEMPOOL_API cumempool_status cumempool_release_host_memory(cumempool_allocator *allocator,
                                                             uint64_t *released_bytes);

/* ---- queries and sharing ------------------------------------------------------------------ */

typedef enum cumempool_state {
  CUMEMPOOL_AWAKE = 0,
  CUMEMPOOL_ASLEEP_BACKED_UP = 1,
  CUMEMPOOL_ASLEEP_DISCARDED = 2
} cumempool_state;

typedef struct cumempool_allocation_info {
  uint32_t size; /* sizeof(cumempool_allocation_info), set by the caller; in a snapshot, the bytes
                    from this element to the next */
  int32_t device;
  cumempool_address address;
  uint64_t bytes;           /* of the allocation; a multiple of the granularity */
  uint64_t requested_bytes; /* the argument of malloc */
  const char *tag;          /* valid for the life of the process, like all names of tags */
  cumempool_state state;
  uint64_t generation;   /* grows at each wake: physical pages changed, registrations are stale */
  uint64_t backup_bytes; /* of the backup with its contents, or with those of its last sleep */
  cumempool_backup_tier backup_tier; /* of that backup; UNSET if there is none */
  cumempool_backing backing;
  uint64_t sequence;  /* order of allocation */
  uint32_t preserved; /* 1 = a discard of the tag keeps its contents */
  uint32_t reserved;
} cumempool_allocation_info;

/* Finds the live allocation that holds an address, at its start or inside. `allocator` NULL = any
 * allocator. CUMEMPOOL_NOT_OWNED if there is none, or if it belongs to another allocator. */
CUMEMPOOL_API cumempool_status cumempool_find(cumempool_allocator *allocator,
                                              cumempool_address address,
                                              cumempool_allocation_info *info);

/* One tag on one device. Device -1: the tag is declared and empty. */
typedef struct cumempool_tag_stats {
  uint32_t size; /* bytes from this element to the next */
  int32_t device;
  const char *tag;
  cumempool_on_sleep on_sleep;
  cumempool_on_wake on_wake;
  uint32_t handle_types; /* properties of its memory, frozen at the first allocation */
  uint32_t rdma;
  uint32_t reserved;
  uint64_t awake_allocations;
  uint64_t awake_bytes;
  uint64_t backed_up_allocations;
  uint64_t backed_up_bytes; /* sizes of allocations asleep with a backup */
  uint64_t discarded_allocations;
  uint64_t discarded_bytes;
  uint64_t backup_bytes;   /* bytes of backups that hold contents */
  uint64_t retained_bytes; /* bytes of backups kept while awake */
  cumempool_backup_tier backup_tier;
  cumempool_backing backing;
  uint64_t pins;             /* see cumempool_pin */
  uint64_t unreleased_bytes; /* asleep, with contents in memory that failed to map again */
  uint64_t preserved_bytes;  /* awake or asleep, with contents that no discard drops */
} cumempool_tag_stats;

typedef struct cumempool_totals {
  uint32_t size; /* bytes that the library has written */
  uint32_t reserved;
  uint64_t reserved_address_bytes; /* address space held from the driver */
  uint64_t physical_bytes;         /* memory held from the driver = created - released */
  uint64_t mapped_bytes;
  uint64_t pending_free_bytes; /* freed by the program, not given back yet */
  uint64_t host_bytes;         /* pinned host memory held for backups */
  uint64_t host_used_bytes;    /* the part with backups in it, retained ones included */
  uint64_t pageable_bytes;     /* pageable host memory held for backups */
  uint64_t file_bytes;         /* held in backup files */
  uint64_t peer_bytes;         /* device memory held for backups of other devices */
  uint64_t staging_bytes;      /* pinned host memory held for buffers and digests */
  uint64_t malloc_calls;
  uint64_t malloc_failures;
  uint64_t free_calls;
  uint64_t sleeps; /* committed transitions */
  uint64_t wakes;
  uint64_t swaps;
  uint64_t failed_transitions;
  uint64_t peak_physical_bytes; /* the most physical_bytes so far, or since cumempool_reset_peaks */
  uint64_t leaked_bytes;        /* the driver refused to take it back; tried once more at close */
} cumempool_totals;

/* Sets each peak to its present value. */
CUMEMPOOL_API cumempool_status cumempool_reset_peaks(cumempool_allocator *allocator);

/* Exports the handle of the awake allocation that holds `address`: an int (POSIX fd, close-on-exec,
 * owned by the caller) or a fabric handle of CUMEMPOOL_FABRIC_HANDLE_BYTES. Waits for a transition
 * of another thread. CUMEMPOOL_INVALID_ARGUMENT if the memory is asleep, CUMEMPOOL_UNSUPPORTED if
 * it has no such handle. */
CUMEMPOOL_API cumempool_status cumempool_export(cumempool_allocator *allocator,
                                                cumempool_address address, uint32_t handle_type,
                                                void *exported, cumempool_allocation_info *info);

/* Physical memory of another process, mapped here. */
typedef struct cumempool_shared cumempool_shared;

/* Maps memory that cumempool_export() exported, `bytes` in all, for use by `device`. An fd stays
 * the caller's. The memory lives as long as the mapping, even if its owner ends.
 * CUMEMPOOL_UNSUPPORTED if the driver refuses READ. If opening fails and the driver refuses to take
 * back what it gave so far, that is leaked. */
CUMEMPOOL_API cumempool_status cumempool_shared_open(const cumempool_driver *driver, int device,
                                                     uint32_t handle_type, const void *exported,
                                                     uint64_t bytes, cumempool_access access,
                                                     cumempool_shared **shared);
CUMEMPOOL_API cumempool_address cumempool_shared_address(const cumempool_shared *shared);
/* Waits for work in flight on the device, and unmaps. May be repeated if it fails. */
CUMEMPOOL_API cumempool_status cumempool_shared_close(cumempool_shared *shared);
/* Closes the mapping if it is open, and drops the handle. What the driver refuses to take back is
 * leaked. If the wait for the device fails, the memory stays mapped, because work may still use it.
 */
CUMEMPOOL_API void cumempool_shared_destroy(cumempool_shared *shared);

typedef struct cumempool_snapshot cumempool_snapshot;

/* Takes a consistent picture of tags, totals and allocations. An allocation that another thread is
 * making or freeing at this moment may count in the totals alone. With `allocations` = 0 the
 * snapshot leaves single allocations out and is cheap. */
CUMEMPOOL_API cumempool_status cumempool_take_snapshot(cumempool_allocator *allocator,
                                                       int allocations,
                                                       cumempool_snapshot **snapshot);
CUMEMPOOL_API const cumempool_totals *cumempool_snapshot_totals(const cumempool_snapshot *snapshot);
CUMEMPOOL_API const cumempool_tag_stats *cumempool_snapshot_tags(const cumempool_snapshot *snapshot,
                                                                 size_t *count);
CUMEMPOOL_API const cumempool_allocation_info *cumempool_snapshot_allocations(
    const cumempool_snapshot *snapshot, size_t *count);
/* Returns the reason of the last failed malloc, through a slot or cumempool_malloc, or "". */
CUMEMPOOL_API const char *cumempool_snapshot_last_malloc_failure(
    const cumempool_snapshot *snapshot);
CUMEMPOOL_API void cumempool_snapshot_destroy(cumempool_snapshot *snapshot);

#ifdef __cplusplus
}
#endif

#endif /* CUMEMPOOL_H */
