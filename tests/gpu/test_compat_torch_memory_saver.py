"""What programs do with torch_memory_saver, done with the stand-in for it on a GPU."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cumempool
from cumempool.compat.torch_memory_saver import TorchMemorySaver, folder_for_path

MIB = 1024**2
GIB = 1024**3
#: What kernels and streams that are used for the first time take of the device.
SLACK = 64 * MIB

Used = Callable[[], int]


@pytest.fixture
def saver(allocator: cumempool.CuMemAllocator) -> Iterator[TorchMemorySaver]:
    # A product leaves cuBLAS a workspace in the pool where it was made, and others go on using it.
    torch._C._cuda_clearCublasWorkspaces()
    ones = torch.ones(64, 64, device="cuda", requires_grad=True)
    (ones @ ones).sum().backward()
    del ones
    yield TorchMemorySaver(allocator=allocator)
    torch._C._cuda_clearCublasWorkspaces()


def full(count: int, value: float, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.full((count,), value, dtype=dtype, device="cuda")


def holds(tensor: torch.Tensor, value: int) -> bool:
    """Whether all elements are that; takes no device memory to speak of, as a sum would."""
    return int(tensor.amin()) == int(tensor.amax()) == value


# ---- pause and resume


def test_paused_memory_is_free_and_comes_back_at_its_address(
    saver: TorchMemorySaver, used: Used
) -> None:
    ordinary = full(10_000_000, 100)
    with saver.region():
        paused = full(4 * GIB, 100)
    address, before = paused.data_ptr(), used()
    saver.pause()
    during = used()
    assert before - during >= 4 * GIB - SLACK
    assert int(ordinary[-1]) == 100
    saver.resume()
    assert used() - during >= 4 * GIB - SLACK
    assert paused.data_ptr() == address
    paused.fill_(7)
    assert int(paused[-1]) == 7
    del ordinary, paused
    torch.cuda.empty_cache()
    assert used() <= before - 4 * GIB + SLACK


def test_tags_are_paused_and_resumed_apart(saver: TorchMemorySaver, used: Used) -> None:
    with saver.region(tag="weights", enable_cpu_backup=True):
        weights = full(GIB, 1)
    with saver.region(tag="kv_cache"):
        cache = full(2 * GIB, 2)
    start = used()
    saver.pause("kv_cache")
    assert start - used() >= 2 * GIB - SLACK
    assert holds(weights, 1)
    saver.pause("weights")
    assert start - used() >= 3 * GIB - SLACK
    saver.resume("weights")
    assert holds(weights, 1)
    assert start - used() >= 2 * GIB - SLACK
    saver.resume("kv_cache")
    cache.fill_(3)
    assert int(cache[-1]) == 3
    for tag in ("weights", "kv_cache", "weights"):
        saver.pause(tag)
        saver.resume(tag)
    assert holds(weights, 1)


def test_contents_are_kept_where_a_region_says_so(saver: TorchMemorySaver) -> None:
    with saver.region(enable_cpu_backup=True):
        kept = full(20_000_000, 10)
        typed = torch.randn((10, 20, 30), device="cuda")
    with saver.region(enable_cpu_backup=False):
        lost = full(20_000_000, 20)
    expected = typed.cpu()
    assert {saver.allocator.tag_of(t) for t in (kept, typed)} == {"default:pinned"}
    saver.pause()
    assert saver.get_cpu_backup(lost) is None
    for zero_copy in (False, True):
        backup = saver.get_cpu_backup(typed, zero_copy=zero_copy)
        assert backup is not None
        assert backup.device.type == "cpu"
        assert torch.equal(backup, expected)
    part = saver.get_cpu_backup(kept[1000:2000], zero_copy=True)
    assert part is not None
    assert part.tolist() == [10] * 1000
    elsewhere = full(20_000_000, 30)
    saver.resume()
    assert torch.equal(typed.cpu(), expected)
    assert bool((kept == 10).all())
    lost.fill_(21)
    assert bool((lost == 21).all())
    assert bool((elsewhere == 30).all())
    del part, backup


@pytest.mark.parametrize("where", ["pinned", "mmap", "disk"])
def test_contents_come_back_from_wherever_they_were(
    saver: TorchMemorySaver, where: Any, tmp_path: Path
) -> None:
    saver.set_disk_backup_dir(str(tmp_path))
    options: dict[str, Any] = {"enable_cpu_backup": True, "cpu_backup_backend": where}
    with saver.region(**{"enable_disk_backup": True} if where == "disk" else options):
        tensor = torch.randn(64 * MIB, device="cuda")
    expected = tensor.clone()
    for turn in range(3):
        saver.pause()
        assert saver.allocator.stats().asleep_bytes >= 256 * MIB
        saver.resume()
        assert torch.equal(tensor, expected), turn
        assert saver.allocator.stats().host_bytes == 0
        tensor += 1
        expected += 1


def test_retained_backup_stays_at_its_address_and_is_renewed(saver: TorchMemorySaver) -> None:
    saver.retain_cpu_backup = True
    for device in range(torch.cuda.device_count()):
        with torch.cuda.device(device):
            with saver.region(tag=f"chosen_{device}", enable_cpu_backup=True):
                chosen = torch.full((1024,), 40 + device, dtype=torch.uint8, device="cuda")
            with saver.region(tag=f"other_{device}", enable_cpu_backup=True):
                other = torch.full((1024,), 80 + device, dtype=torch.uint8, device="cuda")
            saver.pause(tag=f"chosen_{device}")
            first = saver.get_cpu_backup(chosen, zero_copy=True)
            assert first is not None
            address = first.data_ptr()
            assert int(other[0]) == 80 + device
            saver.resume(tag=f"chosen_{device}")
            again = saver.get_cpu_backup(chosen, zero_copy=True)
            assert again is not None
            assert again.data_ptr() == address
            chosen.fill_(50 + device)
            saver.pause(tag=f"chosen_{device}")
            second = saver.get_cpu_backup(chosen, zero_copy=True)
            assert second is not None
            assert second.data_ptr() == address
            assert second.tolist() == [50 + device] * 1024
            saver.resume(tag=f"chosen_{device}")
            assert chosen.tolist() == [50 + device] * 1024
    assert saver.allocator.stats().host_used_bytes > 0
    del first, again, second
    saver.pause()
    saver.retain_cpu_backup = False
    saver.resume()
    assert saver.allocator.stats().host_bytes == 0


def test_pause_waits_for_work_in_flight(saver: TorchMemorySaver) -> None:
    with saver.region(enable_cpu_backup=True):
        tensor = torch.zeros(64 * MIB, device="cuda")
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    halves = tensor.chunk(2)
    streams[1].wait_stream(streams[0])
    for stream, half in zip(streams, halves, strict=True):
        with torch.cuda.stream(stream):
            for _ in range(400):
                half += 1
    saver.pause()
    saver.resume()
    assert [float(half.min()) for half in halves] == [400, 400]
    assert [float(half.max()) for half in halves] == [400, 400]


def test_freeing_during_a_pause(saver: TorchMemorySaver, used: Used) -> None:
    before = used()
    with saver.region(enable_cpu_backup=True):
        tensors = [full(256 * MIB, value) for value in range(4)]
    saver.pause()
    del tensors[:2]
    torch.cuda.empty_cache()
    assert saver.allocator.stats().host_used_bytes == 512 * MIB
    saver.resume()
    assert [int(t[-1]) for t in tensors] == [2, 3]
    assert used() - before < 512 * MIB + SLACK
    saver.pause()
    tensors.clear()
    torch.cuda.empty_cache()
    assert saver.allocator.snapshot() == []
    saver.resume()


def test_failed_resume_can_be_repeated(saver: TorchMemorySaver, used: Used) -> None:
    with saver.region(enable_cpu_backup=True):
        kept = full(2 * GIB, 5)
    with saver.region():
        lost = full(2 * GIB, 6)
    saver.pause()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = full(free - 3 * GIB, 1)
    with pytest.raises(cumempool.OutOfMemoryError):
        saver.resume()
    assert saver.allocator.stats().awake_bytes == 0
    del ballast
    saver.resume()
    assert int(kept.sum(dtype=torch.int64)) == 5 * 2 * GIB
    lost.fill_(6)


def test_margin_is_left_free(saver: TorchMemorySaver) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    saver.memory_margin_bytes = free - 2 * GIB
    with saver.region():
        with pytest.raises(torch.OutOfMemoryError):
            full(3 * GIB, 1)
        small = full(GIB, 1)
    saver.memory_margin_bytes = 0
    with saver.region():
        large = full(3 * GIB, 1)
    assert (int(small[-1]), int(large[-1])) == (1, 1)


# ---- regions


def test_disabled_allocations_stay_and_their_memory_goes_back(
    saver: TorchMemorySaver, used: Used
) -> None:
    with saver.region("weights", enable_cpu_backup=True):
        first = full(GIB, 1)
        with saver.disable():
            outside = full(64 * MIB, 2)
        second = full(64 * MIB, 3)
    with pytest.raises(cumempool.NotInPoolError):
        saver.allocator.tag_of(outside)
    assert saver.allocator.tag_of(second) == "weights:pinned"
    saver.pause()
    during = used()
    with saver.disable():
        large = full(2 * GIB, 4)
        assert int(large.sum(dtype=torch.int64)) == 4 * 2 * GIB
        del large
    assert used() - during < SLACK
    assert int(outside.sum(dtype=torch.int64)) == 2 * 64 * MIB
    saver.resume()
    assert int(first.sum(dtype=torch.int64)) == GIB
    assert int(second.sum(dtype=torch.int64)) == 3 * 64 * MIB


def test_pause_inside_an_open_region(saver: TorchMemorySaver) -> None:
    with saver.region("weights", enable_cpu_backup=True):
        first = full(64 * MIB, 1)
        saver.pause("weights")
        second = full(64 * MIB, 2)
        saver.resume("weights")
        assert int(first.sum(dtype=torch.int64)) == 64 * MIB
    assert saver.allocator.tag_of(second) == "weights:pinned"
    assert int(second.sum(dtype=torch.int64)) == 2 * 64 * MIB


def test_regions_of_several_threads(saver: TorchMemorySaver) -> None:
    made: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(4, timeout=60)

    def work(number: int) -> None:
        with saver.region(f"thread_{number}", enable_cpu_backup=True):
            barrier.wait()
            for _ in range(20):
                made[number] = full(8 * MIB, number)
            barrier.wait()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: saver.allocator.tag_of(t) for n, t in made.items()} == {
        n: f"thread_{n}:pinned" for n in range(4)
    }
    saver.pause()
    saver.resume("thread_3")
    saver.resume()
    assert [int(made[n].sum(dtype=torch.int64)) for n in range(4)] == [
        n * 8 * MIB for n in range(4)
    ]


def test_gradients_are_taken_where_a_region_is_for_all_threads(saver: TorchMemorySaver) -> None:
    with saver.region("trainer", enable_cpu_backup=True, all_threads=True):
        model = torch.nn.Linear(1024, 1024, device="cuda")
        model(torch.ones(8, 1024, device="cuda")).sum().backward()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    assert {saver.allocator.tag_of(t) for t in tensors if t is not None} == {"trainer:pinned"}
    expected = [t.detach().cpu() for t in tensors if t is not None]
    saver.pause("trainer")
    saver.resume("trainer")
    found = [t.detach().cpu() for t in tensors if t is not None]
    assert all(map(torch.equal, found, expected))
    assert len(found) == 4


# ---- graphs


class Decoder:
    """A cache that can be paused, and a step over it with a large value in between."""

    def __init__(self, saver: TorchMemorySaver, floats: int = 256 * MIB) -> None:
        self.floats = floats
        with saver.region(tag="kv_cache"):
            self.cache = torch.full((5, 16 * MIB), 1.0, device="cuda")
        self.input = torch.zeros(5, device="cuda")

    def step(self) -> torch.Tensor:
        value = (self.input + self.cache.mean(dim=1)).mean()
        return (torch.ones(self.floats, device="cuda") * value).mean()

    def warm_up(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()

    def replay(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor, value: float) -> float:
        self.input.fill_(value)
        graph.replay()
        return float(output)


def test_graph_replays_after_its_memory_was_paused(saver: TorchMemorySaver, used: Used) -> None:
    decoder = Decoder(saver)
    decoder.warm_up()
    graph = torch.cuda.CUDAGraph()
    with saver.cuda_graph(graph, tag="graph"):
        output = decoder.step()
    assert decoder.replay(graph, output, 100) == pytest.approx(101)
    start = used()
    saver.pause("kv_cache")
    without_cache = used()
    assert start - without_cache >= 5 * 64 * MIB - SLACK
    saver.pause("graph")
    assert without_cache - used() >= GIB
    elsewhere = full(3 * GIB, 9)
    assert int(elsewhere[-1]) == 9
    del elsewhere
    torch.cuda.empty_cache()
    saver.resume("graph")
    saver.resume("kv_cache")
    decoder.cache.fill_(2)
    assert decoder.replay(graph, output, 200) == pytest.approx(202)
    del output
    graph.reset()


def test_graphs_that_name_a_pool_share_its_memory(saver: TorchMemorySaver) -> None:
    decoder = Decoder(saver)
    decoder.warm_up()
    handle = torch.cuda.graph_pool_handle()
    graphs = [torch.cuda.CUDAGraph() for _ in range(3)]
    outputs = []
    for graph in graphs:
        with saver.cuda_graph(cuda_graph=graph, pool=handle, tag="graph"):
            outputs.append(decoder.step())
    held = sum(i.bytes for i in saver.allocator.snapshot() if i.tag.startswith("graph:"))
    assert held < 4 * GIB  # and not three times the 2 GiB of one
    for value in (10.0, 20.0):
        saver.pause()
        assert saver.allocator.stats().awake_bytes == 0
        saver.resume()
        decoder.cache.fill_(1)
        for graph, output in zip(graphs, outputs, strict=True):
            assert decoder.replay(graph, output, value) == pytest.approx(value + 1)
    graph = torch.cuda.CUDAGraph()
    with saver.cuda_graph(graph, pool=handle, tag="graph"):
        output = decoder.step()
        with pytest.raises(cumempool.UnsupportedError), saver.disable():
            pass
    outputs.clear()
    graphs.clear()
    del graph, output
    gc.collect()
    saver.pause("kv_cache")
    torch.cuda.empty_cache()
    assert {info.tag for info in saver.allocator.snapshot()} == {"kv_cache:discarded"}
    saver.resume()


def test_graph_on_a_stream_with_contents_kept(saver: TorchMemorySaver) -> None:
    decoder = Decoder(saver, floats=MIB)
    decoder.warm_up()
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with saver.cuda_graph(
        graph,
        stream=torch.cuda.Stream(),
        capture_error_mode="thread_local",
        tag="graph",
        enable_cpu_backup=True,
    ):
        output = decoder.step()
    with saver.cuda_graph(other, pool=graph.pool(), tag="graph", enable_cpu_backup=True):
        second = decoder.step()
    assert other.pool() == graph.pool()
    assert decoder.replay(graph, output, 4) == pytest.approx(5)
    assert decoder.replay(other, second, 6) == pytest.approx(7)
    saver.pause("graph")
    saver.resume("graph")
    assert float(output) == pytest.approx(5)  # without a replay
    assert decoder.replay(graph, output, 8) == pytest.approx(9)


# ---- programs


class Turns:
    """What a program does with a saver, or without one."""

    def __init__(self, saver: TorchMemorySaver | None) -> None:
        self.saver = saver

    def region(self, tag: str) -> contextlib.AbstractContextManager[None]:
        if self.saver is None:
            return contextlib.nullcontext()
        return self.saver.region(tag, enable_cpu_backup=tag == "trainer")

    def capture(self, graph: torch.cuda.CUDAGraph) -> contextlib.AbstractContextManager[None]:
        if self.saver is None:
            return torch.cuda.graph(graph)
        return self.saver.cuda_graph(graph, tag="engine")

    def switch(self, old: str, new: str) -> None:
        """Has one make room for the other."""
        if self.saver is None:
            return
        self.saver.pause(old)
        self.saver.resume(new)
        infos = self.saver.allocator.snapshot()
        awake = {info.tag.partition(":")[0] for info in infos if info.state == "awake"}
        assert awake == {new}


def train(saver: TorchMemorySaver | None) -> list[float]:
    """Losses of a trainer that takes turns with a captured engine, which gets its weights."""
    torch.manual_seed(0)
    width, turns = 4096, Turns(saver)
    with turns.region("trainer"):
        model = torch.nn.Linear(width, width, device="cuda")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    with turns.region("engine"):
        weight = torch.zeros(width, width, device="cuda")
        prompt = torch.zeros(64, width, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with turns.capture(graph):
        answer = (prompt @ weight.t()).tanh()
    turns.switch("engine", "trainer")
    losses = []
    data = torch.randn(64, width, generator=torch.Generator().manual_seed(1)).cuda()
    answers = data.clone()
    for _ in range(4):
        with turns.region("trainer"):
            loss = (model(data) - answers).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        new_weight = model.weight.detach().clone()
        turns.switch("trainer", "engine")
        weight.copy_(new_weight)
        prompt.copy_(data)
        graph.replay()
        answers = answer.clone()
        turns.switch("engine", "trainer")
    return losses


def test_trainer_and_engine_take_turns_with_equal_losses(saver: TorchMemorySaver) -> None:
    expected = train(None)
    gc.collect()
    torch.cuda.empty_cache()
    assert train(saver) == expected
    assert len(set(expected)) == 4


def test_large_model_pauses_and_gives_the_same_answers(saver: TorchMemorySaver, used: Used) -> None:
    torch.manual_seed(0)
    with saver.region("weights", enable_cpu_backup=True), torch.device("cuda"):
        layers = [torch.nn.Linear(8192, 8192, bias=False, dtype=torch.bfloat16) for _ in range(64)]
    sample = torch.randn(4, 8192, device="cuda", dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        hidden = sample
        with torch.no_grad():
            for layer in layers:
                hidden = torch.nn.functional.layer_norm(layer(hidden), (8192,))
        return hidden

    expected, before = forward(), used()
    for _ in range(2):
        saver.pause("weights")
        assert before - used() >= 8 * GIB - SLACK
        began = time.monotonic()
        saver.resume("weights")
        assert time.monotonic() - began < 60
        assert torch.equal(forward(), expected)


PROGRAM = """
import gc, sys
import torch
from torch_memory_saver import torch_memory_saver, configure_subprocess
from torch_memory_saver.testing_utils import empty_cache, get_and_print_gpu_memory, get_device

