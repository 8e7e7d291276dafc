"""The allocator object: exact-size tensors, statistics, bad input, close, the shared instance."""

from __future__ import annotations

import gc
import json
import pickle
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GRANULE, MIB, MakeAllocator, assert_nothing_is_held
from refusals import refuses

from cumempool import (
    AllocationInfo,
    ClosedError,
    CuMemAllocator,
    CuMemConfig,
    CumempoolError,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    OutOfMemoryError,
    UnavailableError,
    UnknownTagError,
)

HOST = CuMemConfig(driver="host", host_driver_bytes=64 * MIB)

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
]

# ---- empty


def test_empty_takes_the_integers_of_numpy(alloc: CuMemAllocator) -> None:
    assert alloc.empty(np.int64(3), np.uint8(2)).shape == (3, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_gives_a_tensor_of_any_dtype(alloc: CuMemAllocator, dtype: torch.dtype) -> None:
    tensor = alloc.empty(5, 7, dtype=dtype, tag="t")
    assert tensor.dtype is dtype
    assert tensor.shape == (5, 7)
    assert tensor.stride() == (7, 1)
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % GRANULE == 0
    assert tensor.untyped_storage().nbytes() == 35 * dtype.itemsize
    (info,) = alloc.snapshot()
    assert info.requested_bytes == 35 * dtype.itemsize
    tensor.view(torch.uint8).fill_(1)
    assert int(tensor.view(torch.uint8).sum()) == 35 * dtype.itemsize


@pytest.mark.parametrize(
    "size",
    [
        (),
        ((),),
        (3,),
        (2, 3),
        ((2, 3),),
        ([2, 3],),
        (torch.Size([2, 3]),),
        (1, 1, 1),
        (range(2, 4),),
    ],
    ids=repr,
)
def test_empty_takes_shapes_as_torch_does(alloc: CuMemAllocator, size: Any) -> None:
    expected = torch.empty(tuple(size[0]) if size and not isinstance(size[0], int) else size)
    tensor = alloc.empty(*size)
    assert (tensor.shape, tensor.stride()) == (expected.shape, expected.stride())
    assert tensor.dtype is torch.get_default_dtype()
    assert len(alloc.snapshot()) == 1


@pytest.mark.parametrize("size", [(0,), (2, 0, 3), (0, 0)], ids=repr)
def test_zero_size_tensors_take_no_memory_and_make_the_tag_known(
    alloc: CuMemAllocator, size: tuple[int, ...]
) -> None:
    tensor = alloc.empty(*size, tag="nothing", dtype=torch.int8)
    expected = torch.empty(*size, dtype=torch.int8)
    assert (tensor.shape, tensor.stride()) == (expected.shape, expected.stride())
    assert alloc.snapshot() == []
    assert alloc.sleep(tags=["nothing"]).bytes_freed == 0
    assert alloc.wake_up(["nothing"]).bytes_mapped == 0


def test_the_last_reference_to_the_storage_gives_the_memory_back(alloc: CuMemAllocator) -> None:
    tensor = alloc.empty(GRANULE, dtype=torch.uint8)
    view = tensor[10:20].view(2, 5)
    del tensor
    assert alloc.get_current_usage() == GRANULE
    view.fill_(3)
    del view
    assert alloc.get_current_usage() == 0
    assert alloc.stats().free_calls == 1


@pytest.mark.parametrize("device", [None, 0, "cpu", "cpu:0", torch.device("cpu")], ids=repr)
def test_devices_that_name_the_simulated_one(alloc: CuMemAllocator, device: Any) -> None:
    assert alloc.empty(3, device=device).device == torch.device("cpu")


def test_an_integer_names_a_device_of_the_driver(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(mib=4, devices=3)
    kept = [allocator.empty(1, device=ordinal, tag="t") for ordinal in (2, 0, 2, 1)]
    assert [info.device for info in allocator.snapshot()] == [2, 0, 2, 1]
    assert all(tensor.device.type == "cpu" for tensor in kept)
    with pytest.raises(OutOfMemoryError) as caught:  # two granules per device
        allocator.empty(1, device=2, tag="t")
    assert (caught.value.device, caught.value.free_bytes, caught.value.total_bytes) == (
        2,
        0,
        4 * MIB,
    )
    kept.append(allocator.empty(1, device=1, tag="t"))
    report = allocator.sleep(tags="t")
    assert report.tags["t"].devices == (0, 1, 2)
    assert report.bytes_freed == 5 * GRANULE


def test_out_of_memory_says_what_where_and_what_to_do_and_leaves_nothing(
    make_allocator: MakeAllocator,
) -> None:
    allocator = make_allocator(mib=8)
    kept = allocator.empty(2 * GRANULE, dtype=torch.uint8, tag="kept")
    with pytest.raises(OutOfMemoryError) as caught:
        allocator.empty(3 * GRANULE, dtype=torch.uint8, tag="more")
    error = caught.value
    assert isinstance(error, RuntimeError)
    assert (error.operation, error.tag, error.device) == ("malloc", "more", 0)
    assert error.bytes == 3 * GRANULE
    assert (error.driver_call, error.result_name) == ("host.create", "CUDA_ERROR_OUT_OF_MEMORY")
    assert (error.free_bytes, error.total_bytes) == (2 * GRANULE, 4 * GRANULE)
    for part in ("malloc", "'more'", "device 0", "6.00 MiB", "4.00 MiB of 8.00 MiB", error.advice):
        assert part in str(error)
    stats = allocator.stats()
    assert stats.last_malloc_failure == str(error)
    assert stats.malloc_failures >= 1
    assert stats.physical_bytes == stats.reserved_address_bytes == 2 * GRANULE
    again = allocator.empty(2 * GRANULE, dtype=torch.uint8)
    assert kept.data_ptr() != again.data_ptr()


# ---- numbers


def test_stats_add_up(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(devices=2)
    kept = [
        allocator.empty(1, tag="a"),
        allocator.empty(GRANULE + 1, dtype=torch.uint8, tag="a", device=1),
        allocator.empty(3 * GRANULE, dtype=torch.uint8, tag="b", device=1),
        allocator.empty(5, tag="c"),
    ]
    allocator.sleep(tags=["a"])
    allocator.discard("b")
    stats = allocator.stats()
    assert list(stats.tags) == ["a", "b", "c"]
    a, b, c = stats.tags.values()
    assert (a.backed_up_allocations, a.backed_up_bytes, a.awake_bytes) == (2, 3 * GRANULE, 0)
    assert (a.backup_bytes, a.retained_bytes, a.backup_tier) == (3 * GRANULE, 0, "pinned")
    assert (b.discarded_allocations, b.discarded_bytes, b.backup_bytes) == (1, 3 * GRANULE, 0)
    assert (c.awake_allocations, c.awake_bytes, c.asleep_bytes) == (1, GRANULE, 0)
    assert all(tag.unreleased_bytes == 0 for tag in (a, b, c))
    assert all(tag.handle_types == ("posix_fd",) and not tag.rdma for tag in (a, b, c))
    assert stats.awake_bytes == GRANULE == allocator.get_current_usage()
    assert stats.asleep_bytes == 6 * GRANULE
    assert stats.reserved_address_bytes == 7 * GRANULE
    assert stats.physical_bytes == stats.mapped_bytes == stats.awake_bytes
    assert stats.host_used_bytes == a.backup_bytes <= stats.host_bytes
    assert (stats.malloc_calls, stats.malloc_failures, stats.free_calls) == (4, 0, 0)
    assert (stats.sleeps, stats.wakes, stats.swaps, stats.failed_transitions) == (2, 0, 0, 0)
    assert (stats.pageable_bytes, stats.file_bytes, stats.peer_bytes) == (0, 0, 0)
    assert (stats.pending_free_bytes, stats.last_malloc_failure) == (0, "")

    allocator.wake_up("a")
    stats = allocator.stats()
    assert (stats.awake_bytes, stats.asleep_bytes) == (4 * GRANULE, 3 * GRANULE)
    assert stats.physical_bytes == stats.mapped_bytes == 4 * GRANULE
    a = stats.tags["a"]
    assert (a.backup_bytes, a.retained_bytes) == (0, 3 * GRANULE)
    assert stats.host_used_bytes == 3 * GRANULE
    assert (stats.sleeps, stats.wakes) == (2, 1)
    del kept
    stats = allocator.stats()
    assert stats.host_used_bytes == 0
    assert (stats.physical_bytes, stats.reserved_address_bytes, stats.free_calls) == (0, 0, 4)
    assert list(stats.tags) == ["a", "b", "c"]


def test_r13_the_peak_is_the_most_that_was_held(alloc: CuMemAllocator) -> None:
    tensor = alloc.empty(3 << 20, dtype=torch.uint8, tag="a")
    held = alloc.stats().physical_bytes
    del tensor
    assert (alloc.stats().physical_bytes, alloc.stats().peak_physical_bytes) == (0, held)
    alloc.reset_peak_stats()
    assert alloc.stats().peak_physical_bytes == 0


def test_stats_are_immutable_and_become_json(alloc: CuMemAllocator) -> None:
    kept = alloc.empty(1, tag="t")
    stats = alloc.stats()
    plain = json.loads(json.dumps(stats.to_dict()))
    assert plain["tags"]["t"]["awake_bytes"] == GRANULE
    assert plain["physical_bytes"] == GRANULE
    with pytest.raises(FrozenInstanceError):
        stats.wakes = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        stats.tags["t"] = stats.tags["t"]  # type: ignore[index]
    assert kept.numel() == 1


def test_policies_and_tags_that_hold_nothing_are_in_the_stats(alloc: CuMemAllocator) -> None:
    alloc.use_memory_pool("kv", on_sleep="discard", on_wake="zero")
    alloc.use_memory_pool("kv")  # None leaves what was set before
    tag = alloc.stats().tags["kv"]
    assert (tag.on_sleep, tag.on_wake, tag.awake_allocations) == ("discard", "zero", 0)
    alloc.use_memory_pool("kv", on_sleep="offload", on_wake="undefined")
    tag = alloc.stats().tags["kv"]
    assert (tag.on_sleep, tag.on_wake) == ("offload", "undefined")


def test_snapshot_lists_live_allocations_in_order_with_every_field(alloc: CuMemAllocator) -> None:
    first = alloc.empty(3, dtype=torch.int16, tag="z")
    gone = alloc.empty(1, tag="y")
    second = alloc.empty(2 * GRANULE + 1, dtype=torch.uint8, tag="a")
    del gone
    alloc.sleep(tags="a")
    one, two = alloc.snapshot()
    assert asdict(one) == {
        "address": first.data_ptr(),
        "bytes": GRANULE,
        "requested_bytes": 6,
        "tag": "z",
        "device": 0,
        "state": "awake",
        "generation": one.generation,
        "backup_bytes": 0,
        "backup_tier": None,
        "backing": "vmm",
        "sequence": one.sequence,
        "preserved": False,
    }
    assert asdict(two) == {
        "address": second.data_ptr(),
        "bytes": 3 * GRANULE,
        "requested_bytes": 2 * GRANULE + 1,
        "tag": "a",
        "device": 0,
        "state": "backed_up",
        "generation": two.generation,
        "backup_bytes": 3 * GRANULE,
        "backup_tier": "pinned",
        "backing": "vmm",
        "sequence": one.sequence + 2,
        "preserved": False,
    }
    alloc.wake_up()
    _, woken = alloc.snapshot()
    assert (woken.generation, woken.state) == (two.generation + 1, "awake")
    assert (woken.backup_bytes, woken.backup_tier) == (3 * GRANULE, "pinned")  # retained
    alloc.discard("a")
    discarded = alloc.snapshot()[1]
    assert (discarded.state, discarded.backup_bytes) == ("discarded", 0)
    assert discarded.backup_tier is None
    assert pickle.loads(pickle.dumps(one)) == one


# ---- tag_of


def test_tag_of_a_tensor_its_views_and_while_it_sleeps(alloc: CuMemAllocator) -> None:
    tensor = alloc.empty(64, 64, tag="weights")
    views = [tensor[3:], tensor.t(), tensor.view(torch.uint8), tensor[1, 2], tensor.detach()]
    assert {alloc.tag_of(view) for view in [tensor, *views]} == {"weights"}
    assert alloc.tag_of(torch.nn.Parameter(tensor)) == "weights"
    alloc.sleep(tags="weights")
    assert alloc.tag_of(views[0]) == "weights"
    info = alloc.allocation_of(views[1])
    assert isinstance(info, AllocationInfo)
    assert (info.address, info.state) == (tensor.data_ptr(), "backed_up")


def foreign_tensors() -> dict[str, torch.Tensor]:
    return {
        "ordinary": torch.ones(3),
        "zero-size": torch.empty(0),
        "meta": torch.empty(3, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
        "copy": torch.ones(3).clone(),
    }


@pytest.mark.parametrize("kind", foreign_tensors())
def test_tag_of_memory_from_elsewhere(alloc: CuMemAllocator, kind: str) -> None:
    with pytest.raises(NotInPoolError):
        alloc.tag_of(foreign_tensors()[kind])


def test_tag_of_a_zero_size_tensor_and_of_anothers_tensor(make_allocator: MakeAllocator) -> None:
    mine, other = make_allocator(), make_allocator()
    with pytest.raises(NotInPoolError):
        mine.tag_of(mine.empty(0))
    theirs = other.empty(1)
    with refuses(NotInPoolError, names="another allocator", operation="find"):
        mine.tag_of(theirs)
    assert other.tag_of(theirs) == "default"


@pytest.mark.parametrize("thing", [None, 3, "weights", [1], b"x"], ids=repr)
def test_tag_of_what_is_no_tensor(alloc: CuMemAllocator, thing: Any) -> None:
    with refuses(InvalidTypeError, names="Tensor"):
        alloc.tag_of(thing)


# ---- bad input

BAD_TAG_TYPES: list[Any] = [1, True, b"weights", ["weights"], 1.5]
BAD_TAG_VALUES = ["", "a\0b", "\ud800", "a" * 256, "é" * 128]
GOOD_TAGS = ["a" * 255, "é" * 127, "Gewichte/层 0", "a b", "\N{GRINNING FACE}", "%s{}"]


def raised(kind: type[CumempoolError], call: Any) -> CumempoolError:
    """What a call raised, without the frames, which would keep tensors alive."""
    try:
        call()
    except kind as error:
        return error.with_traceback(None)
    return pytest.fail(f"did not raise {kind.__name__}")


def assert_refused_and_unharmed(
    alloc: CuMemAllocator, kind: type[CumempoolError], call: Any
) -> Any:
    kept = alloc.empty(4, dtype=torch.int64, tag="kept").fill_(42)
    gc.disable()  # it would free tensors that the traceback of an earlier call holds
    try:
        before = alloc.stats()
        error = raised(kind, call)
        after = alloc.stats()
    finally:
        gc.enable()
    assert str(error)
    assert {tag: after.tags[tag] for tag in before.tags} == dict(before.tags)
    for name in ("physical_bytes", "reserved_address_bytes", "mapped_bytes", "sleeps", "wakes"):
        assert getattr(after, name) == getattr(before, name)
    assert kept.tolist() == [42] * 4
    alloc.empty(1)
    return error


@pytest.mark.parametrize("tag", [*BAD_TAG_TYPES, None], ids=repr)
def test_a_tag_of_the_wrong_type(alloc: CuMemAllocator, tag: Any) -> None:
    calls: list[Any] = [
        lambda: alloc.use_memory_pool(tag),
        lambda: alloc.adopt(torch.nn.Linear(1, 1), tag),
    ]
    if tag is not None:
        calls.append(lambda: alloc.empty(1, tag=tag))
    for call in calls:
        assert_refused_and_unharmed(alloc, InvalidTypeError, call)


@pytest.mark.parametrize("tag", BAD_TAG_VALUES, ids=ascii)
def test_a_tag_that_cannot_be(alloc: CuMemAllocator, tag: str) -> None:
    for call in (
        lambda: alloc.use_memory_pool(tag),
        lambda: alloc.empty(1, tag=tag),
        lambda: alloc.empty(0, tag=tag),
        lambda: alloc.adopt(torch.nn.Linear(1, 1), tag),
    ):
        assert_refused_and_unharmed(alloc, InvalidArgumentError, call)


@pytest.mark.parametrize("tag", GOOD_TAGS, ids=ascii)
def test_tags_of_any_text_up_to_255_bytes(alloc: CuMemAllocator, tag: str) -> None:
    tensor = alloc.empty(4, tag=tag).fill_(1.5)
    assert alloc.tag_of(tensor) == tag
    assert list(alloc.sleep(offload_tags=tag).tags) == [tag]
    alloc.wake_up([tag])
    assert tensor.tolist() == [1.5] * 4


@pytest.mark.parametrize(
    "argument",
    ["sleep", "sleep tags", "discard", "wake_up", "wake_up later", "swap sleep", "swap wake"],
)
@pytest.mark.parametrize(
    ("tags", "kind"),
    [
        (3, InvalidTypeError),
        (True, InvalidTypeError),
        (1.5, InvalidTypeError),
        (b"kept", InvalidTypeError),
        ([b"kept"], InvalidTypeError),
        (["kept", None], InvalidTypeError),
        ([["kept"]], InvalidTypeError),
        ("unknown", UnknownTagError),
        (["kept", "unknown"], UnknownTagError),
        ("", UnknownTagError),
        ("a" * 256, UnknownTagError),
        ("a\0b", InvalidArgumentError),
        ("kept\0", InvalidArgumentError),
        ("\ud800", InvalidArgumentError),
        (["kept", "\udfff"], InvalidArgumentError),
    ],
    ids=ascii,
)
def test_bad_tags_of_a_transition(
    alloc: CuMemAllocator, argument: str, tags: Any, kind: type[CumempoolError]
) -> None:
    calls = {
        "sleep": lambda: alloc.sleep(offload_tags=tags),
        "sleep tags": lambda: alloc.sleep(tags=tags),
        "discard": lambda: alloc.discard(tags),
        "wake_up": lambda: alloc.wake_up(tags),
        "wake_up later": lambda: alloc.wake_up(tags, blocking=False),
        "swap sleep": lambda: alloc.swap(sleep=tags),
        "swap wake": lambda: alloc.swap(sleep=[], wake=tags),
    }
    error = assert_refused_and_unharmed(alloc, kind, calls[argument])
    if kind is UnknownTagError:
        assert isinstance(error, KeyError)
        assert error.operation == argument.partition("_")[0].partition(" ")[0].replace(
            "discard", "sleep"
        )
        assert error.tag == (tags if isinstance(tags, str) else "unknown") or error.tag is None
        assert "'kept'" in str(error)  # the known ones


def test_discard_wants_to_be_told_what(alloc: CuMemAllocator) -> None:
    assert_refused_and_unharmed(alloc, InvalidTypeError, lambda: alloc.discard(None))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["on_sleep", "on_wake"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, InvalidTypeError),
        (True, InvalidTypeError),
        (b"offload", InvalidTypeError),
        ([], InvalidTypeError),
        ("", InvalidArgumentError),
        ("keep", InvalidArgumentError),
        ("OFFLOAD", InvalidArgumentError),
    ],
    ids=repr,
)
def test_bad_policies(alloc: CuMemAllocator, name: str, value: Any, kind: Any) -> None:
    error = assert_refused_and_unharmed(
        alloc, kind, lambda: alloc.use_memory_pool("p", **{name: value})
    )
    assert name in str(error)
    assert "p" not in alloc.stats().tags


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        (True, InvalidTypeError),
        (-1, InvalidArgumentError),
        (1, InvalidArgumentError),
        (2**31, InvalidArgumentError),
        (2**63, InvalidArgumentError),
        ("cpu:1", InvalidArgumentError),
        ("cuda", InvalidArgumentError),
        ("meta", InvalidArgumentError),
        ("gpu", InvalidArgumentError),
        ("", InvalidArgumentError),
        ("\ud800", InvalidArgumentError),
        (1.5, InvalidArgumentError),
        ([0], InvalidArgumentError),
        (torch.device("meta"), InvalidArgumentError),
    ],
    ids=ascii,
)
def test_bad_devices(alloc: CuMemAllocator, device: Any, kind: type[CumempoolError]) -> None:
    assert_refused_and_unharmed(alloc, kind, lambda: alloc.empty(1, device=device))
    assert_refused_and_unharmed(alloc, kind, lambda: alloc.empty(0, device=device))


