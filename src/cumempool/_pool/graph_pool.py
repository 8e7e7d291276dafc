"""Makes pools to capture CUDA graphs into: graph memory that sleeps and wakes with a tag."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cumempool._locks import fork_safe_lock
from cumempool.errors import InUseError, UnsupportedError

if TYPE_CHECKING:
    from cumempool import _core, _torch

_lock = fork_safe_lock()
# Slots and pools with live graphs, of allocators that are gone or closed with force.
_orphans: list[tuple[int, _torch.PrivatePool]] = []


def _still_used(
    leaving: list[tuple[int, _torch.PrivatePool]],
) -> list[tuple[int, _torch.PrivatePool]]:
    """Gives back the slots of released pools whose last graph is gone; returns the others."""
    from cumempool import _core

    used = []
    for slot, pool in leaving:
        if pool.users() > 0:
            used.append((slot, pool))
            continue
        pool.forget()
        _core.unbind_slot(slot)
    return used


class GraphPools:
    """The graph pools of one allocator, one per tag and device.

    A pool holds its slot while a graph may be captured into it: until it is released and its graphs
    are gone. If the slot served another tag before that, the tag would get the graphs' allocations.
    """

    def __init__(self, core: _core.Allocator) -> None:
        self._core: Final = core
        self._pools: dict[tuple[str, int], tuple[int, _torch.PrivatePool]] = {}
        self._leaving: list[tuple[int, _torch.PrivatePool]] = []  # released, with live graphs

    def open(self, tag: str, device: int) -> tuple[int, int]:
        """Returns the id of the pool of a declared tag; see `CuMemAllocator.graph_pool`."""
        from cumempool import _torch

        with _lock:
            self.reap()
            found = self._pools.get((tag, device))
            if found is None:
                found = self._make(tag, device)
                self._pools[tag, device] = found
            else:
                self._refuse_asleep(tag, found[1])
        _torch.return_unused()
        return found[1].id

    def _make(self, tag: str, device: int) -> tuple[int, _torch.PrivatePool]:
        from cumempool import _core, _torch

        if _torch.expandable_segments_bypass_pools():
            raise UnsupportedError(
                "graph_pool: with expandable segments this version of torch would not ask the pool "
                "for memory",
                operation="graph_pool",
                tag=tag,
                device=device,
                advice="leave expandable_segments out of PYTORCH_CUDA_ALLOC_CONF",
            )
        _torch.warm_capture_stream(device)
        slot = self._core.bind_slot(tag, lasting=True)
        try:
            return slot, _torch.PrivatePool(slot, device)
        except BaseException:
            _core.unbind_slot(slot)
            raise

    def _refuse_asleep(self, tag: str, pool: _torch.PrivatePool) -> None:
        """Refuses to return a pool if torch has free blocks in its sleeping segments."""
        asleep = {
            info["address"]
            for info in self._core.snapshot(True)["allocations"]
            if info["tag"] == tag and info["state"] != "awake"
        }
        if asleep and any(address in asleep for address, _ in pool.segments()):
            raise InUseError(
                f"graph_pool: memory of the pool of {tag!r} is asleep, and torch would hand out "
                "parts of it",
                operation="graph_pool",
                tag=tag,
                device=pool.device,
                advice="wake the tag before a graph is captured into it",
            )

    def release(self, tag: str, device: int | None) -> int:
        """Releases the pools of a tag; see `CuMemAllocator.release_graph_pool`."""
        with _lock:
            keys = [key for key in self._pools if key[0] == tag and device in (None, key[1])]
            return self._release(keys)

    def release_all(self) -> int:
        """Releases every pool; live graphs keep their memory."""
        with _lock:
            return self._release(list(self._pools))

    def _release(self, keys: list[tuple[str, int]]) -> int:
        from cumempool import _torch

        for key in keys:
            slot, pool = self._pools.pop(key)
            self._leaving.append((slot, pool))
            pool.release()
        self.reap()
        if keys:
            _torch.return_unused()
        return len(keys)

    def abandon(self) -> None:
        """Releases every pool of an allocator that is gone, or about to be closed with force."""
        with _lock:
            while self._pools:
                slot, pool = self._pools.popitem()[1]
                self._leaving.append((slot, pool))
                pool.release()
            _orphans.extend(self._leaving)
            self._leaving = []
            self.reap()

    def reap(self) -> None:
        """Gives back the slots of released pools whose last graph is gone."""
        with _lock:
            if self._leaving:
                self._leaving = _still_used(self._leaving)
            if _orphans:
                _orphans[:] = _still_used(_orphans)

    def refuse_close(self) -> None:
        """Raises if a graph lives that was captured into one of the pools."""
        with _lock:
            self.reap()
            graphs = len(self._leaving)
            graphs += sum(pool.users() > 1 for _, pool in self._pools.values())
        if graphs:
            raise InUseError(
                f"close: {graphs} graph pool(s) are in use by CUDA graphs",
                operation="close",
                advice="delete the graphs first, or close with force",
            )

    def replayed(self) -> set[tuple[int, int]]:
        """Returns the ids of the pools that graphs use, and may read at each replay."""
        with _lock:
            open_ones = [pool for _, pool in self._pools.values() if pool.users() > 1]
            return {pool.id for pool in [*open_ones, *(pool for _, pool in self._leaving)]}

    def unused_segments(self) -> set[int]:
        """Returns the addresses of segments without a used block, which torch would free."""
        with _lock:
            pools = [pool for _, pool in self._pools.values()]
            return {address for pool in pools for address, used in pool.segments() if not used}

    def __len__(self) -> int:
        """Returns the number of pools that hold a slot."""
        return len(self._pools) + len(self._leaving)
