"""How torch is routed to a slot, with fakes in place of its CUDA parts (R10, R11)."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from interrupting import InterruptAt
from refusals import refuses

from cumempool import UnavailableError, UnsupportedError, _torch
from cumempool._torch import ExpandableSegmentsOff, PoolId, PoolRoute, replace_setting


class FakePool:
    """A `torch.cuda.MemPool`, whose destructor gives up a count.

    It must not be the last one: then it empties the cache of the pool, and aborts inside another
    scope.
    """

    def __init__(
        self,
        device: int,
        pool_id: tuple[int, int],
        destroy: Callable[[int, tuple[int, int]], None],
        counts: Counter[tuple[int, int]],
        forgotten: set[tuple[int, int]],
    ) -> None:
        self.id = pool_id
        self.counts = counts
        self.forgotten = forgotten
        weakref.finalize(self, destroy, device, pool_id).atexit = False

    def use_count(self) -> int:
        if self.id in self.forgotten:
            raise RuntimeError(
                "it != graph_pools.end() INTERNAL ASSERT FAILED at "
                '"/pytorch/c10/cuda/CUDACachingAllocator.cpp":2807, please report a bug to PyTorch.'
            )
        return self.counts[self.id]


class FakeTorch:
    """The parts of torch that a route uses, noting every call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, per_thread: bool = True) -> None:
        self.events: list[str] = []
        self.failing: set[str] = set()
        self.destroyed: list[tuple[int, int]] = []
        self.made: list[tuple[int, object]] = []  # device and slot of each pool
        self.counts: Counter[tuple[int, int]] = Counter()
        self.forgotten: set[tuple[int, int]] = set()  # pools that the cache was emptied of
        self.segments: list[dict[str, Any]] = []
        self.device = 0
        self.backend = "native"
        self.snapshots: list[tuple[int, int] | None] = []  # what was asked of
        self.listed = 0  # segments, by all of them
        names = ["_cuda_beginAllocateToPool", "_cuda_endAllocateToPool", "_cuda_releasePool"]
        if per_thread:
            names.append("_cuda_beginAllocateCurrentThreadToPool")
        else:
            monkeypatch.delattr(torch._C, "_cuda_beginAllocateCurrentThreadToPool", raising=False)
        for name in names:
            monkeypatch.setattr(torch._C, name, self.call(name), raising=False)
        monkeypatch.setattr(torch.cuda, "device", self.on_device)
        monkeypatch.setattr(torch.cuda, "MemPool", self.make_pool)
        monkeypatch.setattr(torch.cuda, "memory_snapshot", self.snapshot)
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", self.stats)
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: self.backend)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty_cache)
        monkeypatch.setattr(_torch.routing, "_pluggable_allocator", lambda slot: slot)
        monkeypatch.setattr(_torch.unused, "open_pools", set())
        monkeypatch.setattr(_torch.routing, "_idle_pools", {})
        monkeypatch.setattr(_torch.unused, "fresh_pools", {})
        monkeypatch.setattr(_torch.unused, "_held", _torch.unused._HeldPools())
        monkeypatch.setattr(_torch.routing, "_routes", [])

    def call(self, name: str) -> Callable[[int, tuple[int, int]], None]:
        name = name.removeprefix("_cuda_")

        def noted(device: int, pool_id: tuple[int, int]) -> None:
            event = f"{name} {device} {pool_id}"
            if event in self.failing:
                raise RuntimeError(f"failed: {event}")
            self.counts[pool_id] += {"releasePool": -1, "endAllocateToPool": 0}.get(name, 1)
            self.events.append(event)

        return noted

    @contextmanager
    def on_device(self, device: int) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before

    def make_pool(self, slot: object) -> FakePool:
        self.made.append((self.device, slot))
        pool_id = (0, len(self.made))
        pool = FakePool(self.device, pool_id, self.destroy, self.counts, self.forgotten)
        self.counts[pool.id] += 1
        return pool

    def destroy(self, device: int, pool_id: tuple[int, int]) -> None:
        """What the destructor of a pool does."""
        if self.counts[pool_id] < 2:
            self.destroyed.append(pool_id)
        self.counts[pool_id] -= 1
        self.events.append(f"releasePool {device} {pool_id}")

    def snapshot(
        self, mempool_id: tuple[int, int] | None = None, include_traces: bool = True
    ) -> list[dict[str, Any]]:
        assert not include_traces, "the history is asked for, which may be long"
        self.snapshots.append(mempool_id)
        segments = [
            segment for segment in self.segments if mempool_id in (None, segment["segment_pool_id"])
        ]
        self.listed += len(segments)
        return segments

    def stats(self, device: int) -> dict[str, Any]:
        """Of all devices together; a block without a size has 2 MiB."""
        sums: Counter[str] = Counter()
        for segment in self.segments:
            used = any(block["state"] != "inactive" for block in segment["blocks"])
            for block in segment["blocks"]:
                size = block.get("size", 2 << 20)
                sums["reserved_bytes"] += size
                sums["active_bytes"] += size * (block["state"] != "inactive")
                sums["inactive_split_bytes"] += size * (used and block["state"] == "inactive")
        names = ("reserved_bytes", "active_bytes", "inactive_split_bytes")
        return {name: {"all": {"current": sums[name]}} for name in names}

    def idle(self) -> set[tuple[int, int]]:
        """Pools that are kept for the next scope of their slot, with one count."""
        return {pool.id for pool in _torch.routing._idle_pools.values()}

    def empty_cache(self) -> None:
        self.events.append("empty_cache")
        self.segments = [
            segment
            for segment in self.segments
            if any(block["state"] != "inactive" for block in segment["blocks"])
        ]
        held = {segment["segment_pool_id"] for segment in self.segments}
        self.forgotten |= {
            pool for pool, count in self.counts.items() if count == 0 and pool not in held
        }

    def hold(self, pool: int, *states: str) -> None:
        """Lets torch hold a segment of a pool, with blocks in these states."""
        blocks = [{"state": state} for state in states]
        self.segments.append({"segment_pool_id": (0, pool), "blocks": blocks})


