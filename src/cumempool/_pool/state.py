"""`PoolState`: what the parts of one allocator share."""

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
    """One allocator, as scopes, tensors and transitions see it.

    Attributes:
        core: The allocator of the library.
        driver: ``"cuda"`` or ``"host"``.
        enabled: False where nothing is allocated from pools.
        devices: Its devices.
        tags: What was said of each tag.
        hooks: The hooks of tags.
        transitions: Whose turn it is.
        observer: What keeps and logs events.
        graph_pools: Its pools of CUDA graphs.
        before_tensors: Called before torch gets memory of the allocator.
        before_sleep: Called with the tags that are about to sleep.
        has_preserved: Whether contents are kept anywhere in tags that are discarded.
    """

    core: _core.Allocator
    driver: str
    enabled: bool
    devices: Devices
    tags: Tags
    hooks: Hooks
    transitions: Transitions
    observer: Observer
    graph_pools: GraphPools
    before_tensors: Callable[[], None]
    before_sleep: Callable[[Collection[str]], None]
    has_preserved: bool = False

    def stats(self) -> Stats:
        """Bytes per tag and state, and totals."""
        return stats_of(self.core)

    def snapshot(self) -> list[AllocationInfo]:
        """Every live allocation, in order of allocation."""
        return allocations_of(self.core)

    def allocation_at(self, address: int) -> AllocationInfo:
        """The allocation that holds an address."""
        return AllocationInfo(**self.core.find(address))
