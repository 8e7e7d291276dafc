"""CUDA graphs whose memory sleeps and wakes with a tag (R5, R10, R14)."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from refusals import refuses

import cumempool
from cumempool import _core

pytestmark = pytest.mark.usefixtures("load")

MIB = 1 << 20
ELEMENTS = 8 * MIB  # of four bytes


def chain(x: torch.Tensor) -> torch.Tensor:
    """Some large intermediates, and a result that tells a lost one from a kept one."""
    a = x * 2
    b = torch.sin(a) + x
    return b * a - 1


def captured(
    pool: tuple[int, int], work: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    work(x)  # so that nothing is loaded during the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = work(x)
    return graph, out


def test_a_graph_replays_as_before_after_its_memory_slept(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, used: Callable[[], int]
) -> None:
    x = torch.linspace(0, 1, ELEMENTS, device=gpu)
    pool = allocator.graph_pool("graphs")
    assert allocator.graph_pool("graphs") == pool
    assert allocator.graph_pool("graphs", device=gpu) == pool
    graph, out = captured(pool, chain, x)
    assert allocator.tag_of(out) == "graphs"
    held = allocator.stats().tags["graphs"].awake_bytes
    assert held >= 2 * 4 * ELEMENTS
    addresses = [info.address for info in allocator.snapshot()]
    graph.replay()
    first = out.clone()
    assert torch.equal(first, chain(x))
    torch.cuda.empty_cache()
    for cycle in range(4):
        before = used()
        report = allocator.sleep(tags="graphs")
        assert report.bytes_freed == held
        assert report.bytes_backed_up == held  # also what torch has as free: the graph uses it
        assert before - used() >= held * 0.8  # a first sleep loads a kernel
        allocator.wake_up("graphs")
        if cycle == 0:
            assert torch.equal(out, first)  # what the last replay left is there, too
        x.add_(1)
        graph.replay()
        assert torch.equal(out, chain(x))
    assert [info.address for info in allocator.snapshot()] == addresses


@pytest.mark.parametrize("dropped", [False, True], ids=["held", "dropped"])
def test_a_state_that_no_replay_writes_is_kept_by_default(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, dropped: bool
) -> None:
    """As a counter of an engine, whose tensor may be long gone."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=allocator.graph_pool("graphs")):
        counter = torch.empty(1 << 20, device=gpu)
        counter.add_(1)
        shown = counter + 0
    counter.zero_()
    if dropped:
        del counter
    for _ in range(3):
        graph.replay()
    allocator.sleep()
    other = torch.full((1 << 28,), 77, dtype=torch.uint8, device=gpu)  # others have the pages
    torch.cuda.synchronize()
    del other
    torch.cuda.empty_cache()
    allocator.wake_up()
    for _ in range(2):
        graph.replay()
    assert float(shown.min()) == float(shown.max()) == 5


def test_discarded_graph_memory_is_made_again_by_the_replay(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    x = torch.linspace(0, 1, ELEMENTS, device=gpu)
    graph, out = captured(allocator.graph_pool("graphs"), chain, x)
    report = allocator.discard("graphs")
    assert report.bytes_backed_up == 0
    allocator.wake_up("graphs")
    graph.replay()
    assert torch.equal(out, chain(x))


def test_a_model_with_its_graphs_sleeps_and_computes_the_same(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    """As an inference engine has it: several captures, weights under a tag of their own."""
    torch.manual_seed(0)
    ones = torch.ones(64, 64, device=gpu)
    (ones @ ones).sum().item()  # the workspace of this stream lies outside of the pool
    with allocator.use_memory_pool("weights"), torch.no_grad():
        layers = [torch.randn(1024, 1024, device=gpu) / 32 for _ in range(4)]

    def forward(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = torch.relu(x @ layer)
        return x

    inputs = {size: torch.randn(size, 1024, device=gpu) for size in (1, 8, 64)}
    graphs = {}
    for size, x in inputs.items():
        graphs[size] = captured(allocator.graph_pool("graphs"), forward, x)
    expected = {}
    for size, (graph, out) in graphs.items():
        graph.replay()
        expected[size] = out.clone()
    for _ in range(2):
        allocator.sleep(offload_tags=("weights", "graphs"))
        assert allocator.get_current_usage() == 0
        allocator.wake_up(["weights"])
        allocator.wake_up(["graphs"])
        for size, (graph, out) in graphs.items():
            graph.replay()
            assert torch.equal(out, expected[size]), size


def test_while_the_pool_sleeps_it_is_not_handed_out(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    x = torch.ones(ELEMENTS, device=gpu)
    pool = allocator.graph_pool("graphs")
    graph, out = captured(pool, chain, x)
    allocator.sleep(tags="graphs")
    with refuses(cumempool.InUseError, names="asleep", operation="graph_pool", tag="graphs"):
        allocator.graph_pool("graphs")
    allocator.wake_up()
    other, second = captured(allocator.graph_pool("graphs"), chain, x)
    for one in (graph, other):
        one.replay()
    assert torch.equal(out, chain(x))
    assert torch.equal(second, chain(x))


def test_a_sleep_during_a_capture_is_refused_and_the_capture_survives(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    x = torch.ones(ELEMENTS, device=gpu)
    chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=allocator.graph_pool("graphs")):
        a = x * 2
        with pytest.raises(cumempool.StreamCaptureError):
            allocator.sleep(tags="graphs")
        out = a + 1
    graph.replay()
    assert float(out.min()) == float(out.max()) == 3
    allocator.sleep(tags="graphs")
    allocator.wake_up()
    graph.replay()
    assert float(out.min()) == 3


def test_released_memory_goes_back_once_the_graphs_are_gone(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    x = torch.ones(ELEMENTS, device=gpu)
    graph, out = captured(allocator.graph_pool("graphs"), chain, x)
    held = allocator.get_current_usage()
    assert allocator.release_graph_pool("graphs") == 1
    assert allocator.release_graph_pool("graphs") == 0
    assert allocator.get_current_usage() == held
    allocator.sleep(tags="graphs")
    allocator.wake_up()
    graph.replay()
    assert torch.equal(out, chain(x))
    del graph, out
    gc.collect()
    torch.cuda.empty_cache()
    assert allocator.get_current_usage() == 0
    allocator.graph_pool("graphs")  # which also gives the slot of the old one back
    assert len(allocator._state.graph_pools) == 1
    allocator.release_graph_pool("graphs", device=gpu)
    assert len(allocator._state.graph_pools) == 0


def test_unused_pools_go_back_at_once_and_slots_do_not_run_out(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    x = torch.ones(MIB, device=gpu)
    for number in range(2 * _core.slot_count()):
        graph, out = captured(allocator.graph_pool("graphs"), chain, x)
        graph.replay()
        assert allocator.tag_of(out) == "graphs", number
        del graph, out
        gc.collect()
        assert allocator.release_graph_pool("graphs") == 1
        assert allocator.get_current_usage() == 0, number


def test_close_names_graphs_that_live_and_releases_unused_pools(gpu: torch.device) -> None:
    allocator = cumempool.CuMemAllocator(cumempool.CuMemConfig(driver="cuda"))
    x = torch.ones(ELEMENTS, device=gpu)
    pool = allocator.graph_pool("graphs")
    graph, out = captured(pool, chain, x)
    with refuses(cumempool.InUseError, names="CUDA graphs", operation="close"):
        allocator.close()
    assert allocator.graph_pool("graphs") == pool
    graph.replay()
    assert torch.equal(out, chain(x))
    del graph, out
    gc.collect()
    allocator.close()
    assert allocator.stats().physical_bytes == 0
