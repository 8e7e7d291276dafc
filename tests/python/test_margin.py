"""`set_memory_margin`: device memory that allocations leave to others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import GRANULE, MakeAllocator
from refusals import refuses

from cumempool import CuMemAllocator, InvalidArgumentError, InvalidTypeError, OutOfMemoryError


def test_an_allocation_that_would_leave_less_fails_as_out_of_memory(
    make_allocator: MakeAllocator,
) -> None:
    alloc = make_allocator(mib=8)
    alloc.set_memory_margin(2 * GRANULE)
    kept = alloc.empty(2 * GRANULE, dtype=torch.uint8)
    with refuses(
        OutOfMemoryError,
        names="margin of 4.00 MiB",
        operation="malloc",
        tag="default",
        bytes=GRANULE,
        free_bytes=2 * GRANULE,
        driver_call="",
    ):
        alloc.empty(1)
    assert alloc.stats().physical_bytes == 2 * GRANULE
    alloc.set_memory_margin(GRANULE)
    more = alloc.empty(1)
    alloc.set_memory_margin(0)
    last = alloc.empty(1)
    assert len({kept.data_ptr(), more.data_ptr(), last.data_ptr()}) == 3


def test_it_is_per_allocator_and_wakes_are_not_concerned(make_allocator: MakeAllocator) -> None:
    alloc, other = make_allocator(mib=4), make_allocator(mib=4)
    tensor = alloc.empty(GRANULE, dtype=torch.uint8).fill_(3)
    alloc.sleep()
    alloc.set_memory_margin(4 * GRANULE)
    alloc.wake_up()
    assert int(tensor.sum()) == 3 * GRANULE
    assert other.tag_of(other.empty(2 * GRANULE, dtype=torch.uint8)) == "default"


@pytest.mark.parametrize("margin", [-1, 2**63])
def test_margins_that_do_not_exist_are_refused(alloc: CuMemAllocator, margin: int) -> None:
    with refuses(InvalidArgumentError, names=("margin", str(margin))):
        alloc.set_memory_margin(margin)


@pytest.mark.parametrize("margin", [None, 1.5, "1GiB", True])
def test_a_margin_is_a_number_of_bytes(alloc: CuMemAllocator, margin: Any) -> None:
    with refuses(InvalidTypeError, names=("margin", repr(margin))):
        alloc.set_memory_margin(margin)
