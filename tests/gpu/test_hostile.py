"""Hostile use on a GPU: interrupts, sudden ends, the garbage collector, crowds, odd numbers."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import cumempool

from .conftest import Figure

MIB = 1024**2
GRANULE = 2 * MIB

COMMON = """
import gc, os, signal, sys, threading, time, torch
import cumempool
a = cumempool.CuMemAllocator()
with a.use_memory_pool("t"):
    t = torch.full((4 << 20,), 3.0, device="cuda")
e = a.empty(4 << 20, dtype=torch.uint8, tag="t").fill_(5)
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever began it may ignore it
torch.cuda.synchronize()
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMON + code], capture_output=True, text=True, timeout=180
    )


# ---- interrupts


SIGNALS = """
import random
choose = random.Random(3)
def strike():
    time.sleep(choose.random() * 0.02)
    os.kill(os.getpid(), signal.SIGINT)
b = [a.empty(64 << 20, dtype=torch.uint8, tag="t").fill_(n) for n in range(1, 5)]
a.register_hooks("t", before_unmap=lambda *_: None, after_map=lambda *_: None)
interrupted = 0
for n in range(25):
    thread = threading.Thread(target=strike)
    try:
        thread.start()
        while True:
            a.sleep(tags="t", offload_tags="t")
            a.wake_up()
            a.sleep(tags="t", offload_tags="t")
            a.wake_up(blocking=False).result()
    except KeyboardInterrupt:
        interrupted += 1
        assert len({info.state for info in a.snapshot()}) == 1
        a.wake_up()
    thread.join()
    assert bool(t.eq(3.0).all()) and bool(e.eq(5).all())
    assert all(bool(x.eq(k).all()) for k, x in enumerate(b, 1))
print(interrupted, a.stats().failed_transitions)
"""


def test_real_signals_during_sleeps_and_wakes(gpu: torch.device) -> None:
    done = run(SIGNALS)
    assert (done.returncode, done.stdout) == (0, "25 0\n"), done.stderr


# ---- the end of the process

