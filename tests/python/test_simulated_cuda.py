"""What the allocator does with torch on `cuda`: its own slots and memory, fakes for CUDA."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import GRANULE, MIB, assert_nothing_is_held, random_bytes, slots_left
from interrupting import InterruptAt
from refusals import refuses
from simulated_cuda import UUIDS, SimulatedCuda
from test_torch_route import FakePool

from cumempool import (
    CuMemAllocator,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    OutOfMemoryError,
    OutOfSlotsError,
    UnavailableError,
    UnknownTagError,
    UnsupportedError,
    _core,
    _torch,
    open_shared,
)
from cumempool._pool.scope import current_scope
from cumempool.sharing import importer as sharing

USED, FREE = "active_allocated", "inactive"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedCuda]:
    """Two devices of 64 MiB; afterwards nothing may be held, and no pool be counted."""
    monkeypatch.setattr(sharing, "_drivers", {})
    cuda = SimulatedCuda(monkeypatch)
    yield cuda
    assert not cuda.routes
    cuda.drop_tensors()
    gc.collect()
    for allocator in cuda.allocators:
        allocator.close()
        assert_nothing_is_held(allocator.stats())
    assert cuda.destroyed == []
    counts = {count for pool, count in cuda.counts.items() if pool not in cuda.idle()}
    assert counts <= {0}, "a pool keeps a count, or was released twice"


@pytest.fixture
def alloc(cuda: SimulatedCuda) -> CuMemAllocator:
    return cuda.make_allocator()


def scopes_left(alloc: CuMemAllocator) -> int:
    """How many scopes can be open at this moment."""
    with ExitStack() as stack:
        for count in range(_core.slot_count()):
            try:
                stack.enter_context(alloc.use_memory_pool("many"))
            except OutOfSlotsError:
                return count
    return _core.slot_count()


# ---- scopes


def test_a_scope_is_for_the_current_device_and_every_other_in_use(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    with alloc.use_memory_pool("a") as scope:
        assert scope.devices == [0]
    cuda.contexts.add(1)
    with alloc.use_memory_pool("a") as scope, torch.cuda.device(1):
        assert scope.devices == [0, 1]
        address = cuda.allocate(GRANULE)
    (info,) = alloc.snapshot()
    assert (info.address, info.tag, info.device) == (address, "a", 1)


def test_a_scope_that_torch_cannot_route_is_not_entered(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    cuda.failing.add("beginAllocateCurrentThreadToPool 0 (0, 1)")
    with pytest.raises(RuntimeError, match="beginAllocate"), alloc.use_memory_pool("a"):
        pytest.fail("entered")
    assert scopes_left(alloc) == _core.slot_count()
    alloc.sleep(tags="a")  # which an open scope of it would refuse


def test_a_scope_whose_end_torch_refuses_is_left_all_the_same(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    cuda.failing.add("endAllocateToPool 0 (0, 1)")
    with pytest.raises(RuntimeError, match="endAllocate"), alloc.use_memory_pool("a"):
        address = alloc.empty(1).data_ptr()
    assert address
    assert scopes_left(alloc) == _core.slot_count()
    alloc.sleep(tags="a")
    cuda.failing.clear()
    cuda.routes.clear()
    for _ in range(2):  # the counts that the end would have given up
        torch._C._cuda_releasePool(0, (0, 1))


def test_unused_segments_are_with_the_driver_when_the_scope_is_left(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    """R10."""
    with alloc.use_memory_pool("a"):
        cuda.allocate(2 * GRANULE, FREE, FREE)
        kept = cuda.allocate(2 * GRANULE, USED, FREE)
    assert [info.address for info in alloc.snapshot()] == [kept]


def test_segments_whose_tensors_died_after_the_scope_are_not_put_to_sleep(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    """R10: the sleep has torch give them back first."""
    with alloc.use_memory_pool("a"):
        cuda.allocate(2 * GRANULE)
    cuda.drop_tensors()
    report = alloc.sleep(tags="a")
    assert (report.bytes_freed, report.bytes_backed_up) == (0, 0)
    assert alloc.snapshot() == []


# ---- what torch has cached


def test_blocks_that_torch_has_cached_as_free_are_not_copied(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    """R9."""
    with alloc.use_memory_pool("a"):
        cuda.allocate(3 * GRANULE, USED, FREE, USED)
    report = alloc.sleep(tags="a")
    assert (report.bytes_backed_up, report.bytes_discarded) == (2 * GRANULE, GRANULE)
    assert alloc.wake_up().bytes_restored == 2 * GRANULE


def test_what_is_preserved_in_a_discarded_tag_is_copied_without_what_is_cached(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    with alloc.use_memory_pool("kv", on_sleep="discard"):
        cuda.allocate(GRANULE)
        with alloc.preserve_contents():
            kept = cuda.allocate(2 * GRANULE, USED, FREE)
    assert [info.address for info in alloc.snapshot() if info.preserved] == [kept]
    report = alloc.discard("kv")
    assert (report.bytes_backed_up, report.bytes_discarded) == (GRANULE, 2 * GRANULE)
    assert alloc.wake_up().bytes_restored == GRANULE


def test_where_all_is_discarded_torch_is_not_asked_what_it_has_cached(
    cuda: SimulatedCuda, alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = alloc.empty(GRANULE, dtype=torch.uint8, tag="kv")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: pytest.fail("was asked"))
    assert alloc.discard("kv").bytes_discarded == GRANULE
    alloc.wake_up()
    del tensor


def test_a_snapshot_says_what_torch_has_cached_of_each_allocation(
    cuda: SimulatedCuda, alloc: CuMemAllocator, tmp_path: Path
) -> None:
    with alloc.use_memory_pool("a"):
        cuda.allocate(3 * GRANULE, FREE, USED, FREE)
        cuda.allocate(GRANULE)
    alloc.save_snapshot(tmp_path / "snapshot.json")
    rows = json.loads((tmp_path / "snapshot.json").read_text())["allocations"]
    assert [row["cached_bytes"] for row in rows] == [2 * GRANULE, 0]


def test_a_wake_without_room_has_torch_give_back_what_it_has_cached(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    with alloc.use_memory_pool("a"):
        cuda.allocate(40 * MIB)
    alloc.sleep(tags="a")
    with alloc.use_memory_pool("b"):
        cuda.allocate(40 * MIB)
    with pytest.raises(OutOfMemoryError):
        alloc.wake_up("a")
    assert alloc.stats().tags["a"].backed_up_bytes == 40 * MIB
    cuda.drop_tensors()
    cuda.segments[0]["blocks"][0]["state"] = USED  # of `a`, which sleeps
    assert alloc.wake_up("a").bytes_restored == 40 * MIB
    assert [info.tag for info in alloc.snapshot()] == ["a"]


def test_a_tensor_that_finds_no_room_has_torch_give_back_what_it_has_cached(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    with alloc.use_memory_pool("a"):
        cuda.allocate(40 * MIB)
    with pytest.raises(OutOfMemoryError):
        alloc.empty(40 * MIB, dtype=torch.uint8)
    cuda.drop_tensors()
    assert alloc.empty(40 * MIB, dtype=torch.uint8).numel() == 40 * MIB


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before 3.11")
def test_out_of_memory_in_a_scope_says_what_torch_has_cached_outside(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    cuda.cached_outside = 5 * MIB
    with pytest.raises(torch.OutOfMemoryError) as caught, alloc.use_memory_pool("a"):
        cuda.allocate(100 * MIB)
    reason, cached = caught.value.__notes__
    assert "CUDA_ERROR_OUT_OF_MEMORY" in reason
    assert "5.00 MiB cached outside the pool" in cached
    assert "empty_cache" in cached
    cuda.cached_outside = 0
    with pytest.raises(torch.OutOfMemoryError) as caught, alloc.use_memory_pool("a"):
        cuda.allocate(100 * MIB)
    assert len(caught.value.__notes__) == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before 3.11")
def test_out_of_memory_in_a_scope_says_what_is_free_inside_and_what_helps(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    def replace() -> None:
        cuda.allocate(20 * MIB, *[FREE] * (20 * MIB // GRANULE))
        cuda.allocate(60 * MIB)

    with pytest.raises(torch.OutOfMemoryError) as caught, alloc.use_memory_pool("a"):
        replace()
    _, inside = caught.value.__notes__
    assert "20.00 MiB are free in segments of the scope's pool" in inside
    assert "adopt()" in inside
    assert alloc.snapshot() == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before 3.11")
def test_out_of_memory_by_the_limit_of_torch_says_what_it_counts_of_what_sleeps(
    cuda: SimulatedCuda, alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5)
    with alloc.use_memory_pool("a"):
        cuda.allocate(20 * MIB)
    for asleep in (False, True):
        with pytest.raises(torch.OutOfMemoryError) as caught, alloc.use_memory_pool("b"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        notes = getattr(caught.value, "__notes__", [])
        assert len(notes) == asleep
        if asleep:
            assert "50% of device 0" in notes[0]
            assert "20.00 MiB" in notes[0]
        alloc.sleep(tags="a")


@pytest.mark.parametrize("backend", ["pluggable", "cudaMallocAsync"])
def test_with_another_allocator_scopes_are_refused_by_name_and_exact_tensors_work(
    cuda: SimulatedCuda, alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    cuda.backend = backend
    unsupported = Mock(side_effect=RuntimeError("does not support it"))
    for name in ("memory_snapshot", "memory_stats_as_nested_dict", "memory_reserved", "MemPool"):
        monkeypatch.setattr(torch.cuda, name, unsupported)
    with (
        refuses(UnavailableError, names=backend, operation="use_memory_pool"),
        alloc.use_memory_pool("a"),
    ):
        pytest.fail("entered")
    with refuses(UnavailableError, names=backend):
        alloc.graph_pool("a")
    assert slots_left(alloc) == _core.slot_count()
    tensor = alloc.empty(GRANULE, dtype=torch.uint8, tag="a").fill_(7)
    assert alloc.sleep(tags="a").bytes_backed_up == GRANULE
    alloc.wake_up()
    assert tensor.eq(7).all()
    alloc.discard("a")
    alloc.wake_up()
    alloc.release_graph_pool("a")
    unsupported.assert_not_called()


def test_a_sleep_asks_torch_once_and_not_for_its_history(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    with alloc.use_memory_pool("a"):
        cuda.allocate(2 * GRANULE, USED, FREE)
    cuda.snapshots.clear()
    assert alloc.sleep(tags="a").bytes_backed_up == GRANULE
    assert cuda.snapshots == [None]


def test_scopes_in_a_loop_leave_nothing_behind(cuda: SimulatedCuda, alloc: CuMemAllocator) -> None:
    def pools() -> int:
        return sum(type(each) is FakePool for each in gc.get_objects())

    before = pools()
    for _ in range(200):
        with alloc.use_memory_pool("empty"):
            pass
        with alloc.use_memory_pool("used"):
            cuda.allocate(GRANULE)
        cuda.drop_tensors()
    assert len(cuda.made) <= 202
    assert len(cuda.idle()) <= 2
    assert len(cuda.segments) <= 1
    assert pools() <= before + 2
    assert all(count == 0 for pool, count in cuda.counts.items() if pool not in cuda.idle())


# ---- devices


def test_devices_are_those_of_cuda(cuda: SimulatedCuda, alloc: CuMemAllocator) -> None:
    given: list[tuple[Any, int]] = [
        (None, 0),
        (1, 1),
        ("cuda", 0),
        ("cuda:1", 1),
        (torch.device("cuda", 1), 1),
    ]
    for device, ordinal in given:
        assert alloc.allocation_of(alloc.empty(1, device=device)).device == ordinal
    with torch.cuda.device(1):
        for device in (None, "cuda"):
            assert alloc.allocation_of(alloc.empty(1, device=device)).device == 1
        assert alloc.allocation_of(alloc.empty(1, device="cuda:0")).device == 0


@pytest.mark.extensive
@pytest.mark.parametrize(
    ("device", "names"),
    [
        ("cpu", "cpu"),
        ("cuda:7", ("device 7", "has 2")),
        (7, ("device 7", "has 2")),
        ("gpu", "'gpu'"),
    ],
)
def test_a_device_that_cuda_does_not_have_is_refused(
    cuda: SimulatedCuda, alloc: CuMemAllocator, device: Any, names: str | tuple[str, ...]
) -> None:
    with refuses(InvalidArgumentError, names=names):
        alloc.empty(1, device=device)


def test_a_module_on_the_cpu_is_not_adopted(cuda: SimulatedCuda, alloc: CuMemAllocator) -> None:
    with refuses(InvalidTypeError, names=("'weight'", "cpu"), operation="adopt"):
        alloc.adopt(torch.nn.Linear(2, 2))
    assert alloc.snapshot() == []


def test_state_of_an_optimizer_on_the_cpu_stays_there(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    optimizer = torch.optim.Adam([parameter])
    assert alloc.adopt(optimizer) == 0
    optimizer.step()
    assert alloc.snapshot() == []
    assert optimizer.state[parameter]["exp_avg"].device == torch.device("cpu")


# ---- marks


def test_transitions_are_ranges_of_a_profiler(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    @contextmanager
    def mark(name: str) -> Iterator[None]:
        steps.append(f"begin {name}")
        try:
            yield
        finally:
            steps.append(f"end {name}")

    monkeypatch.setattr(torch.cuda.nvtx, "range", mark)
    alloc = cuda.make_allocator(nvtx=True)
    tensor = alloc.empty(1, tag="a")
    alloc.register_hooks("a", before_unmap=lambda tag, ranges: steps.append("hook"))
    alloc.sleep(tags="a")
    with pytest.raises(UnknownTagError):
        alloc.wake_up("nobody")
    assert steps == [
        "begin cumempool.sleep",
        "hook",
        "end cumempool.sleep",
        "begin cumempool.wake_up",
        "end cumempool.wake_up",
    ]
    del tensor


# ---- graph pools


def test_cublas_makes_its_workspace_for_captures_before_and_in_ordinary_memory(
    cuda: SimulatedCuda, alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory of a graph it would sleep with that graph's tag, while others need it."""
    streams: list[SimpleNamespace] = []
    current: list[SimpleNamespace] = []
    products: list[tuple[SimpleNamespace, int]] = []  # the stream, and how many pools there were

    @contextmanager
    def on(stream: SimpleNamespace) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def make() -> SimpleNamespace:
        streams.append(SimpleNamespace(device=torch.device("cpu", cuda.device)))
        return streams[-1]

    multiply = torch.mm

    def noted(*matrices: torch.Tensor) -> torch.Tensor:
        products.append((current[-1], len(cuda.made)))
        return multiply(*matrices)

    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch, "mm", noted)
    with alloc.use_memory_pool("a", devices=[0]):  # where it would be memory of that tag
        alloc.graph_pool("in a scope")
    cuda.capturing = True
    alloc.graph_pool("in a capture")
    cuda.capturing = False
    assert (streams, products) == ([], [])
    alloc.graph_pool("first")
    alloc.graph_pool("second")
    alloc.graph_pool("second", device=1)  # which the stream is not on
    (stream,) = streams
    assert torch.cuda.graph.default_capture_stream is stream
    assert products == [(stream, 3), (stream, 4)]