def run(hook_mode):
    torch_memory_saver.hook_mode = hook_mode
    device = get_device()
    ordinary = torch.full((10_000_000,), 100, dtype=torch.uint8, device=device)
    with torch_memory_saver.region(tag="weights", enable_cpu_backup=True):
        weights = torch.full((1_000_000_000,), 7, dtype=torch.uint8, device=device)
    with torch_memory_saver.region(tag="kv_cache"):
        cache = torch.full((2_000_000_000,), 8, dtype=torch.uint8, device=device)
    addresses = weights.data_ptr(), cache.data_ptr()
    before = get_and_print_gpu_memory("before")
    torch_memory_saver.pause("kv_cache")
    torch_memory_saver.pause("weights")
    during = get_and_print_gpu_memory("during")
    assert before - during > 2.9e9, (before, during)
    assert torch_memory_saver.get_cpu_backup(weights)[:3].tolist() == [7, 7, 7]
    torch_memory_saver.resume("weights")
    torch_memory_saver.resume("kv_cache")
    after = get_and_print_gpu_memory("after")
    assert after - during > 2.9e9, (during, after)
    assert (weights.data_ptr(), cache.data_ptr()) == addresses
    assert bool((weights == 7).all())
    weights[:1000].sum() * 2
    graph = torch.cuda.CUDAGraph()
    with torch_memory_saver.cuda_graph(graph, tag="graph"):
        total = weights[:1000].sum() * 2
    with torch_memory_saver.disable():
        outside = torch.ones(1000, device=device)
    torch_memory_saver.pause()
    assert float(outside.sum()) == 1000
    torch_memory_saver.resume()
    graph.replay()
    assert int(total) == 14000
    torch_memory_saver.pause()
    empty_cache()
    print("RIGHT", hook_mode, flush=True)