@pytest.mark.parametrize(
    ("devices", "kind"),
    [
        (0, InvalidTypeError),
        (True, InvalidTypeError),
        ("0", InvalidTypeError),
        ([None], InvalidTypeError),
        ([True], InvalidTypeError),
        (["cpu"], InvalidTypeError),
        ([1.0], InvalidTypeError),
        ([], InvalidArgumentError),
        ([-1], InvalidArgumentError),
        ([0, 1], InvalidArgumentError),
        ([2**63], InvalidArgumentError),
    ],
    ids=repr,
)
def test_bad_devices_of_a_scope(alloc: CuMemAllocator, devices: Any, kind: Any) -> None:
    call = lambda: alloc.use_memory_pool("p", devices=devices)  # noqa: E731
    assert_refused_and_unharmed(alloc, kind, call)


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        ((-1,), InvalidArgumentError),
        (([2, -3],), InvalidArgumentError),
        ((0, -1), InvalidArgumentError),
        ((2**63,), InvalidArgumentError),
        ((2**61, 4), InvalidArgumentError),
        ((2**80,), InvalidArgumentError),
        ((2**63, 0), InvalidArgumentError),
        ((0, 2**62, 4), InvalidArgumentError),
        ((2**40,), OutOfMemoryError),
        ((True,), InvalidTypeError),
        ((1.0,), InvalidTypeError),
        ((None,), InvalidTypeError),
        (("3",), InvalidTypeError),
        (([2], 3), InvalidTypeError),
        ((torch.tensor([3]),), InvalidTypeError),
        (({3},), InvalidTypeError),
    ],
    ids=repr,
)
def test_bad_shapes(alloc: CuMemAllocator, size: Any, kind: type[CumempoolError]) -> None:
    assert_refused_and_unharmed(alloc, kind, lambda: alloc.empty(*size))


