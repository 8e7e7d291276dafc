"""The exported malloc and free pairs, called as torch calls them: by name, by any thread (R1)."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import pytest
from conftest import GRANULE, MakeAllocator, assert_nothing_is_held

from cumempool import CuMemAllocator, CuMemConfig, InvalidArgumentError, UnknownTagError, _core
from cumempool._torch import LIBRARY


class Slot:
    """One pair, with the signatures of `CUDAPluggableAllocator`."""

    def __init__(self, number: int) -> None:
        library = ctypes.CDLL(str(LIBRARY))
        self._malloc = library[f"cumempool_malloc_{number}"]
        self._malloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
        self._malloc.restype = ctypes.c_void_p
        self._free = library[f"cumempool_free_{number}"]
        self._free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
        self._free.restype = None

    def malloc(self, size: int, device: int = 0) -> int:
        """The address, or 0."""
        return self._malloc(size, device, None) or 0

    def free(self, address: int, size: int = 1) -> None:
        self._free(address, size, 0, None)


@pytest.fixture
def bound(alloc: CuMemAllocator) -> Iterator[tuple[CuMemAllocator, Slot, int]]:
    """An allocator and a slot that serves its tag ``t``."""
    alloc.use_memory_pool("t")
    number = alloc._core.bind_slot("t")
    yield alloc, Slot(number), number
    try:
        _core.unbind_slot(number)
    except InvalidArgumentError:
        return  # the test has


def test_every_pair_is_exported() -> None:
    for number in range(_core.slot_count()):
        Slot(number)
    with pytest.raises(AttributeError):
        Slot(_core.slot_count())


def test_malloc_gives_memory_of_the_tag_and_free_takes_it_back(
    bound: tuple[CuMemAllocator, Slot, int],
) -> None:
    alloc, slot, _ = bound
    address = slot.malloc(GRANULE + 1)
    (info,) = alloc.snapshot()
    assert (info.address, info.tag, info.bytes) == (address, "t", 2 * GRANULE)
    assert info.requested_bytes == GRANULE + 1
    ctypes.memset(address, 7, GRANULE + 1)
    slot.free(address)
    assert alloc.stats().reserved_address_bytes == 0


def test_what_cannot_be_had_is_null_with_the_reason_in_the_stats(
    bound: tuple[CuMemAllocator, Slot, int],
) -> None:
    alloc, slot, _ = bound
    assert slot.malloc(2**40) == 0
    stats = alloc.stats()
    assert (stats.malloc_calls, stats.malloc_failures) == (1, 1)
    assert "CUDA_ERROR_OUT_OF_MEMORY" in stats.last_malloc_failure
    assert slot.malloc(1, device=5) == 0
    assert "device 5" in alloc.stats().last_malloc_failure
    assert (slot.malloc(0), slot.malloc(-1)) == (0, 0)
    address = slot.malloc(1)
    assert address
    slot.free(address)


def test_frees_of_strange_addresses_do_nothing(bound: tuple[CuMemAllocator, Slot, int]) -> None:
    alloc, slot, _ = bound
    address = slot.malloc(GRANULE)
    for strange in (0, 1, address + 1, address - 1, 2**48):
        slot.free(strange)
    assert alloc.get_current_usage() == GRANULE
    slot.free(address)
    slot.free(address)  # a second time
    assert alloc.stats().free_calls == 1


def test_frees_come_from_any_slot_and_any_thread(alloc: CuMemAllocator) -> None:
    alloc.use_memory_pool("a")
    alloc.use_memory_pool("b")
    one, two = alloc._core.bind_slot("a"), alloc._core.bind_slot("b")
    addresses = [Slot(one).malloc(1) for _ in range(8)]
    threads = [threading.Thread(target=Slot(two).free, args=(a,)) for a in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alloc.stats().free_calls == 8
    assert alloc.snapshot() == []
    _core.unbind_slot(one)
    _core.unbind_slot(two)


def test_memory_is_freed_while_asleep(bound: tuple[CuMemAllocator, Slot, int]) -> None:
    """R6."""
    alloc, slot, number = bound
    kept, freed = slot.malloc(GRANULE), slot.malloc(GRANULE)
    ctypes.memset(kept, 0x5A, GRANULE)
    _core.unbind_slot(number)
    alloc.sleep(tags="t")
    slot.free(freed)
    assert alloc.stats().host_used_bytes == GRANULE
    assert alloc.wake_up().bytes_restored == GRANULE
    assert ctypes.string_at(kept, GRANULE) == b"\x5a" * GRANULE
    slot.free(kept)


def test_an_unbound_slot_gives_nothing_but_takes_back(
    bound: tuple[CuMemAllocator, Slot, int],
) -> None:
    alloc, slot, number = bound
    address = slot.malloc(1)
    _core.unbind_slot(number)
    assert slot.malloc(1) == 0
    assert alloc.stats().malloc_calls == 1
    slot.free(address)
    assert alloc.snapshot() == []
    with pytest.raises(InvalidArgumentError):
        _core.unbind_slot(number)
    with pytest.raises(InvalidArgumentError):
        _core.unbind_slot(_core.slot_count())


def test_a_slot_that_is_bound_again_serves_its_new_owner(make_allocator: MakeAllocator) -> None:
    one, two = make_allocator(), make_allocator()
    one.use_memory_pool("a")
    two.use_memory_pool("b")
    number = one._core.bind_slot("a")
    slot = Slot(number)
    old = slot.malloc(1)
    _core.unbind_slot(number)
    assert two._core.bind_slot("b") == number
    new = slot.malloc(1)
    assert [info.tag for info in one.snapshot()] == ["a"]
    assert [info.tag for info in two.snapshot()] == ["b"]
    slot.free(old)  # goes back to the one that gave it
    assert (one.snapshot(), len(two.snapshot())) == ([], 1)
    slot.free(new)
    _core.unbind_slot(number)


def test_a_tag_that_was_never_declared_gets_no_slot(alloc: CuMemAllocator) -> None:
    with pytest.raises(UnknownTagError):
        alloc._core.bind_slot("never")


def test_memory_is_freed_after_the_allocator_was_closed_by_force() -> None:
    allocator = CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=8 * GRANULE))
    with allocator.use_memory_pool("t") as scope:
        (number,) = scope._slots
        slot = Slot(number)
        address = slot.malloc(1)
        allocator.close(force=True)
        assert slot.malloc(1) == 0
        assert allocator.stats().physical_bytes == 0
        assert allocator.stats().reserved_address_bytes == GRANULE
    slot.free(address)
    assert_nothing_is_held(allocator.stats())


def test_the_pool_scope_binds_a_slot_and_gives_it_back(alloc: CuMemAllocator) -> None:
    with alloc.use_memory_pool("w") as scope:
        (number,) = scope._slots
        address = Slot(number).malloc(1)
        assert alloc.snapshot()[0].tag == "w"
    assert Slot(number).malloc(1) == 0
    Slot(number).free(address)
    with alloc.use_memory_pool("x") as scope:
        assert scope._slots == [number]
