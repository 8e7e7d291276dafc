"""The transitions of an allocator: what goes around the core's part of a sleep, wake or swap.

Each has its turn (`Transitions`), calls the hooks of its tags, becomes an event, and ends in a
report. A scope that is open refuses a sleep before hooks are called, and in the core.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from cumempool._pool.hooks import Arrival, RegistrableRange, ranges_by_tag
from cumempool._pool.report import TransitionReport
from cumempool._pool.scope import refuse_open_scopes
from cumempool._pool.tags import OFFLOAD
from cumempool._pool.torch_state import current_streams, with_room
from cumempool._pool.waking import WakeHandle

if TYPE_CHECKING:
    from cumempool import _core
    from cumempool.allocator import CuMemAllocator

__all__ = ["begin_wake", "prepare", "sleep", "swap", "wake"]


def sleep(
    allocator: CuMemAllocator,
    operation: str,
    actions: Mapping[str, int],
    overrides: Mapping[str, str],
    *,
    drop_backups: bool,
) -> TransitionReport:
    """Sleeps as planned (`sleep_plan.py`); a discard drops backups of what sleeps already."""
    refuse_open_scopes(allocator, operation, actions)
    allocator._exports.settle(actions)
    pairs = list(actions.items())
    with (
        allocator._observer.watch(operation) as watched,
        allocator._transitions.turn(operation),
        _departing(allocator, actions),
    ):
        dead, as_of = _dead_ranges(allocator, pairs)
        streams = current_streams(allocator.config.driver)
        raw = allocator._core.sleep(pairs, drop_backups, dead, streams, as_of)
        report = watched.report = _report(operation, raw, overrides)
    return report


def prepare(
    allocator: CuMemAllocator, actions: Mapping[str, int], *, background: bool
) -> int | Future[int]:
    """See `CuMemAllocator.prepare`."""
    allocator._exports.settle(actions)
    pairs = list(actions.items())
    dead, as_of = _dead_ranges(allocator, pairs)
    # Hooks take pins off before a sleep.
    yielding = sorted(allocator._hooks.yielding().intersection(actions))
    if not background:
        return allocator._core.prepare(pairs, dead, yielding, as_of)
    future: Future[int] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            prepared = allocator._core.prepare(pairs, dead, yielding, as_of)
        except BaseException as error:  # noqa: BLE001 -- whoever waits is told, whatever it is
            future.set_exception(error)
        else:
            future.set_result(prepared)

    threading.Thread(target=run, name="cumempool-prepare", daemon=True).start()
    return future


def wake(allocator: CuMemAllocator, tags: list[str] | None) -> TransitionReport:
    """Wakes tags, or all; see `CuMemAllocator.wake_up`."""
    driver = allocator.config.driver
    with allocator._observer.watch("wake_up") as watched, allocator._transitions.turn("wake_up"):
        streams = current_streams(driver)
        asleep = _asleep(allocator, tags)
        raw, problems = allocator._transitions.arriving(
            lambda: with_room(driver, lambda: allocator._core.wake(tags, streams)),
            lambda: allocator._hooks.owed(_awake(allocator, asleep)),
        )
        report = watched.report = _report("wake_up", raw, {}, problems)
    return report


def begin_wake(allocator: CuMemAllocator, tags: list[str] | None, first: list[int]) -> WakeHandle:
    """Begins a wake that goes on by itself; `first` are addresses that come before all others."""
    driver = allocator.config.driver
    begin = time.perf_counter()
    with (
        allocator._observer.failing("wake_up", begin),
        allocator._transitions.turn("wake_up"),
    ):
        streams = current_streams(driver)
        asleep = _asleep(allocator, tags)
        waking: _core.Waking | None = None

        def wait() -> None:
            if waking is None:  # it has not begun, or was interrupted when it had
                return
            with allocator._observer.failing("wake_up", begin):
                waking.finish()
            allocator._observer.note("wake_up", None, time.perf_counter() - begin)

        arrival = Arrival(wait, lambda: allocator._hooks.owed(_awake(allocator, asleep)))
        allocator._transitions.expect(arrival)
        waking = with_room(driver, lambda: allocator._core.wake_begin(tags, first, streams))
    return WakeHandle(waking, driver, allocator._transitions, arrival)


def swap(
    allocator: CuMemAllocator,
    actions: Mapping[str, int],
    overrides: Mapping[str, str],
    tags: list[str] | None,
) -> TransitionReport:
    """Sleeps as planned while `tags` wake, or all others that sleep."""
    refuse_open_scopes(allocator, "swap", actions)
    allocator._exports.settle(actions)
    driver = allocator.config.driver
    pairs = list(actions.items())
    with (
        allocator._observer.watch("swap") as watched,
        allocator._transitions.turn("swap"),
        _departing(allocator, actions),
    ):
        streams = current_streams(driver)
        asleep = _asleep(allocator, tags)

        def attempt() -> dict[str, Any]:
            # At each try: emptying the cache changes what is dead.
            dead, as_of = _dead_ranges(allocator, pairs)
            return allocator._core.swap(pairs, dead, tags, streams, as_of)

        raw, problems = allocator._transitions.arriving(
            lambda: with_room(driver, attempt),
            lambda: allocator._hooks.owed(_awake(allocator, asleep)),
        )
        report = watched.report = _report("swap", raw, overrides, problems)
    return report


def _departing(
    allocator: CuMemAllocator, tags: Iterable[str]
) -> contextlib.AbstractContextManager[None]:
    """Calls the hooks of tags that are put to sleep in the body."""
    hooked = allocator._hooks.tags().intersection(tags)
    if not hooked:
        return contextlib.nullcontext()
    infos = [info for info in allocator.snapshot() if info.tag in hooked and info.state == "awake"]
    if any(info.backing == "cuda_malloc" for info in infos):
        return contextlib.nullcontext()  # which the core is about to refuse
    leaving = frozenset(info.address for info in infos)
    return allocator._hooks.departing(ranges_by_tag(infos), lambda: _awake(allocator, leaving))


def _asleep(allocator: CuMemAllocator, tags: Iterable[str] | None) -> frozenset[int]:
    """Where memory sleeps that a wake of the tags concerns, of tags that have hooks."""
    hooked = allocator._hooks.tags()
    if tags is not None:
        hooked &= set(tags)
    if not hooked:
        return frozenset()
    infos = allocator.snapshot()
    return frozenset(i.address for i in infos if i.tag in hooked and i.state != "awake")


def _awake(
    allocator: CuMemAllocator, addresses: frozenset[int]
) -> dict[str, list[RegistrableRange]]:
    """Those of the allocations that are awake now, by tag."""
    if not addresses:
        return {}
    infos = allocator.snapshot()
    return ranges_by_tag(i for i in infos if i.address in addresses and i.state == "awake")


def _dead_ranges(
    allocator: CuMemAllocator, actions: Iterable[tuple[str, int]]
) -> tuple[list[tuple[int, int]], int]:
    """Ranges that need no backup, where there is anything to back up, and the moment before.

    By that moment the core knows what a scope may have handed out of them since.
    """
    if allocator.config.driver != "cuda":
        return [], 0
    from cumempool import _torch

    allocator._graph_pools.reap()
    as_of = allocator._core.moment()
    if allocator._has_preserved or any(action == OFFLOAD for _, action in actions):
        return _torch.settled_dead_ranges(allocator._graph_pools.replayed()), as_of
    _torch.return_unused(thorough=True)
    return [], as_of


def _report(
    operation: str,
    raw: Mapping[str, Any],
    overrides: Mapping[str, str],
    problems: Sequence[str] = (),
) -> TransitionReport:
    return TransitionReport.from_rows(
        operation, raw["seconds"], raw["rows"], [*raw["problems"], *problems], overrides
    )
