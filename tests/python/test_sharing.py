"""Memory shared between real processes: contents both ways, leases, refusals, leaks, deaths."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from conftest import (
    GRANULE,
    MIB,
    MakeAllocator,
    RunPython,
    bits,
    fds,
    filled,
    pins,
    random_bytes,
    until,
)
from refusals import refuses

from cumempool import (
    ClosedError,
    CuMemAllocator,
    DriverError,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    SharedMemory,
    SharingError,
    UnsupportedError,
    _core,
    open_shared,
)
from cumempool.sharing import importer as sharing
from cumempool.sharing import leases, wire
from cumempool.sharing import owner as endpoint
from cumempool.sharing.leases import Lease
from cumempool.sharing.owner import Endpoint
from cumempool.sharing.wire import Wire, close_all

pytestmark = pytest.mark.extensive

NOBODY = 65534


def can_watch_processes() -> bool:
    try:
        os.close(_core.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


needs_pidfd = pytest.mark.skipif(
    not can_watch_processes(), reason="this kernel, or its sandbox, has no pidfd_open"
)


class Importer:
    """A process that opens what this one shares."""

    def __init__(self, *arguments: str, wrapper: Sequence[str] = ()) -> None:
        path = os.pathsep.join(part for part in sys.path if part)
        self.process = subprocess.Popen(
            [
                *wrapper,
                sys.executable,
                "-W",
                "error",
                str(Path(__file__).with_name("importer.py")),
                *arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, *words: object) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(*words, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().rstrip("\n")

    def open(self, memory: SharedMemory, name: str = "a", how: str = "write") -> str:
        return self.ask("open", name, pickle.dumps(memory).hex(), how)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture(autouse=True)
def nothing_of_other_tests_is_left() -> None:
    """Descriptors are counted here; those of garbage would go when it is collected."""
    gc.collect()


@pytest.fixture
def importer() -> Iterator[Importer]:
    made = Importer()
    yield made
    made.end()


def endpoint_of(alloc: CuMemAllocator) -> Endpoint:
    """What serves importers, once something was shared."""
    endpoint = alloc._exports._endpoint
    assert isinstance(endpoint, Endpoint)
    return endpoint


def sockets() -> list[str]:
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [name for name in map(os.readlink, links) if name.startswith(("socket", "anon_inode"))]


# ---- contents


def test_both_processes_see_what_either_writes(alloc: CuMemAllocator, importer: Importer) -> None:
    kv = alloc.empty(1000, dtype=torch.int32, tag="kv").fill_(1)
    memory = alloc.share(kv)
    assert isinstance(memory, SharedMemory)
    assert importer.open(memory) == "1 4000"
    assert importer.ask("read", "a") == "1"
    assert importer.ask("fill", "a", 2) == "filled"
    assert kv.eq(2).all()
    kv.fill_(3)
    assert importer.ask("read", "a") == "3"
    assert importer.ask("close", "a") == "closed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.bool, torch.int8])
def test_a_view_arrives_as_it_is(alloc: CuMemAllocator, dtype: torch.dtype) -> None:
    whole = alloc.empty(6, 7, 8, dtype=dtype, tag="kv")
    bits(whole).copy_(random_bytes(bits(whole).numel()) % 2)
    view = whole[1:5:2, 3:].transpose(0, 2)
    opened = open_shared(pickle.loads(pickle.dumps(alloc.share(view))))
    assert isinstance(opened, torch.Tensor)
    assert (opened.dtype, opened.shape, opened.stride()) == (dtype, view.shape, view.stride())
    assert torch.equal(opened, view)
    assert opened.data_ptr() != view.data_ptr()
    opened.zero_()
    assert not view.any()


def test_a_tag_is_shared_with_all_its_allocations(
    alloc: CuMemAllocator, importer: Importer
) -> None:
    tensors = [filled(alloc, size * MIB, "kv", size) for size in range(1, 8)]
    sizes = sum(info.bytes for info in alloc.snapshot())
    assert importer.open(alloc.share("kv")) == f"7 {sizes}"
    assert importer.ask("fill", "a", 9) == "filled"
    assert all(tensor.eq(9).all() for tensor in tensors)
    importer.ask("close", "a")


def test_more_allocations_than_fit_into_a_message(
    make_allocator: MakeAllocator,
) -> None:
    alloc = make_allocator(mib=512)
    tensors = [alloc.empty(8, dtype=torch.uint8, tag="kv").fill_(n) for n in range(150)]
    before = fds()
    opened = open_shared(alloc.share("kv"))
    assert [int(tensor[0]) for tensor in opened] == list(range(150))
    del opened
    until(lambda: pins(alloc) == 0)
    until(lambda: fds() <= before + 4)  # the endpoint
    del tensors


def test_what_is_opened_for_reading_cannot_be_written(
    alloc: CuMemAllocator, importer: Importer
) -> None:
    kv = alloc.empty(1000, dtype=torch.int32, tag="kv").fill_(1)
    for memory in (alloc.share(kv), alloc.share(kv, writable=False)):
        assert importer.open(memory, how="read") == "1 4000"
        assert "read-only" in importer.ask("fill", "a", 2)
        assert importer.ask("read", "a") == "1"
        importer.ask("close", "a")
    answer = importer.open(alloc.share(kv, writable=False))
    assert answer.startswith("SharingError")
    assert "for reading only" in answer
    forged = dataclasses.replace(alloc.share(kv, writable=False), writable=True)
    assert "not shared" in importer.open(forged)


def test_a_device_that_maps_nothing_for_reading_only_leaves_that_to_torch(
    alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = alloc.empty(3, tag="kv").fill_(5)
    mapped: list[bool] = []
    open_in_core = _core.open_shared

    def refuse_reading(*arguments: Any) -> object:
        mapped.append(arguments[4])
        if not arguments[4]:
            raise UnsupportedError("not for reading only")
        return open_in_core(*arguments)

    monkeypatch.setattr(_core, "open_shared", refuse_reading)
    opened = open_shared(alloc.share(kv), writable=False)
    assert isinstance(opened, torch.Tensor)
    assert mapped == [False, True]
    assert opened.tolist() == [5.0] * 3
    with refuses(InvalidArgumentError, names="read-only"):
        opened.fill_(1)


def test_another_device_can_use_it(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator(devices=2)
    kv = alloc.empty(1000, device=1, tag="kv").fill_(4)
    memory = alloc.share(kv)
    assert memory.ranges[0].device == "1"
    for device in (None, 0, 1, "cpu", torch.device("cpu")):
        opened = open_shared(memory, device=device)
        assert isinstance(opened, torch.Tensor)
        assert opened.eq(4).all()
    for wrong in (64, -1, "cuda", "gpu"):
        with pytest.raises(InvalidArgumentError):
            open_shared(memory, device=wrong)


# ---- sleeping


def test_what_is_open_elsewhere_does_not_sleep(alloc: CuMemAllocator, importer: Importer) -> None:
    kv = filled(alloc, 3 * MIB, "kv")
    importer.open(alloc.share(kv), "a")
    importer.open(alloc.share("kv"), "b")
    assert pins(alloc) == 2
    with refuses(InUseError, names=f"process {importer.process.pid},", operation="sleep", tag="kv"):
        alloc.sleep(tags="kv")
    importer.ask("close", "a")
    until(lambda: pins(alloc) == 1)
    with pytest.raises(InUseError):
        alloc.discard("kv")
    with refuses(
        InUseError, names=f"process {importer.process.pid},", operation="prepare", tag="kv"
    ):
        alloc.prepare(tags="kv")
    assert alloc.stats().host_bytes == 0
    importer.ask("close", "b")
    until(lambda: pins(alloc) == 0)
    alloc.sleep(tags="kv")
    alloc.wake_up()
    assert torch.equal(kv, random_bytes(3 * MIB))


def test_a_stale_generation_is_refused(alloc: CuMemAllocator, importer: Importer) -> None:
    kv = filled(alloc, MIB, "kv")
    memory = alloc.share(kv)
    alloc.sleep(tags="kv")
    assert importer.open(memory).startswith("SharingError")
    with refuses(InvalidArgumentError, names="asleep", operation="export", tag="kv"):
        alloc.share(kv)
    alloc.wake_up()
    answer = importer.open(memory)
    assert "generation 2, and the descriptor of 1" in answer
    assert importer.open(alloc.share(kv)) == f"1 {MIB}"
    importer.ask("close", "a")


def test_a_refusal_of_the_owner_has_the_fields_of_an_error(alloc: CuMemAllocator) -> None:
    kv = filled(alloc, MIB, "kv")
    memory = alloc.share(kv)
    alloc.sleep(tags="kv")
    alloc.wake_up()
    with refuses(SharingError, operation="open_shared", tag="kv", advice="share it again"):
        open_shared(memory)
    with refuses(InvalidArgumentError, operation="open_shared", tag="kv"):
        open_shared(dataclasses.replace(memory, version=memory.version + 1))


def test_memory_that_was_freed_is_refused(alloc: CuMemAllocator, importer: Importer) -> None:
    kv = alloc.empty(8, tag="kv")
    memory = alloc.share(kv)
    del kv
    assert importer.open(memory).startswith("SharingError")
    again = alloc.empty(8, tag="kv")
    if again.data_ptr() == memory.ranges[0].address:
        assert "freed since" in importer.open(memory)


def test_revoked_memory_can_sleep(alloc: CuMemAllocator, importer: Importer) -> None:
    kv = alloc.empty(1000, dtype=torch.int32, tag="kv").fill_(5)
    memory = alloc.share(kv)
    importer.open(memory)
    assert alloc.revoke("kv") == 1
    assert alloc.revoke("kv") == 0
    alloc.sleep(tags="kv")
    assert importer.ask("read", "a") == "5"
    alloc.wake_up()
    kv.fill_(6)
    assert importer.ask("read", "a") == "5"  # its own now
    assert "no longer" in importer.open(memory, "b")
    assert importer.open(alloc.share(kv), "c") == "1 4000"
    assert importer.ask("read", "c") == "6"
    for name in "ac":
        importer.ask("close", name)


# ---- leaks and deaths


def test_200_rounds_leak_nothing(alloc: CuMemAllocator, importer: Importer) -> None:
    kv = filled(alloc, 3 * MIB, "kv")

    def round_trip() -> None:
        assert importer.open(alloc.share("kv")) == f"1 {2 * GRANULE}"
        assert importer.ask("close", "a") == "closed"

    round_trip()
    until(lambda: pins(alloc) == 0)
    here, there, stats = fds(), importer.ask("fds"), alloc.stats()
    threads = threading.active_count()
    for _ in range(200):
        round_trip()
    until(lambda: pins(alloc) == 0)
    until(lambda: fds() == here)
    assert importer.ask("fds") == there
    assert threading.active_count() == threads
    assert alloc.stats() == stats
    assert torch.equal(kv, random_bytes(3 * MIB))


def test_a_killed_importer_ends_its_lease(alloc: CuMemAllocator) -> None:
    kv = filled(alloc, MIB, "kv")
    importer = Importer()
    alloc.share(kv)
    before = fds()
    importer.open(alloc.share(kv))
    assert pins(alloc) == 1
    importer.kill()
    until(lambda: pins(alloc) == 0)
    until(lambda: fds() == before)
    importer.end()
    alloc.sleep(tags="kv")
    alloc.wake_up()
    assert torch.equal(kv, random_bytes(MIB))


@needs_pidfd
def test_a_killed_importer_ends_its_lease_though_a_child_of_it_lives(alloc: CuMemAllocator) -> None:
    kv = filled(alloc, MIB, "kv")
    importer = Importer()
    alloc.share(kv)
    before = fds()
    importer.open(alloc.share(kv))
    child = int(importer.ask("fork"))
    try:
        importer.kill()
        until(lambda: pins(alloc) == 0)
        until(lambda: fds() == before)
        os.kill(child, 0)  # lives, and has the connection
    finally:
        os.kill(child, signal.SIGKILL)
    importer.end()
    alloc.sleep(tags="kv")
    alloc.wake_up()
    assert torch.equal(kv, random_bytes(MIB))


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The thread of the owner looks at no lease until the event is set."""
    seeing = threading.Event()
    attend = Endpoint._attend

    def look_away(self: Endpoint, lease: Lease) -> None:
        if seeing.is_set():
            attend(self, lease)
        else:
            time.sleep(0.01)

    monkeypatch.setattr(Endpoint, "_attend", look_away)
    yield seeing
    seeing.set()


