"""Hostile use: interrupts anywhere, garbage on sockets, odd sizes, crowds, and sudden ends."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import gc
import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    GRANULE,
    MIB,
    MakeAllocator,
    RunPython,
    assert_nothing_is_held,
    fds,
    filled,
    random_bytes,
    states,
    until,
)
from interrupting import InterruptAt
from refusals import refuses

from cumempool import (
    BackupDamagedError,
    BackupError,
    CuMemAllocator,
    CuMemConfig,
    CumempoolError,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    OutOfMemoryError,
    SharedMemory,
    SharingError,
    open_shared,
)

pytestmark = pytest.mark.extensive

NOBODY = 65534
Act = Callable[[CuMemAllocator], object]


# ---- KeyboardInterrupt


def strikes_in(file: str) -> bool:
    """Not in hooks, which are the program's own, nor in what only counts or is a weak reference."""
    return file != __file__ and not file.endswith(("/stats.py", "/report.py", "/_weakrefset.py"))


def sleep_two(alloc: CuMemAllocator) -> object:
    return alloc.sleep(offload_tags=("a", "b"), tags=("a", "b"))


def wake_later(alloc: CuMemAllocator) -> object:
    return alloc.wake_up(blocking=False).result()


INTERRUPTED: dict[str, tuple[Act | None, Act]] = {
    "sleep": (None, sleep_two),
    "discard": (None, lambda alloc: alloc.discard("c")),
    "wake": (sleep_two, lambda alloc: alloc.wake_up()),
    "wake later": (sleep_two, wake_later),
    "swap": (sleep_two, lambda alloc: alloc.swap(sleep="c", wake=("a", "b"), offload_tags="c")),
    "prepare": (None, lambda alloc: alloc.prepare(tags="a")),
    "empty": (None, lambda alloc: alloc.empty(5, tag="new")),
}


class Interrupted:
    """A fresh allocator whose tag "a" has hooks, and an operation that is cut off at a moment."""

    def __init__(self, operation: str, moment: int) -> None:
        before, act = INTERRUPTED[operation]
        self.alloc = CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=32 * MIB))
        self.tensors = {tag: filled(self.alloc, 1000, tag, n) for n, tag in enumerate("abc")}
        self.told = told = []  # type: list[str]
        self.alloc.register_hooks(
            "a",
            before_unmap=lambda *_: told.append("goes"),
            after_map=lambda *_: told.append("comes"),
        )
        if before is not None:
            before(self.alloc)
        self.first = states(self.alloc)
        self.interrupt = InterruptAt(moment, strikes_in)
        self.done = self.interrupt.run(lambda: act(self.alloc))

    def check(self, lost: str) -> None:
        """In the handler of the interrupt: all is as before or as after, and goes on."""
        self.alloc.wake_up()
        for number, (tag, tensor) in enumerate(self.tensors.items()):
            assert tag == lost or torch.equal(tensor, random_bytes(1000, number))
        sleep_two(self.alloc)
        self.alloc.wake_up()
        assert self.told.count("goes") == self.told.count("comes")
        assert set(states(self.alloc).values()) == {"awake"}

    def end(self) -> int:
        """Leaves nothing; how many moments there were."""
        self.tensors.clear()
        self.alloc.close()
        assert_nothing_is_held(self.alloc.stats())
        return self.interrupt.seen


# Of generators that an interrupt strikes while they are dropped: Python goes on by itself.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("operation", INTERRUPTED)
def test_an_interrupt_at_any_moment_finishes_or_undoes(operation: str) -> None:
    lost = "c" if operation == "discard" else ""
    moments = Interrupted(operation, 0).end()
    assert moments > 3
    for moment in range(1, moments + 1):
        interrupted = Interrupted(operation, moment)
        try:
            interrupted.check(lost)
        except (AssertionError, CumempoolError) as error:
            pytest.fail(f"moment {moment}, {interrupted.interrupt.where}: {error!r}")
        finally:
            interrupted.end()


SIGNALS = """
import os, random, signal, sys, threading, time, torch
from cumempool import CuMemAllocator
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever began it may ignore it
alloc = CuMemAllocator()
tensors = [alloc.empty(16 << 20, dtype=torch.uint8, tag="t").fill_(n) for n in range(1, 7)]
choose = random.Random(3)

def strike():
    time.sleep(choose.random() * 0.03)
    os.kill(os.getpid(), signal.SIGINT)

interrupted = 0
for _ in range(12):
    thread = threading.Thread(target=strike)
    try:
        thread.start()
        alloc.sleep(tags="t")
        alloc.wake_up()
        alloc.sleep(tags="t")
        alloc.wake_up(blocking=False).result()
        time.sleep(10)
    except KeyboardInterrupt:
        found = {info.state for info in alloc.snapshot()}
        assert len(found) == 1, found
        alloc.wake_up()
        interrupted += 1
    thread.join()
    assert all(bool(tensor.eq(n).all()) for n, tensor in enumerate(tensors, 1))
print(interrupted, alloc.stats().failed_transitions)
"""


