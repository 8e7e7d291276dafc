"""Runs an allocator's transitions: the Python steps around the core's sleep, wake or swap.

Each takes a turn (`Transitions`), calls the hooks of its tags, becomes an event, and ends in a
report. An open scope makes a sleep fail before hooks are called, and again in the core.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from cumempool._pool.hooks import Arrival, Departing, RegistrableRange, ranges_by_tag
from cumempool._pool.report import TransitionReport
from cumempool._pool.scope import refuse_open_scopes
from cumempool._pool.state import PoolState
from cumempool._pool.tags import OFFLOAD
from cumempool._pool.torch_state import current_streams, with_room
from cumempool._pool.waking import WakeHandle

if TYPE_CHECKING:
    from cumempool import _core


def sleep(
    state: PoolState,
    operation: str,
    actions: Mapping[str, int],
    overrides: Mapping[str, str],
    *,
    drop_backups: bool,
) -> TransitionReport:
    """Sleeps as planned (`sleep_plan.py`); a discard drops backups of memory already asleep."""
    refuse_open_scopes(state, operation, actions)
    state.before_sleep(actions)
    pairs = list(actions.items())
    with (
        state.observer.watch(operation) as watched,
        state.transitions.turn(operation),
        _departing(state, actions),
    ):
        dead, as_of = _dead_ranges(state, pairs)
        streams = current_streams(state.driver)
        raw = state.core.sleep(pairs, drop_backups, dead, streams, as_of)
        report = watched.report = _report(operation, raw, overrides)
    return report


def prepare(state: PoolState, actions: Mapping[str, int], *, background: bool) -> int | Future[int]:
    """See `CuMemAllocator.prepare`."""
    state.before_sleep(actions)
    pairs = list(actions.items())
    dead, as_of = _dead_ranges(state, pairs)
    # Hooks release pins before a sleep.
    yielding = sorted(state.hooks.yielding().intersection(actions))
    if not background:
        return state.core.prepare(pairs, dead, yielding, as_of)
    future: Future[int] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            prepared = state.core.prepare(pairs, dead, yielding, as_of)
        except BaseException as error:  # noqa: BLE001 -- the future reports any error
            future.set_exception(error)
        else:
            future.set_result(prepared)

    threading.Thread(target=run, name="cumempool-prepare", daemon=True).start()
    return future


def wake(state: PoolState, tags: list[str] | None) -> TransitionReport:
    """Wakes tags, or all tags; see `CuMemAllocator.wake_up`."""
    with state.observer.watch("wake_up") as watched, state.transitions.turn("wake_up"):
        streams = current_streams(state.driver)
        asleep = _asleep(state, tags)
        raw, problems = state.transitions.arriving(
            lambda: with_room(state.driver, lambda: state.core.wake(tags, streams)),
            lambda: state.hooks.owed(_awake(state, asleep)),
        )
        report = watched.report = _report("wake_up", raw, {}, problems)
    return report


def begin_wake(state: PoolState, tags: list[str] | None, first: list[int]) -> WakeHandle:
    """Begins a wake in the background; the addresses in `first` come before all others."""
    begin = time.perf_counter()
    with (
        state.observer.failing("wake_up", begin),
        state.transitions.turn("wake_up"),
    ):
        streams = current_streams(state.driver)
        asleep = _asleep(state, tags)
        waking: _core.Waking | None = None

        def wait() -> None:
            if waking is None:  # the wake has not begun, or was interrupted as it began
                return
            with state.observer.failing("wake_up", begin):
                waking.finish()
            state.observer.note("wake_up", None, time.perf_counter() - begin)

        arrival = Arrival(wait, lambda: state.hooks.owed(_awake(state, asleep)))
        state.transitions.expect(arrival)
        waking = with_room(state.driver, lambda: state.core.wake_begin(tags, first, streams))
    return WakeHandle(waking, state.driver, state.transitions, arrival)


def swap(
    state: PoolState,
    actions: Mapping[str, int],
    overrides: Mapping[str, str],
    tags: list[str] | None,
) -> TransitionReport:
    """Sleeps as planned while `tags` wake, or all other sleeping tags."""
    refuse_open_scopes(state, "swap", actions)
    state.before_sleep(actions)
    pairs = list(actions.items())
    with (
        state.observer.watch("swap") as watched,
        state.transitions.turn("swap"),
        _departing(state, actions),
    ):
        streams = current_streams(state.driver)
        asleep = _asleep(state, tags)

        def attempt() -> _core.Report:
            # At each attempt: emptying the cache changes the dead ranges.
            dead, as_of = _dead_ranges(state, pairs)
            return state.core.swap(pairs, dead, tags, streams, as_of)

        raw, problems = state.transitions.arriving(
            lambda: with_room(state.driver, attempt),
            lambda: state.hooks.owed(_awake(state, asleep)),
        )
        report = watched.report = _report("swap", raw, overrides, problems)
    return report


def _departing(state: PoolState, tags: Iterable[str]) -> contextlib.AbstractContextManager[None]:
    """Calls the hooks of tags that the body puts to sleep."""
    hooked = state.hooks.tags().intersection(tags)
    if not hooked:
        return contextlib.nullcontext()
    infos = [info for info in state.snapshot() if info.tag in hooked and info.state == "awake"]
    if any(info.backing == "cuda_malloc" for info in infos):
        return contextlib.nullcontext()  # the core is about to refuse
    leaving = frozenset(info.address for info in infos)
    return Departing(state.hooks, ranges_by_tag(infos), lambda: _awake(state, leaving))


def _asleep(state: PoolState, tags: Iterable[str] | None) -> frozenset[int]:
    """Returns the addresses that a wake of the tags would wake, for tags with hooks."""
    hooked = state.hooks.tags()
    if tags is not None:
        hooked &= set(tags)
    if not hooked:
        return frozenset()
    infos = state.snapshot()
    return frozenset(i.address for i in infos if i.tag in hooked and i.state != "awake")


def _awake(state: PoolState, addresses: frozenset[int]) -> dict[str, list[RegistrableRange]]:
    """Returns the ranges of the given allocations that are awake now, by tag."""
    if not addresses:
        return {}
    infos = state.snapshot()
    return ranges_by_tag(i for i in infos if i.address in addresses and i.state == "awake")


def _dead_ranges(
    state: PoolState, actions: Iterable[tuple[str, int]]
) -> tuple[list[tuple[int, int]], int]:
    """Returns ranges that need no backup, empty if nothing is backed up, and the moment before.

    From that moment the core knows what a scope may have handed out of them since.
    """
    if state.driver != "cuda":
        return [], 0
    from cumempool import _torch

    state.graph_pools.reap()
    as_of = state.core.moment()
    if state.has_preserved or any(action == OFFLOAD for _, action in actions):
        return _torch.settled_dead_ranges(state.graph_pools.replayed()), as_of
    _torch.return_unused(thorough=True)
    return [], as_of


def _report(
    operation: str,
    raw: _core.Report,
    overrides: Mapping[str, str],
    problems: Sequence[str] = (),
) -> TransitionReport:
    return TransitionReport.from_rows(
        operation, raw.seconds, raw.rows, [*raw.problems, *problems], overrides
    )
