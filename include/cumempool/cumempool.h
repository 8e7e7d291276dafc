/* cumempool: device memory in tagged pools that can be put to sleep and woken at the same address.
 *
 * Every function returns a cumempool_status unless it says otherwise; on failure its outputs are
 * untouched, nothing is lost, and cumempool_last_error() says why. No function throws, exits or
 * prints. All of them may be called from any thread at the same time. Those that return no status
 * take NULL as an object without anything in it.
 *
 * Structures that may grow begin with their size. Where the caller sets it, one of
 * another version is refused with CUMEMPOOL_INVALID_ARGUMENT. Where the library sets it, fields are
 * only added at the end: read those that the size covers, and go from one element of an array to
 * the next by it.
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

/* "0.1.0". Valid for the life of the process. */
CUMEMPOOL_API const char *cumempool_version(void);

/* The calling thread's last failure; valid until its next failure. Never NULL. */
CUMEMPOOL_API const cumempool_error *cumempool_last_error(void);

/* "CUDA_ERROR_OUT_OF_MEMORY" for 2; "CUDA_ERROR_UNRECOGNIZED" for numbers it does not know. */
CUMEMPOOL_API const char *cumempool_result_name(cumempool_result result);

/* ---- drivers ------------------------------------------------------------------------------ */

/* The `cuda` driver of the process. Opens libcuda at the first call and initialises it; makes no
 * context. CUMEMPOOL_UNAVAILABLE where the library or a required symbol is missing or cuInit fails.
 */
CUMEMPOOL_API cumempool_status cumempool_cuda_driver(const cumempool_driver **driver);

typedef struct cumempool_host_driver_options {
  uint32_t size;             /* sizeof(cumempool_host_driver_options) */
  int32_t device_count;      /* 1 to 64 */
  uint64_t bytes_per_device; /* memory of each device; a multiple of the granularity */
  uint64_t granularity;      /* a power of two, at least the page size */
  uint32_t handle_types; /* what create() and export_handle() grant: bits of CUMEMPOOL_HANDLE_* */
  uint32_t rdma;         /* 1 = create() grants memory for RDMA */
  uint32_t fence;    /* the cumempool_fence_way it has; 0 = the first. All but that one go with a
                      * host_register() that says NOT_SUPPORTED, as in confidential computing. */
  uint32_t reserved; /* 0 */
} cumempool_host_driver_options;

/* A new `host` driver: devices simulated in host memory, strict about the contract of driver.h.
 * Lives until cumempool_host_driver_destroy, which must come after every allocator on it is
 * destroyed and every address of theirs was freed. */
CUMEMPOOL_API cumempool_status cumempool_host_driver_create(
    const cumempool_host_driver_options *options, const cumempool_driver **driver);
CUMEMPOOL_API void cumempool_host_driver_destroy(const cumempool_driver *driver);

/* Queues a function of the host on the default stream of a host driver's device, as
 * cuLaunchHostFunc does: it runs in its turn, in the thread that waits for the device. For tests:
 * a function that takes its time makes the device a busy one. */
CUMEMPOOL_API cumempool_status cumempool_host_driver_launch(const cumempool_driver *driver,
                                                            int device, void (*function)(void *),
                                                            void *argument);

/* What one granule of device memory can be, found by trying; see cumempool_probe_device. */
typedef struct cumempool_device_probe {
  uint32_t size;              /* sizeof(cumempool_device_probe), set by the caller */
  char name[256];             /* as the driver reports it */
  int32_t compute_capability; /* 90 is 9.0 */
  int32_t virtual_memory;     /* the device attribute; 1 = supported */
  int32_t usable;             /* a granule was created, mapped, written, read back and returned */
  uint32_t handle_types;      /* CUMEMPOOL_HANDLE_* that could be created and exported */
  uint32_t handle_types_claimed; /* the same by the device's attributes */
  int32_t rdma;                  /* memory for GPUDirect RDMA could be created */
  int32_t rdma_claimed;
  int32_t fence;            /* the cumempool_fence_way in use */
  int32_t pins_host_memory; /* host memory could be pinned; else backups are pageable or files */
  uint64_t granularity;
  uint64_t free_bytes;
  uint64_t total_bytes;
  char reason[512]; /* why not usable, or "" */
} cumempool_device_probe;