BEGIN = "beginAllocateCurrentThreadToPool"


def ended(device: int, pool: int) -> list[str]:
    """The end of one pool: the routing, then the counts of the scope and of the MemPool object."""
    release = f"releasePool {device} (0, {pool})"
    return [f"endAllocateToPool {device} (0, {pool})", release, release]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTorch]:
    monkeypatch.setattr(_torch.runtime, "torch_version", lambda: (2, 11))
    fake = FakeTorch(monkeypatch)
    yield fake
    gc.collect()
    assert fake.destroyed == []
    if not fake.failing:
        counts = {count for pool, count in fake.counts.items() if pool not in fake.idle()}
        assert counts <= {0}, "a pool keeps a count, or was released twice"


# ---- routes


def test_each_device_gets_a_pool_and_all_end_in_reverse(fake: FakeTorch) -> None:
    route = PoolRoute(7, [0, 2])
    route.begin()
    assert fake.made == [(0, 7), (2, 7)]
    assert fake.events == [f"{BEGIN} 0 (0, 1)", f"{BEGIN} 2 (0, 2)"]
    fake.events.clear()
    route.end()
    assert fake.events == ended(2, 2) + ended(0, 1)
    fake.events.clear()
    route.end()
    assert fake.events == []


def test_a_torch_without_routing_by_thread_is_routed_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_torch.runtime, "torch_version", lambda: (2, 11))
    fake = FakeTorch(monkeypatch, per_thread=False)
    route = PoolRoute(1, [0])
    route.begin()
    assert fake.events == ["beginAllocateToPool 0 (0, 1)"]
    route.end()
    assert fake.counts[0, 1] == 0


def test_a_route_for_all_threads_takes_every_thread(fake: FakeTorch) -> None:
    route = PoolRoute(7, [0, 1], all_threads=True)
    route.begin()
    assert fake.events == ["beginAllocateToPool 0 (0, 1)", "beginAllocateToPool 1 (0, 2)"]
    fake.events.clear()
    route.end()
    assert fake.events == ended(1, 2) + ended(0, 1)


