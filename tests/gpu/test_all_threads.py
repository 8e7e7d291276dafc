"""`use_memory_pool(tag, all_threads=True)`: what other threads allocate, autograd's among them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from refusals import refuses

import cumempool

pytestmark = pytest.mark.usefixtures("load")


@pytest.fixture(autouse=True)
def warm_backward(gpu: torch.device) -> None:
    """Products make a workspace per thread and stream; here, before any scope is open."""
    leaf = torch.ones(64, 64, device=gpu, requires_grad=True)
    (leaf @ leaf).sum().backward()
    torch.cuda.synchronize()


def tag_of(allocator: cumempool.CuMemAllocator, tensor: torch.Tensor | None) -> str | None:
    """Its tag, or None where it lies in ordinary memory."""
    assert tensor is not None
    try:
        return allocator.tag_of(tensor)
    except cumempool.NotInPoolError:
        return None


def model_on(gpu: torch.device) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(512, 512) for _ in range(4)]
    return torch.nn.Sequential(*layers, torch.nn.Linear(512, 8)).to(gpu)


def in_a_thread(work: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


@pytest.mark.parametrize("all_threads", [True, False])
def test_gradients_land_in_the_pool(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, all_threads: bool
) -> None:
    model = model_on(gpu)
    x = torch.randn(32, 512, device=gpu)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    with allocator.use_memory_pool("gradients", all_threads=all_threads):
        model(x).sum().backward()
    tags = {tag_of(allocator, p.grad) for p in model.parameters()}
    # Without, those that a thread of autograd made are in ordinary memory.
    assert tags == {"gradients"} if all_threads else None in tags
    allocator.sleep(tags="gradients")
    allocator.wake_up()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(expected) == 10
    assert all(map(torch.equal, found, expected))


def test_what_backward_only_uses_goes_back(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    """R10."""
    x = torch.randn(64 << 20, device=gpu, requires_grad=True)
    with allocator.use_memory_pool("gradients", all_threads=True):
        torch.sin(torch.cos(torch.sin(x))).sum().backward()
    torch.cuda.empty_cache()
    assert tag_of(allocator, x.grad) == "gradients"
    assert allocator.get_current_usage() == 4 * (64 << 20)


def test_every_thread_and_nested_scopes(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    def here() -> str | None:
        return tag_of(allocator, torch.ones(1000, device=gpu))

    def in_a_scope() -> list[str | None]:
        with allocator.use_memory_pool("theirs"):
            inside = here()
        return [inside, here()]

    with allocator.use_memory_pool("all", all_threads=True):
        assert (here(), in_a_thread(here)) == ("all", "all")
        assert in_a_thread(in_a_scope) == ["theirs", "all"]
        with allocator.use_memory_pool("mine"):
            assert (here(), in_a_thread(here)) == ("mine", "all")
        with allocator.use_memory_pool("all of it", all_threads=True):
            assert (here(), in_a_thread(here)) == ("all of it", "all of it")
        with allocator.preserve_contents():
            info = allocator.allocation_of(torch.ones(1000, device=gpu))
            assert (info.tag, info.preserved) == ("all", True)
        assert (here(), in_a_thread(here)) == ("all", "all")
    assert (here(), in_a_thread(here)) == (None, None)


def test_the_scope_inside_of_one_for_this_thread_takes_all_until_it_ends(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    def here() -> str | None:
        return tag_of(allocator, torch.ones(1000, device=gpu))

    with allocator.use_memory_pool("mine"):
        with allocator.use_memory_pool("all", all_threads=True):
            assert (here(), in_a_thread(here)) == ("all", "all")
        assert (here(), in_a_thread(here)) == ("mine", None)


def test_an_open_scope_of_another_thread_is_not_taken(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("theirs"):

        def enter() -> None:
            with allocator.use_memory_pool("all", all_threads=True):
                pytest.fail("entered")

        with refuses(
            cumempool.InUseError, names="'theirs'", operation="use_memory_pool", tag="all"
        ):
            in_a_thread(enter)
        assert tag_of(allocator, torch.ones(1000, device=gpu)) == "theirs"


def test_preserved_buffers_outlive_a_discard(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("kv_cache", on_sleep="discard", on_wake="zero"):
        cache = torch.ones(8 << 20, device=gpu)
        with allocator.preserve_contents():
            scales = torch.arange(1000.0, device=gpu)
        more = torch.ones(8 << 20, device=gpu)
    report = allocator.sleep()
    assert 4000 <= report.bytes_backed_up <= 65536  # of the block, not of the segment
    assert allocator.get_current_usage() == 0
    allocator.wake_up("kv_cache")
    assert torch.equal(scales, torch.arange(1000.0, device=gpu))
    assert float(cache.max()) == float(more.max()) == 0
    allocator.discard("kv_cache")
    allocator.wake_up("kv_cache")
    assert torch.equal(scales, torch.arange(1000.0, device=gpu))


def test_the_memory_margin_stays_free(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    allocator.set_memory_margin(free - (256 << 20))
    with allocator.use_memory_pool("kv_cache"):
        kept = torch.ones(32 << 20, device=gpu)
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(64 << 20, device=gpu)
        assert "memory margin" in allocator.stats().last_malloc_failure
        small = torch.ones(1 << 20, device=gpu)
    allocator.set_memory_margin(0)
    with allocator.use_memory_pool("kv_cache"):
        large = torch.ones(64 << 20, device=gpu)
    assert float(kept.min() + small.min() + large.min()) == 3