def test_a_sleep_right_after_the_importer_has_let_go_is_not_refused(
    alloc: CuMemAllocator, importer: Importer, blind: threading.Event
) -> None:
    kv = filled(alloc, MIB, "kv")
    other = alloc.empty(3, tag="other")
    transitions: dict[str, Callable[[], object]] = {
        "sleep": lambda: alloc.sleep(tags="kv"),
        "swap": lambda: alloc.swap(sleep="kv", wake=[]),
        "prepare": lambda: alloc.prepare(tags="kv"),
    }
    for operation, transition in transitions.items():
        assert importer.open(alloc.share(kv)) == f"1 {MIB}"
        with refuses(
            InUseError, names=f"process {importer.process.pid},", operation=operation, tag="kv"
        ):
            transition()
        assert importer.ask("close", "a") == "closed"
        transition()
        alloc.wake_up()
    assert importer.open(alloc.share(other)) == "1 12"
    importer.kill()
    alloc.discard("other")
    alloc.wake_up()
    assert torch.equal(kv, random_bytes(MIB))


def test_hundreds_of_sleeps_right_after_the_importer_has_let_go_are_not_refused(
    alloc: CuMemAllocator, importer: Importer
) -> None:
    kv = filled(alloc, MIB, "kv")
    for _ in range(200):
        assert importer.open(alloc.share(kv)) == f"1 {MIB}"
        assert importer.ask("close", "a") == "closed"
        alloc.sleep(tags="kv")
        alloc.wake_up()
    assert torch.equal(kv, random_bytes(MIB))