def test_a_device_that_fails_to_begin_unroutes_the_others(fake: FakeTorch) -> None:
    fake.failing.add(f"{BEGIN} 1 (0, 2)")
    with pytest.raises(RuntimeError, match="failed"):
        PoolRoute(7, [0, 1]).begin()
    release = "releasePool 1 (0, 2)"  # the count of its MemPool object
    assert fake.events == [f"{BEGIN} 0 (0, 1)", release, *ended(0, 1)]
    assert fake.counts == {(0, 1): 0, (0, 2): 0}
    assert not _torch.unused.open_pools


def test_the_pool_is_given_up_even_while_a_traceback_of_the_scope_lives(fake: FakeTorch) -> None:
    """R10: a generator's frame would keep the pool, and with it every unused segment."""
    route = PoolRoute(3, [0])
    caught = None
    try:
        route.begin()
        fake.hold(1, "inactive")
        try:
            raise ValueError("in the scope")
        finally:
            route.end()
    except ValueError as error:
        caught = error
    assert caught is not None
    assert caught.__traceback__ is not None
    assert fake.counts[0, 1] == 0
    assert fake.segments == []


def test_an_end_that_fails_still_puts_the_settings_back(
    fake: FakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    restored = []
    monkeypatch.setattr(ExpandableSegmentsOff, "end", lambda self: restored.append(self))
    fake.failing.add("endAllocateToPool 0 (0, 1)")
    route = PoolRoute(3, [0])
    route.begin()
    with pytest.raises(RuntimeError, match="failed"):
        route.end()
    assert len(restored) == 1


# ---- renewed routes


def test_a_renewed_route_gives_unused_segments_back_and_goes_on_in_a_fresh_pool(
    fake: FakeTorch,
) -> None:
    route = PoolRoute(1, [0])
    route.begin()
    fake.hold(1, "inactive")
    fake.hold(1, "active_allocated")
    fake.events.clear()
    assert route.renew()
    assert fake.events == [*ended(0, 1), "empty_cache", f"{BEGIN} 0 (0, 2)"]
    assert len(fake.segments) == 1
    fake.segments[0]["blocks"][0]["state"] = "inactive"
    assert route.renew()
    assert fake.segments == []
    route.end()
    assert not _torch.unused.open_pools


def test_a_route_is_not_renewed_while_others_are_routed_to_or_a_graph_is_captured(
    fake: FakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    route, other = PoolRoute(1, [0]), PoolRoute(2, [0])
    everywhere = PoolRoute(3, [0], all_threads=True)
    refused = []
    assert not route.renew()
    route.begin()
    thread = threading.Thread(target=lambda: refused.append(not route.renew()))
    thread.start()
    thread.join()
    with monkeypatch.context() as patch:
        patch.setattr(_torch.runtime, "is_capturing", lambda: True)
        refused.append(not route.renew())
    other.begin()
    refused += [not route.renew(), not other.renew()]
    other.end()
    route.end()
    everywhere.begin()
    refused.append(not everywhere.renew())
    everywhere.end()
    assert refused == [True] * 5
    assert fake.events.count("endAllocateToPool 0 (0, 1)") == 1


def test_a_route_that_cannot_begin_again_says_so_and_can_be_ended(fake: FakeTorch) -> None:
    route = PoolRoute(1, [0])
    route.begin()
    fake.failing.add(f"{BEGIN} 0 (0, 2)")
    with pytest.raises(RuntimeError, match="failed"):
        route.renew()
    route.end()
    assert not _torch.unused.open_pools
    assert not _torch.routing._routes


class CudaParameter(torch.nn.Parameter):
    """A parameter that says it is on device 0."""

    is_cuda = True  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0


@pytest.fixture
def renewals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every renewal, whose place among routes is not asked for."""
    counted: list[int] = []
    renew = PoolRoute.renew

    def counting(route: PoolRoute) -> bool:
        counted.append(len(counted))
        return renew(route)

    monkeypatch.setattr(PoolRoute, "renew", counting)
    monkeypatch.setattr(PoolRoute, "_is_innermost", lambda self, device: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    return counted


def replace_weights(fake: FakeTorch, count: int, size: int) -> int:
    """Replaces a module's weight; each leaves a segment. Returns the most that was unused."""
    layer = torch.nn.Linear(1, 1)
    most = 0
    for _ in range(count):
        layer.weight = CudaParameter(torch.zeros(1, 1))
        fake.hold(len(fake.made), "inactive")
        fake.segments[-1]["blocks"][0]["size"] = size
        most = max(most, sum(segment["blocks"][0]["size"] for segment in fake.segments))
    return most


def test_a_module_that_replaces_its_weights_in_a_scope_leaves_little_unused(
    fake: FakeTorch, renewals: list[int]
) -> None:
    route = PoolRoute(1, [0])
    route.begin()
    assert replace_weights(fake, 64, 32 << 20) <= 160 << 20
    route.end()
    assert len(renewals) > 8
    assert fake.segments == []
    assert not torch.nn.modules.module._global_parameter_registration_hooks
    assert not torch.nn.modules.module._global_buffer_registration_hooks


@pytest.mark.parametrize(("free", "renewed"), [(200 << 20, True), (20 << 30, False)])
def test_beside_much_that_is_in_use_a_scope_is_renewed_as_room_gets_short(
    fake: FakeTorch,
    renewals: list[int],
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    renewed: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    fake.hold(9, "active_allocated")
    fake.segments[-1]["blocks"][0]["size"] = 60 << 30
    route = PoolRoute(1, [0])
    route.begin()
    replace_weights(fake, 16, 32 << 20)
    assert bool(renewals) is renewed
    route.end()


def test_small_replacements_are_left_to_the_end_of_the_scope(
    fake: FakeTorch, renewals: list[int]
) -> None:
    route = PoolRoute(1, [0])
    route.begin()
    replace_weights(fake, 15, 4 << 20)
    assert renewals == []
    route.end()
    assert fake.segments == []


def test_parameters_of_other_devices_and_threads_renew_nothing(
    fake: FakeTorch, renewals: list[int]
) -> None:
    route = PoolRoute(1, [1])
    route.begin()
    replace_weights(fake, 8, 64 << 20)
    route.end()
    route = PoolRoute(1, [0])
    route.begin()
    thread = threading.Thread(target=replace_weights, args=(fake, 8, 64 << 20))
    thread.start()
    thread.join()
    torch.nn.Linear(1, 1)  # on the CPU
    route.end()
    assert renewals == []


def test_a_pool_of_others_inside_the_scope_keeps_the_route_as_it_is(
    fake: FakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = 1 << 30
    allocated = torch.zeros(1)
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: allocated)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: address)
    route = PoolRoute(1, [0])
    route.begin()
    for pool, expected in ((9, False), (1, True)):
        fake.hold(pool, "active_allocated")
        fake.segments[-1].update(address=address, total_size=2 << 20)
        assert route._is_innermost(0) is expected
        fake.segments.clear()
    route.end()


# ---- unused segments


def test_unused_segments_go_back_when_the_scope_is_left(fake: FakeTorch) -> None:
    """R10."""
    route = PoolRoute(1, [0])
    route.begin()
    fake.hold(1, "inactive", "inactive")
    fake.hold(1, "active_allocated", "inactive")
    route.end()
    assert fake.events[-1] == "empty_cache"
    assert len(fake.segments) == 1


def test_the_cache_is_left_alone_where_nothing_is_unused(fake: FakeTorch) -> None:
    fake.hold(9, "inactive")  # of a pool that is not ours
    route = PoolRoute(1, [0])
    route.begin()
    fake.hold(1, "active_allocated")
    route.end()
    assert "empty_cache" not in fake.events


def test_while_another_scope_is_open_unused_segments_wait_for_its_end(fake: FakeTorch) -> None:
    outer, inner = PoolRoute(1, [0]), PoolRoute(2, [0])
    outer.begin()
    inner.begin()
    fake.hold(2, "inactive")
    inner.end()
    assert "empty_cache" not in fake.events
    outer.end()
    assert fake.events == [
        f"{BEGIN} 0 (0, 1)",
        f"{BEGIN} 0 (0, 2)",
        *ended(0, 2),
        *ended(0, 1),
        "empty_cache",
    ]


def test_segments_whose_tensors_die_later_are_found_at_the_next_end(fake: FakeTorch) -> None:
    first, second = PoolRoute(1, [0]), PoolRoute(1, [0])
    first.begin()
    fake.hold(1, "active_allocated")
    first.end()
    fake.segments[0]["blocks"][0]["state"] = "inactive"
    second.begin()
    second.end()
    assert fake.segments == []


def use(fake: FakeTorch, slot: int, *states: str) -> tuple[int, int]:
    """One scope in which a segment is made; the id of its pool."""
    route = PoolRoute(slot, [0])
    route.begin()
    fake.hold(len(fake.made), *states)
    route.end()
    return 0, len(fake.made)


def skip(slot: int) -> None:
    """One scope in which nothing is allocated."""
    route = PoolRoute(slot, [0])
    route.begin()
    route.end(lambda: False)


def test_a_scope_that_allocates_nothing_asks_torch_for_nothing(fake: FakeTorch) -> None:
    skip(1)
    assert fake.snapshots == []
    assert "empty_cache" not in fake.events


def test_the_pool_of_a_scope_that_allocated_nothing_serves_the_next_of_its_slot(
    fake: FakeTorch,
) -> None:
    for _ in range(1000):
        skip(1)
    skip(2)
    assert fake.made == [(0, 1), (0, 2)]
    assert fake.counts == {(0, 1): 1, (0, 2): 1}
    assert use(fake, 1, "active_allocated") == (0, 2), "a new pool would be the third"
    fake.segments[0]["segment_pool_id"] = (0, 1)
    assert fake.counts[0, 1] == 0
    skip(1)
    assert fake.made == [(0, 1), (0, 2), (0, 1)], "a pool that has memory serves nobody else"


def fake_pools() -> int:
    return sum(type(each) is FakePool for each in gc.get_objects())


@pytest.mark.parametrize("emptied_by", ["the scope", "somebody else", "the next scopes"])
def test_pools_of_scopes_do_not_pile_up(fake: FakeTorch, emptied_by: str) -> None:
    before = fake_pools()
    for _ in range(500):
        use(fake, 1, "inactive" if emptied_by == "the scope" else "active_allocated")
        for segment in fake.segments:
            segment["blocks"][0]["state"] = "inactive"  # its tensor dies when the scope has ended
        if emptied_by == "somebody else":
            fake.empty_cache()
        assert len(fake.segments) < 10
    assert fake_pools() <= before + 1
    assert len(_torch.unused._held.devices) + len(_torch.unused.fresh_pools) <= 10
    assert fake.destroyed == []


@pytest.mark.parametrize("version", [(2, 10), (2, 11)])
def test_the_object_of_a_pool_stays_where_its_end_would_abort_or_somebody_has_it(
    fake: FakeTorch, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]
) -> None:
    monkeypatch.setattr(_torch.runtime, "torch_version", lambda: version)
    monkeypatch.setattr(_torch.settings, "live_settings", dict)
    route = PoolRoute(1, [0])
    route.begin()
    theirs = route._pools[0]._pool if version == (2, 11) else None
    before = fake_pools()
    route.end()
    assert fake.counts[0, 1] == 0
    del theirs
    gc.collect()
    assert fake_pools() == before
    assert fake.destroyed == []


@pytest.mark.extensive
def test_what_a_scope_costs_does_not_grow_with_the_segments_that_torch_holds(
    fake: FakeTorch,
) -> None:
    route = PoolRoute(1, [0])
    route.begin()
    for _ in range(10_000):
        fake.hold(1, "active_allocated")
        fake.hold(0, "active_allocated")  # of the program
    route.end()
    for _ in range(100):
        skip(2)
        before = fake.listed
        use(fake, 2, "inactive")
        assert fake.listed - before <= 1
        fake.hold(0, "inactive")  # what the program itself has cached changes nothing
    for segment in fake.segments:
        if segment["segment_pool_id"] == (0, 1):
            segment["blocks"][0]["state"] = "inactive"
    skip(2)
    assert not any(segment["segment_pool_id"] == (0, 1) for segment in fake.segments)


def test_of_many_segments_a_thirty_second_may_wait_until_it_is_looked_for(fake: FakeTorch) -> None:
    route = PoolRoute(1, [0])
    route.begin()
    for _ in range(64):
        fake.hold(1, "active_allocated")
    route.end()
    for number in range(3):
        fake.segments[number]["blocks"][0]["state"] = "inactive"
        skip(2)
        assert fake.events.count("empty_cache") == (number >= 1)
    assert len(fake.segments) == 62
    _torch.return_unused(thorough=True)  # as a sleep does
    assert len(fake.segments) == 61


def test_an_older_torch_is_asked_by_what_it_takes(
    fake: FakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: fake.segments)
    fake.hold(9, "inactive")
    use(fake, 1, "inactive")
    assert fake.segments == []
    assert use(fake, 1, "active_allocated") == (0, 2)
    assert list(_torch.unused._held.devices) == [(0, 2)]


def test_torch_gives_up_no_reference_that_it_was_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def stealing(asked: tuple[int, ...]) -> dict[str, Any]:  # as in torch 2.11
        for item in asked:
            ctypes.pythonapi.Py_DecRef(ctypes.py_object(item))
        return {"segments": [], "allocator_settings": {}}

    def snapshot(mempool_id: PoolId = (0, 0), include_traces: bool = True) -> Any:
        return stealing((*mempool_id, include_traces))["segments"]

    monkeypatch.setattr(torch._C, "_cuda_memorySnapshot", stealing, raising=False)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", snapshot)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(
        _torch.snapshots,
        "_references_taken",
        functools.cache(_torch.snapshots._references_taken.__wrapped__),
    )
    number = int("123456789012")  # which Python does not keep for good
    numbers = (number, _torch.snapshots.NO_POOL[1])
    before = [sys.getrefcount(one) for one in numbers]
    for _ in range(100):
        _torch.snapshots.segments_of((0, number))
        _torch.live_settings()
    assert [sys.getrefcount(one) for one in numbers] == before


