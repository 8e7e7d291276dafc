"""What vLLM's sleep-mode allocator is documented to do, done by ours in its place on a GPU."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import refuses

import cumempool
from cumempool.compat import vllm as compat

STAND_IN = Path(__file__).resolve().parents[1] / "data" / "vllm_stand_in"
#: Where the package vllm comes from: a folder with files of its wheel, or the stand-in.
FILES = os.environ.get("CUMEMPOOL_VLLM_FILES") or str(STAND_IN)
MIB = 1 << 20
#: Device memory that kernels take when they are loaded for the first time.
SLACK = 48 * MIB
Used = Callable[[], int]


@pytest.fixture
def vllm(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package vllm in which cumempool was put in the place of its allocator by the one line."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "cumempool.compat.vllm_backend", raising=False)
    monkeypatch.syspath_prepend(FILES)
    monkeypatch.delenv("CUMEMPOOL_VLLM_FILES", raising=False)
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "cuda")
    monkeypatch.setattr(compat.CuMemAllocator, "instance", None)
    compat.install()
    yield
    compat.uninstall()
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules.pop("cumempool.compat.vllm_backend", None)


@pytest.fixture
def allocator(vllm: None) -> Iterator[compat.CuMemAllocator]:
    """The allocator as vLLM asks for it; afterwards everything must be given back."""
    found = importlib.import_module("vllm.device_allocator").get_mem_allocator_instance()
    assert isinstance(found, compat.CuMemAllocator)
    yield found
    gc.collect()
    found.release_pools()
    shared = cumempool.CuMemAllocator.get_instance()
    shared.close(force=True)
    gc.collect()
    torch.cuda.empty_cache()
    stats = shared.stats()
    assert (stats.physical_bytes, stats.mapped_bytes, stats.host_bytes) == (0, 0, 0)


@pytest.fixture
def settled(used: Used) -> Used:
    """Device memory in use, without what torch has cached."""

    def read() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return used()

    return read


def mapped(allocator: compat.CuMemAllocator) -> int:
    return sum(d.handle[1] for d in allocator.pointer_to_data.values() if not d.is_asleep)


def sleeping(allocator: compat.CuMemAllocator) -> set[str]:
    return {data.tag for data in allocator.pointer_to_data.values() if data.is_asleep}


def tag_of(allocator: compat.CuMemAllocator, tensor: torch.Tensor) -> str | None:
    for base, data in allocator.pointer_to_data.items():
        if base <= tensor.data_ptr() < base + data.handle[1]:
            return data.tag
    return None


def pattern(count: int, gpu: torch.device) -> torch.Tensor:
    return torch.arange(count, device=gpu, dtype=torch.int32).remainder(251).to(torch.uint8)


# ---- memory at each stage


def test_sleep_gives_the_memory_back_and_wake_takes_it_again(
    allocator: compat.CuMemAllocator, gpu: torch.device, settled: Used
) -> None:
    outside = torch.ones(1 * MIB, device=gpu)
    before = settled()
    with allocator.use_memory_pool():
        a = torch.full((64 * MIB,), 1.0, device=gpu)
        b = torch.full((32 * MIB,), 2.0, device=gpu)
    size = a.nbytes + b.nbytes
    assert allocator.get_current_usage() == mapped(allocator) == size
    assert abs(settled() - before - size) <= SLACK
    addresses = (a.data_ptr(), b.data_ptr())
    for _ in range(3):
        assert float((a[:MIB] + b[:MIB] + outside[:MIB]).sum()) == 4 * MIB
        allocator.sleep()
        assert mapped(allocator) == 0
        assert allocator.get_current_usage() == size
        assert abs(settled() - before) <= SLACK
        assert float(outside.sum()) == MIB  # of another pool, and untouched
        allocator.wake_up()
        assert mapped(allocator) == size
        assert abs(settled() - before - size) <= SLACK
        assert (a.data_ptr(), b.data_ptr()) == addresses
        assert bool((a == 1).all())
        assert bool((b == 2).all())


def test_weights_are_kept_the_cache_is_not_and_each_wakes_by_itself(
    allocator: compat.CuMemAllocator, gpu: torch.device, settled: Used
) -> None:
    before = settled()
    with allocator.use_memory_pool("weights"):
        weights = torch.empty(128 * MIB, dtype=torch.uint8, device=gpu)
    weights.copy_(pattern(128 * MIB, gpu))
    with allocator.use_memory_pool("kv_cache"):
        cache = torch.zeros(256 * MIB, dtype=torch.uint8, device=gpu)
    address = cache.data_ptr()
    allocator.sleep(offload_tags=("weights",))
    backups = {d.tag: d.cpu_backup_tensor for d in allocator.pointer_to_data.values()}
    assert backups["kv_cache"] is None
    assert backups["weights"] is not None
    assert backups["weights"].nbytes == weights.nbytes
    assert abs(settled() - before) <= SLACK
    allocator.wake_up(tags=["weights"])
    assert sleeping(allocator) == {"kv_cache"}
    assert torch.equal(weights, pattern(128 * MIB, gpu))
    assert abs(settled() - before - weights.nbytes) <= SLACK
    allocator.wake_up(tags=["kv_cache"])
    assert sleeping(allocator) == set()
    assert abs(settled() - before - weights.nbytes - cache.nbytes) <= SLACK
    assert cache.data_ptr() == address
    cache.fill_(3)
    assert int(cache[-1]) == 3


def test_discard_takes_one_tag_and_leaves_the_others_in_use(
    allocator: compat.CuMemAllocator, gpu: torch.device, settled: Used
) -> None:
    with allocator.use_memory_pool("weights"):
        weights = torch.ones(16 * MIB, device=gpu)
    with allocator.use_memory_pool("kv_cache"):
        cache = torch.ones(32 * MIB, device=gpu)
    before = settled()
    allocator.discard("kv_cache")
    assert abs(before - settled() - cache.nbytes) <= SLACK
    assert mapped(allocator) == weights.nbytes
    assert bool((weights == 1).all())
    allocator.wake_up()
    assert mapped(allocator) == weights.nbytes + cache.nbytes
    cache.zero_()
    allocator.sleep(offload_tags="weights")
    allocator.wake_up()
    assert bool((weights == 1).all())


@pytest.mark.parametrize("tag", ["workspace", None])
def test_a_wake_by_tags_wakes_every_tag_that_is_not_deferrable(
    allocator: compat.CuMemAllocator, gpu: torch.device, tag: str | None
) -> None:
    with allocator.use_memory_pool(tag):
        internal = torch.empty(16 * MIB, dtype=torch.uint8, device=gpu)
    with allocator.use_memory_pool("kv_cache"):
        cache = torch.empty(32 * MIB, dtype=torch.uint8, device=gpu)
    allocator.sleep(offload_tags=())
    assert mapped(allocator) == 0
    allocator.wake_up(tags=["weights"])
    assert mapped(allocator) == internal.nbytes
    internal.zero_()
    allocator.wake_up(tags=["kv_cache"])
    assert mapped(allocator) == internal.nbytes + cache.nbytes


def test_memory_that_was_discarded_can_be_filled_as_it_wakes(
    allocator: compat.CuMemAllocator, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = importlib.import_module("vllm.device_allocator.cumem")
    with allocator.use_memory_pool("weights"):
        first = torch.full((4096,), 1, dtype=torch.uint8, device=gpu)
        second = torch.full((4096,), 2, dtype=torch.uint8, device=gpu)
    with allocator.use_memory_pool("runtime"):
        state = torch.full((4096,), 3, dtype=torch.uint8, device=gpu)
    addresses = (first.data_ptr(), second.data_ptr())
    original = module.create_and_map

    def create_map_and_fill(handle: Any) -> None:
        original(handle)
        _, size, address, _ = handle
        module.libcudart.cudaMemset(address, 0xA5, size)

    monkeypatch.setattr(module, "create_and_map", create_map_and_fill)
    allocator.sleep(offload_tags="runtime")
    allocator.wake_up()
    assert (first.data_ptr(), second.data_ptr()) == addresses
    assert bool((first == 0xA5).all())
    assert bool((second == 0xA5).all())
    assert bool((state == 3).all())


def test_bytes_are_copied_by_address(allocator: compat.CuMemAllocator, gpu: torch.device) -> None:
    with allocator.use_memory_pool("weights"):
        tensor = torch.empty(1000, dtype=torch.uint8, device=gpu)
    tensor.copy_(pattern(1000, gpu))
    host = torch.zeros(1000, dtype=torch.uint8)
    compat.libcudart.cudaMemcpy(host.data_ptr(), tensor.data_ptr(), 1000)
    assert torch.equal(host, tensor.cpu())
    host.fill_(9)
    compat.libcudart.cudaMemcpy(tensor.data_ptr(), host.data_ptr(), 1000)
    assert bool((tensor == 9).all())


# ---- usage


def test_usage_is_exact_through_a_tag_that_is_entered_again(
    allocator: compat.CuMemAllocator, gpu: torch.device
) -> None:
    size = 64 * MIB
    with allocator.use_memory_pool("t"):
        early = torch.empty(size, dtype=torch.uint8, device=gpu)
        late = torch.empty(size, dtype=torch.uint8, device=gpu)
        del early
    assert allocator.get_current_usage() == size  # what died inside went at the end
    with allocator.use_memory_pool("t"):
        kept = torch.empty(size, dtype=torch.uint8, device=gpu)
    del late
    gc.collect()
    with allocator.use_memory_pool("t"):
        pass
    assert allocator.get_current_usage() == size  # what died outside goes at the next entry
    kept.fill_(1)
    allocator.sleep(offload_tags="t")
    assert allocator.get_current_usage() == size
    allocator.wake_up()
    assert bool((kept == 1).all())
    allocator.release_pools()
    assert bool((kept == 1).all())
    del kept
    allocator.release_pools()
    assert allocator.get_current_usage() == 0


def test_memory_freed_while_it_sleeps_is_gone(
    allocator: compat.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("weights"):
        kept = torch.full((16 * MIB,), 1, dtype=torch.uint8, device=gpu)
        freed = torch.full((32 * MIB,), 2, dtype=torch.uint8, device=gpu)
    allocator.sleep("weights")
    del freed
    allocator.wake_up()
    assert allocator.get_current_usage() == mapped(allocator) == kept.nbytes
    assert bool((kept == 1).all())


def test_a_scope_inside_another_has_its_own_tag(
    allocator: compat.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("runtime"):
        state = torch.arange(1 << 20, device=gpu)
        with allocator.use_memory_pool("kv_cache"):
            cache = torch.zeros(1 << 20, device=gpu)
        after = torch.ones(1 << 20, device=gpu)
    outside = torch.ones(1 << 20, device=gpu)
    tensors = (state, cache, after, outside)
    assert [tag_of(allocator, t) for t in tensors] == ["runtime", "kv_cache", "runtime", None]


# ---- CUDA graphs


def test_a_graph_over_pool_memory_replays_after_a_wake(
    allocator: compat.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool():
        weight = torch.eye(1024, device=gpu)
    with allocator.use_memory_pool("discarded"):
        cache = torch.empty(1024, 1024, device=gpu)
    x = torch.zeros(128, 1024, device=gpu)

    def model() -> torch.Tensor:
        out = x @ weight
        cache[: out.size(0)].copy_(out)
        return out + 1

    model()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model()
    allocator.sleep()
    assert mapped(allocator) == 0
    allocator.wake_up()
    x.copy_(torch.arange(128 * 1024, device=gpu).remainder(512).view(128, 1024))
    graph.replay()
    assert torch.equal(cache[:128], x)
    assert torch.equal(y, x + 1)


def test_graphs_captured_in_the_graph_pool_sleep_and_replay_equal(
    allocator: compat.CuMemAllocator, gpu: torch.device, settled: Used
) -> None:
    with allocator.use_memory_pool("weights"):
        weight = torch.empty(16 * MIB, device=gpu)
    weight.copy_(torch.linspace(-1, 1, 16 * MIB, device=gpu))
    x = torch.linspace(0, 1, 16 * MIB, device=gpu)

    def model() -> torch.Tensor:
        return torch.sin(x * weight) + x

    model()
    torch.cuda.synchronize()
    graphs = []
    identities = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with allocator.cudagraph_pool() as identity, torch.cuda.graph(graph, pool=identity):
            out = model()
        identities.append(identity)
        graphs.append((graph, out))
    assert identities[0] == identities[1]
    assert {tag_of(allocator, out) for _, out in graphs} == {compat.CUDAGRAPH_TAG}
    size = allocator.get_current_usage()
    assert size >= weight.nbytes + 2 * x.nbytes
    for cycle in range(3):
        before = settled()
        allocator.sleep(offload_tags=("weights", "runtime", "cudagraph"))
        assert mapped(allocator) == 0
        assert before - settled() >= size - SLACK
        allocator.wake_up(tags=["weights"])
        assert mapped(allocator) == size  # graph memory is not deferrable
        x.mul_(0.5)
        for graph, out in graphs:
            graph.replay()
            assert torch.equal(out, model()), cycle
    allocator.release_pools()  # graphs that live keep what they need
    graphs[0][0].replay()
    assert torch.equal(graphs[0][1], model())
    del graphs, graph, out
    allocator.release_pools()
    assert allocator.get_current_usage() == weight.nbytes


def test_scratch_memory_is_discarded_and_graphs_that_use_it_replay(
    allocator: compat.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("workspace"):
        small = torch.empty(32 * MIB, dtype=torch.uint8, device=gpu)
    with allocator.use_memory_pool("workspace"):  # as a resize has it, with the old one in use
        scratch = torch.zeros(64 * MIB, dtype=torch.uint8, device=gpu)
    assert len(allocator.allocator_and_pools["workspace"]) == 2
    scratch.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scratch.add_(1)
    allocator.sleep(offload_tags=("weights", "runtime", "cudagraph"))
    assert all(data.cpu_backup_tensor is None for data in allocator.pointer_to_data.values())
    assert mapped(allocator) == 0
    allocator.wake_up(tags=["kv_cache"])
    scratch.zero_()
    graph.replay()
    assert bool((scratch == 1).all())
    del small
    with allocator.use_memory_pool("workspace"):
        large = torch.zeros(128 * MIB, dtype=torch.uint8, device=gpu)
    assert mapped(allocator) == scratch.nbytes + large.nbytes


# ---- errors


def test_a_wake_without_room_is_a_runtime_error_and_nothing_sticks(
    allocator: compat.CuMemAllocator, gpu: torch.device, settled: Used
) -> None:
    with allocator.use_memory_pool():
        tensor = torch.full((2048 * MIB,), 7, dtype=torch.uint8, device=gpu)
    allocator.sleep()
    settled()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - 1024 * MIB, dtype=torch.uint8, device=gpu)
    for _ in range(2):
        with refuses(cumempool.OutOfMemoryError, operation="wake", tag="default"):
            allocator.wake_up()
        assert mapped(allocator) == 0
    torch.ones(1024, device=gpu).sum().item()  # the context is well
    del hog
    allocator.wake_up()
    assert bool((tensor == 7).all())
    allocator.sleep()
    allocator.wake_up()
    assert bool((tensor == 7).all())


def test_an_allocation_that_does_not_fit_is_torchs_own_error(
    allocator: compat.CuMemAllocator, gpu: torch.device
) -> None:
    with pytest.raises(torch.OutOfMemoryError), allocator.use_memory_pool("weights"):
        torch.empty(1 << 50, dtype=torch.uint8, device=gpu)
    assert allocator.current_tag == "default"
    assert allocator.get_current_usage() == 0
    with allocator.use_memory_pool("weights"):
        tensor = torch.ones(1 << 20, device=gpu)
    assert tag_of(allocator, tensor) == "weights"


def test_an_error_inside_the_scope_leaves_it(
    allocator: compat.CuMemAllocator, gpu: torch.device
) -> None:
    def fail() -> None:
        torch.ones(64 * MIB, device=gpu)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), allocator.use_memory_pool("weights"):
        fail()
    assert allocator.get_current_usage() == 0
    assert tag_of(allocator, torch.ones(1, device=gpu)) is None
    allocator.sleep()
    allocator.wake_up()


# ---- the backend


@pytest.mark.parametrize("level", [1, 2])
def test_the_backend_of_the_plugin_takes_the_engine_down_and_up(
    allocator: compat.CuMemAllocator, gpu: torch.device, settled: Used, level: int
) -> None:
    compat.register()
    factory = importlib.import_module("vllm.device_allocator.sleep_mode_backend")
    backend = factory.SleepModeBackendFactory.create_backend(
        SimpleNamespace(sleep_mode_backend="cumempool")
    )
    before = settled()
    tensors = {}
    for seed, tag in enumerate(("weights", "kv_cache", "runtime", "workspace"), start=1):
        with allocator.use_memory_pool(tag):
            tensors[tag] = torch.full((64 * MIB,), seed, dtype=torch.uint8, device=gpu)
    size = sum(tensor.nbytes for tensor in tensors.values())
    for _ in range(2):
        backend.suspend(level)
        assert backend.state() == "SUSPENDED"
        assert abs(settled() - before) <= SLACK
        backend.resume(tags=["weights"])
        assert sleeping(allocator) == {"kv_cache"}
        assert bool((tensors["runtime"] == 3).all())
        if level == 1:
            assert bool((tensors["weights"] == 1).all())
        tensors["weights"].fill_(1)
        backend.resume(tags=["kv_cache"])
        assert backend.state() == "RUNNING"
        assert allocator.get_current_usage() == mapped(allocator) == size
    backend.discard(("kv_cache",))
    assert mapped(allocator) == size - tensors["kv_cache"].nbytes
    backend.resume()
    assert bool((tensors["weights"] == 1).all())


# ---- processes


def run(code: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_a_child_forked_after_the_import_can_use_it(gpu: torch.device) -> None:
    """As test runners have it that fork a process for each test."""
    code = """
import os, torch
import cumempool.compat.vllm as compat
assert compat.cumem_available
child = os.fork()
if child == 0:
    allocator = compat.CuMemAllocator.get_instance()
    with allocator.use_memory_pool():
        tensor = torch.full((1 << 24,), 3.0, device="cuda")
    allocator.sleep()
    allocator.wake_up()
    os._exit(7 if bool((tensor == 3).all()) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code)[:2] == (0, "7")


@pytest.mark.parametrize("asleep", [True, False])
def test_the_interpreter_ends_quietly_with_tensors_and_graphs(
    gpu: torch.device, asleep: bool
) -> None:
    code = f"""
import torch
import cumempool.compat.vllm as compat
allocator = compat.CuMemAllocator.get_instance()
with allocator.use_memory_pool("weights"):
    tensor = torch.ones(1 << 24, device="cuda")
tensor * 2
graph = torch.cuda.CUDAGraph()
with allocator.cudagraph_pool() as pool, torch.cuda.graph(graph, pool=pool):
    out = tensor * 2
if {asleep}:
    allocator.sleep(("weights", "cudagraph"))
else:
    graph.replay()
    allocator.release_pools()
print("end")
"""
    assert run(code) == (0, "end", "")
