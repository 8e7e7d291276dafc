"""Memory of all GPUs in one process, asleep and awake together."""

from __future__ import annotations

import pytest
import torch

import cumempool
from cumempool.compat.torch_memory_saver import TorchMemorySaver

MIB = 1024**2
GIB = 1024**3


def test_several_devices_sleep_and_wake_together(allocator: cumempool.CuMemAllocator) -> None:
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        torch.zeros(1, device=device)
    with allocator.use_memory_pool("weights"):
        tensors = [torch.randn(1 << 20, device=device) for device in devices]
    expected = [tensor.cpu() for tensor in tensors]
    report = allocator.sleep(offload_tags="weights")
    assert report.tags["weights"].devices == tuple(range(len(devices)))
    allocator.wake_up()
    for tensor, old in zip(tensors, expected, strict=True):
        assert torch.equal(tensor.cpu(), old)
    assert [allocator.allocation_of(tensor).device for tensor in tensors] == list(
        range(len(devices))
    )


def _copies(pool: torch.Tensor, other: torch.Tensor) -> None:
    """All kinds of copies in both directions, each checked."""
    wanted = torch.arange(other.numel(), device=other.device, dtype=torch.float32).view_as(other)
    other.copy_(wanted)
    pool.zero_()
    pool.copy_(other)  # contiguous, in
    assert torch.equal(pool.cpu(), wanted.cpu())
    pool.zero_()
    pool.t().copy_(other.t().contiguous())  # strided, in
    assert torch.equal(pool.cpu(), wanted.cpu())
    pool.zero_()
    pool.copy_(other.double())  # with a cast, in
    assert torch.equal(pool.cpu(), wanted.cpu())
    assert torch.equal(pool.to(other.device), wanted)
    other.zero_()
    other.copy_(pool)
    assert torch.equal(other, wanted)
    other.zero_()
    other.t().copy_(pool.t())
    assert torch.equal(other, wanted)
    assert torch.equal(pool.to(other.device, torch.float64), wanted.double())


@pytest.mark.parametrize("home", [0, 1])
def test_copies_between_devices_work_as_with_ordinary_memory(
    allocator: cumempool.CuMemAllocator, home: int
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.xfail("there is one GPU; this needs two")
    other = torch.empty(513, 1024, device=f"cuda:{1 - home}")
    with torch.cuda.device(home), allocator.use_memory_pool("weights"):
        pool = torch.empty(513, 1024, device=f"cuda:{home}")
    _copies(pool, other)
    allocator.sleep(tags="weights")
    allocator.wake_up()
    _copies(pool, other)
    with torch.cuda.device(1 - home), allocator.use_memory_pool("weights"):
        there = torch.empty(513, 1024, device=f"cuda:{1 - home}")
    _copies(pool, there)
    _copies(there, pool)


def test_a_region_pauses_memory_of_several_devices(
    allocator: cumempool.CuMemAllocator,
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.xfail("there is one GPU; this needs two")
    saver = TorchMemorySaver(allocator=allocator)
    torch.zeros(1, device="cuda:0")
    used_before = [_used_on(device) for device in (0, 1)]
    with torch.cuda.device(1):
        with saver.region("both", enable_cpu_backup=True):
            first = torch.full((GIB,), 1, dtype=torch.uint8, device="cuda:0")
            second = torch.full((GIB,), 2, dtype=torch.uint8, device="cuda")
        saver.pause("both")
        assert all(_used_on(d) - used_before[d] < 512 * MIB for d in (0, 1))
        saver.resume("both")
    assert (first.device.index, second.device.index) == (0, 1)
    assert bool(first.eq(1).all())
    assert bool(second.eq(2).all())


def _used_on(device: int) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return total - free
