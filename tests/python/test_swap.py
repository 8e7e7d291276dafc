"""swap: some tags leave while others arrive, all or none, within the memory there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import (
    GRANULE,
    MIB,
    MakeAllocator,
    filled,
    intact,
    random_bytes,
    states,
    totals,
)
from refusals import refuses

from cumempool import (
    CuMemAllocator,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    OutOfHostMemoryError,
    OutOfMemoryError,
    UnknownTagError,
)


def model(alloc: CuMemAllocator, tag: str, sizes: list[int]) -> list[torch.Tensor]:
    return [filled(alloc, size, tag, seed) for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("mib", [64, 16], ids=["room for both", "room for one"])
def test_two_sets_take_turns(make_allocator: MakeAllocator, mib: int) -> None:
    allocator = make_allocator(mib=mib)
    first = model(allocator, "first", [4 * MIB, 6 * MIB, 2 * MIB, 2 * MIB])
    allocator.sleep(tags="first")
    second = model(allocator, "second", [6 * MIB, 4 * MIB, 4 * MIB])
    addresses = [tensor.data_ptr() for tensor in (*first, *second)]
    for turn in range(4):
        leaving, coming = ("second", "first") if turn % 2 == 0 else ("first", "second")
        report = allocator.swap(sleep=leaving, wake=coming)
        assert report.operation == "swap"
        assert set(report.tags) == {"first", "second"}
        clean = 0 if turn < 1 else 14 * MIB
        assert totals(report) == {
            "bytes_freed": 14 * MIB,
            "bytes_mapped": 14 * MIB,
            "bytes_backed_up": 14 * MIB,
            "bytes_restored": 14 * MIB,
        } | ({"bytes_clean": clean} if clean else {})
        assert report.tags[leaving].bytes_backed_up == report.tags[leaving].bytes_freed == 14 * MIB
        assert report.tags[coming].bytes_restored == report.tags[coming].bytes_mapped == 14 * MIB
        assert states(allocator) == {leaving: "backed_up", coming: "awake"}
        assert intact(first if coming == "first" else second)
        stats = allocator.stats()
        assert stats.physical_bytes == stats.mapped_bytes == 14 * MIB
        assert (stats.swaps, stats.sleeps, stats.wakes) == (turn + 1, 1, 0)
    allocator.sleep(offload_tags=("first", "second"))
    if mib == 64:
        allocator.wake_up()
        assert intact(first)
        assert intact(second)
    assert [tensor.data_ptr() for tensor in (*first, *second)] == addresses


def test_wake_none_is_all_others_that_sleep(alloc: CuMemAllocator) -> None:
    kept = {tag: filled(alloc, GRANULE, tag) for tag in ("a", "b", "c", "d")}
    alloc.sleep(offload_tags=("b", "c"), tags=("b", "c"))
    report = alloc.swap(sleep=["a"])
    assert states(alloc) == {"a": "backed_up", "b": "awake", "c": "awake", "d": "awake"}
    assert set(report.tags) == {"a", "b", "c"}
    assert totals(alloc.swap(sleep="a", wake=[])) == {}  # sleeps already, and wakes nothing
    assert states(alloc)["a"] == "backed_up"
    assert totals(alloc.swap(sleep=[], wake=["a", "b"])) == {
        "bytes_mapped": GRANULE,
        "bytes_restored": GRANULE,
    }
    assert all(torch.equal(tensor, random_bytes(GRANULE)) for tensor in kept.values())


def test_what_leaves_may_be_discarded_and_overrides_are_reported(alloc: CuMemAllocator) -> None:
    alloc.use_memory_pool("kv", on_sleep="discard", on_wake="zero")
    alloc.use_memory_pool("weights", on_sleep="offload")
    kv, weights = filled(alloc, GRANULE, "kv"), filled(alloc, 2 * GRANULE, "weights")
    alloc.sleep(tags="weights")
    report = alloc.swap(sleep="kv", wake="weights")
    assert dict(report.overrides) == {}
    assert totals(report) == {
        "bytes_freed": GRANULE,
        "bytes_discarded": GRANULE,
        "bytes_mapped": 2 * GRANULE,
        "bytes_restored": 2 * GRANULE,
    }
    report = alloc.swap(sleep=("weights",), wake=("kv",), offload_tags=())
    assert dict(report.overrides) == {"weights": "policy offload, call discard"}
    assert states(alloc) == {"kv": "awake", "weights": "discarded"}
    assert int(kv.count_nonzero()) == 0
    assert weights.numel() == 2 * GRANULE


@pytest.mark.parametrize("discarded", [False, True], ids=["kept", "discarded"])
def test_a_swap_without_room_leaves_both_as_they_were(
    make_allocator: MakeAllocator, discarded: bool
) -> None:
    """R4."""
    allocator = make_allocator(mib=16)
    big = model(allocator, "big", [4 * MIB, 8 * MIB])
    allocator.sleep(tags="big")
    small = model(allocator, "small", [2 * MIB, 2 * MIB])
    filler = allocator.empty(8 * MIB, dtype=torch.uint8, tag="filler").fill_(5)
    before, stats = allocator.snapshot(), allocator.stats()
    for _ in range(2):
        with pytest.raises(OutOfMemoryError) as caught:
            allocator.swap(sleep="small", wake="big", offload_tags=() if discarded else None)
        assert (caught.value.operation, caught.value.device) == ("swap", 0)
        assert caught.value.total_bytes == 16 * MIB
        assert [(i.address, i.state, i.generation) for i in allocator.snapshot()] == [
            (i.address, i.state, i.generation) for i in before
        ]
        after = allocator.stats()
        assert (after.physical_bytes, after.mapped_bytes) == (12 * MIB, 12 * MIB)
        assert after.tags["big"].backup_bytes == stats.tags["big"].backup_bytes == 12 * MIB
        assert after.swaps == 0
        assert intact(small)
        assert int(filler.sum()) == 5 * 8 * MIB
    del filler
    allocator.swap(sleep="small", wake="big")
    assert intact(big)
    allocator.swap(sleep="big", wake="small")
    assert intact(small)


def test_a_swap_without_host_memory_leaves_both_as_they_were(
    make_allocator: MakeAllocator,
) -> None:
    allocator = make_allocator(mib=16, limit=10 * MIB)
    first = model(allocator, "first", [8 * MIB])
    allocator.sleep(tags="first")
    second = model(allocator, "second", [6 * MIB])
    with pytest.raises(OutOfHostMemoryError) as caught:
        allocator.swap(sleep="second", wake="first")
    assert caught.value.operation == "swap"
    assert states(allocator) == {"first": "backed_up", "second": "awake"}
    assert intact(second)
    del second
    allocator.wake_up()
    assert intact(first)


def test_a_swap_on_several_devices(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(mib=8, devices=3)

    def on_all(tag: str) -> list[torch.Tensor]:
        return [
            allocator.empty(3 * MIB, dtype=torch.uint8, device=device, tag=tag).copy_(
                random_bytes(3 * MIB, device)
            )
            for device in range(3)
        ]

    first = on_all("first")
    allocator.sleep(tags="first")
    second = on_all("second")
    for _ in range(2):
        report = allocator.swap(sleep="second", wake="first")
        assert all(tag.devices == (0, 1, 2) for tag in report.tags.values())
        assert intact(first)
        allocator.swap(sleep="first", wake="second")
        assert intact(second)


@pytest.mark.parametrize("tier", ["pageable", "file", "peer"])
def test_a_swap_between_tiers(
    make_allocator: MakeAllocator, tmp_path_factory: pytest.TempPathFactory, tier: str
) -> None:
    directory = tmp_path_factory.mktemp("backups")
    text = {"file": f"file:{directory}", "peer": "peer:1"}.get(tier, tier)
    allocator = make_allocator(mib=24, devices=2)
    allocator.use_memory_pool("first", backup=text)
    first = model(allocator, "first", [5 * MIB, 7 * MIB])
    allocator.sleep(tags="first")
    second = model(allocator, "second", [13 * MIB])
    for _ in range(2):
        allocator.swap(sleep="second", wake="first")
        assert intact(first)
        first[0][0] += 1
        first[0][0] -= 1
        allocator.swap(sleep="first", wake="second")
        assert intact(second)


def test_no_tag_may_leave_and_arrive(alloc: CuMemAllocator) -> None:
    tensor = filled(alloc, GRANULE, "t")
    for wake in ("t", ["other", "t"]):
        alloc.use_memory_pool("other")
        with refuses(InvalidArgumentError, operation="swap"):
            alloc.swap(sleep="t", wake=wake)
    assert states(alloc) == {"t": "awake"}
    assert torch.equal(tensor, random_bytes(GRANULE))


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"sleep": None}, InvalidTypeError),
        ({"sleep": 3}, InvalidTypeError),
        ({"sleep": "t", "wake": 3}, InvalidTypeError),
        ({"sleep": "unknown"}, UnknownTagError),
        ({"sleep": "t", "wake": "unknown"}, UnknownTagError),
        ({"sleep": "t", "offload_tags": "other"}, InvalidArgumentError),
    ],
    ids=repr,
)
def test_bad_arguments(alloc: CuMemAllocator, arguments: dict[str, Any], kind: Any) -> None:
    tensor = filled(alloc, GRANULE, "t")
    alloc.use_memory_pool("other")
    with pytest.raises(kind):
        alloc.swap(**arguments)
    assert states(alloc) == {"t": "awake"}
    assert torch.equal(tensor, random_bytes(GRANULE))


def test_open_scopes_of_what_leaves_are_refused(alloc: CuMemAllocator) -> None:
    tensors = [filled(alloc, GRANULE, "leaving"), filled(alloc, GRANULE, "coming")]
    alloc.sleep(tags="coming")
    with (
        alloc.use_memory_pool("leaving"),
        refuses(InUseError, names="scope", operation="swap", tag="leaving"),
    ):
        alloc.swap(sleep="leaving", wake="coming")
    with alloc.use_memory_pool("coming"):
        alloc.swap(sleep="leaving", wake="coming")
    assert states(alloc) == {"leaving": "backed_up", "coming": "awake"}
    assert len(tensors) == 2
