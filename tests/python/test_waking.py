"""wake_up(blocking=False): a handle on a wake that goes on while the program does."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
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
    totals,
)
from refusals import refuses

from cumempool import (
    BackupDamagedError,
    CuMemAllocator,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    OutOfMemoryError,
    TransitionReport,
    UnknownTagError,
    WakeHandle,
)
from cumempool._pool.hooks import Arrival, Transitions


def asleep(
    alloc: CuMemAllocator, tag: str = "t", count: int = 6, size: int = 3 * MIB
) -> list[torch.Tensor]:
    tensors = [filled(alloc, size, tag, seed) for seed in range(count)]
    alloc.sleep(tags=tag)
    return tensors


def test_a_tensor_can_be_read_after_wait(alloc: CuMemAllocator) -> None:
    tensors = asleep(alloc)
    handle = alloc.wake_up(blocking=False)
    assert isinstance(handle, WakeHandle)
    for seed, tensor in enumerate(tensors):
        handle.wait(tensor[5:].view(-1, 1))
        assert torch.equal(tensor, random_bytes(3 * MIB, seed))
    report = handle.result()
    assert handle.done()
    assert isinstance(report, TransitionReport)
    assert report.operation == "wake_up"
    assert totals(report) == {"bytes_mapped": 24 * MIB, "bytes_restored": 24 * MIB}
    assert states(alloc) == {"t": "awake"}
    assert alloc.stats().wakes == 1


def test_result_gives_the_same_report_at_every_call_and_in_every_thread(
    alloc: CuMemAllocator,
) -> None:
    tensors = asleep(alloc, count=20)
    handle = alloc.wake_up(blocking=False)
    barrier = threading.Barrier(8)
    reports: list[TransitionReport] = []

    def ask() -> None:
        barrier.wait()
        reports.append(handle.result())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(reports) == 8
    assert all(report == handle.result() for report in reports)
    assert handle.result() is handle.result()
    assert intact(tensors)


def test_a_with_block_waits_for_the_whole_wake(alloc: CuMemAllocator) -> None:
    tensors = asleep(alloc)
    with alloc.wake_up(["t"], blocking=False) as handle:
        assert isinstance(handle, WakeHandle)
    assert handle.done()
    assert intact(tensors)


def test_an_exception_in_a_with_block_is_the_one_that_comes_out(alloc: CuMemAllocator) -> None:
    tensors = asleep(alloc)
    with pytest.raises(KeyError, match="mine"), alloc.wake_up(blocking=False) as handle:
        raise KeyError("mine")
    assert handle.done()
    assert intact(tensors)


def test_dropping_the_handle_waits(alloc: CuMemAllocator) -> None:
    tensors = asleep(alloc, count=20)
    alloc.wake_up(blocking=False)
    assert states(alloc) == {"t": "awake"}
    assert intact(tensors)


def test_a_handle_in_a_cycle_can_be_collected(alloc: CuMemAllocator) -> None:
    tensors = asleep(alloc)
    cycle: list[Any] = [alloc.wake_up(blocking=False)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert states(alloc) == {"t": "awake"}
    assert intact(tensors)


def test_the_handle_outlives_the_names_of_the_allocator() -> None:
    from cumempool import CuMemConfig

    allocator = CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=64 * MIB))
    tensors = asleep(allocator)
    handle = allocator.wake_up(blocking=False)
    del allocator
    gc.collect()
    assert handle.result().bytes_restored == 24 * MIB
    assert intact(tensors)
    del handle, tensors


def test_nothing_to_wake(alloc: CuMemAllocator) -> None:
    tensor = filled(alloc, GRANULE, "t")
    for handle in (alloc.wake_up(blocking=False), alloc.wake_up([], blocking=False)):
        handle.wait(tensor)
        assert totals(handle.result()) == {}
    assert torch.equal(tensor, random_bytes(GRANULE))


def test_several_handles_one_after_another(alloc: CuMemAllocator) -> None:
    first, second = asleep(alloc, "first"), asleep(alloc, "second")
    handles = [alloc.wake_up(tag, blocking=False) for tag in ("first", "second")]
    handles[1].wait(second[0])
    handles[0].wait(first[-1])
    assert [set(handle.result().tags) for handle in handles] == [{"first"}, {"second"}]
    assert intact(first)
    assert intact(second)


def test_transitions_wait_for_the_end_of_the_wake(alloc: CuMemAllocator) -> None:
    tensors = asleep(alloc, count=20)
    handle = alloc.wake_up(blocking=False)
    report = alloc.sleep(tags="t")
    assert handle.done()
    assert report.bytes_backed_up == report.bytes_clean == handle.result().bytes_restored
    alloc.wake_up()
    assert intact(tensors)


def test_tensors_freed_while_they_wake(alloc: CuMemAllocator) -> None:
    tensors = asleep(alloc, count=20)
    handle = alloc.wake_up(blocking=False)
    del tensors[5:]
    handle.result()
    assert intact(tensors)
    assert alloc.stats().awake_bytes == 20 * MIB
    assert alloc.stats().pending_free_bytes == 0
    assert alloc.stats().reserved_address_bytes == 20 * MIB


def test_allocating_goes_on_meanwhile(alloc: CuMemAllocator) -> None:
    tensors = asleep(alloc, count=20)
    handle = alloc.wake_up(blocking=False)
    new = filled(alloc, GRANULE, "t", 77)
    assert handle.result().tags["t"].allocations == 20
    assert torch.equal(new, random_bytes(GRANULE, 77))
    assert intact(tensors)


@pytest.mark.parametrize(
    "choose",
    [lambda t: [t[4], t[2]], lambda t: (x for x in t[3:]), lambda t: t[5], lambda t: []],
    ids=["list", "generator", "one tensor", "none"],
)
def test_first_names_what_comes_first(
    alloc: CuMemAllocator, choose: Callable[[list[torch.Tensor]], Any]
) -> None:
    tensors = asleep(alloc)
    handle = alloc.wake_up(blocking=False, first=choose(tensors))
    assert handle.result().bytes_restored == 24 * MIB
    assert intact(tensors)


def test_first_with_what_is_elsewhere(alloc: CuMemAllocator) -> None:
    tensors = asleep(alloc)
    for first, kind in (
        ([torch.ones(3)], NotInPoolError),
        ([tensors[0], 3], InvalidTypeError),
        (3, InvalidTypeError),
        ([torch.eye(2).to_sparse()], NotInPoolError),
    ):
        with pytest.raises(kind):
            alloc.wake_up(blocking=False, first=first)  # type: ignore[arg-type]
    assert states(alloc) == {"t": "backed_up"}
    alloc.wake_up(blocking=False, first=[torch.empty(0), alloc.empty(0), tensors[1]])
    assert intact(tensors)


def test_first_goes_with_a_wake_that_does_not_block(alloc: CuMemAllocator) -> None:
    tensors = asleep(alloc)
    with refuses(InvalidArgumentError, names=("`first`", "blocking=False")):
        alloc.wake_up(first=tensors)  # type: ignore[call-overload]
    with refuses(InvalidTypeError, names="blocking"):
        alloc.wake_up(blocking=0)  # type: ignore[call-overload]
    assert states(alloc) == {"t": "backed_up"}


def test_what_cannot_be_waited_for(make_allocator: MakeAllocator) -> None:
    allocator, other = make_allocator(), make_allocator()
    tensors, elsewhere = asleep(allocator), other.empty(3)
    still = filled(allocator, GRANULE, "still")
    allocator.sleep(tags="still")
    handle = allocator.wake_up("t", blocking=False)
    for thing in (None, 3, "t", [tensors[0]]):
        with pytest.raises(InvalidTypeError):
            handle.wait(thing)  # type: ignore[arg-type]
    for foreign in (torch.ones(3), elsewhere, torch.eye(2).to_sparse()):
        with pytest.raises(NotInPoolError):
            handle.wait(foreign)
    with refuses(InvalidArgumentError, operation="wait"):
        handle.wait(still)
    handle.wait(torch.empty(0))  # has nothing to wait for
    handle.wait(allocator.empty(GRANULE, dtype=torch.uint8))  # awake
    handle.wait(tensors[0])
    assert intact(tensors)


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]
    device = torch.device("cuda", 3)  # type: ignore[assignment]


def test_on_cuda_the_current_stream_of_the_tensors_device_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, int, int]] = []

    class Core:
        """Of a wake that goes on."""

        def wait(self, *arguments: int) -> None:
            calls.append(arguments)  # type: ignore[arg-type]

        def finish(self) -> dict[str, object]:
            return {"seconds": 0.0, "rows": [], "problems": []}

    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=device.index + 70)
    )
    core = Core()
    handle = WakeHandle(core, "cuda", Transitions(), Arrival(core.finish, list))  # type: ignore[arg-type]
    tensor = torch.ones(3).as_subclass(OnGpu)
    handle.wait(tensor)
    assert calls == [(tensor.untyped_storage().data_ptr(), 3, 73)]
    with refuses(NotInPoolError, names="cpu"):
        handle.wait(torch.ones(3))
    assert len(calls) == 1


@pytest.mark.extensive
def test_many_threads_sleep_and_wake_and_wait(alloc: CuMemAllocator) -> None:
    tensors = {tag: asleep(alloc, tag, count=3) for tag in "abcd"}

    def cycle(tag: str) -> None:
        for _ in range(25):
            with alloc.wake_up(tag, blocking=False, first=tensors[tag][2:]) as handle:
                handle.wait(tensors[tag][2])
                assert torch.equal(tensors[tag][2], random_bytes(3 * MIB, 2))
            assert intact(tensors[tag])
            assert alloc.sleep(tags=tag).tags[tag].allocations == 3

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(cycle, tensors))
    assert alloc.stats().wakes == 100


def test_a_wake_without_room_is_refused_at_once(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(mib=32)
    tensors = asleep(allocator)
    filler = allocator.empty(12 * MIB, dtype=torch.uint8, tag="filler").fill_(1)
    before = allocator.snapshot()
    for _ in range(2):
        with pytest.raises(OutOfMemoryError) as caught:
            allocator.wake_up(blocking=False)
        assert (caught.value.operation, caught.value.device) == ("wake", 0)
        assert allocator.snapshot() == before
        assert allocator.stats().physical_bytes == 12 * MIB
    del filler
    assert allocator.wake_up(blocking=False).result().bytes_restored == 24 * MIB
    assert intact(tensors)


def test_unknown_tags_are_refused_at_once(alloc: CuMemAllocator) -> None:
    with pytest.raises(UnknownTagError):
        alloc.wake_up("nobody", blocking=False)


def damaged_wake(alloc: CuMemAllocator, directory: Any) -> tuple[list[torch.Tensor], WakeHandle]:
    from test_backup import damage

    alloc.use_memory_pool("t", backup=f"file:{directory}")
    tensors = asleep(alloc)
    damage(directory, 7 * MIB)
    return tensors, alloc.wake_up(blocking=False)


def test_a_wake_that_fails_raises_where_it_is_asked_and_leaves_all_asleep(
    alloc: CuMemAllocator, tmp_path: Any
) -> None:
    """R4."""
    from test_backup import damage

    tensors, handle = damaged_wake(alloc, tmp_path)
    errors = []
    for ask in (handle.result, handle.result, lambda: handle.wait(tensors[0])):
        with pytest.raises(BackupDamagedError) as caught:
            ask()
        errors.append(str(caught.value))
    assert len(set(errors)) == 1
    assert handle.done()
    assert states(alloc) == {"t": "backed_up"}
    stats = alloc.stats()
    assert (stats.physical_bytes, stats.wakes, stats.failed_transitions) == (0, 0, 1)
    damage(tmp_path, 7 * MIB)
    alloc.wake_up()
    assert intact(tensors)


def test_a_wake_that_fails_in_a_with_block(alloc: CuMemAllocator, tmp_path: Any) -> None:
    tensors, handle = damaged_wake(alloc, tmp_path)
    with pytest.raises(BackupDamagedError), handle:
        pass
    _, handle = tensors, alloc.wake_up(blocking=False)
    with pytest.raises(KeyError, match="mine"), handle:
        raise KeyError("mine")
    alloc.wake_up(blocking=False)  # dropped: nobody is told
    assert states(alloc) == {"t": "backed_up"}


ENDINGS = {
    "a live handle": "handle = alloc.wake_up(blocking=False)",
    "a dropped handle": "alloc.wake_up(blocking=False)",
    "in a cycle": "cycle = [alloc.wake_up(blocking=False)]; cycle.append(cycle)",
    "in a cycle without names": (
        "cycle = [alloc.wake_up(blocking=False)]; cycle.append(cycle); del cycle, alloc, tensors"
    ),
    "with the tensors gone": "handle = alloc.wake_up(blocking=False); del tensors",
    "closed by force": "handle = alloc.wake_up(blocking=False); alloc.close(force=True)",
    "sys.exit in a with block": (
        "import sys\nwith alloc.wake_up(blocking=False) as handle: sys.exit(0)"
    ),
    "os._exit": "import os; handle = alloc.wake_up(blocking=False); os._exit(0)",
    "a hook that asks": (
        "import atexit; handle = alloc.wake_up(blocking=False)\n"
        "atexit.register(lambda: handle.result())"
    ),
    "a daemon thread that waits": (
        "import threading; handle = alloc.wake_up(blocking=False)\n"
        "threading.Thread(target=handle.result, daemon=True).start()"
    ),
    "a daemon thread that goes on": (
        "import threading, time\n"
        "def work():\n"
        "    while True:\n"
        "        alloc.sleep(tags='t'); alloc.wake_up(blocking=False).wait(tensors[0])\n"
        "threading.Thread(target=work, daemon=True).start(); time.sleep(0.2)"
    ),
}


@pytest.mark.extensive
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreter_ends_quietly_while_a_wake_is_under_way(
    run_python: RunPython, ending: str
) -> None:
    """R14."""
    setup = """
