"""Sleep and wake on all ranks of a process group, or on none.

Every rank does its local transition and votes; one entry of the group's store, written once,
decides for all. Ranks meet through the store and never by a collective, so that nothing hangs on a
rank that is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, fields
from functools import partial
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from cumempool.allocator import CuMemAllocator
from cumempool.errors import (
    DistributedTransitionError,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    RankState,
)
from cumempool.report import TagReport, TransitionReport, format_bytes
from cumempool.scope import refuse_open_scopes
from cumempool.sleep_plan import plan_sleep
from cumempool.tags import DISCARD, OFFLOAD

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DEFAULT_TIMEOUT", "GroupReport", "Store", "StoreGroup", "discard", "sleep", "wake_up"]

DEFAULT_TIMEOUT: Final = 300.0
"""Seconds that a rank waits for the others, at each point where they meet."""

_STORE_PATIENCE: Final = 10.0  # seconds for one call of the store, where the timeout is longer
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.02  # seconds between two looks into the store

_T = TypeVar("_T")
_logger = logging.getLogger("cumempool")


# ---- what callers give and get


class Store(Protocol):
    """What is needed of a ``torch.distributed.Store``; ``TCPStore`` and ``FileStore`` have it."""

    def set(self, key: str, value: str, /) -> None:
        """Writes a value."""

    def get(self, key: str, /) -> bytes:
        """Reads a value."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are there."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Writes a value in place of another; returns what is there then."""

    def delete_key(self, key: str, /) -> bool:
        """Deletes a key."""


@dataclass(frozen=True, slots=True)
class StoreGroup:
    """Ranks that meet through a store, for programs without a ``torch.distributed`` process group.

    Attributes:
        store: A ``torch.distributed.Store`` that all of them reach, such as a ``TCPStore``.
        rank: Of this process, from 0.
        size: How many there are.
        name: Tells groups apart that share a store.

    Raises:
        InvalidArgumentError: `rank` is none of `size`.
    """

    store: Store
    rank: int
    size: int
    name: str = "ranks"

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if not 0 <= self.rank < self.size:
            raise InvalidArgumentError(f"rank {self.rank} is not one of 0 to {self.size - 1}")


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What one transition did on every rank of a group.

    Attributes:
        operation: ``"sleep"``, ``"wake_up"`` or ``"discard"``.
        seconds: Wall time of the call on this rank, waiting for the others included.
        ranks: Rank of the group -> what was done there; read-only.
    """

    operation: str
    seconds: float
    ranks: Mapping[int, TransitionReport]

    def __post_init__(self) -> None:
        """Keeps the reports from being changed."""
        object.__setattr__(self, "ranks", MappingProxyType(dict(self.ranks)))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles a plain dict: a mapping proxy cannot be."""
        return (type(self), (self.operation, self.seconds, dict(self.ranks)))

    @property
    def bytes_freed(self) -> int:
        """Device memory given back to the driver, all ranks."""
        return sum(report.bytes_freed for report in self.ranks.values())

    @property
    def bytes_mapped(self) -> int:
        """Device memory taken from the driver, all ranks."""
        return sum(report.bytes_mapped for report in self.ranks.values())

    @property
    def slowest_seconds(self) -> float:
        """Time of the local transition on the rank that took longest."""
        return max(report.seconds for report in self.ranks.values())

    @property
    def problems(self) -> tuple[str, ...]:
        """Failures that did not stop the transition, each with its rank."""
        return tuple(
            f"rank {rank}: {problem}"
            for rank, report in self.ranks.items()
            for problem in report.problems
        )

    def to_dict(self) -> dict[str, object]:
        """All of it, of types that ``json.dumps`` takes; ranks are texts there."""
        return {
            "operation": self.operation,
            "seconds": self.seconds,
            "bytes_freed": self.bytes_freed,
            "bytes_mapped": self.bytes_mapped,
            "ranks": {str(rank): report.to_dict() for rank, report in self.ranks.items()},
        }

    def __str__(self) -> str:
        """One line for all, then the report of each rank."""
        amounts = [("freed", self.bytes_freed), ("mapped", self.bytes_mapped)]
        text = ", ".join(f"{verb} {format_bytes(count)}" for verb, count in amounts if count)
        lines = [
            f"{self.operation} on {len(self.ranks)} ranks: {text or 'nothing changed'} "
            f"in {self.seconds * 1e3:.1f} ms"
        ]
        for rank, report in self.ranks.items():
            first, *rest = str(report).splitlines()
            lines += [f"  rank {rank}: {first}", *(f"  {line}" for line in rest)]
        return "\n".join(lines)


# ---- the three transitions


def sleep(
    group: ProcessGroup | StoreGroup | None = None,
    offload_tags: Sequence[str] | str | None = None,
    *,
    tags: Sequence[str] | str | None = None,
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
        offload_tags: As for `CuMemAllocator.sleep`; ranks need not name the same tags.
        tags: As for `CuMemAllocator.sleep`.
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

    def plan(allocator: CuMemAllocator) -> list[_Step]:
        actions, _ = plan_sleep(allocator._core, offload_tags, tags)
        return _sleep_steps(allocator, actions)

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

    Args:
        group: As for `sleep`.
        tags: Wake only these. None: all. Ranks need not name the same.
        allocator: As for `sleep`.
        timeout: As for `sleep`.

    Returns:
        The reports of all ranks.

    Raises:
        DistributedTransitionError: As for `sleep`.
        InvalidArgumentError: As for `sleep`.
    """

    def plan(allocator: CuMemAllocator) -> list[_Step]:
        return _wake_steps(allocator, tags)

    return _transition("wake_up", group, allocator, plan, timeout)


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

    Args:
        group: As for `sleep`.
        tags: The tags; ranks need not name the same.
        allocator: As for `sleep`.
        timeout: As for `sleep`.

    Returns:
        The reports of all ranks.

    Raises:
        DistributedTransitionError: As for `sleep`.
        InvalidArgumentError: As for `sleep`.
    """

    def plan(allocator: CuMemAllocator) -> list[_Step]:
        return _discard_steps(allocator, tags)

    return _transition("discard", group, allocator, plan, timeout)


# ---- what a rank does locally


@dataclass(frozen=True, slots=True)
class _Step:
    """One local transition and its way back."""

    run: Callable[[], TransitionReport]
    undo: Callable[[], object]
    undone: Callable[[], bool]
    lost_tags: tuple[str, ...] = ()  # whose contents the way back does not bring


def _none(allocator: CuMemAllocator, tags: Iterable[str], state: str) -> bool:
    """Whether no allocation of the tags is ``"awake"``, or is ``"asleep"``."""
    known = allocator.stats().tags
    return not any(_counts(known[tag])[state] for tag in tags if tag in known)


def _counts(tag: Any) -> dict[str, int]:
    asleep = tag.backed_up_allocations + tag.discarded_allocations
    return {"awake": tag.awake_allocations, "asleep": asleep}


def _check_known(operation: str, allocator: CuMemAllocator, tags: Iterable[str]) -> None:
    for tag in tags:
        allocator._tags.check_known(tag, operation)


def _whole(operation: str, allocator: CuMemAllocator, tags: Iterable[str], state: str) -> list[str]:
    """Those of the tags that have something in a state, all of which must be.

    A way back works on whole tags: from a tag of which only a part slept, it would wake too much.
    """
    known = allocator.stats().tags
    chosen = []
    for tag in tags:
        if tag not in known or not (counts := _counts(known[tag]))[state]:
            continue
        if min(counts.values()):
            raise InUseError(
                f"{operation}: tag {tag!r} is partly awake ({counts['awake']} allocations) and "
                f"partly asleep ({counts['asleep']}), and what changes could not be undone; call "
                "sleep() or wake_up() of the allocator first",
                operation=operation,
                tag=tag,
            )
        chosen.append(tag)
    return chosen


def _refuse_pinned(operation: str, allocator: CuMemAllocator, tags: Iterable[str]) -> None:
    """Looks for what would refuse a discard, before another rank has discarded anything."""
    known = allocator.stats().tags
    refuse_open_scopes(allocator, operation, tags)
    for tag in tags:
        if known[tag].pins or known[tag].backing == "cuda_malloc":
            why = f"has {known[tag].pins} pins" if known[tag].pins else "is of cudaMalloc memory"
            raise InUseError(
                f"{operation}: tag {tag!r} {why} and cannot sleep", operation=operation, tag=tag
            )


def _losing(allocator: CuMemAllocator, tags: Iterable[str]) -> tuple[str, ...]:
    """Those of some awake tags that have contents which a discard does not preserve."""
    known = allocator.stats().tags
    return tuple(tag for tag in tags if known[tag].awake_bytes > known[tag].preserved_bytes)


def _sleep_steps(allocator: CuMemAllocator, actions: Mapping[str, int]) -> list[_Step]:
    """What can be undone comes first: discarding is for when all ranks have come so far."""
    keep = [tag for tag, action in actions.items() if action == OFFLOAD]
    drop = [tag for tag, action in actions.items() if action == DISCARD]
    steps = [_sleep_step(allocator, keep, keep)] if keep else []
    return [*steps, _sleep_step(allocator, drop, [])] if drop else steps


def _sleep_step(allocator: CuMemAllocator, tags: list[str], kept: list[str]) -> _Step:
    _check_known("sleep", allocator, tags)
    touched = _whole("sleep", allocator, tags, "awake")
    if not kept:
        _refuse_pinned("sleep", allocator, touched)
    return _Step(
        run=lambda: allocator.sleep(kept, tags=tags),
        undo=lambda: allocator.wake_up(touched),
        undone=lambda: _none(allocator, touched, "asleep"),
        lost_tags=() if kept else _losing(allocator, touched),
    )


def _wake_steps(allocator: CuMemAllocator, tags: Sequence[str] | str | None) -> list[_Step]:
    known = allocator.stats().tags
    named = list(known) if tags is None else [tags] if isinstance(tags, str) else list(tags)
    _check_known("wake_up", allocator, named)
    touched = _whole("wake_up", allocator, named, "asleep")
    # What was preserved inside a discarded tag is backed up again whatever is done with the tag.
    backed_up = {i.tag for i in allocator.snapshot() if i.state == "backed_up" and not i.preserved}
    kept = [tag for tag in touched if tag in backed_up]
    return [
        _Step(
            run=lambda: allocator.wake_up(named),
            undo=lambda: allocator.sleep(kept, tags=touched),
            undone=lambda: _none(allocator, touched, "awake"),
        )
    ]


def _discard_steps(allocator: CuMemAllocator, tags: Sequence[str] | str) -> list[_Step]:
    named = [tags] if isinstance(tags, str) else list(tags)
    _check_known("discard", allocator, named)
    known = allocator.stats().tags
    touched = _whole("discard", allocator, named, "awake")
    _refuse_pinned("discard", allocator, touched)
    backed_up = [tag for tag in named if known[tag].backed_up_bytes > known[tag].preserved_bytes]
    return [
        _Step(
            run=lambda: allocator.discard(named),
            undo=lambda: allocator.wake_up(touched),
            undone=lambda: _none(allocator, touched, "asleep"),
            lost_tags=(*_losing(allocator, touched), *backed_up),
        )
    ]


# ---- how ranks meet


class _StoreLostError(Exception):
    """The store does not answer, or fails."""


class _Channel(contextlib.AbstractContextManager["_Channel"]):
    """A store, no call of which takes longer than `patience` seconds.

    Calls are made in a thread of their own: a store whose host is cut off keeps them for ever.
    """

    def __init__(self, store: Store, prefix: str, patience: float) -> None:
        self._store = store
        self._prefix = prefix
        self._patience = patience
        self._lost = ""
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._calls = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="cumempool-store", daemon=True).start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            future, work = call
            try:
                future.set_result(work())
            except (RuntimeError, ValueError, OSError) as error:
                future.set_exception(error)

    def _call(self, what: str, work: Callable[[], _T]) -> _T:
        if self._lost:
            raise _StoreLostError(self._lost)
        future: Future[_T] = Future()
        self._calls.put((future, work))
        try:
            return future.result(self._patience)
        except FutureTimeoutError:
            self._lost = f"the group's store did not answer a {what} in {self._patience:g} s"
        except (RuntimeError, ValueError, OSError) as error:
            self._lost = f"the group's store failed in a {what}: {error}"
        raise _StoreLostError(self._lost)

    def put(self, key: str, value: object) -> None:
        """Writes a value, as JSON."""
        text = json.dumps(value)
        self._call("set", lambda: self._store.set(self._prefix + key, text))

    def has(self, keys: Sequence[str]) -> bool:
        """Whether all the keys are there."""
        names = [self._prefix + key for key in keys]
        return bool(self._call("check", lambda: self._store.check(names)))

    def get(self, key: str) -> Any:
        """The value of a key that is there."""
        return json.loads(self._call("get", lambda: self._store.get(self._prefix + key)))

    def first(self, key: str, value: object) -> Any:
        """Writes a value where there is none yet; returns what is there then."""
        return self.exchange(key, None, value)

    def exchange(self, key: str, expected: object, value: object) -> Any:
        """Writes a value in place of the expected one (None: of none); returns what is there."""
        before = "" if expected is None else json.dumps(expected)
        after = json.dumps(value)
        name = self._prefix + key
        return json.loads(
            self._call("compare_set", lambda: self._store.compare_set(name, before, after))
        )

    def drop(self, keys: Iterable[str]) -> None:
        """Deletes keys."""
        for key in keys:
            self._call("delete", partial(self._store.delete_key, self._prefix + key))


class _AbortedError(Exception):
    """The group does not make this transition."""


@dataclass
class _Round:
    """One transition of a group, as one rank sees it.

    Rounds are numbered in the store. Whoever comes after a round was decided begins the next one,
    so that ranks that came too late, or were restarted, meet the others again.
    """

    channel: _Channel
    rank: int
    size: int
    operation: str
    timeout: float
    number: int = 0
    failures: dict[int, str] = field(default_factory=dict)
    unanswered: set[int] = field(default_factory=set)
    done: list[_Step] = field(default_factory=list)
    reports: list[TransitionReport] = field(default_factory=list)
    cause: BaseException | None = None
    secondary: list[str] = field(default_factory=list)

    # ---- the way there

    def run(self, plan: Callable[[], list[_Step]]) -> dict[int, TransitionReport]:
        """Goes through all phases; returns the reports of all ranks.

        Raises:
            DistributedTransitionError: It was not made, and was undone here.
        """
        try:
            return self._all_or_none(plan)
        except _AbortedError:
            raise self._error(self._leave()) from self._take_cause()
        except _StoreLostError as error:
            self.failures.setdefault(self.rank, f"{error}; what the others did is not known here")
            raise self._error({self.rank: self._undo()}) from (self._take_cause() or error)
        except BaseException:  # such as the user's Ctrl-C while this rank waits
            self._give_up("was interrupted")
            raise

    def _all_or_none(self, plan: Callable[[], list[_Step]]) -> dict[int, TransitionReport]:
        steps = self._planned(plan)
        self._find_number()
        arrived = self._gather("here", {"operation": self.operation, "steps": len(steps)})
        self._check_operations(arrived)
        if self.number:
            self.channel.drop(self._own_keys(self.number - 1))
        for stage in range(max(answer["steps"] for answer in arrived.values())):
            if stage < len(steps):
                self._run_step(steps[stage])
            last = [_to_json(report) for report in self.reports]
            votes = self._gather(f"vote{stage}", {"reports": last})
        if not self._decide({"commit": True})["commit"]:
            raise _AbortedError
        if not any(answer["steps"] for answer in arrived.values()):
            return {rank: _joined(self.operation, []) for rank in arrived}
        return {rank: _joined(self.operation, vote["reports"]) for rank, vote in votes.items()}

    def _planned(self, plan: Callable[[], list[_Step]]) -> list[_Step]:
        try:
            return plan()
        except Exception as error:  # told to all ranks, and raised from
            _logger.debug("%s: this rank cannot take part", self.operation, exc_info=True)
            self._failed(error)
            return []

    def _run_step(self, step: _Step) -> None:
        try:
            self.reports.append(step.run())
        except Exception as error:  # told to all ranks, and raised from; hooks raise anything
            _logger.debug("%s failed on this rank", self.operation, exc_info=True)
            self._failed(error)
            if not step.undone():  # the allocator could not undo all of it either
                self.done.append(step)
        else:
            self.done.append(step)

    def _failed(self, error: Exception) -> None:
        self.cause = error
        self.failures[self.rank] = f"{type(error).__name__}: {error}"

    def _take_cause(self) -> BaseException | None:
        """What this rank failed with; not kept, since the frames of it know this object."""
        cause, self.cause = self.cause, None
        return cause

    def _find_number(self) -> None:
        """The round that is open."""
        self.number = int(self.channel.first("round", 0))
        while self.channel.has([f"{self.number}/decision"]):
            self._begin_next()
            self.number = int(self.channel.first("round", 0))

    def _begin_next(self) -> None:
        self.channel.exchange("round", self.number, self.number + 1)

    def _gather(self, phase: str, answer: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Tells the others, and waits until all have told.

        Raises:
            _AbortedError: One has failed, or has told nothing in time, or the others gave up.
        """
        answer["failure"] = self.failures.get(self.rank)
        self.channel.put(self._key(phase, self.rank), answer)
        made, missing = True, []
        if not self._wait(phase, range(self.size), f"{self.number}/decision"):
            missing = self._missing(phase, range(self.size))
            made = self._decide({"commit": False, "unanswered": missing})["commit"]
        answers = self._answers(phase, set(range(self.size)) - set(missing))
        self._note_failures(answers)
        if self.failures:
            made = self._decide({"commit": False})["commit"]
        if not made:
            raise _AbortedError
        return answers

    def _check_operations(self, arrived: Mapping[int, dict[str, Any]]) -> None:
        """Refuses a round in which ranks want different things; all of them see the same."""
        wanted = {rank: str(answer["operation"]) for rank, answer in arrived.items()}
        if len(set(wanted.values())) > 1:
            for rank, operation in wanted.items():
                self.failures[rank] = f"called {operation}(), which is not what all others called"
            self._decide({"commit": False})
            raise _AbortedError

    def _decide(self, decision: dict[str, Any]) -> dict[str, Any]:
        """Decides the round, unless that was done; returns what was decided, once and for all."""
        made: dict[str, Any] = self.channel.first(f"{self.number}/decision", decision)
        with contextlib.suppress(_StoreLostError):  # whoever comes next does it
            self._begin_next()
        return made

    # ---- the way back

    def _leave(self) -> dict[int, RankState]:
        """Undoes what was done here, and hears how the others fared."""
        state = self._undo()
        try:
            decision = self.channel.get(f"{self.number}/decision")
            self.unanswered.update(decision.get("unanswered", ()))
            self.channel.put(self._key("end", self.rank), self._end(state))
            others = sorted(set(range(self.size)) - self.unanswered - {self.rank})
            if not self._wait("end", others, None):
                self.unanswered.update(self._missing("end", others))
            ends = self._answers("end", set(others) - self.unanswered)
        except _StoreLostError as error:
            self.secondary.append(str(error))
            return {self.rank: state}
        self._note_failures(ends)
        self.unanswered.discard(self.rank)
        self.secondary += [text for end in ends.values() for text in end["secondary"]]
        return {self.rank: state, **{rank: end["state"] for rank, end in ends.items()}}

    def _give_up(self, why: str) -> None:
        """Leaves on an exception that is none of ours: aborts, unless all have agreed before."""
        self.failures[self.rank] = why
        made = False
        with contextlib.suppress(_StoreLostError):
            made = self._decide({"commit": False})["commit"]
        if not made:
            state = self._undo()
            with contextlib.suppress(_StoreLostError):
                self.channel.put(self._key("end", self.rank), self._end(state))

    def _end(self, state: RankState) -> dict[str, Any]:
        failure = self.failures.get(self.rank)
        return {"failure": failure, "state": state, "secondary": self.secondary}

    def _undo(self) -> RankState:
        """Takes back what was done here, last first; says what state that leaves."""
        for step in reversed(self.done):
            try:
                step.undo()
            except Exception as error:  # told to all ranks: the others go on with theirs
                _logger.debug("%s could not be undone", self.operation, exc_info=True)
                self.secondary.append(f"rank {self.rank}: {type(error).__name__}: {error}")
        if not all(step.undone() for step in self.done):
            return "not_undone"
        return "contents_lost" if self._lost_tags() else "unchanged"

    def _lost_tags(self) -> tuple[str, ...]:
        return tuple(tag for step in self.done for tag in step.lost_tags)

    def _error(self, states: Mapping[int, RankState]) -> DistributedTransitionError:
        failures = dict(sorted(self.failures.items()))
        unanswered = tuple(sorted(self.unanswered))
        advice = "see to the ranks that are named, then repeat the call on all"
        lines = [f"{self.operation} was made on none of {self.size} ranks"]
        lines += [f"rank {rank}: {reason}" for rank, reason in failures.items()]
        if unanswered:
            names = ", ".join(map(str, unanswered))
            lines.append(f"no answer within {self.timeout:g} s from rank {names}")
        if not failures and not unanswered:
            lines.append("the others had given up when this rank came")
        stuck = [rank for rank, state in sorted(states.items()) if state == "not_undone"]
        if stuck:
            lines.append(
                f"rank {', '.join(map(str, stuck))} could not go back, and is in between: "
                "wake_up() or sleep() of its allocator takes it on"
            )
        lost = self._lost_tags()
        if lost:
            lines.append(f"contents are lost here of {', '.join(map(repr, lost))}")
        return DistributedTransitionError(
            "; ".join([*lines, *self.secondary, advice]),
            operation=self.operation,
            rank=self.rank,
            failures=failures,
            unanswered=unanswered,
            states=dict(sorted(states.items())),
            lost_tags=lost,
            secondary=tuple(self.secondary),
            advice=advice,
        )

    # ---- keys

    def _key(self, phase: str, rank: int) -> str:
        return f"{self.number}/{phase}/{rank}"

    def _own_keys(self, number: int) -> list[str]:
        """What this rank may have written in a round that nobody reads any more."""
        phases = ("here", "vote0", "vote1", "end")
        keys = [f"{number}/{phase}/{self.rank}" for phase in phases]
        return [*keys, f"{number}/decision"] if self.rank == 0 else keys

    def _wait(self, phase: str, ranks: Sequence[int], decision: str | None) -> bool:
        """Whether all have told in time; ends early where a decision was made without."""
        keys = [self._key(phase, rank) for rank in ranks]
        if not keys:
            return True
        deadline = time.monotonic() + self.timeout
        pause = _FIRST_PAUSE
        while not self.channel.has(keys):
            left = deadline - time.monotonic()
            if left <= 0 or (decision is not None and self.channel.has([decision])):
                return False
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, _LONGEST_PAUSE)
        return True

    def _missing(self, phase: str, ranks: Iterable[int]) -> list[int]:
        return [rank for rank in ranks if not self.channel.has([self._key(phase, rank)])]

    def _answers(self, phase: str, ranks: Iterable[int]) -> dict[int, dict[str, Any]]:
        return {rank: self.channel.get(self._key(phase, rank)) for rank in sorted(ranks)}

    def _note_failures(self, answers: Mapping[int, dict[str, Any]]) -> None:
        for rank, answer in answers.items():
            if answer["failure"] is not None:
                self.failures[rank] = str(answer["failure"])


