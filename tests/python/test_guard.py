"""Registered memory is guarded: ranges, hooks around every transition, pins, generations."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    GRANULE,
    MIB,
    MakeAllocator,
    RunPython,
    filled,
    intact,
    random_bytes,
    states,
)
from refusals import refuses

from cumempool import (
    ClosedError,
    CuMemAllocator,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    OutOfMemoryError,
    RegistrableRange,
    TransitionInProgressError,
    UnknownTagError,
)


@dataclass
class Log:
    """Hooks that write down what they are called with, and raise where they are told to."""

    allocator: CuMemAllocator
    lines: list[tuple[str, str, int]] = field(default_factory=list)
    seen: list[Sequence[RegistrableRange]] = field(default_factory=list)
    fail: set[str] = field(default_factory=set)

    def hooks(self, name: str, tag: str = "kv") -> Any:
        def hook(when: str) -> Callable[[str, Sequence[RegistrableRange]], None]:
            def call(called_tag: str, ranges: Sequence[RegistrableRange]) -> None:
                assert called_tag == tag
                self.lines.append((name, when, len(ranges)))
                self.seen.append(ranges)
                if f"{name} {when}" in self.fail:
                    raise KeyError(f"{name} {when}")

            return call

        return self.allocator.register_hooks(
            tag, before_unmap=hook("before"), after_map=hook("after")
        )

    def take(self) -> list[tuple[str, str, int]]:
        lines, self.lines = self.lines, []
        return lines


@pytest.fixture
def log(alloc: CuMemAllocator) -> Log:
    return Log(alloc)


@pytest.fixture
def kv(alloc: CuMemAllocator) -> Iterator[list[torch.Tensor]]:
    tensors = [filled(alloc, 3 * MIB, "kv", seed) for seed in range(2)]
    yield tensors
    tensors.clear()


# ---- ranges


def test_ranges_are_the_awake_allocations(alloc: CuMemAllocator, kv: list[torch.Tensor]) -> None:
    other = alloc.empty(3, tag="other")
    ranges = alloc.registrable_ranges("kv")
    assert [r.address for r in ranges] == [t.data_ptr() for t in kv]
    assert {(r.bytes, r.device, r.generation) for r in ranges} == {(2 * GRANULE, 0, 1)}
    alloc.sleep(tags="kv")
    late = alloc.empty(3, tag="kv")
    assert [r.address for r in alloc.registrable_ranges("kv")] == [late.data_ptr()]
    assert len(alloc.registrable_ranges("other")) == 1
    alloc.wake_up()
    del other


def test_the_generation_grows_at_every_wake(alloc: CuMemAllocator, kv: list[torch.Tensor]) -> None:
    for expected in range(2, 5):
        alloc.sleep(tags="kv")
        alloc.wake_up()
        assert {r.generation for r in alloc.registrable_ranges("kv")} == {expected}
    assert intact(kv)


@pytest.mark.parametrize(
    "operation", ["registrable_ranges", "register_hooks", "pin", "share", "revoke"]
)
def test_an_unknown_tag_is_refused(alloc: CuMemAllocator, operation: str) -> None:
    alloc.empty(1, tag="kv")
    with refuses(UnknownTagError, operation=operation, tag="kv_cash"):
        getattr(alloc, operation)("kv_cash")
    with pytest.raises(InvalidTypeError):
        getattr(alloc, operation)(3)


# ---- hooks


SLEEPS: dict[str, Callable[[CuMemAllocator], object]] = {
    "sleep": lambda alloc: alloc.sleep(tags="kv"),
    "sleep of all": lambda alloc: alloc.sleep(offload_tags=("kv",)),
    "discard": lambda alloc: alloc.discard("kv"),
    "swap": lambda alloc: alloc.swap(sleep="kv", wake=()),
}
WAKES: dict[str, Callable[[CuMemAllocator], object]] = {
    "wake_up": lambda alloc: alloc.wake_up("kv"),
    "wake_up of all": lambda alloc: alloc.wake_up(),
    "in the background": lambda alloc: alloc.wake_up(blocking=False).result(),
    "by a swap": lambda alloc: alloc.swap(sleep="other", wake="kv"),
}


@pytest.mark.parametrize("sleep", SLEEPS)
@pytest.mark.parametrize("wake", WAKES)
@pytest.mark.usefixtures("kv")
def test_hooks_run_in_order_around_every_transition(
    alloc: CuMemAllocator, log: Log, sleep: str, wake: str
) -> None:
    alloc.empty(1, tag="other")
    log.hooks("a")
    log.hooks("b")
    before = alloc.registrable_ranges("kv")
    SLEEPS[sleep](alloc)
    assert log.take() == [("a", "before", 2), ("b", "before", 2)]
    assert log.seen == [before, before]
    log.seen.clear()
    WAKES[wake](alloc)
    assert log.take() == [("a", "after", 2), ("b", "after", 2)]
    assert log.seen == [alloc.registrable_ranges("kv")] * 2
    assert {r.generation for r in log.seen[0]} == {2}


@pytest.mark.usefixtures("kv")
def test_no_hook_where_nothing_goes_or_comes(alloc: CuMemAllocator, log: Log) -> None:
    log.hooks("a")
    other = alloc.empty(1, tag="other")
    alloc.wake_up()
    alloc.wake_up(blocking=False).result()
    alloc.sleep(tags="other")
    alloc.wake_up("other")
    assert log.take() == []
    alloc.sleep(tags="kv")
    alloc.sleep(tags="kv")
    alloc.discard("kv")
    assert log.take() == [("a", "before", 2)]
    alloc.wake_up()
    alloc.wake_up()
    assert log.take() == [("a", "after", 2)]
    del other


@pytest.mark.usefixtures("kv")
def test_a_wake_is_told_of_what_has_woken(alloc: CuMemAllocator, log: Log) -> None:
    log.hooks("a")
    alloc.sleep(tags="kv")
    late = alloc.empty(1, tag="kv")
    alloc.wake_up()
    assert log.take() == [("a", "before", 2), ("a", "after", 2)]
    alloc.sleep(tags="kv")
    assert log.take() == [("a", "before", 3)]
    alloc.wake_up()
    del late


def test_removed_hooks_are_not_called(
    alloc: CuMemAllocator, log: Log, kv: list[torch.Tensor]
) -> None:
    first = log.hooks("a")
    with log.hooks("b") as second:
        first.remove()
        first.remove()
        alloc.sleep(tags="kv")
        assert log.take() == [("b", "before", 2)]
    second.remove()
    alloc.wake_up()
    assert log.take() == []
    assert intact(kv)


def test_a_failing_before_unmap_cancels_with_nothing_changed(
    alloc: CuMemAllocator, log: Log, kv: list[torch.Tensor]
) -> None:
    for name in "abc":
        log.hooks(name)
    log.fail = {"b before", "a after"}
    stats = alloc.stats()
    for sleep in SLEEPS.values():
        with pytest.raises(KeyError, match="b before") as caught:
            sleep(alloc)
        assert log.take() == [("a", "before", 2), ("b", "before", 2), ("a", "after", 2)]
        if hasattr(caught.value, "__notes__"):
            assert "a after" in caught.value.__notes__[0]
    assert alloc.stats() == stats
    assert intact(kv)
    log.fail.clear()
    alloc.sleep(tags="kv")
    alloc.wake_up()
    assert intact(kv)


def test_hooks_are_undone_where_the_transition_fails(
    alloc: CuMemAllocator, log: Log, kv: list[torch.Tensor]
) -> None:
    log.hooks("a")
    with (
        alloc.pin("kv", "an engine"),
        refuses(InUseError, names="'an engine'", operation="sleep", tag="kv"),
    ):
        alloc.sleep(tags="kv")
    assert log.take() == [("a", "before", 2), ("a", "after", 2)]
    assert {r.generation for r in log.seen[1]} == {1}
    assert intact(kv)


def test_a_failing_after_map_is_reported_and_the_memory_is_awake(
    alloc: CuMemAllocator, log: Log, kv: list[torch.Tensor]
) -> None:
    log.hooks("a")
    log.hooks("b")
    log.fail = {"a after"}
    for wake in list(WAKES.values())[:3]:
        alloc.sleep(tags="kv")
        log.take()
        report: Any = wake(alloc)
        assert log.take() == [("a", "after", 2), ("b", "after", 2)]
        assert report.problems == ("an after_map hook of tag 'kv' failed: KeyError: 'a after'",)
        assert states(alloc) == {"kv": "awake"}
        assert intact(kv)


def test_a_failed_wake_calls_no_hook(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator(mib=8)
    log = Log(alloc)
    kv = filled(alloc, 6 * MIB, "kv")
    log.hooks("a")
    alloc.sleep(tags="kv")
    log.take()
    other = alloc.empty(6 * MIB, dtype=torch.uint8, tag="other")
    for blocking in (True, False):
        with pytest.raises(OutOfMemoryError):
            alloc.wake_up("kv", blocking=blocking)
    assert log.take() == []
    del other
    alloc.wake_up("kv")
    assert log.take() == [("a", "after", 1)]
    assert torch.equal(kv, random_bytes(6 * MIB))


TRANSITIONS: dict[str, Callable[[CuMemAllocator], object]] = {
    "sleep": lambda alloc: alloc.sleep(tags="other"),
    "discard": lambda alloc: alloc.discard("other"),
    "swap": lambda alloc: alloc.swap(sleep="other"),
    "wake_up": lambda alloc: alloc.wake_up("other"),
    "wake_up in the background": lambda alloc: alloc.wake_up("other", blocking=False),
}


@pytest.mark.parametrize("name", TRANSITIONS)
@pytest.mark.usefixtures("kv")
def test_a_hook_cannot_start_a_transition(alloc: CuMemAllocator, name: str) -> None:
    other = alloc.empty(1, tag="other")
    refused: list[TransitionInProgressError] = []

    def hook(tag: str, ranges: object) -> None:
        with pytest.raises(TransitionInProgressError) as caught:
            TRANSITIONS[name](alloc)
        refused.append(caught.value)

    alloc.register_hooks("kv", before_unmap=hook, after_map=hook)
    alloc.sleep(tags="kv")
    alloc.wake_up()
    assert len(refused) == 2
    assert states(alloc) == {"kv": "awake", "other": "awake"}
    del other


@pytest.mark.usefixtures("kv")
def test_a_hook_pins_and_reads_ranges(alloc: CuMemAllocator) -> None:
    pins = [alloc.pin("kv", "registration")]

    def before(tag: str, ranges: object) -> None:
        assert alloc.registrable_ranges(tag) == ranges
        pins.pop().release()

    def after(tag: str, ranges: object) -> None:
        pins.append(alloc.pin(tag, "registration"))
        assert alloc.registrable_ranges(tag) == ranges

    with alloc.register_hooks("kv", before_unmap=before, after_map=after):
        for _ in range(3):
            alloc.sleep(tags="kv")
            assert alloc.stats().tags["kv"].pins == 0
            alloc.wake_up()
            assert alloc.stats().tags["kv"].pins == 1
    pins.pop().release()


@pytest.mark.parametrize("hook", [3, "x"])
@pytest.mark.usefixtures("kv")
def test_a_hook_is_something_to_call(alloc: CuMemAllocator, hook: Any) -> None:
    with refuses(InvalidTypeError, names="before_unmap"):
        alloc.register_hooks("kv", before_unmap=hook)
    with refuses(InvalidTypeError, names="after_map"):
        alloc.register_hooks("kv", after_map=hook)


# ---- wakes in the background


def in_a_with_block(alloc: CuMemAllocator) -> None:
    with alloc.wake_up(blocking=False):
        pass


def left_by_an_exception(alloc: CuMemAllocator) -> None:
    with pytest.raises(KeyError), alloc.wake_up(blocking=False):
        raise KeyError


def dropped(alloc: CuMemAllocator) -> None:
    alloc.wake_up(blocking=False)
    gc.collect()


def asked_twice(alloc: CuMemAllocator) -> None:
    handle = alloc.wake_up(blocking=False)
    assert handle.result() is handle.result()


def asked_by_threads(alloc: CuMemAllocator) -> None:
    handle = alloc.wake_up(blocking=False)
    threads = [threading.Thread(target=handle.result) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    "end", [in_a_with_block, left_by_an_exception, dropped, asked_twice, asked_by_threads]
)
def test_a_wake_in_the_background_calls_hooks_once(
    alloc: CuMemAllocator, log: Log, kv: list[torch.Tensor], end: Callable[[CuMemAllocator], None]
) -> None:
    log.hooks("a")
    for _ in range(3):
        alloc.sleep(tags="kv")
        end(alloc)
        assert log.take() == [("a", "before", 2), ("a", "after", 2)]
        assert intact(kv)


def test_the_next_transition_calls_hooks_that_a_wake_still_owes(
    alloc: CuMemAllocator, log: Log, kv: list[torch.Tensor]
) -> None:
    log.hooks("a")
    alloc.sleep(tags="kv")
    log.fail = {"a after"}
    handle = alloc.wake_up(blocking=False)
    alloc.sleep(tags="kv")
    assert [when for _, when, _ in log.take()] == ["before", "after", "before"]
    assert "a after" in handle.result().problems[0]
    assert log.take() == []
    alloc.wake_up()
    assert intact(kv)


@pytest.mark.usefixtures("kv")
def test_a_hook_of_a_wake_cannot_wait_for_it(alloc: CuMemAllocator) -> None:
    alloc.sleep(tags="kv")
    handles: list[Any] = []
    alloc.register_hooks("kv", after_map=lambda tag, ranges: handles[0].result())
    handles.append(alloc.wake_up(blocking=False))
    (problem,) = handles[0].result().problems
    assert "TransitionInProgressError" in problem


def test_at_the_end_of_the_program_hooks_are_called(run_python: RunPython) -> None:
    done = run_python("""
