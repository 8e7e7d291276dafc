"""What the driver counts: given back asleep, after empty_cache and after close (R10, R13)."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable

import pytest
import torch
from refusals import refuses

import cumempool

from .conftest import GRANULE, Figure

MIB = 1024**2
Used = Callable[[], int]


def test_sleep_returns_memory_to_within_a_granule_per_allocation(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, used: Used, figure: Figure
) -> None:
    before = used()
    with allocator.use_memory_pool("weights"):
        tensors = [torch.ones(200 * MIB, dtype=torch.uint8, device=gpu) for _ in range(10)]
    with allocator.use_memory_pool("kv_cache"):
        cache = torch.ones(1024 * MIB, dtype=torch.uint8, device=gpu)
    count = len(allocator.snapshot())
    awake = used()
    assert awake - before >= 3024 * MIB
    report = allocator.sleep(offload_tags="weights")
    asleep = used()
    figure("used_bytes_before_the_pool", before)
    figure("used_bytes_awake", awake)
    figure("used_bytes_asleep", asleep)
    figure("allocations", count)
    assert abs(asleep - before) <= count * GRANULE
    assert report.bytes_freed == allocator.stats().reserved_address_bytes
    allocator.wake_up()
    assert abs(used() - awake) <= count * GRANULE
    assert all(int(t[0]) == 1 and int(t[-1]) == 1 for t in tensors)
    assert cache.numel() == 1024 * MIB


def test_memory_returns_after_del_and_empty_cache(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, used: Used
) -> None:
    before = used()
    with allocator.use_memory_pool("weights"):
        kept = torch.ones(64 * MIB, dtype=torch.uint8, device=gpu)
        temporary = torch.ones(2048 * MIB, dtype=torch.uint8, device=gpu)
        del temporary
        torch.cuda.synchronize()  # memory of a busy device comes back a moment later
    # R10: what was unused when the scope ended is back without any further call.
    assert allocator.stats().physical_bytes <= 66 * MIB
    assert used() - before <= 68 * MIB
    del kept
    torch.cuda.empty_cache()
    assert abs(used() - before) <= GRANULE
    assert allocator.stats().reserved_address_bytes == 0
    assert torch.cuda.memory_reserved() < 64 * MIB


def test_close_leaves_nothing(gpu: torch.device, used: Used) -> None:
    before = used()
    allocator = cumempool.CuMemAllocator(cumempool.CuMemConfig(driver="cuda"))
    with allocator.use_memory_pool("weights"):
        tensor = torch.ones(512 * MIB, dtype=torch.uint8, device=gpu)
    exact = allocator.empty(100 * MIB, dtype=torch.uint8, tag="kv_cache")
    allocator.sleep(offload_tags=("weights", "kv_cache"))
    with refuses(cumempool.InUseError, names="weights", operation="close"):
        allocator.close()
    allocator.wake_up()
    del tensor, exact
    gc.collect()
    allocator.close()
    stats = allocator.stats()
    assert stats.physical_bytes == stats.reserved_address_bytes == stats.host_bytes == 0
    assert abs(used() - before) <= GRANULE
    with pytest.raises(cumempool.ClosedError):
        allocator.sleep()


def test_close_by_force_frees_the_device_while_tensors_live(gpu: torch.device, used: Used) -> None:
    before = used()
    allocator = cumempool.CuMemAllocator(cumempool.CuMemConfig(driver="cuda"))
    with allocator.use_memory_pool("weights"):
        tensor = torch.ones(512 * MIB, dtype=torch.uint8, device=gpu)
    allocator.close(force=True)
    assert abs(used() - before) <= GRANULE
    assert allocator.stats().reserved_address_bytes > 0
    del tensor
    torch.cuda.empty_cache()
    assert allocator.stats().reserved_address_bytes == 0


def test_an_exception_in_the_scope_strands_nothing(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    caught: BaseException | None = None
    try:
        with allocator.use_memory_pool("weights"):
            torch.ones(256 * MIB, dtype=torch.uint8, device=gpu)
            raise KeyError("from the user's code")
    except KeyError as error:
        caught = error
    assert allocator.stats().physical_bytes == 0  # although the traceback is alive
    assert caught is not None
    torch.ones(1, device=gpu)
    assert allocator.stats().malloc_calls == 1


def test_exact_tensors_go_back_when_they_die(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, used: Used
) -> None:
    before = used()
    tensor = allocator.empty(300 * MIB, dtype=torch.uint8, tag="kv_cache")
    info = allocator.allocation_of(tensor)
    assert info.requested_bytes == 300 * MIB
    assert info.address == tensor.data_ptr()
    view = tensor[10:20]
    del tensor
    assert allocator.stats().physical_bytes == 300 * MIB
    del view
    assert allocator.stats().physical_bytes == 0
    assert abs(used() - before) <= GRANULE


def test_wake_without_room_keeps_everything_asleep_and_can_be_repeated(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    tensors = [torch.randint(0, 255, (512 * MIB,), dtype=torch.uint8, device=gpu) for _ in range(4)]
    with allocator.use_memory_pool("weights"):
        ours = [tensor.clone() for tensor in tensors]
    allocator.sleep(offload_tags="weights")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - 1024 * MIB, dtype=torch.uint8, device=gpu)
    before = allocator.stats()
    for _ in range(2):
        with pytest.raises(cumempool.OutOfMemoryError) as caught:
            allocator.wake_up()
        assert isinstance(caught.value, RuntimeError)
        assert "weights" in str(caught.value)
        assert caught.value.result_name == "CUDA_ERROR_OUT_OF_MEMORY"
        after = allocator.stats()
        assert after.tags == before.tags
        assert after.physical_bytes == 0
    del hog
    torch.cuda.empty_cache()
    allocator.wake_up()
    assert all(torch.equal(a, b) for a, b in zip(ours, tensors, strict=True))


def rdma_capable(tensor: torch.Tensor) -> bool:
    """What libcuda says of the memory."""
    libcuda = ctypes.CDLL("libcuda.so.1")
    value = ctypes.c_bool()
    capable = 15  # CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE
    address = ctypes.c_uint64(tensor.data_ptr())
    assert libcuda.cuPointerGetAttribute(ctypes.byref(value), capable, address) == 0
    return value.value


def test_memory_is_made_for_rdma_unless_the_tag_is_told_otherwise(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    granted = cumempool.probe(driver="cuda").devices[gpu.index].rdma
    with allocator.use_memory_pool("weights", rdma=False):
        weights = torch.full((4 * MIB,), 1, dtype=torch.uint8, device=gpu)
    with allocator.use_memory_pool("kv"):
        kv = torch.full((4 * MIB,), 2, dtype=torch.uint8, device=gpu)
    for _ in range(2):
        stats = allocator.stats().tags
        assert (stats["weights"].rdma, stats["kv"].rdma) == (False, granted)
        assert (rdma_capable(weights), rdma_capable(kv)) == (False, granted)
        allocator.sleep(offload_tags=("weights", "kv"))
        allocator.wake_up()
    assert int(weights.min()) == int(weights.max()) == 1
    assert int(kv.min()) == int(kv.max()) == 2
    del weights, kv


def test_large_allocations_begin_with_a_page_directory_and_are_told_from_their_neighbours(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    libcuda = ctypes.CDLL("libcuda.so.1")
    sizes = [2 * MIB, 512 * MIB, 20 * MIB, 1280 * MIB, 600 * MIB]
    tensors = [
        allocator.empty(size, dtype=torch.uint8, device=gpu, tag="kv").fill_(index)
        for index, size in enumerate(sizes)
    ]
    for index, (size, tensor) in enumerate(zip(sizes, tensors, strict=True)):
        base, bytes_ = ctypes.c_uint64(), ctypes.c_size_t()
        address = ctypes.c_uint64(tensor.data_ptr() + size - 1)
        assert (
            libcuda.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(bytes_), address) == 0
        )
        assert (base.value, bytes_.value) == (tensor.data_ptr(), size)
        assert size < 512 * MIB or tensor.data_ptr() % (512 * MIB) == 0
        assert int(tensor[0]) == int(tensor[-1]) == index
    del tensor, tensors


def test_an_allocation_too_large_raises_and_the_process_goes_on(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    _, total = torch.cuda.mem_get_info()
    with allocator.use_memory_pool("weights"):
        for _ in range(3):
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(2 * total, dtype=torch.uint8, device=gpu)
            small = torch.full((1000,), 7, device=gpu)
            assert int(small.sum()) == 7000
            assert allocator.tag_of(small) == "weights"
    with refuses(
        cumempool.OutOfMemoryError, operation="malloc", result_name="CUDA_ERROR_OUT_OF_MEMORY"
    ):
        allocator.empty(2 * total, dtype=torch.uint8)
    assert int(allocator.empty(4, dtype=torch.int32).fill_(2).sum()) == 8
    assert allocator.stats().malloc_failures > 0


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes on exceptions came with Python 3.11")
def test_running_out_in_a_scope_names_what_torch_has_cached_elsewhere(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    free, _ = torch.cuda.mem_get_info()
    cached = torch.empty(int(free * 0.6), dtype=torch.uint8, device=gpu)
    del cached
    with pytest.raises(torch.OutOfMemoryError) as caught, allocator.use_memory_pool("weights"):
        torch.empty(int(free * 0.6), dtype=torch.uint8, device=gpu)
    notes = "\n".join(caught.value.__notes__)
    assert "CUDA_ERROR_OUT_OF_MEMORY" in notes
    assert "torch.cuda.empty_cache()" in notes
    torch.cuda.empty_cache()
    with allocator.use_memory_pool("weights"):
        fits = torch.empty(int(free * 0.6), dtype=torch.uint8, device=gpu)
    assert allocator.tag_of(fits) == "weights"


def test_host_memory_is_reused_and_given_back(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("weights"):
        tensor = torch.randn(64 * MIB, device=gpu)
    expected = tensor.clone()
    allocator.sleep(offload_tags="weights")
    held = allocator.stats().host_bytes
    assert tensor.nbytes <= held <= tensor.nbytes * 1.02
    for _ in range(3):
        allocator.wake_up()
        allocator.sleep(offload_tags="weights")
        assert allocator.stats().host_bytes == held
    allocator.wake_up()
    staging = allocator.stats().staging_bytes
    assert allocator.release_host_memory() == held + staging
    assert allocator.stats().host_bytes == 0
    assert torch.equal(tensor, expected)


def test_prepare_pins_what_a_sleep_needs_ahead_of_it(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("weights"):
        tensor = torch.randn(64 * MIB, device=gpu)
    expected = tensor.clone()
    pinned = allocator.prepare(offload_tags="weights", background=True).result(timeout=60)
    assert tensor.nbytes <= pinned <= tensor.nbytes * 1.02
    allocator.sleep(offload_tags="weights")
    assert allocator.stats().host_bytes == pinned
    allocator.wake_up()
    assert torch.equal(tensor, expected)
