"""Memory that is shared, reduced by NCCL and made of cudaMalloc, on real devices."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing

import cumempool

GIB = 1024**3
MIB = 1024**2
CONTEXT = torch.multiprocessing.get_context("spawn")
TIMEOUT = 240


def two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.xfail("there is one GPU; this needs two")


def posix_fds() -> None:
    found = cumempool.probe(driver="cuda")
    if "posix_fd" not in found.devices[torch.cuda.current_device()].handle_types:
        pytest.xfail("the driver grants no POSIX descriptors here")


def seconds(work: Callable[[], object], device: int) -> float:
    """What `work` takes on a device, by events."""
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


class Importer:
    """A process on one device; each function is run there with the queues."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self.inbox, self.outbox = CONTEXT.Queue(), CONTEXT.Queue()
        self.process = CONTEXT.Process(target=work, args=(self.inbox, self.outbox, *arguments))
        self.process.start()

    def get(self) -> Any:
        return self.outbox.get(timeout=TIMEOUT)

    def put(self, what: object) -> None:
        self.inbox.put(what)

    def join(self) -> None:
        self.process.join(timeout=TIMEOUT)
        assert self.process.exitcode == 0


# ---- sharing


def change(inbox: Any, outbox: Any, device: int) -> None:
    torch.cuda.set_device(device)
    opened = cumempool.open_shared(inbox.get(timeout=TIMEOUT), device=device)
    assert isinstance(opened, torch.Tensor)
    outbox.put(opened[:4].tolist())
    opened.add_(1)
    torch.cuda.synchronize()
    outbox.put("changed")
    inbox.get(timeout=TIMEOUT)
    del opened
    outbox.put("closed")


@pytest.mark.parametrize("device", [0, 1])
def test_another_process_reads_and_writes_the_same_memory(
    allocator: cumempool.CuMemAllocator, device: int
) -> None:
    posix_fds()
    if device:
        two_devices()
    kv = allocator.empty(64 * MIB, dtype=torch.int32, device=0, tag="kv")
    torch.arange(kv.numel(), out=kv)
    torch.cuda.synchronize()
    other = Importer(change, device)
    other.put(allocator.share(kv))
    assert other.get() == [0, 1, 2, 3]
    assert other.get() == "changed"
    assert torch.equal(kv, torch.arange(1, kv.numel() + 1, dtype=torch.int32, device=kv.device))
    with pytest.raises(cumempool.InUseError, match=f"process {other.process.pid}"):
        allocator.sleep(tags="kv")
    other.put("close")
    assert other.get() == "closed"
    other.join()
    deadline = time.monotonic() + 10
    while allocator.stats().tags["kv"].pins and time.monotonic() < deadline:
        time.sleep(0.01)
    allocator.sleep(tags="kv")
    allocator.wake_up()
    assert int(kv[7]) == 8
    del kv


def test_what_is_opened_for_reading_is_not_written(allocator: cumempool.CuMemAllocator) -> None:
    posix_fds()
    kv = allocator.empty(1000, device=0, tag="kv").fill_(3)
    opened = cumempool.open_shared(allocator.share(kv, writable=False), writable=False)
    assert isinstance(opened, torch.Tensor)
    assert opened.data_ptr() != kv.data_ptr()
    assert bool((opened * 2).eq(6).all())
    for view in (opened, opened[3:], opened.view(-1, 10)):
        with pytest.raises(cumempool.InvalidArgumentError, match="read-only"):
            view.add_(1)
    assert bool(kv.eq(3).all())
    del opened, view
    with pytest.raises(cumempool.SharingError, match="reading only"):
        cumempool.open_shared(allocator.share(kv, writable=False))
    del kv


