"""What scopes cost, whatever torch holds and records, and what they say when memory runs out."""

from __future__ import annotations

import gc
import itertools
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch

import cumempool
from cumempool import _torch

from .conftest import GRANULE, Figure

MIB = 1024**2
ENTRIES = 100_000

needs_notes = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="exceptions have no notes before Python 3.11"
)


def median_seconds(act: Callable[[], object], times: int = 21) -> float:
    took = []
    for _ in range(times):
        begin = time.perf_counter()
        act()
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


def empty_scope(allocator: cumempool.CuMemAllocator) -> None:
    with allocator.use_memory_pool("scratch"):
        pass


def used_scope(allocator: cumempool.CuMemAllocator) -> None:
    with allocator.use_memory_pool("scratch"):
        torch.empty(2 * MIB, dtype=torch.uint8, device="cuda")


@pytest.mark.skipif(
    _torch.runtime.torch_version() < (2, 11), reason="older torch cannot leave history out"
)
def test_recorded_history_costs_scopes_and_sleeps_nothing(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, figure: Figure
) -> None:
    with allocator.use_memory_pool("weights"):
        weights = torch.ones(64 * MIB, dtype=torch.uint8, device=gpu)

    def cycle() -> None:
        allocator.sleep(tags="weights")
        allocator.wake_up()

    acts = (lambda: used_scope(allocator), cycle)
    for act in acts:
        act()
    before = [median_seconds(act, 5) for act in acts]
    torch.cuda.memory._record_memory_history(max_entries=ENTRIES, stacks="python")
    try:
        for _ in range(ENTRIES // 2):
            torch.empty(512, dtype=torch.uint8, device=gpu)
        after = [median_seconds(act, 5) for act in acts]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    more = [1000 * (b - a) for a, b in zip(before, after, strict=True)]
    figure("history_more_ms", [round(each, 2) for each in more])
    assert max(more) < 20
    assert int(weights[0]) == 1


@pytest.mark.parametrize("of", ["a scope", "the program"])
@pytest.mark.parametrize("scope", [empty_scope, used_scope])
def test_a_scope_costs_at_most_twice_with_ten_thousand_segments(
    allocator: cumempool.CuMemAllocator,
    gpu: torch.device,
    figure: Figure,
    of: str,
    scope: Callable[[cumempool.CuMemAllocator], None],
) -> None:
    def measured(count: int) -> float:
        tensors: list[torch.Tensor] = []

        def fill() -> None:
            # More than a MiB each, and no two of them in a segment.
            tensors.extend(
                torch.empty(10 * MIB, dtype=torch.uint8, device=gpu) for _ in range(count)
            )

        if of == "a scope":
            with allocator.use_memory_pool("held"):
                fill()
        else:
            fill()
        scope(allocator)
        seconds = median_seconds(lambda: scope(allocator), 101)
        tensors.clear()
        torch.cuda.empty_cache()
        return seconds

    room = torch.cuda.mem_get_info()[0] // (10 * MIB) - 200
    few, many = measured(10), measured(min(10_000, room))
    figure("segments", min(10_000, room))
    figure("scope_us_few_many", [round(few * 1e6, 1), round(many * 1e6, 1)])
    assert many <= 2 * few


@pytest.mark.parametrize("scope", [empty_scope, used_scope])
def test_scopes_in_a_loop_take_no_memory(
    allocator: cumempool.CuMemAllocator,
    gpu: torch.device,
    figure: Figure,
    scope: Callable[[cumempool.CuMemAllocator], None],
) -> None:
    def pools() -> int:
        return sum(type(each) is torch.cuda.MemPool for each in gc.get_objects())

    for _ in range(500):
        scope(allocator)
    before, pools_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, pools()
    for _ in range(20_000):
        scope(allocator)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    figure("grown_kib", grown)
    if _torch.runtime.torch_version() >= (2, 11):
        assert pools() == pools_before
        assert grown < 2048
    assert allocator.stats().physical_bytes == 0


def test_a_scope_is_left_inside_another_and_beside_a_capture_of_another_thread(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    """The object of its pool is destroyed there, which must not empty any cache."""
    static = torch.ones(1024, device=gpu)
    captured, leave = threading.Event(), threading.Event()
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            static.mul_(2)
            captured.set()
            assert leave.wait(60)

    thread = threading.Thread(target=capture)
    with allocator.use_memory_pool("outer"):
        kept = torch.ones(4 * MIB, device=gpu)
        thread.start()
        assert captured.wait(60)
        for _ in range(10):
            used_scope(allocator)
        leave.set()
        thread.join(60)
        used_scope(allocator)
    graph.replay()
    torch.cuda.synchronize()
    assert float(static[0]) == 2
    assert bool(kept.eq(1).all())


def test_a_tag_with_an_open_scope_does_not_sleep_whoever_waits(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    stop = threading.Event()
    outcomes: list[bool] = []

    def sleep() -> None:
        while not stop.is_set():
            try:
                allocator.sleep(tags="kv")
                outcomes.append(True)
            except cumempool.InUseError:
                outcomes.append(False)
            allocator.wake_up()

    allocator.use_memory_pool("kv")
    thread = threading.Thread(target=sleep)
    thread.start()
    kept = []
    for number in itertools.count():
        with allocator.use_memory_pool("kv"):
            for _ in range(3):
                kept.append(torch.full((3 * MIB,), number % 200, dtype=torch.uint8, device=gpu))
                torch.cuda.synchronize()
                assert int(kept[-1][-1]) == number % 200
            del kept[:-3]
        if number > 100 and {True, False} <= set(outcomes):
            break
    stop.set()
    thread.join(60)
    assert all(int(tensor[0]) == number % 200 for tensor in kept)


@needs_notes
def test_out_of_memory_where_tensors_are_replaced_by_larger_ones_names_the_way_out(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    layers, size = 32, 64 * MIB

    def load() -> torch.nn.ParameterList:
        weights = [torch.zeros(size, dtype=torch.uint8, device=gpu) for _ in range(layers)]
        for number in range(layers):
            larger = torch.zeros(size + 4 * MIB, dtype=torch.uint8, device=gpu)
            larger[:size].copy_(weights[number])
            weights[number] = larger
        return torch.nn.ParameterList(
            torch.nn.Parameter(weight, requires_grad=False) for weight in weights
        )

    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    room = int(1.3 * layers * (size + 4 * MIB))
    blocker = torch.empty(free - room, dtype=torch.uint8, device=gpu)
    with pytest.raises(torch.OutOfMemoryError) as caught, allocator.use_memory_pool("weights"):
        load()
    assert any(
        "free in segments of the scope's pool" in note and "adopt()" in note
        for note in caught.value.__notes__
    )
    del caught
    gc.collect()
    torch.cuda.empty_cache()
    model = load()
    allocator.adopt(model, "weights")
    assert allocator.stats().tags["weights"].awake_bytes >= layers * size
    del model, blocker


class Layer(torch.nn.Module):
    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        data = torch.ones(size, dtype=torch.uint8, device=device)
        self.weight = torch.nn.Parameter(data, requires_grad=False)

    def pad(self) -> torch.Tensor:
        size = self.weight.numel()
        padded = torch.zeros(size + 4 * MIB, dtype=torch.uint8, device=self.weight.device)
        padded[:size].copy_(self.weight)
        return padded


@pytest.mark.parametrize("replaced_by", ["registration", "data"])
def test_weights_that_a_module_replaces_in_a_scope_need_no_more_room_than_outside(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, replaced_by: str
) -> None:
    layers, size = 48, 64 * MIB
    torch.cuda.empty_cache()
    room = int(1.3 * layers * (size + 4 * MIB))
    free = torch.cuda.mem_get_info()[0]
    blocker = torch.empty(free - room, dtype=torch.uint8, device=gpu)
    with allocator.use_memory_pool("weights") as scope:
        model = [Layer(size, gpu) for _ in range(layers)]
        for number, layer in enumerate(model):
            if replaced_by == "registration":
                layer.weight = torch.nn.Parameter(layer.pad(), requires_grad=False)
            else:
                layer.weight.data = layer.pad()
                if number % 4 == 3:
                    assert scope.release_unused()
    del blocker
    held = allocator.stats().tags["weights"].awake_bytes
    assert held <= layers * (size + 4 * MIB) + 8 * GRANULE
    assert all(allocator.tag_of(layer.weight) == "weights" for layer in model)
    allocator.sleep(tags="weights")
    allocator.wake_up()
    for layer in model:
        assert int(layer.weight[size - 1]) == 1
        assert int(layer.weight[size]) == 0


@needs_notes
def test_out_of_memory_by_the_limit_of_torch_says_what_it_counts_of_what_sleeps(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    if not hasattr(torch.cuda, "get_per_process_memory_fraction"):
        pytest.skip("this torch does not tell its limit")
    total = torch.cuda.mem_get_info()[1]
    with allocator.use_memory_pool("weights"):
        weights = torch.ones(1024 * MIB, dtype=torch.uint8, device=gpu)
    allocator.sleep(tags="weights")
    reserved = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((reserved + 512 * MIB) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught, allocator.use_memory_pool("kv"):
            torch.empty(768 * MIB, dtype=torch.uint8, device=gpu)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("set_per_process_memory_fraction" in note for note in caught.value.__notes__)
    assert any("1.00 GiB" in note for note in caught.value.__notes__)
    allocator.wake_up()
    assert int(weights[0]) == 1
    assert allocator.stats().physical_bytes <= 1024 * MIB + GRANULE


OTHER_ALLOCATOR = """
import sys

import torch

import cumempool
from cumempool import _torch

backend = sys.argv[1]
allocator = cumempool.CuMemAllocator()
if backend == "pluggable":  # a slot of the library serves all of torch
    allocator.use_memory_pool("all")
    slot = allocator._core.bind_slot("all", lasting=True)
    names = (f"cumempool_malloc_{slot}", f"cumempool_free_{slot}")
    torch.cuda.memory.change_current_allocator(
        torch.cuda.memory.CUDAPluggableAllocator(str(_torch.LIBRARY), *names)
    )
ordinary = torch.ones(1 << 20, device="cuda")
try:
    with allocator.use_memory_pool("a"):
        sys.exit("entered")
except cumempool.UnavailableError as error:
    assert backend in str(error), error
tensor = allocator.empty(1 << 20, dtype=torch.uint8, tag="a").fill_(7)
allocator.sleep(tags="a")
allocator.wake_up()
assert bool(tensor.eq(7).all())
assert bool(ordinary.eq(1).all())
print("done", flush=True)
"""


@pytest.mark.parametrize("backend", ["pluggable", "cudaMallocAsync"])
def test_with_another_allocator_scopes_are_refused_by_name_and_exact_tensors_work(
    gpu: torch.device, backend: str
) -> None:
    environment = dict(os.environ)
    if backend == "cudaMallocAsync":
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
    ran = subprocess.run(
        [sys.executable, "-c", OTHER_ALLOCATOR, backend],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.stdout.strip() == "done", ran.stderr


def test_the_settings_of_torch_are_read_without_what_it_holds(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    assert isinstance(_torch.live_settings()["expandable_segments"], bool)
