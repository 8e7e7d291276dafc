"""Chooses the pool that a graph is captured into, and releases it after its last graph."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cumempool._locks import fork_safe_lock
from cumempool.allocator import CuMemAllocator
from cumempool.errors import InvalidArgumentError

if TYPE_CHECKING:
    import torch

PoolHandle = tuple[int, int]
"""Torch's id of a pool."""

_PoolKey = tuple[str, int]
"""The allocator's tag of a pool, and its device."""


class GraphCaptures:
    """Maps the pools that programs name to pools of the allocator, until their last graph is gone.

    torch lets programs name a pool that does not exist yet, and the allocator makes its own pools.
    So this looks up a program's handle by tag and device.
    """

    def __init__(self) -> None:
        self._lock = fork_safe_lock()
        self._graphs: Counter[_PoolKey] = Counter()
        self._issued: dict[PoolHandle, _PoolKey] = {}
        # Finalizers only append to it: they may run anywhere, even while a lock is held.
        self._gone: deque[_PoolKey] = deque()
        self._local = threading.local()

    def capturing(self) -> bool:
        """Whether the calling thread is in the body of a capture."""
        return bool(getattr(self._local, "depth", 0))

    @contextlib.contextmanager
    def pool(
        self,
        allocator: CuMemAllocator,
        declare: Callable[[str], None],
        prefix: str,
        device: int,
        shared: PoolHandle | None,
        graph: torch.cuda.CUDAGraph,
    ) -> Iterator[PoolHandle]:
        """Returns the pool to capture a graph into; it lives as long as the graph object."""
        self.reap(allocator)
        with self._lock:
            if shared is None:
                key = self._own_key(prefix, device)
            else:
                key = self._shared_key(prefix, device, shared)
            declare(key[0])
            handle = allocator.graph_pool(key[0], device=device)
            weakref.finalize(graph, self._gone.append, key).atexit = False
            self._graphs[key] += 1
            self._issued[handle] = key
        self._local.depth = getattr(self._local, "depth", 0) + 1
        try:
            yield handle
        finally:
            self._local.depth -= 1

    def _own_key(self, prefix: str, device: int) -> _PoolKey:
        number = 0
        while (key := (f"{prefix}:graph{number}", device)) in self._graphs:
            number += 1
        return key

    def _shared_key(self, prefix: str, device: int, shared: PoolHandle) -> _PoolKey:
        try:
            first, second = (int(part) for part in shared)
        except (TypeError, ValueError):
            raise InvalidArgumentError(
                f"pool={shared!r} is not what torch.cuda.graph_pool_handle() or graph.pool() gives"
            ) from None
        issued = self._issued.get((first, second))
        if issued is not None and issued[1] == device and _prefix_of(issued[0]) == prefix:
            return issued
        return f"{prefix}:graph{first}.{second}", device

    def reap(self, allocator: CuMemAllocator) -> None:
        """Releases the pools whose last graph is gone."""
        with self._lock:
            while self._gone:
                key = self._gone.popleft()
                self._graphs[key] -= 1
                if self._graphs[key] == 0:
                    del self._graphs[key]
                    self._issued = {h: k for h, k in self._issued.items() if k != key}
                    allocator.release_graph_pool(key[0], device=key[1])


def _prefix_of(name: str) -> str:
    return name.rpartition(":graph")[0]
