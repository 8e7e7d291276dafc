"""The only module that knows how torch works inside.

Routing to a slot, what torch has cached, which streams are current, expandable segments, tensors
that cannot be written to. Everything else uses public torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import torch

from cumempool.errors import InvalidArgumentError, UnavailableError, UnsupportedError
from cumempool.locks import fork_safe_lock

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "LIBRARY",
    "CurrentStream",
    "ExpandableSegmentsOff",
    "PoolRoute",
    "PrivatePool",
    "ReadOnlyTensor",
    "as_plain",
    "build_kind",
    "cached_bytes",
    "can_be_pointed",
    "current_streams",
    "dead_ranges",
    "devices_in_use",
    "dispatches",
    "empty_cache",
    "expandable_segments_bypass_pools",
    "from_capsule",
    "is_capturing",
    "is_initialized",
    "live_settings",
    "nvtx_range",
    "ordinary_tensors",
    "point",
    "replace_setting",
    "return_unused",
    "store_of_group",
    "tensor_over",
    "warm_capture_stream",
    "with_lazy_bits",
]

#: The shared library whose slots torch loads.
LIBRARY: Final = Path(__file__).parent / "lib" / "libcumempool.so"

#: From this version on, torch keeps expandable segments out of pools with an allocator of their own
#: (seen with 2.11). Earlier ones are reported to bypass the allocator (pytorch#147851).
_HONOURS_CUSTOM_POOLS: Final = (2, 11)

CurrentStream = tuple[int, int]
"""A device ordinal and the ``cudaStream_t`` that is current there, as an integer."""

_C: Final[Any] = torch._C
_logger = logging.getLogger("cumempool")


def _version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def build_kind() -> str:
    """``"cuda"``, ``"rocm"`` or ``"cpu"``: what this torch was built for."""
    if torch.version.hip is not None:
        return "rocm"
    return "cuda" if torch.version.cuda is not None else "cpu"


def is_initialized() -> bool:
    """Whether torch has started to use CUDA in this process; asking does not start it."""
    return build_kind() == "cuda" and torch.cuda.is_initialized()


def devices_in_use() -> list[int]:
    """The current device and every other one whose primary context exists, ascending."""
    torch.cuda.init()
    current = torch.cuda.current_device()
    others = [
        device
        for device in range(torch.cuda.device_count())
        if device == current or _C._cuda_hasPrimaryContext(device)
    ]
    return sorted({current, *others})


def current_streams() -> list[CurrentStream]:
    """The calling thread's current stream of each device that is in use."""
    if not is_initialized():
        return []
    return [
        (device, int(torch.cuda.current_stream(device).cuda_stream)) for device in devices_in_use()
    ]


def is_capturing() -> bool:
    """Whether the calling thread's current stream is being captured into a graph."""
    return is_initialized() and torch.cuda.is_current_stream_capturing()


def warm_capture_stream(device: int) -> None:
    """Has cuBLAS make its workspace for torch's capture stream now, in ordinary memory.

    torch keeps one per stream for good. Made during a capture, it would lie in the memory of that
    graph, and graphs of other tags that are captured later would use it while that tag sleeps.
    Does nothing where it would not end up in ordinary memory, or the stream is on another device.
    """
    if is_capturing() or _open_pools or not has_native_allocator():
        return
    with torch.cuda.device(device):
        if torch.cuda.graph.default_capture_stream is None:
            torch.cuda.graph.default_capture_stream = torch.cuda.Stream()
        stream = torch.cuda.graph.default_capture_stream
        if stream.device.index != device:
            return
        with torch.cuda.stream(stream), torch.no_grad():
            square = torch.zeros(16, 16, dtype=torch.bfloat16, device=stream.device)
            torch.addmm(square[0], torch.mm(square, square), square)  # through both its interfaces


def empty_cache() -> None:
    """Gives torch's unused segments back, those of pools that are gone included."""
    if is_initialized():
        torch.cuda.empty_cache()