def test_real_signals_during_sleeps_and_wakes(run_python: RunPython) -> None:
    done = run_python(SIGNALS)
    assert (done.code, done.out, done.err) == (0, "12 0\n", "")


def test_a_signal_that_nobody_handles_ends_the_process_as_any_other(run_python: RunPython) -> None:
    done = run_python("""
import os, signal, threading, torch
from cumempool import CuMemAllocator
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever began it may ignore it
alloc = CuMemAllocator()
tensor = alloc.empty(64 << 20, dtype=torch.uint8, tag="t")
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
while True:
    alloc.sleep(tags="t")
    alloc.wake_up()
""")
    assert done.code == -signal.SIGINT
    assert done.out == ""
    assert done.err.startswith("Traceback")
    assert done.err.rstrip().endswith("KeyboardInterrupt")
    assert done.err.count("Traceback") == 1


# ---- exceptions in hooks


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_a_hook_that_raises_before_cancels(
    alloc: CuMemAllocator, kind: type[BaseException]
) -> None:
    tensor = filled(alloc, 1000, "t")
    told: list[str] = []

    def refuse(*_: object) -> None:
        raise kind

    alloc.register_hooks("t", before_unmap=lambda *_: 0, after_map=lambda *_: told.append("back"))
    with alloc.register_hooks("t", before_unmap=refuse):
        for transition in (
            lambda: alloc.sleep(tags="t"),
            lambda: alloc.discard("t"),
            lambda: alloc.swap(sleep="t"),
        ):
            with pytest.raises(kind):
                transition()
            assert states(alloc) == {"t": "awake"}
    assert told == ["back"] * 3
    alloc.sleep(tags="t")
    alloc.wake_up()
    assert torch.equal(tensor, random_bytes(1000))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_hook_that_ends_the_program_after_a_wake_is_heard_last(
    alloc: CuMemAllocator, kind: type[BaseException]
) -> None:
    """Memory is there, and all other hooks are told so, before the exception goes on."""
    tensor = filled(alloc, 1000, "t")
    told: list[str] = []

    def end(*_: object) -> None:
        raise kind

    alloc.register_hooks("t", after_map=end)
    alloc.register_hooks("t", after_map=lambda *_: told.append("there"))
    alloc.sleep(tags="t")
    with pytest.raises(kind):
        alloc.wake_up()
    assert torch.equal(tensor, random_bytes(1000))
    assert told == ["there"]
    alloc.sleep(tags="t")
    with pytest.raises(kind):
        alloc.wake_up(blocking=False).result()
    assert torch.equal(tensor, random_bytes(1000))
    assert told == ["there"] * 2
    assert states(alloc) == {"t": "awake"}


# ---- the garbage collector


