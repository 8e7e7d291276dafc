"""What makes an allocator pleasant to use: blocks, tensors that are filled, texts for people."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import MakeAllocator

from cumempool import (
    Availability,
    ClosedError,
    CuMemAllocator,
    CuMemConfig,
    DeviceProbe,
    InUseError,
    InvalidTypeError,
    OutOfMemoryError,
    TorchProbe,
    UnknownTagError,
    UnsupportedError,
    probe,
)

HOST = CuMemConfig(driver="host", host_driver_bytes=256 << 20)


# ---- with CuMemAllocator() as allocator


def test_the_end_of_a_block_closes_the_allocator() -> None:
    with CuMemAllocator(HOST) as allocator:
        tensor = allocator.empty(4)
        del tensor
    with pytest.raises(ClosedError):
        allocator.empty(4)


def test_tensors_that_live_at_the_end_of_a_block_keep_the_allocator_open() -> None:
    with pytest.raises(InUseError), CuMemAllocator(HOST) as allocator:
        tensor = allocator.full(4, 3.0)
    assert tensor.tolist() == [3.0] * 4
    allocator.sleep()
    allocator.wake_up()
    assert tensor.tolist() == [3.0] * 4
    del tensor
    allocator.close()


def test_the_error_of_a_block_is_not_hidden_by_tensors_that_live() -> None:
    tensors = []

    def body(allocator: CuMemAllocator) -> None:
        tensors.append(allocator.empty(4))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), CuMemAllocator(HOST) as allocator:
        body(allocator)
    tensor = tensors.pop()
    assert allocator.tag_of(tensor) == "default"
    del tensor
    allocator.close()


def test_a_block_that_fails_without_tensors_is_closed() -> None:
    with pytest.raises(KeyError), CuMemAllocator(HOST) as allocator:
        raise KeyError("mine")
    with pytest.raises(ClosedError):
        allocator.empty(4)


# ---- tags, is_asleep, awake


def test_tags_are_listed_by_name_for_good(alloc: CuMemAllocator) -> None:
    assert alloc.tags == ()
    first, second = alloc.empty(4, tag="weights"), alloc.empty(4, tag="kv")
    assert alloc.tags == ("kv", "weights")
    del first, second
    assert alloc.tags == ("kv", "weights")


def test_a_tag_is_asleep_while_anything_of_it_sleeps(alloc: CuMemAllocator) -> None:
    with pytest.raises(UnknownTagError):
        alloc.is_asleep("weights")
    old = alloc.zeros(4, tag="weights")
    assert not alloc.is_asleep("weights")
    alloc.sleep("weights")
    assert alloc.is_asleep("weights")
    new = alloc.zeros(4, tag="weights")
    assert alloc.is_asleep("weights")
    alloc.wake_up("weights")
    assert not alloc.is_asleep("weights")
    assert old.tolist() == new.tolist() == [0.0] * 4


def test_an_awake_block_puts_back_to_sleep_what_it_has_woken(alloc: CuMemAllocator) -> None:
    weights, cache = alloc.full(4, 1.0, tag="weights"), alloc.full(4, 2.0, tag="kv")
    alloc.sleep("weights")
    with alloc.awake():
        weights += 1
        with alloc.awake(["weights", "kv"]):  # which are awake: nothing to do
            assert alloc.stats().wakes == 1
        assert not alloc.is_asleep("weights")
    assert alloc.is_asleep("weights")
    assert not alloc.is_asleep("kv")
    assert cache.tolist() == [2.0] * 4
    with pytest.raises(ValueError, match="is not in list"), alloc.awake("weights"):
        weights.tolist().index(1.0)
    assert alloc.is_asleep("weights")
    alloc.wake_up()


def test_an_awake_block_of_an_unknown_tag_is_an_error(alloc: CuMemAllocator) -> None:
    with pytest.raises(UnknownTagError), alloc.awake("weihgts"):
        pytest.fail("it was entered")
    assert alloc.stats().wakes == 0


def test_an_awake_block_of_an_allocator_that_is_switched_off_is_an_error() -> None:
    config = dataclasses.replace(HOST, enable_cumem_allocator=False)
    with (
        CuMemAllocator(config) as allocator,
        pytest.raises(UnsupportedError),
        allocator.awake(),
    ):
        pytest.fail("it was entered")


# ---- zeros, full, empty_like, from_tensor


def test_zeros_and_full_fill_what_they_allocate(alloc: CuMemAllocator) -> None:
    zeros = alloc.zeros(2, 3, dtype=torch.int16, tag="kv")
    assert zeros.tolist() == [[0] * 3] * 2
    assert zeros.dtype == torch.int16
    assert alloc.tag_of(zeros) == "kv"
    with alloc.use_memory_pool("scope"):
        full = alloc.full((2,), 7, dtype=torch.float64)
    assert full.tolist() == [7.0, 7.0]
    assert full.dtype == torch.float64
    assert alloc.tag_of(full) == "scope"


@pytest.mark.parametrize("value", [True, 3, 2.5, 1 + 2j])
def test_full_takes_the_dtype_that_torch_takes(alloc: CuMemAllocator, value: complex) -> None:
    assert torch.equal(alloc.full([3], value), torch.full([3], value))


def test_empty_like_takes_shape_and_dtype(alloc: CuMemAllocator) -> None:
    like = alloc.empty_like(torch.zeros(3, 2, dtype=torch.int32).t(), tag="kv")
    assert (like.shape, like.dtype, like.is_contiguous()) == ((2, 3), torch.int32, True)
    assert alloc.tag_of(like) == "kv"
    assert alloc.empty_like(like, dtype=torch.float16).dtype == torch.float16
    assert not alloc.empty_like(torch.nn.Parameter(torch.zeros(2))).requires_grad


def test_from_tensor_copies_contents_and_neither_strides_nor_gradient(
    alloc: CuMemAllocator,
) -> None:
    source = torch.arange(6.0, requires_grad=True).view(3, 2).t()
    copy = alloc.from_tensor(source, tag="kv")
    assert torch.equal(copy, source)
    assert copy.is_contiguous()
    assert not copy.requires_grad
    assert copy.is_leaf
    copy += 1
    assert source.tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    assert alloc.tag_of(copy) == "kv"


def test_from_tensor_refuses_what_has_no_strides(alloc: CuMemAllocator) -> None:
    for wrong in ([1, 2], torch.zeros(2, 2).to_sparse()):
        with pytest.raises(InvalidTypeError):
            alloc.from_tensor(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError):
        alloc.empty_like(3)  # type: ignore[arg-type]
    assert alloc.snapshot() == []


# ---- texts


def test_statistics_can_be_read(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator(mib=64)
    weights, cache = alloc.zeros(1 << 20, tag="weights"), alloc.zeros(1 << 20, tag="kv")
    alloc.sleep("weights")
    assert str(alloc.stats()).splitlines() == [
        "4.00 MiB awake, 4.00 MiB asleep; backups: 4.00 MiB pinned",
        "  kv: 4.00 MiB awake",
        "  weights: 4.00 MiB backed up",
    ]
    pin = alloc.pin("kv")
    assert str(alloc.stats().tags["kv"]) == "kv: 4.00 MiB awake, 1 pins"
    pin.release()
    alloc.wake_up()
    alloc.set_backup("kv", "pageable")
    alloc.sleep("kv")
    alloc.discard("weights")
    text = str(alloc.stats())
    assert "4.00 MiB pageable" in text
    assert "weights: 4.00 MiB discarded" in text
    with pytest.raises(OutOfMemoryError):
        alloc.empty(1 << 30)
    assert "last failed allocation: " in str(alloc.stats())
    alloc.wake_up()
    del weights, cache
    assert "  kv: nothing" in str(alloc.stats())


def test_availability_can_be_read() -> None:
    text = str(probe(HOST))
    assert text.startswith("cumempool can be used: driver host")
    assert f"torch {torch.__version__}" in text
    assert "\n  device 0: " in text
    assert text.endswith("free")
    broken = DeviceProbe(1, "", "", False, "no", False, (), (), False, False, 0, 0, 0)
    none = Availability(
        False, "no device", "buy one", "cuda", devices=(broken,), torch=TorchProbe("", "", None, "")
    )
    assert str(none) == (
        "cumempool cannot be used with driver cuda: no device; buy one\n"
        "  device 1 cannot be used: no"
    )