def nvtx_range(name: str) -> contextlib.AbstractContextManager[object]:
    """An NVTX range of a name, where this torch can make one."""
    if build_kind() != "cuda":
        return contextlib.nullcontext()
    mark: contextlib.AbstractContextManager[object] = torch.cuda.nvtx.range(name)
    return mark


def has_native_allocator() -> bool:
    """Whether torch's own caching allocator serves CUDA, and no pluggable one or cudaMallocAsync.

    Only that one has pools, and can be asked what it holds.
    """
    return str(torch.cuda.get_allocator_backend()) == "native"


def cached_bytes() -> int:
    """Bytes of all devices that torch holds and no tensor uses."""
    if not is_initialized() or not has_native_allocator():
        return 0
    return sum(
        torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        for device in devices_in_use()
    )


def memory_limit(device: int) -> float:
    """The part of a device that torch was told to use at most, which 1.0 is all of."""
    ask = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # not in every torch
    return 1.0 if ask is None else float(ask(device))


PoolId = tuple[int, int]
Segment = dict[str, Any]

#: What torch takes for all of them.
_ALL_POOLS: Final[PoolId] = (0, 0)
#: No pool has this id, so that torch has no segments to list of it.
_NO_POOL: Final[PoolId] = (0, 1 << 62)


@functools.lru_cache(maxsize=2)
def _parameters_of(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _add_references(value: object, count: int) -> None:
    for _ in range(count):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


@functools.cache
def _references_taken() -> int:
    """How many references to each item of its argument ``_cuda_memorySnapshot`` gives up too many.

    One in torch 2.11, as counts of references show: a number that Python does not keep for good,
    as the id of a pool may be, is freed by that while it is in use, and the heap is broken.
    """
    ask = getattr(_C, "_cuda_memorySnapshot", None)
    if ask is None:
        return 0
    number = int(str(_NO_POOL[1]))  # an object that nobody else has
    lent = 2
    _add_references(number, lent)
    before = sys.getrefcount(number)
    ask((_NO_POOL[0], number, False))
    taken = before - sys.getrefcount(number)
    for _ in range(lent - taken):
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(number))
    return taken


def _lend(pool: PoolId) -> None:
    """Gives torch the references that it is about to take of a pool's id, see above."""
    for item in (*pool, False):
        _add_references(item, _references_taken())


def _segments(pool: PoolId | None = None) -> list[Segment]:
    """What torch holds, of one pool or of all; without its history, where this torch can."""
    ask: Callable[..., list[Segment]] = torch.cuda.memory_snapshot
    takes = _parameters_of(ask)
    options: dict[str, Any] = {}
    if "include_traces" in takes:
        options["include_traces"] = False
        _lend(_ALL_POOLS if pool is None else pool)
    if pool is None:
        return ask(**options)
    if "mempool_id" in takes:
        options["mempool_id"] = pool
    return [segment for segment in ask(**options) if _pool_of(segment) == pool]


def _field(of: Mapping[str, Any], name: str) -> Any:
    """A field of what torch says of itself, or an error that names it."""
    try:
        return of[name]
    except KeyError:
        raise UnsupportedError(
            f"torch {torch.__version__} does not say {name!r} of its memory, which cumempool has "
            "to know; use a version of torch that cumempool was tried with",
            advice="use a version of torch that cumempool was tried with",
        ) from None


def _pool_of(segment: Segment) -> PoolId:
    first, second = _field(segment, "segment_pool_id")
    return int(first), int(second)


def _in_use(segment: Segment) -> bool:
    return any(block["state"] != "inactive" for block in segment["blocks"])


def dead_ranges(
    live: Collection[PoolId] = (), segments: Sequence[Segment] | None = None
) -> list[tuple[int, int]]:
    """(address, bytes) of the blocks that torch has cached as free in segments of custom pools.

    Args:
        live: Pools that are left out: graphs use blocks of theirs that torch has as free.
        segments: What torch holds. None asks it.
    """
    if segments is None:
        segments = _segments() if is_initialized() and has_native_allocator() else []
    without = {(0, 0), *live}
    return [
        (block["address"], block["size"])
        for segment in segments
        if _pool_of(segment) not in without
        for block in segment["blocks"]
        if block["state"] == "inactive"
    ]