def open_and_read(inbox: Any, outbox: Any) -> None:
    torch.cuda.set_device(1)
    target = torch.empty(4 * GIB, dtype=torch.uint8, device=1)
    memory = inbox.get(timeout=TIMEOUT)
    cumempool.open_shared(memory, device=1)  # drivers and contexts
    opening = []
    for _ in range(10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        one = cumempool.open_shared(memory, device=1)
        opening.append(time.perf_counter() - begin)
        del one
    opened = cumempool.open_shared(memory, device=1)
    assert isinstance(opened, torch.Tensor)
    target.copy_(opened)
    taken = [seconds(lambda: target.copy_(opened), 1) for _ in range(10)]
    outbox.put((statistics.median(opening), statistics.median(taken), bool(target.eq(5).all())))


def test_shared_memory_is_read_across_nvlink_at_speed(
    allocator: cumempool.CuMemAllocator,
) -> None:
    posix_fds()
    two_devices()
    kv = allocator.empty(4 * GIB, dtype=torch.uint8, device=0, tag="kv").fill_(5)
    torch.cuda.synchronize()
    other = Importer(open_and_read)
    other.put(allocator.share(kv))
    opening, taken, equal = other.get()
    other.join()
    rate = kv.nbytes / taken / 1e9
    print(f"open and map 4 GiB: {opening * 1e3:.2f} ms; read from the peer: {rate:.0f} GB/s")
    assert equal
    assert opening <= 0.010
    assert rate >= 350
    del kv


def open_and_close(inbox: Any, outbox: Any, rounds: int) -> None:
    free: list[int] = []
    open_files: list[int] = []
    torch.cuda.set_device(0)
    for done in range(rounds + 1):
        opened = cumempool.open_shared(inbox.get(timeout=TIMEOUT))
        value = int(opened[-1])
        del opened
        if done in (0, rounds):
            torch.cuda.synchronize()
            free.append(torch.cuda.mem_get_info()[0])
            open_files.append(fds())
        outbox.put(value)
    outbox.put((free, open_files))


def test_a_thousand_rounds_leak_nothing(allocator: cumempool.CuMemAllocator) -> None:
    posix_fds()
    kv = allocator.empty(64 * MIB, dtype=torch.uint8, device=0, tag="kv")
    other = Importer(open_and_close, 1000)
    before = 0
    for number in range(1001):
        kv.fill_(number % 251)
        torch.cuda.synchronize()
        other.put(allocator.share(kv))
        assert other.get() == number % 251
        if number == 0:
            before = fds()
    free, open_files = other.get()
    other.join()
    deadline = time.monotonic() + 10
    while fds() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fds() <= before
    assert open_files[0] == open_files[1]
    assert free[0] == free[1]
    assert allocator.stats().tags["kv"].pins == 0
    assert allocator.stats().physical_bytes == 64 * MIB
    del kv


def receive(inbox: Any, outbox: Any) -> None:
    tensor, plain = inbox.get(timeout=TIMEOUT)
    tensor.fill_(9)
    plain.fill_(3)
    torch.cuda.synchronize()
    outbox.put("done")
    inbox.get(timeout=TIMEOUT)


def test_torch_multiprocessing_sends_pool_tensors(allocator: cumempool.CuMemAllocator) -> None:
    posix_fds()
    with allocator.use_memory_pool("kv"):
        tensor = torch.zeros(1000, device="cuda")
    plain = torch.zeros(1000, device="cuda")
    torch.cuda.synchronize()
    other = Importer(receive)
    other.put((tensor[10:20], plain))
    assert other.get() == "done"
    assert tensor.sum() == 90
    assert plain.eq(3).all()
    other.put("end")
    other.join()
    del tensor


# ---- NCCL


def reduce_all(rank: int, store: str, results: Any) -> None:
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
        device_id=torch.device("cuda", rank),
    )
    allocator = cumempool.CuMemAllocator(cumempool.CuMemConfig(driver="cuda"))
    count = 256 * MIB
    with allocator.use_memory_pool("kv"):
        pooled = torch.zeros(count, dtype=torch.float32, device="cuda")
    plain = torch.zeros(count, dtype=torch.float32, device="cuda")

    def measure(tensor: torch.Tensor) -> float:
        tensor.fill_(rank + 1)
        torch.distributed.all_reduce(tensor)
        assert bool(tensor.eq(3).all())
        torch.distributed.barrier()
        return seconds(lambda: torch.distributed.all_reduce(tensor), rank)

    def compare(pooled: torch.Tensor) -> float:
        pairs = [(measure(pooled), measure(plain)) for _ in range(15)][3:]
        return statistics.median(pool / other for pool, other in pairs)

    ratios = [compare(pooled)]
    allocator.sleep(tags="kv", offload_tags="kv")
    torch.distributed.barrier()
    allocator.wake_up()
    ratios.append(compare(pooled))
    results.put((rank, ratios))
    torch.distributed.destroy_process_group()
    del pooled
    torch.cuda.empty_cache()
    allocator.close()


@pytest.mark.parametrize("variable", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_an_all_reduce_costs_the_same_on_pool_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    two_devices()
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "expandable_segments:True")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")  # multicast is not granted everywhere
    if not torch.distributed.is_nccl_available():
        pytest.xfail("this torch has no NCCL")
    results = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=reduce_all, args=(rank, str(tmp_path / "store"), results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=TIMEOUT) for _ in processes]
    for process in processes:
        process.join(timeout=TIMEOUT)
        assert process.exitcode == 0
    print(f"all-reduce of 1 GiB, pool over plain, before and after a sleep: {sorted(found)}")
    for _, ratios in found:
        assert max(ratios) <= 1.05, found


# ---- cudaMalloc


def test_memory_of_cuda_malloc_can_be_opened_by_legacy_ipc_and_not_sleep(
    allocator: cumempool.CuMemAllocator,
) -> None:
    import ctypes

    with allocator.use_memory_pool("plain", backing="cuda_malloc"):
        plain = torch.ones(32 * MIB, dtype=torch.uint8, device="cuda")
    kv = allocator.empty(32 * MIB, dtype=torch.uint8, tag="kv").fill_(2)
    torch.cuda.synchronize()
    assert allocator.allocation_of(plain).backing == "cuda_malloc"
    libcuda = ctypes.CDLL("libcuda.so.1")
    handle = ctypes.create_string_buffer(64)
    get_handle = libcuda.cuIpcGetMemHandle
    assert get_handle(handle, ctypes.c_uint64(plain.data_ptr())) == 0
    assert get_handle(handle, ctypes.c_uint64(kv.data_ptr())) != 0
    with pytest.raises(cumempool.UnsupportedError, match="cudaMalloc"):
        allocator.sleep()
    with pytest.raises(cumempool.UnsupportedError):
        allocator.share(plain)
    allocator.sleep(tags="kv", offload_tags="kv")
    assert plain.sum(dtype=torch.int64) == 32 * MIB
    allocator.wake_up()
    assert bool(kv.eq(2).all())
    del plain, kv


def test_peers_read_pool_memory_before_and_after_a_sleep(
    allocator: cumempool.CuMemAllocator,
) -> None:
    two_devices()
    if not torch.cuda.can_device_access_peer(1, 0):
        pytest.xfail("the devices cannot reach each other")
    allocator.use_memory_pool("kv", peers="all")
    kv = allocator.empty(1 * GIB, dtype=torch.uint8, device=0, tag="kv").fill_(6)
    for _ in range(2):
        assert bool(kv.to("cuda:1").eq(6).all())
        allocator.sleep(tags="kv", offload_tags="kv")
        allocator.wake_up()
    del kv