/* Tries a device for real. Leaves no context behind that was not there before. */
CUMEMPOOL_API cumempool_status cumempool_probe_device(const cumempool_driver *driver, int device,
                                                      cumempool_device_probe *probe);

/* What the kernel leaves this process of host memory, page cache included; see
 * cumempool_host_room. */
typedef struct cumempool_host_memory {
  uint32_t size; /* sizeof(cumempool_host_memory), set by the caller */
  uint32_t reserved;
  uint64_t free_bytes;  /* under the limit that leaves the least; UINT64_MAX = not known */
  uint64_t limit_bytes; /* of that one */
  char source[512];     /* its file: /proc/meminfo, or that of a control group */
} cumempool_host_memory;

/* Looks at the machine, and at every control group from the process's own up to the root. */
CUMEMPOOL_API cumempool_status cumempool_host_room(cumempool_host_memory *memory);

/* ---- allocators --------------------------------------------------------------------------- */

typedef struct cumempool_allocator cumempool_allocator;

/* Where the contents of sleeping memory are kept. */
typedef enum cumempool_backup_tier {
  CUMEMPOOL_BACKUP_UNSET = 0,
  CUMEMPOOL_BACKUP_PINNED = 1,   /* pinned host memory: at the speed of the link */
  CUMEMPOOL_BACKUP_PAGEABLE = 2, /* host memory that the system may swap out */
  CUMEMPOOL_BACKUP_FILE = 3,     /* a file that has no name and goes with the process */
  CUMEMPOOL_BACKUP_PEER = 4      /* memory of another device, which must be able to reach it */
} cumempool_backup_tier;

typedef struct cumempool_backup_policy {
  uint32_t size;              /* sizeof(cumempool_backup_policy) */
  cumempool_backup_tier tier; /* UNSET leaves what was set before */
  const char *directory;      /* FILE: where the file is made; else NULL */
  int32_t peer_device;        /* PEER: the other device; else 0 */
  uint32_t reserved;          /* 0 */
} cumempool_backup_policy;

typedef struct cumempool_allocator_options {
  uint32_t size;           /* sizeof(cumempool_allocator_options) */
  uint32_t retain_backups; /* 1 = keep backups while awake, and copy only what has changed since */
  uint64_t host_backup_limit; /* most pinned host bytes held for backups; 0 = no limit */
  /* What takes backups that the limit leaves no room for, or that the driver refuses to pin:
   * PAGEABLE or FILE; UNSET refuses them. */
  cumempool_backup_policy overflow;
} cumempool_allocator_options;

CUMEMPOOL_API cumempool_status cumempool_allocator_create(
    const cumempool_driver *driver, const cumempool_allocator_options *options,
    cumempool_allocator **allocator);

/* Gives everything back. Refused with CUMEMPOOL_IN_USE while allocations live or slots are bound,
 * unless `force`: then physical memory and backups go at once, contents are lost, and the addresses
 * stay reserved until each is freed. Ordinary memory stays until it is freed. Closing twice is no
 * error. */
CUMEMPOOL_API cumempool_status cumempool_allocator_close(cumempool_allocator *allocator, int force);

/* 1 once the allocator is closed, whether or not everything was given back; also after a fork. */
CUMEMPOOL_API int cumempool_allocator_closed(const cumempool_allocator *allocator);

/* Drops the handle. An allocator that was not closed is closed by force first. */
CUMEMPOOL_API void cumempool_allocator_destroy(cumempool_allocator *allocator);

typedef enum cumempool_on_sleep {
  CUMEMPOOL_ON_SLEEP_UNSET = 0,
  CUMEMPOOL_ON_SLEEP_OFFLOAD = 1,
  CUMEMPOOL_ON_SLEEP_DISCARD = 2
} cumempool_on_sleep;

typedef enum cumempool_on_wake {
  CUMEMPOOL_ON_WAKE_UNSET = 0,
  CUMEMPOOL_ON_WAKE_UNDEFINED = 1, /* discarded memory comes back with undefined contents */
  CUMEMPOOL_ON_WAKE_ZERO = 2       /* discarded memory comes back filled with zero bytes */
} cumempool_on_wake;