def from_capsule(capsule: object) -> torch.Tensor:
    """The uint8 tensor over the memory of a DLPack capsule; the memory goes with its storage."""
    return torch.utils.dlpack.from_dlpack(capsule)


def tensor_over(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int,
) -> torch.Tensor:
    """A tensor of any dtype on part of a storage; ``storage_offset`` counts elements."""
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, storage_offset, tuple(size), tuple(stride))


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """What is made in the body is no inference tensor, has no gradient, and asks no subclass."""
    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        yield


def dispatches(tensor: torch.Tensor) -> bool:
    """Whether a subclass does the work of its tensors itself, so that a storage says nothing."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a `torch.Tensor`, past what a subclass says of its shape or dtype."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor
    return torch.Tensor.as_subclass(tensor, torch.Tensor)


def can_be_pointed(tensor: torch.Tensor) -> bool:
    """Whether torch lets a tensor view other memory, by `point`."""
    plain = as_plain(tensor)
    other = torch.empty(0, dtype=plain.dtype, device=plain.device)
    return torch._has_compatible_shallow_copy_type(tensor, other)


def point(tensor: torch.Tensor, storage: torch.UntypedStorage, offset: int) -> None:
    """Makes a tensor, without changing its identity, view a storage from `offset` bytes on.

    What it takes over is an inference tensor where it is one: it has no version counter, and never
    gets one. An ordinary one that took over an inference tensor would be left without gradients.
    """
    plain = as_plain(tensor)
    with torch.inference_mode(plain.is_inference()):
        moved = tensor_over(
            storage,
            plain.dtype,
            plain.shape,
            plain.stride(),
            offset // plain.element_size() + int(plain.storage_offset()),
        )
        torch.Tensor.data.__set__(tensor, moved)  # type: ignore[attr-defined]


def with_lazy_bits(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor on the bytes of `like`, read as `like` reads them: conjugated or negated lazily."""
    if like.is_conj():
        tensor = tensor.conj()
    return torch._neg_view(tensor) if like.is_neg() else tensor


# ---- read-only tensors --------------------------------------------------------------------------


def _read_only_in(value: object) -> list[ReadOnlyTensor]:
    items = value if isinstance(value, (list, tuple)) else (value,)
    return [item for item in items if isinstance(item, ReadOnlyTensor)]


class ReadOnlyTensor(torch.Tensor):
    """A tensor that operations do not write to, and neither to its views, which are of this class.

    All else that operations make of it are ordinary tensors. torch has no such thing: of an
    inference tensor it does complain, but when it has been written to already.
    """

    __torch_function__ = _C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> ReadOnlyTensor:
        """Views the memory of an ordinary tensor."""
        made: ReadOnlyTensor = torch.Tensor._make_subclass(cls, tensor)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operation, unless it declares to write to a tensor of this class."""
        kwargs = kwargs or {}
        named = {argument.name: argument.alias_info for argument in func._schema.arguments}
        given = {**dict(zip(named, args, strict=False)), **kwargs}
        for name, value in given.items():
            if named[name] is not None and named[name].is_write and _read_only_in(value):
                raise InvalidArgumentError(
                    f"{func} would write to a read-only tensor: clone() it, or ask for it with "
                    "writable=True"
                )
        memory = {
            tensor.untyped_storage().data_ptr()
            for value in given.values()
            for tensor in _read_only_in(value)
        }

        def protect(result: Any) -> Any:
            if isinstance(result, (list, tuple)):
                return type(result)(map(protect, result))
            views = (
                isinstance(result, torch.Tensor)
                and not isinstance(result, cls)
                and result.device.type in ("cpu", "cuda")
                and result.layout == torch.strided
                and result.untyped_storage().data_ptr() in memory
            )
            return cls(result) if views else result

        with _C._DisableTorchDispatch():
            return protect(func(*args, **kwargs))

    def _unprotected(self) -> torch.Tensor:
        tensor = tensor_over(
            self.untyped_storage(),
            self.dtype,
            self.shape,
            self.stride(),
            int(self.storage_offset()),
        )
        return with_lazy_bits(tensor, self)

    # What torch refuses of subclasses, or would let write.

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array on the same memory."""
        array = self._unprotected().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """As of any tensor."""
        return self._unprotected().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._unprotected())

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied: torch.Tensor = memo.setdefault(id(self), self.clone())
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)

    def __dlpack__(self, **options: object) -> Any:
        raise BufferError("a read-only tensor cannot be exchanged by DLPack: clone() it")