@pytest.mark.parametrize("operation", ["sleep", "swap"])
def test_what_a_scope_took_after_the_unused_ranges_were_read_is_backed_up(
    cuda: SimulatedCuda, alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    with alloc.use_memory_pool("a"):
        address = cuda.allocate(2 * GRANULE, USED, FREE)
    read = _torch.settled_dead_ranges

    def read_and_lose_time(live: Any) -> list[tuple[int, int]]:
        ranges = read(live)
        with alloc.use_memory_pool("a"):  # torch would hand the unused block out in here
            pass
        return ranges

    monkeypatch.setattr(_torch, "settled_dead_ranges", read_and_lose_time)
    act = {"sleep": lambda: alloc.sleep(tags="a"), "swap": lambda: alloc.swap(sleep="a", wake=())}
    assert act[operation]().bytes_backed_up == 2 * GRANULE
    alloc.wake_up()
    monkeypatch.setattr(_torch, "settled_dead_ranges", read)
    assert act[operation]().bytes_backed_up == GRANULE
    alloc.wake_up()
    assert alloc.snapshot()[0].address == address


@pytest.fixture
def graphs(
    cuda: SimulatedCuda, alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    """The graph pool of a tag, with a segment in it that is not used at this moment."""
    monkeypatch.setattr(_torch, "warm_capture_stream", lambda device: None)
    pool = alloc.graph_pool("graphs")
    cuda.allocate(GRANULE, FREE, pool=pool)
    return pool


def test_memory_of_graphs_sleeps_with_its_tag(
    cuda: SimulatedCuda, alloc: CuMemAllocator, graphs: tuple[int, int]
) -> None:
    cuda.counts[graphs] += 1  # a graph that was captured into it
    cuda.segments[0]["blocks"][0]["state"] = USED
    assert alloc.sleep(tags="graphs").bytes_backed_up == GRANULE
    with refuses(InUseError, names="asleep", operation="graph_pool", tag="graphs"):
        alloc.graph_pool("graphs")
    assert alloc.wake_up().bytes_restored == GRANULE
    assert alloc.graph_pool("graphs") == graphs
    cuda.counts[graphs] -= 1


def test_memory_that_a_graph_uses_is_kept_where_torch_has_it_as_free(
    cuda: SimulatedCuda, alloc: CuMemAllocator, graphs: tuple[int, int]
) -> None:
    """R9: a graph reads at each replay what was written once, whoever holds a tensor over it."""
    cuda.allocate(GRANULE, USED, pool=graphs)
    cuda.counts[graphs] += 1
    with alloc.use_memory_pool("weights"):
        cuda.allocate(3 * GRANULE, USED, FREE, USED)
    report = alloc.sleep()
    assert report.tags["graphs"].bytes_backed_up == 2 * GRANULE
    assert report.tags["weights"].bytes_backed_up == 2 * GRANULE
    alloc.wake_up()
    alloc.release_graph_pool("graphs")  # the graph lives on, and is replayed
    assert alloc.sleep(tags="graphs").bytes_backed_up == 2 * GRANULE
    alloc.wake_up()
    cuda.counts[graphs] -= 1


def test_a_graph_pool_is_released_on_the_device_that_is_named(
    cuda: SimulatedCuda, alloc: CuMemAllocator, graphs: tuple[int, int]
) -> None:
    other = alloc.graph_pool("graphs", device="cuda:1")
    assert other != graphs
    assert alloc.release_graph_pool("graphs", device=1) == 1
    assert alloc.graph_pool("graphs") == graphs
    assert alloc.release_graph_pool("graphs") == 1
    assert alloc.snapshot() == []


def test_close_releases_graph_pools_in_which_no_graph_lives(
    cuda: SimulatedCuda, alloc: CuMemAllocator, graphs: tuple[int, int]
) -> None:
    alloc.close()
    assert cuda.counts[graphs] == 0
    assert_nothing_is_held(alloc.stats())


@pytest.mark.parametrize("what", ["a graph", "a tensor", "a scope"])
def test_a_refused_close_leaves_the_graph_pools_as_they_are(
    cuda: SimulatedCuda, alloc: CuMemAllocator, graphs: tuple[int, int], what: str
) -> None:
    tensor = alloc.empty(1) if what == "a tensor" else None
    scope = alloc.use_memory_pool("a")
    if what == "a scope":
        scope.__enter__()
    cuda.counts[graphs] += what == "a graph"
    with refuses(InUseError, operation="close"):
        alloc.close()
    assert alloc.graph_pool("graphs") == graphs
    assert [info.tag for info in alloc.snapshot() if info.tag == "graphs"] == ["graphs"]
    cuda.counts[graphs] -= what == "a graph"
    scope.__exit__(None, None, None)
    del tensor


def test_closing_by_force_releases_graph_pools_whose_graphs_live(
    cuda: SimulatedCuda, alloc: CuMemAllocator, graphs: tuple[int, int]
) -> None:
    cuda.counts[graphs] += 1
    alloc.close(force=True)
    assert cuda.counts[graphs] == 1
    assert alloc.stats().physical_bytes == 0
    cuda.counts[graphs] -= 1  # the graph goes


# ---- a wake in the background


class OnDevice(torch.Tensor):
    """A tensor that says that it is on a CUDA device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = True
    device = torch.device("cuda", 0)


def test_waiting_for_a_tensor_is_left_to_the_current_stream(
    cuda: SimulatedCuda, alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def current_stream(device: Any = None) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(cuda_stream=0)

    tensor = alloc.empty(GRANULE, dtype=torch.uint8, tag="a")
    tensor.copy_(random_bytes(GRANULE))
    alloc.sleep(tags="a")
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    handle = alloc.wake_up(blocking=False)
    asked.clear()
    handle.wait(torch.Tensor._make_subclass(OnDevice, tensor))
    assert asked == [torch.device("cuda", 0)]
    assert handle.result().bytes_restored == GRANULE
    assert torch.equal(tensor, random_bytes(GRANULE))


def test_a_tensor_that_is_on_no_cuda_device_is_not_waited_for(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    handle = alloc.wake_up(blocking=False)
    with refuses(NotInPoolError, names="cpu"):
        handle.wait(torch.ones(1))
    handle.wait(torch.ones(0))
    handle.result()


# ---- sharing


def test_what_is_shared_names_its_device_by_uuid(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    """Ordinals depend on CUDA_VISIBLE_DEVICES, which differs between processes."""
    tensor = alloc.empty(8, dtype=torch.uint8, device="cuda:1").fill_(7)
    memory = alloc.share(tensor)
    assert [part.device for part in memory.ranges] == [UUIDS[1]]
    for device in (None, 0, "cuda", torch.device("cuda:1")):
        opened = open_shared(memory, device=device)
        assert isinstance(opened, torch.Tensor)
        assert opened.tolist() == [7] * 8
        del opened


@pytest.mark.extensive
@pytest.mark.parametrize(
    ("device", "names"),
    [
        ("cpu", "cpu"),
        ("cuda:7", ("device 7", "has 2")),
        (-1, "device -1"),
        ("nonsense", "'nonsense'"),
    ],
)
def test_shared_memory_is_not_opened_on_a_device_that_is_not_there(
    cuda: SimulatedCuda, alloc: CuMemAllocator, device: Any, names: str | tuple[str, ...]
) -> None:
    tensor = alloc.empty(8, tag="kv")
    memory = alloc.share(tensor)
    with refuses(InvalidArgumentError, names=names):
        open_shared(memory, device=device)
    assert alloc.stats().tags["kv"].pins == 0
    del tensor


def test_a_device_that_cannot_reach_the_memory_is_refused_by_name(
    cuda: SimulatedCuda, alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = alloc.empty(8, device=1, tag="kv").fill_(3)
    memory = alloc.share(tensor)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: False)
    with refuses(UnsupportedError, names="device 1", operation="open_shared", device=0):
        open_shared(memory, device=0)
    assert alloc.stats().tags["kv"].pins == 0
    opened = open_shared(memory, device=1)
    assert isinstance(opened, torch.Tensor)
    assert opened.tolist() == [3.0] * 8


def test_a_gpu_that_is_not_visible_here_has_to_be_named(
    cuda: SimulatedCuda, alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = alloc.empty(8, device=1, tag="kv").fill_(3)
    memory = alloc.share(tensor)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with refuses(InvalidArgumentError, names=(UUIDS[1], "`device`")):
        open_shared(memory)
    opened = open_shared(memory, device=0)
    assert isinstance(opened, torch.Tensor)
    assert opened.tolist() == [3.0] * 8


def test_an_interrupt_at_any_moment_of_an_entry_leaves_no_scope_open(
    cuda: SimulatedCuda, alloc: CuMemAllocator
) -> None:
    def strikes_in(file: str) -> bool:
        return file.endswith("/_pool/scope.py") or "/cumempool/_torch/" in file

    moment, done = 0, False
    while not done:
        moment += 1
        scope = alloc.use_memory_pool("a", devices=[0])
        interrupt = InterruptAt(moment, strikes_in)
        done = interrupt.run(scope.__enter__)
        if done:
            scope.__exit__(None, None, None)
        assert not cuda.routes, interrupt.where
        assert current_scope(alloc._state) is None, interrupt.where
        assert slots_left(alloc) == _core.slot_count(), interrupt.where
    assert moment > 20
    for pool in cuda.counts.keys() - cuda.idle():
        cuda.counts[pool] = 0  # a pool of torch that was being made when it struck
