"""Frees on a busy device let their thread go on; on an idle one memory is back (R1, R7)."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable

import pytest
import torch

import cumempool
from cumempool.allocator import Backing

from .conftest import CYCLES, GRANULE, settled

MIB = 1024**2
Used = Callable[[], int]


@pytest.fixture
def queued(gpu: torch.device) -> torch.cuda.Stream:
    """A stream that is at work for about 100 ms."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
    return stream


def free_exact(allocator: cumempool.CuMemAllocator) -> Callable[[], None]:
    held = [allocator.empty(8 * MIB, dtype=torch.uint8, tag="weights")]
    return held.clear


def free_segment(allocator: cumempool.CuMemAllocator) -> Callable[[], None]:
    with allocator.use_memory_pool("weights"):
        held = [torch.ones(8 * MIB, dtype=torch.uint8, device="cuda")]

    def free() -> None:
        held.clear()
        torch.cuda.empty_cache()

    return free


@pytest.mark.parametrize("make", [free_exact, free_segment])
def test_a_free_on_a_busy_device_goes_on_and_so_do_other_threads(
    allocator: cumempool.CuMemAllocator,
    request: pytest.FixtureRequest,
    make: Callable[[cumempool.CuMemAllocator], Callable[[], None]],
) -> None:
    free = make(allocator)
    stream: torch.cuda.Stream = request.getfixturevalue("queued")
    gaps: list[float] = []
    ends = threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not ends.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticker = threading.Thread(target=tick)
    ticker.start()
    began = time.perf_counter()
    free()
    seconds = time.perf_counter() - began
    busy = not stream.query()
    ends.set()
    ticker.join()
    assert busy, "the work was too short to tell"
    assert seconds < 0.02
    assert max(gaps) < 0.02
    torch.cuda.synchronize()
    assert settled(allocator).physical_bytes == 0


@pytest.mark.parametrize("backing", ["vmm", "cuda_malloc"])
def test_memory_of_a_busy_device_is_back_when_that_is_idle(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, used: Used, backing: Backing
) -> None:
    before = used()
    with allocator.use_memory_pool("weights", backing=backing):
        pass  # says what memory of the tag is made of
    tensor = allocator.empty(256 * MIB, dtype=torch.uint8, tag="weights").fill_(1)
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    del tensor  # no collection, which takes as long as the work
    assert allocator.stats().pending_free_bytes == 256 * MIB
    torch.cuda.synchronize()
    assert settled(allocator).physical_bytes == 0
    assert abs(used() - before) <= GRANULE


def test_an_allocation_without_room_waits_for_what_was_freed(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    most = int(torch.cuda.mem_get_info()[0] * 0.7) // GRANULE * GRANULE
    tensor = allocator.empty(most, dtype=torch.uint8, tag="weights")
    torch.cuda._sleep(CYCLES)
    del tensor
    gc.collect()
    tensor = allocator.empty(most, dtype=torch.uint8, tag="weights")
    assert tensor.numel() == most


def test_a_python_callback_in_a_stream_ends_while_a_deleter_waits(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    cuda = ctypes.CDLL("libcuda.so.1")
    called = threading.Event()

    def call(_: int) -> None:
        called.set()

    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(call)
    held = [allocator.empty(8 * MIB, dtype=torch.uint8, tag="weights")]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES // 10)
    assert cuda.cuLaunchHostFunc(ctypes.c_void_p(stream.cuda_stream), callback, None) == 0
    held.clear()
    allocator.close(force=True)  # waits for all of it
    assert called.is_set()


def test_empty_cache_on_an_idle_device_gives_memory_back_before_it_returns(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, used: Used
) -> None:
    before = used()
    with allocator.use_memory_pool("weights"):
        tensors = [torch.ones(32 * MIB, dtype=torch.uint8, device=gpu) for _ in range(20)]
    torch.cuda.synchronize()
    tensors.clear()
    torch.cuda.empty_cache()
    assert allocator.stats().pending_free_bytes == 0
    assert abs(used() - before) <= GRANULE
