"""Groups of GPUs that sleep and wake together, with NCCL collectives before and after."""

from __future__ import annotations

import gc
import json
import queue
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import cumempool
from cumempool import distributed

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tensor_parallel.py"
CONTEXT = torch.multiprocessing.get_context("spawn")
GIB = 1024**3
MIB = 1024**2
TIMEOUT = 240

pytestmark = pytest.mark.timeout(2 * TIMEOUT)


def devices(count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.xfail(f"there are {torch.cuda.device_count()} GPUs; this needs {count}")
    if not dist.is_nccl_available():
        pytest.xfail("this torch has no NCCL")


Work = Callable[[int, cumempool.CuMemAllocator], Any]


def rank_main(work: Work, rank: int, size: int, port: int, results: Any) -> None:
    torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=TIMEOUT))
    dist.init_process_group(
        "nccl",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
        device_id=torch.device("cuda", rank),
    )
    allocator = cumempool.CuMemAllocator(cumempool.CuMemConfig(driver="cuda"))
    results.put((rank, work(rank, allocator)))
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()  # tensors in the cycles that a caught exception makes
    torch.cuda.empty_cache()
    allocator.close()


def run_ranks(work: Work, size: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `work` gives on each rank; none is left behind."""
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")  # multicast is not granted everywhere
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    results: Any = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=rank_main, args=(work, rank, size, store.port, results))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT
    try:
        while len(found) < size and time.monotonic() < deadline:
            try:
                rank, value = results.get(timeout=1)
                found[rank] = value
            except queue.Empty:
                assert all(process.exitcode in (None, 0) for process in processes)
        for process in processes:
            process.join(30)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [found[rank] for rank in range(size)]


def used() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def pooled(allocator: cumempool.CuMemAllocator, tag: str, count: int) -> torch.Tensor:
    with allocator.use_memory_pool(tag):
        return torch.zeros(count, dtype=torch.float32, device="cuda")


def reduces(tensor: torch.Tensor, rank: int) -> bool:
    """Whether a collective on the memory gives the sum over all ranks."""
    size = dist.get_world_size()
    tensor.fill_(rank + 1)
    dist.all_reduce(tensor)
    return bool(tensor.eq(size * (size + 1) / 2).all())


# ---- transitions between collectives


def sleep_between_collectives(rank: int, allocator: cumempool.CuMemAllocator) -> dict[str, Any]:
    tensor = pooled(allocator, "weights", GIB // 4)
    cache = pooled(allocator, "kv", GIB // 4)
    good = [reduces(tensor, rank), reduces(cache, rank)]
    freed = []
    for _ in range(3):
        before = used()
        # In flight when the group goes to sleep: what the collective writes is what is backed up.
        tensor.fill_(rank + 1)
        dist.all_reduce(tensor)
        slept = distributed.sleep(None, offload_tags="weights", allocator=allocator, timeout=60)
        freed.append(before - used())
        distributed.wake_up(allocator=allocator, timeout=60)
        size = dist.get_world_size()
        good.append(bool(tensor.eq(size * (size + 1) / 2).all()))
        good += [reduces(tensor, rank), reduces(cache, rank)]
        assert sorted(slept.ranks) == list(range(size))
    return {"good": good, "freed": freed}


@pytest.mark.parametrize("size", [2, 4])
def test_a_group_sleeps_between_collectives_on_its_memory(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    devices(size)
    for found in run_ranks(sleep_between_collectives, size, monkeypatch):
        assert all(found["good"]), found
        assert all(freed >= 2 * GIB - 64 * MIB for freed in found["freed"]), found


# ---- failures


def fail_on_the_last(rank: int, allocator: cumempool.CuMemAllocator) -> dict[str, Any]:
    size = dist.get_world_size()
    last = rank == size - 1
    tensor = pooled(allocator, "weights", GIB // 4)
    good = [reduces(tensor, rank)]
    found: dict[str, Any] = {}

    def expect(name: str, transition: Callable[..., Any], *arguments: Any) -> None:
        try:
            transition(None, *arguments, allocator=allocator, timeout=60)
        except cumempool.DistributedTransitionError as error:
            found[name] = (error.failures, error.unanswered, error.states)

    pin = allocator.pin("weights", "a registration") if last else None
    expect("pinned", distributed.sleep, "weights")
    if pin is not None:
        pin.release()
    good += [bool(tensor.eq(size * (size + 1) / 2).all()), reduces(tensor, rank)]

    distributed.sleep(None, offload_tags="weights", allocator=allocator, timeout=60)
    hog = None
    if last:
        torch.cuda.empty_cache()
        hog = torch.empty(
            torch.cuda.mem_get_info()[0] - 512 * MIB, dtype=torch.uint8, device="cuda"
        )
    expect("no room", distributed.wake_up)
    found["states"] = {info.state for info in allocator.snapshot()}
    del hog
    torch.cuda.empty_cache()
    distributed.wake_up(allocator=allocator, timeout=60)
    good += [bool(tensor.eq(size * (size + 1) / 2).all()), reduces(tensor, rank)]

    if last:
        time.sleep(6)
    begun = time.monotonic()
    try:
        distributed.sleep(None, offload_tags="weights", allocator=allocator, timeout=2)
    except cumempool.DistributedTransitionError as error:
        found["late"] = (error.unanswered, error.states[rank])
    found["late seconds"] = time.monotonic() - begun
    good += [bool(tensor.eq(size * (size + 1) / 2).all()), reduces(tensor, rank)]
    return found | {"good": good}


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_fails_or_is_late_leaves_the_group_as_it_was(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    devices(size)
    unchanged = dict.fromkeys(range(size), "unchanged")
    for rank, found in enumerate(run_ranks(fail_on_the_last, size, monkeypatch)):
        for name, reason in (("pinned", "InUseError"), ("no room", "OutOfMemoryError")):
            failures, unanswered, states = found[name]
            assert list(failures) == [size - 1]
            assert failures[size - 1].startswith(reason)
            assert (unanswered, states) == ((), unchanged)
        assert found["states"] == {"backed_up"}
        others = tuple(other for other in range(size - 1)) if rank == size - 1 else (size - 1,)
        assert found["late"] == (others, "unchanged")
        assert found["late seconds"] < 5
        assert all(found["good"]), found


# ---- a tensor-parallel model


@pytest.mark.parametrize("size", [2, 4])
def test_a_tensor_parallel_model_of_8b_shape_gives_identical_logits(
    tmp_path: Path, size: int
) -> None:
    devices(size)
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--ranks", str(size), "--json", str(figures)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert found["shape"]["hidden"] == 4096
    assert found["shape"]["layers"] == 32
    assert found["weight_bytes"] >= 14.9 * GIB
    assert found["identical"]
    assert found["refused_on_all"]
    assert len(found["ranks"]) == size