/* Makes a tag known, or changes the policy of a known one; UNSET leaves what was set before. Tags
 * are 1 to 255 bytes of UTF-8. */
CUMEMPOOL_API cumempool_status cumempool_declare_tag(cumempool_allocator *allocator,
                                                     const char *tag, cumempool_on_sleep on_sleep,
                                                     cumempool_on_wake on_wake);

/* What memory of a tag is made of. */
typedef enum cumempool_backing {
  CUMEMPOOL_BACKING_UNSET = 0,
  CUMEMPOOL_BACKING_VMM = 1,        /* virtual memory management: can sleep and be shared */
  CUMEMPOOL_BACKING_CUDA_MALLOC = 2 /* ordinary memory: can be registered by those who know no
                                       other (legacy IPC), and can do neither */
} cumempool_backing;

/* Values of cumempool_memory_policy.all_peers. */
enum {
  CUMEMPOOL_PEERS_LISTED = 0, /* those in `peers`; where there are none, nobody has chosen: the
                                 devices whose primary context is active, as they become so */
  CUMEMPOOL_PEERS_ALL = 1,    /* every device that can */
  CUMEMPOOL_PEERS_NONE = 2    /* only the device that the memory is on */
};

typedef struct cumempool_memory_policy {
  uint32_t size;             /* sizeof(cumempool_memory_policy) */
  cumempool_backing backing; /* UNSET is VMM */
  uint32_t all_peers;        /* CUMEMPOOL_PEERS_*: who else gets access */
  uint32_t peer_count;
  const int32_t *peers;  /* devices that get access beside the memory's own, now and at each wake */
  uint32_t without_rdma; /* 1 = not for GPUDirect RDMA, which costs libcuda a call to the kernel at
                            each map and unmap; 0 = for it, where the device grants that */
  uint32_t reserved;
} cumempool_memory_policy;

/* What memory of a declared tag is made of. CUMEMPOOL_IN_USE while memory of the tag lives that was
 * made otherwise; CUMEMPOOL_INVALID_ARGUMENT for a peer that does not exist, and for ordinary
 * memory with peers or without RDMA; CUMEMPOOL_UNSUPPORTED for a peer that reaches no other device,
 * and from malloc where a peer cannot reach the device. */
CUMEMPOOL_API cumempool_status cumempool_set_memory(cumempool_allocator *allocator, const char *tag,
                                                    const cumempool_memory_policy *policy);

/* Until the pin is taken off, putting memory of the tag to sleep is refused with CUMEMPOOL_IN_USE,
 * naming the holder: for whoever has registered the memory elsewhere. Waits for a transition of
 * another thread. */
CUMEMPOOL_API cumempool_status cumempool_pin(cumempool_allocator *allocator, const char *tag,
                                             const char *holder, uint64_t *pin);
CUMEMPOOL_API cumempool_status cumempool_unpin(cumempool_allocator *allocator, uint64_t pin);

/* Where backups of a declared tag go from its next sleep on; what was never set is PINNED. Refused
 * with CUMEMPOOL_UNSUPPORTED where no device can reach the peer. */
CUMEMPOOL_API cumempool_status cumempool_set_backup(cumempool_allocator *allocator, const char *tag,
                                                    const cumempool_backup_policy *policy);

/* `bytes` of device memory under a declared tag, rounded up to the granularity. */
CUMEMPOOL_API cumempool_status cumempool_malloc(cumempool_allocator *allocator, const char *tag,
                                                int device, size_t bytes,
                                                cumempool_address *address);

/* The same for contents that are kept wherever the tag is discarded: such memory sleeps and wakes
 * with its tag, and is backed up each time. */
CUMEMPOOL_API cumempool_status cumempool_malloc_preserved(cumempool_allocator *allocator,
                                                          const char *tag, int device, size_t bytes,
                                                          cumempool_address *address);

/* Has the contents of the allocation that holds `address` kept from now on wherever its tag is
 * discarded. Waits for a transition of another thread. */
