"""Routes allocations of torch to a slot, through pools that are given up by count."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from cumempool._locks import fork_safe_lock
from cumempool._torch import runtime, snapshots, unused
from cumempool._torch.settings import ExpandableSegmentsOff
from cumempool._torch.snapshots import PoolId, dead_ranges, is_in_use
from cumempool.errors import UnavailableError

_C: Final[Any] = torch._C

#: The shared library whose slots torch loads.
LIBRARY: Final = Path(__file__).parents[1] / "lib" / "libcumempool.so"


def warm_capture_stream(device: int) -> None:
    """Has cuBLAS make its workspace for torch's capture stream now, in ordinary memory.

    torch keeps one per stream for good. Made during a capture, it would lie in the memory of that
    graph, and graphs of other tags that are captured later would use it while that tag sleeps.
    Does nothing where it would not end up in ordinary memory, or the stream is on another device.
    """
    if runtime.is_capturing() or unused.open_pools or not runtime.has_native_allocator():
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
    if not runtime.has_native_allocator():
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
        """Returns torch's use count: graphs, routes, and this object until `release`."""
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
        return [
            (segment["address"], is_in_use(segment)) for segment in snapshots.segments_of(self.id)
        ]

    def cached_bytes(self) -> int:
        """Bytes in its segments that nothing uses."""
        return sum(bytes_ for _, bytes_ in dead_ranges((), snapshots.segments_of(self.id)))

    def release(self) -> None:
        """Gives up the count of this object. What is unused goes once no graph counts it either.

        torch's object stays for good, since its destructor would give up a count as well.
        """
        self._released = True
        _C._cuda_releasePool(self.device, self.id)

    def drop(self) -> None:
        """As `release`, for a pool that a route counts as well; destroys torch's object.

        With a count left, its destructor finds nothing to empty and asserts nothing. torch before
        2.11 asserts that it is the only one that counts.
        """
        if (
            runtime.torch_version() < _DESTROYS_COUNTED_POOLS
            or sys.getrefcount(self._pool) > _OUR_REFERENCES
        ):
            self.release()
            return
        pool, self._pool = self._pool, None
        self._released = True
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(pool))

    def forget(self) -> None:
        """Has `return_unused` see to its segments, now that nobody counts it."""
        with unused.pools_lock:
            unused.fresh_pools[self.id] = self.device


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
        self._thread = 0
        self._unused: dict[int, int] = {}  # the least that a device had unused since a renewal

    def begin(self) -> None:
        """Takes a pool per device and starts the routing. On failure nothing is routed."""
        try:
            self._expandable.begin()
            for device in self._devices:
                self._begin_device(device)
            self._thread = threading.get_ident()
            _watch_registrations(self)
        except BaseException:
            self.end()
            raise

    def _begin_device(self, device: int) -> None:
        begin = _C._cuda_beginAllocateToPool
        if not self._all_threads:  # which older torch does not tell apart
            begin = getattr(_C, "_cuda_beginAllocateCurrentThreadToPool", begin)
        with unused.pools_lock:
            pool = _idle_pools.pop((self._slot, device), None) or PrivatePool(self._slot, device)
            # Before it begins: an interrupt may strike right after.
            self._pools.append(pool)
            unused.open_pools.add(pool.id)
        begin(device, pool.id)

    def cached_bytes(self) -> int:
        """Bytes in segments of its pools that nothing uses."""
        return sum(pool.cached_bytes() for pool in self._pools)

    def end(self, was_used: Callable[[], bool] = lambda: True) -> None:
        """Ends the routing and gives up the pools; what is unused in them goes back to the slot.

        Every device is seen to, whatever torch says of one of them. If the slot was not asked for
        memory, its pools are empty, and are kept for its next route.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(unused.return_unused)
            stack.callback(self._expandable.end)
            stack.callback(_unwatch_registrations, self)
            while self._pools:
                stack.callback(_end_device, self._pools.pop(0), was_used)

    def renew(self) -> bool:
        """Gives unused segments back to the slot, and routes on to fresh pools.

        torch frees no segment while any pool is routed to, so the routing ends for a moment.

        Returns:
            Whether it was done. It is not while another scope is open, for a route of all threads
            or of another thread, or during a capture: nothing changes then.
        """
        if self._all_threads or self._thread != threading.get_ident() or runtime.is_capturing():
            return False
        with unused.pools_lock:
            if not self._pools or unused.open_pools != {pool.id for pool in self._pools}:
                return False
        with contextlib.ExitStack() as stack:
            stack.callback(unused.return_unused, thorough=True)
            while self._pools:
                stack.callback(_end_device, self._pools.pop(0), lambda: True)
        for device in self._devices:
            self._begin_device(device)
        self._unused.clear()
        return True

    def renew_if_worthwhile(self, device: int) -> None:
        """Renews the route if much has become unused on a device since the last renewal."""
        reserved, now = unused.held_bytes(device)
        least = self._unused[device] = min(self._unused.get(device, now), now)
        grown = now - least
        if grown < _RENEWED_BYTES:
            return
        if grown < reserved // _RENEWED_PART:
            free, _ = torch.cuda.mem_get_info(device)
            if grown < free // _RENEWED_ROOM:
                return
        if not (self._is_innermost(device) and self.renew()):
            self._unused[device] = now  # later, once as much again is unused

    def _is_innermost(self, device: int) -> bool:
        """Whether torch sends an allocation of this thread here, and to no pool of others."""
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            return False  # tensors may have no memory at all
        try:
            with torch.inference_mode(False):
                address = torch.empty(1, dtype=torch.uint8, device=f"cuda:{device}").data_ptr()
        except torch.OutOfMemoryError:
            return False
        return any(
            segment["address"] <= address < segment["address"] + segment["total_size"]
            for pool in self._pools
            if pool.device == device
            for segment in snapshots.segments_of(pool.id)
        )


def _end_device(pool: PrivatePool, was_used: Callable[[], bool]) -> None:
    with unused.pools_lock:
        unused.open_pools.discard(pool.id)
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
        with unused.pools_lock:
            _idle_pools[pool.slot, pool.device] = pool


# Routes that have begun, in that order.
_routes: list[PoolRoute] = []
# Torch's hooks on registrations, while there are routes.
_registration_hooks: list[Any] = []

#: Bytes that have to become unused inside a scope before its route is renewed, and which part of
#: what torch holds on the device, or of what is free there, they have to be: each renewal leaves
#: segments behind that are in use in part.
_RENEWED_BYTES: Final = 64 << 20
_RENEWED_PART: Final = 16
_RENEWED_ROOM: Final = 4


def _watch_registrations(route: PoolRoute) -> None:
    with unused.pools_lock:
        _routes.append(route)
        if not _registration_hooks:
            module = torch.nn.modules.module
            _registration_hooks.extend(
                (
                    module.register_module_parameter_registration_hook(_on_registration),
                    module.register_module_buffer_registration_hook(_on_registration),
                )
            )


def _unwatch_registrations(route: PoolRoute) -> None:
    with unused.pools_lock:
        if route in _routes:
            _routes.remove(route)
        while _registration_hooks and not _routes:
            _registration_hooks.pop().remove()


def _on_registration(module: torch.nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Renews the only route, if worthwhile, as a module takes a parameter or buffer.

    Loaders replace weights in this way, by tensors of another size, layer by layer.
    """
    if value is None or not value.is_cuda or len(_routes) != 1 or torch.compiler.is_compiling():
        return
    route = _routes[0]
    device = value.get_device()
    if device in route._devices and route._thread == threading.get_ident():
        route.renew_if_worthwhile(device)


# Pools that nothing was ever allocated in, one per slot and device at most.
_idle_pools: dict[tuple[int, int], PrivatePool] = {}
