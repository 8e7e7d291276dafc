"""Defines `PoolState`: the state that the parts of one allocator share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cumempool._pool.devices import Devices
from cumempool._pool.events import Observer
from cumempool._pool.graph_pool import GraphPools
from cumempool._pool.hooks import Hooks, Transitions
from cumempool._pool.stats import AllocationInfo, Stats, allocations_of, stats_of
from cumempool._pool.tags import Tags

if TYPE_CHECKING:
    from cumempool import _core


@dataclass(eq=False, kw_only=True)
class PoolState:
    """One allocator, as scopes, tensors and transitions see it."""

    core: _core.Allocator
    driver: str
    enabled: bool  # if False, nothing is allocated from pools
    devices: Devices
    tags: Tags
    hooks: Hooks
    transitions: Transitions
    observer: Observer
    graph_pools: GraphPools
    before_tensors: Callable[[], None]  # called before torch gets memory of the allocator
    before_sleep: Callable[[Collection[str]], None]  # called with the tags about to sleep
    has_preserved: bool = False  # some allocation keeps its contents if its tag is discarded

    def stats(self) -> Stats:
        return stats_of(self.core)

    def snapshot(self) -> list[AllocationInfo]:
        return allocations_of(self.core)

    def preserve(self, address: int) -> None:
        """Keeps the contents of the allocation at an address if its tag is discarded."""
        self.has_preserved = True
        self.core.preserve(address)

    def allocation_at(self, address: int) -> AllocationInfo:
        return AllocationInfo(**self.core.find(address))