CUMEMPOOL_API cumempool_status cumempool_preserve(cumempool_allocator *allocator,
                                                  cumempool_address address);

/* From now on an allocation, through a slot too, is refused with CUMEMPOOL_OUT_OF_MEMORY where less
 * than `bytes` of its device would stay free; 0, as at the start, takes all there is. Wakes are not
 * concerned. */
CUMEMPOOL_API cumempool_status cumempool_set_memory_margin(cumempool_allocator *allocator,
                                                           uint64_t bytes);

/* How far the transition under way has come, or the last one went: bytes of the allocations whose
 * copies are done, and of all that it copies or fills. For another thread to look at now and then;
 * never waits. */
CUMEMPOOL_API cumempool_status cumempool_progress(cumempool_allocator *allocator,
                                                  uint64_t *done_bytes, uint64_t *total_bytes);

/* Frees by the address that malloc (or a slot) returned, awake or asleep, whichever allocator it
 * came from. Waits for work in flight on the device. While a transition is using the allocation, it
 * goes when the transition ends. */
CUMEMPOOL_API cumempool_status cumempool_free(cumempool_address address);

/* How long a free waits for a device that is busy, in nanoseconds; 1 ms unless it is set. A free
 * that has waited that long goes on, and the memory, which counts as pending_free_bytes, comes back
 * as soon as it can. CUMEMPOOL_FREE_WAITS: a free waits until it is back. */
#define CUMEMPOOL_FREE_WAITS UINT64_MAX
CUMEMPOOL_API cumempool_status cumempool_set_free_wait(cumempool_allocator *allocator,
                                                       uint64_t nanoseconds);

/* ---- slots: the functions that torch.cuda.memory.CUDAPluggableAllocator loads by name ----- */

/* How many pairs cumempool_malloc_<n> / cumempool_free_<n> there are. */
CUMEMPOOL_API uint32_t cumempool_slot_count(void);

/* Routes a slot that is not bound to (allocator, tag). The tag must be declared, and is kept from
 * going to sleep until the slot is unbound (CUMEMPOOL_IN_USE): what the slot gave may be handed out
 * again in parts by a caching allocator above it. */
CUMEMPOOL_API cumempool_status cumempool_bind_slot(cumempool_allocator *allocator, const char *tag,
                                                   uint32_t *slot);

/* The same for a slot that stays bound while its tag sleeps, as those of pools that CUDA graphs are
 * captured into: the program sees to it that no part of what sleeps is used. */
CUMEMPOOL_API cumempool_status cumempool_bind_lasting_slot(cumempool_allocator *allocator,
                                                           const char *tag, uint32_t *slot);

/* What is allocated through a bound slot is preserved until the slot is unbound, as by
 * cumempool_malloc_preserved(). */
CUMEMPOOL_API cumempool_status cumempool_preserve_slot(uint32_t slot);

/* Writes how many times cumempool_malloc_<slot> was called since the slot was bound. */
CUMEMPOOL_API cumempool_status cumempool_slot_mallocs(uint32_t slot, uint64_t *count);

/* Ends the routing: cumempool_malloc_<slot> returns NULL until it is bound again;
 * cumempool_free_<slot> goes on working for what was allocated. */
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
  uint32_t drop_backups; /* 1 = DISCARD also drops the backups of what is asleep already */
  const cumempool_tag_action *tags;
  size_t tag_count;
  const cumempool_extent *dead; /* ranges whose bytes need no backup, in any order */
  size_t dead_count;
  const cumempool_device_stream *streams; /* the caller's current streams: refused if capturing */
  size_t stream_count;
  uint64_t
      dead_as_of; /* cumempool_moment() from before the list was made: what may have been handed
                     out since is backed up although it is in the list; 0 = the list holds */
} cumempool_sleep_request;

/* Writes the number of the present moment, which grows as slots are bound and memory is allocated.
 */
CUMEMPOOL_API cumempool_status cumempool_moment(cumempool_allocator *allocator, uint64_t *moment);

