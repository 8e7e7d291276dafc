"""Work in flight and stream captures (R5)."""

from __future__ import annotations

import threading

import pytest
import torch
from refusals import refuses

import cumempool

from .conftest import settled


def test_work_in_flight_on_a_side_stream_is_finished_before_sleep(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("weights"):
        tensor = torch.zeros(64 << 20, device=gpu)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for cycle in range(5):
        with torch.cuda.stream(stream):
            for _ in range(200):
                tensor.add_(1)
        assert not stream.query()  # otherwise nothing is in flight and this proves nothing
        allocator.sleep(offload_tags="weights")
        allocator.wake_up()
        expected = 200 * (cycle + 1)
        assert float(tensor.min()) == float(tensor.max()) == expected


def test_work_in_flight_is_finished_before_memory_is_freed(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    result = torch.zeros(1, device=gpu)
    stream = torch.cuda.Stream()
    for _ in range(5):
        tensor = allocator.empty(16 << 20, tag="weights")
        tensor.fill_(1)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            result.add_(tensor.sum())
        del tensor  # without any synchronisation, and without record_stream
    torch.cuda.synchronize()
    assert float(result) == 5 * (16 << 20)
    assert settled(allocator).physical_bytes == 0


def test_restored_bytes_are_visible_to_every_stream_at_once(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("weights"):
        tensor = torch.ones(64 << 20, device=gpu)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(3):
        allocator.sleep(offload_tags="weights")
        allocator.wake_up()
        sums = []
        for stream in streams:
            with torch.cuda.stream(stream):
                sums.append(tensor.sum())
        torch.cuda.synchronize()
        assert [float(s) for s in sums] == [64 << 20] * 4


def test_sleep_inside_a_capture_is_refused_and_the_capture_goes_on(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("weights"):
        tensor = torch.ones(1 << 20, device=gpu)
    outside = torch.zeros(1000, device=gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outside.add_(1)
        with refuses(cumempool.StreamCaptureError, operation="sleep"):
            allocator.sleep(offload_tags="weights")
        with refuses(cumempool.StreamCaptureError, operation="wake"):
            allocator.wake_up()
        outside.add_(1)
    assert allocator.stats().awake_bytes > 0
    graph.replay()
    assert float(outside.sum()) == 2000
    assert float(tensor.sum()) == 1 << 20


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_transitions_in_another_thread_leave_a_capture_intact(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, mode: str
) -> None:
    with allocator.use_memory_pool("weights"):
        tensor = torch.ones(8 << 20, device=gpu)
    outside = torch.zeros(1000, device=gpu)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(2):
                allocator.sleep(offload_tags="weights")
                allocator.wake_up()
            exact = allocator.empty(1 << 20, tag="weights")
            del exact
            allocator.release_host_memory()
        except cumempool.CumempoolError as error:
            failures.append(error)

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        outside.add_(1)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        outside.add_(1)
    assert failures == []
    graph.replay()
    assert float(outside.sum()) == 2000
    assert float(tensor.sum()) == 8 << 20
    assert allocator.stats().sleeps == 2


def test_allocating_inside_a_capture_comes_from_the_pool(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    sample = torch.ones(1 << 20, device=gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exact = allocator.empty(1 << 20, tag="weights")
        exact.copy_(sample * 3)
    graph.replay()
    assert float(exact.sum()) == 3 << 20
    allocator.sleep(offload_tags="weights")
    allocator.wake_up()
    assert float(exact.sum()) == 3 << 20
