"""Finds the unused segments of pools whose scopes have ended, and gives them back."""

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
# Pools that torch routes to.
open_pools: set[PoolId] = set()
# Pools whose scope has ended, possibly with unused segments in torch, and their device.
fresh_pools: dict[PoolId, int] = {}


class _HeldPools:
    """Released pools that had memory in use when they were last examined.

    Attributes:
        devices: The device of each pool.
        segments: The number of their segments.
        looked_at: The number of pools when all were last examined.
        releasable: The minimum of `_releasable_bytes` since then.
    """

    def __init__(self) -> None:
        self.devices: dict[PoolId, int] = {}
        self.segments = 0
        self.looked_at = 0
        self.releasable = 0
        self._sizes: dict[PoolId, int] = {}

    def put(self, pool: PoolId, device: int, segments: int) -> None:
        """Adds a pool, or removes one without segments."""
        self.segments += segments - self._sizes.pop(pool, 0)
        self.devices.pop(pool, None)
        if segments:
            self._sizes[pool] = segments
            self.devices[pool] = device

    def are_worth_a_look(self) -> bool:
        """Whether enough has become unused, or enough pools have come, to examine all of them."""
        now = _releasable_bytes()
        self.releasable = min(self.releasable, now)
        grown = now - self.releasable
        many = len(self.devices) > 2 * self.looked_at + _ASKED_EACH
        return many or grown >= max(1, self.segments * _WORTH_A_LOOK)

    def were_looked_at(self, all_of_them: bool) -> None:
        """Updates the counters after pools were examined and their unused segments freed."""
        if not self.devices:
            self.looked_at = 0
            return
        now = _releasable_bytes()
        self.releasable = now if all_of_them else min(self.releasable, now)
        if all_of_them:
            self.looked_at = len(self.devices)


_held = _HeldPools()

#: Bytes per held segment, of at least 2 MiB each, that must become unused before all are examined,
#: which takes some microseconds per segment.
_WORTH_A_LOOK: Final = 64 << 10
#: Up to this many pools, torch is asked for each pool, and not for all its segments.
_ASKED_EACH: Final = 4


def return_unused(*, thorough: bool = False) -> None:
    """Makes torch free the unused segments of pools whose scopes have ended, if there are any.

    It waits while a scope is open on any device, because torch frees nothing then; the end of that
    scope calls this again. Its cost does not depend on how much torch holds, except for pools whose
    scopes have just ended, and if enough has become unused to be worth it.
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
    """Does `return_unused` for all pools and `dead_ranges`, with one query to torch.

    The result may contain ranges that it frees.
    """
    if not runtime.is_initialized() or not runtime.has_native_allocator():
        return []
    with pools_lock:  # pools before segments: a pool that ends in between may have more segments
        pools = {} if open_pools else {**_held.devices, **fresh_pools}
        segments = snapshots.segments_of()
        unused = _look_at(pools, segments)
    if pools:
        _return(unused, every=True)
    return dead_ranges(live, segments)


def _look_at(pools: Mapping[PoolId, int], segments: Sequence[Segment]) -> dict[PoolId, int]:
    """Records which of the pools have segments in use; returns those with unused ones."""
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
    """Makes torch free unused segments of pools. `every`: all released pools were examined."""
    if unused:
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            # torch before 2.9 refuses while any capture or pool scope is under way. The segments
            # stay cached, as after any other empty_cache() that comes too early.
            _logger.debug("torch refused to empty its cache; unused segments stay for now")
            with pools_lock:
                fresh_pools.update(unused)
    with pools_lock:
        _held.were_looked_at(every)


def _releasable_bytes() -> int:
    """Returns bytes of unused segments of any pool, on the devices of the held pools."""
    return sum(held_bytes(device)[1] for device in set(_held.devices.values()))


def held_bytes(device: int) -> tuple[int, int]:
    """Returns the bytes of torch's segments on a device, and of the unused ones among them."""
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    reserved, active, split = (
        int(field_of(stats, name)["all"]["current"])
        for name in ("reserved_bytes", "active_bytes", "inactive_split_bytes")
    )
    return reserved, reserved - active - split