# ---- routing -----------------------------------------------------------------------------------

_pluggable_lock = fork_safe_lock()
# Never emptied: torch frees segments through these objects long after their pools are gone.
_pluggable: dict[int, Any] = {}


def _pluggable_allocator(slot: int) -> Any:
    with _pluggable_lock:
        if slot not in _pluggable:
            _pluggable[slot] = torch.cuda.memory.CUDAPluggableAllocator(
                str(LIBRARY), f"cumempool_malloc_{slot}", f"cumempool_free_{slot}"
            )
        return _pluggable[slot].allocator()


def _refuse_other_allocators() -> None:
    """Raises where torch has no pools, by an error that says why."""
    if not has_native_allocator():
        backend = torch.cuda.get_allocator_backend()
        advice = (
            "leave the allocator of torch as it is (no change_current_allocator(), no "
            "backend:cudaMallocAsync in PYTORCH_CUDA_ALLOC_CONF), or allocate by empty()"
        )
        raise UnavailableError(
            f"torch allocates by its {backend!r} backend, which has no memory pools, so that "
            f"nothing can be sent to a pool of cumempool; {advice}",
            operation="use_memory_pool",
            advice=advice,
        )


class PrivatePool:
    """A pool of torch's own on one device, whose segments come from a slot, until `release`.

    torch's context manager is not used, and the destructor of its ``MemPool`` must not be the one
    that gives up the last count of a pool: it empties the pool's cache then, which torch asserts
    must not happen while any pool scope or graph capture is under way on the device, in any thread,
    so that a nested scope would abort the process. Here the last count is given up by hand, which
    is always allowed; torch frees the pool with the next emptying of its cache, and `return_unused`
    asks for that when something is there to be freed.

    Attributes:
        slot: The slot.
        device: The device ordinal.
        id: What torch knows it by.
    """

    def __init__(self, slot: int, device: int) -> None:
        _refuse_other_allocators()
        with torch.cuda.device(device):
            pool = torch.cuda.MemPool(_pluggable_allocator(slot))
        # Kept by a count that nobody gives up but `drop`: the destructor must not run by itself,
        # not even when the interpreter ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))
        self._pool: Any = pool
        self._released = False
        self.slot: Final = slot
        self.device: Final = device
        self.id: Final[PoolId] = (int(pool.id[0]), int(pool.id[1]))

    def users(self) -> int:
        """How many counts torch has of it: graphs, routes, and this object until `release`."""
        try:
            return int(self._pool.use_count())
        except RuntimeError:
            # torch forgets a pool that nobody counts when it frees its last segment, and asserts
            # that it is asked of pools it knows.
            if not self._released:
                raise
            return 0

    def segments(self) -> list[tuple[int, bool]]:
        """The address of each of its segments, and whether something in it is in use."""
        return [(segment["address"], _in_use(segment)) for segment in _segments(self.id)]

    def cached_bytes(self) -> int:
        """Bytes in its segments that nothing uses."""
        return sum(bytes_ for _, bytes_ in dead_ranges((), _segments(self.id)))

    def release(self) -> None:
        """Gives up the count of this object. What is unused goes once no graph counts it either.

        torch's object stays for good, since its destructor would give up a count as well.
        """
        self._released = True
        _C._cuda_releasePool(self.device, self.id)

    def drop(self) -> None:
        """The same for a pool that a route counts as well, and torch's object is destroyed.

        With a count left, its destructor finds nothing to empty and asserts nothing. torch before
        2.11 asserts that it is the only one that counts.
        """
        if _version() < _DESTROYS_COUNTED_POOLS or sys.getrefcount(self._pool) > _OUR_REFERENCES:
            self.release()
            return
        pool, self._pool = self._pool, None
        self._released = True
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(pool))

    def forget(self) -> None:
        """Has `return_unused` see to its segments, now that nobody counts it."""
        with _pools_lock:
            _fresh_pools[self.id] = self.device


