"""sleep, wake_up and discard: what is kept, what is not, what is reported, what failures leave."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from conftest import (
    EVERY_DTYPE,
    GRANULE,
    MIB,
    MakeAllocator,
    bits,
    filled,
    random_bytes,
    states,
    totals,
)
from refusals import refuses

from cumempool import (
    CuMemAllocator,
    InvalidArgumentError,
    OutOfHostMemoryError,
    OutOfMemoryError,
    TagReport,
    UnknownTagError,
)

# ---- contents, addresses, views


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_every_dtype_comes_back_bit_equal_at_its_address(
    alloc: CuMemAllocator, dtype: torch.dtype
) -> None:
    tensor = alloc.empty(33, 65, dtype=dtype, tag="t")
    contents = random_bytes(33 * 65 * dtype.itemsize)
    bits(tensor).copy_(contents)
    address, strides = tensor.data_ptr(), tensor.stride()
    alloc.sleep(tags="t")
    alloc.wake_up()
    assert (tensor.data_ptr(), tensor.stride(), tensor.dtype) == (address, strides, dtype)
    assert torch.equal(bits(tensor), contents)


def test_nan_payloads_and_negative_zeros_survive(alloc: CuMemAllocator) -> None:
    pattern = [0x7FC00001, 0x7F800001, -0x80000000, -0x400000 + 7, 1]
    tensor = alloc.empty(len(pattern), dtype=torch.int32, tag="t")
    tensor.copy_(torch.tensor(pattern, dtype=torch.int32))
    alloc.sleep(tags="t")
    alloc.wake_up()
    assert tensor.view(torch.float32).view(torch.int32).tolist() == pattern


def test_views_strides_and_scalars_survive(alloc: CuMemAllocator) -> None:
    tensor = alloc.empty(12, 10, tag="t")
    tensor.copy_(torch.arange(120.0).view(12, 10))
    scalar = alloc.empty((), tag="t").fill_(2.5)
    nothing = alloc.empty(0, 4, tag="t")
    views = [tensor.t(), tensor[::2, 1::3], tensor[3], tensor.view(3, 40), tensor.unfold(0, 4, 2)]
    expected = [view.clone() for view in views]
    layout = [(view.data_ptr(), view.stride(), view.storage_offset()) for view in views]
    alloc.sleep(tags="t")
    alloc.wake_up()
    assert all(torch.equal(view, want) for view, want in zip(views, expected, strict=True))
    assert layout == [(view.data_ptr(), view.stride(), view.storage_offset()) for view in views]
    assert scalar.item() == 2.5
    assert nothing.shape == (0, 4)
    views[0].add_(1)  # still views of one memory
    assert tensor[0, 0].item() == 1.0


def test_what_is_written_between_cycles_is_what_comes_back(alloc: CuMemAllocator) -> None:
    tensor = filled(alloc, 3 * GRANULE + 5, "t")
    expected = random_bytes(3 * GRANULE + 5)
    for _ in range(5):
        tensor.add_(1)
        expected.add_(1)
        alloc.sleep(tags="t")
        alloc.wake_up()
        assert torch.equal(tensor, expected)
    (info,) = alloc.snapshot()
    assert alloc.stats().wakes == 5
    assert info.state == "awake"


@pytest.mark.extensive
def test_sizes_around_granules_and_blocks_of_host_memory(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(mib=160)
    sizes = [1, GRANULE - 1, GRANULE, GRANULE + 1, 32 * MIB - 1, 32 * MIB + 1, 33 * MIB]
    tensors = [filled(allocator, size, "t", seed) for seed, size in enumerate(sizes)]
    assert allocator.sleep(tags="t").bytes_backed_up == allocator.stats().asleep_bytes
    assert allocator.stats().physical_bytes == 0
    allocator.wake_up()
    for seed, (size, tensor) in enumerate(zip(sizes, tensors, strict=True)):
        assert torch.equal(tensor, random_bytes(size, seed))


def test_memory_of_all_devices_comes_back(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(devices=3)
    tensors = []
    for device in (2, 0, 1):
        tensor = allocator.empty(GRANULE + 9, dtype=torch.uint8, device=device, tag="t")
        tensors.append(tensor.copy_(random_bytes(GRANULE + 9, device)))
    report = allocator.sleep(tags="t")
    assert report.tags["t"].devices == (0, 1, 2)
    assert report.bytes_freed == report.bytes_backed_up == 6 * GRANULE
    allocator.wake_up()
    for device, tensor in zip((2, 0, 1), tensors, strict=True):
        assert torch.equal(tensor, random_bytes(GRANULE + 9, device))


# ---- which tags, kept or not

TAGS = ("default", "keep", "drop", "plain")


@pytest.fixture
def four(alloc: CuMemAllocator) -> Iterator[tuple[CuMemAllocator, list[torch.Tensor]]]:
    """Four tags: the default one, two with policies of their own, one without."""
    alloc.use_memory_pool("keep", on_sleep="offload")
    alloc.use_memory_pool("drop", on_sleep="discard")
    tensors = [filled(alloc, 100, tag, seed) for seed, tag in enumerate(TAGS)]
    yield alloc, tensors
    tensors.clear()


@pytest.mark.parametrize(
    ("offload_tags", "tags", "kept", "dropped", "overridden"),
    [
        (None, None, {"default", "keep", "plain"}, {"drop"}, set()),
        ((), None, set(), set(TAGS), {"keep"}),
        ("plain", None, {"plain"}, {"default", "keep", "drop"}, {"keep"}),
        (("plain", "keep"), None, {"plain", "keep"}, {"default", "drop"}, set()),
        (["drop"], None, {"drop"}, {"default", "keep", "plain"}, {"drop", "keep"}),
        (["drop", "drop"], None, {"drop"}, {"default", "keep", "plain"}, {"drop", "keep"}),
        (iter(TAGS), None, set(TAGS), set(), {"drop"}),
        (None, "plain", {"plain"}, set(), set()),
        (None, ["drop", "plain"], {"plain"}, {"drop"}, set()),
        (None, ("keep", "default", "keep"), {"keep", "default"}, set(), set()),
        (None, [], set(), set(), set()),
        ([], ["keep", "plain"], set(), {"keep", "plain"}, {"keep"}),
        (["drop"], ["drop", "plain"], {"drop"}, {"plain"}, {"drop"}),
        ({"plain": 1}, {"plain"}, {"plain"}, set(), set()),
    ],
    ids=repr,
)
def test_what_sleep_keeps_drops_and_leaves_awake(
    four: tuple[CuMemAllocator, list[torch.Tensor]],
    offload_tags: Any,
    tags: Any,
    kept: set[str],
    dropped: set[str],
    overridden: set[str],
) -> None:
    alloc, tensors = four
    report = alloc.sleep(offload_tags=offload_tags, tags=tags)
    expected = dict.fromkeys(TAGS, "awake")
    expected |= dict.fromkeys(kept, "backed_up") | dict.fromkeys(dropped, "discarded")
    assert states(alloc) == expected
    assert set(report.tags) == kept | dropped
    assert set(report.overrides) == overridden
    for tag, text in report.overrides.items():
        own, call = ("offload", "discard") if tag == "keep" else ("discard", "offload")
        assert text == f"policy {own}, call {call}"
        assert tag in str(report)
    assert report.bytes_backed_up == len(kept) * GRANULE
    assert report.bytes_discarded == len(dropped) * GRANULE
    assert report.bytes_freed == (len(kept) + len(dropped)) * GRANULE
    alloc.wake_up()
    for seed, (tag, tensor) in enumerate(zip(TAGS, tensors, strict=True)):
        if tag not in dropped:
            assert torch.equal(tensor, random_bytes(100, seed))


def test_adopted_weights_outlive_a_plain_sleep(alloc: CuMemAllocator) -> None:
    module = torch.nn.Linear(4, 4)
    before = module.weight.detach().clone()
    alloc.adopt(module)
    assert alloc.sleep().bytes_discarded == 0
    alloc.wake_up()
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("name", ["sleep", "prepare"])
def test_the_first_argument_is_tags_as_that_of_wake_up(name: str) -> None:
    first = [
        list(inspect.signature(function).parameters.values())[1]
        for function in (getattr(CuMemAllocator, name), CuMemAllocator.wake_up)
    ]
    assert first[0] == first[1]
    assert first[0].name == "tags"


def test_offload_tags_may_still_come_first_beside_tags(
    four: tuple[CuMemAllocator, list[torch.Tensor]],
) -> None:
    alloc, _ = four
    with pytest.warns(DeprecationWarning, match="offload_tags=X") as caught:
        assert alloc.prepare(["drop"], tags=["drop", "plain"]) == GRANULE
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="offload_tags=X"):
        alloc.sleep(["drop"], tags=["drop", "plain"])
    expected = {"default": "awake", "keep": "awake", "drop": "backed_up", "plain": "discarded"}
    assert states(alloc) == expected
    with pytest.raises(TypeError, match="multiple values"):
        alloc.sleep("keep", tags="keep", offload_tags="keep")


def test_offload_tags_outside_tags_contradict_each_other(
    four: tuple[CuMemAllocator, list[torch.Tensor]],
) -> None:
    alloc, _ = four
    with refuses(InvalidArgumentError, names="['plain']"):
        alloc.sleep(offload_tags=["plain", "keep"], tags=["keep"])
    assert set(states(alloc).values()) == {"awake"}


def test_sleep_is_idempotent_and_a_second_one_never_drops_a_backup(alloc: CuMemAllocator) -> None:
    tensor = filled(alloc, GRANULE, "t")
    alloc.sleep(tags="t")
    for again in (
        lambda: alloc.sleep(tags="t"),
        lambda: alloc.sleep(offload_tags=()),  # would discard, were it awake
        alloc.sleep,
    ):
        report = again()
        assert totals(report) == {}
        assert states(alloc) == {"t": "backed_up"}
    assert alloc.wake_up().bytes_restored == GRANULE
    assert totals(alloc.wake_up()) == {}
    assert torch.equal(tensor, random_bytes(GRANULE))


def test_what_is_allocated_while_the_tag_sleeps_is_awake_and_sleeps_next(
    alloc: CuMemAllocator,
) -> None:
    old = filled(alloc, 10, "t", 1)
    alloc.sleep(tags="t")
    new = filled(alloc, 10, "t", 2)
    assert [info.state for info in alloc.snapshot()] == ["backed_up", "awake"]
    assert alloc.sleep(tags="t").tags["t"].allocations == 1
    assert alloc.wake_up().tags["t"].allocations == 2
    assert torch.equal(old, random_bytes(10, 1))
    assert torch.equal(new, random_bytes(10, 2))


def test_discard_drops_contents_and_backups_and_reports_overrides(alloc: CuMemAllocator) -> None:
    alloc.use_memory_pool("slept", on_sleep="offload")
    slept, awake = filled(alloc, GRANULE, "slept"), filled(alloc, GRANULE, "awake")
    alloc.sleep(tags="slept")
    assert alloc.stats().host_used_bytes == GRANULE
    report = alloc.discard(("slept", "awake", "slept"))
    assert report.operation == "discard"
    assert dict(report.overrides) == {"slept": "policy offload, call discard"}
    assert totals(report) == {"bytes_freed": GRANULE, "bytes_discarded": 2 * GRANULE}
    assert states(alloc) == {"slept": "discarded", "awake": "discarded"}
    assert alloc.stats().host_used_bytes == 0
    assert totals(alloc.discard(["slept", "awake"])) == {}
    assert totals(alloc.wake_up()) == {"bytes_mapped": 2 * GRANULE}
    assert slept.numel() == awake.numel() == GRANULE


def test_on_wake_zero_fills_what_was_discarded_and_restores_what_was_not(
    alloc: CuMemAllocator,
) -> None:
    alloc.use_memory_pool("t", on_wake="zero")
    tensor = filled(alloc, GRANULE + 1, "t")
    alloc.sleep(tags="t")
    assert totals(alloc.wake_up()) == {
        "bytes_mapped": 2 * GRANULE,
        "bytes_restored": 2 * GRANULE,
    }
    assert torch.equal(tensor, random_bytes(GRANULE + 1))
    alloc.discard("t")
    assert totals(alloc.wake_up()) == {"bytes_mapped": 2 * GRANULE, "bytes_zeroed": 2 * GRANULE}
    assert int(tensor.count_nonzero()) == 0


# ---- waking


def test_wake_up_of_some_tags_leaves_the_others_asleep(alloc: CuMemAllocator) -> None:
    tensors = {tag: filled(alloc, 10, tag) for tag in "abc"}
    alloc.sleep(offload_tags=tuple("abc"))
    assert set(alloc.wake_up(["b"]).tags) == {"b"}
    assert states(alloc) == {"a": "backed_up", "b": "awake", "c": "backed_up"}
    assert totals(alloc.wake_up([])) == {}
    assert set(alloc.wake_up("a").tags) == {"a"}
    assert set(alloc.wake_up(("a", "b", "c", "c")).tags) == {"c"}
    assert all(torch.equal(tensor, random_bytes(10)) for tensor in tensors.values())


def test_generations_grow_at_each_wake(alloc: CuMemAllocator) -> None:
    kept = alloc.empty(1, tag="t"), alloc.empty(1, tag="u")
    before = [info.generation for info in alloc.snapshot()]
    for _ in range(3):
        alloc.sleep(tags="t")
        alloc.wake_up()
    after = [info.generation for info in alloc.snapshot()]
    assert after == [before[0] + 3, before[1]]
    assert len(kept) == 2


def test_a_wake_without_room_leaves_everything_asleep_with_its_backup(
    make_allocator: MakeAllocator,
) -> None:
    """R4: and a later wake restores every byte."""
    allocator = make_allocator(mib=16)
    tensors = [filled(allocator, 2 * GRANULE, "weights", seed) for seed in range(3)]
    kv = filled(allocator, GRANULE, "kv")
    addresses = [tensor.data_ptr() for tensor in tensors]
    allocator.sleep(offload_tags=("weights",))
    other = allocator.empty(4 * GRANULE, dtype=torch.uint8, tag="other").fill_(7)
    asleep, snapshot = allocator.stats(), allocator.snapshot()

    for attempt in (1, 2):
        with pytest.raises(OutOfMemoryError) as caught:
            allocator.wake_up()
        error = caught.value
        assert isinstance(error, RuntimeError)
        assert (error.operation, error.device) == ("wake", 0)
        assert error.tag in {"weights", "kv"}
        assert error.result_name == "CUDA_ERROR_OUT_OF_MEMORY"
        assert error.total_bytes == 16 * MIB
        assert error.free_bytes is not None
        assert "14.00 MiB" in str(error)  # what the whole wake needs
        assert "asleep" in error.advice
        assert allocator.snapshot() == snapshot
        after = allocator.stats()
        assert after.tags == asleep.tags
        assert after.physical_bytes == after.mapped_bytes == 4 * GRANULE
        assert after.host_used_bytes == 6 * GRANULE
        assert after.wakes == 0
        assert after.failed_transitions >= attempt

    assert allocator.wake_up("kv").bytes_mapped == GRANULE  # what fits can wake
    assert int(other.sum()) == 7 * 4 * GRANULE
    del other
    report = allocator.wake_up()
    assert totals(report) == {"bytes_mapped": 6 * GRANULE, "bytes_restored": 6 * GRANULE}
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    for seed, tensor in enumerate(tensors):
        assert torch.equal(tensor, random_bytes(2 * GRANULE, seed))
    assert kv.numel() == GRANULE


def test_a_wake_that_fails_on_one_device_wakes_none(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(mib=4, devices=2)
    tensors = []
    for device in (0, 1):
        tensor = allocator.empty(GRANULE, dtype=torch.uint8, device=device, tag="t")
        tensors.append(tensor.copy_(random_bytes(GRANULE, device)))
    allocator.sleep(tags="t")
    filler = allocator.empty(2 * GRANULE, dtype=torch.uint8, device=1, tag="filler")
    with pytest.raises(OutOfMemoryError) as caught:
        allocator.wake_up("t")
    assert caught.value.device == 1
    assert [info.state for info in allocator.snapshot()] == ["backed_up", "backed_up", "awake"]
    assert allocator.stats().physical_bytes == 2 * GRANULE
    del filler
    allocator.wake_up()
    assert all(torch.equal(t, random_bytes(GRANULE, d)) for d, t in enumerate(tensors))


# ---- host memory


def test_a_backup_over_the_limit_puts_nothing_to_sleep(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(limit=8 * MIB)
    tensors = [filled(allocator, 3 * MIB, "t", seed) for seed in range(3)]
    with pytest.raises(OutOfHostMemoryError) as caught:
        allocator.sleep(tags="t")
    error = caught.value
    assert isinstance(error, MemoryError)
    assert (error.operation, error.tag) == ("sleep", "t")
    assert "8.00 MiB" in str(error)
    assert "host_backup_limit" in error.advice
    assert states(allocator) == {"t": "awake"}
    stats = allocator.stats()
    assert (stats.sleeps, stats.failed_transitions, stats.host_used_bytes) == (0, 1, 0)
    assert stats.host_bytes <= 8 * MIB
    assert stats.physical_bytes == stats.mapped_bytes == 6 * GRANULE
    assert all(torch.equal(t, random_bytes(3 * MIB, s)) for s, t in enumerate(tensors))

    tensors.pop()
    assert allocator.sleep(tags="t").bytes_backed_up == 8 * MIB  # just fits
    allocator.wake_up()
    assert all(torch.equal(t, random_bytes(3 * MIB, s)) for s, t in enumerate(tensors))


def test_host_memory_is_kept_for_the_next_sleep_and_released_on_demand(
    alloc: CuMemAllocator,
) -> None:
    tensor = filled(alloc, 4 * GRANULE, "t")
    alloc.sleep(tags="t")
    stats = alloc.stats()
    assert stats.host_bytes >= 4 * GRANULE == stats.host_used_bytes
    unused = stats.host_bytes - 4 * GRANULE + stats.staging_bytes
    assert alloc.release_host_memory() == unused  # only what holds no contents of what sleeps
    assert alloc.stats().host_bytes == 4 * GRANULE
    alloc.wake_up()
    kept = alloc.stats().host_bytes
    alloc.sleep(tags="t")
    assert alloc.stats().host_bytes == kept
    alloc.wake_up()
    stats = alloc.stats()
    assert stats.tags["t"].retained_bytes == 4 * GRANULE
    assert alloc.release_host_memory() == kept + stats.staging_bytes
    stats = alloc.stats()
    assert (stats.host_bytes, stats.staging_bytes, stats.tags["t"].retained_bytes) == (0, 0, 0)
    assert alloc.release_host_memory() == 0
    assert torch.equal(tensor, random_bytes(4 * GRANULE))


# ---- frees and reports


def test_freeing_what_sleeps_gives_address_and_backup_back(alloc: CuMemAllocator) -> None:
    """R6."""
    backed_up, discarded = filled(alloc, GRANULE, "a"), filled(alloc, GRANULE, "b")
    alloc.sleep(offload_tags=("a",))
    del backed_up, discarded
    stats = alloc.stats()
    assert (stats.reserved_address_bytes, stats.host_used_bytes, stats.asleep_bytes) == (0, 0, 0)
    assert totals(alloc.wake_up()) == {}


def test_reports_count_every_tag_and_add_up(alloc: CuMemAllocator) -> None:
    kept = [
        filled(alloc, 1, "a"),
        filled(alloc, GRANULE + 1, "a"),
        filled(alloc, 3 * GRANULE, "b"),
    ]
    slept = alloc.sleep(offload_tags=("a",))
    assert (slept.operation, slept.problems, dict(slept.overrides)) == ("sleep", (), {})
    a, b = slept.tags["a"], slept.tags["b"]
    assert a == TagReport(
        tag="a",
        devices=(0,),
        allocations=2,
        bytes_freed=3 * GRANULE,
        bytes_backed_up=3 * GRANULE,
        seconds=a.seconds,
    )
    assert b == TagReport(
        tag="b",
        devices=(0,),
        allocations=1,
        bytes_freed=3 * GRANULE,
        bytes_discarded=3 * GRANULE,
        seconds=b.seconds,
    )
    assert 0 < a.seconds <= slept.seconds
    assert a.gb_per_s == pytest.approx(3 * GRANULE / a.seconds / 1e9)
    woken = alloc.wake_up()
    assert woken.operation == "wake_up"
    assert woken.tags["a"] == TagReport(
        tag="a",
        devices=(0,),
        allocations=2,
        bytes_mapped=3 * GRANULE,
        bytes_restored=3 * GRANULE,
        seconds=woken.tags["a"].seconds,
    )
    assert totals(woken) == {"bytes_mapped": 6 * GRANULE, "bytes_restored": 3 * GRANULE}
    assert woken.gb_per_s > 0
    assert len(kept) == 3


def test_transitions_without_anything_to_do(alloc: CuMemAllocator) -> None:
    for report in (alloc.sleep(), alloc.wake_up(), alloc.sleep(offload_tags=()), alloc.discard(())):
        assert totals(report) == {}
        assert dict(report.tags) == {}


@pytest.mark.extensive
def test_a_keyboard_interrupt_during_a_sleep_comes_when_the_sleep_is_done(
    make_allocator: MakeAllocator,
) -> None:
    allocator = make_allocator(mib=512)
    tensor = allocator.empty(256 * MIB, dtype=torch.uint8, tag="t").fill_(9)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    core = allocator._core

    class Interrupted:
        """The core, with a signal that arrives while a sleep is under way."""

        def sleep(self, *arguments: Any) -> Any:
            signal.setitimer(signal.ITIMER_REAL, 0.005)
            return core.sleep(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(core, name)

    try:
        allocator._state.core = Interrupted()  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            allocator.sleep(tags="t")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        allocator._state.core = core
    assert states(allocator) == {"t": "backed_up"}
    allocator.wake_up()
    assert int(tensor[::4096].sum()) == 9 * (256 * MIB // 4096)


# ---- prepare


def test_prepare_pins_ahead_what_a_sleep_needs(alloc: CuMemAllocator) -> None:
    tensor = alloc.empty(8 * MIB, dtype=torch.uint8, tag="weights").fill_(3)
    pinned = alloc.prepare(offload_tags="weights")
    assert pinned == 8 * MIB
    assert alloc.stats().host_bytes == pinned
    assert alloc.stats().host_used_bytes == 0
    alloc.sleep(offload_tags="weights")
    assert alloc.stats().host_bytes == pinned
    alloc.wake_up()
    assert bool((tensor == 3).all())
    assert alloc.prepare(offload_tags="weights") == 0
    staging = alloc.stats().staging_bytes
    assert alloc.release_host_memory() == pinned + staging


def test_prepare_in_the_background_gives_a_future(alloc: CuMemAllocator) -> None:
    tensor = alloc.empty(8 * MIB, dtype=torch.uint8, tag="weights").fill_(3)
    future = alloc.prepare(tags="weights", background=True)
    assert future.result(timeout=60) == 8 * MIB
    alloc.release_host_memory()
    future = alloc.prepare(tags="weights", background=True)
    alloc.sleep(offload_tags="weights")  # one of the two waits for the other
    assert future.result(timeout=60) in {0, 8 * MIB}
    assert alloc.stats().host_bytes == 8 * MIB
    alloc.wake_up()
    assert bool((tensor == 3).all())


def test_prepare_refuses_unknown_tags_and_too_much(make_allocator: MakeAllocator) -> None:
    limited = make_allocator(limit=MIB)
    with pytest.raises(UnknownTagError):
        limited.prepare(offload_tags="nobody")
    tensor = limited.empty(8 * MIB, dtype=torch.uint8, tag="weights")
    too_much = partial(
        refuses,
        OutOfHostMemoryError,
        names="host_backup_limit",
        operation="prepare",
        tag="weights",
        bytes=8 * MIB,
    )
    with too_much():
        limited.prepare(offload_tags="weights")
    failed = limited.prepare(offload_tags="weights", background=True)
    with too_much():
        failed.result(timeout=60)
    assert limited.stats().host_bytes == 0
    del tensor
