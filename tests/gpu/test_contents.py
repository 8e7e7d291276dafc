"""Values, addresses and strides are bit-equal after sleep and wake (R2, R4)."""

from __future__ import annotations

import pytest
import torch

import cumempool

pytestmark = pytest.mark.usefixtures("load")

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(shape, device=device) > 0.5
    flat = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), device=device)
    return flat.to(torch.uint8).view(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["scope", "empty"])
def test_every_dtype_is_bit_equal_after_wake(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, dtype: torch.dtype, way: str
) -> None:
    expected = random_bits((33, 257), dtype, gpu)
    if way == "scope":
        with allocator.use_memory_pool("weights"):
            tensor = torch.empty((33, 257), dtype=dtype, device=gpu)
    else:
        tensor = allocator.empty(33, 257, dtype=dtype, tag="weights")
    tensor.copy_(expected)
    address = tensor.data_ptr()
    allocator.sleep(offload_tags="weights")
    allocator.wake_up()
    assert tensor.data_ptr() == address
    assert torch.equal(bits(tensor), bits(expected))


def test_views_strides_and_zero_sizes_survive(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("weights"):
        base = torch.randn(64, 128, device=gpu)
        nothing = torch.empty(0, 7, device=gpu)
    views = [base.t(), base[3:9, ::5], base.view(-1)[17:], base.as_strided((4, 4), (3, 7), 11)]
    before = [view.clone() for view in views]
    layout = [(view.data_ptr(), view.stride(), view.shape) for view in views]
    allocator.sleep(offload_tags="weights")
    allocator.wake_up()
    for view, old, (address, stride, shape) in zip(views, before, layout, strict=True):
        assert torch.equal(view, old)
        assert (view.data_ptr(), view.stride(), view.shape) == (address, stride, shape)
    assert nothing.shape == (0, 7)
    assert nothing.sum() == 0


def test_discarded_memory_is_back_at_its_address_and_zero_where_asked(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("kv_cache", on_sleep="discard", on_wake="zero"):
        cache = torch.full((1 << 20,), 3.0, device=gpu)
    address = cache.data_ptr()
    report = allocator.sleep()
    assert report.bytes_backed_up == 0
    allocator.wake_up()
    assert cache.data_ptr() == address
    assert torch.count_nonzero(cache) == 0


def test_only_live_bytes_are_copied(allocator: cumempool.CuMemAllocator, gpu: torch.device) -> None:
    with allocator.use_memory_pool("weights"):
        keep = torch.randint(0, 255, (3 << 20,), dtype=torch.uint8, device=gpu)
        drop = torch.zeros(12 << 20, dtype=torch.uint8, device=gpu)
        small = [torch.full((1000,), i, dtype=torch.int32, device=gpu) for i in range(20)]
        expected = keep.clone()
        del drop
    del small[::2]
    report = allocator.sleep(offload_tags="weights")
    live = keep.nbytes + sum(t.nbytes for t in small) + expected.nbytes
    assert live <= report.bytes_backed_up <= live + 64 * 1024
    assert report.bytes_freed == report.bytes_backed_up + report.bytes_discarded
    allocator.wake_up()
    assert torch.equal(keep, expected)
    assert [int(t[7]) for t in small] == list(range(1, 20, 2))


def test_cuda_graph_replays_equal_after_wake(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("weights"):
        weight = torch.randn(512, 512, device=gpu)
    with allocator.use_memory_pool("kv_cache", on_wake="zero"):
        cache = torch.zeros(512, 512, device=gpu)
    sample = torch.randn(512, 512, device=gpu)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cache.copy_(sample @ weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.copy_(sample @ weight)
        result = cache * 2
    graph.replay()
    expected = result.clone()
    for _ in range(3):
        allocator.sleep(offload_tags="weights")
        allocator.wake_up()
        result.zero_()
        graph.replay()
        assert torch.equal(result, expected)
