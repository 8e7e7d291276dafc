"""`preserve_contents`, `preserve`: memory that keeps its contents where its tag is discarded."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from conftest import GRANULE, MakeAllocator, states
from refusals import refuses
from torch import nn

from cumempool import (
    CuMemAllocator,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    OutOfHostMemoryError,
)


def discarded_tag(alloc: CuMemAllocator) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of the tag "kv" that is discarded, and one beside it that is preserved."""
    with alloc.use_memory_pool("kv", on_sleep="discard", on_wake="zero"):
        cache = alloc.empty(1000).fill_(1)
        with alloc.preserve_contents() as scope:
            assert (scope.tag, scope.preserves) == ("kv", True)
            scales = alloc.empty(1000).fill_(2)
        after = alloc.empty(10)
    del after
    return cache, scales


@pytest.mark.parametrize("how", ["sleep", "sleep tags", "offload nothing", "discard", "swap"])
def test_preserved_contents_survive_and_the_rest_of_the_tag_does_not(
    alloc: CuMemAllocator, how: str
) -> None:
    cache, scales = discarded_tag(alloc)
    addresses = (cache.data_ptr(), scales.data_ptr())
    report = {
        "sleep": alloc.sleep,
        "sleep tags": lambda: alloc.sleep(tags="kv"),
        "offload nothing": lambda: alloc.sleep(offload_tags=()),
        "discard": lambda: alloc.discard("kv"),
        "swap": lambda: alloc.swap(sleep="kv"),
    }[how]()
    assert (report.bytes_backed_up, report.bytes_discarded) == (GRANULE, GRANULE)
    stats = alloc.stats().tags["kv"]
    assert (stats.backed_up_bytes, stats.discarded_bytes) == (GRANULE, GRANULE)
    assert stats.preserved_bytes == GRANULE
    woken = alloc.wake_up("kv")
    assert (woken.bytes_restored, woken.bytes_zeroed) == (GRANULE, GRANULE)
    assert (cache.data_ptr(), scales.data_ptr()) == addresses
    assert set(scales.tolist()) == {2.0}
    assert set(cache.tolist()) == {0.0}


def test_a_discard_of_what_sleeps_drops_no_preserved_backup(alloc: CuMemAllocator) -> None:
    cache, scales = discarded_tag(alloc)
    alloc.sleep(offload_tags=("kv",))
    assert alloc.stats().tags["kv"].backed_up_bytes == 2 * GRANULE
    alloc.discard("kv")
    stats = alloc.stats().tags["kv"]
    assert (stats.backed_up_bytes, stats.discarded_bytes) == (GRANULE, GRANULE)
    alloc.wake_up()
    assert set(scales.tolist()) == {2.0}
    assert set(cache.tolist()) == {0.0}


def test_preserved_memory_sleeps_with_its_tag_and_shows_under_it(alloc: CuMemAllocator) -> None:
    discarded_tag_held = discarded_tag(alloc)
    assert [(info.tag, info.preserved) for info in alloc.snapshot()] == [
        ("kv", False),
        ("kv", True),
    ]
    assert list(alloc.stats().tags) == ["kv"]
    alloc.sleep(tags="kv")
    assert [info.state for info in alloc.snapshot()] == ["discarded", "backed_up"]
    alloc.wake_up("kv")
    assert states(alloc) == {"kv": "awake"}
    assert len(discarded_tag_held) == 2


def test_prepare_pins_for_preserved_memory_of_a_discarded_tag(alloc: CuMemAllocator) -> None:
    held = discarded_tag(alloc)
    assert alloc.prepare(offload_tags=(), tags="kv") >= GRANULE
    before = alloc.stats().host_bytes
    alloc.sleep(offload_tags=(), tags="kv")
    assert alloc.stats().host_bytes == before
    alloc.wake_up()
    assert len(held) == 2


def test_without_room_for_preserved_contents_nothing_sleeps(make_allocator: MakeAllocator) -> None:
    """R4."""
    alloc = make_allocator(limit=GRANULE)
    with alloc.use_memory_pool("kv", on_sleep="discard"), alloc.preserve_contents():
        kept = alloc.empty(2 * GRANULE, dtype=torch.uint8).fill_(7)
    with refuses(OutOfHostMemoryError, operation="sleep", tag="kv", bytes=2 * GRANULE):
        alloc.sleep()
    assert alloc.stats().asleep_bytes == 0
    assert int(kept.sum()) == 14 * GRANULE