class Cycle:
    """Keeps a tensor until the garbage collector finds it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.itself = self


@contextlib.contextmanager
def collecting_all_the_time() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def test_collections_during_every_step_of_a_transition(alloc: CuMemAllocator) -> None:
    kept = filled(alloc, GRANULE + 5, "t")
    with collecting_all_the_time():
        for round_ in range(40):
            for tag in ("t", "other"):
                Cycle(alloc.empty(100, dtype=torch.uint8, tag=tag).fill_(round_))
            alloc.sleep(tags=("t", "other"))
            Cycle(alloc.empty(7, tag="t"))
            if round_ % 2:
                Cycle(alloc.wake_up(blocking=False))  # type: ignore[arg-type]
            else:
                alloc.wake_up()
    gc.collect()
    alloc.wake_up()
    assert torch.equal(kept, random_bytes(GRANULE + 5))
    assert [info.tag for info in alloc.snapshot()] == ["t"]


def test_a_hook_that_collects_frees_what_is_about_to_sleep(alloc: CuMemAllocator) -> None:
    kept = filled(alloc, 1000, "t")
    alloc.use_memory_pool("t")
    cycles = [weakref.ref(Cycle(filled(alloc, GRANULE, "t", n))) for n in range(3)]
    alloc.register_hooks("t", before_unmap=lambda *_: gc.collect(), after_map=lambda *_: None)
    gc.disable()
    try:
        report = alloc.sleep(tags="t")
    finally:
        gc.enable()
    assert [cycle() for cycle in cycles] == [None] * 3
    assert report.tags["t"].allocations == 1
    alloc.wake_up()
    assert torch.equal(kept, random_bytes(1000))


def test_a_thread_collects_what_another_is_putting_to_sleep(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator(mib=512)
    kept = filled(alloc, 8 * MIB, "t")
    over = threading.Event()
    failures: list[BaseException] = []

    def litter() -> None:
        try:
            while not over.is_set():
                # May sleep at once; may be too much, while another thread collects.
                with contextlib.suppress(OutOfMemoryError):
                    Cycle(alloc.empty(MIB, dtype=torch.uint8, tag="t"))
                gc.collect()
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            failures.append(error)

    threads = [threading.Thread(target=litter) for _ in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline and not failures:
        alloc.sleep(tags="t")
        with contextlib.suppress(OutOfMemoryError):
            alloc.wake_up()
            assert torch.equal(kept, random_bytes(8 * MIB))
    over.set()
    for thread in threads:
        thread.join(timeout=30)
    assert failures == []
    gc.collect()
    alloc.wake_up()
    assert torch.equal(kept, random_bytes(8 * MIB))
    assert alloc.stats().pending_free_bytes == 0
    assert alloc.stats().awake_bytes == 8 * MIB


def test_an_allocator_in_a_cycle_goes_in_the_middle_of_anothers_sleep(
    alloc: CuMemAllocator, make_allocator: MakeAllocator
) -> None:
    kept = filled(alloc, 1000, "t")
    threads = threading.active_count()
    gone = []
    for _ in range(5):
        other = CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=8 * MIB))
        cycle = Cycle(other.empty(3, tag="x"))
        cycle.allocator = other  # type: ignore[attr-defined]
        other.share("x")
        gone.append(weakref.ref(other))
        del other, cycle
    alloc.register_hooks("t", before_unmap=lambda *_: gc.collect())
    alloc.sleep(tags="t")
    alloc.wake_up()
    assert [each() for each in gone] == [None] * 5
    assert torch.equal(kept, random_bytes(1000))
    until(lambda: threading.active_count() == threads)


# ---- crowds


def test_64_threads_at_once(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator(mib=1024)
    shared = filled(alloc, 3 * MIB, "shared")
    failures: list[BaseException] = []
    start = threading.Barrier(64)

    def work(number: int) -> None:
        choose = random.Random(number)
        tag = f"tag {number % 16}"
        try:
            start.wait()
            for _ in range(4):
                tensor = alloc.empty(choose.randrange(1, 3000), dtype=torch.int64, tag=tag)
                tensor.fill_(number)
                what = choose.randrange(5)
                if what == 0:
                    alloc.sleep(tags="shared")
                elif what == 1:
                    alloc.wake_up("shared")
                elif what == 2:
                    alloc.wake_up("shared", blocking=False).result()
                elif what == 3:
                    alloc.stats()
                    alloc.snapshot()
                else:
                    with alloc.use_memory_pool(tag):
                        assert alloc.tag_of(alloc.empty(1)) == tag
                assert bool(tensor.eq(number).all())
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    alloc.wake_up()
    assert torch.equal(shared, random_bytes(3 * MIB))
    assert alloc.stats().pending_free_bytes == 0
    assert alloc.stats().awake_bytes == 4 * MIB


MANY = """
import resource, time, torch
from cumempool import CuMemAllocator, CuMemConfig
COUNT = 10_000
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * COUNT), hard))
alloc = CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=COUNT * (2 << 20)))
alloc.use_memory_pool("most", on_sleep="discard")
tensors = [alloc.empty(1, dtype=torch.int64, tag="few" if n % 50 == 0 else "most").fill_(n)
           for n in range(COUNT)]
assert len(alloc.snapshot()) == COUNT
report = alloc.sleep(tags=("few", "most"))
assert report.tags["few"].allocations == COUNT // 50
assert alloc.stats().physical_bytes == 0
alloc.wake_up()
for n, tensor in enumerate(tensors):
    assert n % 50 or int(tensor) == n, n
del tensors, tensor
assert alloc.stats().reserved_address_bytes == 0
alloc.close()
"""


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 10_200,
    reason="the simulated devices want a file descriptor per allocation",
)
def test_10000_allocations(run_python: RunPython) -> None:
    done = run_python(MANY)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_without_file_descriptors_it_says_so_and_goes_on(run_python: RunPython) -> None:
    done = run_python("""
import os, resource, torch
from cumempool import CuMemAllocator, CumempoolError, open_shared
alloc = CuMemAllocator()
kept = alloc.empty(100, tag="kept").fill_(5)
memory = alloc.share(kept)
files = lambda: len(os.listdir("/proc/self/fd"))
before = files()
opened = open_shared(memory)
del opened
import time
while files() > before:  # the owner's end of the connection is closed a little later
    time.sleep(0.01)
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
made = []
try:
    while True:
        made.append(alloc.empty(1, tag="more"))
except CumempoolError as error:
    assert error.operation == "malloc" and "ulimit -n" in str(error), repr(error)
assert 10 < len(made) < 64, len(made)
for call in (lambda: alloc.share(kept), lambda: open_shared(memory)):
    try:
        call()
        raise SystemExit("did not raise")
    except (CumempoolError, OSError) as error:
        assert isinstance(error, CumempoolError), repr(error)
made.clear()
assert open_shared(memory).eq(5).all()
time.sleep(0.2)
while alloc.stats().tags["kept"].pins:
    time.sleep(0.01)
