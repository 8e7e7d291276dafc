"""Progress of long transitions: callbacks and the bar."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch
from conftest import GRANULE, MakeAllocator, filled

from cumempool import CuMemAllocator, InvalidArgumentError, InvalidTypeError, UnknownTagError
from cumempool import progress as progress_module
from cumempool.progress import ProgressWatch, show_progress

Calls = list[tuple[str, int, int]]


def test_a_transition_tells_its_bytes(alloc: CuMemAllocator) -> None:
    tensors = [filled(alloc, GRANULE * size, "data") for size in (1, 2)]
    other = filled(alloc, GRANULE, "other")
    assert alloc._core.progress() == (0, 0)
    alloc.sleep(tags="data")
    assert alloc._core.progress() == (3 * GRANULE, 3 * GRANULE)
    alloc.swap(sleep="other", wake="data")
    assert alloc._core.progress() == (4 * GRANULE, 4 * GRANULE)
    alloc.discard("data")
    assert alloc._core.progress() == (0, 0), "nothing is copied"
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
    with alloc.on_progress(fail, after=0), caplog.at_level(logging.ERROR, logger="cumempool"):
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


def test_the_bar_follows_and_goes(
    alloc: CuMemAllocator, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_progress(alloc) as registration:
        bar = registration.callback
        assert isinstance(bar, progress_module._Bar)
        for done in (0, GRANULE, 2 * GRANULE):
            bar("wake_up", done, 2 * GRANULE)
            assert (bar._bar is None) == (done == 2 * GRANULE)
    printed = capsys.readouterr().out
    assert "wake_up" in printed
    assert "4.2/4.2 MB" in printed or "4.0/4.0 MiB" in printed
