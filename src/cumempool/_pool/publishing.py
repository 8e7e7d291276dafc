"""Publishes a process's statistics to other processes of its user, for ``cumempool top``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from cumempool._pool.unfailing import report_failure
from cumempool.errors import CumempoolError, InvalidArgumentError

_INTERVAL = 1.0
_SUFFIX: Final = ".stats.json"
_WANTED: Final = ".wanted"
_WHOLE: Final = ".snapshot.json"


def home() -> str:
    """Returns an identifier of this boot and PID namespace; "" if they cannot be read."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def directory() -> Path:
    """Returns the folder where this user's processes publish, in the runtime or temporary one."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) if runtime and Path(runtime).is_dir() else Path(tempfile.gettempdir())
    folder = base / f"cumempool-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:  # such as a dangling link
        raise InvalidArgumentError(f"{folder} cannot be made: {error}") from None
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise InvalidArgumentError(
            f"{folder} must belong to this user and to nobody else: remove it, or chmod 700"
        )
    return folder


def _start_of(process: int) -> str:
    """Returns the start of a process in clock ticks, to detect reuse of its number; "" if gone."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]


def _write(path: Path, record: Mapping[str, object]) -> None:
    """Replaces a file atomically: a reader sees the old text or the new one."""
    unfinished = path.with_suffix(".new")
    try:
        unfinished.write_text(json.dumps(record))
        unfinished.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def publish(
    snapshot: Callable[[], Mapping[str, object]], stats: Callable[[], Mapping[str, object]]
) -> Publisher | None:
    """Starts a `Publisher` of this program. Returns None, and logs why, if that fails.

    Another user's folder, a full disk, or no room for a thread must not prevent an allocator.
    """
    try:
        return Publisher(snapshot, stats, Path(sys.argv[0]).name or "python")
    except Exception as error:  # noqa: BLE001 -- whatever it is, the allocator works without
        report_failure("statistics are not published", error)
        return None


class Publisher:
    """Writes an allocator's statistics to a file of this process once a second, until `close`."""

    def __init__(
        self,
        snapshot: Callable[[], Mapping[str, object]],
        stats: Callable[[], Mapping[str, object]],
        name: str,
        interval: float | None = None,
    ) -> None:
        self._snapshot = snapshot
        self._stats = stats
        self._name = name
        self._interval = _INTERVAL if interval is None else interval
        self._process = os.getpid()
        self._start = _start_of(self._process)
        self._home = home()
        # Each allocator of a process has its own file.
        self._stem = directory() / f"{self._process}-{id(self):x}"
        self._stop = threading.Event()
        self._publish()
        # The files go with the publisher, and with the process if it exits normally.
        self._remove = weakref.finalize(self, _remove, self._file(_SUFFIX), self._process)
        self._thread = threading.Thread(
            target=_run, args=(weakref.ref(self), self._stop), daemon=True
        )
        self._thread.start()

    def _file(self, suffix: str) -> Path:
        return self._stem.with_name(self._stem.name + suffix)

    def _publish(self) -> None:
        whose = {"process": self._process, "start": self._start, "home": self._home}
        record = {**whose, "name": self._name}
        _write(self._file(_SUFFIX), {**record, "time": time.time(), "stats": self._stats()})
        wanted = self._file(_WANTED)
        if wanted.exists():
            _write(self._file(_WHOLE), {**self._snapshot(), "name": self._name})
            wanted.unlink(missing_ok=True)

    def close(self) -> None:
        """Stops, and removes the files. Repeating it is no error."""
        self._stop.set()
        if os.getpid() == self._process and self._thread is not threading.current_thread():
            self._thread.join()
        self._remove()


def _run(reference: weakref.ref[Publisher], stop: threading.Event) -> None:
    while True:
        publisher = reference()
        if publisher is None or stop.wait(publisher._interval):
            return
        try:
            publisher._publish()
        except Exception as error:  # noqa: BLE001 -- whatever it is, the allocator goes on
            report_failure("statistics are no longer published", error)
            return
        del publisher


@dataclass(frozen=True, slots=True)
class Published:
    """The latest published statistics of one allocator of a live process.

    Attributes:
        process: The process id.
        name: The name of its program.
        time: When it was written, in seconds since 1970.
        stats: The result of `Stats.to_dict`; read-only.
        file: The file that it was read from.
    """

    process: int
    name: str
    time: float
    stats: Mapping[str, Any]
    file: Path


def published() -> list[Published]:
    """Returns the records of this user's live processes; removes files of dead ones.

    Processes of other PID namespaces may share the folder; whether they live is unknown here.
    """
    found, here = [], home()
    for file in sorted(directory().glob(f"*{_SUFFIX}")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = json.loads(file.read_text())
            process = int(record["process"])
            if record["home"] != here:
                continue
            if _start_of(process) != record["start"]:
                _remove(file, os.getpid())
                continue
            found.append(
                Published(
                    process,
                    str(record["name"]),
                    float(record["time"]),
                    MappingProxyType(record["stats"]),
                    file,
                )
            )
    return sorted(found, key=lambda one: one.process)


def _siblings(file: Path) -> Iterator[Path]:
    stem = file.name.removesuffix(_SUFFIX)
    return (file.with_name(stem + suffix) for suffix in (_SUFFIX, _WANTED, _WHOLE))


def _remove(file: Path, process: int) -> None:
    """Removes the published files. Does nothing in a forked child."""
    if os.getpid() != process:
        return
    for path in _siblings(file):
        with contextlib.suppress(OSError):  # the folder may be gone, or another user's by now
            path.unlink(missing_ok=True)


def request_snapshot(of: Published, timeout: float = 10.0) -> dict[str, Any]:
    """Makes a process write everything, including allocations and events, and reads it."""
    _, wanted, whole = _siblings(of.file)
    whole.unlink(missing_ok=True)
    wanted.touch()
    end = time.monotonic() + timeout
    while not whole.exists():
        if time.monotonic() > end:
            wanted.unlink(missing_ok=True)
            raise CumempoolError(
                f"process {of.process} did not answer within {timeout:g} s",
                operation="snapshot",
                advice="check whether it is stopped; py-spy dump shows where it is",
            )
        time.sleep(0.02)
    snapshot: dict[str, Any] = json.loads(whole.read_text())
    whole.unlink(missing_ok=True)
    return snapshot