@pytest.mark.parametrize("dtype", ["float32", float, 1, b"float32"], ids=repr)
def test_bad_dtypes(alloc: CuMemAllocator, dtype: Any) -> None:
    assert_refused_and_unharmed(alloc, InvalidTypeError, lambda: alloc.empty(1, dtype=dtype))


@pytest.mark.parametrize("config", [1, "host", {"driver": "host"}], ids=repr)
def test_a_configuration_of_the_wrong_type(config: Any) -> None:
    with refuses(InvalidTypeError, names="CuMemConfig"):
        CuMemAllocator(config)
    with refuses(InvalidTypeError, names="CuMemConfig"):
        CuMemAllocator.get_instance(config)


def test_a_host_device_smaller_than_a_granule_is_refused() -> None:
    with refuses(InvalidArgumentError, names="host_driver_bytes=2097151"):
        CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=GRANULE - 1))


def test_a_budget_that_is_no_multiple_of_a_granule_is_cut_to_whole_granules() -> None:
    allocator = CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=2 * GRANULE - 1))
    kept = allocator.empty(1)
    with pytest.raises(OutOfMemoryError):
        allocator.empty(1)
    del kept
    allocator.close()


# ---- close


def test_close_twice_is_no_error_and_gives_everything_back() -> None:
    allocator = CuMemAllocator(HOST)
    tensor = allocator.empty(3)
    allocator.sleep(tags="default")
    allocator.wake_up()
    assert allocator.stats().host_bytes > 0  # kept for the next sleep
    del tensor
    allocator.close()
    allocator.close()
    allocator.close(force=True)
    assert_nothing_is_held(allocator.stats())