alloc.sleep(tags="kept")
alloc.wake_up()
assert kept.eq(5).all()
""")
    assert (done.code, done.out) == (0, ""), done.err


def test_1000_tags(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator(mib=2048)
    names = [f"層 {number} ✓" for number in range(1000)]
    tensors = [alloc.empty(2, dtype=torch.int32, tag=tag).fill_(n) for n, tag in enumerate(names)]
    for tag in names[::50]:
        alloc.register_hooks(tag, before_unmap=lambda *_: None)
        with alloc.use_memory_pool(tag, on_sleep="discard", on_wake="zero"):
            pass
    report = alloc.sleep(tags=names)
    assert sorted(report.tags) == sorted(names)
    assert alloc.stats().physical_bytes == 0
    assert "層 999 ✓" in str(report.to_dict())
    alloc.wake_up(names[:500])
    alloc.wake_up(names)
    values = [int(tensor[1]) for tensor in tensors]
    assert values == [0 if number % 50 == 0 else number for number in range(1000)]


# ---- sizes and numbers


def test_the_smallest_and_the_largest(alloc: CuMemAllocator) -> None:
    nothing = alloc.empty(0, tag="t")
    one = alloc.empty(1, dtype=torch.uint8, tag="t").fill_(9)
    largest = alloc.empty(256 * MIB - GRANULE, dtype=torch.uint8, tag="t")
    largest[-1] = 7
    with pytest.raises(OutOfMemoryError):
        alloc.empty(1, dtype=torch.uint8, tag="t")
    assert one.nbytes == 1
    assert alloc.allocation_of(one).requested_bytes == 1
    alloc.sleep(tags="t")
    alloc.wake_up()
    assert (int(one), int(largest[-1]), nothing.numel()) == (9, 7, 0)


HUGE = (2**62, 2**62 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 2**64, 2**65, 10**30)


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.complex128])
def test_sizes_about_the_largest_number(
    alloc: CuMemAllocator, size: int, dtype: torch.dtype
) -> None:
    kept = filled(alloc, 1000, "kept")
    before = alloc.stats()
    for shape in ((size,), (1, size), (size, size), (2, 2, size), (2, size, 0)):
        with pytest.raises((InvalidArgumentError, OutOfMemoryError)):
            alloc.empty(shape, dtype=dtype)
    after = alloc.stats()
    assert after.reserved_address_bytes == before.reserved_address_bytes
    assert after.physical_bytes == before.physical_bytes
    assert torch.equal(kept, random_bytes(1000))


def calls_of_the_bindings(alloc: CuMemAllocator, number: int) -> dict[str, Callable[[], object]]:
    """Every number that the extension module takes, at its border."""
    core = alloc._core
    address = alloc.snapshot()[0].address
    stream = [(0, number)]
    return {
        "malloc": lambda: core.malloc("kept", 0, number),
        "malloc_capsule": lambda: core.malloc_capsule("kept", 0, number),
        "device": lambda: core.malloc("kept", number, 1),
        "find": lambda: core.find(number),
        "view": lambda: core.view_backup(address, number, False),
        "view at": lambda: core.view_backup(number, 1, False),
        "view behind": lambda: core.view_backup(address + 999, number, False),
        "export": lambda: core.export_fd(number),
        "unpin": lambda: core.unpin(number),
        "peer": lambda: core.set_backup("kept", 4, b"", number),
        "tier": lambda: core.set_backup("kept", number, b"", 0),
        "peers": lambda: core.set_memory("kept", 1, False, [number]),
        "policy": lambda: core.declare_tag("kept", number, 0),
        "action": lambda: core.sleep([("kept", number)], False, [], []),
        "stream": lambda: core.wake_begin(["kept"], [number], [(number, 0)]),
        "first": lambda: core.wake_begin(["nothing"], [number], stream),
    }


@pytest.mark.parametrize("number", [2**31, 2**32, *HUGE, -1, -(2**63)])
def test_numbers_at_the_border_of_the_bindings(alloc: CuMemAllocator, number: int) -> None:
    kept = filled(alloc, 1000, "kept")
    before = alloc.stats()
    for name, call in calls_of_the_bindings(alloc, number).items():
        try:
            call()
        except (CumempoolError, TypeError):  # a TypeError: it is no number of the interface
            continue
        pytest.fail(f"{name} took {number}")
    after = alloc.stats()
    assert after.reserved_address_bytes == before.reserved_address_bytes
    assert after.tags == before.tags
    assert torch.equal(kept, random_bytes(1000))


def test_dead_ranges_of_any_numbers_cost_no_live_byte(alloc: CuMemAllocator) -> None:
    """What torch says of its blocks is not believed further than an allocation reaches."""
    kept = filled(alloc, GRANULE, "kept")
    address = alloc.snapshot()[0].address
    top = 2**64 - 1
    ranges = [(0, address), (address + GRANULE, top), (top, top), (top, 1), (0, 0), (address, 0)]
    alloc._core.sleep([("kept", 1)], False, ranges, [])
    alloc.wake_up()
    assert torch.equal(kept, random_bytes(GRANULE))


BAD_TEXTS = ["a\0b", "\0", "kept\0", "\ud800", "x" * 256, "é" * 128]


@pytest.mark.parametrize("text", BAD_TEXTS, ids=ascii)
def test_texts_that_are_no_tag_are_refused_everywhere(alloc: CuMemAllocator, text: str) -> None:
    kept = filled(alloc, 1000, "kept")
    for call in (
        lambda: alloc.share(text),
        lambda: alloc.revoke(text),
        lambda: alloc.pin(text),
        lambda: alloc.registrable_ranges(text),
        lambda: alloc.register_hooks(text, before_unmap=print),
        lambda: alloc.set_backup(text, "pageable"),
        lambda: alloc.prepare(tags=text),
    ):
        with pytest.raises((InvalidArgumentError, KeyError)) as caught:
            call()
        assert isinstance(caught.value, CumempoolError)
        assert str(caught.value)
    for holder in ("", "a\0b", "\0", "\ud800"):
        with pytest.raises(CumempoolError):
            alloc.pin("kept", holder)
    assert states(alloc) == {"kept": "awake"}
    assert torch.equal(kept, random_bytes(1000))


def test_names_of_other_alphabets_go_everywhere(alloc: CuMemAllocator) -> None:
    tag = "Gewichte/層\N{GRINNING FACE}"
    tensor = filled(alloc, 1000, tag)
    opened = open_shared(alloc.share(tag))
    assert torch.equal(opened[0][:1000], random_bytes(1000))
    del opened
    until(lambda: alloc.stats().tags[tag].pins == 0)
    with alloc.pin(tag, "Halter\N{GRINNING FACE}"), pytest.raises(CumempoolError) as caught:
        alloc.sleep(tags=tag)
    assert "Halter\N{GRINNING FACE}" in str(caught.value)
    assert caught.value.tag == tag
    alloc.sleep(tags=tag)
    alloc.wake_up(tag)
    assert torch.equal(tensor, random_bytes(1000))


# ---- the owner's socket


def framed(message: object) -> bytes:
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack("!I", len(data)) + data


def request_for(memory: SharedMemory) -> dict[str, Any]:
    return dict(memory._request(True))


def connect(memory: SharedMemory) -> socket.socket:
    stranger = socket.socket(socket.AF_UNIX)
    stranger.connect("\0" + memory.endpoint)  # waits where too many do
    stranger.settimeout(20)
    return stranger


@pytest.fixture
def memory(alloc: CuMemAllocator) -> Iterator[SharedMemory]:
    tensor = alloc.empty(1000, dtype=torch.uint8, tag="kv").fill_(6)
    yield alloc.share(tensor)
    del tensor


def serves(alloc: CuMemAllocator, memory: SharedMemory) -> None:
    """The endpoint is as good as new."""
    opened = open_shared(memory)
    assert isinstance(opened, torch.Tensor)
    assert opened.eq(6).all()
    del opened
    until(lambda: alloc.stats().tags["kv"].pins == 0)


def test_messages_altered_at_random_are_answered_or_dropped(
    alloc: CuMemAllocator, memory: SharedMemory
) -> None:
    choose = random.Random(5)
    before = fds()
    good = framed(request_for(memory))
    for _ in range(300):
        text = bytearray(good)
        for _ in range(choose.randrange(1, 6)):
            at = choose.randrange(len(text))
            change = choose.randrange(4)
            if change == 0:
                text[at] ^= 1 << choose.randrange(8)
            elif change == 1:
                del text[at:]
            elif change == 2:
                text[at:at] = choose.randbytes(choose.randrange(1, 9))
            else:
                text[at : at + 4] = struct.pack("!I", choose.randrange(2**32))
            text = text or bytearray(b"\0")
        with connect(memory) as stranger, contextlib.suppress(OSError):
            stranger.sendall(text)
            if choose.random() < 0.3:
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(4096):
                    pass
    until(lambda: alloc.stats().tags["kv"].pins == 0 and fds() <= before)
    serves(alloc, memory)


def send_with_fds(stranger: socket.socket, data: bytes, numbers: list[int]) -> None:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", numbers))
    stranger.sendmsg([data], [rights])


@pytest.mark.parametrize("text", ["garbage", "a request", "after the request", "one byte"])
def test_descriptors_that_are_sent_to_the_owner_are_closed(
    alloc: CuMemAllocator, memory: SharedMemory, text: str
) -> None:
    before = fds()
    reading, writing = os.pipe()
    with connect(memory) as stranger:
        request = framed(request_for(memory))
        if text == "after the request":
            stranger.sendall(request)
            until(lambda: alloc.stats().tags["kv"].pins == 1)
        data = {"garbage": b"\xff" * 64, "a request": request, "one byte": b"\0"}.get(text, b"x")
        for _ in range(3):
            with contextlib.suppress(OSError):  # it has hung up already
                send_with_fds(stranger, data, [writing] * 60)
    os.close(writing)
    # Nobody has the other end any more.
    assert os.read(reading, 1) == b""
    os.close(reading)
    until(lambda: alloc.stats().tags["kv"].pins == 0 and fds() <= before)
    serves(alloc, memory)


def test_hundreds_of_connections_that_say_nothing(
    alloc: CuMemAllocator, memory: SharedMemory
) -> None:
    before, threads = fds(), threading.active_count()
    for _ in range(4):
        crowd = [connect(memory) for _ in range(100)]
        for stranger in crowd:
            stranger.close()
    until(lambda: fds() <= before and threading.active_count() == threads)
    serves(alloc, memory)


def test_other_users_get_no_byte_and_no_descriptor(
    alloc: CuMemAllocator, memory: SharedMemory, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    code = """
