"""Threads that allocate, free and read numbers while others sleep and wake (R7)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
import torch
from conftest import GRANULE, MIB, MakeAllocator

from cumempool import CuMemAllocator

#: For the long run of the acceptance test: CUMEMPOOL_ is kept for settings.
SECONDS = float(os.environ.get("TEST_THREADS_SECONDS", "3"))


def run_all(workers: list[Callable[[], None]], seconds: float = SECONDS) -> int:
    """Repeats each worker in a thread of its own; returns the rounds of the slowest one."""
    end = time.monotonic() + seconds
    failures: list[BaseException] = []
    rounds = [0] * len(workers)

    def repeat(number: int, worker: Callable[[], None]) -> None:
        try:
            while time.monotonic() < end and not failures:
                worker()
                rounds[number] += 1
        except BaseException as error:  # noqa: BLE001 - raised again below, in the main thread
            failures.append(error.with_traceback(None))

    threads = [threading.Thread(target=repeat, args=pair) for pair in enumerate(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if failures:
        raise failures[0]
    return min(rounds)


@pytest.mark.extensive
def test_eight_threads_work_while_another_sleeps_and_wakes_other_tags(
    make_allocator: MakeAllocator,
) -> None:
    allocator = make_allocator(mib=512)
    weights = [
        allocator.empty(3 * MIB, dtype=torch.uint8, tag="weights").fill_(n) for n in range(4)
    ]

    def churn(number: int) -> Callable[[], None]:
        value = number + 1

        def worker() -> None:
            with allocator.use_memory_pool(f"thread {number}"):
                tensor = allocator.empty(64 * value, dtype=torch.int32).fill_(value)
            assert allocator.tag_of(tensor) == f"thread {number}"
            stats = allocator.stats()
            assert stats.mapped_bytes <= stats.physical_bytes <= stats.reserved_address_bytes
            assert stats.tags[f"thread {number}"].awake_allocations == 1
            assert any(info.address == tensor.data_ptr() for info in allocator.snapshot())
            assert int(tensor.sum()) == 64 * value * value

        return worker

    def transitions() -> None:
        assert allocator.sleep(tags="weights").bytes_backed_up == 16 * MIB
        assert allocator.stats().tags["weights"].awake_bytes == 0
        assert allocator.wake_up("weights").bytes_restored == 16 * MIB
        assert [int(tensor.min()) for tensor in weights] == [0, 1, 2, 3]
        assert [int(tensor.max()) for tensor in weights] == [0, 1, 2, 3]

    assert run_all([*(churn(number) for number in range(8)), transitions]) > 0
    stats = allocator.stats()
    assert stats.awake_bytes == 16 * MIB
    assert stats.sleeps == stats.wakes
    assert (stats.failed_transitions, stats.pending_free_bytes) == (0, 0)
    assert stats.malloc_calls == stats.free_calls + len(weights)


def test_transitions_of_many_threads_run_one_after_another(alloc: CuMemAllocator) -> None:
    tensors = {tag: alloc.empty(GRANULE, dtype=torch.uint8, tag=tag).fill_(7) for tag in "abcd"}

    def cycle(tag: str) -> Callable[[], None]:
        def worker() -> None:
            assert alloc.sleep(tags=tag).tags[tag].allocations == 1
            assert alloc.wake_up(tag).tags[tag].allocations == 1
            assert int(tensors[tag].min()) == int(tensors[tag].max()) == 7

        return worker

    assert run_all([cycle(tag) for tag in tensors], 1.0) > 0
    assert alloc.stats().sleeps == alloc.stats().wakes


def test_memory_freed_while_a_transition_uses_it_goes_when_that_ends(
    alloc: CuMemAllocator,
) -> None:
    kept = alloc.empty(GRANULE, dtype=torch.uint8, tag="t").fill_(3)

    def free_some() -> None:
        alloc.empty(GRANULE, dtype=torch.uint8, tag="t")
        alloc.empty(1, tag="t")

    def cycle() -> None:
        alloc.sleep(tags="t")
        alloc.wake_up("t")

    assert run_all([free_some, free_some, cycle], 1.0) > 0
    assert int(kept.sum()) == 3 * GRANULE
    assert alloc.stats().awake_bytes == GRANULE
    assert alloc.stats().pending_free_bytes == 0


def test_the_shared_instance_is_made_once_however_many_threads_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "host")
    barrier = threading.Barrier(8)
    got: list[CuMemAllocator] = []

    def ask() -> None:
        barrier.wait()
        got.append(CuMemAllocator.get_instance())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len(set(map(id, got))) == 1
    got[0].close()
