"""Records the latest events of an allocator in a ring; logs and marks them as well."""

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
#: Files that one process writes on out-of-memory: who goes on trying must not fill a disk.
_MOST_FILES: Final = 16
_file_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Event:
    """One transition, or one failure to allocate.

    Attributes:
        time: When it ended, in seconds since 1970 (UTC).
        operation: ``"sleep"``, ``"wake_up"``, ``"swap"``, ``"discard"`` or ``"malloc"``.
        seconds: How long it took.
        error: What it failed with, or ``""``.
        report: What it did; None where it failed, or went on in the background.
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
        """All fields, of types that ``json.dumps`` takes."""
        report = None if self.report is None else self.report.to_dict()
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"report": report}


class EventLog:
    """The latest events of an allocator, oldest first. Thread-safe.

    Args:
        capacity: How many it keeps.
    """

    # Without a lock, which a fork could leave taken: appending and copying are one step each.
    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._events: deque[Event] = deque(maxlen=capacity)

    def record(self, event: Event) -> None:
        """Appends an event; the oldest goes where the ring is full."""
        self._events.append(event)

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events.copy())

    def __len__(self) -> int:
        return len(self._events)


class Watched:
    """One transition under observation; `report` is set when it has worked."""

    def __init__(self) -> None:
        self.report: TransitionReport | None = None


class Observer:
    """Records, logs and marks the transitions of one allocator.

    What fails here is logged, and never fails a transition: sinks, loggers, progress, marks.
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
        """Records what the body does: its report, or the error that it raises."""
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
        """Records the error that the body raises; `begin` is of ``time.perf_counter()``."""
        try:
            yield
        except BaseException as error:
            self.note_failure(operation, error, time.perf_counter() - begin)
            raise

    def note(self, operation: str, report: TransitionReport | None, seconds: float) -> None:
        """Records what has worked; without a report where there is none."""
        unfailing(f"{operation} was not recorded", lambda: self._note(operation, report, seconds))

    def _note(self, operation: str, report: TransitionReport | None, seconds: float) -> None:
        event = self._event(operation, seconds, "", report)
        self._record(event)
        text = f"{operation}: {seconds * 1e3:.1f} ms" if report is None else str(report)
        _logger.info("%s", text, extra={"cumempool": event.to_dict()})

    def note_failure(self, operation: str, error: BaseException, seconds: float = 0.0) -> None:
        """Records a failure; where memory has run out, writes down what is there."""
        unfailing(
            f"a failure of {operation} was not recorded",
            lambda: self._note_failure(operation, error, seconds),
        )

    def _note_failure(self, operation: str, error: BaseException, seconds: float) -> None:
        text = f"{type(error).__name__}: {error}"
        event = self._event(operation, seconds, text, None)
        self._record(event)
        # Not louder than the exception, which the caller gets.
        _logger.info("%s failed: %s", operation, text, extra={"cumempool": event.to_dict()})
        if isinstance(error, OutOfMemoryError) or type(error).__name__ == "OutOfMemoryError":
            self._write_down(error)

    def _event(
        self, operation: str, seconds: float, error: str, report: TransitionReport | None
    ) -> Event:
        awake = asleep = physical = host = 0
        # In a forked child there are none; the error that is noted says so.
        with contextlib.suppress(CumempoolError):
            stats = self._stats()
            awake, asleep = stats.awake_bytes, stats.asleep_bytes
            physical, host = stats.physical_bytes, stats.host_bytes
        values = (awake, asleep, physical, host)
        return Event(time.time(), operation, seconds, error, report, *values)

    def summary(self) -> dict[str, object]:
        """Statistics and the last event, of types that ``json.dumps`` takes."""
        events = list(self.log)
        last = events[-1].to_dict() if events else None
        return {**self._stats().to_dict(), "last_event": last}

    def snapshot(self) -> dict[str, object]:
        """Statistics, allocations and events, of types that ``json.dumps`` takes."""
        return {
            "format": "cumempool snapshot 1",
            "time": time.time(),
            "process": os.getpid(),
            "stats": self._stats().to_dict(),
            "allocations": self._allocation_rows(),
            "events": [event.to_dict() for event in self.log],
        }

    def _allocation_rows(self) -> list[dict[str, object]]:
        """Every allocation with what torch has cached of it as free, as ``cached_bytes``."""
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
            except Exception as error:  # noqa: BLE001 -- whatever it is: it is the last of it
                self._remove(sink)
                report_failure("events are recorded no longer", error)

    def _remove(self, sink: Callable[[Event], None]) -> None:
        with contextlib.suppress(ValueError):  # another thread has removed it
            self._sinks.remove(sink)

    @contextlib.contextmanager
    def recording(self, path: Path) -> Iterator[None]:
        """Writes a trace: each event of the body as one line of JSON.

        A disk that is full ends the trace, and nothing else.
        """
        lock = fork_safe_lock()  # a transition of another thread may end while the trace does
        waiting: deque[str] = deque()
        writing = False
        with path.open("w", encoding="utf-8", buffering=1) as file:

            def write(line: dict[str, object]) -> None:
                nonlocal writing
                waiting.append(json.dumps(line) + "\n")
                with lock:
                    # A signal handler has interrupted this thread in here, which then goes on.
                    if writing or file.closed:
                        return
                    writing = True
                    try:
                        while waiting:
                            file.write(waiting.popleft())
                    except (OSError, ValueError) as problem:
                        # Now: at the end it would try once more to write what is left.
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
            _logger.warning("what there was at out-of-memory was not written: %s", problem)
            return
        _logger.warning("what there was at out-of-memory is in %s", path)
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"cumempool: see {path} (cumempool report {path})")
