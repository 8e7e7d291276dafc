"""Where contents are while they sleep: tiers, clean sleeps, swaps, asynchronous wakes, views."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from refusals import refuses

import cumempool

from .conftest import GRANULE, Figure

MIB = 1024**2
Used = Callable[[], int]
Make = Callable[..., cumempool.CuMemAllocator]


@pytest.fixture
def make(gpu: torch.device) -> Iterator[Make]:
    """Makes allocators that must give everything back when the test is over."""
    made: list[cumempool.CuMemAllocator] = []

    def build(**settings: object) -> cumempool.CuMemAllocator:
        made.append(cumempool.CuMemAllocator(cumempool.CuMemConfig(driver="cuda", **settings)))
        return made[-1]

    yield build
    gc.collect()
    torch.cuda.empty_cache()
    for allocator in made:
        allocator.close(force=True)
        totals = allocator.stats()
        assert totals.physical_bytes == totals.host_bytes == totals.staging_bytes == 0
        assert totals.pageable_bytes == totals.file_bytes == totals.peer_bytes == 0


def fill(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator(device=tensor.device).manual_seed(seed)
    tensor.view(torch.int32).random_(generator=generator)
    return tensor.clone()


def rss() -> int:
    """Resident bytes of the process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("tier", ["pinned", "pageable", "file"])
def test_contents_return_from_every_tier(make: Make, tmp_path: Path, tier: str) -> None:
    allocator = make()
    backup = f"file:{tmp_path}" if tier == "file" else tier
    with allocator.use_memory_pool("weights", backup=backup):
        tensors = [
            torch.empty(n, dtype=torch.int32, device="cuda")
            for n in (1000, 3 * MIB + 5, 20 * MIB, 7)
        ]
    for cycle in range(3):
        expected = [fill(tensor, cycle) for tensor in tensors]
        report = allocator.sleep(offload_tags="weights")
        assert report.bytes_clean == 0
        assert report.problems == ()
        allocator.wake_up()
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    clean = allocator.sleep(offload_tags="weights")
    assert clean.bytes_clean == clean.bytes_backed_up > 0
    allocator.wake_up()
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_contents_return_from_a_peer(make: Make) -> None:
    if torch.cuda.device_count() < 2:
        pytest.xfail("needs two devices: run it on a machine with NVLink or PCIe P2P")
    allocator = make()
    with allocator.use_memory_pool("weights", backup="peer:1", devices=[0]):
        tensor = torch.empty(100 * MIB, dtype=torch.int32, device="cuda:0")
    expected = fill(tensor, 1)
    allocator.sleep(offload_tags="weights")
    stats = allocator.stats()
    assert stats.peer_bytes >= 400 * MIB
    assert stats.host_bytes == 0
    with refuses(
        cumempool.UnsupportedError, names="another device", operation="read_backup", tag="weights"
    ):
        allocator.read_backup(tensor)
    allocator.wake_up()
    assert torch.equal(tensor, expected)


def test_a_device_cannot_back_itself_up(make: Make) -> None:
    allocator = make()
    if torch.cuda.device_count() < 2:
        with refuses(cumempool.UnsupportedError, names="peer access", operation="set_backup"):
            allocator.use_memory_pool("weights", backup="peer:0")
        return
    with allocator.use_memory_pool("weights", backup="peer:0", devices=[0]):
        tensor = torch.ones(MIB, device="cuda:0")
    with refuses(
        cumempool.UnsupportedError, names="back itself up", operation="sleep", tag="weights"
    ):
        allocator.sleep(offload_tags="weights")
    assert tensor.sum().item() == MIB


def test_only_what_changed_is_copied(make: Make) -> None:
    allocator = make()
    with allocator.use_memory_pool("weights"):
        tensors = [torch.empty(64 * MIB, dtype=torch.uint8, device="cuda") for _ in range(4)]
    for i, tensor in enumerate(tensors):
        fill(tensor, i)
    allocator.sleep(offload_tags="weights")
    allocator.wake_up()
    # One bit at the start, in the middle and at the end: three slices of 1 MiB.
    for at in (0, 33 * MIB + 12345, 64 * MIB - 1):
        tensors[1][at] ^= 1
    expected = [tensor.clone() for tensor in tensors]
    report = allocator.sleep(offload_tags="weights")
    assert report.bytes_dirty == 3 * MIB
    assert report.bytes_clean == 253 * MIB
    allocator.wake_up()
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_without_retained_backups_everything_is_copied(make: Make) -> None:
    allocator = make(retain_backups=False)
    with allocator.use_memory_pool("weights"):
        tensor = torch.ones(64 * MIB, device="cuda")
    for _ in range(2):
        report = allocator.sleep(offload_tags="weights")
        assert report.bytes_clean == 0
        allocator.wake_up()
    assert tensor.sum().item() == 64 * MIB