from cumempool import CuMemAllocator
alloc = CuMemAllocator()
kv = alloc.empty(1 << 22, tag="kv").fill_(3)
alloc.sleep(tags="kv")
alloc.register_hooks("kv", after_map=lambda tag, ranges: print(tag, len(ranges)))
handle = alloc.wake_up(blocking=False)
""")
    assert (done.code, done.out, done.err) == (0, "kv 1\n", "")


# ---- pins


@pytest.mark.parametrize("sleep", SLEEPS)
def test_a_pinned_tag_does_not_sleep(
    alloc: CuMemAllocator, kv: list[torch.Tensor], sleep: str
) -> None:
    operation = sleep.split()[0]
    pin = alloc.pin("kv", holder="decode worker 3")
    with alloc.pin("kv", holder="nixl") as second:
        assert alloc.stats().tags["kv"].pins == 2
        with refuses(InUseError, names="'decode worker 3', 'nixl'", operation=operation, tag="kv"):
            SLEEPS[sleep](alloc)
    second.release()
    with refuses(InUseError, names="'decode worker 3'", operation=operation, tag="kv"):
        SLEEPS[sleep](alloc)
    assert (pin.tag, pin.holder, pin.released) == ("kv", "decode worker 3", False)
    assert intact(kv)
    pin.release()
    pin.release()
    assert pin.released
    assert alloc.stats().tags["kv"].pins == 0
    SLEEPS[sleep](alloc)
    alloc.wake_up()


@pytest.mark.usefixtures("kv")
def test_a_pin_of_one_tag_leaves_others_alone(alloc: CuMemAllocator) -> None:
    other = alloc.empty(1, tag="other")
    with alloc.pin("kv"):
        alloc.sleep(tags="other")
        with refuses(InUseError, names="unnamed", operation="sleep", tag="kv"):
            alloc.sleep()
    alloc.wake_up()
    del other


@pytest.mark.usefixtures("kv")
def test_what_sleeps_can_be_pinned_and_wakes(alloc: CuMemAllocator) -> None:
    alloc.sleep(tags="kv")
    with alloc.pin("kv"):
        alloc.sleep(tags="kv")
        alloc.wake_up("kv")


@pytest.mark.usefixtures("kv")
def test_a_holder_needs_a_name(alloc: CuMemAllocator) -> None:
    for holder in ("", "a\0b"):
        with refuses(InvalidArgumentError, names="holder"):
            alloc.pin("kv", holder)
    with refuses(InvalidTypeError, names="holder"):
        alloc.pin("kv", 3)  # type: ignore[arg-type]


def test_after_close_there_is_nothing_to_pin(alloc: CuMemAllocator) -> None:
    alloc.empty(1, tag="kv")
    pin = alloc.pin("kv")
    alloc.close()
    pin.release()
    with pytest.raises(ClosedError):
        alloc.pin("kv")


# ---- threads and forks


def test_sleeps_wakes_hooks_and_pins_of_many_threads(alloc: CuMemAllocator) -> None:
    tensors = {tag: filled(alloc, 3 * MIB, tag, seed) for seed, tag in enumerate("abc")}
    registered: dict[str, int] = dict.fromkeys("abc", 1)

    def before(tag: str, ranges: Sequence[RegistrableRange]) -> None:
        assert len(ranges) == 1
        registered[tag] -= 1

    def after(tag: str, ranges: Sequence[RegistrableRange]) -> None:
        assert len(ranges) == 1
        registered[tag] += 1

    for tag in tensors:
        alloc.register_hooks(tag, before_unmap=before, after_map=after)
    errors: list[BaseException] = []

    def cycle(tag: str) -> None:
        try:
            for turn in range(30):
                assert alloc.sleep(tags=tag).problems == ()
                if turn % 2:
                    alloc.wake_up(tag, blocking=False).result()
                else:
                    alloc.wake_up(tag)
                with alloc.pin(tag):
                    assert alloc.registrable_ranges(tag)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    threads = [threading.Thread(target=cycle, args=(tag,)) for tag in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert registered == dict.fromkeys("abc", 1)
    assert intact(list(tensors.values()))


def test_a_fork_during_a_transition_does_not_hang_the_child(run_python: RunPython) -> None:
    done = run_python("""
