"""Records an allocator's latest events in a ring, and also logs and marks them."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Final

from cumempool._locks import fork_safe_lock
from cumempool._pool.report import TransitionReport
from cumempool._pool.stats import AllocationInfo, Stats
from cumempool._pool.unfailing import Unfailing, report_failure, unfailing
from cumempool.errors import CumempoolError, OutOfMemoryError

_logger = logging.getLogger("cumempool")

_CAPACITY: Final = 512
#: Cap on out-of-memory files per process, so that retry loops do not fill the disk.
_MOST_FILES: Final = 16
_file_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Event:
    """One transition, or one failed allocation.

    Attributes:
        time: Time of its end, in seconds since 1970 (UTC).
        operation: ``"sleep"``, ``"wake_up"``, ``"swap"``, ``"discard"`` or ``"malloc"``.
        seconds: Its duration.
        error: Its error, or ``""``.
        report: Its report; None if it failed or ran in the background.
        awake_bytes: Bytes awake after it, all tags.
        asleep_bytes: Bytes asleep after it, all tags.
        physical_bytes: Device memory held after it.
        host_bytes: Pinned host memory held after it.
    """

    time: float
    operation: str
    seconds: float
    error: str
    report: TransitionReport | None
    awake_bytes: int
    asleep_bytes: int
    physical_bytes: int
    host_bytes: int

    def to_dict(self) -> dict[str, object]:
        """Returns all fields, as types that ``json.dumps`` accepts."""
        report = None if self.report is None else self.report.to_dict()
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"report": report}


class EventLog:
    """The latest events of an allocator, oldest first. Thread-safe.

    Args:
        capacity: The number of events that it keeps.
    """

    # Without a lock, which a fork could leave held: appending and copying are atomic.
    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._events: deque[Event] = deque(maxlen=capacity)

    def record(self, event: Event) -> None:
        """Appends an event; a full ring drops the oldest."""
        self._events.append(event)

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events.copy())

    def __len__(self) -> int:
        return len(self._events)


class Watched:
    """One transition under observation; `report` is set once it succeeds."""

    def __init__(self) -> None:
        self.report: TransitionReport | None = None


class Observer:
    """Records, logs and marks the transitions of one allocator.

    Failures of sinks, loggers, progress and marks are logged, and never fail a transition.
    """

    def __init__(
        self,
        stats: Callable[[], Stats],
        allocations: Callable[[], Sequence[AllocationInfo]],
        cached: Callable[[], Sequence[tuple[int, int]]],
        *,
        during: Sequence[Callable[[str], contextlib.AbstractContextManager[object]]] = (),
        directory: Path | None = None,
    ) -> None:
        self.log: Final = EventLog()
        self._stats = stats
        self._allocations = allocations
        self._cached = cached
        self._sinks: list[Callable[[Event], None]] = []
        self._during = tuple(during)
        self._directory = directory

    @contextlib.contextmanager
    def watch(self, operation: str) -> Iterator[Watched]:
        """Records the body's report, or the error that it raises."""
        watched = Watched()
        begin = time.perf_counter()
        with contextlib.ExitStack() as stack:
            for make in self._during:
                stack.enter_context(
                    Unfailing(f"{operation}: an observer has failed", partial(make, operation))
                )
            with self.failing(operation, begin):
                yield watched
        self.note(operation, watched.report, time.perf_counter() - begin)

    @contextlib.contextmanager
    def failing(self, operation: str, begin: float) -> Iterator[None]:
        """Records an error of the body; `begin` is a value of ``time.perf_counter()``."""
        try:
            yield
        except BaseException as error:
            self.note_failure(operation, error, time.perf_counter() - begin)
            raise

    def note(self, operation: str, report: TransitionReport | None, seconds: float) -> None:
        """Records a success; `report` is None if there is no report."""
        unfailing(f"{operation} was not recorded", lambda: self._note(operation, report, seconds))

    def _note(self, operation: str, report: TransitionReport | None, seconds: float) -> None:
        event = self._event(operation, seconds, "", report)
        self._record(event)
        text = f"{operation}: {seconds * 1e3:.1f} ms" if report is None else str(report)
        _logger.info("%s", text, extra={"cumempool": event.to_dict()})

    def note_failure(self, operation: str, error: BaseException, seconds: float = 0.0) -> None:
        """Records a failure; if memory has run out, writes a snapshot to a file."""
        unfailing(
            f"a failure of {operation} was not recorded",
            lambda: self._note_failure(operation, error, seconds),
        )

    def _note_failure(self, operation: str, error: BaseException, seconds: float) -> None:
        text = f"{type(error).__name__}: {error}"
        event = self._event(operation, seconds, text, None)
        self._record(event)
        # At INFO, because the caller gets the exception.
        _logger.info("%s failed: %s", operation, text, extra={"cumempool": event.to_dict()})
        if isinstance(error, OutOfMemoryError) or type(error).__name__ == "OutOfMemoryError":
            self._write_down(error)

    def _event(
        self, operation: str, seconds: float, error: str, report: TransitionReport | None
    ) -> Event:
        awake = asleep = physical = host = 0
        # A forked child has no statistics; the recorded error says so.
        with contextlib.suppress(CumempoolError):
            stats = self._stats()
            awake, asleep = stats.awake_bytes, stats.asleep_bytes
            physical, host = stats.physical_bytes, stats.host_bytes
        values = (awake, asleep, physical, host)
        return Event(time.time(), operation, seconds, error, report, *values)

    def summary(self) -> dict[str, object]:
        """Returns statistics and the last event, as types that ``json.dumps`` accepts."""
        events = list(self.log)
        last = events[-1].to_dict() if events else None
        return {**self._stats().to_dict(), "last_event": last}

    def snapshot(self) -> dict[str, object]:
        """Returns statistics, allocations and events, as types that ``json.dumps`` accepts."""
        return {
            "format": "cumempool snapshot 1",
            "time": time.time(),
            "process": os.getpid(),
            "stats": self._stats().to_dict(),
            "allocations": self._allocation_rows(),
            "events": [event.to_dict() for event in self.log],
        }

    def _allocation_rows(self) -> list[dict[str, object]]:
        """Returns every allocation; ``cached_bytes`` counts what torch has cached of it as free."""
        cached = sorted(self._cached())
        rows = []
        for info in self._allocations():
            first = bisect.bisect_left(cached, (info.address, 0))
            last = bisect.bisect_left(cached, (info.address + info.bytes, 0))
            free = sum(size for _, size in cached[first:last])
            rows.append({**info.to_dict(), "cached_bytes": free})
        return rows

    def _record(self, event: Event) -> None:
        self.log.record(event)
        for sink in tuple(self._sinks):
            try:
                sink(event)
            except Exception as error:  # noqa: BLE001 -- a sink may raise anything; it is removed
                self._remove(sink)
                report_failure("events are recorded no longer", error)

    def _remove(self, sink: Callable[[Event], None]) -> None:
        with contextlib.suppress(ValueError):  # another thread has removed it
            self._sinks.remove(sink)

    @contextlib.contextmanager
    def recording(self, path: Path) -> Iterator[None]:
        """Writes a trace: each event of the body as one line of JSON.

        A full disk ends the trace only.
        """
        lock = fork_safe_lock()  # another thread's transition may end while the trace does
        waiting: deque[str] = deque()
        writing = False
        with path.open("w", encoding="utf-8", buffering=1) as file:

            def write(line: dict[str, object]) -> None:
                nonlocal writing
                waiting.append(json.dumps(line) + "\n")
                with lock:
                    # A signal handler may have interrupted this thread here; the thread goes on.
                    if writing or file.closed:
                        return
                    writing = True
                    try:
                        while waiting:
                            file.write(waiting.popleft())
                    except (OSError, ValueError) as problem:
                        # Now: a later close would try again to write the rest.
                        with contextlib.suppress(OSError):
                            file.close()
                        raise OSError(f"the trace {path} ends here: {problem}") from problem
                    finally:
                        writing = False

            def sink(event: Event) -> None:
                write(event.to_dict())

            write({"format": "cumempool trace 1", "time": time.time(), "process": os.getpid()})
            self._sinks.append(sink)
            try:
                yield
            finally:
                self._remove(sink)
                with lock, contextlib.suppress(OSError):
                    file.close()

    def _write_down(self, error: BaseException) -> None:
        if self._directory is None:
            return
        number = next(_file_numbers)
        if number >= _MOST_FILES:
            return
        path = self._directory / f"cumempool-oom-{os.getpid()}-{number}.json"
        try:
            path.write_text(json.dumps({**self.snapshot(), "error": str(error)}))
        except (OSError, CumempoolError) as problem:
            _logger.warning("the snapshot at out-of-memory was not written: %s", problem)
            return
        _logger.warning("the snapshot at out-of-memory is in %s", path)
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"cumempool: see {path} (cumempool report {path})")
