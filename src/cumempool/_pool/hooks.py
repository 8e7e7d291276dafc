"""Guards memory that is registered elsewhere: hooks around transitions, ranges, pins."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from cumempool._locks import fork_safe_lock
from cumempool.errors import CumempoolError, InvalidTypeError, TransitionInProgressError

if TYPE_CHECKING:
    from cumempool import _core
    from cumempool._pool.stats import AllocationInfo

_logger = logging.getLogger("cumempool")


@dataclass(frozen=True, slots=True)
class RegistrableRange:
    """One awake allocation: a range that lies inside one handle.

    Attributes:
        address: Its start.
        bytes: Its size.
        device: Device ordinal.
        generation: Grows at each wake. A registration made at an older generation is stale.
    """

    address: int
    bytes: int
    device: int
    generation: int


def ranges_by_tag(infos: Iterable[AllocationInfo]) -> dict[str, list[RegistrableRange]]:
    """Groups allocations by tag, as ranges."""
    ranges: dict[str, list[RegistrableRange]] = {}
    for info in infos:
        ranges.setdefault(info.tag, []).append(
            RegistrableRange(info.address, info.bytes, info.device, info.generation)
        )
    return ranges


_T = TypeVar("_T")

Hook = Callable[[str, Sequence[RegistrableRange]], object]
"""Called with a tag and the ranges concerned."""

Ranges = Mapping[str, Sequence[RegistrableRange]]


class HookRegistration(contextlib.AbstractContextManager["HookRegistration"]):
    """A pair of registered hooks; `remove` or the end of the context removes them."""

    def __init__(
        self, hooks: Hooks, tag: str, before_unmap: Hook | None, after_map: Hook | None
    ) -> None:
        self._hooks, self._tag = hooks, tag
        self._before_unmap, self._after_map = before_unmap, after_map

    def remove(self) -> None:
        """Removes the hooks. Repeating it is no error."""
        self._hooks._remove(self)

    def __exit__(self, *_: object) -> None:
        self.remove()


class Hooks:
    """The hooks of one allocator, called in the order of their registration. Thread-safe."""

    def __init__(self) -> None:
        self._lock = fork_safe_lock()
        self._entries: list[HookRegistration] = []

    def register(
        self, tag: str, before_unmap: Hook | None, after_map: Hook | None
    ) -> HookRegistration:
        """Adds a pair of hooks for a tag; either may be None."""
        for name, hook in (("before_unmap", before_unmap), ("after_map", after_map)):
            if hook is not None and not callable(hook):
                raise InvalidTypeError(f"{name} must be callable or None, not {hook!r}")
        entry = HookRegistration(self, tag, before_unmap, after_map)
        with self._lock:
            self._entries.append(entry)
        return entry

    def _remove(self, entry: HookRegistration) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._entries.remove(entry)

    def _of(self, tags: Ranges) -> list[HookRegistration]:
        with self._lock:
            return [entry for entry in self._entries if tags.get(entry._tag)]

    def tags(self) -> set[str]:
        """Returns the tags that have hooks."""
        if not self._entries:
            return set()
        with self._lock:
            return {entry._tag for entry in self._entries}

    def yielding(self) -> set[str]:
        """Returns the tags with a ``before_unmap`` hook, which may release pins before a sleep."""
        with self._lock:
            return {entry._tag for entry in self._entries if entry._before_unmap is not None}

    def owed(self, ranges: Ranges) -> list[Owed]:
        """Returns the ``after_map`` calls to make for mapped ranges, for `tell`."""
        return _owed(self._of(ranges), ranges)


class Departing(contextlib.AbstractContextManager[None]):
    """Calls ``before_unmap`` hooks of departing memory, and ``after_map`` if the body fails.

    If a hook or the body raises, the hooks that ran get their ranges back by ``after_map``. The
    exception goes on, with failures of those calls as notes. `ranges_now` returns the ranges that
    are mapped then. It is no generator: if an interrupt struck before the first ``yield``
    returned, the generator would end only when it is dropped, which is too late.
    """

    def __init__(self, hooks: Hooks, ranges: Ranges, ranges_now: Callable[[], Ranges]) -> None:
        self._hooks = hooks
        self._ranges = ranges
        self._ranges_now = ranges_now
        self._ran: list[HookRegistration] = []

    def __enter__(self) -> None:
        try:
            for entry in self._hooks._of(self._ranges):
                if entry._before_unmap is not None:
                    entry._before_unmap(entry._tag, self._ranges[entry._tag])
                    self._ran.append(entry)
        except BaseException as error:
            self._undo(error, self._ranges)
            raise

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            self._undo(error, self._ranges_now())

    def _undo(self, error: BaseException, ranges: Ranges) -> None:
        problems = tell(_owed(self._ran, ranges))
        if hasattr(error, "add_note"):  # Python 3.11
            for problem in problems:
                error.add_note(f"cumempool: {problem}")


Owed = tuple[str, Hook, Sequence[RegistrableRange]]
"""A tag, its ``after_map`` hook, and the ranges to call it with."""


def _owed(entries: Sequence[HookRegistration], ranges: Ranges) -> list[Owed]:
    return [
        (entry._tag, entry._after_map, ranges[entry._tag])
        for entry in entries
        if entry._after_map is not None and ranges.get(entry._tag)
    ]


def tell(owed: list[Owed], problems: list[str] | None = None) -> list[str]:
    """Calls ``after_map`` hooks, each removed from `owed` first; adds failures to `problems`.

    A hook that raises is no failure of the wake: the memory is awake. An exception that is no
    `Exception`, such as the end of the program, goes on after all hooks were called. If an
    interrupt strikes between two hooks, a later call can handle the rest of `owed`.
    """
    problems = [] if problems is None else problems
    last: BaseException | None = None
    while owed:
        tag, hook, ranges = owed[0]
        try:
            del owed[0]
            hook(tag, ranges)
        except Exception as error:  # a user's hook may raise anything: the memory is awake
            _logger.exception("an after_map hook of tag %r failed", tag)
            problems.append(
                f"an after_map hook of tag {tag!r} failed: {type(error).__name__}: {error}"
            )
        except BaseException as error:  # noqa: BLE001 -- goes on after all hooks were called
            last = last or error
    if last is not None:
        raise last
    return problems


class Pin(contextlib.AbstractContextManager["Pin"]):
    """Keeps memory of a tag awake until `release` or the end of the context.

    Dropping the object does not release the pin, because it does not end the registration.

    Attributes:
        tag: The tag.
        holder: The name of the pin's owner.
    """

    def __init__(self, tag: str, holder: str, release: Callable[[], None]) -> None:
        self.tag: Final = tag
        self.holder: Final = holder
        self._lock = fork_safe_lock()
        self._release: Callable[[], None] | None = release

    @property
    def released(self) -> bool:
        """Whether it was released."""
        return self._release is None

    def release(self) -> None:
        """Releases the pin. Repeating it is no error."""
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release()

    def __exit__(self, *_: object) -> None:
        self.release()


def pin_tag(core: _core.Allocator, tag: str, holder: str) -> Pin:
    """Pins a tag under the holder's name."""
    number = core.pin(tag, holder)
    return Pin(tag, holder, lambda: core.unpin(number))


