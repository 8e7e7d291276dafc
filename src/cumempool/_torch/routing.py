"""Routes torch's allocations to a slot, through pools whose use counts it releases by hand."""

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

#: The shared library from which torch loads the slots.
LIBRARY: Final = Path(__file__).parents[1] / "lib" / "libcumempool.so"


def warm_capture_stream(device: int) -> None:
    """Makes cuBLAS create its workspace for torch's capture stream now, in ordinary memory.

    torch keeps one workspace per stream for good. If it were made during a capture, it would lie in
    the memory of that graph, and later graphs of other tags would use it while that tag sleeps.
    Does nothing if it would not lie in ordinary memory, or if the stream is on another device.
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
    """Raises an error with the reason if torch has no pools."""
    if not runtime.has_native_allocator():
        backend = torch.cuda.get_allocator_backend()
        advice = (
            "leave the allocator of torch as it is (no change_current_allocator(), no "
            "backend:cudaMallocAsync in PYTORCH_CUDA_ALLOC_CONF), or allocate by empty()"
        )
        raise UnavailableError(
            f"torch allocates by its {backend!r} backend, which has no memory pools, so nothing "
            f"can be routed to a pool of cumempool; {advice}",
            operation="use_memory_pool",
            advice=advice,
        )


class PrivatePool:
    """A private pool of torch on one device, whose segments come from a slot, until `release`.

    torch's context manager is not used. The destructor of its ``MemPool`` must not drop the last
    use count of a pool: it then empties the pool's cache, and torch asserts that no pool scope or
    graph capture is under way on the device in any thread, so a nested scope would abort the
    process. This class drops the last count by hand, which is always allowed. torch frees the pool
    when it next empties its cache; `return_unused` requests that if there is something to free.

    Attributes:
        slot: The slot.
        device: The device ordinal.
        id: torch's id of the pool.
    """

    def __init__(self, slot: int, device: int) -> None:
        _refuse_other_allocators()
        with torch.cuda.device(device):
            pool = torch.cuda.MemPool(_pluggable_allocator(slot))
        # Keeps a reference that only `drop` releases: the destructor must not run by itself, not
        # even when the interpreter ends.
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
            # torch forgets a pool without a use count when it frees the pool's last segment, and
            # asserts that it knows the pool.
            if not self._released:
                raise
            return 0

    def segments(self) -> list[tuple[int, bool]]:
        """Returns the address of each segment, and whether something in it is in use."""
        return [
            (segment["address"], is_in_use(segment)) for segment in snapshots.segments_of(self.id)
        ]

    def cached_bytes(self) -> int:
        """Returns the unused bytes in its segments."""
        return sum(bytes_ for _, bytes_ in dead_ranges((), snapshots.segments_of(self.id)))

    def release(self) -> None:
        """Drops this object's use count. Unused memory goes once no graph counts the pool either.

        torch's object stays for good, because its destructor would drop a count as well.
        """
        self._released = True
        _C._cuda_releasePool(self.device, self.id)

    def drop(self) -> None:
        """As `release`, but destroys torch's object; for a pool that a route counts as well.

        While another count is left, the destructor finds nothing to empty and asserts nothing.
        torch before 2.11 asserts that its count is the only one.
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
        """Leaves its segments to `return_unused`, once nothing counts the pool."""
        with unused.pools_lock:
            unused.fresh_pools[self.id] = self.device


#: From this version on, a ``MemPool`` may be destroyed while its pool has other counts (read in
#: 2.11).
_DESTROYS_COUNTED_POOLS: Final = (2, 11)
#: References to a pool object: its attribute, the one kept for good, and getrefcount's argument.
_OUR_REFERENCES: Final = 3


class PoolRoute:
    """Routes allocations on some devices to a slot, from `begin` to `end`.

    It routes the calling thread, or every thread of the process. torch gives an allocation to the
    route that began last among those that cover its thread.
    """

    def __init__(self, slot: int, devices: Sequence[int], *, all_threads: bool = False) -> None:
        self._slot = slot
        self._devices = tuple(devices)
        self._all_threads = all_threads
        self._pools: list[PrivatePool] = []
        self._expandable = ExpandableSegmentsOff()
        self._thread = 0
        self._unused: dict[int, int] = {}  # lowest unused bytes per device since a renewal

    def begin(self) -> None:
        """Takes a pool per device and starts to route. On failure nothing is routed."""
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
        if not self._all_threads:  # older torch has one function for both
            begin = getattr(_C, "_cuda_beginAllocateCurrentThreadToPool", begin)
        with unused.pools_lock:
            pool = _idle_pools.pop((self._slot, device), None) or PrivatePool(self._slot, device)
            # Before the routing begins: an interrupt may strike right after.
            self._pools.append(pool)
            unused.open_pools.add(pool.id)
        begin(device, pool.id)

    def cached_bytes(self) -> int:
        """Returns the unused bytes in segments of its pools."""
        return sum(pool.cached_bytes() for pool in self._pools)

    def end(self, was_used: Callable[[], bool] = lambda: True) -> None:
        """Ends the routing and releases the pools; their unused memory goes back to the slot.

        It handles every device, even if torch fails on one. If the slot got no request for memory,
        its pools are empty, and its next route reuses them.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(unused.return_unused)
            stack.callback(self._expandable.end)
            stack.callback(_unwatch_registrations, self)
            while self._pools:
                stack.callback(_end_device, self._pools.pop(0), was_used)

    def renew(self) -> bool:
        """Gives unused segments back to the slot, and continues with fresh pools.

        torch frees no segment while it routes to any pool, so the routing ends for a moment.

        Returns:
            Whether it was done. It is refused, and nothing changes, while another scope is open,
            for a route of all threads or of another thread, and during a capture.
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
        """Renews the route if many bytes have become unused on a device since the last renewal."""
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
            self._unused[device] = now  # tries again once as much more is unused

    def _is_innermost(self, device: int) -> bool:
        """Whether torch routes this thread's allocations here, and to no other pool."""
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            return False  # tensors may have no memory
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
    if pool.users() < 2:  # its routing has not begun
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
        _C._cuda_releasePool(pool.device, pool.id)  # the count from the begin of the routing
    else:
        _C._cuda_releasePool(pool.device, pool.id)
        with unused.pools_lock:
            _idle_pools[pool.slot, pool.device] = pool


# Routes that have begun, in order.
_routes: list[PoolRoute] = []
# torch's registration hooks, while there are routes.
_registration_hooks: list[Any] = []

#: A route is renewed once this many bytes have become unused inside its scope, and they are this
#: part of torch's memory on the device, or of the free memory there: each renewal leaves behind
#: segments that are partly in use.
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
    """Renews the only route, if worthwhile, when a module takes a parameter or buffer.

    Loaders that replace weights layer by layer, with tensors of another size, register them so.
    """
    if value is None or not value.is_cuda or len(_routes) != 1 or torch.compiler.is_compiling():
        return
    route = _routes[0]
    device = value.get_device()
    if device in route._devices and route._thread == threading.get_ident():
        route.renew_if_worthwhile(device)


# Pools without any allocation, at most one per slot and device.
_idle_pools: dict[tuple[int, int], PrivatePool] = {}
