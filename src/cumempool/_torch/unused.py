"""Pools whose scopes have ended: which of their segments nothing uses, and giving those back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import torch

from cumempool._locks import fork_safe_lock
from cumempool._torch import runtime, snapshots
from cumempool._torch.snapshots import PoolId, Segment, dead_ranges, field_of, is_in_use, pool_of

_logger = logging.getLogger("cumempool")

pools_lock = fork_safe_lock()
# Pools that are routed to.
open_pools: set[PoolId] = set()
# Pools whose scope has ended and that torch may hold unused segments of, with their device.
fresh_pools: dict[PoolId, int] = {}


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
    """
    with pools_lock:
        if open_pools or not (fresh_pools or _held.devices):
            return
        every = not _held.devices or thorough or _held.are_worth_a_look()
        pools = {**_held.devices, **fresh_pools} if every else dict(fresh_pools)
        if not pools:
            return
        if len(pools) <= _ASKED_EACH:
            segments = [segment for pool in pools for segment in snapshots.segments_of(pool)]
        else:
            segments = snapshots.segments_of()
        unused = _look_at(pools, segments)
    _return(unused, every)


def settled_dead_ranges(live: Collection[PoolId]) -> list[tuple[int, int]]:
    """`return_unused` of all, and `dead_ranges`, by asking torch once.

    Ranges of what is freed by it may be among them.
    """
    if not runtime.is_initialized() or not runtime.has_native_allocator():
        return []
    with pools_lock:  # pools before segments: of one that ends meanwhile there may be more
        pools = {} if open_pools else {**_held.devices, **fresh_pools}
        segments = snapshots.segments_of()
        unused = _look_at(pools, segments)
    if pools:
        _return(unused, every=True)
    return dead_ranges(live, segments)


def _look_at(pools: Mapping[PoolId, int], segments: Sequence[Segment]) -> dict[PoolId, int]:
    """Notes which of the pools have segments in use; returns those with unused ones."""
    used: Counter[PoolId] = Counter()
    unused: dict[PoolId, int] = {}
    for segment in segments:
        pool = pool_of(segment)
        if pool not in pools:
            continue
        if is_in_use(segment):
            used[pool] += 1
        else:
            unused[pool] = pools[pool]
    for pool, device in pools.items():
        fresh_pools.pop(pool, None)
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
            with pools_lock:
                fresh_pools.update(unused)
    with pools_lock:
        _held.were_looked_at(every)


def _releasable_bytes() -> int:
    """Bytes of segments of any pool that nothing uses, of the devices of pools that are held."""
    return sum(held_bytes(device)[1] for device in set(_held.devices.values()))


def held_bytes(device: int) -> tuple[int, int]:
    """Bytes of torch's segments on a device, and of those in which nothing is in use."""
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    reserved, active, split = (
        int(field_of(stats, name)["all"]["current"])
        for name in ("reserved_bytes", "active_bytes", "inactive_split_bytes")
    )
    return reserved, reserved - active - split
