"""Tells how far long transitions have come: to a callback, or as a progress bar."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

from cumempool._locks import fork_safe_lock
from cumempool._pool.unfailing import unfailing
from cumempool.errors import InvalidArgumentError, InvalidTypeError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


__all__ = ["OnProgress", "ProgressRegistration", "ProgressWatch", "show_progress"]

OnProgress = Callable[[str, int, int], object]
"""Called with the operation, the bytes done, and the bytes in all, from a thread of its own."""

_EVERY: Final = 0.1  # seconds between two calls


class ProgressRegistration(contextlib.AbstractContextManager["ProgressRegistration"]):
    """A callback that was registered; `remove` takes it out, and so does leaving the context."""

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
        """Takes the callback out. Doing it twice is no error."""
        self._watch._remove(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


class ProgressWatch:
    """The progress callbacks of one allocator.

    Args:
        progress: (bytes done, bytes in all) of the transition under way.
    """

    def __init__(self, progress: Callable[[], tuple[int, int]]) -> None:
        self._progress = progress
        self._lock = fork_safe_lock()  # for changes of the next one, which is read without
        self._entries: tuple[ProgressRegistration, ...] = ()

    def register(
        self, callback: OnProgress, after: float, ended: Callable[[], object] | None = None
    ) -> ProgressRegistration:
        """Adds a callback for transitions that take longer than `after` seconds.

        Args:
            callback: Called while one runs.
            after: Seconds.
            ended: Called after the last call of `callback` for a transition, however it ended.

        Raises:
            InvalidTypeError: It cannot be called, or `after` is no number.
            InvalidArgumentError: `after` is negative.
        """
        if not callable(callback):
            raise InvalidTypeError(f"on_progress is something to call, not {callback!r}")
        if isinstance(after, bool) or not isinstance(after, (int, float)):
            raise InvalidTypeError(f"after is a number of seconds, not {after!r}")
        if not after >= 0:
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
        """Calls the callbacks while the body runs, and once more when it has succeeded."""
        with contextlib.ExitStack() as stack:
            for entry in self._entries:
                stack.enter_context(_Follower(entry, operation, self._progress))
            yield


class _Follower(contextlib.AbstractContextManager["_Follower"]):
    """Calls one callback in a thread, while one transition runs."""

    def __init__(
        self, entry: ProgressRegistration, operation: str, progress: Callable[[], tuple[int, int]]
    ) -> None:
        self._entry = entry
        self._operation = operation
        self._progress = progress
        self._succeeded = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cumempool-progress", daemon=True)

    def __enter__(self) -> _Follower:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._succeeded = error is None
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        if self._ended.wait(self._entry.after):
            return  # it was short: nothing was shown
        what = f"an on_progress callback of a {self._operation} failed"
        unfailing(what, self._follow)
        if self._entry.ended is not None:
            unfailing(what, self._entry.ended)

    def _follow(self) -> None:
        while not self._ended.wait(_EVERY):
            self._entry.callback(self._operation, *self._progress())
        if self._succeeded:
            _, total = self._progress()
            self._entry.callback(self._operation, total, total)


class ReportsProgress(Protocol):
    """What `show_progress` needs of an allocator."""

    def on_progress(
        self,
        callback: OnProgress,
        *,
        after: float = ...,
        ended: Callable[[], object] | None = ...,
    ) -> ProgressRegistration:
        """See `CuMemAllocator.on_progress`."""


def show_progress(allocator: ReportsProgress, *, after: float = 1.0) -> ProgressRegistration:
    """Shows a bar for each transition that takes longer, in terminals and in notebooks.

    Args:
        allocator: Whose transitions.
        after: Seconds that a transition may take before a bar is shown.

    Returns:
        What ends it: ``with show_progress(allocator): ...``.
    """
    bar = _Bar()
    return allocator.on_progress(bar, after=after, ended=bar.end)


class _Bar:
    """One bar at a time, taken away when its transition has ended. Thread-safe."""

    def __init__(self) -> None:
        self._lock = fork_safe_lock()
        self._operation = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, operation: str, done: int, total: int) -> None:
        with self._lock:
            self._show(operation, done, total)

    def end(self) -> None:
        """Takes the bar away."""
        with self._lock:
            bar, self._bar, self._task = self._bar, None, None
        if bar is not None:
            bar.stop()

    def _show(self, operation: str, done: int, total: int) -> None:
        if operation != self._operation:  # another thread's, which took its turn
            self.end()
            self._operation = operation
        if self._bar is None or self._task is None:
            from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

            self._bar = Progress(
                "{task.description}", BarColumn(), DownloadColumn(True), TransferSpeedColumn()
            )
            self._task = self._bar.add_task(operation, total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)