def test_close_with_live_memory_is_refused_and_changes_nothing(alloc: CuMemAllocator) -> None:
    awake = alloc.empty(8, tag="awake").fill_(1)
    asleep = alloc.empty(8, tag="asleep").fill_(2)
    alloc.sleep(tags="asleep")
    before = alloc.stats()
    with pytest.raises(InUseError) as caught:
        alloc.close()
    assert "'awake'" in str(caught.value)
    assert "'asleep'" in str(caught.value)
    assert alloc.stats() == before
    alloc.wake_up()
    assert (awake.tolist(), asleep.tolist()) == ([1.0] * 8, [2.0] * 8)


def test_close_by_force_gives_memory_back_at_once_and_addresses_when_they_are_freed() -> None:
    allocator = CuMemAllocator(HOST)
    tensors = [allocator.empty(8, tag=tag) for tag in ("awake", "asleep", "discarded")]
    allocator.sleep(tags="asleep")
    allocator.discard("discarded")
    allocator.close(force=True)
    stats = allocator.stats()
    assert (stats.physical_bytes, stats.mapped_bytes, stats.host_bytes) == (0, 0, 0)
    assert stats.reserved_address_bytes == 3 * GRANULE
    del tensors
    assert_nothing_is_held(allocator.stats())


@pytest.mark.parametrize("force", [1, 0, None, "yes"], ids=repr)
def test_force_is_a_bool(alloc: CuMemAllocator, force: Any) -> None:
    assert_refused_and_unharmed(alloc, InvalidTypeError, lambda: alloc.close(force=force))