def _transition(
    operation: str,
    group: ProcessGroup | StoreGroup | None,
    allocator: CuMemAllocator | None,
    plan: Callable[[CuMemAllocator], list[_Step]],
    timeout: float,
) -> GroupReport:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise InvalidTypeError(f"timeout is a number of seconds, not {timeout!r}")
    if not 0 < timeout < math.inf:
        raise InvalidArgumentError(f"timeout={timeout} is not a number of seconds above 0")
    members = group if isinstance(group, StoreGroup) else _members(group)
    begun = time.monotonic()

    def planned() -> list[_Step]:
        chosen = CuMemAllocator.get_instance() if allocator is None else allocator
        with chosen._transitions.turn(operation):  # a wake in the background ends before
            pass
        return plan(chosen)

    prefix = f"cumempool/{members.name}/"
    with _Channel(members.store, prefix, min(timeout, _STORE_PATIENCE)) as channel:
        made = _Round(channel, members.rank, members.size, operation, timeout).run(planned)
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


# ---- reports on their way between ranks

_TAG_FIELDS: Final = tuple(part.name for part in fields(TagReport))


def _to_json(report: TransitionReport) -> dict[str, Any]:
    return {
        "seconds": report.seconds,
        "tags": [
            {name: getattr(tag, name) for name in _TAG_FIELDS} for tag in report.tags.values()
        ],
        "overrides": dict(report.overrides),
        "problems": list(report.problems),
    }


def _joined(operation: str, parts: Iterable[Mapping[str, Any]]) -> TransitionReport:
    """One report from those of the steps, which concern different tags."""
    tags: dict[str, TagReport] = {}
    overrides: dict[str, str] = {}
    problems: list[str] = []
    seconds = 0.0
    for part in parts:
        seconds += float(part["seconds"])
        for raw in part["tags"]:
            tags[raw["tag"]] = TagReport(**{**raw, "devices": tuple(raw["devices"])})
        overrides.update(part["overrides"])
        problems += part["problems"]
    return TransitionReport(operation, seconds, tags, overrides, tuple(problems))
