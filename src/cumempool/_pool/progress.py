"""Reports the progress of long transitions: to a callback, or on a terminal."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from cumempool._locks import fork_safe_lock
from cumempool._pool.checks import check_seconds
from cumempool._pool.report import format_bytes
from cumempool._pool.unfailing import unfailing
from cumempool.errors import InvalidArgumentError, InvalidTypeError

OnProgress = Callable[[str, int, int], object]
"""Called with the operation, the bytes done, and the total bytes, from a thread of its own."""

_EVERY: Final = 0.1  # seconds between two calls


class ProgressRegistration(contextlib.AbstractContextManager["ProgressRegistration"]):
    """A registered callback; `remove` or the end of the context removes it."""

    def __init__(
        self,
        watch: ProgressWatch,
        callback: OnProgress,
        after: float,
        ended: Callable[[], object] | None,
    ) -> None:
        self._watch = watch
        self.callback: Final = callback
        self.after: Final = after
        self.ended: Final = ended

    def remove(self) -> None:
        """Removes the callback. Repeating it is no error."""
        self._watch._remove(self)

    def __exit__(self, *_: object) -> None:
        self.remove()


class ProgressWatch:
    """The progress callbacks of one allocator."""

    def __init__(self, progress: Callable[[], tuple[int, int]]) -> None:
        self._progress = progress
        self._lock = fork_safe_lock()  # guards changes of the next field; reading needs no lock
        self._entries: tuple[ProgressRegistration, ...] = ()

    def register(
        self, callback: OnProgress, after: float, ended: Callable[[], object] | None = None
    ) -> ProgressRegistration:
        """Adds a callback for transitions that take longer than `after` seconds."""
        if not callable(callback):
            raise InvalidTypeError(f"on_progress must be callable, not {callback!r}")
        if not check_seconds(after, "after") >= 0:
            raise InvalidArgumentError(f"after={after} is negative")
        entry = ProgressRegistration(self, callback, after, ended)
        with self._lock:
            self._entries = (*self._entries, entry)
        return entry

    def _remove(self, entry: ProgressRegistration) -> None:
        with self._lock:
            self._entries = tuple(other for other in self._entries if other is not entry)

    @contextlib.contextmanager
    def watching(self, operation: str) -> Iterator[None]:
        """Calls the callbacks while the body runs, and once more when the body succeeds."""
        followers = [_Follower(entry, operation, self._progress) for entry in self._entries]
        try:
            for follower in followers:
                follower.start()
            yield
            for follower in followers:
                follower.succeeded = True
        finally:
            for follower in followers:
                follower.ended.set()
                if follower.ident is not None:  # it was started
                    follower.join()


class _Follower(threading.Thread):
    """Calls one callback while one transition runs."""

    def __init__(
        self, entry: ProgressRegistration, operation: str, progress: Callable[[], tuple[int, int]]
    ) -> None:
        super().__init__(name="cumempool-progress", daemon=True)
        self._entry = entry
        self._operation = operation
        self._progress = progress
        self.succeeded = False
        self.ended: Final = threading.Event()

    def run(self) -> None:
        if self.ended.wait(self._entry.after):
            return  # a short transition: nothing was shown
        what = f"an on_progress callback of a {self._operation} failed"
        unfailing(what, self._follow)
        if self._entry.ended is not None:
            unfailing(what, self._entry.ended)

    def _follow(self) -> None:
        while not self.ended.wait(_EVERY):
            self._entry.callback(self._operation, *self._progress())
        if self.succeeded:
            _, total = self._progress()
            self._entry.callback(self._operation, total, total)


class ReportsProgress(Protocol):
    """The part of an allocator that `show_progress` uses."""

    def on_progress(
        self,
        callback: OnProgress,
        *,
        after: float = ...,
        ended: Callable[[], object] | None = ...,
    ) -> ProgressRegistration:
        """See `CuMemAllocator.on_progress`."""


def show_progress(allocator: ReportsProgress, *, after: float = 1.0) -> ProgressRegistration:
    """Shows a line on stderr for each long transition, in terminals and notebooks.

    Args:
        allocator: The allocator.
        after: Seconds that a transition may take before a line is shown.

    Returns:
        The registration, which ends it: ``with show_progress(allocator): ...``.
    """

    def show(operation: str, done: int, total: int) -> None:
        text = f"{operation}: {format_bytes(done)} of {format_bytes(total)}"
        print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)

    return allocator.on_progress(show, after=after, ended=lambda: print(file=sys.stderr))