def test_preserve_contents_takes_the_innermost_scope_of_this_thread(alloc: CuMemAllocator) -> None:
    seen: list[tuple[str, bool]] = []

    def note(tensor: torch.Tensor) -> None:
        info = alloc.allocation_of(tensor)
        seen.append((info.tag, info.preserved))

    with alloc.use_memory_pool("a"), alloc.use_memory_pool("b"), alloc.preserve_contents():
        note(alloc.empty(1))
        note(alloc.empty(1, tag="other"))
        with alloc.use_memory_pool("c"):
            note(alloc.empty(1))
        thread = threading.Thread(target=lambda: note(alloc.empty(1)))
        thread.start()
        thread.join()
    assert seen == [("b", True), ("other", False), ("c", False), ("default", False)]


def test_preserve_contents_outside_of_a_scope_is_refused(alloc: CuMemAllocator) -> None:
    with refuses(InvalidArgumentError, operation="preserve_contents"):
        alloc.preserve_contents()


def test_while_it_is_open_the_tag_cannot_sleep(alloc: CuMemAllocator) -> None:
    """R5: torch would hand out memory that sleeps."""
    with (
        alloc.use_memory_pool("kv"),
        alloc.preserve_contents(),
        refuses(InUseError, names="scope", operation="sleep", tag="kv"),
    ):
        alloc.sleep(tags="kv")


# ---- what exists already


def test_preserve_keeps_the_allocation_that_a_tensor_lies_in(alloc: CuMemAllocator) -> None:
    tensor = alloc.empty(1000, tag="kv").fill_(3)
    other = alloc.empty(1000, tag="kv").fill_(4)
    assert alloc.preserve(tensor[5:]) == GRANULE
    assert alloc.preserve([tensor, tensor, torch.empty(0)]) == GRANULE
    assert alloc.preserve([]) == 0
    alloc.discard("kv")
    alloc.wake_up()
    assert set(tensor.tolist()) == {3.0}
    assert other.sum() != 4000


def test_preserve_of_memory_that_sleeps_goes_for_the_next_time(alloc: CuMemAllocator) -> None:
    tensor = alloc.empty(1000, tag="kv").fill_(3)
    alloc.sleep(tags="kv")
    alloc.preserve(tensor)
    alloc.discard("kv")
    alloc.wake_up()
    assert set(tensor.tolist()) == {3.0}


def test_preserve_of_a_module_is_for_its_buffers(alloc: CuMemAllocator) -> None:
    module = nn.BatchNorm1d(4)
    alloc.adopt(module, preserve_buffers=True)
    weight = alloc.allocation_of(module.weight)
    mean = alloc.allocation_of(module.running_mean)
    assert (weight.preserved, mean.preserved) == (False, True)
    assert weight.address != mean.address
    other = nn.BatchNorm1d(4)
    alloc.adopt(other)
    assert alloc.preserve(other) == GRANULE
    assert alloc.allocation_of(other.running_mean).preserved
    with torch.no_grad():
        module.running_mean.fill_(9)
    alloc.discard("weights")
    alloc.wake_up()
    assert set(module.running_mean.tolist()) == {9.0}


def test_buffers_that_were_packed_with_weights_are_preserved_where_they_are(
    alloc: CuMemAllocator,
) -> None:
    module = nn.BatchNorm1d(4)
    assert alloc.adopt(module) == GRANULE
    mean = module.running_mean.data_ptr()
    alloc.sleep(offload_tags=("weights",))
    assert alloc.adopt(module, preserve_buffers=True) == 0
    alloc.wake_up()
    assert module.running_mean.data_ptr() == mean
    assert [info.preserved for info in alloc.snapshot()] == [True]


def test_a_buffer_that_shares_its_storage_with_a_weight_takes_it_along(
    alloc: CuMemAllocator,
) -> None:
    module = nn.Linear(4, 4, bias=False)
    module.register_buffer("row", module.weight.detach()[0])
    alloc.adopt(module, preserve_buffers=True)
    assert [info.preserved for info in alloc.snapshot()] == [True]
    with torch.no_grad():
        module.weight.fill_(5)
    assert set(module.row.tolist()) == {5.0}


def test_preserve_of_memory_of_others_is_refused_with_nothing_preserved(
    alloc: CuMemAllocator,
) -> None:
    mine = alloc.empty(10, tag="kv")
    with pytest.raises(NotInPoolError):
        alloc.preserve([mine, torch.ones(3)])
    assert not alloc.snapshot()[0].preserved


@pytest.mark.parametrize("thing", [None, 3, ["x"]], ids=repr)
def test_preserve_takes_tensors_and_modules(alloc: CuMemAllocator, thing: Any) -> None:
    with pytest.raises(InvalidTypeError):
        alloc.preserve(thing)