def test_a_torch_that_names_its_fields_otherwise_is_an_error_by_name(fake: FakeTorch) -> None:
    fake.segments.append({"pool": (0, 1), "blocks": []})
    with refuses(UnsupportedError, names="'segment_pool_id'"):
        _torch.dead_ranges(segments=fake.segments)
    fake.segments.clear()
    with refuses(UnsupportedError, names="'allocator_settings'"):
        _torch.snapshots.field_of({}, "allocator_settings")


@pytest.mark.parametrize("backend", ["pluggable", "cudaMallocAsync"])
def test_a_torch_with_another_allocator_is_an_error_that_says_so(
    fake: FakeTorch, backend: str
) -> None:
    fake.backend = backend
    with refuses(UnavailableError, names=backend, operation="use_memory_pool") as caught:
        PoolRoute(1, [0]).begin()
    assert "empty()" in caught.value.advice
    assert (fake.made, fake.events) == ([], [])
    assert not _torch.unused.open_pools
    assert _torch.live_settings() == {}


# ---- interrupts


@pytest.mark.parametrize("used", [True, False])
def test_an_interrupt_at_any_moment_leaves_nothing_routed(fake: FakeTorch, used: bool) -> None:
    skip(1)

    def scope() -> None:
        route = PoolRoute(1, [0, 1])
        try:
            route.begin()
        except BaseException:
            assert not route._pools
            raise
        try:
            fake.events.append("body")
        finally:
            route.end(lambda: used)

    moment, done = 0, False
    while not done:
        moment += 1
        fake.events.clear()
        # The moment at which a pool of torch has been made, and nobody has it yet, is left out, and
        # so are those after the body, which have nobody who would go on.
        interrupt = InterruptAt(moment, lambda file: "/cumempool/_torch/" in file)
        done = interrupt.run(scope)
        begun = sum(event.startswith(BEGIN) for event in fake.events)
        ended = sum(event.startswith("endAllocate") for event in fake.events)
        if "body" in fake.events:
            break
        assert begun == ended, interrupt.where
        assert not _torch.unused.open_pools, interrupt.where
    assert moment > 20
    fake.failing.add("what was struck keeps counts")
    fake.destroyed.clear()