class Arrival:
    """A wake under way, and the hooks to call when it has ended."""

    def __init__(self, wait: Callable[[], object], owed: Callable[[], list[Owed]]) -> None:
        self._wait = wait
        self._find = owed
        self._owed: list[Owed] | None = None
        self.problems: list[str] = []
        self.settled = False

    def _settle(self) -> None:
        """Waits, then calls the hooks. Can be repeated after an interrupt."""
        if self._owed is None:
            try:
                self._wait()
                self._owed = self._find()
            except CumempoolError as error:  # nothing woke; the handle reports it
                _logger.debug("a wake in the background has failed: %s", error)
                self._owed = []
        tell(self._owed, self.problems)
        self.settled = True  # only after the last hook has returned: a hook may ask


class Transitions:
    """Lets one transition with its hooks through at a time; hooks cannot start another.

    Each turn first calls the hooks of wakes that ran in the background.

    An interrupt may strike between any two calls. The only state to undo is therefore the lock: it
    knows its owner, and its C-implemented ``__exit__`` runs no Python code.
    """

    def __init__(self) -> None:
        self._lock = fork_safe_lock()
        self._arrivals: list[Arrival] = []
        _live.add(self)

    def turn(self, operation: str) -> Turn:
        """Returns a turn, which waits for other threads' transitions and background wakes."""
        return Turn(self, operation)

    def expect(self, arrival: Arrival) -> None:
        """Adds a wake that goes on in the background; called inside a turn."""
        self._arrivals.append(arrival)

    def arriving(
        self, wake: Callable[[], _T], owed: Callable[[], list[Owed]]
    ) -> tuple[_T, list[str]]:
        """Wakes, then calls hooks; called inside a turn.

        If an interrupt strikes between the two, the next turn calls the hooks.

        Returns:
            The result of `wake`, and the failures of hooks, as texts.
        """
        arrival = Arrival(lambda: None, owed)
        self.expect(arrival)
        woken = wake()
        self._settle_all()
        return woken, arrival.problems

    def settle(self, arrival: Arrival) -> list[str]:
        """Makes sure that the hooks of a wake were called; returns their failures, as texts."""
        if not arrival.settled:
            with self.turn("wake_up"):
                pass
        return arrival.problems

    def settle_soon(self) -> None:
        """As `settle` for all wakes; if another thread has its turn, leaves it to the next turn."""
        if self._is_mine():
            return
        try:
            if self._lock.acquire(blocking=False):
                self._settle_all()
        finally:
            if self._is_mine():
                self._lock.release()

    def _is_mine(self) -> bool:
        """Whether the calling thread is inside a turn."""
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]  # conditions use it too

    def _settle_all(self) -> None:
        while self._arrivals:
            self._arrivals[0]._settle()  # if interrupted, the next turn repeats it
            del self._arrivals[0]

    def _forked(self) -> None:
        self._lock = fork_safe_lock()  # not held, even if a hook forked
        self._arrivals = []


class Turn:
    """One turn of `Transitions`, as a context manager."""

    def __init__(self, transitions: Transitions, operation: str) -> None:
        self._transitions = transitions
        self._operation = operation
        # The lock's own method, looked up before entering: an interrupt could stop a Python
        # function before it releases the lock.
        self._leave = transitions._lock.__exit__

    def __enter__(self) -> None:
        transitions = self._transitions
        if transitions._is_mine():
            raise TransitionInProgressError(
                f"{self._operation}: called from inside a transition of the same allocator, or "
                "from one of its hooks",
                operation=self._operation,
                advice="call it after that has returned",
            )
        try:
            transitions._lock.acquire()
            transitions._settle_all()
        except BaseException:
            if transitions._is_mine():
                transitions._lock.release()
            raise

    @property
    def __exit__(self) -> Callable[..., None]:
        """The lock's ``__exit__``."""
        return self._leave


_live: Final[weakref.WeakSet[Transitions]] = weakref.WeakSet()


def _after_fork() -> None:
    for transitions in _live:
        transitions._forked()


os.register_at_fork(after_in_child=_after_fork)