def test_retained_backups_go_when_asked_and_the_process_shrinks(
    make: Make,
    figure: Figure,
) -> None:
    allocator = make()
    with allocator.use_memory_pool("weights"):
        tensor = torch.ones(512 * MIB, device="cuda")
    allocator.sleep(offload_tags="weights")
    allocator.wake_up()
    before = rss()
    assert allocator.stats().tags["weights"].retained_bytes == 2048 * MIB
    released = allocator.release_host_memory()
    after = rss()
    figure("resident_bytes", before)
    figure("resident_bytes_after_release_host_memory", after)
    figure("released_bytes", released)
    assert 2048 * MIB <= released <= 1.01 * 2048 * MIB  # the buffer of digests comes along
    assert before - after >= 0.98 * released
    assert allocator.stats().host_bytes == 0
    assert allocator.sleep(offload_tags="weights").bytes_clean == 0
    allocator.wake_up()
    assert tensor.sum().item() == 512 * MIB


def test_what_the_limit_leaves_no_room_for_overflows(make: Make) -> None:
    allocator = make(host_backup_limit=64 * MIB, host_backup_overflow="pageable")
    with allocator.use_memory_pool("weights"):
        tensors = [torch.full((40 * MIB,), i, dtype=torch.uint8, device="cuda") for i in (1, 2)]
    allocator.sleep(offload_tags="weights")
    stats = allocator.stats()
    assert 0 < stats.host_bytes <= 64 * MIB
    assert stats.pageable_bytes >= 40 * MIB
    allocator.wake_up()
    assert [int(tensor.min()) for tensor in tensors] == [1, 2]
    assert [int(tensor.max()) for tensor in tensors] == [1, 2]