@needs_pidfd
def test_who_hangs_up_without_a_word_has_it_open_until_the_process_is_gone(
    alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies hangs up before its devices have stopped to work."""
    kv = filled(alloc, MIB, "kv")
    importer = Importer()
    alloc.share(kv)
    before = fds()
    importer.open(alloc.share(kv))
    assert importer.ask("hang-up") == "hung up"
    serving = endpoint_of(alloc)
    until(lambda: [lease.deaf for lease in serving.leases.watched()] == [True])
    with monkeypatch.context() as impatient:
        impatient.setattr(leases, "_DYING", 0.05)
        with refuses(
            InUseError, names=f"process {importer.process.pid},", operation="sleep", tag="kv"
        ):
            alloc.sleep(tags="kv")
    assert pins(alloc) == 1
    threading.Timer(0.2, importer.process.kill).start()
    alloc.sleep(tags="kv")  # which waits for the end
    alloc.wake_up()
    assert torch.equal(kv, random_bytes(MIB))
    importer.kill()
    until(lambda: fds() == before)
    importer.end()


def test_a_killed_receiver_frees_the_message_that_it_has_received(alloc: CuMemAllocator) -> None:
    from multiprocessing.reduction import ForkingPickler

    receiver = Importer()
    message = bytes(ForkingPickler.dumps(alloc.empty(8, tag="kv"))).hex()
    assert receiver.ask("receive", "a", message) == "received"
    assert len(alloc.snapshot()) == 1
    receiver.kill()
    receiver.end()
    until(lambda: alloc.snapshot() == [])
    assert pins(alloc) == 0


def test_what_is_opened_in_inference_mode_is_an_ordinary_tensor(alloc: CuMemAllocator) -> None:
    kv = alloc.empty(3, tag="kv").fill_(2)
    with torch.inference_mode():
        opened = open_shared(alloc.share(kv))
    assert isinstance(opened, torch.Tensor)
    assert not opened.is_inference()
    weight = torch.ones(3, requires_grad=True)
    (weight * opened).sum().backward()
    assert weight.grad is not None
    assert weight.grad.eq(2).all()


OWNER = """
import pickle, sys
from cumempool import CuMemAllocator
alloc = CuMemAllocator()
kv = alloc.empty(1000, tag="kv").fill_(7)
print(pickle.dumps(alloc.share(kv)).hex(), flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_the_memory_outlives_its_owner(end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "CUMEMPOOL_DRIVER": "host"},
    ) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        memory = pickle.loads(bytes.fromhex(owner.stdout.readline().decode()))
        opened = open_shared(memory)
        assert isinstance(opened, torch.Tensor)
        if end == "killed":
            owner.kill()
        else:
            owner.stdin.write(b"\n")
            owner.stdin.flush()
        assert owner.wait(timeout=60) == (-signal.SIGKILL if end == "killed" else 0)
        assert opened.eq(7).all()
        assert opened.fill_(8).eq(8).all()
        with refuses(SharingError, names=f"process {owner.pid},", tag="kv"):
            open_shared(memory)


def test_close_ends_what_is_open(make_allocator: MakeAllocator) -> None:
    alloc, threads = make_allocator(), threading.active_count()
    before = sockets()
    kv = alloc.empty(1000, tag="kv").fill_(7)
    memory = alloc.share(kv)
    opened = open_shared(memory)
    assert isinstance(opened, torch.Tensor)
    with pytest.raises(InUseError):
        alloc.close()
    assert pins(alloc) == 1
    del kv
    alloc.close()
    assert threading.active_count() == threads
    assert opened.eq(7).all()
    with pytest.raises(SharingError):
        open_shared(memory)
    del opened
    until(lambda: sockets() == before)
    with pytest.raises(ClosedError):
        alloc._exports._open_endpoint().describe("host", "kv", [], None, True)


def test_a_dropped_allocator_ends_its_endpoint() -> None:
    from cumempool import CuMemConfig

    threads = threading.active_count()
    alloc = CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=8 * MIB))
    alloc.share(alloc.empty(3, tag="kv"))
    assert threading.active_count() == threads + 1
    del alloc
    until(lambda: threading.active_count() == threads)