#: From this version on, a ``MemPool`` may be destroyed while others count its pool (read in 2.11).
_DESTROYS_COUNTED_POOLS: Final = (2, 11)
#: To the object of a pool: its attribute, the count that was taken for good, and the question.
_OUR_REFERENCES: Final = 3


class PoolRoute:
    """Routes allocations on some devices to a slot, from `begin` to `end`.

    They are those of the calling thread, or of every thread of the process. torch gives an
    allocation to the route that began last and takes its thread.
    """

    def __init__(self, slot: int, devices: Sequence[int], *, all_threads: bool = False) -> None:
        self._slot = slot
        self._devices = tuple(devices)
        self._all_threads = all_threads
        self._pools: list[PrivatePool] = []
        self._expandable = ExpandableSegmentsOff()

    def begin(self) -> None:
        """Takes a pool per device and starts the routing. On failure nothing is routed.

        Raises:
            UnavailableError: torch allocates by something that has no pools.
        """
        try:
            self._expandable.begin()
            for device in self._devices:
                self._begin_device(device)
        except BaseException:
            self.end()
            raise

    def _begin_device(self, device: int) -> None:
        begin = _C._cuda_beginAllocateToPool
        if not self._all_threads:  # which older torch does not tell apart
            begin = getattr(_C, "_cuda_beginAllocateCurrentThreadToPool", begin)
        with _pools_lock:
            pool = _idle_pools.pop((self._slot, device), None) or PrivatePool(self._slot, device)
            # Before it begins: an interrupt may strike right after.
            self._pools.append(pool)
            _open_pools.add(pool.id)
        begin(device, pool.id)

    def cached_bytes(self) -> int:
        """Bytes in segments of its pools that nothing uses."""
        return sum(pool.cached_bytes() for pool in self._pools)

    def end(self, was_used: Callable[[], bool] = lambda: True) -> None:
        """Ends the routing and gives up the pools; what is unused in them goes back to the slot.

        Every device is seen to, whatever torch says of one of them.

        Args:
            was_used: Whether the slot was asked for memory. If not, its pools are empty, and are
                kept for the next route of the slot.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(return_unused)
            stack.callback(self._expandable.end)
            while self._pools:
                stack.callback(_end_device, self._pools.pop(0), was_used)


def _end_device(pool: PrivatePool, was_used: Callable[[], bool]) -> None:
    with _pools_lock:
        _open_pools.discard(pool.id)
    if pool.users() < 2:  # it has not begun
        pool.release()
        return
    try:
        _C._cuda_endAllocateToPool(pool.device, pool.id)
    except BaseException:
        pool.forget()
        raise
    if was_used():
        pool.forget()
        pool.drop()
        _C._cuda_releasePool(pool.device, pool.id)  # the count that beginning took
    else:
        _C._cuda_releasePool(pool.device, pool.id)
        with _pools_lock:
            _idle_pools[pool.slot, pool.device] = pool


_pools_lock = fork_safe_lock()
# Pools that are routed to.
_open_pools: set[PoolId] = set()
# Pools that nothing was ever allocated in, one per slot and device at most.
_idle_pools: dict[tuple[int, int], PrivatePool] = {}
# Pools whose scope has ended and that torch may hold unused segments of, with their device.
_fresh_pools: dict[PoolId, int] = {}


class _HeldPools:
    """Released pools in which something was in use when they were last looked at.

    Attributes:
        devices: The device of each.
        segments: How many segments they had.
        looked_at: How many pools there were when all were last looked at.
        releasable: The least that `_releasable_bytes` was since.
    """

    def __init__(self) -> None:
        self.devices: dict[PoolId, int] = {}
        self.segments = 0
        self.looked_at = 0
        self.releasable = 0
        self._sizes: dict[PoolId, int] = {}

    def put(self, pool: PoolId, device: int, segments: int) -> None:
        """Adds a pool, or takes out one without segments."""
        self.segments += segments - self._sizes.pop(pool, 0)
        self.devices.pop(pool, None)
        if segments:
            self._sizes[pool] = segments
            self.devices[pool] = device

    def are_worth_a_look(self) -> bool:
        """Whether so much has become unused somewhere, or so many pools have come, that it pays."""
        now = _releasable_bytes()
        self.releasable = min(self.releasable, now)
        grown = now - self.releasable
        many = len(self.devices) > 2 * self.looked_at + _ASKED_EACH
        return many or grown >= max(1, self.segments * _WORTH_A_LOOK)

    def were_looked_at(self, all_of_them: bool) -> None:
        """Notes what can be released now that pools were looked at, and the unused was freed."""
        if not self.devices:
            self.looked_at = 0
            return
        now = _releasable_bytes()
        self.releasable = now if all_of_them else min(self.releasable, now)
        if all_of_them:
            self.looked_at = len(self.devices)


_held = _HeldPools()

#: Bytes per held segment, of at least 2 MiB each, that have to become unused before all are looked
#: at, which takes some microseconds per segment.
_WORTH_A_LOOK: Final = 64 << 10
#: Pools up to which torch is asked of each, and not of all that it holds.
_ASKED_EACH: Final = 4


def return_unused(*, thorough: bool = False) -> None:
    """Has torch free the unused segments of pools whose scopes have ended, if there are any.

    While a scope of ours is open on any device it waits, because torch frees nothing then; the end
    of that scope comes here again. What cost this has does not depend on what torch holds, but for
    pools whose scopes have just ended, and where enough has become unused to be worth it.

    Args:
        thorough: Looks at all pools, whether it is worth it or not.
    """
    with _pools_lock:
        if _open_pools or not (_fresh_pools or _held.devices):
            return
        every = not _held.devices or thorough or _held.are_worth_a_look()
        pools = {**_held.devices, **_fresh_pools} if every else dict(_fresh_pools)
        if not pools:
            return
        if len(pools) <= _ASKED_EACH:
            segments = [segment for pool in pools for segment in _segments(pool)]
        else:
            segments = _segments()
        unused = _look_at(pools, segments)
    _return(unused, every)


def settled_dead_ranges(live: Collection[PoolId]) -> list[tuple[int, int]]:
    """`return_unused` of all, and `dead_ranges`, by asking torch once.

    Ranges of what is freed by it may be among them.
    """
    if not is_initialized() or not has_native_allocator():
        return []
    with _pools_lock:  # pools before segments: of one that ends meanwhile there may be more
        pools = {} if _open_pools else {**_held.devices, **_fresh_pools}
        segments = _segments()
        unused = _look_at(pools, segments)
    if pools:
        _return(unused, every=True)
    return dead_ranges(live, segments)


def _look_at(pools: Mapping[PoolId, int], segments: Sequence[Segment]) -> dict[PoolId, int]:
    """Notes which of the pools have segments in use; returns those with unused ones."""
    used: Counter[PoolId] = Counter()
    unused: dict[PoolId, int] = {}
    for segment in segments:
        pool = _pool_of(segment)
        if pool not in pools:
            continue
        if _in_use(segment):
            used[pool] += 1
        else:
            unused[pool] = pools[pool]
    for pool, device in pools.items():
        _fresh_pools.pop(pool, None)
        _held.put(pool, device, used[pool])
    return unused


def _return(unused: Mapping[PoolId, int], every: bool) -> None:
    """Has torch free what pools have unused. `every`: all released pools were looked at."""
    if unused:
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            # torch before 2.9 refuses while somebody's capture or pool scope is under way. The
            # segments stay cached, as after any other empty_cache() that came too early.
            _logger.debug("torch refused to empty its cache; unused segments stay for now")
            with _pools_lock:
                _fresh_pools.update(unused)
    with _pools_lock:
        _held.were_looked_at(every)


def _releasable_bytes() -> int:
    """Bytes of segments of any pool that nothing uses, of the devices of pools that are held."""
    total = 0
    for device in set(_held.devices.values()):
        stats = torch.cuda.memory_stats_as_nested_dict(device)
        reserved, active, split = (
            int(_field(stats, name)["all"]["current"])
            for name in ("reserved_bytes", "active_bytes", "inactive_split_bytes")
        )
        total += reserved - active - split
    return total


# ---- expandable segments -------------------------------------------------------------------------


def _split_settings(text: str) -> list[str]:
    """The options of an allocator settings string; commas inside brackets do not separate."""
    options, depth, current = [], 0, ""
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            options.append(current)
            current = ""
        else:
            current += character
    return [option.strip() for option in [*options, current] if option.strip()]


def replace_setting(text: str, name: str, value: str) -> str:
    """An allocator settings string with one option changed or added, all others as they were.

    torch resets every option that a settings string leaves out, so a change has to name them all.
    """
    kept = [option for option in _split_settings(text) if option.partition(":")[0].strip() != name]
    return ",".join([*kept, f"{name}:{value}"])


def live_settings() -> dict[str, Any]:
    """The settings of torch's caching allocator that hold now, by name."""
    if not has_native_allocator():
        return {}
    if "include_traces" in _parameters_of(torch.cuda.memory_snapshot):
        _lend(_NO_POOL)
        said = _C._cuda_memorySnapshot((*_NO_POOL, False))  # neither segments nor history
    else:
        said = torch.cuda.memory._snapshot()
    settings: dict[str, Any] = _field(said, "allocator_settings")
    return settings


