"""Sleeps that copy only what has changed since the last one, and what makes them copy all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import GRANULE, MIB, MakeAllocator, filled, random_bytes, totals

from cumempool import CuMemAllocator

TIERS = ("pinned", "pageable", "file", "peer")


def cycle(alloc: CuMemAllocator, tag: str = "t") -> tuple[int, int]:
    """Sleeps and wakes; how many bytes were backed up, and how many of them were clean."""
    report = alloc.sleep(tags=tag)
    woken = alloc.wake_up(tag)
    assert woken.bytes_restored == report.bytes_backed_up
    return report.bytes_backed_up, report.bytes_clean


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    name = str(request.param)
    directory = tmp_path_factory.mktemp("backups")
    return {"file": f"file:{directory}", "peer": "peer:1"}.get(name, name)


def test_only_slices_that_changed_are_copied(make_allocator: MakeAllocator, tier: str) -> None:
    allocator = make_allocator(devices=2)
    allocator.use_memory_pool("t", backup=tier)
    tensor = filled(allocator, 11 * MIB + 3, "t")  # 12 MiB with the rest of the last granule
    expected = random_bytes(11 * MIB + 3)
    assert cycle(allocator) == (12 * MIB, 0)
    assert cycle(allocator) == (12 * MIB, 12 * MIB)
    for changed, slices in (
        ([0], 1),
        ([11 * MIB + 2], 1),
        ([MIB - 1, MIB], 2),
        ([5 * MIB + 17, 5 * MIB + 90, 7 * MIB], 2),
        (list(range(0, 11 * MIB, MIB)), 11),
        ([], 0),
    ):
        for at in changed:
            tensor[at] += 1
            expected[at] += 1
        report = allocator.sleep(tags="t")
        assert (report.bytes_dirty, report.bytes_backed_up) == (slices * MIB, 12 * MIB)
        assert report.bytes_copied == slices * MIB
        assert report.tags["t"].bytes_clean == (12 - slices) * MIB
        assert report.problems == ()
        allocator.wake_up()
        assert torch.equal(tensor, expected)


def test_a_clean_sleep_copies_nothing_and_says_so(alloc: CuMemAllocator) -> None:
    tensor = filled(alloc, 4 * GRANULE, "t")
    cycle(alloc)
    report = alloc.sleep(tags="t")
    assert totals(report) == {
        "bytes_freed": 4 * GRANULE,
        "bytes_backed_up": 4 * GRANULE,
        "bytes_clean": 4 * GRANULE,
    }
    assert (report.bytes_dirty, report.bytes_copied, report.gb_per_s) == (0, 0, 0.0)
    assert "clean 8.00 MiB" in str(report)
    alloc.wake_up()
    assert torch.equal(tensor, random_bytes(4 * GRANULE))


def test_memory_written_back_to_what_it_was_is_clean(alloc: CuMemAllocator) -> None:
    tensor = filled(alloc, GRANULE, "t")
    cycle(alloc)
    tensor[3] += 1
    tensor[3] -= 1
    assert cycle(alloc) == (GRANULE, GRANULE)


def test_each_allocation_is_compared_with_its_own_backup(alloc: CuMemAllocator) -> None:
    tensors = [filled(alloc, size * MIB, "t", seed) for seed, size in enumerate((2, 6, 4, 2))]
    cycle(alloc)
    tensors[1][:] = 7
    tensors.append(filled(alloc, 2 * MIB, "t", 9))  # has no backup yet
    report = alloc.sleep(tags="t")
    assert (report.bytes_dirty, report.bytes_clean) == (8 * MIB, 8 * MIB)
    alloc.wake_up()
    assert bool((tensors[1] == 7).all())
    for at, seed in ((0, 0), (2, 2), (3, 3), (4, 9)):
        assert torch.equal(tensors[at], random_bytes(tensors[at].numel(), seed))


def test_retained_backups_are_in_the_statistics(alloc: CuMemAllocator) -> None:
    tensor = filled(alloc, 3 * GRANULE, "t")
    assert alloc.stats().tags["t"].retained_bytes == 0
    alloc.sleep(tags="t")
    tag = alloc.stats().tags["t"]
    assert (tag.backup_bytes, tag.retained_bytes) == (3 * GRANULE, 0)
    alloc.wake_up()
    stats = alloc.stats()
    assert (stats.tags["t"].backup_bytes, stats.tags["t"].retained_bytes) == (0, 3 * GRANULE)
    assert stats.host_used_bytes == 3 * GRANULE
    (info,) = alloc.snapshot()
    assert (info.state, info.backup_bytes, info.backup_tier) == ("awake", 3 * GRANULE, "pinned")
    del tensor
    stats = alloc.stats()
    assert (stats.tags["t"].retained_bytes, stats.host_used_bytes) == (0, 0)


def test_without_retained_backups_everything_is_copied(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(retain=False)
    tensor = filled(allocator, 2 * GRANULE, "t")
    for _ in range(3):
        assert cycle(allocator) == (2 * GRANULE, 0)
        stats = allocator.stats()
        assert (stats.tags["t"].retained_bytes, stats.host_used_bytes) == (0, 0)
    assert torch.equal(tensor, random_bytes(2 * GRANULE))


FORGET: dict[str, Callable[[CuMemAllocator], object]] = {
    "release_host_memory": lambda alloc: alloc.release_host_memory(),
    "discard": lambda alloc: (alloc.discard("t"), alloc.wake_up()),
    "another tier": lambda alloc: alloc.set_backup("t", "pageable"),
}


@pytest.mark.parametrize("way", FORGET)
def test_what_makes_the_next_sleep_copy_all_of_it(alloc: CuMemAllocator, way: str) -> None:
    tensor = filled(alloc, 2 * GRANULE, "t")
    cycle(alloc)
    FORGET[way](alloc)
    tensor.copy_(random_bytes(2 * GRANULE))
    assert cycle(alloc) == (2 * GRANULE, 0)
    assert cycle(alloc) == (2 * GRANULE, 2 * GRANULE)
    assert torch.equal(tensor, random_bytes(2 * GRANULE))


def test_release_host_memory_while_awake_drops_retained_backups(alloc: CuMemAllocator) -> None:
    awake, asleep = filled(alloc, 2 * GRANULE, "awake", 1), filled(alloc, GRANULE, "asleep", 2)
    alloc.sleep(offload_tags=("awake", "asleep"))
    alloc.wake_up("awake")
    stats = alloc.stats()
    assert stats.host_used_bytes == 3 * GRANULE
    released = alloc.release_host_memory()
    after = alloc.stats()
    assert (after.host_used_bytes, after.staging_bytes) == (GRANULE, 0)
    assert after.tags["awake"].retained_bytes == 0
    assert after.tags["asleep"].backup_bytes == GRANULE
    assert released == stats.host_bytes + stats.staging_bytes - after.host_bytes
    alloc.wake_up()
    assert torch.equal(awake, random_bytes(2 * GRANULE, 1))
    assert torch.equal(asleep, random_bytes(GRANULE, 2))


def test_a_wake_that_fails_keeps_what_the_next_sleep_compares_with(
    make_allocator: MakeAllocator,
) -> None:
    """R4."""
    allocator = make_allocator(mib=16)
    tensor = filled(allocator, 3 * GRANULE, "t")
    allocator.sleep(tags="t")
    filler = allocator.empty(6 * GRANULE, dtype=torch.uint8, tag="filler")
    with pytest.raises(RuntimeError):
        allocator.wake_up("t")
    del filler
    allocator.wake_up("t")
    assert cycle(allocator) == (3 * GRANULE, 3 * GRANULE)
    assert torch.equal(tensor, random_bytes(3 * GRANULE))


def test_several_devices_are_compared_at_the_same_time(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(devices=3)
    tensors = [
        allocator.empty(4 * MIB, dtype=torch.uint8, device=device, tag="t").fill_(device)
        for device in range(3)
    ]
    assert cycle(allocator) == (12 * MIB, 0)
    tensors[2][5] = 99
    report = allocator.sleep(tags="t")
    assert (report.bytes_dirty, report.tags["t"].devices) == (MIB, (0, 1, 2))
    allocator.wake_up()
    assert [int(tensor[5]) for tensor in tensors] == [0, 1, 99]
