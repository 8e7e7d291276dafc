"""Progress of long transitions: callbacks and the line on a terminal."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from conftest import GRANULE, MakeAllocator, filled

from cumempool import (
    CuMemAllocator,
    InvalidArgumentError,
    InvalidTypeError,
    ProgressRegistration,
    UnknownTagError,
    show_progress,
)
from cumempool._pool.progress import ProgressWatch

Calls = list[tuple[str, int, int]]


def test_a_transition_tells_its_bytes(alloc: CuMemAllocator) -> None:
    tensors = [filled(alloc, GRANULE * size, "data") for size in (1, 2)]
    other = filled(alloc, GRANULE, "other")
    progress = alloc._core.progress
    assert progress() == (0, 0)
    alloc.sleep(tags="data")
    assert progress() == (3 * GRANULE, 3 * GRANULE)
    alloc.swap(sleep="other", wake="data")
    assert progress() == (4 * GRANULE, 4 * GRANULE)
    alloc.discard("data")
    assert progress() == (0, 0), "nothing is copied"
    del tensors, other


def test_a_callback_is_called_while_a_long_transition_runs(alloc: CuMemAllocator) -> None:
    calls: Calls = []
    inside = threading.Event()

    def hook(tag: str, ranges: object) -> None:
        assert inside.wait(20), "the transition lasts until the callback was called"

    def callback(operation: str, done: int, total: int) -> None:
        calls.append((operation, done, total))
        inside.set()

    tensor = filled(alloc, GRANULE, "data")
    with alloc.on_progress(callback, after=0), alloc.register_hooks("data", before_unmap=hook):
        alloc.sleep(tags="data")
    assert {operation for operation, _, _ in calls} == {"sleep"}
    assert calls[-1] == ("sleep", GRANULE, GRANULE)
    assert all(done <= total for _, done, total in calls)
    count = len(calls)
    alloc.wake_up()
    assert len(calls) == count, "it was taken out"
    del tensor


def test_a_short_transition_calls_nobody(alloc: CuMemAllocator) -> None:
    calls: Calls = []
    tensor = filled(alloc, GRANULE, "data")
    with alloc.on_progress(lambda *call: calls.append(call), after=3600):
        alloc.sleep(tags="data")
        alloc.wake_up()
    assert calls == []
    del tensor


def test_a_transition_that_fails_is_not_told_as_done() -> None:
    calls: Calls = []
    watch = ProgressWatch(lambda: (1, 5))
    registration = watch.register(lambda *call: calls.append(call), 0)

    def fail_after_a_call() -> None:
        while not calls:
            time.sleep(0.01)
        raise UnknownTagError("it fails")

    with pytest.raises(UnknownTagError), watch.watching("sleep"):
        fail_after_a_call()
    assert set(calls) == {("sleep", 1, 5)}
    registration.remove()
    registration.remove()


def test_a_callback_that_raises_is_logged_and_the_transition_goes_on(
    make_allocator: MakeAllocator, caplog: pytest.LogCaptureFixture
) -> None:
    alloc = make_allocator()

    def fail(*call: object) -> None:
        raise ZeroDivisionError

    tensor = filled(alloc, GRANULE, "data")
    expected = tensor.clone()
    with alloc.on_progress(fail, after=0), caplog.at_level(logging.WARNING, logger="cumempool"):
        alloc.register_hooks("data", before_unmap=lambda *_: time.sleep(0.5))
        alloc.sleep(tags="data")
    alloc.wake_up()
    assert torch.equal(tensor, expected)
    assert "on_progress callback of a sleep failed" in caplog.text
    del tensor


@pytest.mark.parametrize(
    ("callback", "after", "error"),
    [
        (None, 1.0, InvalidTypeError),
        (print, "1", InvalidTypeError),
        (print, True, InvalidTypeError),
        (print, -1, InvalidArgumentError),
        (print, float("nan"), InvalidArgumentError),
    ],
)
def test_bad_arguments(
    alloc: CuMemAllocator, callback: object, after: object, error: type[Exception]
) -> None:
    with pytest.raises(error):
        alloc.on_progress(callback, after=after)  # type: ignore[arg-type]


def test_a_long_transition_is_shown_on_a_line_of_its_own(
    alloc: CuMemAllocator, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_progress(alloc) as registration:
        for done in (0, GRANULE):
            registration.callback("wake_up", done, GRANULE)
        assert registration.ended is not None
        registration.ended()
    shown = capsys.readouterr().err
    assert [line.rstrip() for line in shown.split("\r")] == [
        "",
        "wake_up: 0 bytes of 2.00 MiB",
        "wake_up: 2.00 MiB of 2.00 MiB",
    ]
    assert shown.endswith("\n")


def test_the_end_of_a_transition_that_fails_is_told_as_well() -> None:
    calls: Calls = []
    ended: list[bool] = []
    watch = ProgressWatch(lambda: (1, 5))
    watch.register(lambda *call: calls.append(call), 0, lambda: ended.append(True))

    def fail_after_a_call() -> None:
        while not calls:
            time.sleep(0.01)
        raise UnknownTagError("it fails")

    with pytest.raises(UnknownTagError), watch.watching("sleep"):
        fail_after_a_call()
    assert ended == [True]


def test_threads_that_register_at_once_lose_no_callback() -> None:
    watch = ProgressWatch(lambda: (0, 0))
    inside, leave = threading.Event(), threading.Event()

    class SlowEntries(tuple[ProgressRegistration, ...]):
        """Stands still while it is copied."""

        def __iter__(self) -> Iterator[ProgressRegistration]:
            inside.set()
            leave.wait(5)
            return super().__iter__()

    watch._entries = SlowEntries()
    one = threading.Thread(target=watch.register, args=(print, 0))
    one.start()
    inside.wait(5)
    other = threading.Thread(target=watch.register, args=(repr, 0))
    other.start()
    other.join(0.2)
    leave.set()
    one.join()
    other.join()
    assert {entry.callback for entry in watch._entries} == {print, repr}
