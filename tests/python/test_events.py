"""Events, logs, marks and what is written when memory runs out."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import GRANULE, MakeAllocator, filled, random_bytes

from cumempool import (
    CuMemAllocator,
    Event,
    EventLog,
    InUseError,
    OutOfMemoryError,
    UnknownTagError,
)
from cumempool._pool.events import Observer


def operations(alloc: CuMemAllocator) -> list[tuple[str, str]]:
    return [(event.operation, event.error.partition(":")[0]) for event in alloc.events]


def test_each_transition_is_an_event_with_its_report(alloc: CuMemAllocator) -> None:
    tensor = filled(alloc, GRANULE, "data")
    slept = alloc.sleep(tags="data")
    woken = alloc.wake_up()
    alloc.discard("data")
    events = list(alloc.events)
    assert [event.operation for event in events] == ["sleep", "wake_up", "discard"]
    assert [event.report for event in events[:2]] == [slept, woken]
    assert [event.awake_bytes for event in events] == [0, GRANULE, 0]
    assert [event.asleep_bytes for event in events] == [GRANULE, 0, GRANULE]
    assert events[0].host_bytes >= GRANULE
    assert all(event.seconds >= slept.seconds > 0 for event in events[:1])
    assert events[0].time <= events[1].time
    json.dumps([event.to_dict() for event in events])
    del tensor


def test_a_swap_and_a_wake_in_the_background_are_events(alloc: CuMemAllocator) -> None:
    tensors = [filled(alloc, GRANULE, tag) for tag in ("a", "b")]
    alloc.sleep(tags="b")
    alloc.swap(sleep="a", wake="b")
    alloc.wake_up("a", blocking=False).result()
    assert operations(alloc) == [("sleep", ""), ("swap", ""), ("wake_up", "")]
    assert list(alloc.events)[-1].report is None
    assert list(alloc.events)[-1].awake_bytes == 2 * GRANULE
    del tensors


def test_a_failure_is_an_event_with_its_error(alloc: CuMemAllocator) -> None:
    with pytest.raises(UnknownTagError):
        alloc.wake_up("nobody")
    with pytest.raises(UnknownTagError):
        alloc.wake_up("nobody", blocking=False)
    tensor = filled(alloc, GRANULE, "data")
    with alloc.pin("data", holder="me"), pytest.raises(InUseError):
        alloc.sleep(tags="data")
    assert operations(alloc) == [
        ("wake_up", "UnknownTagError"),
        ("wake_up", "UnknownTagError"),
        ("sleep", "InUseError"),
    ]
    assert "me" in list(alloc.events)[-1].error
    del tensor


def test_transitions_are_logged_with_their_numbers(
    alloc: CuMemAllocator, caplog: pytest.LogCaptureFixture
) -> None:
    tensor = filled(alloc, GRANULE, "data")
    with caplog.at_level(logging.INFO, logger="cumempool"):
        alloc.sleep(tags="data")
        with pytest.raises(UnknownTagError):
            alloc.wake_up("nobody")
    slept, failed = caplog.records
    assert slept.levelno == logging.INFO
    assert "backed up 2.00 MiB" in slept.getMessage()
    assert vars(slept)["cumempool"]["report"]["bytes_backed_up"] == GRANULE
    assert failed.levelno == logging.INFO
    assert vars(failed)["cumempool"]["operation"] == "wake_up"
    del tensor


def test_the_ring_keeps_the_latest() -> None:
    log = EventLog(capacity=3)
    for number in range(5):
        log.record(Event(number, "sleep", 0.0, "", None, 0, 0, 0, 0))
    assert [event.time for event in log] == [2, 3, 4]
    assert len(log) == 3


def test_ranges_are_marked_while_a_transition_runs(alloc: CuMemAllocator) -> None:
    steps: list[str] = []

    @contextlib.contextmanager
    def mark(name: str) -> Iterator[None]:
        steps.append(f"begin {name}")
        yield
        steps.append(f"end {name}")

    observer = Observer(alloc.stats, alloc.snapshot, list, during=[mark])
    with observer.watch("sleep"):
        steps.append("body")
    assert steps == ["begin sleep", "body", "end sleep"]


def test_marks_are_harmless_where_torch_has_none(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator(nvtx=True)
    tensor = filled(alloc, GRANULE, "data")
    alloc.sleep(tags="data")
    assert operations(alloc) == [("sleep", "")]
    del tensor


class Interrupted(io.StringIO):
    """A file in the middle of whose writing a signal handler puts a tag to sleep, once."""

    def __init__(self, handler: Callable[[], object]) -> None:
        super().__init__()
        self._handler: Callable[[], object] | None = handler
        self._writes = False

    def write(self, text: str, /) -> int:
        if self._writes:
            raise RuntimeError("reentrant call")  # as of io.BufferedWriter
        self._writes = True
        if "wake_up" in text and self._handler is not None:
            handler, self._handler = self._handler, None
            handler()
        self._writes = False
        return super().write(text)

    def close(self) -> None:
        pass  # what was written is read afterwards


def test_a_signal_handler_may_call_while_its_thread_writes_a_trace(
    alloc: CuMemAllocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = filled(alloc, GRANULE, "weights")
    file = Interrupted(lambda: alloc.sleep(tags="weights"))
    alloc.sleep(tags="weights")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *arguments, **options: file)
        with alloc.record(tmp_path / "trace"):
            alloc.wake_up()
            alloc.wake_up()
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [line.get("operation") for line in lines[1:]] == ["wake_up", "sleep", "wake_up"]
    del tensor


def test_a_trace_that_cannot_be_written_ends_and_nothing_else_does(
    alloc: CuMemAllocator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensor = filled(alloc, GRANULE, "data")
    trace = tmp_path / "trace"
    os.mkfifo(trace)  # which can be written to until its reader goes
    reader = os.open(trace, os.O_RDONLY | os.O_NONBLOCK)
    with alloc.record(trace):
        alloc.sleep(tags="data")
        lines = [json.loads(line) for line in os.read(reader, 1 << 16).splitlines()]
        os.close(reader)
        alloc.wake_up()
        alloc.sleep(tags="data")
    assert [line.get("operation") for line in lines] == [None, "sleep"]
    assert caplog.text.count("ends here") == 1
    assert operations(alloc) == [("sleep", ""), ("wake_up", ""), ("sleep", "")]
    alloc.wake_up()
    assert torch.equal(tensor, random_bytes(GRANULE))


# ---- out of memory ---------------------------------------------------------------------------


def test_what_there_is_at_out_of_memory_is_written_down(
    make_allocator: MakeAllocator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alloc = make_allocator(mib=16, out_of_memory_directory=str(tmp_path))
    tensors = [filled(alloc, 3 * GRANULE, tag) for tag in ("a", "b")]
    with pytest.raises(OutOfMemoryError) as caught:
        alloc.empty(4 * GRANULE, dtype=torch.uint8, tag="c")
    alloc.sleep(tags="a")
    filling = alloc.empty(4 * GRANULE, dtype=torch.uint8, tag="c")
    with pytest.raises(OutOfMemoryError):
        alloc.wake_up("a")
    first, second = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert str(os.getpid()) in first.name
    record = json.loads(first.read_text())
    assert record["format"] == "cumempool snapshot 1"
    assert {info["tag"] for info in record["allocations"]} == {"a", "b"}
    assert record["events"][-1]["operation"] == "malloc"
    assert json.loads(second.read_text())["events"][-1]["operation"] == "wake_up"
    assert str(first) in caplog.text
    if hasattr(caught.value, "__notes__"):
        assert any(str(first) in note for note in caught.value.__notes__)
    del tensors, filling, caught
    gc.collect()


def test_a_directory_that_has_gone_hides_no_error(
    make_allocator: MakeAllocator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    alloc = make_allocator(mib=16, out_of_memory_directory=str(folder))
    folder.rmdir()
    with pytest.raises(OutOfMemoryError):
        alloc.empty(9 * GRANULE, tag="a")
    assert "was not written" in caplog.text


def test_a_program_that_goes_on_trying_fills_no_disk(
    make_allocator: MakeAllocator, tmp_path: Path
) -> None:
    alloc = make_allocator(mib=16, out_of_memory_directory=str(tmp_path))
    for _ in range(40):
        with pytest.raises(OutOfMemoryError):
            alloc.empty(9 * GRANULE, tag="a")
    assert len(list(tmp_path.iterdir())) <= 16


def test_a_snapshot_can_be_saved(alloc: CuMemAllocator, tmp_path: Path) -> None:
    tensor = filled(alloc, GRANULE, "data")
    alloc.sleep(tags="data")
    alloc.save_snapshot(tmp_path / "snapshot.json")
    record = json.loads((tmp_path / "snapshot.json").read_text())
    assert record["stats"]["tags"]["data"]["backed_up_bytes"] == GRANULE
    (info,) = record["allocations"]
    assert (info["address"], info["state"]) == (tensor.data_ptr(), "backed_up")
    assert [event["operation"] for event in record["events"]] == ["sleep"]