def test_a_torch_that_refuses_to_empty_its_cache_is_no_error(
    fake: FakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise RuntimeError("a capture is under way")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    route = PoolRoute(1, [0])
    route.begin()
    fake.hold(1, "inactive")
    route.end()
    assert len(fake.segments) == 1


# torch frees segments through the object that made them, long after its pool is gone.
pluggable_allocator = _torch.routing._pluggable_allocator


def test_a_slot_has_one_pluggable_allocator_for_the_life_of_the_process(
    fake: FakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, str, str]] = []

    class Pluggable:
        def __init__(self, library: str, malloc: str, free: str) -> None:
            made.append((library, malloc, free))

        def allocator(self) -> tuple[str, str, str]:
            return made[-1]

    monkeypatch.setattr(torch.cuda.memory, "CUDAPluggableAllocator", Pluggable)
    monkeypatch.setattr(_torch.routing, "_pluggable", {})
    monkeypatch.setattr(_torch.routing, "_pluggable_allocator", pluggable_allocator)
    for slot in (3, 3, 4):
        route = PoolRoute(slot, [0])
        route.begin()
        route.end()
    library = str(_torch.LIBRARY)
    assert made == [
        (library, f"cumempool_malloc_{slot}", f"cumempool_free_{slot}") for slot in (3, 4)
    ]
    assert [slot for _, slot in fake.made] == [made[0], made[0], made[1]]