import torch
from cumempool import CuMemAllocator
alloc = CuMemAllocator()
tensors = [alloc.empty(8 << 20, dtype=torch.uint8, tag="t").fill_(n) for n in range(20)]
alloc.sleep(tags="t")
"""
    done = run_python(f"{setup}\n{ENDINGS[ending]}")
    assert (done.code, done.out, done.err) == (0, "", "")


@pytest.mark.extensive
@pytest.mark.parametrize("ends", ["os._exit(3)", "sys.exit(3)"])
def test_a_forked_child_has_no_wake_under_way(run_python: RunPython, ends: str) -> None:
    """R14."""
    code = f"""
import os, sys, threading, warnings, torch
from cumempool import CuMemAllocator, ForkedError
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
alloc = CuMemAllocator()
tensors = [alloc.empty(8 << 20, dtype=torch.uint8, tag="t").fill_(n) for n in range(20)]
alloc.sleep(tags="t")
handle = alloc.wake_up(blocking=False)
waiting = threading.Thread(target=handle.result)
waiting.start()
child = os.fork()
if child == 0:
    for call in (handle.result, lambda: handle.wait(tensors[0])):
        try:
            call()
            print("did not raise", file=sys.stderr)
        except ForkedError:
            pass
    {ends}
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 3, status
waiting.join()
assert handle.result().bytes_restored == 160 << 20
assert [int(tensor.max()) for tensor in tensors] == list(range(20))
"""
    done = run_python(code)
    assert (done.code, done.out, done.err) == (0, "", "")
