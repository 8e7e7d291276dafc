"""Every kind of work of the primary context is finished before its memory goes (R5).

Each test queues a host function of 80 ms and, behind it, a copy or a fill of pool memory on one
kind of stream, and then sleeps or frees without synchronising.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator

import pytest
import torch

import cumempool

from .conftest import settled

MIB = 1024**2
NOT_READY = 600
PER_THREAD_STREAM = 2
SLEEP_US = 80_000

Handle = ctypes.c_void_p


class Cuda:
    """The calls of libcuda that torch has no name for; a failing one raises."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def __getattr__(self, name: str) -> Callable[..., None]:
        entry = getattr(self._library, name)

        def call(*arguments: object) -> None:
            result = entry(*arguments)
            assert result == 0, f"{name} returned {result}"

        return call

    def is_busy(self, stream: Handle) -> bool:
        return self._library.cuStreamQuery(stream) == NOT_READY


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    return Cuda()


# usleep takes the place of a host function: it needs no lock of Python's, and its argument is the
# number of microseconds.
USLEEP = ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p)


def queue_fill(cuda: Cuda, stream: Handle, address: int, value: int, count: int) -> None:
    cuda.cuLaunchHostFunc(stream, USLEEP, Handle(SLEEP_US))
    cuda.cuMemsetD8Async(ctypes.c_uint64(address), value, ctypes.c_size_t(count), stream)


def queue_copy(cuda: Cuda, stream: Handle, to: int, source: int, count: int) -> None:
    cuda.cuLaunchHostFunc(stream, USLEEP, Handle(SLEEP_US))
    cuda.cuMemcpyDtoDAsync_v2(
        ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(count), stream
    )


class GreenStream:
    """A stream of a green context on some of the multiprocessors."""

    def __init__(self, cuda: Cuda, device: int) -> None:
        self._cuda = cuda
        self._context = Handle()
        self.stream = Handle()
        resource = (ctypes.c_char * 256)()  # CUdevResource has 144 bytes
        parts = (ctypes.c_char * 256)()
        rest = (ctypes.c_char * 256)()
        count = ctypes.c_uint(1)
        description = Handle()
        cuda.cuDeviceGetDevResource(device, ctypes.byref(resource), 1)  # 1: multiprocessors
        cuda.cuDevSmResourceSplitByCount(
            ctypes.byref(parts),
            ctypes.byref(count),
            ctypes.byref(resource),
            ctypes.byref(rest),
            0,
            16,
        )
        cuda.cuDevResourceGenerateDesc(ctypes.byref(description), ctypes.byref(parts), 1)
        cuda.cuGreenCtxCreate(ctypes.byref(self._context), description, device, 1)
        cuda.cuGreenCtxStreamCreate(ctypes.byref(self.stream), self._context, 1, 0)

    def close(self) -> None:
        self._cuda.cuStreamDestroy_v2(self.stream)
        self._cuda.cuGreenCtxDestroy(self._context)


KINDS = ["non-blocking", "blocking", "legacy", "per-thread", "green context"]


@pytest.fixture(params=KINDS)
def stream(request: pytest.FixtureRequest, cuda: Cuda, gpu: torch.device) -> Iterator[Handle]:
    """A stream of each kind."""
    kind: str = request.param
    if kind in ("non-blocking", "blocking"):
        made = Handle()
        cuda.cuStreamCreate(ctypes.byref(made), 1 if kind == "non-blocking" else 0)
        yield made
        cuda.cuStreamSynchronize(made)
        cuda.cuStreamDestroy_v2(made)
    elif kind == "legacy":
        yield Handle(0)
        torch.cuda.synchronize()
    elif kind == "per-thread":
        yield Handle(PER_THREAD_STREAM)
        torch.cuda.synchronize()
    else:
        green = GreenStream(cuda, gpu.index or 0)
        yield green.stream
        cuda.cuStreamSynchronize(green.stream)
        green.close()


def test_a_sleep_waits_for_work_on_each_kind_of_stream(
    allocator: cumempool.CuMemAllocator, cuda: Cuda, stream: Handle
) -> None:
    tensor = allocator.empty(8 * MIB, dtype=torch.uint8, tag="weights").fill_(1)
    torch.cuda.synchronize()
    queue_fill(cuda, stream, tensor.data_ptr(), 7, 8 * MIB)
    assert cuda.is_busy(stream)  # otherwise this proves nothing
    allocator.sleep(tags=["weights"])
    assert not cuda.is_busy(stream)
    allocator.wake_up()
    assert bool(tensor.eq(7).all())


def test_a_free_takes_nothing_from_work_on_each_kind_of_stream(
    allocator: cumempool.CuMemAllocator, cuda: Cuda, stream: Handle
) -> None:
    target = torch.zeros(8 * MIB, dtype=torch.uint8, device="cuda")
    tensor = allocator.empty(8 * MIB, dtype=torch.uint8, tag="weights").fill_(7)
    torch.cuda.synchronize()
    queue_copy(cuda, stream, target.data_ptr(), tensor.data_ptr(), 8 * MIB)
    assert cuda.is_busy(stream)
    del tensor
    gc.collect()
    torch.cuda.synchronize()
    cuda.cuStreamSynchronize(stream)
    assert bool(target.eq(7).all())
    assert settled(allocator).physical_bytes == 0


def test_a_sleep_waits_for_a_graph_that_was_launched(
    allocator: cumempool.CuMemAllocator, cuda: Cuda, gpu: torch.device
) -> None:
    tensor = allocator.empty(8 * MIB, dtype=torch.uint8, tag="weights").fill_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = Handle(torch.cuda.current_stream().cuda_stream)
        cuda.cuLaunchHostFunc(stream, USLEEP, Handle(SLEEP_US))
        tensor.add_(1)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        graph.replay()
    assert not side.query()
    allocator.sleep(tags=["weights"])
    assert side.query()
    allocator.wake_up()
    assert bool(tensor.eq(2).all())


def test_a_sleep_waits_for_stream_ordered_allocations(
    allocator: cumempool.CuMemAllocator, cuda: Cuda, gpu: torch.device
) -> None:
    tensor = allocator.empty(8 * MIB, dtype=torch.uint8, tag="weights").fill_(7)
    target = torch.zeros(8 * MIB, dtype=torch.uint8, device=gpu)
    torch.cuda.synchronize()
    stream = Handle(torch.cuda.Stream().cuda_stream)
    scratch = ctypes.c_uint64()
    cuda.cuMemAllocAsync(ctypes.byref(scratch), ctypes.c_size_t(8 * MIB), stream)
    queue_copy(cuda, stream, scratch.value, tensor.data_ptr(), 8 * MIB)
    queue_copy(cuda, stream, target.data_ptr(), scratch.value, 8 * MIB)
    cuda.cuMemFreeAsync(scratch, stream)
    assert cuda.is_busy(stream)
    allocator.sleep(tags=["weights"])
    assert not cuda.is_busy(stream)
    assert bool(target.eq(7).all())
    allocator.wake_up()
    assert bool(tensor.eq(7).all())
