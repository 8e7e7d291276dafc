"""Progress of long transitions: callbacks and the bar."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from conftest import GRANULE, MakeAllocator, filled

from cumempool import CuMemAllocator, InvalidArgumentError, InvalidTypeError, UnknownTagError
from cumempool._pool import progress as progress_module
from cumempool._pool.progress import ProgressRegistration, ProgressWatch, show_progress

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


def test_the_bar_follows_and_goes(
    alloc: CuMemAllocator, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_progress(alloc) as registration:
        bar = registration.callback
        assert isinstance(bar, progress_module._Bar)
        for done in (0, GRANULE, 2 * GRANULE):
            bar("wake_up", done, 2 * GRANULE)
            assert bar._bar is not None  # also where all is done: the transition goes on
        assert registration.ended is not None
        registration.ended()
        assert bar._bar is None
    printed = capsys.readouterr().out
    assert "wake_up" in printed
    assert "4.2/4.2 MB" in printed or "4.0/4.0 MiB" in printed


def test_the_bar_of_a_transition_that_fails_goes_as_well() -> None:
    watch = ProgressWatch(lambda: (1, 5))
    bar = progress_module._Bar()
    watch.register(bar, 0, bar.end)

    def fail_after_a_bar() -> None:
        while bar._bar is None:
            time.sleep(0.01)
        raise UnknownTagError("it fails")

    with pytest.raises(UnknownTagError), watch.watching("sleep"):
        fail_after_a_bar()
    assert bar._bar is None


def test_a_bar_has_the_name_of_the_transition_that_it_shows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bar = progress_module._Bar()
    bar("sleep", 1, 5)
    bar("wake_up", 1, 5)
    assert bar._bar is not None
    assert [task.description for task in bar._bar.tasks] == ["wake_up"]
    bar.end()
    assert "wake_up" in capsys.readouterr().out


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
