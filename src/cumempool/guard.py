"""Guards memory that somebody has registered elsewhere: hooks around transitions, ranges, pins."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from cumempool.errors import CumempoolError, InvalidTypeError, TransitionInProgressError

__all__ = [
    "Arrival",
    "Hook",
    "HookRegistration",
    "Hooks",
    "Pin",
    "RegistrableRange",
    "Transitions",
]

_logger = logging.getLogger("cumempool")


@dataclass(frozen=True, slots=True)
class RegistrableRange:
    """One awake allocation: a range that lies inside one handle.

    Attributes:
        address: Its start.
        bytes: Its size.
        device: Device ordinal.
        generation: Grows at each wake; a registration made under another generation is stale.
    """

    address: int
    bytes: int
    device: int
    generation: int


Hook = Callable[[str, Sequence[RegistrableRange]], object]
"""Called with a tag and the ranges concerned."""

Ranges = Mapping[str, Sequence[RegistrableRange]]


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    tag: str
    before_unmap: Hook | None
    after_map: Hook | None


class HookRegistration(contextlib.AbstractContextManager["HookRegistration"]):
    """Hooks that were registered; `remove` takes them out, and so does leaving the context."""

    def __init__(self, hooks: Hooks, entry: _Entry) -> None:
        self._hooks = hooks
        self._entry = entry

    def remove(self) -> None:
        """Takes the hooks out. Doing it twice is no error."""
        self._hooks._remove(self._entry)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


class Hooks:
    """The hooks of one allocator, called in the order of their registration. Thread-safe."""

    def __init__(self) -> None:
        # The garbage collector may end a wake, and call hooks, anywhere: also where it is held.
        self._lock = threading.RLock()
        self._entries: list[_Entry] = []

    def register(
        self, tag: str, before_unmap: Hook | None, after_map: Hook | None
    ) -> HookRegistration:
        """Adds a pair of hooks for a tag; either may be None.

        Raises:
            InvalidTypeError: One of them cannot be called.
        """
        for name, hook in (("before_unmap", before_unmap), ("after_map", after_map)):
            if hook is not None and not callable(hook):
                raise InvalidTypeError(f"{name} is something to call or None, not {hook!r}")
        entry = _Entry(tag, before_unmap, after_map)
        with self._lock:
            self._entries.append(entry)
        return HookRegistration(self, entry)

    def _remove(self, entry: _Entry) -> None:
        with self._lock:
            if entry in self._entries:
                self._entries.remove(entry)

    def _of(self, tags: Ranges) -> list[_Entry]:
        with self._lock:
            return [entry for entry in self._entries if tags.get(entry.tag)]

    def tags(self) -> set[str]:
        """Tags that have hooks."""
        if not self._entries:
            return set()
        with self._lock:
            return {entry.tag for entry in self._entries}

    def _before_unmap(self, ranges: Ranges) -> list[_Entry]:
        """Calls the hooks of tags whose memory is about to go; returns those that were called.

        Where one raises, those that ran before it get their ranges back by `after_map`, and the
        exception goes on, with their own failures as notes.
        """
        ran: list[_Entry] = []
        try:
            for entry in self._of(ranges):
                if entry.before_unmap is not None:
                    entry.before_unmap(entry.tag, ranges[entry.tag])
                    ran.append(entry)
        except BaseException as error:
            _note(error, self._call_after(ran, ranges))
            raise
        return ran

    def after_map(self, ranges: Ranges) -> list[str]:
        """Calls the hooks of tags whose memory is there (again); returns what failed, as texts."""
        return self._call_after(self._of(ranges), ranges)

    def _call_after(self, entries: Sequence[_Entry], ranges: Ranges) -> list[str]:
        problems: list[str] = []
        for entry in entries:
            if entry.after_map is None or not ranges.get(entry.tag):
                continue
            try:
                entry.after_map(entry.tag, ranges[entry.tag])
            except Exception as error:  # whatever a stranger's code raises: the memory is awake
                _logger.exception("an after_map hook of tag %r failed", entry.tag)
                problems.append(
                    f"an after_map hook of tag {entry.tag!r} failed: "
                    f"{type(error).__name__}: {error}"
                )
        return problems

    @contextlib.contextmanager
    def departing(self, ranges: Ranges, ranges_now: Callable[[], Ranges]) -> Iterator[None]:
        """Calls ``before_unmap`` hooks, and their ``after_map`` where the body fails.

        Args:
            ranges: What is about to go.
            ranges_now: What is there after a failure.
        """
        ran = self._before_unmap(ranges)
        try:
            yield
        except BaseException as error:
            _note(error, self._call_after(ran, ranges_now()))
            raise


def _note(error: BaseException, problems: Sequence[str]) -> None:
    if hasattr(error, "add_note"):  # Python 3.11
        for problem in problems:
            error.add_note(f"cumempool: {problem}")


class Pin(contextlib.AbstractContextManager["Pin"]):
    """Forbids that memory of a tag goes to sleep, until `release` or the end of the context.

    Dropping it takes nothing off: a registration does not end by being forgotten.

    Attributes:
        tag: The tag.
        holder: Who has pinned it.
    """

    def __init__(self, tag: str, holder: str, release: Callable[[], None]) -> None:
        self.tag: Final = tag
        self.holder: Final = holder
        self._lock = threading.RLock()  # the garbage collector may come here as well
        self._release: Callable[[], None] | None = release

    @property
    def released(self) -> bool:
        """Whether it was taken off."""
        return self._release is None

    def release(self) -> None:
        """Takes the pin off. Doing it twice is no error."""
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class Arrival:
    """A wake under way, and the hooks that it owes when it has ended.

    Args:
        wait: Waits for its end; raises what it failed with.
        call: Calls the hooks; returns what failed, as texts.
    """

    def __init__(self, wait: Callable[[], object], call: Callable[[], list[str]]) -> None:
        self._wait = wait
        self._call = call
        self.settled = False
        self.problems: list[str] = []

    def _settle(self) -> None:
        try:
            self._wait()
            self.problems = self._call()
        except CumempoolError as error:  # nothing woke; whoever has the handle is told
            _logger.debug("a wake in the background has failed: %s", error)
        finally:
            self.settled = True


class Transitions:
    """Lets one transition with its hooks through at a time; hooks cannot start another.

    Before each of them, the hooks of wakes that went on in the background are called.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._arrivals: list[Arrival] = []
        _live.add(self)

    @contextlib.contextmanager
    def turn(self, operation: str) -> Iterator[None]:
        """Waits for the transition of another thread, and for wakes in the background.

        Raises:
            TransitionInProgressError: The calling thread is inside one itself.
        """
        if self._owner == threading.get_ident():
            raise TransitionInProgressError(
                f"{operation}: called from inside a transition of the same allocator, or from one "
                "of its hooks; call it after that has returned",
                operation=operation,
                advice="call it after that has returned",
            )
        with self._lock, self._owning():
            yield

    def expect(self, arrival: Arrival) -> None:
        """Adds a wake that goes on; called inside a turn."""
        self._arrivals.append(arrival)

    def settle(self, arrival: Arrival) -> list[str]:
        """Sees to it that the hooks of a wake have been called; returns what failed, as texts.

        Raises:
            TransitionInProgressError: Called from one of those hooks.
        """
        if not arrival.settled:
            with self.turn("wake_up"):
                pass
        return arrival.problems

    def settle_soon(self) -> None:
        """As `settle` for all, but where another thread has its turn: the next turn does it."""
        if self._lock.acquire(blocking=False):
            try:
                with self._owning():
                    pass
            finally:
                self._lock.release()

    @contextlib.contextmanager
    def _owning(self) -> Iterator[None]:
        self._owner = threading.get_ident()
        try:
            while self._arrivals:
                self._arrivals.pop(0)._settle()
            yield
        finally:
            self._owner = None

    def _forked(self) -> None:
        self._lock = threading.Lock()  # the thread that had it is not in this process
        self._owner = None
        self._arrivals = []


_live: Final[weakref.WeakSet[Transitions]] = weakref.WeakSet()


def _after_fork() -> None:
    for transitions in _live:
        transitions._forked()


os.register_at_fork(after_in_child=_after_fork)
