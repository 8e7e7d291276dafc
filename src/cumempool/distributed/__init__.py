"""Sleep and wake on all ranks of a process group, or on none.

Every rank does its local transition and votes; one entry of the group's store, written once,
decides for all. Ranks meet through the store and never by a collective, so that nothing hangs on a
rank that is gone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from cumempool._pool.checks import check_seconds
from cumempool._pool.sleep_plan import plan_sleep, takes_offload_tags_first
from cumempool.allocator import CuMemAllocator
from cumempool.distributed.reports import GroupReport
from cumempool.distributed.round import Round
from cumempool.distributed.steps import Step, discard_steps, sleep_steps, wake_steps
from cumempool.distributed.store import Channel, Store, StoreGroup
from cumempool.errors import InvalidArgumentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DEFAULT_TIMEOUT", "GroupReport", "Store", "StoreGroup", "discard", "sleep", "wake_up"]

DEFAULT_TIMEOUT: Final = 300.0
"""Seconds that a rank waits for the others, at each point where they meet."""

_STORE_PATIENCE: Final = 10.0  # seconds for one call of the store, where the timeout is longer


@takes_offload_tags_first
def sleep(
    group: ProcessGroup | StoreGroup | None = None,
    tags: Sequence[str] | str | None = None,
    *,
    offload_tags: Sequence[str] | str | None = None,
    allocator: CuMemAllocator | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> GroupReport:
    """Puts tags to sleep on every rank of a group, or on none. Called by every rank, in one order.

    First all ranks say that they are here and find nothing in the way. Then each puts to sleep what
    is backed up; only when that went well everywhere is anything discarded. Where a rank fails or
    does not answer, the others wake again what they have put to sleep. Contents that were discarded
    by then do not come back; that takes a failure in the last step (a hook that raises, a driver
    that fails, a rank that dies within it), and the error names the tags.

    Args:
        group: A process group of any backend, a `StoreGroup`, or None for the default group.
            Nothing is communicated but through its store.
        tags: As for `CuMemAllocator.sleep`; ranks need not name the same tags.
        offload_tags: As for `CuMemAllocator.sleep`.
        allocator: None: the one of ``CuMemAllocator.get_instance()``.
        timeout: Seconds to wait for the other ranks, at each point where they meet, counted from
            when this rank gets there. It does not cut short what a rank does locally: a collective
            that never ends, submitted before, holds up the sleep.

    Returns:
        The reports of all ranks.

    Raises:
        DistributedTransitionError: A rank failed, or did not answer; it says which ranks and why,
            and what state each is in now. ``__cause__`` is what this rank failed with.
        InvalidArgumentError: This process is not in the group, there is none, or a bad timeout.
    """

    def plan(allocator: CuMemAllocator) -> list[Step]:
        allocator._check_enabled("sleep")
        actions, _ = plan_sleep(allocator._core, tags, offload_tags)
        return sleep_steps(allocator, actions)

    return _transition("sleep", group, allocator, plan, timeout)


def wake_up(
    group: ProcessGroup | StoreGroup | None = None,
    tags: Sequence[str] | str | None = None,
    *,
    allocator: CuMemAllocator | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> GroupReport:
    """Wakes tags on every rank of a group, or on none. Called by every rank, in the same order.

    Where a rank fails or does not answer, the others put to sleep again what they have woken: with
    its contents, where it had a backup, which copies nothing if that backup was kept
    (``retain_backups``); discarded memory is discarded again.

    Arguments, result and errors are those of `sleep`; without tags, all wake.
    """
    return _transition("wake_up", group, allocator, lambda own: wake_steps(own, tags), timeout)


def discard(
    group: ProcessGroup | StoreGroup | None,
    tags: Sequence[str] | str,
    *,
    allocator: CuMemAllocator | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> GroupReport:
    """Puts tags to sleep without keeping their contents, on every rank of a group or on none.

    What is in the way is looked for on all ranks before the first of them discards anything. Where
    a rank fails all the same, the others wake again what was awake, with undefined contents: the
    error names the tags. Backups that were dropped do not come back.

    Arguments, result and errors are those of `sleep`.
    """
    return _transition("discard", group, allocator, lambda own: discard_steps(own, tags), timeout)


def _transition(
    operation: str,
    group: ProcessGroup | StoreGroup | None,
    allocator: CuMemAllocator | None,
    plan: Callable[[CuMemAllocator], list[Step]],
    timeout: float,
) -> GroupReport:
    if not 0 < check_seconds(timeout, "timeout") < math.inf:
        raise InvalidArgumentError(f"timeout={timeout} is not a number of seconds above 0")
    members = group if isinstance(group, StoreGroup) else _members(group)
    begun = time.monotonic()

    def planned() -> list[Step]:
        chosen = CuMemAllocator.get_instance() if allocator is None else allocator
        with chosen._state.transitions.turn(operation):  # a wake in the background ends before
            pass
        return plan(chosen)

    prefix = f"cumempool/{members.name}/"
    with Channel(members.store, prefix, min(timeout, _STORE_PATIENCE)) as channel:
        made = Round(channel, members.rank, members.size, operation, timeout).run(planned)
    return GroupReport(operation, time.monotonic() - begun, made)


def _members(group: ProcessGroup | None) -> StoreGroup:
    """A process group as ranks that meet through its store."""
    import torch.distributed as dist

    from cumempool import _torch

    if not dist.is_available() or not dist.is_initialized():
        raise InvalidArgumentError(
            "there is no process group: call torch.distributed.init_process_group() first, or give "
            "a StoreGroup"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise InvalidArgumentError("this process is not in the group")
    store = _torch.store_of_group(group)
    return StoreGroup(store, rank, dist.get_world_size(group), "group")