def test_a_fork_serves_nothing_and_keeps_nothing(run_python: RunPython) -> None:
    done = run_python("""
import os, warnings
from cumempool import CuMemAllocator, CumempoolError, open_shared
warnings.simplefilter("ignore")
def fds():
    kinds = (os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
             if os.path.lexists(f"/proc/self/fd/{n}"))
    return sum(kind.startswith(("socket", "anon_inode:[eventpoll")) for kind in kinds)
alloc = CuMemAllocator()
kv = alloc.empty(3, tag="kv")
memory = alloc.share(kv)
child = os.fork()
if child == 0:
    assert fds() == 0
    try:
        alloc.share(kv)
    except CumempoolError as error:
        os._exit(7 if type(error).__name__ == "ForkedError" else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert open_shared(memory).shape == (3,)
print("served")
""")
    assert (done.code, done.out, done.err) == (0, "served\n", "")


def test_a_fork_holds_no_lease_of_its_parent(run_python: RunPython) -> None:
    done = run_python("""
import os, warnings
from cumempool import CuMemAllocator, open_shared
warnings.simplefilter("ignore")
def sockets():
    kinds = (os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
             if os.path.lexists(f"/proc/self/fd/{n}"))
    return sum(kind.startswith("socket") for kind in kinds)
alloc = CuMemAllocator()
kv = alloc.empty(3, tag="kv")
opened = open_shared(alloc.share(kv))
child = os.fork()
if child == 0:
    os._exit(sockets())  # the importer's end, which is in use here as well
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
assert alloc.stats().tags["kv"].pins == 1
del opened
print("over")
""")
    assert (done.code, done.out, done.err) == (0, "over\n", "")