def test_after_close_every_call_that_needs_memory_says_so() -> None:
    allocator = CuMemAllocator(HOST)
    allocator.empty(1, tag="t")
    unentered = allocator.use_memory_pool("t")
    allocator.close()
    calls: list[Any] = [
        lambda: allocator.empty(3),
        lambda: allocator.empty(0),
        lambda: allocator.adopt(torch.nn.Linear(2, 2)),
        lambda: allocator.use_memory_pool("t"),
        unentered.__enter__,
        allocator.sleep,
        lambda: allocator.sleep(tags="unknown"),
        lambda: allocator.discard("t"),
        allocator.wake_up,
        lambda: allocator.wake_up("unknown"),
        lambda: allocator.wake_up(blocking=False),
        lambda: allocator.swap(sleep="t"),
        lambda: allocator.set_backup("t", "pageable"),
        allocator.prepare,
        allocator.release_host_memory,
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    assert_nothing_is_held(allocator.stats())
    assert allocator.snapshot() == []
    assert allocator.get_current_usage() == 0
    assert "host" in repr(allocator)
    with pytest.raises(NotInPoolError):
        allocator.tag_of(torch.ones(1))


def test_tensors_outlive_the_allocator_object() -> None:
    allocator = CuMemAllocator(HOST)
    awake, asleep = allocator.empty(1000).fill_(3), allocator.empty(3, tag="asleep")
    allocator.sleep(tags="asleep")
    del allocator
    gc.collect()
    assert float(awake.sum()) == 3000
    del awake, asleep
    gc.collect()


def test_two_allocators_do_not_see_each_other(make_allocator: MakeAllocator) -> None:
    one, two = make_allocator(), make_allocator()
    mine, yours = one.empty(4, tag="t").fill_(1), two.empty(4, tag="t").fill_(2)
    assert one.sleep(offload_tags="t").bytes_freed == GRANULE
    assert two.get_current_usage() == GRANULE
    assert yours.tolist() == [2.0] * 4
    assert one.wake_up().bytes_restored == GRANULE
    assert mine.tolist() == [1.0] * 4


def test_repr_says_driver_tags_and_bytes(alloc: CuMemAllocator) -> None:
    kept = [alloc.empty(1, tag="a"), alloc.empty(1, tag="b")]
    alloc.sleep(tags="a")
    assert f"host: 2 tags, {GRANULE} bytes awake, {GRANULE} asleep" in repr(alloc)
    assert len(kept) == 2


# ---- the shared instance


def test_get_instance_gives_one_allocator_until_it_is_closed() -> None:
    first = CuMemAllocator.get_instance(HOST)
    assert CuMemAllocator.get_instance() is first
    assert CuMemAllocator.get_instance(CuMemConfig(**asdict(HOST))) is first
    assert CuMemAllocator(HOST) is not first
    first.close()
    second = CuMemAllocator.get_instance(HOST)
    assert second is not first
    first.close()  # closing it again does not forget the new one
    assert CuMemAllocator.get_instance() is second
    second.close()


def test_get_instance_with_another_configuration_is_refused() -> None:
    allocator = CuMemAllocator.get_instance(HOST)
    other = CuMemConfig(driver="host", host_driver_bytes=32 * MIB)
    with refuses(InvalidArgumentError, names="close()"):
        CuMemAllocator.get_instance(other)
    assert CuMemAllocator.get_instance() is allocator
    allocator.close()
    replaced = CuMemAllocator.get_instance(other)
    assert replaced.config == other
    replaced.close()


def test_a_close_that_is_refused_keeps_the_shared_instance() -> None:
    allocator = CuMemAllocator.get_instance(HOST)
    tensor = allocator.empty(1)
    with pytest.raises(InUseError):
        allocator.close()
    assert CuMemAllocator.get_instance() is allocator
    del tensor
    allocator.close()


def test_an_allocator_of_ones_own_does_not_touch_the_shared_one() -> None:
    shared = CuMemAllocator.get_instance(HOST)
    CuMemAllocator(HOST).close()
    assert CuMemAllocator.get_instance() is shared
    shared.close()


def test_the_pool_scope_of_a_configuration_is_that_of_the_shared_allocator() -> None:
    config = CuMemConfig(driver="host", host_driver_bytes=64 * MIB, enable_sleep_mode=True)
    with config.maybe_use_memory_pool("weights", on_sleep="offload"):
        shared = CuMemAllocator.get_instance()
        tensor = shared.empty(1)
    assert shared.config == config
    assert shared.tag_of(tensor) == "weights"
    del tensor
    shared.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what happens without a GPU")
def test_cuda_without_a_gpu_is_an_error_and_never_the_host_driver() -> None:
    for make in (CuMemAllocator, CuMemAllocator.get_instance):
        with pytest.raises(UnavailableError) as caught:
            make(CuMemConfig(driver="cuda"))
        assert caught.value.advice
    with pytest.raises(UnavailableError):
        CuMemAllocator()