/* One tag on one device. */
typedef struct cumempool_report_row {
  uint32_t size; /* bytes from this row to the next */
  int32_t device;
  const char *tag;
  uint64_t allocations;     /* allocations that changed state */
  uint64_t freed_bytes;     /* device memory given back */
  uint64_t mapped_bytes;    /* device memory taken */
  uint64_t backed_up_bytes; /* contents kept: those copied now, and the clean ones */
  uint64_t clean_bytes;     /* contents kept without a copy: a retained backup has them */
  uint64_t restored_bytes;  /* copied back */
  uint64_t discarded_bytes; /* given up without a copy: discarded allocations and dead ranges */
  uint64_t zeroed_bytes;
  double copy_seconds; /* time that the copies of this row took */
} cumempool_report_row;

typedef struct cumempool_report cumempool_report;
CUMEMPOOL_API double cumempool_report_seconds(const cumempool_report *report);
CUMEMPOOL_API const cumempool_report_row *cumempool_report_rows(const cumempool_report *report,
                                                                size_t *count);
/* Failures that did not stop the transition, as texts; memory they concern is in the statistics. */
CUMEMPOOL_API const char *const *cumempool_report_problems(const cumempool_report *report,
                                                           size_t *count);
CUMEMPOOL_API void cumempool_report_destroy(cumempool_report *report);

/* Puts every awake allocation of the listed tags to sleep: all or none. Waits for work in flight on
 * their devices first. What is asleep already stays as it is. */
CUMEMPOOL_API cumempool_status cumempool_sleep(cumempool_allocator *allocator,
                                               const cumempool_sleep_request *request,
                                               cumempool_report **report);

/* Pins the host memory that this sleep will need beyond what is free, so that the sleep only
 * copies, and writes the bytes pinned. Refused where the sleep would be, with the same error:
 * memory that is pinned, or cannot sleep. `yielding`: tags whose holders take their pins off before
 * a sleep. A transition that starts meanwhile waits. On failure, what was pinned until then stays.
 */
CUMEMPOOL_API cumempool_status cumempool_prepare(cumempool_allocator *allocator,
                                                 const cumempool_sleep_request *request,
                                                 const char *const *yielding, size_t yielding_count,
                                                 uint64_t *pinned_bytes);

/* Wakes every sleeping allocation of the tags (tags NULL = all): all or none. When it returns, the
 * restored bytes are visible to every stream. Backups are dropped only after the whole wake has
 * succeeded. */
CUMEMPOOL_API cumempool_status cumempool_wake(cumempool_allocator *allocator,
                                              const char *const *tags, size_t tag_count,
                                              const cumempool_device_stream *streams,
                                              size_t stream_count, cumempool_report **report);

typedef struct cumempool_swap_request {
  uint32_t size;     /* sizeof(cumempool_swap_request) */
  uint32_t reserved; /* 0 */
  const cumempool_sleep_request *sleep;
  const char *const *wake_tags; /* NULL = all that the sleep does not name */
  size_t wake_tag_count;
} cumempool_swap_request;

/* Puts tags to sleep and wakes others in one transition, all or none, with both directions of the
 * link busy. Takes no more device memory than what is free and what the sleep gives back. No tag
 * may be in both. */
CUMEMPOOL_API cumempool_status cumempool_swap(cumempool_allocator *allocator,
                                              const cumempool_swap_request *request,
                                              cumempool_report **report);

/* A wake under way in a thread of its own. */
typedef struct cumempool_waking cumempool_waking;

/* Begins a wake as cumempool_wake() does it, in the order of allocation, `first` before the rest,
 * and returns once it is sure to have the memory it needs unless others take it meanwhile. */
CUMEMPOOL_API cumempool_status cumempool_wake_begin(cumempool_allocator *allocator,
                                                    const char *const *tags, size_t tag_count,
                                                    const cumempool_address *first,
                                                    size_t first_count,
                                                    const cumempool_device_stream *streams,
                                                    size_t stream_count, cumempool_waking **waking);
/* Makes later work of the stream, of any device in use, wait until the allocation that holds
 * `address` has its contents; returns as soon as that is arranged. No effect where it is awake. */
CUMEMPOOL_API cumempool_status cumempool_waking_wait(cumempool_waking *waking,
                                                     cumempool_address address,
                                                     cumempool_device_stream stream);