def test_no_descriptor_is_left_to_a_program_that_is_started(alloc: CuMemAllocator) -> None:
    kv = alloc.empty(3, tag="kv")
    opened = open_shared(alloc.share(kv))
    here = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    listed = subprocess.run(
        ["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True
    )
    ours = {name for name in here if name.startswith(("socket", "/memfd"))}
    assert len(ours) >= 4  # the endpoint, both ends of the lease, the memory
    assert [name for name in ours if name in listed.stdout] == []
    assert "eventpoll" not in listed.stdout
    assert "pidfd" not in listed.stdout
    del opened


# ---- what runs out, and what is late


@contextlib.contextmanager
def no_free_descriptors() -> Iterator[None]:
    """This process can open nothing in the body."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (most + 1, hard))
        with contextlib.suppress(OSError):
            while True:  # numbers that are free between others
                opened.callback(os.close, os.dup(0))
        yield


def test_an_owner_without_free_descriptors_serves_when_it_has_some(
    alloc: CuMemAllocator, importer: Importer, caplog: pytest.LogCaptureFixture
) -> None:
    kv = alloc.empty(3, tag="kv")
    memory = alloc.share(kv)
    with ThreadPoolExecutor(1) as thread:
        with no_free_descriptors():
            answer = thread.submit(importer.open, memory)
            until(lambda: "an importer could not be accepted" in caplog.text)
            assert not answer.done()
        assert answer.result(60) == "1 12"
    assert importer.ask("close", "a") == "closed"
    until(lambda: pins(alloc) == 0)


def test_an_owner_without_free_descriptors_can_be_closed(
    make_allocator: MakeAllocator, importer: Importer, caplog: pytest.LogCaptureFixture
) -> None:
    alloc = make_allocator()
    kv = alloc.empty(3, tag="kv")
    memory = alloc.share(kv)
    del kv
    with ThreadPoolExecutor(1) as thread:
        with no_free_descriptors():
            answer = thread.submit(importer.open, memory)
            until(lambda: "an importer could not be accepted" in caplog.text)
            alloc.close()
        assert answer.result(60).startswith("SharingError")


def test_an_importer_without_free_descriptors_is_told(alloc: CuMemAllocator) -> None:
    kv = alloc.empty(3, tag="kv")
    memory = alloc.share(kv)
    with (
        no_free_descriptors(),
        refuses(SharingError, names="Unix socket", tag="kv", advice="raise ulimit -n"),
    ):
        open_shared(memory)
    ends = socket.socketpair()
    Wire(ends[0]).send_fds([0])
    with no_free_descriptors(), refuses(SharingError, names="open files"):
        Wire(ends[1]).receive_fds(1)
    for end in ends:
        end.close()
    opened = open_shared(memory)
    del opened


def test_who_is_not_through_in_time_is_given_up(
    alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = alloc.empty(3, tag="kv")
    memory = alloc.share(kv)
    before = fds()
    monkeypatch.setattr(wire, "PATIENCE", 0.0)
    with refuses(SharingError, names="0 seconds", tag="kv"):
        open_shared(memory)
    until(lambda: fds() == before)
    assert pins(alloc) == 0


def test_a_request_that_comes_when_the_allocator_is_closed_is_refused(
    make_allocator: MakeAllocator,
) -> None:
    alloc = make_allocator()
    kv = alloc.empty(3, tag="kv")
    memory = alloc.share(kv)
    threads = set(threading.enumerate())
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("\0" + memory.endpoint)
        until(lambda: bool(set(threading.enumerate()) - threads))  # which waits for the request
        del kv
        alloc.close()
        late = Wire(connection)
        late.send(memory._request(True))
        with refuses(SharingError, names="closed"):
            late.receive_fds(1)


def test_close_ends_leases_that_the_serving_thread_has_not_seen_end(
    make_allocator: MakeAllocator,
) -> None:
    alloc = make_allocator()
    kv = [alloc.empty(3, tag=tag) for tag in ("a", "b")]
    opened = [open_shared(alloc.share(tensor)) for tensor in kv]
    serving = endpoint_of(alloc)
    thread = serving._thread.ident
    assert thread is not None

    def line() -> int:
        return sys._current_frames()[thread].f_lineno

    with serving.leases._turn:  # which the thread needs once a lease has ended
        waiting = line()
        del opened[0]
        until(lambda: line() != waiting)
        serving.stop()
    until(lambda: [pins(alloc, tag) for tag in ("a", "b")] == [0, 0])
    opened.clear()
    kv.clear()


def test_whatever_runs_in_the_thread_that_serves_may_close_the_allocator(
    make_allocator: MakeAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finalizer, or a handler of its log: it cannot wait for itself."""
    alloc = make_allocator()
    memory = alloc.share(alloc.empty(3, tag="kv"))
    closed: list[str] = []

    class Closing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            alloc.close()
            closed.append(threading.current_thread().name)

    handler = Closing()
    monkeypatch.setattr(endpoint, "peer_of", lambda connection: (1, os.geteuid() + 1))
    monkeypatch.setattr(logging.getLogger("cumempool"), "handlers", [handler])
    with pytest.raises(SharingError):
        open_shared(memory)
    until(lambda: closed == ["cumempool-sharing"])
    until(lambda: "cumempool-sharing" not in [thread.name for thread in threading.enumerate()])


def test_where_the_kernel_cannot_watch_a_process_its_connection_tells_its_end(
    alloc: CuMemAllocator, importer: Importer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = alloc.empty(3, tag="kv")
    monkeypatch.setattr(endpoint, "pidfd_of_peer", lambda connection, process: None)
    memory = alloc.share(kv)
    before = fds()
    assert importer.open(memory) == "1 12"
    assert pins(alloc) == 1
    importer.kill()
    until(lambda: pins(alloc) == 0)
    until(lambda: fds() == before)


# ---- who is served


def test_a_wrong_secret_is_refused(alloc: CuMemAllocator, importer: Importer) -> None:
    kv = alloc.empty(3, tag="kv")
    memory = alloc.share(kv)
    for wrong in ("", "0" * 64, memory.secret[:-1], "é", memory.secret.upper()):
        with pytest.raises(SharingError):
            open_shared(dataclasses.replace(memory, secret=wrong))
    assert "not shared" in importer.open(dataclasses.replace(memory, secret="0" * 64))
    assert memory.secret not in repr(memory)


def test_a_secret_is_good_for_nothing_else(alloc: CuMemAllocator) -> None:
    kv, other = alloc.empty(3, tag="kv"), alloc.empty(3, tag="other")
    memory, foreign = alloc.share(kv), alloc.share(other)
    for forged in (
        dataclasses.replace(memory, ranges=foreign.ranges),
        dataclasses.replace(memory, tag="other"),
        dataclasses.replace(memory, ranges=memory.ranges + foreign.ranges, layout=None),
    ):
        with refuses(SharingError, names="not shared"):
            open_shared(forged)
    with refuses(SharingError, names="no memory", tag="kv"):
        open_shared(dataclasses.replace(memory, ranges=(), layout=None))
    assert pins(alloc) == pins(alloc, "other") == 0


def test_a_foreign_layout_is_refused(alloc: CuMemAllocator) -> None:
    kv = alloc.empty(10, tag="kv")
    memory = alloc.share(kv)
    assert memory.layout is not None
    for change in (
        {"shape": (1 << 30,)},
        {"offset": memory.ranges[0].bytes},
        {"offset": 3},
        {"offset": -4},
        {"strides": (-1,)},
        {"strides": (1, 1)},
        {"dtype": "nonsense"},
        {"dtype": "nn"},
    ):
        layout = dataclasses.replace(memory.layout, **change)
        with refuses(SharingError, names=repr(layout), tag="kv"):
            open_shared(dataclasses.replace(memory, layout=layout))
    longer = dataclasses.replace(memory.ranges[0], bytes=2 * memory.ranges[0].bytes)
    with pytest.raises(SharingError):
        open_shared(dataclasses.replace(memory, ranges=(longer,)))
    with refuses(InvalidArgumentError, names="version 2"):
        open_shared(dataclasses.replace(memory, version=2))
    with pytest.raises(InvalidTypeError):
        open_shared("kv")  # type: ignore[arg-type]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused(alloc: CuMemAllocator, importer: Importer) -> None:
    kv = alloc.empty(3, tag="kv")
    memory = alloc.share(kv)
    try:
        stranger = Importer(str(NOBODY))
    except AssertionError:
        pytest.skip("another user cannot read the interpreter or the package")
    answer = stranger.open(memory)
    stranger.end()
    assert answer.startswith("SharingError"), answer
    assert pins(alloc) == 0
    assert importer.open(memory) == "1 12"
    importer.ask("close", "a")


def test_an_endpoint_of_another_user_is_not_told_the_secret(
    alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = alloc.empty(3, tag="kv")
    memory = alloc.share(kv)
    before = fds()
    monkeypatch.setattr(sharing, "peer_of", lambda connection: (1, os.geteuid() + 1))
    monkeypatch.setattr(sharing, "_map_leased", lambda *_: pytest.fail("was asked"))
    with refuses(SharingError, names="another user", tag="kv"):
        open_shared(memory)
    until(lambda: fds() == before)


# What an owner sends, who has these descriptors.
Answer = Callable[[Wire, list[int]], object]

ANSWERS: dict[str, Answer] = {
    "nothing": lambda owner, fds: None,
    "few descriptors": lambda owner, fds: owner.send_fds(fds[:1]),
    "a message": lambda owner, fds: owner.send({"fds": 2}),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_an_owner_that_answers_garbage_leaves_nothing_behind(
    alloc: CuMemAllocator, answer: Answer
) -> None:
    kv = [alloc.empty(3, tag="kv") for _ in range(2)]
    shared = alloc.share("kv")
    before = fds()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # the kernel finds a name
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                owner = Wire(connection)
                owner.receive()
                exported = [alloc._core.export_fd(part.address)[0] for part in shared.ranges]
                answer(owner, exported)
                close_all(exported)

        name = listener.getsockname()[1:].decode()
        memory = dataclasses.replace(shared, endpoint=name)
        with ThreadPoolExecutor(1) as thread:
            served = thread.submit(serve)
            with refuses(SharingError, names=(f"process {os.getpid()},", "answer"), tag="kv"):
                open_shared(memory)
            served.result(60)
    gc.collect()
    assert fds() == before
    del kv


def garbage(memory: SharedMemory) -> dict[str, bytes]:
    request = memory._request(True)

    def framed(message: Any) -> bytes:
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        return struct.pack("!I", len(data)) + data

    return {
        "nothing": b"",
        "half a length": b"\0\0",
        "half a message": framed(request)[:-5],
        "noise": bytes(random_bytes(4096).tolist()),
        "a huge length": struct.pack("!I", 2**32 - 1) + b"x" * 100,
        "no JSON": framed(b"\xff\xfe{"),
        "deep JSON": framed(b"[" * 200_000),
        "a list": framed([1]),
        "an empty object": framed({}),
        "wrong types": framed({**request, "tag": 3, "ranges": "x", "secret": None}),
        "a number of a secret": framed({**request, "secret": 3}),
        "huge numbers": framed({**request, "ranges": [[10**300, 1e308, -1, None]]}),
        "gone before the answer": framed(request),
    }


def test_garbage_is_harmless(alloc: CuMemAllocator) -> None:
    kv = alloc.empty(3, tag="kv")
    memory = alloc.share(kv)
    before = fds()
    for text in garbage(memory).values():
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect("\0" + memory.endpoint)
                stranger.sendall(text)
    until(lambda: pins(alloc) == 0 and fds() == before)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect("\0" + memory.endpoint)
        stranger.sendall(garbage(memory)["gone before the answer"] + b"and more")
        until(lambda: stranger.recv(1) in (b"f", b""))
        until(lambda: pins(alloc) == 0)
    opened = open_shared(memory)
    assert isinstance(opened, torch.Tensor)
    # Both ends of the lease, what tells the importer's end, and the importer's memory.
    until(lambda: fds() == before + 3 + can_watch_processes())


def test_slow_clients_are_few_and_do_not_last(
    alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cumempool.sharing.wire.PATIENCE", 0.5)
    kv = alloc.empty(3, tag="kv")
    memory = alloc.share(kv)
    threads, before = threading.active_count(), fds()
    strangers = []
    for _ in range(100):
        stranger = socket.socket(socket.AF_UNIX)
        stranger.connect("\0" + memory.endpoint)
        strangers.append(stranger)
    assert threading.active_count() <= threads + 64
    for _ in range(20):
        for stranger in strangers[:64]:
            try:
                stranger.send(b"\0")
            except OSError:
                stranger.close()
        time.sleep(0.05)
    until(lambda: threading.active_count() == threads)
    opened = open_shared(memory)
    assert isinstance(opened, torch.Tensor)
    for stranger in strangers:
        stranger.close()
    del opened
    until(lambda: fds() == before)


def test_silent_connections_lock_no_importer_out(alloc: CuMemAllocator, importer: Importer) -> None:
    kv = alloc.empty(3, tag="kv")
    memory = alloc.share(kv)
    with contextlib.ExitStack() as silent:
        for _ in range(endpoint._MOST_REQUESTS):
            stranger = silent.enter_context(socket.socket(socket.AF_UNIX))
            stranger.connect("\0" + memory.endpoint)
        serving = endpoint_of(alloc)
        until(lambda: len(serving._asking) == endpoint._MOST_REQUESTS)
        begin = time.monotonic()
        with ThreadPoolExecutor(4) as threads:
            opened = list(threads.map(open_shared, [memory] * 8))
        assert importer.open(memory) == "1 12"
        assert time.monotonic() - begin < wire.PATIENCE / 2, "the silent ones were waited for"
        assert len(opened) == 8


def test_an_importer_that_is_put_off_for_too_long_is_told_that_the_owner_is_busy(
    alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = alloc.empty(3, tag="kv")
    memory = alloc.share(kv)
    serving = endpoint_of(alloc)
    for _ in range(endpoint._MOST_REQUESTS):
        assert serving._room.acquire(blocking=False)
    monkeypatch.setattr(sharing, "PATIENCE", 0.2)
    with refuses(SharingError, names=(f"process {os.getpid()},", "busy"), tag="kv") as told:
        open_shared(memory)
    assert "open it again later" in str(told.value.advice)
    for _ in range(endpoint._MOST_REQUESTS):
        serving._room.release()
    opened = open_shared(memory)
    assert isinstance(opened, torch.Tensor)


def test_who_runs_as_the_user_of_all_strangers_takes_none_of_them_for_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Users of other user namespaces all appear as one."""
    user = os.geteuid()
    with subprocess.Popen(
        ["unshare", "-U", "sh", "-c", "echo; read _"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        if not other.stdout.readline():
            pytest.skip("no user namespace can be made here")
        for process in (os.getpid(), other.pid):
            assert wire.is_of_this_user(process, user)
            assert not wire.is_of_this_user(process, user + 1)
        monkeypatch.setattr(wire, "_overflow_user", lambda: user)
        assert wire.is_of_this_user(os.getpid(), user)
        assert not wire.is_of_this_user(other.pid, user)
        assert not wire.is_of_this_user(0, user)  # of a PID namespace that is not seen from here


# ---- FABRIC handles


def refuse(*_: object) -> None:
    raise ConnectionRefusedError("there is no such name")


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name of a socket is found from here, as from another network namespace."""
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_who_does_not_find_the_name_is_told_to_come_into_the_network_namespace(
    alloc: CuMemAllocator, unreachable: None
) -> None:
    memory = alloc.share(alloc.empty(3, tag="kv"))
    before = fds()
    with refuses(SharingError, tag="kv") as told:
        open_shared(memory)
    assert "network namespace" in str(told.value.advice)
    assert fds() == before


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch, make_allocator: MakeAllocator) -> CuMemAllocator:
    """An allocator whose memory has FABRIC handles."""
    plain = _core.open_host
    monkeypatch.setattr(_core, "open_host", lambda **options: plain(**{**options, "fabric": True}))
    return make_allocator()


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Notes of which type the handles are that are imported here."""
    noted: list[type] = []
    real = _core.open_shared

    def note(driver: Any, device: int, exported: Any, *rest: Any) -> object:
        noted.append(type(exported))
        return real(driver, device, exported, *rest)

    monkeypatch.setattr(_core, "open_shared", note)
    return noted


def test_memory_without_fabric_handles_comes_by_descriptors(
    alloc: CuMemAllocator, imported: list[type]
) -> None:
    kv = alloc.empty(3, tag="kv").fill_(4)
    opened = open_shared(alloc.share(kv))
    assert isinstance(opened, torch.Tensor)
    assert opened.eq(4).all()
    assert imported == [int]
    with refuses(UnsupportedError, names="handle", operation="export", tag="kv"):
        alloc.share(kv, fabric=True)
    assert pins(alloc) == 1


def test_memory_with_fabric_handles_comes_by_them(
    fabric: CuMemAllocator, imported: list[type], importer: Importer
) -> None:
    kv = [fabric.empty(3, tag="kv").fill_(number) for number in range(70)]
    assert fabric.stats().tags["kv"].handle_types == ("posix_fd", "fabric")
    before = fds()
    memory = fabric.share("kv", fabric=True)
    opened = open_shared(memory)
    assert [int(tensor.view(torch.float32)[0]) for tensor in opened] == list(range(70))
    assert imported == [bytes] * 70
    assert importer.open(fabric.share(kv[7], fabric=True)) == "1 12"
    assert importer.ask("read", "a") == "7.0"
    assert pins(fabric) == 3  # and for the handles
    with refuses(InUseError, names=f"process {importer.process.pid},", operation="sleep", tag="kv"):
        fabric.sleep(tags="kv")
    importer.ask("close", "a")
    del opened
    until(lambda: pins(fabric) == 1)
    until(lambda: fds() <= before + 4)  # the endpoint
    fabric.revoke("kv")
    fabric.sleep(tags="kv")
    fabric.wake_up()
    with refuses(SharingError, names="no longer"):
        open_shared(memory)


def test_no_fabric_handle_leaves_its_owner_that_it_did_not_give_out(
    fabric: CuMemAllocator, imported: list[type]
) -> None:
    kv = fabric.empty(3, tag="kv").fill_(4)
    memory = fabric.share(kv)
    request = {**memory._request(True), "fabric": True}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("\0" + memory.endpoint)
        stranger = Wire(connection)
        stranger.send(request)
        close_all(stranger.receive_fds(1))
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    opened = open_shared(memory)
    assert isinstance(opened, torch.Tensor)
    assert imported == [int]


def test_where_a_fabric_handle_does_not_open_the_descriptor_does(
    fabric: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = _core.open_shared, []

    def refuse_fabric(driver: Any, device: int, exported: Any, *rest: Any) -> object:
        tried.append(type(exported))
        if isinstance(exported, bytes):
            raise DriverError("CUDA_ERROR_NOT_PERMITTED", result=800)
        return real(driver, device, exported, *rest)

    monkeypatch.setattr(_core, "open_shared", refuse_fabric)
    kv = fabric.empty(3, tag="kv").fill_(4)
    opened = open_shared(fabric.share(kv, fabric=True))
    assert isinstance(opened, torch.Tensor)
    assert opened.eq(4).all()
    assert tried == [bytes, int]
    fabric.revoke("kv")


@pytest.mark.parametrize("what", ["a tensor", "the tag"])
def test_a_descriptor_that_carries_handles_opens_where_nobody_can_be_asked(
    fabric: CuMemAllocator, importer: Importer, what: str
) -> None:
    kv = fabric.empty(1000, dtype=torch.int32, tag="kv").fill_(1)
    memory = fabric.share(kv if what == "a tensor" else "kv", fabric=True)
    assert {len(part.fabric) for part in memory.ranges} == {64}
    assert "fabric=" not in repr(memory.ranges)
    elsewhere = dataclasses.replace(memory, endpoint="nowhere", owner=1)
    assert importer.open(elsewhere).startswith("1 ")
    assert pins(fabric) == 1  # nobody can say who has it open
    assert importer.ask("fill", "a", 2) == "filled"
    assert bits(kv).eq(2).all() if what == "the tag" else kv.eq(2).all()
    with refuses(InUseError, names=("FABRIC", "revoke()"), operation="sleep", tag="kv"):
        fabric.sleep(tags="kv")
    assert importer.open(memory, "b").startswith("1 ")  # asked, where he can be
    until(lambda: pins(fabric) == 2)
    importer.ask("close", "b")
    until(lambda: pins(fabric) == 1)
    fabric.share(kv, fabric=True)
    assert pins(fabric) == 1  # one for all of them
    assert fabric.revoke("kv") == 0
    assert "no longer" in importer.open(memory, "b")
    fabric.sleep(tags="kv")
    assert importer.ask("read", "a").startswith("2")
    fabric.wake_up()
    assert "DriverError" in importer.open(elsewhere, "b")
    importer.ask("close", "a")


def test_handles_that_are_carried_grant_what_was_granted(
    fabric: CuMemAllocator, unreachable: None
) -> None:
    kv = fabric.empty(3, tag="kv").fill_(1)
    memory = fabric.share(kv, writable=False, fabric=True)
    with refuses(SharingError, names="reading only", tag="kv"):
        open_shared(memory)
    opened = open_shared(memory, writable=False)
    assert isinstance(opened, torch.Tensor)
    assert opened.eq(1).all()
    with refuses(InvalidArgumentError, names="read-only"):
        opened.zero_()
    half = dataclasses.replace(memory.ranges[0], fabric=memory.ranges[0].fabric[:32])
    with refuses(InvalidArgumentError, names="fabric handle"):
        open_shared(dataclasses.replace(memory, ranges=(half,)), writable=False)
    fabric.revoke("kv")


def test_a_failure_to_give_handles_out_leaves_no_pin(
    fabric: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = fabric.empty(3, tag="kv")
    current = fabric.share(kv).ranges[0]
    endpoint = endpoint_of(fabric)
    for wrong in (
        dataclasses.replace(current, generation=5),
        dataclasses.replace(current, sequence=99),
    ):
        with pytest.raises(SharingError):
            endpoint.describe("host", "kv", [current, wrong], None, True, True)
    assert pins(fabric) == 0
    with refuses(InvalidTypeError, names="fabric"):
        fabric.share(kv, fabric=1)  # type: ignore[arg-type]


# ---- what can be shared


def test_what_cannot_be_shared_is_refused(alloc: CuMemAllocator) -> None:
    kv = alloc.empty(3, dtype=torch.complex64, tag="kv")
    with pytest.raises(NotInPoolError):
        alloc.share(torch.zeros(3))
    for wrong in (3, None, kv.conj()):
        with pytest.raises(InvalidTypeError):
            alloc.share(wrong)  # type: ignore[arg-type]
    with refuses(InvalidTypeError, names="writable"):
        alloc.share(kv, writable=1)  # type: ignore[arg-type]
    del kv, wrong
    gc.collect()
    with refuses(InvalidArgumentError, names="nothing", tag="kv"):
        alloc.share("kv")
    with alloc.use_memory_pool("plain", backing="cuda_malloc"):
        plain = alloc.empty(3)
    with refuses(UnsupportedError, names="cudaMalloc", operation="export", tag="plain"):
        alloc.share(plain)


def test_a_tag_of_too_many_allocations_is_refused(
    alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_MOST_RANGES", 2)
    kv = [alloc.empty(3, tag="kv") for _ in range(3)]
    with refuses(SharingError, names=("3 allocations", "2"), advice="share the tensors"):
        alloc.share("kv")
    assert alloc.share(kv[0]).ranges
    del kv[2]
    assert len(alloc.share("kv").ranges) == 2
    with refuses(InvalidTypeError, names="writable"):
        open_shared(alloc.share("kv"), writable=1)  # type: ignore[arg-type]


def test_threads_share_open_and_sleep(alloc: CuMemAllocator) -> None:
    kv = filled(alloc, MIB, "kv")
    errors: list[BaseException] = []

    def use() -> None:
        try:
            for _ in range(40):
                try:
                    opened = open_shared(alloc.share(kv))
                    assert torch.equal(opened, random_bytes(MIB))
                    del opened
                except (SharingError, InvalidArgumentError):
                    pass  # it slept meanwhile
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    def cycle() -> None:
        try:
            for _ in range(40):
                try:
                    alloc.sleep(tags="kv")
                except InUseError:
                    pass
                finally:
                    alloc.wake_up()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    threads = [threading.Thread(target=work) for work in (use, use, use, cycle)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    until(lambda: pins(alloc) == 0)
    alloc.sleep(tags="kv")
    alloc.wake_up()
    assert torch.equal(kv, random_bytes(MIB))


# ---- torch.multiprocessing


def work(inbox: Any, outbox: Any) -> None:
    tensor, parameter, plain = inbox.get()
    outbox.put((type(tensor) is torch.Tensor, type(parameter) is torch.nn.Parameter))
    outbox.put((parameter.requires_grad, tensor.sum().item(), plain.sum().item()))
    tensor.fill_(9)
    plain.fill_(5)
    with torch.no_grad():
        parameter.fill_(8)
    outbox.put("done")
    inbox.get()


def test_torch_multiprocessing_sends_the_memory_itself(alloc: CuMemAllocator) -> None:
    torch.multiprocessing.set_sharing_strategy("file_system")
    context = torch.multiprocessing.get_context("spawn")
    tensor = alloc.empty(5, 7, tag="kv").fill_(1)
    parameter = torch.nn.Parameter(alloc.empty(10, tag="weights"), requires_grad=False)
    plain = torch.ones(3)
    address = tensor.data_ptr()
    inbox, outbox = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=work, args=(inbox, outbox))
    process.start()
    inbox.put((tensor[1:, :3], parameter, plain))
    assert outbox.get() == (True, True)
    assert outbox.get() == (False, 12.0, 3.0)
    assert outbox.get() == "done"
    assert tensor[1:, :3].eq(9).all()
    assert tensor[0].eq(1).all()
    assert parameter.eq(8).all()
    assert plain.eq(5).all()
    assert tensor.data_ptr() == address
    with refuses(InUseError, names=f"process {process.pid},", operation="sleep", tag="kv"):
        alloc.sleep(tags="kv")
    inbox.put(None)
    process.join(timeout=60)
    assert process.exitcode == 0
    process.close()
    until(lambda: pins(alloc) == pins(alloc, "weights") == 0)
    for queue in (inbox, outbox):
        queue.close()


def test_what_torch_refuses_to_send_it_still_refuses(alloc: CuMemAllocator) -> None:
    from multiprocessing.reduction import ForkingPickler

    leaf = alloc.empty(3, tag="kv").requires_grad_()
    with pytest.raises(RuntimeError, match="requires_grad"):
        ForkingPickler.dumps(leaf * 2 + leaf.view(-1))
    again = pickle.loads(ForkingPickler.dumps(leaf))
    assert again.requires_grad
    with torch.no_grad():
        leaf.fill_(6)
    assert again.eq(6).all()
    del again
    until(lambda: pins(alloc) == 0)
    alloc.sleep(tags="kv")
    with refuses(InvalidArgumentError, names="asleep", operation="export", tag="kv"):
        ForkingPickler.dumps(leaf)
    alloc.wake_up()
