"""Nothing that waits for a device holds the GIL meanwhile.

Other threads go on, and work in flight that needs the GIL comes to an end.

A device of the host driver is made busy by a function of C in its default stream.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import RunPython

from cumempool import _core

LIBC = ctypes.CDLL(None, use_errno=True)
BYTES = 1 << 16


def address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class Busy:
    """A device that is at work until it is told to end."""

    def __init__(self, driver: _core.Driver) -> None:
        self.driver = driver
        self.semaphore = ctypes.create_string_buffer(64)
        assert LIBC.sem_init(self.semaphore, 0, 0) == 0

    def begin(self) -> None:
        self.driver.launch(0, address_of(LIBC.sem_wait), ctypes.addressof(self.semaphore))

    def end(self) -> None:
        assert LIBC.sem_post(self.semaphore) == 0


@pytest.fixture
def driver() -> _core.Driver:
    return _core.open_host(
        devices=1, bytes_per_device=64 << 20, granularity=BYTES, rdma=False, fabric=False
    )


@pytest.fixture
def busy(driver: _core.Driver) -> Busy:
    return Busy(driver)


@pytest.fixture
def allocator(driver: _core.Driver) -> Iterator[_core.Allocator]:
    allocator = _core.Allocator(driver, 0, True, None)
    allocator.declare_tag("w", 0, 0)
    yield allocator
    allocator.close(force=True)


def ends_with_the_help_of_a_python_thread(busy: Busy, wait: Callable[[], None]) -> None:
    """Runs `wait`, which lasts until another thread of Python has run."""

    def help_it_end() -> None:
        time.sleep(0.05)
        busy.end()

    busy.begin()
    helper = threading.Thread(target=help_it_end)
    helper.start()
    wait()
    helper.join()


@pytest.mark.parametrize("taken", [False, True], ids=["of a capsule", "of a tensor"])
def test_a_deleter_leaves_the_gil_to_others(
    driver: _core.Driver, allocator: _core.Allocator, busy: Busy, taken: bool
) -> None:
    held: list[Any] = [allocator.malloc_capsule("w", 0, BYTES)]
    if taken:
        held = [torch.from_dlpack(held.pop())]  # type: ignore[attr-defined]
    ends_with_the_help_of_a_python_thread(busy, held.clear)
    assert allocator.snapshot(True)["allocations"] == []


def test_closing_leaves_the_gil_to_others(allocator: _core.Allocator, busy: Busy) -> None:
    address = allocator.malloc("w", 0, BYTES)
    ends_with_the_help_of_a_python_thread(busy, lambda: allocator.close(force=True))
    _core.free(address)


def test_memory_of_another_process_is_unmapped_without_the_gil(
    driver: _core.Driver, allocator: _core.Allocator, busy: Busy
) -> None:
    address = allocator.malloc("w", 0, BYTES)
    number, _ = allocator.export_fd(address)
    held = [_core.open_shared(driver, 0, number, BYTES, True, None)]
    os.close(number)
    ends_with_the_help_of_a_python_thread(busy, held.clear)
    _core.free(address)


def pending(allocator: _core.Allocator) -> int:
    count = allocator.snapshot(False)["totals"]["pending_free_bytes"]
    assert isinstance(count, int)
    return count


def test_a_deleter_goes_on_while_the_device_is_busy(allocator: _core.Allocator, busy: Busy) -> None:
    allocator.set_free_wait(0)
    held = [allocator.malloc_capsule("w", 0, BYTES)]
    busy.begin()
    held.clear()
    assert pending(allocator) == BYTES
    busy.end()
    allocator.close(force=False)
    assert pending(allocator) == 0


def test_an_allocator_that_is_dropped_waits_without_the_gil(
    driver: _core.Driver, busy: Busy
) -> None:
    held = [_core.Allocator(driver, 0, True, None)]
    held[0].declare_tag("w", 0, 0)
    held[0].set_free_wait(0)
    address = held[0].malloc("w", 0, BYTES)

    def free_and_drop() -> None:
        _core.free(address)
        held.clear()

    ends_with_the_help_of_a_python_thread(busy, free_and_drop)


@pytest.mark.parametrize(("function", "argument"), [("usleep", 300_000), ("sleep", 60)])
def test_a_process_ends_silently_while_freed_memory_waits_for_its_device(
    run_python: RunPython, function: str, argument: int
) -> None:
    began = time.monotonic()
    done = run_python(
        f"""
import ctypes
from cumempool import _core
driver = _core.open_host(
    devices=1, bytes_per_device=1 << 24, granularity=1 << 16, rdma=False, fabric=False
)
allocator = _core.Allocator(driver, 0, True, None)
allocator.declare_tag("w", 0, 0)
allocator.set_free_wait(0)
kept = allocator.malloc_capsule("w", 0, 1 << 16)  # so that nothing closes the allocator
address = allocator.malloc("w", 0, 1 << 16)
function = getattr(ctypes.CDLL(None), "{function}")
driver.launch(0, ctypes.cast(function, ctypes.c_void_p).value, {argument})
_core.free(address)
"""
    )
    assert (done.code, done.out, done.err) == (0, "", "")
    assert time.monotonic() - began < 30


def test_a_child_forked_while_freed_memory_waits_ends_and_the_parent_goes_on(
    run_python: RunPython,
) -> None:
    done = run_python(
        """
import ctypes, os, warnings
from cumempool import _core, errors
libc = ctypes.CDLL(None)
driver = _core.open_host(
    devices=1, bytes_per_device=1 << 24, granularity=1 << 16, rdma=False, fabric=False
)
allocator = _core.Allocator(driver, 0, True, None)
allocator.declare_tag("w", 0, 0)
allocator.set_free_wait(0)
address = allocator.malloc("w", 0, 1 << 16)
other = allocator.malloc("w", 0, 1 << 16)
driver.launch(0, ctypes.cast(libc.usleep, ctypes.c_void_p).value, 300_000)
_core.free(address)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Python warns of forks of processes with threads
    child = os.fork()
if child == 0:
    try:
        _core.free(other)
    except errors.ForkedError:
        raise SystemExit(3)
    raise SystemExit(4)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
_core.free(other)
allocator.close(force=False)
"""
    )
    assert (done.code, done.out, done.err) == (0, "", "")


def test_a_deleter_in_a_thread_that_python_ends_is_silent(run_python: RunPython) -> None:
    """The interpreter ends while a daemon thread waits in a deleter."""
    done = run_python(
        """
import ctypes, sys, threading, time
from cumempool import _core
libc = ctypes.CDLL(None)
driver = _core.open_host(
    devices=1, bytes_per_device=1 << 24, granularity=1 << 16, rdma=False, fabric=False
)
allocator = _core.Allocator(driver, 0, True, None)
allocator.declare_tag("w", 0, 0)
held = [allocator.malloc_capsule("w", 0, 1 << 16)]
driver.launch(0, ctypes.cast(libc.usleep, ctypes.c_void_p).value, 300_000)
began = threading.Event()

def drop():
    began.set()
    held.clear()

class EndsLate:
    # Goes when the interpreter is ending already, and lets the thread come back then.
    def __del__(self, sleep=time.sleep):
        sleep(0.6)

sys.late = EndsLate()
threading.Thread(target=drop, daemon=True).start()
began.wait()
time.sleep(0.02)
"""
    )
    assert (done.code, done.out, done.err) == (0, "", "")
