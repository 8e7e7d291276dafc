"""`graph_pool`: pools for captures of CUDA graphs, with fakes in place of torch's CUDA parts."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from conftest import GRANULE, slots_left
from refusals import refuses
from test_torch_route import FakeTorch

from cumempool import (
    CuMemAllocator,
    CuMemConfig,
    InUseError,
    OutOfSlotsError,
    UnsupportedError,
    _core,
    _torch,
)
from cumempool._pool import graph_pool
from cumempool._pool.graph_pool import GraphPools


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTorch]:
    monkeypatch.setattr(_torch.runtime, "torch_version", lambda: (2, 11))
    monkeypatch.setattr(_torch, "warm_capture_stream", lambda device: None)
    fake = FakeTorch(monkeypatch)
    yield fake
    gc.collect()
    assert fake.destroyed == []
    assert set(fake.counts.values()) <= {0}, "a pool keeps a count, or was released twice"


@pytest.fixture
def pools(alloc: CuMemAllocator) -> Iterator[GraphPools]:
    """The graph pools of an allocator that knows two tags; no slot may be left."""
    alloc.use_memory_pool("graphs")
    alloc.use_memory_pool("others")
    pools = alloc._state.graph_pools
    yield pools
    assert len(pools) == 0


def capture(fake: FakeTorch, pool: tuple[int, int]) -> None:
    """A graph comes to life that was captured into a pool."""
    fake.counts[pool] += 1


def delete_graph(fake: FakeTorch, pool: tuple[int, int]) -> None:
    fake.counts[pool] -= 1


def segment_of(alloc: CuMemAllocator, fake: FakeTorch, pool: int, state: str) -> int:
    """Lets torch hold an allocation of the tag as a segment of a pool; its address."""
    address = alloc._core.malloc("graphs", 0, GRANULE)
    fake.hold(pool, state)
    fake.segments[-1]["address"] = address
    return address


def test_the_host_driver_has_no_graphs(alloc: CuMemAllocator) -> None:
    with refuses(UnsupportedError, operation="graph_pool", tag="graphs"):
        alloc.graph_pool("graphs")
    assert alloc.release_graph_pool("graphs") == 0


def test_one_pool_per_tag_and_device_that_holds_a_slot(
    alloc: CuMemAllocator, fake: FakeTorch, pools: GraphPools
) -> None:
    before = slots_left(alloc)
    first = pools.open("graphs", 0)
    assert pools.open("graphs", 0) == first
    assert pools.open("graphs", 1) != first
    assert pools.open("others", 0) not in (first, pools.open("graphs", 1))
    assert [device for device, _ in fake.made] == [0, 1, 0]
    assert len({slot for _, slot in fake.made}) == 3
    assert slots_left(alloc) == before - 3
    assert pools.release("graphs", 1) == 1
    assert pools.release("graphs", 1) == 0
    assert pools.release("graphs", None) == 1
    assert pools.release_all() == 1
    assert slots_left(alloc) == before


def test_a_pool_whose_graphs_live_keeps_its_slot_until_they_are_gone(
    alloc: CuMemAllocator, fake: FakeTorch, pools: GraphPools
) -> None:
    """A slot that served others meanwhile would take what is captured into the old id."""
    before = slots_left(alloc)
    first = pools.open("graphs", 0)
    capture(fake, first)
    fake.hold(first[1], "inactive")
    pools.release("graphs", None)
    assert slots_left(alloc) == before - 1
    assert "empty_cache" not in fake.events  # which would free nothing of it
    second = pools.open("graphs", 0)
    assert second != first
    delete_graph(fake, first)
    pools.reap()
    assert slots_left(alloc) == before - 1
    _torch.return_unused()
    assert fake.segments == []
    pools.release_all()


def test_unused_segments_go_back_when_a_pool_is_released(
    fake: FakeTorch, pools: GraphPools
) -> None:
    """R10."""
    pool = pools.open("graphs", 0)
    fake.hold(pool[1], "inactive")
    fake.hold(pool[1], "active_allocated", "inactive")
    pools.release_all()
    assert fake.events[-1] == "empty_cache"
    assert len(fake.segments) == 1


def test_a_pool_that_torch_has_forgotten_gives_its_slot_back(
    alloc: CuMemAllocator, fake: FakeTorch, pools: GraphPools
) -> None:
    """The last graph is deleted and torch's cache emptied before anybody asks."""
    before = slots_left(alloc)
    pool = pools.open("graphs", 0)
    capture(fake, pool)
    fake.hold(pool[1], "active_allocated")
    pools.release_all()
    assert slots_left(alloc) == before - 1
    delete_graph(fake, pool)
    fake.segments[-1]["blocks"][0]["state"] = "inactive"
    torch.cuda.empty_cache()
    with pytest.raises(RuntimeError, match="INTERNAL ASSERT"):
        next(iter(pools._leaving))[1]._pool.use_count()
    pools.reap()
    assert len(pools) == 0
    assert slots_left(alloc) == before