@pytest.mark.parametrize("tight", [False, True])
def test_swap(make: Make, used: Used, tight: bool) -> None:
    allocator = make()
    size = 2048 * MIB
    tensors = {}
    for tag in ("a", "b"):
        with allocator.use_memory_pool(tag):
            tensors[tag] = [
                torch.empty(size // 16, dtype=torch.uint8, device="cuda") for _ in range(16)
            ]
    expected = {tag: [fill(t, 7) for t in of_tag] for tag, of_tag in tensors.items()}
    allocator.sleep(offload_tags="b", tags=["b"])
    free, _ = torch.cuda.mem_get_info()
    # Leaves room for four of the sixteen that arrive: the rest has to wait for those that depart.
    ballast = torch.empty(free - size // 4, dtype=torch.uint8, device="cuda") if tight else None
    for leaves, arrives in (("a", "b"), ("b", "a")):
        report = allocator.swap(sleep=[leaves], wake=[arrives])
        assert report.tags[leaves].bytes_freed == report.tags[arrives].bytes_mapped == size
        assert all(
            torch.equal(t, e) for t, e in zip(tensors[arrives], expected[arrives], strict=True)
        )
        assert allocator.stats().tags[leaves].awake_bytes == 0
    assert allocator.stats().swaps == 2
    del ballast
    allocator.wake_up()
    assert all(torch.equal(t, e) for t, e in zip(tensors["b"], expected["b"], strict=True))


def test_a_swap_without_room_changes_nothing(make: Make) -> None:
    allocator = make()
    with allocator.use_memory_pool("large"):
        large = torch.ones(1024 * MIB, dtype=torch.uint8, device="cuda")
    with allocator.use_memory_pool("small"):
        small = torch.full((64 * MIB,), 2, dtype=torch.uint8, device="cuda")
    allocator.sleep(offload_tags="large", tags=["large"])
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - 256 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(cumempool.OutOfMemoryError):
        allocator.swap(sleep=["small"], wake=["large"])
    assert (int(small.min()), int(small.max())) == (2, 2)
    del ballast
    torch.cuda.empty_cache()
    allocator.wake_up()
    assert int(large.sum(dtype=torch.int64)) == 1024 * MIB


def test_tensors_are_ready_one_after_another(make: Make) -> None:
    allocator = make()
    tensors = [
        allocator.empty(256 * MIB, dtype=torch.uint8, device="cuda", tag="w") for _ in range(16)
    ]
    expected = [fill(tensor, i).sum(dtype=torch.int64) for i, tensor in enumerate(tensors)]
    for cycle in range(3):
        allocator.sleep(offload_tags="w")
        handle = allocator.wake_up(blocking=False, first=[tensors[5]] if cycle else [])
        sums = []
        for tensor in tensors:
            handle.wait(tensor)
            sums.append(tensor.sum(dtype=torch.int64))  # on the current stream, right behind
        report = handle.result()
        assert report.bytes_restored == 4096 * MIB
        assert handle.done()
        assert [int(s) for s in sums] == [int(e) for e in expected]


def test_an_asynchronous_wake_without_room_is_refused_at_once(make: Make) -> None:
    allocator = make()
    tensor = allocator.empty(2048 * MIB, dtype=torch.uint8, device="cuda", tag="w").fill_(3)
    allocator.sleep(offload_tags="w")
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - 1024 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(cumempool.OutOfMemoryError):
        allocator.wake_up(blocking=False)
    del ballast
    torch.cuda.empty_cache()
    with allocator.wake_up(blocking=False) as handle:
        handle.wait(tensor)
    assert int(tensor.sum(dtype=torch.int64)) == 3 * 2048 * MIB


def test_backups_are_read_and_written_where_they_are(make: Make) -> None:
    allocator = make()
    with allocator.use_memory_pool("weights"):
        weight = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16)
        other = torch.randn(100, 300, device="cuda").t()
    expected, of_other = weight.cpu(), other.cpu()
    allocator.sleep(offload_tags="weights")
    before = rss()
    seen = allocator.read_backup(weight)
    assert torch.equal(seen, expected)
    assert torch.equal(allocator.read_backup(other), of_other)
    assert allocator.read_backup(other).stride() == other.stride()
    assert rss() - before < 64 * MIB
    with refuses(cumempool.InvalidArgumentError, names="read-only"):
        seen.zero_()
    allocator.read_backup(weight, writable=True)[3] = 5.0
    expected[3] = 5.0
    del seen
    gc.collect()
    allocator.wake_up()
    assert torch.equal(weight.cpu(), expected)
    allocator.sleep(offload_tags="weights")
    allocator.wake_up()
    assert torch.equal(weight.cpu(), expected)


def test_clean_sleeps_beside_a_capture(make: Make) -> None:
    allocator = make()
    with allocator.use_memory_pool("weights"):
        weight = torch.ones(64 * MIB, device="cuda")
    allocator.sleep(offload_tags="weights")
    allocator.wake_up()
    sample = torch.ones(1024, device="cuda")
    graph = torch.cuda.CUDAGraph()
    reports: list[cumempool.TransitionReport] = []

    def cycle() -> None:
        reports.append(allocator.sleep(offload_tags="weights"))
        reports.append(allocator.wake_up())

    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        doubled = sample * 2
        thread = threading.Thread(target=cycle)
        thread.start()
        thread.join()
    assert reports[0].bytes_clean == 256 * MIB
    graph.replay()
    assert doubled.sum().item() == 2048
    assert weight.sum().item() == 64 * MIB


def test_digests_take_no_device_memory_to_speak_of(make: Make, used: Used) -> None:
    allocator = make()
    with allocator.use_memory_pool("weights"):
        tensor = torch.ones(1024 * MIB, dtype=torch.uint8, device="cuda")
    allocator.sleep(offload_tags="weights")
    allocator.wake_up()
    before = used()
    for _ in range(3):
        assert allocator.sleep(offload_tags="weights").bytes_clean == 1024 * MIB
        allocator.wake_up()
    assert abs(used() - before) <= GRANULE
    assert tensor.numel() == 1024 * MIB
