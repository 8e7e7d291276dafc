"""Puts memory to sleep and wakes it on all ranks of a process group, or on none.

Every rank does its local transition and votes; one entry of the group's store, written once,
decides for all. Ranks meet through the store and never by a collective, so no rank hangs if another
is gone.
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

_STORE_PATIENCE: Final = 10.0  # seconds for one call of the store, if the timeout is longer


@takes_offload_tags_first
def sleep(
    group: ProcessGroup | StoreGroup | None = None,
    tags: Sequence[str] | str | None = None,
    *,
    offload_tags: Sequence[str] | str | None = None,
    allocator: CuMemAllocator | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> GroupReport:
    """Puts tags to sleep on every rank of a group, or on none. Every rank calls it, in one order.

    First all ranks report that they are here and that nothing prevents the sleep. Then each puts
    its backed-up tags to sleep. If that succeeds everywhere, each discards the others. If a rank
    fails or does not answer, the others wake again what they have put to sleep. Contents discarded
    by then are lost. Only a failure in the last step does that (a hook that raises, a driver that
    fails, a rank that dies within it), and the error names the tags.

    Args:
        group: A process group of any backend, a `StoreGroup`, or None for the default group.
            Ranks communicate through its store only.
        tags: As for `CuMemAllocator.sleep`; ranks need not name the same tags.
        offload_tags: As for `CuMemAllocator.sleep`.
        allocator: The allocator; None means ``CuMemAllocator.get_instance()``.
        timeout: Seconds that this rank waits for the others each time they meet. It does not limit
            the local work of a rank: a collective that was submitted before and never ends holds
            up the sleep.

    Returns:
        The reports of all ranks.

    Raises:
        DistributedTransitionError: A rank failed or did not answer. It names the ranks, the reasons
            and the state of each rank now. ``__cause__`` is this rank's own error.
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
    """Wakes tags on every rank of a group, or on none. Every rank calls it, in the same order.

    If a rank fails or does not answer, the others put to sleep again what they have woken. Memory
    that had a backup is backed up again, without a copy if the backup was retained
    (``retain_backups``). Discarded memory is discarded again.

    Arguments, result and errors are as for `sleep`; without tags, all wake.
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

    All ranks check whether they can discard before the first of them discards anything. If a rank
    still fails, the others wake again what was awake, with undefined contents; the error names the
    tags. Dropped backups are lost.

    Arguments, result and errors are as for `sleep`.
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
        with chosen._state.transitions.turn(operation):  # waits for a background wake
            pass
        return plan(chosen)

    prefix = f"cumempool/{members.name}/"
    with Channel(members.store, prefix, min(timeout, _STORE_PATIENCE)) as channel:
        made = Round(channel, members.rank, members.size, operation, timeout).run(planned)
    return GroupReport(operation, time.monotonic() - begun, made)


def _members(group: ProcessGroup | None) -> StoreGroup:
    """Returns a process group as ranks that meet through its store."""
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
