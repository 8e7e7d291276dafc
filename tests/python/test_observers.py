"""Observers that fail never fail a transition: what worked reports success."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import GRANULE, RunPython, filled, random_bytes

from cumempool import (
    CuMemAllocator,
    Event,
    TransitionReport,
    UnknownTagError,
)
from cumempool._pool import progress as progress_module


class OddError(Exception):
    """What nobody expects."""


def fail(*arguments: object, **keywords: object) -> None:
    raise OddError("an observer has failed")


@contextlib.contextmanager
def fails_on_leaving(operation: str) -> Iterator[None]:
    yield
    fail()


def add_sinks(alloc: CuMemAllocator, *sinks: Callable[[Event], object]) -> None:
    alloc._state.observer._sinks.extend(sinks)


def add_a_sink(alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
    add_sinks(alloc, fail)


def add_a_mark_that_cannot_begin(alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alloc._state.observer, "_during", (fail,))


def add_a_mark_that_cannot_end(alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alloc._state.observer, "_during", (fails_on_leaving,))


def take_the_statistics(alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alloc._state.observer, "_stats", fail)


def take_the_threads(alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
    alloc.on_progress(lambda *_: None, after=0)
    monkeypatch.setattr(progress_module.threading.Thread, "start", fail)


def spoil_the_logger(alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("cumempool")
    monkeypatch.setattr(logger, "filters", [fail])
    monkeypatch.setattr(logger, "level", logging.DEBUG)


OBSERVERS = [
    add_a_sink,
    add_a_mark_that_cannot_begin,
    add_a_mark_that_cannot_end,
    take_the_statistics,
    take_the_threads,
    spoil_the_logger,
]


@pytest.mark.parametrize("spoil", OBSERVERS)
def test_an_observer_that_fails_fails_no_transition(
    alloc: CuMemAllocator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[CuMemAllocator, pytest.MonkeyPatch], None],
) -> None:
    tensor, other = filled(alloc, GRANULE, "data", 1), filled(alloc, GRANULE, "other", 2)
    spoil(alloc, monkeypatch)
    assert isinstance(alloc.sleep(tags="data"), TransitionReport)
    assert isinstance(alloc.swap(sleep="other", wake="data"), TransitionReport)
    assert isinstance(alloc.wake_up(blocking=False).result(), TransitionReport)
    with pytest.raises(UnknownTagError):
        alloc.sleep(tags="nobody knows it")
    monkeypatch.undo()
    assert spoil is spoil_the_logger or "OddError: an observer has failed" in caplog.text
    caplog.clear()  # whose tracebacks know the tensors
    assert torch.equal(tensor, random_bytes(GRANULE, 1))
    assert torch.equal(other, random_bytes(GRANULE, 2))


def test_a_sink_that_fails_is_told_of_once(
    alloc: CuMemAllocator, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Event] = []
    add_sinks(alloc, fail, heard.append)
    tensor = filled(alloc, GRANULE, "data")
    alloc.sleep(tags="data")
    alloc.wake_up()
    assert caplog.text.count("events are recorded no longer") == 1
    assert [event.operation for event in heard] == ["sleep", "wake_up"]
    del tensor


def test_a_record_that_another_thread_leaves_meanwhile_fails_no_transition(
    alloc: CuMemAllocator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entered, ended = threading.Event(), threading.Event()
    leave = threading.Event()

    def record() -> None:
        with alloc.record(tmp_path / "trace"):
            entered.set()
            leave.wait()
        ended.set()

    def leave_it(event: Event) -> None:
        leave.set()
        assert ended.wait(20)

    add_sinks(alloc, leave_it)  # comes first, so that the trace ends before its turn
    thread = threading.Thread(target=record)
    thread.start()
    entered.wait()
    tensor = filled(alloc, GRANULE, "data")
    assert isinstance(alloc.sleep(tags="data"), TransitionReport)
    thread.join()
    assert caplog.text == ""
    del tensor


def test_a_hook_that_fails_is_told_though_an_observer_fails_too(alloc: CuMemAllocator) -> None:
    tensor = filled(alloc, GRANULE, "data")
    add_sinks(alloc, fail)
    with alloc.register_hooks("data", before_unmap=fail), pytest.raises(OddError):
        alloc.sleep(tags="data")
    assert alloc.stats().awake_bytes == GRANULE
    del tensor


PREPARE = """
import sys, threading, torch
from concurrent.futures import CancelledError
from cumempool import CuMemAllocator
alloc = CuMemAllocator()
tensor = alloc.empty(1000, tag="weights")
CANCEL
alloc.sleep(tags="weights")
del tensor
alloc.close()
"""

CANCELLED = {
    "while it runs": """
future = alloc.prepare(tags="weights", background=True)
cancelled = future.cancel()
if cancelled:
    assert alloc.stats().host_bytes == 0 or future.cancelled()
else:
    assert future.result(60) > 0
""",
    "before it begins": """
real, begun = threading.Thread.start, []
threading.Thread.start = lambda thread: begun.append(thread)
future = alloc.prepare(tags="weights", background=True)
assert future.cancel()
real(begun[0])
begun[0].join()
threading.Thread.start = real
assert future.cancelled()
assert alloc.stats().host_bytes == 0
""",
    "when it has ended": """
future = alloc.prepare(tags="weights", background=True)
future.result(60)
assert not future.cancel()
assert future.result() > 0
""",
}


@pytest.mark.extensive
@pytest.mark.parametrize("when", CANCELLED)
def test_cancelling_a_preparation_says_what_is_true(run_python: RunPython, when: str) -> None:
    done = run_python(PREPARE.replace("CANCEL", CANCELLED[when]))
    assert (done.code, done.out, done.err) == (0, "", "")