def test_other_failures_of_torch_to_count_are_not_hidden(
    alloc: CuMemAllocator, fake: FakeTorch, pools: GraphPools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools.open("graphs", 0)
    private = next(iter(pools._pools.values()))[1]

    def fail() -> int:
        raise RuntimeError("no CUDA device")

    with monkeypatch.context() as patch:
        patch.setattr(private._pool, "use_count", fail)
        with pytest.raises(RuntimeError, match="no CUDA device"):
            private.users()
    assert private.users() == 1
    pools.release_all()


def test_a_pool_with_memory_asleep_is_not_handed_out(
    alloc: CuMemAllocator, fake: FakeTorch, pools: GraphPools
) -> None:
    pool = pools.open("graphs", 0)
    address = segment_of(alloc, fake, pool[1], "active_allocated")
    alloc.sleep(tags="graphs")
    with refuses(InUseError, operation="graph_pool", tag="graphs"):
        pools.open("graphs", 0)
    assert pools.open("others", 0) != pool
    alloc.wake_up()
    assert pools.open("graphs", 0) == pool
    _core.free(address)
    fake.segments.clear()
    pools.release_all()


def test_other_memory_of_the_tag_may_sleep(
    alloc: CuMemAllocator, fake: FakeTorch, pools: GraphPools
) -> None:
    tensor = alloc.empty(1, tag="graphs")
    pool = pools.open("graphs", 0)
    alloc.sleep(tags="graphs")
    assert pools.open("graphs", 0) == pool
    alloc.wake_up()
    pools.release_all()
    assert alloc.tag_of(tensor) == "graphs"


def test_graph_memory_may_sleep_while_its_pool_is_open(
    alloc: CuMemAllocator, fake: FakeTorch, pools: GraphPools
) -> None:
    pool = pools.open("graphs", 0)
    address = segment_of(alloc, fake, pool[1], "active_allocated")
    assert alloc.sleep(tags="graphs").bytes_backed_up == GRANULE
    alloc.wake_up("graphs")
    _core.free(address)
    fake.segments.clear()
    pools.release_all()


def test_out_of_slots_leaves_no_pool_behind(
    alloc: CuMemAllocator, fake: FakeTorch, pools: GraphPools
) -> None:
    bound = [alloc._core.bind_slot("others") for _ in range(slots_left(alloc))]
    with pytest.raises(OutOfSlotsError):
        pools.open("graphs", 0)
    assert len(pools) == 0
    for slot in bound:
        _core.unbind_slot(slot)
    pools.open("graphs", 0)
    pools.release_all()


def test_a_pool_that_torch_does_not_make_costs_no_slot(
    alloc: CuMemAllocator,
    fake: FakeTorch,
    pools: GraphPools,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(slot: object) -> object:
        raise RuntimeError("no pool")

    before = slots_left(alloc)
    monkeypatch.setattr(torch.cuda, "MemPool", fail)
    with pytest.raises(RuntimeError, match="no pool"):
        pools.open("graphs", 0)
    assert slots_left(alloc) == before


def test_expandable_segments_of_older_torch_are_refused(
    fake: FakeTorch, pools: GraphPools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_torch.runtime, "torch_version", lambda: (2, 9))
    monkeypatch.setattr(_torch.settings, "live_settings", lambda: {"expandable_segments": True})
    with refuses(
        UnsupportedError, names="expandable segments", operation="graph_pool", tag="graphs"
    ):
        pools.open("graphs", 0)
    assert fake.made == []


# ---- close


def test_close_releases_pools_that_nothing_is_captured_into(
    alloc: CuMemAllocator, fake: FakeTorch, pools: GraphPools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pools.open("graphs", 0)
    address = segment_of(alloc, fake, pool[1], "inactive")

    def empty_cache(*_: str) -> None:
        if fake.counts[pool] == 0 and fake.segments:
            fake.segments.clear()
            _core.free(address)

    monkeypatch.setattr("cumempool.allocator.empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    alloc.close()
    assert alloc.stats().reserved_address_bytes == 0


@pytest.mark.parametrize("why", ["a graph", "a released graph", "a tensor", "a scope"])
def test_a_refused_close_changes_no_pool(
    alloc: CuMemAllocator, fake: FakeTorch, pools: GraphPools, why: str
) -> None:
    pool = pools.open("graphs", 0)
    held = []
    scope = alloc.use_memory_pool("others")
    if why == "a tensor":
        held.append(alloc.empty(1, tag="others"))
    elif why == "a scope":
        scope.__enter__()
    else:
        capture(fake, pool)
    if why == "a released graph":
        pools.release_all()
    events = list(fake.events)
    holder = {"a tensor": "'others'", "a scope": "open scope"}.get(why, "1 graph pool")
    with refuses(InUseError, names=holder, operation="close"):
        alloc.close()
    assert fake.events == events
    if why != "a released graph":
        assert pools.open("graphs", 0) == pool
    held.clear()
    scope.__exit__(None, None, None)
    fake.counts[pool] -= "graph" in why
    alloc.close()


def test_close_by_force_releases_pools_and_keeps_slots_of_graphs_that_live(
    alloc: CuMemAllocator, fake: FakeTorch, pools: GraphPools
) -> None:
    pool = pools.open("graphs", 0)
    other = pools.open("others", 0)
    capture(fake, pool)
    alloc.close(force=True)
    assert fake.counts[other] == 0
    assert len(graph_pool._orphans) == 1
    alloc.close()  # twice is no error
    delete_graph(fake, pool)
    pools.reap()
    assert graph_pool._orphans == []


def test_an_allocator_that_is_dropped_gives_its_slots_back(fake: FakeTorch) -> None:
    allocator = CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=GRANULE))
    allocator.use_memory_pool("graphs")
    pools = allocator._state.graph_pools
    pool = pools.open("graphs", 0)
    capture(fake, pool)
    del allocator
    gc.collect()
    assert fake.counts[pool] == 1
    assert len(pools) == 0
    assert len(graph_pool._orphans) == 1
    delete_graph(fake, pool)
    pools.reap()
    assert graph_pool._orphans == []