def _apply_settings(text: str) -> None:
    setter = getattr(_C, "_accelerator_setAllocatorSettings", None)
    if setter is None:
        setter = _C._cuda_cudaCachingAllocator_set_allocator_settings
    setter(text)


def expandable_segments_bypass_pools() -> bool:
    """Whether torch would now make segments of pools without asking their allocator."""
    if _version() >= _HONOURS_CUSTOM_POOLS:
        return False
    return bool(live_settings().get("expandable_segments", False))


class ExpandableSegmentsOff:
    """Keeps expandable segments away while a scope is open, where this torch needs that.

    The setting is one for the process: the first scope switches it off, the last one puts back what
    was there. A settings string that somebody applied in between is left alone.
    """

    _lock = fork_safe_lock()
    _open = 0
    _before: str | None = None
    _ours = ""

    def __init__(self) -> None:
        self._counts = False

    def begin(self) -> None:
        """Switches expandable segments off if they are on and would bypass the pool."""
        if _version() >= _HONOURS_CUSTOM_POOLS:
            return
        cls = ExpandableSegmentsOff
        with cls._lock:
            settings = live_settings()
            if settings.get("expandable_segments", False):
                before = str(settings.get("PYTORCH_CUDA_ALLOC_CONF", ""))
                ours = replace_setting(before, "expandable_segments", "False")
                _apply_settings(ours)
                cls._before, cls._ours = before, ours
            cls._open += 1
            self._counts = True

    def end(self) -> None:
        """Puts the setting back when the last open scope ends. Without a `begin`, nothing."""
        cls = ExpandableSegmentsOff
        with cls._lock:
            if not self._counts:
                return
            self._counts = False
            cls._open -= 1
            if cls._open or cls._before is None:
                return
            before, cls._before = cls._before, None
            if live_settings().get("PYTORCH_CUDA_ALLOC_CONF", "") == cls._ours:
                _apply_settings(before)

    def __enter__(self) -> ExpandableSegmentsOff:
        self.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()


def store_of_group(group: ProcessGroup | None) -> Any:
    """The store that the ranks of a process group met through; None: of the default group."""
    from torch.distributed import distributed_c10d

    chosen: Any = distributed_c10d.GroupMember.WORLD if group is None else group
    if hasattr(chosen, "get_group_store"):  # not in every torch since 2.6
        return chosen.get_group_store()
    return distributed_c10d._world.pg_map[chosen][1]