import array, socket, sys
request = bytes.fromhex(sys.stdin.readline())
with socket.socket(socket.AF_UNIX) as stranger:
    stranger.settimeout(20)
    stranger.connect("\\0" + sys.argv[1])
    try:
        stranger.sendall(request)
        data, rights, _, _ = stranger.recvmsg(4096, socket.CMSG_LEN(256))
    except ConnectionError:
        data, rights = b"", []
print(len(data), len(rights))
"""
    python = os.path.realpath(sys.executable)
    try:
        done = subprocess.run(
            [python, "-I", "-S", "-c", code, memory.endpoint],
            input=framed(request_for(memory)).hex() + "\n",
            capture_output=True,
            text=True,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd="/",
            timeout=60,
            check=False,
        )
    except PermissionError:
        pytest.skip("another user cannot run this interpreter")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 0\n", "")
    assert alloc.stats().tags["kv"].pins == 0
    assert f"of user {NOBODY} asked for shared memory" in caplog.text
    serves(alloc, memory)


# ---- an owner that is none


class FalseOwner:
    """Listens in the owner's place, and answers each request as it is told."""

    def __init__(self, memory: SharedMemory, answer: Callable[[socket.socket], object]) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        name = f"cumempool-test-{os.getpid()}-{random.randrange(1 << 40)}"
        self._listener.bind("\0" + name)
        self._listener.listen()
        self._answer = answer
        self.memory = dataclasses.replace(memory, endpoint=name)
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(20)
            connection.recv(1 << 16)
            self._answer(connection)
            connection.recv(1)

    def __enter__(self) -> SharedMemory:
        self._thread.start()
        return self.memory

    def __exit__(self, *_: object) -> None:
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()
        self._listener.close()