ENDINGS: dict[str, tuple[str, int]] = {
    "sys.exit asleep with a graph": (
        """
g = torch.cuda.CUDAGraph()
with torch.cuda.graph(g):
    t.add_(1)
g.replay()
a.sleep(tags="t", offload_tags="t")
sys.exit(7)
""",
        7,
    ),
    "work in flight, sys.exit": ("torch.cuda._sleep(10**9); t.add_(1); sys.exit(7)", 7),
    "a wake under way, sys.exit": (
        "a.sleep(tags='t', offload_tags='t'); h = a.wake_up(blocking=False); sys.exit(7)",
        7,
    ),
    "shared and open, sys.exit": (
        "o = cumempool.open_shared(a.share(e)); sys.exit(7)",
        7,
    ),
    "preparing, sys.exit": ("a.prepare(tags='t', background=True); sys.exit(7)", 7),
    "atexit that wakes": (
        "import atexit; a.sleep(tags='t', offload_tags='t'); atexit.register(a.wake_up);"
        " sys.exit(7)",
        7,
    ),
    "in a cycle": (
        "class Late:\n"
        "    def __del__(self): self.t = None; self.a.stats()\n"
        "late = Late(); late.t, late.a = t, a\n"
        "cycle = [late]; cycle.append(cycle); del late, t, e, a; sys.exit(7)",
        7,
    ),
    "threads that go on": (
        "def work():\n"
        "    while True:\n"
        "        a.sleep(tags='t', offload_tags='t'); a.wake_up()\n"
        "for _ in range(4): threading.Thread(target=work, daemon=True).start()\n"
        "time.sleep(0.3); sys.exit(7)",
        7,
    ),
    "os._exit asleep": ("a.sleep(tags='t'); os._exit(9)", 9),
    "terminated asleep": ("a.sleep(tags='t'); os.kill(os.getpid(), 15)", -15),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_process_ends_as_it_was_told(gpu: torch.device, ending: str) -> None:
    code, status = ENDINGS[ending]
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_signal_that_nobody_handles_ends_the_process_as_any_other(gpu: torch.device) -> None:
    done = run("""
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
while True:
    a.sleep(tags="t", offload_tags="t")
    a.wake_up()
""")
    assert done.returncode == -signal.SIGINT, done.stderr
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert done.stderr.count("Traceback") == 1


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


def test_collections_during_every_step_of_a_transition(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("t"):
        kept = torch.arange(1 << 20, device=gpu)
    expected = kept.clone()
    with collecting_all_the_time():
        for round_ in range(15):
            with allocator.use_memory_pool("t"):
                Cycle(torch.full((1000,), round_, device=gpu))
            Cycle(allocator.empty(1000, tag="t").fill_(round_))
            allocator.sleep(tags="t", offload_tags="t")
            Cycle(allocator.empty(3, tag="t"))
            allocator.wake_up()
    gc.collect()
    assert torch.equal(kept, expected)
    torch.cuda.empty_cache()
    assert allocator.stats().pending_free_bytes == 0
    del kept


def test_a_hook_that_collects_frees_what_is_about_to_sleep(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    kept = allocator.empty(1000, dtype=torch.uint8, tag="t").fill_(4)
    cycles = [weakref.ref(Cycle(allocator.empty(MIB, tag="t").fill_(n))) for n in range(3)]
    hooks = allocator.register_hooks("t", before_unmap=lambda *_: gc.collect())
    gc.disable()
    try:
        report = allocator.sleep(tags="t", offload_tags="t")
    finally:
        gc.enable()
    hooks.remove()
    assert [cycle() for cycle in cycles] == [None] * 3
    assert report.tags["t"].allocations == 1
    allocator.wake_up()
    assert bool(kept.eq(4).all())
    del kept


# ---- crowds


def test_64_threads_at_once(allocator: cumempool.CuMemAllocator, gpu: torch.device) -> None:
    shared = torch.arange(4 << 20, device=gpu)
    with allocator.use_memory_pool("shared"):
        kept = shared.clone()
    failures: list[str] = []
    start = threading.Barrier(64)

    def work(number: int) -> None:
        choose = random.Random(number)
        tag = f"tag {number % 16}"
        stream = torch.cuda.Stream()
        try:
            start.wait()
            with torch.cuda.stream(stream):
                for _ in range(4):
                    size = choose.randrange(1, 300_000)
                    tensor = allocator.empty(size, dtype=torch.int64, tag=tag).fill_(number)
                    what = choose.randrange(4)
                    if what == 0:
                        allocator.sleep(tags="shared", offload_tags="shared")
                    elif what == 1:
                        allocator.wake_up("shared")
                    elif what == 2:
                        allocator.snapshot()
                    else:
                        with allocator.use_memory_pool(tag):
                            routed = torch.full((size,), number, device=gpu)
                        if not bool(routed.eq(number).all()):
                            failures.append(f"thread {number}: wrong values in the pool")
                        del routed
                    if not bool(tensor.eq(number).all()):
                        failures.append(f"thread {number}: wrong values")
                    del tensor
        except Exception as error:  # noqa: BLE001 -- whatever it is, the main thread reports it
            failures.append(f"thread {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    allocator.wake_up()
    assert torch.equal(kept, shared)
    torch.cuda.empty_cache()
    assert allocator.stats().pending_free_bytes == 0
    del kept


def test_10000_allocations(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, figure: Figure
) -> None:
    """20 GiB of the device, of which 400 MiB are backed up."""
    count = 10_000
    if torch.cuda.mem_get_info()[0] < (count + 1000) * GRANULE:
        pytest.xfail("the device has not the room for them")
    allocator.use_memory_pool("most", on_sleep="discard", on_wake="zero")
    begin = time.monotonic()
    tensors = [
        allocator.empty(1, dtype=torch.int64, tag="few" if n % 50 == 0 else "most").fill_(n)
        for n in range(count)
    ]
    made = time.monotonic()
    assert len(allocator.snapshot()) == count
    report = allocator.sleep(tags=("few", "most"), offload_tags="few")
    assert report.tags["few"].allocations == count // 50
    assert allocator.stats().physical_bytes == 0
    slept = time.monotonic()
    allocator.wake_up()
    woken = time.monotonic()
    values = torch.stack(tensors).flatten().tolist()
    assert values == [0 if n % 50 else n for n in range(count)]
    figure("made_s", round(made - begin, 2))
    figure("asleep_s", round(slept - made, 2))
    figure("awake_s", round(woken - slept, 2))
    del tensors
    assert allocator.stats().reserved_address_bytes == 0


def test_1000_tags(allocator: cumempool.CuMemAllocator, gpu: torch.device) -> None:
    names = [f"層 {number} ✓" for number in range(1000)]
    tensors = [
        allocator.empty(2, dtype=torch.int32, tag=tag).fill_(n) for n, tag in enumerate(names)
    ]
    report = allocator.sleep(tags=names, offload_tags=names[::2])
    assert len(report.tags) == 1000
    assert allocator.stats().physical_bytes == 0
    allocator.wake_up(names[:500])
    allocator.wake_up()
    values = torch.stack(tensors)[:, 1].tolist()
    assert values[::2] == list(range(0, 1000, 2))
    del tensors


# ---- numbers and garbage


@pytest.mark.parametrize("size", [2**62, 2**63 - 1, 2**63, 2**64, 10**30])
def test_sizes_about_the_largest_number(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, size: int
) -> None:
    kept = allocator.empty(1000, dtype=torch.uint8, tag="kept").fill_(4)
    for shape in ((size,), (1, size), (size, size), (2, size, 0)):
        with pytest.raises((cumempool.InvalidArgumentError, cumempool.OutOfMemoryError)):
            allocator.empty(shape, dtype=torch.uint8)
    with allocator.use_memory_pool("p"), pytest.raises((RuntimeError, TypeError, OverflowError)):
        torch.empty(size, dtype=torch.uint8, device=gpu)
    assert bool(kept.eq(4).all())
    assert len(allocator.snapshot()) == 1
    del kept


FALSE_HANDLES = """
import tempfile
from cumempool import _core, CumempoolError
driver = _core.open_cuda()
before = a.stats().to_dict()
read, write = os.pipe()
files = [tempfile.TemporaryFile(), open("/dev/null"), os.fdopen(read), os.fdopen(write, "w")]
numbers = [-1, 10**6, *(file.fileno() for file in files)]
for number in numbers:
    for size in (1, 2 << 20, 2**62):
        try:
            _core.open_shared(driver, 0, number, size, True, None)
            sys.exit(f"took {number}")
        except CumempoolError as error:
            assert str(error)
fd, info = a._core.export_fd(e.untyped_storage().data_ptr())
for size in (2 << 30, 2**62, 2**63 - 1, 2**64 - 1):
    try:
        _core.open_shared(driver, 0, fd, size, True, None)
        sys.exit(f"took {size} bytes")
    except CumempoolError as error:
        assert str(error)
os.close(fd)
torch.cuda.synchronize()
assert bool(e.eq(5).all()) and a.stats().to_dict() == before
a.sleep(tags="t", offload_tags="t")
a.wake_up()
assert bool(e.eq(5).all()) and bool(t.eq(3.0).all())
"""


def test_descriptors_that_are_no_memory_are_refused(gpu: torch.device) -> None:
    done = run(FALSE_HANDLES)
    assert done.returncode == 0, done.stderr


# ---- files of backups


def backup_file(directory: Path) -> Path:
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            if os.readlink(path).startswith(f"{directory}/"):
                return path
    raise AssertionError("there is no backup file")


@pytest.mark.parametrize("way", ["altered", "cut short", "swapped"])
def test_a_damaged_file_is_an_error_and_not_contents(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, tmp_path: Path, way: str
) -> None:
    size = 16 * MIB
    allocator.use_memory_pool("t", backup=f"file:{tmp_path}")
    tensor = allocator.empty(size, dtype=torch.uint8, tag="t")
    tensor.random_(0, 255)
    expected = tensor.cpu()
    allocator.sleep(tags="t", offload_tags="t")
    path = backup_file(tmp_path)
    whole = path.read_bytes()
    damaged: Callable[[], bytes] = {
        # Its last byte; there may be more room in the file.
        "altered": lambda: whole[: size - 1] + bytes([whole[size - 1] ^ 1]) + whole[size:],
        "cut short": lambda: whole[: len(whole) // 2],
        "swapped": lambda: whole[8 * MIB :] + whole[: 8 * MIB],
    }[way]
    path.write_bytes(damaged())
    for _ in range(2):
        with pytest.raises(cumempool.BackupDamagedError):
            allocator.wake_up()
        assert [info.state for info in allocator.snapshot()] == ["backed_up"]
    path.write_bytes(whole)
    allocator.wake_up()
    assert torch.equal(tensor.cpu(), expected)
    del tensor