# ---- expandable segments


class FakeSettings:
    """The allocator settings of the process: a text, and what it switches on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: str, version: tuple[int, int]):
        self.text = text
        self.applied: list[str] = []
        self.reads = 0
        monkeypatch.setattr(_torch.runtime, "torch_version", lambda: version)
        monkeypatch.setattr(_torch.settings, "live_settings", self.read)
        monkeypatch.setattr(_torch.settings, "_apply_settings", self.apply)

    def read(self) -> dict[str, Any]:
        self.reads += 1
        expandable = "expandable_segments:True" in self.text.replace(" ", "")
        return {"PYTORCH_CUDA_ALLOC_CONF": self.text, "expandable_segments": expandable}

    def apply(self, text: str) -> None:
        self.applied.append(text)
        self.text = text


@pytest.fixture(autouse=True)
def no_scope_is_left_open() -> Iterator[None]:
    yield
    assert (ExpandableSegmentsOff._open, ExpandableSegmentsOff._before) == (0, None)


USER = "max_split_size_mb:64,expandable_segments:True,roundup_power2_divisions:[256:1,512:2,>:8]"
OURS = "max_split_size_mb:64,roundup_power2_divisions:[256:1,512:2,>:8],expandable_segments:False"


def test_expandable_segments_are_off_inside_and_back_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = FakeSettings(monkeypatch, USER, (2, 9))
    with ExpandableSegmentsOff():
        assert settings.text == OURS  # every other option of the user survives (R11)
    assert settings.text == USER
    assert settings.applied == [OURS, USER]


def test_nested_scopes_restore_at_the_last_end_only(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = FakeSettings(monkeypatch, USER, (2, 9))
    with ExpandableSegmentsOff():
        with ExpandableSegmentsOff():
            assert settings.text == OURS
        assert settings.text == OURS
    assert settings.text == USER
    assert settings.applied == [OURS, USER]


def test_scopes_that_end_out_of_order_restore_at_the_last_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = FakeSettings(monkeypatch, USER, (2, 9))
    first, second = ExpandableSegmentsOff(), ExpandableSegmentsOff()
    first.begin()
    second.begin()
    first.end()
    assert settings.text == OURS
    second.end()
    assert settings.text == USER


def test_an_exception_in_the_scope_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = FakeSettings(monkeypatch, USER, (2, 9))
    with pytest.raises(KeyError), ExpandableSegmentsOff():
        raise KeyError
    assert settings.text == USER


def test_what_somebody_sets_in_between_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = FakeSettings(monkeypatch, USER, (2, 9))
    with ExpandableSegmentsOff():
        settings.text = "garbage_collection_threshold:0.8"
    assert settings.text == "garbage_collection_threshold:0.8"
    assert settings.applied == [OURS]


def test_expandable_segments_switched_on_inside_are_off_in_the_next_scope(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = FakeSettings(monkeypatch, "", (2, 9))
    with ExpandableSegmentsOff():
        settings.text = "expandable_segments:True"
        with ExpandableSegmentsOff():
            assert settings.text == "expandable_segments:False"
    assert settings.text == "expandable_segments:True"


@pytest.mark.parametrize("text", ["", "max_split_size_mb:64", "expandable_segments:False"])
def test_nothing_is_applied_where_they_are_off_already(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    settings = FakeSettings(monkeypatch, text, (2, 9))
    with ExpandableSegmentsOff():
        pass
    assert settings.applied == []


@pytest.mark.parametrize("version", [(2, 11), (2, 13), (3, 0)])
def test_nothing_is_touched_where_torch_needs_nothing(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]
) -> None:
    settings = FakeSettings(monkeypatch, USER, version)
    with ExpandableSegmentsOff():
        assert settings.text == USER
    assert (settings.applied, settings.reads) == ([], 0)


def test_a_route_switches_them_off_before_the_first_pool_and_back_after_the_last(
    fake: FakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = FakeSettings(monkeypatch, USER, (2, 9))
    during = []
    make = fake.make_pool
    monkeypatch.setattr(
        torch.cuda, "MemPool", lambda slot: (during.append(settings.text), make(slot))[1]
    )
    route = PoolRoute(1, [0])
    route.begin()
    route.end()
    assert during == [OURS]
    assert settings.text == USER


def test_settings_that_cannot_be_read_leave_no_scope_counted(
    fake: FakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = FakeSettings(monkeypatch, USER, (2, 9))

    def fail() -> dict[str, Any]:
        raise RuntimeError("no settings")

    monkeypatch.setattr(_torch.settings, "live_settings", fail)
    with pytest.raises(RuntimeError, match="no settings"):
        PoolRoute(1, [0]).begin()
    assert ExpandableSegmentsOff._open == 0
    monkeypatch.setattr(_torch.settings, "live_settings", settings.read)
    route = PoolRoute(1, [0])
    route.begin()
    assert settings.text == OURS
    route.end()
    assert settings.text == USER


def test_a_route_that_fails_to_begin_puts_them_back(
    fake: FakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = FakeSettings(monkeypatch, USER, (2, 9))
    fake.failing.add(f"{BEGIN} 0 (0, 1)")
    with pytest.raises(RuntimeError, match="failed"):
        PoolRoute(1, [0]).begin()
    assert fake.counts[0, 1] == 0
    assert settings.text == USER


@pytest.mark.parametrize("setter", ["_accelerator_setAllocatorSettings", "old"])
def test_settings_are_applied_through_what_this_torch_has(
    monkeypatch: pytest.MonkeyPatch, setter: str
) -> None:
    applied: list[str] = []
    old = "_cuda_cudaCachingAllocator_set_allocator_settings"
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings", raising=False)
    monkeypatch.setattr(torch._C, old if setter == "old" else setter, applied.append, raising=False)
    _torch.settings._apply_settings("a:1")
    assert applied == ["a:1"]


# ---- settings strings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "x:1"),
        ("x:2", "x:1"),
        (" x : 2 ", "x:1"),
        ("a:1,x:2,b:3", "a:1,b:3,x:1"),
        ("x:2,x:3", "x:1"),
        ("a:[k:1,x:2],b:3", "a:[k:1,x:2],b:3,x:1"),
        ("a:1,,b:2,", "a:1,b:2,x:1"),
        ("xx:2,ax:3", "xx:2,ax:3,x:1"),
    ],
)
def test_replace_setting_changes_one_option_and_keeps_the_others(text: str, expected: str) -> None:
    assert replace_setting(text, "x", "1") == expected


# ---- what torch has cached


def test_dead_ranges_are_the_free_blocks_of_custom_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """R9."""
    blocks = [
        {"address": 100, "size": 10, "state": "active_allocated"},
        {"address": 110, "size": 20, "state": "inactive"},
        {"address": 130, "size": 5, "state": "active_pending_free"},
        {"address": 135, "size": 7, "state": "inactive"},
    ]
    segments = [
        {"segment_pool_id": (0, 0), "blocks": blocks},
        {"segment_pool_id": (0, 3), "blocks": blocks},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)  # as of an older torch
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(_torch.runtime, "is_initialized", lambda: False)
    assert _torch.dead_ranges() == []
    monkeypatch.setattr(_torch.runtime, "is_initialized", lambda: True)
    assert _torch.dead_ranges() == [(110, 20), (135, 7)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what happens without a GPU")
def test_without_cuda_nothing_is_current_cached_or_started() -> None:
    assert not _torch.is_initialized()
    assert (_torch.current_streams(), _torch.dead_ranges()) == ([], [])
    _torch.empty_cache()
    assert not torch.cuda.is_initialized()