import os, threading, warnings
from cumempool import CuMemAllocator, CumempoolError
warnings.simplefilter("ignore")
alloc = CuMemAllocator()
kv = alloc.empty(3, tag="kv")
inside, leave = threading.Event(), threading.Event()
alloc.register_hooks("kv", before_unmap=lambda *_: (inside.set(), leave.wait()))
thread = threading.Thread(target=lambda: alloc.sleep(tags="kv"))
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    try:
        alloc.wake_up()
    except CumempoolError as error:
        os._exit(7 if type(error).__name__ == "ForkedError" else 1)
    os._exit(2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
leave.set()
thread.join()
""")
    assert (done.code, done.out, done.err) == (0, "7\n", "")


def test_nothing_is_prepared_for_memory_that_stays_pinned(alloc: CuMemAllocator) -> None:
    kv = filled(alloc, MIB, "kv")
    with alloc.pin("kv", "a raw registration"):
        with refuses(InUseError, names="'a raw registration'", operation="prepare", tag="kv"):
            alloc.prepare(tags="kv")
        with (
            alloc.register_hooks("kv", after_map=lambda tag, ranges: None),
            pytest.raises(InUseError),
        ):
            alloc.prepare(tags="kv")
        assert alloc.stats().host_bytes == 0
    pin = alloc.pin("kv", "what its hook takes off")
    with alloc.register_hooks("kv", before_unmap=lambda tag, ranges: pin.release()):
        assert alloc.prepare(tags="kv") == GRANULE
        alloc.sleep(tags="kv")
    alloc.wake_up()
    assert torch.equal(kv, random_bytes(MIB))


# ---- where interrupts and the garbage collector strike


def test_a_handle_that_is_dropped_inside_a_hook_starts_nothing_there(
    alloc: CuMemAllocator, kv: list[torch.Tensor]
) -> None:
    called: list[str] = []
    other = filled(alloc, GRANULE, "other", 5)
    alloc.sleep(tags="kv")
    alloc.register_hooks("kv", after_map=lambda tag, ranges: called.append("woken"))
    handles = [alloc.wake_up("kv", blocking=False)]

    def drop(tag: str, ranges: object) -> None:
        called.append("before")
        handles.clear()
        called.append("after")

    with alloc.register_hooks("other", before_unmap=drop):
        alloc.sleep(tags="other")
    assert called == ["woken", "before", "after"]
    alloc.wake_up()
    assert called == ["woken", "before", "after"]
    assert intact(kv)
    assert torch.equal(other, random_bytes(GRANULE, 5))


def waits_for_its_turn(thread: int) -> bool:
    """Whether a thread stays where it asks for a turn."""
    places = set()
    for _ in range(20):
        frame = sys._current_frames()[thread]
        code = frame.f_code
        places.add((code.co_name, Path(code.co_filename).name, frame.f_lasti))
        time.sleep(0.001)
    return len(places) == 1 and next(iter(places))[:2] == ("__enter__", "hooks.py")


def test_an_interrupt_while_waiting_for_a_turn_leaves_the_turn_to_its_owner(
    alloc: CuMemAllocator, kv: list[torch.Tensor]
) -> None:
    inside, go_on, over = threading.Event(), threading.Event(), threading.Event()
    waiter = threading.get_ident()

    def hold(tag: str, ranges: object) -> None:
        inside.set()
        assert go_on.wait(60)

    def interrupt() -> None:
        while not waits_for_its_turn(waiter):
            if over.is_set():
                return
        signal.pthread_kill(waiter, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with alloc.register_hooks("kv", before_unmap=hold), ThreadPoolExecutor(2) as threads:
            slept = threads.submit(alloc.sleep, tags="kv")
            assert inside.wait(60)
            struck = threads.submit(interrupt)
            try:
                with pytest.raises(KeyboardInterrupt):
                    alloc.wake_up()
            finally:
                over.set()
            struck.result()
            assert not slept.done()
            go_on.set()
            assert slept.result(60).bytes_freed == 2 * 2 * GRANULE
    finally:
        go_on.set()
        signal.signal(signal.SIGINT, before)
    assert alloc.wake_up().bytes_mapped == 2 * 2 * GRANULE
    assert intact(kv)


def test_an_exception_that_takes_no_notes_passes_as_it_is(
    alloc: CuMemAllocator, log: Log, kv: list[torch.Tensor]
) -> None:
    """As all of them before Python 3.11."""

    class NoteLessError(Exception):
        @property
        def add_note(self) -> None:
            raise AttributeError

    def cancel(tag: str, ranges: object) -> None:
        raise NoteLessError("not now")

    log.hooks("a")
    log.fail = {"a after"}
    with (
        alloc.register_hooks("kv", before_unmap=cancel),
        pytest.raises(NoteLessError, match="not now"),
    ):
        alloc.sleep(tags="kv")
    assert log.take() == [("a", "before", 2), ("a", "after", 2)]
    assert states(alloc) == {"kv": "awake"}
    assert intact(kv)