/* 1 once the wake has ended, well or not. */
CUMEMPOOL_API int cumempool_waking_done(const cumempool_waking *waking);
/* Waits for the end. On failure everything is asleep as before, and memory that was handed to a
 * stream meanwhile is gone again. May be called again: then it fails the same way, or `report` is
 * NULL. */
CUMEMPOOL_API cumempool_status cumempool_waking_finish(cumempool_waking *waking,
                                                       cumempool_report **report);
/* Waits for the end, and drops the handle. */
CUMEMPOOL_API void cumempool_waking_destroy(cumempool_waking *waking);

/* A lease on the backup of sleeping memory. */
typedef struct cumempool_backup_view {
  uint32_t size; /* sizeof(cumempool_backup_view), set by the caller */
  uint32_t reserved;
  void *data;     /* host memory that holds the bytes, without a copy */
  uint64_t bytes; /* as asked for */
  void *lease;    /* for cumempool_end_backup_view */
} cumempool_backup_view;

/* The backup of `bytes` at an address of sleeping memory. `writable` = 1: what is written there is
 * what the next wake restores. The view stays valid, and keeps its host memory, until it is ended;
 * after the wake it shows what was restored. CUMEMPOOL_UNSUPPORTED for backups on a peer,
 * CUMEMPOOL_INVALID_ARGUMENT for 0 bytes. */
CUMEMPOOL_API cumempool_status cumempool_view_backup(cumempool_allocator *allocator,
                                                     cumempool_address address, uint64_t bytes,
                                                     int writable, cumempool_backup_view *view);
CUMEMPOOL_API void cumempool_end_backup_view(void *lease);

/* Returns host memory that holds no contents of sleeping memory: free room, retained backups of
 * memory that is awake, buffers. */
CUMEMPOOL_API cumempool_status cumempool_release_host_memory(cumempool_allocator *allocator,
                                                             uint64_t *released_bytes);

/* ---- what there is ------------------------------------------------------------------------ */

typedef enum cumempool_state {
  CUMEMPOOL_AWAKE = 0,
  CUMEMPOOL_ASLEEP_BACKED_UP = 1,
  CUMEMPOOL_ASLEEP_DISCARDED = 2
} cumempool_state;

typedef struct cumempool_allocation_info {
  uint32_t size; /* sizeof(cumempool_allocation_info), set by the caller; in a snapshot, bytes from
                    this one to the next */
  int32_t device;
  cumempool_address address;
  uint64_t bytes;           /* of the allocation; a multiple of the granularity */
  uint64_t requested_bytes; /* what malloc was asked for */
  const char *tag;          /* valid for the life of the process, as all names of tags */
  cumempool_state state;
  uint64_t generation;   /* grows at each wake: physical pages changed, registrations are stale */
  uint64_t backup_bytes; /* bytes of the backup that has its contents, or those of its last sleep */
  cumempool_backup_tier backup_tier; /* of that backup; UNSET where there is none */
  cumempool_backing backing;
  uint64_t sequence;  /* order of allocation */
  uint32_t preserved; /* 1 = its contents are kept where its tag is discarded */
  uint32_t reserved;
} cumempool_allocation_info;

/* The live allocation that holds an address, anywhere inside it. `allocator` NULL = any allocator;
 * CUMEMPOOL_NOT_OWNED where there is none, or it belongs to another allocator. */
CUMEMPOOL_API cumempool_status cumempool_find(cumempool_allocator *allocator,
                                              cumempool_address address,
                                              cumempool_allocation_info *info);

/* One tag on one device (or device -1: declared and empty). */
typedef struct cumempool_tag_stats {
  uint32_t size; /* bytes from this one to the next */
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
  uint64_t unreleased_bytes; /* asleep, with contents in memory that could not be mapped again */
  uint64_t preserved_bytes;  /* awake or asleep, with contents that no discard touches */
} cumempool_tag_stats;

