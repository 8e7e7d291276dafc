"""Allocating, freeing and reading statistics while other tags sleep and wake (R3, R7)."""

from __future__ import annotations

import os
import random
import threading
import time

import torch

import cumempool

from .conftest import Figure

SECONDS = float(os.environ.get("CUMEMPOOL_THREAD_TEST_SECONDS", "60"))


def test_eight_threads_work_while_other_tags_sleep_and_wake(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, figure: Figure
) -> None:
    stop = time.monotonic() + SECONDS
    failures: list[str] = []
    rounds = [0] * 8

    def work(number: int) -> None:
        choose = random.Random(number)
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                while time.monotonic() < stop:
                    with allocator.use_memory_pool(f"thread{number}"):
                        tensors = [
                            torch.full(
                                (choose.randrange(1, 1 << 20),), number * 1000 + i, device=gpu
                            )
                            for i in range(choose.randrange(1, 12))
                        ]
                    tensors.append(
                        allocator.empty(
                            choose.randrange(1, 1 << 20), dtype=torch.int64, tag=f"thread{number}"
                        ).fill_(number * 1000 + len(tensors))
                    )
                    choose.shuffle(tensors)
                    for tensor in tensors:
                        if not bool((tensor == tensor[0]).all()):
                            failures.append(f"thread {number}: wrong values")
                    if int(sum(t[0] for t in tensors)) != sum(
                        number * 1000 + i for i in range(len(tensors))
                    ):
                        failures.append(f"thread {number}: wrong set of values")
                    allocator.stats()
                    del tensors, tensor
                    rounds[number] += 1
                    if rounds[number] % 20 == 0:
                        torch.cuda.empty_cache()
        except Exception as error:  # noqa: BLE001 -- whatever it is, the main thread reports it
            failures.append(f"thread {number}: {type(error).__name__}: {error}")

    with allocator.use_memory_pool("weights"):
        weights = [torch.randint(0, 1 << 30, (4 << 20,), device=gpu) for _ in range(8)]
    with allocator.use_memory_pool("kv_cache", on_wake="zero"):
        cache = torch.ones(16 << 20, device=gpu)
    expected = [weight.clone() for weight in weights]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    cycles = 0
    while time.monotonic() < stop:
        allocator.sleep(tags=("weights", "kv_cache"), offload_tags="weights")
        allocator.wake_up(("weights", "kv_cache"))
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
        assert torch.count_nonzero(cache) == 0
        cycles += 1
    for thread in threads:
        thread.join()
    figure("sleep_wake_cycles", cycles)
    figure("rounds_per_thread", rounds)
    assert failures == []
    assert cycles > 0
    assert min(rounds) > 0
    torch.cuda.empty_cache()
    assert allocator.stats().pending_free_bytes == 0