"""

STARTS = {
    "installed": "import cumempool.compat.torch_memory_saver as t\nt.install()\n",
    "path": "",
}


@pytest.mark.parametrize("hook_mode", ["torch", "preload"])
@pytest.mark.parametrize("start", STARTS)
def test_program_under_the_lent_name_ends_while_paused(hook_mode: str, start: str) -> None:
    environment = dict(os.environ)
    if start == "path":
        path = [folder_for_path(), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, "-c", f"{STARTS[start]}{PROGRAM}\nrun({hook_mode!r})"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert f"RIGHT {hook_mode}" in done.stdout
    assert ("nothing is preloaded" in done.stderr) == (hook_mode == "preload"), done.stderr


def test_spawned_process_under_the_lent_name(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "main.py").write_text(
        "import contextlib, multiprocessing, sys\n"
        "import cumempool.compat.torch_memory_saver as stand_in\n"
        "stand_in.install()\n"
        "import torch_memory_saver, program\n"
        "if __name__ == '__main__':\n"
        "    with torch_memory_saver.configure_subprocess():\n"
        "        context = multiprocessing.get_context('spawn')\n"
        "        process = context.Process(target=program.run, args=('preload',))\n"
        "        process.start()\n"
        "    process.join(150)\n"
        "    sys.exit(process.exitcode)\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py")], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert "RIGHT preload" in done.stdout