def refusal(memory: SharedMemory) -> str:
    """What opening it is refused with; without the exception, whose frames have the connection."""
    try:
        open_shared(memory)
    except CumempoolError as error:
        return str(error)
    return pytest.fail("it was opened")


def with_file(mode: str) -> Callable[[socket.socket], None]:
    """Sends one descriptor of some file that is no memory of a device."""

    def send(connection: socket.socket) -> None:
        if mode == "pipe":
            numbers = list(os.pipe())
        elif mode == "memfd":
            numbers = [os.memfd_create("small")]
        elif mode == "socket":
            numbers = [os.dup(connection.fileno())]
        elif mode == "directory":
            numbers = [os.open("/", os.O_RDONLY)]
        else:
            numbers = [os.open("/dev/null", os.O_RDWR)]
        send_with_fds(connection, b"f", numbers[:1])
        for number in numbers:
            os.close(number)

    return send


def with_many(count: int) -> Callable[[socket.socket], None]:
    def send(connection: socket.socket) -> None:
        number = os.open("/dev/null", os.O_RDWR)
        send_with_fds(connection, b"f", [number] * count)
        os.close(number)

    return send


def drip(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"e" if random.random() < 0.01 else b"\0")
        time.sleep(0.05)


ANSWERS: dict[str, Callable[[socket.socket], object]] = {
    "nothing": lambda _: time.sleep(1.5),
    "the end": lambda connection: connection.shutdown(socket.SHUT_RDWR),
    "no descriptor": lambda connection: connection.sendall(b"f"),
    "another letter": lambda connection: connection.sendall(b"x"),
    "noise": lambda connection: connection.sendall(random.Random(1).randbytes(10_000)),
    "half an error": lambda connection: connection.sendall(b"e" + framed({"error": "x"})[:-2]),
    "a huge error": lambda connection: connection.sendall(b"e" + struct.pack("!I", 2**32 - 1)),
    "an error of noise": lambda connection: connection.sendall(b"e" + framed(b"\xff\0")),
    "an error too deep": lambda connection: connection.sendall(b"e" + framed(b"[" * 200_000)),
    "an error that is none": lambda connection: connection.sendall(b"e" + framed([1])),
    "an error without text": lambda connection: connection.sendall(b"e" + framed({})),
    "a byte now and then": drip,
    "three descriptors": with_many(3),
    "sixty descriptors": with_many(60),
    **{f"a {kind}": with_file(kind) for kind in ("pipe", "memfd", "socket", "directory", "null")},
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_owner_that_answers_garbage_is_an_error(
    alloc: CuMemAllocator, memory: SharedMemory, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cumempool.sharing.wire.PATIENCE", 1.0)
    serves(alloc, memory)
    before = fds()
    with FalseOwner(memory, ANSWERS[answer]) as false:
        assert refusal(false)
    gc.collect()  # of frames in cycles, which exceptions leave
    until(lambda: fds() <= before)
    serves(alloc, memory)


def forged(memory: SharedMemory) -> list[SharedMemory]:
    """Descriptors that nobody signed, with numbers that nothing has."""
    part = memory.ranges[0]
    layout = memory.layout
    assert layout is not None
    huge = [2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -1]
    made = []
    for number in huge:
        for name in ("address", "bytes", "generation", "sequence"):
            ranges = (dataclasses.replace(part, **{name: number}),)
            made.append(dataclasses.replace(memory, ranges=ranges))
        made.append(dataclasses.replace(memory, layout=dataclasses.replace(layout, offset=number)))
        made.append(
            dataclasses.replace(memory, layout=dataclasses.replace(layout, shape=(number,)))
        )
        strides = dataclasses.replace(layout, shape=(2,), strides=(number,))
        made.append(dataclasses.replace(memory, layout=strides))
        everything = dataclasses.replace(layout, shape=(number,))
        ranges = (dataclasses.replace(part, bytes=2**70),)
        made.append(dataclasses.replace(memory, ranges=ranges, layout=everything))
    made.append(dataclasses.replace(memory, endpoint="x" * 300))
    made.append(dataclasses.replace(memory, endpoint=""))
    made.append(dataclasses.replace(memory, tag="\0"))
    made.append(dataclasses.replace(memory, secret=""))
    return made


def test_descriptions_with_numbers_that_nothing_has_are_refused(
    alloc: CuMemAllocator, memory: SharedMemory
) -> None:
    serves(alloc, memory)
    before = fds()
    for wrong in forged(memory):
        with pytest.raises(SharingError):
            open_shared(wrong)
    until(lambda: fds() <= before)
    for device in (2**31, 2**63, 2**64, -1):
        with pytest.raises((InvalidArgumentError, InvalidTypeError)):
            open_shared(memory, device=device)
    serves(alloc, memory)


# ---- files of backups


def backup_file(directory: Path) -> str:
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            if os.readlink(path).startswith(f"{directory}/"):
                return str(path)
    raise AssertionError("there is no backup file")


def test_a_file_cut_short_wakes_nothing_until_it_is_whole(
    alloc: CuMemAllocator, tmp_path: Path
) -> None:
    alloc.use_memory_pool("t", backup=f"file:{tmp_path}")
    tensor = filled(alloc, 2 * GRANULE, "t")
    alloc.sleep(tags="t")
    path = backup_file(tmp_path)
    whole = Path(path).read_bytes()
    for length in (0, 1, 4096, GRANULE - 1, len(whole) - 1):
        os.truncate(path, length)
        for wake in (alloc.wake_up, lambda: wake_later(alloc)):
            with refuses(BackupDamagedError, names=str(tmp_path), operation="wake", tag="t"):
                wake()
            assert states(alloc) == {"t": "backed_up"}
    Path(path).write_bytes(whole)
    alloc.wake_up()
    assert torch.equal(tensor, random_bytes(2 * GRANULE))


@pytest.mark.parametrize("way", ["zeros", "swapped", "shifted"])
def test_an_altered_file_is_an_error_and_not_contents(
    alloc: CuMemAllocator, tmp_path: Path, way: str
) -> None:
    alloc.use_memory_pool("t", backup=f"file:{tmp_path}")
    tensor = filled(alloc, 2 * GRANULE, "t")
    alloc.sleep(tags="t")
    path = Path(backup_file(tmp_path))
    whole = path.read_bytes()
    half = GRANULE
    altered = {
        "zeros": bytes(len(whole)),
        "swapped": whole[half:] + whole[:half],
        "shifted": whole[1:] + whole[:1],
    }[way]
    assert altered != whole
    path.write_bytes(altered)
    with pytest.raises(BackupDamagedError):
        alloc.wake_up()
    path.write_bytes(whole)
    alloc.wake_up()
    assert torch.equal(tensor, random_bytes(2 * GRANULE))


FULL = """
import ctypes, os, sys, torch
from cumempool import BackupError, CuMemAllocator
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 1 << 14 | 1 << 18, None):
    sys.exit(77)  # no mounts of its own
if libc.mount(b"tmpfs", sys.argv[1].encode(), b"tmpfs", 0, b"size=8m"):
    sys.exit(77)
alloc = CuMemAllocator()
alloc.use_memory_pool("t", backup="file:" + sys.argv[1])
big = alloc.empty(16 << 20, dtype=torch.uint8, tag="t").fill_(3)
other = alloc.empty(4 << 20, dtype=torch.uint8, tag="other").fill_(4)
for _ in range(3):
    try:
        alloc.sleep(tags=("other", "t"))
        sys.exit("did not raise")
    except BackupError as error:
        assert error.operation == "sleep" and error.advice, repr(error)
    assert {info.state for info in alloc.snapshot()} == {"awake"}
    assert int(big.sum()) == 3 * 16 << 20
    assert alloc.stats().file_bytes == 0
small = big[: 1 << 20].clone()
del big
again = alloc.empty(4 << 20, dtype=torch.uint8, tag="t").fill_(5)
alloc.sleep(tags=("other", "t"))
alloc.wake_up()
assert int(again.sum()) == 5 * 4 << 20 and int(other.sum()) == 4 * 4 << 20
del again, other
alloc.close()
"""


def test_a_disk_without_room_refuses_and_what_fits_later_sleeps(
    run_python: RunPython, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    script = tmp_path / "full.py"
    script.write_text(FULL, encoding="utf-8")
    done = run_python("", str(script), str(tmp_path / "disk"))
    if done.code == 77:
        pytest.skip("this process may not mount a small disk")
    assert (done.code, done.out, done.err) == (0, "", "")


# ---- the end of the process

SETUP = """
alloc = CuMemAllocator()
tensor = alloc.empty(8 << 20, dtype=torch.uint8, tag="t").fill_(3)
"""

#: Forks before the library is used, so that torch is imported once for all of them.
FORKING = """
import atexit, gc, json, logging, os, signal, sys, tempfile, threading, time, warnings, torch
import cumempool
from cumempool import CuMemAllocator, open_shared
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
found = {}
for name, code in json.loads(sys.argv[1]).items():
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in (out, err):
        file.seek(0)
        texts.append(file.read().decode())
        file.close()
    found[name] = (status, *texts)
else:
    print(json.dumps(found))
    sys.exit()
out.close()
err.close()
exec(code)
"""

ENDINGS: dict[str, tuple[str, int]] = {
    "shared and open": ("memory = alloc.share(tensor); opened = open_shared(memory)", 0),
    "shared, open, sys.exit": ("o = open_shared(alloc.share('t')); sys.exit(7)", 7),
    "shared, open, os._exit": ("o = open_shared(alloc.share('t')); os._exit(9)", 9),
    "preparing": ("future = alloc.prepare(tags='t', background=True)", 0),
    "preparing, sys.exit": ("alloc.prepare(tags='t', background=True); sys.exit(7)", 7),
    "hooks and pins": (
        "alloc.register_hooks('t', before_unmap=print, after_map=print)\n"
        "pin = alloc.pin('t'); sys.exit(7)",
        7,
    ),
    "a wake under way, sys.exit": (
        "alloc.sleep(tags='t'); h = alloc.wake_up(blocking=False); sys.exit(7)",
        7,
    ),
    "sys.exit in a thread that sleeps": (
        "def work():\n"
        "    alloc.sleep(tags='t')\n"
        "    sys.exit(5)\n"
        "threading.Thread(target=work).start(); sys.exit(7)",
        7,
    ),
    "sys.exit in a hook": (
        "logging.disable()\n"  # of the transition that was refused
        "alloc.register_hooks('t', before_unmap=lambda *_: sys.exit(7)); alloc.sleep(tags='t')",
        7,
    ),
    "os._exit in a hook": (
        "alloc.register_hooks('t', before_unmap=lambda *_: os._exit(8)); alloc.sleep(tags='t')",
        8,
    ),
    "atexit that wakes": (
        "alloc.sleep(tags='t'); atexit.register(alloc.wake_up); sys.exit(7)",
        7,
    ),
    "freed at the very end": (
        "class Late:\n"
        "    def __del__(self): self.tensor = None; self.alloc.stats()\n"
        "late = Late(); late.tensor, late.alloc = tensor, alloc\n"
        "cycle = [late]; cycle.append(cycle); del late, tensor, alloc; sys.exit(7)",
        7,
    ),
    "a pool tensor in a module": ("import json; json.kept = tensor; alloc.sleep(tags='t')", 0),
    "terminated asleep": (
        "alloc.sleep(tags='t'); os.kill(os.getpid(), signal.SIGTERM)",
        -signal.SIGTERM,
    ),
    "killed in a sleep": (
        "alloc.register_hooks('t', before_unmap=lambda *_: os.kill(os.getpid(), signal.SIGKILL))\n"
        "alloc.sleep(tags='t')",
        -signal.SIGKILL,
    ),
    "many threads": (
        "def work():\n"
        "    while True:\n"  # without operations of torch, which do not survive this
        "        alloc.sleep(tags='t'); alloc.wake_up(); alloc.snapshot()\n"
        "for _ in range(16): threading.Thread(target=work, daemon=True).start()\n"
        "time.sleep(0.1); sys.exit(7)",
        7,
    ),
}


def test_the_process_ends_as_it_was_told(run_python: RunPython, tmp_path: Path) -> None:
    """R14: with its own exit status, and not a word."""
    script = tmp_path / "forking.py"
    script.write_text(FORKING, encoding="utf-8")
    codes = {name: f"{SETUP}\n{code}" for name, (code, _) in ENDINGS.items()}
    done = run_python("", str(script), json.dumps(codes))
    assert (done.code, done.err) == (0, "")
    found = {name: tuple(ended) for name, ended in json.loads(done.out).items()}
    assert found == {name: (status, "", "") for name, (_, status) in ENDINGS.items()}


def test_a_tensor_that_is_no_more_is_not_found(alloc: CuMemAllocator) -> None:
    tensor = alloc.empty(3, tag="t")
    address = tensor.data_ptr()
    del tensor
    with pytest.raises(NotInPoolError):
        alloc._core.find(address)


def test_a_sleep_that_has_no_file_left_loses_nothing(alloc: CuMemAllocator, tmp_path: Path) -> None:
    """The directory goes, and comes back as a file."""
    disk = tmp_path / "disk"
    disk.mkdir()
    alloc.use_memory_pool("t", backup=f"file:{disk}")
    tensor = filled(alloc, GRANULE, "t")
    disk.rmdir()
    disk.write_text("no directory")
    with pytest.raises(BackupError):
        alloc.sleep(tags="t")
    assert states(alloc) == {"t": "awake"}
    assert torch.equal(tensor, random_bytes(GRANULE))