typedef struct cumempool_totals {
  uint32_t size; /* sizeof(cumempool_totals) where the library was built: what it has written */
  uint32_t reserved;
  uint64_t reserved_address_bytes; /* address space held from the driver */
  uint64_t physical_bytes;         /* memory held from the driver = created - released */
  uint64_t mapped_bytes;
  uint64_t pending_free_bytes; /* freed by the program, not back yet */
  uint64_t host_bytes;         /* pinned host memory held for backups */
  uint64_t host_used_bytes;    /* the part that holds backups, retained ones included */
  uint64_t pageable_bytes;     /* pageable host memory held for backups */
  uint64_t file_bytes;         /* of backup files */
  uint64_t peer_bytes;         /* device memory held for backups of other devices */
  uint64_t staging_bytes;      /* pinned host memory held for buffers and digests */
  uint64_t malloc_calls;
  uint64_t malloc_failures;
  uint64_t free_calls;
  uint64_t sleeps; /* transitions that were committed */
  uint64_t wakes;
  uint64_t swaps;
  uint64_t failed_transitions;
  uint64_t peak_physical_bytes; /* the most physical_bytes so far, or since cumempool_reset_peaks */
  uint64_t leaked_bytes;        /* the driver refused to take it back; tried once more at close */
} cumempool_totals;

/* Peaks begin again with what is held now. */
CUMEMPOOL_API cumempool_status cumempool_reset_peaks(cumempool_allocator *allocator);

/* Exports the handle of the awake allocation that holds `address`: an int (POSIX fd, close-on-exec,
 * the caller's) or a fabric handle. Waits for a transition of another thread. */
CUMEMPOOL_API cumempool_status cumempool_export(cumempool_allocator *allocator,
                                                cumempool_address address, uint32_t handle_type,
                                                void *exported, cumempool_allocation_info *info);

/* Physical memory of another process, mapped here. */
typedef struct cumempool_shared cumempool_shared;

/* Maps what cumempool_export() wrote there, `bytes` in all, for use by `device`. An fd stays the
 * caller's. The memory lives as long as the mapping, whatever becomes of its owner. READ may be
 * refused with CUMEMPOOL_UNSUPPORTED. Where it fails and the driver does not take back what it gave
 * until then, that is tried again whenever memory of this driver is opened or closed. */
CUMEMPOOL_API cumempool_status cumempool_shared_open(const cumempool_driver *driver, int device,
                                                     uint32_t handle_type, const void *exported,
                                                     uint64_t bytes, cumempool_access access,
                                                     cumempool_shared **shared);
CUMEMPOOL_API cumempool_address cumempool_shared_address(const cumempool_shared *shared);
/* Waits for work in flight on the device, and unmaps; may be repeated where it fails. */
CUMEMPOOL_API cumempool_status cumempool_shared_close(cumempool_shared *shared);
/* Drops the handle; one that was not closed is closed first. Where that fails, because the device
 * cannot be waited for, the memory stays mapped: work may still use it. That, too, is tried again
 * whenever memory of this driver is opened or closed, so a driver has to outlive it; the built-in
 * ones do. */
CUMEMPOOL_API void cumempool_shared_destroy(cumempool_shared *shared);

typedef struct cumempool_snapshot cumempool_snapshot;

/* A consistent picture of what lives; allocations that other threads are making or freeing at this
 * moment may count in the totals alone. With `allocations` = 0 it leaves single allocations out and
 * is cheap. */
CUMEMPOOL_API cumempool_status cumempool_take_snapshot(cumempool_allocator *allocator,
                                                       int allocations,
                                                       cumempool_snapshot **snapshot);
CUMEMPOOL_API const cumempool_totals *cumempool_snapshot_totals(const cumempool_snapshot *snapshot);
CUMEMPOOL_API const cumempool_tag_stats *cumempool_snapshot_tags(const cumempool_snapshot *snapshot,
                                                                 size_t *count);
CUMEMPOOL_API const cumempool_allocation_info *cumempool_snapshot_allocations(
    const cumempool_snapshot *snapshot, size_t *count);
/* Why the last malloc through a slot or cumempool_malloc failed, or "". */
CUMEMPOOL_API const char *cumempool_snapshot_last_malloc_failure(
    const cumempool_snapshot *snapshot);
CUMEMPOOL_API void cumempool_snapshot_destroy(cumempool_snapshot *snapshot);

#ifdef __cplusplus
}
#endif

#endif /* CUMEMPOOL_H */
